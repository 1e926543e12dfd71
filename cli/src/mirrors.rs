//! A node among other nodes: what it is to them, who may connect, whom it follows.
//!
//! ```text
//!   mirrors.rs          starting and stopping, status        mirrors/following   the mirror's part: log, packs
//!   mirrors/book        members, as entries                  mirrors/leading     the source's part: who acknowledges
//!   mirrors/replica     a mirror's node on disk              mirrors/promotion   from mirror to source
//!   mirrors/snapshots   what new mirrors begin with          mirrors/stale       a source that was replaced
//!   mirrors/gathering   bytes that a promotion lacked       mirrors/membership  a member's word to and from its source
//!   mirrors/lost        a source that has lost what mirrors hold
//!   mirrors/removal     a member that is taken out          mirrors/succession  whom mirrors follow after a promotion
//!   mirrors/rejoin      a mirror that joins as a member  mirrors/level       what an fsync waits for
//! ```
//!
//! Invariants:
//! - A node whose successor is known decides nothing any more, in this process or a later one.
//! - A mirror leads only after its log has been claimed for an epoch that nobody else has.

mod book;
mod following;
mod gathering;
mod heard;
mod leading;
mod level;
mod lost;
mod mandate;
mod membership;
mod promotion;
mod rejoin;
mod removal;
mod replica;
mod snapshots;
mod stale;
#[cfg(test)]
pub(crate) mod steps;
mod succession;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use murphy_fs::{BlockStores, MemberRole, Sealed, Volume};
use murphy_log::{Clock, DiskLog, Epoch, Log, Lsn, SystemClock, VolumeKeys};
use murphy_mirror::{
    Dialer, GatherStatus, Identity, Leader, Listener, MemberBook, MirrorAcknowledger, NetworkOptions, Part,
    RemotePacks, Secret, Services, Token, UdpSockets,
};
use tokio::{runtime::Handle, sync::watch};

use crate::{
    archive_reads::ArchiveReads,
    archives::{Archives, check_fences, refuse_fenced},
    config::{NodeConfig, Promoted, Role},
    error::{CliError, failed},
    givers::dialer,
    node::{Node, NodeOpening, NodeOptions, failure_domain},
    replaced::{list_behind, refuse_branch},
    settings::Settings,
    status::{MirrorStatus, PackStatus, SilentStoreStatus, SourceStatus, Status},
};
use book::VolumeBook;
use following::Followed;
pub(crate) use membership::keep_proof;
use membership::load_proof;
pub(crate) use promotion::PromoteOrder;
pub(crate) use rejoin::Rejoining;
pub(crate) use removal::MemberStatus;
use replica::DiskReplica;

/// A node's part among others.
pub(crate) struct Mirroring {
    directory: PathBuf,
    runtime: Handle,
    clock: Arc<dyn Clock>,
    keys: VolumeKeys,
    identity: Arc<Identity>,
    dialer: Dialer,
    services: Arc<Services>,
    book: Arc<VolumeBook>,
    volume: Volume,
    log: Arc<DiskLog>,
    blocks: Arc<BlockStores>,
    archive_reads: Arc<ArchiveReads>,
    config: Mutex<NodeConfig>,
    listen: Option<SocketAddr>,
    replica: Option<Arc<DiskReplica>>,
    followed: Mutex<Option<Followed>>,
    /// The packs of whoever is followed.
    packs: RemotePacks,
    /// The last LSN heard of while a source was followed.
    heard: Mutex<Option<Lsn>>,
    acknowledger: Mutex<Option<Arc<MirrorAcknowledger>>>,
    /// The archives that this node ships to, once it does.
    archives: OnceLock<Weak<Archives>>,
    /// Whom this mirror is to follow, once somebody leads the epoch that it has promised.
    leader: Arc<watch::Sender<Option<Leader>>>,
    /// Held by a promotion, and while this mirror goes over to another source.
    turn: Mutex<()>,
    /// Held while the set that acknowledges is read and changed.
    set_turn: tokio::sync::Mutex<()>,
    /// How many orders want their turn that wait for nobody: those that wait for somebody end.
    overtaking: watch::Sender<u32>,
    /// How far the gathering of packs is, on a source.
    gathering: Mutex<Option<watch::Receiver<GatherStatus>>>,
    /// Why this source has to stop, once it was replaced.
    fenced: Mutex<Option<String>>,
    /// The same once a mirror holds what it has lost.
    lost: Mutex<Option<String>>,
    /// Up to where mirrors are noted to hold the log.
    noted: Mutex<Lsn>,
    stop: watch::Sender<bool>,
}

