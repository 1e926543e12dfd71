//! A node among other nodes: it follows a source, or is followed; it copies packs, promises, and hears that it was replaced.
//!
//! Invariants:
//! - Listener, follower, copier and dialer are the product's, over simulated datagrams.
//! - A mirror follows before it holds anything; it listens, and copies, once it is seeded and open.

use std::{collections::VecDeque, path::PathBuf, sync::Arc, time::Duration};

use murphy_fs::MemberState;
use murphy_log::{Clock, Epoch, Log, Lsn, NodeId};
use murphy_mirror::{
    Ask, Copier, CursorFile, Dialer, FollowHandle, FollowSetup, Following, Identity, Leader, Listener,
    MemberBook, MirrorPart, NetworkOptions, Part, PublicKey, RemotePacks, Replica, Services, SourcePart,
};
use parking_lot::Mutex;
use tokio::{sync::watch, task::AbortHandle};

use super::{
    disk::{Disk, NodeLog, NodeName, Upstream},
    gate::Gate,
    members::{Book, Census},
    network::{Network, address_of},
    node::{Begun, Ground, Process},
    seeding::{NodeReplica, Snapshots},
    stage::{NodeClock, Stage},
    world::{BRANCH, VOLUME, World},
};

/// What a process is among other nodes.
pub(super) struct Among {
    pub(super) services: Arc<Services>,
    pub(super) dialer: Dialer,
    pub(super) followed: Option<Followed>,
    /// Who says that it leads, to a mirror.
    pub(super) leaders: Option<watch::Receiver<Option<Leader>>>,
    /// Who is to be removed by the source that this is.
    pub(super) removal: Arc<Mutex<Option<NodeId>>>,
    /// Ends the listener, and what follows.
    _stop: watch::Sender<bool>,
}

/// A mirror's part.
pub(super) struct Followed {
    pub(super) replica: Arc<NodeReplica>,
    pub(super) handle: FollowHandle,
    /// Ends following and copying.
    pub(super) stop: watch::Sender<bool>,
}

/// Where a mirror's packs go, and how far they have come.
pub(super) struct Copying {
    log: Arc<NodeLog>,
    gate: Arc<Gate>,
    copied: PathBuf,
    data: watch::Sender<Lsn>,
    clock: Arc<NodeClock>,
}

impl World {
    /// How `process` on `node`, which follows, copies packs.
    pub(super) fn copying(&self, process: &Process, followed: &Followed, node: NodeName) -> Copying {
        Copying {
            log: Arc::clone(&process.log),
            gate: Arc::clone(&process.gate),
            copied: self.folder.path().join(format!("copied-{}-{}", node.host, node.life)),
            data: followed.replica.data.clone(),
            clock: Arc::clone(&process.clock),
        }
    }
}

/// A mirror that follows and is not open yet: it may hold nothing.
pub(super) struct Waiting {
    pub(super) begun: Begun,
    pub(super) dialer: Dialer,
    pub(super) followed: Followed,
}

impl Waiting {
    /// Whether its source says that it is no member any more.
    pub(super) fn is_removed(&self) -> bool {
        self.followed.handle.status.borrow().revoked
    }
}

impl Ground {
    /// Begins to follow `source`; also returns what ends that without a word.
    pub(super) fn begin_following(
        &self,
        host: usize,
        disk: &Disk,
        source: Upstream,
        network: &Arc<Network>,
    ) -> Result<(Waiting, AbortHandle), String> {
        let begun = Begun::new(&self.stage);
        let replica = Arc::new(NodeReplica::new(self, host, disk));
        let dialer = self.dialer(host, &self.identity(disk.node)?, &begun.gate, network);
        let stage = Arc::clone(&self.stage);
        let setup = FollowSetup {
            addresses: vec![address_of(source.host).to_string()],
            source_key: source.key,
            branch: BRANCH,
            replica: Arc::clone(&replica) as Arc<dyn Replica>,
            dialer: dialer.clone(),
            clock: Arc::clone(&begun.clock) as Arc<dyn Clock>,
            random: Arc::new(move || stage.below(u64::MAX)),
            silence: SILENCE,
            heard: Lsn::new(0),
        };
        let (following, handle) = Following::new(setup);
        let (stop, stopped) = watch::channel(false);
        let stage = Arc::clone(&self.stage);
        let task = begun.tasks.run(async move {
            if let Err(error) = following.run(stopped).await {
                stage.note(format!("host {host}: follows no more: {error}"));
            }
        });
        Ok((Waiting { begun, dialer, followed: Followed { replica, handle, stop } }, task))
    }

    /// How the process behind `gate` reaches others.
    pub(super) fn dialer(
        &self,
        host: usize,
        identity: &Arc<Identity>,
        gate: &Arc<Gate>,
        network: &Arc<Network>,
    ) -> Dialer {
        let sockets = network.sockets(host, gate);
        Dialer { identity: Arc::clone(identity), sockets, options: options() }
    }

