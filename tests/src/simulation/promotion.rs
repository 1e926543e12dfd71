//! A mirror takes over: the acts of a promotion, in the order in which the program does them.
//!
//! Invariants:
//! - The epoch is remembered before the first act. What was acknowledged, within the promise of the level, is on the history that goes on.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use murphy_backup::{ArchiveFence, KnownLosses, LostPacks, Successor, Supplies, TakeOverLog};
use murphy_fs::{Fence, MemberState, RowKey, SettingRow, Volume};
use murphy_log::{Clock, Epoch, Log, NodeId, Position, State};
use murphy_mirror::{
    AckPolicy, AcknowledgingSet, Ask, Dialer, ExchangeError, Identity, Lender, Point, PromotePlan,
    PromoteRequest, PublicKey, Refusal, Refused as RefusedBy, Replica, Seal, Services, Standing, TakeOver,
    promote,
};

use super::{
    Level,
    account::Account,
    disk::{NodeLog, NodeName, Promoted, Upstream},
    giving_up::Refused,
    members::holders,
    mirrors::Copying,
    network::address_of,
    node::{ARCHIVES, Ground},
    seeding::NodeReplica,
    stage::NodeClock,
    world::{BRANCH, VOLUME, World, epoch_of},
};

/// What a promotion works with, taken from the process.
struct Parts {
    volume: Volume,
    log: Arc<NodeLog>,
    clock: Arc<NodeClock>,
    gate: Arc<super::gate::Gate>,
    dialer: Dialer,
    services: Arc<Services>,
    replica: Arc<NodeReplica>,
    status: tokio::sync::watch::Receiver<murphy_mirror::FollowerStatus>,
    heard: tokio::sync::watch::Receiver<murphy_log::Lsn>,
    copying: Copying,
    name: NodeName,
    identity: Arc<Identity>,
    /// The source that it followed.
    source: Upstream,
}

/// How somebody took over: whether every place that may have acknowledged was sealed, and who was given up.
type Taken = (PromotePlan, bool, BTreeSet<NodeId>);

impl World {
    /// Lets the mirror on `host` take over, unless it still hears its source.
    pub(super) async fn promote(self: &Arc<Self>, host: usize) {
        // Those who look after the volume promote one node at a time.
        if std::mem::replace(&mut *self.promoting.lock(), true) {
            return;
        }
        // Of two that promise an epoch each neither can be sealed by the other: whoever has begun is tried until the others are sealed.
        let candidate = *self.candidate.lock();
        if candidate.is_none_or(|candidate| candidate == host) {
            self.promote_alone(host).await;
        }
        *self.promoting.lock() = false;
    }

    async fn promote_alone(self: &Arc<Self>, host: usize) {
        let Some(parts) = self.parts(host) else { return };
        if self.is_removed(host) {
            return self.dismiss_the_removed(host);
        }
        if !self.has_caught_up(&parts.log.durable().state().position) {
            // What was there before the last promotion is not here yet: nobody would promote this one.
            return self.stage().note(format!("host {host}: has not caught up, and is not promoted"));
        }
        let silent = async {
            while parts.status.borrow().connected {
                tokio::time::sleep(LOOK).await;
            }
        };
        if tokio::time::timeout(SILENCE_MAX, silent).await.is_err() {
            return self.stage().note(format!("host {host}: hears its source, and is not promoted"));
        }
        self.stage().disaster("a promotion", format!("host {host} is promoted"));
        self.stop_following(host);
        self.dismiss_the_unseeded();
        self.dismiss_the_absent(&parts.volume);
        *self.candidate.lock() = Some(host);
        let taken = tokio::select! {
            biased;
            taken = self.take_over(host, &parts) => taken,
            // What reaches the world through its gate would never return.
            () = parts.gate.death() => {
                return self.stage().note(format!("host {host}: dies while it is promoted"));
            }
        };
        match taken {
            Ok(taken) => {
                *self.candidate.lock() = None;
                *self.refused.lock() = Refused::default();
                self.led_by(host, parts.source, &taken);
                self.tell_predecessor(host);
                self.speak_with_members(host);
            }
            Err(error) if error.contains("was removed from volume") => {
                self.stage().note(format!("host {host}: is not promoted: {error}"));
                self.dismiss_the_removed(host);
            }
            Err(error) => {
                if error.contains("promote that one") || error.contains("which holds more") {
                    *self.candidate.lock() = None;
                    self.note_refusal(host, &error);
                }
                self.give_up_archives(host, parts.source.host, &error);
                self.stage().note(format!("host {host}: is not promoted: {error}"));
                self.crash(host);
                self.restart_later(host);
            }
        }
    }

