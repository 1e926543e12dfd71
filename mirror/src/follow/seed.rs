//! Receives the parts of a snapshot.
//!
//! Invariants:
//! - Every part is taken once, at the offset that its index says; what the source announced must be what came.
//! - Few parts are in memory at a time.
//! - A source that sends no more of it is not waited for, whatever else it says meanwhile.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

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

/// Takes parts until all that `announced` says are there, and installs the snapshot. Fails once nothing has come for so long as `patience`.
pub(super) async fn receive(
    connection: Connection,
    replica: Arc<dyn Replica>,
    state: State,
    announced: oneshot::Receiver<(u32, u64)>,
    patience: Duration,
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
            () = tokio::time::sleep(patience) => {
                return Err(format!("the source has sent nothing of the snapshot for {patience:?}"));
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
/// After so long without a part the source is given up. It gives a mirror up earlier that does not take one, and says so.
pub(super) const PART_TIMEOUT: Duration = Duration::from_secs(900);

#[cfg(test)]
mod tests {
    use murphy_log::VolumeKeys;

    use super::*;
    use crate::{
        Durability, MemoryReplica,
        endpoint::{ListeningEndpoint, NetworkOptions, UdpSockets, dial},
        identity::Identity,
        message::SeedPart,
        tests::{VOLUME, base_state},
    };

    /// The fear: a source whose disk hangs in the middle of a snapshot goes on saying where it stands, and the mirror waits for ever.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_source_that_sends_no_more_of_a_snapshot_is_given_up() {
        let [source, follower] = [(), ()].map(|()| Identity::generate().unwrap());
        let (options, limit) = (NetworkOptions::default(), Duration::from_secs(30));
        let local = ([127, 0, 0, 1], 0).into();
        let listener = ListeningEndpoint::bind(&source, &UdpSockets, local, &options).unwrap();
        let (address, key) = (listener.local_addr().unwrap(), source.public_key());
        let (accepted, dialled) = tokio::join!(
            async { listener.accept().await.unwrap().complete().await.unwrap() },
            dial(&follower, &UdpSockets, address, key, &options),
        );
        let mut stream = accepted.open_one().await.unwrap();
        stream.send(&Message::SeedPart(SeedPart { index: 0, length: 9 })).await.unwrap();
        stream.send_raw(Bytes::from_static(b"half"), limit).await.unwrap();
        let keys = VolumeKeys::derive(VOLUME);
        let replica = Arc::new(MemoryReplica::new(keys, None, Durability::Immediate));
        let (_announce, announced) = oneshot::channel();
        let patience = Duration::from_millis(200);
        let receiving = receive(dialled.unwrap(), replica, base_state(), announced, patience);
        let received = tokio::time::timeout(limit, receiving).await;
        assert_eq!(received, Ok(Err("the source has sent nothing of the snapshot for 200ms".to_owned())));
    }
}
