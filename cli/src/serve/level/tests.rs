//! Orders for another level at a node in this process, whose mirrors say what they are told to: crashes after every durable step, orders that
//! stand in each other's way, and a source that is replaced meanwhile.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use murphy_fs::{Errno, FileSystem};
use murphy_log::{Epoch, EpochId, Lsn, NodeId, Position};
use tokio::runtime::Runtime;

use super::*;
use crate::{
    mirrors::{self, Mirroring, steps},
    node::{NewNode, NodeOptions, create},
    serve::host::{HostOptions, Purpose},
    settings::{SharedArchive, shared_form},
};

mod joining;

/// A node that is served, and two mirrors that nobody has admitted yet.
struct Scene {
    host: Arc<Host>,
    directory: PathBuf,
    folder: tempfile::TempDir,
    // Dropped last.
    runtime: Runtime,
}

const MIRRORS: [NodeId; 2] = [NodeId::from_bytes([1; 16]), NodeId::from_bytes([2; 16])];

impl Scene {
    /// A new volume that waits for nobody, with an archive in another failure domain, and so many mirrors.
    fn new(mirrors: usize) -> Scene {
        Scene::served(mirrors, &NodeOptions::default())
    }

    /// The same, served in another way.
    fn served(mirrors: usize, options: &NodeOptions) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("a");
        let url = |name: &str, domain: &str| -> StoreUrl {
            format!("file://{}{domain}", folder.path().join(name).display()).parse().unwrap()
        };
        let far = url("far", "?domain=far");
        let shared = SharedArchive { known: true, ..SharedArchive::new(shared_form(&far), false) };
        let settings = Settings {
            name: "vol".to_owned(),
            ack: Ack::Local,
            sync: false,
            window: "30d".to_owned(),
            archives: vec![shared],
        };
        let new = NewNode { blocks: url("blocks", ""), settings, archives: vec![(far, false)] };
        let runtime = Runtime::new().unwrap();
        create(&directory, &new, runtime.handle()).unwrap();
        let host = serve(&directory, options, &runtime);
        MIRRORS[..mirrors].iter().for_each(|node| host.mirroring.admit(*node));
        Scene { host, directory, folder, runtime }
    }

    fn order(&self, to: Ack) -> Result<Value, CliError> {
        ack(&self.host, &AckOrder { level: Some(to), dry_run: false, confirmed: true })
    }

    /// What `act` answers, while every mirror acknowledges whatever is durable.
    fn while_they_follow<T>(&self, act: impl FnOnce() -> T) -> T {
        let follows = AtomicBool::new(true);
        thread::scope(|scope| {
            scope.spawn(|| {
                while follows.load(Ordering::Relaxed) {
                    MIRRORS.iter().for_each(|node| self.host.mirroring.has_everything(*node));
                    // As often as a network would carry it: whoever is waited for needs the processor too.
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let done = act();
            follows.store(false, Ordering::Relaxed);
            done
        })
    }

    /// Gets to `level` from `local`.
    fn at(self, level: Ack) -> Scene {
        if level != Ack::Local {
            self.while_they_follow(|| self.order(level)).unwrap();
        }
        // Each counts, not only as many as are waited for.
        if let Ack::Mirrors(_) = level {
            self.while_they_follow(|| {
                while self.host.mirroring.counts().unwrap().1.len() < 2 {
                    thread::yield_now();
                }
            });
        }
        self
    }

    fn fsync(&self) -> Result<(), Errno> {
        self.runtime.block_on(self.host.volume().sync_all().wait())
    }

    fn set(&self) -> Ack {
        Settings::of(self.host.volume()).unwrap().ack
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        steps::look_away(&self.directory);
        self.host.mirroring.stop();
    }
}

fn serve(directory: &Path, options: &NodeOptions, runtime: &Runtime) -> Arc<Host> {
    let opened = mirrors::open(directory, options, runtime.handle(), std::future::pending());
    let opened = opened.unwrap().unwrap();
    let (node, mirroring) = Mirroring::start(opened, None, runtime.handle()).unwrap();
    let options = HostOptions {
        purpose: Purpose::Serve,
        io_timeout: None,
        ends_with_mounts: false,
        given_up: BTreeSet::new(),
    };
    Arc::new(Host::start(node, mirroring, options, runtime.handle()).unwrap())
}

/// What a crash leaves of the node at this moment. What is written last is read first: nothing is there without what came before it.
fn crash(directory: &Path, to: &Path) {
    std::fs::create_dir_all(to.join("log")).unwrap();
    for file in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    for file in std::fs::read_dir(directory.join("log")).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), to.join("log").join(file.file_name())).unwrap();
    }
}