    /// Whether a log that ends at `tip` may be gone on with.
    pub(super) fn has_caught_up(&self, tip: &Position) -> bool {
        self.stage().judge(|judge, _| Ok(judge.has_caught_up(tip))) == Some(true)
    }

    fn parts(&self, host: usize) -> Option<Parts> {
        let home = self.hosts[host].lock();
        let process = home.process.as_ref()?;
        let among = process.among.as_ref()?;
        let followed = among.followed.as_ref()?;
        Some(Parts {
            volume: process.volume.clone(),
            log: Arc::clone(&process.log),
            clock: Arc::clone(&process.clock),
            gate: Arc::clone(&process.gate),
            dialer: among.dialer.clone(),
            services: Arc::clone(&among.services),
            replica: Arc::clone(&followed.replica),
            status: followed.handle.status.clone(),
            heard: followed.handle.heard.clone(),
            copying: self.copying(process, followed, home.disk.node),
            name: home.disk.node,
            identity: Arc::clone(&process.identity),
            source: home.disk.follows?,
        })
    }

    fn stop_following(&self, host: usize) {
        let home = self.hosts[host].lock();
        let followed = home.process.as_ref().and_then(|process| process.among.as_ref()?.followed.as_ref());
        if let Some(followed) = followed {
            followed.stop.send_replace(true);
        }
    }

    /// Seals everybody and claims the next epoch. Says whether every place that may have acknowledged was sealed, and who was given up.
    async fn take_over(self: &Arc<Self>, host: usize, parts: &Parts) -> Result<Taken, String> {
        let ground = &self.ground;
        let archives = names(&ground.archives_of(&parts.volume)?);
        let (places, epochs, complete) = self.open_places(host, parts).await?;
        let known = [Some(parts.log.durable().state().position.epoch), parts.replica.promised()];
        let known: Vec<Epoch> = known.into_iter().flatten().chain(epochs).collect();
        let attempts = {
            let mut home = self.hosts[host].lock();
            let number = known.iter().chain(&home.disk.attempts).map(|epoch| epoch.number).max();
            let fresh = epoch_of(number.unwrap_or_default() + 1, parts.name).id;
            let next = Successor::next_epoch(&home.disk.attempts, &known, fresh);
            if home.disk.attempts.last() != Some(&next) {
                home.disk.attempts.push(next);
            }
            home.disk.attempts.clone()
        };
        let next = *attempts.last().ok_or("no epoch was remembered")?;
        let own = parts.identity.node();
        let policy = ground.policy(&parts.volume);
        let mut assume_lost = ground.gone.lock().clone();
        assume_lost.insert(parts.source.key.node());
        if self.refused.lock().gives_up == Some(host) {
            assume_lost.extend(holders(&parts.volume).into_keys());
        }
        assume_lost.remove(&own);
        let successor = Successor { node: own, attempts, given_up: assume_lost.clone() };
        let request = PromoteRequest { own, next, policy, assume_lost };
        let ground = Arc::clone(ground);
        let (outbid, lacks) = (AtomicBool::new(false), AtomicBool::new(false));
        let acts = Acts {
            host,
            ground,
            parts,
            places,
            successor,
            request: request.clone(),
            archives,
            given_up: self.given_up.lock().clone(),
            outbid,
            lacks,
        };
        let promoted = promote(&request, &acts).await.map_err(|error| error.to_string());
        if promoted.is_err() && acts.outbid.load(Ordering::Relaxed) {
            // Somebody else has tried this number. The next run asks for a later one, which everybody may promise.
            let later = epoch_of(next.number + 1, parts.name);
            self.hosts[host].lock().disk.attempts.push(later);
        }
        let complete = complete && !acts.lacks.load(Ordering::Relaxed);
        Ok((promoted?, complete, request.assume_lost))
    }

