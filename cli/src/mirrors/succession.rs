//! Whom the mirrors follow after a promotion: the new source tells them, and they go on with it, with what they hold. A source that was never
//! promoted asks those that do not follow whether somebody else was.
//!
//! Invariants:
//! - A mirror follows whoever leads the epoch that it has promised last, and nobody else by itself. A source of which it hears is left only for
//!   a later epoch.
//! - A source that is left is told that it was replaced; one that does not answer, for some minutes.
//! - Nothing that a mirror holds is given up by that: what is not in the new source's history is kept as a branch.

use std::{sync::Arc, time::Duration};

use murphy_log::{Epoch, NodeId};
use murphy_mirror::{ExchangeError, Leader, Refusal, Replica, Seal};

use super::{Mirroring, changed, lock};
use crate::{
    config::Upstream,
    error::CliError,
    givers::{Member, MirrorGiver},
};

impl Mirroring {
    /// As a source, for as long as it leads, speaks with every member that does not follow. One that was a mirror tells them who leads, and where
    /// it listens. One that never was asks them whether somebody else does: nobody may have answered when it began, and whoever took over from
    /// it may be gone, so that no source is left that knows whom it has to tell.
    pub(super) fn speak_with_members(self: &Arc<Mirroring>) {
        let tells = self.config().promoted.is_some();
        if tells && self.listen.is_none() {
            tracing::warn!("this source does not listen, so no mirror can follow it: serve it with --listen");
        }
        let leads = self.listen.filter(|_| tells).map(|listen| listen.to_string());
        let (this, mut stopped) = (Arc::downgrade(self), self.stop.subscribe());
        self.runtime.spawn(async move {
            loop {
                let Some(mirroring) = this.upgrade() else { return };
                let spoken = mirroring.absent_members().into_iter();
                let spoken = spoken.map(|member| mirroring.speak_with(member, leads.clone()));
                futures::future::join_all(spoken).await;
                drop(mirroring);
                tokio::select! {
                    () = tokio::time::sleep(TELL_AGAIN) => {}
                    _ = stopped.wait_for(|stop| *stop) => return,
                }
            }
        });
    }

    async fn speak_with(&self, member: Member, leads: Option<String>) {
        match leads {
            Some(listen) => self.tell_member(member, listen).await,
            None => self.ask_for_successor(member, self.known_epoch()).await,
        }
    }

    /// The members that hold a copy, can be reached, and do not follow.
    fn absent_members(&self) -> Vec<Member> {
        let (own, status) = (self.identity.node(), self.services.board.status(self.clock.monotonic()));
        let follows = |node| status.iter().any(|mirror| mirror.node == node && mirror.connected);
        let members = self.book.holders().into_iter().filter(|(node, _)| *node != own && !follows(*node));
        members.filter_map(|(node, row)| Member::of_row(node, row)).filter(Member::listens).collect()
    }

    async fn tell_member(&self, member: Member, listen: String) {
        let (epoch, proof) = (self.known_epoch(), self.services.proof());
        let seal = {
            let config = self.config();
            Seal { volume: config.volume, branch: config.branch, epoch, proof, leads: vec![listen] }
        };
        let said = self.dialer.seal(&member.addresses, member.key, seal);
        match tokio::time::timeout(TELL_MAX, said).await {
            Ok(Ok(_)) => tracing::info!("{member} has heard that this node leads"),
            // Whatever the reason: whoever refuses may know of a later epoch.
            Ok(Err(ExchangeError::Refused(refused))) => {
                let node = member.node;
                self.ask_for_successor(member, epoch).await;
                if refused.reason == Refusal::Fenced && self.services.board.fenced_by().is_none() {
                    self.note_bound(node, &refused.detail);
                }
            }
            Ok(Err(error)) => tracing::debug!(%error, "{member} has not heard that this node leads"),
            Err(_) => tracing::debug!("{member} does not answer in time"),
        }
    }

    /// Notes that a member has promised an epoch of the same number that another node tried to begin, and never led: it follows nobody else in that.
    fn note_bound(&self, node: NodeId, detail: &str) {
        let why = format!("{detail}, for a node that has not begun it; {UNBIND}");
        if self.services.board.refused(node, why) {
            tracing::warn!(%node, "a member does not follow: {detail}, for a node that has not begun it; {UNBIND}");
        }
    }

