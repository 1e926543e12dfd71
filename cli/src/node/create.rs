//! Making a node: everything in a directory beside the wanted one, published by a rename.
//!
//! Invariants:
//! - The wanted directory is not there, or empty, until the node in it is complete and durable.
//! - A place that is used is refused before anything is made anywhere.
//! - What was begun and failed is removed again, in the store too.

use std::path::Path;

use murphy_fs::{
    MemberRow, OpenedStore, PackNumber, StoreUrl, claim_prefix, probe_put_if_absent, release_prefix,
    remove_object,
};
use murphy_log::{
    BranchId, Clock, DiskLog, DiskOptions, Epoch, EpochId, Log, LogTime, State, SystemClock, VolumeId,
};
use tokio::runtime::Handle;

use super::{
    Node, NodeOptions, lock, log_directory, missing::call_missing, open, random, staging::Staging,
    store_place::NewPlace, turn::Turn,
};
use crate::{
    config::NodeConfig,
    error::{CliError, failed},
    places::{create_archive, find_archive},
    settings::{Settings, shared_form},
};

/// What a new volume begins with.
pub(crate) struct NewNode {
    pub(crate) blocks: StoreUrl,
    pub(crate) settings: Settings,
    /// Archives and whether they hold no packs, as this node reaches them.
    pub(crate) archives: Vec<(StoreUrl, bool)>,
}

/// Makes a new volume and its first node in `directory`.
pub(crate) fn create(directory: &Path, new: &NewNode, runtime: &Handle) -> Result<NodeConfig, CliError> {
    let staging = Staging::beside(Turn::take(directory, "murphy format")?)?;
    let (volume, branch) = (VolumeId::from_bytes(random()?), BranchId::from_bytes(random()?));
    let config = NodeConfig {
        archives: with_credentials(new.archives.iter().map(|(url, _)| url)),
        ..NodeConfig::new(volume, branch, new.settings.name.clone(), new.blocks.clone())
    };
    let stores = std::iter::once(&new.blocks).chain(new.archives.iter().map(|(url, _)| url));
    let places: Vec<NewPlace> = stores.map(NewPlace::before).collect();
    // Before anything is made, in the block store too.
    for (url, log_only) in &new.archives {
        if runtime.block_on(find_archive(&config, url, *log_only))?.is_some() {
            return Err(CliError::new(format!("{url} is an archive of this volume already")));
        }
    }
    let opened = new.blocks.open().map_err(failed)?;
    runtime
        .block_on(claim_prefix(&opened, config.volume))
        .map_err(|error| failed(error).hint("every volume has a prefix of its own: give another --blocks"))?;
    let mut begun: Vec<OpenedStore> = Vec::new();
    let made = (|| {
        let label = |error| failed(error).hint("the store must honour put-if-absent (S3 If-None-Match)");
        runtime.block_on(probe_put_if_absent(&*opened.store, &opened.prefix)).map_err(label)?;
        let epoch = begin(&staging.path, &config, new, runtime)?;
        let now = SystemClock::new().wall();
        for (url, log_only) in &new.archives {
            let base = State::origin(epoch).position;
            runtime.block_on(create_archive(&config, url, *log_only, base, now))?;
            begun.push(url.open().map_err(failed)?);
        }
        staging.publish()
    })();
    if let Err(error) = made {
        for opened in &begun {
            if let Err(left) = runtime.block_on(remove_object(opened, ARCHIVE_DESCRIPTOR)) {
                tracing::warn!(error = %left, "an archive that was begun stays");
            }
        }
        if let Err(left) = runtime.block_on(release_prefix(&opened, config.volume)) {
            tracing::warn!(error = %left, "the mark of the unfinished volume stays in the block store");
        }
        return Err(error);
    }
    places.into_iter().for_each(NewPlace::keep);
    Ok(config)
}

/// Writes the log's first entries and everything else, and closes it all again.
fn begin(directory: &Path, config: &NodeConfig, new: &NewNode, runtime: &Handle) -> Result<Epoch, CliError> {
    config.write(directory)?;
    let epoch = Epoch { number: 1, id: EpochId::from_bytes(random()?) };
    let options = DiskOptions::new(log_directory(directory), config.volume, config.branch);
    let lock = lock(directory)?;
    let log = DiskLog::create(options, State::origin(epoch)).map_err(failed)?;
    let node = open::assemble(directory, config.clone(), lock, log, &NodeOptions::default(), runtime)?;
    node.log.claim(epoch).map_err(failed)?;
    let _entered = runtime.enter();
    node.volume.lead(epoch, Some(&new.settings.genesis()?)).map_err(failed)?;
    close(&node, runtime)?;
    Ok(epoch)
}

/// The archives whose shared form is not enough.
fn with_credentials<'a>(urls: impl Iterator<Item = &'a StoreUrl>) -> Vec<StoreUrl> {
    urls.filter(|url| shared_form(url) != url.to_string()).cloned().collect()
}

