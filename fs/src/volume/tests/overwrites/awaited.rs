//! What an fsync waits for, and what it does not wait for: the bytes of others.

use super::*;
use crate::volume::{files::Urgency, flush::Batch};

impl Scene {
    /// Writes so many bytes that no pack makes shorter.
    pub(super) async fn fill(&self, bytes: usize) {
        let mut random = Random(self.ino.get());
        for at in (0..bytes).step_by(MIB) {
            self.write(at as u64, &random.bytes(MIB.min(bytes - at))).await;
        }
    }

    /// Some bytes that fit into a small pack.
    pub(super) async fn fill_little(&self) {
        self.write(0, &[b'X'; 4096]).await;
    }

    /// Waits until it is known that somebody waits.
    async fn is_queued(&self) {
        let file = self.volume.shared.files.find(self.ino).unwrap();
        let is_asked_for = || {
            let inner = file.lock();
            inner.queued.is_some() || inner.flushes_begun > 0
        };
        until("a request", is_asked_for).await;
    }

    pub(super) async fn is_synced(&self) {
        tokio::time::timeout(PATIENCE, self.fsync()).await.expect("it waits for others").unwrap().unwrap();
        let row = self.volume.inode_row(self.ino).unwrap().unwrap();
        assert_eq!(row.size, 4096);
    }
}

/// The fear: one put that hangs holds up all files whose packs were put behind it.
#[tokio::test]
async fn an_fsync_does_not_wait_for_the_packs_of_other_files_in_its_batch() {
    let (large, small) = files().await;
    large.fill(4 * MIB).await;
    small.fill_little().await;
    large.store.puts.send_replace(Puts::Hold);
    large.close().await;
    small.close().await;
    // One batch, and a pack each.
    small.begun(2).await;
    let fsync = small.fsync();
    assert!(!fsync.is_finished());
    large.store.puts.send_replace(Puts::HoldLarge);
    tokio::time::timeout(PATIENCE, fsync).await.expect("it waits for others").unwrap().unwrap();
    assert!(small.crashed().await == [b'X'; 4096]);
    let stored = large.volume.inode_row(large.ino).unwrap().unwrap().size;
    assert_eq!(stored, 0);
    large.ends().await;
}

/// The fear: a small file that somebody waits for comes after all that was closed before it.
#[tokio::test]
async fn a_file_that_somebody_waits_for_is_put_before_what_was_closed_before_it() {
    let (large, small) = files().await;
    large.fill(36 * MIB).await;
    small.fill_little().await;
    large.store.puts.send_replace(Puts::HoldLarge);
    large.close().await;
    small.close().await;
    // As many as are under way at once: the turn of the small one has not come.
    small.begun(8).await;
    small.is_synced().await;
    large.ends().await;
}

/// The fear: a file that was closed and is synced then is in both queues, and the batch that nobody waits for takes it.
#[tokio::test]
async fn what_nobody_waits_for_leaves_what_somebody_waits_for_alone() {
    let (large, small) = files().await;
    for file in [&large, &small] {
        file.fill_little().await;
    }
    let volume = &large.volume;
    let [unhurried, awaited] = [&large, &small].map(|file| volume.shared.files.find(file.ino).unwrap());
    for (file, urgency) in [(&unhurried, Urgency::Soon), (&awaited, Urgency::First)] {
        file.lock().queued = Some(urgency);
    }
    let both = [Arc::clone(&awaited), unhurried];
    Batch::run(volume.clone(), both.to_vec(), Urgency::Soon).await;
    assert_eq!(both.each_ref().map(|file| file.lock().flushes_begun), [0, 1]);
    assert_eq!(awaited.lock().queued, Some(Urgency::First));
    Batch::run(volume.clone(), both.to_vec(), Urgency::First).await;
    assert_eq!(awaited.lock().flushes_stored, 1);
}

