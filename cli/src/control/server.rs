//! The answering side of the control socket: a thread that accepts, and one for each connection.
//!
//! Invariants:
//! - An answer is one last line, after any number of others; a request that is not understood gets one too.
//! - A connection that breaks ends its own thread and nothing else.
//! - One that takes no answer, or asks nothing, is given up: what was asked for is done all the same, and its place is free for others.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::Value;

use super::{BYTES_MAX, Greeting, LINE_BYTES_MAX, Line, Request, SOCKET, VERSION, at_socket};
use crate::{
    error::{CliError, at},
    progress::Progress,
};

/// What answers requests. Each call has a thread of its own and may block.
pub(crate) trait Handler: Send + Sync + 'static {
    fn handle(&self, request: Request, replies: &mut dyn Replies) -> Result<Value, CliError>;

    /// Whether somebody else takes orders in a moment: it is just beginning, or about to end.
    fn is_passing(&self) -> bool {
        false
    }
}

/// The lines of an answer before its last one.
pub(crate) trait Replies {
    /// Says how far it is.
    fn progress(&mut self, progress: Progress);

    /// Hands out an item.
    fn item(&mut self, value: Value);

    /// Hands out bytes. Fails if nobody takes them: what makes them may stop.
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Listens until it is dropped.
pub(crate) struct ControlServer {
    socket: PathBuf,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    active: AtomicUsize,
    stopped: AtomicBool,
}

impl ControlServer {
    /// Begins to answer in `directory`, whose lock the caller holds, for as long as the handler lives.
    pub(crate) fn start(directory: &Path, handler: &Arc<dyn Handler>) -> Result<ControlServer, CliError> {
        let socket = directory.join(SOCKET);
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&socket)(error)),
            _ => {}
        }
        let listener = at_socket(directory, |path| UnixListener::bind(path)).map_err(at(&socket))?;
        let state = Arc::new(State::default());
        let (shared, handler) = (Arc::clone(&state), Arc::downgrade(handler));
        thread::Builder::new()
            .name("murphy-control".to_owned())
            .spawn(move || accept(&listener, &handler, &shared))
            .map_err(at(&socket))?;
        Ok(ControlServer { socket, state })
    }

    /// Waits a moment for answers that are being given. Whoever comes meanwhile is answered too: one that nobody answers could not know that
    /// the node's lock is about to be free.
    pub(crate) fn drain(&self) {
        for _ in 0..DRAIN_STEPS {
            if self.state.active.load(Ordering::SeqCst) == 0 {
                return;
            }
            thread::sleep(DRAIN_PAUSE);
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        if let Err(error) = fs::remove_file(&self.socket) {
            tracing::debug!(%error, "the control socket was not removed");
        }
    }
}

fn accept(listener: &UnixListener, handler: &Weak<dyn Handler>, state: &Arc<State>) {
    for stream in listener.incoming() {
        if state.stopped.load(Ordering::SeqCst) {
            return;
        }
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket failed for a moment");
                thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if state.active.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            state.active.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("too many commands at once, one was turned away");
            continue;
        }
        let Some(handler) = handler.upgrade() else { return };
        let shared = Arc::clone(state);
        let spawned = thread::Builder::new().name("murphy-command".to_owned()).spawn(move || {
            let _active = Active(shared);
            match serve(&stream, &*handler, Patience::default()) {
                Err(error) if is_late(&error) => {
                    tracing::warn!("a command that takes no answer was given up");
                }
                Err(error) => tracing::debug!(%error, "a command went away before it was answered"),
                Ok(()) => {}
            }
        });
        if let Err(error) = spawned {
            state.active.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!(%error, "a command was turned away");
        }
    }
}

/// Counts a connection until it is dropped, a panic included.
struct Active(Arc<State>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How long a command is waited for.
#[derive(Clone, Copy)]
struct Patience {
    /// To take what it is answered.
    reply: Duration,
    /// To ask, or to ask again.
    request: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { reply: REPLY_MAX, request: REQUEST_MAX }
    }
}

