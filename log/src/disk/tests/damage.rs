//! Damage: what may be cut, what must be refused, and what is never changed.
//!
//! Invariants:
//! - No damage changes an entry silently: it is cut with the torn tail, refused at the open, or refused at the read.

use std::ops::Range;

use super::*;
use crate::{FrameReader, Recovery};

/// A log of one segment with three groups, of two frames each.
pub(super) fn three_groups() -> (FaultyDisk, Vec<Frame>) {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    let mut frames = Vec::new();
    for _ in 0..3 {
        frames.push(append(&log, &mut history, 1).unwrap());
        frames.push(append(&log, &mut history, 2).unwrap());
        assert!(log.step());
    }
    (files, frames)
}

pub(super) const SEGMENT: &str = "/log/00000000000000000002.seg";

pub(super) fn group_bytes(frames: &[Frame]) -> usize {
    frames.iter().map(|frame| MARK_BYTES + frame.bytes().len()).sum::<usize>()
}

/// Where the marks of these frames stand.
pub(super) fn marks_of(frames: &[Frame]) -> Vec<Range<usize>> {
    let starts = (0..frames.len()).map(|index| SEGMENT_HEADER_BYTES + group_bytes(&frames[..index]));
    starts.map(|start| start..start + MARK_BYTES).collect()
}

pub(super) fn recovered(files: &FaultyDisk) -> Result<(Recovery, Vec<Frame>), OpenError> {
    let log = DiskLog::open(options(files))?;
    Ok((log.recovery().clone(), read_all(&log)))
}

