//! The sequencer: the one place where an entry gets its LSN.
//!
//! Decide, LSN, hash, digest and overlay insert are one critical section, in memory only. A row that is not in memory is loaded outside of
//! it, into the row cache that every append writes through, and the request is decided again.
//!
//! Invariants:
//! - An entry is visible to every view on this node before its caller has the answer, and durable only later.
//! - Frames go to the log from inside the critical section. While the log has no room for one every request fails with ENOSPC, as it does
//!   while the disk of the index is nearly full.
//! - After the log has ended nothing is decided any more.

mod frames;
#[cfg(test)]
mod interleavings;
mod memory;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use murphy_log::{
    Appender, Clock, Entry, Epoch, Frame, Log, LogTime, Lsn, Position, Requester, State, VolumeKeys,
};
use parking_lot::{Condvar, MutexGuard};
use quick_cache::sync::Cache;

use crate::{
    Caller, Errno, IndexSnapshot, Ino, RowKey,
    decide::{Decided, Draft, EntryKind, Moment, Operation, Refusal},
    log_time::LogClock,
    sync::{ArcSwap, AtomicU64, Mutex},
    table::Table,
    view::{Basis, View, ViewError, decode_row},
};
use frames::{Due, Frames, IDLE};
use memory::{Cached, Loaded, Newest};

/// Sequences entries and publishes what they change.
pub(crate) struct Sequencer {
    core: Mutex<Core>,
    clock: LogClock,
    /// Why nothing is decided any more.
    ended: OnceLock<String>,
    /// Signalled when a frame begins to wait for being closed.
    opened: Condvar,
    basis: ArcSwap<Basis>,
    visible: AtomicU64,
    /// Whether this node decides; while it follows another source every change is refused.
    leads: AtomicBool,
    cache: Cache<RowKey, Cached>,
    log: Arc<dyn Log>,
    keys: VolumeKeys,
    limits: Limits,
    /// Wakes those who wait for room in the overlay.
    room: tokio::sync::Notify,
    /// Told when a frame begins to wait for being closed, or a generation was sealed.
    work: tokio::sync::Notify,
    /// Whether the log has taken every frame that was closed.
    log_room: AtomicBool,
    /// Whether the disk of the index is not nearly full.
    index_room: AtomicBool,
    /// Signalled when a generation was sealed.
    sealed: (Mutex<u64>, Condvar),
    /// How often something was decided, anew or not.
    #[cfg(test)]
    pub(crate) decisions: AtomicU64,
}

/// How much the sequencer may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// A generation is sealed at the first frame end after this many bytes.
    pub(crate) generation_bytes: usize,
    /// Appends wait while the overlay is larger.
    pub(crate) overlay_bytes: usize,
    /// How many rows the cache holds.
    pub(crate) cached_rows: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { generation_bytes: 16 << 20, overlay_bytes: 128 << 20, cached_rows: 1 << 18 }
    }
}

/// What the critical section protects.
struct Core {
    frames: Frames,
    /// The state after the last entry.
    state: State,
}

/// Why a request was not sequenced.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum SubmitError {
    /// It failed; nothing has changed.
    Errno(Errno),
    /// What the caller prepared is out of date; prepare again.
    Stale,
    /// The overlay is full; wait for [`Sequencer::room`].
    Full,
}

