//! Shipping: follows a log and keeps an archive up to date, slot by slot.
//!
//! ```text
//! log -> durable frames -> cut into slots -> packs they name -> slot -> registry -> cursor -> archived
//! ```
//!
//! Invariants:
//! - A slot is created after every pack that it names is in the archive (a log archive holds none).
//! - A slot counts when it, and all before it, are there, and the registry read after its creation has no floor above it.
//! - An error is shown and tried again, ever later; what cannot be mended by trying again ends the shipping, and says why.

mod core;
mod cursor;
mod task;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use murphy_fs::{BlockStore, PackNumber, Sealed, Volume};
use murphy_log::{Clock, Durable, Epoch, Frame, Log, LogTime, Lsn, NodeId, ReadError, Terminal};
use tokio::sync::{Mutex, Semaphore, watch};

use crate::{
    descriptor::Archive,
    registry::Registry,
    strays::{Reach, StraysError, strays, strays_behind},
    walk::{Boundary, Walk, WalkError, walk},
};

use self::{
    core::{Action, Core, Outcome},
    task::SlotTask,
};

pub use self::{
    core::{ShipEnd, ShipLimits},
    cursor::{CursorError, CursorFile, NoCursor, SaveCursor},
};

/// What a shipper works with.
#[derive(Clone)]
pub struct ShipperParts {
    /// Where to.
    pub archive: Archive,
    /// Where from.
    pub log: Arc<dyn Log>,
    /// Where the packs are that the log names.
    pub packs: Arc<dyn BlockStore>,
    /// The node that ships.
    pub node: NodeId,
    /// The epoch that the log was claimed in; a later one in the archive fences.
    pub epoch: Epoch,
    /// What was saved by the shipper before; without it the archive is walked from its beginning.
    pub known: Option<Boundary>,
    /// Where to save how far it has come.
    pub cursor: Arc<dyn SaveCursor>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// How slots are cut.
    pub limits: ShipLimits,
    /// Packs that may be gone for good; only a promotion loses any.
    pub lost: Option<Arc<dyn Losses>>,
}

/// Which packs a slot does not wait for if neither this node's stores nor the archive have them.
pub trait Losses: Send + Sync + std::fmt::Debug {
    /// Whether the pack that `since` was the first entry to name may be gone for good.
    fn may_have(&self, since: Lsn) -> bool;
}

/// Packs of a source that was lost before its mirror had them: those that an entry behind `after`, up to `upto`, was the first to name.
/// What a promotion knows before the new source has asked everybody, and its tree can say which of them are missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LostPacks {
    /// The last entry whose bytes were all there.
    pub after: Lsn,
    /// The last entry of the lost source.
    pub upto: Lsn,
}

impl Losses for LostPacks {
    fn may_have(&self, since: Lsn) -> bool {
        since > self.after && since <= self.upto
    }
}

/// What a source knows to be lost: the packs that its tree calls missing, and those of its promotion until it has asked everybody.
#[derive(Clone)]
pub struct KnownLosses {
    volume: Volume,
    promoted: Option<LostPacks>,
}

impl KnownLosses {
    /// What `volume` says, and what its promotion left open.
    pub fn new(volume: Volume, promoted: Option<LostPacks>) -> KnownLosses {
        KnownLosses { volume, promoted }
    }
}

impl Losses for KnownLosses {
    fn may_have(&self, since: Lsn) -> bool {
        if self.promoted.is_some_and(|lost| lost.may_have(since)) {
            return true;
        }
        match self.volume.pack(PackNumber(since.get())) {
            Ok(row) => row.is_some_and(|row| row.is_missing()),
            Err(error) => {
                tracing::warn!(%since, %error, "whether a pack is lost is not known: its slot waits");
                false
            }
        }
    }
}

impl std::fmt::Debug for KnownLosses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KnownLosses").field("promoted", &self.promoted).finish_non_exhaustive()
    }
}

/// How an archive does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ArchiveStatus {
    /// The archive.
    pub url: String,
    /// Up to where it holds everything; `None` until that is known.
    pub archived: Option<Boundary>,
    /// The log time of the last entry there, if it was shipped since the start.
    pub as_of: Option<LogTime>,
    /// How long the oldest durable entry that is not there has existed, in milliseconds; 0 if everything is there.
    pub lag_ms: u64,
    /// What keeps it from going on, if anything does.
    pub error: Option<String>,
    /// Why it will not go on.
    pub end: Option<ShipEnd>,
}

