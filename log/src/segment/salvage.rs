//! What can still be read of a damaged log.
//!
//! Invariants:
//! - Every frame that comes out is whole by itself: checksum, and the chain over its own entries. That it belongs to the history of the others is
//!   not known.

use super::{LogSecret, OpenError, Place, Scan, SegmentHeader, Step};
use crate::{ChainHash, Digest, Epoch, EpochId, Frame, Lsn, Position, State, Usage};

impl Place<'_> {
    /// Hands `each` the frames that are whole, oldest first, wherever something is damaged between them.
    pub(crate) fn salvage(&self, each: &mut dyn FnMut(Frame)) -> Result<(), OpenError> {
        let segments = self.segments()?;
        let Some(secret) = self.secret(&segments) else { return Ok(()) };
        for first in segments {
            let header = self.read_header(first).unwrap_or_else(|_| self.unknown_header(first, secret));
            let scan = self.scan(&header);
            if let Err(error) = scan.and_then(|scan| salvage_segment(scan, each)) {
                tracing::warn!("what lies behind that in the segment is left out: {error}");
            }
        }
        Ok(())
    }

    /// What the marks of the log are made of, as the first header says that can be read.
    pub(super) fn secret(&self, segments: &[Lsn]) -> Option<LogSecret> {
        segments.iter().find_map(|first| self.read_header(*first).ok()).map(|header| header.secret)
    }

    /// A header for a segment of which nothing is known: no frame continues its base.
    pub(super) fn unknown_header(&self, first: Lsn, secret: LogSecret) -> SegmentHeader {
        let epoch = Epoch { number: 0, id: EpochId::from_bytes([0; 16]) };
        let position = Position { epoch, lsn: first.previous(), hash: ChainHash::default() };
        let base = State { position, digest: Digest::default(), usage: Usage::default() };
        SegmentHeader::plain(self.volume, self.branch, epoch, base, secret)
    }
}

fn salvage_segment(mut scan: Scan, each: &mut dyn FnMut(Frame)) -> Result<(), OpenError> {
    loop {
        let step = scan.next_over_mark();
        match step.map_err(|error| OpenError::io(&scan.path, &error))? {
            Step::Frame(frame) => each(frame),
            Step::End(_) => {
                let found = scan.skip();
                if !found.map_err(|error| OpenError::io(&scan.path, &error))? {
                    return Ok(());
                }
            }
        }
    }
}
