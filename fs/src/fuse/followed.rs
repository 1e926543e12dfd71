//! What the threads of a mounted follower share: how far the tree has been shown, how far the kernel has been told, and which answers a
//! change may have overtaken.
//!
//! ```text
//!   the following thread      shows a frame, notes what it changed      (T1, T2)
//!   the invalidator           tells the kernel                          (T3)
//!   a request                 reads the tree, checks, answers
//! ```
//!
//! An answer that was read before T1 must not reach the kernel after T3 unseen, or the kernel would keep what it says for a whole
//! lifetime. A request marks what it speaks of and then looks whether it has changed since the request began: if so it answers with
//! lifetime 0. The invalidator, after T2, looks for marks: what was answered a moment ago may still be on its way inside the
//! kernel, and is told again a second later. Of a mark and a note at least one is seen, because both sides store, fence and load.
//!
//! A file that grows needs more. The kernel fills the page of a short read with zeros; if it learns of the new length before it
//! forgets that page, it shows the zeros as data. So a file's attributes are not answered between the moment at which a change of it is
//! announced, before it is visible, and the moment at which the kernel has forgotten its pages. What it then gets it compares with
//! its own count of invalidations, and asks again. That is not all: see [`super::growth`].
//!
//! All that ends when the node is about to decide itself. From then on the kernel makes every change, and what it is told late of an entry
//! that it did not ask for would undo what it knows better: a page that a local write has filled and not sent yet would be dropped, and a
//! reader would bring the old one back for good; an older last byte would be stored over a newer one. So there is a cut:
//!
//! ```text
//!   followed to the end   ->   told, told again, sent   ->   the cut   ->   the node decides
//! ```
//!
//! Invariants:
//! - No notice of an entry that was followed, and no length of a file, is sent after the cut; what cannot be sent before it within a limit is
//!   not sent at all, and ends caching for good. (One that the kernel has in hand then cannot be taken back.) Only a listing that a request
//!   finds overtaken afterwards is told later: of a directory the kernel keeps nothing that it has not asked for.
//! - Inodes share slots. Sharing costs a superfluous request or notification and never hides one.
//! - The lock is held for moments only: neither requests nor the following thread wait here for anything.

use std::{
    collections::HashSet,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering, fence},
    },
    time::Duration,
};

use murphy_log::{Clock, Entry, LogTime, Lsn};
use parking_lot::{Condvar, Mutex};

use super::{
    growth::{Growth, Length, PageCache},
    kernel::Lifetimes,
    lane::Lane,
    notify::{Notice, has_ended},
};
use crate::{Answer, Attr, ChangeObserver, FileSystem, Handle, Ino, Kind, OpenFlags, Opened, Table};

/// What is shared.
pub(super) struct Followed {
    clock: Arc<dyn Clock>,
    /// The last entry whose changes have been noted.
    noted: AtomicU64,
    /// By slot, the last entry that is going to change something, or has.
    announced: Box<[AtomicU64]>,
    /// By slot, when that was, in milliseconds of `clock`, plus one.
    announced_at: Box<[AtomicU64]>,
    /// The time of the last entry, in nanoseconds of log time.
    time: AtomicU64,
    /// By slot, the last entry that changed something.
    changed: Box<[AtomicU64]>,
    /// By slot, when the last answer was given, in milliseconds of `clock`, plus one.
    answered: Box<[AtomicU64]>,
    /// Nothing is to be cached for a while.
    suspended: AtomicBool,
    suspensions: AtomicU64,
    /// The last entry whose notices are in the lanes.
    told: AtomicU64,
    /// Files may be opened past the page cache.
    may_bypass: AtomicBool,
    /// The node decides by now, or the mount has ended: the kernel is given no length any more.
    is_cut: AtomicBool,
    pub(super) growth: Growth,
    pub(super) names: Lane,
    pub(super) pages: Lane,
    progress: Mutex<Progress>,
    moved: Condvar,
}

/// How far everything is.
pub(super) struct Progress {
    /// The last entry that is visible.
    pub(super) shown: Lsn,
    /// The last entry whose notices are in the lanes.
    pub(super) told: Lsn,
    /// Directories whose listing was overtaken on its way.
    pub(super) relist: HashSet<Ino>,
    /// The mount is gone, or going.
    pub(super) ended: bool,
    /// Some change could not be told, ever.
    pub(super) lost: bool,
    /// Nothing is followed any more.
    pub(super) ending: bool,
    /// All that was followed has been sent to the kernel, and nothing of it comes any more.
    pub(super) cut: bool,
}

