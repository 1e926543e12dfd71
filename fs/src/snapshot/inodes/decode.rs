//! From columns to inodes.
//!
//! Invariants:
//! - Any streams give inodes or a fault; numbers that a row cannot hold are refused.

use super::{
    super::{
        streams::{Column, StreamReader, unzigzag},
        times::TimesReader,
    },
    *,
};
use crate::Timespec;

/// The streams of a block while it is read.
struct InodeColumns {
    last_ino: u64,
    inos: Column,
    shapes: std::vec::IntoIter<u8>,
    numbers: Column,
    classes: Vec<Class>,
    parents: Column,
    cookies: Column,
    sizes: Column,
    allocated: Column,
    extents: Column,
    atimes: TimesReader,
    mtimes: TimesReader,
    ctimes: TimesReader,
    children: Column,
    subdirectories: Column,
    directory_mtimes: TimesReader,
    directory_ctimes: TimesReader,
}

impl InodeBatch {
    /// The inodes of a block of `count`; those that are placed by name still lack their places.
    pub(in crate::snapshot) fn decode(
        streams: &mut StreamReader,
        count: usize,
    ) -> Result<InodeBatch, BlockFault> {
        let mut input = InodeColumns::new(streams, count)?;
        let mut batch = InodeBatch { entries: Vec::with_capacity(count), targets: Vec::new() };
        let mut total = 0;
        for at in 0..count {
            let entry = input.entry(at)?;
            total += entry.extents as usize;
            batch.entries.push(entry);
        }
        let (mut packs, mut offsets) = (streams.numbers(PACKS, total)?, streams.numbers(OFFSETS, total)?);
        let mut last_pack = 0;
        let mut end = 0;
        for entry in &batch.entries {
            for slot in 0..entry.extents {
                let pack = unzigzag(last_pack, packs.next()?);
                let expected = if pack == last_pack { end } else { 0 };
                let offset = u32::try_from(unzigzag(expected, offsets.next()?));
                let offset = offset.map_err(|_| BlockFault("an extent has an impossible offset"))?;
                end = u64::from(offset) + u64::from(slot_length(entry.row.size, slot));
                last_pack = pack;
                batch.targets.push((pack, offset));
            }
        }
        Ok(batch)
    }
}

impl InodeColumns {
    fn new(streams: &mut StreamReader, count: usize) -> Result<InodeColumns, BlockFault> {
        let shapes = streams.bytes(SHAPES);
        if shapes.len() != count {
            return Err(BlockFault("inodes and shapes differ in number"));
        }
        let numbers = streams.numbers(CLASSES, count)?;
        let classes = classes(streams, numbers.largest(), count)?;
        let mut counts = Counts::default();
        for (shape, number) in shapes.iter().zip(numbers.as_slice()) {
            let class = classes.get(*number as usize).ok_or(UNKNOWN_CLASS)?;
            counts.add(*shape, class.kind)?;
        }
        Ok(InodeColumns {
            last_ino: 0,
            inos: streams.numbers(INOS, count)?,
            shapes: shapes.into_iter(),
            numbers,
            classes,
            parents: streams.numbers(PARENTS, counts.here)?,
            cookies: streams.numbers(COOKIES, counts.here)?,
            sizes: streams.numbers(SIZES, counts.sized)?,
            allocated: streams.numbers(ALLOCATED, counts.sparse)?,
            extents: streams.numbers(EXTENTS, counts.sparse)?,
            atimes: TimesReader::new(ATIMES, counts.atimes, streams)?,
            mtimes: TimesReader::new(MTIMES, counts.mtimes, streams)?,
            ctimes: TimesReader::new(CTIMES, count, streams)?,
            children: streams.numbers(CHILDREN, counts.directories)?,
            subdirectories: streams.numbers(SUBDIRECTORIES, counts.directories)?,
            directory_mtimes: TimesReader::new(DIRECTORY_MTIMES, counts.directory_mtimes, streams)?,
            directory_ctimes: TimesReader::new(DIRECTORY_CTIMES, counts.directories, streams)?,
        })
    }

