//! Mending several segments at once, where one of them does not tell where the next one begins: neighbours that are missing, or whose headers are
//! damaged, and what is damaged before such a one.
//!
//! Invariants:
//! - It begins behind what is whole, and ends at the state before a segment whose header is whole, or at the end of the log. Nothing is replaced before
//!   all of it is there, durable and on the chain.
//! - A segment begins where one began, and where an epoch does.

use std::path::PathBuf;

use super::{
    Behind, OpenError, Place, RepairError, SEGMENT_HEADER_BYTES, SegmentHeader, Step, UNFINISHED_SUFFIX,
    repair::{Copy, FetchFrames, check_same, keep_proven},
    segment_name,
};
use crate::{Frame, Lsn, State, files::SegmentFile, rename_durably};

/// Segments between two that are whole.
pub(super) struct Run {
    /// The header of the first of them, which is whole, or known from elsewhere.
    pub(super) begins: SegmentHeader,
    /// Where others begin.
    pub(super) starts: Vec<Lsn>,
    /// The files that are there.
    pub(super) held: Vec<Lsn>,
    /// The state behind them; without one they end with the log.
    pub(super) target: Option<State>,
}

/// A segment as it will be.
struct Written {
    file: Box<dyn SegmentFile>,
    copy: PathBuf,
    path: PathBuf,
}

impl Place<'_> {
    pub(super) fn mend_run(&self, run: &Run, fetch: &mut FetchFrames<'_>) -> Result<(), RepairError> {
        let mut written = Vec::new();
        let filled = self.write_run(run, &mut written, fetch);
        let synced = filled.and_then(|()| {
            written.iter().try_for_each(|Written { file, copy, .. }| {
                Ok(file.sync_data().map_err(|error| OpenError::io(copy, &error))?)
            })
        });
        if let Err(error) = synced {
            for Written { copy, .. } in &written {
                if let Err(left) = self.files.remove(copy) {
                    tracing::debug!("what was begun of a segment stays until the next opening: {left}");
                }
            }
            return Err(error);
        }
        for Written { copy, path, .. } in &written {
            rename_durably(self.files, copy, path).map_err(|error| OpenError::io(copy, &error))?;
        }
        Ok(())
    }

    fn write_run(
        &self,
        run: &Run,
        written: &mut Vec<Written>,
        fetch: &mut FetchFrames<'_>,
    ) -> Result<(), RepairError> {
        let mut header = run.begins;
        loop {
            let next = run.starts.iter().find(|start| **start > header.first());
            let bound = next.map(|next| next.previous()).or(run.target.map(|target| target.position.lsn));
            let state = self.write_segment(run, &header, bound, written, fetch)?;
            match run.target {
                None if bound.is_none() => return Ok(()),
                Some(target) if state.position.lsn >= target.position.lsn => {
                    let other = RepairError::Other { lsn: target.position.lsn };
                    return if state == target { Ok(()) } else { Err(other) };
                }
                _ => header = self.following(run, &header, state, fetch)?,
            }
        }
    }

    /// The header of the segment that begins behind `state`: in the epoch of what is whole in it, or else in that of the one before or of what comes
    /// behind all of them, whichever somebody has.
    fn following(
        &self,
        run: &Run,
        before: &SegmentHeader,
        state: State,
        fetch: &mut FetchFrames<'_>,
    ) -> Result<SegmentHeader, RepairError> {
        let at = state.position;
        let begun = |epoch| SegmentHeader { epoch, base: state, previous: Some(before.first()), ..*before };
        let own = self.own(run, &begun(before.epoch))?;
        if let Some((_, (epoch, _))) = own.whole.first_key_value() {
            return Ok(begun(*epoch));
        }
        let is_newest = run.target.is_none() && run.starts.last().is_none_or(|last| *last <= at.lsn.next());
        if is_newest && own.durable.is_none() {
            return Ok(begun(before.epoch));
        }
        let mut why = String::new();
        for epoch in
            [Some(before.epoch), run.target.map(|target| target.position.epoch)].into_iter().flatten()
        {
            match fetch(at, epoch) {
                Ok(frames) if frames.first().is_some_and(|frame| frame.epoch() == epoch) => {
                    return Ok(begun(epoch));
                }
                Ok(_) => {}
                Err(reason) => why = reason,
            }
        }
        Err(RepairError::Nobody { lsn: at.lsn.next(), reason: why })
    }

    /// What is whole in the file of a segment, if it is there.
    fn own(&self, run: &Run, header: &SegmentHeader) -> Result<Behind, RepairError> {
        if !run.held.contains(&header.first()) {
            return Ok(Behind::default());
        }
        let mut scan = self.scan(header)?;
        Ok(scan.behind().map_err(|error| OpenError::io(&scan.path, &error))?)
    }

    /// Writes the segment with this header, up to `bound` or where its epoch ends, and returns the state behind it; one without a bound is the newest.
    fn write_segment(
        &self,
        run: &Run,
        header: &SegmentHeader,
        bound: Option<Lsn>,
        written: &mut Vec<Written>,
        fetch: &mut FetchFrames<'_>,
    ) -> Result<State, RepairError> {
        let name = segment_name(header.first());
        let (path, copy) =
            (self.directory.join(&name), self.directory.join(format!("{name}{UNFINISHED_SUFFIX}")));
        let file = self.files.create_private(&copy).map_err(|error| OpenError::io(&copy, &error))?;
        written.push(Written { file, copy, path });
        let Some(Written { file, copy, .. }) = written.last() else { return Ok(header.base) };
        file.write_at(0, &header.encode()).map_err(|error| OpenError::io(copy, &error))?;
        let mut out = Copy {
            file: &**file,
            path: copy,
            marks: header.marks(),
            written: SEGMENT_HEADER_BYTES as u64,
            state: header.base,
        };
        let own = self.own(run, header)?;
        let mut scan = run.held.contains(&header.first()).then(|| self.scan(header)).transpose()?;
        loop {
            let at = out.state.position.lsn;
            if bound.is_some_and(|bound| at >= bound) {
                break;
            }
            let fits = |frame: &Frame| bound.is_none_or(|bound| frame.last() <= bound);
            if let Some(scan) = &mut scan
                && let Step::Frame(frame) =
                    scan.next_over_mark().map_err(|error| OpenError::io(&scan.path, &error))?
            {
                if frame.epoch() != header.epoch || !fits(&frame) {
                    return Err(RepairError::Other { lsn: at });
                }
                out.append(vec![frame], header, None)?;
                continue;
            }
            if bound.is_none() && own.durable.is_none_or(|durable| durable <= at) {
                break;
            }
            let nobody = |reason| RepairError::Nobody { lsn: at.next(), reason };
            let mut frames = match fetch(out.state.position, header.epoch) {
                Ok(frames) => frames,
                // Nobody has more of this epoch: the next one may begin here.
                Err(_) if bound.is_some() && at >= header.first() => break,
                Err(reason) => return Err(nobody(reason)),
            };
            match bound {
                Some(_) => {
                    frames.truncate(frames.iter().take_while(|frame| fits(frame)).count());
                    check_same(&frames, &own)?;
                }
                None => keep_proven(&mut frames, &own)?,
            }
            out.append(frames, header, None)?;
            if out.state.position.lsn == at {
                if bound.is_some() && at >= header.first() {
                    break;
                }
                return Err(nobody("nobody who answers has them".to_owned()));
            }
            if let Some(scan) = &mut scan {
                scan.resume(out.state).map_err(|error| OpenError::io(&scan.path, &error))?;
            }
        }
        Ok(out.state)
    }
}
