//! The footer and the trailer of a pack: written, parsed, and asked where things are.
//!
//! Invariants:
//! - A footer that parses has exactly the bytes that `encode` would write: there is one form of it.
//! - Cells follow each other without gaps, in the stored and in the plain bytes.

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;

use super::{
    CELL_BYTES, CellSeal, MAX_CELLS, MAX_PACK_PLAIN, MAX_PACK_STORED, PackDamage, PackError, PackMeta,
    PackName, Stretch, VERSION, join,
};
use crate::data::{buffers::Buffers, cell::Encoding, name::WriterId};

/// The BLAKE3 hash of a pack's footer. With the log's word for it, it vouches for every byte of the pack.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FooterDigest([u8; 32]);

impl FooterDigest {
    /// The digest with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> FooterDigest {
        FooterDigest(bytes)
    }

    /// The bytes of the digest.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for FooterDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FooterDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FooterDigest({self})")
    }
}

/// What a pack says of its cells, verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackFooter {
    name: PackName,
    pieces: u32,
    cells: Vec<Cell>,
    digest: FooterDigest,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Cell {
    stored_at: u32,
    plain_at: u32,
    seal: CellSeal,
}

impl PackFooter {
    /// The footer at the end of the pack that `meta` describes. `tail` is the end of the object, at least
    /// [`PackFooter::tail_range`] of it.
    pub fn parse(meta: &PackMeta, tail: &[u8]) -> Result<PackFooter, PackError> {
        let damaged = |damage| PackError { pack: meta.name, damage };
        check_lengths(meta, tail).map_err(damaged)?;
        let (footer, digest) = split_footer(tail).map_err(damaged)?;
        if digest != meta.footer_digest.0[..16] || blake3::hash(footer) != meta.footer_digest.0 {
            return Err(damaged(PackDamage::FooterDigest));
        }
        parse_footer(meta, footer).map_err(damaged)
    }

    /// What `object` would have to be known as for it to be the pack `name`, by its own word: for those who pass packs on and do not have
    /// the log's. What is damaged, and what is another pack, contradicts itself.
    pub(super) fn described(name: PackName, object: &[u8]) -> Result<PackMeta, PackError> {
        let damaged = |damage| PackError { pack: name, damage };
        let stored_len = object.len() as u64;
        let unknown = PackMeta { name, footer_digest: FooterDigest([0; 32]), plain_len: 0, stored_len };
        check_lengths(&unknown, object).map_err(damaged)?;
        let (footer, digest) = split_footer(object).map_err(damaged)?;
        let found = FooterDigest(*blake3::hash(footer).as_bytes());
        if found.0[..16] != digest {
            return Err(damaged(PackDamage::FooterDigest));
        }
        let mut head = Fields(&footer[PLAIN_LEN_AT..]);
        Ok(PackMeta { footer_digest: found, plain_len: u64::from(head.u32()), ..unknown })
    }

    /// The end of the object of a pack that holds the footer and the trailer, however many cells there are.
    pub fn tail_range(meta: &PackMeta) -> Range<u64> {
        meta.stored_len.saturating_sub(super::MAX_TAIL as u64)..meta.stored_len
    }

    /// The name that the pack bears inside.
    pub fn name(&self) -> PackName {
        self.name
    }

    /// The hash of the footer.
    pub fn digest(&self) -> FooterDigest {
        self.digest
    }

    /// How many pieces were added to the pack: many more than cells means many small files.
    pub fn piece_count(&self) -> u32 {
        self.pieces
    }

    /// How many cells the pack has.
    pub fn cell_count(&self) -> usize {
        self.cells.len()
    }

    /// How many bytes of file data the pack holds.
    pub fn plain_len(&self) -> u64 {
        self.cells.last().map_or(0, |last| u64::from(last.plain_at) + u64::from(last.seal.plain_len))
    }

