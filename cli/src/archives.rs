//! The archives of a running source: one shipper each, what they say of themselves, and who may acknowledge an fsync.
//!
//! Invariants:
//! - An archive that does not answer is shown and tried again; it never keeps the node from serving, unless an fsync waits for it.
//! - Only a full archive outside the failure domains of the node and of its block store acknowledges.
//! - A fence at any archive ends the node, and so does an archive that holds entries of its epoch which its log lacks.

mod abandon;
mod acknowledge;
mod fence;
mod join;
mod shipping;

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize},
    },
    time::Duration,
};

use murphy_backup::{
    Archive, Boundary, NewBase, Proof, SaveCursor, ShipEnd, ShipHandle, check_continued_by, write_base,
};
use murphy_fs::{IndexSnapshot, Sealed, StoreUrl, Volume};
use murphy_log::{Clock, Files, Log, LogTime, Lsn, OsFiles, Position, SystemClock};
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    archive_notes::{cursor, cursors},
    config::NodeConfig,
    error::{CliError, at, failed},
    node::Node,
    places::{create_archive, find_archive, local_url, open_archive},
    settings::{Settings, SharedArchive, shared_form},
    status::{ArchiveStatus, ProofStatus},
};
pub(crate) use abandon::Abandoning;
pub(crate) use acknowledge::{acknowledge_as_set, by_archives, check_outlives};
pub(crate) use fence::{check_fences, refuse_fenced};
pub(crate) use join::Leaving;

/// The archives that a node ships to.
pub(crate) struct Archives {
    context: Arc<Context>,
    shipped: Mutex<Vec<Shipped>>,
    /// Held while the shared list of archives is read and changed.
    changing: tokio::sync::Mutex<()>,
    /// How many times archives were removed, or came to acknowledge nothing otherwise; counted while the list is changed.
    removals: AtomicU64,
}

/// What every shipper needs of the node.
struct Context {
    config: NodeConfig,
    directory: PathBuf,
    volume: Volume,
    log: Arc<dyn Log>,
    packs: Arc<dyn murphy_fs::BlockStore>,
    node: murphy_log::NodeId,
    clock: Arc<dyn Clock>,
    runtime: tokio::runtime::Handle,
    /// Counts whatever changes who may acknowledge.
    changes: watch::Sender<u64>,
}

impl Context {
    /// Lets every fsync that waits look anew who may acknowledge it.
    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// One archive.
struct Shipped {
    shared: SharedArchive,
    /// Whether the list has it no more: it acknowledges nothing from then on, least of all its own removal, and still is a witness.
    is_removed: bool,
    /// So many orders are about to take it off the list: it acknowledges nothing by then, so that the others have all that it has acknowledged.
    leaving: Arc<AtomicUsize>,
    url: StoreUrl,
    state: Arc<Mutex<ShipState>>,
    /// The entry that names it does not come behind that.
    named: Lsn,
    /// How far it was when this node last noted it: what is known of it until it answers.
    noted: Option<Boundary>,
    task: JoinHandle<()>,
}

/// How it does, as far as its own status does not say.
#[derive(Default)]
struct ShipState {
    handle: Option<ShipHandle>,
    error: Option<String>,
    /// The newest proof in it, once it was asked.
    proof: Option<Option<Proof>>,
}

impl Archives {
    /// The archives of an open node; none is shipped to yet.
    pub(crate) fn new(node: &Node, runtime: tokio::runtime::Handle) -> Archives {
        let context = Context {
            config: node.config.clone(),
            directory: node.directory.clone(),
            volume: node.volume.clone(),
            log: Arc::clone(&node.log) as Arc<dyn Log>,
            packs: node.blocks.clone(),
            node: node.identity.public_key().node(),
            clock: Arc::new(SystemClock::new()),
            runtime,
            changes: watch::Sender::default(),
        };
        Archives {
            context: Arc::new(context),
            shipped: Mutex::default(),
            changing: Default::default(),
            removals: AtomicU64::default(),
        }
    }

    /// The volume that is shipped.
    pub(crate) fn volume(&self) -> &Volume {
        &self.context.volume
    }

    /// Where the shippers run.
    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.context.runtime
    }

