//! A copy whose bytes are not all there: its tree says which are missing.
//!
//! Invariants:
//! - What the tree calls missing afterwards is what the own store does not have intact, where each pack is read; or, of a copy that reads in
//!   archives, what all of them have said that they do not have.
//! - Memory does not grow with the number of packs that are there.

use std::sync::Arc;

use futures::StreamExt;
use murphy_fs::{BlockStore, Errno, HeldPack, PACKS_PER_ENTRY, PackNews, PackNumber, PackRow, look_for_pack};

use super::Node;
use crate::error::{CliError, failed};

/// Calls missing, by entries, every pack that the tree of `node`, which leads, refers to and its own store lacks. A source asks whoever may
/// have them from its first start on, and nobody waits for them meanwhile.
pub(super) async fn call_missing(node: &Node) -> Result<(), CliError> {
    let own = node.blocks.own();
    let known = node.volume.packs().filter(|row| row.as_ref().map_or(true, |(_, row)| !row.is_missing()));
    let looks = futures::stream::iter(known).map(|row| {
        let own = Arc::clone(&own);
        async move {
            let (number, row) = row.map_err(failed)?;
            Ok::<_, CliError>((!is_there(&row, &*own).await?).then_some(number))
        }
    });
    let mut looks = looks.buffer_unordered(LOOKS_AT_ONCE);
    let mut missing = Vec::new();
    while let Some(look) = looks.next().await {
        missing.extend(look?);
        if missing.len() >= PACKS_PER_ENTRY {
            record(node, std::mem::take(&mut missing)).await?;
        }
    }
    record(node, missing).await
}

/// The same for packs that nobody who was asked has; `node` keeps none of them in its own store.
pub(crate) async fn call_these_missing(node: &Node, packs: &[PackNumber]) -> Result<(), CliError> {
    for some in packs.chunks(PACKS_PER_ENTRY) {
        record(node, some.to_vec()).await?;
    }
    Ok(())
}

async fn record(node: &Node, packs: Vec<PackNumber>) -> Result<(), CliError> {
    if packs.is_empty() {
        return Ok(());
    }
    let refused = |errno: Errno| CliError::new(format!("missing packs cannot be written down: {errno:?}"));
    node.volume.record_packs(packs, PackNews::Missing).wait().await.map(drop).map_err(refused)
}

async fn is_there(row: &PackRow, own: &dyn BlockStore) -> Result<bool, CliError> {
    let held = look_for_pack(own, &row.meta()).await.map_err(failed)?;
    Ok(held == HeldPack::Intact)
}

const LOOKS_AT_ONCE: usize = 16;
