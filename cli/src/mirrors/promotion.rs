//! From mirror to source: what it would cost, and the steps.
//!
//! Invariants:
//! - Nothing is changed by a plan. A source that is heard of is not replaced.
//! - The epoch is claimed in the own log before the node's file says that it is the source: a process killed in between is a mirror that
//!   takes nothing older, and may be promoted again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::future::BoxFuture;
use murphy_fs::MemberState;
use murphy_log::{Epoch, EpochId, Log, NodeId, Position, State};
use murphy_mirror::{
    AckPolicy, MemberBook, PromotePlan, PromoteRequest, PublicKey, Replica, Seal, Standing, TakeOver,
    compare, promote,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Mirroring,
    following::SILENCE,
    leading::{waits_for_mirrors, write_set},
    lock,
    replica::DiskReplica,
};
use crate::{
    config::{Promoted, Role},
    error::{CliError, failed},
    node::random,
    settings::{Ack, Settings},
};

/// A promotion that is wanted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct PromoteOrder {
    /// Only say what it would cost.
    pub(crate) dry_run: bool,
    /// Members that are given up.
    pub(crate) assume_lost: Vec<String>,
}

impl Mirroring {
    /// Makes this mirror the source, or says what that would cost.
    pub(crate) fn promote(self: &Arc<Mirroring>, order: &PromoteOrder) -> Result<Value, CliError> {
        let name = self.settings()?.name;
        let replica = match &self.replica {
            Some(replica) if self.is_mirror() => Arc::clone(replica),
            _ => {
                return Err(CliError::new("this node is the source already")
                    .hint("murphy status shows what each node is"));
            }
        };
        let request = self.request(&replica, order)?;
        if order.dry_run {
            let plan = self.plan(&request, &replica)?;
            let note = self.ack_note()?;
            return Ok(described(&plan, &name, self.hears_source(), (&request, note)));
        }
        self.wait_for_silence()?;
        self.wait_for_bytes(&replica);
        let acts =
            Acts { mirroring: Arc::clone(self), replica: Arc::clone(&replica), request: request.clone() };
        let followed = lock(&self.followed).take();
        let was_following = followed.is_some();
        if let Some(followed) = followed {
            let heard = *followed.heard.borrow();
            lock(&self.heard).replace(heard);
            followed.stop(&self.runtime);
        }
        let data = replica.data().borrow().get();
        let plan = match self.runtime.block_on(promote(&request, &acts)) {
            Ok(plan) => plan,
            Err(error) => {
                if was_following {
                    self.follow_again()?;
                }
                return Err(failed(error));
            }
        };
        let note = self.ack_note()?;
        self.lead(&plan, data)?;
        Ok(described(&plan, &name, false, (&request, note)))
    }

    fn request(&self, replica: &DiskReplica, order: &PromoteOrder) -> Result<PromoteRequest, CliError> {
        let mut assume_lost = BTreeSet::new();
        for text in &order.assume_lost {
            let node = text.parse::<NodeId>();
            assume_lost.insert(node.map_err(|error| {
                CliError::usage(format!("--assume-lost {text}: {error}"))
                    .hint("murphy promote --dry-run names the members")
            })?);
        }
        let known = self.known_epoch();
        Ok(PromoteRequest {
            own: self.identity.node(),
            epoch_id: EpochId::from_bytes(random()?),
            known_epoch: replica.promised().map_or(known, |promised| promised.max(known)),
            policy: self.policy()?,
            assume_lost,
        })
    }

    fn policy(&self) -> Result<AckPolicy, CliError> {
        let members = || self.book.holders().into_iter().map(|(node, _)| node).collect();
        Ok(match waits_for_mirrors(&self.volume)? {
            Some(wanted) => AckPolicy::Mirrors { wanted, members: members() },
            None => AckPolicy::Local,
        })
    }

    fn standing(&self, replica: &DiskReplica) -> Result<Standing, CliError> {
        let state = replica.state().ok_or_else(|| {
            CliError::new("this mirror holds nothing yet").hint("it was never seeded by its source")
        })?;
        let heard = lock(&self.followed).as_ref().map(|followed| *followed.heard.borrow());
        let heard = heard.or(*lock(&self.heard)).unwrap_or(state.position.lsn);
        Ok(Standing { state, data_lsn: *replica.data().borrow(), heard_lsn: heard })
    }

    /// The plan as it would be if every member that must be sealed answered, and held nothing more.
    fn plan(&self, request: &PromoteRequest, replica: &DiskReplica) -> Result<PromotePlan, CliError> {
        let answers: BTreeMap<_, _> =
            request.to_seal().into_iter().map(|node| (node, Ok::<_, String>(None))).collect();
        request.plan(self.standing(replica)?, &answers).map_err(failed)
    }

    fn hears_source(&self) -> bool {
        lock(&self.followed).as_ref().is_some_and(|followed| followed.status.borrow().connected)
    }

    /// Returns when the source is not heard of any more. One that was killed is silent after a moment.
    fn wait_for_silence(&self) -> Result<(), CliError> {
        let alive = |how: &str| {
            CliError::new(format!("the source is alive: {how}"))
                .hint("stop it first; two sources would be two histories")
        };
        if lock(&self.followed).is_none() {
            let config = self.config().clone();
            let Some(source) = config.source else { return Ok(()) };
            let log = Arc::clone(&self.log) as Arc<dyn Log>;
            let ask = compare(&self.dialer, &source.addresses, source.key, (&self.keys, config.branch), &log);
            let answer = self.runtime.block_on(async { tokio::time::timeout(ASK_MAX, ask).await });
            return match answer {
                Ok(Ok(_) | Err(murphy_mirror::ExchangeError::Refused(_))) => Err(alive("it answers")),
                Ok(Err(_)) | Err(_) => Ok(()),
            };
        }
        let mut waited = Duration::ZERO;
        while self.hears_source() {
            if waited >= SILENCE + PATIENCE {
                return Err(alive("this mirror follows it"));
            }
            std::thread::sleep(LOOK);
            waited += LOOK;
        }
        Ok(())
    }