/// Why the entries of a frame were not shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FollowError {
    #[error("the frame at lsn {found} does not continue {shown}")]
    NotNext { shown: Position, found: Lsn },
    #[error(transparent)]
    Unreadable(#[from] murphy_log::DecodeError),
    #[error(transparent)]
    Log(#[from] murphy_log::ReadError),
}

impl From<Errno> for SubmitError {
    fn from(errno: Errno) -> SubmitError {
        SubmitError::Errno(errno)
    }
}

impl Sequencer {
    /// A sequencer that follows `log`, whose durable entries the index has up to `state`.
    pub(crate) fn new(
        log: Arc<dyn Log>,
        keys: VolumeKeys,
        clock: Arc<dyn Clock>,
        index: Arc<dyn IndexSnapshot>,
        state: State,
        last_time: LogTime,
        limits: Limits,
    ) -> Sequencer {
        let frames = Frames::new(Arc::clone(&log), state.position, last_time);
        let lsn = state.position.lsn;
        Sequencer {
            core: Mutex::new(Core { frames, state }),
            clock: LogClock::new(clock, last_time),
            ended: OnceLock::new(),
            opened: Condvar::new(),
            basis: ArcSwap::from_pointee(Basis::new(index, lsn)),
            visible: AtomicU64::new(lsn.get()),
            leads: AtomicBool::new(false),
            cache: Cache::new(limits.cached_rows),
            log,
            keys,
            limits,
            room: tokio::sync::Notify::new(),
            work: tokio::sync::Notify::new(),
            log_room: AtomicBool::new(true),
            index_room: AtomicBool::new(true),
            sealed: (Mutex::new(0), Condvar::new()),
            #[cfg(test)]
            decisions: AtomicU64::new(0),
        }
    }

    /// Begins to decide, in `epoch`, no earlier than the last entry that it followed.
    pub(crate) fn lead(&self, epoch: Epoch) {
        let mut core = self.core.lock();
        self.clock.not_before(core.frames.last_entry());
        let appender = Appender::new(self.keys.clone(), epoch, core.state);
        core.frames.lead(appender);
        self.leads.store(true, Ordering::Release);
    }

    /// Whether this node decides.
    pub(crate) fn leads(&self) -> bool {
        self.leads.load(Ordering::Acquire)
    }

    /// Decides nothing any more: every change is refused with EROFS from now on.
    pub(crate) fn retire(&self) {
        let mut core = self.core.lock();
        self.close_frames(&mut core);
        core.frames.retire();
        self.leads.store(false, Ordering::Release);
    }

    /// The newest view.
    pub(crate) fn view(&self) -> View {
        let visible = Lsn::new(self.visible.load(Ordering::Acquire));
        View::new(self.basis.load_full(), visible)
    }

    /// The newest view together with its state, at the end of a frame.
    pub(crate) fn view_with_state(&self) -> View {
        let mut core = self.core.lock();
        self.close_frames(&mut core);
        View::new(self.basis.load_full(), core.state.position.lsn).with_state(core.state)
    }

    /// The state after the last entry.
    pub(crate) fn state(&self) -> State {
        self.core.lock().state
    }

    /// The newest row at `key`: what a view taken now would find, through the cache.
    pub(crate) fn newest_row(&self, key: &RowKey) -> Result<Option<Bytes>, ViewError> {
        let visible = Lsn::new(self.visible.load(Ordering::Acquire));
        if let Some(cached) = self.cache.get(key).filter(|cached| cached.lsn <= visible) {
            return Ok(cached.value);
        }
        let view = self.view();
        let row = view.row(key)?;
        self.admit(&self.core.lock(), key, row.clone(), view.indexed());
        Ok(row)
    }

    /// The row at `key` that `view` has, through the cache, decoded.
    pub(crate) fn in_view<T>(
        &self,
        view: &View,
        key: &RowKey,
        decode: impl FnOnce(&Bytes) -> Result<T, crate::RowError>,
    ) -> Result<Option<T>, ViewError> {
        // A row is in the cache before it is visible: what is found there now, and is not later than the view, is what the view has.
        if let Some(cached) = self.cache.get(key).filter(|cached| cached.lsn <= view.lsn()) {
            return decode_row(key, cached.value, decode);
        }
        let row = view.row(key)?;
        self.admit(&self.core.lock(), key, row.clone(), view.indexed());
        decode_row(key, row, decode)
    }

    /// The newest row at `key`, decoded.
    pub(crate) fn newest<T>(
        &self,
        key: &RowKey,
        decode: impl FnOnce(&Bytes) -> Result<T, crate::RowError>,
    ) -> Result<Option<T>, ViewError> {
        decode_row(key, self.newest_row(key)?, decode)
    }

    /// Caches a row that an index at `indexed` holds, if nothing later can exist for it.
    fn admit(&self, _core: &MutexGuard<'_, Core>, key: &RowKey, value: Option<Bytes>, indexed: Lsn) {
        let basis = self.basis.load();
        if basis.indexed == indexed && basis.overlaid(key, Lsn::MAX).is_none() {
            self.cache.insert(key.clone(), Cached { lsn: indexed, value });
        }
    }

    /// Decides `operation` and sequences its entry.
    pub(crate) fn submit<O: Operation>(
        &self,
        caller: Option<&Caller>,
        operation: &O,
    ) -> Result<O::Reply, SubmitError> {
        let mut loaded = Loaded::default();
        if let Some(key) = operation.foreseen().filter(|key| !self.cache.contains_key(key)) {
            loaded.load(&self.view(), [key]).map_err(|error| unreadable(&error))?;
        }
        loop {
            let refusal = {
                let mut core = self.core.lock();
                self.may_append()?;
                let moment = self.moment(&core);
                #[cfg(test)]
                self.decisions.fetch_add(1, Ordering::Relaxed);
                let rows = Newest { sequencer: self, loaded: &loaded };
                let mut draft = Draft::new(&rows, moment, caller.copied().unwrap_or_default());
                match operation.decide(&mut draft) {
                    Ok(reply) => {
                        self.sequence(&mut core, O::KIND, caller, moment, draft.finish())?;
                        return Ok(reply);
                    }
                    Err(refusal) => refusal,
                }
            };
            match refusal {
                Refusal::Errno(errno) => return Err(errno.into()),
                Refusal::Stale => return Err(SubmitError::Stale),
                Refusal::Need(keys) => {
                    loaded.load(&self.view(), keys).map_err(|error| unreadable(&error))?;
                }
                Refusal::NeedLink(ino) => loaded.link = Some(self.find_link(ino)?),
                Refusal::Damaged(key) => {
                    tracing::error!(?key, "a row of the tree cannot be read");
                    return Err(Errno::EIO.into());
                }
            }
        }
    }

    /// What refuses every entry at the moment.
    fn may_append(&self) -> Result<(), SubmitError> {
        if self.ended.get().is_some() {
            return Err(Errno::EIO.into());
        }
        if !self.leads() {
            return Err(Errno::EROFS.into());
        }
        if !self.log_room.load(Ordering::Relaxed) || !self.has_index_room() {
            return Err(Errno::ENOSPC.into());
        }
        if self.is_full() {
            return Err(SubmitError::Full);
        }
        Ok(())
    }

    /// Whether the overlay has reached its limit.
    pub(crate) fn is_full(&self) -> bool {
        self.basis.load().weight() > self.limits.overlay_bytes
    }

    fn moment(&self, core: &Core) -> Moment {
        let position = core.state.position;
        let epoch = core.frames.epoch().unwrap_or(position.epoch).number;
        Moment { lsn: position.lsn.next(), time: self.clock.now(), epoch }
    }

    fn find_link(&self, ino: Ino) -> Result<RowKey, SubmitError> {
        match self.view().rows_of(Table::Link, ino.get()).next() {
            Some(Ok((key, _))) => Ok(key),
            Some(Err(error)) => Err(unreadable(&error.into())),
            None => {
                tracing::error!(%ino, "an inode with several names has no further link");
                Err(Errno::EIO.into())
            }
        }
    }

    /// Gives a decision its place in history and shows it to everybody on this node.
    fn sequence(
        &self,
        core: &mut Core,
        kind: EntryKind,
        caller: Option<&Caller>,
        moment: Moment,
        decided: Decided,
    ) -> Result<(), SubmitError> {
        if decided.writes.is_empty() && kind != EntryKind::Tick {
            return Ok(());
        }
        let mut state = core.state;
        for write in decided.writes.iter().filter(|write| Table::in_digest(write.key.table())) {
            let hash = |value: &Bytes| self.keys.row_digest(write.key.table(), write.key.key(), value);
            state.digest = write.old.as_ref().map_or(state.digest, |old| state.digest.minus(hash(old)));
            state.digest = write.new.as_ref().map_or(state.digest, |new| state.digest.plus(hash(new)));
        }
        state.usage.inodes = state.usage.inodes.saturating_add_signed(decided.inodes);
        state.usage.bytes = state.usage.bytes.saturating_add_signed(decided.bytes);
        let entry = Entry {
            lsn: moment.lsn,
            time: moment.time,
            kind: kind as u8,
            caller: caller.map(|caller| Requester { uid: caller.uid, gid: caller.gid, pid: caller.pid }),
            request: None,
            names: decided.names,
            changes: decided.writes,
        };
        let was_empty = core.frames.is_empty();
        let pushed = core.frames.push(&entry, state.digest, state.usage).ok_or(Errno::EROFS)?;
        state.position = pushed.map_err(|error| {
            tracing::error!(%error, ?kind, "an entry could not be encoded");
            Errno::EIO
        })?;
        self.show(moment.lsn, entry.changes.into_iter().map(|write| (write.key, write.new)));
        core.state = state;
        if core.frames.due(moment.time) == Due::Close {
            self.close_frames(core);
        } else if was_empty {
            self.opened.notify_one();
            self.work.notify_one();
        }
        Ok(())
    }

    /// Puts the rows of the entry at `lsn` where every reader finds them.
    fn show(&self, lsn: Lsn, rows: impl Iterator<Item = (RowKey, Option<Bytes>)>) {
        let basis = self.basis.load();
        let cached = rows.inspect(|(key, value)| {
            self.cache.insert(key.clone(), Cached { lsn, value: value.clone() });
        });
        basis.growing().add(lsn, cached);
        self.visible.store(lsn.get(), Ordering::Release);
    }

    /// Hands what is open to the log, and seals the growing generation if it is large.
    fn close_frames(&self, core: &mut Core) {
        let closed = core.frames.close(self.clock.wall());
        self.log_room.store(!core.frames.is_stuck(), Ordering::Relaxed);
        if let Err(error) = closed {
            return self.fail(error.to_string());
        }
        if !core.frames.is_stuck() && self.basis.load().growing().weight() >= self.limits.generation_bytes {
            self.seal(core);
        }
    }

    fn seal(&self, core: &Core) {
        self.basis.store(Arc::new(self.basis.load().sealed(core.state)));
        *self.sealed.0.lock() += 1;
        self.sealed.1.notify_all();
        self.work.notify_one();
    }

    /// What there is to do is told here too, for those who do not block.
    pub(crate) fn work(&self) -> &tokio::sync::Notify {
        &self.work
    }

    /// Stops deciding for good.
    pub(crate) fn fail(&self, reason: String) {
        let mut is_first = false;
        let reason = self.ended.get_or_init(|| {
            is_first = true;
            reason
        });
        if is_first {
            tracing::error!(reason, "nothing more is decided");
        }
    }

    /// Why nothing is decided any more, if so.
    pub(crate) fn ended(&self) -> Option<String> {
        self.ended.get().cloned()
    }

    /// Says whether the index has disk space for what is to be applied; changes are refused while it has none.
    pub(crate) fn set_index_room(&self, has_room: bool) {
        if self.index_room.swap(has_room, Ordering::Relaxed) != has_room {
            tracing::warn!(has_room, "the disk of the index; without room on it changes are refused");
        }
    }

    /// What [`Sequencer::set_index_room`] said last.
    pub(crate) fn has_index_room(&self) -> bool {
        self.index_room.load(Ordering::Relaxed)
    }

    /// Closes what is open, so that it becomes durable soon; returns the last LSN.
    pub(crate) fn close_open_frame(&self) -> Lsn {
        let mut core = self.core.lock();
        self.close_frames(&mut core);
        core.state.position.lsn
    }

    /// Does what is due: closes a frame that is old enough, appends the idle tick. Returns how long nothing will be due.
    pub(crate) fn step(&self) -> Duration {
        let mut core = self.core.lock();
        if self.ended.get().is_some() {
            return IDLE;
        }
        if core.frames.due(self.clock.now()) == Due::Close {
            self.close_frames(&mut core);
        }
        if core.frames.is_stuck() {
            return IDLE;
        }
        match core.frames.due(self.clock.now()) {
            Due::In(patience) => patience,
            Due::Close => Duration::ZERO,
            Due::Tick => {
                let moment = self.moment(&core);
                match self.sequence(&mut core, EntryKind::Tick, None, moment, Decided::default()) {
                    Ok(()) => self.close_frames(&mut core),
                    Err(error) => tracing::error!(?error, "the idle tick was not appended"),
                }
                IDLE
            }
        }
    }

    /// Waits at most `timeout`, or until a frame is opened.
    pub(crate) fn wait_for_work(&self, timeout: Duration) {
        let mut core = self.core.lock();
        if core.frames.is_empty() {
            self.opened.wait_for(&mut core, timeout);
        } else {
            drop(core);
            std::thread::sleep(timeout);
        }
    }

    /// Lets the threads that wait for work look around.
    pub(crate) fn wake(&self) {
        self.opened.notify_all();
        self.sealed.1.notify_all();
    }

    /// Seals what has grown, so that the applier indexes it too.
    pub(crate) fn seal_now(&self) -> Lsn {
        let mut core = self.core.lock();
        self.close_frames(&mut core);
        if !core.frames.is_stuck() && self.basis.load().growing().weight() > 0 {
            self.seal(&core);
        }
        core.state.position.lsn
    }

    /// The oldest sealed generation and its basis, if there is one.
    pub(crate) fn oldest_sealed(&self) -> Option<(Arc<crate::overlay::Generation>, State)> {
        let basis = self.basis.load();
        let oldest = basis.generations.first()?;
        Some((Arc::clone(oldest), oldest.end()?))
    }

    /// Waits at most `timeout` for a generation to be sealed after the `seen`th; returns how many there have been.
    pub(crate) fn wait_for_sealed(&self, seen: u64, timeout: Duration) -> u64 {
        let mut count = self.sealed.0.lock();
        if *count == seen {
            self.sealed.1.wait_for(&mut count, timeout);
        }
        *count
    }

    /// Publishes an index that has ingested the oldest generation.
    pub(crate) fn indexed(&self, index: Arc<dyn IndexSnapshot>, lsn: Lsn) {
        let _core = self.core.lock();
        self.basis.store(Arc::new(self.basis.load().indexed(index, lsn)));
        self.room.notify_waiters();
    }

    /// Returns when the overlay has become smaller, or after a moment.
    pub(crate) async fn room(&self) {
        let notified = self.room.notified();
        let _waited = tokio::time::timeout(Duration::from_millis(50), notified).await;
    }

    /// Follows a source: shows the entries of a frame that is durable in this node's own log.
    pub(crate) fn follow(&self, frame: &Frame, entries: &[Entry]) -> Result<(), FollowError> {
        let mut core = self.core.lock();
        let shown = core.state.position;
        if core.frames.epoch().is_some()
            || frame.first() != shown.lsn.next()
            || frame.previous_hash() != shown.hash
        {
            return Err(FollowError::NotNext { shown, found: frame.first() });
        }
        for entry in entries {
            let rows = entry.changes.iter();
            let rows =
                rows.map(|change| (RowKey::from_parts(change.table, &change.key), change.value.clone()));
            self.show(entry.lsn, rows);
        }
        core.state = frame.state();
        let last_entry = entries.last().map_or(core.frames.last_entry(), |entry| entry.time);
        core.frames.followed(frame.position(), last_entry);
        if self.basis.load().growing().weight() >= self.limits.generation_bytes {
            self.seal(&core);
        }
        Ok(())
    }

    /// The time that an entry would have now, for the times of written data. What an entry would be refused for refuses the data too,
    /// except a full overlay. Takes no lock.
    pub(crate) fn time_of_write(&self) -> Result<LogTime, SubmitError> {
        match self.may_append() {
            Ok(()) | Err(SubmitError::Full) => Ok(self.clock.now()),
            Err(refused) => Err(refused),
        }
    }

    /// Gives nothing a time before `moment` any more.
    pub(crate) fn not_before(&self, moment: LogTime) {
        self.clock.not_before(moment);
    }

    /// How far log time is ahead of the wall clock, in milliseconds; negative if it is behind.
    pub(crate) fn log_time_ahead_ms(&self) -> i64 {
        self.clock.ahead_ms()
    }

    /// The log below.
    pub(crate) fn log(&self) -> &Arc<dyn Log> {
        &self.log
    }
}

/// A row that cannot be read becomes EIO here, and is logged here.
pub(crate) fn unreadable(error: &ViewError) -> SubmitError {
    tracing::error!(%error, "the tree cannot be read");
    SubmitError::Errno(Errno::EIO)
}
