//! Data follows the log: the packs that entries name are copied into the mirror's own store.
//!
//! Invariants:
//! - A pack counts as copied when its footer and every cell have been verified and the own store has it durably. What lies there already is
//!   read whole, once: its length proves nothing. What the saved cursor covers was counted before.
//! - The saved cursor is a point of a history and is compared with the log before it is believed; without it, or with one of another
//!   history, everything is looked at again, and what is there is not copied again.
//! - Several helpers copy at a time; the data position advances in the order of the log.

mod ahead;
mod plan;
mod tree;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use murphy_fs::{
    BlockStore, BlockStoreError, HeldPack, PackMeta, PackName, PackNumber, PackReader, PackRow,
    look_for_pack, put_intact,
};
use murphy_log::{ChainHash, Clock, Frame, Log, Lsn, OsFiles, ReadError, replace_file};
use tokio::sync::watch;

use ahead::Ahead;
pub use plan::{CopyPlan, PackNeed, ScanError};

use crate::{
    dial::{PackFetchError, RemotePacks},
    history::{Lookup, Point, look_up},
    message::MAX_PACK_BYTES,
};

/// Where packs are copied from.
pub trait PackSource: Send + Sync {
    /// The whole object of a pack, not verified.
    fn fetch(&self, pack: PackName) -> BoxFuture<'_, Result<Bytes, PackFetchError>>;
}

impl PackSource for RemotePacks {
    fn fetch(&self, pack: PackName) -> BoxFuture<'_, Result<Bytes, PackFetchError>> {
        self.read(pack, 0..0).boxed()
    }
}

impl PackSource for Arc<dyn BlockStore> {
    fn fetch(&self, pack: PackName) -> BoxFuture<'_, Result<Bytes, PackFetchError>> {
        let read = async move {
            self.get(pack).await.map_err(|error| match error {
                BlockStoreError::NotFound { .. } => PackFetchError::Missing(pack),
                error => PackFetchError::Failed(error.to_string()),
            })
        };
        read.boxed()
    }
}

/// Copies packs as the log names them.
pub struct Copier {
    /// The mirror's own log. When a snapshot or a tail set aside gives the node another one, the copier is started anew.
    pub log: Arc<dyn Log>,
    /// Where packs come from.
    pub source: Arc<dyn PackSource>,
    /// Where they go.
    pub store: Arc<dyn BlockStore>,
    /// Keeps how far it has come.
    pub cursor: CursorFile,
    /// Tells how far it has come: the mirror's data position.
    pub data: watch::Sender<Lsn>,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// How many packs are copied at a time.
    pub helpers: usize,
}

impl Copier {
    /// Copies the packs that a snapshot's tree needs, as its rows say; then everything up to `state`, its position, is here. Memory does not
    /// grow with the number of packs.
    ///
    /// [`CopyError::Lacks`] when all others were copied and some do not come: a later tree may say that nobody has them.
    pub async fn copy_base(
        &self,
        packs: impl Iterator<Item = Result<(PackNumber, PackRow), CopyError>> + Send,
        state: Point,
    ) -> Result<(), CopyError> {
        let ahead = self.ahead();
        let counted = self.counted()?.map_or(Lsn::new(0), |point| point.lsn);
        let mut copying = FuturesUnordered::new();
        let mut lacking = 0;
        for row in packs {
            let (number, row) = row?;
            let Some(since) = row.needed_since(number) else { continue };
            if copying.len() >= self.helpers.max(1)
                && let Some(done) = copying.next().await
            {
                let had: bool = done?;
                lacking += u64::from(!had);
            }
            copying.push(self.copy_surely(row.meta(), since <= counted, &ahead));
        }
        while let Some(done) = copying.next().await {
            lacking += u64::from(!done?);
        }
        if lacking > 0 {
            return Err(CopyError::Lacks { packs: lacking });
        }
        self.cursor.save(state).map_err(CopyError::Cursor)?;
        ahead.clear();
        self.data.send_replace(state.lsn);
        Ok(())
    }

