//! Receives the parts of a snapshot.
//!
//! Invariants:
//! - Every part is taken once, at the offset that its index says; what the source announced must be what came.
//! - Few parts are in memory at a time.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use murphy_log::State;
use tokio::sync::oneshot;

use super::blocking;
use crate::{
    message::{Message, SEED_PART_BYTES},
    replica::Replica,
    session::{Connection, MessageReader},
};

/// Takes parts until all that `announced` says are there, and installs the snapshot.
pub(super) async fn receive(
    connection: Connection,
    replica: Arc<dyn Replica>,
    state: State,
    announced: oneshot::Receiver<(u32, u64)>,
) -> Result<State, String> {
    let mut writer = blocking(move || replica.begin_seed(state)).await?;
    let mut reading = FuturesUnordered::new();
    let (mut seen, mut received) = (BTreeSet::new(), 0);
    let mut total = None;
    tokio::pin!(announced);
    while total.is_none_or(|(parts, _)| (seen.len() as u64) < u64::from(parts)) {
        tokio::select! {
            stream = connection.accept_one(), if reading.len() < PARTS_AT_ONCE => {
                reading.push(read_part(stream.map_err(|error| error.to_string())?));
            }
            Some(part) = reading.next() => {
                let (index, bytes): (u32, Bytes) = part?;
                if !seen.insert(index) {
                    return Err(format!("part {index} came twice"));
                }
                received += bytes.len() as u64;
                let offset = u64::from(index) * SEED_PART_BYTES as u64;
                writer = blocking(move || writer.write_at(offset, &bytes).map(|()| writer)).await?;
            }
            end = &mut announced, if total.is_none() => {
                total = Some(end.map_err(|_| "the snapshot was not finished".to_owned())?);
            }
        }
    }
    let (parts, bytes) = total.unwrap_or_default();
    if received != bytes || seen.last().is_some_and(|last| *last >= parts) {
        return Err(format!(
            "{received} bytes in {} parts where {bytes} in {parts} were announced",
            seen.len()
        ));
    }
    blocking(move || writer.finish(bytes)).await
}

async fn read_part(mut stream: MessageReader) -> Result<(u32, Bytes), String> {
    match stream.expect().await.map_err(|error| error.to_string())? {
        Message::SeedPart(part) => {
            let bytes = stream.raw(part.length as usize).await.map_err(|error| error.to_string())?;
            Ok((part.index, bytes))
        }
        other => Err(format!("a {} message where a part of a snapshot should be", other.name())),
    }
}

const PARTS_AT_ONCE: usize = 4;
