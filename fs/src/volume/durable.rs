//! What an fsync waits for: this node's log, and then whoever acknowledges.
//!
//! Invariants:
//! - An fsync that returns was acknowledged by whom the volume waits for at that moment: one that waits for somebody who is given up goes on
//!   with those that are left.
//! - It has one deadline for all of that, whoever is waited for in between: no order of people makes a process wait longer.
//! - None returns after this node is known to have been replaced, or to have lost entries, also if it waits for nobody.

use std::{sync::Arc, time::Duration};

use murphy_log::Lsn;
use tokio::time::Instant;

use super::Volume;
use crate::{AcknowledgeError, Acknowledger, Errno, Mandate};

impl Volume {
    /// Lets fsync wait for copies too, also one that waits already.
    pub fn acknowledge_with(&self, acknowledger: Arc<dyn Acknowledger>) {
        self.shared.acknowledger.send_replace(Some(acknowledger));
    }

    /// Lets fsync wait for this node only, also one that waits already.
    pub fn acknowledge_alone(&self) {
        self.shared.acknowledger.send_replace(None);
    }

    /// Lets nothing be acknowledged any more once `mandate` does not stand, by whomever. Given once, for the life of the volume.
    pub fn acknowledge_under(&self, mandate: Arc<dyn Mandate>) {
        if self.shared.mandate.set(mandate).is_err() {
            tracing::error!("a volume has its mandate already");
        }
    }

    /// Lets every fsync that waits look at once whether the mandate still stands.
    pub fn ask_again(&self) {
        self.shared.acknowledger.send_modify(|_| {});
    }

    /// Waits until every entry so far is durable at the volume's level.
    pub(crate) async fn make_durable(&self) -> Result<Lsn, Errno> {
        let until = Instant::now() + self.shared.options.io_timeout;
        let lsn = self.durable_here().await?;
        let refused = |error: AcknowledgeError| {
            tracing::error!(%lsn, %error, "copies did not acknowledge");
            Errno::EIO
        };
        let mut acknowledgers = self.shared.acknowledger.subscribe();
        loop {
            // One that is known to have been replaced does not wait first.
            self.check_mandate().map_err(refused)?;
            let Some(acknowledger) = acknowledgers.borrow_and_update().clone() else { return Ok(lsn) };
            let left: Duration = until.saturating_duration_since(Instant::now());
            tokio::select! {
                answer = acknowledger.acknowledged(lsn, left) => {
                    answer.and_then(|()| self.check_mandate()).map_err(refused)?;
                    return Ok(lsn);
                }
                // The sender lives as long as this volume.
                Ok(()) = acknowledgers.changed() => {}
            }
        }
    }

    fn check_mandate(&self) -> Result<(), AcknowledgeError> {
        self.shared.mandate.get().map_or(Ok(()), |mandate| mandate.stands())
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
