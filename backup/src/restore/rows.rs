//! Single tables of a planned moment, and its size: what a volume has set, who its members are, whether it has any bytes, known before
//! anything is restored.
//!
//! Invariants:
//! - Snapshot and slots are verified as for a restore, each to its end; only the digest of the whole tree, which needs all of it, is not.
//! - Nothing is kept in memory but the rows that are asked for.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use murphy_fs::{ReadSnapshotError, RowKey, SnapshotReader, Table};
use murphy_log::{Frame, Usage};
use tokio::sync::mpsc;

use super::{Frames, OnProgress, RestoreError, SLOTS_AHEAD, check_header};
use crate::{
    base::{BaseManifest, read_base},
    descriptor::Archive,
    plan::RestorePlan,
    walk::Boundary,
};

/// The rows of `tables` in the tree that `plan` leads to. `archives` are those that the plan was made of, in the same order.
///
/// After [`RestoreError::Snapshot`] a plan without that snapshot may still succeed.
pub async fn planned_rows(
    archives: &[Archive],
    plan: &RestorePlan,
    tables: &[Table],
) -> Result<BTreeMap<RowKey, Bytes>, RestoreError> {
    let tables: Vec<u8> = tables.iter().map(|table| table.number()).collect();
    let route = &plan.route;
    let mut rows = match &route.snapshot {
        Some((archive, base)) => rows_of_base(&archives[*archive], base, tables.clone()).await?,
        None => BTreeMap::new(),
    };
    let (sender, mut receiver) = mpsc::channel(SLOTS_AHEAD);
    let progress: OnProgress = Arc::new(|_| {});
    let at = Boundary::after(route.start.position);
    let producer = Frames { archives, plan, at, sender, progress: &progress };
    // It owns the receiver: when it fails, whoever produces learns that nobody takes its frames.
    let collecting = async move {
        while let Some(frames) = receiver.recv().await {
            for frame in &frames {
                change(&mut rows, frame, &tables)?;
            }
        }
        Ok(rows)
    };
    let (produced, collected) = tokio::join!(producer.run(), collecting);
    match produced {
        Err(RestoreError::Stopped) | Ok(()) => collected,
        Err(error) => Err(error),
    }
}

/// How large the tree is that `plan` leads to. `archives` are those that the plan was made of, in the same order. Only the last slot is read.
pub async fn planned_usage(archives: &[Archive], plan: &RestorePlan) -> Result<Usage, RestoreError> {
    let steps = &plan.route.steps;
    // Behind the last slot there may be a seal.
    let Some(last) = steps.iter().rposition(|step| step.slot.is_some()) else {
        return Ok(plan.route.start.usage);
    };
    let at = match last.checked_sub(1).and_then(|before| steps.get(before)) {
        Some(before) => before.end,
        None => Boundary::after(plan.route.start.position),
    };
    let mut plan = plan.clone();
    plan.route.steps.drain(..last);
    let (sender, mut receiver) = mpsc::channel(SLOTS_AHEAD);
    let progress: OnProgress = Arc::new(|_| {});
    let producer = Frames { archives, plan: &plan, at, sender, progress: &progress };
    let collecting = async move {
        let mut usage = None;
        while let Some(frames) = receiver.recv().await {
            usage = frames.last().map(|frame| frame.header().usage).or(usage);
        }
        usage
    };
    let (produced, usage) = tokio::join!(producer.run(), collecting);
    produced?;
    Ok(usage.unwrap_or(plan.route.start.usage))
}

fn change(rows: &mut BTreeMap<RowKey, Bytes>, frame: &Frame, tables: &[u8]) -> Result<(), RestoreError> {
    for entry in frame {
        let entry = entry.map_err(|error| RestoreError::Slot { reason: error.to_string() })?;
        for change in entry.changes.iter().filter(|change| tables.contains(&change.table)) {
            let key = RowKey::from_parts(change.table, &change.key);
            match &change.value {
                Some(value) => rows.insert(key, value.clone()),
                None => rows.remove(&key),
            };
        }
    }
    Ok(())
}

async fn rows_of_base(
    archive: &Archive,
    base: &BaseManifest,
    tables: Vec<u8>,
) -> Result<BTreeMap<RowKey, Bytes>, RestoreError> {
    let reader = read_base(archive, base);
    let reading = murphy_log::aside(move || {
        let reader = SnapshotReader::open(reader)?;
        let header = *reader.header();
        let mut kept = BTreeMap::new();
        let mut keep = |batch: murphy_fs::RowBatch| {
            kept.extend(batch.into_iter().filter(|(key, _)| tables.contains(&key.table())));
            Ok(())
        };
        reader.read(&mut keep, &|_| ())?;
        Ok::<_, ReadSnapshotError>((header, kept))
    });
    let (header, kept) = reading.await.map_err(|source| RestoreError::Snapshot {
        folder: base.folder.clone(),
        url: archive.url().to_owned(),
        source,
    })?;
    check_header(archive, base, (header.volume, header.branch), header.state)?;
    Ok(kept)
}
