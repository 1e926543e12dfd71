//! Decide: from the rows of the tree and a request, the rows that an entry writes, or a refusal.
//!
//! Deciding is pure: it reads rows through [`Rows`], is given the moment, and touches nothing. Rows that are not in memory make it
//! return [`Refusal::Need`]; the caller loads them outside the critical section and asks again. What names many rows asks for all of
//! them at once: how often an entry is decided does not grow with it.
//!
//! Invariants:
//! - What was decided applies without reading anything: every change is a whole row.
//! - The old row of every change is known, so that the digest can be kept up.
//! - Equal rows, moment and request give an equal decision.

mod attr;
mod create;
mod data;
mod draft;
mod genesis;
mod link;
mod member;
mod names;
mod packs;
mod remove;
mod rename;
#[cfg(test)]
mod tests;
mod xattr;

use murphy_log::{LogTime, Lsn};

use crate::{Errno, Ino, RowKey};

pub(crate) use attr::{DropPrivilege, SetAttributes, capability_key, loses_mode_bits};
pub(crate) use create::{MakeDirectory, MakeNode, MakeSymlink, NewInode};
pub(crate) use data::{FILE_MAX, PackUse, Piece, Store, Truncate};
pub(crate) use draft::{Decided, Draft};
pub(crate) use genesis::{BeginSession, ChangeSettings, Genesis};
pub(crate) use link::MakeLink;
pub(crate) use member::ChangeMembers;
pub(crate) use names::{PlacedName, find};
pub(crate) use packs::RecordPacks;
pub use packs::{PACKS_PER_ENTRY, PackNews};
pub(crate) use remove::{Fate, PURGE_BATCH, Purge, RemoveDirectory, Unlink, Victim};
pub(crate) use rename::Rename;
pub(crate) use xattr::{RemoveXattr, SetXattr, check_namespace};

/// Where deciding reads rows: the newest of each.
pub(crate) trait Rows {
    /// The newest row at `key`, as far as memory knows.
    fn newest(&self, key: &RowKey) -> RowState;

    /// The key of one further link of `ino`, if the caller was asked for it before. It may be out of date.
    fn link_hint(&self, ino: Ino) -> Option<RowKey>;
}

/// What memory knows of a row.
#[derive(Clone, Debug)]
pub(crate) enum RowState {
    /// It is this, or it is known not to exist.
    Known(Option<bytes::Bytes>),
    /// It is not in memory.
    Unknown,
}

/// When an entry is decided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// The LSN that the entry will have.
    pub(crate) lsn: Lsn,
    /// Log time.
    pub(crate) time: LogTime,
    /// The number of the epoch.
    pub(crate) epoch: u32,
}

/// Why there is no decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The request fails.
    Errno(Errno),
    /// These rows are needed and not in memory.
    Need(Vec<RowKey>),
    /// The key of a further link of this inode is needed.
    NeedLink(Ino),
    /// What the caller prepared does not fit the rows any more; prepare again.
    Stale,
    /// A row of the tree cannot be read.
    Damaged(RowKey),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Refusal {
        Refusal::Errno(errno)
    }
}

/// A request that an entry can answer.
pub(crate) trait Operation {
    /// What the caller gets.
    type Reply;
    /// Which operation the entry says it was.
    const KIND: EntryKind;

    /// Reads rows from `draft` and writes the changes into it. A reply with no change makes no entry.
    fn decide(&self, draft: &mut Draft<'_>) -> Result<Self::Reply, Refusal>;

    /// A row that deciding will ask for and that memory seldom has, such as the one of a name that is about to be new: loaded before,
    /// it spares the decision that would only find out that it is missing.
    fn foreseen(&self) -> Option<RowKey> {
        None
    }
}

/// The kinds of entries. A number never changes its meaning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum EntryKind {
    /// Nothing happened: the source is alive.
    Tick = murphy_log::KIND_TICK,
    /// The volume was formatted.
    Genesis = 1,
    /// A directory was made.
    Mkdir = 2,
    /// A file, pipe, socket or device was made.
    Mknod = 3,
    /// A symbolic link was made.
    Symlink = 4,
    /// A name was added to an inode.
    Link = 5,
    /// A name was removed.
    Unlink = 6,
    /// A directory was removed.
    Rmdir = 7,
    /// A name was moved.
    Rename = 8,
    /// Attributes were changed.
    Setattr = 9,
    /// File data was stored.
    Write = 10,
    /// A file's length was changed.
    Truncate = 11,
    /// An extended attribute was set.
    Setxattr = 12,
    /// An extended attribute was removed.
    Removexattr = 13,
    /// An orphan, or a part of it, was removed.
    Purge = 14,
    /// A process began to decide.
    Session = 15,
    /// A shared setting was changed.
    Setting = 16,
    /// A member joined, changed its role or was revoked.
    Member = 17,
    /// Packs were lost with a source, or found again.
    Packs = 18,
}

impl EntryKind {
    /// Every kind.
    pub const ALL: [EntryKind; 19] = [
        EntryKind::Tick,
        EntryKind::Genesis,
        EntryKind::Mkdir,
        EntryKind::Mknod,
        EntryKind::Symlink,
        EntryKind::Link,
        EntryKind::Unlink,
        EntryKind::Rmdir,
        EntryKind::Rename,
        EntryKind::Setattr,
        EntryKind::Write,
        EntryKind::Truncate,
        EntryKind::Setxattr,
        EntryKind::Removexattr,
        EntryKind::Purge,
        EntryKind::Session,
        EntryKind::Setting,
        EntryKind::Member,
        EntryKind::Packs,
    ];

    /// The kind with this number.
    pub fn from_number(number: u8) -> Option<EntryKind> {
        EntryKind::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// The word for it in `log` and `subscribe`.
    pub const fn word(self) -> &'static str {
        match self {
            EntryKind::Tick => "tick",
            EntryKind::Genesis => "genesis",
            EntryKind::Mkdir => "mkdir",
            EntryKind::Mknod => "mknod",
            EntryKind::Symlink => "symlink",
            EntryKind::Link => "link",
            EntryKind::Unlink => "unlink",
            EntryKind::Rmdir => "rmdir",
            EntryKind::Rename => "rename",
            EntryKind::Setattr => "setattr",
            EntryKind::Write => "write",
            EntryKind::Truncate => "truncate",
            EntryKind::Setxattr => "setxattr",
            EntryKind::Removexattr => "removexattr",
            EntryKind::Purge => "purge",
            EntryKind::Session => "session",
            EntryKind::Setting => "setting",
            EntryKind::Member => "member",
            EntryKind::Packs => "packs",
        }
    }
}
