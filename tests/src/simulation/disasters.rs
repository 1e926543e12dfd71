//! What befalls a world: one disaster after another, drawn from its seed.
//!
//! Invariants:
//! - What no copy can survive together does not happen together: of the archives at most one is damaged or dies.

use std::{sync::Arc, time::Duration};

use super::{
    Canary,
    account::{Account, Damage, Weather},
    disk::SLOW_MS_MAX,
    gate::Life,
    losses::Loss,
    network::Air,
    world::World,
};

/// Disasters until `end`.
pub(super) async fn strike(world: &Arc<World>, end: Duration) {
    let stage = Arc::clone(world.stage());
    let victim = stage.below(world.ground.archives.len() as u64) as usize;
    let spared = world.ground.archives.iter().enumerate().find(|(at, _)| *at != victim);
    if let (Some((_, spared)), true) = (spared, stage.is_kind(3)) {
        tokio::spawn(Arc::clone(world).damage_packs(Arc::clone(spared), end));
    }
    while stage.now() < end {
        stage.pause(100, 3500).await;
        strike_once(world, victim).await;
    }
    if stage.has(Canary::LyingDisk) {
        lie(world);
    }
    if stage.has(Canary::EarlyCollector) {
        collect(world).await;
    }
}

async fn strike_once(world: &Arc<World>, victim: usize) {
    let stage = world.stage();
    let host = stage.below(world.hosts.len() as u64) as usize;
    let account = &world.ground.archives[victim];
    if stage.has(Canary::ForgottenPromise) {
        // The bug shows itself only while a mirror takes over: nothing else keeps it from that.
        return replace(world);
    }
    let kinds = if world.network.is_some() { 25 } else { 19 };
    match stage.below(kinds) {
        0..=2 => crash(world, host),
        3..=5 => bad_weather(world),
        6 => {
            let lag = stage.ms(1000, 30_000);
            let account = any_account(world);
            account.change_weather(|weather| weather.list_lag = lag);
            stage.disaster("listings that lag", format!("listings of {} lag by {lag:?}", account.name));
        }
        7 if world.may_harm(account) => damage(world, account).await,
        8 if stage.once_in(4) && world.may_harm(account) => lose_account(world, account),
        9 => slow_disk(world, host),
        10 => full_disk(world, host),
        11 => step_clock(world, host),
        12 => pause(world, host),
        13 | 14 => work_on_archives(world),
        15 | 16 => world.lose(host, if stage.once_in(3) { Loss::Region } else { Loss::Disk }),
        17 if world.network.is_none() && world.may_be_cloned() => {
            // With two archives each copy may win one of them, and acknowledge through it: only one archive decides for certain.
            lose_account(world, account);
            world.clone_node().await;
        }
        17..=19 => part(world, host),
        20 | 21 => rough_air(world),
        22.. => replace(world),
        _ => {}
    }
}

/// What people do about archives while all this happens: snapshots, and an archive that is added.
fn work_on_archives(world: &Arc<World>) {
    let Some(leader) = world.leader() else { return };
    let home = world.hosts[leader].lock();
    let Some(process) = &home.process else { return };
    let Some(shipping) = process.shipping.clone() else { return };
    let known = world.ground.archives_of(&process.volume).unwrap_or_default();
    let missing = |late: &&Arc<Account>| !known.iter().any(|known| Arc::ptr_eq(known, late));
    match world.late.as_ref().filter(missing).filter(|late| !late.is_gone()) {
        None => drop(process.tasks.run(shipping.snapshot_all())),
        Some(late) => {
            let (world, late) = (Arc::clone(world), Arc::clone(late));
            process.tasks.run(async move {
                world.add_archive(leader, &shipping, &late).await;
            });
        }
    }
}

fn lose_account(world: &Arc<World>, account: &Arc<Account>) {
    if !account.is_gone() {
        account.change_weather(|weather| weather.gone = true);
        world.stage().disaster("an account gone for ever", format!("{} is gone for ever", account.name));
    }
}

fn crash(world: &Arc<World>, host: usize) {
    if world.hosts[host].lock().gate().is_none() {
        return;
    }
    world.stage().disaster("a crash", format!("host {host} crashes"));
    world.crash(host);
    world.restart_later(host);
}

fn any_account(world: &World) -> Arc<Account> {
    let (archives, stores) = (&world.ground.archives, world.ground.stores.len());
    let at = world.stage().below((archives.len() + stores) as u64) as usize;
    archives.get(at).cloned().unwrap_or_else(|| world.ground.store(at - archives.len()))
}

/// An account fails for a while.
fn bad_weather(world: &Arc<World>) {
    let stage = Arc::clone(world.stage());
    let account = any_account(world);
    let (per_mille, slow_per_mille) = (stage.below(700), stage.below(120));
    let how_long = stage.ms(500, 15_000);
    stage.disaster(
        "a store that fails",
        format!(
            "{}: {per_mille} of 1000 requests fail, {slow_per_mille} hang, for {how_long:?}",
            account.name
        ),
    );
    account.change_weather(|weather| *weather = Weather { per_mille, slow_per_mille, ..*weather });
    tokio::spawn(async move {
        tokio::time::sleep(how_long).await;
        account.change_weather(|weather| *weather = Weather { per_mille: 0, slow_per_mille: 0, ..*weather });
    });
}

