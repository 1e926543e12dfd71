//! Interleavings and failures that lose bytes, hang or lie, each once: stores that fail or hang, logs that sync late or end, names that
//! change under a reader.
//!
//! Invariants:
//! - Nothing is waited for longer than [`PATIENCE`]: a call that hangs is a failure.
//! - Where the order of two steps matters, futures are polled by hand on a runtime with one thread.

mod world;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::poll;
use murphy_fs::{
    Answer, Attr, Caller, Errno, FileSystem, Index, Ino, Kind, NewNode, OpenFlags, RenameMode, SetAttr,
    SetTime, Timespec, Volume, VolumeOptions, VolumeParts, XattrMode, XattrName, check_tree,
};
use murphy_log::{InPlace, Log, MemoryLog, State, Terminal};
use murphy_tests::{Layered, PATIENCE, epoch, lead_new, new_log, pause_task, stays, until};
use parking_lot::Mutex;
use tokio::runtime::Builder;

use world::{
    CrampedLog, PutFaults, Puts, READ_WRITE, ROOT, StuckIndex, World, alone, impatient, in_the_end, named,
    now, parts, soon,
};

/// Two processes sync one file, the flush fails: both are told, or one of them believes in bytes that are nowhere.
#[test]
fn every_fsync_that_waits_for_a_failed_flush_fails() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        world.store.let_puts(Puts::Fail);
        let both = futures::future::join(world.fsync(file), world.fsync(file)).await;
        assert_eq!(both, (Err(Errno::EIO), Err(Errno::EIO)));
        world.store.let_puts(Puts::Succeed);
        world.fsync(file).await.unwrap();
    });
}

/// A close that hears of the error first does not turn the fsync that caused the flush into a success.
#[test]
fn a_close_does_not_take_the_error_from_an_fsync() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        world.store.let_puts(Puts::Fail);
        let mut fsync = Box::pin(world.fsync(file));
        assert!(poll!(&mut fsync).is_pending());
        world.store.begun(1).await;
        let failed = || now(world.volume.flush(file.0, file.1)) == Err(Errno::EIO);
        until("a close to hear of the failed flush", PATIENCE, failed).await;
        assert_eq!(fsync.await, Err(Errno::EIO));
    });
}

/// The fear: whoever waits for bytes that are written behind a put asks for them again and again until the put has ended, and keeps a
/// processor busy with it for as long as the store takes. Here time passes only while nobody has anything to do.
#[test]
fn an_fsync_behind_a_slow_put_waits_without_asking_again_and_again() {
    let (sender, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _in_place = InPlace::begin();
        let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let world = World::new(VolumeOptions::default());
            let file = world.create("f");
            world.write(file, 0, b"first").unwrap();
            world.store.let_puts(Puts::Hang);
            let mut first = Box::pin(world.fsync(file));
            assert!(poll!(&mut first).is_pending());
            world.store.begun(1).await;
            world.write(file, 5, b"second").unwrap();
            let later = async {
                pause_task(Duration::from_secs(5)).await;
                world.store.let_puts(Puts::Succeed);
            };
            let (first, second, ()) = tokio::join!(first, world.fsync(file), later);
            assert_eq!((first, second), (Ok(()), Ok(())));
        });
        sender.send(()).unwrap();
    });
    done.recv_timeout(PATIENCE).expect("time passes");
}

/// Nothing is left to be stored, and nobody says so.
#[test]
fn an_fsync_does_not_wait_for_bytes_that_were_truncated_away() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        let mut fsync = Box::pin(world.fsync(file));
        assert!(poll!(&mut fsync).is_pending());
        let empty = SetAttr { size: Some(0), ..SetAttr::default() };
        now(world.volume.setattr(&ROOT, file.0, None, empty)).unwrap();
        fsync.await.unwrap();
    });
}

/// One entry cannot replace that many extents: the bytes must not be refused for ever.
#[test]
fn a_write_over_thousands_of_small_extents_is_stored() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.scatter(file, 6000);
        world.fsync(file).await.unwrap();
        assert_eq!(world.volume.view().inode(file.0).unwrap().unwrap().extents, 6000);
        world.write(file, 0, &vec![7; 12_003]).unwrap();
        world.fsync(file).await.unwrap();
        assert_eq!(check_tree(&world.volume.view()).unwrap(), Vec::new());
        let read = soon(world.volume.read(file.0, file.1, 0, 20_000).wait()).await.unwrap();
        assert!(read == vec![7; 12_003]);
    });
}

