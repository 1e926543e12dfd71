//! What dirty data takes in memory, also when it is not to be stored any more.

use super::*;

/// The fear: whoever writes files and empties them over a store that does not answer fills the memory: what is on its way is held, and
/// counted no more.
#[tokio::test]
async fn what_was_cut_off_on_its_way_counts_until_nobody_holds_it() {
    const LIMIT: u64 = 1 << 20;
    let options = VolumeOptions { dirty_bytes: LIMIT, ..VolumeOptions::default() };
    let scene = Scene::new(options, 0).await;
    scene.store.puts.send_replace(Puts::Hold);
    let bytes = Bytes::from(Random(1).bytes(LIMIT as usize / 2));
    let mut waiting = None;
    for number in 0..4 {
        let file = scene.another(&number.to_string()).await;
        let written = file.volume.write(&Caller::default(), file.ino, file.handle, 0, bytes.clone());
        if let Answer::Later(written) = written {
            waiting = Some(written);
            break;
        }
        file.close().await;
        scene.begun(number + 1).await;
        file.resize(0).await.unwrap();
        assert_eq!(scene.volume.dirty_bytes(), 0);
    }
    scene.store.puts.send_replace(Puts::Succeed);
    waiting.expect("a writer waits").await.unwrap();
    scene.volume.sync_all().wait().await.unwrap();
    until("everything to be let go", || scene.volume.shared.files.memory.bytes() == 0).await;
}

/// The fear: a put is given up, and what does it goes on in a directory that hangs and keeps the bytes: they are counted no more, and come
/// again and again until there is no memory.
#[tokio::test]
async fn what_a_put_keeps_that_was_given_up_counts_until_it_is_let_go() {
    let scene = Scene::new(impatient(), 0).await;
    scene.store.puts.send_replace(Puts::Detach);
    scene.write(0, &Random(1).bytes(1 << 20)).await;
    assert_eq!(scene.fsync().await.unwrap(), Err(Errno::EIO));
    scene.fails().await;
    scene.resize(0).await.unwrap();
    assert_eq!(scene.volume.dirty_bytes(), 0);
    let (kept, counted) = (scene.store.kept.load(Ordering::SeqCst), scene.volume.shared.files.memory.bytes());
    assert!(kept > 1 << 20 && kept <= counted, "{kept} bytes are kept, {counted} are counted");
    scene.store.puts.send_replace(Puts::Succeed);
    until("everything to be let go", || scene.volume.shared.files.memory.bytes() == 0).await;
}
