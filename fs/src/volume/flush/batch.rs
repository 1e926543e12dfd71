//! Files whose bytes are on their way: packs are put, and each flight goes on with what has arrived of it.
//!
//! Invariants:
//! - No put holds up another one, but for the number of those that are under way at once.

use std::sync::Arc;

use futures::{
    StreamExt,
    future::{BoxFuture, OptionFuture},
    stream::FuturesUnordered,
};
use murphy_log::spawn_blocking;
use tokio::task::JoinHandle;

use super::{
    super::{
        Volume,
        files::{FileState, Urgency},
    },
    cut::{Cut, Cutter, Load},
    flight::{Arrival, Flight},
    pace::Turn,
};
use crate::{BlockStoreError, Errno, data::SealedPack};

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
        let (mut puts, mut large) = (FuturesUnordered::<BoxFuture<'static, Put>>::new(), 0);
        loop {
            if puts.len() < PUTS
                && large < LARGE_PUTS
                && let Some(mut idle) = cutter.take()
            {
                cutting = Some(spawn_blocking(move || {
                    let cut = idle.next();
                    (idle, cut)
                }));
            }
            tokio::select! {
                biased;
                Some((load, stored)) = puts.next() => {
                    large -= usize::from(load.is_large);
                    batch.settle(load, stored).await;
                }
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
                        large += usize::from(load.is_large);
                        match load.unstored.take() {
                            Some(unstored) => puts.push(Box::pin(put(batch.volume.clone(), urgency, load, unstored))),
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

/// What became of a put.
type Put = (Load, Result<(), Errno>);

/// Puts a pack, unless nothing could refer to it.
async fn put(volume: Volume, urgency: Urgency, load: Load, pack: SealedPack) -> (Load, Result<(), Errno>) {
    let turn = match load.is_large {
        true => Some(volume.shared.flusher.pace.turn(urgency).await),
        false => None,
    };
    if let Some(errno) = volume.refusal() {
        return (load, Err(errno));
    }
    let options = &volume.shared.options;
    let put = volume.shared.blocks.put(pack.name, pack.bytes);
    let answer = tokio::time::timeout(options.put_timeout.max(options.io_timeout), put).await;
    let (is_late, error) = match answer {
        Ok(Ok(())) => {
            turn.map(Turn::in_time);
            return (load, Ok(()));
        }
        Ok(Err(error)) => (matches!(error, BlockStoreError::Unavailable { .. }), error.to_string()),
        Err(_) => (true, "the store does not answer".to_owned()),
    };
    if is_late {
        turn.map(Turn::late);
    }
    tracing::error!(error, "a pack was not stored; its bytes are kept and tried again");
    (load, Err(Errno::EIO))
}

/// Puts under way at once in a batch, ...
const PUTS: usize = 64;
/// ... and large ones among them, also such as wait for their turn.
const LARGE_PUTS: usize = 8;