    /// The cells that hold the plain bytes in `plain`; none if it is empty or beyond the end.
    pub fn cells_covering(&self, plain: &Range<u64>) -> Range<usize> {
        let end = plain.end.min(self.plain_len());
        if plain.start >= end {
            return 0..0;
        }
        let first = self.cells.partition_point(|cell| u64::from(cell.plain_at) <= plain.start) - 1;
        first..self.cells.partition_point(|cell| u64::from(cell.plain_at) < end)
    }

    /// Where in the object the cells `cells` lie. They exist.
    pub fn stored_range(&self, cells: Range<usize>) -> Range<u64> {
        match self.cells[cells].as_ref() {
            [] => 0..0,
            [first, .., last] | [first @ last] => {
                u64::from(first.stored_at)..u64::from(last.stored_at) + u64::from(last.seal.stored_len)
            }
        }
    }

    /// The plain bytes of the cell `cell`, which exists, of which `stored` are the stored bytes; verified.
    pub fn open_cell(&self, cell: usize, stored: &[u8]) -> Result<Bytes, PackError> {
        let opened = self.cells[cell].seal.open(stored);
        opened.map_err(|fault| PackError { pack: self.name, damage: PackDamage::Cell { cell, fault } })
    }

    /// The plain bytes of the cells `cells`, which exist, of which `stored` are the stored bytes; verified, and in one buffer: that of
    /// `stored` if all of them are stored as they are. The error is that of the first damaged cell.
    pub(in crate::data) fn open_stretch(
        &self,
        cells: Range<usize>,
        stored: &Bytes,
        buffers: &Arc<Buffers>,
    ) -> Result<Stretch, PackError> {
        let opened = &self.cells[cells.clone()];
        let start = self.stored_range(cells.clone()).start;
        let stored_of = |cell: &Cell| {
            let from = (u64::from(cell.stored_at) - start) as usize;
            &stored[from..from + cell.seal.stored_len as usize]
        };
        let damaged = |cell, fault| PackError { pack: self.name, damage: PackDamage::Cell { cell, fault } };
        let numbered = || cells.clone().zip(opened);
        if opened.iter().all(|cell| cell.seal.is_raw()) {
            for (number, cell) in numbered() {
                cell.seal.verify_raw(stored_of(cell)).map_err(|fault| damaged(number, fault))?;
            }
            return Ok(Stretch { cells, plain: stored.clone() });
        }
        let length = opened.iter().map(|cell| cell.seal.plain_len as usize).sum();
        let mut buffer = buffers.take(length);
        let mut rest = buffer.bytes_mut();
        for (number, cell) in numbered() {
            let (plain, after) = rest.split_at_mut(cell.seal.plain_len as usize);
            cell.seal.open_into(stored_of(cell), plain).map_err(|fault| damaged(number, fault))?;
            rest = after;
        }
        Ok(Stretch { cells, plain: buffer.freeze(length) })
    }

    /// Cuts the plain bytes in `plain` out of `parts`, which cover it in order and may overlap; without a copy if one does.
    pub(in crate::data) fn assemble(&self, plain: Range<u64>, parts: &[Stretch]) -> Bytes {
        let end = plain.end.min(self.plain_len());
        let total = usize::try_from(end.saturating_sub(plain.start)).expect("a pack has at most 4 MiB");
        let mut next = plain.start;
        let cut = parts.iter().map(|part| {
            let at = u64::from(self.cells[part.cells.start].plain_at);
            let from = (next - at) as usize;
            let to = usize::try_from(end - at).map_or(part.plain.len(), |to| to.min(part.plain.len()));
            next = at + to as u64;
            part.plain.slice(from..to)
        });
        join(cut, total)
    }

    /// The footer of a pack that is made of these cells.
    pub(super) fn of_cells(name: PackName, pieces: u32, seals: &[CellSeal]) -> PackFooter {
        debug_assert!(seals.len() <= MAX_CELLS, "no two neighbouring cells would fit into one");
        let (mut stored_at, mut plain_at) = (0, 0);
        let cells = seals.iter().map(|seal| {
            let cell = Cell { stored_at, plain_at, seal: *seal };
            stored_at += seal.stored_len;
            plain_at += seal.plain_len;
            cell
        });
        let mut footer = PackFooter { name, pieces, cells: cells.collect(), digest: FooterDigest([0; 32]) };
        footer.digest = FooterDigest(*blake3::hash(&footer.encode_footer()).as_bytes());
        footer
    }

