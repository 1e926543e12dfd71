//! What an fsync waits for, as far as mirrors have to do with it, and how that is changed while the node is served.
//!
//! ```text
//!   local, archive -> mirror=W    entry, everybody has it, then W      until then an fsync waits as before: whoever lacks the entry would ask nobody
//!   mirror=V -> mirror=W, W > V   W have everything, entry             whoever has the entry asks fewer of them
//!   mirror=V -> mirror=W, W < V   entry, V have it, then W             whoever lacks the entry asks fewer of them
//!   any -> local                  at once, entry
//! ```
//!
//! Archives are asked by every successor, whatever the level: what makes them a level is told in `serve/level.rs`.
//!
//! Invariants:
//! - A successor asks as many as any fsync that was acknowledged relied on, whether or not it has the entry that changed the level.
//! - A level that is not in force is remembered beside the log before the log names it: a node that was started anew waits as it did before.
//! - An order that takes effect at once asks nobody, and waits behind nobody: an order that waits for others ends when it comes.
//! - No level lets a source acknowledge that is known to have been replaced, or to have lost entries: `mandate.rs`.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use murphy_fs::Acknowledger;
use murphy_log::{Lsn, NodeId};
use murphy_mirror::MirrorAcknowledger;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    Mirroring,
    leading::{read_set, write_set},
    lock,
};
use crate::{
    config::PendingAck,
    error::{CliError, failed},
    settings::{Ack, Settings},
};

impl Mirroring {
    /// What an fsync waits for: what the log names, or what was waited for before that.
    pub(crate) fn waited_for(&self) -> Result<Ack, CliError> {
        let set = self.settings()?.ack;
        Ok(self.pending()?.map_or(set, |pending| pending.before))
    }

    /// The change that is not in force yet.
    pub(crate) fn pending(&self) -> Result<Option<PendingAck>, CliError> {
        let set = self.settings()?.ack;
        Ok(self.config().ack_pending.filter(|pending| pending.to == set))
    }

    /// From now on an fsync waits for this node only. Durable when it returns.
    pub(crate) async fn wait_for_nobody(&self) -> Result<(), CliError> {
        let _turn = self.set_turn.lock().await;
        self.check_mandate()?;
        // An order before may have written it down, and have got no further.
        match self.settings()?.ack {
            Ack::Local => drop(self.durable().await?),
            Ack::Mirrors(_) | Ack::Archive => self.record_level(Ack::Local).await?,
        }
        *lock(&self.acknowledger) = None;
        self.wait_as_before();
        self.forget_pending()
    }

    /// Goes back to what is waited for still.
    pub(crate) async fn stay_with(&self, before: Ack) -> Result<(), CliError> {
        let _turn = self.set_turn.lock().await;
        if self.pending()?.is_none_or(|pending| pending.before != before) {
            return Err(
                CliError::new("the level that was set has come into force meanwhile").hint("run it again")
            );
        }
        self.record_level(before).await?;
        self.forget_pending()
    }

    /// Goes over to archives, with `by`, which knows whether they have everything. Nothing has changed if it fails, unless the log names them.
    pub(crate) async fn wait_for_archives(&self, by: &Arc<dyn Acknowledger>) -> Result<(), CliError> {
        let _turn = self.set_turn.lock().await;
        self.volume.acknowledge_with(Arc::clone(by));
        let changed = async {
            self.acknowledged_by(&**by).await?;
            self.record_level(Ack::Archive).await
        };
        if let Err(error) = changed.await {
            if self.settings()?.ack != Ack::Archive {
                self.wait_as_before();
            }
            return Err(error);
        }
        *lock(&self.acknowledger) = None;
        self.forget_pending()
    }

