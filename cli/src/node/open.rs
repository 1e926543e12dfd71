//! Opening a node, in the order in which each step may refuse: whose block store it is, log, index, volume.
//!
//! Invariants:
//! - A step that refuses leaves what is on the disk as it was, except that the log gets back what others hold of it.
//! - No directory is made in place of a store that is not there.

use std::{path::Path, sync::Arc};

use murphy_fs::{
    BlockStore, BlockStores, CellCache, ClaimPrefixError, DiskCache, FjallIndex, Index, ObjectBlockStore,
    PackFetcher, RowKey, SettingRow, StoreUrl, Volume, VolumeOptions, VolumeParts, check_prefix,
};
use murphy_log::{
    Access, Clock, DirectoryLock, DiskLog, DiskOptions, HeaderError, Log, LogTime, OpenError, Scrub, State,
    SystemClock, VolumeId, VolumeKeys,
};
use murphy_mirror::{Identity, RemotePacks, SourceStore};
use tokio::runtime::Handle;

use super::{
    Node, NodeOpening, NodeOptions,
    index::{open_index, open_index_in, still_to_read},
    log_directory, lost_tail,
    settle::has_begun,
};
use crate::{
    archive_notes::known_durable,
    archive_packs::ArchivePacks,
    archive_reads::ArchiveReads,
    config::{NodeConfig, Role},
    error::{CliError, failed},
    places::check_there,
    scrub_notes,
    settings::SYNC,
    units::{parse_bytes, parse_duration},
};

pub(super) fn open(opening: NodeOpening, options: &NodeOptions, runtime: &Handle) -> Result<Node, CliError> {
    let NodeOpening { directory, config, lock } = opening;
    let directory = &*directory;
    if config.role == Role::Mirror && !log_directory(directory).exists() {
        return Err(CliError::new(format!("mirror {} holds nothing yet", directory.display()))
            .hint("murphy serve or murphy mount lets its source seed it"));
    }
    // Before the log is opened to be gone on with.
    check_blocks(&config.blocks, config.volume, runtime)?;
    let log = lost_tail::open(directory, &config, runtime)?;
    assemble(directory, config, lock, log, options, runtime)
}

/// Opens everything above the log.
pub(super) fn assemble(
    directory: &Path,
    config: NodeConfig,
    lock: DirectoryLock,
    log: DiskLog,
    options: &NodeOptions,
    runtime: &Handle,
) -> Result<Node, CliError> {
    assemble_above(directory, config, lock, (Arc::new(log), None), options, runtime)
}

/// The same for a log that others hold too; with a way to the source's packs, those that the own store lacks are read there.
pub(super) fn assemble_above(
    directory: &Path,
    config: NodeConfig,
    lock: DirectoryLock,
    (log, packs): (Arc<DiskLog>, Option<RemotePacks>),
    options: &NodeOptions,
    runtime: &Handle,
) -> Result<Node, CliError> {
    let keys = VolumeKeys::derive(config.volume);
    let (index, state) = match open_index(directory, &log, &keys) {
        // The index knows of more than the log has.
        Err(refused) if config.role == Role::Source && refused.is_damage() => {
            let next = log.tail().position.lsn.next();
            let fetched = lost_tail::fetch(directory, &config, &log, next, runtime);
            fetched.map_err(|error| refused.because(&error))?;
            open_index(directory, &log, &keys)?
        }
        opened => opened?,
    };
    let cache = open_cache(directory, &config, options)?;
    let identity = Identity::load_or_create(directory).map_err(failed)?;
    let ground = Ground { log, packs, index, state, cache, identity };
    assemble_on(directory, config, lock, ground, options, runtime)
}

/// Opens a node to be looked at: no file of it is changed. What its index lacks of the log goes to a copy of the index in `scratch`.
/// A log that is damaged is refused and not mended.
pub(super) fn open_to_look(
    directory: &Path,
    scratch: &Path,
    lock: DirectoryLock,
    runtime: &Handle,
) -> Result<Node, CliError> {
    let config = NodeConfig::read(directory)?;
    if config.role == Role::Mirror && (has_begun(directory) || !log_directory(directory).exists()) {
        return Err(CliError::new(format!("mirror {} is about to be seeded", directory.display()))
            .hint("murphy serve or murphy mount finishes that"));
    }
    let log = Arc::new(open_log_for(directory, &config, Access::Read)?);
    let indexed = open_index_in(scratch, directory, &log, &VolumeKeys::derive(config.volume));
    let (index, state) = indexed.map_err(|refused| lost_tail::with_way_out(&config, refused))?;
    // One without an identity gets one when it is served, not by being looked at.
    let identity = match Identity::load_existing(directory).map_err(failed)? {
        Some(identity) => identity,
        None => Identity::generate().map_err(failed)?,
    };
    let ground = Ground { log, packs: None, index, state, cache: None, identity };
    assemble_on(directory, config, lock, ground, &NodeOptions::default(), runtime)
}

