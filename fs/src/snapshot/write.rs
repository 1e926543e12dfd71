//! Writing a snapshot from an index or a view.
//!
//! One thread scans the tables and settles which row goes where, group by group: up to 32 Ki inodes, the names in all directories up to
//! the last of them, their directory rows and extents. Workers turn the groups into blocks, take the blocks apart again and count
//! what came out.
//!
//! Invariants:
//! - Every row that a scan yields ends in exactly one block.
//! - The names of a directory are in the file before the first inode whose number is higher than the directory's group.
//! - The footer is written only when the rows read back from the blocks are those of the state.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use bytes::Bytes;
use murphy_log::{BranchId, LogTime, State, VolumeKeys};

use super::{
    SectionBytes, SnapshotHeader, SnapshotProgress, SnapshotSummary,
    awaited::Awaited,
    block::{BLOCK_HEAD_BYTES, BLOCK_ROWS, BlockFault, BlockHead, BlockKind, StoredBlock},
    footer::{BlockList, TRAILER_BYTES, trailer},
    header::HEADER_BYTES,
    inodes::{EXTENT_STREAMS, InodeBatch},
    name_hasher,
    names::NameBatch,
    plain_rows::{PlainRows, ROW_MAX},
    streams::{Compressor, StoreFault, StreamReader},
    tally::{Disagreement, Tally},
    worker_threads,
    workers::Workers,
};
use crate::{Cookie, IndexError, IndexSnapshot, InodeRow, NameHasher, RowIterator, RowKey, Table};

/// What the rows themselves do not say about a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnapshotOrigin {
    /// The branch that the state's position belongs to.
    pub branch: BranchId,
    /// The wall clock.
    pub created: LogTime,
}

/// Why no snapshot was written. What `out` got of it is not one.
#[derive(Debug, thiserror::Error)]
pub enum WriteSnapshotError {
    /// The source holds no state.
    #[error("there is no state to take a snapshot of")]
    NoState,
    /// The source could not be read.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The snapshot could not be written down.
    #[error("cannot write the snapshot: {0}")]
    Output(#[from] io::Error),
    /// A row is larger than a snapshot can hold.
    #[error("row {key} has {bytes} bytes, a snapshot holds {limit}")]
    RowTooLarge {
        /// The row.
        key: String,
        /// Its size.
        bytes: usize,
        /// The largest size.
        limit: usize,
    },
    /// The compressor failed.
    #[error("cannot compress block {block}: {reason}")]
    Compressor {
        /// Which block of the file.
        block: u32,
        /// What it said.
        reason: String,
    },
    /// A block that was just made does not read back as what it was made of.
    #[error("block {block} does not read back: {fault}")]
    ReadBack {
        /// Which block of the file.
        block: u32,
        /// What is wrong with it.
        fault: BlockFault,
    },
    /// The rows of the source are not those of its state.
    #[error("the source disagrees with its own state: {0}")]
    State(#[from] Disagreement),
}

/// Writes the tree that `source` holds to `out`, from sequential scans, in constant memory. `progress` is called after every block.
///
/// A source whose rows are not those of its state is an error, and `out` is then no snapshot. The caller makes `out` durable.
pub fn write_snapshot(
    source: &dyn IndexSnapshot,
    keys: &VolumeKeys,
    origin: SnapshotOrigin,
    out: &mut dyn Write,
    progress: &dyn Fn(SnapshotProgress),
) -> Result<SnapshotSummary, WriteSnapshotError> {
    write_with(source, keys, origin, out, progress, (worker_threads(), Awaited::new()))
}

/// The same with a number of threads and a limit of memory.
pub(super) fn write_with(
    source: &dyn IndexSnapshot,
    keys: &VolumeKeys,
    origin: SnapshotOrigin,
    out: &mut dyn Write,
    progress: &dyn Fn(SnapshotProgress),
    (threads, awaited): (usize, Awaited),
) -> Result<SnapshotSummary, WriteSnapshotError> {
    let state = source.state().ok_or(WriteSnapshotError::NoState)?;
    let SnapshotOrigin { branch, created } = origin;
    let header = SnapshotHeader { volume: keys.volume(), branch, state, created };
    out.write_all(&header.encode())?;
    let hasher = name_hasher(keys);
    let mut compressors = Vec::new();
    for _ in 0..threads {
        compressors.push(Compressor::new()?);
    }
    let (tally, sections) = std::thread::scope(|scope| {
        let works = compressors.into_iter().map(|mut compressor| {
            let (keys, hasher) = (keys.clone(), hasher.clone());
            move |job: (u32, Group)| make_block(job, &keys, &hasher, &mut compressor)
        });
        let workers = Workers::start(scope, works);
        let sections = SectionBytes { framing: HEADER_BYTES as u64, ..SectionBytes::default() };
        let (tally, blocks) = (Tally::new(), BlockList::default());
        let mut writer =
            Writer { out, progress, workers, submitted: 0, blocks, tally, sections, plain: BTreeMap::new() };
        writer.tree(source, awaited)?;
        writer.other_tables(source)?;
        writer.finish(&state)
    })?;
    Ok(SnapshotSummary { header, rows: tally.per_table(), digest: tally.digest, sections })
}

/// The rows of one block.
enum Group {
    Names(NameBatch),
    Inodes(InodeBatch),
    Rows(PlainRows),
}

/// A block that is ready to be written, and what it was found to hold.
struct MadeBlock {
    block: StoredBlock,
    tally: Tally,
    sections: SectionBytes,
}

struct Writer<'a> {
    out: &'a mut dyn Write,
    progress: &'a dyn Fn(SnapshotProgress),
    workers: Workers<(u32, Group), Result<MadeBlock, WriteSnapshotError>>,
    submitted: u32,
    blocks: BlockList,
    tally: Tally,
    sections: SectionBytes,
    /// Rows that are stored as they are, by table, until they fill a block.
    plain: BTreeMap<u8, PlainRows>,
}

impl Writer<'_> {
    /// The four large tables, joined by inode number.
    fn tree(&mut self, source: &dyn IndexSnapshot, mut awaited: Awaited) -> Result<(), WriteSnapshotError> {
        let mut inodes = Scan::of(source, Table::Inode)?;
        let mut directories = Scan::of(source, Table::Directory)?;
        let mut dentries = Scan::of(source, Table::Dentry)?;
        let mut extents = Scan::of(source, Table::Extent)?;
        loop {
            let (mut batch, last) = self.inodes(&mut inodes)?;
            self.names(&mut dentries, last, &mut awaited)?;
            batch.settle_places(|ino| awaited.take(ino));
            self.directories(&mut directories, last, &mut batch)?;
            self.extents(&mut extents, last, &mut batch)?;
            if batch.len() > 0 {
                self.submit(Group::Inodes(batch))?;
            }
            if last == u64::MAX {
                return Ok(());
            }
        }
    }

