//! A source that has lost what its mirrors hold: how it finds out, before it decides and while it does, and what it does then.
//!
//! Invariants:
//! - Before a source decides, every member that can be reached says where it stands. What one of them holds of the source's own epoch beyond
//!   its log is fetched first; a source that knows of such entries and does not get them does not decide.
//! - Nor does one of whose epoch a member holds other entries: they left a source that had them durable, so this one has lost them. Which of two
//!   histories goes on is decided by people, never by whoever is asked first.
//! - A source that hears of either while it decides acknowledges nothing any more (`mandate.rs`) and ends. Its directory remembers what it lacks.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use murphy_log::{DiskLog, Epoch, Log, NodeId, Position};
use murphy_mirror::{Lookup, MemberBook, Point, Stands, look_up};

use super::{Mirroring, changed, lock, stale};
use crate::{
    error::{CliError, failed},
    givers::{Giver, Member, MirrorGiver},
    mirror_notes::{self, MirrorNote},
    node::Node,
};

impl Mirroring {
    /// Asks the members before this source decides: whether it was replaced, and whether they hold what it has lost.
    /// Those that are `given_up` are not asked.
    pub(crate) fn ask_members(&self, node: &Node, given_up: &BTreeSet<NodeId>) -> Result<(), CliError> {
        let own = node.log.recovery().epoch;
        let standing = self.standings(own, given_up);
        if let Some(later) = standing.iter().find_map(|(_, stands)| stands.replaces(own)) {
            return stale::replaced(self, later);
        }
        let end = |stands: Stands| stands.state.map(|state| state.position).filter(|end| end.epoch == own);
        let mut holding: Vec<(MirrorGiver, Position)> =
            standing.into_iter().filter_map(|(giver, stands)| Some((giver, end(stands)?))).collect();
        holding.sort_by_key(|(_, held)| std::cmp::Reverse(held.lsn));
        for (giver, held) in &holding {
            if held.lsn > node.log.tail().position.lsn {
                let fetched = self.fetch(node, giver, *held);
                fetched.map_err(|error| error.hint(ways_out(&node.log, &holding, given_up)))?;
            } else if !has(&node.log, *held)? {
                return Err(CliError::new(format!(
                    "{} holds another lsn {} of epoch {} than this node, which leads it: this one has lost entries before, and has gone on without them, or it is a copy",
                    giver.member, held.lsn, own.number
                ))
                .hint(ways_out(&node.log, &holding, given_up)));
            }
        }
        Ok(())
    }

    /// Gets back what a member holds beyond this log.
    fn fetch(&self, node: &Node, giver: &MirrorGiver, held: Position) -> Result<(), CliError> {
        let (member, end) = (giver.member.clone(), node.log.tail().position.lsn);
        let giver: Box<dyn Giver> = Box::new(giver.clone());
        node.fetch_lost(&[giver], held.lsn, &self.runtime).map_err(|error| {
            CliError::new(format!(
                "{member} holds entries of this node's epoch up to lsn {}, this log ends at {end}: {error}",
                held.lsn
            ))
        })
    }

    /// Where every member that answers in time stands.
    fn standings(&self, own: Epoch, given_up: &BTreeSet<NodeId>) -> Vec<(MirrorGiver, Stands)> {
        let config = self.config().clone();
        let is_asked = |node: NodeId| node != self.identity.node() && !given_up.contains(&node);
        let members = self.book.members().into_iter().filter(|(node, _)| is_asked(*node));
        let members = members.filter_map(|(node, row)| Member::of_row(node, row)).filter(Member::listens);
        let asked = members.map(|member| {
            let giver = MirrorGiver::new(&config, member, self.dialer.clone());
            async move {
                let answer = tokio::time::timeout(ASK_MAX, giver.ask(Some(own))).await;
                match answer {
                    Ok(Ok(lender)) => return Some((giver, lender.stands)),
                    Ok(Err(error)) => tracing::info!(%error, "{} does not say where it stands", giver.member),
                    Err(_) => tracing::info!("{} does not answer in time", giver.member),
                }
                None
            }
        });
        let asked: Vec<_> = asked.collect();
        self.runtime.block_on(futures::future::join_all(asked)).into_iter().flatten().collect()
    }

