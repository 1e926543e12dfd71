//! The draft: rows as a decision sees them, and the changes that it has made so far.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;
use murphy_log::{Lsn, MAX_NAMES, WrittenRow};

use super::{Moment, Refusal, RowState, Rows};
use crate::{
    Caller, DirectoryRow, Errno, Extent, ExtentRow, Ino, InodeRow, Kind, PackNumber, PackRow, RowError,
    RowKey, Timespec,
};

/// A decision in the making.
pub(crate) struct Draft<'a> {
    rows: &'a dyn Rows,
    moment: Moment,
    caller: Caller,
    decided: Decided,
    /// Where the write of a key is, once there are [`INDEXED_FROM`] of them: most decisions write a handful, some write thousands.
    places: HashMap<RowKey, usize>,
}

/// What a decision came to.
#[derive(Debug, Default)]
pub(crate) struct Decided {
    /// Each key once.
    pub(crate) writes: Vec<RowWrite>,
    /// The names that the request spoke of.
    pub(crate) names: Vec<Bytes>,
    /// By how much the number of inodes changes.
    pub(crate) inodes: i64,
    /// By how much the allocated bytes change.
    pub(crate) bytes: i64,
}

/// A row before and after.
#[derive(Clone, Debug)]
pub(crate) struct RowWrite {
    pub(crate) key: RowKey,
    pub(crate) old: Option<Bytes>,
    pub(crate) new: Option<Bytes>,
}

impl WrittenRow for RowWrite {
    fn table(&self) -> u8 {
        self.key.table()
    }

    fn key(&self) -> &[u8] {
        self.key.key()
    }

    fn value(&self) -> Option<&[u8]> {
        self.new.as_deref()
    }
}

