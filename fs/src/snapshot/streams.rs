//! The streams of a block: columns of numbers and runs of bytes, each compressed alone.
//!
//! A column of numbers is stored as byte planes: first the lowest byte of every number, then the next, as many planes as the largest
//! number needs. Planes of zeros vanish in the compressor, and random bits are not mixed with regular ones.
//!
//! Invariants:
//! - A stream that would hold only zeros or nothing is not stored.
//! - Output of zstd is expanded and compared before it is stored.
//! - A reader allocates no more than [`BLOCK_PLAIN_MAX`] for a block, whatever its lengths claim.

use std::io;

use super::block::BlockFault;

/// Gathers the streams of one block.
#[derive(Default)]
pub(super) struct StreamWriter {
    streams: Vec<(u8, Vec<u8>)>,
}

impl StreamWriter {
    /// Adds a column of numbers.
    pub(super) fn numbers(&mut self, id: u8, numbers: &[u64]) {
        let all = numbers.iter().fold(0, |all, number| all | number);
        let planes = (u64::BITS - all.leading_zeros()).div_ceil(8) as usize;
        if planes == 0 {
            return;
        }
        let mut bytes = Vec::with_capacity(1 + planes * numbers.len());
        bytes.push(planes as u8);
        for plane in 0..planes {
            bytes.extend(numbers.iter().map(|number| (number >> (8 * plane)) as u8));
        }
        self.streams.push((id, bytes));
    }

    /// Adds a run of bytes.
    pub(super) fn bytes(&mut self, id: u8, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.streams.push((id, bytes));
        }
    }

    /// How many streams there are.
    pub(super) fn count(&self) -> usize {
        self.streams.len()
    }

    /// Appends the stored form of all streams to `out` and returns what `id`s in `apart` took of it, in bytes.
    pub(super) fn store(
        &self,
        compressor: &mut Compressor,
        apart: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<u64, StoreFault> {
        let plain: usize = self.streams.iter().map(|(_, bytes)| bytes.len()).sum();
        if plain > BLOCK_PLAIN_MAX {
            return Err(StoreFault::TooLarge { bytes: plain });
        }
        let mut bodies = Vec::new();
        let mut bytes_apart = 0;
        for (id, plain) in &self.streams {
            let start = bodies.len();
            let codec = compressor.append(plain, &mut bodies)?;
            let stored = bodies.len() - start;
            out.extend_from_slice(&[*id, codec]);
            out.extend_from_slice(&(plain.len() as u32).to_le_bytes());
            out.extend_from_slice(&(stored as u32).to_le_bytes());
            if apart.contains(id) {
                bytes_apart += (STREAM_HEADER_BYTES + stored) as u64;
            }
        }
        out.extend_from_slice(&bodies);
        Ok(bytes_apart)
    }
}

/// Why a block could not be stored.
#[derive(Debug)]
pub(super) enum StoreFault {
    /// It holds more than a reader would accept.
    TooLarge { bytes: usize },
    /// The compressor failed, or made what does not expand to what it was given.
    Compressor(String),
    /// The stored block does not read back as it was.
    ReadBack(BlockFault),
}

impl From<BlockFault> for StoreFault {
    fn from(fault: BlockFault) -> StoreFault {
        StoreFault::ReadBack(fault)
    }
}

/// A compressor with its counter-check.
pub(super) struct Compressor {
    compressor: zstd::bulk::Compressor<'static>,
    expander: Expander,
    scratch: Vec<u8>,
}

impl Compressor {
    pub(super) fn new() -> io::Result<Compressor> {
        let compressor = zstd::bulk::Compressor::new(LEVEL)?;
        Ok(Compressor { compressor, expander: Expander::new()?, scratch: Vec::new() })
    }

    /// The expander, for reading back.
    pub(super) fn expander(&mut self) -> &mut Expander {
        &mut self.expander
    }