    /// Footer and trailer.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = self.encode_footer();
        let footer_len = u32::try_from(out.len()).expect("a footer has at most 12 KiB");
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&footer_len.to_le_bytes());
        out.extend_from_slice(&self.digest.0[..16]);
        out
    }

    fn encode_footer(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD_LEN + self.cells.len() * RECORD_LEN + TRAILER_LEN);
        out.extend_from_slice(&self.name.writer.as_u64().to_le_bytes());
        out.extend_from_slice(&self.name.number.to_le_bytes());
        let cell_count = u32::try_from(self.cells.len()).expect("a pack has at most 256 cells");
        let plain_len = u32::try_from(self.plain_len()).expect("a pack has at most 4 MiB");
        let cells_len = u32::try_from(self.cells_len()).expect("stored cells are not larger than plain ones");
        for field in [cell_count, self.pieces, plain_len, cells_len] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.push(CIPHER_NONE);
        out.extend_from_slice(&[0; 15]);
        for cell in &self.cells {
            for field in [cell.stored_at, cell.seal.stored_len, cell.seal.plain_len] {
                out.extend_from_slice(&field.to_le_bytes());
            }
            out.extend_from_slice(&[cell.seal.encoding.code(), 0, 0, 0]);
            out.extend_from_slice(&cell.seal.stored_hash);
            out.extend_from_slice(&cell.seal.plain_hash);
        }
        out
    }

    fn cells_len(&self) -> u64 {
        self.stored_range(0..self.cells.len()).end
    }
}

/// What the log says must be possible before a byte of the pack is looked at.
fn check_lengths(meta: &PackMeta, tail: &[u8]) -> Result<(), PackDamage> {
    let shortest = (HEAD_LEN + RECORD_LEN + TRAILER_LEN) as u64;
    if meta.stored_len > MAX_PACK_STORED as u64 {
        return Err(PackDamage::Length { expected: MAX_PACK_STORED as u64, found: meta.stored_len });
    }
    if meta.stored_len < shortest || (tail.len() as u64) < shortest {
        return Err(PackDamage::Length { expected: shortest, found: meta.stored_len.min(tail.len() as u64) });
    }
    if tail.len() as u64 > meta.stored_len {
        return Err(PackDamage::Length { expected: meta.stored_len, found: tail.len() as u64 });
    }
    Ok(())
}

/// Reads the trailer and cuts the footer out of the tail of the object; the other half is what the trailer says of the footer's digest.
fn split_footer(tail: &[u8]) -> Result<(&[u8], [u8; 16]), PackDamage> {
    let (before, trailer) = tail.split_at(tail.len() - TRAILER_LEN);
    let mut fields = Fields(trailer);
    if fields.take::<8>() != MAGIC {
        return Err(PackDamage::Magic);
    }
    let version = u16::from_le_bytes(*fields.take());
    if version != VERSION {
        return Err(PackDamage::Version { found: version });
    }
    if *fields.take::<2>() != [0; 2] {
        return Err(PackDamage::FooterField { field: "reserved byte" });
    }
    let footer_len = fields.u32() as usize;
    let records =
        footer_len.checked_sub(HEAD_LEN).filter(|len| len % RECORD_LEN == 0).map(|len| len / RECORD_LEN);
    if !records.is_some_and(|n| (1..=MAX_CELLS).contains(&n)) || footer_len > before.len() {
        return Err(PackDamage::FooterField { field: "length" });
    }
    Ok((&before[before.len() - footer_len..], *fields.take()))
}