    /// Notes how far mirrors are known to be, now and then.
    pub(super) fn note_mirrors(self: &Arc<Mirroring>) {
        let this = Arc::downgrade(self);
        let (mut changes, mut stopped) = (self.services.board.changes(), self.stop.subscribe());
        self.runtime.spawn(async move {
            loop {
                changes.borrow_and_update();
                let Some(mirroring) = this.upgrade() else { return };
                // A disk that is slow must not hold up those who follow.
                let noted = murphy_log::spawn_blocking(move || mirroring.note_furthest()).await;
                if let Err(error) = noted {
                    tracing::error!(%error, "what mirrors hold is not noted any more");
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(NOTE_INTERVAL) => {}
                    _ = stopped.wait_for(|stop| *stop) => return,
                }
                if !changed(&mut changes, &mut stopped).await {
                    return;
                }
            }
        });
    }

    /// Notes how far a mirror is known to be, if that is further than was noted. Blocks.
    pub(super) fn note_furthest(&self) {
        let Some((node, position)) = self.services.board.furthest() else { return };
        let mut noted = lock(&self.noted);
        if *noted >= position.lsn {
            return;
        }
        match mirror_notes::save(&self.directory, &MirrorNote { node, position }) {
            Ok(()) => *noted = position.lsn,
            Err(error) => tracing::warn!(%error, "what mirrors hold is not noted"),
        }
    }

    /// Ends this source as soon as a mirror says that it holds what the source has lost.
    pub(super) fn watch_loss(self: &Arc<Mirroring>) {
        let this = Arc::downgrade(self);
        let (mut changes, mut stopped) = (self.services.board.changes(), self.stop.subscribe());
        self.runtime.spawn(async move {
            loop {
                changes.borrow_and_update();
                let Some(mirroring) = this.upgrade() else { return };
                if let Some((node, position)) = mirroring.services.board.lost() {
                    mirroring.volume.ask_again();
                    // The next start must know of it, so it is noted before this process ends.
                    let ended = murphy_log::spawn_blocking(move || mirroring.has_lost(node, position)).await;
                    if let Err(error) = ended {
                        tracing::error!(%error, "that entries were lost is not noted");
                    }
                    return;
                }
                drop(mirroring);
                if !changed(&mut changes, &mut stopped).await {
                    return;
                }
            }
        });
    }

    fn has_lost(&self, node: NodeId, position: Position) {
        if let Err(error) = mirror_notes::save(&self.directory, &MirrorNote { node, position }) {
            tracing::error!(%error, "that entries were lost cannot be noted");
        }
        let why = format!(
            "mirror {node} holds lsn {} of epoch {}, which this node leads, and this node does not: what was durable here is lost",
            position.lsn, position.epoch.number
        );
        *lock(&self.lost) = Some(why);
    }

    /// Why this source has to stop, if a mirror holds what it has lost.
    pub(crate) fn lost(&self) -> Option<String> {
        lock(&self.lost).clone()
    }
}

/// Whether the log has what a member says that it ends with, as far as the log reaches back.
fn has(log: &DiskLog, held: Position) -> Result<bool, CliError> {
    let same = Point { lsn: held.lsn, hash: held.hash };
    Ok(match look_up(log, held.lsn).map_err(failed)? {
        Lookup::End(point) => point == same,
        Lookup::Inside { .. } | Lookup::Beyond { .. } => false,
        Lookup::Trimmed { .. } => true,
    })
}

/// How to go on: with what these members hold, or without all of those that hold what the log does not have.
fn ways_out(log: &DiskLog, holding: &[(MirrorGiver, Position)], given_up: &BTreeSet<NodeId>) -> String {
    // One that cannot be compared is named too: it may stand in the way as well.
    let others = holding.iter().filter(|(_, held)| !has(log, *held).unwrap_or(false));
    let others = others.map(|(giver, _)| giver.member.node).chain(given_up.iter().copied());
    let others: Vec<String> = others.map(|node| node.to_string()).collect();
    format!(
        "murphy promote at that mirror goes on with its history; murphy member remove DIR {} --assume-lost gives up what this node does not have, and goes on with this one's",
        others.join(" ")
    )
}

const ASK_MAX: Duration = Duration::from_secs(3);
/// The note is saved at most so often.
const NOTE_INTERVAL: Duration = Duration::from_secs(1);
