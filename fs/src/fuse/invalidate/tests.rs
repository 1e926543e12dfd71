//! The invalidator against a kernel that a test plays.

use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use murphy_log::{
    Appender, Change, Entry, Epoch, EpochId, LogTime, ManualClock, MemoryLog, Position, State, VolumeId,
    VolumeKeys,
};
use parking_lot::Mutex;

use super::*;
use crate::{
    ChangeObserver, DirectoryRow, Name, RowKey, changes::Observers, decide::EntryKind, fuse::followed::Watch,
    fuse::kernel::Lifetimes,
};

const DIRECTORY: Ino = Ino::new(1);
const FILE: Ino = Ino::new(2);
const PATIENCE: Duration = Duration::from_secs(20);

/// A log that is followed, and what the kernel was told.
struct World {
    log: Arc<MemoryLog>,
    appender: Appender,
    end: Position,
    state: State,
    followed: Arc<Followed>,
    clock: Arc<ManualClock>,
    told: Receiver<Notice>,
    /// Pages are invalidated only once this is gone.
    pages_held: Option<Sender<()>>,
    invalidator: Invalidator,
}

impl World {
    fn new() -> World {
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([7; 16]) };
        let state = State::origin(epoch);
        let log = Arc::new(MemoryLog::new(state));
        log.claim(epoch).unwrap();
        let clock = Arc::new(ManualClock::default());
        let followed = Arc::new(Followed::new(clock.clone()));
        let observers = Arc::new(Observers::default());
        let observation = observers.add(followed.clone());
        let (tell, told) = channel();
        let (pages_held, held) = channel::<()>();
        let (tell, held) = (Mutex::new(tell), Mutex::new(held));
        let kernel: ToKernel = Arc::new(move |notice: &Notice| {
            if matches!(notice, Notice::Data(_)) {
                let _gone = held.lock().recv();
            }
            tell.lock().send(notice.clone()).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))
        });
        let parts = (log.clone() as Arc<dyn Log>, NameHasher::new([1; 32]));
        let invalidator = Invalidator::start(followed.clone(), observation, parts, &kernel).unwrap();
        let appender = Appender::new(VolumeKeys::derive(VolumeId::from_bytes([1; 16])), epoch, state);
        let pages_held = Some(pages_held);
        World { log, appender, end: state.position, state, followed, clock, told, pages_held, invalidator }
    }

    /// An entry becomes durable and visible.
    fn follow(&mut self, kind: EntryKind, key: &RowKey, value: Option<Bytes>) -> Lsn {
        let lsn = self.end.lsn.next();
        let change = Change { table: key.table(), key: key.key_bytes(), value };
        let entry = Entry { kind: kind as u8, changes: vec![change], ..Entry::tick(lsn, LogTime::default()) };
        self.appender.push(&entry, self.state.digest, self.state.usage).unwrap();
        let frame = self.appender.close(LogTime::default(), self.end.lsn).unwrap();
        self.log.append(&self.end, frame.clone()).unwrap();
        self.end = frame.position();
        self.followed.changed(&[entry]);
        lsn
    }

    fn touch(&mut self, directory: Ino) -> Lsn {
        let row = DirectoryRow::default().encode();
        self.follow(EntryKind::Setattr, &RowKey::directory(directory), Some(row))
    }

    fn next(&self) -> Notice {
        self.told.recv_timeout(PATIENCE).unwrap()
    }
}

#[test]
fn what_is_followed_is_told_once() {
    let mut world = World::new();
    let lsn = world.touch(DIRECTORY);
    assert!(world.invalidator.wait_for(lsn, PATIENCE));
    assert_eq!(world.next(), Notice::Listing(DIRECTORY));
    assert_eq!(world.invalidator.stats(), InvalidationStats { told: lsn, suspensions: 0, lost: false });
    assert!(world.told.try_recv().is_err());
}

/// A page that is being read belongs to a store that may take a minute.
#[test]
fn names_do_not_wait_for_pages() {
    let mut world = World::new();
    for _ in 0..3 {
        world.follow(EntryKind::Write, &RowKey::inode(FILE), None);
    }
    let lsn = world.touch(DIRECTORY);
    assert_eq!(world.next(), Notice::Listing(DIRECTORY));
    assert!(!world.invalidator.wait_for(lsn, Duration::from_millis(20)), "pages are still owed");
    world.pages_held = None;
    assert!(world.invalidator.wait_for(lsn, PATIENCE));
    assert_eq!(world.next(), Notice::Data(FILE));
}

/// An answer that was read before the change may reach the kernel after the first notification.
#[test]
fn what_an_answer_may_have_crossed_is_told_again_after_a_second() {
    let mut world = World::new();
    Watch::begin(Some(&world.followed), Lifetimes::EXCLUSIVE).lifetimes(DIRECTORY, None);
    let lsn = world.touch(DIRECTORY);
    assert!(world.invalidator.wait_for(lsn, PATIENCE));
    assert_eq!(world.next(), Notice::Listing(DIRECTORY));
    assert!(world.told.try_recv().is_err());
    world.clock.advance(REPEAT_AFTER);
    world.followed.update(|progress| progress.relist.insert(FILE));
    assert_eq!(world.next(), Notice::Listing(DIRECTORY));
}

