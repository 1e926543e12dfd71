//! The source's part: its mirrors, and which of them acknowledge.
//!
//! Invariants:
//! - With `--ack mirror=W` the set of members that acknowledge follows the members of the log by the steps of [`AcknowledgingSet`], and is
//!   remembered: a mirror that is promoted knows every set through which something was acknowledged. How it loses a member is told in
//!   `removal.rs`; one that the log has removed never counts, whatever is remembered.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use murphy_fs::{Acknowledger, MemberRole, MemberRow, MemberState, Volume};
use murphy_log::{Epoch, Log, Lsn, NodeId, ParseIdError};
use murphy_mirror::{AcknowledgingSet, MemberBook, MirrorAcknowledger, Part, SetStep, SourcePart};

use super::{Mirroring, changed, lock, snapshots::VolumeSnapshots};
use crate::{
    error::{CliError, failed},
    settings::Ack,
    summed,
};

impl Mirroring {
    /// Offers what a source offers, in `epoch`, and lets fsync wait for mirrors if that is set.
    pub(super) fn begin_leading(self: &Arc<Mirroring>, epoch: Epoch) -> Result<(), CliError> {
        let config = self.config().clone();
        let snapshots = VolumeSnapshots {
            volume: self.volume.clone(),
            keys: self.keys.clone(),
            branch: config.branch,
            folder: self.directory.clone(),
            count: AtomicU64::new(0),
        };
        self.services.become_part(Part::Source(SourcePart {
            log: Arc::clone(&self.log) as Arc<dyn Log>,
            epoch,
            snapshots: Arc::new(snapshots),
            heartbeat: HEARTBEAT,
        }));
        if lock(&self.acknowledger).is_none() {
            self.acknowledge_by_mirrors()?;
        }
        self.watch_members();
        self.watch_loss();
        self.note_mirrors();
        self.register();
        self.tell_predecessor();
        self.speak_with_members();
        self.begin_gathering();
        Ok(())
    }

    /// Lets fsync wait for mirrors if that is set.
    pub(super) fn acknowledge_by_mirrors(&self) -> Result<(), CliError> {
        let Ack::Mirrors(wanted) = self.waited_for()? else { return Ok(()) };
        let members = read_set(&self.directory)?.unwrap_or_default();
        let board = Arc::clone(&self.services.board);
        let needed = self.needed(wanted as usize, &members);
        let acknowledger = Arc::new(MirrorAcknowledger::new(board, needed, members));
        *lock(&self.acknowledger) = Some(Arc::clone(&acknowledger));
        self.volume.acknowledge_with(acknowledger as Arc<dyn Acknowledger>);
        Ok(())
    }

    /// How many of the acknowledging set an fsync waits for, if these are its members.
    pub(super) fn needed(&self, wanted: usize, members: &BTreeSet<NodeId>) -> usize {
        self.set_of(members.clone()).needed(wanted)
    }

    /// The acknowledging set with these members.
    fn set_of(&self, members: BTreeSet<NodeId>) -> AcknowledgingSet {
        let config = self.config();
        let promoted = config.promoted.as_ref().filter(|promoted| !promoted.is_settled);
        AcknowledgingSet { members, unsettled: promoted.map(|promoted| Lsn::new(promoted.metadata_lsn)) }
    }

    /// The acknowledging set, as this directory remembers it.
    fn set(&self) -> Result<AcknowledgingSet, CliError> {
        Ok(self.set_of(read_set(&self.directory)?.unwrap_or_default()))
    }

    /// The members that hold a copy, without this node.
    pub(super) fn mirrors(&self) -> BTreeSet<NodeId> {
        let own = self.identity.node();
        self.book.holders().into_iter().map(|(node, _)| node).filter(|node| *node != own).collect()
    }

