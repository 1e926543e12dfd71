//! Drives a [`Source`] core over one connection.
//!
//! Invariants:
//! - The core decides; this only reads, writes and waits.
//! - A follower that takes no more of a snapshot is given up: others wait for its place.

use std::{io::Read, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use murphy_fs::MemberRole;
use murphy_log::{DurableWatch, Frame, FrameReader, Log, Lsn, ReadError, State};
use tokio::sync::OwnedSemaphorePermit;

use super::{Part, Services, SourcePart, part, refuse};
use crate::{
    board::BoardEntry,
    history::{Lookup, Point, is_older, look_up},
    message::{Hello, Message, Refusal, Resume, SEED_PART_BYTES, SeedPart},
    replica::SeedSnapshot,
    session::{Connection, MessageReader, MessageWriter, SessionError},
    source::{Peer, Source, SourceAction, SourceConfig, SourceReport},
};

/// Follows one follower from its hello to the end of the connection.
pub(super) async fn serve(
    services: &Arc<Services>,
    connection: &Connection,
    role: MemberRole,
    hello: Hello,
    mut reader: MessageReader,
    writer: MessageWriter,
) -> Result<(), SessionError> {
    let Part::Source(source) = services.part() else {
        let detail = "this node is not the source".to_owned();
        return refuse(connection, writer, Refusal::Protocol, detail).await;
    };
    let now = services.clock.monotonic();
    let (_counted, window_bytes) = services.count_follower();
    let peer = Peer { node: connection.peer().node(), role };
    let config = SourceConfig {
        volume: services.keys.volume(),
        branch: services.branch,
        node: services.node,
        epoch: source.epoch,
        window_bytes,
        heartbeat: source.heartbeat,
    };
    let watch = source.log.durable();
    let core = Source::new(config, peer, watch.state(), now);
    let counted = role.holds_copy();
    let entry = counted.then(|| services.board.connected(now, peer.node));
    let mut session = SourceSession {
        services: Arc::clone(services),
        connection,
        core,
        source,
        watch,
        entry,
        writer,
        frames: None,
        reader: None,
        snapshot: None,
        hold: None,
        jobs: FuturesUnordered::new(),
    };
    session.run(hello, &mut reader).await?;
    // The reader lives until then: a follower whose words are not taken any more gives up before it has read the last ones.
    let parted = part(connection, session.writer, None).await;
    drop(reader);
    parted
}

struct SourceSession<'a> {
    services: Arc<Services>,
    connection: &'a Connection,
    core: Source,
    source: SourcePart,
    watch: DurableWatch,
    /// The place on the board of one who holds a copy.
    entry: Option<BoardEntry<'a>>,
    writer: MessageWriter,
    /// The stream of frames, once there are any.
    frames: Option<MessageWriter>,
    /// Where reading goes on, between two reads.
    reader: Option<(Lsn, FrameReader)>,
    snapshot: Option<OpenedSnapshot>,
    /// Keeps the log behind a snapshot from being trimmed until the mirror has gone on from there.
    hold: Option<(Lsn, Box<dyn Send>)>,
    jobs: FuturesUnordered<BoxFuture<'a, Done>>,
}

/// A snapshot, and the permission to send it.
struct OpenedSnapshot {
    seed: SeedSnapshot,
    permit: OwnedSemaphorePermit,
}

/// What has been done aside.
enum Done {
    Found(Lsn, Result<Lookup, ReadError>),
    Read(State, Result<(Vec<Frame>, Lsn, FrameReader), ReadError>),
    Opened(Result<OpenedSnapshot, String>),
    Sent(Result<(u32, u64), String>),
}

