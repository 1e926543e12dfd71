//! How many requests of each kind the kernel has sent.
//!
//! Invariants:
//! - Counting is one relaxed atomic addition: a count is exact once the requests that it counts have been answered.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

macro_rules! request_kinds {
    ($($kind:ident => $name:literal,)*) => {
        /// A kind of request that the kernel sends.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[expect(missing_docs, reason = "the names are those of the FUSE protocol")]
        pub enum RequestKind {
            $($kind,)*
        }

        impl RequestKind {
            /// Every kind.
            pub const ALL: &[RequestKind] = &[$(RequestKind::$kind,)*];

            /// Its name in lower case.
            pub const fn name(self) -> &'static str {
                match self {
                    $(RequestKind::$kind => $name,)*
                }
            }
        }

        /// The number of kinds.
        const KINDS: usize = RequestKind::ALL.len();
    };
}

request_kinds! {
    Lookup => "lookup",
    Forget => "forget",
    Getattr => "getattr",
    Setattr => "setattr",
    Readlink => "readlink",
    Mknod => "mknod",
    Mkdir => "mkdir",
    Symlink => "symlink",
    Link => "link",
    Unlink => "unlink",
    Rmdir => "rmdir",
    Rename => "rename",
    Create => "create",
    Open => "open",
    Read => "read",
    Write => "write",
    Flush => "flush",
    Fsync => "fsync",
    Release => "release",
    Opendir => "opendir",
    Readdir => "readdir",
    Readdirplus => "readdirplus",
    Fsyncdir => "fsyncdir",
    Setxattr => "setxattr",
    Getxattr => "getxattr",
    Listxattr => "listxattr",
    Removexattr => "removexattr",
    Statfs => "statfs",
    Unsupported => "unsupported",
}

/// Counters that request threads add to.
#[derive(Debug, Default)]
pub struct RequestCounters([AtomicU64; KINDS]);

impl RequestCounters {
    /// Counts one request.
    pub fn add(&self, kind: RequestKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts so far.
    pub fn snapshot(&self) -> RequestCounts {
        RequestCounts(std::array::from_fn(|kind| self.0[kind].load(Ordering::Relaxed)))
    }
}

/// Requests per kind, since the mount or between two moments.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RequestCounts([u64; KINDS]);

impl RequestCounts {
    /// How many requests of this kind.
    pub fn get(&self, kind: RequestKind) -> u64 {
        self.0[kind as usize]
    }

    /// How many requests of all kinds. One forgotten inode counts as one request.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// What came after `earlier` was taken.
    #[must_use]
    pub fn since(&self, earlier: &RequestCounts) -> RequestCounts {
        RequestCounts(std::array::from_fn(|kind| self.0[kind].saturating_sub(earlier.0[kind])))
    }

    /// The kinds that came at least once, with their counts.
    pub fn seen(&self) -> impl Iterator<Item = (RequestKind, u64)> + '_ {
        RequestKind::ALL.iter().map(|kind| (*kind, self.get(*kind))).filter(|(_, count)| *count > 0)
    }
}

impl fmt::Display for RequestCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (kind, count) in self.seen() {
            write!(f, "{separator}{} {count}", kind.name())?;
            separator = ", ";
        }
        if separator.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_between_two_moments_leave_out_what_was_before() {
        let counters = RequestCounters::default();
        counters.add(RequestKind::Lookup);
        let before = counters.snapshot();
        counters.add(RequestKind::Create);
        counters.add(RequestKind::Create);
        let between = counters.snapshot().since(&before);
        assert_eq!(between.get(RequestKind::Lookup), 0);
        assert_eq!(between.total(), 2);
        assert_eq!(between.to_string(), "create 2");
        assert_eq!(RequestCounts::default().to_string(), "none");
    }
}
