//! Blocks of inodes: attributes as columns, with the directory rows and the ordinary extents of the same inodes.
//!
//! Invariants:
//! - The place of an inode's name is stored only if the names before it do not tell it.
//! - Extents are kept here only if they are the ones that any writer makes of a file of that size: one per [`SLOT_BYTES`], without a
//!   hole, in packs. Others are stored as rows.

use bytes::Bytes;

use super::{
    awaited::Place,
    block::{BLOCK_ROWS, BlockFault},
};
use crate::{
    DirectoryRow, ExtentRow, ExtentTarget, Ino, InodeRow, Kind, PackNumber, RowKey, SLOT_BYTES, Table,
};

pub(super) mod decode;
pub(super) mod encode;

/// The inodes of one block, in order.
#[derive(Default, PartialEq, Debug)]
pub(super) struct InodeBatch {
    pub(super) entries: Vec<InodeEntry>,
    /// Pack and offset of each ordinary extent.
    pub(super) targets: Vec<(u64, u32)>,
}

/// One inode.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct InodeEntry {
    pub(super) ino: u64,
    /// Parent and cookie are 0 while they are to be told by a name.
    pub(super) row: InodeRow,
    pub(super) placed: Placed,
    pub(super) directory: Option<DirectoryRow>,
    /// How many of the targets are its own.
    pub(super) extents: u32,
}

/// Where the place of an inode's name is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Placed {
    /// With the inode.
    Here,
    /// With the first name of the inode.
    ByName,
}

impl InodeBatch {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.entries.len() >= BLOCK_ROWS
    }

    /// Takes an inode row in. `None` if it must be stored as it is.
    pub(super) fn push(&mut self, key: &RowKey, value: &Bytes) -> Option<()> {
        let ino = key.number().filter(|_| key.key().len() == NUMBER_BYTES)?;
        let row = InodeRow::decode(value).ok()?;
        self.entries.push(InodeEntry { ino, row, placed: Placed::Here, directory: None, extents: 0 });
        Some(())
    }

    /// Where the inode `number` is, or the next one after it, not looking before `from`.
    pub(super) fn position(&self, from: usize, number: u64) -> usize {
        let later = self.entries.get(from..).unwrap_or_default();
        from + later.iter().take_while(|entry| entry.ino < number).count()
    }

    /// Takes the directory row of the inode at `at` in. `None` if it must be stored as it is.
    pub(super) fn attach_directory(&mut self, at: usize, key: &RowKey, value: &Bytes) -> Option<()> {
        let entry = self.entries.get_mut(at).filter(|entry| key.number() == Some(entry.ino))?;
        let fits = key.key().len() == NUMBER_BYTES && entry.row.kind == Kind::Directory;
        entry.directory = Some(DirectoryRow::decode(value).ok().filter(|_| fits)?);
        Some(())
    }

    /// Takes all extents of the inode at `at` in. `None` if they must be stored as they are.
    pub(super) fn attach_extents(&mut self, at: usize, rows: &[(RowKey, Bytes)]) -> Option<()> {
        let first = rows.first().and_then(|(key, _)| key.number());
        let entry = self.entries.get_mut(at).filter(|entry| first == Some(entry.ino))?;
        let slots = ordinary_slots(&entry.row).filter(|slots| *slots as usize == rows.len())?;
        let start = self.targets.len();
        for (slot, (key, value)) in (0..slots).zip(rows) {
            let row = ExtentRow::decode(value).ok();
            let expected = RowKey::extent(Ino::new(entry.ino), u64::from(slot) * SLOT_BYTES);
            match row {
                Some(ExtentRow { length, target: ExtentTarget::Pack { pack, offset } })
                    if *key == expected && length == slot_length(entry.row.size, slot) =>
                {
                    self.targets.push((pack.0, offset));
                }
                _ => {
                    self.targets.truncate(start);
                    return None;
                }
            }
        }
        entry.extents = slots;
        Some(())
    }

    /// Leaves the place of an inode to its name where `take` tells the same.
    pub(super) fn settle_places(&mut self, mut take: impl FnMut(u64) -> Option<Place>) {
        for entry in &mut self.entries {
            let place = (entry.row.parent.get(), entry.row.cookie);
            entry.placed = if take(entry.ino) == Some(place) { Placed::ByName } else { Placed::Here };
        }
    }

    /// Gives every inode its place; `take` tells those that are left to names.
    pub(super) fn fill_places(
        &mut self,
        mut take: impl FnMut(u64) -> Option<Place>,
    ) -> Result<(), BlockFault> {
        for entry in &mut self.entries {
            let place = take(entry.ino);
            if entry.placed == Placed::ByName {
                let (parent, cookie) = place.ok_or(BlockFault("an inode's name is missing"))?;
                entry.row.parent = Ino::new(parent);
                entry.row.cookie = cookie;
            }
        }
        Ok(())
    }

    /// How many bytes the inodes say to be allocated.
    pub(super) fn allocated(&self) -> u64 {
        self.entries.iter().fold(0, |sum, entry| sum.wrapping_add(entry.row.allocated))
    }

    /// Hands out every inode and directory row, in the order of their inodes.
    pub(super) fn emit_inodes(&self, mut sink: impl FnMut(u8, &[u8], Bytes)) {
        for entry in &self.entries {
            let key = entry.ino.to_be_bytes();
            sink(Table::Inode.number(), &key, entry.row.encode());
            if let Some(directory) = &entry.directory {
                sink(Table::Directory.number(), &key, directory.encode());
            }
        }
    }

    /// Hands out every ordinary extent, in order.
    pub(super) fn emit_extents(&self, mut sink: impl FnMut(u8, &[u8], Bytes)) {
        let mut targets = self.targets.iter();
        for entry in &self.entries {
            for (slot, (pack, offset)) in (0..entry.extents).zip(&mut targets) {
                let target = ExtentTarget::Pack { pack: PackNumber(*pack), offset: *offset };
                let row = ExtentRow { length: slot_length(entry.row.size, slot), target };
                let mut key = [0; 2 * NUMBER_BYTES];
                key[..8].copy_from_slice(&entry.ino.to_be_bytes());
                key[8..].copy_from_slice(&(u64::from(slot) * SLOT_BYTES).to_be_bytes());
                sink(Table::Extent.number(), &key, row.encode());
            }
        }
    }
}