    /// The inodes of the next block, and the highest number that belongs to its group.
    fn inodes(&mut self, scan: &mut Scan) -> Result<(InodeBatch, u64), WriteSnapshotError> {
        let mut batch = InodeBatch::default();
        let mut last = u64::MAX;
        while !batch.is_full() {
            let Some((key, value)) = scan.next_up_to(u64::MAX)? else {
                return Ok((batch, u64::MAX));
            };
            last = lead(&key);
            if batch.push(&key, &value).is_none() {
                self.plain(&key, &value)?;
            }
        }
        Ok((batch, last))
    }

    fn names(&mut self, scan: &mut Scan, last: u64, awaited: &mut Awaited) -> Result<(), WriteSnapshotError> {
        let mut batch = NameBatch::default();
        while let Some((key, value)) = scan.next_up_to(last)? {
            if batch.push(&key, &value).is_none() {
                self.plain(&key, &value)?;
            }
            if batch.is_full() {
                batch.announce(awaited);
                self.submit(Group::Names(std::mem::take(&mut batch)))?;
            }
        }
        if batch.len() > 0 {
            batch.announce(awaited);
            self.submit(Group::Names(batch))?;
        }
        Ok(())
    }

    fn directories(
        &mut self,
        scan: &mut Scan,
        last: u64,
        batch: &mut InodeBatch,
    ) -> Result<(), WriteSnapshotError> {
        let mut at = 0;
        while let Some((key, value)) = scan.next_up_to(last)? {
            at = batch.position(at, lead(&key));
            if batch.attach_directory(at, &key, &value).is_none() {
                self.plain(&key, &value)?;
            }
        }
        Ok(())
    }

    fn extents(
        &mut self,
        scan: &mut Scan,
        last: u64,
        batch: &mut InodeBatch,
    ) -> Result<(), WriteSnapshotError> {
        let mut at = 0;
        let mut own = Vec::new();
        while let Some(row) = scan.next_up_to(last)? {
            let ino = lead(&row.0);
            own.clear();
            own.push(row);
            // A file with very many extents is passed on as it is read.
            while let Some(row) = scan.next_up_to(ino)? {
                if own.len() > BLOCK_ROWS {
                    own.drain(..).try_for_each(|(key, value)| self.plain(&key, &value))?;
                }
                own.push(row);
            }
            at = batch.position(at, ino);
            if batch.attach_extents(at, &own).is_none() {
                own.drain(..).try_for_each(|(key, value)| self.plain(&key, &value))?;
            }
        }
        Ok(())
    }

