//! Drives a [`Follower`] core: connects, follows, connects again.
//!
//! Invariants:
//! - It never stops by itself while its own log works: whatever goes wrong is shown in the status and tried again.
//! - The core decides; this only reads, writes and waits.
//! - The core hears of a promise before it hears of anything that came after it.

mod seed;

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use murphy_log::{BranchId, Clock, Durable, DurableWatch, Lsn, State, WaitError};
use tokio::sync::{oneshot, watch};

use crate::{
    dial::{Dialer, RemotePacks},
    follower::{Follower, FollowerAction, FollowerConfig},
    identity::PublicKey,
    message::Message,
    replica::Replica,
    session::{Connection, MessageReader, MessageWriter, SessionError, next_frames},
    status::FollowerStatus,
};

/// Whom a mirror follows, and as whom.
#[derive(Clone)]
pub struct FollowSetup {
    /// Where the source listens, best first.
    pub addresses: Vec<String>,
    /// The key that the source proves.
    pub source_key: PublicKey,
    /// The branch to follow.
    pub branch: BranchId,
    /// The mirror's own node.
    pub replica: Arc<dyn Replica>,
    /// Reaches the source.
    pub dialer: Dialer,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// Chooses how long to wait before the next attempt, so that mirrors do not all come at once.
    pub random: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// After so long without a word the source is given up.
    pub silence: Duration,
    /// The last LSN that the source was heard of before; 0 for nothing.
    pub heard: Lsn,
}

/// What others can see of a mirror that follows, and ask of it.
#[derive(Debug)]
pub struct FollowHandle {
    /// How far it is.
    pub status: watch::Receiver<FollowerStatus>,
    /// The last LSN that it heard of from the source.
    pub heard: watch::Receiver<Lsn>,
    /// Fetches packs from the source.
    pub packs: RemotePacks,
}

/// A mirror that follows; drive it with [`Following::run`].
pub struct Following {
    setup: FollowSetup,
    core: Follower,
    status: watch::Sender<FollowerStatus>,
    heard: watch::Sender<Lsn>,
    packs: RemotePacks,
    address: String,
    attempts: u32,
}

impl Following {
    /// Gets ready to follow.
    pub fn new(setup: FollowSetup) -> (Following, FollowHandle) {
        Following::with_packs(RemotePacks::default(), setup)
    }

    /// The same, for one who reads the packs of the source through `packs` already.
    pub fn with_packs(packs: RemotePacks, setup: FollowSetup) -> (Following, FollowHandle) {
        let config = FollowerConfig {
            volume: setup.replica.keys().volume(),
            branch: setup.branch,
            node: setup.dialer.identity.node(),
            silence: setup.silence,
        };
        let replica = &setup.replica;
        let core = Follower::new(config, replica.keys().clone(), replica.state(), replica.promised());
        let address = setup.addresses.first().cloned().unwrap_or_default();
        let status = watch::Sender::new(core.status(setup.clock.monotonic(), address.clone()));
        let heard = watch::Sender::new(setup.heard);
        let handle =
            FollowHandle { status: status.subscribe(), heard: heard.subscribe(), packs: packs.clone() };
        (Following { setup, core, status, heard, packs, address, attempts: 0 }, handle)
    }