/// Reads a footer that has the right digest: what is wrong in it was written wrongly.
fn parse_footer(meta: &PackMeta, footer: &[u8]) -> Result<PackFooter, PackDamage> {
    let wrong = |field| Err(PackDamage::FooterField { field });
    let (head, records) = footer.split_at(HEAD_LEN);
    let mut head = Fields(head);
    let name = PackName::new(WriterId::from_u64(head.u64()), head.u64());
    let (cell_count, pieces, plain_len, cells_len) = (head.u32(), head.u32(), head.u32(), head.u32());
    let [cipher] = *head.take::<1>();
    if name != meta.name {
        return wrong("name");
    }
    if cipher != CIPHER_NONE {
        return Err(PackDamage::Cipher { found: cipher });
    }
    if *head.take::<15>() != [0; 15] {
        return wrong("reserved byte");
    }
    if cell_count as usize != records.len() / RECORD_LEN {
        return wrong("cell count");
    }
    if u64::from(plain_len) != meta.plain_len || plain_len as usize > MAX_PACK_PLAIN {
        return wrong("plain length");
    }
    if u64::from(cells_len) + (footer.len() + TRAILER_LEN) as u64 != meta.stored_len {
        return wrong("length of cells");
    }
    if pieces == 0 || pieces > plain_len {
        return wrong("piece count");
    }
    let cells = parse_cells(records)?;
    let footer = PackFooter { name, pieces, cells, digest: meta.footer_digest };
    if footer.plain_len() != u64::from(plain_len) || footer.cells_len() != u64::from(cells_len) {
        return wrong("sum of cells");
    }
    Ok(footer)
}

fn parse_cells(records: &[u8]) -> Result<Vec<Cell>, PackDamage> {
    let (mut stored_at, mut plain_at) = (0u32, 0u32);
    let parse = |record| {
        let mut fields = Fields(record);
        let (at, stored_len, plain_len) = (fields.u32(), fields.u32(), fields.u32());
        let [code, reserved @ ..] = *fields.take::<4>();
        let encoding = Encoding::from_code(code).ok_or(PackDamage::FooterField { field: "cell encoding" })?;
        let shrunk = match encoding {
            Encoding::Raw => stored_len == plain_len,
            Encoding::Zstd => stored_len > 0 && stored_len < plain_len,
        };
        if at != stored_at
            || plain_len == 0
            || plain_len as usize > CELL_BYTES
            || !shrunk
            || reserved != [0; 3]
        {
            return Err(PackDamage::FooterField { field: "cell record" });
        }
        let (stored_hash, plain_hash) = (*fields.take(), *fields.take());
        let seal = CellSeal { stored_len, plain_len, encoding, stored_hash, plain_hash };
        let cell = Cell { stored_at, plain_at, seal };
        // At most 256 cells of 64 KiB: no sum overflows.
        stored_at += stored_len;
        plain_at += plain_len;
        Ok(cell)
    };
    records.chunks_exact(RECORD_LEN).map(parse).collect()
}

/// Fields of a slice whose length was checked before, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> &'a [u8; N] {
        let (field, rest) =
            self.0.split_first_chunk().expect("the length of the record is a const and was checked");
        self.0 = rest;
        field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(*self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(*self.take())
    }
}

const MAGIC: &[u8; 8] = b"MURPHYPK";

/// The length of the part of a footer before its records.
pub(super) const HEAD_LEN: usize = 48;

/// Where in the head the plain length stands.
const PLAIN_LEN_AT: usize = 8 + 8 + 4 + 4;

/// The length of the record of one cell.
pub(super) const RECORD_LEN: usize = 48;

/// The length of what follows the footer.
pub(super) const TRAILER_LEN: usize = 32;

/// Cells in clear; the only cipher of this version.
const CIPHER_NONE: u8 = 0;

const _: () = assert!(HEAD_LEN == 8 + 8 + 4 * 4 + 1 + 15);
const _: () = assert!(RECORD_LEN == 3 * 4 + 4 + 16 + 16);
const _: () = assert!(TRAILER_LEN == 8 + 2 + 2 + 4 + 16);
