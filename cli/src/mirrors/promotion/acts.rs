//! The acts of a promotion on this node, in the order in which [`murphy_mirror::promote`] asks for them.
//!
//! Invariants:
//! - The epoch was remembered before the first act.
//! - What an act fetches or finds out may change who must be sealed: then nothing is claimed, and the promotion is tried again. An archive that
//!   only what comes behind the base names is sealed before the epoch begins.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use murphy_backup::{Successor, TakeOverError, TakeOverLog};
use murphy_log::{Epoch, Log, NodeId, Position, State};
use murphy_mirror::{
    ExchangeError, Lender, MemberBook, Part, PromoteRequest, Refusal, Refused, Replica, Seal, Standing,
    TakeOver,
};

use super::{super::replica::DiskReplica, LOOK, Mirroring, places::Places};
use crate::{
    givers::{Member, MirrorGiver},
    settings::SharedArchive,
    take_over::{GivenUp, named_beyond, way_past},
};

pub(super) struct Acts {
    pub(super) mirroring: Arc<Mirroring>,
    pub(super) replica: Arc<DiskReplica>,
    pub(super) request: PromoteRequest,
    pub(super) places: Arc<Places>,
    pub(super) successor: Successor,
    pub(super) given_up: GivenUp,
    /// A member has promised an epoch that does not come before this one.
    pub(super) outbid: AtomicBool,
    /// It has ended before anybody promised anything.
    pub(super) unchanged: AtomicBool,
}

impl Acts {
    /// Whether everybody who must be sealed is still the same.
    fn check_unchanged(&self) -> Result<(), String> {
        let text = |error: crate::error::CliError| error.to_string();
        if self.mirroring.policy().map_err(text)? != self.request.policy {
            return Err("the members have changed meanwhile: try again".to_owned());
        }
        // Who of them acknowledges makes no difference to who has to be sealed.
        let now = self.mirroring.settings().map_err(text)?.archives;
        if !now.iter().map(SharedArchive::place).eq(self.places.shared.iter().map(SharedArchive::place)) {
            return Err("the archives have changed meanwhile: try again".to_owned());
        }
        Ok(())
    }

    /// Seals the archives, and those that the source before has named in what it still got into one of them.
    async fn seal_archives(&self) -> Result<TakeOverLog, String> {
        let mut places = self.places.log.clone();
        let mut known: Vec<String> = self.places.shared.iter().map(|archive| archive.url.clone()).collect();
        loop {
            places.seal(&self.successor).await.map_err(|error| self.told(&error))?;
            let named = named_beyond(&places, &known).await.map_err(|error| error.to_string())?;
            if named.is_empty() {
                return Ok(places);
            }
            known.extend(named.iter().map(|archive| archive.url.clone()));
            let more = Places::open(&self.mirroring.promoted(&self.replica), &named, &self.given_up).await;
            let more = more.map_err(|error| format!("{error}; --assume-lost gives it up by its URL"))?;
            places.places.extend(more.log.places);
        }
    }

    /// Why an archive refuses, and the way past that if there is one.
    fn told(&self, error: &TakeOverError) -> String {
        match way_past(error, &self.successor) {
            Some(way) => format!("{error}; {way}"),
            None => error.to_string(),
        }
    }

    /// A member that can be asked.
    fn member(&self, node: NodeId) -> Result<Member, String> {
        let row = self.mirroring.book.row(node).ok_or("it is no member")?;
        let member = Member::of_row(node, row).ok_or("it is no member any more")?;
        match member.listens() {
            true => Ok(member),
            false => Err("nobody knows where it listens: serve it with --listen".to_owned()),
        }
    }

    async fn lender(&self, node: NodeId) -> Result<Lender, String> {
        let (config, dialer) = (self.mirroring.config().clone(), self.mirroring.dialer.clone());
        let giver = MirrorGiver::new(&config, self.member(node)?, dialer);
        giver.ask(Some(self.request.next)).await.map_err(|error| error.to_string())
    }

    /// Refuses to go on behind an end that an earlier attempt has settled: an archive is sealed there, and takes only entries of the new epoch.
    async fn check_unsettled(&self) -> Result<(), String> {
        let standings = self.places.log.look(&self.successor).await.map_err(|error| error.to_string())?;
        match standings.iter().any(|standing| standing.is_settled) {
            true => Err("an archive was sealed below that, by an earlier attempt or by a node that is given up: --assume-lost and its URL goes on without that \
                         archive, if it was not this node's attempt"
                .to_owned()),
            false => Ok(()),
        }
    }

