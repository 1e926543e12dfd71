//! Pins: a restore says in every archive that it reads there, before it looks at anything.
//!
//! Invariants:
//! - What was pinned is unpinned however the restore ends, unless its process is killed; a later one into the same directory does it then.
//! - Whoever else reads takes back what its own process has pinned, and nothing of others.
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
        let what = format!("restore to {}", directory.display());
        Pins::held(&restore.archives, holder(&what, None), runtime)
    }

    /// The same for somebody else who reads: `what` he does, in words. Several may do the same at a time.
    pub(in crate::commands) fn of(archives: &[Archive], what: &str, runtime: &'a Runtime) -> Pins<'a> {
        Pins::held(archives, holder(what, Some(std::process::id())), runtime)
    }

    fn held(archives: &[Archive], holder: String, runtime: &'a Runtime) -> Pins<'a> {
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

/// Who reads, to people: `what` is done on this machine, by which process if it may be done by several at a time.
fn holder(what: &str, process: Option<u32>) -> String {
    let host = std::fs::read_to_string(HOST_NAME).unwrap_or_default();
    let process = process.map(|id| format!(" by process {id}")).unwrap_or_default();
    format!("{what}{process} on {}", host.trim())
}

/// Who this machine is, to people.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

#[cfg(test)]
mod tests {
    use murphy_fs::StoreUrl;
    use murphy_log::{BranchId, Epoch, EpochId, State, VolumeId};

    use super::*;
    use crate::{config::NodeConfig, places::create_archive};

    /// The fear: of two who read at a time the first to end takes back the pin of the other, and what that reads is deleted; or what a restore
    /// that was killed has pinned stays for good.
    #[test]
    fn a_reader_that_ends_takes_back_its_own_pin_and_none_of_another_process() {
        let (folder, runtime) = (tempfile::tempdir().unwrap(), Runtime::new().unwrap());
        let url: StoreUrl = format!("file://{}/a", folder.path().display()).parse().unwrap();
        let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
        let config = NodeConfig::new(volume, branch, "v".to_owned(), url.clone());
        let base = State::origin(Epoch { number: 1, id: EpochId::from_bytes([1; 16]) }).position;
        let made = create_archive(&config, &url, false, base, SystemClock::new().wall());
        let archive = runtime.block_on(made).unwrap();
        let held =
            |what, process| Pins::held(std::slice::from_ref(&archive), holder(what, process), &runtime);
        let holders = || -> Vec<String> {
            let mut registry = Registry::new(archive.clone());
            let view = runtime.block_on(registry.refresh()).unwrap();
            view.pins.values().map(|pin| pin.holder.clone()).collect()
        };
        let (first, second) = (held("dump to -", Some(7)), held("dump to -", Some(8)));
        assert_eq!((holders().len(), first.unpinned().len()), (2, 0));
        drop(first);
        assert_eq!(holders(), [holder("dump to -", Some(8))]);
        drop(second);
        std::mem::forget(held("restore to /a", None));
        assert_eq!(holders().len(), 1);
        drop(held("restore to /a", None));
        assert_eq!(holders(), Vec::<String>::new());
        let own = Pins::of(std::slice::from_ref(&archive), "dump to -", &runtime);
        assert!(own.holder.contains(&format!("process {}", std::process::id())), "{}", own.holder);
    }
}