/// Follows a shipper. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ShipHandle {
    status: watch::Receiver<ArchiveStatus>,
    wanted: Arc<watch::Sender<Lsn>>,
    /// What comes behind it this process was the first to write: where the log ended when the shipper was made, or before.
    began: Lsn,
    /// Whether an acknowledgement still waits for the archive to take something of this process.
    awaited: Arc<AtomicBool>,
}

impl ShipHandle {
    /// How the archive does.
    pub fn status(&self) -> ArchiveStatus {
        self.status.borrow().clone()
    }

    /// Waits until the status changes after the last call on this handle; `false` when there is no shipper any more. Cancel safe.
    pub async fn changed(&mut self) -> bool {
        self.status.changed().await.is_ok()
    }

    /// The same for a process that has written everything behind `lsn`: the archive could be opened only later.
    #[must_use]
    pub fn for_entries_behind(self, lsn: Lsn) -> ShipHandle {
        ShipHandle { began: self.began.min(lsn), ..self }
    }

    /// What comes behind it this process was the first to write.
    pub(crate) fn began(&self) -> Lsn {
        self.began
    }

    /// Whether the archive has taken nothing of this process yet, and is still waited for.
    pub(crate) fn is_awaited(&self) -> bool {
        let held = self.status.borrow().archived.map_or(Lsn::default(), |held| held.position.lsn);
        held <= self.began && self.awaited.load(Ordering::Relaxed)
    }

    /// It was waited for in vain; this holds for all clones.
    pub(crate) fn wait_no_more(&self) {
        self.awaited.store(false, Ordering::Relaxed);
    }

    /// Waits until the archive holds `lsn`, and hurries the shipper. Returns the end if that comes first. Cancel safe.
    pub async fn archived(&self, lsn: Lsn) -> Result<Boundary, Option<ShipEnd>> {
        self.wanted.send_if_modified(|wanted| {
            let is_later = *wanted < lsn;
            *wanted = lsn.max(*wanted);
            is_later
        });
        let mut status = self.status.clone();
        let holds = |status: &ArchiveStatus| status.archived.filter(|held| held.position.lsn >= lsn);
        let waited = status.wait_for(|status| holds(status).is_some() || status.end.is_some()).await;
        let status = waited.map_err(|_| None)?;
        holds(&status).ok_or_else(|| status.end.clone())
    }
}

/// Ships a log to an archive.
pub struct Shipper {
    parts: ShipperParts,
    status: watch::Sender<ArchiveStatus>,
    wanted: watch::Receiver<Lsn>,
    task: Arc<SlotTask>,
    minds_strays: bool,
    is_given_up: bool,
}

/// What comes back to the shipper's loop.
enum Event {
    Durable(Option<Durable>),
    Frames(Result<Vec<Frame>, ReadError>),
    Outcome(u64, Outcome),
    Wanted,
    Time,
}

impl Shipper {
    /// A shipper that does nothing until it is run, and what to follow it with.
    pub fn new(parts: ShipperParts) -> (Shipper, ShipHandle) {
        let status = ArchiveStatus {
            url: parts.archive.url().to_owned(),
            archived: None,
            as_of: None,
            lag_ms: 0,
            error: None,
            end: None,
        };
        let (status, follower) = watch::channel(status);
        let (wanted, waiting) = watch::channel(Lsn::default());
        let task = Arc::new(SlotTask {
            registry: Mutex::new(Registry::new(parts.archive.clone())),
            copies: Semaphore::new(COPIES_AT_ONCE),
            seen: parking_lot::Mutex::default(),
            parts: parts.clone(),
        });
        let (began, awaited) = (parts.log.tail().position.lsn, Arc::new(AtomicBool::new(true)));
        let handle = ShipHandle { status: follower, wanted: Arc::new(wanted), began, awaited };
        (Shipper { parts, status, wanted: waiting, task, minds_strays: true, is_given_up: false }, handle)
    }

    /// The same for whoever brings an archive up only to end its epoch: what nothing leads to there is looked at by the one who ends it.
    #[must_use]
    pub(crate) fn past_strays(self) -> Shipper {
        Shipper { minds_strays: false, ..self }
    }

    /// The same for an archive that was given up when the source began its epoch: whoever has sealed it for an epoch that does not come behind that
    /// one has replaced nobody. See [`ShipEnd::Lost`].
    #[must_use]
    pub fn to_given_up(self) -> Shipper {
        Shipper { is_given_up: true, ..self }
    }

    /// Ships until something ends it for good. May be dropped at any time, and begun anew by another shipper.
    pub async fn run(self) -> ShipEnd {
        self.run_to(Lsn::MAX).await
    }

