//! Writing one segment file, and preparing the next.
//!
//! Invariants:
//! - A file gets the name of a segment only after its header is durable, and counts only after the name is.
//! - Writes go to preallocated space; every group commit is one write and one sync.
//! - Only the owner of a log may read its files: they hold its secret.

use std::{io, path::Path};

use super::{MARK_BYTES, Marks, SEGMENT_HEADER_BYTES, SPARE_NAME, SegmentHeader, segment_name};
use crate::{
    Frame, Lsn,
    files::{Files, SegmentFile},
};

/// A segment that is being written.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    file: Box<dyn SegmentFile>,
    marks: Marks,
    /// Where the next group commit goes.
    offset: u64,
    buffer: Vec<u8>,
}

impl SegmentWriter {
    /// Turns the spare file into the segment that `header` describes; durable when it returns. A segment of the same name
    /// is replaced: it is one to which no frame was ever written.
    pub(crate) fn begin(
        files: &dyn Files,
        directory: &Path,
        spare: Box<dyn SegmentFile>,
        header: &SegmentHeader,
    ) -> io::Result<SegmentWriter> {
        spare.write_at(0, &header.encode())?;
        spare.sync_data()?;
        files.rename(&directory.join(SPARE_NAME), &directory.join(segment_name(header.first())))?;
        files.sync_dir(directory)?;
        let (marks, offset) = (header.marks(), SEGMENT_HEADER_BYTES as u64);
        Ok(SegmentWriter { file: spare, marks, offset, buffer: Vec::new() })
    }

    /// Writes a group of frames, before which everything up to `durable` has been synced, and makes them durable.
    pub(crate) fn commit(&mut self, durable: Lsn, frames: &[Frame]) -> io::Result<()> {
        self.buffer.clear();
        for frame in frames {
            let place = self.offset + self.buffer.len() as u64;
            self.buffer.extend_from_slice(&self.marks.encode(place, durable));
            self.buffer.extend_from_slice(frame.bytes());
        }
        self.file.write_at(self.offset, &self.buffer)?;
        self.file.sync_data()?;
        self.offset += self.buffer.len() as u64;
        self.buffer.shrink_to(KEPT_BUFFER_BYTES);
        Ok(())
    }

    /// Gives back the preallocated space that will not be used.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.file.truncate(self.offset)
    }
}

/// Creates the file that will become the next segment and reserves its space.
pub(crate) fn prepare_spare(
    files: &dyn Files,
    directory: &Path,
    bytes: u64,
) -> io::Result<Box<dyn SegmentFile>> {
    let path = directory.join(SPARE_NAME);
    let file = files.create_private(&path)?;
    if let Err(error) = file.preallocate(bytes) {
        drop(file);
        // The space that was reserved in part is not ours to keep.
        if let Err(kept) = files.remove(&path) {
            tracing::warn!("cannot remove {}: {kept}", path.display());
        }
        return Err(error);
    }
    Ok(file)
}

/// What one frame takes of a segment, in bytes.
pub(crate) fn frame_cost(length: usize) -> u64 {
    (length + MARK_BYTES) as u64
}

const KEPT_BUFFER_BYTES: usize = 1 << 20;
