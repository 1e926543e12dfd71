//! The process that serves a node: its control socket, its mounts, and its end.
//!
//! Invariants:
//! - It ends cleanly on SIGTERM, SIGINT and SIGHUP (a terminal that is closed), and when its last mount is unmounted if it was started by `mount`: everything durable first,
//!   then the mounts, then whatever was written in between.
//! - Once it is decided that it ends nothing is begun any more that would end with it: no mount, no change. What was begun before is waited for.
//! - When the volume has ended (the log is poisoned, another source took over) it says why, exits with 1, and its mounts go with it.

mod answer;
mod beforehand;
mod gate;
mod host;
mod joining;
mod level;
mod removals;
mod scrub;
mod tasks;

use std::{
    collections::BTreeSet, net::SocketAddr, os::unix::process::CommandExt, path::PathBuf, sync::Arc,
    time::Duration,
};

use serde_json::Value;
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

use crate::{
    background,
    control::{
        Control, ControlServer, Handler, MountRequest, Replies, Request, ask_lasting, leave_to_the_server,
    },
    error::{CliError, Code, failed},
    mirror_notes,
    mirrors::{self, Mirroring},
    node::{Looked, Node, NodeOptions},
    output::Output,
    progress::{Progress, ProgressLine},
    replaced::way_on,
};
use host::{Host, HostOptions, Purpose};
use scrub::Scrub;

/// What to serve.
pub(crate) struct Plan {
    pub(crate) directory: PathBuf,
    pub(crate) options: NodeOptions,
    /// The first mount. A process that was started with one ends with its last one.
    pub(crate) mount: Option<MountRequest>,
    /// Where to listen for other nodes.
    pub(crate) listen: Option<SocketAddr>,
}

/// Serves until it is over.
pub(crate) fn run(plan: &Plan, output: &Output) -> Result<Code, CliError> {
    let begun_in = std::env::current_dir().map_err(failed)?;
    if background::is_child() {
        background::detach()?;
    }
    let runtime = Runtime::new().map_err(failed)?;
    // From here on a signal means a clean end, however early it comes.
    let mut signals = Signals::listen(&runtime)?;
    let given_up = async {
        tokio::select! {
            _ = signals.terminate.recv() => {}
            _ = signals.interrupt.recv() => {}
        }
    };
    let opened = mirrors::open(&plan.directory, &plan.options, runtime.handle(), given_up)?;
    let Some(opened) = opened else { return Ok(Code::Done) };
    let options = HostOptions {
        purpose: Purpose::Serve,
        io_timeout: plan.options.io_timeout,
        ends_with_mounts: plan.mount.is_some(),
        given_up: BTreeSet::new(),
    };
    let (node, mirroring) = Mirroring::start(opened, plan.listen, runtime.handle())?;
    let scrub_every = scrub::every(&node.config, &plan.options)?;
    let host = Arc::new(Host::start(node, mirroring, options, runtime.handle())?);
    let handler = Arc::clone(&host) as Arc<dyn Handler>;
    let server = ControlServer::start(&plan.directory, &handler)?;
    if let Some(request) = &plan.mount {
        host.mount_first(request)?;
    }
    let scrub = Scrub::start(&host.node, scrub_every)?;
    tracing::info!(node = %plan.directory.display(), "serving");
    background::report_ready();
    let why = runtime.block_on(wait(&host, &mut signals));
    drop(scrub);
    let code = end(&host, &why, output);
    host.mirroring.stop();
    server.drain();
    drop(server);
    // What has not come to its end by now waits for a store that does not answer.
    runtime.shutdown_timeout(SHUTDOWN);
    // The node's lock is given back last.
    drop((handler, host));
    match why {
        Over::BeginAnew(_) => Err(begin_anew(&begun_in)),
        Over::Signal | Over::Unmounted | Over::Ended(_) => code,
    }
}

/// Runs this program again in this process, with nothing open any more. Returns only if that fails.
fn begin_anew(begun_in: &std::path::Path) -> CliError {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return failed(error),
    };
    let mut command = std::process::Command::new(program);
    failed(command.args(std::env::args_os().skip(1)).current_dir(begun_in).exec())
}

