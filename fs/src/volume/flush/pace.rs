//! How many large packs are put at once: as many as the way to the store takes.
//!
//! Packs that share a slow uplink are late together: none is stored before its put is given up, and then all of them are put anew. So a put
//! that gets no answer in time halves how many the whole volume puts at once, once for all that were under way together, and many that are in
//! time one after the other let one more go.
//!
//! Invariants:
//! - One may always go.
//! - Those that nobody waits for leave room where there is any, and no more than that many of them are before one that somebody waits for.
//! - Within each of the two kinds the first to ask is the first to go.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};

use super::super::files::Urgency;

/// The turns of large packs.
pub(super) struct Pace {
    limit: Mutex<Limit>,
    all: Semaphore,
    /// Who may ask for one of `all` although nobody waits for him.
    background: Semaphore,
    /// Woken when somebody waits for what nobody has waited for.
    hurried: Notify,
}

struct Limit {
    puts: usize,
    /// Puts that were in time since the limit changed, or one was late.
    in_time: usize,
    /// How often it was halved.
    halvings: u64,
    /// Permits of the two semaphores, free or not: more than the limit until those are back that were given out before it fell.
    all: usize,
    background: usize,
}

/// The right to put one large pack.
pub(super) struct Turn<'a> {
    pace: &'a Pace,
    /// How often the limit had been halved when it began.
    halvings: u64,
    /// There until it ends.
    all: Option<SemaphorePermit<'a>>,
    background: Option<SemaphorePermit<'a>>,
}

impl Default for Pace {
    fn default() -> Pace {
        let (all, background) = (PUTS_MAX, in_background(PUTS_MAX));
        let limit = Limit { puts: PUTS_MAX, in_time: 0, halvings: 0, all, background };
        Pace {
            limit: Mutex::new(limit),
            all: Semaphore::new(all),
            background: Semaphore::new(background),
            hurried: Notify::new(),
        }
    }
}

impl Pace {
    /// Waits for a turn; as what nobody waits for only until somebody waits for one of those that are `awaited`.
    pub(super) async fn turn<'a>(&'a self, urgency: Urgency, awaited: &[Arc<AtomicBool>]) -> Turn<'a> {
        let background = match urgency {
            Urgency::First => None,
            Urgency::Now | Urgency::Soon => self.background(awaited).await,
        };
        let all = self.all.acquire().await.ok();
        let halvings = self.limit.lock().halvings;
        Turn { pace: self, halvings, all, background }
    }

    /// Waits with those that nobody waits for; `None` once somebody does.
    async fn background(&self, awaited: &[Arc<AtomicBool>]) -> Option<SemaphorePermit<'_>> {
        let permit = self.background.acquire();
        tokio::pin!(permit);
        loop {
            let hurried = self.hurried.notified();
            tokio::pin!(hurried);
            hurried.as_mut().enable();
            if awaited.iter().any(|awaited| awaited.load(Ordering::SeqCst)) {
                return None;
            }
            tokio::select! {
                permit = &mut permit => return permit.ok(),
                () = hurried => {}
            }
        }
    }

    /// Somebody waits from now on for what is on its way.
    pub(super) fn hurry(&self, awaited: &AtomicBool) {
        if !awaited.swap(true, Ordering::SeqCst) {
            self.hurried.notify_waiters();
        }
    }

    /// Lets so many go at once.
    fn set(&self, limit: &mut Limit, puts: usize) {
        (limit.puts, limit.in_time) = (puts, 0);
        fit(&self.all, &mut limit.all, puts);
        fit(&self.background, &mut limit.background, in_background(puts));
    }
}

impl Turn<'_> {
    /// The put was answered in time.
    pub(super) fn in_time(self) {
        let mut limit = self.pace.limit.lock();
        let semaphores = [&self.pace.all, &self.pace.background];
        let is_made_use_of = semaphores.iter().any(|permits| permits.available_permits() == 0);
        // What was not made use of says nothing.
        if !is_made_use_of || limit.puts == PUTS_MAX {
            return;
        }
        limit.in_time += 1;
        if limit.in_time >= RAISED_AFTER {
            let puts = limit.puts + 1;
            self.pace.set(&mut limit, puts);
        }
    }

    /// It was not. Those that are late together count once.
    pub(super) fn late(self) {
        let mut limit = self.pace.limit.lock();
        limit.in_time = 0;
        if self.halvings < limit.halvings {
            return;
        }
        limit.halvings += 1;
        let puts = (limit.puts / 2).max(1);
        self.pace.set(&mut limit, puts);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut limit = self.pace.limit.lock();
        let puts = limit.puts;
        give_back(self.all.take(), &mut limit.all, puts);
        give_back(self.background.take(), &mut limit.background, in_background(puts));
    }
}

/// How many of `puts` may go although nobody waits for them.
const fn in_background(puts: usize) -> usize {
    puts - puts / 4
}

/// Lets a semaphore have `wanted` permits, as far as they are not given out.
fn fit(semaphore: &Semaphore, permits: &mut usize, wanted: usize) {
    if wanted > *permits {
        semaphore.add_permits(wanted - *permits);
        *permits = wanted;
    } else {
        *permits -= semaphore.forget_permits(*permits - wanted);
    }
}

