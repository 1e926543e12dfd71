//! Reading a segment from its header on, frame by frame, in constant memory.
//!
//! Invariants:
//! - Every frame that comes out has been verified: checksum, linkage, chain.
//! - Nothing is believed because of where it stands: an end is an end, and whether it may be one is for the caller to decide.
//! - Behind an end only marks are believed, and of frames only those behind marks: anything else may be what a user has put into a body.

use std::{collections::BTreeMap, io, path::PathBuf};

use bytes::Bytes;

use super::{MARK_BYTES, Marks, SEGMENT_HEADER_BYTES, SegmentHeader, mark::MARK_MAGIC};
use crate::{
    ChainHash, Epoch, FRAME_HEADER_BYTES, Frame, FrameError, FrameHeader, Lsn, MAX_FRAME_BYTES, Position,
    State, UnverifiedFrame, VolumeKeys, files::SegmentFile,
};

/// A reader of one segment.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) path: PathBuf,
    file: Box<dyn SegmentFile>,
    keys: VolumeKeys,
    marks: Marks,
    /// Where the next mark, and a frame behind it, begins.
    offset: u64,
    /// The state before it.
    state: State,
    window: Vec<u8>,
    window_start: u64,
}

/// What a scan found next.
#[derive(Debug)]
pub(crate) enum Step {
    /// A verified frame.
    Frame(Frame),
    /// No mark and frame that continue the segment: zeros, a torn write, or damage.
    End(EndOfScan),
}

/// Why a scan ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum EndOfScan {
    /// The file ends here.
    EndOfFile,
    /// What stands here is no mark; it may be zeros.
    Unknown,
    /// A mark that says that more was durable than is before it.
    MarkOutOfPlace,
    /// What stands behind a mark is not the next frame.
    Frame(FrameError),
}

/// What stands behind the end of a scan.
#[derive(Debug, Default)]
pub(crate) struct Behind {
    /// Up to where it says that the log was durable.
    pub(crate) durable: Option<Lsn>,
    /// The frames behind marks that are whole: by their first entries their epochs, and the hashes after them.
    pub(crate) whole: BTreeMap<Lsn, (Epoch, ChainHash)>,
}

impl Scan {
    /// A scan of the segment in `file`, which has this header.
    pub(crate) fn new(
        path: PathBuf,
        file: Box<dyn SegmentFile>,
        keys: VolumeKeys,
        header: &SegmentHeader,
    ) -> Scan {
        let (marks, offset, state) = (header.marks(), SEGMENT_HEADER_BYTES as u64, header.base);
        Scan { path, file, keys, marks, offset, state, window: Vec::new(), window_start: 0 }
    }

    /// The position behind what has been read.
    pub(crate) fn position(&self) -> Position {
        self.state.position
    }

    /// The state behind what has been read.
    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// What was found where the scan has ended, for people.
    pub(crate) fn told(&self, end: &EndOfScan) -> String {
        let at = self.offset;
        match end {
            EndOfScan::EndOfFile => format!("the file ends at byte {at}"),
            EndOfScan::Unknown => format!("no mark of a frame stands at byte {at}"),
            EndOfScan::MarkOutOfPlace => format!("at byte {at} is a mark that does not belong there"),
            EndOfScan::Frame(error) => {
                format!("at byte {} is no good frame: {error}", at + MARK_BYTES as u64)
            }
        }
    }

    /// The next frame, or why there is none. May be called again after an end: the file may have grown.
    pub(crate) fn next_step(&mut self) -> io::Result<Step> {
        let (marks, place) = (self.marks.clone(), self.offset);
        let start = self.fetch(place, MARK_BYTES)?;
        if start.is_empty() {
            return Ok(Step::End(EndOfScan::EndOfFile));
        }
        let Some(durable) = marks.parse(place, start) else {
            return Ok(Step::End(EndOfScan::Unknown));
        };
        if durable > self.state.position.lsn {
            return Ok(Step::End(EndOfScan::MarkOutOfPlace));
        }
        self.step_over_mark()
    }