/// What a node stands on.
struct Ground {
    log: Arc<DiskLog>,
    /// A way to the packs of the source.
    packs: Option<RemotePacks>,
    index: Arc<FjallIndex>,
    /// Of the index.
    state: State,
    cache: Option<Arc<DiskCache>>,
    identity: Identity,
}

fn assemble_on(
    directory: &Path,
    config: NodeConfig,
    lock: DirectoryLock,
    ground: Ground,
    options: &NodeOptions,
    runtime: &Handle,
) -> Result<Node, CliError> {
    let Ground { log, packs, index, state, cache, identity } = ground;
    let keys = VolumeKeys::derive(config.volume);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let last_time = last_time(&log, &state)?.unwrap_or_else(|| clock.wall());
    let blocks = open_blocks(&config, runtime)?;
    let volume_options = volume_options(&config, options, &*index)?;
    let mut readable: Vec<Arc<dyn BlockStore>> = vec![blocks.clone()];
    readable.extend(packs.iter().flat_map(SourceStore::ways));
    let archive_reads = Arc::new(ArchiveReads::new(Arc::clone(&index), config.clone()));
    readable.push(archive_reads.clone());
    let fetcher = PackFetcher::new(readable, CellCache::default(), cache);
    let parts = VolumeParts {
        log: Arc::clone(&log) as Arc<dyn Log>,
        index,
        state,
        last_time,
        keys: keys.clone(),
        clock,
        blocks: blocks.clone(),
        fetcher,
        runtime: runtime.clone(),
        options: volume_options,
    };
    // The flusher and the purges are spawned on the runtime.
    let _entered = runtime.enter();
    let volume = Volume::open(parts).map_err(failed)?;
    let directory = directory.to_owned();
    Ok(Node { directory, config, volume, log, keys, blocks, archive_reads, identity, _lock: lock })
}

pub(crate) fn open_log(directory: &Path, config: &NodeConfig) -> Result<DiskLog, CliError> {
    open_log_for(directory, config, Access::Write)
}

/// How the log of the node in `directory` is opened, without what is known from elsewhere. What the index lacks is read, all of it where the index has
/// to be made anew, and after a scrub that has found damage: it is mended before an index is filled from it.
pub(super) fn log_options(directory: &Path, config: &NodeConfig) -> DiskOptions {
    let mut options = DiskOptions::new(log_directory(directory), config.volume, config.branch);
    let is_damaged = scrub_notes::load(directory).is_some_and(|note| note.trouble().is_some());
    options.scrub = match is_damaged {
        true => Scrub::Everything,
        false => still_to_read(directory),
    };
    options
}

pub(super) fn open_log_for(
    directory: &Path,
    config: &NodeConfig,
    access: Access,
) -> Result<DiskLog, CliError> {
    let mut options = log_options(directory, config);
    options.known_durable = known_durable(directory)?;
    options.access = access;
    DiskLog::open(options).map_err(|error| lost_tail::with_way_out(config, told(&error)))
}

/// Why a log was not opened, with what to do.
fn told(error: &OpenError) -> CliError {
    let hint = match error {
        OpenError::Locked { .. } => "one process serves a node; murphy status shows it",
        OpenError::Empty { .. } => {
            "the log is gone: restore the node from an archive, or join it again as a mirror"
        }
        OpenError::Torn { .. } => {
            "its index knows of what came then: bring an archive or a mirror that has it within reach and start again; to go on without it, delete DIR/index"
        }
        OpenError::DamagedMiddle { .. } | OpenError::Diverged { .. } => {
            "bring an archive or a mirror that has these entries within reach (murphy serve --listen ADDR there) and start again; to go on without this node: murphy promote at a mirror (--assume-lost MEMBER gives up one that is gone), or murphy restore URL DIR --take-over; if nobody has them: murphy dump DIR FILE writes the tree as the index has it, and murphy load FILE NEW-DIR makes a volume of that"
        }
        OpenError::Header { source: HeaderError::Version { .. }, .. } => {
            "another version of murphy wrote it; use that version"
        }
        OpenError::Header { source: HeaderError::Volume { .. } | HeaderError::Branch { .. }, .. } => {
            "murphy.toml and the log are of different volumes; put back the file that belongs here"
        }
        OpenError::Header { .. } => {
            "nothing was changed; bring an archive or a mirror that has it within reach and start again; if nobody has it: murphy dump DIR FILE writes the tree as the index has it, and murphy load FILE NEW-DIR makes a volume of that"
        }
        OpenError::NotEmpty { .. } | OpenError::SegmentTooSmall { .. } | OpenError::Io { .. } => {
            "nothing was changed"
        }
    };
    let refused = failed(error).hint(hint);
    match error {
        OpenError::DamagedMiddle { .. }
        | OpenError::Diverged { .. }
        | OpenError::Torn { .. }
        | OpenError::Empty { .. } => refused.damage(),
        OpenError::Header { source, .. } => match source {
            HeaderError::Truncated { .. }
            | HeaderError::NotASegment
            | HeaderError::Checksum
            | HeaderError::Reserved { .. }
            | HeaderError::FirstLsn { .. } => refused.damage(),
            HeaderError::Version { .. }
            | HeaderError::Name { .. }
            | HeaderError::Volume { .. }
            | HeaderError::Branch { .. } => refused.wrong(),
        },
        OpenError::Locked { .. }
        | OpenError::NotEmpty { .. }
        | OpenError::SegmentTooSmall { .. }
        | OpenError::Io { .. } => refused,
    }
}

