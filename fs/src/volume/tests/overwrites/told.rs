//! What is told of a flush that failed: what is true when somebody asks.
//!
//! Invariants:
//! - Nothing is said of bytes that are stored by now, and nothing that is unstored after a failure is passed over.

use super::*;

impl Scene {
    /// What a close says.
    async fn closes(&self) -> Result<(), Errno> {
        self.volume.flush(self.ino, self.handle).wait().await
    }

    fn is_forgotten(&self) -> bool {
        self.volume.shared.files.find(self.ino).is_none()
    }

    /// Waits until a flush of the file has failed.
    pub(super) async fn fails(&self) {
        let file = self.volume.shared.files.find(self.ino).unwrap();
        until("a flush that fails", || file.lock().failure.is_some()).await;
    }
}

/// The fear: an outage is told hours after it was made good, to whoever asks first, and each file that was closed while it lasted takes room
/// until the restart.
#[tokio::test]
async fn a_failure_is_not_told_any_more_once_its_bytes_are_stored() {
    let options = VolumeOptions { flush_after: Duration::from_millis(20), ..VolumeOptions::default() };
    for refused in [false, true] {
        let open = Scene::new(options, 0).await;
        let [closed, emptied] = [open.another("closed").await, open.another("emptied").await];
        let files = [&open, &closed, &emptied];
        open.store.puts.send_replace(if refused { Puts::Hold } else { Puts::Vary(1) });
        for file in files {
            file.write(0, &[b'X'; 8192]).await;
        }
        open.let_decide(!refused);
        for file in files {
            file.fails().await;
        }
        closed.volume.release(closed.ino, closed.handle);
        open.let_decide(true);
        emptied.resize(0).await.unwrap();
        assert_eq!(emptied.closes().await, Ok(()));
        emptied.volume.release(emptied.ino, emptied.handle);
        open.store.puts.send_replace(Puts::Succeed);
        until("everything to be stored", || open.volume.dirty_bytes() == 0).await;
        assert_eq!(open.fsync().await.unwrap(), Ok(()));
        assert_eq!(open.closes().await, Ok(()));
        assert_eq!(open.volume.sync_all().wait().await, Ok(()));
        open.volume.release(open.ino, open.handle);
        until("all to be forgotten", || files.iter().all(|file| file.is_forgotten())).await;
        assert!(open.crashed().await == [b'X'; 8192]);
    }
}

/// The fear: whoever has been told once closes the file, hears of success, and removes what he copied.
#[tokio::test]
async fn a_close_says_that_bytes_failed_for_as_long_as_they_are_not_stored() {
    let scene = Scene::new(unhurried(), 0).await;
    let read_only = OpenFlags { write: false, ..READ_WRITE };
    let reader = scene.volume.open(&Caller::default(), scene.ino, read_only).wait().await.unwrap().handle;
    scene.write(0, &[b'X'; 8192]).await;
    scene.store.puts.send_replace(Puts::Vary(1));
    for _ in 0..3 {
        assert_eq!(scene.fsync().await.unwrap(), Err(Errno::EIO));
        assert_eq!(scene.closes().await, Err(Errno::EIO));
        assert_eq!(scene.closes().await, Err(Errno::EIO));
        // It has written nothing.
        assert_eq!(scene.volume.flush(scene.ino, reader).wait().await, Ok(()));
    }
    scene.store.puts.send_replace(Puts::Succeed);
    assert_eq!(scene.fsync().await.unwrap(), Ok(()));
    assert_eq!(scene.closes().await, Ok(()));
}

/// The fear: while the store is out of order and the memory is full everything dirty is compressed and put again, ten times a second.
#[tokio::test]
async fn what_failed_is_left_alone_for_a_while_unless_somebody_waits_for_it() {
    let options = VolumeOptions { dirty_bytes: 8192, io_timeout: Duration::from_secs(1), ..unhurried() };
    let scene = Scene::new(options, 0).await;
    let begun = || scene.store.begun.load(Ordering::SeqCst);
    scene.store.puts.send_replace(Puts::Vary(1));
    let before = begun();
    scene.write(0, &[b'X'; 8192]).await;
    assert_eq!(scene.try_write(8192, &[b'Y'; 10]).await, Err(Errno::EIO));
    let puts = begun() - before;
    assert!((1..=3).contains(&puts), "{puts} puts");
    // Whoever waits does not wait for the pause, and it does not pass what is said to him.
    for _ in 0..3 {
        assert_eq!(scene.fsync().await.unwrap(), Err(Errno::EIO));
        assert_eq!(scene.volume.sync_all().wait().await, Err(Errno::EIO));
    }
    assert!(begun() - before >= puts + 6);
    scene.store.puts.send_replace(Puts::Succeed);
    scene.fsync().await.unwrap().unwrap();
    // It is over with the first success.
    scene.write(0, &[b'Z'; 8192]).await;
    scene.write(8192, &[b'Y'; 10]).await;
    assert!(scene.volume.sync_all().wait().await.is_ok());
}