/// Asks the process that serves the node in `directory`; without one the answer is given here, by a node that is opened for it.
pub(crate) fn ask(
    directory: &std::path::Path,
    request: &Request,
    output: &Output,
    mut item: impl FnMut(Value) -> Result<(), CliError>,
) -> Result<Value, CliError> {
    if !request.outlives_nobody() {
        if let Some(answer) = ask_lasting(directory, request, output, &mut item)? {
            return Ok(answer);
        }
    } else if let Some(mut control) = Control::connect(directory)? {
        let answer = control.ask(request, output, &mut item);
        // A process that has just ended is no reason not to say how its node is.
        if *request != Request::Status || answer.is_ok() || Control::connect(directory)?.is_some() {
            return answer;
        }
    }
    let given_up = request.given_up();
    // What a member vouches for that is given up keeps the node from nothing, unless it is not given up in the end.
    let note = if given_up.is_empty() { None } else { mirror_notes::load(directory) };
    let note = note.filter(|note| given_up.contains(&note.node));
    if note.is_some() {
        mirror_notes::forget(directory)?;
    }
    let mut is_out = false;
    let mut item = |value: Value| {
        is_out |= note.is_some_and(|note| value["removed"] == note.node.to_string().as_str());
        item(value)
    };
    let bytes = &mut |_: &[u8]| Err(CliError::new("the answer is bytes that nobody wants"));
    let answer = answer_at_rest(directory, request, output, (&mut item, bytes));
    if let (Err(_), Some(note), false) = (&answer, note, is_out) {
        mirror_notes::save(directory, &note)?;
    }
    answer
}

/// The same for an answer that is bytes.
pub(crate) fn ask_for_bytes(
    directory: &std::path::Path,
    request: &Request,
    output: &Output,
    bytes: &mut dyn FnMut(&[u8]) -> Result<(), CliError>,
) -> Result<Value, CliError> {
    match Control::connect(directory)? {
        Some(mut control) => control.ask_for_bytes(request, output, bytes),
        None => answer_at_rest(directory, request, output, (&mut |_| Ok(()), bytes)),
    }
}

/// Opens a node that nobody serves, for one answer. No file of it is changed if the answer only shows something, or is a refusal.
fn answer_at_rest<'a>(
    directory: &std::path::Path,
    request: &Request,
    output: &Output,
    (item, bytes): (&mut TakesItems<'a>, &mut TakesBytes<'a>),
) -> Result<Value, CliError> {
    beforehand::check(directory, request)?;
    let runtime = Runtime::new().map_err(failed)?;
    let (node, scratch) = match request.only_looks() && Looked::is_possible(directory)? {
        true => match Looked::open(directory, runtime.handle()) {
            Ok(Looked { node, scratch }) => (node, Some(scratch)),
            Err(error) => return removals::plan_unseen(directory, request, error),
        },
        false => (Node::open(directory, &NodeOptions::default(), runtime.handle())?, None),
    };
    let purpose = if request.changes() { Purpose::Change } else { Purpose::Look };
    let given_up = request.given_up();
    let options = HostOptions { purpose, io_timeout: None, ends_with_mounts: false, given_up };
    let mirroring = Arc::new(mirrors::at_rest(&node, runtime.handle())?);
    let host = Host::start(node, mirroring, options, runtime.handle())?;
    let mut replies = Printed { line: ProgressLine::new(output), item, bytes, failed: None };
    let answer = host.handle(request.clone(), &mut replies);
    let unprinted = replies.failed.take();
    drop(replies);
    host.mirroring.stop();
    if matches!(request, Request::Promote(_)) {
        // Whoever is to acknowledge from now on is not shipped to by this process, and no mirror can reach it.
        host.volume().acknowledge_alone();
    }
    if purpose == Purpose::Change || matches!(request, Request::Promote(_)) {
        host.close()?;
    }
    drop(host);
    runtime.shutdown_timeout(SHUTDOWN);
    drop(scratch);
    match unprinted {
        Some(error) => Err(error),
        None => answer,
    }
}

