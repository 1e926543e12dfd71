//! Mending a segment: frames that are damaged or missing are replaced by the same frames from elsewhere.
//!
//! Invariants:
//! - Only frames that continue the log on the chain get in. Every intact frame of the segment that continues them stays: it stands where the one
//!   before it ends, or behind a mark.
//! - The file is replaced when the whole segment is there again, and durable; before that nothing is changed.
//! - A log never gets into a later epoch by being mended, unless a frame of its own is of that epoch.
//! - What does not tell where the next segment begins is mended together with it: see [`Run`].
//! - The newest segment is mended as far as the log proves that it was, and no further; frames that contradict a whole one in it are refused.

use std::{io, path::PathBuf};

use super::{
    Behind, HeaderError, Marks, OpenError, Place, SEGMENT_HEADER_BYTES, Scan, SegmentHeader, Step,
    UNFINISHED_SUFFIX, run::Run, segment_name,
};
use crate::{Epoch, Frame, Lsn, Position, State, files::SegmentFile, rename_durably};

/// Who has frames: those that follow a position, verified, in order, some of them; none if there are none. The first of them is to be of the
/// epoch that is said: another history may go on from there in a later one.
pub type FetchFrames<'a> = dyn FnMut(Position, Epoch) -> Result<Vec<Frame>, String> + 'a;

