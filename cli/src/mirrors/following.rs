//! The mirror's part: following the source's log, and copying the packs that it names.
//!
//! Invariants:
//! - What was begun here ends with the [`Followed`], within a limit.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use murphy_log::{DiskLog, Log, Lsn, SystemClock};
use murphy_mirror::{
    Copier, Dialer, FollowSetup, FollowerStatus, Following, Leader, Lookup, MirrorPart, Part, RemotePacks,
    Replica, look_up,
};
use tokio::{runtime::Handle, sync::watch, task::JoinHandle};

use super::{Mirroring, lock, replica::DiskReplica};
use crate::{
    config::NodeConfig,
    error::{CliError, failed},
    node::data_cursor,
};

/// A source that is followed.
pub(crate) struct Followed {
    pub(super) status: watch::Receiver<FollowerStatus>,
    pub(super) heard: watch::Receiver<Lsn>,
    pub(super) packs: RemotePacks,
    stop: watch::Sender<bool>,
    broken: Arc<Mutex<Option<String>>>,
    /// Why packs are not copied, if that is so.
    copying: watch::Sender<Option<String>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Followed {
    /// Begins to follow the source that `config` names.
    pub(super) fn start(
        config: &NodeConfig,
        replica: &Arc<DiskReplica>,
        (dialer, packs): (Dialer, RemotePacks),
        runtime: &Handle,
    ) -> Result<Followed, CliError> {
        let source = config.source.clone().ok_or_else(|| {
            CliError::new("murphy.toml names no source")
                .hint("murphy invite at the source makes a token, murphy join in this directory takes it")
        })?;
        let (following, handle) = Following::with_packs(
            packs,
            FollowSetup {
                addresses: source.addresses,
                source_key: source.key,
                branch: config.branch,
                replica: Arc::clone(replica) as Arc<dyn Replica>,
                dialer,
                clock: Arc::new(SystemClock::new()),
                random: Arc::new(any_number),
                silence: SILENCE,
                heard: replica.heard(),
            },
        );
        let stop = watch::Sender::new(false);
        let broken = Arc::new(Mutex::new(None));
        let (stopping, why) = (stop.subscribe(), Arc::clone(&broken));
        let task = runtime.spawn(async move {
            if let Err(error) = following.run(stopping).await {
                *lock(&why) = Some(error.to_string());
            }
        });
        Ok(Followed {
            status: handle.status,
            heard: handle.heard,
            packs: handle.packs,
            stop,
            broken,
            copying: watch::Sender::new(None),
            tasks: Mutex::new(vec![task]),
        })
    }

    /// Notes now and then up to where the source has been heard of, so that a promotion after a restart knows what is lost.
    fn note_heard(&self, replica: &Arc<DiskReplica>, runtime: &Handle) {
        let (replica, mut heard, mut stopping) =
            (Arc::clone(replica), self.heard.clone(), self.stop.subscribe());
        self.run(runtime.spawn(async move {
            loop {
                let is_over = tokio::select! {
                    changed = heard.changed() => changed.is_err(),
                    _ = stopping.wait_for(|stop| *stop) => true,
                };
                let (lsn, replica) = (*heard.borrow_and_update(), Arc::clone(&replica));
                let noted = murphy_log::aside(move || replica.note_heard(lsn));
                if let Err(error) = noted.await {
                    tracing::warn!(%error, "up to where the source was heard of is not noted");
                }
                if is_over {
                    return;
                }
                tokio::time::sleep(NOTE_PAUSE).await;
            }
        }));
    }

    /// What this node offers to others while it follows.
    pub(super) fn part(
        &self,
        replica: &Arc<DiskReplica>,
        leader: &Arc<watch::Sender<Option<Leader>>>,
    ) -> MirrorPart {
        let replica = Arc::clone(replica) as Arc<dyn Replica>;
        let part = MirrorPart::new(replica, self.heard.clone(), self.status.clone());
        MirrorPart { leader: Arc::clone(leader), ..part }
    }

    /// Returns when the node holds something.
    pub(super) async fn seeded(&self, replica: &Arc<DiskReplica>) -> Result<(), CliError> {
        let mut said = None;
        while replica.state().is_none() {
            if let Some(why) = replica.restart().borrow().clone() {
                return Err(CliError::new(why).hint("start it again: it goes on where it was"));
            }
            if let Some(why) = self.broken() {
                return Err(CliError::new(why));
            }
            let error = self.status.borrow().error.clone();
            if error != said {
                if let Some(error) = &error {
                    tracing::warn!(error, "waiting for the source to seed this mirror");
                }
                said = error;
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Why it cannot go on, if that is so.
    pub(super) fn broken(&self) -> Option<String> {
        lock(&self.broken).clone()
    }

    /// Why packs are not copied, if that is so.
    pub(super) fn not_copying(&self) -> Option<String> {
        self.copying.borrow().clone()
    }

    /// Says when following ends.
    pub(super) fn stopping(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    pub(super) fn run(&self, task: JoinHandle<()>) {
        lock(&self.tasks).push(task);
    }

    /// Ends it; what has arrived stays.
    pub(super) fn stop(self, runtime: &Handle) {
        self.stop.send_replace(true);
        let tasks = std::mem::take(&mut *lock(&self.tasks));
        runtime.block_on(async {
            for task in tasks {
                let abort = task.abort_handle();
                if tokio::time::timeout(END_MAX, task).await.is_err() {
                    abort.abort();
                }
            }
        });
    }
}

impl Mirroring {
    /// Begins to copy packs into the own store.
    pub(super) fn begin_copying(self: &Arc<Mirroring>) -> Result<(), CliError> {
        let followed = lock(&self.followed);
        let (Some(followed), Some(replica)) = (followed.as_ref(), &self.replica) else { return Ok(()) };
        followed.note_heard(replica, &self.runtime);
        let copier = self.copier(replica, followed.packs.clone());
        let (volume, stopping) = (self.volume.clone(), followed.stop.subscribe());
        let copying = followed.copying.clone();
        followed.run(self.runtime.spawn(async move { copier.keep_up(&volume, stopping, &copying).await }));
        Ok(())
    }

    /// Copies the packs that the log names from another node into the own store, after what is there.
    pub(super) fn copier(&self, replica: &DiskReplica, source: RemotePacks) -> Copier {
        Copier {
            log: Arc::clone(&self.log) as Arc<dyn Log>,
            source: Arc::new(source),
            store: self.blocks.own(),
            cursor: data_cursor(&self.directory),
            data: replica.data_sender(),
            clock: Arc::clone(&self.clock),
            helpers: COPY_HELPERS,
        }
    }

    /// Begins to follow again after a promotion that did not come about.
    pub(super) fn follow_again(self: &Arc<Mirroring>) -> Result<(), CliError> {
        let Some(replica) = &self.replica else { return Ok(()) };
        replica.reopen();
        // The volume reads what is not copied yet through the same packs.
        let reaches = (self.dialer.clone(), self.packs.clone());
        let followed = Followed::start(&self.config(), replica, reaches, &self.runtime)?;
        self.services.become_part(Part::Mirror(followed.part(replica, &self.leader)));
        *lock(&self.followed) = Some(followed);
        self.begin_copying()?;
        self.begin_announcing()
    }
}

/// Says up to where the bytes are here, as far as the copier has noted it.
pub(super) fn load_data_position(
    directory: &Path,
    log: &DiskLog,
    data: &watch::Sender<Lsn>,
) -> Result<(), CliError> {
    let saved = data_cursor(directory).load().map_err(failed)?;
    if let Some(saved) = saved
        && look_up(log, saved.lsn).map_err(failed)? == Lookup::End(saved)
    {
        data.send_replace(saved.lsn);
    }
    Ok(())
}

/// Spreads attempts; that it repeats is no harm.
fn any_number() -> u64 {
    let mut bytes = [0; 8];
    // Without randomness the attempts come at the same times, which is slower and not wrong.
    getrandom::fill(&mut bytes).unwrap_or_default();
    u64::from_le_bytes(bytes)
}

/// After so long without a word the source is given up, and tried again.
pub(super) const SILENCE: Duration = Duration::from_secs(2);
const NOTE_PAUSE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(10);
const END_MAX: Duration = Duration::from_secs(5);
pub(super) const COPY_HELPERS: usize = 4;