    /// Follows the log until `shutdown` says true.
    pub async fn run(&self, mut shutdown: watch::Receiver<bool>) -> Result<(), CopyError> {
        let mut plan = CopyPlan::new(self.begin()?);
        let ahead = self.ahead();
        self.publish(&plan);
        let mut watch = self.log.durable();
        let mut reader = None;
        let mut copying = FuturesUnordered::new();
        let mut saved = (self.clock.monotonic(), plan.data());
        let mut more = true;
        loop {
            if more && plan.has_room() {
                more = self.scan(&mut plan, &mut reader).await?;
            }
            let now = self.clock.monotonic();
            while copying.len() < self.helpers.max(1)
                && let Some(need) = plan.start(now)
            {
                copying.push(self.copy(need.meta, false, &ahead).map(move |outcome| (need, outcome)));
            }
            self.publish(&plan);
            if plan.data() != saved.1 && now.saturating_sub(saved.0) >= SAVE_INTERVAL {
                self.save(&plan, &ahead)?;
                saved = (now, plan.data());
            }
            if more && plan.has_room() {
                continue;
            }
            if more && plan.is_stuck() {
                return Err(CopyError::Stuck { packs: plan.missing() });
            }
            tokio::select! {
                Some((need, outcome)) = copying.next() => self.copied(&mut plan, &need, outcome)?,
                durable = watch.changed() => match durable {
                    Ok(_) => more = true,
                    Err(_) => break,
                },
                () = tokio::time::sleep(IDLE) => {}
                _ = shutdown.wait_for(|stop| *stop) => break,
            }
        }
        self.save(&plan, &ahead)
    }

    /// Follows the log until everything up to `wanted` is here, and says whether it is: it gives up after `patience` without a pack that came.
    pub async fn reach(&self, wanted: Lsn, patience: Duration) -> Result<bool, CopyError> {
        let (stop, stopped) = watch::channel(false);
        let mut data = self.data.subscribe();
        let come = async {
            while *data.borrow_and_update() < wanted {
                if !matches!(tokio::time::timeout(patience, data.changed()).await, Ok(Ok(()))) {
                    return false;
                }
            }
            true
        };
        let run = self.run(stopped);
        tokio::pin!(run, come);
        let has_come = tokio::select! {
            ended = &mut run => return ended.map(|()| *self.data.borrow() >= wanted),
            has_come = &mut come => has_come,
        };
        stop.send_replace(true);
        run.await?;
        Ok(has_come)
    }

    fn ahead(&self) -> Ahead {
        Ahead::load(&self.cursor, &self.store.label())
    }

    fn save(&self, plan: &CopyPlan, ahead: &Ahead) -> Result<(), CopyError> {
        self.cursor.save(plan.data()).map_err(CopyError::Cursor)?;
        if plan.has_all() {
            ahead.clear();
        }
        Ok(())
    }

    /// The saved cursor, if it is a point of this log: what is needed up to there was put or read whole by this node.
    fn counted(&self) -> Result<Option<Point>, CopyError> {
        let Some(saved) = self.cursor.load().map_err(CopyError::Cursor)? else { return Ok(None) };
        Ok((look_up(&*self.log, saved.lsn)? == Lookup::End(saved)).then_some(saved))
    }

    /// Where to begin: after the saved cursor, if it is a point of this log, else with the oldest entry.
    fn begin(&self) -> Result<Point, CopyError> {
        if let Some(counted) = self.counted()? {
            return Ok(counted);
        }
        match look_up(&*self.log, self.log.first().previous())? {
            // Below it are only entries that a base snapshot holds, whose packs somebody has to copy.
            Lookup::End(point) if point.lsn <= Lsn::ROOT => Ok(point),
            _ => Err(CopyError::NoBase { first: self.log.first() }),
        }
    }

    /// Scans some frames; says whether there may be more.
    async fn scan(
        &self,
        plan: &mut CopyPlan,
        reader: &mut Option<murphy_log::FrameReader>,
    ) -> Result<bool, CopyError> {
        let (log, from, kept) = (Arc::clone(&self.log), plan.next_lsn(), reader.take());
        let read = murphy_log::spawn_blocking(move || -> Result<_, ReadError> {
            let mut reader = match kept {
                Some(reader) => reader,
                None => log.read(from)?,
            };
            let frames: Vec<Frame> = reader.by_ref().take(FRAMES_AT_ONCE).collect::<Result<_, _>>()?;
            Ok((frames, reader))
        });
        let (frames, again) = read.await.map_err(|error| CopyError::Panicked(error.to_string()))??;
        *reader = Some(again);
        for frame in &frames {
            plan.scan(frame)?;
        }
        Ok(frames.len() == FRAMES_AT_ONCE)
    }

