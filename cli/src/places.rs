//! Archives as places: by which URL a node reaches them, and opening and making them.
//!
//! Invariants:
//! - An archive is opened only for the branch that the node is of.
//! - A directory that hangs is waited for by nobody but whoever asked for what is in it.

use murphy_backup::{Archive, ArchiveKind, ArchiveStore, Descriptor, Lineage, OpenArchiveError};
use murphy_fs::StoreUrl;
use murphy_log::{LogTime, Position};

use crate::{
    config::NodeConfig,
    error::{CliError, failed},
    settings::{SharedArchive, shared_form},
};

/// The URL by which this node reaches an archive: credentials are a local matter.
pub(crate) fn local_url(config: &NodeConfig, shared: &SharedArchive) -> Result<StoreUrl, CliError> {
    let own = config.archives.iter().find(|url| shared_form(url) == shared.url);
    match own {
        Some(url) => Ok(url.clone()),
        None => shared.url.parse().map_err(|error| failed(format!("archive {}: {error}", shared.url))),
    }
}

/// Makes the archive at `url`, which begins after `base`.
pub(crate) async fn create_archive(
    config: &NodeConfig,
    url: &StoreUrl,
    log_only: bool,
    base: Position,
    now: LogTime,
) -> Result<Archive, CliError> {
    let descriptor = Descriptor {
        lineage: Lineage { volume: config.volume, branch: config.branch },
        name: config.name.clone(),
        kind: if log_only { ArchiveKind::Log } else { ArchiveKind::Full },
        failure_domain: url.failure_domain().to_string(),
        created: now,
        base,
    };
    let to = url.clone();
    let store = murphy_log::aside(move || open_store(&to)).await?;
    let archive = Archive::create(store, descriptor).await.map_err(failed)?;
    check_kind(&archive, log_only)?;
    Ok(archive)
}

/// The archive that [`create_archive`] would find at `url`, which is refused if it holds anything else. Nothing is written.
pub(crate) async fn find_archive(
    config: &NodeConfig,
    url: &StoreUrl,
    log_only: bool,
) -> Result<Option<Archive>, CliError> {
    let at = url.clone();
    // Opening the store would make the directory.
    let open = move || match at.directory() {
        Some(directory) if !directory.exists() => Ok(None),
        _ => open_store(&at).map(Some),
    };
    let Some(store) = murphy_log::aside(open).await? else { return Ok(None) };
    let lineage = Lineage { volume: config.volume, branch: config.branch };
    let found = Archive::find(&store, lineage).await.map_err(failed)?;
    found.iter().try_for_each(|archive| check_kind(archive, log_only))?;
    Ok(found)
}

fn check_kind(archive: &Archive, log_only: bool) -> Result<(), CliError> {
    let kind = if log_only { ArchiveKind::Log } else { ArchiveKind::Full };
    match archive.descriptor().kind == kind {
        true => Ok(()),
        false => Err(CliError::new(format!("{} is an archive of the other kind already", archive.url()))),
    }
}

/// Refuses a file store whose directory is not there: opening it would make an empty one, in place of a disk that is not mounted. May take
/// long.
pub(crate) fn check_there(url: &StoreUrl) -> Result<(), CliError> {
    match url.directory() {
        Some(directory) if !directory.is_dir() => Err(CliError::new(format!("{url} is not there"))
            .hint("is its disk mounted? nothing is written in its place")),
        _ => Ok(()),
    }
}

/// The store of an archive. Makes its directory, which may take long.
pub(crate) fn open_store(url: &StoreUrl) -> Result<ArchiveStore, CliError> {
    let opened = url.open().map_err(failed)?;
    let open = if url.is_file() { ArchiveStore::in_directory } else { ArchiveStore::new };
    Ok(open(opened.store, opened.prefix, &shared_form(url)))
}

/// Opens the archive at `url`, which must be one of this volume's branch.
pub(crate) async fn open_archive(config: &NodeConfig, url: &StoreUrl) -> Result<Archive, ArchiveNotOpen> {
    let at = url.clone();
    let store = murphy_log::aside(move || check_there(&at).and_then(|()| open_store(&at))).await;
    let store = store.map_err(|error| ArchiveNotOpen::Store(error.to_string()))?;
    let lineage = Lineage { volume: config.volume, branch: config.branch };
    Ok(Archive::open_for(store, lineage).await?)
}

/// Why an archive cannot be used for now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveNotOpen {
    /// Its store cannot be opened.
    #[error("{0}")]
    Store(String),
    /// It is not the archive that it should be, or does not answer.
    #[error(transparent)]
    Archive(#[from] OpenArchiveError),
}