impl<'a> Draft<'a> {
    pub(crate) fn new(rows: &'a dyn Rows, moment: Moment, caller: Caller) -> Draft<'a> {
        Draft { rows, moment, caller, decided: Decided::default(), places: HashMap::new() }
    }

    pub(crate) fn finish(self) -> Decided {
        self.decided
    }

    pub(crate) fn caller(&self) -> &Caller {
        &self.caller
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.moment.epoch
    }

    /// The time of the entry.
    pub(crate) fn time(&self) -> murphy_log::LogTime {
        self.moment.time
    }

    /// The time of the entry, as a file's time.
    pub(crate) fn now(&self) -> Timespec {
        self.moment.time.into()
    }

    /// The inode that this entry creates, if it creates one.
    pub(crate) fn newborn(&self) -> Ino {
        Ino::born_at(self.moment.lsn)
    }

    /// The LSN of this entry.
    pub(crate) fn lsn(&self) -> Lsn {
        self.moment.lsn
    }

    /// The pack that this entry registers, if it registers one.
    pub(crate) fn new_pack(&self) -> PackNumber {
        PackNumber(self.moment.lsn.get())
    }

    /// Notes a name for people, if the entry has room for one more: the changes say everything anyway.
    pub(crate) fn mention(&mut self, name: Bytes) {
        if self.decided.names.len() < MAX_NAMES {
            self.decided.names.push(name);
        }
    }

    /// The row at `key` as this decision leaves it so far.
    pub(crate) fn row(&self, key: &RowKey) -> Result<Option<Bytes>, Refusal> {
        if let Some(place) = self.place(key) {
            return Ok(self.decided.writes[place].new.clone());
        }
        match self.rows.newest(key) {
            RowState::Known(row) => Ok(row),
            RowState::Unknown => Err(Refusal::Need(vec![key.clone()])),
        }
    }

    /// Refuses unless all of these rows are in memory, naming every one that is not.
    pub(crate) fn need(&self, keys: impl IntoIterator<Item = RowKey>) -> Result<(), Refusal> {
        let is_missing =
            |key: &RowKey| self.place(key).is_none() && matches!(self.rows.newest(key), RowState::Unknown);
        let missing: Vec<RowKey> = keys.into_iter().filter(is_missing).collect();
        if missing.is_empty() { Ok(()) } else { Err(Refusal::Need(missing)) }
    }

    /// The extents of `ino` at these offsets of the file; the rows of their packs are in memory. Stale if one is not there.
    pub(crate) fn extents(&self, ino: Ino, offsets: &[u64]) -> Result<Vec<Extent>, Refusal> {
        self.need(offsets.iter().map(|offset| RowKey::extent(ino, *offset)))?;
        let mut extents = Vec::with_capacity(offsets.len());
        for offset in offsets {
            let row = self.decoded(&RowKey::extent(ino, *offset), |row| ExtentRow::decode(row))?;
            extents.push(Extent { offset: *offset, row: row.ok_or(Refusal::Stale)? });
        }
        let packs: BTreeSet<PackNumber> =
            extents.iter().filter_map(|extent| extent.row.target.pack()).collect();
        self.need(packs.into_iter().map(|pack| RowKey::pack(pack.0)))?;
        Ok(extents)
    }

    /// Writes a row, or removes it.
    pub(crate) fn put(&mut self, key: RowKey, new: Option<Bytes>) -> Result<(), Refusal> {
        if let Some(place) = self.place(&key) {
            self.decided.writes[place].new = new;
            return Ok(());
        }
        let old = match self.rows.newest(&key) {
            RowState::Known(old) => old,
            RowState::Unknown => return Err(Refusal::Need(vec![key])),
        };
        if old != new {
            self.push(RowWrite { key, old, new });
        }
        Ok(())
    }

    /// Writes a row whose key holds the entry's own LSN, so that none can be there yet.
    pub(crate) fn put_newborn(&mut self, key: RowKey, new: Bytes) {
        self.push(RowWrite { key, old: None, new: Some(new) });
    }

    /// Where the write of `key` is, if there is one.
    fn place(&self, key: &RowKey) -> Option<usize> {
        if self.places.is_empty() {
            return self.decided.writes.iter().rposition(|write| write.key == *key);
        }
        self.places.get(key).copied()
    }

    fn push(&mut self, write: RowWrite) {
        self.decided.writes.push(write);
        let writes = &self.decided.writes;
        let unplaced = match writes.len() {
            ..INDEXED_FROM => return,
            INDEXED_FROM => 0,
            length => length - 1,
        };
        self.places
            .extend((unplaced..).zip(&writes[unplaced..]).map(|(place, write)| (write.key.clone(), place)));
    }

    /// The inode row of `ino`. ESTALE if there is none, or if it is being purged: nothing changes it any more but its purge.
    pub(crate) fn inode(&self, ino: Ino) -> Result<InodeRow, Refusal> {
        self.find_inode(ino)?.filter(|row| !row.purging).ok_or(Refusal::Errno(Errno::ESTALE))
    }

    /// The inode row of `ino`, if there is one, of an inode that is being purged too.
    pub(crate) fn find_inode(&self, ino: Ino) -> Result<Option<InodeRow>, Refusal> {
        self.decoded(&RowKey::inode(ino), |row| InodeRow::decode(row))
    }

    /// The directory row of `ino`: ENOTDIR if the inode is not a directory, ENOENT if it was removed.
    pub(crate) fn directory(&self, ino: Ino) -> Result<DirectoryRow, Refusal> {
        if let Some(directory) = self.decoded(&RowKey::directory(ino), |row| DirectoryRow::decode(row))? {
            return Ok(directory);
        }
        match self.find_inode(ino)? {
            Some(row) if row.kind != Kind::Directory => Err(Errno::ENOTDIR.into()),
            _ => Err(Errno::ENOENT.into()),
        }
    }

    /// The row of a pack that an extent refers to.
    pub(crate) fn pack(&self, number: PackNumber) -> Result<PackRow, Refusal> {
        let key = RowKey::pack(number.0);
        self.decoded(&key, |row| PackRow::decode(row))?.ok_or(Refusal::Damaged(key))
    }

    pub(crate) fn put_inode(&mut self, ino: Ino, row: &InodeRow) -> Result<(), Refusal> {
        self.put(RowKey::inode(ino), Some(row.encode()))
    }

    pub(crate) fn put_directory(&mut self, ino: Ino, row: &DirectoryRow) -> Result<(), Refusal> {
        self.put(RowKey::directory(ino), Some(row.encode()))
    }

    /// Counts an inode that this entry creates.
    pub(crate) fn count_inode(&mut self) {
        self.decided.inodes += 1;
    }

    /// Counts an inode that this entry removes for good.
    pub(crate) fn uncount_inode(&mut self) {
        self.decided.inodes -= 1;
    }

    /// Adds to the allocated bytes; negative for what is freed.
    pub(crate) fn count_bytes(&mut self, bytes: i64) {
        self.decided.bytes += bytes;
    }

    /// The key of a further link of `ino`, checked to be there.
    pub(crate) fn further_link(&self, ino: Ino) -> Result<RowKey, Refusal> {
        let key = self.rows.link_hint(ino).ok_or(Refusal::NeedLink(ino))?;
        match self.row(&key)? {
            Some(_) => Ok(key),
            None => Err(Refusal::NeedLink(ino)),
        }
    }

    /// The row at `key`, decoded.
    pub(crate) fn decoded<T>(
        &self,
        key: &RowKey,
        decode: impl FnOnce(&Bytes) -> Result<T, RowError>,
    ) -> Result<Option<T>, Refusal> {
        self.row(key)?.map(|row| decode(&row).map_err(|_| Refusal::Damaged(key.clone()))).transpose()
    }
}

/// From so many writes on they are found by a map; below, looking through them is faster.
const INDEXED_FROM: usize = 64;