/// A crash after one step of an order.
struct Crashed {
    directory: PathBuf,
    /// What every mirror had by then.
    held: Lsn,
    /// Where the log ended, if it had the new level.
    has_entry: Option<Lsn>,
}

impl Crashed {
    /// A crash of `host` at this moment, on its way to `level`.
    fn now(host: &Host, level: Ack, directory: PathBuf) -> Crashed {
        let (held, durable) = (host.mirroring.held_by_all(), host.volume().durable().lsn);
        let is_set = Settings::of(host.volume()).unwrap().ack == level;
        crash(&host.node.directory, &directory);
        Crashed { directory, held, has_entry: is_set.then_some(durable) }
    }

    fn restart(&self, runtime: &Runtime) -> Restarted {
        let options = NodeOptions::default();
        let opened = mirrors::open(&self.directory, &options, runtime.handle(), std::future::pending());
        let (node, mirroring) = Mirroring::start(opened.unwrap().unwrap(), None, runtime.handle()).unwrap();
        let (set, waits) = (Settings::of(&node.volume).unwrap().ack, mirroring.waited_for().unwrap());
        let counts = mirroring.counts();
        mirroring.stop();
        Restarted { set, waits, counts, held: self.held }
    }
}

/// What a node waits for after it was started again.
#[derive(Debug)]
struct Restarted {
    set: Ack,
    waits: Ack,
    counts: Option<(usize, BTreeSet<NodeId>)>,
    held: Lsn,
}

/// Every order from every level to every other one, with a crash after each of its durable steps.
///
/// The fear: a node that was started again counts fewer than whoever takes over goes by, or counts for a level of which nobody has heard.
#[test]
fn a_crash_after_any_step_of_an_order_leaves_a_level_that_is_safe() {
    let levels = [Ack::Local, Ack::Mirrors(1), Ack::Mirrors(2), Ack::Archive];
    let mut crashes = 0;
    for (from, to) in levels.iter().flat_map(|from| levels.iter().map(move |to| (*from, *to))) {
        if from == to {
            continue;
        }
        let scene = Scene::new(2).at(from);
        let (taken, folder) = (Arc::new(Mutex::new(Vec::new())), scene.folder.path().join("crashed"));
        taken.lock().unwrap().push(Crashed::now(&scene.host, to, folder.join("before")));
        steps::look(&scene.directory, {
            let (taken, host) = (Arc::clone(&taken), Arc::downgrade(&scene.host));
            move || {
                let (mut taken, host) = (taken.lock().unwrap(), host.upgrade().unwrap());
                let directory = folder.join(taken.len().to_string());
                taken.push(Crashed::now(&host, to, directory));
            }
        });
        scene.while_they_follow(|| scene.order(to)).unwrap_or_else(|error| panic!("{from} to {to}: {error}"));
        steps::look_away(&scene.directory);
        // What came into it afterwards would be fetched from there.
        std::fs::rename(scene.folder.path().join("far"), scene.folder.path().join("away")).unwrap();
        let taken = std::mem::take(&mut *taken.lock().unwrap());
        assert!(taken.len() > 1, "{from} to {to}");
        let entry = taken.iter().find_map(|crashed| crashed.has_entry);
        let found: Vec<Restarted> = taken.iter().map(|crashed| crashed.restart(&scene.runtime)).collect();
        found.iter().for_each(|found| judge((from, to), found, entry));
        let last = found.last().unwrap();
        assert_eq!((last.set, last.waits), (to, to), "the last step was the last one");
        crashes += found.len();
    }
    assert!(crashes >= 30, "{crashes} crashes");
}