impl Place<'_> {
    /// Mends the segment that begins with `first`; the caller holds the log's lock. `base` may be the state before the first entry of the log.
    pub(crate) fn repair(
        &self,
        first: Lsn,
        base: Option<State>,
        fetch: &mut FetchFrames<'_>,
    ) -> Result<(), RepairError> {
        let segments = self.segments()?;
        if let Some(run) = self.run_around(first, base, &segments)? {
            return self.mend_run(&run, fetch);
        }
        let mut early = Vec::new();
        let next = segments.iter().find(|segment| **segment > first);
        let target = next.map(|next| self.read_header(*next)).transpose()?.map(|next| next.base);
        let header = match self.read_header(first) {
            Ok(header) => header,
            Err(refused) => self.header_of(first, (&segments, target), refused, &mut early, fetch)?,
        };
        if target.is_none() && !early.is_empty() {
            let mut own = self.scan(&header)?;
            let own = own.behind().map_err(|error| OpenError::io(&own.path, &error))?;
            keep_proven(&mut early, &own)?;
        }
        let path = self.directory.join(segment_name(first));
        // What a crash leaves of it is removed at the next opening.
        let copy = self.directory.join(format!("{}{UNFINISHED_SUFFIX}", segment_name(first)));
        let failed = |error: io::Error| OpenError::io(&copy, &error);
        let file = self.files.create_private(&copy).map_err(failed)?;
        file.write_at(0, &header.encode()).map_err(failed)?;
        let (marks, written) = (header.marks(), SEGMENT_HEADER_BYTES as u64);
        let mut out = Copy { file: &*file, path: &copy, marks, written, state: header.base };
        out.append(early, &header, target)?;
        let scan = segments.contains(&first).then(|| self.scan(&header)).transpose()?;
        let filled = self.fill(scan, &header, target, &mut out, fetch);
        if let Err(error) = filled {
            if let Err(left) = self.files.remove(&copy) {
                tracing::debug!("what was begun of a segment stays until the next opening: {left}");
            }
            return Err(error);
        }
        file.sync_data().map_err(failed)?;
        rename_durably(self.files, &copy, &path).map_err(failed)?;
        Ok(())
    }

    /// The segments around the one that begins with `first`, where it cannot be mended alone: it is the oldest and its header is damaged, or the header
    /// of the one behind is; or it is to be made anew where what lies before does not reach it.
    fn run_around(
        &self,
        first: Lsn,
        base: Option<State>,
        segments: &[Lsn],
    ) -> Result<Option<Run>, RepairError> {
        if self.whole_header(first, segments)?.is_some() {
            return Ok(None);
        }
        let next = segments.iter().copied().filter(|segment| *segment > first);
        let mut whole = None;
        for segment in next.clone() {
            whole = self.whole_header(segment, segments)?;
            if whole.is_some() {
                break;
            }
        }
        let older = segments.iter().rev().find(|segment| **segment < first);
        let begins = match older {
            Some(older) => self.read_header(*older)?,
            None => self.oldest_header(first, base, segments)?,
        };
        let is_next_missing = whole.and_then(|whole| whole.previous).is_some_and(|previous| previous > first);
        let is_next_over_mark = whole.map(|whole| whole.first()) == next.clone().next() && !is_next_missing;
        if older.is_some() && is_next_over_mark && self.reaches(&begins, first.previous())? {
            return Ok(None);
        }
        let end = whole.map_or(Lsn::MAX, |whole| whole.first());
        let between = next.chain([first]).chain(whole.and_then(|whole| whole.previous));
        let mut starts: Vec<Lsn> = between.filter(|start| *start > begins.first() && *start < end).collect();
        starts.sort_unstable();
        starts.dedup();
        let (held, target) = (segments.to_vec(), whole.map(|whole| whole.base));
        Ok(Some(Run { begins, starts, held, target }))
    }

    /// The header of a segment; `None` if it is damaged, or not among those that are held. What another version or another log wrote is nobody's to
    /// replace.
    fn whole_header(&self, first: Lsn, held: &[Lsn]) -> Result<Option<SegmentHeader>, OpenError> {
        if !held.contains(&first) {
            return Ok(None);
        }
        match self.read_header(first) {
            Ok(header) => Ok(Some(header)),
            Err(OpenError::Header {
                source:
                    HeaderError::Truncated { .. }
                    | HeaderError::NotASegment
                    | HeaderError::Checksum
                    | HeaderError::Reserved { .. }
                    | HeaderError::FirstLsn { .. },
                ..
            }) => Ok(None),
            Err(refused) => Err(refused),
        }
    }

    /// Whether all entries of a segment up to `last` are whole.
    fn reaches(&self, header: &SegmentHeader, last: Lsn) -> Result<bool, OpenError> {
        let mut scan = self.scan(header)?;
        while scan.position().lsn < last {
            match scan.next_step().map_err(|error| OpenError::io(&scan.path, &error))? {
                Step::Frame(_) => {}
                Step::End(_) => return Ok(false),
            }
        }
        Ok(scan.position().lsn == last)
    }

    /// The header of the oldest segment, before which nothing was or `base` is; in the epoch of what is whole in it.
    fn oldest_header(
        &self,
        first: Lsn,
        base: Option<State>,
        segments: &[Lsn],
    ) -> Result<SegmentHeader, RepairError> {
        let unknown = |what: &str| RepairError::Nobody { lsn: first, reason: what.to_owned() };
        let secret =
            self.secret(segments).ok_or_else(|| unknown("no other segment tells the secret of the log"))?;
        let mut own = self.scan(&self.unknown_header(first, secret))?;
        let own = own.behind().map_err(|error| OpenError::io(&own.path, &error))?;
        let Some((_, (epoch, _))) = own.whole.first_key_value() else {
            return Err(unknown("nothing in the oldest segment says of which epoch it is"));
        };
        let origin = (first == Lsn::FIRST).then(|| State::origin(*epoch));
        let known = base.filter(|base| base.position.lsn.next() == first).or(origin);
        let known = known.ok_or_else(|| unknown("nothing says what the log began behind"))?;
        Ok(SegmentHeader::plain(self.volume, self.branch, *epoch, known, secret))
    }

    /// The header of a segment that is not there, or whose own cannot be read: it begins where the one before it ends, with the epoch of the first
    /// frame that somebody has. That must be the epoch of what is whole in it; where nothing is, that of the segment before if it is the newest one,
    /// and otherwise the one in which the next one begins.
    fn header_of(
        &self,
        first: Lsn,
        (segments, target): (&[Lsn], Option<State>),
        refused: OpenError,
        early: &mut Vec<Frame>,
        fetch: &mut FetchFrames<'_>,
    ) -> Result<SegmentHeader, RepairError> {
        let Some(older) = segments.iter().rev().find(|segment| **segment < first) else {
            return Err(refused.into());
        };
        let older = self.read_header(*older)?;
        let mut scan = self.scan(&older)?;
        while scan.position().lsn < first.previous() {
            match scan.next_over_mark().map_err(|error| OpenError::io(&scan.path, &error))? {
                Step::Frame(_) => {}
                Step::End(_) => return Err(refused.into()),
            }
        }
        let base = scan.state();
        let begun = |epoch| SegmentHeader { epoch, base, previous: Some(older.first()), ..older };
        let mut own_epoch = None;
        if base.position.lsn == first.previous() && segments.contains(&first) {
            let mut own = self.scan(&begun(older.epoch))?;
            let behind = own.behind().map_err(|error| OpenError::io(&own.path, &error))?;
            own_epoch = behind.whole.first_key_value().map(|(_, (epoch, _))| *epoch);
        }
        // What is whole in it says everything else that the header did: nobody needs to be asked for that.
        if let Some(epoch) = own_epoch {
            return Ok(begun(epoch));
        }
        let wanted = target.map_or(older.epoch, |target| target.position.epoch);
        *early = fetch(base.position, wanted).map_err(|reason| RepairError::Nobody { lsn: first, reason })?;
        let Some(frame) = early.first().filter(|_| base.position.lsn == first.previous()) else {
            return Err(refused.into());
        };
        // The newest segment says in which epoch this log is. Whoever took over may have begun right there: that would be its epoch.
        let is_newest = segments.iter().all(|segment| *segment <= first);
        if is_newest && frame.epoch() != older.epoch {
            return Err(RepairError::Other { lsn: base.position.lsn });
        }
        Ok(begun(frame.epoch()))
    }

    fn fill(
        &self,
        mut scan: Option<Scan>,
        header: &SegmentHeader,
        target: Option<State>,
        out: &mut Copy<'_>,
        fetch: &mut FetchFrames<'_>,
    ) -> Result<(), RepairError> {
        let read = |path: &PathBuf, error: &io::Error| RepairError::Open(OpenError::io(path, error));
        if let Some(scan) = &mut scan {
            scan.resume(out.state).map_err(|error| read(&scan.path, &error))?;
        }
        // What the newest segment says of its end, once a frame was missing.
        let mut own: Option<Behind> = None;
        loop {
            let at = out.state.position.lsn;
            if target.is_some_and(|target| at >= target.position.lsn) {
                break;
            }
            if let Some(scan) = &mut scan {
                match scan.next_over_mark().map_err(|error| read(&scan.path, &error))? {
                    Step::Frame(frame) => {
                        out.append(vec![frame], header, target)?;
                        continue;
                    }
                    Step::End(_) if target.is_some() => {}
                    Step::End(_) => {
                        if own.is_none() {
                            own = Some(scan.behind().map_err(|error| read(&scan.path, &error))?);
                        }
                    }
                }
            }
            let durable = own.as_ref().and_then(|own| own.durable);
            if let Some(own) = own.as_ref().filter(|_| durable.is_none_or(|durable| durable <= at)) {
                // A whole frame that would come next and does not continue what was given belongs to the log; what was given does not.
                match own.whole.contains_key(&at.next()) {
                    true => return Err(RepairError::Other { lsn: at }),
                    false => break,
                }
            }
            let nobody = |reason| RepairError::Nobody { lsn: at.next(), reason };
            let mut frames = fetch(out.state.position, header.epoch).map_err(nobody)?;
            if let Some(own) = &own {
                keep_proven(&mut frames, own)?;
            }
            out.append(frames, header, target)?;
            if out.state.position.lsn == at {
                return Err(nobody("nobody who answers has them".to_owned()));
            }
            if let Some(scan) = &mut scan {
                scan.resume(out.state).map_err(|error| read(&scan.path, &error))?;
            }
        }
        match target {
            Some(target) if target != out.state => Err(RepairError::Other { lsn: target.position.lsn }),
            _ => Ok(()),
        }
    }
}