/// What takes parts of an answer.
type TakesItems<'a> = dyn FnMut(Value) -> Result<(), CliError> + 'a;
type TakesBytes<'a> = dyn FnMut(&[u8]) -> Result<(), CliError> + 'a;

/// Replies that are shown by the process that gives them.
struct Printed<'a, 'b> {
    line: ProgressLine,
    item: &'a mut TakesItems<'b>,
    bytes: &'a mut TakesBytes<'b>,
    failed: Option<CliError>,
}

impl Replies for Printed<'_, '_> {
    fn progress(&mut self, progress: Progress) {
        self.line.show(&progress);
    }

    fn item(&mut self, value: Value) {
        if self.failed.is_none() {
            self.failed = (self.item)(value).err();
        }
    }

    fn bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.failed.is_none() {
            self.failed = (self.bytes)(bytes).err();
        }
        self.failed.as_ref().map_or(Ok(()), |error| Err(std::io::Error::other(error.clone())))
    }
}

/// Why serving is over.
enum Over {
    Signal,
    Unmounted,
    Ended(String),
    /// What a mirror holds is to be replaced.
    BeginAnew(String),
}

impl Over {
    /// How long orders that came before are waited for. Where nothing can be decided any more they come to no good end.
    fn orders(&self) -> Duration {
        if matches!(self, Over::Ended(_)) { Duration::ZERO } else { ORDERS }
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen(runtime: &Runtime) -> Result<Signals, CliError> {
        let _entered = runtime.enter();
        leave_to_the_server();
        Ok(Signals {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            hangup: signal(SignalKind::hangup()).map_err(failed)?,
        })
    }
}

async fn wait(host: &Host, signals: &mut Signals) -> Over {
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return Over::Signal,
            _ = signals.interrupt.recv() => return Over::Signal,
            _ = signals.hangup.recv() => return Over::Signal,
            _ = look.tick() => {}
        }
        if let Some(reason) = host.ended() {
            return Over::Ended(reason);
        }
        if let Some(reason) = host.mirroring.restart() {
            return Over::BeginAnew(reason);
        }
        if host.ends_with_its_mounts() {
            return Over::Unmounted;
        }
    }
}

/// Ends everything in order.
fn end(host: &Host, why: &Over, output: &Output) -> Result<Code, CliError> {
    host.take_no_more(why.orders());
    let mounts = host.take_mounts();
    if let Over::Ended(reason) = why {
        // The mounts are detached: nothing that is written there could be kept.
        drop(mounts);
        let hint = match host.mirroring.lost() {
            _ if host.is_replaced() => way_on(host.directory()),
            Some(_) => {
                "start again while that mirror is served with --listen: what is lost is fetched from there. A log that has gone on without it cannot take it back: murphy promote at that mirror, or murphy member remove with --assume-lost, of every mirror that holds it, gives that up".to_owned()
            }
            None if host.archives.lost().is_some() => {
                "start again while that archive answers: what is lost is fetched from there, or what stands in the way is said".to_owned()
            }
            None => "everything acknowledged is in the log; start again once the cause is gone".to_owned(),
        };
        return Err(CliError::new(format!("the volume has ended: {reason}")).hint(hint));
    }
    if let Over::BeginAnew(reason) = why {
        tracing::warn!(reason, "this mirror begins anew");
    }
    if matches!(why, Over::Signal) && !mounts.is_empty() {
        output.note("Ending: everything is made durable first");
    }
    if let Err(error) = host.flush(&mut |_| {}) {
        tracing::error!(%error, "the mounts end all the same");
    }
    for mount in mounts {
        if let Err(error) = mount.unmount() {
            tracing::warn!(%error, "detaching it: open files there fail from now on");
        }
    }
    // It tries once more, and tells what became of everything.
    host.close().map(|()| Code::Done)
}

const LOOK: Duration = Duration::from_millis(50);
const ORDERS: Duration = Duration::from_secs(5);
const SHUTDOWN: Duration = Duration::from_secs(2);