fn close(node: &Node, runtime: &Handle) -> Result<(), CliError> {
    let closed = runtime.block_on(node.volume.close());
    closed.map_err(|errno| CliError::new(format!("the first entries cannot be written: {errno:?}")))
}

/// What a copy goes on from.
pub(crate) struct CopyOf {
    /// The tree that it begins with; the index and the base in the directory hold it.
    pub(crate) state: State,
    /// Of a successor: the log time of the last entry that it continues.
    pub(crate) not_before: LogTime,
    /// The epoch that it begins.
    pub(crate) epoch: Epoch,
    /// A copy is a branch of its own, without archives; a successor keeps what it takes over.
    pub(crate) is_successor: bool,
    /// Which packs of the tree it lacks: its tree calls them missing from its beginning on.
    pub(crate) lacking: Vec<PackNumber>,
}

/// Begins the log of a copy in `directory`, which has everything else, and opens it. `config` is as it is while the directory has its
/// temporary name.
pub(crate) fn begin_copy(
    directory: &Path,
    config: &NodeConfig,
    copy: &CopyOf,
    runtime: &Handle,
) -> Result<Node, CliError> {
    let options = DiskOptions::new(log_directory(directory), config.volume, config.branch);
    let lock = lock(directory)?;
    let log = DiskLog::create(options, copy.state).map_err(failed)?;
    let node = open::assemble(directory, config.clone(), lock, log, &NodeOptions::default(), runtime)?;
    node.log.claim(copy.epoch).map_err(failed)?;
    let _entered = runtime.enter();
    // The log is empty: nothing else knows of a source whose clock was ahead. The first entry does.
    node.volume.not_before(copy.not_before);
    node.volume.lead(copy.epoch, None).map_err(failed)?;
    if !copy.is_successor {
        let changed = runtime.block_on(node.volume.change_settings(Settings::of_copy(&config.name)).wait());
        changed.map_err(|errno| {
            CliError::new(format!("the settings of the copy cannot be written: {errno:?}"))
        })?;
        forget_members(&node, runtime)?;
    }
    runtime.block_on(call_missing(&node, &copy.lacking))?;
    close(&node, runtime)?;
    Ok(node)
}

/// Whoever follows the source, or was invited to, has no part in a copy of it.
fn forget_members(node: &Node, runtime: &Handle) -> Result<(), CliError> {
    let members = node.volume.members().map_err(failed)?;
    for some in members.chunks(MEMBERS_AT_ONCE) {
        let gone: Vec<_> = some.iter().map(|(member, _)| (*member, None)).collect();
        let Some((first, _)) = gone.first().cloned() else { continue };
        let change = move |_: Option<&MemberRow>, _| Ok::<_, std::convert::Infallible>(gone.clone());
        let changed = runtime.block_on(node.volume.change_members(first, change).wait());
        match changed {
            Ok(Ok(())) => {}
            Ok(Err(never)) => match never {},
            Err(errno) => {
                let text = format!("the members of the source cannot be removed from the copy: {errno:?}");
                return Err(CliError::new(text));
            }
        }
    }
    Ok(())
}

/// Members that one entry forgets; an entry has room for several times as many.
const MEMBERS_AT_ONCE: usize = 1000;
/// What makes a prefix an archive.
const ARCHIVE_DESCRIPTOR: &str = "murphy.json";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The fear: the clock of a source was a year ahead; whoever takes over from its archives dates its entries before those that it continues, and no
    /// moment of either can be found by its time.
    #[test]
    fn a_successor_dates_nothing_before_what_it_continues() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, blocks) = (folder.path().join("node"), folder.path().join("blocks"));
        for made in [&directory, &blocks] {
            std::fs::create_dir(made).unwrap();
        }
        let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
        let blocks = StoreUrl::from_directory(&blocks).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(claim_prefix(&blocks.open().unwrap(), volume)).unwrap();
        let config = NodeConfig::new(volume, branch, "vol".to_owned(), blocks);
        config.write(&directory).unwrap();
        let epoch = |number| Epoch { number, id: EpochId::from_bytes([9; 16]) };
        let not_before = SystemClock::new().wall().after(Duration::from_secs(31_536_000));
        let copy = CopyOf {
            state: State::origin(epoch(1)),
            not_before,
            epoch: epoch(2),
            is_successor: true,
            lacking: Vec::new(),
        };
        let node = begin_copy(&directory, &config, &copy, runtime.handle()).unwrap();
        let frames: Vec<_> = node.log.read(node.log.first()).unwrap().map(Result::unwrap).collect();
        let times = frames.iter().flatten().map(|entry| entry.unwrap().time);
        let times: Vec<LogTime> = times.collect();
        assert!(!times.is_empty() && times.iter().all(|time| *time >= not_before), "{times:?}");
        assert!(node.volume.log_time_ahead_ms() > 0);
    }
}