/// The fear: whoever syncs what is on its way already waits as long as if nobody did.
#[tokio::test]
async fn a_flight_that_is_synced_on_its_way_is_waited_for_from_then_on() {
    let (large, _) = files().await;
    large.fill(300 << 10).await;
    large.store.puts.send_replace(Puts::Hold);
    large.close().await;
    large.begun(1).await;
    let file = large.volume.shared.files.find(large.ino).unwrap();
    let is_awaited = || file.lock().awaited.load(Ordering::SeqCst);
    assert!(!is_awaited());
    let fsync = large.fsync();
    until("a fsync", is_awaited).await;
    large.ends().await;
    fsync.await.unwrap().unwrap();
}

/// The fear: batches that make no progress leave no place for what somebody waits for.
#[tokio::test]
async fn a_file_that_somebody_waits_for_is_put_whatever_else_is_under_way() {
    let (large, small) = files().await;
    large.store.puts.send_replace(Puts::HoldLarge);
    let (mut begun, mut waiting) = (0, Vec::new());
    for number in 0..8 {
        let file = large.another(&number.to_string()).await;
        file.fill(2 * LARGE).await;
        match number % 2 {
            0 => file.close().await,
            _ => waiting.push(file.fsync()),
        }
        begun += 1;
        file.begun(begun).await;
    }
    small.fill_little().await;
    small.is_synced().await;
    assert!(waiting.iter().all(|fsync| !fsync.is_finished()));
    large.ends().await;
    for fsync in waiting {
        fsync.await.unwrap().unwrap();
    }
}

/// Lets every turn of those that somebody waits for be taken for a while: whoever comes meanwhile is in one batch. Returns how many puts
/// have begun.
async fn take_turns(scene: &Scene) -> u64 {
    for number in 1..=4 {
        let file = scene.another(&format!("turn {number}")).await;
        file.fill(2 * LARGE).await;
        file.fsync();
        file.begun(number).await;
    }
    4
}

/// The fear: a small file shares a pack with others that are not large, but together they are, and it waits as a large one does.
#[tokio::test]
async fn a_small_file_that_somebody_waits_for_shares_no_large_pack() {
    let scene = Scene::new(patient(), 0).await;
    let [small, medium] = [scene.another("small").await, scene.another("medium").await];
    scene.store.puts.send_replace(Puts::HoldLarge);
    take_turns(&scene).await;
    small.fill_little().await;
    medium.fill(250 << 10).await;
    let fsyncs = [small.fsync(), medium.fsync()];
    for file in [&small, &medium] {
        file.is_queued().await;
    }
    small.is_synced().await;
    scene.ends().await;
    for fsync in fsyncs {
        fsync.await.unwrap().unwrap();
    }
}

/// The fear: files in one batch hang, and those behind them are not put until they have failed.
#[tokio::test]
async fn a_large_file_that_somebody_waits_for_does_not_wait_for_the_puts_of_others() {
    const FILES: u64 = 9;
    // Those of the first kind are in one batch with others.
    for bytes in [200 << 10, 300 << 10] {
        let scene = Scene::new(patient(), 0).await;
        scene.store.puts.send_replace(Puts::HoldLarge);
        let begun = take_turns(&scene).await;
        let (mut files, mut fsyncs) = (Vec::new(), Vec::new());
        for number in 0..FILES {
            let file = scene.another(&number.to_string()).await;
            file.fill(bytes).await;
            files.push(file);
        }
        for file in &files {
            fsyncs.push(file.fsync());
        }
        scene.begun(begun + FILES).await;
        scene.ends().await;
        for fsync in fsyncs {
            fsync.await.unwrap().unwrap();
        }
    }
}

