//! Damage: what may be cut, what must be refused, and what is never changed.
//!
//! Invariants:
//! - No damage changes an entry silently: it is cut with the torn tail, refused at the open, or refused at the read.

use super::*;
use crate::{Appender, Digest, Entry, FrameReader, LogTime, Recovery, Usage, VolumeKeys};

/// A log of one segment with three groups, of two frames each.
fn three_groups() -> (FaultyDisk, Vec<Frame>) {
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

const SEGMENT: &str = "/log/00000000000000000002.seg";

fn group_bytes(frames: &[Frame]) -> usize {
    MARK_BYTES + frames.iter().map(|frame| frame.bytes().len()).sum::<usize>()
}

fn recovered(files: &FaultyDisk) -> Result<(Recovery, Vec<Frame>), OpenError> {
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
        if byte < last_group {
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

/// A later frame tells what was durable when it was made, whatever became of the marks.
#[test]
fn a_later_frame_proves_what_was_durable() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    let first = append(&log, &mut history, 1).unwrap();
    log.step();
    history.set_durable(first.last());
    let second = append(&log, &mut history, 1).unwrap();
    assert_eq!(second.header().durable_lsn, first.last());
    log.step();
    drop(log);
    files.damage(Path::new(SEGMENT), |bytes| {
        let second_mark = SEGMENT_HEADER_BYTES + group_bytes(std::slice::from_ref(&first));
        bytes[second_mark..second_mark + MARK_BYTES].fill(0);
        bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 50] ^= 1;
    });
    let refused = recovered(&files).unwrap_err().to_string();
    assert!(refused.contains("a later frame says that it was durable"), "{refused}");
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

/// Frames as an archive would give them: those of a few, up to `held`.
fn others(frames: &[Frame], held: Lsn) -> impl FnMut(Position, Epoch) -> Result<Vec<Frame>, String> + '_ {
    move |after, _| {
        let behind = frames.iter().filter(|frame| frame.last() > after.lsn && frame.last() <= held);
        Ok(behind.take(2).cloned().collect())
    }
}

fn damaged_segment(files: &FaultyDisk) -> Option<PathBuf> {
    match DiskLog::open(DiskOptions { scrub: Scrub::Everything, ..options(files) }) {
        Ok(_) => None,
        Err(OpenError::DamagedMiddle { segment, .. }) => Some(segment),
        Err(OpenError::Header { path, .. }) => Some(path),
        Err(error) => panic!("{error}"),
    }
}

/// The archive has what is damaged; what only this log has, behind it, stays.
#[test]
fn a_damaged_frame_is_mended_and_what_is_whole_behind_it_stays() {
    let (files, frames) = three_groups();
    let used = SEGMENT_HEADER_BYTES + frames.chunks(2).map(group_bytes).sum::<usize>();
    let last_group = used - group_bytes(&frames[4..]);
    for byte in SEGMENT_HEADER_BYTES..last_group {
        let damaged = files.after_kill();
        damaged.damage(Path::new(SEGMENT), |bytes| bytes[byte] ^= 16);
        let Some(segment) = damaged_segment(&damaged) else { panic!("byte {byte} is not missed") };
        let nobody = DiskLog::repair(&options(&damaged), &segment, None, &mut |_, _| Ok(Vec::new()));
        let mended =
            DiskLog::repair(&options(&damaged), &segment, None, &mut others(&frames, frames[3].last()));
        // Only a frame is mended from elsewhere; a mark can be left out.
        assert!(nobody.is_err() || mended.is_ok(), "byte {byte}: {nobody:?}");
        mended.unwrap_or_else(|error| panic!("byte {byte}: {error}"));
        assert_same(&recovered(&damaged).unwrap().1, &frames);
    }
}

#[test]
fn a_missing_segment_is_made_anew_from_elsewhere() {
    let (files, frames) = many_segments();
    let segments = recovered(&files).unwrap().0.segments;
    for lost in &segments[1..segments.len() - 1] {
        for is_gone in [true, false] {
            let holed = files.after_kill();
            let path = Path::new("/log").join(segment_name(*lost));
            if is_gone {
                holed.remove(&path).unwrap();
            } else {
                holed.damage(&path, |bytes| bytes[40..].fill(7));
            }
            let before = holed.contents();
            let segment = damaged_segment(&holed).unwrap();
            assert_eq!(segment, path);
            let end = frames.iter().find(|frame| frame.first() == *lost).unwrap().last();
            let too_few =
                DiskLog::repair(&options(&holed), &segment, None, &mut others(&frames, end.previous()));
            assert!(too_few.is_err());
            assert_eq!(holed.contents(), before, "nothing is changed");
            let last = frames.last().unwrap().last();
            DiskLog::repair(&options(&holed), &segment, None, &mut others(&frames, last)).unwrap();
            assert_same(&recovered(&holed).unwrap().1, &frames);
            assert_eq!(damaged_segment(&holed), None);
        }
    }
}

/// The fear: the header of the newest segment is damaged and nothing is left behind it, a successor has begun its epoch right where that segment
/// begins, and the source that was replaced comes back in the successor's epoch as if it were its own.
#[test]
fn a_log_is_not_mended_into_the_epoch_of_a_successor() {
    let (files, frames) = many_segments();
    let newest = *recovered(&files).unwrap().0.segments.last().unwrap();
    let path = Path::new("/log").join(segment_name(newest));
    let base = frames.iter().find(|frame| frame.last() == newest.previous()).unwrap().state();
    let mut successor = History::new(epoch(4), base);
    let theirs: Vec<Frame> = (0..3).map(|_| successor.frame(1)).collect();
    for is_empty in [false, true] {
        let damaged = files.after_kill();
        damaged.damage(&path, |bytes| match is_empty {
            true => bytes[40..].fill(0),
            false => bytes[40] ^= 1,
        });
        assert_eq!(damaged_segment(&damaged), Some(path.clone()));
        let before = damaged.contents();
        let last = theirs.last().unwrap().last();
        let mended = DiskLog::repair(&options(&damaged), &path, None, &mut others(&theirs, last));
        // What is whole in it says in which epoch it is, and is not believed alone.
        assert!(mended.is_err(), "{is_empty}");
        assert_eq!(damaged.contents(), before);
        let last = frames.last().unwrap().last();
        DiskLog::repair(&options(&damaged), &path, None, &mut others(&frames, last)).unwrap();
        let (recovery, read) = recovered(&damaged).unwrap();
        assert_eq!(recovery.epoch, epoch(3));
        assert_same(&read[..], &frames[..read.len()]);
    }
}

/// The fear: a mirror is mended in an epoch that it had followed into, or not at all because that one is not the epoch of the segment before.
#[test]
fn the_header_of_a_segment_comes_back_in_the_epoch_of_what_is_whole_in_it() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut frames = Vec::new();
    for number in 1..3 {
        let mut history = History::new(epoch(number), log.claim(epoch(number)).unwrap());
        for _ in 0..3 {
            frames.push(append(&log, &mut history, 1).unwrap());
            log.step();
        }
    }
    drop(log);
    let path = Path::new("/log").join(segment_name(frames[3].first()));
    let first = SEGMENT_HEADER_BYTES + MARK_BYTES + 30;
    files.damage(&path, |bytes| bytes[20..first].fill(0));
    assert_eq!(damaged_segment(&files), Some(path.clone()));
    DiskLog::repair(&options(&files), &path, None, &mut others(&frames, frames[3].last())).unwrap();
    let (recovery, read) = recovered(&files).unwrap();
    assert_eq!(recovery.epoch, epoch(2));
    assert_same(&read, &frames);
}