    fn shipped(&self) -> MutexGuard<'_, Vec<Shipped>> {
        // A list is whole after every operation on it.
        self.shipped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to ship to these archives, all at once: none of them acknowledges anything before all of them are asked who else ships there. An error
    /// names those that cannot be shipped to; the others are.
    pub(crate) fn start_all(&self, archives: Vec<SharedArchive>) -> Result<(), CliError> {
        let begin = |shared: SharedArchive| {
            let url = local_url(&self.context.config, &shared)?;
            self.begin(shared, url)
        };
        let mut errors = Vec::new();
        let begun = archives.into_iter().filter_map(|shared| {
            let url = shared.url.clone();
            begin(shared).map_err(|error| errors.push(format!("{url}: {error}"))).ok()
        });
        let begun: Vec<Shipped> = begun.collect();
        self.shipped().extend(begun);
        self.context.changed();
        if errors.is_empty() { Ok(()) } else { Err(CliError::new(errors.join("; "))) }
    }

    /// Begins to ship to an archive that was added, with the URL by which this node reaches it.
    pub(crate) fn start_at(&self, shared: SharedArchive, url: StoreUrl) -> Result<(), CliError> {
        // One that was taken out and could not be waited for is still there.
        self.stop(&shared.url);
        let begun = self.begin(shared, url)?;
        self.shipped().push(begun);
        self.context.changed();
        Ok(())
    }

    fn begin(&self, shared: SharedArchive, url: StoreUrl) -> Result<Shipped, CliError> {
        let folder = cursors(&self.context.directory);
        OsFiles.create_dir(&folder).map_err(at(&folder))?;
        let noted = cursor(&self.context.directory, &shared).load().unwrap_or_else(|error| {
            tracing::warn!(url = shared.url, %error, "how far an archive is is not known before it answers");
            None
        });
        let state = Arc::new(Mutex::new(ShipState::default()));
        // The file as it is now: the node may have been promoted after it was opened.
        let config = NodeConfig::read(&self.context.directory)?;
        let is_given_up = config.archives_given_up.contains(&shared.url);
        // Entries may be decided, and wait to be acknowledged, before the archive is open.
        let began = self.context.log.tail().position.lsn;
        let to = shipping::Destination { shared: shared.clone(), url: url.clone(), is_given_up, began };
        let shipping = shipping::ship(Arc::clone(&self.context), to, Arc::clone(&state));
        let task = self.context.runtime.spawn(shipping);
        let (is_removed, leaving) = Default::default();
        Ok(Shipped { shared, is_removed, leaving, url, state, named: began, noted, task })
    }

    /// Whether an archive has said since it is shipped to how far it holds this node's history.
    pub(crate) fn has_answered(&self, url: &str) -> bool {
        self.shipped().iter().filter(|shipped| shipped.shared.url == url).any(|shipped| {
            shipped.state().handle.as_ref().is_some_and(|handle| handle.status().archived.is_some())
        })
    }