/// `entry` is where the log ended with the entry of the new level.
fn judge((from, to): (Ack, Ack), found: &Restarted, entry: Option<Lsn>) {
    let context = format!("{from} to {to}: {found:?}");
    assert!([from, to].contains(&found.set) && [from, to].contains(&found.waits), "{context}");
    // The old level may be waited for although the log names the new one, while it is not in force; never the other way round.
    assert!(found.waits == found.set || (found.set, found.waits) == (to, from), "{context}");
    if let (Ack::Mirrors(asked), Ack::Mirrors(counted)) = (found.set, found.waits) {
        assert!(counted >= asked, "fewer are counted than the log says: {context}");
    }
    if let (Ack::Mirrors(wanted), Some((needed, set))) = (found.waits, &found.counts) {
        assert_eq!((*needed, set), (wanted as usize, &BTreeSet::from(MIRRORS)), "{context}");
    }
    // Fewer, or others, count only once everybody who may be asked has heard of it.
    let is_raised = matches!((from, to), (Ack::Mirrors(from), Ack::Mirrors(to)) if from < to);
    if found.waits == to && matches!(to, Ack::Mirrors(_)) && !is_raised {
        assert!(entry.is_some_and(|entry| found.held >= entry), "{context}, the entry at {entry:?}");
    }
}

fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
}

/// What tells a source that it must not go on.
fn end(host: &Host, how: usize) {
    let board = host.mirroring.board();
    match how {
        0 => board.fenced(epoch(9)),
        _ => {
            let position = host.volume().durable();
            board.note_lost(MIRRORS[0], Position { lsn: position.lsn.next(), ..position });
        }
    }
}

/// The fear: people who see every fsync hang go on without mirrors, at a source that was replaced, and what it says to be durable is lost.
#[test]
fn no_order_lets_a_source_acknowledge_that_was_replaced() {
    for how in 0..2 {
        let scene = Scene::new(2).at(Ack::Mirrors(1));
        scene.while_they_follow(|| scene.fsync()).unwrap();
        end(&scene.host, how);
        for to in [Ack::Local, Ack::Mirrors(2), Ack::Archive] {
            let refused = scene.order(to).unwrap_err();
            assert!(refused.message.contains("nothing is acknowledged here any more"), "{to}: {refused}");
            assert_eq!(scene.set(), Ack::Mirrors(1), "{to}");
        }
        assert_eq!(scene.fsync(), Err(Errno::EIO));
    }
}

/// The same between the look and the change: at each durable step.
#[test]
fn a_source_that_is_replaced_within_an_order_acknowledges_nothing_after_it() {
    for (how, to) in [(0, Ack::Local), (1, Ack::Local), (0, Ack::Archive), (0, Ack::Mirrors(2))] {
        let scene = Scene::new(2).at(Ack::Mirrors(1));
        steps::look(&scene.directory, {
            let host = Arc::downgrade(&scene.host);
            move || end(&host.upgrade().unwrap(), how)
        });
        let refused = scene.while_they_follow(|| scene.order(to)).unwrap_err();
        assert!(refused.message.contains("nothing is acknowledged here any more"), "{to}: {refused}");
        assert_eq!(scene.while_they_follow(|| scene.fsync()), Err(Errno::EIO), "{to}");
    }
}

/// Also at a source that never waited for anybody.
#[test]
fn a_source_with_the_level_local_that_was_replaced_acknowledges_nothing() {
    let scene = Scene::new(1);
    scene.fsync().unwrap();
    end(&scene.host, 0);
    assert_eq!(scene.fsync(), Err(Errno::EIO));
    assert!(scene.order(Ack::Local).is_err());
}

/// Runs `waits`, which waits for mirrors that say nothing, and orders `local` once it `has_begun`, until it has an answer.
fn overtake(
    scene: &Scene,
    has_begun: impl Fn() -> bool,
    waits: impl FnOnce() -> Result<Value, CliError> + Send,
) -> CliError {
    thread::scope(|scope| {
        let waiting = scope.spawn(waits);
        while !has_begun() && !waiting.is_finished() {
            thread::yield_now();
        }
        while !waiting.is_finished() {
            scene.order(Ack::Local).unwrap();
        }
        waiting.join().unwrap().unwrap_err()
    })
}