    /// Ships until the archive holds `last`.
    pub async fn run_to(mut self, last: Lsn) -> ShipEnd {
        let end = match self.start().await {
            Ok(core) => self.follow(core, last).await,
            Err(end) => end,
        };
        let end = if self.is_given_up { self.end_of_given_up(end).await } else { end };
        if end != ShipEnd::Reached && end != ShipEnd::LogEnded {
            tracing::error!(url = self.parts.archive.url(), %end, "shipping has ended");
        }
        self.status.send_modify(|status| status.end = Some(end.clone()));
        end
    }

    /// What it means that shipping to an archive has ended like that which was given up.
    async fn end_of_given_up(&self, end: ShipEnd) -> ShipEnd {
        match end {
            ShipEnd::Fenced(sealed) if sealed.next.number <= self.parts.epoch.number => ShipEnd::Lost(sealed),
            ShipEnd::Forked { .. } | ShipEnd::Ahead { .. } => {
                let mut pause = START_PAUSE_FIRST;
                loop {
                    let error = match self.led_by_another().await {
                        Ok(Some(sealed)) => return ShipEnd::Lost(sealed),
                        Ok(None) => return end,
                        Err(error) => error,
                    };
                    let url = self.parts.archive.url();
                    tracing::warn!(url, %error, "whose the end of an archive is that was given up is not known");
                    if error.is_of_content() {
                        return end;
                    }
                    // Until it is known the worse of both holds.
                    self.status.send_modify(|status| status.end = Some(end.clone()));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(START_PAUSE_MAX);
                }
            }
            end => end,
        }
    }

    /// The last seal of the archive, if it began an epoch before this source's that this log never had: whoever wrote there since has replaced a source
    /// before this one, and was not followed.
    async fn led_by_another(&self) -> Result<Option<Sealed>, StraysError> {
        let walked = walk(&self.parts.archive, self.parts.known).await?;
        let Some(seal) = walked.seals.last() else { return Ok(None) };
        let (next, log) = (seal.next, Arc::clone(&self.parts.log));
        if next.number >= self.parts.epoch.number || walked.end.epoch != next {
            return Ok(None);
        }
        let is_another = murphy_log::aside(move || never_had(&*log, next)).await?;
        Ok(is_another.then(|| seal.sealed()))
    }

    /// Finds out how far the archive holds this log, however long the store takes to answer.
    async fn start(&mut self) -> Result<Core, ShipEnd> {
        let mut pause = START_PAUSE_FIRST;
        let began = self.parts.clock.monotonic();
        loop {
            let error = match walk(&self.parts.archive, self.parts.known).await {
                Ok(walked) => match self.check(&walked).await {
                    Ok(()) => {
                        if !walked.dead.is_empty() {
                            let (url, dead) = (self.parts.archive.url(), walked.dead.join(", "));
                            tracing::info!(url, dead, "slots that were given up are passed over");
                        }
                        self.status.send_modify(|status| {
                            status.archived = Some(walked.end);
                            status.as_of = walked.as_of();
                            status.error = None;
                        });
                        let durable = self.parts.log.durable().state().position.lsn;
                        return Ok(Core::new(self.parts.limits, walked.end, durable));
                    }
                    Err(Outcome::Ended(end)) => return Err(end),
                    Err(Outcome::Failed(error)) => error,
                    Err(Outcome::Done | Outcome::Abandoned | Outcome::Adopted(..)) => continue,
                },
                Err(WalkError::Fork { lsn, .. }) => {
                    return Err(ShipEnd::Forked { url: self.parts.archive.url().to_owned(), lsn });
                }
                Err(error) => match self.check_unwalked(&error).await {
                    Err(Outcome::Ended(end)) => return Err(end),
                    _ => error.to_string(),
                },
            };
            tracing::warn!(url = self.parts.archive.url(), %error, "the archive cannot be continued yet");
            let waited = self.parts.clock.monotonic().saturating_sub(began);
            self.status.send_modify(|status| (status.error, status.lag_ms) = (Some(error), millis(waited)));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(START_PAUSE_MAX);
        }
    }