    /// Waits for so many mirrors, who already wait for some of them or for others.
    pub(crate) async fn wait_for_mirrors(&self, wanted: u32) -> Result<(), CliError> {
        let before = self.waited_for()?;
        if matches!(before, Ack::Mirrors(old) if old < wanted) {
            return self.wait_for_more(wanted).await;
        }
        let members = self.candidates(before)?;
        check_enough(wanted as usize, members.len())?;
        if !matches!(before, Ack::Mirrors(_)) {
            // Nobody is to wait for a mirror that does not come: that is found out before anything is changed.
            let lsn = self.durable().await?;
            self.everybody_has(lsn, (members.len(), &members), RAISE_MAX).await?;
        }
        let (turn, to) = (self.set_turn.lock().await, Ack::Mirrors(wanted));
        self.change_config(|config| config.ack_pending = Some(PendingAck { before, to }))?;
        self.record_level(to).await?;
        drop(turn);
        self.book.touch();
        // What was acknowledged while it was not in force yet has to have it as well.
        self.confirm_level().await
    }

    /// Waits for more mirrors than before: as many have everything before the log says so.
    async fn wait_for_more(&self, wanted: u32) -> Result<(), CliError> {
        let _turn = self.set_turn.lock().await;
        let set = read_set(&self.directory)?.unwrap_or_default();
        check_enough(wanted as usize, set.len())?;
        let acknowledger = self.acknowledger()?;
        acknowledger.set(self.needed(wanted as usize, &set), set.clone());
        let changed = async {
            self.acknowledged_by(&*acknowledger).await?;
            // One that an order has left behind which got no further must not mean this level.
            self.forget_pending()?;
            self.record_level(Ack::Mirrors(wanted)).await
        };
        if let Err(error) = changed.await {
            if let Ack::Mirrors(old) = self.waited_for()? {
                acknowledger.set(self.needed(old as usize, &set), set);
                self.wait_as_before();
            }
            return Err(error);
        }
        Ok(())
    }

    /// Lets the level that the log names be in force, once whoever may take over has heard of it. It is tried again whenever members change.
    pub(super) async fn take_effect(&self, at_most: Duration) -> Result<(), CliError> {
        let Some(pending) = self.pending()? else { return Ok(()) };
        let Ack::Mirrors(wanted) = pending.to else { return Ok(()) };
        let (wanted, mut changes) = (wanted as usize, self.book.changes());
        changes.borrow_and_update();
        let set = self.candidates(pending.before)?;
        check_enough(wanted, set.len())?;
        let (asked, of) = match pending.before {
            Ack::Mirrors(old) if set.len() >= old as usize => (old as usize, set.clone()),
            // Nothing is acknowledged yet, and each that has joined may know too few of the others to ask anybody who has heard of it.
            Ack::Mirrors(_) => {
                let all = self.mirrors();
                (all.len(), all)
            }
            Ack::Local | Ack::Archive => (set.len(), set.clone()),
        };
        let lsn = self.durable().await?;
        tokio::select! {
            held = self.everybody_has(lsn, (asked, &of), at_most) => held?,
            _ = changes.changed() => return Err(CliError::new("the members change")),
        }
        let _turn = self.set_turn.lock().await;
        if self.pending()? != Some(pending) {
            return Ok(());
        }
        if self.candidates(pending.before)? != set || !of.is_subset(&self.mirrors()) {
            return Err(CliError::new("the members have changed meanwhile"));
        }
        match pending.before {
            Ack::Mirrors(_) => self.acknowledger()?.set(self.needed(wanted, &set), set),
            Ack::Local | Ack::Archive => {
                write_set(&self.directory, &set)?;
                let board = Arc::clone(&self.services.board);
                *lock(&self.acknowledger) = Some(Arc::new(MirrorAcknowledger::new(board, wanted, set)));
            }
        }
        self.wait_as_before();
        self.change_config(|config| {
            config.ack_pending = None;
            if let (Some(promoted), Ack::Local | Ack::Archive) = (&mut config.promoted, pending.before) {
                // All of them have what came after its beginning.
                promoted.is_settled = true;
            }
        })
    }