    fn entry(&mut self, at: usize) -> Result<InodeEntry, BlockFault> {
        let shape = self.shapes.next().ok_or(UNKNOWN_CLASS)?;
        let class = *self.classes.get(self.numbers.next_len()?).ok_or(UNKNOWN_CLASS)?;
        let step = self.inos.next()?;
        let ino = self.last_ino.checked_add(step).filter(|_| step > 0 || at == 0);
        let ino = ino.ok_or(BlockFault("inodes are out of order"))?;
        self.last_ino = ino;
        let placed = if shape & HERE != 0 { Placed::Here } else { Placed::ByName };
        let (parent, cookie) = match placed {
            Placed::Here => (unzigzag(ino, self.parents.next()?), self.cookies.next()?),
            Placed::ByName => (0, 0),
        };
        let mut row = self.times(shape, class)?;
        (row.parent, row.cookie) = (Ino::new(parent), cookie);
        if matches!(row.kind, Kind::File | Kind::Symlink) {
            row.size = self.sizes.next()?;
        }
        if row.kind == Kind::File {
            (row.allocated, row.extents) = if shape & DENSE != 0 {
                (row.size, row.size.div_ceil(SLOT_BYTES))
            } else {
                (self.allocated.next()?, self.extents.next()?)
            };
        }
        let extents = if shape & ORDINARY != 0 {
            ordinary_slots(&row).ok_or(BlockFault("a file has too many extents"))?
        } else {
            0
        };
        let directory = if shape & DIRECTORY != 0 { Some(self.directory(shape)?) } else { None };
        Ok(InodeEntry { ino, row, placed, directory, extents })
    }

    fn times(&mut self, shape: u8, class: Class) -> Result<InodeRow, BlockFault> {
        let ctime = self.ctimes.next()?;
        let mtime = match class.kind {
            Kind::Directory => Timespec::default(),
            _ if shape & MTIME_IS_CTIME != 0 => ctime,
            _ => self.mtimes.next()?,
        };
        let atime = match shape & (ATIME_IS_MTIME | ATIME_IS_CTIME) {
            0 => self.atimes.next()?,
            ATIME_IS_MTIME => mtime,
            _ => ctime,
        };
        let Class { kind, has_xattrs, purging, mode, uid, gid, rdev, nlink, generation, project } = class;
        let (size, allocated, extents, parent, cookie) = (0, 0, 0, Ino::new(0), 0);
        Ok(InodeRow {
            kind,
            mode,
            uid,
            gid,
            rdev,
            nlink,
            size,
            allocated,
            extents,
            has_xattrs,
            purging,
            generation,
            project,
            parent,
            cookie,
            atime,
            mtime,
            ctime,
        })
    }

    fn directory(&mut self, shape: u8) -> Result<DirectoryRow, BlockFault> {
        let children = self.children.next()?;
        let subdirectories = self.subdirectories.next32()?;
        let ctime = self.directory_ctimes.next()?;
        let mtime = if shape & MTIME_IS_CTIME != 0 { ctime } else { self.directory_mtimes.next()? };
        Ok(DirectoryRow { children, subdirectories, mtime, ctime })
    }
}

/// How many elements each column has that not every inode is in.
#[derive(Default)]
struct Counts {
    here: usize,
    sized: usize,
    sparse: usize,
    atimes: usize,
    mtimes: usize,
    directories: usize,
    directory_mtimes: usize,
}

impl Counts {
    fn add(&mut self, shape: u8, kind: Kind) -> Result<(), BlockFault> {
        let has = |bits: u8| shape & bits != 0;
        if has(UNKNOWN)
            || has(DIRECTORY) && kind != Kind::Directory
            || has(DENSE | ORDINARY) && kind != Kind::File
        {
            return Err(BlockFault("an inode has an impossible shape"));
        }
        self.here += usize::from(has(HERE));
        self.sized += usize::from(matches!(kind, Kind::File | Kind::Symlink));
        self.sparse += usize::from(kind == Kind::File && !has(DENSE));
        self.atimes += usize::from(!has(ATIME_IS_MTIME | ATIME_IS_CTIME));
        self.mtimes += usize::from(kind != Kind::Directory && !has(MTIME_IS_CTIME));
        self.directories += usize::from(has(DIRECTORY));
        self.directory_mtimes += usize::from(has(DIRECTORY) && !has(MTIME_IS_CTIME));
        Ok(())
    }
}

/// The classes of a block, whose inodes refer to numbers up to `largest`.
fn classes(streams: &mut StreamReader, largest: u64, count: usize) -> Result<Vec<Class>, BlockFault> {
    let number = if count == 0 { 0 } else { usize::try_from(largest).map_err(|_| UNKNOWN_CLASS)? + 1 };
    if number > count {
        return Err(UNKNOWN_CLASS);
    }
    let mut fields = Vec::with_capacity(CLASS_FIELDS);
    for id in (CLASS_FIRST..).take(CLASS_FIELDS) {
        fields.push(streams.numbers(id, number)?);
    }
    let mut classes = Vec::with_capacity(number);
    for _ in 0..number {
        let mut numbers = [0; CLASS_FIELDS];
        for (number, field) in numbers.iter_mut().zip(&mut fields) {
            *number = field.next()?;
        }
        classes.push(Class::from_numbers(numbers).ok_or(UNKNOWN_CLASS)?);
    }
    Ok(classes)
}

const UNKNOWN_CLASS: BlockFault = BlockFault("an inode is of no known class");
