//! Files whose bytes are on their way: packs are put, and each flight goes on with what has arrived of it.
//!
//! Invariants:
//! - No put holds up another one, but for the number of those that are under way at once.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicBool},
};

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
    cut::{Cut, Cutter, Load, Matter},
    flight::{Arrival, Flight},
    put::{Put, put},
};
use crate::Errno;

/// What has begun of a batch.
pub(in crate::volume) struct Batch {
    volume: Volume,
    /// Those that have not ended.
    flights: Vec<Option<Flight>>,
}

impl Batch {
    /// Stores what is dirty in `files`, in about this order.
    pub(in crate::volume) async fn run(volume: Volume, files: Vec<Arc<FileState>>, urgency: Urgency) {
        let mut cutter = Some(Cutter::new(volume.clone(), files, urgency));
        let mut cutting: Option<JoinHandle<(Cutter, Option<Cut>)>> = None;
        let mut batch = Batch { volume, flights: Vec::new() };
        let (mut puts, mut large) = (FuturesUnordered::<BoxFuture<'static, Put>>::new(), 0);
        let mut waiting = VecDeque::new();
        loop {
            while puts.len() < PUTS
                && large < LARGE_PUTS
                && let Some((mut load, matter)) = waiting.pop_front()
            {
                if let Matter::Stored = matter {
                    batch.settle(load, Ok(())).await;
                    continue;
                }
                if load.is_large {
                    large += 1;
                    load.awaited = batch.awaited(&load);
                }
                puts.push(Box::pin(put(batch.volume.clone(), urgency, load, matter)));
            }
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
                    waiting.extend(cut.loads);
                }
                else => return,
            }
        }
    }

    /// Whether somebody waits for the flights that a load is of, each of them.
    fn awaited(&self, load: &Load) -> Vec<Arc<AtomicBool>> {
        let mut flights: Vec<usize> = load.runs.iter().map(|run| run.flight).collect();
        flights.dedup();
        let flights = flights.into_iter().filter_map(|flight| self.flights[flight].as_ref());
        flights.map(|flight| Arc::clone(&flight.awaited)).collect()
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

/// Packs on their way at once in a batch, ...
const PUTS: usize = 64;
/// ... and large ones among them, also such as wait for their turn.
const LARGE_PUTS: usize = 8;
