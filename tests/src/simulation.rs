//! The simulation: sources, archives, stores and clients in one process, from one seed, in virtual time.
//!
//! ```text
//!   clients -> Volume -> NodeLog over a disk that syncs late, fills up, fails, forgets and is lost
//!                 |          |
//!                 |          +-> Shipper -> archive-a, archive-b     accounts that fail, hang, lie, lose objects, and die
//!                 |          +-> QUIC    -> two mirrors, seeded by snapshots, with packs of their own
//!                 +-> packs  -> store-0
//!   judge: sees every frame that becomes durable, every object that lands, every fsync that returns
//!   people: restart, promote, invite, restore, give up what is gone
//! ```
//!
//! Everything between clients and accounts is the product's own code: the volume with its sequencer, applier and flusher, the shippers,
//! fences, snapshots and restores, the mirrors' protocol. Simulated are time, disks, stores, datagrams, processes and people.
//!
//! Invariants:
//! - One seed is one exact schedule: a process that simulates nothing else gives the same trace, bit for bit.
//! - Nothing here sleeps in real time.

mod account;
mod archives;
mod client;
mod disasters;
mod disk;
mod entropy;
mod gate;
mod gathering;
mod giving_up;
mod going_over;
mod judge;
mod lives;
mod losses;
mod members;
mod mirrors;
mod network;
mod node;
mod promotion;
mod removal;
mod restores;
mod rot;
mod seeding;
mod shipping;
mod stage;
mod trace;
mod verdict;
mod world;

use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use murphy_log::InPlace;
use tokio::sync::watch;

use self::{stage::Stage, world::World};

/// What `--ack` says in a world.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Level {
    Local,
    Mirror,
    Archive,
}

/// A deliberate bug, one for each thing that the judge must be able to find.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Canary {
    /// A disk says synced and has not: something acknowledged is lost.
    LyingDisk,
    /// A shipper does not wait for the disk: an archive is ahead of its source.
    ShipBeforeDurable,
    /// Somebody deletes a pack that a retained moment needs.
    EarlyCollector,
    /// A shipper stops without a word.
    SilentShipper,
    /// A mirror stops following without a word.
    SilentMirror,
    /// A mirror forgets what it has promised to a successor: two epochs acknowledge.
    ForgottenPromise,
    /// The index of a mirror loses rows: equal positions, other digests.
    ForgetfulIndex,
    /// A source lets one mirror fewer acknowledge than its level says.
    HastySource,
    /// A byte of a file is another one when its packs are damaged, as with a reader that does not verify what it reads.
    ForeignByte,
}

impl Canary {
    /// All of them.
    pub const ALL: [Canary; 9] = [
        Canary::LyingDisk,
        Canary::ShipBeforeDurable,
        Canary::EarlyCollector,
        Canary::SilentShipper,
        Canary::SilentMirror,
        Canary::ForgottenPromise,
        Canary::ForgetfulIndex,
        Canary::HastySource,
        Canary::ForeignByte,
    ];

    /// What it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Canary::LyingDisk => "lying-disk",
            Canary::ShipBeforeDurable => "ship-before-durable",
            Canary::EarlyCollector => "early-collector",
            Canary::SilentShipper => "silent-shipper",
            Canary::SilentMirror => "silent-mirror",
            Canary::ForgottenPromise => "forgotten-promise",
            Canary::ForgetfulIndex => "forgetful-index",
            Canary::HastySource => "hasty-source",
            Canary::ForeignByte => "foreign-byte",
        }
    }

    /// How the violation begins that it is: of the invariant that it breaks.
    pub fn finding(self) -> &'static str {
        match self {
            Canary::LyingDisk => "lost",
            Canary::ShipBeforeDurable => "ahead",
            Canary::EarlyCollector => "deleted",
            Canary::SilentShipper => "silent stall: archive",
            Canary::SilentMirror => "silent stall: mirror",
            Canary::ForgottenPromise => "two ",
            Canary::ForgetfulIndex => "digest",
            Canary::HastySource => "too few",
            Canary::ForeignByte => "foreign",
        }
    }

    /// How violations begin that follow from it in worlds where something else comes before what would show it itself. Whoever looks for
    /// the bug goes on to the next world.
    pub fn aftermath(self) -> &'static [&'static str] {
        match self {
            // One whose status says how far it is behind is not silent: it is found when everything should have caught up.
            Canary::SilentShipper => &["stall: "],
            // And one that hears its source for ever is not promoted while that one is gone.
            Canary::SilentMirror => &["stall: "],
            // What the old source has acknowledged after the seal is missed by whoever takes over next, if that comes before the next fsync.
            Canary::ForgottenPromise => &["lost"],
            // A mirror with such an index is promoted and read before anybody compares digests; a source that finds it out by itself seeds nobody.
            Canary::ForgetfulIndex => &["lost", "stall: "],
            Canary::LyingDisk
            | Canary::ShipBeforeDurable
            | Canary::EarlyCollector
            | Canary::HastySource
            | Canary::ForeignByte => &[],
        }
    }
}

