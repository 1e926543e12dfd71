//! From mirror to source: what it would cost, and the steps.
//!
//! Invariants:
//! - Nothing is changed by a plan. A source that is heard of is not replaced.
//! - The next epoch is remembered before anybody promises it or any archive is sealed for it.
//! - The epoch is claimed in the own log before the node's file says that it is the source: a process killed in between is a mirror that
//!   takes nothing older, and may be promoted again.

mod acts;
mod places;
mod soundness;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use murphy_backup::{KnownLosses, Successor};
use murphy_fs::MemberState;
use murphy_log::{Epoch, EpochId, Log};
use murphy_mirror::{
    AckPolicy, MemberBook, PromotePlan, PromoteRequest, Replica, Standing, compare, promote,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::{
    acts::Acts,
    places::{Lacking, Places},
};
use super::{
    Mirroring,
    following::SILENCE,
    leading::{waits_for_mirrors, write_set},
    lock,
    replica::DiskReplica,
};
use crate::{
    attempts,
    config::{Promoted, Role},
    error::{CliError, failed},
    node::{failure_domain, random},
    places::local_url,
    replaced::refuse_branch,
    settings::{Ack, Settings},
    take_over::{GivenUp, Outlook},
};

/// A promotion that is wanted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct PromoteOrder {
    /// Only say what it would cost.
    pub(crate) dry_run: bool,
    /// Members, and URLs of archives, that are given up.
    pub(crate) assume_lost: Vec<String>,
}