    /// All other tables, whether or not this version knows them.
    fn other_tables(&mut self, source: &dyn IndexSnapshot) -> Result<(), WriteSnapshotError> {
        for number in TABLES_AFTER_TREE {
            let range = RowKey::from_parts(number, &[])..RowKey::from_parts(number + 1, &[]);
            for row in source.scan(range) {
                let (key, value) = row?;
                self.plain(&key, &value)?;
            }
        }
        for rows in std::mem::take(&mut self.plain).into_values() {
            self.submit(Group::Rows(rows))?;
        }
        Ok(())
    }

    /// Stores a row as it is.
    fn plain(&mut self, key: &RowKey, value: &Bytes) -> Result<(), WriteSnapshotError> {
        let bytes = key.as_bytes().len() + value.len();
        if bytes > ROW_MAX {
            return Err(WriteSnapshotError::RowTooLarge { key: format!("{key:?}"), bytes, limit: ROW_MAX });
        }
        let rows = self.plain.entry(key.table()).or_default();
        rows.push(key, value);
        if rows.is_full() {
            let rows = std::mem::take(rows);
            self.submit(Group::Rows(rows))?;
        }
        Ok(())
    }

    fn submit(&mut self, group: Group) -> Result<(), WriteSnapshotError> {
        let job = (self.submitted, group);
        self.submitted += 1;
        match self.workers.submit(job) {
            Some(made) => self.write(&made?),
            None => Ok(()),
        }
    }

    fn write(&mut self, made: &MadeBlock) -> Result<(), WriteSnapshotError> {
        self.out.write_all(made.block.bytes())?;
        self.blocks.push(&made.block);
        self.tally.add(&made.tally);
        self.sections.add(&made.sections);
        (self.progress)(SnapshotProgress {
            inodes: self.tally.rows_of(Table::Inode),
            rows: self.tally.total(),
            bytes: self.sections.total(),
        });
        Ok(())
    }

    fn finish(mut self, state: &State) -> Result<(Tally, SectionBytes), WriteSnapshotError> {
        while let Some(made) = self.workers.next() {
            self.write(&made?)?;
        }
        self.tally.check(state)?;
        let block = self.blocks.count();
        let footer = self.blocks.footer(&self.tally.per_table(), self.tally.digest);
        let footer = footer.map_err(|fault| WriteSnapshotError::ReadBack { block, fault })?;
        self.out.write_all(footer.bytes())?;
        self.out.write_all(&trailer(&footer))?;
        self.out.flush()?;
        self.sections.framing += (footer.bytes().len() + TRAILER_BYTES) as u64;
        Ok((self.tally, self.sections))
    }
}

/// Makes a block, reads it back from its stored bytes and counts what it holds.
fn make_block(
    (ordinal, group): (u32, Group),
    keys: &VolumeKeys,
    hasher: &NameHasher,
    compressor: &mut Compressor,
) -> Result<MadeBlock, WriteSnapshotError> {
    let mut places = Vec::new();
    let stored = match &group {
        Group::Names(names) => {
            let streams;
            (streams, places) = names.encode(hasher);
            store(BlockKind::Names, &streams, names.len(), ordinal, compressor)
        }
        Group::Inodes(inodes) => {
            store(BlockKind::Inodes, &inodes.encode(), inodes.len(), ordinal, compressor)
        }
        Group::Rows(rows) => store(BlockKind::Rows, &rows.encode(), rows.len(), ordinal, compressor),
    };
    let made = stored.and_then(|(block, apart)| {
        let tally = read_back(&block, &group, places, keys, compressor)?;
        let total = block.bytes().len() as u64;
        let sections = sections_of(&block.head, total, apart, &tally);
        Ok(MadeBlock { block, tally, sections })
    });
    made.map_err(|fault| match fault {
        StoreFault::TooLarge { bytes } => WriteSnapshotError::Compressor {
            block: ordinal,
            reason: format!("its {bytes} bytes are more than a block may hold"),
        },
        StoreFault::Compressor(reason) => WriteSnapshotError::Compressor { block: ordinal, reason },
        StoreFault::ReadBack(fault) => WriteSnapshotError::ReadBack { block: ordinal, fault },
    })
}

fn store(
    kind: BlockKind,
    streams: &super::streams::StreamWriter,
    rows: usize,
    ordinal: u32,
    compressor: &mut Compressor,
) -> Result<(StoredBlock, u64), StoreFault> {
    let mut bytes = vec![0; BLOCK_HEAD_BYTES];
    let apart: &[u8] = if kind == BlockKind::Inodes { &EXTENT_STREAMS } else { &[] };
    let apart = streams.store(compressor, apart, &mut bytes)?;
    let length = (bytes.len() - BLOCK_HEAD_BYTES) as u32;
    let head = BlockHead { kind, streams: streams.count() as u8, length, rows: rows as u32, ordinal };
    head.seal(&mut bytes);
    Ok((StoredBlock::new(head, bytes), apart))
}