/// The fear: puts that were under way when the store hung take all places, and it is long back when the next file is put.
#[tokio::test]
async fn a_file_that_somebody_waits_for_is_put_however_many_puts_have_been_lost() {
    let scene = Scene::new(patient(), 0).await;
    scene.store.puts.send_replace(Puts::Lose);
    for number in 1..=32 {
        let lost = scene.another(&number.to_string()).await;
        lost.fill_little().await;
        lost.fsync();
        lost.begun(number).await;
    }
    scene.store.puts.send_replace(Puts::Succeed);
    let [large, small] = [scene.another("large").await, scene.another("small").await];
    large.fill(300 << 10).await;
    small.fill_little().await;
    let fsync = large.fsync();
    small.is_synced().await;
    tokio::time::timeout(PATIENCE, fsync).await.expect("it waits for others").unwrap().unwrap();
}

/// The fear: packs share a slow uplink, none is stored before all are given up, and all are put anew, for ever. An fsync that waits no
/// longer than a pack takes does not end its put.
#[tokio::test]
async fn packs_that_share_a_slow_uplink_are_stored_all_the_same() {
    const PACKS: u64 = 8;
    let alone = Duration::from_millis(700);
    let options = VolumeOptions { io_timeout: alone / 2, put_timeout: 2 * alone, ..unhurried() };
    let scene = Scene::new(options, 0).await;
    scene.store.puts.send_replace(Puts::Share((4 * MIB) as u64 / alone.as_millis() as u64));
    scene.fill(PACKS as usize * 4 * MIB).await;
    let synced = async { while scene.fsync().await.unwrap().is_err() {} };
    tokio::time::timeout(PATIENCE, synced).await.expect("nothing is stored");
    let begun = scene.store.begun.load(Ordering::SeqCst);
    // Five halvings from 32 to 1, each of which may cost a round.
    assert!(begun <= 6 * PACKS, "{begun} puts of {PACKS} packs");
    assert_eq!(scene.crashed().await.len(), PACKS as usize * 4 * MIB);
}

/// The fear: files of which nobody waits for one alone get a pack each.
#[tokio::test]
async fn files_that_are_flushed_together_share_packs() {
    let (first, _) = files().await;
    for number in 0..100 {
        first.another(&number.to_string()).await.fill_little().await;
    }
    first.volume.sync_all().wait().await.unwrap();
    let packs = first.volume.known_packs().count();
    assert!(packs <= 2, "{packs} packs");
}

/// The fear: packs are stored in any order, or not, and a crash shows zeros in front of what came early.
#[tokio::test]
async fn packs_that_arrive_in_any_order_leave_a_prefix() {
    let scene = Scene::new(unhurried(), 3).await;
    let fill = vec![b'Y'; MIB];
    for at in (0..40 * MIB).step_by(MIB) {
        scene.write(at as u64, &fill).await;
    }
    scene.store.puts.send_replace(Puts::Vary(2));
    let mut found = 0;
    loop {
        let fsync = scene.fsync();
        while !fsync.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let crashed = scene.crashed().await;
            assert!(crashed.iter().all(|byte| *byte == b'Y'), "zeros that nobody wrote");
            assert!(crashed.len() >= found);
            found = crashed.len();
        }
        if fsync.await.unwrap().is_ok() {
            assert_eq!(scene.crashed().await.len(), 40 * MIB);
            break;
        }
    }
    assert_eq!(scene.volume.dirty_bytes(), 0);
    // What had arrived when another put failed was not put again.
    let [begun, failed] = [&scene.store.begun, &scene.store.failed].map(|puts| puts.load(Ordering::SeqCst));
    assert!(failed > 0);
    assert_eq!(begun - failed, scene.volume.known_packs().count() as u64);
}

impl Scene {
    async fn ends(&self) {
        self.store.puts.send_replace(Puts::Succeed);
        self.volume.sync_all().wait().await.unwrap();
        assert_eq!(self.volume.dirty_bytes(), 0);
    }
}

async fn files() -> (Scene, Scene) {
    let large = Scene::new(unhurried(), 0).await;
    let small = large.another("small").await;
    (large, small)
}

const MIB: usize = 1 << 20;