/// Keeps of `frames` what the newest segment proves to have been in it, and refuses them if it has whole ones in their place that differ.
pub(super) fn keep_proven(frames: &mut Vec<Frame>, own: &Behind) -> Result<(), RepairError> {
    frames.retain(|frame| own.durable.is_some_and(|durable| frame.last() <= durable));
    check_same(frames, own)
}

/// Refuses frames where the segment has whole ones in their place that differ.
pub(super) fn check_same(frames: &[Frame], own: &Behind) -> Result<(), RepairError> {
    let differs = |frame: &&Frame| {
        let same = (frame.first(), (frame.epoch(), frame.position().hash));
        own.whole.range(frame.first()..=frame.last()).any(|(first, held)| (*first, *held) != same)
    };
    match frames.iter().find(differs) {
        Some(frame) => Err(RepairError::Other { lsn: frame.first().previous() }),
        None => Ok(()),
    }
}

/// The segment as it will be.
pub(super) struct Copy<'a> {
    pub(super) file: &'a dyn SegmentFile,
    pub(super) path: &'a PathBuf,
    pub(super) marks: Marks,
    pub(super) written: u64,
    pub(super) state: State,
}

impl Copy<'_> {
    /// Writes those of `frames` that belong here, each behind a mark of its own: all are durable before the copy gets its name.
    pub(super) fn append(
        &mut self,
        frames: Vec<Frame>,
        header: &SegmentHeader,
        target: Option<State>,
    ) -> Result<(), RepairError> {
        for frame in frames {
            let after = self.state.position;
            let is_beyond = target.is_some_and(|target| after.lsn >= target.position.lsn);
            if is_beyond || frame.epoch() != header.epoch {
                break;
            }
            if frame.header().follows(&after).is_err() {
                return Err(RepairError::Other { lsn: after.lsn });
            }
            let mut group = self.marks.encode(self.written, after.lsn).to_vec();
            group.extend_from_slice(frame.bytes());
            let written = self.file.write_at(self.written, &group);
            written.map_err(|error| OpenError::io(self.path, &error))?;
            self.written += group.len() as u64;
            self.state = frame.state();
        }
        Ok(())
    }
}

/// Why a segment was not mended; nothing was changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RepairError {
    /// The log cannot be read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is not the name of a segment.
    #[error("{} is no segment", .0.display())]
    NoSegment(PathBuf),
    /// Frames that are needed are nowhere.
    #[error("the entries from lsn {lsn} on: {reason}")]
    Nobody {
        /// The first of them.
        lsn: Lsn,
        /// Why not.
        reason: String,
    },
    /// What comes then is of another history.
    #[error("what follows lsn {lsn} continues another history")]
    Other {
        /// The last entry that is common.
        lsn: Lsn,
    },
}
