//! Reading a snapshot, from a file or a pipe.
//!
//! Workers check and expand blocks; one thread takes them in order, gives inodes the places of their names, counts, and collects rows
//! into generations that an index can ingest.
//!
//! Invariants:
//! - Success is reported only after footer, trailer, counts, digest and usage agreed with what was read.
//! - The last generation is handed out after that: whoever records a position with it records a verified one.
//! - Lengths are limited before anything is allocated for them.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    sync::mpsc::sync_channel,
};

use bytes::Bytes;
use murphy_log::{State, VolumeKeys};

use super::{
    SectionBytes, SnapshotHeader, SnapshotProgress, SnapshotSummary,
    awaited::Awaited,
    block::{BlockFault, BlockKind, ReadBlockError, StoredBlock},
    footer::{BlockList, TRAILER_BYTES, trailer},
    header::{HEADER_BYTES, HeaderFault},
    inodes::{EXTENT_STREAMS, InodeBatch},
    name_hasher,
    names::NameBatch,
    plain_rows::PlainRows,
    streams::{Expander, StreamReader},
    tally::{Disagreement, Tally},
    worker_threads,
    workers::Workers,
    write::{count_plain_rows, sections_of},
};
use crate::{Index, IndexError, NameHasher, RowKey, Table};

/// Why a snapshot could not be read. Whatever was taken from it so far is not to be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadSnapshotError {
    /// The input failed.
    #[error("cannot read the snapshot: {0}")]
    Input(io::Error),
    /// The input is something else.
    #[error("not a snapshot of a volume: it begins otherwise at byte 0")]
    NotASnapshot,
    /// The format is newer than this program.
    #[error("the snapshot has format version {0} at byte 8, which this program does not know")]
    Version(u16),
    /// The file ends early.
    #[error("the snapshot is cut short in block {block}")]
    CutShort {
        /// The block where it ends; 0 also for the header.
        block: u32,
    },
    /// Bytes are not what was written.
    #[error("the snapshot is damaged in block {block}: {fault}")]
    Damaged {
        /// The block; one more than there are for the end of the file.
        block: u32,
        /// What is wrong.
        fault: BlockFault,
    },
    /// The rows are not those of the state in the header.
    #[error("the snapshot disagrees with its own header: {0}")]
    State(#[from] Disagreement),
    /// The rows could not be stored.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// A snapshot that is being read: its header has been checked, nothing else.
#[derive(Debug)]
pub struct SnapshotReader<R> {
    input: R,
    header: SnapshotHeader,
}

/// Rows sorted by key, each key once.
pub type RowBatch = Vec<(RowKey, Bytes)>;

impl<R: Read> SnapshotReader<R> {
    /// Reads and checks the header. `input` may be a pipe; it is read to its end.
    pub fn open(mut input: R) -> Result<SnapshotReader<R>, ReadSnapshotError> {
        let mut bytes = [0; HEADER_BYTES];
        input.read_exact(&mut bytes).map_err(|error| input_error(error, 0))?;
        let header = SnapshotHeader::decode(&bytes).map_err(|fault| match fault {
            HeaderFault::Magic => ReadSnapshotError::NotASnapshot,
            HeaderFault::Version(version) => ReadSnapshotError::Version(version),
            HeaderFault::Checksum => ReadSnapshotError::Damaged {
                block: 0,
                fault: BlockFault("the header's checksum does not match"),
            },
            HeaderFault::Reserved => ReadSnapshotError::Damaged {
                block: 0,
                fault: BlockFault("the header's reserved bytes are not zero"),
            },
            HeaderFault::Position => {
                ReadSnapshotError::Damaged { block: 0, fault: BlockFault("the header has an impossible lsn") }
            }
        })?;
        Ok(SnapshotReader { input, header })
    }

    /// What the snapshot says that it is of. The state is proven only by reading to the end.
    pub fn header(&self) -> &SnapshotHeader {
        &self.header
    }

    /// Hands all rows to `sink`, in batches of bounded size, each sorted by key. The last batch comes after everything was verified;
    /// after an error all batches are to be thrown away. In one table keys ascend across batches, but for rows that have no compact form.
    pub fn read(
        self,
        sink: &mut dyn FnMut(RowBatch) -> Result<(), IndexError>,
        progress: &dyn Fn(SnapshotProgress),
    ) -> Result<SnapshotSummary, ReadSnapshotError> {
        self.read_with(sink, progress, (worker_threads(), Awaited::new()))
    }

    /// Loads everything into an index that holds nothing, and syncs it. Until this has returned the index must not be read, and after an error it
    /// is to be deleted.
    pub fn load_into(
        self,
        index: &dyn Index,
        progress: &dyn Fn(SnapshotProgress),
    ) -> Result<State, ReadSnapshotError> {
        let state = self.header.state;
        std::thread::scope(|scope| {
            let (batches, queue) = sync_channel::<RowBatch>(0);
            let ingestion = scope.spawn(move || -> Result<(), IndexError> {
                for batch in queue {
                    index.ingest(&mut batch.into_iter().map(|(key, value)| (key, Some(value))), &state)?;
                }
                Ok(())
            });
            // A closed queue means that the ingestion failed; its own error is the one to report.
            let stopped = || IndexError { path: "index".to_owned(), reason: "ingestion stopped".to_owned() };
            let read = self.read(&mut |batch| batches.send(batch).map_err(|_| stopped()), progress);
            drop(batches);
            let ingested = ingestion.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            ingested?;
            read?;
            index.sync()?;
            Ok(state)
        })
    }

    pub(super) fn read_with(
        mut self,
        sink: &mut dyn FnMut(RowBatch) -> Result<(), IndexError>,
        progress: &dyn Fn(SnapshotProgress),
        (threads, awaited): (usize, Awaited),
    ) -> Result<SnapshotSummary, ReadSnapshotError> {
        let keys = VolumeKeys::derive(self.header.volume);
        let hasher = name_hasher(&keys);
        let mut expanders = Vec::new();
        for _ in 0..threads {
            expanders.push(Expander::new().map_err(ReadSnapshotError::Input)?);
        }
        let header = self.header;
        std::thread::scope(|scope| {
            let works = expanders.into_iter().map(|mut expander| {
                let (keys, hasher) = (keys.clone(), hasher.clone());
                move |(ordinal, block): (u32, StoredBlock)| {
                    open_block(&block, ordinal, &keys, &hasher, &mut expander)
                        .map_err(|fault| ReadSnapshotError::Damaged { block: ordinal, fault })
                }
            });
            let workers = Workers::start(scope, works);
            let sections = SectionBytes { framing: HEADER_BYTES as u64, ..SectionBytes::default() };
            let (tally, rows) = (Tally::new(), Generation::default());
            let mut gatherer =
                Gatherer { keys: &keys, sink, progress, workers, awaited, tally, rows, sections };
            let footer_bytes = gatherer.blocks(&mut self.input)?;
            gatherer.sections.framing += footer_bytes;
            gatherer.tally.check(&header.state)?;
            let Gatherer { tally, sections, rows, sink, .. } = gatherer;
            let block = u32::MAX;
            sink(rows.sorted().map_err(|fault| ReadSnapshotError::Damaged { block, fault })?)?;
            Ok(SnapshotSummary { header, rows: tally.per_table(), digest: tally.digest, sections })
        })
    }
}

/// Reads a snapshot to its end and proves it: checksums, counts, digest, usage.
pub fn verify_snapshot(
    input: impl Read,
    progress: &dyn Fn(SnapshotProgress),
) -> Result<SnapshotSummary, ReadSnapshotError> {
    SnapshotReader::open(input)?.read(&mut |_| Ok(()), progress)
}

/// What a worker found in a block.
pub(super) struct OpenedBlock {
    contents: Contents,
    tally: Tally,
    sections: SectionBytes,
}

enum Contents {
    /// Dentries, for the inodes to come, and their rows.
    Names(NameBatch, RowBatch),
    /// Inodes, some of which wait for their places, and rows of extents.
    Inodes(InodeBatch, RowBatch),
    Rows(RowBatch),
}

pub(super) fn open_block(
    block: &StoredBlock,
    ordinal: u32,
    keys: &VolumeKeys,
    hasher: &NameHasher,
    expander: &mut Expander,
) -> Result<OpenedBlock, BlockFault> {
    let payload = block.verified(ordinal)?;
    let count = block.head.rows as usize;
    let mut streams = StreamReader::new(payload, block.head.streams.into(), expander)?;
    let mut tally = Tally::new();
    let mut rows = RowBatch::with_capacity(count);
    let mut apart = 0;
    let contents = match block.head.kind {
        BlockKind::Names => {
            let names = NameBatch::decode(&mut streams, count, |name| Some(hasher.place(name)))?;
            names.emit(|table, key, value| {
                tally.row(keys, table, key, &value);
                rows.push((RowKey::from_parts(table, key), value));
            })?;
            Contents::Names(names, rows)
        }
        BlockKind::Inodes => {
            apart = streams.stored_bytes(&EXTENT_STREAMS);
            let inodes = InodeBatch::decode(&mut streams, count)?;
            inodes.emit_extents(|table, key, value| {
                tally.row(keys, table, key, &value);
                rows.push((RowKey::from_parts(table, key), value));
            });
            tally.allocated(inodes.allocated());
            Contents::Inodes(inodes, rows)
        }
        BlockKind::Rows => {
            let plain = PlainRows::decode(&mut streams, count)?;
            count_plain_rows(&plain, keys, &mut tally, |key, value| rows.push((key, value)));
            Contents::Rows(rows)
        }
        BlockKind::Footer => return Err(BlockFault("a footer is no block of rows")),
    };
    streams.finish()?;
    let sections = sections_of(&block.head, block.bytes().len() as u64, apart, &tally);
    Ok(OpenedBlock { contents, tally, sections })
}

struct Gatherer<'a> {
    keys: &'a VolumeKeys,
    sink: &'a mut dyn FnMut(RowBatch) -> Result<(), IndexError>,
    progress: &'a dyn Fn(SnapshotProgress),
    workers: Workers<(u32, StoredBlock), Result<OpenedBlock, ReadSnapshotError>>,
    awaited: Awaited,
    tally: Tally,
    rows: Generation,
    sections: SectionBytes,
}

