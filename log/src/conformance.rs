//! What every [`Log`] must do, as one suite that runs against each implementation; and the histories that it runs on.
//!
//! Invariants:
//! - Nothing here knows how a log works inside; what it is given is a maker of [`Subject`]s.
//! - A violation panics with the sentence that was violated.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    AppendError, Appender, BranchId, ChainHash, Change, ClaimError, Digest, Entry, Epoch, EpochId, Frame,
    FrameError, FrameReader, Log, LogTime, Lsn, Position, ReadError, State, Terminal, Usage, VolumeId,
    VolumeKeys, WaitError,
};

/// A log under test, and what can happen to it from outside.
pub trait Subject {
    /// The log.
    fn log(&self) -> Arc<dyn Log>;
    /// Stops the process in order and starts it again. Nothing else holds the log by then.
    fn reopened(self: Box<Self>) -> Box<dyn Subject>;
    /// Makes the medium fail from now on.
    fn break_medium(&self);
}

/// Runs the suite. `make` makes a new, empty log of [`VOLUME`] and [`BRANCH`] that begins after the given state; what it
/// keeps in one piece when it is trimmed must be below 64 KiB.
pub fn conforms(make: &dyn Fn(State) -> Box<dyn Subject>) {
    frames_are_read_as_they_were_appended(make);
    what_does_not_continue_the_tail_is_refused(make);
    epochs_are_fenced(make);
    the_tail_survives_a_restart(make);
    the_watch_tells_what_is_durable(make);
    a_reader_at_the_tail_follows(make);
    a_slow_reader_loses_nothing(make);
    readers_begin_inside_frames_and_not_beyond_the_end(make);
    what_is_trimmed_says_so(make);
    a_broken_medium_is_the_end(make);
}

/// The source of a history: it makes the frames that a log under test is given.
#[derive(Debug)]
pub struct History {
    appender: Appender,
    time: LogTime,
    /// What its frames say to be durable.
    durable: Lsn,
}

impl History {
    /// A history that continues `state` in `epoch`.
    pub fn new(epoch: Epoch, state: State) -> History {
        let appender = Appender::new(VolumeKeys::derive(VOLUME), epoch, state);
        History {
            appender,
            time: LogTime::from_nanos(1_800_000_000_000_000_000),
            durable: state.position.lsn,
        }
    }

    /// The state that a volume without entries is in.
    pub fn origin() -> State {
        let position = Position { epoch: epoch(0), lsn: Lsn::ROOT, hash: ChainHash::from_bytes([7; 32]) };
        State { position, digest: Digest(1), usage: Usage { inodes: 1, bytes: 0 } }
    }

    /// Lets the next frames say that everything up to `lsn` was durable when they were closed.
    pub fn set_durable(&mut self, lsn: Lsn) {
        self.durable = lsn;
    }

    /// The next frame, with this many entries.
    pub fn frame(&mut self, entries: usize) -> Frame {
        let before = self.appender.state();
        for index in 0..entries as u64 {
            let entry = self.entry();
            let digest = Digest(before.digest.0 + u128::from(index) + 1);
            let usage = Usage { inodes: before.usage.inodes + index + 1, bytes: 0 };
            self.appender.push(&entry, digest, usage).expect("the entries of a history are dense");
        }
        let frame = self.appender.close(self.time, self.durable);
        frame.expect("a frame was asked for with at least one entry")
    }

    /// The next entry: one row, whose value holds its LSN and time.
    fn entry(&mut self) -> Entry {
        self.time = self.time.after(Duration::from_micros(20));
        let lsn = self.appender.state().position.lsn.next();
        let mut value = vec![0x11; 20];
        value.extend_from_slice(&lsn.get().to_be_bytes());
        value.extend_from_slice(&self.time.row_bytes());
        let key = Bytes::copy_from_slice(&lsn.get().to_be_bytes());
        let change = Change { table: 1, key, value: Some(Bytes::from(value)) };
        Entry {
            kind: 1,
            names: vec![Bytes::from_static(b"a name")],
            changes: vec![change],
            ..Entry::tick(lsn, self.time)
        }
    }
}