    async fn open_places(
        self: &Arc<Self>,
        host: usize,
        parts: &Parts,
    ) -> Result<(TakeOverLog, Vec<Epoch>, bool), String> {
        let ground = &self.ground;
        let supplies = ground.supplies(host, parts, &self.given_up.lock().clone());
        let mut places: Vec<Arc<dyn Fence>> = Vec::new();
        let (mut epochs, mut complete) = (Vec::new(), true);
        for account in &ground.archives_of(&parts.volume)? {
            if account.is_gone() || self.refused.lock().spoiled.contains(&account.name) {
                self.given_up.lock().insert(account.name.clone());
                complete = false;
                continue;
            }
            let open = async {
                let archive = ground.archive(account, &parts.gate).await?;
                let clock = Arc::clone(&parts.clock) as Arc<dyn Clock>;
                let fence = ArchiveFence::new(archive, parts.identity.node(), clock, None);
                let held = fence.adopt().await.map_err(|error| error.to_string())?;
                Ok::<_, String>((fence.with_supplies(supplies.clone()), held.epoch))
            };
            let opened = tokio::time::timeout(ANSWER_MAX, open).await;
            let opened = opened.map_err(|_| format!("{} does not answer", account.name)).flatten();
            match opened {
                Ok((fence, epoch)) => {
                    places.push(Arc::new(fence));
                    epochs.push(epoch);
                    // What only a damaged one had is gone with the source.
                    complete &= !account.is_damaged();
                }
                // One that a disaster has made unreadable is given up by name, too.
                Err(error) if account.is_damaged() => {
                    self.stage().note(format!("host {host}: gives up {}: {error}", account.name));
                    self.given_up.lock().insert(account.name.clone());
                    complete = false;
                }
                Err(error) => return Err(error),
            }
        }
        let log = Arc::clone(&parts.log) as Arc<dyn Log>;
        Ok((TakeOverLog { log, keys: ground.keys.clone(), places }, epochs, complete))
    }

    /// The node on `host` decides from now on.
    fn led_by(self: &Arc<Self>, host: usize, from: Upstream, (plan, complete, given_up): &Taken) {
        let (stage, level) = (self.stage(), self.ground.level);
        let base = plan.base.position;
        let lost = plan.entries_without_bytes();
        stage.note(format!(
            "host {host}: epoch {} begins after lsn {}, {lost} without bytes",
            plan.epoch.number, base.lsn
        ));
        let keeps = level == Level::Mirror || (level == Level::Archive && *complete);
        stage.judge(|judge, _| {
            judge.begins(plan.epoch, base);
            if keeps {
                return judge.all_held(&format!("host {host}, promoted,"), &base);
            }
            judge.forgive(&base);
            judge.forget_files();
            Ok(())
        });
        // What nobody has acknowledged may be gone with the source. Of what somebody has, every file is compared at the end.
        if lost > 0 {
            self.bytes_lost.store(true, Ordering::Relaxed);
        }
        let led = {
            let mut home = self.hosts[host].lock();
            let home = &mut *home;
            home.disk.leads = Some(plan.epoch);
            home.disk.follows = None;
            home.disk.attempts.clear();
            home.disk.promoted = Some(Promoted { from, base: Point { lsn: base.lsn, hash: base.hash } });
            let lost = (lost > 0).then_some(LostPacks { after: plan.data_lsn, upto: plan.base.position.lsn });
            *home.disk.lost.lock() = lost;
            let disk = home.disk.clone();
            match home.process.as_mut() {
                Some(process) => {
                    // As in the program: those that are not given up, all of which must know of the others before one of them suffices.
                    let mut members: BTreeSet<NodeId> = holders(&process.volume).into_keys().collect();
                    members.retain(|node| *node != process.identity.node() && !given_up.contains(node));
                    *disk.acknowledging.lock() = AcknowledgingSet { members, unsettled: Some(base.lsn) };
                    self.ground.lead(host, process, &disk, plan.epoch, None)
                }
                None => Ok(()),
            }
        };
        if let Err(error) = led {
            stage.note(format!("host {host}: {error}"));
            self.crash(host);
            self.restart_later(host);
        }
        self.follow_leader(host);
        self.publish();
    }