/// The fear: where the header of the newest segment is damaged, a mirror is mended with what it never held, or with another history.
#[test]
fn a_newest_segment_without_its_header_is_mended_with_exactly_what_it_held() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut frames = Vec::new();
    for number in 1..3 {
        let mut history = History::new(epoch(number), log.claim(epoch(number)).unwrap());
        for _ in 0..3 {
            frames.push(append(&log, &mut history, 1).unwrap());
            log.step();
        }
    }
    drop(log);
    let path = Path::new("/log").join(segment_name(frames[3].first()));
    let mut history = History::new(epoch(2), frames[5].state());
    let more: Vec<Frame> = frames.iter().cloned().chain((0..3).map(|_| history.frame(1))).collect();
    let mut history = History::new(epoch(2), frames[2].state());
    let other: Vec<Frame> = frames[..3].iter().cloned().chain((0..3).map(|_| history.frame(2))).collect();
    let last = more.last().unwrap().last();
    for first_is_whole in [true, false] {
        let damaged = files.after_kill();
        damaged.damage(&path, |bytes| bytes[100] ^= 1);
        if !first_is_whole {
            damaged.damage(&path, |bytes| bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 30] ^= 1);
        }
        let before = damaged.contents();
        let refused = DiskLog::repair(&options(&damaged), &path, None, &mut others(&other, last));
        assert!(matches!(refused, Err(RepairError::Other { .. })), "{refused:?}");
        assert_eq!(damaged.contents(), before);
        DiskLog::repair(&options(&damaged), &path, None, &mut others(&more, last)).unwrap();
        assert_same(&recovered(&damaged).unwrap().1, &frames);
    }
}