/// Whether the system has given up waiting.
fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn serve(stream: &UnixStream, handler: &dyn Handler, patience: Patience) -> io::Result<()> {
    stream.set_write_timeout(Some(patience.reply))?;
    stream.set_read_timeout(Some(patience.request))?;
    let mut greeting = serde_json::to_string(&Greeting { murphy: VERSION, passing: handler.is_passing() })?;
    greeting.push('\n');
    let mut to_client = stream;
    to_client.write_all(greeting.as_bytes())?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let mut replies = Sent { stream, broken: None };
        match reader.by_ref().take(LINE_BYTES_MAX).read_line(&mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if is_late(&error) => {
                let late = format!("nothing was asked for {:?}", patience.request);
                return replies.send(&Line::Failed(CliError::new(late)));
            }
            Err(error) => return Err(error),
        }
        let answer = match serde_json::from_str(&line) {
            Ok(request) => handler.handle(request, &mut replies),
            Err(error) => {
                Err(CliError::new(format!("the running process does not know this request: {error}"))
                    .hint("it is of another version; restart it"))
            }
        };
        if let Some(error) = replies.broken.take() {
            return Err(error);
        }
        replies.send(&match answer {
            Ok(value) => Line::Done(value),
            Err(error) => Line::Failed(error),
        })?;
    }
}

/// Replies over the socket.
struct Sent<'a> {
    stream: &'a UnixStream,
    broken: Option<io::Error>,
}

impl Replies for Sent<'_> {
    fn progress(&mut self, progress: Progress) {
        self.send_or_note(&Line::Progress(progress));
    }

    fn item(&mut self, value: Value) {
        self.send_or_note(&Line::Item(value));
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(error) = &self.broken {
            return Err(error.kind().into());
        }
        let sent = self.send_bytes(bytes);
        if let Err(error) = &sent {
            self.broken = Some(error.kind().into());
        }
        sent
    }
}

impl Sent<'_> {
    fn send_or_note(&mut self, line: &Line) {
        if self.broken.is_none() {
            self.broken = self.send(line).err();
        }
    }

    /// Whoever takes bytes may be slow: a pager, or a line to somewhere far away.
    fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        let before = self.stream.write_timeout()?;
        self.stream.set_write_timeout(Some(TAKEN_MAX))?;
        for part in bytes.chunks(BYTES_MAX) {
            self.send(&Line::Bytes(part.len() as u64))?;
            self.stream.write_all(part)?;
        }
        self.stream.set_write_timeout(before)
    }

    fn send(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.stream.write_all(text.as_bytes())
    }
}