    /// Copies the packs that those entries name, as far as the member has them. What does not come is found by the plan that is made then.
    async fn take_packs(&self, lender: &Lender, to: Position) {
        let wanted = lender.stands.data_lsn.min(to.lsn);
        match self.mirroring.copier(&self.replica, lender.packs.clone()).reach(wanted, PACKS_MAX).await {
            Ok(true) => {}
            Ok(false) => tracing::warn!("not every pack came from the member"),
            Err(error) => tracing::warn!(%error, "packs were not copied from the member"),
        }
    }
}

impl TakeOver for Acts {
    fn promise(&self, epoch: Epoch) -> BoxFuture<'_, Result<Standing, String>> {
        let replica = Arc::clone(&self.replica);
        Box::pin(async move {
            // A promise is not taken back, and would end a source that only an archive knows of: what an archive refuses is refused before.
            self.places.log.look(&self.successor).await.map_err(|error| {
                self.unchanged.store(true, Ordering::Relaxed);
                self.told(&error)
            })?;
            murphy_log::aside(move || replica.promise(epoch)).await.map_err(|error| error.to_string())?;
            let state = self.places.log.fetch(&self.successor).await.map_err(|error| error.to_string())?;
            self.mirroring.shown(state).await?;
            self.check_unchanged()?;
            self.mirroring.standing(&self.replica).map_err(|error| error.to_string())
        })
    }

    fn seal(&self, member: NodeId, epoch: Epoch) -> BoxFuture<'_, Result<Option<Standing>, String>> {
        Box::pin(async move {
            let Member { addresses, key, .. } = self.member(member)?;
            let config = self.mirroring.config().clone();
            let (proof, leads) = (self.mirroring.services.proof(), Vec::new());
            let seal = Seal { volume: config.volume, branch: config.branch, epoch, proof, leads };
            let sealed = self.mirroring.dialer.seal(&addresses, key, seal).await;
            if let Err(ExchangeError::Refused(Refused { reason: Refusal::Fenced, .. })) = &sealed {
                self.outbid.store(true, Ordering::Relaxed);
            }
            let sealed = sealed.map_err(|error| error.to_string())?;
            Ok(sealed.state.map(|state| Standing {
                state,
                data_lsn: sealed.data_lsn,
                heard_lsn: sealed.heard_lsn,
            }))
        })
    }

    fn catch_up(&self, member: NodeId, to: Position) -> BoxFuture<'_, Result<Standing, String>> {
        Box::pin(async move {
            let given_up = |error: String| {
                format!(
                    "member {member}, which holds more, up to lsn {}: {error} (--assume-lost {member} gives up what only it has)",
                    to.lsn
                )
            };
            self.check_unsettled().await.map_err(given_up)?;
            let lender = self.lender(member).await.map_err(given_up)?;
            let replica = Arc::clone(&self.replica) as Arc<dyn Replica>;
            let given = lender.give_frames(&replica, self.request.next, to).await;
            given.map_err(|error| given_up(error.to_string()))?;
            let held = self.replica.state().ok_or("this mirror holds nothing")?;
            self.mirroring.shown(held).await?;
            self.take_packs(&lender, to).await;
            self.mirroring.standing(&self.replica).map_err(|error| error.to_string())
        })
    }

    fn claim(&self, _: Epoch, base: State) -> BoxFuture<'_, Result<State, String>> {
        Box::pin(async move {
            self.mirroring.shown(base).await?;
            self.check_unchanged()?;
            let found = self.mirroring.log.durable().state();
            if found != base {
                return Err(format!("the log ends at {} instead of {}", found.position, base.position));
            }
            let places = self.seal_archives().await?;
            // From here on it promises nobody anything; what it has promised meanwhile ends the promotion.
            self.mirroring.services.become_part(Part::Neither);
            if self.replica.promised() != Some(self.request.next) {
                return Err("this node has promised another epoch meanwhile".to_owned());
            }
            let state = places.begin(&self.successor).await.map_err(|error| error.to_string())?;
            self.mirroring.shown(state).await?;
            Ok(state)
        })
    }
}

impl Mirroring {
    /// Returns when the volume shows everything up to `base`.
    async fn shown(&self, base: State) -> Result<(), String> {
        for _ in 0..SHOWN_STEPS {
            if self.volume.state().position.lsn >= base.position.lsn {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        Err("the tree does not catch up with the log".to_owned())
    }
}

/// After so long without a pack that came, no more are waited for.
const PACKS_MAX: Duration = Duration::from_secs(60);
/// A minute in all.
const SHOWN_STEPS: u32 = (Duration::from_secs(60).as_millis() / LOOK.as_millis()) as u32;
