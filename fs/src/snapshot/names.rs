//! Blocks of names: the dentries of a range of (parent, cookie), sorted by name within each directory.
//!
//! Invariants:
//! - A block holds a contiguous range of keys. A directory that spans several blocks is cut between cookies, so that a reader puts one
//!   block back into key order without knowing the others.
//! - A cookie is stored only if it is not the one that the name hashes to, in its slot.

use bytes::Bytes;

use super::{
    awaited::Awaited,
    block::{BLOCK_ROWS, BlockFault},
    streams::{Column, StreamReader, StreamWriter, unzigzag, zigzag},
};
use crate::{Cookie, DentryRow, Ino, Kind, NAME_MAX, Name, NameHasher, RowKey, SLOTS, Table};

/// The dentries of one block, in key order.
#[derive(Default, Clone, PartialEq, Eq, Debug)]
pub(super) struct NameBatch {
    entries: Vec<Entry>,
    names: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    parent: u64,
    cookie: u64,
    /// 0 in a vacancy.
    ino: u64,
    /// Where the name is in `names`; a vacancy has an empty one.
    start: u32,
    length: u8,
    /// Number of the kind, 0 in a vacancy.
    kind: u8,
    more: bool,
}

impl NameBatch {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.entries.len() >= BLOCK_ROWS
    }

    /// Takes a row in. `None` if it is not an ordinary dentry and must be stored as it is.
    pub(super) fn push(&mut self, key: &RowKey, value: &Bytes) -> Option<()> {
        let (parent, cookie) = key.number().zip(key.second()).filter(|_| key.key().len() == KEY_BYTES)?;
        let row = DentryRow::decode(value).ok()?;
        let start = self.names.len() as u32;
        let entry = match &row.named {
            None => Entry { parent, cookie, ino: 0, start, length: 0, kind: 0, more: row.more },
            Some((name, ino, kind)) => {
                let (ino, kind, length) = (ino.get(), *kind as u8, name.as_bytes().len() as u8);
                self.names.extend_from_slice(name.as_bytes());
                Entry { parent, cookie, ino, start, length, kind, more: row.more }
            }
        };
        self.entries.push(entry);
        Some(())
    }

    /// Announces the inodes that the names stand for, in key order.
    pub(super) fn announce(&self, awaited: &mut Awaited) {
        for entry in self.entries.iter().filter(|entry| entry.kind != 0) {
            awaited.name(entry.ino, (entry.parent, entry.cookie));
        }
    }

    fn name(&self, entry: &Entry) -> &[u8] {
        &self.names[entry.start as usize..][..usize::from(entry.length)]
    }

    /// The streams, and where the hasher placed each name, in the order of the streams.
    pub(super) fn encode(&self, hasher: &NameHasher) -> (StreamWriter, Vec<Cookie>) {
        let mut out = NameStreams::default();
        let names = Bytes::copy_from_slice(&self.names);
        let mut order = self.entries.clone();
        let mut last_parent = 0;
        for run in order.chunk_by_mut(|a, b| a.parent == b.parent) {
            let parent = run[0].parent;
            out.parents.push(parent.wrapping_sub(last_parent));
            last_parent = parent;
            // Vacancies have no name: they come last, by cookie.
            run.sort_unstable_by(|a, b| {
                let names = || self.name(a).cmp(self.name(b));
                (a.kind == 0).cmp(&(b.kind == 0)).then_with(names).then_with(|| a.cookie.cmp(&b.cookie))
            });
            let (mut last_name, mut last_ino): (&[u8], u64) = (&[], parent);
            for (at, entry) in run.iter().enumerate() {
                let name = self.name(entry);
                let start = entry.start as usize;
                let placed = Name::new(names.slice(start..start + name.len())).ok();
                out.entry(entry, at == 0, placed.map(|name| hasher.place(&name)));
                if entry.kind != 0 {
                    out.name(last_name, name);
                    out.inos.push(zigzag(last_ino, entry.ino));
                    (last_name, last_ino) = (name, entry.ino);
                }
            }
        }
        out.finish()
    }

    /// The names of a block of `count`; `place` is asked for each in the order of the streams.
    pub(super) fn decode(
        streams: &mut StreamReader,
        count: usize,
        mut place: impl FnMut(&Name) -> Option<Cookie>,
    ) -> Result<NameBatch, BlockFault> {
        let mut input = NameColumns::new(streams, count)?;
        let mut batch = NameBatch { entries: Vec::with_capacity(count), names: Vec::new() };
        for _ in 0..count {
            let entry = input.entry(&mut batch.names)?;
            batch.entries.push(entry);
        }
        if input.suffixes.len() != input.used {
            return Err(BlockFault("bytes follow the last name"));
        }
        let names = Bytes::copy_from_slice(&batch.names);
        let tags = std::mem::take(&mut input.tags);
        for (entry, tag) in batch.entries.iter_mut().zip(tags) {
            let start = entry.start as usize;
            let name = names.slice(start..start + usize::from(entry.length));
            entry.cookie = input.cookie(tag, name, &mut place)?;
        }
        for run in batch.entries.chunk_by_mut(|a, b| a.parent == b.parent) {
            run.sort_unstable_by_key(|entry| entry.cookie);
        }
        let ascend = |a: &Entry, b: &Entry| (a.parent, a.cookie) < (b.parent, b.cookie);
        if batch.entries.is_sorted_by(ascend) { Ok(batch) } else { Err(BlockFault("names are out of order")) }
    }

    /// Hands out every row, in key order.
    pub(super) fn emit(&self, mut sink: impl FnMut(u8, &[u8], Bytes)) -> Result<(), BlockFault> {
        let names = Bytes::copy_from_slice(&self.names);
        for entry in &self.entries {
            let named = match Kind::from_number(entry.kind) {
                None => None,
                Some(kind) => {
                    let start = entry.start as usize;
                    let name = names.slice(start..start + usize::from(entry.length));
                    let name = Name::new(name).map_err(|_| BlockFault("a name is none"))?;
                    Some((name, Ino::new(entry.ino), kind))
                }
            };
            let row = DentryRow { named, more: entry.more };
            let mut key = [0; KEY_BYTES];
            key[..8].copy_from_slice(&entry.parent.to_be_bytes());
            key[8..].copy_from_slice(&entry.cookie.to_be_bytes());
            sink(Table::Dentry.number(), &key, row.encode());
        }
        Ok(())
    }
}