    /// Compares what the archive holds with this log, and makes sure that it stays there: an earlier process may have been killed between a slot
    /// and the sync of its folder.
    async fn check(&self, walked: &Walk) -> Result<(), Outcome> {
        let folder = |name: &String| name.rsplit_once('/').map(|(folder, _)| folder.to_owned());
        let lasts = walked.names.chunk_by(|a, b| folder(a) == folder(b)).filter_map(|names| names.last());
        for name in lasts {
            let durable = self.parts.archive.store().make_durable(name).await;
            durable.map_err(|error| Outcome::Failed(error.to_string()))?;
        }
        // Several may have taken over since: the first of them has ended this epoch.
        let ended = walked.seals.iter().find(|seal| seal.epoch == self.parts.epoch);
        self.check_end(&walked.end, ended.or(walked.seals.last())).await?;
        if !self.minds_strays {
            return Ok(());
        }
        let ShipperParts { archive, log, epoch, .. } = &self.parts;
        let reach = strays(archive, walked, *epoch, log).await;
        match &reach {
            // The next walk goes on with it.
            Ok(reach) if reach.is_behind() => {
                Err(Outcome::Failed("somebody ships while it is looked at".to_owned()))
            }
            _ => self.check_strays(reach),
        }
    }

    /// The same where something that the archive holds keeps it from being walked: what lies behind may still tell.
    async fn check_unwalked(&self, error: &WalkError) -> Result<(), Outcome> {
        if !error.is_of_content() || !self.minds_strays {
            return Ok(());
        }
        let ShipperParts { archive, log, epoch, known, .. } = &self.parts;
        let from = known.unwrap_or(Boundary::after(archive.descriptor().base));
        self.check_strays(strays_behind(archive, from, *epoch, log).await)
    }

    fn check_strays(&self, reach: Result<Reach, StraysError>) -> Result<(), Outcome> {
        let reach = reach.map_err(|error| Outcome::Failed(error.to_string()))?;
        if let Some(seal) = reach.seal() {
            return Err(Outcome::Ended(ShipEnd::Fenced(seal.sealed())));
        }
        if let Some((object, reason)) = reach.broken_seal() {
            return Err(Outcome::Ended(ShipEnd::BrokenSeal { object, reason }));
        }
        let Some(stray) = reach.furthest().cloned() else { return Ok(()) };
        let log = self.parts.log.tail().position.lsn;
        Err(Outcome::Ended(ShipEnd::Stray { stray, archived: reach.end.position.lsn, log }))
    }

    /// Compares where the archive ends with this log.
    async fn check_end(&self, end: &Boundary, seal: Option<&crate::seal::Seal>) -> Result<(), Outcome> {
        let url = || self.parts.archive.url().to_owned();
        if end.epoch.number > self.parts.epoch.number
            || (end.epoch.number == self.parts.epoch.number && end.epoch != self.parts.epoch)
        {
            return Err(Outcome::Ended(match seal {
                Some(seal) => ShipEnd::Fenced(seal.sealed()),
                None => ShipEnd::Forked { url: url(), lsn: end.next() },
            }));
        }
        let durable = self.parts.log.durable().state();
        if end.position.lsn > durable.position.lsn {
            return Err(Outcome::Ended(ShipEnd::Ahead { url: url(), held: *end, log: durable.position }));
        }
        self.task.check_on_chain(end.position).await
    }

    async fn follow(&mut self, mut core: Core, last: Lsn) -> ShipEnd {
        let clock = Arc::clone(&self.parts.clock);
        let mut durable = self.parts.log.durable();
        let mut is_open = true;
        let mut work: FuturesUnordered<BoxFuture<'static, Event>> = FuturesUnordered::new();
        core.durable(durable.current().state.position.lsn);
        is_open &= durable.current().terminal.is_none();
        loop {
            for action in core.step(clock.monotonic()) {
                self.act(&mut core, action, &mut work).await;
            }
            if core.archived().position.lsn >= last {
                core.finish(ShipEnd::Reached);
            }
            if !is_open && core.is_idle() {
                core.finish(ShipEnd::LogEnded);
            }
            self.publish(&core);
            if let Some(end) = core.end() {
                return end.clone();
            }
            let now = clock.monotonic();
            let pause = core.wake_at().map_or(STATUS_PAUSE, |at| at.saturating_sub(now).min(STATUS_PAUSE));
            let event = tokio::select! {
                changed = durable.changed(), if is_open => Event::Durable(changed.ok()),
                Some(event) = work.next(), if !work.is_empty() => event,
                Ok(()) = self.wanted.changed() => Event::Wanted,
                () = tokio::time::sleep(pause) => Event::Time,
            };
            match event {
                Event::Durable(None) => is_open = false,
                Event::Durable(Some(now)) => {
                    core.durable(now.state.position.lsn);
                    is_open = now.terminal.is_none();
                    if let Some(Terminal::Fenced { by }) = now.terminal {
                        tracing::warn!(epoch = %by, "the log was taken over; what it holds is still shipped");
                    }
                }
                Event::Frames(Ok(frames)) => core.frames(frames, clock.monotonic(), clock.wall()),
                Event::Frames(Err(error)) => self.read_failed(&mut core, &error, clock.monotonic()),
                Event::Outcome(id, outcome) => core.outcome(id, outcome, clock.monotonic()),
                Event::Wanted => core.wanted(*self.wanted.borrow_and_update()),
                Event::Time => {}
            }
        }
    }

