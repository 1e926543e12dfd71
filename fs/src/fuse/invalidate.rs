//! Keeps the kernel's caches true to a volume that follows a source: every followed entry is told to the kernel, from the log.
//!
//! The log is the queue. The invalidator reads frames behind what the volume has shown, at its own pace, and so never has to drop
//! anything; when it is far behind, caching is suspended until it has caught up. Pages go a way of their own: invalidating a page that is
//! being read waits for the store, and names must not wait for that.
//!
//! ```text
//!   log --> frames --> notices --+--> names, listings, attributes ---> a lane of their own ---> kernel
//!              ^                 +--> data -------------------------> a lane of their own ---> kernel
//!              |                 +--> once more after a second, if an answer was on its way
//!   shown by the volume
//! ```
//!
//! Invariants:
//! - The kernel is told of an entry after its rows are visible, so that it asks for nothing old.
//! - Neither the volume nor a request ever waits for the names' lane, which waits for locks that requests hold. An answer with a file's
//!   attributes waits, for a bounded time, for the pages' lane, which waits for reads only.
//! - What cannot be told is said, and ends caching for good.
//! - Once the node is about to decide, everything that was followed has been sent before it does, repetitions included: see
//!   [`super::followed`].

mod notices;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    sync::Arc,
    thread,
    time::Duration,
};

use self::notices::Notices;
use super::{
    followed::{Followed, Progress},
    lane::Ended,
    notify::Notice,
};
use crate::{Ino, NameHasher, Observation};
use murphy_log::{Frame, FrameReader, Log, Lsn};

/// Tells the kernel of everything that a volume follows. Dropping it ends its threads, once the kernel lets them go.
#[derive(Debug)]
pub struct Invalidator {
    followed: Arc<Followed>,
    _observation: Observation,
}

/// How far the kernel has been told, and how well.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InvalidationStats {
    /// The last entry that has been sent on its way to the kernel.
    pub told: Lsn,
    /// How often caching was suspended because the kernel was late.
    pub suspensions: u64,
    /// Something could not be told: what the kernel cached before may be wrong until its lifetime ends.
    pub lost: bool,
}

/// The way to the kernel.
pub(super) type ToKernel = Arc<dyn Fn(&Notice) -> io::Result<()> + Send + Sync>;

impl Invalidator {
    pub(super) fn start(
        followed: Arc<Followed>,
        observation: Observation,
        (log, hasher): (Arc<dyn Log>, NameHasher),
        send: &ToKernel,
    ) -> io::Result<Invalidator> {
        for (name, is_pages) in [("fuse-pages", true), ("fuse-names", false)] {
            let (state, send) = (Arc::clone(&followed), Arc::clone(send));
            thread::Builder::new().name(name.into()).spawn(move || {
                let lane = if is_pages { &state.pages } else { &state.names };
                lane.deliver(
                    |notice| state.send(notice, &*send),
                    |notice, error| {
                        state.lose(&format!("the kernel refused {notice:?}: {error}"));
                    },
                );
                state.end();
            })?;
        }
        let invalidator = Invalidator { followed: Arc::clone(&followed), _observation: observation };
        let told = followed.update(|progress| progress.told);
        let (frames, ahead, repeats) = (None, None, Repeats::default());
        let courier = Courier { followed, log, hasher, frames, ahead, told, repeats };
        thread::Builder::new().name("fuse-invalidate".into()).spawn(move || courier.run())?;
        Ok(invalidator)
    }

    /// Waits at most `timeout` until the kernel has been told of every entry up to `lsn`, pages included, and says whether it has. True
    /// as well when the mount has ended. What may have been overtaken is told once more a second later; that is not waited for.
    pub fn wait_for(&self, lsn: Lsn, timeout: Duration) -> bool {
        self.followed.wait(timeout, |progress| progress.told >= lsn || progress.ended)
            && self.followed.names.wait_sent(timeout)
            && self.followed.pages.wait_sent(timeout)
    }

    /// How far the kernel has been told.
    pub fn stats(&self) -> InvalidationStats {
        let (told, lost) = self.followed.update(|progress| (progress.told, progress.lost));
        InvalidationStats { told, suspensions: self.followed.suspensions(), lost }
    }
}

impl Drop for Invalidator {
    fn drop(&mut self) {
        self.followed.end();
    }
}

impl std::fmt::Debug for Followed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Followed").finish_non_exhaustive()
    }
}

/// The thread that reads the log and tells.
struct Courier {
    followed: Arc<Followed>,
    log: Arc<dyn Log>,
    hasher: NameHasher,
    frames: Option<FrameReader>,
    /// A frame that is durable and not shown yet.
    ahead: Option<Frame>,
    told: Lsn,
    repeats: Repeats,
}

