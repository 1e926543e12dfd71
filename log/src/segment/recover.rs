//! Opening a directory of segments after whatever happened to it.
//!
//! The steps: list, read every header, check that they follow each other, scan the newest segments to find the end, decide
//! whether that end may be one, and only then touch the disk.
//!
//! Invariants:
//! - A refused open has changed nothing.
//! - What is cut was never acknowledged, as far as anything left can prove: no later mark, nothing that the opener knows to be
//!   durable.
//! - Recovered frames count only after they were copied to a new file and synced: pages that survived a failed sync in the
//!   page cache are not on the disk, and must not be shipped.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    HeaderError, LogSecret, SEGMENT_HEADER_BYTES, Scan, SegmentHeader, Step, UNFINISHED_SUFFIX,
    parse_segment_name, scan::EndOfScan, segment_name,
};
use crate::{BranchId, Epoch, Lsn, Position, State, VolumeId, VolumeKeys, files::Files};

/// Where a log lives and which one it must be.
#[derive(Clone, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) files: &'a dyn Files,
    pub(crate) directory: &'a Path,
    pub(crate) volume: VolumeId,
    pub(crate) branch: BranchId,
    pub(crate) known_durable: Option<Position>,
    pub(crate) scrub: Scrub,
}

/// How much of the log is read when it is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Scrub {
    /// All headers, and the two newest segments; older damage is found when it is read.
    #[default]
    Newest,
    /// The same, and every segment that holds this entry or a later one: somebody is about to read them.
    From(Lsn),
    /// Everything.
    Everything,
}

/// What was found at recovery.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovery {
    /// The state after the last durable entry.
    pub tail: State,
    /// The epoch of the last claim.
    pub epoch: Epoch,
    /// The first LSN of every segment, in order.
    pub segments: Vec<Lsn>,
    /// Whether a torn write was cut off, and why the log ends there; nothing acknowledged was in it.
    pub cut: Option<String>,
}

/// What becomes of an end that is neither a frame nor zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Torn {
    Cut,
    Refuse,
}

/// Recovers the log at `place`, and says its secret; the caller holds its lock.
pub(crate) fn recover(place: &Place<'_>, torn: Torn) -> Result<(Recovery, LogSecret), OpenError> {
    let found = Found::at(place)?;
    if let (Some(reason), Torn::Refuse) = (&found.end.cut, torn) {
        let (segment, lsn) = (place.path(found.last.first()), found.end.state.position.lsn);
        return Err(OpenError::Torn { segment, lsn, reason: reason.clone() });
    }
    for name in &found.listing.unfinished {
        let path = place.directory.join(name);
        place.files.remove(&path).map_err(|error| OpenError::io(&path, &error))?;
    }
    if found.end.state.position.lsn >= found.last.first() {
        place.copy_synced(&found.last, found.end.state)?;
    }
    Ok(found.recovery())
}

/// What a recovery of the log at `place` would find; changes nothing.
pub(crate) fn look(place: &Place<'_>) -> Result<(Recovery, LogSecret), OpenError> {
    Ok(Found::at(place)?.recovery())
}

/// A log that may be opened.
struct Found {
    listing: Listing,
    /// The newest segment.
    last: SegmentHeader,
    end: LogEnd,
}

impl Found {
    fn at(place: &Place<'_>) -> Result<Found, OpenError> {
        let listing = place.list()?;
        let mut headers = place.read_headers(&listing.segments)?;
        let Some(last) = headers.pop() else {
            return Err(OpenError::Empty { directory: place.directory.to_owned() });
        };
        place.check_older(&headers, &last)?;
        let end = place.find_end(&last)?;
        Ok(Found { listing, last, end })
    }

    fn recovery(self) -> (Recovery, LogSecret) {
        let Found { listing, last, end } = self;
        let recovery =
            Recovery { tail: end.state, epoch: last.epoch, segments: listing.segments, cut: end.cut };
        (recovery, last.secret)
    }
}

struct Listing {
    segments: Vec<Lsn>,
    unfinished: Vec<String>,
}

/// The end of the newest segment.
struct LogEnd {
    state: State,
    cut: Option<String>,
}

