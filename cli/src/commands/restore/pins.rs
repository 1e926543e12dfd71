//! Pins: a restore says in every archive that it reads there, before it looks at anything.
//!
//! Invariants:
//! - What was pinned is unpinned however the restore ends, unless its process is killed; a later one into the same directory does it then.
//! - An archive that takes no records is read all the same, and the result of the restore says so.

use murphy_backup::{Archive, Record, Registry, RegistryError};
use murphy_log::{Clock, NodeId, SystemClock};
use serde::Serialize;
use tokio::runtime::Runtime;

use super::Restore;

/// Pins that are held. Dropping this takes them back.
pub(in crate::commands) struct Pins<'a> {
    runtime: &'a Runtime,
    archives: Vec<Archive>,
    holder: String,
    unpinned: Vec<Unwritten>,
}

/// An archive that did not take a record: whoever deletes there does not know of what the record says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Unwritten {
    /// The archive.
    pub(super) url: String,
    /// Why not.
    pub(super) reason: String,
}

impl Unwritten {
    pub(super) fn new(archive: &Archive, error: &RegistryError) -> Unwritten {
        Unwritten { url: archive.url().to_owned(), reason: error.to_string() }
    }
}

impl<'a> Pins<'a> {
    /// Pins everything in every archive of `restore`. One that cannot be written to is read all the same: that something was deleted
    /// meanwhile is found out by every reader.
    pub(super) fn take(restore: &Restore, runtime: &'a Runtime) -> Pins<'a> {
        let directory = std::path::absolute(&restore.directory).unwrap_or(restore.directory.clone());
        Pins::of(&restore.archives, &format!("restore to {}", directory.display()), runtime)
    }

    /// The same for somebody else who reads: `what` he does, in words.
    pub(in crate::commands) fn of(archives: &[Archive], what: &str, runtime: &'a Runtime) -> Pins<'a> {
        let host = std::fs::read_to_string(HOST_NAME).unwrap_or_default();
        let holder = format!("{what} on {}", host.trim());
        let mut pins = Pins { runtime, archives: Vec::new(), holder, unpinned: Vec::new() };
        for archive in archives {
            pins.pin(archive.clone());
        }
        pins
    }

    /// Pins everything in one more archive.
    pub(super) fn pin(&mut self, archive: Archive) {
        let (lsn, holder) = (archive.descriptor().base.lsn, &self.holder);
        let mut registry = Registry::new(archive.clone());
        let pinned = registry.pin(NodeId::default(), SystemClock::new().wall(), lsn, holder);
        if let Err(error) = self.runtime.block_on(pinned) {
            tracing::warn!(url = archive.url(), %error, "it is read without a pin");
            self.unpinned.push(Unwritten::new(&archive, &error));
        }
        self.archives.push(archive);
    }

    /// The archives that are read without a pin.
    pub(super) fn unpinned(&self) -> &[Unwritten] {
        &self.unpinned
    }

    async fn take_back(&self, archive: &Archive) -> Result<(), RegistryError> {
        let mut registry = Registry::new(archive.clone());
        let pins = registry.refresh().await?.pins.clone();
        for (id, _) in pins.into_iter().filter(|(_, pin)| pin.holder == self.holder) {
            registry.append(NodeId::default(), SystemClock::new().wall(), Record::Unpin { id }).await?;
        }
        Ok(())
    }
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        for archive in &self.archives {
            if let Err(error) = self.runtime.block_on(self.take_back(archive)) {
                tracing::warn!(url = archive.url(), %error, "a pin is left behind; it keeps objects and does no other harm");
            }
        }
    }
}

/// Who this machine is, to people.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";
