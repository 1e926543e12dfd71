//! Files whose bytes are on their way: packs are put, and each flight goes on with what has arrived of it.
//!
//! Invariants:
//! - No put holds up another one, but for the number of those that are under way at once.

use std::sync::Arc;

use futures::{StreamExt, future::OptionFuture, stream::FuturesUnordered};
use murphy_log::spawn_blocking;
use tokio::task::JoinHandle;

use super::{
    super::{
        Volume,
        files::{FileState, Urgency},
    },
    LARGE,
    cut::{Cut, Cutter, Load},
    flight::{Arrival, Flight},
};
use crate::{Errno, data::SealedPack};

/// What has begun of a batch.
pub(super) struct Batch {
    volume: Volume,
    /// Those that have not ended.
    flights: Vec<Option<Flight>>,
}

impl Batch {
    /// Stores what is dirty in `files`, in about this order.
    pub(super) async fn run(volume: Volume, files: Vec<Arc<FileState>>, urgency: Urgency) {
        let mut cutter = Some(Cutter::new(volume.clone(), files, urgency == Urgency::First));
        let mut cutting: Option<JoinHandle<(Cutter, Option<Cut>)>> = None;
        let mut batch = Batch { volume, flights: Vec::new() };
        let mut puts = FuturesUnordered::new();
        loop {
            if puts.len() < PUTS
                && let Some(mut idle) = cutter.take()
            {
                cutting = Some(spawn_blocking(move || {
                    let cut = idle.next();
                    (idle, cut)
                }));
            }
            tokio::select! {
                biased;
                Some((load, stored)) = puts.next() => batch.settle(load, stored).await,
                Some(done) = OptionFuture::from(cutting.as_mut()) => {
                    cutting = None;
                    let (idle, cut) = match done {
                        Ok((idle, Some(cut))) => (idle, cut),
                        Ok((_, None)) => continue,
                        Err(error) => {
                            tracing::error!(%error, "cutting packs failed");
                            continue;
                        }
                    };
                    cutter = Some(idle);
                    batch.flights.extend(cut.flights.into_iter().map(Some));
                    for mut load in cut.loads {
                        match load.unstored.take() {
                            Some(unstored) => puts.push(put(batch.volume.clone(), urgency, load, unstored)),
                            None => batch.settle(load, Ok(())).await,
                        }
                    }
                }
                else => return,
            }
        }
    }

    /// A pack was put, or could not be: each flight goes on by itself.
    async fn settle(&mut self, load: Load, stored: Result<(), Errno>) {
        for run in load.runs {
            let place = &mut self.flights[run.flight];
            let Some(flight) = place else { continue };
            let pack = Arc::clone(&load.pack);
            flight.land(run.number, Arrival { pack, pieces: run.pieces, stored }).await;
            if flight.left == 0 {
                *place = None;
            }
        }
    }
}

/// Puts a pack, unless nothing could refer to it.
async fn put(volume: Volume, urgency: Urgency, load: Load, pack: SealedPack) -> (Load, Result<(), Errno>) {
    let large = &volume.shared.flusher.large;
    let _turn = match urgency {
        Urgency::First if pack.bytes.len() > LARGE => large.acquire().await.ok(),
        Urgency::First | Urgency::Now | Urgency::Soon => None,
    };
    if let Some(errno) = volume.refusal() {
        return (load, Err(errno));
    }
    let put = volume.shared.blocks.put(pack.name, pack.bytes);
    let error = match tokio::time::timeout(volume.shared.options.io_timeout, put).await {
        Ok(Ok(())) => return (load, Ok(())),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the store does not answer".to_owned(),
    };
    tracing::error!(error, "a pack was not stored; its bytes are kept and tried again");
    (load, Err(Errno::EIO))
}

/// Puts under way at once in a batch.
const PUTS: usize = 8;
