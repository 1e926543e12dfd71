//! Murphy's file system: the tree, decided entry by entry, and the bytes that it names.
//!
//! [`FileSystem`] is the way in; [`Name`], [`Ino`], [`Attr`] and [`Errno`] are its words.

mod attr;
mod errno;
mod file_system;
mod ino;
mod name;

pub use attr::{Attr, DIRECTORY_BYTES, Kind, SetAttr, SetTime, StatFs, Timespec};
pub use errno::Errno;
pub use file_system::{
    Answer, Caller, DirEntry, DirEntryPlus, FileSystem, Handle, NewNode, OpenFlags, Opened, RenameMode,
    XattrMode,
};
pub use ino::Ino;
pub use name::{NAME_MAX, Name, XattrName};