impl Courier {
    fn run(mut self) {
        let mut calm_since = self.followed.now();
        loop {
            let pause = self.repeats.pause(self.followed.now()).min(self.calm_pause());
            let told = self.told;
            self.followed.wait(pause, |progress| {
                let is_due = progress.ending && !progress.cut && self.repeats.is_empty();
                progress.ended || progress.shown > told || !progress.relist.is_empty() || is_due
            });
            let (shown, relist, ended) = self
                .followed
                .update(|progress| (progress.shown, std::mem::take(&mut progress.relist), progress.ended));
            let busy = shown > told;
            let worked = if ended { Err(Ended) } else { self.work(shown, relist) };
            if worked.is_err() {
                return self.followed.end();
            }
            let is_last = |progress: &mut Progress| {
                progress.ending && !progress.cut && progress.shown <= self.told && progress.relist.is_empty()
            };
            if self.repeats.is_empty() && self.followed.update(is_last) {
                self.followed.see_through();
            }
            if busy {
                calm_since = self.followed.now();
            } else if self.followed.now().saturating_sub(calm_since) >= CALM
                && !self.followed.update(|progress| progress.lost)
            {
                self.followed.resume();
            }
        }
    }

    /// How long to wait at most for nothing to happen.
    fn calm_pause(&self) -> Duration {
        if self.followed.is_suspended() { CALM } else { Duration::MAX }
    }

    fn work(&mut self, shown: Lsn, relist: HashSet<Ino>) -> Result<(), Ended> {
        for directory in relist {
            self.repeat(Notice::Listing(directory))?;
        }
        while let Some(frame) = self.next_frame(shown) {
            let mut notices = Notices::default();
            match frame.entries() {
                Ok(entries) => entries.iter().for_each(|entry| notices.add(entry, &self.hasher)),
                Err(error) => self.followed.lose(&error.to_string()),
            }
            if let Some(place) = notices.unknown.first() {
                self.followed.lose(&format!("an entry removes a name that it does not tell, at {place:?}"));
            }
            for notice in notices.all {
                self.tell(notice)?;
            }
            self.reached(frame.last());
            self.tell_again()?;
        }
        self.tell_again()
    }

    fn reached(&mut self, lsn: Lsn) {
        self.told = lsn;
        self.followed.told(lsn);
    }

    /// The next frame that has been shown and not been told.
    fn next_frame(&mut self, shown: Lsn) -> Option<Frame> {
        if self.told >= shown {
            return None;
        }
        if let Some(frame) = self.ahead.take_if(|frame| frame.last() <= shown) {
            return Some(frame);
        }
        let next = match &mut self.frames {
            Some(frames) => frames.next(),
            None => match self.log.read(self.told.next()) {
                Ok(frames) => self.frames.insert(frames).next(),
                Err(error) => Some(Err(error)),
            },
        };
        match next? {
            Ok(frame) if frame.last() <= shown => Some(frame),
            Ok(frame) => {
                self.ahead = Some(frame);
                None
            }
            Err(error) => {
                self.followed.lose(&error.to_string());
                self.frames = None;
                self.reached(shown);
                None
            }
        }
    }

    /// Tells the kernel now, and again later if an answer to the contrary may be on its way.
    fn tell(&mut self, notice: Notice) -> Result<(), Ended> {
        self.deliver(notice.clone())?;
        if self.followed.recently_answered(notice.ino()) {
            self.repeat(notice)?;
        }
        Ok(())
    }

    fn deliver(&self, notice: Notice) -> Result<(), Ended> {
        match notice {
            Notice::Data(_) | Notice::Length(_) => self.followed.pages.push(notice),
            notice => self.followed.names.push(notice),
        }
    }

    /// Notes what is to be told again. Waits while too much is.
    fn repeat(&mut self, notice: Notice) -> Result<(), Ended> {
        while self.repeats.is_full() {
            thread::sleep(self.repeats.pause(self.followed.now()));
            self.tell_again()?;
        }
        self.repeats.add(notice, self.followed.now() + REPEAT_AFTER);
        Ok(())
    }

    fn tell_again(&mut self) -> Result<(), Ended> {
        while let Some(notice) = self.repeats.due(self.followed.now()) {
            self.deliver(notice)?;
        }
        Ok(())
    }
}

/// What is to be told again, and when: about in the order in which it is due.
#[derive(Default)]
struct Repeats {
    order: VecDeque<(Duration, Notice)>,
    /// The last moment for which each was asked.
    last: HashMap<Notice, Duration>,
}

impl Repeats {
    /// Tells `notice` again at `due`. One that waits already waits until then: it has just been told.
    fn add(&mut self, notice: Notice, due: Duration) {
        if self.last.insert(notice.clone(), due).is_none() {
            self.order.push_back((due, notice));
        }
    }

    fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    fn is_full(&self) -> bool {
        self.order.len() >= REPEATS_MAX
    }

    /// How long nothing is due.
    fn pause(&self, now: Duration) -> Duration {
        self.order.front().map_or(Duration::MAX, |(due, _)| due.saturating_sub(now))
    }

    fn due(&mut self, now: Duration) -> Option<Notice> {
        loop {
            let (_, notice) = self.order.pop_front_if(|(due, _)| *due <= now)?;
            match self.last.get(&notice).copied().filter(|last| *last > now) {
                Some(last) => self.order.push_back((last, notice)),
                None => {
                    self.last.remove(&notice);
                    return Some(notice);
                }
            }
        }
    }
}

/// When what may have been overtaken is told again.
const REPEAT_AFTER: Duration = Duration::from_secs(1);
/// How many wait for that at most; the invalidator then waits for the first.
const REPEATS_MAX: usize = 1 << 16;
/// Suspended caching is resumed after so long without a change to tell.
const CALM: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests;