#[test]
fn no_flipped_bit_changes_an_entry_silently() {
    let (files, frames) = three_groups();
    let used = SEGMENT_HEADER_BYTES + frames.chunks(2).map(group_bytes).sum::<usize>();
    let last_group = used - group_bytes(&frames[4..]);
    for bit in 0..(used + 64) * 8 {
        let damaged = files.after_kill();
        damaged.damage(Path::new(SEGMENT), |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        let before = damaged.contents();
        let (byte, opened) = (bit / 8, recovered(&damaged));
        if marks_of(&frames).iter().any(|mark| mark.contains(&byte)) {
            let (recovery, read) = opened.unwrap();
            assert_same(&read, &frames);
            assert_eq!(recovery.cut, None, "byte {byte}");
        } else if byte < last_group {
            let refused = opened.unwrap_err();
            assert_eq!(damaged.contents(), before, "a refused open changes nothing");
            let middle = matches!(refused, OpenError::DamagedMiddle { .. });
            assert!(middle || byte < SEGMENT_HEADER_BYTES, "byte {byte}: {refused}");
        } else {
            let (recovery, read) = opened.unwrap();
            assert_same(&read, &frames[..read.len()]);
            assert!(recovery.cut.is_some(), "byte {byte}: damage is said");
            assert!(read.len() >= 4, "byte {byte}: what was durable before the last group is there");
            assert_eq!(read.len() == 6, byte >= used, "byte {byte}");
        }
    }
}

#[test]
fn a_torn_tail_is_cut_at_every_length() {
    let (files, frames) = three_groups();
    let used = SEGMENT_HEADER_BYTES + frames.chunks(2).map(group_bytes).sum::<usize>();
    for length in SEGMENT_HEADER_BYTES..used {
        let zeroed = files.after_kill();
        zeroed.damage(Path::new(SEGMENT), |bytes| bytes[length..].fill(0));
        let shortened = files.after_kill();
        shortened.damage(Path::new(SEGMENT), |bytes| bytes.truncate(length));
        let (zeroed, shortened) = (recovered(&zeroed).unwrap().1, recovered(&shortened).unwrap().1);
        assert_same(&zeroed, &shortened);
        assert_same(&zeroed, &frames[..zeroed.len()]);
    }
}

/// Whoever may know more than the log is asked before anything is cut.
#[test]
fn a_torn_end_is_refused_before_it_is_cut_when_told_so() {
    let (files, frames) = three_groups();
    let used = SEGMENT_HEADER_BYTES + frames.chunks(2).map(group_bytes).sum::<usize>();
    let whole_only =
        |files: &FaultyDisk| DiskLog::open(DiskOptions { access: Access::WriteWhole, ..options(files) });
    let torn = files.after_kill();
    torn.damage(Path::new(SEGMENT), |bytes| bytes[used - 1] ^= 1);
    let before = torn.contents();
    let refused = whole_only(&torn).map(drop).unwrap_err();
    let last = frames[4].last();
    assert!(matches!(refused, OpenError::Torn { lsn, .. } if lsn == last), "{refused}");
    assert!(torn.contents() == before, "nothing was cut");
    assert_eq!(recovered(&torn).unwrap().0.tail.position.lsn, last);
    let opened = whole_only(&files).unwrap();
    assert_same(&read_all(&opened), &frames);
}

/// The fear: whoever only wants to know how a log is changes it, and takes away what tells why it is so.
#[test]
fn a_look_finds_what_a_recovery_would_and_changes_no_file() {
    let (files, frames) = three_groups();
    let used = SEGMENT_HEADER_BYTES + frames.chunks(2).map(group_bytes).sum::<usize>();
    for length in [SEGMENT_HEADER_BYTES - 1, SEGMENT_HEADER_BYTES, used - 200, used - 1, used, used + 64] {
        let damaged = files.after_kill();
        damaged.damage(Path::new(SEGMENT), |bytes| bytes[length.min(used)..used].fill(0));
        damaged.damage(Path::new(SEGMENT), |bytes| bytes.truncate(length));
        damaged.create(Path::new("/log/00000000000000000009.seg.tmp")).unwrap();
        let before = damaged.contents();
        let looked = DiskLog::open(DiskOptions { access: Access::Read, ..options(&damaged) });
        let seen = looked.map(|log| {
            assert_eq!(log.claim(epoch(2)), Err(ClaimError::ReadOnly));
            assert_eq!(log.trim(Lsn::new(5)), Ok(log.first()));
            (log.recovery().clone(), read_all(&log))
        });
        assert!(damaged.contents() == before, "{length}: a look changed something");
        match (seen, recovered(&damaged)) {
            (Ok((seen, read)), Ok((recovery, frames))) => {
                assert_eq!(seen, recovery, "{length}");
                assert_same(&read, &frames);
            }
            (Err(refused), Err(also)) => assert_eq!(refused, also, "{length}"),
            (seen, recovered) => panic!("{length}: {:?}, {:?}", seen.is_ok(), recovered.is_ok()),
        }
    }
}

#[test]
fn a_tail_that_is_known_to_have_been_durable_is_not_cut() {
    let (files, frames) = three_groups();
    let damaged = files.after_kill();
    let end = SEGMENT_HEADER_BYTES + group_bytes(&frames[..2]) + 40;
    damaged.damage(Path::new(SEGMENT), |bytes| bytes[end..].fill(0));
    let before = damaged.contents();
    let known = |frame: &Frame| DiskOptions { known_durable: Some(frame.position()), ..options(&damaged) };
    let refused = DiskLog::open(known(&frames[2])).unwrap_err();
    assert!(
        matches!(&refused, OpenError::DamagedMiddle { lsn, .. } if *lsn == frames[2].first()),
        "{refused}"
    );
    assert_eq!(damaged.contents(), before);
    DiskLog::open(known(&frames[1])).unwrap();

    let mut other = frames[1].position();
    other.hash = ChainHash::default();
    let refused = DiskLog::open(DiskOptions { known_durable: Some(other), ..options(&files) }).unwrap_err();
    assert!(matches!(refused, OpenError::Diverged { .. }), "{refused}");
}

/// The frames of one group may reach the disk in any order; the loss of its first is a torn write, not damage.
#[test]
fn a_group_whose_first_frame_is_lost_is_torn() {
    let (files, frames) = three_groups();
    let used = SEGMENT_HEADER_BYTES + frames.chunks(2).map(group_bytes).sum::<usize>();
    let first = used - group_bytes(&frames[4..]) + MARK_BYTES;
    files.damage(Path::new(SEGMENT), |bytes| bytes[first..first + frames[4].bytes().len()].fill(0));
    let (recovery, read) = recovered(&files).unwrap();
    assert_same(&read, &frames[..4]);
    assert!(recovery.cut.is_some());
}

/// Every frame has a mark: the last of a group proves what was durable before it, whatever became of the others.
#[test]
fn a_later_frame_proves_what_was_durable() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    let first = append(&log, &mut history, 1).unwrap();
    log.step();
    let second = append(&log, &mut history, 1).unwrap();
    append(&log, &mut history, 1).unwrap();
    assert!(log.step() && !log.step());
    drop(log);
    files.damage(Path::new(SEGMENT), |bytes| {
        let second_mark = SEGMENT_HEADER_BYTES + group_bytes(std::slice::from_ref(&first));
        bytes[second_mark..second_mark + group_bytes(&[second])].fill(0);
        bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 50] ^= 1;
    });
    let refused = recovered(&files).unwrap_err();
    assert!(matches!(&refused, OpenError::DamagedMiddle { lsn, .. } if *lsn == first.first()), "{refused}");
}

/// Many segments: `claims` claims with enough frames for several segments each.
pub(super) fn many_segments() -> (FaultyDisk, Vec<Frame>) {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut frames = Vec::new();
    for number in 1..4 {
        let mut history = History::new(epoch(number), log.claim(epoch(number)).unwrap());
        for _ in 0..20 {
            frames.push(append(&log, &mut history, 20).unwrap());
            log.step();
        }
    }
    (files, frames)
}