impl Gatherer<'_> {
    /// Reads all blocks, the footer and the trailer, and returns what the last two take in bytes.
    fn blocks(&mut self, input: &mut dyn Read) -> Result<u64, ReadSnapshotError> {
        let mut list = BlockList::default();
        loop {
            let ordinal = list.count();
            let block = StoredBlock::read(input).map_err(|error| match error {
                ReadBlockError::Io(error) => input_error(error, ordinal),
                ReadBlockError::Fault(fault) => ReadSnapshotError::Damaged { block: ordinal, fault },
            })?;
            if block.head.kind == BlockKind::Footer {
                while let Some(opened) = self.workers.next() {
                    self.take(opened?, list.count())?;
                }
                self.footer(&block, &list, input)?;
                return Ok((block.bytes().len() + TRAILER_BYTES) as u64);
            }
            list.push(&block);
            if let Some(opened) = self.workers.submit((ordinal, block)) {
                self.take(opened?, ordinal)?;
            }
        }
    }

    /// Compares the footer and what follows it with what must stand there.
    fn footer(
        &self,
        found: &StoredBlock,
        list: &BlockList,
        input: &mut dyn Read,
    ) -> Result<(), ReadSnapshotError> {
        let block = list.count();
        let damaged = |fault| ReadSnapshotError::Damaged { block, fault };
        found.verified(block).map_err(damaged)?;
        let expected = list.footer(&self.tally.per_table(), self.tally.digest).map_err(damaged)?;
        if found.bytes() != expected.bytes() {
            return Err(damaged(BlockFault("the footer tells of other rows or blocks")));
        }
        let mut end = [0; TRAILER_BYTES];
        input.read_exact(&mut end).map_err(|error| input_error(error, block + 1))?;
        let damaged = |fault| ReadSnapshotError::Damaged { block: block + 1, fault };
        if end != trailer(&expected) {
            return Err(damaged(BlockFault("the trailer is wrong")));
        }
        match input.read_exact(&mut [0]) {
            Ok(()) => Err(damaged(BlockFault("bytes follow the trailer"))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            Err(error) => Err(ReadSnapshotError::Input(error)),
        }
    }

    /// Takes the contents of the next block in.
    fn take(&mut self, opened: OpenedBlock, block: u32) -> Result<(), ReadSnapshotError> {
        let damaged = |fault| ReadSnapshotError::Damaged { block, fault };
        self.tally.add(&opened.tally);
        self.sections.add(&opened.sections);
        match opened.contents {
            Contents::Names(names, rows) => {
                names.announce(&mut self.awaited);
                self.rows.extend(rows);
            }
            Contents::Inodes(mut inodes, extents) => {
                inodes.fill_places(|ino| self.awaited.take(ino)).map_err(damaged)?;
                let (tally, rows, keys) = (&mut self.tally, &mut self.rows, self.keys);
                inodes.emit_inodes(|table, key, value| {
                    tally.row(keys, table, key, &value);
                    rows.push(RowKey::from_parts(table, key), value);
                });
                rows.extend(extents);
            }
            Contents::Rows(rows) => self.rows.extend(rows),
        }
        if self.rows.is_full() {
            let rows = std::mem::take(&mut self.rows).sorted().map_err(damaged)?;
            (self.sink)(rows)?;
        }
        (self.progress)(SnapshotProgress {
            inodes: self.tally.rows_of(Table::Inode),
            rows: self.tally.total(),
            bytes: self.sections.total(),
        });
        Ok(())
    }
}

