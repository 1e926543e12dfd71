//! What a node lends to those who have asked where it stands: frames of its own log.
//!
//! Invariants:
//! - Only what is durable in the own log is lent, and only behind a frame end that both have.
//! - No frame is lent to one whose epoch has ended here: a later one, or another of its number, is promised or held. That is looked at anew
//!   before every run.

use std::{sync::Arc, time::Duration};

use murphy_log::{Epoch, FrameReader, Log, Lsn, ReadError};

use super::{Part, Services, refuse, source::read_run};
use crate::{
    history::{Lookup, look_up},
    message::{Ask, Frames, LendRequest, Message, Refusal, Refused, Stands},
    session::{Connection, MessageReader, MessageWriter, SessionError},
};

/// Says where the node stands; then the connection stays for requests until the asker leaves.
pub(super) async fn answer(
    services: &Services,
    connection: &Connection,
    ask: Ask,
    mut reader: MessageReader,
    mut writer: MessageWriter,
) -> Result<(), SessionError> {
    if ask.volume != services.keys.volume() {
        let detail = format!("this is volume {}", services.keys.volume());
        return refuse(connection, writer, Refusal::ForeignVolume, detail).await;
    }
    if ask.branch != services.branch {
        let detail = format!("this is branch {}", services.branch);
        return refuse(connection, writer, Refusal::ForeignBranch, detail).await;
    }
    let part_now = services.part();
    let stands = murphy_log::spawn_blocking(move || standing(&part_now)).await;
    let Ok(Some((stands, _))) = stands else {
        let detail = "this node is neither source nor mirror at the moment".to_owned();
        return refuse(connection, writer, Refusal::Protocol, detail).await;
    };
    writer.send(&Message::Stands(stands)).await?;
    match reader.next().await {
        // Whoever has borrowed what it needs just leaves.
        Ok(None) | Err(SessionError::Lost(_)) => Ok(()),
        Ok(Some(other)) => {
            let detail = format!("a {} message is not expected now", other.name());
            refuse(connection, writer, Refusal::Protocol, detail).await
        }
        Err(error) => Err(error),
    }
}

/// Lends frames on a stream of their own to one who asked on behalf of `epoch`.
pub(super) async fn lend(
    services: &Services,
    epoch: Option<Epoch>,
    request: LendRequest,
    mut writer: MessageWriter,
) -> Result<(), SessionError> {
    let mut place = None;
    loop {
        let part = services.part();
        let next = murphy_log::spawn_blocking(move || next_run(&part, epoch, &request, place)).await;
        match next.unwrap_or_else(|panic| refusal(Refusal::Unreadable, panic)) {
            Ok(Some((frames, after))) => {
                writer.send(&Message::Frames(frames)).await?;
                place = Some(after);
            }
            Ok(None) => break,
            Err(refused) => {
                tracing::info!(reason = %refused.reason, detail = refused.detail, "no frames were lent");
                writer.send(&Message::Refused(refused)).await?;
                break;
            }
        }
    }
    writer.finish(LENT_TIMEOUT).await
}

/// Where lending goes on.
type Place = (Lsn, FrameReader);

/// The next frames for one whose request is as far as `place`; none once everything that is wanted and held has been sent.
fn next_run(
    part: &Part,
    epoch: Option<Epoch>,
    request: &LendRequest,
    place: Option<Place>,
) -> Result<Option<(Frames, Place)>, Refused> {
    let Some((stands, Some(log))) = standing(part) else {
        return refusal(Refusal::Protocol, "this node holds nothing at the moment");
    };
    if let Some(epoch) = epoch
        && let Some(later) = stands.ends(epoch)
    {
        return refusal(Refusal::Fenced, format!("{epoch} has ended, {later} is known here"));
    }
    let (from, reader) = match place {
        Some((next, reader)) => (next, Some(reader)),
        None => {
            check_shared(&*log, request)?;
            (request.after.lsn.next(), None)
        }
    };
    if from > request.to {
        return Ok(None);
    }
    let (mut frames, next, reader) = read_run(&*log, from, reader, RUN_BYTES).or_else(unreadable)?;
    frames.retain(|frame| frame.last() <= request.to);
    if frames.is_empty() {
        return Ok(None);
    }
    let message = Frames::of(log.durable().state().position.lsn, &frames);
    let message = message.or_else(|error| refusal(Refusal::Unreadable, error))?;
    Ok(Some((message, (next, reader))))
}

/// Where the node stands, and the log that it lends from.
fn standing(part: &Part) -> Option<(Stands, Option<Arc<dyn Log>>)> {
    match part {
        Part::Mirror(mirror) => {
            let log = mirror.replica.history();
            let stands = Stands {
                state: log.as_ref().map(|log| log.durable().state()),
                data_lsn: *mirror.replica.data().borrow(),
                heard_lsn: *mirror.heard.borrow(),
                promised: mirror.replica.promised(),
            };
            Some((stands, log))
        }
        Part::Source(source) => {
            let state = source.log.durable().state();
            let stands = Stands {
                state: Some(state),
                data_lsn: Lsn::new(0),
                heard_lsn: state.position.lsn,
                promised: Some(source.epoch),
            };
            Some((stands, Some(Arc::clone(&source.log))))
        }
        Part::Neither => None,
    }
}

/// Whether the log has a frame end where the asker's log ends.
fn check_shared(log: &dyn Log, request: &LendRequest) -> Result<(), Refused> {
    let after = request.after;
    match look_up(log, after.lsn).or_else(unreadable)? {
        Lookup::End(point) if point == after => Ok(()),
        Lookup::End(_) | Lookup::Inside { .. } => {
            refusal(Refusal::OtherHistory, format!("the history here has another lsn {}", after.lsn))
        }
        Lookup::Beyond { durable } => {
            refusal(Refusal::OtherHistory, format!("the log here ends at lsn {durable}"))
        }
        Lookup::Trimmed { first } => refusal(Refusal::Trimmed, format!("the log here begins at lsn {first}")),
    }
}

fn unreadable<T>(error: ReadError) -> Result<T, Refused> {
    let reason =
        if matches!(error, ReadError::Trimmed { .. }) { Refusal::Trimmed } else { Refusal::Unreadable };
    refusal(reason, error)
}

fn refusal<T>(reason: Refusal, detail: impl ToString) -> Result<T, Refused> {
    Err(Refused { reason, detail: detail.to_string() })
}

/// What was lent last has so much time to arrive.
const LENT_TIMEOUT: Duration = Duration::from_secs(60);
/// One message carries about so many bytes of frames.
const RUN_BYTES: usize = 1 << 20;