    /// Asks a member that does not follow where it stands: if it knows of a later epoch, this source has been replaced.
    async fn ask_for_successor(&self, member: Member, own: Epoch) {
        let giver = MirrorGiver::new(&self.config().clone(), member, self.dialer.clone());
        let asked = tokio::time::timeout(TELL_MAX, giver.ask(Some(own))).await;
        if let Ok(Ok(lender)) = asked
            && let Some(later) = lender.stands.replaces(own)
        {
            tracing::error!(epoch = later.number, "{} knows of a later epoch", giver.member);
            self.services.board.fenced(later);
        }
    }

    /// As a mirror: goes over to whoever leads the epoch that was promised, whenever somebody says so.
    pub(super) fn begin_going_over(self: &Arc<Mirroring>) {
        let this = Arc::downgrade(self);
        let (mut leaders, mut stopped) = (self.leader.subscribe(), self.stop.subscribe());
        self.runtime.spawn(async move {
            while changed(&mut leaders, &mut stopped).await {
                let (Some(leader), Some(mirroring)) = (leaders.borrow_and_update().clone(), this.upgrade())
                else {
                    continue;
                };
                // It waits for the end of what follows now.
                let gone = murphy_log::spawn_blocking(move || mirroring.go_over(&leader)).await;
                match gone {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::error!(%error, "this mirror does not follow the new source"),
                    Err(error) => tracing::error!(%error, "this mirror does not follow the new source"),
                }
            }
        });
    }

    /// Tells the source that this mirror leaves that `epoch` has replaced it, for a while if it does not answer: it may go on acknowledging, and
    /// whoever leads now may not reach it.
    fn tell_left(&self, left: Upstream, epoch: Epoch) {
        let (dialer, keys, branch) = (self.dialer.clone(), self.keys.clone(), self.config().branch);
        let mut stopped = self.stop.subscribe();
        self.runtime.spawn(async move {
            for _ in 0..LEFT_TRIES {
                let said = dialer.tell_fenced(&left.addresses, left.key, (&keys, branch), epoch, None);
                match tokio::time::timeout(TELL_MAX, said).await {
                    Ok(Ok(())) => return tracing::info!("the source before has heard that it was replaced"),
                    // It leads nothing any more, or this node is nobody to it.
                    Ok(Err(error @ ExchangeError::Refused(_))) => {
                        return tracing::info!(%error, "the source before does not listen to this mirror");
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "the source before has not heard of its successor");
                    }
                    Err(_) => tracing::debug!("the source before does not answer in time"),
                }
                tokio::select! {
                    () = tokio::time::sleep(TELL_AGAIN) => {}
                    _ = stopped.wait_for(|stop| *stop) => return,
                }
            }
        });
    }

    fn go_over(self: &Arc<Mirroring>, leader: &Leader) -> Result<(), CliError> {
        let _turn = lock(&self.turn);
        let upstream = Upstream { addresses: leader.addresses.clone(), key: leader.key };
        let config = self.config().clone();
        let promised = self.replica.as_ref().and_then(|replica| replica.promised());
        let heard = lock(&self.followed).as_ref().map(|followed| followed.status.borrow().connected);
        let is_same = config.source.as_ref().is_some_and(|source| source.key == leader.key);
        let is_there = heard.is_some() && config.source.as_ref() == Some(&upstream);
        let stays = is_there || (heard == Some(true) && is_same);
        if !self.is_mirror() || promised != Some(leader.epoch) || stays {
            return Ok(());
        }
        let node = leader.key.node();
        tracing::warn!(%node, epoch = leader.epoch.number, "following the new source from now on");
        if let Some(left) = config.source.filter(|_| !is_same) {
            self.tell_left(left, leader.epoch);
        }
        self.change_config(|config| config.source = Some(upstream))?;
        self.services.set_source_key(leader.key);
        if let Some(followed) = lock(&self.followed).take() {
            followed.stop(&self.runtime);
        }
        self.follow_again()
    }
}

/// What to do about a member whose promise binds it to nobody.
const UNBIND: &str = "murphy member remove, and murphy join in a new directory there; or promote that mirror, which takes over with a later epoch";
/// So often members that do not follow are told.
const TELL_AGAIN: Duration = Duration::from_secs(2);
const TELL_MAX: Duration = Duration::from_secs(10);
/// So often the source that is left is told, if it does not answer.
const LEFT_TRIES: u32 = 30;
