//! Files that grow at the source while they are read through a follower's mount.
//!
//! The kernel's page cache cannot follow such a file by itself. A page that a read has filled up to the old end goes on with zeros; whoever
//! has that page in hand and then sees a larger size takes the zeros for data. And a kernel that is answered another size cuts its
//! cache there: it waits for the lock of the page at the new end and clears the rest of it, and by then a read may have filled it with what
//! was appended meanwhile. Nothing tells when it is done. So:
//!
//! - A file that has changed lately is opened past the page cache: what is read of it is what the volume answers.
//! - A file at rest is opened through the page cache. If it grows while it is open so, the kernel is not answered its new size but given
//!   it: after it has forgotten the pages and whoever had one in hand is through with it, the last byte of the file is stored into its
//!   cache, by which the file grows there and nothing is cut. Answers wait for that and then say what the kernel knows already.
//!
//! Invariants:
//! - Where something of the file was announced since the last byte was read the pages are forgotten after it was stored: an older byte
//!   would live on in the cache.
//! - Nothing is kept of a file but while it is open through the page cache.

use std::collections::{HashMap, HashSet};

use parking_lot::Mutex;

use crate::{Handle, Ino};

/// How the kernel may read a file that was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PageCache {
    /// Past it.
    Bypassed,
    /// Through it, and it has nothing of the file yet.
    Fresh,
    /// Through it, with the pages that it has.
    Kept,
}

/// The files that are open through the page cache of a follower's mount.
#[derive(Default)]
pub(super) struct Growth(Mutex<HashMap<Ino, CachedFile>>);

/// One of them.
struct CachedFile {
    handles: HashSet<Handle>,
    /// The last entry that was announced of it when it was opened, with the size that the kernel has.
    since: u64,
    /// The size that the kernel was given last, if it was given one.
    given: Option<u64>,
}

/// A size that the kernel is to be given.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Length {
    /// Of which file.
    pub(super) ino: Ino,
    /// In bytes, at least one.
    pub(super) length: u64,
    /// The byte before its end.
    pub(super) last: u8,
    /// The last entry that was announced of the file before that byte was read.
    pub(super) as_of: u64,
}

impl Growth {
    /// A file is going to be read through the page cache by `handle`; `since` was announced of it last.
    pub(super) fn opened(&self, ino: Ino, handle: Handle, since: u64) {
        let mut files = self.0.lock();
        let file =
            files.entry(ino).or_insert_with(|| CachedFile { handles: HashSet::new(), since, given: None });
        file.handles.insert(handle);
    }

    pub(super) fn closed(&self, ino: Ino, handle: Handle) {
        let mut files = self.0.lock();
        let Some(file) = files.get_mut(&ino) else { return };
        file.handles.remove(&handle);
        if file.handles.is_empty() {
            files.remove(&ino);
        }
    }

    /// Whether the kernel must be given this size before it is answered; a handle to read the last byte with, if so, which is none of
    /// `useless`. `announced` is the last entry that was announced of the file.
    pub(super) fn owed(&self, ino: Ino, length: u64, announced: u64, useless: &[Handle]) -> Option<Handle> {
        let files = self.0.lock();
        let file = files.get(&ino)?;
        let is_owed = length > 0 && announced > file.since && file.given != Some(length);
        file.handles.iter().copied().find(|handle| is_owed && !useless.contains(handle))
    }

    /// The kernel has been given this size.
    pub(super) fn given(&self, length: &Length) {
        if let Some(file) = self.0.lock().get_mut(&length.ino) {
            file.given = Some(length.length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Ino = Ino::new(7);

    /// Only who reads through the page cache can see what it makes of a growing file.
    #[test]
    fn a_size_is_owed_while_a_file_is_open_through_the_page_cache_and_has_changed_since() {
        let growth = Growth::default();
        assert_eq!(growth.owed(FILE, 10, 5, &[]), None, "not open");
        let (one, other) = (Handle(1), Handle(2));
        growth.opened(FILE, one, 5);
        assert_eq!(growth.owed(FILE, 10, 5, &[]), None, "not changed");
        assert_eq!(growth.owed(FILE, 10, 6, &[]), Some(one));
        assert_eq!(growth.owed(FILE, 0, 6, &[]), None, "an empty file has no page");
        growth.opened(FILE, other, 6);
        growth.closed(FILE, one);
        assert_eq!(growth.owed(FILE, 10, 6, &[]), Some(other), "of the first who opened it, changed since");
        growth.given(&Length { ino: FILE, length: 10, last: 1, as_of: 6 });
        assert_eq!(growth.owed(FILE, 10, 7, &[]), None, "given");
        assert_eq!(growth.owed(FILE, 11, 7, &[]), Some(other));
        assert_eq!(growth.owed(FILE, 11, 7, &[other]), None, "nothing else is open");
        growth.closed(FILE, other);
        assert_eq!(growth.owed(FILE, 11, 7, &[]), None);
        assert!(growth.0.lock().is_empty());
    }
}
