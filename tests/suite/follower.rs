//! A volume that follows: it shows what its source decided, and changes nothing itself.

use std::sync::Arc;

use bytes::Bytes;
use murphy_fs::{
    Answer, Caller, ChangeObserver, Errno, FileSystem, Ino, Kind, Name, NewNode, OpenFlags, RenameMode,
    SetAttr, Volume, VolumeOptions, XattrMode, XattrName,
};
use murphy_log::{Entry, Lsn};
use murphy_tests::{PATIENCE, Pair, TreeRules, compare_trees, epoch, wait_until};
use parking_lot::Mutex;

const ROOT_USER: Caller = Caller { uid: 0, gid: 0, pid: 1 };
const READ: OpenFlags = OpenFlags { read: true, write: false, append: false, truncate: false, sync: false };
const WRITE: OpenFlags = OpenFlags { read: true, write: true, append: false, truncate: false, sync: false };

fn name(text: &str) -> Name {
    Name::new(text.as_bytes().to_vec()).unwrap()
}

/// A file with bytes and an attribute, and a directory, on both sides.
fn pair() -> (Pair, Ino, Ino) {
    let pair = Pair::new(VolumeOptions::default());
    let (driver, source) = (pair.driver(), &pair.source);
    let (file, opened) = driver.wait(source.create(&ROOT_USER, Ino::ROOT, &name("f"), 0o644, WRITE)).unwrap();
    let data = Bytes::from_static(b"some bytes");
    driver.wait(source.write(&ROOT_USER, file.ino, opened.handle, 0, data)).unwrap();
    source.release(file.ino, opened.handle);
    let directory = driver.wait(source.mkdir(&ROOT_USER, Ino::ROOT, &name("d"), 0o755)).unwrap();
    let key = XattrName::new(&b"user.a"[..]).unwrap();
    let value = Bytes::from_static(b"v");
    driver.wait(source.setxattr(&ROOT_USER, file.ino, &key, value, XattrMode::Set)).unwrap();
    let lsn = pair.copy();
    pair.wait_shown(lsn, PATIENCE).unwrap();
    (pair, file.ino, directory.ino)
}

#[expect(clippy::needless_pass_by_value, reason = "an answer is looked at once")]
fn refused<T>(what: &str, answer: Answer<T>) {
    match answer {
        Answer::Now(Err(Errno::EROFS)) => {}
        Answer::Now(Err(errno)) => panic!("{what} fails with {errno}"),
        Answer::Now(Ok(_)) => panic!("{what} is done"),
        Answer::Later(_) => panic!("{what} waits"),
    }
}

/// A client on a read-only copy that hangs on a write, or whose write is taken and then lost, is worse than none.
#[test]
fn every_change_is_refused_at_once_and_reading_goes_on() {
    let (pair, file, directory) = pair();
    let (driver, mirror) = (pair.driver(), &pair.follower);
    let (caller, root, new) = (&ROOT_USER, Ino::ROOT, &name("new"));
    let before = mirror.state();
    refused("mkdir", mirror.mkdir(caller, root, new, 0o755));
    let node = NewNode { kind: Kind::Fifo, mode: 0o600, rdev: 0 };
    refused("mknod", mirror.mknod(caller, root, new, node));
    refused("create", mirror.create(caller, root, new, 0o644, WRITE));
    refused("create of what is there", mirror.create(caller, root, &name("f"), 0o644, WRITE));
    refused("symlink", mirror.symlink(caller, root, new, b"f"));
    refused("link", mirror.link(caller, file, root, new));
    refused("unlink", mirror.unlink(caller, root, &name("f")));
    refused("rmdir", mirror.rmdir(caller, root, &name("d")));
    for mode in [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange, RenameMode::Whiteout] {
        refused("rename", mirror.rename(caller, (root, &name("f")), (root, new), mode));
    }
    let size = SetAttr { size: Some(0), ..SetAttr::default() };
    let huge = SetAttr { size: Some(u64::MAX), ..SetAttr::default() };
    let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    for change in [size, huge, mode] {
        refused("setattr", mirror.setattr(caller, file, None, change));
    }
    refused("setattr of a directory", mirror.setattr(caller, directory, None, mode));
    let key = XattrName::new(&b"user.a"[..]).unwrap();
    refused("setxattr", mirror.setxattr(caller, file, &key, Bytes::new(), XattrMode::Set));
    refused("removexattr", mirror.removexattr(caller, file, &key));
    let truncate = OpenFlags { truncate: true, ..READ };
    for flags in [WRITE, truncate, OpenFlags { truncate: true, ..WRITE }, OpenFlags { append: true, ..WRITE }]
    {
        refused("open", mirror.open(caller, file, flags));
    }
    refused("a setting", mirror.change_settings(vec![("x".to_owned(), None)]));
    let opened = driver.wait(mirror.open(caller, file, READ)).unwrap();
    refused("write", mirror.write(caller, file, opened.handle, 0, Bytes::from_static(b"x")));
    refused("setattr by handle", mirror.setattr(caller, file, Some(opened.handle), size));
    let bytes = driver.wait(mirror.read(file, opened.handle, 0, 100)).unwrap();
    assert_eq!(bytes, &b"some bytes"[..]);
    driver.wait(mirror.flush(file, opened.handle)).unwrap();
    driver.wait(mirror.fsync(file, Some(opened.handle))).unwrap();
    driver.wait(mirror.sync_all()).unwrap();
    mirror.release(file, opened.handle);
    assert_eq!(mirror.state(), before);
    let found = compare_trees(driver, &pair.source, mirror, TreeRules::SAME_HISTORY);
    assert!(found.is_empty(), "{found:?}");
}

