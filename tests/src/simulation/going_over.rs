//! Mirrors that follow whoever has taken over, by themselves: what they show for their membership, who tells them, and what they do then.
//!
//! Invariants:
//! - A mirror goes over only to who leads the epoch that it has promised last, with what it holds.
//! - What a source has vouched for is on the mirror's disk, and shown by it when it takes over.

use std::{sync::Arc, time::Duration};

use murphy_fs::{MemberRow, MemberState};
use murphy_log::Epoch;
use murphy_mirror::{Ask, Dialer, ExchangeError, Leader, Proof, PublicKey, Replica, Seal, Services};
use parking_lot::Mutex;

use super::{
    disk::Upstream,
    members::holders,
    mirrors::Followed,
    network::address_of,
    node::Process,
    world::{BRANCH, VOLUME, World},
};

/// Tells the source where the mirror on `host` listens, whenever it is reached, and keeps what it vouches for.
pub(super) fn announcing(
    (host, source): (usize, Upstream),
    dialer: Dialer,
    followed: &Followed,
    (services, kept): (Arc<Services>, Arc<Mutex<Proof>>),
) -> impl Future<Output = ()> + Send + use<> {
    let (mut status, mut stopped) = (followed.handle.status.clone(), followed.stop.subscribe());
    let announcing = async move {
        let (there, here) = ([address_of(source.host).to_string()], address_of(host).to_string());
        while status.wait_for(|status| status.connected).await.is_ok() {
            match dialer.announce(&there, source.key, vec![here.clone()], Vec::new()).await {
                Ok(admitted) => {
                    kept.lock().clone_from(&admitted.proof);
                    services.set_proof(admitted.proof);
                    if status.wait_for(|status| !status.connected).await.is_err() {
                        return;
                    }
                }
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    };
    async move {
        tokio::select! {
            biased;
            _ = stopped.wait_for(|stop| *stop) => {}
            () = announcing => {}
        }
    }
}

impl World {
    /// Lets the mirror on `host` go over to whoever tells it that it leads the epoch that was promised.
    pub(super) fn begin_going_over(self: &Arc<Self>, host: usize, process: &Process) {
        let Some(among) = &process.among else { return };
        let (Some(followed), Some(mut leaders)) = (&among.followed, among.leaders.clone()) else { return };
        let (world, gate, replica) =
            (Arc::clone(self), Arc::clone(&process.gate), Arc::clone(&followed.replica));
        tokio::spawn(async move {
            loop {
                let told = tokio::select! {
                    biased;
                    () = gate.death() => return,
                    changed = leaders.changed() => changed.is_ok(),
                };
                let leader = leaders.borrow_and_update().clone();
                let Some(leader) = leader.filter(|_| told) else { return };
                if replica.promised() == Some(leader.epoch) && world.goes_over(host, &leader) {
                    world.stage().count("mirrors that went over to a new source");
                    world.crash(host);
                    return world.restart_later(host);
                }
            }
        });
    }

    /// Follows `leader` from the next start on, if that is somebody else than before.
    fn goes_over(&self, host: usize, leader: &Leader) -> bool {
        let listens = |other: &usize| leader.addresses.contains(&address_of(*other).to_string());
        let Some(at) = (0..self.hosts.len()).find(listens) else { return false };
        let mut home = self.hosts[host].lock();
        let upstream = Upstream { host: at, key: leader.key };
        if home.disk.fenced.is_some() || home.disk.follows.is_none_or(|source| source == upstream) {
            return false;
        }
        home.disk.follows = Some(upstream);
        self.stage().note(format!("host {host}: goes over to host {at}"));
        true
    }

    /// Lets the node on `host`, which leads, speak with every member that does not follow, for as long as it lives: one that was a mirror tells
    /// them that it leads, any other asks them whether somebody else does.
    pub(super) fn speak_with_members(&self, host: usize) {
        let home = self.hosts[host].lock();
        let (Some(process), Some(epoch)) = (&home.process, home.leads()) else { return };
        let Some(among) = &process.among else { return };
        let speaker = Speaker {
            epoch,
            leads: home.disk.promoted.map(|_| vec![address_of(host).to_string()]),
            services: Arc::clone(&among.services),
            dialer: among.dialer.clone(),
        };
        let (volume, own) = (process.volume.clone(), process.identity.node());
        let (ground, clock) = (Arc::clone(&self.ground), Arc::clone(&process.clock));
        process.tasks.run(async move {
            loop {
                let status = speaker.services.board.status(murphy_log::Clock::monotonic(&*clock));
                let follows = |node| status.iter().any(|mirror| mirror.node == node && mirror.connected);
                let is_absent = |node| node != own && !follows(node) && !ground.gone.lock().contains(&node);
                let absent = holders(&volume).into_iter().filter(|(node, _)| is_absent(*node));
                futures::future::join_all(absent.map(|(_, row)| speaker.speak_with(row))).await;
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    /// Returns when the mirror on `host` follows `leader`, or people lose their patience.
    pub(super) async fn wait_until_it_follows(&self, host: usize, leader: PublicKey) {
        let mut waited = Duration::ZERO;
        while waited < PATIENCE {
            let follows = self.hosts[host].lock().disk.follows;
            if follows.is_none_or(|source| source.key == leader) {
                return;
            }
            tokio::time::sleep(AGAIN).await;
            waited += AGAIN;
        }
    }
}

/// A source that speaks with members.
struct Speaker {
    epoch: Epoch,
    /// Where it listens, if it has taken over.
    leads: Option<Vec<String>>,
    services: Arc<Services>,
    dialer: Dialer,
}

impl Speaker {
    async fn speak_with(&self, MemberRow { state, addresses, .. }: MemberRow) {
        let MemberState::Joined { public_key } = state else { return };
        let (key, epoch) = (PublicKey::from_bytes(public_key), self.epoch);
        if let Some(leads) = self.leads.clone() {
            let seal = Seal { volume: VOLUME, branch: BRANCH, epoch, proof: self.services.proof(), leads };
            // Whoever does not answer is told again.
            let told = tokio::time::timeout(TELL_MAX, self.dialer.seal(&addresses, key, seal)).await;
            if !matches!(told, Ok(Err(ExchangeError::Refused(_)))) {
                return;
            }
        }
        let ask = Ask { volume: VOLUME, branch: BRANCH, epoch: Some(epoch) };
        let asked = tokio::time::timeout(TELL_MAX, self.dialer.lender(&addresses, key, ask)).await;
        if let Ok(Ok(lender)) = asked
            && let Some(later) = lender.stands.replaces(epoch)
        {
            self.services.board.fenced(later);
        }
    }
}

/// So often what was not heard is said again.
const AGAIN: Duration = Duration::from_secs(2);
const TELL_MAX: Duration = Duration::from_secs(10);
/// After so long a mirror that follows nobody who leads joins with an empty directory.
const PATIENCE: Duration = Duration::from_secs(20);