impl SourceSession<'_> {
    async fn run(&mut self, mut hello: Hello, reader: &mut MessageReader) -> Result<(), SessionError> {
        if hello.resume == Resume::From(Lsn::new(0)) {
            hello.resume = Resume::From(self.source.log.first());
        }
        if let (Some(promised), Resume::After(base)) = (hello.promised, hello.resume)
            && self.entry.is_some()
            && is_older(self.source.epoch, promised)
        {
            self.services.board.note_successor_base(Point { lsn: base.lsn, hash: base.hash });
        }
        let actions = self.core.handle(Message::Hello(hello));
        self.perform(actions).await?;
        while !self.core.is_closed() {
            let wait = self.core.tick_due().saturating_sub(self.services.clock.monotonic());
            let actions = tokio::select! {
                message = reader.next() => match message? {
                    Some(message) => self.core.handle(message),
                    None => return Ok(()),
                },
                durable = self.watch.changed() => match durable {
                    Ok(durable) => self.durable(&durable),
                    Err(_) => return Ok(()),
                },
                Some(done) = self.jobs.next() => self.done(done),
                () = tokio::time::sleep(wait) => {
                    let clock = &self.services.clock;
                    self.core.tick(clock.monotonic(), clock.wall())
                }
            };
            self.perform(actions).await?;
        }
        Ok(())
    }

    fn durable(&mut self, durable: &murphy_log::Durable) -> Vec<SourceAction> {
        let now = self.services.clock.monotonic();
        self.services.board.durable(now, durable.state.position.lsn);
        let mut actions = self.core.durable(durable.state);
        if let Some(terminal) = &durable.terminal {
            actions.extend(self.core.ended(terminal));
        }
        actions
    }

    fn done(&mut self, done: Done) -> Vec<SourceAction> {
        match done {
            Done::Found(lsn, found) => self.core.found(lsn, found),
            Done::Read(durable, Ok((frames, next, reader))) => {
                self.reader = Some((next, reader));
                self.core.read(durable, Ok(frames))
            }
            Done::Read(durable, Err(error)) => self.core.read(durable, Err(error)),
            Done::Opened(Ok(snapshot)) => {
                let state = snapshot.seed.state;
                self.snapshot = Some(snapshot);
                self.core.snapshot(Ok(state))
            }
            Done::Opened(Err(error)) => self.core.snapshot(Err(error)),
            Done::Sent(sent) => self.core.snapshot_sent(sent),
        }
    }

    async fn perform(&mut self, actions: Vec<SourceAction>) -> Result<(), SessionError> {
        for action in actions {
            match action {
                SourceAction::Send(message) => self.writer.send(&message).await?,
                SourceAction::SendFrames(frames) => {
                    if self.frames.is_none() {
                        self.frames = Some(self.connection.open_one().await?);
                    }
                    if let Some(stream) = &mut self.frames {
                        stream.send(&Message::Frames(frames)).await?;
                    }
                }
                SourceAction::Lookup(lsn) => self.look_up(lsn),
                SourceAction::Read { from, max_bytes } => self.read(from, max_bytes),
                SourceAction::OpenSnapshot => self.open_snapshot(),
                SourceAction::StreamSnapshot => self.stream_snapshot(),
                SourceAction::Acked(ack) => {
                    self.hold.take_if(|(lsn, _)| ack.position.lsn > *lsn);
                    if let Some(entry) = &self.entry {
                        entry.acknowledged(ack);
                    }
                }
                SourceAction::Report(report) => self.report(&report),
                SourceAction::Close => return Ok(()),
            }
        }
        Ok(())
    }

    fn report(&self, report: &SourceReport) {
        let node = self.connection.peer().node();
        match report {
            SourceReport::Fenced(epoch) => self.services.board.fenced(*epoch),
            SourceReport::Lost { position, .. } | SourceReport::Forked { position } => {
                if let Some(entry) = &self.entry {
                    entry.lost(*position);
                }
            }
            // One that is seeded begins anew: the log that it may have had, and counted with, is gone or goes.
            SourceReport::Diverged { .. } | SourceReport::Seeding(_) => {
                if let Some(entry) = &self.entry {
                    entry.holds_nothing();
                }
            }
            SourceReport::Refused { .. } | SourceReport::RefusedByPeer(_) => {}
        }
        tracing::warn!(%node, "follower: {report}");
    }

    fn look_up(&self, lsn: Lsn) {
        let log = Arc::clone(&self.source.log);
        let job = murphy_log::spawn_blocking(move || look_up(&*log, lsn));
        self.jobs.push(
            job.map(move |found| Done::Found(lsn, found.unwrap_or_else(|e| Err(panicked(&e))))).boxed(),
        );
    }

    fn read(&mut self, from: Lsn, max_bytes: usize) {
        let log = Arc::clone(&self.source.log);
        let reader = self.reader.take().filter(|(next, _)| *next == from);
        let job = murphy_log::spawn_blocking(move || {
            let read = read_run(&*log, from, reader.map(|(_, reader)| reader), max_bytes);
            Done::Read(log.durable().state(), read)
        });
        let state = self.watch.state();
        self.jobs
            .push(job.map(move |done| done.unwrap_or_else(|e| Done::Read(state, Err(panicked(&e))))).boxed());
    }

    fn open_snapshot(&self) {
        let services = Arc::clone(&self.services);
        let snapshots = Arc::clone(&self.source.snapshots);
        let job = async move {
            let permit = Arc::clone(&services.seeds).acquire_owned().await;
            let permit = permit.map_err(|error| error.to_string())?;
            let opened = murphy_log::spawn_blocking(move || snapshots.open()).await;
            let seed = opened.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            Ok(OpenedSnapshot { seed, permit })
        };
        self.jobs.push(job.map(Done::Opened).boxed());
    }

    fn stream_snapshot(&mut self) {
        let Some(OpenedSnapshot { seed, permit }) = self.snapshot.take() else { return };
        self.hold = Some((seed.state.position.lsn, seed.hold));
        let sending = send_snapshot(self.connection.clone(), seed.reader, PART_TIMEOUT);
        let sending = sending.map(move |sent| {
            drop(permit);
            Done::Sent(sent)
        });
        self.jobs.push(sending.boxed());
    }
}