impl Followed {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Followed {
        let slots = || (0..SLOTS).map(|_| AtomicU64::new(0)).collect();
        let (shown, told) = (Lsn::ROOT, Lsn::ROOT);
        let relist = HashSet::new();
        let progress = Progress { shown, told, relist, ended: false, lost: false, ending: false, cut: false };
        Followed {
            clock,
            noted: AtomicU64::new(0),
            announced: slots(),
            announced_at: slots(),
            time: AtomicU64::new(0),
            changed: slots(),
            answered: slots(),
            suspended: AtomicBool::new(false),
            suspensions: AtomicU64::new(0),
            told: AtomicU64::new(0),
            may_bypass: AtomicBool::new(false),
            is_cut: AtomicBool::new(false),
            growth: Growth::default(),
            names: Lane::default(),
            pages: Lane::default(),
            progress: Mutex::new(progress),
            moved: Condvar::new(),
        }
    }

    /// Nothing up to `lsn` needs telling: the kernel has seen nothing older.
    pub(super) fn begin(&self, lsn: Lsn) {
        self.told(lsn);
    }

    /// The notices of everything up to `lsn` are in the lanes.
    pub(super) fn told(&self, lsn: Lsn) {
        self.told.store(lsn.get(), Ordering::Release);
        self.update(|progress| progress.told = lsn);
    }

    /// The mount is gone, or going: nobody waits any more.
    pub(super) fn end(&self) {
        self.is_cut.store(true, Ordering::Release);
        self.told.store(u64::MAX, Ordering::Release);
        self.names.end();
        self.pages.end();
        self.update(|progress| progress.ended = true);
    }

    /// Returns when the kernel has been told of everything that was followed, or will not be. For whoever is about to decide; waits at most
    /// `longest`.
    pub(super) fn cut(&self, longest: Duration) {
        self.update(|progress| progress.ending = true);
        if !self.wait(longest, |progress| progress.cut || progress.ended) {
            self.lose("it does not take what was followed before this node decides");
            self.end();
        }
    }

    /// Sees everything that is in the lanes on its way, and takes no more for the pages. For the thread that fills the lanes, once it has
    /// nothing more to tell of what was followed.
    pub(super) fn see_through(&self) {
        self.pages.close();
        if self.pages.wait_sent(CUT_MAX) && self.names.wait_sent(CUT_MAX) {
            self.is_cut.store(true, Ordering::Release);
            if !self.update(|progress| std::mem::replace(&mut progress.cut, true) || progress.lost) {
                self.resume();
            }
        }
    }

    /// The kernel lets files be opened past its page cache, and mapped nevertheless.
    pub(super) fn allow_bypass(&self, may_bypass: bool) {
        self.may_bypass.store(may_bypass, Ordering::Relaxed);
    }

    /// The last entry that was announced of `ino`, or of another inode in its slot.
    fn announced(&self, ino: Ino) -> u64 {
        self.announced[slot(ino)].load(Ordering::Acquire)
    }

    /// Whether the kernel may be shown the length of a file as it is now: it has forgotten every page that was read before, and knows the
    /// length already if somebody reads through its pages.
    fn is_settled(&self, attr: &Attr) -> bool {
        let announced = self.announced(attr.ino);
        announced == 0
            || (self.told.load(Ordering::Acquire) >= announced
                && !self.pages.owes(&Notice::Data(attr.ino))
                && self.owed(attr, &[]).is_none())
    }

    /// A handle to read the last byte of a file with, none of `useless`, if the kernel must be given its length before it is answered.
    fn owed(&self, attr: &Attr, useless: &[Handle]) -> Option<Handle> {
        if self.is_cut.load(Ordering::Acquire) {
            return None;
        }
        self.growth.owed(attr.ino, attr.size, self.announced(attr.ino), useless)
    }