/// Mends until all of it can be opened.
fn mend_all(files: &FaultyDisk, base: Option<State>, frames: &[Frame]) -> Result<(), RepairError> {
    let held = frames.last().unwrap().last();
    let mut fetch = others(frames, held);
    // As archives and mirrors do, it says that it has nothing of an epoch.
    let mut fetch = |after: Position, epoch| {
        let frames: Vec<Frame> = fetch(after, epoch)?;
        let is_wanted = frames.first().is_some_and(|frame| frame.epoch() == epoch);
        if is_wanted { Ok(frames) } else { Err("nobody".to_owned()) }
    };
    while let Some(segment) = damaged_segment(files) {
        DiskLog::repair(&options(files), &segment, base, &mut fetch)?;
    }
    Ok(())
}

/// The fear: two neighbours are lost, or their headers, or something before a lost header, and nothing is mended although somebody has everything.
#[test]
fn neighbours_are_mended_together() {
    let (files, frames) = many_segments();
    let segments = recovered(&files).unwrap().0.segments;
    let path = |segment: &Lsn| Path::new("/log").join(segment_name(*segment));
    let lose = |files: &FaultyDisk, segment: &Lsn| files.remove(&path(segment)).unwrap();
    let behead = |files: &FaultyDisk, segment: &Lsn| files.damage(&path(segment), |bytes| bytes[100] ^= 1);
    let damage = |files: &FaultyDisk, segment: &Lsn| {
        files.damage(&path(segment), |bytes| bytes[SEGMENT_HEADER_BYTES + MARK_BYTES + 30] ^= 1);
    };
    let wipe = |files: &FaultyDisk, segment: &Lsn| files.damage(&path(segment), |bytes| bytes.fill(0));
    type Damage<'a> = &'a dyn Fn(&FaultyDisk, &Lsn);
    let kinds: [(Damage<'_>, Damage<'_>); 7] = [
        (&lose, &lose),
        (&behead, &behead),
        (&damage, &behead),
        (&damage, &lose),
        (&wipe, &lose),
        (&behead, &lose),
        (&wipe, &wipe),
    ];
    let (origin, mut other) = (Some(History::origin()), Vec::new());
    for number in 1..4 {
        let base = other.last().map_or(History::origin(), Frame::state);
        let mut history = History::new(epoch(number), base);
        other.extend((0..30).map(|_| history.frame(15)));
    }
    for (kind, (first, second)) in kinds.iter().enumerate() {
        for pair in segments.windows(2) {
            let damaged = files.after_kill();
            first(&damaged, &pair[0]);
            second(&damaged, &pair[1]);
            // Of the newest one nothing is left that says that it was there; nor is there of the oldest, whose header is lost with all that is in it.
            let is_gone = pair[1] == segments[segments.len() - 1] && matches!(kind, 0 | 3 | 4 | 5 | 6);
            let is_beginning = pair[0] == segments[0] && matches!(kind, 0 | 4 | 6);
            if is_gone || is_beginning {
                continue;
            }
            let before = damaged.contents();
            let (refused, what) = (mend_all(&damaged, origin, &other), format!("{kind} at {}", pair[0]));
            // Where only headers are lost all frames are there.
            assert_eq!(refused.is_err(), kind != 1, "{what}");
            assert!(refused.is_ok() || damaged.contents() == before, "{what}: something was changed");
            mend_all(&damaged, origin, &frames).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_same(&recovered(&damaged).unwrap().1, &frames);
        }
    }
}