    /// The part of `process` that speaks with other nodes; it listens from now on.
    pub(super) fn among(
        &self,
        host: usize,
        (process, disk): (&Process, &Disk),
        dialer: Dialer,
        followed: Option<Followed>,
    ) -> Result<Among, String> {
        let identity = &process.identity;
        let clock = Arc::clone(&process.clock) as Arc<dyn Clock>;
        let book = Arc::new(Book(process.volume.clone()));
        let mut services = Services::new(self.keys.clone(), BRANCH, identity.node(), clock, book);
        services.packs = Some(self.layered(host, &process.gate));
        services.identity = Some(Arc::clone(identity));
        services.set_proof(disk.proof.lock().clone());
        let before = disk.promoted.map(|promoted| promoted.from);
        if let Some(source) = disk.follows.or(before) {
            services.set_source_key(source.key);
        }
        let services = Arc::new(services);
        let mut leaders = None;
        if let Some(followed) = &followed {
            let replica = Arc::clone(&followed.replica) as Arc<dyn Replica>;
            let (heard, status) = (followed.handle.heard.clone(), followed.handle.status.clone());
            let part = MirrorPart::new(replica, heard, status);
            leaders = Some(part.leader.subscribe());
            services.become_part(Part::Mirror(part));
        }
        let address = address_of(host);
        let bound =
            Listener::bind(identity, &*dialer.sockets, address, &dialer.options, Arc::clone(&services));
        let listener = bound.map_err(|error| error.to_string())?;
        let (stop, stopped) = watch::channel(false);
        process.tasks.run(listener.run(stopped));
        Ok(Among { services, dialer, followed, leaders, removal: Arc::default(), _stop: stop })
    }

    /// The later epoch that any of the members knows of that answer.
    pub(super) async fn successor(&self, process: &Process, among: &Among, own: Epoch) -> Option<Epoch> {
        let members = Book(process.volume.clone()).members();
        let others = members.into_iter().filter(|(node, _)| *node != process.identity.node());
        let asked = others.map(|(_, row)| async move {
            let MemberState::Joined { public_key } = row.state else { return None };
            let key = PublicKey::from_bytes(public_key);
            let ask = Ask { volume: VOLUME, branch: BRANCH, epoch: Some(own) };
            let asked = among.dialer.lender(&row.addresses, key, ask);
            tokio::time::timeout(ASK_MAX, asked).await.ok()?.ok()?.stands.replaces(own)
        });
        futures::future::join_all(asked).await.into_iter().flatten().max()
    }

    /// Offers what a source offers, and lets fsync wait for mirrors if that is the level.
    pub(super) fn offer(self: &Arc<Self>, process: &Process, among: &Among, disk: &Disk, epoch: Epoch) {
        let snapshots = Snapshots {
            volume: process.volume.clone(),
            log: Arc::clone(&process.log),
            keys: self.keys.clone(),
            lineage: self.lineage,
            clock: Arc::clone(&process.clock),
        };
        among.services.become_part(Part::Source(SourcePart {
            log: process.log.shipped(),
            epoch,
            snapshots: Arc::new(snapshots),
            heartbeat: HEARTBEAT,
        }));
        let census = Census::new(self, disk.node.host, (process, among), &disk.acknowledging);
        process.tasks.run(census.keep());
    }

    /// What copies packs into `host`'s own store.
    pub(super) fn copier(&self, host: usize, copying: &Copying, source: RemotePacks) -> Copier {
        let Copying { log, gate, copied, data, clock } = copying;
        Copier {
            log: Arc::clone(log) as Arc<dyn Log>,
            source: Arc::new(source),
            store: self.blocks(host, gate),
            cursor: CursorFile::new(copied.clone()),
            data: data.clone(),
            clock: Arc::clone(clock) as Arc<dyn Clock>,
            helpers: 3,
        }
    }

    /// Begins to copy packs into the own store.
    pub(super) fn begin_copying(
        &self,
        host: usize,
        process: &Process,
        followed: &Followed,
        copying: &Copying,
    ) {
        let copier = self.copier(host, copying, followed.handle.packs.clone());
        let volume = process.volume.clone();
        let stopped = followed.stop.subscribe();
        process.tasks.run(async move {
            // Whether it has come to an end of its troubles is judged by what the mirror holds.
            let (trouble, _) = watch::channel(None);
            copier.keep_up(&volume, stopped, &trouble).await;
        });
    }
}

/// A mirror that does not go on has to say so, if its source does; of one that goes on elsewhere it may not have heard yet.
pub(super) fn watch_following(
    stage: &Arc<Stage>,
    (host, source): (usize, Upstream),
    process: &Process,
    followed: &Followed,
) -> impl Future<Output = ()> + Send + use<> {
    let (stage, gate, log) = (Arc::clone(stage), Arc::clone(&process.gate), Arc::clone(&process.log));
    let status = followed.handle.status.clone();
    async move {
        let mut marks: VecDeque<Lsn> = VecDeque::new();
        let (mut last, mut looks) = (Lsn::default(), 0);
        loop {
            gate.pass().await;
            tokio::time::sleep(STALL_LOOK).await;
            marks.extend(stage.judge(|judge, _| Ok(judge.newest(source.host))));
            let Some(goal) = (marks.len() > UNREPORTED_LOOKS).then(|| marks.pop_front()).flatten() else {
                continue;
            };
            let held = log.durable().state().position.lsn;
            let seen = status.borrow().clone();
            let says = !seen.connected || seen.error.is_some() || seen.lag_ms > 0;
            looks = if held < goal && held == last && !says { looks + 1 } else { 0 };
            last = held;
            if looks > SILENT_LOOKS_MAX && !gate.was_paused() {
                stage.violated(&format!(
                    "silent stall: mirror {host} holds lsn {held}, lsn {goal} has been durable for long, \
                     and its status says nothing of it"
                ));
            }
        }
    }
}

fn options() -> NetworkOptions {
    NetworkOptions { idle_timeout: IDLE_TIMEOUT, ..NetworkOptions::default() }
}

/// What the source lacked may have come to it after so long, or be called missing.
const STALL_LOOK: Duration = Duration::from_millis(500);
/// What is behind for more looks says so, ...
const UNREPORTED_LOOKS: usize = 10;
/// ... before it has stood still for so many.
const SILENT_LOOKS_MAX: u32 = 3;
/// As the program.
const HEARTBEAT: Duration = Duration::from_millis(250);
const SILENCE: Duration = Duration::from_secs(2);
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
const ASK_MAX: Duration = Duration::from_secs(3);
