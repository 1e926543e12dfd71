//! The packs: every one that the tree refers to is in the store, and, if asked, every cell of it is intact.
//!
//! Invariants:
//! - A pack of which nothing is referred to any more need not be there: a restore copies only what somebody can read.

use std::sync::Arc;

use futures::StreamExt;
use murphy_fs::{BlockStore, PackMeta, PackReader, PackRow, RowKey, Table, View};
use tokio::runtime::Handle;

use super::Findings;
use crate::{
    error::{CliError, failed},
    node::Node,
};

/// What is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// Whether each pack is there, known losses too.
    All,
    /// The same, and every cell of it is read.
    Cells,
    /// Only what the tree says to be there.
    Unknown,
}

/// Checks every pack that the tree refers to; returns how many bytes of objects were read and verified.
pub(super) fn check_packs(
    node: &Node,
    view: &View,
    look: Look,
    runtime: &Handle,
    findings: &mut Findings<'_>,
) -> Result<u64, CliError> {
    let range = RowKey::range_start(Table::Pack, 0)..RowKey::from_parts(Table::Pack.number() + 1, &[]);
    let packs = view.rows(range).map(|row| {
        let (key, value) = row.map_err(failed)?;
        PackRow::decode(&value).map_err(|error| failed(format!("{key:?}: {error}")))
    });
    let is_wanted = |row: &PackRow| row.live_bytes > 0 && !(row.is_missing() && look == Look::Unknown);
    let packs = packs.filter(|row| row.as_ref().map_or(true, is_wanted));
    let checks = futures::stream::iter(packs).map(|row| {
        let store = Arc::clone(&node.blocks);
        async move {
            let row = row?;
            let checked = check_pack(&*store, row.meta(), look == Look::Cells).await;
            let known = "the volume knows that it was lost with a source";
            Ok::<_, CliError>(checked.map_err(|finding| match row.is_missing() {
                true => format!("{finding} ({known})"),
                false => finding,
            }))
        }
    });
    runtime.block_on(async {
        let mut verified = 0;
        let mut checks = std::pin::pin!(checks.buffer_unordered(AT_ONCE));
        while let Some(checked) = checks.next().await {
            match checked? {
                Ok(bytes) => verified += bytes,
                Err(finding) => findings.add(finding),
            }
        }
        Ok(verified)
    })
}

/// Checks one pack; returns how many bytes were verified, or what is wrong.
async fn check_pack(store: &dyn BlockStore, meta: PackMeta, cells: bool) -> Result<u64, String> {
    if !cells {
        return match store.size(meta.name).await {
            Ok(size) if size == meta.stored_len => Ok(0),
            Ok(size) => Err(format!("pack {} has {size} bytes, the log says {}", meta.name, meta.stored_len)),
            Err(error) => Err(error.to_string()),
        };
    }
    let bytes = store.get(meta.name).await.map_err(|error| error.to_string())?;
    let verify = move || PackReader::open(&meta, bytes).and_then(|pack| pack.verify());
    murphy_log::aside(verify).await.map_err(|damage| damage.to_string())?;
    Ok(meta.stored_len)
}

/// Packs that are asked for at once; each may be a few MiB in memory.
const AT_ONCE: usize = 16;
