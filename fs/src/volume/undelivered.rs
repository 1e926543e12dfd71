//! Handles on their way to whoever asked for them.
//!
//! Invariants:
//! - A handle that nobody has been told of is closed: an answer that fails, comes too late or is dropped leaves nothing open.

use super::Volume;
use crate::Opened;

/// An open file whose handle nobody knows yet.
pub(super) struct Undelivered {
    volume: Volume,
    opened: Option<Opened>,
}

impl Volume {
    pub(super) fn undelivered(&self, opened: Opened) -> Undelivered {
        Undelivered { volume: self.clone(), opened: Some(opened) }
    }
}

impl Undelivered {
    /// Hands it out: whoever gets it closes it.
    pub(super) fn deliver(mut self) -> Opened {
        self.opened.take().expect("it is handed out once, by value")
    }
}

impl Drop for Undelivered {
    fn drop(&mut self) {
        if let Some(opened) = self.opened.take() {
            self.volume.close_handle(opened.handle);
        }
    }
}