/// An object of one archive is lost, cut or changed.
async fn damage(world: &Arc<World>, account: &Arc<Account>) {
    let stage = world.stage();
    let names = account.names().await;
    if names.is_empty() {
        return;
    }
    let at = &names[stage.below(names.len() as u64) as usize];
    let how = match stage.below(3) {
        0 => Damage::Lost,
        1 => Damage::Truncated,
        _ => Damage::Flipped(stage.below(1 << 20)),
    };
    let kind = match how {
        Damage::Lost => "an object lost",
        Damage::Truncated => "an object truncated",
        Damage::Flipped(_) => "an object with a flipped bit",
    };
    stage.disaster(kind, format!("{}: {at}: {how:?}", account.name));
    if let Err(error) = account.damage(at, how, true).await {
        stage.note(format!("not damaged: {error}"));
    }
}

fn slow_disk(world: &Arc<World>, host: usize) {
    let stage = world.stage();
    let home = world.hosts[host].lock();
    let Some(process) = &home.process else { return };
    let fails = stage.once_in(3);
    let kind = if fails { "a sync that fails" } else { "a slow disk" };
    stage.disaster(
        kind,
        format!("the disk of host {host} is slow{}", if fails { ", and a sync fails" } else { "" }),
    );
    let slow_ms = stage.below(SLOW_MS_MAX);
    process.log.trouble(|trouble| (trouble.slow_ms, trouble.fails) = (slow_ms, fails));
}

fn full_disk(world: &Arc<World>, host: usize) {
    let stage = Arc::clone(world.stage());
    let home = world.hosts[host].lock();
    let Some(process) = &home.process else { return };
    stage.disaster("a full disk", format!("the disk of host {host} is full"));
    let log = Arc::clone(&process.log);
    log.trouble(|trouble| trouble.full = true);
    tokio::spawn(async move {
        stage.pause(300, 8000).await;
        log.trouble(|trouble| trouble.full = false);
    });
}

fn step_clock(world: &Arc<World>, host: usize) {
    let stage = world.stage();
    let home = world.hosts[host].lock();
    let Some(process) = &home.process else { return };
    let hour = 3_600_000i64;
    let step = [hour, -hour, 365 * 24 * hour, -365 * 24 * hour, 90_000, -90_000, 0][stage.below(7) as usize];
    stage.disaster("a clock that steps", format!("the clock of host {host} steps by {step} ms"));
    process.clock.step(step);
}

fn pause(world: &Arc<World>, host: usize) {
    let stage = Arc::clone(world.stage());
    let gate = world.hosts[host].lock().gate().cloned();
    let Some(gate) = gate else { return };
    if gate.life() != Life::Runs {
        return;
    }
    stage.disaster("a process that stands still", format!("host {host} stands still"));
    gate.set(Life::Paused);
    tokio::spawn(async move {
        stage.pause(200, 12_000).await;
        gate.set(Life::Runs);
    });
}

/// The network parts a host from the others, in one direction or both, for a while.
fn part(world: &Arc<World>, host: usize) {
    let stage = world.stage();
    let directions = [(true, true), (true, false), (false, true)][stage.below(3) as usize];
    let whom: Vec<usize> = (0..world.hosts.len()).filter(|other| *other != host).collect();
    let whom = if stage.once_in(2) { whom } else { vec![whom[stage.below(whom.len() as u64) as usize]] };
    cut_off(world, host, whom, directions);
}

fn cut_off(world: &Arc<World>, host: usize, whom: Vec<usize>, (out, back): (bool, bool)) {
    let Some(network) = world.network.clone() else { return };
    let stage = world.stage();
    let how_long = stage.ms(200, 12_000);
    let kind = if out && back { "a partition" } else { "a one-way partition" };
    stage.disaster(
        kind,
        format!("host {host} is cut off from {whom:?} (out {out}, back {back}) for {how_long:?}"),
    );
    for other in &whom {
        if out {
            network.cut(host, *other);
        }
        if back {
            network.cut(*other, host);
        }
    }
    tokio::spawn(async move {
        tokio::time::sleep(how_long).await;
        for other in whom {
            network.mend(host, other);
            network.mend(other, host);
        }
    });
}

fn rough_air(world: &Arc<World>) {
    let Some(network) = &world.network else { return };
    let stage = world.stage();
    let air = Air {
        lost_per_mille: stage.below(150),
        doubled_per_mille: stage.below(100),
        latest: stage.ms(2, 120),
    };
    stage.disaster("a network that loses, doubles and reorders", format!("the network: {air:?}"));
    network.change_air(air);
}

/// The source dies, stands still or is cut off, and a mirror takes over.
fn replace(world: &Arc<World>) {
    let Some(leader) = world.leader() else { return };
    let stage = world.stage();
    let mirrors: Vec<usize> = (0..world.hosts.len()).filter(|host| *host != leader).collect();
    let mirror = mirrors[stage.below(mirrors.len() as u64) as usize];
    match stage.below(4) {
        // The other mirror still hears the source, and acknowledges to it if it forgets what it promises.
        _ if stage.has(Canary::ForgottenPromise) => cut_off(world, leader, vec![mirror], (true, true)),
        0 | 1 => crash(world, leader),
        2 => pause(world, leader),
        _ => part(world, leader),
    }
    let world = Arc::clone(world);
    tokio::spawn(async move { world.promote(mirror).await });
}

/// The bug: a disk that says synced and has not.
fn lie(world: &Arc<World>) {
    let Some(host) = world.leader() else { return };
    world.crash(host);
    let origin = world.ground.origin;
    world.hosts[host].lock().disk.forget(origin, 5);
    world.restart_later(host);
}

/// The bug: somebody deletes what a retained moment needs.
async fn collect(world: &Arc<World>) {
    for account in &world.ground.archives {
        let names = account.names().await;
        let packs: Vec<_> = names.iter().filter(|name| name.as_ref().contains("/packs/")).collect();
        if let Some(pack) = packs.first() {
            account.damage(pack, Damage::Lost, false).await.unwrap_or_default();
        }
    }
}