/// How many extents a file without holes has, if it is one whose extents may be ordinary.
fn ordinary_slots(row: &InodeRow) -> Option<u32> {
    let slots = row.size.div_ceil(SLOT_BYTES);
    (row.kind == Kind::File && (1..=SLOTS_MAX).contains(&slots)).then_some(slots as u32)
}

/// The length of the extent in slot number `slot` of a file of `size` bytes.
fn slot_length(size: u64, slot: u32) -> u32 {
    (size.saturating_sub(u64::from(slot) * SLOT_BYTES)).min(SLOT_BYTES) as u32
}

/// Whether `allocated` and `extents` follow from the size.
fn is_dense(row: &InodeRow) -> bool {
    row.allocated == row.size && row.extents == row.size.div_ceil(SLOT_BYTES)
}

/// What inodes of one block often have in common; stored once and referred to by number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Class {
    kind: Kind,
    has_xattrs: bool,
    purging: bool,
    mode: u16,
    uid: u32,
    gid: u32,
    rdev: u32,
    nlink: u32,
    generation: u32,
    project: u32,
}

/// The numbers of a class in the file, each a column.
const CLASS_FIELDS: usize = 9;

impl Class {
    fn of(row: &InodeRow) -> Class {
        let InodeRow { kind, has_xattrs, purging, mode, uid, gid, rdev, nlink, generation, project, .. } =
            *row;
        Class { kind, has_xattrs, purging, mode, uid, gid, rdev, nlink, generation, project }
    }

    fn numbers(&self) -> [u64; CLASS_FIELDS] {
        let Class { kind, has_xattrs, purging, mode, uid, gid, rdev, nlink, generation, project } = *self;
        let flags = u64::from(has_xattrs) * HAS_XATTRS + u64::from(purging) * PURGING;
        let small = [kind as u64, flags, u64::from(mode)];
        let large = [uid, gid, rdev, nlink, generation, project].map(u64::from);
        [small[0], small[1], small[2], large[0], large[1], large[2], large[3], large[4], large[5]]
    }

    fn from_numbers(numbers: [u64; CLASS_FIELDS]) -> Option<Class> {
        let at = |field: usize| u32::try_from(numbers[field]).ok();
        let kind = Kind::from_number(u8::try_from(numbers[0]).ok()?)?;
        let flags = Some(numbers[1]).filter(|flags| *flags <= HAS_XATTRS | PURGING)?;
        let (has_xattrs, purging) = (flags & HAS_XATTRS != 0, flags & PURGING != 0);
        let mode = u16::try_from(numbers[2]).ok().filter(|mode| *mode <= 0o7777)?;
        let rdev = at(5)?;
        if rdev != 0 && !matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
            return None;
        }
        let (uid, gid, nlink, generation, project) = (at(3)?, at(4)?, at(6)?, at(7)?, at(8)?);
        if purging && nlink > 0 {
            return None;
        }
        Some(Class { kind, has_xattrs, purging, mode, uid, gid, rdev, nlink, generation, project })
    }
}

/// The streams of extents, which a summary reports apart.
pub(super) const EXTENT_STREAMS: [u8; 2] = [PACKS, OFFSETS];

const INOS: u8 = 1;
const SHAPES: u8 = 2;
const CLASSES: u8 = 3;
/// The classes' fields are streams 4 to 12.
const CLASS_FIRST: u8 = 4;
const PARENTS: u8 = 13;
const COOKIES: u8 = 14;
const SIZES: u8 = 15;
const ALLOCATED: u8 = 16;
const EXTENTS: u8 = 17;
/// Each column of times is two streams.
const ATIMES: u8 = 18;
const MTIMES: u8 = 20;
const CTIMES: u8 = 22;
const CHILDREN: u8 = 24;
const SUBDIRECTORIES: u8 = 25;
const DIRECTORY_MTIMES: u8 = 26;
const DIRECTORY_CTIMES: u8 = 28;
const PACKS: u8 = 30;
const OFFSETS: u8 = 31;

/// What a class may be besides its numbers.
const HAS_XATTRS: u64 = 1;
const PURGING: u64 = 2;

/// Parent and cookie stand here.
const HERE: u8 = 0x01;
/// Allocated bytes and extents follow from the size.
const DENSE: u8 = 0x02;
/// The extents stand here.
const ORDINARY: u8 = 0x04;
/// A directory row stands here.
const DIRECTORY: u8 = 0x08;
/// mtime = ctime; in a directory that of its directory row.
const MTIME_IS_CTIME: u8 = 0x10;
const ATIME_IS_MTIME: u8 = 0x20;
const ATIME_IS_CTIME: u8 = 0x40;
const UNKNOWN: u8 = 0x80;

/// Files with more slots keep their extents as rows: a block must not hold millions.
const SLOTS_MAX: u64 = 16;
const NUMBER_BYTES: usize = 8;
