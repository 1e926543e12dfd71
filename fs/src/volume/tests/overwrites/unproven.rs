//! Packs of which it is not known whether they were stored: their puts got no answer.

use super::*;

impl Scene {
    /// Flushes until it is not known of `puts` packs whether they are stored.
    async fn is_left_in_the_dark(&self, puts: Puts, begun: u64) {
        self.store.puts.send_replace(puts);
        assert_eq!(self.fsync().await.unwrap(), Err(Errno::EIO));
        self.fails().await;
        let ended = || {
            let file = self.volume.shared.files.find(self.ino).unwrap();
            let inner = file.lock();
            inner.flushes_begun == inner.flushes_ended
        };
        until("the flight to end", ended).await;
        assert_eq!(self.puts_begun(), begun);
    }
}

/// The fear: a store takes what it is given, and its answers do not come in time: everything is put again and again, under names that nobody
/// will ever delete.
#[tokio::test]
async fn what_may_be_in_the_store_is_asked_for_and_not_put_again() {
    for large in [false, true] {
        let scene = Scene::new(impatient(), 0).await;
        let bytes = Random(1).bytes(if large { 1 << 20 } else { 8192 });
        scene.write(0, &bytes).await;
        // As long as the store says nothing, nothing is put either.
        for _ in 0..3 {
            scene.is_left_in_the_dark(Puts::StoreAndHang, 1).await;
        }
        // What is written meanwhile hides what is there, and comes into a pack of its own.
        scene.write(100, b"later").await;
        scene.store.puts.send_replace(Puts::Succeed);
        scene.fsync().await.unwrap().unwrap();
        let mut expected = bytes;
        expected[100..105].copy_from_slice(b"later");
        assert!(scene.crashed().await == expected);
        assert_eq!((scene.puts_begun(), scene.volume.known_packs().count()), (2, 2));
        assert_eq!(scene.volume.dirty_bytes(), 0);
        until("everything to be let go", || scene.volume.shared.files.memory.bytes() == 0).await;
    }
}

/// A file of these bytes and a small one, in one pack that was put and lost. On a busy machine each may have got one of its own: then once more.
async fn both_in_one_pack(bytes: &[u8]) -> (Scene, Scene) {
    loop {
        let scene = Scene::new(impatient(), 0).await;
        let other = scene.another("g").await;
        scene.write(0, bytes).await;
        other.write(0, b"other").await;
        scene.store.puts.send_replace(Puts::Lose);
        assert_eq!(scene.volume.sync_all().wait().await, Err(Errno::EIO));
        if scene.puts_begun() == 1 {
            return (scene, other);
        }
    }
}

/// The fear: a pack is counted on that the store has not, or has half; whoever syncs when the store is back hears of a failure of before.
#[tokio::test]
async fn what_the_store_has_not_is_put_anew_by_the_same_fsync() {
    for has_half in [false, true] {
        let bytes = Random(1).bytes(8192);
        let (scene, other) = both_in_one_pack(&bytes).await;
        scene.fails().await;
        other.fails().await;
        assert_eq!(scene.puts_begun(), 1);
        scene.write(100, b"later").await;
        if has_half {
            scene.store.damage_last().await;
        }
        scene.store.puts.send_replace(Puts::Succeed);
        scene.fsync().await.unwrap().unwrap();
        other.fsync().await.unwrap().unwrap();
        let mut expected = bytes;
        expected[100..105].copy_from_slice(b"later");
        assert!(scene.crashed().await == expected);
        assert!(contents(scene.log.reopened(), &scene.store, other.ino).await == b"other");
        assert_eq!(scene.volume.dirty_bytes(), 0);
    }
}

/// The fear: what may be in the store lies scattered over the file, and each piece of it is asked for and put by itself.
#[tokio::test]
async fn a_pack_that_may_be_in_the_store_is_asked_for_once_wherever_its_pieces_are() {
    const PAGES: u64 = 100;
    let scene = Scene::new(impatient(), 0).await;
    let bytes = Random(1).bytes(PAGES as usize * 8192);
    let page = |number: u64| (number * 4096, &bytes[number as usize * 4096..][..4096]);
    for number in 0..PAGES {
        let (at, page) = page(2 * number + 1);
        scene.write(at, page).await;
    }
    scene.is_left_in_the_dark(Puts::Lose, 1).await;
    for number in 0..PAGES {
        let (at, page) = page(2 * number);
        scene.write(at, page).await;
    }
    scene.is_left_in_the_dark(Puts::StoreAndHang, 2).await;
    let before = scene.store.asked.load(Ordering::SeqCst);
    scene.store.puts.send_replace(Puts::Succeed);
    scene.fsync().await.unwrap().unwrap();
    assert!(scene.crashed().await == bytes);
    let asked = scene.store.asked.load(Ordering::SeqCst) - before;
    assert!(asked <= 2, "asked {asked} times for two packs");
    assert_eq!((scene.puts_begun(), scene.volume.known_packs().count()), (3, 2));
}

/// The fear: very many packs may be in the store, and it is asked for all of them at once.
#[tokio::test]
async fn no_more_packs_are_asked_for_at_once_than_are_put() {
    const FILES: u64 = 70;
    let scene = Scene::new(impatient(), 0).await;
    let (mut files, mut fsyncs) = (Vec::new(), Vec::new());
    for number in 0..FILES {
        let file = scene.another(&number.to_string()).await;
        file.fill(200 << 10).await;
        files.push(file);
    }
    scene.store.puts.send_replace(Puts::Lose);
    // Each has a pack of its own.
    fsyncs.extend(files.iter().map(Scene::fsync));
    scene.begun(FILES).await;
    for file in &files {
        file.fails().await;
    }
    scene.store.asking_most.store(0, Ordering::SeqCst);
    scene.store.puts.send_replace(Puts::StoreAndHang);
    let synced = scene.volume.sync_all().wait();
    assert_eq!(synced.await, Err(Errno::EIO));
    let all_asked = || scene.store.asked.load(Ordering::SeqCst) >= FILES;
    until("all to be asked for", all_asked).await;
    let most = scene.store.asking_most.load(Ordering::SeqCst);
    assert!(most <= 64, "{most} at once");
    scene.store.puts.send_replace(Puts::Succeed);
}
