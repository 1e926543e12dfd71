//! Packs: one immutable object with file data, made of cells. The format is `docs/formats/pack.md`.
//!
//! ```text
//! | cell 0 | cell 1 | ... | footer: head, one record per cell | trailer |
//! 0                       cells_len                           ...       stored_len
//! ```
//!
//! Invariants:
//! - Every byte of a pack is covered: cells by their hashes, the footer by its digest, the trailer by being implied.
//! - A pack that is read is compared with what the log says of it ([`PackMeta`]), never believed on its own word.
//! - Every length is checked against a limit, and against the others, before anything is allocated or sliced.

mod footer;

use std::{fmt, ops::Range};

use bytes::{Bytes, BytesMut};

pub use footer::{FooterDigest, PackFooter};

use super::{
    cell::{CELL_BYTES, CellFault, CellSeal},
    name::PackName,
};

/// What the log knows of a pack; everything that is needed to read and verify it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PackMeta {
    /// What the pack is called.
    pub name: PackName,
    /// The BLAKE3 hash of its footer.
    pub footer_digest: FooterDigest,
    /// How many bytes of file data it holds; at most [`MAX_PACK_PLAIN`].
    pub plain_len: u64,
    /// The length of the object.
    pub stored_len: u64,
}

/// A place in the plain bytes of a pack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PlainOffset(u32);

impl PlainOffset {
    /// Bytes from the start of the pack's plain bytes.
    pub const fn as_u64(self) -> u64 {
        self.0 as u64
    }
}

/// A pack in the making. Compressing takes about 2 ms per MiB: not for an async worker.
///
/// A piece (the bytes of one `add`) that does not fit into what is left of the open cell begins a new one. So a piece of up
/// to 64 KiB lies in one cell, a larger one begins at the start of a cell, and small pieces share cells.
#[derive(Debug)]
pub struct PackBuilder {
    name: PackName,
    /// The stored bytes of the closed cells.
    stored: Vec<u8>,
    seals: Vec<CellSeal>,
    /// The plain bytes of the cell that is not closed yet.
    open: Vec<u8>,
    plain_len: usize,
    pieces: u32,
}

impl PackBuilder {
    /// An empty pack.
    pub fn new(name: PackName) -> PackBuilder {
        PackBuilder { name, stored: Vec::new(), seals: Vec::new(), open: Vec::new(), plain_len: 0, pieces: 0 }
    }

    /// What the pack will be called.
    pub fn name(&self) -> PackName {
        self.name
    }

    /// How many plain bytes were added so far.
    pub fn plain_len(&self) -> usize {
        self.plain_len
    }

    /// How many plain bytes may still be added.
    pub fn room(&self) -> usize {
        MAX_PACK_PLAIN - self.plain_len
    }

    /// Appends the bytes of one file, or of one part of a file, and tells where they begin.
    pub fn add(&mut self, piece: &[u8]) -> Result<PlainOffset, AddPieceError> {
        if piece.is_empty() {
            return Err(AddPieceError::Empty);
        }
        if piece.len() > self.room() {
            return Err(AddPieceError::NoRoom { pack: self.name, piece: piece.len(), room: self.room() });
        }
        if self.open.len() + piece.len() > CELL_BYTES {
            self.close_cell();
        }
        for part in piece.chunks(CELL_BYTES) {
            self.open.extend_from_slice(part);
            if self.open.len() == CELL_BYTES {
                self.close_cell();
            }
        }
        let at = PlainOffset(u32::try_from(self.plain_len).expect("a pack has at most 4 MiB"));
        self.plain_len += piece.len();
        self.pieces += 1;
        Ok(at)
    }

    /// The finished pack; `None` if nothing was added.
    pub fn finish(mut self) -> Option<SealedPack> {
        self.close_cell();
        if self.seals.is_empty() {
            return None;
        }
        let footer = PackFooter::of_cells(self.name, self.pieces, &self.seals);
        let mut bytes = self.stored;
        bytes.extend_from_slice(&footer.encode());
        Some(SealedPack {
            name: self.name,
            plain_len: self.plain_len as u64,
            stored_len: bytes.len() as u64,
            footer_digest: footer.digest(),
            bytes: bytes.into(),
        })
    }

    fn close_cell(&mut self) {
        if !self.open.is_empty() {
            self.seals.push(CellSeal::seal(&self.open, &mut self.stored));
            self.open.clear();
        }
    }
}

/// Why a piece was not added to a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AddPieceError {
    /// A piece has at least one byte.
    #[error("an empty piece has no place in a pack")]
    Empty,
    /// The piece belongs into another pack; this one is as before.
    #[error("pack {pack} has room for {room} bytes, not for a piece of {piece}")]
    NoRoom {
        /// The pack that is nearly full.
        pack: PackName,
        /// The length of the piece.
        piece: usize,
        /// How many bytes it could take.
        room: usize,
    },
}

/// A finished pack: put `bytes` into a store, then log the rest.
#[derive(Clone, Debug)]
pub struct SealedPack {
    /// What the pack is called.
    pub name: PackName,
    /// The whole object.
    pub bytes: Bytes,
    /// How many bytes of file data it holds.
    pub plain_len: u64,
    /// The length of `bytes`.
    pub stored_len: u64,
    /// The BLAKE3 hash of its footer.
    pub footer_digest: FooterDigest,
}

