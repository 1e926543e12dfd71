//! Cells: up to 64 KiB of plain bytes, compressed and hashed alone, so that a read fetches and verifies only what it needs.
//!
//! Invariants:
//! - Compressed output is decompressed and compared before it is stored; what does not come back the same is stored raw.
//! - Nothing is decompressed whose stored bytes do not have the recorded hash, and nothing is returned whose plain bytes do
//!   not have theirs.
//! - A cell never allocates more than [`CELL_BYTES`], whatever its bytes say.

use std::cell::RefCell;

use bytes::Bytes;
use zstd::{
    bulk::{Compressor, Decompressor},
    zstd_safe,
};

/// The first 16 bytes of a BLAKE3 hash.
pub(super) type CellHash = [u8; 16];

/// How the stored bytes of a cell were made of its plain ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Encoding {
    /// They are the same.
    Raw,
    /// One zstd frame.
    Zstd,
}

impl Encoding {
    pub(super) const fn code(self) -> u8 {
        match self {
            Encoding::Raw => 0,
            Encoding::Zstd => 1,
        }
    }

    pub(super) const fn from_code(code: u8) -> Option<Encoding> {
        match code {
            0 => Some(Encoding::Raw),
            1 => Some(Encoding::Zstd),
            _ => None,
        }
    }
}

/// What is needed to turn the stored bytes of a cell back into verified plain ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CellSeal {
    pub(super) stored_len: u32,
    pub(super) plain_len: u32,
    pub(super) encoding: Encoding,
    pub(super) stored_hash: CellHash,
    pub(super) plain_hash: CellHash,
}

impl CellSeal {
    /// Appends the stored form of `plain` (1 to [`CELL_BYTES`] bytes) to `out`.
    pub(super) fn seal(plain: &[u8], out: &mut Vec<u8>) -> CellSeal {
        debug_assert!(!plain.is_empty() && plain.len() <= CELL_BYTES, "a cell has 1 to 65536 bytes");
        let plain_hash = hash(plain);
        let seal = |stored: &[u8], encoding, stored_hash| CellSeal {
            stored_len: u32::try_from(stored.len())
                .expect("a stored cell is not larger than its plain bytes"),
            plain_len: u32::try_from(plain.len()).expect("a cell has at most 65536 bytes"),
            encoding,
            stored_hash,
            plain_hash,
        };
        match compress(plain) {
            Some(packed) => {
                out.extend_from_slice(&packed);
                seal(&packed, Encoding::Zstd, hash(&packed))
            }
            None => {
                out.extend_from_slice(plain);
                seal(plain, Encoding::Raw, plain_hash)
            }
        }
    }

    /// The plain bytes of the cell that is stored as `stored`, verified.
    ///
    /// The result owns its memory: it does not keep the buffer alive that `stored` was cut from.
    pub(super) fn open(&self, stored: &[u8]) -> Result<Bytes, CellFault> {
        let mut plain = vec![0; (self.plain_len as usize).min(CELL_BYTES)];
        self.open_into(stored, &mut plain)?;
        Ok(plain.into())
    }

    /// The same, written to `plain`, which has exactly their length. What is there after an error is worth nothing.
    pub(super) fn open_into(&self, stored: &[u8], plain: &mut [u8]) -> Result<(), CellFault> {
        match self.encoding {
            Encoding::Raw => {
                self.verify_raw(stored)?;
                if plain.len() != stored.len() {
                    return Err(CellFault::PlainLength);
                }
                plain.copy_from_slice(stored);
                Ok(())
            }
            Encoding::Zstd => {
                self.verify_stored(stored)?;
                let length = decompress(stored, plain).ok_or(CellFault::Compression)?;
                self.verify_plain(length, || hash(plain))
            }
        }
    }

    /// Whether the cell is stored as it is.
    pub(super) fn is_raw(&self) -> bool {
        self.encoding == Encoding::Raw
    }

    /// That `stored` is a cell that is stored as it is, and so also its plain bytes.
    pub(super) fn verify_raw(&self, stored: &[u8]) -> Result<(), CellFault> {
        debug_assert!(self.is_raw(), "the plain bytes of other cells are not the stored ones");
        self.verify_stored(stored)?;
        // The hash of the stored bytes has just been compared with the recorded one.
        self.verify_plain(stored.len(), || self.stored_hash)
    }

    fn verify_stored(&self, stored: &[u8]) -> Result<(), CellFault> {
        if stored.len() != self.stored_len as usize {
            return Err(CellFault::StoredLength);
        }
        if hash(stored) == self.stored_hash { Ok(()) } else { Err(CellFault::StoredHash) }
    }

    fn verify_plain(&self, length: usize, hash: impl FnOnce() -> CellHash) -> Result<(), CellFault> {
        if length != self.plain_len as usize {
            return Err(CellFault::PlainLength);
        }
        if hash() == self.plain_hash { Ok(()) } else { Err(CellFault::PlainHash) }
    }
}

