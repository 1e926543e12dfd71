//! A source that has lost what its mirrors hold: how it finds out, before it decides and while it does, and what it does then.
//!
//! Invariants:
//! - Before a source decides, every member that can be reached says where it stands. What one of them holds of the source's own epoch beyond
//!   its log is fetched first; a source that knows of such entries and does not get them does not decide.
//! - Nor does one of whose epoch a member holds other entries: they left a source that had them durable, so this one has lost them. Which of two
//!   histories goes on is decided by people, never by whoever is asked first.
//! - A source that hears of either while it decides acknowledges nothing any more and ends. Its directory remembers what it lacks.

use std::{sync::Arc, time::Duration};

use murphy_fs::{AcknowledgeError, Acknowledgement, Acknowledger};
use murphy_log::{DiskLog, Epoch, Log, Lsn, NodeId, Position};
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
    /// One that is `given_up` is not asked.
    pub(crate) fn ask_members(&self, node: &Node, given_up: Option<NodeId>) -> Result<(), CliError> {
        let own = node.log.recovery().epoch;
        let mut standing = self.standings(own, given_up);
        if let Some(later) = standing.iter().find_map(|(_, stands)| stands.ends(own)) {
            return stale::replaced(self, later);
        }
        standing.retain(|(_, stands)| stands.state.is_some_and(|state| state.position.epoch == own));
        let end = |stands: &Stands| stands.state.map(|state| state.position);
        standing.sort_by_key(|(_, stands)| std::cmp::Reverse(end(stands).map(|end| end.lsn)));
        for (giver, stands) in standing {
            let Some(held) = end(&stands) else { continue };
            if held.lsn > node.log.tail().position.lsn {
                self.fetch(node, giver, held)?;
            } else if holds_other(&node.log, held)? {
                return Err(CliError::new(format!(
                    "{} holds another lsn {} of epoch {} than this node, which leads it: this one has lost entries before, and has gone on without them, or it is a copy",
                    giver.member, held.lsn, own.number
                ))
                .hint("murphy promote at that mirror goes on with its history; murphy member remove with --assume-lost gives it up, and goes on with this one"));
            }
        }
        Ok(())
    }

    /// Gets back what a member holds beyond this log.
    fn fetch(&self, node: &Node, giver: MirrorGiver, held: Position) -> Result<(), CliError> {
        let (member, end) = (giver.member.clone(), node.log.tail().position.lsn);
        let giver: Box<dyn Giver> = Box::new(giver);
        node.fetch_lost(&[giver], held.lsn, &self.runtime).map_err(|error| {
            CliError::new(format!(
                "{member} holds entries of this node's epoch up to lsn {}, this log ends at {end}: {error}",
                held.lsn
            ))
            .hint("this node has lost acknowledged entries, and does not go on without them: murphy promote at that mirror")
        })
    }

    /// Where every member that answers in time stands.
    fn standings(&self, own: Epoch, given_up: Option<NodeId>) -> Vec<(MirrorGiver, Stands)> {
        let config = self.config().clone();
        let is_asked = |node: NodeId| node != self.identity.node() && Some(node) != given_up;
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
                    mirroring.volume.acknowledge_with(Arc::new(Incomplete { node, position }));
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

/// Whether the log has something else where a member says that it stands.
fn holds_other(log: &DiskLog, held: Position) -> Result<bool, CliError> {
    let same = Point { lsn: held.lsn, hash: held.hash };
    Ok(match look_up(log, held.lsn).map_err(failed)? {
        Lookup::End(point) => point != same,
        Lookup::Inside { .. } => true,
        Lookup::Trimmed { .. } | Lookup::Beyond { .. } => false,
    })
}

/// Acknowledges nothing: the log lacks entries before those that it would be asked about.
struct Incomplete {
    node: NodeId,
    position: Position,
}

impl Acknowledger for Incomplete {
    fn acknowledged(&self, _: Lsn, _: Duration) -> Acknowledgement<'_> {
        let held = format!("mirror {} holds lsn {}, this source does not", self.node, self.position.lsn);
        Box::pin(std::future::ready(Err(AcknowledgeError::Lost(held))))
    }
}

const ASK_MAX: Duration = Duration::from_secs(3);
/// The note is saved at most so often.
const NOTE_INTERVAL: Duration = Duration::from_secs(1);