    /// Lets the node on `host`, which leads, tell the source before it, if there was one, that it was replaced, until that one has heard it.
    pub(super) fn tell_predecessor(&self, host: usize) {
        let home = self.hosts[host].lock();
        let (Some(process), Some(epoch), Some(promoted)) = (&home.process, home.leads(), home.disk.promoted)
        else {
            return;
        };
        let Some(dialer) = process.among.as_ref().map(|among| among.dialer.clone()) else { return };
        let ground = Arc::clone(&self.ground);
        process.tasks.run(async move {
            let Promoted { from, base } = promoted;
            let addresses = [address_of(from.host).to_string()];
            let tell = || dialer.tell_fenced(&addresses, from.key, (&ground.keys, BRANCH), epoch, Some(base));
            while !ground.gone.lock().contains(&from.key.node()) && tell().await.is_err() {
                tokio::time::sleep(TELL_AGAIN).await;
            }
        });
    }

    /// Mirrors of somebody else go over to `leader` by themselves, or join it with empty directories, once somebody gets round to them. What
    /// these had is of no use any more: `leader` has sealed them, or given them up, so that everybody gives them up by name.
    fn follow_leader(self: &Arc<Self>, leader: usize) {
        for host in (0..self.hosts.len()).filter(|host| *host != leader) {
            let world = Arc::clone(self);
            tokio::spawn(async move {
                world.stage().pause(0, TOLD_MS_MAX).await;
                let leads = || {
                    let home = world.hosts[leader].lock();
                    let node = home.leads().map(|_| home.disk.node);
                    node.and_then(|node| world.ground.identity(node).ok())
                };
                if world.stage().once_in(2)
                    && let Some(identity) = leads()
                {
                    world.wait_until_it_follows(host, identity.public_key()).await;
                }
                let Some(identity) = leads() else { return };
                let follows = world.hosts[host].lock().disk.follows;
                if follows.is_some_and(|source| source.key != identity.public_key()) {
                    world.give_up_node(host);
                    world.crash(host);
                    world.hosts[host].lock().disk.fenced = Some("its source was replaced".to_owned());
                    world.rejoin_later(host);
                }
            });
        }
    }
}

impl Ground {
    /// Who acknowledges, as far as `volume` knows.
    fn policy(&self, volume: &Volume) -> AckPolicy {
        match self.level {
            Level::Mirror => {
                AckPolicy::Mirrors { wanted: self.wanted, members: holders(volume).into_keys().collect() }
            }
            Level::Local | Level::Archive => AckPolicy::Local,
        }
    }
}

impl Ground {
    /// What the archives get from the node on `host`, and from each other without those that are given up.
    fn supplies(&self, host: usize, parts: &Parts, given_up: &BTreeSet<String>) -> Supplies {
        let (after, upto) = (*parts.replica.data.borrow(), parts.log.durable().state().position.lsn);
        let lost = (after < upto).then_some(LostPacks { after, upto });
        Supplies {
            log: Arc::clone(&parts.log) as Arc<dyn Log>,
            packs: self.layered_without(host, &parts.gate, given_up),
            lost: Some(Arc::new(KnownLosses::new(parts.volume.clone(), lost))),
        }
    }
}

