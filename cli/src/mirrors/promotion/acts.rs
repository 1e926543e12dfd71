//! The acts of a promotion on this node, in the order in which [`murphy_mirror::promote`] asks for them.
//!
//! Invariants:
//! - The epoch was remembered before the first act.
//! - What an act fetches or finds out may change who must be sealed: then nothing is claimed, and the promotion is tried again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use murphy_backup::Successor;
use murphy_fs::MemberState;
use murphy_log::{Epoch, Log, NodeId, Position, State};
use murphy_mirror::{
    ExchangeError, MemberBook, PromoteRequest, PublicKey, Refusal, Refused, Replica, Seal, Standing, TakeOver,
};

use super::{super::replica::DiskReplica, LOOK, Mirroring, places::Places};

pub(super) struct Acts {
    pub(super) mirroring: Arc<Mirroring>,
    pub(super) replica: Arc<DiskReplica>,
    pub(super) request: PromoteRequest,
    pub(super) places: Arc<Places>,
    pub(super) successor: Successor,
    /// A member has promised an epoch that does not come before this one.
    pub(super) outbid: AtomicBool,
}

impl Acts {
    /// Whether everybody who must be sealed is still the same.
    fn check_unchanged(&self) -> Result<(), String> {
        let text = |error: crate::error::CliError| error.to_string();
        if self.mirroring.policy().map_err(text)? != self.request.policy {
            return Err("the members have changed meanwhile: try again".to_owned());
        }
        if self.mirroring.settings().map_err(text)?.archives != self.places.shared {
            return Err("the archives have changed meanwhile: try again".to_owned());
        }
        Ok(())
    }
}

impl TakeOver for Acts {
    fn promise(&self, epoch: Epoch) -> BoxFuture<'_, Result<Standing, String>> {
        let replica = Arc::clone(&self.replica);
        Box::pin(async move {
            murphy_log::aside(move || replica.promise(epoch)).await.map_err(|error| error.to_string())?;
            let state = self.places.log.fetch(&self.successor).await.map_err(|error| error.to_string())?;
            self.mirroring.shown(state).await?;
            self.check_unchanged()?;
            self.mirroring.standing(&self.replica).map_err(|error| error.to_string())
        })
    }

    fn seal(&self, member: NodeId, epoch: Epoch) -> BoxFuture<'_, Result<Option<Standing>, String>> {
        Box::pin(async move {
            let row = self.mirroring.book.row(member).ok_or("it is no member")?;
            let MemberState::Joined { public_key } = row.state else {
                return Err("it is no member any more".to_owned());
            };
            if row.addresses.is_empty() {
                return Err("nobody knows where it listens: serve it with --listen".to_owned());
            }
            let config = self.mirroring.config().clone();
            let seal = Seal { volume: config.volume, branch: config.branch, epoch };
            let key = PublicKey::from_bytes(public_key);
            let sealed = self.mirroring.dialer.seal(&row.addresses, key, seal).await;
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
            let more = format!("member {member} holds more, up to lsn {}: promote that one", to.lsn);
            Err(format!("{more} (--assume-lost {member} gives up what only it has)"))
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
            self.places.log.seal(&self.successor).await.map_err(|error| error.to_string())?;
            let state = self.places.log.begin(&self.successor).await.map_err(|error| error.to_string())?;
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

/// A minute in all.
const SHOWN_STEPS: u32 = (Duration::from_secs(60).as_millis() / LOOK.as_millis()) as u32;