/// Gives a permit back, unless there are too many.
fn give_back(permit: Option<SemaphorePermit<'_>>, permits: &mut usize, wanted: usize) {
    let Some(permit) = permit else { return };
    if *permits > wanted {
        *permits -= 1;
        permit.forget();
    }
}

/// Large packs that are put at once at most, ...
const PUTS_MAX: usize = 32;
/// ... and how many must have been in time for one more.
const RAISED_AFTER: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(pace: &Pace) -> usize {
        pace.limit.lock().puts
    }

    /// The fears: turns are lost, or more go at once than may, when the limit changes under those that are under way.
    #[tokio::test]
    async fn no_turn_is_lost_whatever_becomes_of_the_limit() {
        let pace = Pace::default();
        let mut turns = Vec::new();
        for place in 0..PUTS_MAX {
            let urgency = if place < in_background(PUTS_MAX) { Urgency::Soon } else { Urgency::First };
            turns.push(pace.turn(urgency, &[]).await);
        }
        let mut next = Box::pin(pace.turn(Urgency::First, &[]));
        assert!(futures::poll!(&mut next).is_pending());
        turns.drain(..8).for_each(Turn::late);
        assert_eq!(limit(&pace), PUTS_MAX / 2, "they were under way together");
        assert!(futures::poll!(&mut next).is_pending(), "24 are under way, and 16 may be");
        turns.truncate(PUTS_MAX / 2);
        assert!(futures::poll!(&mut next).is_pending());
        drop(turns);
        next.await.late();
        for _ in 0..3 {
            pace.turn(Urgency::First, &[]).await.late();
        }
        for puts in 1..PUTS_MAX {
            assert_eq!(limit(&pace), puts);
            for _ in 0..RAISED_AFTER {
                let mut turns = Vec::new();
                for _ in 0..puts {
                    turns.push(pace.turn(Urgency::First, &[]).await);
                }
                assert!(futures::poll!(Box::pin(pace.turn(Urgency::First, &[]))).is_pending());
                turns.pop().unwrap().in_time();
            }
        }
        assert_eq!((pace.all.available_permits(), limit(&pace)), (PUTS_MAX, PUTS_MAX));
        assert_eq!(pace.background.available_permits(), in_background(PUTS_MAX));
    }

    /// The fear: an outage has made the limit small, and as long as nobody waits for anything it stays so for ever.
    #[tokio::test]
    async fn the_limit_grows_again_when_only_what_nobody_waits_for_is_put() {
        let pace = Pace::default();
        for _ in 0..5 {
            pace.turn(Urgency::Soon, &[]).await.late();
        }
        assert_eq!(limit(&pace), 1);
        for _ in 0..PUTS_MAX * RAISED_AFTER {
            let mut turns = Vec::new();
            while let std::task::Poll::Ready(turn) = futures::poll!(Box::pin(pace.turn(Urgency::Soon, &[]))) {
                turns.push(turn);
            }
            turns.pop().unwrap().in_time();
            // A task that never pauses is refused what there is.
            tokio::task::yield_now().await;
        }
        assert_eq!(limit(&pace), PUTS_MAX);
    }

    /// The fear: one that somebody waits for comes after all that was closed before.
    #[tokio::test]
    async fn what_somebody_waits_for_has_its_turn_before_what_nobody_waits_for() {
        let pace = Pace::default();
        for _ in 0..5 {
            pace.turn(Urgency::Soon, &[]).await.late();
        }
        let under_way = pace.turn(Urgency::Soon, &[]).await;
        let mut behind: Vec<_> = (0..3).map(|_| Box::pin(pace.turn(Urgency::Soon, &[]))).collect();
        for turn in &mut behind {
            assert!(futures::poll!(turn).is_pending());
        }
        let mut first = Box::pin(pace.turn(Urgency::First, &[]));
        assert!(futures::poll!(&mut first).is_pending());
        drop(under_way);
        assert!(futures::poll!(&mut behind[0]).is_pending());
        assert!(futures::poll!(&mut first).is_ready());
    }

    /// The fear: a file takes off because it was closed, is synced then, and waits behind all that was closed before it.
    #[tokio::test]
    async fn what_somebody_begins_to_wait_for_is_before_what_nobody_waits_for() {
        let pace = Pace::default();
        for _ in 0..5 {
            pace.turn(Urgency::Soon, &[]).await.late();
        }
        let under_way = pace.turn(Urgency::Soon, &[]).await;
        let mut behind: Vec<_> = (0..3).map(|_| Box::pin(pace.turn(Urgency::Soon, &[]))).collect();
        for turn in &mut behind {
            assert!(futures::poll!(turn).is_pending());
        }
        let awaited = [Arc::default(), Arc::default()];
        let mut last = Box::pin(pace.turn(Urgency::Soon, &awaited));
        assert!(futures::poll!(&mut last).is_pending());
        pace.hurry(&awaited[1]);
        assert!(futures::poll!(&mut last).is_pending());
        drop(under_way);
        assert!(futures::poll!(&mut behind[0]).is_pending());
        assert!(futures::poll!(&mut last).is_ready());
    }
}