impl Mirroring {
    /// Makes this mirror the source, or says what that would cost. `before_leading` is told what the volume waits for, right before
    /// anybody can wait for it.
    pub(crate) fn promote(
        self: &Arc<Mirroring>,
        order: &PromoteOrder,
        before_leading: &dyn Fn(Ack) -> Result<(), CliError>,
    ) -> Result<Value, CliError> {
        let _turn = lock(&self.turn);
        self.check_member()?;
        let settings = self.settings()?;
        let replica = match &self.replica {
            Some(replica) if self.is_mirror() => Arc::clone(replica),
            _ => {
                return Err(CliError::new("this node is the source already")
                    .hint("murphy status shows what each node is"));
            }
        };
        let again = !attempts::load(&self.attempts_path())?.is_empty();
        let given_up = GivenUp::parse(&order.assume_lost, &settings.archives, again, "murphy promote")?;
        if order.dry_run {
            return self.outlook(&replica, &settings, &given_up);
        }
        self.wait_for_silence()?;
        self.check_tree(true)?;
        self.wait_for_bytes(&replica);
        // A mirror that is not served shows only what it held when it was opened.
        self.volume.follow().map_err(failed)?;
        let followed = lock(&self.followed).take();
        let was_following = followed.is_some();
        if let Some(followed) = followed {
            let heard = *followed.heard.borrow();
            lock(&self.heard).replace(heard);
            followed.stop(&self.runtime);
        }
        let taken = self.take_over(&replica, &settings, given_up);
        let (plan, places, request) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                if was_following {
                    self.follow_again()?;
                }
                return Err(error);
            }
        };
        let note = self.ack_note()?;
        let data = replica.data().borrow().get();
        self.lead(&plan, data, &places, before_leading)?;
        let outlooks = places.shared.iter().map(|archive| archive.url.clone()).collect::<Vec<_>>();
        let mut said = described(&plan, &settings.name, false, (&request, note));
        said["archives"] = json!(outlooks);
        Ok(said)
    }

    /// Refuses on a mirror that was removed: whoever is left would not know of what it does.
    fn check_member(&self) -> Result<(), CliError> {
        refuse_branch(&self.directory, &self.config())?;
        let own = self.book.row(self.identity.node()).map(|row| row.state);
        if !self.config().removed && !matches!(own, Some(MemberState::Revoked { .. })) {
            return Ok(());
        }
        Err(CliError::new("this node was removed from the volume, and takes over from nobody").hint(
            "murphy join in a new directory, with the same --blocks, makes a mirror anew (if they lie in this directory, keep it); murphy dump takes out what this one holds",
        ))
    }

    /// What it would cost, and what every archive has to do with it.
    fn outlook(
        &self,
        replica: &DiskReplica,
        settings: &Settings,
        given_up: &GivenUp,
    ) -> Result<Value, CliError> {
        let attempts = attempts::load(&self.attempts_path())?;
        let known: Vec<Epoch> = [self.known_epoch()].into_iter().chain(replica.promised()).collect();
        let fresh = EpochId::from_bytes(random()?);
        let request = self.request(Successor::next_epoch(&attempts, &known, fresh), given_up)?;
        let successor = Successor { node: request.own, attempts, given_up: given_up.nodes.clone() };
        let promoted = self.promoted(replica);
        let taker = promoted.taker();
        let look = Outlook::of(&taker, &settings.archives, given_up, (&successor, &promoted.log));
        let outlooks = self.runtime.block_on(look);
        let plan = self.plan(&request, replica)?;
        let mut said = described(&plan, &settings.name, self.hears_source(), (&request, self.ack_note()?));
        let lines = outlooks.iter().map(Outlook::line).chain([self.check_tree(false)?]);
        said["text"] = json!([plan.to_string()].into_iter().chain(lines).collect::<Vec<_>>().join("\n"));
        said["archives"] = json!(outlooks);
        Ok(said)
    }

    /// Seals everybody and claims the next epoch, which is remembered first.
    fn take_over(
        self: &Arc<Mirroring>,
        replica: &Arc<DiskReplica>,
        settings: &Settings,
        given_up: GivenUp,
    ) -> Result<(PromotePlan, Arc<Places>, PromoteRequest), CliError> {
        // A snapshot may still be looked through for whoever was followed.
        replica.close().map_err(failed)?;
        let promoted = self.promoted(replica);
        let places = self.runtime.block_on(Places::open(&promoted, &settings.archives, &given_up))?;
        let places = Arc::new(places);
        let mut attempts = attempts::load(&self.attempts_path())?;
        let known = [self.known_epoch()].into_iter().chain(replica.promised()).chain(places.epochs.clone());
        let fresh = EpochId::from_bytes(random()?);
        let next = Successor::next_epoch(&attempts, &known.collect::<Vec<_>>(), fresh);
        if attempts.last() != Some(&next) {
            attempts.push(next);
            attempts::remember(&self.attempts_path(), &attempts)?;
        }
        let request = self.request(next, &given_up)?;
        let acts = Acts {
            mirroring: Arc::clone(self),
            replica: Arc::clone(replica),
            request: request.clone(),
            places: Arc::clone(&places),
            successor: Successor { node: request.own, attempts, given_up: given_up.nodes.clone() },
            given_up,
            outbid: AtomicBool::new(false),
            unchanged: AtomicBool::new(false),
        };
        match self.runtime.block_on(promote(&request, &acts)) {
            Ok(plan) => Ok((plan, places, request)),
            Err(error) if acts.outbid.load(Ordering::Relaxed) => {
                // Somebody else has tried this number. The next run asks for a later one, which everybody may promise.
                let mut attempts = acts.successor.attempts;
                let later =
                    Epoch { number: next.number.saturating_add(1), id: EpochId::from_bytes(random()?) };
                attempts.push(later);
                attempts::remember(&self.attempts_path(), &attempts)?;
                Err(failed(error).hint(
                    "a member has promised an epoch of another node: run it again, it asks for a later one",
                ))
            }
            Err(error) if acts.unchanged.load(Ordering::Relaxed) => Err(failed(error).hint(UNCHANGED)),
            Err(error) => Err(failed(error).hint(HALF_PROMOTED)),
        }
    }

    /// This node as the archives meet it. Bytes that it lacks may be gone with the source.
    fn promoted(&self, replica: &DiskReplica) -> places::Promoted {
        places::Promoted {
            config: self.config().clone(),
            node: self.identity.node(),
            log: Arc::clone(&self.log) as Arc<dyn Log>,
            keys: self.keys.clone(),
            blocks: Arc::clone(&self.blocks),
            clock: Arc::clone(&self.clock),
            lost: Arc::new(Lacking {
                known: Arc::new(KnownLosses::new(self.volume.clone(), None)),
                data: replica.data(),
                log: Arc::clone(&self.log) as Arc<dyn Log>,
            }),
        }
    }

    fn attempts_path(&self) -> std::path::PathBuf {
        self.directory.join(ATTEMPTS)
    }

    fn request(&self, next: Epoch, given_up: &GivenUp) -> Result<PromoteRequest, CliError> {
        let (own, policy) = (self.identity.node(), self.policy()?);
        Ok(PromoteRequest { own, next, policy, assume_lost: given_up.nodes.clone() })
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
            CliError::new("this mirror holds nothing yet").hint("it was never seeded by its source: promote a mirror that holds something, or restore from an archive")
        })?;
        let heard = lock(&self.followed).as_ref().map(|followed| *followed.heard.borrow());
        let heard = heard.or(*lock(&self.heard)).unwrap_or_default().max(replica.heard());
        Ok(Standing { state, data_lsn: *replica.data().borrow(), heard_lsn: heard.max(state.position.lsn) })
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

    /// What becomes of `--ack mirror=W` when fewer than W mirrors are left, and of `--ack archive` when no archive is left that may
    /// acknowledge: every fsync would fail until somebody joins, or an archive is added.
    fn ack_note(&self) -> Result<Option<String>, CliError> {
        let left = self.mirrors().len();
        let settings = self.settings()?;
        let why = match settings.ack {
            Ack::Local => None,
            Ack::Mirrors(wanted) => {
                (left < wanted as usize).then(|| format!("{left} of {wanted} mirrors are left"))
            }
            Ack::Archive => {
                let outside = self.has_archive_outside(&settings)?;
                (!outside).then(|| "no full archive is outside this node's failure domain".to_owned())
            }
        };
        let text = "fsync waits         for this node only from then on (ack local)";
        Ok(why.map(|why| format!("{text}: {why}")))
    }

    fn has_archive_outside(&self, settings: &Settings) -> Result<bool, CliError> {
        let config = self.config().clone();
        let own = [failure_domain(&self.directory)?, config.blocks.failure_domain()];
        for shared in settings.archives.iter().filter(|shared| !shared.log_only) {
            if !own.contains(&local_url(&config, shared)?.failure_domain()) {
                return Ok(true);
            }
        }
        Ok(false)
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
    fn lead(
        self: &Arc<Mirroring>,
        plan: &PromotePlan,
        data_lsn: u64,
        places: &Places,
        before_leading: &dyn Fn(Ack) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let data_lsn = data_lsn.max(plan.data_lsn.get()).min(plan.base.position.lsn.get());
        let lacks_bytes = data_lsn < plan.base.position.lsn.get();
        // Some are sealed, none of them may know all the others yet: until they do, an fsync waits for all that are not given up. It is there
        // before this is a source: one that is killed in between must not count those of a time when it led before.
        let set = self.mirrors().difference(&places.given_up).copied().collect();
        write_set(&self.directory, &set)?;
        self.change_config(|config| {
            let from = config.source.take();
            config.role = Role::Source;
            config.ack_pending = None;
            config.archives_given_up.extend(places.archives_given_up.iter().cloned());
            config.promoted = from.map(|from| Promoted {
                epoch: plan.epoch.number,
                metadata_lsn: plan.base.position.lsn.get(),
                hash: plan.base.position.hash.to_string(),
                data_lsn,
                from,
                given_up: places.given_up.iter().map(ToString::to_string).collect(),
                is_gathered: false,
                is_settled: false,
            });
            let full = places.full.iter().filter(|_| lacks_bytes).map(|(url, _)| url.clone());
            config.packs_from.extend(full);
        })?;
        self.archive_reads.lead();
        if lacks_bytes {
            self.blocks.also(places.full.iter().map(|(_, packs)| Arc::clone(packs)).collect());
        }
        let falls_back = self.ack_note()?.is_some();
        if !falls_back {
            // An fsync that comes right after must not be answered by this node alone.
            self.acknowledge_by_mirrors()?;
            before_leading(self.settings()?.ack)?;
        }
        let _entered = self.runtime.enter();
        self.volume.lead(plan.epoch, None).map_err(failed)?;
        if falls_back {
            let change = vec![Settings::set_ack(Ack::Local)];
            let changed = self.runtime.block_on(self.volume.change_settings(change).wait());
            changed
                .map_err(|errno| CliError::new(format!("the setting ack cannot be changed: {errno:?}")))?;
        }
        tracing::warn!(epoch = plan.epoch.number, "this node is the source now");
        if let Err(error) = std::fs::remove_file(self.attempts_path()) {
            tracing::debug!(%error, "what was remembered of the promotion stays, and means nothing any more");
        }
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

/// In the node's directory: the epochs that it has made up its mind to begin.
const ATTEMPTS: &str = "promoting.json";
/// What to do when it fails after it has begun.
const UNCHANGED: &str = "this run has changed nothing: nobody was asked to promise anything and no archive was sealed. If another node has sealed an archive, go on with that one: it leads the volume; otherwise run it again (--assume-lost and its URL goes on without an archive)";
const HALF_PROMOTED: &str = "what has promised or was sealed stays so, and the old source may be unable to acknowledge from now on: run it again, it goes on with the same epoch (--assume-lost gives up who does not answer), or promote another mirror";
const LOOK: Duration = Duration::from_millis(20);
const BYTES_MAX: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(3);
const ASK_MAX: Duration = Duration::from_secs(3);