/// What a node is opened with.
pub(crate) struct Opened {
    pub(crate) node: Node,
    replica: Option<Arc<DiskReplica>>,
    followed: Option<Followed>,
}

/// Opens the node in `directory` to serve it. A mirror that holds nothing is seeded first; `given_up` ends the waiting.
pub(crate) fn open(
    directory: &Path,
    options: &NodeOptions,
    runtime: &Handle,
    given_up: impl Future<Output = ()>,
) -> Result<Option<Opened>, CliError> {
    let config = NodeConfig::read(directory)?;
    stale::refuse(directory, &config)?;
    refuse_branch(directory, &config)?;
    if config.role == Role::Source {
        // What only its log holds is not written to any more.
        refuse_fenced(directory)?;
        let node = Node::open(directory, options, runtime)?;
        return Ok(Some(Opened { node, replica: None, followed: None }));
    }
    let opening = NodeOpening::begin(directory)?;
    let replica = Arc::new(DiskReplica::open(directory, &opening.config, runtime)?);
    let identity = Arc::new(Identity::load_or_create(directory).map_err(failed)?);
    let followed =
        Followed::start(&opening.config, &replica, (dialer(&identity), RemotePacks::default()), runtime)?;
    let seeded = runtime.block_on(async {
        tokio::select! {
            seeded = followed.seeded(&replica) => seeded.map(|()| true),
            () = given_up => Ok(false),
        }
    })?;
    let log = replica.use_log();
    let (true, Some(log)) = (seeded, log) else {
        followed.stop(runtime);
        return Ok(None);
    };
    let node = Node::open_mirror(opening, log, followed.packs.clone(), options, runtime)?;
    Ok(Some(Opened { node, replica: Some(replica), followed: Some(followed) }))
}

/// Opens the node in `directory` for one command, which may make it the source.
pub(crate) fn at_rest(node: &Node, runtime: &Handle) -> Result<Mirroring, CliError> {
    let replica = match node.config.role {
        Role::Source => None,
        Role::Mirror => {
            let replica = DiskReplica::above(&node.directory, &node.config, Some(Arc::clone(&node.log)))?;
            following::load_data_position(&node.directory, &node.log, &replica.data_sender())?;
            Some(Arc::new(replica))
        }
    };
    Mirroring::new(node, replica, None, None, runtime)
}

impl Mirroring {
    /// Takes the node's place among others: leads or follows, and listens if that is wanted.
    pub(crate) fn start(
        opened: Opened,
        listen: Option<SocketAddr>,
        runtime: &Handle,
    ) -> Result<(Node, Arc<Mirroring>), CliError> {
        let Opened { node, replica, followed } = opened;
        let listener = listen.map(|address| (address, NetworkOptions::default()));
        let mirroring = Arc::new(Mirroring::new(&node, replica, followed, listener, runtime)?);
        match node.config.role {
            Role::Source => {
                mirroring.ask_members(&node, &BTreeSet::new())?;
                check_fences(&node, &Settings::of(&node.volume)?.archives, runtime)?;
                let _entered = runtime.enter();
                node.lead()?;
                let epoch = node.log.recovery().epoch;
                mirroring.begin_leading(epoch)?;
            }
            Role::Mirror => {
                node.volume.follow().map_err(failed)?;
                mirroring.begin_copying()?;
                mirroring.begin_announcing()?;
                mirroring.begin_going_over();
            }
        }
        Ok((node, mirroring))
    }