/// Rows until they are enough to be handed out, by table.
#[derive(Default)]
struct Generation {
    tables: BTreeMap<u8, RowBatch>,
    rows: usize,
    bytes: usize,
}

impl Generation {
    fn push(&mut self, key: RowKey, value: Bytes) {
        self.rows += 1;
        self.bytes += key.as_bytes().len() + value.len();
        self.tables.entry(key.table()).or_default().push((key, value));
    }

    fn extend(&mut self, rows: RowBatch) {
        for (key, value) in rows {
            self.push(key, value);
        }
    }

    fn is_full(&self) -> bool {
        self.rows >= GENERATION_ROWS || self.bytes >= GENERATION_BYTES
    }

    /// All rows in the order of their keys.
    fn sorted(self) -> Result<RowBatch, BlockFault> {
        let mut all = RowBatch::with_capacity(self.rows);
        for mut rows in self.tables.into_values() {
            // Only rows that are stored as they are come out of order.
            if !rows.is_sorted_by(|a, b| a.0 < b.0) {
                rows.sort_by(|a, b| a.0.cmp(&b.0));
                if rows.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                    return Err(BlockFault("a row comes twice"));
                }
            }
            all.append(&mut rows);
        }
        Ok(all)
    }
}

fn input_error(error: io::Error, block: u32) -> ReadSnapshotError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        ReadSnapshotError::CutShort { block }
    } else {
        ReadSnapshotError::Input(error)
    }
}

/// Where a generation is handed out. In memory a row takes about 250 bytes besides its own, and two generations exist at a time.
const GENERATION_ROWS: usize = 512 << 10;
const GENERATION_BYTES: usize = 96 << 20;