    /// Follows until `shutdown` says true. An error means that the own log has ended.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) -> Result<(), FollowError> {
        loop {
            tokio::select! {
                outcome = self.attempt() => outcome?,
                _ = shutdown.wait_for(|stop| *stop) => break,
            }
            let wait = self.next_wait();
            tokio::select! {
                () = self.idle(wait) => {}
                _ = shutdown.wait_for(|stop| *stop) => break,
            }
        }
        self.packs.set(None);
        Ok(())
    }

    /// One connection, from dialling to its end.
    async fn attempt(&mut self) -> Result<(), FollowError> {
        if self.setup.replica.begins_anew() {
            return Ok(());
        }
        let FollowSetup { addresses, source_key, dialer, .. } = &self.setup;
        let (connection, address) = match dialer.dial(addresses, *source_key).await {
            Ok(reached) => reached,
            Err(error) => {
                tracing::info!(%error, "the source is not reached");
                self.core.disconnected(Some(error.to_string()));
                self.publish();
                return Ok(());
            }
        };
        self.address = address;
        let outcome = self.follow(&connection).await;
        self.packs.set(None);
        connection.close("done");
        let error = match outcome {
            Ok(()) => None,
            Err(AttemptError::Session(error)) => {
                tracing::info!(%error, "the connection to the source has ended");
                Some(error.to_string())
            }
            Err(AttemptError::Log(error)) => return Err(error),
        };
        self.core.disconnected(error);
        self.publish();
        Ok(())
    }

    async fn follow(&mut self, connection: &Connection) -> Result<(), AttemptError> {
        let (mut reader, writer) = connection.open_both().await?;
        let replica = Arc::clone(&self.setup.replica);
        let mut data = replica.data();
        let mut frames: Option<MessageReader> = None;
        let mut io = Io { connection, writer, seed: None, watch: replica.durable(), over: false };
        let (state, bytes) = (replica.state(), *data.borrow_and_update());
        self.heed_promise();
        let mut actions = self.core.connected(self.now(), state);
        actions.extend(self.core.data(bytes));
        self.perform(actions, &mut io).await?;
        let mut ticks = tokio::time::interval(TICK);
        while !io.over {
            let event = tokio::select! {
                message = reader.next() => Event::Message(message),
                message = next_frames(connection, &mut frames), if self.core.is_following() => {
                    Event::Message(message)
                }
                durable = changed(&mut io.watch) => Event::Durable(durable?),
                Ok(()) = data.changed() => Event::Data(*data.borrow_and_update()),
                installed = seeded(&mut io.seed) => Event::Seeded(installed),
                _ = ticks.tick() => Event::Tick,
            };
            self.heed_promise();
            let actions = match event {
                Event::Message(message) => self.received(message)?,
                Event::Durable(Durable { terminal: Some(terminal), .. }) => {
                    return Err(AttemptError::Log(FollowError::Ended(terminal.to_string())));
                }
                Event::Durable(durable) => self.core.durable(durable.state),
                Event::Data(lsn) => self.core.data(lsn),
                Event::Seeded(installed) => {
                    io.seed = None;
                    io.watch = replica.durable();
                    self.core.seeded(installed)
                }
                Event::Tick => self.core.tick(self.now()),
            };
            self.perform(actions, &mut io).await?;
            self.publish();
        }
        // The source should hear why; it may be gone as well.
        io.writer.finish(FAREWELL).await.unwrap_or_default();
        Ok(())
    }

    /// Looks whether something was promised. To be called between reading what there is and acknowledging it: what was there before the
    /// promise is in the answer of whoever made it, what came after it must not be acknowledged to a source of an older epoch.
    fn heed_promise(&mut self) {
        if let Some(promised) = self.setup.replica.promised() {
            self.core.promised(promised);
        }
    }

    fn received(
        &mut self,
        message: Result<Option<Message>, SessionError>,
    ) -> Result<Vec<FollowerAction>, SessionError> {
        match message {
            Ok(Some(message)) => Ok(self.core.handle(self.now(), message)),
            Ok(None) => Err(SessionError::Lost("the source has closed the connection".to_owned())),
            Err(SessionError::Message(error)) => Ok(self.core.undecodable(&error)),
            Err(lost) => Err(lost),
        }
    }

    async fn perform(&mut self, actions: Vec<FollowerAction>, io: &mut Io<'_>) -> Result<(), SessionError> {
        let mut actions = std::collections::VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                FollowerAction::Send(message) => io.writer.send(&message).await?,
                FollowerAction::Append { frame, told } => {
                    let first = frame.first();
                    if let Err(error) = self.setup.replica.append(frame, told) {
                        actions = self.core.append_failed(first, error.to_string()).into();
                    }
                }
                FollowerAction::LookupOwn(lsn) => {
                    let replica = Arc::clone(&self.setup.replica);
                    let found = blocking(move || replica.look_up(lsn)).await;
                    actions.extend(self.core.own(found));
                }
                FollowerAction::BeginSeed { state } => {
                    let (done, parts) = oneshot::channel();
                    let replica = Arc::clone(&self.setup.replica);
                    let receiving =
                        seed::receive(io.connection.clone(), replica, state, parts, seed::PART_TIMEOUT);
                    let task = receiving.boxed();
                    io.seed = Some(Seeding { task, done: Some(done) });
                }
                FollowerAction::FinishSeed { parts, bytes } => {
                    if let Some(done) = io.seed.as_mut().and_then(|seed| seed.done.take()) {
                        // Nobody listens if the task has failed, and then it says why itself.
                        done.send((parts, bytes)).unwrap_or_default();
                    }
                }
                FollowerAction::SetAside { ancestor, tail } => {
                    let replica = Arc::clone(&self.setup.replica);
                    if let Err(error) = blocking(move || replica.set_aside(ancestor, tail)).await {
                        actions = self.core.set_aside_failed(error).into();
                    }
                    io.watch = self.setup.replica.durable();
                }
                FollowerAction::Report(report) => tracing::warn!("{report}"),
                FollowerAction::Disconnect => io.over = true,
            }
        }
        if self.core.is_following() {
            self.attempts = 0;
            self.packs.set(Some(io.connection.clone()));
        }
        Ok(())
    }

    /// Lets time pass between two attempts; the status goes on growing older.
    async fn idle(&mut self, wait: Duration) {
        let end = tokio::time::sleep(wait);
        tokio::pin!(end);
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                () = &mut end => return,
                _ = ticks.tick() => self.publish(),
            }
        }
    }

    fn next_wait(&mut self) -> Duration {
        let longest = BACKOFF_FIRST.saturating_mul(1 << self.attempts.min(16)).min(BACKOFF_MOST);
        self.attempts += 1;
        // Between half and all of it.
        longest / 2 + longest.mul_f64(((self.setup.random)() % 1024) as f64 / 2048.0)
    }

    fn publish(&self) {
        let status = self.core.status(self.now(), self.address.clone());
        self.status.send_if_modified(|known| {
            let changed = *known != status;
            *known = status;
            changed
        });
        let lsn = self.core.source_lsn();
        // Nothing heard takes nothing back that was heard before.
        let was_heard = lsn > Lsn::new(0);
        self.heard.send_if_modified(|known| was_heard && std::mem::replace(known, lsn) != lsn);
    }

    fn now(&self) -> Duration {
        self.setup.clock.monotonic()
    }
}