    fn copied(
        &self,
        plan: &mut CopyPlan,
        need: &PackNeed,
        outcome: Result<(), PackCopyError>,
    ) -> Result<(), CopyError> {
        match outcome {
            Ok(()) => plan.done(need),
            Err(error) if error.is_final() => return Err(CopyError::Pack { pack: need.meta.name, error }),
            Err(error) => {
                tracing::warn!(pack = %need.meta.name, %error, "a pack was not copied yet");
                plan.failed(need, self.clock.monotonic());
            }
        }
        Ok(())
    }

    /// Whether it came. One that does not is asked for again with the tree of then, which may say that nobody has it.
    async fn copy_surely(&self, meta: PackMeta, is_counted: bool, ahead: &Ahead) -> Result<bool, CopyError> {
        let mut wait = Duration::from_millis(200);
        for _ in 0..BASE_TRIES {
            match self.copy(meta, is_counted, ahead).await {
                Ok(()) => return Ok(true),
                Err(error) if error.is_final() => return Err(CopyError::Pack { pack: meta.name, error }),
                Err(PackCopyError::Fetch(error @ PackFetchError::Missing(_))) => {
                    tracing::warn!(%error, "a pack was not copied yet");
                    return Ok(false);
                }
                Err(error) => tracing::warn!(pack = %meta.name, %error, "a pack was not copied yet"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(30));
        }
        Ok(false)
    }

    /// Returns when the own store has the pack. Of one that was counted before only the length is looked at.
    async fn copy(&self, meta: PackMeta, is_counted: bool, ahead: &Ahead) -> Result<(), PackCopyError> {
        let is_there = match is_counted || ahead.has(&meta) {
            true => is_there(&meta, &*self.store).await?,
            false => is_intact(&meta, &*self.store).await?,
        };
        if !is_there {
            copy_verified(&meta, &*self.source, &*self.store).await?;
        }
        ahead.add(&meta);
        Ok(())
    }

    fn publish(&self, plan: &CopyPlan) {
        let lsn = plan.data().lsn;
        self.data.send_if_modified(|known| std::mem::replace(known, lsn) != lsn);
    }
}

/// Whether a store has a pack's object, with the right length.
async fn is_there(meta: &PackMeta, store: &dyn BlockStore) -> Result<bool, PackCopyError> {
    match store.size(meta.name).await {
        Ok(size) => Ok(size == meta.stored_len),
        Err(BlockStoreError::NotFound { .. }) => Ok(false),
        Err(error) => Err(PackCopyError::Store(error.to_string())),
    }
}

/// Whether a store has a pack: whatever it has under the name is read whole.
async fn is_intact(meta: &PackMeta, store: &dyn BlockStore) -> Result<bool, PackCopyError> {
    match look_for_pack(store, meta).await {
        Ok(HeldPack::Intact) => Ok(true),
        Ok(HeldPack::Damaged(_) | HeldPack::Nothing) => Ok(false),
        Err(error) => Err(PackCopyError::Store(error.to_string())),
    }
}

/// Copies a pack, whose footer and cells are verified first. What the own store has damaged under its name is replaced.
pub(crate) async fn copy_verified(
    meta: &PackMeta,
    from: &dyn PackSource,
    to: &dyn BlockStore,
) -> Result<(), PackCopyError> {
    let bytes = from.fetch(meta.name).await?;
    let owned = *meta;
    let verify = murphy_log::spawn_blocking(move || -> Result<Bytes, murphy_fs::PackError> {
        PackReader::open(&owned, bytes.clone())?.verify()?;
        Ok(bytes)
    });
    let verified = verify.await.map_err(|error| PackCopyError::Store(error.to_string()))?;
    let bytes = verified.map_err(|error| PackCopyError::Damaged(error.to_string()))?;
    match put_intact(to, meta.name, bytes).await {
        Ok(()) => Ok(()),
        Err(BlockStoreError::Refused { refusal: murphy_fs::Refusal::OtherContent, .. }) => {
            Err(PackCopyError::OtherContent)
        }
        Err(error) => Err(PackCopyError::Store(error.to_string())),
    }
}

/// Why a pack was not copied.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PackCopyError {
    /// It did not come.
    #[error(transparent)]
    Fetch(#[from] PackFetchError),
    /// What came is damaged.
    #[error("what the source sent is damaged: {0}")]
    Damaged(String),
    /// The own store did not take it.
    #[error("the own store: {0}")]
    Store(String),
    /// The own store has another whole pack under that name.
    #[error("the own store has other content under this name")]
    OtherContent,
}

impl PackCopyError {
    /// Whether trying again cannot help.
    fn is_final(&self) -> bool {
        matches!(self, PackCopyError::OtherContent)
    }
}

/// Why copying has ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CopyError {
    /// The own log cannot be read.
    #[error(transparent)]
    Log(#[from] ReadError),
    /// A frame cannot be scanned.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The cursor cannot be read or saved.
    #[error("the cursor of the copier: {0}")]
    Cursor(CursorError),
    /// The log does not reach back to its beginning and no cursor fits it: copy the packs of a base snapshot first.
    #[error("the log begins at lsn {first}: the packs of an older snapshot have to be copied first")]
    NoBase {
        /// The oldest LSN in the log.
        first: Lsn,
    },
    /// Not all packs of the snapshot's tree come: look at a later tree.
    #[error("{packs} packs of the tree do not come from the source")]
    Lacks {
        /// How many.
        packs: u64,
    },
    /// So many packs do not come that no further entry is looked at: copy the packs of the tree of now instead.
    #[error("{packs} packs do not come")]
    Stuck {
        /// How many.
        packs: usize,
    },
    /// The tree cannot be read.
    #[error("the tree's packs cannot be read: {0}")]
    Tree(String),
    /// A pack can never be copied.
    #[error("pack {pack}: {error}")]
    Pack {
        /// Which.
        pack: PackName,
        /// Why.
        error: PackCopyError,
    },
    /// A task ended unexpectedly.
    #[error("a task has failed: {0}")]
    Panicked(String),
}

/// The file that keeps how far the copier has come.
#[derive(Clone, Debug)]
pub struct CursorFile(PathBuf);

impl CursorFile {
    /// The file at `path`, which need not exist.
    pub fn new(path: PathBuf) -> CursorFile {
        CursorFile(path)
    }

