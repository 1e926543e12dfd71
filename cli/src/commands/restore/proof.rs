//! The proof that a restore leaves in the one archive that it has read: what came back, and how long it took. The source's `status` shows it.
//!
//! Invariants:
//! - It is left when everything is in place, and says what was wrong. That it cannot be left is said, and is no failure: whoever rehearses may
//!   have read access only.

use murphy_backup::{Proof, RESTORE};
use murphy_log::{Clock, LogTime, NodeId, SystemClock};
use tokio::runtime::Runtime;

use super::{Restore, execute::Restored};
use crate::output::Output;

/// What a restore has gone through.
pub(super) struct Rehearsal {
    /// When the command began.
    pub(super) began: LogTime,
    /// Slots that were to be read.
    pub(super) slots: u64,
    /// What the plan knew to be wrong.
    pub(super) problems: Vec<String>,
}

impl Rehearsal {
    /// Leaves the proof of `restored` in the archive that it came from. Of several nobody could say what each of them is worth alone.
    pub(super) fn prove(self, restore: &Restore, restored: &Restored, runtime: &Runtime, output: &Output) {
        let [archive] = &restore.archives[..] else { return };
        let counted = [
            (restored.damaged_snapshots as u64, "damaged snapshots were passed over"),
            (restored.missing_packs, "packs are missing"),
            (restored.unanswered_packs, "packs were not shown while an archive did not answer"),
        ];
        let counted = counted.iter().filter(|(count, _)| *count > 0);
        let findings =
            self.problems.into_iter().chain(counted.map(|(count, what)| format!("{count} {what}")));
        let proof = Proof {
            kind: RESTORE.to_owned(),
            // A copy is no node of the volume.
            node: NodeId::default().to_string(),
            began: self.began.as_nanos(),
            ended: SystemClock::new().wall().as_nanos(),
            position: restored.position.into(),
            data_percent: restored.percent_read,
            objects: self.slots + restored.packs_copied,
            findings: findings.collect(),
        };
        if let Err(error) = runtime.block_on(proof.keep(archive)) {
            output.note(&format!("The proof of this restore is not kept in {}: {error}", archive.url()));
        }
    }
}
