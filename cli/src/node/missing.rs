//! A copy whose bytes are not all there: its tree says which are missing.
//!
//! Invariants:
//! - Whoever made the copy has looked for each pack of its tree. Nothing is looked for once more: the volume has no source meanwhile.

use murphy_fs::{Errno, PACKS_PER_ENTRY, PackNews, PackNumber};

use super::Node;
use crate::error::CliError;

/// Calls these packs, which nobody who was asked has, missing, by entries of `node`, which leads. A source asks whoever may have them from its
/// first start on, and nobody waits for them meanwhile.
pub(super) async fn call_missing(node: &Node, packs: &[PackNumber]) -> Result<(), CliError> {
    let refused = |errno: Errno| CliError::new(format!("missing packs cannot be written down: {errno:?}"));
    for some in packs.chunks(PACKS_PER_ENTRY) {
        node.volume.record_packs(some.to_vec(), PackNews::Missing).wait().await.map_err(refused)?;
    }
    Ok(())
}