    /// Returns when the kernel may be shown these lengths. What changes after the call is not waited for.
    async fn settle(&self, fs: &Arc<dyn FileSystem>, attrs: &[Attr]) {
        let announced = attrs.iter().map(|attr| self.announced(attr.ino)).max().unwrap_or(0);
        while self.told.load(Ordering::Acquire) < announced {
            tokio::time::sleep(SETTLE_POLL).await;
        }
        let added = self.pages.added();
        let owes = |attr: &Attr| self.pages.owes(&Notice::Data(attr.ino));
        while attrs.iter().any(owes) && !self.pages.has_sent(added) {
            tokio::time::sleep(SETTLE_POLL).await;
        }
        if attrs.iter().all(|attr| self.owed(attr, &[]).is_none()) {
            return;
        }
        tokio::time::sleep(PAGE_IN_HAND).await;
        for attr in attrs {
            self.lengthen(fs, attr).await;
        }
    }

    /// Gives the kernel the length of a file, if it must be. A handle may be closed meanwhile; what cannot be read through any need not be
    /// shown.
    async fn lengthen(&self, fs: &Arc<dyn FileSystem>, attr: &Attr) {
        let mut useless = Vec::new();
        while let Some(handle) = self.owed(attr, &useless) {
            let (ino, length, as_of) = (attr.ino, attr.size, self.announced(attr.ino));
            let last = fs.read(ino, handle, length - 1, 1).wait().await;
            let Some(last) = last.ok().and_then(|bytes| bytes.first().copied()) else {
                useless.push(handle);
                continue;
            };
            let notice = Notice::Length(Length { ino, length, last, as_of });
            if self.pages.push_now(notice.clone()).is_err() {
                return;
            }
            while self.pages.owes(&notice) {
                tokio::time::sleep(SETTLE_POLL).await;
            }
        }
    }

    /// Sends a notice. Pages into which a last byte was stored that may be another one by now are forgotten at once; what is announced
    /// after that was asked is forgotten by a later notice of the same lane.
    pub(super) fn send(&self, notice: &Notice, send: impl Fn(&Notice) -> io::Result<()>) -> io::Result<()> {
        let Notice::Length(length) = notice else { return send(notice) };
        let sent = send(notice);
        self.growth.given(length);
        match sent {
            Err(error) if !has_ended(&error) => {
                tracing::warn!(?length, %error, "the kernel does not take the length of a file; it is answered");
            }
            sent => sent?,
        }
        if self.announced(length.ino) == length.as_of { Ok(()) } else { send(&Notice::Data(length.ino)) }
    }

    /// Whether a file has changed so lately that it may be about to change again. Inodes share slots, so the file itself is asked too.
    fn is_restless(&self, fs: &Arc<dyn FileSystem>, ino: Ino) -> bool {
        let mark = self.announced_at[slot(ino)].load(Ordering::Relaxed);
        let rest = REST.as_millis() as u64;
        if mark == 0 || millis(self.now()).saturating_sub(mark - 1) >= rest {
            return false;
        }
        let time = self.time.load(Ordering::Relaxed).saturating_sub(REST.as_nanos() as u64);
        match fs.getattr(ino) {
            Answer::Now(Ok(attr)) => attr.ctime >= LogTime::from_nanos(time).into(),
            Answer::Now(Err(_)) | Answer::Later(_) => true,
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.clock.monotonic()
    }

    /// Changes the progress and wakes whoever waits for some.
    pub(super) fn update<T>(&self, change: impl FnOnce(&mut Progress) -> T) -> T {
        let result = change(&mut self.progress.lock());
        self.moved.notify_all();
        result
    }

    /// Waits at most `timeout` until `is_it` holds, and says whether it does.
    pub(super) fn wait(&self, timeout: Duration, is_it: impl Fn(&Progress) -> bool) -> bool {
        let mut progress = self.progress.lock();
        self.moved.wait_while_for(&mut progress, |progress| !is_it(progress), timeout);
        is_it(&progress)
    }

    /// Whether something about `ino` was answered so lately that the answer may still be on its way.
    pub(super) fn recently_answered(&self, ino: Ino) -> bool {
        fence(Ordering::SeqCst);
        let mark = self.answered[slot(ino)].load(Ordering::Relaxed);
        mark > 0 && millis(self.now()).saturating_sub(mark - 1) < ANSWER_TRAVELS.as_millis() as u64
    }

    /// Marks an answer about `ino`, and says whether it has changed since the entry `since` was noted.
    fn overtaken(&self, ino: Ino, since: u64) -> bool {
        self.answered[slot(ino)].store(millis(self.now()) + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.changed[slot(ino)].load(Ordering::Relaxed) > since
    }

    /// Lets the kernel cache nothing more for a while, and says so.
    pub(super) fn suspend(&self, reason: &str) {
        if !self.suspended.swap(true, Ordering::Relaxed) {
            self.suspensions.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                reason,
                "the kernel's caches are late; until it has caught up it caches nothing new"
            );
        }
    }

    /// Lets the kernel cache again.
    pub(super) fn resume(&self) {
        if self.suspended.swap(false, Ordering::Relaxed) {
            tracing::info!("the kernel's caches are up to date again");
        }
    }

    pub(super) fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Relaxed)
    }

    /// How often caching was suspended.
    pub(super) fn suspensions(&self) -> u64 {
        self.suspensions.load(Ordering::Relaxed)
    }

    /// Changes that cannot be told any more: caching ends for good, and what the kernel has may be wrong until its lifetime ends.
    pub(super) fn lose(&self, reason: &str) {
        if !self.update(|progress| std::mem::replace(&mut progress.lost, true)) {
            tracing::error!(
                reason,
                "the kernel was not told of all changes; mount again to be sure of what it shows"
            );
        }
        self.suspend(reason);
    }
}