const CONNECTIONS_MAX: usize = 64;
/// A command that was stopped with a full pipe takes nothing.
const REPLY_MAX: Duration = Duration::from_secs(30);
/// Bytes go where whoever asked has sent them, and may have to wait there.
const TAKEN_MAX: Duration = Duration::from_secs(3600);
/// People may be asked in between whether they are sure.
const REQUEST_MAX: Duration = Duration::from_secs(3600);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Five seconds in all.
const DRAIN_STEPS: u32 = 250;
const DRAIN_PAUSE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{control::Control, output::Output};

    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Request, replies: &mut dyn Replies) -> Result<Value, CliError> {
            match request {
                Request::Flush => Err(CliError::new("no").hint("never")),
                request => {
                    replies.item(serde_json::json!(1));
                    Ok(serde_json::to_value(request).unwrap())
                }
            }
        }
    }

    /// Says so much that no pipe has room for it, and when it is through.
    struct Talker(std::sync::mpsc::SyncSender<()>);

    impl Handler for Talker {
        fn handle(&self, _: Request, replies: &mut dyn Replies) -> Result<Value, CliError> {
            for _ in 0..4096 {
                replies.item(Value::String("x".repeat(4096)));
            }
            self.0.send(()).map_err(CliError::new)?;
            Ok(Value::Null)
        }
    }

    /// The fear: somebody stops a command with Ctrl-Z, and the promotion or the removal that it asked for stands still with it.
    #[test]
    fn a_command_that_takes_no_answer_holds_up_nothing() {
        let (mut command, node) = UnixStream::pair().unwrap();
        let patience = Patience { reply: Duration::from_millis(100), request: REQUEST_MAX };
        let (done, is_done) = std::sync::mpsc::sync_channel(1);
        let serving = thread::spawn(move || serve(&node, &Talker(done), patience));
        command.write_all(b"{\"request\":\"flush\"}\n").unwrap();
        is_done.recv_timeout(Duration::from_secs(30)).expect("it is done");
        assert!(is_late(&serving.join().unwrap().unwrap_err()));
    }

    /// The fear: commands that were forgotten take all places, and the node can be asked nothing any more.
    #[test]
    fn a_command_that_asks_nothing_is_told_so_and_let_go() {
        let (command, node) = UnixStream::pair().unwrap();
        let patience = Patience { reply: REPLY_MAX, request: Duration::from_millis(50) };
        let serving = thread::spawn(move || serve(&node, &Echo, patience));
        let mut said = String::new();
        (&command).read_to_string(&mut said).unwrap();
        assert!(said.contains("nothing was asked for 50ms"), "{said}");
        serving.join().unwrap().unwrap();
    }

    /// A node deep in a tree must be as reachable as any other.
    #[test]
    fn a_socket_works_below_a_path_longer_than_an_address() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("x".repeat(100)).join("y".repeat(100));
        fs::create_dir_all(&deep).unwrap();
        assert!(Control::connect(&deep).unwrap().is_none());
        let handler: Arc<dyn Handler> = Arc::new(Echo);
        let server = ControlServer::start(&deep, &handler).unwrap();
        let output = Output::new(true);
        let mut control = Control::connect(&deep).unwrap().unwrap();
        let mut items = 0;
        let request = Request::Fsck { data: true };
        let answer = control.ask(&request, &output, |_| {
            items += 1;
            Ok(())
        });
        assert_eq!((answer, items), (Ok(serde_json::to_value(&request).unwrap()), 1));
        let refused = control.ask(&Request::Flush, &output, |_| Ok(())).unwrap_err();
        assert_eq!(refused, CliError::new("no").hint("never"));
        drop(control);
        server.drain();
        drop(server);
        assert!(Control::connect(&deep).unwrap().is_none());
    }

    /// A kill can come at any moment of a conversation; whatever the system calls that, people are told that the node is not running.
    #[test]
    fn a_process_that_is_killed_while_it_is_asked_is_said_to_be_gone() {
        for hears in [false, true] {
            let root = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(root.path().join(SOCKET)).unwrap();
            let dies = thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(b"{\"murphy\":0}\n").unwrap();
                if hears {
                    let mut line = String::new();
                    BufReader::new(stream).read_line(&mut line).unwrap();
                }
            });
            let mut control = Control::connect(root.path()).unwrap().unwrap();
            if !hears {
                dies.join().unwrap();
            }
            let said = control.ask(&Request::Flush, &Output::new(true), |_| Ok(())).unwrap_err().to_string();
            let node = root.path().display().to_string();
            assert!(said.contains("is not running") && said.contains(&node), "{said}");
        }
    }

    /// A process that was killed leaves its socket behind.
    #[test]
    fn a_stale_socket_is_nobody_and_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(root.path().join(SOCKET)).unwrap());
        assert!(Control::connect(root.path()).unwrap().is_none());
        let handler: Arc<dyn Handler> = Arc::new(Echo);
        let _server = ControlServer::start(root.path(), &handler).unwrap();
        assert!(Control::connect(root.path()).unwrap().is_some());
    }
}