    fn new(
        node: &Node,
        replica: Option<Arc<DiskReplica>>,
        followed: Option<Followed>,
        listen: Option<(SocketAddr, NetworkOptions)>,
        runtime: &Handle,
    ) -> Result<Mirroring, CliError> {
        // Only a node that is looked at may have none, and gets none by that.
        let identity = match Identity::load_existing(&node.directory).map_err(failed)? {
            Some(identity) => Arc::new(identity),
            None => Arc::new(Identity::generate().map_err(failed)?),
        };
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let book = Arc::new(VolumeBook::new(node.volume.clone()));
        let (keys, branch) = (node.keys.clone(), node.config.branch);
        let members = Arc::clone(&book) as Arc<dyn MemberBook>;
        let mut services = Services::new(keys.clone(), branch, identity.node(), Arc::clone(&clock), members);
        services.packs = Some(node.blocks.clone());
        services.identity = Some(Arc::clone(&identity));
        services.set_proof(load_proof(&node.directory)?);
        let services = Arc::new(services);
        // The source before may ask as well: it hears that it was replaced.
        let before = node.config.promoted.as_ref().map(|promoted| &promoted.from);
        if let Some(source) = node.config.source.as_ref().or(before) {
            services.set_source_key(source.key);
        }
        let leader = Arc::new(watch::Sender::new(None));
        if let (Some(replica), Some(followed)) = (&replica, &followed) {
            services.become_part(Part::Mirror(followed.part(replica, &leader)));
        }
        let stop = watch::Sender::new(false);
        let mut bound = None;
        if let Some((address, options)) = listen {
            let _entered = runtime.enter();
            let services = Arc::clone(&services);
            let listener = Listener::bind(&identity, &UdpSockets, address, &options, services);
            let listener = listener.map_err(failed)?;
            bound = Some(listener.local_addr().map_err(failed)?);
            runtime.spawn(listener.run(stop.subscribe()));
        }
        Ok(Mirroring {
            directory: node.directory.clone(),
            runtime: runtime.clone(),
            clock,
            keys,
            dialer: dialer(&identity),
            identity,
            services,
            book,
            volume: node.volume.clone(),
            log: Arc::clone(&node.log),
            blocks: Arc::clone(&node.blocks),
            archive_reads: Arc::clone(&node.archive_reads),
            config: Mutex::new(node.config.clone()),
            listen: bound,
            replica,
            packs: followed.as_ref().map(|followed| followed.packs.clone()).unwrap_or_default(),
            followed: Mutex::new(followed),
            heard: Mutex::default(),
            acknowledger: Mutex::default(),
            archives: OnceLock::new(),
            leader,
            turn: Mutex::default(),
            set_turn: tokio::sync::Mutex::default(),
            overtaking: watch::Sender::new(0),
            gathering: Mutex::default(),
            fenced: Mutex::default(),
            lost: Mutex::default(),
            noted: Mutex::default(),
            stop,
        })
    }

    /// Whether it follows a source now.
    pub(crate) fn is_mirror(&self) -> bool {
        self.config().role == Role::Mirror
    }

    /// Refuses what only a source can do, on a mirror and on a source that was replaced.
    pub(crate) fn check_source(&self) -> Result<(), CliError> {
        let config = self.config().clone();
        stale::refuse(&self.directory, &config)?;
        if config.role == Role::Mirror {
            return Err(CliError::new("this node is a mirror, and changes nothing by itself")
                .hint("run the command at the source"));
        }
        Ok(())
    }