impl Place<'_> {
    fn list(&self) -> Result<Listing, OpenError> {
        let names = self.files.list(self.directory).map_err(|error| OpenError::io(self.directory, &error))?;
        let mut segments: Vec<Lsn> = names.iter().filter_map(|name| parse_segment_name(name)).collect();
        segments.sort_unstable();
        let unfinished = names.into_iter().filter(|name| name.ends_with(UNFINISHED_SUFFIX)).collect();
        Ok(Listing { segments, unfinished })
    }

    /// The segments, oldest first.
    pub(crate) fn segments(&self) -> Result<Vec<Lsn>, OpenError> {
        Ok(self.list()?.segments)
    }

    /// Whether there is any segment; does not look into it.
    pub(crate) fn is_empty(&self) -> Result<bool, OpenError> {
        Ok(self.list()?.segments.is_empty())
    }

    fn path(&self, first: Lsn) -> PathBuf {
        self.directory.join(segment_name(first))
    }

    fn read_headers(&self, segments: &[Lsn]) -> Result<Vec<SegmentHeader>, OpenError> {
        segments.iter().map(|first| self.read_header(*first)).collect()
    }

    pub(crate) fn read_header(&self, first: Lsn) -> Result<SegmentHeader, OpenError> {
        let path = self.path(first);
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        let file = self.files.open(&path).map_err(|error| OpenError::io(&path, &error))?;
        let length = file.read_at(0, &mut bytes).map_err(|error| OpenError::io(&path, &error))?;
        let header =
            SegmentHeader::parse(&bytes[..length]).and_then(|header| self.check_identity(header, first));
        header.map_err(|source| OpenError::Header { path, source })
    }

    fn check_identity(&self, header: SegmentHeader, first: Lsn) -> Result<SegmentHeader, HeaderError> {
        if header.volume != self.volume {
            return Err(HeaderError::Volume { found: header.volume });
        }
        if header.branch != self.branch {
            return Err(HeaderError::Branch { found: header.branch });
        }
        if header.first() != first {
            return Err(HeaderError::Name { first: header.first() });
        }
        Ok(header)
    }

    /// A scan of the segment with this header.
    pub(crate) fn scan(&self, header: &SegmentHeader) -> Result<Scan, OpenError> {
        let path = self.path(header.first());
        let file = self.files.open(&path).map_err(|error| OpenError::io(&path, &error))?;
        Ok(Scan::new(path, file, VolumeKeys::derive(self.volume), header))
    }

    /// Checks that every older segment ends where the next one begins, as far as the scrub reads them.
    fn check_older(&self, older: &[SegmentHeader], last: &SegmentHeader) -> Result<(), OpenError> {
        let newest = older.len().saturating_sub(1);
        let scanned = match self.scrub {
            Scrub::Newest => newest,
            Scrub::From(lsn) => {
                newest.min(older.partition_point(|header| header.first() <= lsn).saturating_sub(1))
            }
            Scrub::Everything => 0,
        };
        let nexts = older.iter().skip(1).chain([last]);
        for (index, (header, next)) in older.iter().zip(nexts).enumerate() {
            if next.epoch.number < header.epoch.number {
                let reason = "the segment after it is of an earlier epoch".to_owned();
                return Err(self.damaged(header, next.first(), reason));
            }
            if let Some(missing) = next.previous.filter(|previous| *previous != header.first()) {
                let reason = "the segment is missing".to_owned();
                return Err(OpenError::DamagedMiddle { segment: self.path(missing), lsn: missing, reason });
            }
            if index >= scanned {
                self.check_whole(header, next)?;
            }
        }
        Ok(())
    }

    /// Checks that all frames between two headers are there.
    fn check_whole(&self, header: &SegmentHeader, next: &SegmentHeader) -> Result<(), OpenError> {
        let mut scan = self.scan(header)?;
        while scan.position().lsn < next.base.position.lsn {
            match scan.next_step().map_err(|error| OpenError::io(&scan.path, &error))? {
                Step::Frame(_) => self.check_known(&scan)?,
                Step::End(end) => {
                    return Err(self.damaged(header, scan.position().lsn.next(), scan.told(&end)));
                }
            }
        }
        if scan.state() != next.base {
            let reason = "the segment after it continues another history".to_owned();
            return Err(self.damaged(header, next.first(), reason));
        }
        Ok(())
    }

    /// Scans the newest segment, and decides whether its end may be the end of the log.
    fn find_end(&self, last: &SegmentHeader) -> Result<LogEnd, OpenError> {
        let mut scan = self.scan(last)?;
        self.check_known(&scan)?;
        let end = loop {
            match scan.next_over_mark().map_err(|error| OpenError::io(&scan.path, &error))? {
                Step::Frame(frame) if frame.epoch() != last.epoch => {
                    return Err(self.damaged(last, frame.first(), "a frame of another epoch".to_owned()));
                }
                Step::Frame(_) => self.check_known(&scan)?,
                Step::End(end) => break end,
            }
        };
        let lost = scan.position().lsn.next();
        if scan.finds_proof().map_err(|error| OpenError::io(&scan.path, &error))? {
            let reason = format!("{}, and something that was written later follows", scan.told(&end));
            return Err(self.damaged(last, lost, reason));
        }
        if let Some(known) = self.known_durable
            && known.lsn >= lost
        {
            let reason = format!("{}, and lsn {} is known to have been durable", scan.told(&end), known.lsn);
            return Err(self.damaged(last, lost, reason));
        }
        let clean = match end {
            EndOfScan::EndOfFile => true,
            EndOfScan::Unknown => scan.only_zeros().map_err(|error| OpenError::io(&scan.path, &error))?,
            EndOfScan::MarkOutOfPlace | EndOfScan::Frame(_) => false,
        };
        Ok(LogEnd { state: scan.state(), cut: (!clean).then(|| scan.told(&end)) })
    }

    /// Checks what has just been scanned against what the opener knows.
    fn check_known(&self, scan: &Scan) -> Result<(), OpenError> {
        let here = scan.position();
        match self.known_durable {
            Some(known) if known.lsn == here.lsn && known.hash != here.hash => {
                Err(OpenError::Diverged { path: scan.path.clone(), known: Box::new(known) })
            }
            _ => Ok(()),
        }
    }

    /// Replaces a segment by a synced copy of its frames up to `end`.
    fn copy_synced(&self, header: &SegmentHeader, end: State) -> Result<(), OpenError> {
        let path = self.path(header.first());
        let copy_path = self.directory.join(format!("{}{UNFINISHED_SUFFIX}", segment_name(header.first())));
        let failed = |error: io::Error| OpenError::io(&copy_path, &error);
        let copy = self.files.create_private(&copy_path).map_err(failed)?;
        copy.write_at(0, &header.encode()).map_err(failed)?;
        let (mut scan, marks) = (self.scan(header)?, header.marks());
        let mut group = Vec::new();
        let mut written = SEGMENT_HEADER_BYTES as u64;
        while scan.position() != end.position {
            let after = scan.position().lsn;
            let Step::Frame(frame) = scan.next_over_mark().map_err(|error| OpenError::io(&path, &error))?
            else {
                let reason = "it reads differently the second time".to_owned();
                return Err(self.damaged(header, after.next(), reason));
            };
            group.clear();
            // All of them are durable before the copy gets its name.
            group.extend_from_slice(&marks.encode(written, after));
            group.extend_from_slice(frame.bytes());
            copy.write_at(written, &group).map_err(failed)?;
            written += group.len() as u64;
        }
        copy.sync_data().map_err(failed)?;
        self.files.rename(&copy_path, &path).map_err(failed)?;
        self.files.sync_dir(self.directory).map_err(failed)
    }

    fn damaged(&self, segment: &SegmentHeader, lsn: Lsn, reason: String) -> OpenError {
        OpenError::DamagedMiddle { segment: self.path(segment.first()), lsn, reason }
    }
}

