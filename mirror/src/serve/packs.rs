//! Answering requests for packs.
//!
//! Invariants:
//! - A whole pack is sent after it was verified, once; of several stores the first is taken that has it intact, so that damage in one never
//!   keeps those who ask behind while another has the bytes.
//! - A part is sent as the first store has it: whoever finds it damaged asks for the whole.
//! - So many whole packs, and parts that are as good as whole, are in memory for all peers together, and fewer for one of them. A place is
//!   held for a bounded time, whether the peer does not take what it asked for or the store does not give it.

use std::time::Duration;

use bytes::Bytes;
use murphy_fs::{BlockStoreError, IntactError, lend_intact};
use tokio::sync::Semaphore;

use super::Services;
use crate::{
    message::{MAX_PACK_BYTES, Message, PackReply, PackRequest},
    session::{MessageWriter, SessionError},
};

/// Answers one request on its stream; `to_peer` limits what this peer gets at a time.
pub(super) async fn answer(
    services: &Services,
    to_peer: &Semaphore,
    request: &PackRequest,
    mut writer: MessageWriter,
) -> Result<(), SessionError> {
    let answered = async {
        let is_large = request.length == 0 || request.length > SMALL_PART;
        // They are never closed.
        let _permits = match is_large {
            true => (to_peer.acquire().await.ok(), services.lending.acquire().await.ok()),
            false => (None, None),
        };
        let is_whole = (request.offset, request.length) == (0, 0);
        let reply = if is_whole { whole(services, request).await } else { part(services, request).await };
        writer.send(&Message::PackReply(reply)).await?;
        writer.finish(ANSWER_MAX).await
    };
    tokio::time::timeout(ANSWER_MAX, answered).await.unwrap_or_else(|_| {
        tracing::warn!(pack = %request.pack, "a pack was not read and taken in time, and is not lent");
        Ok(())
    })
}

async fn whole(services: &Services, request: &PackRequest) -> PackReply {
    let Some(packs) = &services.packs else { return none() };
    match lend_intact(&**packs, request.pack).await {
        Ok(bytes) => PackReply::Found(bytes),
        Err(IntactError::Store(BlockStoreError::NotFound { .. })) => PackReply::Missing,
        Err(error) => {
            tracing::error!(pack = %request.pack, %error, "a pack that was asked for cannot be lent");
            PackReply::Failed(error.to_string())
        }
    }
}

async fn part(services: &Services, request: &PackRequest) -> PackReply {
    let Some(packs) = &services.packs else { return none() };
    let read = match request.length {
        0 => match packs.size(request.pack).await {
            Ok(size) if size > request.offset => packs.get_range(request.pack, request.offset..size).await,
            Ok(_) => return PackReply::Found(Bytes::new()),
            Err(error) => Err(error),
        },
        length => {
            let Some(end) = request.offset.checked_add(u64::from(length)) else {
                return PackReply::Failed("a range beyond any pack".to_owned());
            };
            packs.get_range(request.pack, request.offset..end).await
        }
    };
    match read {
        Ok(bytes) if bytes.len() <= MAX_PACK_BYTES => PackReply::Found(bytes),
        Ok(bytes) => PackReply::Failed(format!("{} bytes are beyond the limit", bytes.len())),
        Err(BlockStoreError::NotFound { .. }) => PackReply::Missing,
        Err(error) => PackReply::Failed(error.to_string()),
    }
}

fn none() -> PackReply {
    PackReply::Failed("this node serves no packs".to_owned())
}

/// Who asks waits no longer for the answer, from its question on.
const ANSWER_MAX: Duration = Duration::from_secs(if cfg!(test) { 5 } else { 30 });
/// A longer part counts as a whole pack, in bytes.
const SMALL_PART: u32 = 256 << 10;
/// So many whole packs are read, verified and sent at a time: 4 MiB each.
pub(super) const MAX_LENT: usize = 32;
/// Of these one peer gets so many.
pub(super) const MAX_LENT_TO_ONE: usize = 8;