impl SealedPack {
    /// What the log has to know of the pack.
    pub fn meta(&self) -> PackMeta {
        PackMeta {
            name: self.name,
            footer_digest: self.footer_digest,
            plain_len: self.plain_len,
            stored_len: self.stored_len,
        }
    }
}

/// A whole pack in memory, for those who copy, verify or restore packs.
#[derive(Clone, Debug)]
pub struct PackReader {
    footer: PackFooter,
    bytes: Bytes,
}

impl PackReader {
    /// The pack whose object is `bytes`. The footer is verified here, the cells when they are read.
    pub fn open(meta: &PackMeta, bytes: Bytes) -> Result<PackReader, PackError> {
        if bytes.len() as u64 != meta.stored_len {
            let damage = PackDamage::Length { expected: meta.stored_len, found: bytes.len() as u64 };
            return Err(PackError { pack: meta.name, damage });
        }
        Ok(PackReader { footer: PackFooter::parse(meta, &bytes)?, bytes })
    }

    /// The same for those who only pass the pack on, and do not have the log's word: it is taken at its own, and must bear `name`. Whoever
    /// uses it still compares it with the log.
    pub fn open_by_name(name: PackName, bytes: Bytes) -> Result<PackReader, PackError> {
        PackReader::open(&PackFooter::described(name, &bytes)?, bytes)
    }

    /// What the pack says of its cells.
    pub fn footer(&self) -> &PackFooter {
        &self.footer
    }

    /// The plain bytes in `plain`, of which what lies beyond the end is left out.
    pub fn read(&self, plain: Range<u64>) -> Result<Bytes, PackError> {
        let cells = self.footer.cells_covering(&plain);
        let parts = cells.map(|cell| self.cell(cell).map(|plain| Stretch::of_cell(cell, plain)));
        let parts: Vec<Stretch> = parts.collect::<Result<_, _>>()?;
        Ok(self.footer.assemble(plain, &parts))
    }

    /// Verifies every cell.
    pub fn verify(&self) -> Result<(), PackError> {
        (0..self.footer.cell_count()).try_for_each(|cell| self.cell(cell).map(drop))
    }

    fn cell(&self, cell: usize) -> Result<Bytes, PackError> {
        let at = self.footer.stored_range(cell..cell + 1);
        self.footer.open_cell(cell, &self.bytes[at.start as usize..at.end as usize])
    }
}

/// Verified plain bytes of consecutive cells, in one buffer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::data) struct Stretch {
    /// The cells; at least one.
    pub(in crate::data) cells: Range<usize>,
    /// Their bytes.
    pub(in crate::data) plain: Bytes,
}

impl Stretch {
    /// One cell.
    pub(in crate::data) fn of_cell(cell: usize, plain: Bytes) -> Stretch {
        Stretch { cells: cell..cell + 1, plain }
    }
}

/// A pack that is not what was written, and where.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("pack {pack}: {damage}")]
pub struct PackError {
    /// The pack.
    pub pack: PackName,
    /// What is wrong with it.
    pub damage: PackDamage,
}

/// What is wrong with a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PackDamage {
    /// The object is longer or shorter than the log says, or longer than a pack may be.
    #[error("it ends at byte {found} and not at byte {expected}")]
    Length {
        /// How many there should be.
        expected: u64,
        /// How many there are.
        found: u64,
    },
    /// The last bytes are not the trailer of a pack.
    #[error("the field magic of the trailer is not that of a pack")]
    Magic,
    /// A later version of the format, or damage.
    #[error("format version {found} in the field version of the trailer is not known here, only {VERSION}")]
    Version {
        /// What the trailer says.
        found: u16,
    },
    /// A cipher that this version does not have, or damage.
    #[error("cipher {found} in the field cipher of the footer is not known here")]
    Cipher {
        /// What the footer says.
        found: u8,
    },
    /// The footer is not the one that the log names.
    #[error("the footer has another digest than the log says, as the field digest of the trailer")]
    FooterDigest,
    /// The footer contradicts itself, its trailer or the log.
    #[error("the footer has a wrong value in the field {field}")]
    FooterField {
        /// The field.
        field: &'static str,
    },
    /// A cell.
    #[error("cell {cell}: {fault}")]
    Cell {
        /// The number of the cell, from 0.
        cell: usize,
        /// What is wrong with it.
        fault: CellFault,
    },
}

/// Joins `parts`, without a copy where there is only one.
fn join(parts: impl ExactSizeIterator<Item = Bytes>, total: usize) -> Bytes {
    let mut parts = parts;
    if parts.len() == 1 {
        return parts.next().unwrap_or_default();
    }
    let mut joined = BytesMut::with_capacity(total);
    parts.for_each(|part| joined.extend_from_slice(&part));
    joined.freeze()
}

/// The most plain bytes in a pack.
pub const MAX_PACK_PLAIN: usize = 4 << 20;

/// The most bytes in the object of a pack: incompressible cells, and the longest footer.
pub const MAX_PACK_STORED: usize = MAX_PACK_PLAIN + MAX_TAIL;

/// The most bytes that a footer and the trailer take together.
pub(super) const MAX_TAIL: usize = footer::HEAD_LEN + MAX_CELLS * footer::RECORD_LEN + footer::TRAILER_LEN;

/// The most cells in a pack. A writer makes at most 127, because no two neighbours would fit into one.
pub(super) const MAX_CELLS: usize = 256;

/// The version of the format that is written.
const VERSION: u16 = 0;

impl fmt::Display for PlainOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests;