    /// Why the source has to stop, if somebody has replaced it.
    pub(crate) fn fenced(&self) -> Option<String> {
        if let Some(why) = lock(&self.fenced).clone() {
            return Some(why);
        }
        let epoch = self.services.board.fenced_by()?;
        if self.is_mirror() {
            return None;
        }
        let why = stale::fence(self, epoch);
        *lock(&self.fenced) = Some(why.clone());
        Some(why)
    }

    /// Finds out what only this node holds, once it was replaced. Blocks.
    pub(crate) fn find_branch(&self) {
        if lock(&self.fenced).is_some()
            && let Err(error) = stale::find_branch(self)
        {
            tracing::warn!(%error, "what only this node holds is not listed");
        }
    }

    /// Lists what only this source holds, once an archive says that it was `sealed`.
    pub(crate) fn note_sealed(&self, sealed: &Sealed) {
        let mut listed = self.config().clone();
        let noted = list_behind(&mut listed, &self.log, sealed);
        let noted = noted.and_then(|()| self.change_config(|config| config.branches = listed.branches));
        if let Err(error) = noted {
            tracing::warn!(%error, "what only this node holds is not listed");
        }
    }

    /// Why the process has to begin anew, if it has to: only a mirror's log is replaced.
    pub(crate) fn restart(&self) -> Option<String> {
        self.replica
            .as_ref()
            .filter(|_| self.is_mirror())
            .and_then(|replica| replica.restart().borrow().clone())
    }

    /// Why the mirror cannot go on, if that is so.
    pub(crate) fn broken(&self) -> Option<String> {
        lock(&self.followed).as_ref().and_then(Followed::broken)
    }

    /// Makes a token, which a new node joins with.
    pub(crate) fn invite(
        &self,
        role: MemberRole,
        addresses: &[String],
        valid: Duration,
    ) -> Result<String, CliError> {
        if self.is_mirror() {
            return Err(CliError::new("this node is a mirror, and only the source admits members")
                .hint("run murphy invite at the source"));
        }
        let Some(listen) = self.listen else {
            return Err(CliError::new("this node does not listen, so nobody could join")
                .hint("serve or mount it with --listen ADDR, as in --listen 0.0.0.0:7000"));
        };
        let mut reachable = addresses.to_vec();
        if reachable.is_empty() {
            reachable = self.addresses();
        }
        if reachable.is_empty() {
            return Err(CliError::new(format!("{listen} is every address of this machine"))
                .hint("say how others reach it: --address HOST:PORT"));
        }
        let secret = Secret::random().map_err(failed)?;
        let hash = secret.hash(&self.keys);
        let expires = self.runtime.block_on(self.book.invite(hash, role, valid))?;
        let token = Token {
            addresses: reachable,
            volume: self.keys.volume(),
            branch: self.config().branch,
            source_key: self.identity.public_key(),
            secret,
            role,
            expires,
        };
        token.to_text().map_err(failed)
    }

    /// Where others reach this node, as far as it knows.
    fn addresses(&self) -> Vec<String> {
        let any = |ip: IpAddr| ip.is_unspecified();
        self.listen.filter(|listen| !any(listen.ip())).map(|listen| listen.to_string()).into_iter().collect()
    }

    /// What this node's copy dies with: its machine, and its block store.
    fn domains(&self) -> Result<Vec<String>, CliError> {
        let own = failure_domain(&self.directory)?.to_string();
        let mut domains = vec![own, self.config().blocks.failure_domain().to_string()];
        domains.dedup();
        Ok(domains)
    }