    /// Returns when every mirror has the entries up to `lsn`, whatever bytes it lacks: it knows every archive that they name.
    pub(crate) async fn heard_by_all(&self, lsn: Lsn) -> Result<(), CliError> {
        let mut changes = self.services.board.changes();
        let heard = async {
            loop {
                changes.borrow_and_update();
                if self.unheard(lsn).is_empty() || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        // Whoever is missing then is named.
        let in_time = async { Ok(tokio::time::timeout(RAISE_MAX, heard).await.is_ok()) };
        let _in_time = self.unless_overtaken(in_time).await?;
        match self.unheard(lsn) {
            missing if missing.is_empty() => Ok(()),
            missing => Err(CliError::new(format!("not every mirror has lsn {lsn}: {}", missing.join(", ")))),
        }
    }

    /// Whether no other node has a copy.
    pub(crate) fn is_alone(&self) -> bool {
        self.mirrors().is_empty()
    }

    /// The mirrors of which it is not known that they have the entries up to `lsn`.
    pub(crate) fn unheard(&self, lsn: Lsn) -> Vec<String> {
        let status = self.services.board.status(self.clock.monotonic());
        let has = |node: &NodeId| status.iter().any(|one| one.node == *node && one.metadata_lsn >= lsn);
        self.mirrors().into_iter().filter(|node| !has(node)).map(|node| node.to_string()).collect()
    }

    /// Returns when `asked` of these mirrors, and every archive, have everything up to `lsn`.
    async fn everybody_has(
        &self,
        lsn: Lsn,
        (asked, set): (usize, &BTreeSet<NodeId>),
        at_most: Duration,
    ) -> Result<(), CliError> {
        let archives = self.archives.get().and_then(std::sync::Weak::upgrade);
        let archives = archives.ok_or_else(|| CliError::new("no archive can be asked yet"))?;
        let mirrors = MirrorAcknowledger::new(Arc::clone(&self.services.board), asked, set.clone());
        let by_mirrors = async { mirrors.acknowledged(lsn, at_most).await.map_err(failed) };
        let both = async { tokio::try_join!(by_mirrors, archives.all_hold(lsn, at_most)).map(|_| ()) };
        self.unless_overtaken(both).await
    }

    /// Who acknowledges, or would.
    fn candidates(&self, before: Ack) -> Result<BTreeSet<NodeId>, CliError> {
        match before {
            Ack::Mirrors(_) => Ok(read_set(&self.directory)?.unwrap_or_default()),
            Ack::Local | Ack::Archive => Ok(self.mirrors()),
        }
    }

    /// Returns when everything so far has been acknowledged.
    pub(crate) async fn acknowledged_by(&self, by: &dyn Acknowledger) -> Result<(), CliError> {
        let lsn = self.durable().await?;
        self.unless_overtaken(async { by.acknowledged(lsn, RAISE_MAX).await.map_err(failed) }).await
    }

    /// Ends every order that waits for somebody, for as long as the answer is held: one that waits for nobody wants its turn.
    pub(crate) fn overtake(&self) -> Overtaking {
        self.overtaking.send_modify(|orders| *orders += 1);
        Overtaking(self.overtaking.clone())
    }

    /// Waits, for as long as no order wants its turn that waits for nobody.
    pub(crate) async fn unless_overtaken<T>(
        &self,
        wait: impl Future<Output = Result<T, CliError>>,
    ) -> Result<T, CliError> {
        let mut overtaking = self.overtaking.subscribe();
        tokio::select! {
            biased;
            // The sender lives as long as this.
            Ok(_) = overtaking.wait_for(|orders| *orders > 0) => {
                Err(CliError::new("murphy ack local has overtaken this order"))
            }
            done = wait => done,
        }
    }

    /// Returns when the mirrors that an fsync waits for have everything so far, and a level that was set is in force.
    pub(crate) async fn confirm_level(&self) -> Result<(), CliError> {
        self.take_effect(RAISE_MAX).await?;
        match self.waited_for()? {
            Ack::Mirrors(_) => self.acknowledged_by(&*self.acknowledger()?).await,
            Ack::Local | Ack::Archive => Ok(()),
        }
    }

    /// Lets an fsync, also one that waits already, wait for the mirrors that are remembered, or for nobody.
    fn wait_as_before(&self) {
        match lock(&self.acknowledger).clone() {
            Some(mirrors) => self.volume.acknowledge_with(mirrors as Arc<dyn Acknowledger>),
            None => self.volume.acknowledge_alone(),
        }
    }

    fn acknowledger(&self) -> Result<Arc<MirrorAcknowledger>, CliError> {
        lock(&self.acknowledger).clone().ok_or_else(|| CliError::new("no mirror acknowledges here"))
    }

    /// Writes the level down, durably on this node.
    async fn record_level(&self, ack: Ack) -> Result<(), CliError> {
        self.check_mandate()?;
        let refused = |errno| CliError::new(format!("the setting ack cannot be changed: {errno:?}"));
        self.volume.change_settings(vec![Settings::set_ack(ack)]).wait().await.map_err(refused)?;
        self.volume.durable_here().await.map_err(refused)?;
        #[cfg(test)]
        super::steps::done(&self.directory);
        // Nobody is to be told that a level is in force at a source that was replaced in between.
        self.check_mandate()
    }

    fn forget_pending(&self) -> Result<(), CliError> {
        if self.config().ack_pending.is_none() {
            return Ok(());
        }
        self.change_config(|config| config.ack_pending = None)
    }

    async fn durable(&self) -> Result<Lsn, CliError> {
        let refused = |errno| CliError::new(format!("the log does not go on: {errno:?}"));
        self.volume.durable_here().await.map_err(refused)
    }

    /// The mirrors, and which of them count.
    pub(crate) fn describe_acknowledging(&self) -> Result<Vec<Value>, CliError> {
        let set = match self.waited_for()? {
            Ack::Mirrors(_) => read_set(&self.directory)?.unwrap_or_default(),
            Ack::Local | Ack::Archive => BTreeSet::new(),
        };
        let status = self.services.board.status(self.clock.monotonic());
        let described = self.mirrors().into_iter().map(|node| {
            let seen = status.iter().find(|mirror| mirror.node == node);
            json!({
                "node": node.to_string(),
                "acknowledges": set.contains(&node),
                "connected": seen.is_some_and(|mirror| mirror.connected),
                "metadata_lsn": seen.map_or(0, |mirror| mirror.metadata_lsn.get()),
                "data_lsn": seen.map_or(0, |mirror| mirror.data_lsn.get()),
            })
        });
        Ok(described.collect())
    }

    /// How many of the mirrors that count an fsync waits for, while it waits for `wanted`.
    pub(crate) fn asked_of(&self, wanted: u32) -> Result<(usize, usize), CliError> {
        let set = read_set(&self.directory)?.unwrap_or_default();
        Ok((self.needed(wanted as usize, &set), set.len()))
    }

    /// Where the source of this mirror is.
    pub(crate) fn source_place(&self) -> String {
        let source = self.config().source.clone();
        source.map_or_else(|| "its source".to_owned(), |source| source.addresses.join(" or "))
    }
}

/// An order that waits for nobody, and has not been carried out yet.
pub(crate) struct Overtaking(watch::Sender<u32>);

impl Drop for Overtaking {
    fn drop(&mut self) {
        self.0.send_modify(|orders| *orders -= 1);
    }
}

fn check_enough(wanted: usize, there: usize) -> Result<(), CliError> {
    if there >= wanted {
        return Ok(());
    }
    Err(CliError::new(format!(
        "an fsync would wait for {wanted} mirrors, and {there} could acknowledge: every one would fail"
    ))
    .hint("let another mirror join first: murphy invite here, murphy join there"))
}

/// So long whoever is to acknowledge, or to hear of it, gets to have everything.
const RAISE_MAX: Duration = Duration::from_secs(20);