/// What the stored block holds, which must be the group that it was made of.
fn read_back(
    block: &StoredBlock,
    group: &Group,
    places: Vec<Cookie>,
    keys: &VolumeKeys,
    compressor: &mut Compressor,
) -> Result<Tally, StoreFault> {
    const DIFFERENT: BlockFault = BlockFault("it holds other rows");
    let mut tally = Tally::new();
    let payload = block.verified(block.head.ordinal)?;
    let mut streams = StreamReader::new(payload, block.head.streams.into(), compressor.expander())?;
    match group {
        Group::Names(names) => {
            // Hashed once: if other names than those came out, the digest would tell.
            let mut places = places.into_iter();
            let found = NameBatch::decode(&mut streams, names.len(), |_| places.next())?;
            found.emit(|table, key, value| tally.row(keys, table, key, &value))?;
        }
        Group::Inodes(inodes) => {
            let mut found = InodeBatch::decode(&mut streams, inodes.len())?;
            let mut places = inodes.entries.iter().map(|e| (e.ino, (e.row.parent.get(), e.row.cookie)));
            found.fill_places(|ino| places.next().filter(|(of, _)| *of == ino).map(|(_, place)| place))?;
            found.emit_inodes(|table, key, value| tally.row(keys, table, key, &value));
            found.emit_extents(|table, key, value| tally.row(keys, table, key, &value));
            tally.allocated(found.allocated());
        }
        Group::Rows(rows) => {
            // Some tables have no part in the digest, so the rows themselves are compared.
            let found = PlainRows::decode(&mut streams, rows.len())?;
            if found != *rows {
                return Err(DIFFERENT.into());
            }
            count_plain_rows(&found, keys, &mut tally, |_, _| ());
        }
    }
    streams.finish()?;
    Ok(tally)
}

/// Counts rows that are stored as they are, and hands them on.
pub(super) fn count_plain_rows(
    rows: &PlainRows,
    keys: &VolumeKeys,
    tally: &mut Tally,
    mut sink: impl FnMut(RowKey, Bytes),
) {
    rows.emit(|table, key, value| {
        tally.row(keys, table, key, &value);
        if table == Table::Inode.number() {
            match InodeRow::decode(&value) {
                Ok(row) => tally.allocated(row.allocated),
                Err(_) => tally.unknown_inode(),
            }
        }
        sink(RowKey::from_parts(table, key), value);
    });
}

/// What a block of `total` bytes counts as; `apart` of them are extents.
pub(super) fn sections_of(head: &BlockHead, total: u64, apart: u64, tally: &Tally) -> SectionBytes {
    let mut sections = SectionBytes::default();
    match head.kind {
        BlockKind::Names => sections.names = total,
        BlockKind::Inodes => (sections.attributes, sections.extents) = (total - apart, apart),
        // A block of rows is of one table.
        BlockKind::Rows if tally.rows_of(Table::Extent) > 0 => sections.extents = total,
        BlockKind::Rows if tally.rows_of(Table::Dentry) > 0 => sections.names = total,
        BlockKind::Rows if tally.rows_of(Table::Inode) + tally.rows_of(Table::Directory) > 0 => {
            sections.attributes = total;
        }
        BlockKind::Rows => sections.others = total,
        BlockKind::Footer => sections.framing = total,
    }
    sections
}

/// A scan with a look ahead.
struct Scan {
    rows: RowIterator,
    ahead: Option<(RowKey, Bytes)>,
}

impl Scan {
    fn of(source: &dyn IndexSnapshot, table: Table) -> Result<Scan, IndexError> {
        let number = table.number();
        let mut rows = source.scan(RowKey::from_parts(number, &[])..RowKey::from_parts(number + 1, &[]));
        let ahead = rows.next().transpose()?;
        Ok(Scan { rows, ahead })
    }

    /// The next row, if its key does not begin with a number above `last`.
    fn next_up_to(&mut self, last: u64) -> Result<Option<(RowKey, Bytes)>, IndexError> {
        if self.ahead.as_ref().is_none_or(|(key, _)| lead(key) > last) {
            return Ok(None);
        }
        let following = self.rows.next().transpose()?;
        Ok(std::mem::replace(&mut self.ahead, following))
    }
}

/// The number that a key begins with; a key that is too short for one is filled up with zeros.
fn lead(key: &RowKey) -> u64 {
    let mut bytes = [0; 8];
    let length = key.key().len().min(8);
    bytes[..length].copy_from_slice(&key.key()[..length]);
    u64::from_be_bytes(bytes)
}

/// The tables whose rows are stored as they are. The first and the last number are of no table.
const TABLES_AFTER_TREE: std::ops::Range<u8> = 5..u8::MAX;
const _: () = assert!(Table::Extent.number() == 4);