#[test]
fn a_lost_or_shortened_segment_is_noticed() {
    let (files, frames) = many_segments();
    let segments = recovered(&files).unwrap().0.segments;
    assert!(segments.len() > 5);
    let newest_but_one = format!("/log/{}", segment_name(segments[segments.len() - 2]));
    let shortened = files.after_kill();
    shortened.damage(Path::new(&newest_but_one), |bytes| bytes.truncate(bytes.len() - 1));
    let refused = DiskLog::open(options(&shortened)).unwrap_err();
    assert!(matches!(refused, OpenError::DamagedMiddle { .. }), "{refused}");

    for lost in &segments[1..segments.len() - 1] {
        let holed = files.after_kill();
        holed.remove(&Path::new("/log").join(segment_name(*lost))).unwrap();
        for scrub in [Scrub::Newest, Scrub::Everything] {
            let refused = DiskLog::open(DiskOptions { scrub, ..options(&holed) }).unwrap_err();
            assert!(matches!(&refused, OpenError::DamagedMiddle { lsn, .. } if lsn == lost), "{refused}");
        }
    }
    // The oldest ones may be trimmed.
    let trimmed = files.after_kill();
    trimmed.remove(&Path::new("/log").join(segment_name(segments[0]))).unwrap();
    let log = DiskLog::open(options(&trimmed)).unwrap();
    let last = log.read(segments[1]).unwrap().map(Result::unwrap).last().unwrap();
    assert_eq!(last.position(), frames.last().unwrap().position());
}

#[test]
fn damage_in_an_old_segment_is_found_when_it_is_read() {
    let (files, frames) = many_segments();
    files.damage(Path::new(SEGMENT), |bytes| bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 300] ^= 4);
    let log = DiskLog::open(options(&files)).unwrap();
    let mut reader = log.read(Lsn::FIRST).unwrap();
    let refused = reader.next().unwrap().unwrap_err();
    assert!(
        matches!(&refused, ReadError::Damaged { place, lsn, .. } if place == SEGMENT && *lsn == Lsn::FIRST)
    );
    assert_eq!(reader.next().unwrap().unwrap_err(), refused, "a reader does not go on behind damage");
    let second_segment = log.recovery().segments[1];
    let read: Vec<Frame> = log.read(second_segment).unwrap().map(Result::unwrap).collect();
    let rest = frames.iter().position(|frame| frame.first() == second_segment).unwrap();
    assert_same(&read, &frames[rest..]);
    drop(log);
    let refused = DiskLog::open(DiskOptions { scrub: Scrub::Everything, ..options(&files) }).unwrap_err();
    assert!(matches!(refused, OpenError::DamagedMiddle { lsn: Lsn::FIRST, .. }), "{refused}");
}

#[test]
fn a_trimmed_log_begins_at_a_segment_and_opens_without_the_rest() {
    let (files, frames) = many_segments();
    let log = DiskLog::open(options(&files)).unwrap();
    let first = log.trim(frames[30].first()).unwrap();
    assert!(first > Lsn::FIRST && first <= frames[30].first());
    drop(log);
    let log = DiskLog::open(DiskOptions { scrub: Scrub::Everything, ..options(&files) }).unwrap();
    assert_eq!(log.first(), first);
    let kept = frames.iter().position(|frame| frame.first() == first).unwrap();
    assert_same(&read_all(&log), &frames[kept..]);
}

/// The fear: a node that has lost its index does not learn from its damaged log who could mend that.
#[test]
fn what_is_whole_in_a_damaged_log_can_be_read() {
    let (files, frames) = many_segments();
    let segments = recovered(&files).unwrap().0.segments;
    let salvaged = |files: &FaultyDisk| {
        let (mut read, before) = (Vec::new(), files.contents());
        DiskLog::salvage(&options(files), &mut |frame| read.push(frame)).unwrap();
        assert_eq!(files.contents(), before);
        read
    };
    assert_same(&salvaged(&files), &frames);
    for segment in &segments {
        let (path, at) =
            (Path::new("/log").join(segment_name(*segment)), SEGMENT_HEADER_BYTES + MARK_BYTES + 30);
        let held: Vec<Frame> = frames.iter().filter(|frame| frame.first() != *segment).cloned().collect();
        let damaged = files.after_kill();
        damaged.damage(&path, |bytes| bytes[at] ^= 1);
        assert_same(&salvaged(&damaged), &held);
        damaged.damage(&path, |bytes| bytes[100] ^= 1);
        assert_same(&salvaged(&damaged), &held);
    }
}