/// The fear: bytes that cannot be stored take with them what can be: a volume that is closed leaves entries that are not durable, goes on
/// deciding, and says nothing.
#[tokio::test]
async fn a_volume_that_cannot_store_everything_is_closed_all_the_same() {
    let scene = Scene::new(unhurried(), 0).await;
    scene.store.puts.send_replace(Puts::Vary(1));
    scene.write(0, &[b'X'; 8192]).await;
    let make =
        |name| scene.volume.mkdir(&Caller::default(), Ino::ROOT, &Name::new(name).unwrap(), 0o755).wait();
    make("before").await.unwrap();
    assert_eq!(scene.volume.close().await, Err(Errno::EIO));
    assert_eq!(make("after").await, Err(Errno::EROFS));
    assert_eq!(scene.volume.dirty_bytes(), 8192);
    assert_eq!(scene.volume.durable(), scene.volume.state().position);
    assert_eq!(scene.volume.index_snapshot().state().unwrap().position, scene.volume.durable());
}

/// The fear: a program that opens and closes a file very often has it compressed and put each time, while the store is out of order.
#[tokio::test]
async fn a_close_leaves_alone_what_failed_just_now() {
    let scene = Scene::new(unhurried(), 0).await;
    scene.store.puts.send_replace(Puts::Vary(1));
    scene.write(0, &[b'X'; 8192]).await;
    assert_eq!(scene.fsync().await.unwrap(), Err(Errno::EIO));
    let before = scene.puts_begun();
    let file = scene.volume.shared.files.find(scene.ino).unwrap();
    for _ in 0..50 {
        assert_eq!(scene.closes().await, Err(Errno::EIO));
        let is_left_alone = || {
            let inner = file.lock();
            inner.queued.is_none() && inner.flushes_begun == inner.flushes_ended
        };
        until("what a close has begun", is_left_alone).await;
    }
    let puts = scene.puts_begun() - before;
    assert!(puts <= 2, "{puts} puts");
}

/// The fear: the store is back, and whoever writes still fails, because everything that takes the room is left alone for a long while.
#[tokio::test]
async fn what_is_left_alone_is_tried_again_once_something_else_was_stored() {
    let options = VolumeOptions { dirty_bytes: 8192, io_timeout: Duration::from_secs(3), ..unhurried() };
    let scene = Scene::new(options, 0).await;
    let other = scene.another("g").await;
    other.write(0, b"other").await;
    scene.write(0, &[b'X'; 8192]).await;
    scene.store.puts.send_replace(Puts::Vary(1));
    // After each failure the pause is twice as long: 8 s at last.
    for _ in 0..4 {
        assert_eq!(scene.fsync().await.unwrap(), Err(Errno::EIO));
    }
    scene.store.puts.send_replace(Puts::Succeed);
    other.fsync().await.unwrap().unwrap();
    assert_eq!(scene.try_write(8192, b"later").await, Ok(5));
}

/// The fear: whoever syncs while a put is under way that is to fail, because the store was out of order when it began, hears of that,
/// although the store was in order all the time that he waited.
#[tokio::test]
async fn an_fsync_tries_once_more_what_began_before_it() {
    let scene = Scene::new(patient(), 0).await;
    scene.store.puts.send_replace(Puts::Hold);
    scene.write(0, &[b'X'; 8192]).await;
    scene.close().await;
    scene.begun(1).await;
    let mut fsync = Box::pin(scene.volume.fsync(scene.ino, Some(scene.handle)).wait());
    assert!(futures::poll!(&mut fsync).is_pending());
    scene.store.puts.send_replace(Puts::FailHeld);
    assert_eq!(fsync.await, Ok(()));
    assert!(scene.crashed().await == [b'X'; 8192]);
}