/// A file that is replaced is there at every moment: the old one or the new one.
#[test]
fn a_lookup_never_misses_a_name_that_is_replaced() {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _entered = runtime.enter();
    let world = World::new(VolumeOptions::default());
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    now(world.volume.mknod(&ROOT, Ino::ROOT, &named("f"), node)).unwrap();
    std::thread::scope(|scope| {
        let replacing = scope.spawn(|| {
            for _ in 0..REPLACEMENTS {
                now(world.volume.mknod(&ROOT, Ino::ROOT, &named("t"), node)).unwrap();
                let (from, to) = (named("t"), named("f"));
                let (from, to) = ((Ino::ROOT, &from), (Ino::ROOT, &to));
                now(world.volume.rename(&ROOT, from, to, RenameMode::Replace)).unwrap();
            }
        });
        while !replacing.is_finished() {
            let found: Result<Attr, Errno> = now(world.volume.lookup(&ROOT, Ino::ROOT, &named("f")));
            assert!(found.is_ok(), "{found:?}");
        }
    });
}

/// A log that syncs no more fills the overlay: a request that waits for room is answered, or its process can never be killed.
#[test]
fn a_change_does_not_wait_for_ever_for_room() {
    alone(async {
        let options = VolumeOptions { generation_bytes: 1000, ..impatient() };
        let world = World::over(held_log(), options);
        for number in 0..1000 {
            match world.volume.mkdir(&ROOT, Ino::ROOT, &named(&number.to_string()), 0o755) {
                Answer::Now(result) => drop(result.unwrap()),
                Answer::Later(waits) => {
                    assert_eq!(soon(waits).await.unwrap_err(), Errno::EIO);
                    return;
                }
            }
        }
        panic!("the overlay has no limit");
    });
}

#[test]
fn a_volume_whose_log_has_ended_takes_no_bytes() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.fsync(file).await.unwrap();
        world.log.end(Terminal::Poisoned { message: "broken".into() });
        drop(world.volume.mkdir(&ROOT, Ino::ROOT, &named("d"), 0o755));
        assert_eq!(world.fsync(file).await, Err(Errno::EIO));
        until("the volume to end", PATIENCE, || world.volume.ended().is_some()).await;
        assert_eq!(world.write(file, 0, b"bytes"), Err(Errno::EIO));
    });
}

/// A store that never answers one put: later ones must not wait behind it for ever.
#[test]
fn a_put_that_hangs_is_given_up_and_its_bytes_are_sent_again() {
    alone(async {
        let world = World::new(impatient());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        world.store.let_puts(Puts::Hang);
        assert_eq!(world.fsync(file).await, Err(Errno::EIO));
        let given_up = || world.store.given_up.load(Ordering::SeqCst);
        until("the put to be given up", PATIENCE, || given_up() > 0).await;
        world.store.let_puts(Puts::Succeed);
        world.fsync(file).await.unwrap();
        assert!(world.store.begun.load(Ordering::SeqCst) > given_up(), "nothing was sent again");
    });
}

/// An inode whose last name is gone and that nobody has open is gone; an open between its unlink and its purge must not keep it.
#[test]
fn an_orphan_that_somebody_opens_late_is_purged() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let (ino, handle) = world.create("f");
        let attribute = XattrName::new("user.a").unwrap();
        now(world.volume.setxattr(&ROOT, ino, &attribute, Bytes::new(), XattrMode::Set)).unwrap();
        world.volume.release(ino, handle);
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        assert_eq!(world.orphans(), 1, "its purge has not begun");
        assert_eq!(now(world.volume.open(&ROOT, ino, READ_WRITE)), Err(Errno::ESTALE));
        // One that came while it is purged would stay behind.
        let late = XattrName::new("user.late").unwrap();
        let set = now(world.volume.setxattr(&ROOT, ino, &late, Bytes::new(), XattrMode::Set));
        assert_eq!(set, Err(Errno::ESTALE));
        world.without_orphans().await;
    });
}