    /// Appends the shorter form of `plain` and says which one it is.
    fn append(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<u8, StoreFault> {
        if plain.len() >= COMPRESSED_MIN {
            let failed = |error: io::Error| StoreFault::Compressor(error.to_string());
            let start = out.len();
            self.scratch.clear();
            self.scratch.reserve(zstd::zstd_safe::compress_bound(plain.len()));
            self.compressor.compress_to_buffer(plain, &mut self.scratch).map_err(failed)?;
            if self.scratch.len() < plain.len() {
                out.extend_from_slice(&self.scratch);
                self.expander.expand(&out[start..], plain.len(), &mut self.scratch)?;
                if self.scratch != plain {
                    return Err(StoreFault::Compressor("what it made expands to other bytes".to_owned()));
                }
                return Ok(ZSTD);
            }
        }
        out.extend_from_slice(plain);
        Ok(PLAIN)
    }
}

/// Expands streams.
pub(super) struct Expander(zstd::bulk::Decompressor<'static>);

impl Expander {
    pub(super) fn new() -> io::Result<Expander> {
        zstd::bulk::Decompressor::new().map(Expander)
    }

    /// Replaces `plain` by what `stored` expands to, which must be `length` bytes.
    fn expand(&mut self, stored: &[u8], length: usize, plain: &mut Vec<u8>) -> Result<(), BlockFault> {
        plain.clear();
        plain.reserve_exact(length);
        match self.0.decompress_to_buffer(stored, plain) {
            Ok(found) if found == length => Ok(()),
            _ => Err(BlockFault("a stream does not expand to its length")),
        }
    }
}

/// The streams of one block, expanded.
pub(super) struct StreamReader {
    streams: Vec<(u8, Vec<u8>)>,
    /// Stored bytes of each stream, its header included, in the same order.
    stored: Vec<u64>,
}

impl StreamReader {
    /// Takes the payload of a block with `count` streams apart.
    pub(super) fn new(
        payload: &[u8],
        count: usize,
        expander: &mut Expander,
    ) -> Result<StreamReader, BlockFault> {
        let short = BlockFault("streams are cut short");
        let (headers, mut bodies) = payload.split_at_checked(count * STREAM_HEADER_BYTES).ok_or(short)?;
        let mut reader =
            StreamReader { streams: Vec::with_capacity(count), stored: Vec::with_capacity(count) };
        let mut room = BLOCK_PLAIN_MAX;
        for header in headers.chunks_exact(STREAM_HEADER_BYTES) {
            let (id, codec) = (header[0], header[1]);
            let length = |at: usize| {
                u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize
            };
            let (plain_bytes, stored_bytes) = (length(2), length(6));
            room = room.checked_sub(plain_bytes).ok_or(BlockFault("streams are too long"))?;
            if reader.streams.last().is_some_and(|(last, _)| *last >= id) {
                return Err(BlockFault("streams are out of order"));
            }
            let (body, rest) = bodies.split_at_checked(stored_bytes).ok_or(short)?;
            bodies = rest;
            let mut plain = Vec::new();
            match codec {
                PLAIN if plain_bytes == stored_bytes => plain.extend_from_slice(body),
                ZSTD => expander.expand(body, plain_bytes, &mut plain)?,
                _ => return Err(BlockFault("a stream has an unknown form")),
            }
            reader.streams.push((id, plain));
            reader.stored.push((STREAM_HEADER_BYTES + stored_bytes) as u64);
        }
        if !bodies.is_empty() {
            return Err(BlockFault("bytes follow the last stream"));
        }
        Ok(reader)
    }

    /// What the streams in `ids` take of the block, in bytes.
    pub(super) fn stored_bytes(&self, ids: &[u8]) -> u64 {
        let both = self.streams.iter().zip(&self.stored);
        both.filter(|((id, _), _)| ids.contains(id)).map(|(_, stored)| stored).sum()
    }

    /// The column `id` of `count` numbers.
    pub(super) fn numbers(&mut self, id: u8, count: usize) -> Result<Column, BlockFault> {
        let Some(bytes) = self.taken(id) else {
            return Ok(Column(vec![0; count].into_iter()));
        };
        let (planes, bytes) = bytes.split_first().ok_or(WRONG_COUNT)?;
        let planes = usize::from(*planes);
        if !(1..=8).contains(&planes) || bytes.len() != planes * count {
            return Err(WRONG_COUNT);
        }
        let mut numbers = vec![0u64; count];
        for plane in 0..planes {
            for (number, byte) in numbers.iter_mut().zip(&bytes[plane * count..]) {
                *number |= u64::from(*byte) << (8 * plane);
            }
        }
        Ok(Column(numbers.into_iter()))
    }

    /// The bytes of stream `id`; empty if it has none.
    pub(super) fn bytes(&mut self, id: u8) -> Vec<u8> {
        self.taken(id).unwrap_or_default()
    }

    /// Refuses a block with streams that nobody asked for.
    pub(super) fn finish(self) -> Result<(), BlockFault> {
        if self.streams.iter().all(|(_, bytes)| bytes.is_empty()) {
            Ok(())
        } else {
            Err(BlockFault("a block has an unknown stream"))
        }
    }

    fn taken(&mut self, id: u8) -> Option<Vec<u8>> {
        let (_, bytes) = self.streams.iter_mut().find(|(found, _)| *found == id)?;
        Some(std::mem::take(bytes))
    }
}

/// A column that is being read.
pub(super) struct Column(std::vec::IntoIter<u64>);

impl Column {
    /// The next number.
    pub(super) fn next(&mut self) -> Result<u64, BlockFault> {
        self.0.next().ok_or(WRONG_COUNT)
    }

    /// The next number, which must fit 32 bits.
    pub(super) fn next32(&mut self) -> Result<u32, BlockFault> {
        u32::try_from(self.next()?).map_err(|_| BlockFault("a number is too large"))
    }

    /// The next number, as an amount of bytes or rows in memory.
    pub(super) fn next_len(&mut self) -> Result<usize, BlockFault> {
        Ok(self.next32()? as usize)
    }

    /// What is left.
    pub(super) fn as_slice(&self) -> &[u64] {
        self.0.as_slice()
    }

    /// The largest of what is left; 0 if nothing is.
    pub(super) fn largest(&self) -> u64 {
        self.as_slice().iter().copied().max().unwrap_or(0)
    }
}

/// Takes `count` bytes off the front of `bytes`.
pub(super) fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], BlockFault> {
    let (taken, rest) = bytes.split_at_checked(count).ok_or(WRONG_COUNT)?;
    *bytes = rest;
    Ok(taken)
}

/// The distance from `from` to `to` as a number that is small if they are near.
pub(super) const fn zigzag(from: u64, to: u64) -> u64 {
    let distance = to.wrapping_sub(from).cast_signed();
    ((distance << 1) ^ (distance >> 63)).cast_unsigned()
}

/// The number at the distance `coded` from `from`.
pub(super) const fn unzigzag(from: u64, coded: u64) -> u64 {
    let distance = (coded >> 1) ^ (coded & 1).wrapping_neg();
    from.wrapping_add(distance)
}

const WRONG_COUNT: BlockFault = BlockFault("a stream has a wrong number of elements");
/// The most that the streams of one block may expand to.
pub(super) const BLOCK_PLAIN_MAX: usize = 24 << 20;
/// Id, codec, plain length, stored length.
const STREAM_HEADER_BYTES: usize = 10;
const PLAIN: u8 = 0;
const ZSTD: u8 = 1;
const LEVEL: i32 = 3;
/// Below this zstd's own framing eats what it saves.
const COMPRESSED_MIN: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(streams: &StreamWriter) -> Vec<u8> {
        let mut out = Vec::new();
        streams.store(&mut Compressor::new().unwrap(), &[], &mut out).unwrap();
        out
    }