    /// The same once it had time for it.
    pub(crate) async fn answers(&self, url: &str, at_most: Duration) -> bool {
        let answered = async {
            while !self.has_answered(url) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(at_most, answered).await.is_ok()
    }

    /// Whether an archive is shipped to.
    pub(crate) fn ships_to(&self, url: &str) -> bool {
        self.shipped().iter().any(|shipped| shipped.shared.url == url)
    }

    /// Stops shipping to an archive; what it holds stays.
    pub(crate) fn stop(&self, url: &str) {
        self.shipped().retain(|shipped| {
            let stays = shipped.shared.url != url;
            if !stays {
                shipped.task.abort();
            }
            stays
        });
        self.context.changed();
    }

    /// Makes an archive that begins at the state of now, with a snapshot and every pack.
    pub(crate) fn create(&self, url: &StoreUrl, log_only: bool) -> Result<SharedArchive, CliError> {
        let context = &self.context;
        let view = context.volume.view_with_state();
        let position = view.state().ok_or_else(|| CliError::new("the volume has no state yet"))?.position;
        context.runtime.block_on(async {
            let now = context.clock.wall();
            let mut archive = create_archive(&context.config, url, log_only, position, now).await?;
            if archive.descriptor().base != position && shipping::is_unfinished(&archive).await? {
                archive = archive.begin_again(position, now).await.map_err(failed)?;
            }
            // One that was removed and is added again goes on where it ended.
            if archive.descriptor().base == position {
                let held = Boundary::after(position);
                shipping::write_base_of(context, &archive, view, held).await?;
                // From here on it has everything up to there, whether it is shipped to at once or when the node is served.
                let folder = cursors(&context.directory);
                OsFiles.create_dir(&folder).map_err(at(&folder))?;
                let shared = SharedArchive::new(shared_form(url), log_only);
                cursor(&context.directory, &shared).save(&held).map_err(failed)?;
            } else {
                shipping::check_begun(&archive).await?;
                check_continued(&archive, &context.log).await?;
            }
            Ok::<_, CliError>(())
        })?;
        Ok(SharedArchive::new(shared_form(url), log_only))
    }

    /// Refuses what [`Archives::create`] would find there and refuse, and writes nothing.
    pub(crate) fn check_new(&self, url: &StoreUrl, log_only: bool) -> Result<(), CliError> {
        let context = &self.context;
        context.runtime.block_on(async {
            match find_archive(&context.config, url, log_only).await? {
                Some(archive) => {
                    if !shipping::is_unfinished(&archive).await? {
                        shipping::check_begun(&archive).await?;
                    }
                    check_continued(&archive, &context.log).await
                }
                None => Ok(()),
            }
        })
    }

    /// Writes a snapshot of now into an archive; returns its position.
    pub(crate) fn snapshot(&self, url: &str) -> Result<Position, CliError> {
        let found = self.shipped().iter().find(|one| one.shared.url == url).map(|one| {
            let handle = one.state().handle.clone();
            (one.url.clone(), handle)
        });
        let context = &self.context;
        context.runtime.block_on(async {
            if let Some((url, handle)) = found {
                let archive = open_archive(&context.config, &url).await.map_err(failed)?;
                let handle = handle.ok_or_else(|| CliError::new(format!("{url} does not answer")))?;
                return shipping::write_base_now(context, &archive, &handle).await;
            }
            let shared = SharedArchive::new(url.to_owned(), false);
            let archive = open_archive(&context.config, &local_url(&context.config, &shared)?).await;
            let archive = archive.map_err(failed)?;
            let walked = murphy_backup::walk(&archive, None).await.map_err(failed)?;
            let view = context.volume.view_with_state();
            shipping::write_base_of(context, &archive, view, walked.end).await
        })
    }

    /// How each archive does.
    pub(crate) fn status(&self) -> Vec<ArchiveStatus> {
        let now = self.context.clock.wall();
        self.shipped().iter().map(|shipped| shipped.status(now)).collect()
    }

    /// Who has taken over, if an archive says that somebody has: where it was sealed, and how people are told.
    pub(crate) fn fenced(&self) -> Option<(Sealed, String)> {
        self.shipped().iter().find_map(|shipped| {
            let state = shipped.state();
            match state.handle.as_ref()?.status().end {
                Some(ShipEnd::Fenced(sealed)) => {
                    let reason = fence::sealed(&shipped.shared, &sealed);
                    Some((sealed, reason))
                }
                _ => None,
            }
        })
    }

    /// What an archive holds of this node's epoch and its log does not, if one has said so since the start: the node was asked to go on while it
    /// did not answer.
    pub(crate) fn lost(&self) -> Option<String> {
        self.shipped().iter().find_map(|shipped| {
            let end = shipped.state().handle.as_ref()?.status().end?;
            match &end {
                // One that was given up when this node took over may go further in an epoch that is over.
                ShipEnd::Ahead { held, .. } => {
                    (held.epoch == self.context.volume.state().position.epoch).then(|| end.to_string())
                }
                ShipEnd::Stray { .. } | ShipEnd::BrokenSeal { .. } => Some(end.to_string()),
                _ => None,
            }
        })
    }

    /// Returns when every archive of the volume holds everything up to `lsn`.
    pub(crate) async fn all_hold(&self, lsn: Lsn, at_most: Duration) -> Result<(), CliError> {
        let lacking = self.lacking_after(lsn, at_most).await?;
        if lacking.is_empty() {
            return Ok(());
        }
        let lacking: Vec<_> = lacking.iter().map(|(url, why)| format!("{url} ({why})")).collect();
        Err(CliError::new(format!("not every archive has lsn {lsn}: {}", lacking.join("; "))))
    }

    /// The archives of the volume that do not hold everything up to `lsn` once they had time for it, by URL, and why.
    pub(crate) async fn lacking_after(
        &self,
        lsn: Lsn,
        at_most: Duration,
    ) -> Result<Vec<(String, String)>, CliError> {
        let mut waited = Duration::ZERO;
        loop {
            let lacking = self.lacking(lsn, &Settings::of(&self.context.volume)?.archives);
            if lacking.is_empty() || waited >= at_most {
                return Ok(lacking);
            }
            tokio::time::sleep(LOOK).await;
            waited += LOOK;
        }
    }

    /// Those of `archives` that are not known to hold everything up to `lsn`, by URL, and why.
    pub(crate) fn lacking(&self, lsn: Lsn, archives: &[SharedArchive]) -> Vec<(String, String)> {
        let shipped = self.shipped();
        let lacks = |shared: &SharedArchive| {
            let Some(found) = shipped.iter().find(|one| one.shared.url == shared.url) else {
                return Some((shared.url.clone(), "it is not shipped to".to_owned()));
            };
            let status = found.status(self.context.clock.wall());
            let why = status.error.unwrap_or_else(|| format!("it is at lsn {}", status.lsn));
            (status.lsn < lsn.get()).then(|| (shared.url.clone(), why))
        };
        archives.iter().filter_map(lacks).collect()
    }

    /// Nobody changes the list of archives while this is held.
    pub(crate) async fn unchanged(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.changing.lock().await
    }

    /// Gives the archives a moment to hold everything up to `lsn`, and says which do not.
    pub(crate) fn settle(&self, lsn: Lsn, at_most: Duration) -> Vec<String> {
        let handles: Vec<_> = self
            .shipped()
            .iter()
            .filter_map(|shipped| Some((shipped.shared.url.clone(), shipped.state().handle.clone()?)))
            .collect();
        self.context.runtime.block_on(async {
            let waits = handles.into_iter().map(|(url, handle)| async move {
                let held = tokio::time::timeout(at_most, handle.archived(lsn)).await;
                (!matches!(held, Ok(Ok(_)))).then_some(url)
            });
            futures::future::join_all(waits).await.into_iter().flatten().collect()
        })
    }
}

/// Refuses an archive that is there already and holds what this log does not lead on from.
async fn check_continued(archive: &Archive, log: &Arc<dyn Log>) -> Result<(), CliError> {
    check_continued_by(archive, log).await.map_err(|error| {
        failed(error).hint("it belongs to a history that lost, or to a copy: give the archive another prefix")
    })
}

impl Drop for Archives {
    fn drop(&mut self) {
        self.shipped().drain(..).for_each(|shipped| shipped.task.abort());
    }
}

impl Shipped {
    fn state(&self) -> MutexGuard<'_, ShipState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self, now: LogTime) -> ArchiveStatus {
        let state = self.state();
        let mut status = ArchiveStatus {
            url: self.shared.url.clone(),
            log_only: self.shared.log_only,
            domain: self.url.failure_domain().to_string(),
            lsn: self.noted.map_or(0, |held| held.position.lsn.get()),
            lag_ms: None,
            error: state.error.clone(),
            proof: state.proof.iter().flatten().next().map(|proof| ProofStatus::of(proof, now)),
            never_proven: state.proof.as_ref().is_some_and(Option::is_none),
        };
        if self.shared.joining {
            status.error.get_or_insert_with(|| JOINING.to_owned());
        }
        if let Some(handle) = &state.handle {
            let shipped = handle.status();
            if let Some(held) = shipped.archived {
                status.lsn = held.position.lsn.get();
                status.lag_ms = Some(shipped.lag_ms);
            }
            let end = shipped.end.map(|end| match end {
                ShipEnd::Gap { .. } => format!("{end}; {STRANDED}"),
                ShipEnd::Lost(_) => format!("{end}; {GIVEN_UP}"),
                end => end.to_string(),
            });
            status.error = status.error.or(end).or(shipped.error);
        }
        status
    }
}