/// As on tmpfs: what is open works like any file, whether it has a name or not.
#[test]
fn an_orphan_takes_attributes_while_it_is_open() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let (ino, handle) = world.create("f");
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        let attribute = XattrName::new("user.a").unwrap();
        let value = Bytes::from_static(b"value");
        now(world.volume.setxattr(&ROOT, ino, &attribute, value.clone(), XattrMode::Set)).unwrap();
        assert_eq!(now(world.volume.getxattr(&ROOT, ino, &attribute)), Ok(value));
        now(world.volume.removexattr(&ROOT, ino, &attribute)).unwrap();
        world.volume.release(ino, handle);
        world.without_orphans().await;
    });
}

/// A restored copy has only the packs that it refers to: whoever copies from it and asks for the others waits for ever.
#[test]
fn a_pack_of_which_nothing_is_referred_to_is_asked_of_nobody() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        world.fsync(file).await.unwrap();
        assert_eq!(world.volume.packs().count(), 1);
        world.volume.release(file.0, file.1);
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        world.without_orphans().await;
        assert_eq!(world.volume.packs().count(), 0);
    });
}

/// The source unlinks what a mirror has open; the mirror becomes the source; the last close purges.
#[test]
fn an_orphan_held_open_across_a_promotion_is_purged() {
    alone(async {
        let source = World::new(VolumeOptions::default());
        let (ino, handle) = source.create("f");
        source.fsync((ino, handle)).await.unwrap();
        let store = Arc::clone(&source.store);
        let mirror = World::beside(Arc::clone(&source.log), store, VolumeOptions::default());
        mirror.volume.follow().unwrap();
        let lsn = source.volume.view().lsn();
        until("the mirror to follow", PATIENCE, || mirror.volume.view().lsn() >= lsn).await;
        let read = OpenFlags { read: true, ..OpenFlags::default() };
        let held = now(mirror.volume.open(&ROOT, ino, read)).unwrap().handle;
        now(source.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        soon(source.volume.sync_all().wait()).await.unwrap();
        assert_eq!(source.orphans(), 1);
        let World { log, .. } = source;
        log.claim(epoch(2)).unwrap();
        mirror.volume.lead(epoch(2), None).unwrap();
        stays("somebody has it open", Duration::from_millis(50), || mirror.orphans() == 1).await;
        mirror.volume.release(ino, held);
        mirror.without_orphans().await;
    });
}

#[test]
fn a_mirror_takes_no_bytes() {
    alone(async {
        let source = World::new(VolumeOptions::default());
        let file = source.create("f");
        source.fsync(file).await.unwrap();
        let store = Arc::clone(&source.store);
        let mirror = World::beside(Arc::clone(&source.log), store, VolumeOptions::default());
        mirror.volume.follow().unwrap();
        let lsn = source.volume.view().lsn();
        until("the mirror to follow", PATIENCE, || mirror.volume.view().lsn() >= lsn).await;
        let written = match mirror.volume.open(&ROOT, file.0, READ_WRITE).wait().await {
            Ok(opened) => mirror.write((file.0, opened.handle), 0, b"bytes").map(drop),
            Err(errno) => Err(errno),
        };
        assert_eq!(written, Err(Errno::EROFS));
    });
}

/// The removal of an inode with more attributes than an entry can hold changes.
#[test]
fn an_orphan_with_thousands_of_attributes_is_purged() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let (ino, handle) = world.create("f");
        for number in 0..5000 {
            let attribute = XattrName::new(format!("user.{number}")).unwrap();
            now(world.volume.setxattr(&ROOT, ino, &attribute, Bytes::new(), XattrMode::Set)).unwrap();
        }
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        world.volume.release(ino, handle);
        world.without_orphans().await;
    });
}

/// A truncation in several entries is refused by its first one.
#[test]
fn a_truncation_that_is_refused_has_cut_off_nothing() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.scatter(file, 1000);
        world.fsync(file).await.unwrap();
        let stranger = Caller { uid: 7, gid: 7, pid: 0 };
        let time = SetTime::At(Timespec { seconds: 1, nanos: 0 });
        let change = SetAttr { size: Some(0), mtime: Some(time), ..SetAttr::default() };
        let refused = soon(world.volume.setattr(&stranger, file.0, None, change).wait()).await;
        assert_eq!(refused, Err(Errno::EPERM));
        assert_eq!(now(world.volume.getattr(file.0)).unwrap().size, 2000);
    });
}

