//! What an fsync waits for: this node's log, and then whoever acknowledges.
//!
//! Invariants:
//! - An fsync that returns was acknowledged by whom the volume waits for at that moment: one that waits for somebody who is given up goes on
//!   with those that are left.

use std::sync::Arc;

use murphy_log::Lsn;

use super::Volume;
use crate::{Acknowledger, Errno};

impl Volume {
    /// Lets fsync wait for copies too, also one that waits already.
    pub fn acknowledge_with(&self, acknowledger: Arc<dyn Acknowledger>) {
        self.shared.acknowledger.send_replace(Some(acknowledger));
    }

    /// Lets fsync wait for this node only, also one that waits already.
    pub fn acknowledge_alone(&self) {
        self.shared.acknowledger.send_replace(None);
    }

    /// Waits until every entry so far is durable at the volume's level.
    pub(crate) async fn make_durable(&self) -> Result<Lsn, Errno> {
        let lsn = self.durable_here().await?;
        let deadline = self.shared.options.io_timeout;
        let mut acknowledgers = self.shared.acknowledger.subscribe();
        loop {
            let Some(acknowledger) = acknowledgers.borrow_and_update().clone() else { return Ok(lsn) };
            tokio::select! {
                answer = acknowledger.acknowledged(lsn, deadline) => {
                    answer.map_err(|error| {
                        tracing::error!(%lsn, %error, "copies did not acknowledge");
                        Errno::EIO
                    })?;
                    return Ok(lsn);
                }
                // The sender lives as long as this volume.
                Ok(()) = acknowledgers.changed() => {}
            }
        }
    }

    /// Waits until every entry so far is durable on this node, whatever the volume's level: joining as the first mirror cannot wait for mirrors.
    pub async fn durable_here(&self) -> Result<Lsn, Errno> {
        let lsn = self.shared.sequencer.close_open_frame();
        let deadline = self.shared.options.io_timeout;
        let watch = self.shared.sequencer.log().durable();
        match tokio::time::timeout(deadline, watch.wait_for(lsn)).await {
            Ok(Ok(_)) => Ok(lsn),
            Ok(Err(error)) => {
                tracing::error!(%lsn, %error, "entries do not become durable");
                Err(Errno::EIO)
            }
            Err(_) => {
                tracing::error!(%lsn, ?deadline, "entries did not become durable in time");
                Err(Errno::EIO)
            }
        }
    }
}