/// The streams of a block of names while it is written.
#[derive(Default)]
struct NameStreams {
    tags: Vec<u8>,
    parents: Vec<u64>,
    shared: Vec<u64>,
    lengths: Vec<u64>,
    suffixes: Vec<u8>,
    inos: Vec<u64>,
    slots: Vec<u64>,
    cookies: Vec<u64>,
    places: Vec<Cookie>,
}

impl NameStreams {
    fn entry(&mut self, entry: &Entry, first: bool, placed: Option<Cookie>) {
        let mut tag = entry.kind;
        tag |= if entry.more { MORE } else { 0 };
        tag |= if first { FIRST } else { 0 };
        let cookie = Cookie::new(entry.cookie);
        if placed != Some(cookie.in_slot(0)) {
            tag |= FOREIGN;
            self.cookies.push(entry.cookie);
        } else if cookie.slot() != 0 {
            tag |= SLOTTED;
            self.slots.push(u64::from(cookie.slot()));
        }
        if tag & FOREIGN == 0 {
            self.places.extend(placed);
        }
        self.tags.push(tag);
    }

    fn name(&mut self, last: &[u8], name: &[u8]) {
        let common = last.iter().zip(name).take_while(|(a, b)| a == b).count();
        self.shared.push(common as u64);
        self.lengths.push((name.len() - common) as u64);
        self.suffixes.extend_from_slice(&name[common..]);
    }

    fn finish(self) -> (StreamWriter, Vec<Cookie>) {
        let mut streams = StreamWriter::default();
        streams.bytes(TAGS, self.tags);
        streams.numbers(PARENTS, &self.parents);
        streams.numbers(SHARED, &self.shared);
        streams.numbers(LENGTHS, &self.lengths);
        streams.bytes(SUFFIXES, self.suffixes);
        streams.numbers(INOS, &self.inos);
        streams.numbers(SLOT_NUMBERS, &self.slots);
        streams.numbers(COOKIES, &self.cookies);
        (streams, self.places)
    }
}

/// The same streams while they are read.
struct NameColumns {
    tags: Vec<u8>,
    /// How many entries were taken.
    at: usize,
    parents: Column,
    shared: Column,
    lengths: Column,
    suffixes: Vec<u8>,
    used: usize,
    inos: Column,
    slots: Column,
    cookies: Column,
    /// The directory of the run, and the name and inode before this one in it.
    parent: u64,
    last_name: Vec<u8>,
    last_ino: u64,
}