/// Write, rename over: after a crash the name has all of the old bytes or all of the new, whatever took the name of the source while its
/// bytes were on their way.
#[test]
fn a_rename_over_a_file_waits_for_the_bytes_of_what_moves_in_the_end() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let old = world.create("f");
        world.fsync(old).await.unwrap();
        let first = world.create("t");
        world.write(first, 0, b"first").unwrap();
        world.volume.release(first.0, first.1);
        world.store.let_puts(Puts::Hang);
        let (from, to) = (named("t"), named("f"));
        let (from, to) = ((Ino::ROOT, &from), (Ino::ROOT, &to));
        let mut rename = Box::pin(world.volume.rename(&ROOT, from, to, RenameMode::Replace).wait());
        assert!(poll!(&mut rename).is_pending());
        world.store.begun(1).await;
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("t"))).unwrap();
        let second = world.create("t");
        world.write(second, 0, b"second").unwrap();
        world.store.let_puts(Puts::Succeed);
        soon(rename).await.unwrap();
        assert_eq!(now(world.volume.lookup(&ROOT, Ino::ROOT, &named("f"))).unwrap().ino, second.0);
        assert_eq!(world.volume.view().inode(second.0).unwrap().unwrap().extents, 1);
    });
}

/// Two names are exchanged of which one file, or both, have bytes that are not stored: after a crash each has all of the one or of the other.
#[test]
fn an_exchange_waits_for_the_bytes_of_both_files() {
    alone(async {
        for dirty in [["a", "b"].as_slice(), &["a"], &["b"]] {
            let world = World::new(VolumeOptions::default());
            let files = ["a", "b"].map(|name| world.create(name));
            for (name, file) in ["a", "b"].into_iter().zip(files) {
                world.write(file, 0, name.as_bytes()).unwrap();
                if !dirty.contains(&name) {
                    world.fsync(file).await.unwrap();
                }
            }
            let (a, b) = (named("a"), named("b"));
            let rename = world.volume.rename(&ROOT, (Ino::ROOT, &a), (Ino::ROOT, &b), RenameMode::Exchange);
            soon(rename.wait()).await.unwrap();
            for (ino, _) in files {
                assert_eq!(world.volume.view().inode(ino).unwrap().unwrap().extents, 1, "{dirty:?}");
            }
            assert_eq!(now(world.volume.lookup(&ROOT, Ino::ROOT, &a)).unwrap().ino, files[1].0);
        }
    });
}

#[test]
fn settling_the_index_does_not_wait_for_ever_for_the_log() {
    alone(async {
        let world = World::over(held_log(), impatient());
        now(world.volume.mkdir(&ROOT, Ino::ROOT, &named("d"), 0o755)).unwrap();
        let volume = world.volume.clone();
        let settled = soon(tokio::task::spawn_blocking(move || volume.settle_index())).await;
        assert_eq!(settled.unwrap(), Err(Errno::EIO));
    });
}

/// Many dirty files and a dead store: flushing them all takes as long as one request may, not that long for each.
#[test]
fn a_dead_store_does_not_hold_up_a_flush_of_everything_file_by_file() {
    alone(async {
        let world = World::new(impatient());
        let files = 100;
        for number in 0..files {
            let file = world.create(&number.to_string());
            world.write(file, 0, b"bytes").unwrap();
        }
        world.store.let_puts(Puts::Hang);
        let one_by_one = files * impatient().io_timeout;
        let flushed = tokio::time::timeout(one_by_one, world.volume.sync_all().wait()).await;
        assert_eq!(flushed.expect("it came in time"), Err(Errno::EIO));
    });
}

#[test]
fn a_volume_that_was_closed_decides_nothing_more() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        soon(world.volume.close()).await.unwrap();
        assert_eq!(now(world.volume.mkdir(&ROOT, Ino::ROOT, &named("d"), 0o755)).unwrap_err(), Errno::EROFS);
        assert_eq!(world.index.reached().unwrap().position, world.volume.durable());
    });
}