    /// Adds what is known of other nodes.
    pub(crate) fn describe(&self, status: &mut Status) {
        let config = self.config().clone();
        config.role.as_str().clone_into(&mut status.role);
        status.listen = self.listen.map(|listen| listen.to_string());
        status.removed = config.removed;
        status.silent_stores = self.volume.silent_stores().into_iter().map(SilentStoreStatus::from).collect();
        status.ack_before = config
            .ack_pending
            .filter(|pending| pending.to.to_string() == status.ack)
            .map(|pending| pending.before.to_string());
        status.branches = config.branches.iter().map(ToString::to_string).collect();
        match lock(&self.followed).as_ref() {
            Some(followed) if config.role == Role::Mirror => {
                let seen = followed.status.borrow().clone();
                status.metadata_lsn = Some(seen.metadata_lsn.get());
                status.data_lsn = Some(seen.data_lsn.get());
                status.data_error = followed.not_copying();
                status.lag_ms = Some(seen.lag_ms);
                let (address, connected, error) = (seen.address, seen.connected, seen.error);
                status.source = Some(SourceStatus { address, connected, lsn: seen.source_lsn.get(), error });
            }
            _ if config.role == Role::Mirror => {
                let data = self
                    .replica
                    .as_ref()
                    .map_or(0, |replica| murphy_mirror::Replica::data(&**replica).borrow().get());
                status.metadata_lsn = Some(status.durable_lsn);
                status.data_lsn = Some(data.min(status.durable_lsn));
            }
            _ => {
                let missing = config.promoted.filter(Promoted::lacks_bytes);
                status.data_lsn = Some(missing.map_or(status.durable_lsn, |promoted| promoted.data_lsn));
                let gathering = lock(&self.gathering).as_ref().map(|status| *status.borrow());
                let is_told = |status: &GatherStatus| status.wanted + status.missing + status.found > 0;
                status.packs = gathering
                    .filter(is_told)
                    .map(|GatherStatus { found, wanted, missing }| PackStatus { found, wanted, missing });
                status.packs_from_archives = self.archive_reads.count();
                status.log_time_ahead_ms = Some(self.volume.log_time_ahead_ms());
                let mirrors = self.services.board.status(self.clock.monotonic());
                let addresses = |node| self.book.row(node).map(|row| row.addresses).unwrap_or_default();
                status.mirrors = mirrors
                    .into_iter()
                    .map(|mirror| MirrorStatus {
                        node: mirror.node.to_string(),
                        metadata_lsn: mirror.metadata_lsn.get(),
                        data_lsn: mirror.data_lsn.get(),
                        lag_ms: Some(mirror.lag_ms),
                        connected: mirror.connected,
                        addresses: addresses(mirror.node),
                        domains: mirror.domains,
                        refuses: mirror.refuses,
                    })
                    .collect();
            }
        }
    }

    /// Ends following, copying and listening.
    pub(crate) fn stop(&self) {
        self.stop.send_replace(true);
        self.note_furthest();
        if let Some(followed) = lock(&self.followed).take() {
            followed.stop(&self.runtime);
        }
    }

    fn config(&self) -> MutexGuard<'_, NodeConfig> {
        lock(&self.config)
    }

    /// Changes the node's own file; durable when it returns.
    pub(crate) fn change_config(&self, change: impl FnOnce(&mut NodeConfig)) -> Result<(), CliError> {
        let mut config = self.config();
        let mut changed = config.clone();
        change(&mut changed);
        changed.write(&self.directory)?;
        *config = changed;
        #[cfg(test)]
        steps::done(&self.directory);
        Ok(())
    }

    /// The latest epoch that this node's log knows of.
    fn known_epoch(&self) -> Epoch {
        let claimed = self.log.recovery().epoch;
        claimed.max(self.log.tail().position.epoch).max(self.volume.state().position.epoch)
    }

    fn settings(&self) -> Result<Settings, CliError> {
        Settings::of(&self.volume)
    }
}

/// Waits for the next change; `false` once there will be none, or the node stops.
async fn changed<T>(changes: &mut watch::Receiver<T>, stopped: &mut watch::Receiver<bool>) -> bool {
    tokio::select! {
        changed = changes.changed() => changed.is_ok(),
        _ = stopped.wait_for(|stop| *stop) => false,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change of what is in it is one assignment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
