//! Whether a volume is sound in itself: what `fsck` looks at, for a volume in the same process.
//!
//! Invariants:
//! - Only volumes of [`VOLUME`](crate::VOLUME) are looked at: the digest depends on the volume's keys.

use murphy_fs::{IndexSnapshot, Volume, check_digest, check_tree};

use crate::volume_keys;

/// Looks whether the tree is sound, and whether the digest that was kept up is that of its rows.
///
/// # Errors
/// What is not right.
pub fn check_sound(volume: &Volume) -> Result<(), String> {
    let view = volume.view_with_state();
    let findings = check_tree(&view).map_err(|error| error.to_string())?;
    let digest = check_digest(&view, &volume_keys()).map_err(|error| error.to_string())?.digest;
    let kept = view.state().map(|state| state.digest);
    if kept != Some(digest) {
        return Err(format!("the rows have digest {digest}, {kept:?} was kept up"));
    }
    if findings.is_empty() { Ok(()) } else { Err(format!("the tree is not sound: {findings:?}")) }
}