struct Acts<'a> {
    host: usize,
    ground: Arc<Ground>,
    parts: &'a Parts,
    places: TakeOverLog,
    successor: Successor,
    request: PromoteRequest,
    /// The archives of the volume when the promotion began.
    archives: Vec<String>,
    /// Those of them that are given up.
    given_up: BTreeSet<String>,
    /// A member has promised an epoch that does not come before this one.
    outbid: AtomicBool,
    /// An archive that was named at the last moment is gone.
    lacks: AtomicBool,
}

impl Acts<'_> {
    fn standing(&self) -> Standing {
        let state = self.parts.log.durable().state();
        let heard_lsn = (*self.parts.heard.borrow()).max(state.position.lsn);
        Standing { state, data_lsn: *self.parts.replica.data.borrow(), heard_lsn }
    }

    async fn shown(&self, state: State) {
        while self.parts.volume.state().position.lsn < state.position.lsn {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Seals the archives, and those that the source before has named in what it still got into one of them.
    async fn seal_archives(&self) -> Result<TakeOverLog, String> {
        let (mut places, mut known) = (self.places.clone(), self.archives.clone());
        loop {
            places.seal(&self.successor).await.map_err(|error| error.to_string())?;
            let row = places.row_beyond(&RowKey::setting(ARCHIVES)).await;
            let Some(row) = row.map_err(|error| error.to_string())? else { return Ok(places) };
            let row = SettingRow::decode(&row).map_err(|error| error.to_string())?;
            let text = String::from_utf8_lossy(&row.text).into_owned();
            let is_new = |name: &str| !known.iter().any(|known| known == name);
            let mut named = self.ground.named(&text);
            named.retain(|one| is_new(&one.name));
            if named.is_empty() {
                return Ok(places);
            }
            for account in &named {
                if account.is_gone() {
                    // Given up by name.
                    self.lacks.store(true, Ordering::Relaxed);
                    continue;
                }
                let archive = self.ground.archive(account, &self.parts.gate).await?;
                let clock = Arc::clone(&self.parts.clock) as Arc<dyn Clock>;
                let fence = ArchiveFence::new(archive, self.parts.identity.node(), clock, None);
                places.places.push(Arc::new(fence.with_supplies(self.ground.supplies(
                    self.host,
                    self.parts,
                    &self.given_up,
                ))));
            }
            known.extend(named.iter().map(|account| account.name.clone()));
        }
    }

    /// An archive that an earlier attempt has sealed takes nothing behind its seal but entries of the new epoch.
    async fn check_unsettled(&self) -> Result<(), String> {
        let standings = self.places.look(&self.successor).await.map_err(|error| error.to_string())?;
        match standings.iter().any(|standing| standing.is_settled) {
            true => Err("an earlier attempt of this node has ended the epoch before that".to_owned()),
            false => Ok(()),
        }
    }

    async fn lender(&self, member: NodeId) -> Result<Lender, String> {
        let (addresses, key) = self.member(member)?;
        let ask = Ask { volume: VOLUME, branch: BRANCH, epoch: Some(self.request.next) };
        self.parts.dialer.lender(&addresses, key, ask).await.map_err(|error| error.to_string())
    }

    /// Where a member listens, and its key.
    fn member(&self, member: NodeId) -> Result<(Vec<String>, PublicKey), String> {
        let row = holders(&self.parts.volume).remove(&member).ok_or("it is no member")?;
        let MemberState::Joined { public_key } = row.state else {
            return Err("it is no member any more".to_owned());
        };
        Ok((row.addresses, PublicKey::from_bytes(public_key)))
    }

    /// What was fetched may change who must be sealed: then the promotion is tried again.
    fn check_unchanged(&self) -> Result<(), String> {
        if self.ground.policy(&self.parts.volume) != self.request.policy {
            return Err("the members have changed meanwhile: try again".to_owned());
        }
        if names(&self.ground.archives_of(&self.parts.volume)?) != self.archives {
            return Err("the archives have changed meanwhile: try again".to_owned());
        }
        Ok(())
    }
}

impl TakeOver for Acts<'_> {
    fn promise(&self, epoch: Epoch) -> BoxFuture<'_, Result<Standing, String>> {
        Box::pin(async move {
            self.parts.gate.pass().await;
            self.places.look(&self.successor).await.map_err(|error| error.to_string())?;
            self.parts.replica.promise(epoch).map_err(|error| error.to_string())?;
            let state = self.places.fetch(&self.successor).await.map_err(|error| error.to_string())?;
            self.shown(state).await;
            self.check_unchanged()?;
            Ok(self.standing())
        })
    }

    fn seal(&self, member: NodeId, epoch: Epoch) -> BoxFuture<'_, Result<Option<Standing>, String>> {
        Box::pin(async move {
            let (addresses, key) = self.member(member)?;
            let (proof, leads) = (self.parts.services.proof(), Vec::new());
            let seal = Seal { volume: VOLUME, branch: BRANCH, epoch, proof, leads };
            let sealed = self.parts.dialer.seal(&addresses, key, seal).await;
            if let Err(ExchangeError::Refused(RefusedBy { reason: Refusal::Fenced, .. })) = &sealed {
                self.outbid.store(true, Ordering::Relaxed);
            }
            let sealed = sealed.map_err(|error| error.to_string())?;
            let standing = |state| Standing { state, data_lsn: sealed.data_lsn, heard_lsn: sealed.heard_lsn };
            Ok(sealed.state.map(standing))
        })
    }

    fn catch_up(&self, member: NodeId, to: Position) -> BoxFuture<'_, Result<Standing, String>> {
        Box::pin(async move {
            let given_up =
                |error| format!("member {member}, which holds more, up to lsn {}: {error}", to.lsn);
            self.check_unsettled().await.map_err(given_up)?;
            let lender = self.lender(member).await.map_err(given_up)?;
            let replica = Arc::clone(&self.parts.replica) as Arc<dyn Replica>;
            let given = lender.give_frames(&replica, self.request.next, to).await;
            given.map_err(|error| given_up(error.to_string()))?;
            let held = replica.state().ok_or("this mirror holds nothing")?;
            self.shown(held).await;
            let (host, stage) = (self.host, &self.ground.stage);
            stage.count("promotions that borrowed entries from a member");
            stage.note(format!("host {host}: has borrowed what comes up to lsn {}", to.lsn));
            let copier = self.ground.copier(host, &self.parts.copying, lender.packs.clone());
            let wanted = lender.stands.data_lsn.min(to.lsn);
            if let Err(error) = copier.reach(wanted, PACKS_MAX).await {
                stage.note(format!("host {host}: borrows no packs: {error}"));
            }
            Ok(self.standing())
        })
    }

    fn claim(&self, epoch: Epoch, base: State) -> BoxFuture<'_, Result<State, String>> {
        Box::pin(async move {
            if self.ground.level == Level::Mirror {
                self.ground.stage.judge(|judge, _| {
                    judge.sealed(epoch, base.position);
                    Ok(())
                });
            }
            self.shown(base).await;
            self.check_unchanged()?;
            let found = self.parts.log.durable().state();
            if found != base {
                return Err(format!("the log ends at {} instead of {}", found.position, base.position));
            }
            let places = self.seal_archives().await?;
            self.parts.log.decide();
            let state = places.begin(&self.successor).await.map_err(|error| error.to_string())?;
            self.shown(state).await;
            Ok(state)
        })
    }
}

fn names(archives: &[Arc<Account>]) -> Vec<String> {
    archives.iter().map(|account| account.name.clone()).collect()
}

/// A mirror hears of its source's successor after so long.
const TOLD_MS_MAX: u64 = 6000;
const TELL_AGAIN: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(20);
const SILENCE_MAX: Duration = Duration::from_secs(8);
/// After so long without a pack that came, no more are waited for.
const PACKS_MAX: Duration = Duration::from_secs(20);
const ANSWER_MAX: Duration = Duration::from_secs(10);