/// Nothing keeps a volume alive but its users: neither its threads nor its tasks.
#[test]
fn the_last_clone_of_a_volume_stops_everything() {
    alone(async {
        let World { volume, index, store, .. } = World::new(VolumeOptions::default());
        let (attr, opened) = now(volume.create(&ROOT, Ino::ROOT, &named("f"), 0o644, READ_WRITE)).unwrap();
        now(volume.write(&ROOT, attr.ino, opened.handle, 0, Bytes::from_static(b"bytes"))).unwrap();
        let clone = volume.clone();
        soon(volume.sync_all().wait()).await.unwrap();
        drop((volume, clone));
        let alone = || Arc::strong_count(&index) == 1 && Arc::strong_count(&store) == 1;
        until("threads and tasks to let go", PATIENCE, alone).await;
    });
}

/// A flush that dies leaves its bytes to the next one.
#[test]
fn a_flush_that_panics_is_followed_by_another() {
    alone(async {
        let world = World::new(impatient());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        world.store.let_puts(Puts::Panic);
        assert_eq!(world.fsync(file).await, Err(Errno::EIO));
        world.store.let_puts(Puts::Succeed);
        in_the_end(|| world.fsync(file)).await;
    });
}

/// While the log has no room changes are refused and nothing piles up behind it, ticks included; then everything goes on.
#[test]
fn a_log_without_room_gathers_no_ticks_and_loses_nothing() {
    alone(async {
        let log = Arc::new(Layered(CrampedLog { below: new_log(), is_full: AtomicBool::new(false) }));
        let index = Arc::new(murphy_fs::MemoryIndex::new());
        let parts = parts(log.clone(), index, &PutFaults::store());
        let volume = lead_new(VolumeParts { options: impatient(), ..parts });
        in_the_end(|| volume.sync_all().wait()).await;
        log.is_full.store(true, Ordering::SeqCst);
        let kept = now(volume.mkdir(&ROOT, Ino::ROOT, &named("kept"), 0o755)).unwrap();
        assert_eq!(soon(volume.sync_all().wait()).await, Err(Errno::EIO));
        let refused = now(volume.mkdir(&ROOT, Ino::ROOT, &named("refused"), 0o755));
        assert_eq!(refused.unwrap_err(), Errno::ENOSPC);
        let stuck = volume.state();
        let ticks = Duration::from_millis(2500);
        stays("nothing is decided without room, ticks included", ticks, || volume.state() == stuck).await;
        log.is_full.store(false, Ordering::SeqCst);
        in_the_end(|| volume.sync_all().wait()).await;
        now(volume.mkdir(&ROOT, Ino::ROOT, &named("taken"), 0o755)).unwrap();
        in_the_end(|| volume.sync_all().wait()).await;
        assert!(volume.durable().lsn > stuck.position.lsn);
        assert_eq!(now(volume.lookup(&ROOT, Ino::ROOT, &named("kept"))).unwrap().ino, kept.ino);
    });
}

/// The fear: an orphan whose purge meets a full log stays until the next start.
#[test]
fn an_orphan_that_met_a_full_log_is_purged_once_there_is_room() {
    alone(async {
        let (below, store, index) = (new_log(), PutFaults::store(), Arc::new(murphy_fs::MemoryIndex::new()));
        let log = Arc::new(Layered(CrampedLog { below: below.clone(), is_full: AtomicBool::new(false) }));
        let parts = parts(log.clone(), index.clone(), &store);
        let options = VolumeOptions { flush_after: Duration::from_millis(20), ..impatient() };
        let volume = lead_new(VolumeParts { options, ..parts });
        let world = World { volume, log: below, store, index };
        let (ino, handle) = world.create("f");
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        in_the_end(|| world.volume.sync_all().wait()).await;
        log.is_full.store(true, Ordering::SeqCst);
        now(world.volume.mkdir(&ROOT, Ino::ROOT, &named("d"), 0o755)).unwrap();
        assert_eq!(soon(world.volume.sync_all().wait()).await, Err(Errno::EIO));
        world.volume.release(ino, handle);
        stays("nothing is decided without room", Duration::from_millis(100), || world.orphans() == 1).await;
        log.is_full.store(false, Ordering::SeqCst);
        in_the_end(|| world.volume.sync_all().wait()).await;
        world.without_orphans().await;
    });
}

