//! The rows of the tree: what each table's values hold, packed by hand.
//!
//! Numbers are varints (LEB128) unless their own LSN may stand there: inode numbers in dentries take eight bytes, times nine, so that
//! an entry can replace them by one byte.
//!
//! Invariants:
//! - The first byte of a value is the version of its layout.
//! - Encoding is canonical: equal rows have equal bytes, and decoding refuses trailing bytes. The digest depends on it.
//! - A row knows nothing of views, overlays or operations.

mod codec;
mod dentry;
mod extent;
#[cfg(test)]
mod golden;
mod inode;
mod member;
mod other;

pub use codec::RowError;
pub use dentry::{Cookie, DentryRow, NameHasher, SLOTS};
pub use extent::{Extent, ExtentRow, ExtentTarget, SLOT_BYTES};
pub use inode::{DirectoryRow, InodeRow};
pub use member::{MEMBER_ADDRESSES, MEMBER_NAME_BYTES, MemberRole, MemberRow, MemberState, UnknownRole};
pub use other::{OrphanRow, PackNumber, PackRow, PackState, SessionRow, SettingRow, SymlinkRow, XattrRow};