    /// What was saved last; `None` if nothing was.
    pub fn load(&self) -> Result<Option<Point>, CursorError> {
        let bytes = match std::fs::read(&self.0) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed(&error)),
        };
        let damaged = || CursorError::Damaged { path: self.0.clone() };
        let (content, sum) = bytes.split_last_chunk::<16>().ok_or_else(damaged)?;
        if blake3::hash(content).as_bytes()[..16] != *sum {
            return Err(damaged());
        }
        let content = content.strip_prefix(CURSOR_MAGIC).ok_or_else(damaged)?;
        let (lsn, hash) = content.split_first_chunk::<8>().ok_or_else(damaged)?;
        let hash = ChainHash::from_bytes(hash.try_into().map_err(|_| damaged())?);
        Ok(Some(Point { lsn: Lsn::new(u64::from_le_bytes(*lsn)), hash }))
    }

    /// Saves; durable when it returns.
    pub fn save(&self, point: Point) -> Result<(), CursorError> {
        let mut bytes = CURSOR_MAGIC.to_vec();
        bytes.extend_from_slice(&point.lsn.get().to_le_bytes());
        bytes.extend_from_slice(point.hash.as_bytes());
        bytes.extend_from_slice(&blake3::hash(&bytes).as_bytes()[..16]);
        replace_file(&OsFiles, &self.0, &bytes).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &io::Error) -> CursorError {
        CursorError::Io { path: self.0.clone(), message: error.to_string() }
    }
}

/// Why a cursor cannot be read or saved.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CursorError {
    /// The system refuses.
    #[error("{path}: {message}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        message: String,
    },
    /// The file is not what was saved: removing it makes the copier look at everything again.
    #[error("{path} is damaged", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

const CURSOR_MAGIC: &[u8; 8] = b"MfCopy0\n";
const FRAMES_AT_ONCE: usize = 64;
const SAVE_INTERVAL: Duration = Duration::from_secs(1);
/// Packs that failed are looked at again so often.
const IDLE: Duration = Duration::from_millis(100);
/// So often a pack of a tree is asked for; with the pauses in between about a minute.
const BASE_TRIES: u32 = if cfg!(test) { 2 } else { 8 };
const _: () = assert!(murphy_fs::MAX_PACK_STORED <= MAX_PACK_BYTES);

#[cfg(test)]
mod tests;
