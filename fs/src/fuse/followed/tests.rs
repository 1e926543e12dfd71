//! What is told to the kernel of a volume that is followed, with a kernel and a clock of the test.

use bytes::Bytes;
use murphy_log::{Change, LogTime, ManualClock};

use super::*;
use crate::fuse::memory::Memory;

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
    let fs: Arc<dyn FileSystem> = Arc::new(Memory::new());
    let open = |followed: Option<&Arc<Followed>>, unchanged, decides| {
        let opened = Opened { handle: Handle(3), unchanged, decides };
        Watch::begin(followed, LONG).opened(&fs, Ino::new(5), OpenFlags::default(), opened)
    };
    assert_eq!(open(Some(&followed), true, false), PageCache::Kept);
    assert_eq!(open(Some(&followed), false, true), PageCache::Kept);
    assert_eq!(open(Some(&followed), false, false), PageCache::Fresh);
    followed.lose("a frame cannot be read");
    assert_eq!(open(Some(&followed), true, true), PageCache::Fresh);
    assert_eq!(open(None, true, false), PageCache::Kept);
    assert_eq!(open(None, false, true), PageCache::Kept, "nobody else changes anything");
}

/// Its pages could not follow it.
#[test]
fn a_file_that_has_just_changed_is_read_past_the_page_cache() {
    let (followed, clock) = followed();
    let fs: Arc<dyn FileSystem> = Arc::new(Memory::new());
    // The root of the memory file system stands for the file: it has a time.
    let root = fs.getattr(Ino::ROOT);
    let Answer::Now(Ok(attr)) = root else { panic!("the memory answers at once") };
    let time = LogTime::from_nanos(u64::try_from(attr.ctime.seconds).unwrap() * 1_000_000_000);
    let opened = Opened { handle: Handle(3), unchanged: true, decides: false };
    let open = |flags| Watch::begin(Some(&followed), LONG).opened(&fs, Ino::ROOT, flags, opened);
    let read = OpenFlags { read: true, ..OpenFlags::default() };
    let changed = |time| followed.changing(&[Entry { time, ..entry(9, 1) }]);
    changed(time);
    assert_eq!(open(read), PageCache::Kept, "a kernel that could not map it");
    followed.allow_bypass(true);
    assert_eq!(open(read), PageCache::Bypassed);
    assert_eq!(open(OpenFlags { write: true, ..read }), PageCache::Kept);
    changed(time.after(2 * REST));
    assert_eq!(open(read), PageCache::Kept, "another one of its slot has changed");
    changed(time);
    clock.advance(REST);
    assert_eq!(open(read), PageCache::Kept, "at rest");
}

/// A byte that was overwritten after it was read would live on in the kernel's cache.
#[test]
fn a_last_byte_that_may_have_changed_is_forgotten_at_once() {
    let (followed, _) = followed();
    let file = Ino::new(5);
    followed.growth.opened(file, Handle(3), 0);
    followed.changing(&[entry(9, 5)]);
    assert!(followed.growth.owed(file, 10, 9, &[]).is_some());
    let sent = |as_of| {
        let sent = Mutex::new(Vec::new());
        let notice = Notice::Length(Length { ino: file, length: 10, last: 1, as_of });
        let send = |notice: &Notice| {
            sent.lock().push(notice.clone());
            Ok(())
        };
        followed.send(&notice, send).unwrap();
        assert_eq!(sent.lock()[0], notice);
        sent.into_inner().split_off(1)
    };
    assert_eq!(sent(9), []);
    assert_eq!(sent(8), [Notice::Data(file)]);
    assert!(followed.growth.owed(file, 10, 9, &[]).is_none());
}

/// A file of three bytes, its attributes, and handles 1 to 3 through which it is read: it has grown since.
fn grown(followed: &Followed) -> (Arc<Memory>, Attr) {
    let fs = Arc::new(Memory::new());
    let caller = crate::Caller::default();
    let (name, flags) = (crate::Name::new("file").unwrap(), OpenFlags::default());
    let Answer::Now(Ok((made, opened))) = fs.create(&caller, Ino::ROOT, &name, 0o644, flags) else {
        panic!("the memory answers at once")
    };
    let Answer::Now(Ok(3)) = fs.write(&caller, made.ino, opened.handle, 0, Bytes::from_static(b"abc")) else {
        panic!("the memory takes bytes")
    };
    let Answer::Now(Ok(attr)) = fs.getattr(made.ino) else { panic!("the memory answers at once") };
    (1..=3).for_each(|handle| followed.growth.opened(attr.ino, Handle(handle), 0));
    followed.changing(&[entry(9, attr.ino.get())]);
    followed.told(Lsn::new(9));
    (fs, attr)
}

/// The fear: one of several who have a growing file open closes it, and the others see zeros.
#[tokio::test]
async fn a_handle_that_is_closed_meanwhile_leaves_the_others_to_read_the_last_byte_with() {
    // Which one is asked first is the hasher's choice.
    for round in 0..16 {
        let (followed, _) = followed();
        let (fs, attr) = grown(&followed);
        fs.open.store(1 + round % 3, Ordering::Relaxed);
        let (state, sent) = (Arc::clone(&followed), Arc::new(Mutex::new(Vec::new())));
        let told = Arc::clone(&sent);
        let lane = std::thread::spawn(move || {
            let send = |notice: &Notice| {
                told.lock().push(notice.clone());
                Ok(())
            };
            state
                .pages
                .deliver(|notice| state.send(notice, send), |notice, error| panic!("{notice:?}: {error}"));
        });
        let fs: Arc<dyn FileSystem> = fs;
        followed.settle(&fs, &[attr]).await;
        let length = Length { ino: attr.ino, length: 3, last: b'c', as_of: 9 };
        assert_eq!(*sent.lock(), [Notice::Length(length)], "{round}");
        followed.end();
        lane.join().unwrap();
    }
}

#[tokio::test]
async fn a_file_that_nobody_can_read_any_more_is_not_waited_for() {
    let (followed, _) = followed();
    let (fs, attr) = grown(&followed);
    fs.open.store(7, Ordering::Relaxed);
    let fs: Arc<dyn FileSystem> = fs;
    followed.settle(&fs, &[attr]).await;
    assert_eq!(followed.pages.added(), 0);
}

/// The fear: a node that was promoted stores a byte that somebody else wrote long ago over one that a local program has just written.
#[tokio::test]
async fn the_kernel_is_given_no_length_once_the_node_decides() {
    let (followed, _) = followed();
    let (fs, attr) = grown(&followed);
    assert!(followed.owed(&attr, &[]).is_some());
    followed.see_through();
    followed.cut(Duration::ZERO);
    assert!(followed.owed(&attr, &[]).is_none() && followed.is_settled(&attr));
    let fs: Arc<dyn FileSystem> = fs;
    followed.settle(&fs, &[attr]).await;
    let late = Notice::Length(Length { ino: attr.ino, length: 3, last: b'c', as_of: 9 });
    assert!(followed.pages.push_now(late).is_err(), "one who has asked before, and pushes after");
    assert_eq!(followed.pages.added(), 0);
    assert!(!followed.is_suspended());
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
