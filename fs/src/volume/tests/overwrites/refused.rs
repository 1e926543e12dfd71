//! Packs that are in the store while no entry can be decided, because the disk of the log or of the index is full.

use super::*;

impl Scene {
    pub(super) fn let_decide(&self, has_room: bool) {
        self.volume.shared.sequencer.set_index_room(has_room);
    }

    pub(super) fn puts_begun(&self) -> u64 {
        self.store.begun.load(Ordering::SeqCst)
    }

    /// Flushes again and again, each of which must be refused.
    async fn is_refused(&self) {
        for _ in 0..FLUSHES {
            assert_eq!(self.fsync().await.unwrap(), Err(Errno::ENOSPC));
        }
    }
}

/// The fear: while the disk of the log is full everything dirty is put again with every flush, under names that nobody will ever delete.
#[tokio::test]
async fn what_is_in_the_store_is_not_put_again_while_no_entry_can_be_decided() {
    let scene = Scene::new(unhurried(), 0).await;
    let put = scene.puts_begun() + 1;
    scene.store.puts.send_replace(Puts::Hold);
    scene.write(0, &[b'X'; 8192]).await;
    let fsync = scene.fsync();
    scene.begun(put).await;
    scene.let_decide(false);
    scene.store.puts.send_replace(Puts::Succeed);
    assert_eq!(fsync.await.unwrap(), Err(Errno::ENOSPC));
    scene.is_refused().await;
    assert_eq!(scene.puts_begun(), put);
    scene.let_decide(true);
    scene.fsync().await.unwrap().unwrap();
    assert_eq!(scene.puts_begun(), put);
    assert!(scene.crashed().await == [b'X'; 8192]);
    assert_eq!(scene.volume.dirty_bytes(), 0);
}

/// The fear: everything dirty is put although it is known that no entry can refer to it.
#[tokio::test]
async fn nothing_is_put_while_no_entry_can_be_decided() {
    let scene = Scene::new(unhurried(), 0).await;
    let put = scene.puts_begun();
    scene.write(0, &[b'X'; 8192]).await;
    scene.let_decide(false);
    scene.is_refused().await;
    assert_eq!(scene.volume.sync_all().wait().await, Err(Errno::ENOSPC));
    assert_eq!(scene.puts_begun(), put);
    scene.let_decide(true);
    scene.fsync().await.unwrap().unwrap();
    assert!(scene.crashed().await == [b'X'; 8192]);
}

/// The fears: what was overwritten or cut off since its pack was stored comes back when entries can be decided again; one that follows it
/// comes first, and a crash shows zeros; two files make one pack known twice.
#[tokio::test]
async fn what_has_changed_since_it_was_put_is_put_anew_and_the_rest_is_found() {
    let scene = Scene::new(unhurried(), 0).await;
    let other = scene.another("g").await;
    other.write(0, b"other").await;
    scene.write(0, &[b'X'; 8192]).await;
    scene.store.puts.send_replace(Puts::Hold);
    let put = scene.puts_begun() + 1;
    let synced = tokio::spawn(scene.volume.sync_all().wait());
    scene.begun(put).await;
    scene.write(100, &[b'Y'; 100]).await;
    scene.let_decide(false);
    scene.store.puts.send_replace(Puts::Succeed);
    assert_eq!(synced.await.unwrap(), Err(Errno::ENOSPC));
    scene.let_decide(true);
    scene.store.puts.send_replace(Puts::Hold);
    scene.write(1000, &[b'Z'; 100]).await;
    scene.write(8192, &[b'W'; 100]).await;
    scene.resize(8200).await.unwrap();
    let fsync = scene.fsync();
    scene.begun(put + 1).await;
    scene.write(4000, &[b'V'; 1]).await;
    scene.store.puts.send_replace(Puts::Succeed);
    fsync.await.unwrap().unwrap();
    scene.volume.sync_all().wait().await.unwrap();
    let mut expected = [vec![b'X'; 8192], vec![b'W'; 8]].concat();
    expected[100..200].fill(b'Y');
    expected[1000..1100].fill(b'Z');
    expected[4000] = b'V';
    assert!(scene.crashed().await == expected);
    assert!(contents(scene.log.reopened(), &scene.store, other.ino).await == b"other");
    // The pack of both, what was written after it, the last byte: each is put once and known once.
    assert_eq!(scene.puts_begun(), put + 2);
    assert_eq!(scene.volume.known_packs().count(), 3);
    assert_eq!(scene.volume.dirty_bytes(), 0);
}

/// The fear: while the disk of the log is full a write waits for memory that nothing can clean, and fails after a minute with what says
/// nothing of the disk.
#[tokio::test]
async fn a_write_that_waits_for_memory_hears_at_once_that_no_entry_can_be_decided() {
    let options =
        VolumeOptions { dirty_bytes: 8192, io_timeout: Duration::from_secs(2), ..VolumeOptions::default() };
    let scene = Scene::new(options, 0).await;
    scene.write(0, &[b'X'; 8192]).await;
    scene.let_decide(false);
    assert_eq!(scene.try_write(8192, &[b'Y'; 10]).await, Err(Errno::ENOSPC));
    scene.let_decide(true);
    scene.write(8192, &[b'Y'; 10]).await;
}

const FLUSHES: usize = 20;
