//! How commands reach the process that serves a node: a unix socket in the node's directory, JSON line by line.
//!
//! ```text
//!   <- {"murphy":0}                                               the version, at once; "passing":true from one that is about to end
//!   -> {"request":"flush"}
//!   <- {"progress":{"what":"flushing","done":0,"total":4096}}      any number
//!   <- {"item":...}                                                any number
//!   <- {"bytes":4096} and so many bytes, as they are                any number
//!   <- {"done":...}  or  {"failed":{"message":...}}                one, the last
//! ```
//!
//! Invariants:
//! - Whoever may enter the directory (mode 0700) may give orders; nothing else is asked.
//! - A socket that nobody answers is left from a process that is gone; whoever holds the node's lock replaces it.

mod client;
mod interrupted;
mod lasting;
mod server;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use murphy_log::NodeId;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::{error::CliError, mirrors::PromoteOrder, progress::Progress, settings::Ack, tree::TreeRequest};
pub(crate) use client::Control;
pub(crate) use interrupted::leave_to_the_server;
pub(crate) use lasting::{ask_lasting, connect_lasting};
pub(crate) use server::{ControlServer, Handler, Replies};

/// What can be asked of a running node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// A [`Status`](crate::status::Status).
    Status,
    /// Makes everything durable at the volume's level.
    Flush,
    /// Mounts the node's volume, which is mounted nowhere yet.
    Mount(MountRequest),
    /// Makes everything durable and unmounts.
    Unmount {
        /// The mount point, without links.
        path: PathBuf,
    },
    /// Writes the tree of now into a file, or into the answer.
    Dump {
        /// A new file; whoever asks gets the bytes if there is none.
        path: Option<PathBuf>,
    },
    /// Makes an archive and ships to it from now on.
    ArchiveAdd {
        /// Where, with the options that this node needs.
        url: String,
        /// Whether it holds no packs.
        log_only: bool,
    },
    /// Ships to an archive no longer; what it holds stays.
    ArchiveRemove(ArchiveRemoval),
    /// Takes a snapshot of now.
    ArchiveSnapshot {
        /// Into which archive; all if that is not said.
        url: Option<String>,
    },
    /// Makes a token that a new node joins with.
    Invite {
        /// What it may do.
        role: String,
        /// Where it reaches this node; by default where this node listens.
        addresses: Vec<String>,
        /// For how long, in seconds.
        expires_secs: u64,
    },
    /// Every member, as items.
    Members,
    /// Takes members out of the volume, one after the other; each that is out is an item.
    MemberRemove(MemberRemoval),
    /// What an fsync waits for; changes it if a level is given.
    Ack(AckOrder),
    /// Makes a mirror the source, or says what that would cost.
    Promote(PromoteOrder),
    /// The entries from here on, some at a time; waits a moment if there is none yet.
    Entries {
        /// The first LSN; the first that is there if that is not said.
        from: Option<u64>,
    },
    /// Reads or changes files through the library, where nothing can be mounted.
    Tree(TreeRequest),
    /// Checks the node; findings are items.
    Fsck {
        /// Whether packs are read too.
        data: bool,
    },
}

impl Request {
    /// Whether it appends to the log.
    pub(crate) fn changes(&self) -> bool {
        matches!(
            self,
            Request::ArchiveAdd { .. }
                | Request::ArchiveRemove(ArchiveRemoval { dry_run: false, .. })
                | Request::MemberRemove(MemberRemoval { dry_run: false, .. })
                | Request::Ack(AckOrder { level: Some(_), dry_run: false, .. })
        )
    }