    #[test]
    fn distances_survive_the_ends_of_the_range() {
        for (from, to) in [(0, 0), (5, 3), (3, 5), (0, u64::MAX), (u64::MAX, 0), (1 << 63, 0), (0, 1 << 63)] {
            assert_eq!(unzigzag(from, zigzag(from, to)), to);
        }
        assert_eq!((zigzag(5, 4), zigzag(5, 6)), (1, 2));
    }

    #[test]
    fn columns_of_every_width_come_back() {
        let columns: Vec<Vec<u64>> = vec![
            vec![],
            vec![0; 100],
            (0..1000).collect(),
            vec![u64::MAX; 70],
            (0..200).map(|n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect(),
        ];
        let mut streams = StreamWriter::default();
        for (id, column) in columns.iter().enumerate() {
            streams.numbers(id as u8, column);
        }
        let bytes = stored(&streams);
        let mut reader = StreamReader::new(&bytes, streams.count(), &mut Expander::new().unwrap()).unwrap();
        for (id, column) in columns.iter().enumerate() {
            let mut found = reader.numbers(id as u8, column.len()).unwrap();
            assert!(column.iter().all(|number| found.next() == Ok(*number)));
        }
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn a_claimed_length_beyond_the_limit_allocates_nothing() {
        let mut header = vec![1, ZSTD];
        header.extend_from_slice(&u32::MAX.to_le_bytes());
        header.extend_from_slice(&0u32.to_le_bytes());
        let refused = StreamReader::new(&header, 1, &mut Expander::new().unwrap());
        assert_eq!(refused.err(), Some(BlockFault("streams are too long")));
    }

    #[test]
    fn a_column_of_another_length_is_refused() {
        let mut streams = StreamWriter::default();
        streams.numbers(1, &[1, 2, 3]);
        let bytes = stored(&streams);
        let mut reader = StreamReader::new(&bytes, 1, &mut Expander::new().unwrap()).unwrap();
        assert!(reader.numbers(1, 4).is_err());
    }
}