    /// What becomes of `--ack mirror=W` when fewer than W mirrors are left: every fsync would fail until somebody joins.
    fn ack_note(&self) -> Result<Option<String>, CliError> {
        let left = self.mirrors().len();
        Ok(waits_for_mirrors(&self.volume)?.filter(|wanted| left < *wanted).map(|wanted| {
            format!("fsync waits         for this node only from then on (ack local): {left} of {wanted} mirrors are left")
        }))
    }

    /// Lets the copier look at everything that has arrived. What only the lost source's store holds does not come any more.
    fn wait_for_bytes(&self, replica: &DiskReplica) {
        if lock(&self.followed).is_none() {
            return;
        }
        let mut waited = Duration::ZERO;
        while waited < BYTES_MAX {
            let end = replica.state().map(|state| state.position.lsn);
            if end.is_none_or(|end| *replica.data().borrow() >= end) {
                return;
            }
            std::thread::sleep(LOOK);
            waited += LOOK;
        }
    }

    /// Becomes the source; the epoch has been claimed.
    fn lead(self: &Arc<Mirroring>, plan: &PromotePlan, data_lsn: u64) -> Result<(), CliError> {
        let data_lsn = data_lsn.max(plan.data_lsn.get()).min(plan.base.position.lsn.get());
        self.change_config(|config| {
            let from = config.source.take();
            config.role = Role::Source;
            config.promoted = from.map(|from| Promoted {
                epoch: plan.epoch.number,
                metadata_lsn: plan.base.position.lsn.get(),
                hash: plan.base.position.hash.to_string(),
                data_lsn,
                from,
            });
        })?;
        // Every member of the set is sealed or given up: the new source begins with all of them.
        write_set(&self.directory, &self.mirrors())?;
        let _entered = self.runtime.enter();
        self.volume.lead(plan.epoch, None).map_err(failed)?;
        if self.ack_note()?.is_some() {
            let change = vec![Settings::set_ack(Ack::Local)];
            let changed = self.runtime.block_on(self.volume.change_settings(change).wait());
            changed
                .map_err(|errno| CliError::new(format!("the setting ack cannot be changed: {errno:?}")))?;
        }
        tracing::warn!(epoch = plan.epoch.number, "this node is the source now");
        self.begin_leading(plan.epoch)
    }
}

fn described(
    plan: &PromotePlan,
    name: &str,
    hears_source: bool,
    (request, ack_note): (&PromoteRequest, Option<String>),
) -> Value {
    let to_seal: Vec<String> = request.to_seal().iter().map(ToString::to_string).collect();
    json!({
        "name": name,
        "epoch": plan.epoch.number,
        "metadata_lsn": plan.base.position.lsn.get(),
        "data_lsn": plan.data_lsn.get(),
        "source_lsn": plan.heard_lsn.get(),
        "source_connected": hears_source,
        "lost_entries": plan.lost_entries(),
        "entries_without_bytes": plan.entries_without_bytes(),
        "seal": to_seal,
        "assume_lost": plan.lost.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "ack_note": ack_note,
        "text": plan.to_string(),
    })
}

/// The acts of a promotion on this node.
struct Acts {
    mirroring: Arc<Mirroring>,
    replica: Arc<DiskReplica>,
    request: PromoteRequest,
}

impl Acts {
    fn standing(&self) -> Result<Standing, String> {
        self.mirroring.standing(&self.replica).map_err(|error| error.to_string())
    }
}

impl TakeOver for Acts {
    fn promise(&self, epoch: Epoch) -> BoxFuture<'_, Result<Standing, String>> {
        let replica = Arc::clone(&self.replica);
        Box::pin(async move {
            let promised = tokio::task::spawn_blocking(move || replica.promise(epoch)).await;
            promised.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            self.standing()
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
            let sealed = sealed.map_err(|error| error.to_string())?;
            Ok(sealed.state.map(|state| Standing {
                state,
                data_lsn: sealed.data_lsn,
                heard_lsn: sealed.heard_lsn,
            }))
        })
    }

    fn catch_up(&self, member: NodeId, to: Position) -> BoxFuture<'_, Result<Standing, String>> {
        Box::pin(
            async move { Err(format!("member {member} holds more, up to lsn {}: promote that one", to.lsn)) },
        )
    }

    fn claim(&self, epoch: Epoch, base: State) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            let (mirroring, log) = (&self.mirroring, Arc::clone(&self.mirroring.log));
            // What this node holds may change who had to be sealed.
            mirroring.shown(base).await?;
            let policy = mirroring.policy().map_err(|error| error.to_string())?;
            if policy != self.request.policy {
                return Err("the members have changed meanwhile: try again".to_owned());
            }
            let claimed = tokio::task::spawn_blocking(move || log.claim(epoch)).await;
            let state = claimed.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            if state != base {
                return Err(format!("the log ends at {} instead of {}", state.position, base.position));
            }
            Ok(())
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

const LOOK: Duration = Duration::from_millis(20);
/// A minute in all.
const SHOWN_STEPS: u32 = 3000;
const BYTES_MAX: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(3);
const ASK_MAX: Duration = Duration::from_secs(3);