    /// The same, whatever has become of the mark before the next frame. Only the writer puts anything right behind a verified frame: what stands
    /// there, and continues the chain, is what it wrote.
    pub(crate) fn next_over_mark(&mut self) -> io::Result<Step> {
        match self.next_step()? {
            Step::End(EndOfScan::Unknown) => Ok(match self.step_over_mark()? {
                Step::Frame(frame) => {
                    tracing::warn!(segment = %self.path.display(), lsn = %frame.first(), "the mark of a whole frame is damaged");
                    Step::Frame(frame)
                }
                Step::End(_) => Step::End(EndOfScan::Unknown),
            }),
            step => Ok(step),
        }
    }

    /// The next frame, without a look at the mark before it.
    fn step_over_mark(&mut self) -> io::Result<Step> {
        let frame = match self.frame_behind(self.offset)? {
            Ok(frame) => frame.verify(&self.keys, &self.state.position),
            Err(error) => Err(error),
        };
        Ok(match frame {
            Ok(frame) => {
                self.offset += (MARK_BYTES + frame.bytes().len()) as u64;
                self.state = frame.state();
                Step::Frame(frame)
            }
            Err(error) => Step::End(EndOfScan::Frame(error)),
        })
    }

    /// Goes on behind `state`, which was reached otherwise: with the frame that continues it, if one stands anywhere further on.
    pub(crate) fn resume(&mut self, state: State) -> io::Result<()> {
        if state == self.state {
            return Ok(());
        }
        self.state = state;
        let continues = self.find_mark(|scan, place, _| {
            let Ok(frame) = scan.frame_behind(place)? else { return Ok(None) };
            Ok(frame.verify(&scan.keys, &state.position).is_ok().then_some(place))
        })?;
        self.offset = continues.unwrap_or(self.offset);
        Ok(())
    }

    /// Goes on with the next frame behind a mark that is whole by itself, whatever it continues; false if there is none.
    pub(crate) fn skip(&mut self) -> io::Result<bool> {
        let reached = self.state.position.lsn;
        let found = self.find_mark(|scan, place, _| {
            let Ok(frame) = scan.frame_behind(place)? else { return Ok(None) };
            let FrameHeader { first, epoch, hash_before: hash, .. } = *frame.header();
            if first <= reached {
                return Ok(None);
            }
            let before = Position { epoch, lsn: first.previous(), hash };
            Ok(frame.verify(&scan.keys, &before).is_ok().then_some((place, before)))
        })?;
        let Some((place, position)) = found else { return Ok(false) };
        self.offset = place;
        self.state.position = position;
        Ok(true)
    }

    /// Whether a mark behind the end of the scan proves that what should stand here was durable.
    pub(crate) fn finds_proof(&mut self) -> io::Result<bool> {
        let lost = self.state.position.lsn.next();
        let proof = self.find_mark(|_, _, durable| Ok((durable >= lost).then_some(())))?;
        Ok(proof.is_some())
    }

    /// What stands behind the end of the scan, whatever it continues.
    pub(crate) fn behind(&mut self) -> io::Result<Behind> {
        let mut behind = Behind::default();
        self.find_mark(|scan, place, durable| {
            behind.durable = behind.durable.max(Some(durable));
            if let Ok(frame) = scan.frame_behind(place)? {
                let header = frame.header();
                behind.whole.insert(header.first, (header.epoch, header.hash_after));
            }
            Ok(None::<()>)
        })?;
        Ok(behind)
    }

    /// Whether nothing but zeros follows, to the end of the file.
    pub(crate) fn only_zeros(&mut self) -> io::Result<bool> {
        let mut at = self.offset;
        loop {
            self.window.clear();
            let bytes = self.fetch(at, WINDOW_BYTES)?;
            if !is_zero(bytes) {
                return Ok(false);
            }
            if bytes.len() < WINDOW_BYTES {
                return Ok(true);
            }
            at += WINDOW_BYTES as u64;
        }
    }

    /// Forgets what was read ahead, because the file has grown since.
    pub(crate) fn forget_window(&mut self) {
        self.window.clear();
    }