/// After a promote the same mount goes on, with the same handles.
#[test]
fn a_follower_that_leads_may_change() {
    let (pair, file, _) = pair();
    let mirror = &pair.follower;
    refused("before", mirror.open(&ROOT_USER, file, WRITE));
    mirror.log().claim(epoch(2)).unwrap();
    let _runtime = pair.driver().enter();
    mirror.lead(epoch(2), None).unwrap();
    let opened = pair.driver().wait(mirror.open(&ROOT_USER, file, WRITE)).unwrap();
    let data = Bytes::from_static(b"after");
    pair.driver().wait(mirror.write(&ROOT_USER, file, opened.handle, 0, data)).unwrap();
    pair.driver().wait(mirror.fsync(file, Some(opened.handle))).unwrap();
}

#[derive(Default)]
struct Heard(Mutex<Vec<Lsn>>);

impl ChangeObserver for Heard {
    fn changed(&self, entries: &[Entry]) {
        self.0.lock().extend(entries.iter().map(|entry| entry.lsn));
    }
}

/// Looks whether the volume decides already when it is told that it is about to.
#[derive(Default)]
struct Last {
    volume: Mutex<Option<Volume>>,
    heard: Mutex<Vec<Lsn>>,
    at_the_end: Mutex<Vec<(Lsn, Option<Errno>)>>,
}

impl ChangeObserver for Last {
    fn changed(&self, entries: &[Entry]) {
        self.heard.lock().extend(entries.iter().map(|entry| entry.lsn));
    }

    fn about_to_lead(&self) {
        let volume = self.volume.lock().take().unwrap();
        let refused = match volume.mkdir(&ROOT_USER, Ino::ROOT, &name("early"), 0o755) {
            Answer::Now(Err(errno)) => Some(errno),
            Answer::Now(Ok(_)) | Answer::Later(_) => None,
        };
        let last = self.heard.lock().last().copied().unwrap();
        self.at_the_end.lock().push((last, refused));
    }
}

/// The fear: what others decided is told to a kernel that makes the changes itself by now.
#[test]
fn an_observer_is_through_with_what_was_followed_before_the_node_decides() {
    let (pair, _, _) = pair();
    let (mirror, observer) = (&pair.follower, Arc::new(Last::default()));
    let _observation = mirror.observe(observer.clone());
    *observer.volume.lock() = Some(mirror.clone());
    pair.driver().wait(pair.source.mkdir(&ROOT_USER, Ino::ROOT, &name("late"), 0o755)).unwrap();
    let late = pair.copy();
    mirror.log().claim(epoch(2)).unwrap();
    let _runtime = pair.driver().enter();
    mirror.lead(epoch(2), None).unwrap();
    assert_eq!(*observer.at_the_end.lock(), [(late, Some(Errno::EROFS))]);
    pair.driver().wait(mirror.mkdir(&ROOT_USER, Ino::ROOT, &name("early"), 0o755)).unwrap();
    assert_eq!(observer.heard.lock().last(), Some(&late), "nothing of its own");
}

/// A cache above that misses an entry is wrong for as long as it likes.
#[test]
fn an_observer_hears_every_followed_entry_once_in_order_and_none_of_its_own_node() {
    let pair = Pair::new(VolumeOptions { generation_bytes: 4096, ..VolumeOptions::default() });
    let heard = Arc::new(Heard::default());
    let observation = pair.follower.observe(heard.clone());
    let own = Arc::new(Heard::default());
    let _own = pair.source.observe(own.clone());
    let mut last = Lsn::ROOT;
    for round in 0..20 {
        for file in 0..20 {
            let new = name(&format!("{round}-{file}"));
            pair.driver().wait(pair.source.mkdir(&ROOT_USER, Ino::ROOT, &new, 0o755)).unwrap();
        }
        last = pair.copy();
    }
    pair.wait_shown(last, PATIENCE).unwrap();
    let expected: Vec<Lsn> = (Lsn::FIRST.get()..=last.get()).map(Lsn::new).collect();
    // The last frame is told a moment after it is visible.
    wait_until("the last frame to be told", PATIENCE, || heard.0.lock().len() == expected.len());
    assert_eq!(*heard.0.lock(), expected);
    assert!(own.0.lock().is_empty());
    drop(observation);
    pair.driver().wait(pair.source.mkdir(&ROOT_USER, Ino::ROOT, &name("more"), 0o755)).unwrap();
    let more = pair.copy();
    pair.wait_shown(more, PATIENCE).unwrap();
    assert_eq!(heard.0.lock().len(), expected.len());
}
