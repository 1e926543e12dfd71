//! Random changes of a file, fsyncs and crashes at the same time.
//!
//! Invariants:
//! - A state is written down before it comes about; an fsync promises those that had come about when it began.

use std::sync::atomic::AtomicBool;

use super::*;

/// Every state that a file has been in.
#[derive(Default)]
struct History {
    /// The first is that of an empty file. A change is here before it is made.
    states: Mutex<Vec<Vec<u8>>>,
    /// So many of them had come about.
    reached: AtomicU64,
    /// No crash may leave an earlier one.
    promised: AtomicU64,
    is_over: AtomicBool,
}

impl History {
    fn begin(&self, change: impl FnOnce(&mut Vec<u8>)) -> u64 {
        let mut states = self.states.lock();
        let mut state = states.last().cloned().unwrap_or_default();
        change(&mut state);
        states.push(state);
        states.len() as u64 - 1
    }

    /// A change was refused.
    fn take_back(&self, state: u64) -> u64 {
        let before = self.states.lock()[state as usize - 1].clone();
        self.begin(|state| *state = before)
    }

    /// Whether each byte is as in one of the states from `first` on.
    fn judge(&self, first: u64, found: &[u8]) -> Result<(), String> {
        let states = self.states.lock();
        let states = &states[first as usize..];
        let longest = states.iter().map(Vec::len).max().unwrap_or_default().max(found.len());
        for place in 0..longest {
            let allowed = |state: &Vec<u8>| state.get(place) == found.get(place);
            if !states.iter().any(allowed) {
                let seen: Vec<_> = states.iter().map(|state| state.get(place)).collect();
                return Err(format!("byte {place} is {:?}; since {first} it was {seen:?}", found.get(place)));
            }
        }
        Ok(())
    }
}

/// Changes a file at random, one change after the other.
async fn change_at_random(
    scene: &Scene,
    history: &History,
    turn: &tokio::sync::Mutex<()>,
    mut random: Random,
    is_cramped: bool,
) {
    for _ in 0..CHANGES {
        {
            let _turn = turn.lock().await;
            let made = match random.below(10) {
                0..=6 => {
                    let (at, length) = (random.below(1500), 1 + random.below(700));
                    let (mut byte, range) = (0, at as usize..(at + length) as usize);
                    let state = history.begin(|state| {
                        byte = random.below(255) as u8 + 1;
                        state.resize(state.len().max(range.end), 0);
                        state[range].fill(byte);
                    });
                    match scene.try_write(at, &vec![byte; length as usize]).await {
                        Ok(_) => Some(state),
                        // No entry can be decided.
                        Err(_) => Some(history.take_back(state)),
                    }
                }
                7..=8 => {
                    let size = if random.below(3) == 0 { 0 } else { random.below(2500) };
                    let state = history.begin(|state| state.resize(size as usize, 0));
                    match scene.resize(size).await {
                        Ok(_) => Some(state),
                        // A put has failed for which it waited, or no entry can be decided.
                        Err(_) => Some(history.take_back(state)),
                    }
                }
                _ => {
                    if is_cramped {
                        scene.let_decide(random.below(2) == 0);
                    }
                    let _told = scene.volume.flush(scene.ino, scene.handle).wait().await;
                    None
                }
            };
            if let Some(state) = made {
                history.reached.store(state, Ordering::SeqCst);
            }
        }
        tokio::time::sleep(Duration::from_millis(random.below(3))).await;
    }
}

/// Syncs a file again and again and crashes it, after an fsync that said yes and at other times.
async fn sync_and_crash(scene: &Scene, history: &History) -> Result<u64, String> {
    let mut promises = 0;
    while !history.is_over.load(Ordering::SeqCst) {
        let reached = history.reached.load(Ordering::SeqCst);
        if scene.fsync().await.unwrap().is_ok() {
            promises += 1;
            history.promised.fetch_max(reached, Ordering::SeqCst);
        }
        let promised = history.promised.load(Ordering::SeqCst);
        history.judge(promised, &scene.crashed().await)?;
    }
    Ok(promises)
}

/// Judges one file under changes and crashes; says how many fsyncs were acknowledged, or what was lost.
async fn judge_overwrites(seed: u64, forgets_hidden: bool) -> Result<u64, String> {
    let flush_after = Duration::from_millis(10);
    let options = match seed % 4 {
        0 => VolumeOptions { flush_after, ..impatient() },
        _ => VolumeOptions { flush_after, ..VolumeOptions::default() },
    };
    let (scene, history) = (Arc::new(Scene::new(options, seed).await), Arc::new(History::default()));
    history.begin(|_| {});
    scene.volume.shared.files.find(scene.ino).unwrap().lock().dirty.forgets_hidden = forgets_hidden;
    scene.store.puts.send_replace(match seed % 4 {
        0 => Puts::Waver(6),
        2 => Puts::Vary(0),
        _ => Puts::Vary(6),
    });
    let crashing: Vec<_> = (0..2)
        .map(|_| {
            let (scene, history) = (Arc::clone(&scene), Arc::clone(&history));
            tokio::spawn(async move { sync_and_crash(&scene, &history).await })
        })
        .collect();
    let turn = tokio::sync::Mutex::new(());
    let is_cramped = seed.is_multiple_of(3);
    let random = |share| Random(seed * 8 + share);
    let changers = [2, 3].map(|share| change_at_random(&scene, &history, &turn, random(share), is_cramped));
    futures::future::join_all(changers).await;
    history.is_over.store(true, Ordering::SeqCst);
    let mut promises = 0;
    for crashing in crashing {
        promises += crashing.await.unwrap()?;
    }
    scene.store.puts.send_replace(Puts::Succeed);
    scene.let_decide(true);
    let synced = async { while scene.volume.sync_all().wait().await.is_err() {} };
    tokio::time::timeout(PATIENCE, synced).await.unwrap();
    history.judge(history.reached.load(Ordering::SeqCst), &scene.crashed().await)?;
    assert_eq!(scene.volume.dirty_bytes(), 0);
    until("everything to be let go", || scene.volume.shared.files.memory.bytes() == 0).await;
    Ok(promises)
}

/// Overlapping writes, changes of length, fsyncs and closes over a store that takes its time and fails now and then, and a disk that is
/// full now and then: after each crash each byte is as it was when the last fsync that was acknowledged began, or later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_after_a_crash_is_as_it_was_at_an_acknowledged_fsync_or_later() {
    let mut promises = 0;
    for seed in 1..=SEEDS {
        promises += judge_overwrites(seed, false).await.unwrap_or_else(|lost| panic!("seed {seed}: {lost}"));
    }
    assert!(promises > SEEDS, "{promises} fsyncs were acknowledged");
}

/// The canary: what is hidden does not land.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_dropped_on_their_way_are_found_out() {
    for seed in 1..=10 * SEEDS {
        if judge_overwrites(seed, true).await.is_err() {
            return;
        }
    }
    panic!("nothing was found");
}

/// Files that are judged.
const SEEDS: u64 = 12;
/// Changes of each of the two that change a file.
const CHANGES: u64 = 40;
