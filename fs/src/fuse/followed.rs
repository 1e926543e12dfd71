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
//! its own count of invalidations, and asks again.
//!
//! Invariants:
//! - Inodes share slots. Sharing costs a superfluous request or notification and never hides one.
//! - The lock is held for moments only: neither requests nor the following thread wait here for anything.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering, fence},
    },
    time::Duration,
};

use murphy_log::{Clock, Entry, Lsn};
use parking_lot::{Condvar, Mutex};

use super::{invalidate::Lane, kernel::Lifetimes, notify::Notice};
use crate::{Attr, ChangeObserver, Ino, Kind, Opened, Table};

/// What is shared.
pub(super) struct Followed {
    clock: Arc<dyn Clock>,
    /// The last entry whose changes have been noted.
    noted: AtomicU64,
    /// By slot, the last entry that is going to change something, or has.
    announced: Box<[AtomicU64]>,
    /// By slot, the last entry that changed something.
    changed: Box<[AtomicU64]>,
    /// By slot, when the last answer was given, in milliseconds of `clock`, plus one.
    answered: Box<[AtomicU64]>,
    /// Nothing is to be cached for a while.
    suspended: AtomicBool,
    suspensions: AtomicU64,
    /// The last entry whose notices are in the lanes.
    told: AtomicU64,
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
}

impl Followed {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Followed {
        let slots = || (0..SLOTS).map(|_| AtomicU64::new(0)).collect();
        let (shown, told) = (Lsn::ROOT, Lsn::ROOT);
        let progress = Progress { shown, told, relist: HashSet::new(), ended: false, lost: false };
        Followed {
            clock,
            noted: AtomicU64::new(0),
            announced: slots(),
            changed: slots(),
            answered: slots(),
            suspended: AtomicBool::new(false),
            suspensions: AtomicU64::new(0),
            told: AtomicU64::new(0),
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
        self.told.store(u64::MAX, Ordering::Release);
        self.names.end();
        self.pages.end();
        self.update(|progress| progress.ended = true);
    }

    /// Whether the kernel may be shown the length of a file as it is now: it has forgotten every page that was read before.
    fn is_settled(&self, ino: Ino) -> bool {
        let announced = self.announced[slot(ino)].load(Ordering::Acquire);
        announced == 0
            || (self.told.load(Ordering::Acquire) >= announced && !self.pages.owes(&Notice::Data(ino)))
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
        note(&self.announced, entries);
    }