/// The fear: the header of the oldest segment is damaged, nothing before it says what it began with, and nothing is mended.
#[test]
fn the_header_of_the_oldest_segment_comes_back_where_its_base_is_known() {
    let (files, frames) = many_segments();
    let segments = recovered(&files).unwrap().0.segments;
    for (at, segment) in segments.iter().enumerate() {
        let trimmed = files.after_kill();
        for older in &segments[..at] {
            trimmed.remove(&Path::new("/log").join(segment_name(*older))).unwrap();
        }
        trimmed.damage(&Path::new("/log").join(segment_name(*segment)), |bytes| bytes[100] ^= 1);
        let base = frames.iter().find(|frame| frame.last() == segment.previous()).map(Frame::state);
        let other = frames.last().unwrap().state();
        if let Some(base) = base {
            let before = trimmed.contents();
            for unknown in [None, Some(other), Some(History::origin())] {
                assert!(mend_all(&trimmed, unknown, &frames).is_err(), "{segment}");
            }
            let wrong = State { position: Position { hash: ChainHash::default(), ..base.position }, ..base };
            let mended = mend_all(&trimmed, Some(wrong), &frames);
            assert!(mended.is_err(), "{segment}");
            assert_eq!(trimmed.contents(), before);
        }
        mend_all(&trimmed, base.or(Some(History::origin())), &frames)
            .unwrap_or_else(|error| panic!("{segment}: {error}"));
        let kept = frames.iter().position(|frame| frame.first() == *segment).unwrap();
        assert_same(&recovered(&trimmed).unwrap().1, &frames[kept..]);
    }
}

/// The fear: a mirror that is mended claims what it never held, or gives up what it holds for the other history of whoever is asked.
#[test]
fn the_newest_segment_is_mended_no_further_than_it_was_and_with_nothing_that_contradicts_it() {
    let (files, frames) = three_groups();
    let lost = SEGMENT_HEADER_BYTES + MARK_BYTES + 40;
    let damaged = || {
        let damaged = files.after_kill();
        damaged.damage(Path::new(SEGMENT), |bytes| bytes[lost] ^= 1);
        damaged
    };
    let path = Path::new(SEGMENT);
    let mut history = History::new(epoch(1), frames.last().unwrap().state());
    let beyond: Vec<Frame> = frames.iter().cloned().chain((0..3).map(|_| history.frame(1))).collect();
    let everything = |_, _| Ok(beyond.clone());
    for last_is_torn in [false, true] {
        let holed = damaged();
        if last_is_torn {
            let last = beyond[5].bytes().len();
            let used = SEGMENT_HEADER_BYTES + frames.chunks(2).map(group_bytes).sum::<usize>();
            holed.damage(path, |bytes| bytes[used - last - group_bytes(&frames[4..5]) + 8..used].fill(3));
        }
        DiskLog::repair(&options(&holed), path, None, &mut everything.clone()).unwrap();
        let kept = if last_is_torn { 4 } else { 6 };
        assert_same(&recovered(&holed).unwrap().1, &frames[..kept]);
    }
    let mut other = Appender::new(VolumeKeys::derive(VOLUME), epoch(1), History::origin());
    let others = frames.iter().map(|frame| {
        for lsn in frame.first().get()..=frame.last().get() {
            let tick = Entry::tick(Lsn::new(lsn), LogTime::from_nanos(lsn));
            other.push(&tick, Digest::default(), Usage::default()).unwrap();
        }
        other.close(LogTime::from_nanos(5), Lsn::ROOT).unwrap()
    });
    let others: Vec<Frame> = others.collect();
    let holed = damaged();
    let before = holed.contents();
    let refused = DiskLog::repair(&options(&holed), path, None, &mut |_, _| Ok(others.clone()));
    assert!(matches!(refused, Err(RepairError::Other { .. })), "{refused:?}");
    assert_eq!(holed.contents(), before);
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
    assert!(matches!(recovered(&files), Err(OpenError::DamagedMiddle { .. })));
    let copy = DiskLog::open(DiskOptions { frames: Origin::Elsewhere, ..options(&files) }).unwrap();
    assert!(copy.recovery().cut.is_some());
    assert_eq!(copy.tail(), History::origin());
}
