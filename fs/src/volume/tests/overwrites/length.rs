//! Changes of length before the bytes in front of the end are stored.

use super::*;
use crate::Attr;

impl Scene {
    pub(super) async fn resize(&self, size: u64) -> Result<Attr, Errno> {
        let change = SetAttr { size: Some(size), ..SetAttr::default() };
        self.volume.setattr(&Caller::default(), self.ino, None, change).wait().await
    }

    async fn stored_size(&self) -> u64 {
        self.volume.inode_row(self.ino).unwrap().unwrap().size
    }
}

/// The fear: a length is in the log before the bytes in front of it, and a crash shows zeros in their place.
#[tokio::test]
async fn a_length_is_not_logged_before_the_bytes_in_front_of_it() {
    for (size, waits) in [(3000, false), (4096, false), (9000, true)] {
        let scene = Scene::new(VolumeOptions::default(), 0).await;
        scene.write(0, &[b'Y'; 4096]).await;
        scene.store.puts.send_replace(Puts::Hold);
        let change = SetAttr { size: Some(size), ..SetAttr::default() };
        let mut resized = match scene.volume.setattr(&Caller::default(), scene.ino, None, change) {
            Answer::Now(resized) if !waits => {
                assert_eq!(resized.unwrap().size, size);
                None
            }
            Answer::Later(later) if waits => Some(tokio::spawn(later)),
            _ => panic!("{size} waits, or does not"),
        };
        if waits {
            scene.begun(1).await;
        }
        scene.volume.durable_here().await.unwrap();
        assert_eq!(scene.crashed().await, Vec::<u8>::new(), "zeros that nobody wrote");
        scene.store.puts.send_replace(Puts::Succeed);
        if let Some(resized) = resized.take() {
            assert_eq!(resized.await.unwrap().unwrap().size, size);
        }
        scene.fsync().await.unwrap().unwrap();
        let (found, written) = (scene.crashed().await, size.min(4096) as usize);
        assert_eq!((found.len() as u64, scene.stored_size().await), (size, size));
        assert!(found[..written].iter().all(|byte| *byte == b'Y'));
        assert!(found[written..].iter().all(|byte| *byte == 0));
    }
}

/// The fear: a new length goes without an entry of its own because bytes that are to be stored bring it; whoever waits for bytes that it has
/// cut off is told that he has them, and gets neither.
#[tokio::test]
async fn a_length_behind_which_bytes_are_on_their_way_waits_for_them() {
    let scene = Scene::new(VolumeOptions::default(), 0).await;
    scene.store.puts.send_replace(Puts::Hold);
    scene.write(3000, &[b'Y'; 1000]).await;
    let fsync = scene.fsync();
    scene.begun(1).await;
    scene.write(0, &[b'Z'; 2000]).await;
    let mut resized = Box::pin(scene.resize(1500));
    assert!(futures::poll!(&mut resized).is_pending());
    scene.store.puts.send_replace(Puts::Succeed);
    fsync.await.unwrap().unwrap();
    let found = scene.crashed().await;
    assert!(found.len() == 4000 || found == [b'Z'; 1500], "{} bytes", found.len());
    assert_eq!(resized.await.unwrap().size, 1500);
    scene.fsync().await.unwrap().unwrap();
    assert!(scene.crashed().await == [b'Z'; 1500]);
}

/// The fear: an fsync waits for a put that gets no answer, although everything in it was cut off and it has nothing to wait for.
#[tokio::test]
async fn an_fsync_whose_bytes_are_all_cut_off_waits_for_nothing() {
    for removes in [false, true] {
        let scene = Scene::new(patient(), 0).await;
        scene.store.puts.send_replace(Puts::Hold);
        scene.write(0, &[b'Y'; 4096]).await;
        let fsync = scene.fsync();
        scene.begun(1).await;
        if removes {
            scene
                .volume
                .unlink(&Caller::default(), Ino::ROOT, &Name::new("f").unwrap())
                .wait()
                .await
                .unwrap();
            scene.volume.release(scene.ino, scene.handle);
        } else {
            scene.resize(0).await.unwrap();
        }
        tokio::time::timeout(PATIENCE, fsync).await.expect("it waits for nothing").unwrap().unwrap();
        scene.store.puts.send_replace(Puts::Succeed);
    }
}

/// The fear: a file is emptied and written anew while the put of what it was gets no answer, and an fsync of the new bytes waits for the old.
#[tokio::test]
async fn an_fsync_does_not_wait_for_bytes_that_were_cut_off_before_its_own() {
    for behind in [false, true] {
        let scene = Scene::new(patient(), 0).await;
        scene.store.puts.send_replace(Puts::HoldLarge);
        scene.fill(300 << 10).await;
        if behind {
            // The flight begins behind what stays.
            scene.write(0, &[b'W'; 8192]).await;
            scene.store.puts.send_replace(Puts::Succeed);
            scene.fsync().await.unwrap().unwrap();
            scene.store.puts.send_replace(Puts::HoldLarge);
            scene.write(8192, &Random(7).bytes(300 << 10)).await;
        }
        let begun = scene.store.begun.load(Ordering::SeqCst);
        let before = scene.fsync();
        scene.begun(begun + 1).await;
        scene.resize(0).await.unwrap();
        scene.fill_little().await;
        scene.is_synced().await;
        before.await.unwrap().unwrap();
        assert!(scene.crashed().await == [b'X'; 4096]);
        // What arrives late does not come back, and what is on its way meanwhile does not meet it.
        scene.store.puts.send_replace(Puts::HoldLarge);
        scene.write(0, &Random(8).bytes(200 << 10)).await;
        let after = scene.fsync();
        scene.begun(begun + 3).await;
        scene.store.puts.send_replace(Puts::Succeed);
        after.await.unwrap().unwrap();
        assert!(scene.crashed().await == Random(8).bytes(200 << 10));
        assert_eq!(scene.volume.dirty_bytes(), 0);
        until("everything to be let go", || scene.volume.shared.files.memory.bytes() == 0).await;
    }
}

/// The fear: a large file is removed while it is on its way, and all of it goes up although nothing will ever refer to it.
#[tokio::test]
async fn what_was_cut_off_is_not_put() {
    let scene = Scene::new(patient(), 0).await;
    scene.fill(64 << 20).await;
    scene.store.puts.send_replace(Puts::HoldLarge);
    let fsync = scene.fsync();
    scene.begun(8).await;
    scene.resize(0).await.unwrap();
    fsync.await.unwrap().unwrap();
    scene.store.puts.send_replace(Puts::Succeed);
    until("everything to be let go", || scene.volume.shared.files.memory.bytes() == 0).await;
    assert_eq!(scene.store.begun.load(Ordering::SeqCst), 8);
}
