//! Bytes of users that look like what a log says of itself: they lie in the bodies of frames, and a power cut may leave them behind a gap.
//!
//! Invariants:
//! - The user knows the formats, the volume, the history, and where his bytes will lie. He does not know what is in the files of the log.

use bytes::Bytes;

use super::*;
use crate::{
    Appender, Change, Digest, Entry, FrameHeader, KIND_TICK, LogSecret, LogTime, Usage, VolumeKeys,
    segment::Marks,
};

/// A frame behind `state` with one entry for each value.
fn frame_of(epoch: Epoch, state: State, values: &[Vec<u8>]) -> Frame {
    let mut appender = Appender::new(VolumeKeys::derive(VOLUME), epoch, state);
    for value in values {
        let lsn = appender.state().position.lsn.next();
        let key = Bytes::copy_from_slice(&lsn.get().to_be_bytes());
        let change = Change { table: 7, key, value: Some(Bytes::copy_from_slice(value)) };
        let tick = Entry::tick(lsn, LogTime::from_nanos(lsn.get()));
        let entry = Entry { kind: KIND_TICK + 1, changes: vec![change], ..tick };
        appender.push(&entry, Digest(lsn.get().into()), Usage::default()).unwrap();
    }
    appender.close(LogTime::from_nanos(10), state.position.lsn).unwrap()
}

fn push(log: &DiskLog, frame: Frame) -> Frame {
    log.append(&log.tail().position, frame.clone()).unwrap();
    frame
}

/// A mark with a checksum that anybody can compute.
fn plain_mark(durable: Lsn) -> [u8; MARK_BYTES] {
    let mut mark = [0; MARK_BYTES];
    mark[..4].copy_from_slice(b"MsyX");
    mark[8..16].copy_from_slice(&durable.get().to_le_bytes());
    let sum = blake3::hash(&mark[..16]);
    mark[16..].copy_from_slice(&sum.as_bytes()[..16]);
    mark
}

/// A whole frame of `epoch` that says of what was durable what it likes.
fn frame_that_says(first: Lsn, durable: Lsn, epoch: Epoch) -> Vec<u8> {
    let origin = History::origin();
    let base = State { position: Position { epoch, lsn: first.previous(), ..origin.position }, ..origin };
    let frame = frame_of(epoch, base, &[vec![1; 10]]);
    let mut header = FrameHeader { durable_lsn: durable, ..*frame.header() };
    header.checksum = header.checksum_with(&frame.body());
    [&header.encode()[..], &frame.body()].concat()
}

/// All that a user might want to be believed, as the value of an entry. It begins at byte `place` of the segment that begins with `first`; `before`
/// is a state that he would like to go on from.
fn forged(first: Lsn, place: usize, before: State) -> Vec<u8> {
    let made_up = [
        frame_that_says(NEVER.next(), NEVER, epoch(before.position.epoch.number)),
        frame_that_says(Lsn::FIRST, Lsn::ROOT, epoch(77)),
        frame_of(before.position.epoch, before, &[b"never decided".to_vec()]).bytes().to_vec(),
    ];
    let mut bytes = Vec::new();
    for secret in [None, Some([0; 32]), Some([9; 32])] {
        for frame in &made_up {
            let at = (place + bytes.len()) as u64;
            let guessed = |secret| Marks::new(&LogSecret::from_bytes(secret), first).encode(at, NEVER);
            bytes.extend_from_slice(&secret.map_or_else(|| plain_mark(NEVER), guessed));
            bytes.extend_from_slice(frame);
        }
    }
    bytes
}

/// Makes a history twice: the first time to see where the user's bytes come to lie, the second time with what he makes of that.
fn with_forgery<T>(
    first: Lsn,
    make: impl Fn(&dyn Fn(State) -> Vec<u8>) -> (FaultyDisk, T),
) -> (FaultyDisk, T) {
    let placeholder = |before| vec![0xEE; forged(first, 0, before).len()];
    let (files, _) = make(&placeholder);
    let place = finds(&segment(&files, first), &[0xEE; 100]).unwrap();
    let made = make(&|before| forged(first, place, before));
    assert_eq!(finds(&segment(&made.0, first), &plain_mark(NEVER)), Some(place));
    made
}

fn segment(files: &FaultyDisk, first: Lsn) -> Vec<u8> {
    let name = segment_name(first);
    files.contents().into_iter().find(|(path, _)| path.ends_with(&name)).unwrap().1
}

fn damage(files: &FaultyDisk, first: Lsn, damage: impl Fn(&mut Vec<u8>)) -> PathBuf {
    let path = Path::new("/log").join(segment_name(first));
    files.damage(&path, damage);
    path
}

