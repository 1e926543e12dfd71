//! What can still be read of a damaged log.
//!
//! Invariants:
//! - Every frame that comes out is whole by itself: checksum, and the chain over its own entries. That it belongs to the history of the others is
//!   not known.

use super::{OpenError, Place, Scan, Step};
use crate::{ChainHash, Digest, Epoch, EpochId, Frame, Lsn, Position, State, Usage};

impl Place<'_> {
    /// Hands `each` the frames that are whole, oldest first, wherever something is damaged between them.
    pub(crate) fn salvage(&self, each: &mut dyn FnMut(Frame)) -> Result<(), OpenError> {
        for first in self.segments()? {
            let scan = match self.read_header(first) {
                Ok(header) => self.scan(&header),
                Err(_) => self.scan_from(first, nothing_before(first)),
            };
            if let Err(error) = scan.and_then(|scan| salvage_segment(scan, each)) {
                tracing::warn!("what lies behind that in the segment is left out: {error}");
            }
        }
        Ok(())
    }
}

fn salvage_segment(mut scan: Scan, each: &mut dyn FnMut(Frame)) -> Result<(), OpenError> {
    loop {
        let step = scan.next_step();
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

/// A state that no frame continues.
pub(super) fn nothing_before(first: Lsn) -> State {
    let epoch = Epoch { number: 0, id: EpochId::from_bytes([0; 16]) };
    let position = Position { epoch, lsn: first.previous(), hash: ChainHash::default() };
    State { position, digest: Digest::default(), usage: Usage::default() }
}