#[test]
fn a_change_that_cannot_be_told_is_said_and_ends_caching() {
    let mut world = World::new();
    let key = RowKey::dentry(DIRECTORY, 16);
    let lsn = world.follow(EntryKind::Unlink, &key, None);
    assert!(world.invalidator.wait_for(lsn, PATIENCE));
    assert!(world.invalidator.stats().lost, "a name that nobody tells");
    let kept = Watch::begin(Some(&world.followed), Lifetimes::EXCLUSIVE).lifetimes(FILE, None);
    assert_eq!(kept, Lifetimes::NONE);
}

#[test]
fn the_end_of_the_mount_lets_nobody_wait() {
    let mut world = World::new();
    let (_, nobody) = channel();
    world.told = nobody;
    let lsn = world.touch(DIRECTORY);
    assert!(world.invalidator.wait_for(lsn.advanced(100), PATIENCE));
}

/// The fear: a node begins to decide while its kernel is still told of what others decided before: a page that a local write has just filled
/// is dropped, a reader brings the old one back, and nobody ever tells the kernel of it again.
#[test]
fn a_node_does_not_decide_before_its_kernel_has_heard_of_everything_that_was_followed() {
    let mut world = World::new();
    for _ in 0..3 {
        world.follow(EntryKind::Write, &RowKey::inode(FILE), None);
    }
    // Told once more later, because an answer was on its way.
    Watch::begin(Some(&world.followed), Lifetimes::EXCLUSIVE).lifetimes(DIRECTORY, None);
    let lsn = world.touch(DIRECTORY);
    assert!(world.followed.wait(PATIENCE, |progress| progress.told >= lsn));
    let (tell, decides) = channel();
    let followed = Arc::clone(&world.followed);
    let promotion = thread::spawn(move || {
        followed.about_to_lead();
        tell.send(()).unwrap();
    });
    assert_eq!(world.next(), Notice::Listing(DIRECTORY));
    assert!(decides.try_recv().is_err(), "pages are still owed");
    world.pages_held = None;
    let mut told = vec![world.next()];
    assert!(decides.try_recv().is_err(), "a listing is to be told once more");
    world.clock.advance(REPEAT_AFTER);
    decides.recv_timeout(PATIENCE).unwrap();
    promotion.join().unwrap();
    told.extend(world.told.try_iter());
    assert_eq!(told.pop(), Some(Notice::Listing(DIRECTORY)));
    assert!(told.iter().all(|notice| *notice == Notice::Data(FILE)), "{told:?}");
    assert!(!world.invalidator.stats().lost);
    // A request that began before and ends now has read an old listing.
    world.followed.update(|progress| progress.relist.insert(DIRECTORY));
    // It is due a second after the thread has heard of it.
    let late = (0..PATIENCE.as_millis()).find_map(|_| {
        world.clock.advance(REPEAT_AFTER);
        world.followed.update(|_| ());
        world.told.recv_timeout(Duration::from_millis(1)).ok()
    });
    assert_eq!(late, Some(Notice::Listing(DIRECTORY)));
    assert!(world.followed.pages.push_now(Notice::Data(FILE)).is_err(), "no page is dropped any more");
}

/// The fear: a read that hangs in a dead store keeps a promotion from ending; or what was not sent for it comes after the node has begun.
#[test]
fn a_kernel_that_does_not_take_what_was_followed_holds_up_a_promotion_for_a_while_only() {
    let mut world = World::new();
    let other = Ino::new(30);
    for file in [Ino::new(20), other] {
        world.follow(EntryKind::Write, &RowKey::inode(file), None);
    }
    let lsn = world.touch(DIRECTORY);
    assert_eq!(world.next(), Notice::Listing(DIRECTORY));
    assert!(world.followed.wait(PATIENCE, |progress| progress.told >= lsn));
    world.followed.cut(Duration::from_millis(20));
    assert!(world.invalidator.stats().lost, "it is said, and the kernel keeps nothing from now on");
    let kept = Watch::begin(Some(&world.followed), Lifetimes::EXCLUSIVE).lifetimes(FILE, None);
    assert_eq!(kept, Lifetimes::NONE);
    world.pages_held = None;
    // The one that the kernel had in hand, at most, and then the end of the thread that sends.
    let late: Vec<Notice> = std::iter::from_fn(|| world.told.recv_timeout(PATIENCE).ok()).collect();
    assert!(!late.contains(&Notice::Data(other)), "{late:?}");
}

/// A notice that is told all the time need not be told again, but once it is quiet it must.
#[test]
fn repeats_wait_for_the_last_time_they_were_asked_for() {
    let mut repeats = Repeats::default();
    let (notice, other) = (Notice::Listing(DIRECTORY), Notice::Entry(DIRECTORY, Name::new("a").unwrap()));
    let second = Duration::from_secs(1);
    repeats.add(notice.clone(), second);
    repeats.add(other.clone(), second);
    repeats.add(notice.clone(), 2 * second);
    assert_eq!(repeats.due(Duration::ZERO), None);
    assert_eq!(repeats.pause(Duration::ZERO), second);
    assert_eq!(repeats.due(second), Some(other));
    assert_eq!(repeats.due(second), None);
    assert_eq!(repeats.due(2 * second), Some(notice));
    assert_eq!(repeats.pause(2 * second), Duration::MAX);
}