fn finds(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn flip_bit_of(bytes: &mut [u8], frame: &Frame) {
    let at = finds(bytes, frame.bytes()).unwrap();
    bytes[at + 100] ^= 1;
}

/// The fear: a user writes an attribute that looks as if more had been durable, a power cut keeps its page and not the ones before it, and the
/// node does not start.
#[test]
fn what_a_user_has_written_does_not_make_a_torn_group_durable() {
    let (files, (durable, torn)) = with_forgery(Lsn::FIRST, |user| {
        let files = disk();
        let log = DiskLog::create(options(&files), History::origin()).unwrap();
        let state = log.claim(epoch(1)).unwrap();
        let durable = push(&log, frame_of(epoch(1), state, &[vec![5; 50]]));
        assert!(log.step());
        let torn = push(&log, frame_of(epoch(1), durable.state(), &[vec![6; 700]]));
        push(&log, frame_of(epoch(1), torn.state(), &[user(durable.state())]));
        files.stop_at(files.operations() + 1);
        assert!(!log.step(), "the sync does not come to its end");
        (files, (durable, torn))
    });
    let mut met = 0;
    for seed in 0..300 {
        let files = files.after_power_cut(seed);
        let bytes = segment(&files, Lsn::FIRST);
        let is_torn = finds(&bytes, torn.bytes()).is_none();
        let is_met = is_torn && finds(&bytes, &plain_mark(NEVER)).is_some();
        let opened = DiskLog::open(options(&files)).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let read = read_all(&opened);
        assert_same(&read[..1], std::slice::from_ref(&durable));
        assert!(read.len() == 1 || !is_torn, "seed {seed}");
        assert!(!is_met || opened.recovery().cut.is_some(), "seed {seed}");
        met += usize::from(is_met);
    }
    assert!(met > 10, "the fear was met {met} times");
}

/// The fear: what is really damaged is mended up to an end that never was, with entries that a user made up, or not at all because of them.
#[test]
fn a_mend_neither_takes_nor_asks_for_what_a_user_has_made_up() {
    let (files, frames) = with_forgery(Lsn::FIRST, |user| {
        let files = disk();
        let log = DiskLog::create(options(&files), History::origin()).unwrap();
        let mut state = log.claim(epoch(1)).unwrap();
        let mut frames = Vec::new();
        for round in 0..4 {
            let value = if round == 1 { user(state) } else { vec![round; 300] };
            frames.push(push(&log, frame_of(epoch(1), state, &[value])));
            state = log.tail();
            assert!(log.step());
        }
        (files, frames)
    });
    let last = frames.last().unwrap().last();
    let damaged = damage(&files, Lsn::FIRST, |bytes| {
        flip_bit_of(bytes, &frames[0]);
        flip_bit_of(bytes, &frames[1]);
    });
    let refused = DiskLog::open(options(&files)).unwrap_err();
    assert!(matches!(refused, OpenError::DamagedMiddle { lsn: Lsn::FIRST, .. }), "{refused}");
    DiskLog::repair(&options(&files), &damaged, None, &mut |after, _| {
        assert!(after.lsn < last, "asked for what follows {after}");
        Ok(frames.iter().filter(|frame| frame.first() > after.lsn).take(1).cloned().collect())
    })
    .unwrap();
    assert_same(&read_all(&DiskLog::open(options(&files)).unwrap()), &frames);
}

/// Two segments, of an epoch each; the user writes into the second one, which has three groups.
fn two_segments() -> (FaultyDisk, Vec<Frame>) {
    with_forgery(Lsn::new(3), |user| {
        let files = disk();
        let log = DiskLog::create(options(&files), History::origin()).unwrap();
        let state = log.claim(epoch(1)).unwrap();
        let mut frames = vec![push(&log, frame_of(epoch(1), state, &[vec![1; 300]]))];
        assert!(log.step());
        let mut state = log.claim(epoch(2)).unwrap();
        for value in [user(state), vec![2; 300], vec![3; 300]] {
            frames.push(push(&log, frame_of(epoch(2), state, &[value])));
            state = log.tail();
            assert!(log.step());
        }
        (files, frames)
    })
}

/// The fear: the header of the newest segment rots, and with it all knowledge of how far the log was durable, so that the mend cuts what was; or a user
/// has said in which epoch it is.
#[test]
fn a_segment_that_lost_its_header_still_says_how_far_it_was_durable_and_in_which_epoch() {
    for lost in [0..8, 160..224, 0..300] {
        for (damaged_frames, kept) in [(0..0, 4), (2..3, 4), (1..3, 4), (3..4, 3)] {
            let (files, frames) = two_segments();
            let path = damage(&files, Lsn::new(3), |bytes| {
                frames[damaged_frames.clone()].iter().for_each(|frame| flip_bit_of(bytes, frame));
                bytes[lost.clone()].fill(0xAA);
            });
            let refused = DiskLog::open(options(&files)).unwrap_err();
            assert!(matches!(refused, OpenError::Header { .. }), "{refused}");
            DiskLog::repair(&options(&files), &path, None, &mut |after, wanted| {
                assert_eq!(wanted, epoch(2));
                Ok(frames.iter().filter(|frame| frame.first() > after.lsn).take(1).cloned().collect())
            })
            .unwrap_or_else(|error| panic!("{lost:?}, {damaged_frames:?}: {error}"));
            let log = DiskLog::open(DiskOptions { scrub: Scrub::Everything, ..options(&files) }).unwrap();
            assert_same(&read_all(&log), &frames[..kept]);
            assert_eq!(log.recovery().epoch, epoch(2));
        }
    }
}

/// No log has come this far.
const NEVER: Lsn = Lsn::new(1 << 40);
