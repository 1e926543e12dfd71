//! Reading a segment from its header on, frame by frame, in constant memory.
//!
//! Invariants:
//! - Every frame that comes out has been verified: checksum, linkage, chain.
//! - Nothing is believed because of where it stands: an end is an end, and whether it may be one is for the caller to decide.

use std::{collections::BTreeMap, io, path::PathBuf};

use bytes::Bytes;

use super::{MARK_BYTES, Mark, SEGMENT_HEADER_BYTES, mark::MARK_MAGIC};
use crate::{
    ChainHash, Epoch, FRAME_HEADER_BYTES, FRAME_MAGIC, Frame, FrameError, FrameHeader, Lsn, MAX_FRAME_BYTES,
    Position, State, UnverifiedFrame, VolumeKeys, files::SegmentFile,
};

/// A reader of one segment.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) path: PathBuf,
    file: Box<dyn SegmentFile>,
    keys: VolumeKeys,
    /// Who made its frames.
    frames: Origin,
    /// Where the next mark or frame begins.
    offset: u64,
    /// The state before it.
    state: State,
    window: Vec<u8>,
    window_start: u64,
}

/// Who made the frames of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// This log: what a frame says of the durable end is said of this one.
    Here,
    /// Another one, of which they are copies: what was durable there need not have been durable here when they were written.
    Elsewhere,
}

/// What a scan found next.
#[derive(Debug)]
pub(crate) enum Step {
    /// A verified frame.
    Frame(Frame),
    /// Neither a frame nor a mark that continues the segment: zeros, a torn write, or damage.
    End(EndOfScan),
}

/// Why a scan ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum EndOfScan {
    /// The file ends here.
    EndOfFile,
    /// What stands here is neither a frame nor a mark; it may be zeros.
    Unknown,
    /// A mark that does not follow what is before it.
    MarkOutOfPlace,
    /// What stands here began like a frame.
    Frame(FrameError),
}

/// What stands behind the end of a scan.
#[derive(Debug, Default)]
pub(crate) struct Behind {
    /// Up to where it says that the log was durable.
    pub(crate) durable: Option<Lsn>,
    /// The frames that are whole by themselves: by their first entries their epochs, and the hashes after them.
    pub(crate) whole: BTreeMap<Lsn, (Epoch, ChainHash)>,
}

impl Scan {
    /// A scan of the segment in `file`, whose header says that `base` is the state before it.
    pub(crate) fn new(path: PathBuf, file: Box<dyn SegmentFile>, keys: VolumeKeys, base: State) -> Scan {
        let (frames, offset) = (Origin::Here, SEGMENT_HEADER_BYTES as u64);
        Scan { path, file, keys, frames, offset, state: base, window: Vec::new(), window_start: 0 }
    }