/// The fear: an index is made anew from a log, or brought to its end, and only then the log turns out to be damaged there.
#[test]
fn all_that_is_about_to_be_read_is_read_at_the_opening() {
    let (files, _) = many_segments();
    let segments = recovered(&files).unwrap().0.segments;
    for damaged in &segments[..segments.len() - 2] {
        let holed = files.after_kill();
        let path = Path::new("/log").join(segment_name(*damaged));
        holed.damage(&path, |bytes| bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 30] ^= 1);
        for from in &segments {
            for from in [from.previous(), *from, from.next()] {
                let opened = DiskLog::open(DiskOptions { scrub: Scrub::From(from), ..options(&holed) });
                let next = segments[segments.partition_point(|segment| segment <= damaged)];
                assert_eq!(opened.is_err(), from < next, "{damaged} from {from}");
            }
        }
    }
}

/// The fear: a scrub calls the newest entries sound because it looks at what is in memory, and not at the disk.
#[test]
fn what_is_read_from_the_files_is_not_hidden_by_what_is_in_memory() {
    let files = disk();
    let log =
        DiskLog::create(DiskOptions { recent_bytes: 1 << 20, ..options(&files) }, History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    let frames: Vec<Frame> = (0..3).map(|_| append(&log, &mut history, 2).unwrap()).collect();
    while log.step() {}
    let read = |frames: FrameReader| frames.collect::<Result<Vec<Frame>, ReadError>>();
    assert_same(&read(log.read_files(Lsn::FIRST).unwrap()).unwrap(), &frames);
    files.damage(Path::new(SEGMENT), |bytes| bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 30] ^= 1);
    assert_same(&read(log.read(Lsn::FIRST).unwrap()).unwrap(), &frames);
    let refused = read(log.read_files(Lsn::FIRST).unwrap());
    assert!(matches!(refused, Err(ReadError::Damaged { lsn: Lsn::FIRST, .. })), "{refused:?}");
}

/// The fear: a mirror that a power cut met while it caught up is never opened again, because its source had long had on its disk what was torn
/// here.
#[test]
fn what_a_copied_frame_says_of_its_source_proves_nothing_of_the_copy() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    let first = append(&log, &mut history, 1).unwrap();
    history.set_durable(first.last());
    append(&log, &mut history, 1).unwrap();
    // One group, as a mirror writes what comes together.
    assert!(log.step() && !log.step());
    drop(log);
    files.damage(Path::new(SEGMENT), |bytes| bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 50] ^= 1);
    let copy = DiskLog::open(options(&files)).unwrap();
    assert!(copy.recovery().cut.is_some());
    assert_eq!(copy.tail(), History::origin());
}

/// The fear: a bit flips in the mark of the last group, which nobody else has; what was acknowledged is cut like a torn write, or the node does not
/// start.
#[test]
fn what_stands_behind_a_damaged_mark_is_not_cut() {
    let (files, frames) = three_groups();
    for byte in marks_of(&frames).into_iter().flatten() {
        let damaged = files.after_kill();
        damaged.damage(Path::new(SEGMENT), |bytes| bytes[byte] ^= 16);
        for access in [Access::Read, Access::WriteWhole] {
            let log = DiskLog::open(DiskOptions { access, ..options(&damaged) });
            assert_same(&read_all(&log.unwrap_or_else(|error| panic!("byte {byte}: {error}"))), &frames);
        }
        // A mark is there again, and proves what is before it.
        damaged.damage(Path::new(SEGMENT), |bytes| bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 50] ^= 1);
        let refused = recovered(&damaged).unwrap_err();
        assert!(matches!(refused, OpenError::DamagedMiddle { .. }), "byte {byte}: {refused}");
    }
    // All of them at once, and as a power cut may leave them: the frames of a group and not the pages before them.
    files.damage(Path::new(SEGMENT), |bytes| {
        marks_of(&frames).into_iter().for_each(|mark| bytes[mark].fill(0));
    });
    assert_same(&recovered(&files).unwrap().1, &frames);
}

/// The fear: a bit flips in a mark of an old segment, and a lagging archive is called cut off although every frame is whole.
#[test]
fn what_stands_behind_a_damaged_mark_of_an_old_segment_is_read_and_copied() {
    let (files, frames) = many_segments();
    let log = DiskLog::open(options(&files)).unwrap();
    files.damage(Path::new(SEGMENT), |bytes| bytes[marks_of(&frames[..1])[0].start + 20] ^= 1);
    let read = log.read_files(frames[0].first()).unwrap().collect::<Result<Vec<_>, _>>().unwrap();
    assert_same(&read, &frames);
    let end = frames[1].position();
    let state = log.fork(Path::new("/fork"), end.lsn, end.hash).unwrap();
    assert_eq!(state, frames[1].state());
}