impl NameColumns {
    fn new(streams: &mut StreamReader, count: usize) -> Result<NameColumns, BlockFault> {
        let tags = streams.bytes(TAGS);
        if tags.len() != count {
            return Err(WRONG_TAGS);
        }
        let having = |bits: u8| tags.iter().filter(|tag| **tag & bits != 0).count();
        let named = having(KIND);
        Ok(NameColumns {
            parents: streams.numbers(PARENTS, having(FIRST))?,
            shared: streams.numbers(SHARED, named)?,
            lengths: streams.numbers(LENGTHS, named)?,
            suffixes: streams.bytes(SUFFIXES),
            used: 0,
            inos: streams.numbers(INOS, named)?,
            slots: streams.numbers(SLOT_NUMBERS, having(SLOTTED))?,
            cookies: streams.numbers(COOKIES, having(FOREIGN))?,
            parent: 0,
            last_name: Vec::new(),
            last_ino: 0,
            tags,
            at: 0,
        })
    }

    /// The next entry, its cookie apart.
    fn entry(&mut self, names: &mut Vec<u8>) -> Result<Entry, BlockFault> {
        let tag = *self.tags.get(self.at).ok_or(WRONG_TAGS)?;
        self.at += 1;
        if tag & UNKNOWN != 0 {
            return Err(BlockFault("a name has an unknown tag"));
        }
        if tag & FIRST != 0 {
            self.parent = self.parent.wrapping_add(self.parents.next()?);
            self.last_name.clear();
            self.last_ino = self.parent;
        }
        let (kind, more, start) = (tag & KIND, tag & MORE != 0, names.len());
        if kind != 0 {
            self.name()?;
            names.extend_from_slice(&self.last_name);
            self.last_ino = unzigzag(self.last_ino, self.inos.next()?);
        }
        let (length, ino) = ((names.len() - start) as u8, if kind == 0 { 0 } else { self.last_ino });
        Ok(Entry { parent: self.parent, cookie: 0, ino, start: start as u32, length, kind, more })
    }

    /// The cookie of the next entry.
    fn cookie(
        &mut self,
        tag: u8,
        name: Bytes,
        place: &mut impl FnMut(&Name) -> Option<Cookie>,
    ) -> Result<u64, BlockFault> {
        if tag & FOREIGN != 0 {
            return self.cookies.next();
        }
        let name = Name::new(name).map_err(|_| BlockFault("a name is none"))?;
        let slot = if tag & SLOTTED != 0 { self.slots.next()? } else { 0 };
        let slot = u8::try_from(slot).ok().filter(|slot| *slot < SLOTS);
        let slot = slot.ok_or(BlockFault("a name has an impossible slot"))?;
        Ok(place(&name).ok_or(BlockFault("a name has no place"))?.in_slot(slot).get())
    }

    fn name(&mut self) -> Result<(), BlockFault> {
        let (shared, length) = (self.shared.next_len()?, self.lengths.next_len()?);
        let suffix = self.suffixes.get(self.used..).and_then(|rest| rest.get(..length));
        let suffix = suffix.ok_or(BlockFault("a name is cut short"))?;
        if shared > self.last_name.len() || shared + length > NAME_MAX {
            return Err(BlockFault("a name is too long"));
        }
        self.last_name.truncate(shared);
        self.last_name.extend_from_slice(suffix);
        self.used += length;
        Ok(())
    }
}

const WRONG_TAGS: BlockFault = BlockFault("names and tags differ in number");
const KEY_BYTES: usize = 16;

const TAGS: u8 = 1;
const PARENTS: u8 = 2;
const SHARED: u8 = 3;
const LENGTHS: u8 = 4;
const SUFFIXES: u8 = 5;
const INOS: u8 = 6;
const SLOT_NUMBERS: u8 = 7;
const COOKIES: u8 = 8;

/// The kind, 0 in a vacancy.
const KIND: u8 = 0x07;
/// A higher slot is in use.
const MORE: u8 = 0x08;
/// The first of a directory in this block.
const FIRST: u8 = 0x10;
/// In a slot other than 0.
const SLOTTED: u8 = 0x20;
/// At a cookie that is not its hash.
const FOREIGN: u8 = 0x40;
const UNKNOWN: u8 = 0x80;