    fn changed(&self, entries: &[Entry]) {
        let Some(last) = entries.last().map(|entry| entry.lsn) else { return };
        note(&self.changed, entries);
        self.noted.store(last.get(), Ordering::Release);
        let behind = self.update(|progress| {
            progress.shown = last;
            last.since(progress.told)
        });
        if behind > BEHIND_MAX {
            self.suspend("changes come faster than the kernel can be told");
        }
    }
}

/// Notes by slot what entries change.
fn note(slots: &[AtomicU64], entries: &[Entry]) {
    for entry in entries {
        for change in entry.changes.iter().filter(|change| is_cached(change.table)) {
            if let Some(number) = change.key.first_chunk().copied().map(u64::from_be_bytes) {
                slots[slot(Ino::new(number))].store(entry.lsn.get(), Ordering::Release);
            }
        }
    }
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

    /// What may be said of a file that was opened. While the kernel is told of changes late, or was not told of some, it must not keep
    /// pages because the file looks the same as when it was last opened.
    pub(super) fn opened(&self, opened: Opened) -> Opened {
        let trusted = self.followed.as_ref().is_none_or(|followed| !followed.is_suspended());
        Opened { unchanged: opened.unchanged && trusted, ..opened }
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
        attr.kind != Kind::File || self.followed.as_ref().is_none_or(|followed| followed.is_settled(attr.ino))
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

    /// Waits, but not for ever, until the kernel has forgotten the old pages of these files.
    pub(super) async fn settle(&self, attrs: &[Attr]) {
        let polls = SETTLE_MAX.as_millis() / SETTLE_POLL.as_millis();
        for _ in 0..polls {
            if attrs.iter().all(|attr| self.is_settled(attr)) {
                return;
            }
            tokio::time::sleep(SETTLE_POLL).await;
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
/// Overtaken listings that wait to be invalidated at most.
const RELIST_MAX: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use murphy_log::{Change, LogTime, ManualClock};

    use super::*;

    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    const LONG: Lifetimes = Lifetimes { entry: YEAR, attr: YEAR, missing: YEAR };

    fn entry(lsn: u64, ino: u64) -> Entry {
        let key = Bytes::copy_from_slice(&ino.to_be_bytes());
        let change = Change { table: Table::Directory.number(), key, value: None };
        Entry { changes: vec![change], ..Entry::tick(Lsn::new(lsn), LogTime::default()) }
    }

    fn followed() -> (Arc<Followed>, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::default());
        (Arc::new(Followed::new(clock.clone())), clock)
    }

    /// Else a name that was removed while its lookup was under way lives for a year.
    #[test]
    fn an_answer_that_a_change_of_its_parent_overtook_is_not_kept() {
        let (followed, _) = followed();
        let (parent, child) = (Ino::new(5), Ino::new(6));
        let early = Watch::begin(Some(&followed), LONG);
        assert_eq!(early.lifetimes(parent, Some(child)), LONG);
        followed.changed(&[entry(9, 5)]);
        assert_eq!(early.lifetimes(parent, Some(child)), Lifetimes::NONE);
        assert_eq!(early.lifetimes(child, None), LONG, "of another inode");
        assert_eq!(Watch::begin(Some(&followed), LONG).lifetimes(parent, Some(child)), LONG);
        let early = Watch::begin(Some(&followed), LONG);
        followed.changed(&[entry(10, 6)]);
        assert_eq!(early.lifetimes(parent, Some(child)), Lifetimes::NONE, "the attributes are old");
    }

    /// The answer was checked before the change was noted, and reaches the kernel after the notification.
    #[test]
    fn what_was_answered_a_moment_ago_is_told_again() {
        let (followed, clock) = followed();
        let parent = Ino::new(5);
        assert!(!followed.recently_answered(parent));
        Watch::begin(Some(&followed), LONG).lifetimes(parent, None);
        assert!(followed.recently_answered(parent));
        clock.advance(ANSWER_TRAVELS);
        assert!(!followed.recently_answered(parent));
    }

    #[test]
    fn an_overtaken_listing_is_invalidated_later() {
        let (followed, _) = followed();
        let watch = Watch::begin(Some(&followed), LONG);
        watch.listed(Ino::ROOT);
        assert!(followed.update(|progress| progress.relist.is_empty()));
        followed.changed(&[entry(3, 1)]);
        watch.listed(Ino::ROOT);
        assert!(followed.update(|progress| progress.relist.contains(&Ino::ROOT)));
    }

    /// Its pages may be older than the file, and a file of the same size and times would bring them back.
    #[test]
    fn a_kernel_that_was_not_told_keeps_no_pages_at_an_open() {
        let (followed, _) = followed();
        let opened = Opened { handle: crate::Handle(3), unchanged: true };
        let open = || Watch::begin(Some(&followed), LONG).opened(opened).unchanged;
        assert!(open());
        followed.lose("a frame cannot be read");
        assert!(!open());
        assert!(Watch::begin(None, LONG).opened(opened).unchanged, "nobody else changes anything");
    }

    #[test]
    fn a_kernel_that_is_far_behind_caches_nothing_and_it_is_counted_once() {
        let (followed, _) = followed();
        for lsn in [2 + BEHIND_MAX, 3 + BEHIND_MAX] {
            followed.changed(&[entry(lsn, 1)]);
        }
        assert_eq!(followed.suspensions(), 1);
        assert_eq!(Watch::begin(Some(&followed), LONG).lifetimes(Ino::ROOT, None), Lifetimes::NONE);
        followed.resume();
        assert_eq!(Watch::begin(Some(&followed), LONG).lifetimes(Ino::new(7), None), LONG);
    }
}