    /// Keeps the board and the acknowledging set true to the members.
    fn watch_members(self: &Arc<Mirroring>) {
        let this = Arc::downgrade(self);
        let (mut changes, mut stopped) = (self.book.changes(), self.stop.subscribe());
        self.runtime.spawn(async move {
            loop {
                changes.borrow_and_update();
                let Some(mirroring) = this.upgrade() else { return };
                let members = mirroring.mirrors();
                mirroring.show_members(&members);
                let done = match mirroring.change_set(members).await {
                    Ok(()) => mirroring.take_effect(CHANGE_MAX).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = done {
                    tracing::warn!(%error, "the members that acknowledge stay as they were");
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                drop(mirroring);
                if !changed(&mut changes, &mut stopped).await {
                    return;
                }
            }
        });
    }

    /// Keeps the board true to the members.
    fn show_members(&self, members: &BTreeSet<NodeId>) {
        let (board, now) = (&self.services.board, self.clock.monotonic());
        members.iter().for_each(|node| board.list_member(now, *node));
        let listed = board.status(now).into_iter().map(|mirror| mirror.node);
        listed.filter(|node| !members.contains(node)).for_each(|node| board.unlist_member(node));
    }

    async fn change_set(&self, members: BTreeSet<NodeId>) -> Result<(), CliError> {
        let acknowledger = lock(&self.acknowledger).clone();
        let Some(acknowledger) = acknowledger else { return Ok(()) };
        let level = self.waited_for()?;
        let Ack::Mirrors(wanted) = level else { return Ok(()) };
        let wanted = wanted as usize;
        loop {
            let turn = self.set_turn.lock().await;
            if self.waited_for()? != level {
                return Err(CliError::new("what is waited for has changed meanwhile"));
            }
            let set = self.set()?;
            let step = set.towards(wanted, &members);
            match &step {
                SetStep::Stay => return Ok(()),
                SetStep::Leave(kept) => {
                    // The log has removed the others, after W of these had what they had: the process ended right then.
                    acknowledger.set(self.needed(wanted, kept), kept.clone());
                    write_set(&self.directory, kept)?;
                    continue;
                }
                SetStep::Settle(base) => {
                    drop(turn);
                    self.wait_for_members(*base, set.members.len(), &set.members, &members).await?;
                }
                SetStep::Grow { asked, of } => {
                    drop(turn);
                    // Whatever entries made the members what they are must be held, also those that are not durable yet.
                    let lsn = self.volume.durable_here().await;
                    let lsn =
                        lsn.map_err(|errno| CliError::new(format!("the log does not go on: {errno:?}")))?;
                    self.wait_for_members(lsn, *asked, of, &members).await?;
                }
            }
            let _turn = self.set_turn.lock().await;
            // One that was removed meanwhile has no row any more, and was not in the set: it must not come into it.
            if self.set()? != set || self.mirrors() != members || self.waited_for()? != level {
                return Err(CliError::new("they have changed meanwhile"));
            }
            if let SetStep::Settle(_) = step {
                self.change_config(|config| {
                    if let Some(promoted) = &mut config.promoted {
                        promoted.is_settled = true;
                    }
                })?;
                acknowledger.set(wanted, set.members);
            } else {
                write_set(&self.directory, &members)?;
                acknowledger.set(wanted, members);
                return Ok(());
            }
        }
    }

    /// Returns when `asked` of these have `lsn`, while the members of the log stay `members`: one that is waited for may be removed.
    async fn wait_for_members(
        &self,
        lsn: Lsn,
        asked: usize,
        of: &BTreeSet<NodeId>,
        members: &BTreeSet<NodeId>,
    ) -> Result<(), CliError> {
        let mut changes = self.book.changes();
        changes.borrow_and_update();
        if self.mirrors() != *members {
            return Err(CliError::new("they have changed meanwhile"));
        }
        let known = MirrorAcknowledger::of_entries(Arc::clone(&self.services.board), asked, of.clone());
        tokio::select! {
            acknowledged = known.acknowledged(lsn, CHANGE_MAX) => acknowledged.map_err(failed),
            _ = changes.changed() => Err(CliError::new("they change again")),
        }
    }

    /// Makes the source itself known, as one that holds no copy for itself: should it come back after it was replaced, it may ask.
    fn register(self: &Arc<Mirroring>) {
        if self.listen.is_none() {
            return;
        }
        // One that was a mirror is called what it was called then.
        let known = self.book.row(self.identity.node()).map(|row| row.name).filter(|name| !name.is_empty());
        let row = MemberRow {
            role: MemberRole::Observer,
            state: MemberState::Joined { public_key: *self.identity.public_key().as_bytes() },
            name: known.unwrap_or_else(|| self.config().name.clone()),
            addresses: self.addresses(),
        };
        let (book, node) = (Arc::clone(&self.book), self.identity.node());
        self.runtime.spawn(async move {
            if let Err(error) = book.record(node, row).await {
                tracing::warn!(%error, "the source is not in its own list of members");
            }
        });
    }
}

/// The set that acknowledged last.
pub(super) fn read_set(directory: &Path) -> Result<Option<BTreeSet<NodeId>>, CliError> {
    let path = directory.join(SET);
    let way_out = "delete it: no fsync is acknowledged then before every mirror has caught up";
    let Some(names) = summed::read::<Vec<String>>(&path, way_out)? else { return Ok(None) };
    let damaged =
        |error: ParseIdError| CliError::new(format!("{} is damaged: {error}", path.display())).hint(way_out);
    let nodes = names.iter().map(|name| name.parse().map_err(damaged));
    nodes.collect::<Result<BTreeSet<NodeId>, CliError>>().map(Some)
}

pub(super) fn write_set(directory: &Path, members: &BTreeSet<NodeId>) -> Result<(), CliError> {
    let names: Vec<String> = members.iter().map(ToString::to_string).collect();
    summed::write(&directory.join(SET), &names)?;
    #[cfg(test)]
    super::steps::done(directory);
    Ok(())
}

/// Whether the volume's fsync waits for mirrors.
pub(super) fn waits_for_mirrors(volume: &Volume) -> Result<Option<usize>, CliError> {
    match crate::settings::Settings::of(volume)?.ack {
        Ack::Mirrors(wanted) => Ok(Some(wanted as usize)),
        Ack::Local | Ack::Archive => Ok(None),
    }
}

const SET: &str = "acknowledging.json";
const HEARTBEAT: Duration = Duration::from_millis(250);
const CHANGE_MAX: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(1);