    /// Whether a process that is about to end takes it: it promises nothing that has to outlast the process.
    pub(crate) fn outlives_nobody(&self) -> bool {
        match self {
            Request::Status
            | Request::Flush
            | Request::Members
            | Request::Fsck { .. }
            | Request::Entries { .. }
            | Request::Dump { .. }
            | Request::Ack(AckOrder { level: None, .. } | AckOrder { dry_run: true, .. })
            | Request::Promote(PromoteOrder { dry_run: true, .. }) => true,
            Request::Mount(_)
            | Request::Unmount { .. }
            | Request::ArchiveAdd { .. }
            | Request::ArchiveRemove { .. }
            | Request::ArchiveSnapshot { .. }
            | Request::Invite { .. }
            | Request::MemberRemove { .. }
            | Request::Ack(_)
            | Request::Promote(_)
            | Request::Tree(_) => false,
        }
    }

    /// Whether it shows the node, and neither changes it nor passes on what it holds.
    pub(crate) fn only_looks(&self) -> bool {
        matches!(
            self,
            Request::Status
                | Request::Members
                | Request::Invite { .. }
                | Request::ArchiveRemove(ArchiveRemoval { dry_run: true, .. })
                | Request::MemberRemove(MemberRemoval { dry_run: true, .. })
                | Request::Ack(AckOrder { level: None, .. } | AckOrder { dry_run: true, .. })
        )
    }

    /// The members that it gives up, with what only they hold.
    pub(crate) fn given_up(&self) -> BTreeSet<NodeId> {
        match self {
            // What is not an id is refused before anything is removed.
            Request::MemberRemove(MemberRemoval { nodes, assume_lost: true, dry_run: false, .. }) => {
                nodes.iter().filter_map(|node| node.parse().ok()).collect()
            }
            _ => BTreeSet::new(),
        }
    }
}

/// An archive that is to be shipped to no longer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ArchiveRemoval {
    /// Which.
    pub(crate) url: String,
    /// Whether nobody waits for it any more, and what only it holds is given up.
    pub(crate) assume_lost: bool,
    /// Only say what would be given up.
    pub(crate) dry_run: bool,
    /// Whether it was said what is given up, and people agreed.
    pub(crate) confirmed: bool,
}

/// Members that are to be taken out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct MemberRemoval {
    /// Their ids.
    pub(crate) nodes: Vec<String>,
    /// Whether what only they have acknowledged is given up.
    pub(crate) assume_lost: bool,
    /// Only say what would be given up.
    pub(crate) dry_run: bool,
    /// Whether it was said what is given up, and people agreed.
    pub(crate) confirmed: bool,
}

/// What an fsync is to wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct AckOrder {
    /// Only shown if there is none.
    pub(crate) level: Option<Ack>,
    /// Only say what it would change.
    pub(crate) dry_run: bool,
    /// Whether it was said that less is promised then, and people agreed.
    pub(crate) confirmed: bool,
}

/// A mount that is wanted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct MountRequest {
    /// Where.
    pub(crate) path: PathBuf,
    /// The kernel refuses changes.
    pub(crate) read_only: bool,
    /// Other users may enter, as permissions allow.
    pub(crate) allow_other: bool,
}

/// What the process that serves a node says first: a connection alone may be to one that is just ending.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Greeting {
    murphy: u32,
    /// It is just beginning, or about to end: orders are taken by whoever answers in a moment.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    passing: bool,
}

/// A line of an answer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Progress(Progress),
    Item(serde_json::Value),
    /// So many bytes follow, as they are.
    Bytes(u64),
    Done(serde_json::Value),
    Failed(CliError),
}

/// Calls `with` with a path to the socket in `directory` that is short however long the directory's own path is: a socket's address has
/// room for 107 bytes.
fn at_socket<T>(directory: &Path, with: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = rustix::fs::open(directory, flags, Mode::empty())?;
    let short = format!("/proc/self/fd/{}/{SOCKET}", std::os::fd::AsRawFd::as_raw_fd(&open));
    with(Path::new(&short))
}

const VERSION: u32 = 0;
const SOCKET: &str = "control.sock";
/// A longer line is not one of ours.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// So many bytes are sent behind a line at most.
const BYTES_MAX: usize = 4 << 20;
