//! Mending: what comes back from others, and what they may not put in the place of what is here.

use super::{
    damage::{SEGMENT, group_bytes, many_segments, marks_of, recovered, three_groups},
    *,
};
use crate::{Appender, Digest, Entry, LogTime, Usage, VolumeKeys};

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
    let marks = marks_of(&frames);
    for byte in SEGMENT_HEADER_BYTES..last_group {
        let damaged = files.after_kill();
        damaged.damage(Path::new(SEGMENT), |bytes| bytes[byte] ^= 16);
        // Only a frame is mended from elsewhere; a mark is made anew before the frame that is there.
        let is_mark = marks.iter().any(|mark| mark.contains(&byte));
        let segment = PathBuf::from(SEGMENT);
        let found = damaged_segment(&damaged.after_kill());
        assert_eq!(found, (!is_mark).then(|| segment.clone()), "byte {byte}");
        let alone = damaged.after_kill();
        let nobody = DiskLog::repair(&options(&alone), &segment, None, &mut |_, _| Ok(Vec::new()));
        assert_eq!(nobody.is_ok(), is_mark, "byte {byte}: {nobody:?}");
        if is_mark {
            assert_same(&recovered(&alone).unwrap().1, &frames);
        }
        let mended =
            DiskLog::repair(&options(&damaged), &segment, None, &mut others(&frames, frames[3].last()));
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
        // What is whole in it says in which epoch it is: then nobody is needed.
        assert_eq!(mended.is_err(), is_empty);
        if is_empty {
            assert_eq!(damaged.contents(), before);
            let last = frames.last().unwrap().last();
            DiskLog::repair(&options(&damaged), &path, None, &mut others(&frames, last)).unwrap();
        }
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
        // Only what is damaged is asked for.
        if !first_is_whole {
            assert!(matches!(refused, Err(RepairError::Other { .. })), "{refused:?}");
            assert_eq!(damaged.contents(), before);
            DiskLog::repair(&options(&damaged), &path, None, &mut others(&more, last)).unwrap();
        }
        assert_same(&recovered(&damaged).unwrap().1, &frames);
    }
}

/// The fear: one bit of a header flips, every frame is whole, and the node does not start since nobody else has what it holds.
#[test]
fn a_header_is_made_anew_without_anybody_where_every_frame_is_whole() {
    let (files, frames) = many_segments();
    let segments = recovered(&files).unwrap().0.segments;
    for first in &segments[1..] {
        let path = Path::new("/log").join(segment_name(*first));
        let damaged = files.after_kill();
        damaged.damage(&path, |bytes| bytes[100] ^= 1);
        assert_eq!(damaged_segment(&damaged), Some(path.clone()));
        DiskLog::repair(&options(&damaged), &path, None, &mut |_, _| Err("nobody".to_owned())).unwrap();
        let (recovery, read) = recovered(&damaged).unwrap();
        assert_eq!(recovery.epoch, frames.last().unwrap().epoch());
        assert_same(&read, &frames);
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
    // A log of one segment has its secret nowhere else: nothing in it is known then.
    for (at, segment) in segments[..segments.len() - 1].iter().enumerate() {
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