/// A mirror whose index falls behind waits for it, and does not fill its memory with the source's history.
#[test]
#[expect(clippy::await_holding_lock, reason = "holding it is what makes the index stick")]
fn a_follower_whose_index_is_stuck_shows_no_more_than_the_overlay_holds() {
    alone(async {
        let source = World::new(VolumeOptions::default());
        let index = Arc::new(StuckIndex::default());
        let options = VolumeOptions { generation_bytes: 1000, ..VolumeOptions::default() };
        let parts = parts(source.log.clone(), index.clone(), &source.store);
        let state = State::origin(epoch(1));
        let mirror = Volume::open(VolumeParts { state, options, ..parts }).unwrap();
        let stuck = index.stuck.lock();
        mirror.follow().unwrap();
        for number in 0..500 {
            now(source.volume.mkdir(&ROOT, Ino::ROOT, &named(&number.to_string()), 0o755)).unwrap();
            soon(source.volume.sync_all().wait()).await.unwrap();
        }
        until("the mirror to show something", PATIENCE, || mirror.view().lsn().get() > 10).await;
        let small = || mirror.view().lsn().get() < 100;
        stays("few entries in an overlay of 8000 bytes", Duration::from_millis(300), small).await;
        drop(stuck);
        let end = source.volume.view().lsn();
        until("the mirror to catch up", PATIENCE, || mirror.view().lsn() >= end).await;
    });
}

/// A run of fsyncs while the store comes and goes: whatever an fsync has promised is in the log, in stored packs, after a crash.
#[test]
fn what_an_fsync_promised_outlives_a_crash_however_the_store_behaves() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let options = VolumeOptions { flush_after: Duration::from_millis(20), ..impatient() };
        let world = Arc::new(World::new(options));
        let file = world.create("f");
        // Writers that are only ever refused promise nothing, not even that the file is there.
        in_the_end(|| world.fsync(file)).await;
        let promised = Arc::new(Mutex::new([0_u8; 4]));
        let writers = (0..4_u64).map(|place| {
            let (world, promised) = (Arc::clone(&world), Arc::clone(&promised));
            tokio::spawn(async move {
                for number in 1..=40 {
                    let data = Bytes::from(vec![number; 100]);
                    let written = world.volume.write(&ROOT, file.0, file.1, place * 100, data);
                    written.wait().await.unwrap();
                    if world.fsync(file).await.is_ok() {
                        promised.lock()[place as usize] = number;
                    }
                }
            })
        });
        let writers: Vec<_> = writers.collect();
        for turn in 0_u64.. {
            if writers.iter().all(tokio::task::JoinHandle::is_finished) {
                break;
            }
            world.store.let_puts(if turn % 2 == 0 { Puts::Fail } else { Puts::Succeed });
            let puts = || world.store.begun.load(Ordering::SeqCst);
            let enough = puts() + PUTS_A_TURN;
            let over = || puts() >= enough || writers.iter().all(tokio::task::JoinHandle::is_finished);
            until("puts under either rule", PATIENCE, over).await;
        }
        for writer in writers {
            writer.await.unwrap();
        }
        let promised = *promised.lock();
        let log = Arc::new(world.log.reopened());
        let store = Arc::clone(&world.store);
        store.let_puts(Puts::Succeed);
        log.claim(epoch(2)).unwrap();
        let after = World::beside(log, store, VolumeOptions::default());
        after.volume.follow().unwrap();
        after.volume.lead(epoch(2), None).unwrap();
        let opened = now(after.volume.open(&ROOT, file.0, READ_WRITE)).unwrap();
        let bytes = soon(after.volume.read(file.0, opened.handle, 0, 400).wait()).await.unwrap();
        for (place, promised) in promised.into_iter().enumerate() {
            let found = bytes.get(place * 100).copied().unwrap_or(0);
            assert!(found >= promised, "{promised} was promised at {place}, {found} is there");
        }
        assert_eq!(check_tree(&after.volume.view()).unwrap(), Vec::new());
    });
}

/// A log that makes nothing durable unless it is told to.
fn held_log() -> Arc<MemoryLog> {
    Arc::new(MemoryLog::held(State::origin(epoch(1))))
}

/// So many puts begin before a store that fails works again, or the other way round.
const PUTS_A_TURN: u64 = 2;
/// How often a name is replaced under its readers.
const REPLACEMENTS: u32 = 20_000;