const LOOK: Duration = Duration::from_millis(100);
/// What to do about an archive that nobody can bring up to this log.
const STRANDED: &str = "what it holds stays restorable; to go on, murphy archive remove (--assume-lost if fsync waits for it), and murphy archive \
    add at another prefix, which begins with a snapshot";
/// What to do about an archive that was given up and is another one's.
const GIVEN_UP: &str = "it was given up when this node took over, so that nothing is shipped there; murphy archive remove --assume-lost takes it out of the volume";
/// What the status of an archive says that acknowledges nothing yet.
const JOINING: &str = "it acknowledges nothing before another archive that does, or every archive and every mirror, has the entry that added it";

/// What is known of the archives of a node that is not served.
pub(crate) fn status_at_rest(node: &Node, shared: &[SharedArchive]) -> Result<Vec<ArchiveStatus>, CliError> {
    shared
        .iter()
        .map(|shared| {
            let url = local_url(&node.config, shared)?;
            let (held, error) = match cursor(&node.directory, shared).load() {
                Ok(held) => (held, None),
                Err(error) => (None, Some(error.to_string())),
            };
            Ok(ArchiveStatus {
                url: shared.url.clone(),
                log_only: shared.log_only,
                domain: url.failure_domain().to_string(),
                lsn: held.map_or(0, |held| held.position.lsn.get()),
                lag_ms: None,
                error,
                proof: None,
                never_proven: false,
            })
        })
        .collect()
}
