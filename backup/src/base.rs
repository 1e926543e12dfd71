//! Snapshots in an archive: what a replay begins with. `docs/formats/snapshot.md` has the bytes, here they are cut into parts.
//!
//! Invariants:
//! - A snapshot is of a position that the archive's slots reach (or of the archive's base).
//! - The manifest is created last: a snapshot without one does not exist.
//! - The parts of an upload that was broken off are never mixed with those of the next: each attempt has names of its own.
//! - Writing and reading hold a few parts in memory, at any size.
//! - A part is used only if its length and hash are those of the manifest; the snapshot proves itself once more when it is read.

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use bytes::{Buf, Bytes, BytesMut};
use futures::StreamExt;
use murphy_fs::{
    BlockStore, BlockStoreError, HeldPack, IndexError, IndexSnapshot, PackNumber, PackRow, RowError, RowKey,
    SnapshotOrigin, SnapshotSummary, Table, WriteSnapshotError, look_for_pack, write_snapshot,
};
use murphy_log::{LogTime, Lsn, NodeId, Position, State};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    descriptor::{Archive, ArchiveKind},
    document::{self, DOCUMENT_BYTES_MAX, DocumentError, StateText},
    layout,
    pack::{CopyPackError, copy_pack, has_pack},
    registry::{Record, Registry, RegistryError},
    store::{Creation, StoreError},
    walk::Boundary,
};

/// What a manifest says of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BaseManifest {
    /// The folder that it and its parts lie in.
    pub folder: String,
    /// The tree.
    pub state: State,
    /// The log time of the last entry in it.
    pub as_of: LogTime,
    /// When it was written.
    pub created: LogTime,
    /// How many rows each table has.
    pub rows: Vec<(u8, u64)>,
    /// The parts, in order.
    pub parts: Vec<BasePart>,
}

/// A part of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BasePart {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// The BLAKE3 hash of it, hexadecimal.
    pub blake3: String,
}

impl BaseManifest {
    /// The length of the snapshot, in bytes.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// How many rows table `table` has.
    pub fn rows_of(&self, table: Table) -> u64 {
        self.rows.iter().find(|(number, _)| *number == table.number()).map_or(0, |(_, rows)| *rows)
    }

    /// Reads the manifest of the snapshot in `folder`.
    pub async fn read(archive: &Archive, folder: &str) -> Result<BaseManifest, ReadBaseError> {
        let name = layout::manifest(folder);
        let bytes = archive.store().get(&name, DOCUMENT_BYTES_MAX).await?;
        BaseManifest::parse(folder, &bytes)
            .map_err(|reason| ReadBaseError::Manifest { object: archive.store().object(&name), reason })
    }