impl ChangeObserver for Followed {
    fn changing(&self, entries: &[Entry]) {
        if let Some(last) = entries.last() {
            self.time.store(last.time.as_nanos(), Ordering::Relaxed);
        }
        let now = millis(self.now()) + 1;
        for (slot, lsn) in changed_slots(entries) {
            self.announced_at[slot].store(now, Ordering::Relaxed);
            self.announced[slot].store(lsn.get(), Ordering::Release);
        }
    }

    fn changed(&self, entries: &[Entry]) {
        let Some(last) = entries.last().map(|entry| entry.lsn) else { return };
        for (slot, lsn) in changed_slots(entries) {
            self.changed[slot].store(lsn.get(), Ordering::Release);
        }
        self.noted.store(last.get(), Ordering::Release);
        let behind = self.update(|progress| {
            progress.shown = last;
            last.since(progress.told)
        });
        if behind > BEHIND_MAX {
            self.suspend("changes come faster than the kernel can be told");
        }
    }

    fn about_to_lead(&self) {
        self.cut(CUT_MAX);
    }
}

/// The slots of what entries change.
fn changed_slots(entries: &[Entry]) -> impl Iterator<Item = (usize, Lsn)> {
    entries.iter().flat_map(|entry| {
        let changes = entry.changes.iter().filter(|change| is_cached(change.table));
        let numbers = changes.filter_map(|change| change.key.first_chunk().copied().map(u64::from_be_bytes));
        numbers.map(|number| (slot(Ino::new(number)), entry.lsn))
    })
}

/// A request under way, and what the kernel may remember of its answer.
pub(super) struct Watch {
    followed: Option<Arc<Followed>>,
    since: u64,
    lifetimes: Lifetimes,
    held: Vec<Attr>,
}

impl Watch {
    /// Begins a request, before it reads the tree. Without `followed` nothing changes but through this mount.
    pub(super) fn begin(followed: Option<&Arc<Followed>>, lifetimes: Lifetimes) -> Watch {
        let since = followed.map_or(0, |followed| followed.noted.load(Ordering::Acquire));
        let suspended = followed.is_some_and(|followed| followed.is_suspended());
        let lifetimes = if suspended { Lifetimes::NONE } else { lifetimes };
        Watch { followed: followed.cloned(), since, lifetimes, held: Vec::new() }
    }

    /// The lifetimes of an answer that the kernel itself keeps apart from what overtakes it.
    pub(super) fn asked(&self) -> Lifetimes {
        self.lifetimes
    }

    /// How the kernel may read a file that was opened. Where all changes go through this mount the kernel keeps its pages: dropping one that
    /// a write has filled and not sent yet would let a reader bring the old one back, which then stays. While it is told of changes
    /// late, or was not told of some, it must not keep pages because the file looks the same as when it was last opened.
    pub(super) fn opened(
        &self,
        fs: &Arc<dyn FileSystem>,
        ino: Ino,
        flags: OpenFlags,
        opened: Opened,
    ) -> PageCache {
        let mut trusted = true;
        if let Some(followed) = &self.followed {
            let announced = followed.announced(ino);
            if !flags.write && followed.may_bypass.load(Ordering::Relaxed) && followed.is_restless(fs, ino) {
                return PageCache::Bypassed;
            }
            followed.growth.opened(ino, opened.handle, announced.min(self.since));
            trusted = !followed.is_suspended();
        }
        if (opened.unchanged || opened.decides) && trusted { PageCache::Kept } else { PageCache::Fresh }
    }