/// Why a log was not opened. Nothing was changed, except that a synced copy of good frames may have taken the place of the
/// file that they were in.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process, or another log of this one, has it.
    #[error("{} is in use by another process", directory.display())]
    Locked {
        /// The directory.
        directory: PathBuf,
    },
    /// There is no log in it.
    #[error("no log in {}", directory.display())]
    Empty {
        /// The directory.
        directory: PathBuf,
    },
    /// A new log was to be created where there is one.
    #[error("{} already holds a log", directory.display())]
    NotEmpty {
        /// The directory.
        directory: PathBuf,
    },
    /// A file is not a segment of this log.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What it is.
        source: HeaderError,
    },
    /// Something that was durable is damaged or gone. It can be repaired from an archive or a mirror that has it.
    #[error("{} is damaged at lsn {lsn}, in what was durable: {reason}", segment.display())]
    DamagedMiddle {
        /// The file.
        segment: PathBuf,
        /// The first LSN that is not readable.
        lsn: Lsn,
        /// What was found, and what proves that it was durable.
        reason: String,
    },
    /// What comes last is no whole frame; nothing in the log says that it was durable.
    #[error("{} is torn behind lsn {lsn}: {reason}", segment.display())]
    Torn {
        /// The file.
        segment: PathBuf,
        /// The last LSN that is readable.
        lsn: Lsn,
        /// What was found.
        reason: String,
    },
    /// The log holds another history than the opener knows.
    #[error("{} holds another history than the known {known}", path.display())]
    Diverged {
        /// The file.
        path: PathBuf,
        /// What was known.
        known: Box<Position>,
    },
    /// The segment size is too small to hold anything.
    #[error("segments of {bytes} bytes are too small, the least is {least}")]
    SegmentTooSmall {
        /// What was asked for, in bytes.
        bytes: u64,
        /// The least, in bytes.
        least: u64,
    },
    /// A file cannot be read or written.
    #[error("{}: {message}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        message: String,
    },
}

impl OpenError {
    pub(crate) fn io(path: &Path, error: &io::Error) -> OpenError {
        OpenError::Io { path: path.to_owned(), message: error.to_string() }
    }
}