    /// Reads the manifest that lies in `folder`.
    pub fn parse(folder: &str, bytes: &[u8]) -> Result<BaseManifest, DocumentError> {
        document::decode::<ManifestText>(MANIFEST_KIND, bytes).and_then(|text| text.parse(folder))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestText {
    state: StateText,
    as_of: u64,
    created: u64,
    node: String,
    rows: Vec<(u8, u64)>,
    parts: Vec<BasePart>,
}

impl ManifestText {
    fn parse(self, folder: &str) -> Result<BaseManifest, DocumentError> {
        let state = self.state.state()?;
        let position = state.position;
        if layout::snapshot_folder(position.epoch.number, position.lsn) != folder {
            return Err(DocumentError::Field("position"));
        }
        let inside =
            |part: &BasePart| part.name.starts_with(&format!("{folder}/")) && part.bytes <= PART_BYTES_MAX;
        if self.parts.is_empty() || !self.parts.iter().all(inside) {
            return Err(DocumentError::Field("parts"));
        }
        Ok(BaseManifest {
            folder: folder.to_owned(),
            state,
            as_of: LogTime::from_nanos(self.as_of),
            created: LogTime::from_nanos(self.created),
            rows: self.rows,
            parts: self.parts,
        })
    }
}

/// A snapshot to be written into an archive.
pub struct NewBase {
    /// The tree.
    pub source: Arc<dyn IndexSnapshot>,
    /// How far the archive holds the history, as its shipper says: at least up to the tree's position. A snapshot beyond that may be
    /// of a tail that loses a take-over.
    pub archived: Boundary,
    /// The log time of its last entry.
    pub as_of: LogTime,
    /// The wall clock.
    pub now: LogTime,
    /// The node that writes.
    pub node: NodeId,
    /// Where packs that the archive lacks come from: for the first snapshot of an archive that is added to a volume with a past.
    /// Later ones need none, the slots before them have brought theirs.
    pub packs: Option<Arc<dyn BlockStore>>,
}

/// Writes a snapshot into `archive`: the packs it needs, its parts, its manifest, its record in the registry.
///
/// A snapshot of the same position that is there already is left as it is.
pub async fn write_base(archive: &Archive, base: NewBase) -> Result<BaseManifest, WriteBaseError> {
    let state = base.source.state().ok_or(WriteSnapshotError::NoState)?;
    let (wanted, archived) = (state.position, base.archived.position);
    if archived.lsn < wanted.lsn || (archived.lsn == wanted.lsn && archived.hash != wanted.hash) {
        return Err(WriteBaseError::NotArchived { wanted, archived });
    }
    let mut registry = Registry::new(archive.clone());
    let is_first = registry.refresh().await?.snapshots.is_empty();
    let vouched = if is_first { Vouched::Behind(archive.descriptor().base.lsn) } else { Vouched::All };
    if let Some(packs) = &base.packs
        && archive.descriptor().kind == ArchiveKind::Full
    {
        copy_all_packs(archive, &base.source, packs, &vouched).await?;
    }
    let folder = layout::snapshot_folder(state.position.epoch.number, state.position.lsn);
    let (parts, summary) = upload(archive, &base, &folder).await?;
    let text = ManifestText {
        state: state.into(),
        as_of: base.as_of.as_nanos(),
        created: base.now.as_nanos(),
        node: base.node.to_string(),
        rows: summary.rows,
        parts,
    };
    let name = layout::manifest(&folder);
    let object = || archive.store().object(&name);
    let refused = |reason| WriteBaseError::Manifest { object: object(), reason };
    let syntax = |error: serde_json::Error| refused(DocumentError::Syntax(error.to_string()));
    let bytes = document::encode(MANIFEST_KIND, &text).map_err(syntax)?;
    let manifest = match archive.store().create(&name, bytes).await? {
        Creation::Created | Creation::SameContent => text.parse(&folder).map_err(refused)?,
        Creation::Other(bytes) => {
            let other = document::decode::<ManifestText>(MANIFEST_KIND, &bytes);
            let other = other.and_then(|text| text.parse(&folder)).map_err(refused)?;
            if other.state != state {
                return Err(refused(DocumentError::Field("state")));
            }
            other
        }
    };
    let position = state.position;
    let record = Record::Snapshot { epoch: position.epoch.number, lsn: position.lsn.get() };
    if !registry.refresh().await?.snapshots.contains_key(&position.lsn) {
        registry.append(base.node, base.now, record).await?;
    }
    Ok(manifest)
}

/// Whether a snapshot is due: when replaying what came after the last one would take too long, whatever the clock says.
pub fn snapshot_due(entries: u64, log_bytes: u64) -> bool {
    entries >= REPLAY_ENTRIES_MAX || log_bytes >= REPLAY_BYTES_MAX
}

/// The snapshots of an archive, of which lists and the registry tell; those whose manifest cannot be read come as errors.
pub async fn bases(archive: &Archive) -> Result<Vec<Result<BaseManifest, ReadBaseError>>, ReadBaseError> {
    let mut registry = Registry::new(archive.clone());
    let recorded = &registry.refresh().await?.snapshots;
    let mut folders: Vec<String> =
        recorded.iter().map(|(lsn, epoch)| layout::snapshot_folder(*epoch, *lsn)).collect();
    let mut listed = archive.store().list(layout::SNAPSHOT_FOLDER);
    while let Some(item) = listed.next().await {
        if let Some((folder, ..)) = layout::parse_manifest(&item?.name) {
            folders.push(folder.to_owned());
        }
    }
    folders.sort();
    folders.dedup();
    let read = futures::stream::iter(folders)
        .map(|folder| async move { BaseManifest::read(archive, &folder).await });
    Ok(read.buffered(MANIFESTS_AT_ONCE).collect().await)
}

/// The bytes of a snapshot, every part verified before a byte of it is handed out. Read it on a thread that may block.
pub fn read_base(archive: &Archive, manifest: &BaseManifest) -> BaseReader {
    let (sender, parts) = mpsc::channel(1);
    let (archive, listed) = (archive.clone(), manifest.parts.clone());
    tokio::spawn(async move {
        let fetched = futures::stream::iter(listed).map(|part| {
            let archive = archive.clone();
            async move { fetch_part(&archive, &part).await }
        });
        let mut fetched = fetched.buffered(PARTS_AT_ONCE);
        while let Some(part) = fetched.next().await {
            let is_end = part.is_err();
            // Nobody reads any more, or nothing follows.
            if sender.send(part).await.is_err() || is_end {
                return;
            }
        }
        let end = sender.send(Ok(Bytes::new())).await;
        drop(end);
    });
    BaseReader { parts, current: Bytes::new(), is_over: false }
}

/// A snapshot that is being read.
#[derive(Debug)]
pub struct BaseReader {
    parts: mpsc::Receiver<Result<Bytes, ReadBaseError>>,
    current: Bytes,
    is_over: bool,
}

impl Read for BaseReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.current.is_empty() && !self.is_over {
            match self.parts.blocking_recv() {
                Some(Ok(part)) => {
                    // An empty part is the mark of the end, which a task that died does not send.
                    self.is_over = part.is_empty();
                    self.current = part;
                }
                Some(Err(error)) => return Err(io::Error::other(error)),
                None => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the reading of parts stopped"));
                }
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

async fn fetch_part(archive: &Archive, part: &BasePart) -> Result<Bytes, ReadBaseError> {
    let bytes = archive.store().get(&part.name, PART_BYTES_MAX).await?;
    if bytes.len() as u64 != part.bytes || blake3::hash(&bytes).to_hex().as_str() != part.blake3 {
        return Err(ReadBaseError::Part { object: archive.store().object(&part.name) });
    }
    Ok(bytes)
}

/// Writes the snapshot on a thread of its own and creates the parts as they come.
async fn upload(
    archive: &Archive,
    base: &NewBase,
    folder: &str,
) -> Result<(Vec<BasePart>, SnapshotSummary), WriteBaseError> {
    let attempt = getrandom::u64().map_err(WriteBaseError::Random)?;
    let (sender, receiver) = mpsc::channel(1);
    let (source, keys) = (Arc::clone(&base.source), archive.keys().clone());
    let origin = SnapshotOrigin { branch: archive.lineage().branch, created: base.now };
    let writing = murphy_log::aside(move || {
        let mut out = PartWriter { parts: sender, current: BytesMut::new() };
        let summary = write_snapshot(&*source, &keys, origin, &mut out, &|_| {})?;
        out.finish()?;
        Ok::<_, WriteSnapshotError>(summary)
    });
    let received = futures::stream::unfold(receiver, async |mut receiver| {
        receiver.recv().await.map(|part: Bytes| (part, receiver))
    });
    let created = received.enumerate().map(|(number, part)| async move {
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let name = layout::part(folder, number, attempt);
        let blake3 = blake3::hash(&part).to_hex().to_string();
        let bytes = part.len() as u64;
        match archive.store().create(&name, part).await? {
            Creation::Created | Creation::SameContent => Ok(BasePart { name, bytes, blake3 }),
            Creation::Other(_) => Err(WriteBaseError::Taken { object: archive.store().object(&name) }),
        }
    });
    let mut created = Box::pin(created.buffered(PARTS_AT_ONCE));
    let mut parts = Vec::new();
    while let Some(part) = created.next().await {
        parts.push(part?);
    }
    drop(created);
    let summary = writing.await?;
    Ok((parts, summary))
}

/// Cuts what is written into parts.
struct PartWriter {
    parts: mpsc::Sender<Bytes>,
    current: BytesMut,
}

impl PartWriter {
    fn send(&mut self) -> io::Result<()> {
        let part = std::mem::take(&mut self.current).freeze();
        hand_over(&self.parts, part).map_err(|_| io::Error::other("the upload of parts stopped"))
    }

    fn finish(mut self) -> io::Result<()> {
        if self.current.is_empty() { Ok(()) } else { self.send() }
    }
}

impl Write for PartWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PART_BYTES - self.current.len();
        let taken = &bytes[..bytes.len().min(room)];
        self.current.extend_from_slice(taken);
        if self.current.len() == PART_BYTES {
            self.send()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Which packs were brought into an archive, verified, before a snapshot is written: of others an object of the right length proves nothing.
enum Vouched {
    /// Those of the slots: what the tree needs since an entry behind the archive's base. The first snapshot brings the others.
    Behind(Lsn),
    /// All: a snapshot that was written before has brought the others.
    All,
}

impl Vouched {
    fn covers(&self, number: PackNumber, row: &PackRow) -> bool {
        match self {
            Vouched::Behind(base) => row.needed_since(number).is_some_and(|since| since > *base),
            Vouched::All => !row.is_missing(),
        }
    }
}

/// Brings every pack that the tree refers to into the archive, unless it is there.
async fn copy_all_packs(
    archive: &Archive,
    source: &Arc<dyn IndexSnapshot>,
    from: &Arc<dyn BlockStore>,
    vouched: &Vouched,
) -> Result<(), WriteBaseError> {
    let target = &archive.packs();
    let rows = live_packs(source);
    let copies =
        rows.map(|row| async move {
            let (number, row) = row?;
            let meta = row.meta();
            let is_there = match vouched.covers(number, &row) {
                true => has_pack(&meta, target).await,
                false => look_for_pack(target, &meta).await.map(|held| held == HeldPack::Intact),
            };
            if is_there.map_err(CopyPackError::Store)? {
                return Ok::<(), WriteBaseError>(());
            }
            match copy_pack(&meta, &**from, target).await {
                Err(
                    CopyPackError::Store(BlockStoreError::NotFound { .. }) | CopyPackError::Damaged { .. },
                ) if row.is_missing() => Ok(()),
                copied => copied.map(drop).map_err(WriteBaseError::from),
            }
        });
    let mut copies = Box::pin(copies.buffer_unordered(PACKS_AT_ONCE));
    while let Some(copied) = copies.next().await {
        copied?;
    }
    Ok(())
}

/// The packs that the rows of a tree refer to, by number, read on a thread of its own.
pub(crate) fn live_packs(
    source: &Arc<dyn IndexSnapshot>,
) -> impl futures::Stream<Item = Result<(PackNumber, PackRow), PackRowError>> + use<> {
    let (sender, receiver) = mpsc::channel(ROWS_AHEAD);
    let source = Arc::clone(source);
    murphy_log::spawn_blocking(move || {
        let end = RowKey::from_parts(Table::Pack.number() + 1, &[]);
        for row in source.scan(RowKey::range_start(Table::Pack, 0)..end) {
            let row = row.map_err(PackRowError::from).and_then(|(key, value)| {
                let row = PackRow::decode(&value)
                    .map_err(|source| PackRowError::Row { key: format!("{key:?}"), source })?;
                Ok((PackNumber(key.number().unwrap_or_default()), row))
            });
            let is_live = row.as_ref().map_or(true, |(_, row)| row.live_bytes > 0);
            // Nobody waits for more.
            if is_live && hand_over(&sender, row).is_err() {
                return;
            }
        }
    });
    futures::stream::unfold(receiver, async |mut receiver| receiver.recv().await.map(|row| (row, receiver)))
}

/// Sends, and waits for room only if there is none: where blocking work is done in place there is nobody to wait for.
fn hand_over<T>(to: &mpsc::Sender<T>, item: T) -> Result<(), mpsc::error::SendError<T>> {
    match to.try_send(item) {
        Ok(()) => Ok(()),
        Err(mpsc::error::TrySendError::Full(item)) => to.blocking_send(item),
        Err(mpsc::error::TrySendError::Closed(item)) => Err(mpsc::error::SendError(item)),
    }
}

/// Why the packs of a tree are not known.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PackRowError {
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A row cannot be read.
    #[error("row {key}: {source}")]
    Row {
        /// The row.
        key: String,
        /// What is wrong with it.
        source: RowError,
    },
}

/// Why a snapshot was not written; what was written of it does no harm.
#[derive(Debug, thiserror::Error)]
pub enum WriteBaseError {
    /// The archive does not hold the history up to the tree yet.
    #[error("the snapshot would be at {wanted}, the archive holds the history up to {archived}")]
    NotArchived {
        /// The tree's position.
        wanted: Position,
        /// The archive's.
        archived: Position,
    },
    /// The snapshot could not be made.
    #[error(transparent)]
    Snapshot(#[from] WriteSnapshotError),
    /// A pack could not be brought.
    #[error(transparent)]
    Pack(#[from] CopyPackError),
    /// The tree's packs are not known.
    #[error(transparent)]
    PackRow(#[from] PackRowError),
    /// The name of a part is taken by something else.
    #[error("{object} exists already and has other content")]
    Taken {
        /// The object.
        object: String,
    },
    /// The manifest that is there cannot be used.
    #[error("{object} cannot be used: {reason}")]
    Manifest {
        /// The object.
        object: String,
        /// Why.
        reason: DocumentError,
    },
    /// The registry cannot be read or written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No randomness.
    #[error("the operating system gives no random bytes: {0}")]
    Random(getrandom::Error),
}

/// Why a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadBaseError {
    /// Its manifest cannot be used.
    #[error("{object} cannot be used: {reason}")]
    Manifest {
        /// The object.
        object: String,
        /// Why.
        reason: DocumentError,
    },
    /// A part is not what the manifest says.
    #[error("{object} is damaged: it is not the part that the manifest names")]
    Part {
        /// The object.
        object: String,
    },
    /// The registry cannot be read.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

const MANIFEST_KIND: &str = "snapshot";
/// The length of every part but the last.
const PART_BYTES: usize = if cfg!(test) { 100 } else { 64 << 20 };
/// No part is longer.
const PART_BYTES_MAX: u64 = 256 << 20;
const PARTS_AT_ONCE: usize = 2;
const PACKS_AT_ONCE: usize = 16;
const MANIFESTS_AT_ONCE: usize = 16;
const ROWS_AHEAD: usize = 1024;
/// At 500,000 entries a second a minute of replay.
const REPLAY_ENTRIES_MAX: u64 = 30_000_000;
const REPLAY_BYTES_MAX: u64 = 4 << 30;

#[cfg(test)]
mod tests;
