//! A second log with the beginning of a first one: for whoever goes on from an earlier point and keeps the rest.
//!
//! Invariants:
//! - The first log is not changed. Finished segments, which are never written again, get a second name; the one that the beginning ends in is
//!   copied.
//! - Everything in the second log is durable when it is made. It is in no epoch of which it has no frame.

use std::path::{Path, PathBuf};

use super::{OpenError, Place, SEGMENT_HEADER_BYTES, SegmentHeader, Step, segment_name};
use crate::{ChainHash, Lsn, State, files::SegmentFile};

impl Place<'_> {
    /// Makes a log in `to`, an empty directory, that holds what this one holds up to the frame end `at`; returns the state there.
    pub(crate) fn fork(&self, to: &Path, at: (Lsn, ChainHash)) -> Result<State, ForkError> {
        let headers: Vec<SegmentHeader> =
            self.segments()?.into_iter().map(|first| self.read_header(first)).collect::<Result<_, _>>()?;
        let held = headers.partition_point(|header| header.first() <= at.0);
        let state = match held.checked_sub(1) {
            Some(last) => {
                for header in &headers[..last] {
                    let (from, to) =
                        [self.directory, to].map(|dir| dir.join(segment_name(header.first()))).into();
                    self.files.link(&from, &to).map_err(|error| OpenError::io(&to, &error))?;
                }
                self.copy_until(&headers[last], to, at)?
            }
            None => self.begin_at(headers.first().copied(), to, at)?,
        };
        self.files.sync_dir(to).map_err(|error| OpenError::io(to, &error))?;
        Ok(state)
    }

    /// Begins the second log with the segment of `header`, up to `at`.
    fn copy_until(
        &self,
        header: &SegmentHeader,
        to: &Path,
        at: (Lsn, ChainHash),
    ) -> Result<State, ForkError> {
        let mut out = Out::begin(self, to, header)?;
        let (mut scan, marks) = (self.scan(header)?, header.marks());
        while scan.position().lsn < at.0 {
            let after = scan.position().lsn;
            match scan.next_over_mark().map_err(|error| OpenError::io(&scan.path, &error))? {
                Step::Frame(frame) => {
                    out.write(&marks.encode(out.written, after))?;
                    out.write(frame.bytes())?;
                }
                Step::End(end) => {
                    let (segment, reason) = (scan.path.clone(), scan.told(&end));
                    return Err(OpenError::DamagedMiddle { segment, lsn: after.next(), reason }.into());
                }
            }
        }
        out.finish()?;
        check(scan.state(), at)
    }

    /// Begins the second log without a frame, where the first one begins.
    fn begin_at(
        &self,
        first: Option<SegmentHeader>,
        to: &Path,
        at: (Lsn, ChainHash),
    ) -> Result<State, ForkError> {
        let first = first.ok_or_else(|| OpenError::Empty { directory: self.directory.to_owned() })?;
        let base = check(first.base, at)?;
        Out::begin(self, to, &SegmentHeader { epoch: base.position.epoch, previous: None, ..first })?
            .finish()?;
        Ok(base)
    }
}

fn check(state: State, (lsn, hash): (Lsn, ChainHash)) -> Result<State, ForkError> {
    let found = state.position;
    if (found.lsn, found.hash) == (lsn, hash) { Ok(state) } else { Err(ForkError::NoEnd { lsn }) }
}

/// A segment that is written.
struct Out {
    path: PathBuf,
    file: Box<dyn SegmentFile>,
    written: u64,
}

impl Out {
    fn begin(place: &Place<'_>, to: &Path, header: &SegmentHeader) -> Result<Out, ForkError> {
        let path = to.join(segment_name(header.first()));
        let file = place.files.create_private(&path).map_err(|error| OpenError::io(&path, &error))?;
        let mut out = Out { path, file, written: 0 };
        let bytes = header.encode();
        debug_assert_eq!(bytes.len(), SEGMENT_HEADER_BYTES);
        out.write(&bytes)?;
        Ok(out)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ForkError> {
        self.file.write_at(self.written, bytes).map_err(|error| OpenError::io(&self.path, &error))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn finish(self) -> Result<(), ForkError> {
        self.file.sync_data().map_err(|error| OpenError::io(&self.path, &error))?;
        Ok(())
    }
}

/// Why there is no second log. The first one is as it was.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ForkError {
    /// The first log cannot be read, or the second one cannot be written.
    #[error(transparent)]
    Files(#[from] OpenError),
    /// No frame of the log ends there, or another one does.
    #[error("the log has no such end at lsn {lsn}")]
    NoEnd {
        /// Where.
        lsn: Lsn,
    },
}