/// The volume of the suite.
pub const VOLUME: VolumeId = VolumeId::from_bytes([0x56; 16]);
/// The branch of the suite.
pub const BRANCH: BranchId = BranchId::from_bytes([0x42; 16]);

/// The epoch of the suite with this number.
pub fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
}

/// Compares `bytes` with the golden file `name` of version 0, which `MURPHY_WRITE_GOLDEN` makes anew.
///
/// # Panics
/// If they differ, or there is no such file.
pub fn golden(name: &str, bytes: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v0").join(name);
    let line =
        |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ") + "\n";
    let text: String = bytes.chunks(16).map(line).collect();
    if std::env::var_os("MURPHY_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &text).expect("golden files can be written here");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(golden, text, "{name} is not what version 0 wrote");
}

/// A claimed log and its history.
fn begun(make: &dyn Fn(State) -> Box<dyn Subject>) -> (Box<dyn Subject>, Arc<dyn Log>, History) {
    let subject = make(History::origin());
    let log = subject.log();
    let state = log.claim(epoch(1)).expect("a new log can be claimed");
    assert_eq!(state, History::origin(), "a new log begins with the state that it was made with");
    (subject, log, History::new(epoch(1), state))
}

fn append(log: &dyn Log, frame: &Frame) {
    let previous = log.tail().position;
    log.append(&previous, frame.clone()).expect("a frame that continues the tail is queued");
    assert_eq!(log.tail(), frame.state(), "the tail is behind the last frame queued");
}

fn wait(log: &dyn Log, lsn: Lsn) {
    let state = log.durable().wait_blocking(lsn, PATIENCE).expect("what is queued becomes durable");
    assert!(state.position.lsn >= lsn, "a wait ends when its lsn is durable");
}

fn append_all(log: &dyn Log, history: &mut History, frames: usize, entries: usize) -> Vec<Frame> {
    let frames: Vec<Frame> = (0..frames).map(|_| history.frame(entries)).collect();
    frames.iter().for_each(|frame| append(log, frame));
    wait(log, log.tail().position.lsn);
    frames
}

fn read_all(reader: &mut FrameReader) -> Vec<Frame> {
    reader.map(|frame| frame.expect("durable frames can be read")).collect()
}

fn assert_same(read: &[Frame], appended: &[Frame]) {
    let bytes = |frames: &[Frame]| frames.iter().map(|frame| frame.bytes().clone()).collect::<Vec<Bytes>>();
    assert!(
        bytes(read) == bytes(appended),
        "frames are read in order, each once, with the bytes that were appended"
    );
}

fn frames_are_read_as_they_were_appended(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (_subject, log, mut history) = begun(make);
    assert_eq!(read_all(&mut log.read(Lsn::FIRST).expect("an empty log can be read")).len(), 0);
    let frames = append_all(&*log, &mut history, 20, 3);
    assert_same(&read_all(&mut log.read(Lsn::FIRST).expect("it can be read")), &frames);
    assert_eq!(log.first(), Lsn::FIRST, "nothing was trimmed");
}

fn what_does_not_continue_the_tail_is_refused(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let subject = make(History::origin());
    let log = subject.log();
    let mut history = History::new(epoch(1), History::origin());
    let (first, second, third) = (history.frame(2), history.frame(2), history.frame(2));
    let origin = History::origin().position;
    let refused = log.append(&origin, first.clone());
    assert_eq!(refused, Err(AppendError::NotClaimed), "nobody appends without a claim");
    log.claim(epoch(1)).expect("a new log can be claimed");
    log.append(&origin, first.clone()).expect("the first frame is queued");

    let tail = first.position();
    let refused = log.append(&second.position(), third.clone());
    assert_eq!(refused, Err(AppendError::WrongPrevious { tail }), "the caller must know the tail");
    let refused = log.append(&tail, third.clone());
    let gap = FrameError::Gap { expected: second.first(), found: third.first() };
    assert_eq!(refused, Err(AppendError::NotNext(gap)), "a gap is refused");
    assert!(log.append(&tail, first.clone()).is_err(), "a frame is appended once");

    let mut forked = History::origin();
    forked.position = Position { hash: ChainHash::from_bytes([8; 32]), ..tail };
    let fork = History::new(epoch(1), forked).frame(1);
    let refused = log.append(&tail, fork.clone());
    assert_eq!(
        refused,
        Err(AppendError::NotNext(FrameError::Fork { lsn: fork.first() })),
        "a fork is refused"
    );

    let later = History::new(epoch(2), first.state()).frame(1);
    let refused = log.append(&tail, later.clone());
    let wrong = AppendError::WrongEpoch { lsn: later.first(), claimed: epoch(1) };
    assert_eq!(refused, Err(wrong), "an epoch is claimed before it appends");

    append(&*log, &second);
    wait(&*log, second.last());
    assert_same(&read_all(&mut log.read(Lsn::FIRST).expect("it can be read")), &[first, second]);
}

fn epochs_are_fenced(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (subject, log, mut history) = begun(make);
    let first = append_all(&*log, &mut history, 1, 2).remove(0);
    assert_eq!(
        log.claim(epoch(3)).expect("a later epoch may claim"),
        first.state(),
        "a claim tells the durable tail"
    );
    let stale = history.frame(1);
    let refused = log.append(&first.position(), stale.clone());
    assert!(matches!(refused, Err(AppendError::WrongEpoch { .. })), "frames of an ended epoch are refused");
    let fenced = Err(ClaimError::Fenced { by: epoch(3) });
    assert_eq!(log.claim(epoch(2)), fenced, "an earlier epoch is refused");
    let twin = Epoch { number: 3, id: EpochId::from_bytes([99; 16]) };
    assert_eq!(log.claim(twin), fenced, "another epoch of the same number is refused");

    drop(log);
    let subject = subject.reopened();
    let log = subject.log();
    assert_eq!(log.claim(epoch(2)), fenced, "an earlier epoch is refused after a restart");
    assert_eq!(log.claim(epoch(3)), Ok(first.state()), "a source may claim its epoch again");
    let next = append_all(&*log, &mut History::new(epoch(3), first.state()), 1, 1).remove(0);
    assert_same(&read_all(&mut log.read(Lsn::FIRST).expect("it can be read")), &[first, next]);
}

fn the_tail_survives_a_restart(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (mut subject, log, mut history) = begun(make);
    let mut frames = append_all(&*log, &mut history, 5, 4);
    drop(log);
    for _ in 0..3 {
        subject = subject.reopened();
        let log = subject.log();
        let state = frames.last().expect("frames were appended").state();
        assert_eq!(log.tail(), state, "the tail survives a restart");
        assert_eq!(log.durable().state(), state, "what was durable stays durable");
        assert_same(&read_all(&mut log.read(Lsn::FIRST).expect("it can be read")), &frames);
        assert_eq!(log.claim(epoch(1)), Ok(state), "a claim returns the tail");
        frames.extend(append_all(&*log, &mut History::new(epoch(1), state), 2, 2));
    }
}

fn the_watch_tells_what_is_durable(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (_subject, log, mut history) = begun(make);
    let watch = log.durable();
    let frame = append_all(&*log, &mut history, 1, 3).remove(0);
    assert_eq!(watch.state(), frame.state(), "an old watch sees new frames");
    assert_eq!(
        watch.wait_blocking(frame.first(), PATIENCE),
        Ok(frame.state()),
        "a wait resolves to a frame end"
    );
    let next = frame.last().next();
    let timed_out = watch.wait_blocking(next, Duration::from_millis(1));
    assert_eq!(
        timed_out,
        Err(WaitError::TimedOut { lsn: next }),
        "what is not appended does not become durable"
    );
}

fn a_reader_at_the_tail_follows(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (_subject, log, mut history) = begun(make);
    let mut reader = log.read(Lsn::FIRST).expect("an empty log can be read");
    for _ in 0..5 {
        assert!(reader.next().is_none(), "at the tail there is nothing");
        let frames = append_all(&*log, &mut history, 2, 2);
        assert_same(&read_all(&mut reader), &frames);
    }
    let state = log.claim(epoch(2)).expect("a later epoch may claim");
    let frames = append_all(&*log, &mut History::new(epoch(2), state), 2, 2);
    assert_same(&read_all(&mut reader), &frames);
}

fn a_slow_reader_loses_nothing(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (_subject, log, mut history) = begun(make);
    let mut frames = append_all(&*log, &mut history, 1, 1);
    let mut reader = log.read(Lsn::FIRST).expect("it can be read");
    let first = reader.next().expect("one frame is durable").expect("it can be read");
    for _ in 0..40 {
        frames.extend(append_all(&*log, &mut history, 4, 200));
    }
    assert_same(&[vec![first], read_all(&mut reader)].concat(), &frames);
}

fn readers_begin_inside_frames_and_not_beyond_the_end(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (_subject, log, mut history) = begun(make);
    let frames = append_all(&*log, &mut history, 4, 5);
    for frame in &frames {
        for lsn in [frame.first(), frame.first().next(), frame.last()] {
            let found = log
                .read(lsn)
                .expect("it can be read")
                .next()
                .expect("it is durable")
                .expect("it can be read");
            assert_eq!(found.first(), frame.first(), "a reader begins with the frame that holds its lsn");
        }
    }
    let durable = log.tail().position.lsn;
    assert_eq!(read_all(&mut log.read(durable.next()).expect("one beyond the end may be read")).len(), 0);
    let lsn = durable.advanced(2);
    assert_eq!(
        log.read(lsn).err(),
        Some(ReadError::Beyond { lsn, durable }),
        "two beyond the end is refused"
    );
    let first = log.first();
    assert_eq!(log.read(Lsn::ROOT).err(), Some(ReadError::Trimmed { lsn: Lsn::ROOT, first }));
}

fn what_is_trimmed_says_so(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (subject, log, mut history) = begun(make);
    let frames = append_all(&*log, &mut history, 60, 100);
    let below = frames[50].first();
    let mut early = log.read(Lsn::FIRST).expect("it can be read");
    let first = log.trim(below).expect("it can be trimmed");
    assert_eq!(first, log.first());
    assert!(first > Lsn::FIRST, "something was trimmed");
    assert!(first <= below, "nothing was trimmed that was not asked for");
    let trimmed = ReadError::Trimmed { lsn: Lsn::FIRST, first };
    assert_eq!(log.read(Lsn::FIRST).err(), Some(trimmed.clone()), "what is trimmed cannot be read");
    if let Some(Err(error)) = early.next() {
        assert_eq!(error, trimmed, "a reader that was overtaken says so");
    }
    let kept: Vec<Frame> = frames.iter().filter(|frame| frame.first() >= first).cloned().collect();
    assert_same(&read_all(&mut log.read(first).expect("the rest can be read")), &kept);
    log.trim(Lsn::MAX).expect("trimming too much is not an error");
    assert!(log.first() <= log.tail().position.lsn, "the last durable frame is never trimmed");

    let (first, state) = (log.first(), log.tail());
    drop(early);
    drop(log);
    let log = subject.reopened().log();
    assert_eq!((log.first(), log.tail()), (first, state), "a trimmed log opens as it was");
}

fn a_broken_medium_is_the_end(make: &dyn Fn(State) -> Box<dyn Subject>) {
    let (subject, log, mut history) = begun(make);
    let frames = append_all(&*log, &mut history, 3, 2);
    let durable = log.tail();
    subject.break_medium();
    let lost = history.frame(2);
    // The frame is refused, or queued and never durable; both are said.
    if log.append(&durable.position, lost.clone()).is_ok() {
        let ended = log.durable().wait_blocking(lost.last(), PATIENCE);
        assert!(
            matches!(ended, Err(WaitError::Ended(Terminal::Poisoned { .. }))),
            "a failure ends every wait"
        );
    }
    assert_eq!(log.durable().state(), durable, "what was durable stays durable, and nothing more");
    let refused = log.append(&lost.position(), history.frame(1));
    assert!(matches!(refused, Err(AppendError::Ended(_))), "nothing is appended after the end");
    assert!(matches!(log.claim(epoch(2)), Err(ClaimError::Ended(_))), "nothing is claimed after the end");
    assert_same(&read_all(&mut log.read(Lsn::FIRST).expect("reading goes on after the end")), &frames);
}

/// How long the suite waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);