/// The fear: a mirror is dead, somebody waits for it to raise the level, and the way out waits behind that order.
#[test]
fn local_ends_an_order_that_waits_for_a_mirror_and_says_so() {
    let orders = [
        (Ack::Local, Ack::Mirrors(1)),
        (Ack::Local, Ack::Archive),
        (Ack::Archive, Ack::Mirrors(2)),
        (Ack::Mirrors(1), Ack::Mirrors(2)),
        (Ack::Mirrors(2), Ack::Mirrors(1)),
    ];
    for (from, to) in orders {
        let scene = Scene::new(2).at(from);
        // Nobody has what comes next.
        scene.host.mirroring.admit(NodeId::from_bytes([3; 16]));
        let overtaken = overtake(&scene, || scene.host.level_turn.try_lock().is_err(), || scene.order(to));
        assert!(overtaken.message.contains("murphy ack local has overtaken"), "{from} to {to}: {overtaken}");
        assert_eq!((scene.set(), scene.host.mirroring.waited_for().unwrap()), (Ack::Local, Ack::Local));
        scene.fsync().unwrap();
    }
}

/// The same for an order that takes a member out.
#[test]
fn local_ends_the_removal_of_a_member_that_waits_for_another_one() {
    let scene = Scene::new(2).at(Ack::Mirrors(1));
    scene.host.mirroring.admit(NodeId::from_bytes([3; 16]));
    let remove = || {
        let mut removed = |_: Value| {};
        let members = [MIRRORS[0].to_string()];
        scene.host.mirroring.remove_members(&members, false, &mut removed).map(|()| Value::Null)
    };
    let overtaken = overtake(&scene, || scene.host.mirroring.is_turn_taken(), remove);
    assert!(overtaken.message.contains("murphy ack local has overtaken"), "{overtaken}");
    scene.fsync().unwrap();
}

/// From what archives have to what mirrors have: everything so far is there too, and what comes waits for them.
#[test]
fn mirrors_acknowledge_after_archives_once_they_have_everything() {
    let scene = Scene::new(2).at(Ack::Archive);
    scene.fsync().unwrap();
    let written = scene.host.volume().durable().lsn;
    let shown = scene.while_they_follow(|| scene.order(Ack::Mirrors(2))).unwrap();
    assert_eq!((&shown["ack"], &shown["in_force"]), (&json!("mirror=2"), &json!(true)), "{shown}");
    assert!(scene.host.mirroring.held_by_all() >= written);
    assert_eq!(scene.host.mirroring.counts().unwrap(), (2, BTreeSet::from(MIRRORS)));
    scene.while_they_follow(|| scene.fsync()).unwrap();
}

/// The fear: people throw away an archive that was removed, and a mirror that was away finds nowhere that another one acknowledges since.
#[test]
fn the_removal_of_an_archive_names_the_mirrors_that_would_still_look_for_it() {
    let scene = Scene::new(2);
    let url = Settings::of(scene.host.volume()).unwrap().archives[0].url.clone();
    let remove = || crate::serve::tasks::remove_archive(&scene.host, &url, true).unwrap();
    assert_eq!(remove()["not_known_to"], json!(MIRRORS.map(|node| node.to_string())));
    let scene = Scene::new(1);
    let url = Settings::of(scene.host.volume()).unwrap().archives[0].url.clone();
    scene.host.mirroring.has_everything(MIRRORS[0]);
    let untold = crate::serve::tasks::remove_archive(&scene.host, &url, true).unwrap();
    assert_eq!(untold["not_known_to"], json!([MIRRORS[0].to_string()]), "it has what came before");
    scene.host.mirroring.has_everything(MIRRORS[0]);
    let end = scene.host.volume().durable().lsn;
    assert!(scene.runtime.block_on(scene.host.mirroring.untold(end)).is_empty());
}

/// The fear: the source is called an observer, and somebody removes it.
#[test]
fn the_source_is_called_so_among_its_members() {
    let scene = Scene::new(1);
    scene.host.mirroring.admit(scene.host.node.identity.public_key().node());
    let listed = scene.host.mirroring.list_members();
    let roles: Vec<_> = listed.iter().map(|member| (member.own, member.role.as_str())).collect();
    assert!(roles.contains(&(true, "source")) && roles.contains(&(false, "mirror")), "{roles:?}");
}