impl fmt::Display for Canary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Canary {
    type Err = String;

    fn from_str(text: &str) -> Result<Canary, String> {
        let found = Canary::ALL.into_iter().find(|canary| canary.name() == text);
        found.ok_or_else(|| format!("no canary is called {text}"))
    }
}

/// What became of one seed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// The invariant that did not hold, if one did not.
    pub violation: Option<String>,
    /// The hash of everything that happened.
    pub trace: String,
    /// The last things that happened.
    pub tail: Vec<String>,
    /// How many disasters of each kind befell it.
    pub disasters: BTreeMap<&'static str, u64>,
    /// How often other things happened: small mishaps, and what was done about disasters.
    pub events: BTreeMap<&'static str, u64>,
    /// How many operations clients began.
    pub operations: u64,
    /// How many fsyncs returned without an error.
    pub acknowledged: u64,
    /// How long it took in its own time, in milliseconds.
    pub virtual_ms: u64,
}

/// Simulates `seed`. For the same trace in every run this must be the first simulation of its process: tokio counts its runtimes.
///
/// # Panics
/// If the product panics, or the world cannot be set up.
pub fn simulate(seed: u64, canary: Option<Canary>, print: bool) -> Outcome {
    let running =
        thread::Builder::new().name(format!("seed-{seed}")).stack_size(STACK_BYTES).spawn(move || {
            entropy::begin(seed);
            let _in_place = InPlace::begin();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
            runtime.expect("a runtime without a driver can be built").block_on(run(seed, canary, print))
        });
    let running = running.expect("a thread can be started");
    running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

async fn run(seed: u64, canary: Option<Canary>, print: bool) -> Outcome {
    let stage = Arc::new(Stage::new(seed, canary, print));
    // A node alone, or one with two mirrors.
    let needs_level = matches!(canary, Some(Canary::ForgottenPromise | Canary::HastySource));
    let needs_mirrors = needs_level || matches!(canary, Some(Canary::ForgetfulIndex | Canary::SilentMirror));
    let hosts = if needs_mirrors || stage.once_in(4) { 3 } else { 1 };
    let level = match stage.below(3) {
        _ if needs_level => Level::Mirror,
        0 => Level::Local,
        1 if hosts > 1 => Level::Mirror,
        _ => Level::Archive,
    };
    stage.note(format!("seed {seed}, {level:?}, {hosts} hosts"));
    tokio::select! {
        () = live(&stage, level, hosts) => {}
        () = stage.broken() => {}
    }
    let (disasters, events) = stage.tallies();
    Outcome {
        seed,
        violation: stage.violation(),
        trace: stage.hash(),
        tail: stage.tail(),
        disasters,
        events,
        operations: stage.operations.load(Ordering::Relaxed),
        acknowledged: stage.acknowledged.load(Ordering::Relaxed),
        virtual_ms: u64::try_from(stage.now().as_millis()).unwrap_or(u64::MAX),
    }
}

/// A world from its beginning to its end.
async fn live(stage: &Arc<Stage>, level: Level, hosts: usize) {
    let world = match World::new(stage, level, hosts).await {
        Ok(world) => world,
        Err(error) => return stage.violated(&format!("the world does not begin: {error}")),
    };
    world.start(0).await;
    for host in 1..hosts {
        let world = Arc::clone(&world);
        // One that comes late is seeded with more than the beginning.
        let joins = if stage.once_in(3) { stage.ms(1000, 15_000) } else { Duration::ZERO };
        tokio::spawn(async move {
            tokio::time::sleep(joins).await;
            world.rejoin_later(host);
        });
    }
    tokio::spawn(Arc::clone(&world).look_after_archives());
    let (stop, stopped) = watch::channel(false);
    let clients: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(Arc::clone(&world).employ(number, stopped.clone()))).collect();
    let end = stage.ms(8_000, 25_000);
    if hosts > 1 && stage.is_kind(3) {
        tokio::spawn(Arc::clone(&world).remove_mirrors(end));
    }
    disasters::strike(&world, end).await;
    world.heal().await;
    world.find_leader().await;
    stage.pause(1000, 3000).await;
    stop.send_replace(true);
    for client in clients {
        if let Err(error) = client.await {
            return stage.violated(&format!("a client has panicked: {error}"));
        }
    }
    world.settle().await;
    if stage.violation().is_none() {
        world.conclude().await;
    }
}

const CLIENTS: u64 = 3;
const STACK_BYTES: usize = 16 << 20;
