//! Giving up what an archive holds and nothing leads to: the order of people who know that it is a copy's, or that nobody has it any more.
//!
//! Invariants:
//! - Only what keeps a source from starting is given up, and only in the epoch that the node is of: what shows a successor is not.
//! - Nothing is deleted: a record in the archive says it, to everybody.

use std::{path::Path, sync::Arc};

use murphy_backup::{Archive, Reach, Record, Registry, Stray, StrayKind, reach};
use murphy_fs::StoreUrl;
use murphy_log::{Clock, Log, SystemClock};
use tokio::runtime::Runtime;

use crate::{
    archive_notes::cursor,
    config::Role,
    error::{CliError, failed},
    node::Looked,
    places::{local_url, open_archive},
    settings::{Settings, shared_form},
};

/// What would be given up, and in which archive.
pub(crate) struct Abandoning {
    /// The volume's name.
    pub(crate) name: String,
    looked: Looked,
    archive: Archive,
    reach: Reach,
}

impl Abandoning {
    /// Looks what the archive at `url` holds and neither the log of the node in `directory`, which nobody serves, nor anything in it leads to.
    pub(crate) fn of(directory: &Path, url: &StoreUrl, runtime: &Runtime) -> Result<Abandoning, CliError> {
        let looked = Looked::open(directory, runtime.handle())?;
        let node = &looked.node;
        let settings = Settings::of(&node.volume)?;
        let wanted = shared_form(url);
        let shared = settings.archives.iter().find(|archive| archive.url == wanted);
        let shared = shared.ok_or_else(|| {
            CliError::new(format!("{wanted} is not an archive of this volume"))
                .hint("murphy archive list shows those it has")
        })?;
        let log = Arc::clone(&node.log) as Arc<dyn Log>;
        let own = match node.config.role {
            Role::Source => node.log.recovery().epoch,
            Role::Mirror => log.tail().position.epoch,
        };
        let known = cursor(directory, shared).load().map_err(failed)?;
        let (archive, reach) = runtime.block_on(async {
            let archive = open_archive(&node.config, &local_url(&node.config, shared)?).await;
            let archive = archive.map_err(failed)?;
            let reach = reach(&archive, known, own, &log).await.map_err(failed)?;
            Ok::<_, CliError>((archive, reach))
        })?;
        let is_later = |stray: &&Stray| match &stray.kind {
            StrayKind::Slot { epoch, .. } => epoch.number > own.number,
            StrayKind::Seal(_) | StrayKind::BrokenSeal(_) => true,
            StrayKind::Damaged(_) => stray.key.0 > own.number,
        };
        if let Some(stray) = reach.strays.iter().find(is_later) {
            return Err(CliError::new(format!(
                "{stray}: another source has taken over, which is not given up here"
            ))
            .hint("join the successor with a new directory, or restore from the archive"));
        }
        Ok(Abandoning { name: settings.name, looked, archive, reach })
    }

    /// What would be given up.
    pub(crate) fn strays(&self) -> &[Stray] {
        &self.reach.strays
    }

    /// Where the chain of the archive ends.
    pub(crate) fn archived(&self) -> u64 {
        self.reach.end.position.lsn.get()
    }

    /// Gives it up.
    pub(crate) fn perform(&self, runtime: &Runtime) -> Result<(), CliError> {
        let (node, now) = (self.looked.node.identity.public_key().node(), SystemClock::new().wall());
        let mut registry = Registry::new(self.archive.clone());
        for stray in &self.reach.strays {
            let (epoch, first, turn) = stray.key;
            let record = Record::Abandoned { epoch, first: first.get(), turn };
            runtime.block_on(registry.append(node, now, record)).map_err(failed)?;
        }
        Ok(())
    }
}