/// What the core hears of next.
enum Event {
    Message(Result<Option<Message>, SessionError>),
    Durable(Durable),
    Data(Lsn),
    Seeded(Result<State, String>),
    Tick,
}

/// What one connection works with.
struct Io<'a> {
    connection: &'a Connection,
    writer: MessageWriter,
    seed: Option<Seeding>,
    watch: Option<DurableWatch>,
    over: bool,
}

struct Seeding {
    task: BoxFuture<'static, Result<State, String>>,
    done: Option<oneshot::Sender<(u32, u64)>>,
}

async fn changed(watch: &mut Option<DurableWatch>) -> Result<Durable, FollowError> {
    match watch {
        Some(watch) => {
            watch.changed().await.map_err(|error: WaitError| FollowError::Ended(error.to_string()))
        }
        None => std::future::pending().await,
    }
}

async fn seeded(seed: &mut Option<Seeding>) -> Result<State, String> {
    match seed {
        Some(seed) => (&mut seed.task).await,
        None => std::future::pending().await,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, crate::ReplicaError> + Send + 'static,
) -> Result<T, String> {
    let done = murphy_log::spawn_blocking(work).await.map_err(|error| error.to_string())?;
    done.map_err(|error| error.to_string())
}

enum AttemptError {
    Session(SessionError),
    Log(FollowError),
}

impl From<SessionError> for AttemptError {
    fn from(error: SessionError) -> AttemptError {
        AttemptError::Session(error)
    }
}

impl From<FollowError> for AttemptError {
    fn from(error: FollowError) -> AttemptError {
        AttemptError::Log(error)
    }
}

/// Why following has ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FollowError {
    /// The mirror's own log has ended: the process should end too, and be started again.
    #[error("the mirror's own log has ended: {0}")]
    Ended(String),
}

/// The last words are given so much time to arrive.
const FAREWELL: Duration = Duration::from_millis(500);
const TICK: Duration = Duration::from_millis(100);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(5);
