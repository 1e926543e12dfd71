//! Putting a pack, and asking for one that may have been put.
//!
//! Invariants:
//! - Nothing is put that nothing could refer to.
//! - What may be in the store is not put again: only what the store says it has not, and then under another name, because a put that was
//!   given up may still happen.

use std::time::Duration;

use bytes::Bytes;
use murphy_log::spawn_blocking;
use tokio::time::Instant;

use super::{
    super::{Volume, files::Urgency, placed::Proof},
    cut::{Load, Matter, pack_anew},
    pace::Turn,
};
use crate::{BlockStoreError, Errno, data::SealedPack};

/// What became of a pack.
pub(super) type Put = (Load, Result<(), Errno>);

/// Sees to it that a pack is in the store, where it is not known to be.
pub(super) async fn put(volume: Volume, urgency: Urgency, load: Load, matter: Matter) -> Put {
    match matter {
        Matter::Stored => (load, Ok(())),
        Matter::Unstored(pack) => {
            let turn = turn(&volume, urgency, &load).await;
            put_sealed(&volume, load, pack, turn).await
        }
        Matter::Unproven(pieces) => prove(volume, urgency, load, pieces).await,
    }
}

/// Waits for the turn of a large pack.
async fn turn<'a>(volume: &'a Volume, urgency: Urgency, load: &Load) -> Option<Turn<'a>> {
    match load.is_large {
        true => Some(volume.shared.flusher.pace.turn(urgency, &load.awaited).await),
        false => None,
    }
}

/// Puts a pack whose turn it is.
async fn put_sealed(volume: &Volume, load: Load, pack: SealedPack, turn: Option<Turn<'_>>) -> Put {
    if let Some(errno) = volume.refusal() {
        return (load, Err(errno));
    }
    let put = volume.shared.blocks.put(pack.name, pack.bytes);
    let error = match tokio::time::timeout(volume.put_deadline(), put).await {
        Ok(Ok(())) => {
            if let Some(turn) = turn {
                turn.in_time();
            }
            load.pack.learn(Proof::Stored);
            *volume.shared.flusher.stored.lock() = Some(Instant::now());
            return (load, Ok(()));
        }
        Ok(Err(error)) => Some(error),
        Err(_) => None,
    };
    if error.as_ref().is_none_or(|error| matches!(error, BlockStoreError::Unavailable { .. })) {
        load.pack.learn(Proof::Unknown);
    }
    if error.as_ref().is_none_or(BlockStoreError::is_late)
        && let Some(turn) = turn
    {
        turn.late();
    }
    let error = error.map_or_else(|| NO_ANSWER.to_owned(), |error| error.to_string());
    tracing::error!(error, "a pack was not stored; its bytes are kept and tried again");
    (load, Err(Errno::EIO))
}

/// Asks for a pack of which it is not known whether it was stored; puts its `pieces` anew if it was not.
async fn prove(volume: Volume, urgency: Urgency, mut load: Load, pieces: Vec<Bytes>) -> Put {
    if let Some(errno) = volume.refusal() {
        return (load, Err(errno));
    }
    let meta = *load.pack.meta();
    let error = match tokio::time::timeout(
        volume.put_deadline(),
        volume.shared.blocks.size_where_put(meta.name),
    )
    .await
    {
        Ok(Ok(found)) if found == meta.stored_len => {
            load.pack.learn(Proof::Stored);
            return (load, Ok(()));
        }
        Ok(Ok(found)) => {
            tracing::error!(pack = %meta.name, found, expected = meta.stored_len, "a pack that was put has another length");
            None
        }
        Ok(Err(BlockStoreError::NotFound { .. })) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(NO_ANSWER.to_owned()),
    };
    if let Some(error) = error {
        tracing::error!(
            error,
            "it is not known whether a pack was stored; its bytes are kept and tried again"
        );
        return (load, Err(Errno::EIO));
    }
    // What waits is not in memory twice.
    let turn = turn(&volume, urgency, &load).await;
    let packing = volume.clone();
    match spawn_blocking(move || pack_anew(&packing, &pieces)).await {
        Ok(anew) => {
            let pack = load.moves_to(anew);
            put_sealed(&volume, load, pack, turn).await
        }
        Err(error) => {
            tracing::error!(%error, "cutting a pack anew failed");
            (load, Err(Errno::EIO))
        }
    }
}

impl Volume {
    /// How long a store may take for one pack.
    fn put_deadline(&self) -> Duration {
        self.shared.options.put_timeout.max(self.shared.options.io_timeout)
    }
}

const NO_ANSWER: &str = "the store does not answer";