    /// The same with frames of this origin.
    pub(crate) fn of(self, frames: Origin) -> Scan {
        Scan { frames, ..self }
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
            EndOfScan::Unknown => format!("no frame begins at byte {at}"),
            EndOfScan::MarkOutOfPlace => format!("at byte {at} is a mark that does not belong there"),
            EndOfScan::Frame(error) => format!("at byte {at} is no good frame: {error}"),
        }
    }

    /// The next frame, or why there is none. May be called again after an end: the file may have grown.
    pub(crate) fn next_step(&mut self) -> io::Result<Step> {
        loop {
            let start = self.fetch(self.offset, MARK_BYTES)?;
            if start.is_empty() {
                return Ok(Step::End(EndOfScan::EndOfFile));
            }
            if let Some(mark) = Mark::parse(start) {
                if mark.after != self.state.position.lsn {
                    return Ok(Step::End(EndOfScan::MarkOutOfPlace));
                }
                self.offset += MARK_BYTES as u64;
                continue;
            }
            if !start.starts_with(&FRAME_MAGIC) {
                return Ok(Step::End(EndOfScan::Unknown));
            }
            let position = self.state.position;
            let frame = match self.frame_at(self.offset)? {
                Ok(frame) => frame.verify(&self.keys, &position),
                Err(error) => Err(error),
            };
            return Ok(match frame {
                Ok(frame) => {
                    self.offset += frame.bytes().len() as u64;
                    self.state = frame.state();
                    Step::Frame(frame)
                }
                Err(error) => Step::End(EndOfScan::Frame(error)),
            });
        }
    }

    /// Goes on behind `state`, which was reached otherwise: with the frame that continues it, if one stands anywhere further on.
    pub(crate) fn resume(&mut self, state: State) -> io::Result<()> {
        if state == self.state {
            return Ok(());
        }
        self.state = state;
        let continues = self.candidate(|scan, place| {
            let Ok(frame) = scan.frame_at(place)? else { return Ok(None) };
            Ok(frame.verify(&scan.keys, &state.position).is_ok().then_some(place))
        })?;
        self.offset = continues.unwrap_or(self.offset);
        Ok(())
    }

    /// Goes on with the next frame that is whole by itself, whatever it continues; false if there is none.
    pub(crate) fn skip(&mut self) -> io::Result<bool> {
        let reached = self.state.position.lsn;
        let found = self.candidate(|scan, place| {
            let Ok(frame) = scan.frame_at(place)? else { return Ok(None) };
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

    /// Looks behind the end of the scan for something that proves that what should stand here was durable: a later mark, or
    /// a frame that was written when it was durable. Returns what it found.
    pub(crate) fn find_proof(&mut self) -> io::Result<Option<&'static str>> {
        let lost = self.state.position.lsn.next();
        self.candidate(|scan, place| {
            let (mark, frame) = scan.durable_at(place)?;
            if mark.is_some_and(|after| after >= lost) {
                return Ok(Some("a later group commit follows"));
            }
            let said = frame.is_some_and(|header| scan.frames == Origin::Here && header.durable_lsn >= lost);
            Ok(said.then_some("a later frame says that it was durable"))
        })
    }

    /// What stands behind the end of the scan, whatever it continues.
    pub(crate) fn behind(&mut self) -> io::Result<Behind> {
        let mut behind = Behind::default();
        self.candidate(|scan, place| {
            let (mark, frame) = scan.durable_at(place)?;
            let vouches = frame.filter(|_| scan.frames == Origin::Here);
            let said = mark.into_iter().chain(vouches.map(|header| header.durable_lsn));
            behind.durable = behind.durable.into_iter().chain(said).max();
            behind.whole.extend(frame.map(|header| (header.first, (header.epoch, header.hash_after))));
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

    /// Shows `look` every place from the end of the scan on where a mark or a frame may begin, until it returns something.
    fn candidate<T>(
        &mut self,
        mut look: impl FnMut(&mut Scan, u64) -> io::Result<Option<T>>,
    ) -> io::Result<Option<T>> {
        let mut at = self.offset;
        loop {
            self.window.clear();
            let bytes = self.fetch(at, PROOF_WINDOW_BYTES)?;
            let length = bytes.len();
            for offset in candidates(bytes) {
                if let Some(found) = look(self, at + offset as u64)? {
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

    /// The mark, or the whole frame, that stands at `place`: behind what the mark comes, and the frame's header.
    fn durable_at(&mut self, place: u64) -> io::Result<(Option<Lsn>, Option<FrameHeader>)> {
        let mark = Mark::parse(self.fetch(place, MARK_BYTES)?).map(|mark| mark.after);
        Ok((mark, self.frame_at(place)?.ok().map(|frame| *frame.header())))
    }

    fn frame_at(&mut self, offset: u64) -> io::Result<Result<UnverifiedFrame, FrameError>> {
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

/// Where marks or frames may begin. Most of what is looked through was reserved and never written.
fn candidates(bytes: &[u8]) -> Vec<usize> {
    let begins = |window: &[u8]| window == MARK_MAGIC || window == FRAME_MAGIC;
    let mut found = Vec::new();
    for start in (0..bytes.len()).step_by(BLOCK_BYTES) {
        // Magic bytes that begin here may end in the next block.
        let rest = &bytes[start..];
        if is_zero(&rest[..rest.len().min(BLOCK_BYTES)]) {
            continue;
        }
        let windows = rest.windows(MARK_MAGIC.len()).take(BLOCK_BYTES).enumerate();
        found.extend(windows.filter(|(_, window)| begins(window)).map(|(at, _)| start + at));
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
            for magic in [MARK_MAGIC, FRAME_MAGIC] {
                let mut bytes = vec![0; 3 * BLOCK_BYTES + 100];
                assert!(is_zero(&bytes) && candidates(&bytes).is_empty());
                bytes[at..at + magic.len()].copy_from_slice(&magic);
                assert_eq!(candidates(&bytes), [at]);
                assert!(!is_zero(&bytes));
            }
        }
    }
}