/// When the last entry of the log was decided; `None` if the log has none.
fn last_time(log: &DiskLog, state: &State) -> Result<Option<LogTime>, CliError> {
    let last = state.position.lsn;
    if last < log.first() {
        return Ok(None);
    }
    let mut frames = log.read(last).map_err(failed)?;
    let Some(frame) = frames.next().transpose().map_err(failed)? else { return Ok(None) };
    let entry = frame.iter().last().transpose().map_err(failed)?;
    Ok(entry.map(|entry| entry.time))
}

/// Refuses a block store in a directory that is not there: it may be a disk that is not mounted, and what is written in its place would be on
/// another one. And one of another volume. A cloud that does not answer is no reason not to start.
fn check_blocks(url: &StoreUrl, volume: VolumeId, runtime: &Handle) -> Result<(), CliError> {
    if url.is_file() {
        check_there(url)?;
        let opened = url.open().map_err(failed)?;
        runtime.block_on(check_prefix(&opened, volume)).map_err(|error| match error {
            ClaimPrefixError::Store { .. } => failed(error),
            error => failed(error).wrong(),
        })?;
    }
    Ok(())
}

/// Opens the block store. An archive that is not there is no reason not to start.
fn open_blocks(config: &NodeConfig, runtime: &Handle) -> Result<Arc<BlockStores>, CliError> {
    let url = &config.blocks;
    check_blocks(url, config.volume, runtime)?;
    let own: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::open(url).map_err(failed)?);
    let others = config.packs_from.iter().map(|url| {
        let packs: Arc<dyn BlockStore> = Arc::new(ArchivePacks::new(url.clone(), config.volume));
        packs
    });
    Ok(Arc::new(BlockStores::new(own, others.collect())))
}

/// The cache on disk, for a store that is far away.
fn open_cache(
    directory: &Path,
    config: &NodeConfig,
    options: &NodeOptions,
) -> Result<Option<Arc<DiskCache>>, CliError> {
    if config.blocks.is_file() && config.packs_from.iter().all(StoreUrl::is_file) {
        return Ok(None);
    }
    let configured = config.mount.cache_size.as_deref().map(parse_bytes).transpose();
    let configured = configured.map_err(|error| CliError::new(format!("murphy.toml: {error}")))?;
    let size = options.cache_size.or(configured).unwrap_or(DEFAULT_CACHE_BYTES);
    if size == 0 {
        return Ok(None);
    }
    let place = options.cache_dir.clone().or_else(|| config.mount.cache_dir.clone());
    let place = place.unwrap_or_else(|| directory.join("cache"));
    Ok(Some(Arc::new(DiskCache::open(place, size).map_err(failed)?)))
}

fn volume_options(
    config: &NodeConfig,
    options: &NodeOptions,
    index: &dyn Index,
) -> Result<VolumeOptions, CliError> {
    let configured = |text: &Option<String>| {
        let parsed = text.as_deref().map(parse_duration).transpose();
        parsed.map_err(|error| CliError::new(format!("murphy.toml: {error}")))
    };
    let usual = VolumeOptions::default();
    let flush_after = options.flush_after.or(configured(&config.mount.flush_after)?);
    let io_timeout = options.io_timeout.or(configured(&config.mount.io_timeout)?);
    let row = index.snapshot().get(&RowKey::setting(SYNC)).map_err(failed)?;
    let row = row.map(|row| SettingRow::decode(&row)).transpose().map_err(failed)?;
    Ok(VolumeOptions {
        flush_after: flush_after.unwrap_or(usual.flush_after),
        io_timeout: io_timeout.unwrap_or(usual.io_timeout),
        sync: row.is_some_and(|row| &row.text[..] == b"true"),
        ..usual
    })
}

/// The cache of a remote store unless told otherwise.
const DEFAULT_CACHE_BYTES: u64 = 10 << 30;