/// Reads frames until the run is long enough or the log has no more.
pub(super) fn read_run(
    log: &dyn Log,
    from: Lsn,
    reader: Option<FrameReader>,
    max_bytes: usize,
) -> Result<(Vec<Frame>, Lsn, FrameReader), ReadError> {
    let mut reader = match reader {
        Some(reader) => reader,
        None => log.read(from)?,
    };
    let (mut frames, mut bytes, mut next) = (Vec::new(), 0, from);
    while (frames.is_empty() || bytes < max_bytes) && frames.len() < MAX_FRAMES_PER_READ {
        let Some(frame) = reader.next().transpose()? else { break };
        bytes += frame.bytes().len();
        next = frame.last().next();
        frames.push(frame);
    }
    Ok((frames, next, reader))
}

/// Sends a snapshot part by part, a few at a time, each within `part_timeout`.
async fn send_snapshot(
    connection: Connection,
    mut reader: Box<dyn Read + Send>,
    part_timeout: Duration,
) -> Result<(u32, u64), String> {
    let mut sending = FuturesUnordered::new();
    let (mut index, mut total) = (0, 0);
    loop {
        let read = murphy_log::spawn_blocking(move || {
            let mut part = Vec::with_capacity(SEED_PART_BYTES);
            let read = reader.by_ref().take(SEED_PART_BYTES as u64).read_to_end(&mut part);
            (read.map(|_| part), reader)
        });
        let (part, again) = read.await.map_err(|error| error.to_string())?;
        reader = again;
        let part = part.map_err(|error| format!("cannot read the snapshot: {error}"))?;
        if part.is_empty() {
            break;
        }
        total += part.len() as u64;
        sending.push(send_part(connection.clone(), index, part.into(), part_timeout));
        index += 1;
        if sending.len() >= PARTS_AT_ONCE
            && let Some(sent) = sending.next().await
        {
            sent?;
        }
    }
    while let Some(sent) = sending.next().await {
        sent?;
    }
    Ok((index, total))
}

async fn send_part(
    connection: Connection,
    index: u32,
    bytes: Bytes,
    at_most: Duration,
) -> Result<(), String> {
    let sent = async {
        let mut stream = connection.open_one().await?;
        let length = u32::try_from(bytes.len()).expect("a part is below its limit");
        stream.send(&Message::SeedPart(SeedPart { index, length })).await?;
        stream.send_raw(bytes, at_most).await?;
        stream.finish(at_most).await
    };
    let late = |_| "the follower does not take it".to_owned();
    let sent = tokio::time::timeout(at_most, sent).await.map_err(late)?;
    sent.map_err(|error: SessionError| error.to_string())
}

fn panicked(error: &tokio::task::JoinError) -> ReadError {
    ReadError::Io { place: "the log".to_owned(), message: error.to_string() }
}

const MAX_FRAMES_PER_READ: usize = crate::MAX_RUN_FRAMES;
const PARTS_AT_ONCE: usize = 4;
/// A follower that has not taken a part of a snapshot after so long has a disk that hangs; all that are under way pass a link of 250 kbit/s.
const PART_TIMEOUT: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        endpoint::{Grants, ListeningEndpoint, NetworkOptions, UdpSockets, dial_granting},
        identity::Identity,
    };

    /// The fear: mirrors whose disk hangs keep the places of all that are seeded, and no other mirror is ever.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_follower_that_takes_no_part_is_given_up() {
        let [source, follower] = [(), ()].map(|()| Identity::generate().unwrap());
        let options = NetworkOptions::default();
        let local = ([127, 0, 0, 1], 0).into();
        let listener = ListeningEndpoint::bind(&source, &UdpSockets, local, &options).unwrap();
        let (address, key) = (listener.local_addr().unwrap(), source.public_key());
        let (accepted, dialled) = tokio::join!(
            async { listener.accept().await.unwrap().complete().await.unwrap() },
            dial_granting(
                Grants { window: 0, ..Grants::FOLLOWER },
                &follower,
                &UdpSockets,
                address,
                key,
                &options
            ),
        );
        let _dialled = dialled.unwrap();
        let reader = Box::new(std::io::repeat(7).take(3 * SEED_PART_BYTES as u64));
        let sending = send_snapshot(accepted, reader, Duration::from_millis(50));
        let sent = tokio::time::timeout(Duration::from_secs(30), sending).await;
        assert_eq!(sent, Ok(Err("the follower does not take it".to_owned())));
    }
}