/// What is wrong with a cell.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CellFault {
    /// There are more or fewer stored bytes than recorded.
    #[error("its stored bytes have another length")]
    StoredLength,
    /// The stored bytes are not those that were written.
    #[error("its stored bytes have another hash")]
    StoredHash,
    /// The stored bytes cannot be decompressed within the recorded length.
    #[error("its stored bytes do not decompress")]
    Compression,
    /// The plain bytes have another length than recorded.
    #[error("its plain bytes have another length")]
    PlainLength,
    /// The plain bytes are not those that were given to the writer.
    #[error("its plain bytes have another hash")]
    PlainHash,
}

fn hash(bytes: &[u8]) -> CellHash {
    let mut cut = [0; 16];
    cut.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    cut
}

/// The compressed form, proven to decompress to `plain`; `None` if it is not smaller or cannot be proven.
fn compress(plain: &[u8]) -> Option<Vec<u8>> {
    let packed = COMPRESSOR.with_borrow_mut(|slot| {
        let mut compressor = slot.take().or_else(|| Compressor::new(LEVEL).ok())?;
        let mut out = Vec::with_capacity(zstd_safe::compress_bound(plain.len()));
        compressor.compress_to_buffer(plain, &mut out).ok()?;
        // Put back only after success: a context that failed must not be used again.
        *slot = Some(compressor);
        Some(out)
    })?;
    if packed.len() >= plain.len() {
        return None;
    }
    let mut back = vec![0; plain.len()];
    let same = decompress(&packed, &mut back) == Some(plain.len()) && back == plain;
    if !same {
        tracing::error!(
            bytes = plain.len(),
            "compressed bytes do not decompress to the original; stored raw"
        );
    }
    same.then_some(packed)
}

/// Decompresses into `out`, and tells how many bytes that gave; `None` if the frame is damaged or holds more than fit.
fn decompress(stored: &[u8], out: &mut [u8]) -> Option<usize> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let mut decompressor = slot.take().or_else(|| Decompressor::new().ok())?;
        let length = decompressor.decompress_to_buffer(stored, out).ok()?;
        *slot = Some(decompressor);
        Some(length)
    })
}

thread_local! {
    // Contexts are large and costly to make; one of each kind per thread is reused.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// The most plain bytes in a cell.
pub(super) const CELL_BYTES: usize = 64 << 10;

/// How many cells are read and kept together when they are wanted together: as many as the kernel asks for at once.
pub(super) const SPAN_CELLS: usize = 16;

/// The most plain bytes in a span.
pub(super) const SPAN_BYTES: usize = SPAN_CELLS * CELL_BYTES;

/// Of all levels the one that keeps up with a local disk.
const LEVEL: i32 = 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_cell_comes_back(plain in proptest::collection::vec(0u8..4, 1..3000), noisy: bool) {
            let plain: Vec<u8> = if noisy {
                plain.iter().enumerate().map(|(i, b)| hash(&[*b, (i % 251) as u8, (i / 251) as u8])[0]).collect()
            } else {
                plain
            };
            let mut out = b"before".to_vec();
            let seal = CellSeal::seal(&plain, &mut out);
            prop_assert!(seal.stored_len <= seal.plain_len);
            prop_assert_eq!(seal.open(&out[6..]).unwrap(), plain);
        }
    }

    #[test]
    fn bytes_that_do_not_shrink_are_stored_raw() {
        let plain: Vec<u8> = (0..4096u32).flat_map(|i| hash(&i.to_le_bytes())).collect();
        let mut out = Vec::new();
        let seal = CellSeal::seal(&plain, &mut out);
        assert_eq!((seal.encoding, out.len()), (Encoding::Raw, plain.len()));
    }

    #[test]
    fn a_cell_that_unpacks_to_more_than_it_says_is_refused() {
        let mut out = Vec::new();
        let bomb = CellSeal::seal(&[0; CELL_BYTES], &mut out);
        let lie = CellSeal { plain_len: 100, ..bomb };
        assert_eq!(lie.open(&out), Err(CellFault::Compression));
        let lie = CellSeal { plain_len: bomb.plain_len - 1, ..bomb };
        assert_eq!(lie.open(&out), Err(CellFault::Compression));
    }

    #[test]
    fn a_wrong_plain_hash_is_refused_even_if_the_stored_bytes_are_right() {
        for plain in [vec![1; 1000], vec![1, 2, 3]] {
            let mut out = Vec::new();
            let mut seal = CellSeal::seal(&plain, &mut out);
            seal.plain_hash[3] ^= 1;
            assert_eq!(seal.open(&out), Err(CellFault::PlainHash));
        }
    }

    #[test]
    fn a_decompressor_works_again_after_a_damaged_frame() {
        let mut out = Vec::new();
        let seal = CellSeal::seal(&[9; 5000], &mut out);
        let broken = CellSeal { stored_hash: hash(&[1; 8]), stored_len: 8, ..seal };
        assert_eq!(broken.open(&[1; 8]), Err(CellFault::Compression));
        assert_eq!(seal.open(&out).unwrap(), vec![9; 5000]);
    }
}