    /// Shows `look` the place of every mark from the end of the scan on, and what it proves to have been durable, until it returns something.
    fn find_mark<T>(
        &mut self,
        mut look: impl FnMut(&mut Scan, u64, Lsn) -> io::Result<Option<T>>,
    ) -> io::Result<Option<T>> {
        let marks = self.marks.clone();
        let mut at = self.offset;
        loop {
            self.window.clear();
            let bytes = self.fetch(at, PROOF_WINDOW_BYTES)?;
            let length = bytes.len();
            for offset in candidates(bytes) {
                let place = at + offset as u64;
                let Some(durable) = marks.parse(place, self.fetch(place, MARK_BYTES)?) else { continue };
                if let Some(found) = look(self, place, durable)? {
                    return Ok(Some(found));
                }
            }
            if length < PROOF_WINDOW_BYTES {
                return Ok(None);
            }
            // Magic bytes may lie across the border of two windows.
            at += (PROOF_WINDOW_BYTES - MARK_MAGIC.len() + 1) as u64;
        }
    }

    /// The frame behind the mark at `place`.
    fn frame_behind(&mut self, place: u64) -> io::Result<Result<UnverifiedFrame, FrameError>> {
        let offset = place + MARK_BYTES as u64;
        let header = match FrameHeader::parse(self.fetch(offset, FRAME_HEADER_BYTES)?) {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        let bytes = Bytes::copy_from_slice(self.fetch(offset, header.frame_len())?);
        Ok(UnverifiedFrame::parse(&bytes, 0).map(|(frame, _)| frame))
    }

    /// `length` bytes at `offset`, or fewer if the file ends before.
    fn fetch(&mut self, offset: u64, length: usize) -> io::Result<&[u8]> {
        debug_assert!(length <= MAX_FRAME_BYTES);
        let window_end = self.window_start + self.window.len() as u64;
        if offset < self.window_start || offset + length as u64 > window_end {
            self.window.resize(length.max(WINDOW_BYTES), 0);
            // Until the read has succeeded the window holds nothing.
            let read = self.file.read_at(offset, &mut self.window);
            self.window.truncate(read.as_ref().copied().unwrap_or(0));
            self.window_start = offset;
            read?;
        }
        let start = (offset - self.window_start) as usize;
        let end = (start + length).min(self.window.len());
        Ok(&self.window[start..end])
    }
}

/// Where marks may begin. Most of what is looked through was reserved and never written.
fn candidates(bytes: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    for start in (0..bytes.len()).step_by(BLOCK_BYTES) {
        // Magic bytes that begin here may end in the next block.
        let rest = &bytes[start..];
        if is_zero(&rest[..rest.len().min(BLOCK_BYTES)]) {
            continue;
        }
        let windows = rest.windows(MARK_MAGIC.len()).take(BLOCK_BYTES).enumerate();
        found.extend(windows.filter(|(_, window)| *window == MARK_MAGIC).map(|(at, _)| start + at));
    }
    found
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(BLOCK_BYTES).all(|block| *block == [0; BLOCK_BYTES][..block.len()])
}

/// How much is compared with zeros at once.
const BLOCK_BYTES: usize = 4096;
/// How much is read at once, unless a frame is larger.
const WINDOW_BYTES: usize = 256 << 10;
const PROOF_WINDOW_BYTES: usize = WINDOW_BYTES;

#[cfg(test)]
mod tests {
    use super::*;

    /// A proof that is overlooked turns damage into a torn write.
    #[test]
    fn magic_bytes_are_found_wherever_they_begin() {
        for at in [0, 1, BLOCK_BYTES - 4, BLOCK_BYTES - 3, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES - 2]
        {
            let mut bytes = vec![0; 3 * BLOCK_BYTES + 100];
            assert!(is_zero(&bytes) && candidates(&bytes).is_empty());
            bytes[at..at + MARK_MAGIC.len()].copy_from_slice(&MARK_MAGIC);
            assert_eq!(candidates(&bytes), [at]);
            assert!(!is_zero(&bytes));
        }
    }
}