    /// For how long an answer may be kept that speaks of `child`, if it is there, by its name in `parent`. To be asked when the tree
    /// has been read and before the answer is given.
    pub(super) fn lifetimes(&self, parent: Ino, child: Option<Ino>) -> Lifetimes {
        let Some(followed) = &self.followed else { return self.lifetimes };
        let parent = followed.overtaken(parent, self.since);
        let child = child.is_some_and(|child| followed.overtaken(child, self.since));
        if parent || child { Lifetimes::NONE } else { self.lifetimes }
    }

    /// Whether the attributes of a file may be answered now. If not, [`Watch::settle`] first.
    pub(super) fn is_settled(&self, attr: &Attr) -> bool {
        attr.kind != Kind::File || self.followed.as_ref().is_none_or(|followed| followed.is_settled(attr))
    }

    /// Notes that the answer has these attributes, and must wait if they may not be answered now.
    pub(super) fn hold_for(&mut self, attr: &Attr) {
        if !self.is_settled(attr) {
            self.held.push(*attr);
        }
    }

    /// What the answer must wait for.
    pub(super) fn held(&mut self) -> Vec<Attr> {
        std::mem::take(&mut self.held)
    }

    /// Waits, but not for ever, until the kernel may be shown these attributes.
    pub(super) async fn settle(&self, fs: &Arc<dyn FileSystem>, attrs: &[Attr]) {
        let Some(followed) = &self.followed else { return };
        if tokio::time::timeout(SETTLE_MAX, followed.settle(fs, attrs)).await.is_err() {
            tracing::debug!("the kernel is answered attributes before it has forgotten the pages");
        }
    }

    /// A listing of `directory` is about to be given: it has no lifetime, so that one that was overtaken is invalidated later.
    pub(super) fn listed(&self, directory: Ino) {
        let Some(followed) = &self.followed else { return };
        if followed.overtaken(directory, self.since) {
            let has_room = followed.update(|progress| {
                let has_room = progress.relist.len() < RELIST_MAX;
                if has_room {
                    progress.relist.insert(directory);
                }
                has_room
            });
            if !has_room {
                followed.lose("too many listings were overtaken");
            }
        }
    }
}

/// Whether what the kernel caches can come from a row of this table.
pub(super) fn is_cached(table: u8) -> bool {
    let table = Table::from_number(table);
    matches!(table, Some(Table::Inode | Table::Directory | Table::Dentry | Table::Extent))
}

fn slot(ino: Ino) -> usize {
    (ino.get().wrapping_mul(GOLDEN) >> (64 - SLOT_BITS)) as usize
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX - 1)
}

const SLOT_BITS: u32 = 12;
/// Slots that inodes share: 64 KiB in all.
const SLOTS: usize = 1 << SLOT_BITS;
/// Spreads neighbouring inode numbers over the slots: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
/// How long an answer may take from its check to the kernel's cache.
const ANSWER_TRAVELS: Duration = Duration::from_secs(1);
/// Caching is suspended while the kernel has not been told of more entries than this.
const BEHIND_MAX: u64 = 1 << 16;
/// The longest that attributes are held back. Then a read of the file hangs, and they are shown: better than no answer.
const SETTLE_MAX: Duration = Duration::from_secs(1);
const SETTLE_POLL: Duration = Duration::from_millis(1);
/// So long a node that is about to decide waits for its own kernel, which may wait for reads that hang.
const CUT_MAX: Duration = Duration::from_secs(20);
/// Who has found a page in the cache has looked at the file's size after so long: a few instructions, and the wait for a processor.
const PAGE_IN_HAND: Duration = Duration::from_millis(50);
/// A file that has not changed for so long is at rest. Bytes are younger than that when the source sends them, unless it was told to wait.
const REST: Duration = Duration::from_secs(15);
/// Overtaken listings that wait to be invalidated at most.
const RELIST_MAX: usize = 1 << 16;

#[cfg(test)]
mod tests;