    async fn act(
        &self,
        core: &mut Core,
        action: Action,
        work: &mut FuturesUnordered<BoxFuture<'static, Event>>,
    ) {
        match action {
            Action::Read { from, bytes } => {
                let log = Arc::clone(&self.parts.log);
                let read = murphy_log::aside(move || read_frames(&*log, from, bytes));
                work.push(Box::pin(async move { Event::Frames(read.await) }));
            }
            Action::Start(job) => {
                let task = Arc::clone(&self.task);
                work.push(Box::pin(async move {
                    let outcome = task.run(&job).await;
                    if let Outcome::Failed(error) = &outcome {
                        let (url, slot) = (task.parts.archive.url(), job.at.slot_name());
                        tracing::warn!(url, slot, error, "a slot was not archived; it is tried again");
                    }
                    Event::Outcome(job.id, outcome)
                }));
            }
            Action::Archived { boundary, time } => {
                let cursor = Arc::clone(&self.parts.cursor);
                let saved = murphy_log::aside(move || cursor.save(&boundary)).await;
                // Without the cursor the archive still holds it, and a restart finds that out by walking.
                if let Err(error) = saved {
                    tracing::error!(url = self.parts.archive.url(), %error, "the archive cursor is not saved");
                    core.failed(error.to_string());
                }
                self.status.send_modify(|status| {
                    status.archived = Some(boundary);
                    status.as_of = time.or(status.as_of);
                });
            }
        }
    }

    /// What is gone ends shipping; a medium that does not answer is asked again.
    fn read_failed(&self, core: &mut Core, error: &ReadError, now: Duration) {
        let url = self.parts.archive.url().to_owned();
        match error {
            ReadError::Trimmed { .. } | ReadError::Damaged { .. } => {
                core.finish(ShipEnd::Gap { url, lsn: core.archived().next(), reason: error.to_string() });
            }
            ReadError::Io { .. } | ReadError::Beyond { .. } => {
                tracing::warn!(url, %error, "the log was not read; it is tried again");
                core.read_failed(error.to_string(), now);
            }
        }
    }

    fn publish(&self, core: &Core) {
        let lag_ms = millis(core.lag(self.parts.clock.monotonic()));
        self.status.send_if_modified(|status| {
            let error = core.error().map(str::to_owned);
            let has_changed = status.lag_ms != lag_ms || status.error != error;
            (status.lag_ms, status.error) = (lag_ms, error);
            has_changed
        });
    }
}

/// Whether `log` is known never to have had an entry of `epoch`: what it had before its first entry is not known.
fn never_had(log: &dyn Log, epoch: Epoch) -> Result<bool, ReadError> {
    let epoch_at = |lsn: Lsn| Ok(log.read(lsn)?.next().transpose()?.map(|frame| frame.epoch()));
    let (mut low, mut high) = (log.first(), log.durable().state().position.lsn.next());
    if low >= high || epoch_at(low)?.is_none_or(|first| first.number > epoch.number) {
        return Ok(false);
    }
    // Epochs only grow: the last entry of an epoch that is not later.
    while low.next() < high {
        let middle = Lsn::new(low.get() + high.since(low) / 2);
        match epoch_at(middle)? {
            Some(there) if there.number <= epoch.number => low = middle,
            _ => high = middle,
        }
    }
    Ok(epoch_at(low)? != Some(epoch))
}

/// Reads whole frames from `from` on, at least one if there is one.
fn read_frames(log: &dyn Log, from: Lsn, bytes: usize) -> Result<Vec<Frame>, ReadError> {
    let (mut frames, mut total) = (Vec::new(), 0);
    for frame in log.read(from)? {
        let frame = frame?;
        total += frame.bytes().len();
        frames.push(frame);
        if total >= bytes {
            break;
        }
    }
    Ok(frames)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// So many packs are copied at once, for all slots together.
const COPIES_AT_ONCE: usize = 16;
/// The status is brought up to date at least so often.
const STATUS_PAUSE: Duration = Duration::from_millis(500);
/// The pause after the first time that the archive could not be walked; it doubles with each.
const START_PAUSE_FIRST: Duration = Duration::from_millis(200);
const START_PAUSE_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
