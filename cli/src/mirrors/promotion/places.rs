//! The archives in a promotion: where each of them stands, what has to be done with it, and who was given up.
//!
//! Invariants:
//! - Every archive of the volume is sealed, or given up by its URL.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use murphy_backup::{
    Archive, ArchiveFence, ArchiveKind, Losses, LostPacks, Successor, Supplies, TakeOverLog, reach,
};
use murphy_fs::{BlockStore, BlockStores, Fence, FenceError, Held, StoreUrl};
use murphy_log::{Clock, Epoch, Log, Lsn, NodeId, Position, VolumeKeys};
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    config::NodeConfig,
    error::{CliError, failed},
    places::{local_url, open_archive},
    settings::{SharedArchive, shared_form},
};

/// What the order gives up: nobody waits for it, and what only it has is lost.
#[derive(Clone, Default)]
pub(super) struct GivenUp {
    pub(super) nodes: BTreeSet<NodeId>,
    /// Archives, in the shared form of their URLs.
    pub(super) archives: BTreeSet<String>,
}

impl GivenUp {
    /// Reads what stands behind `--assume-lost`: ids of nodes, and URLs of archives of the volume. When a promotion is tried `again`, any URL:
    /// an archive that the source before added at the last moment is known to another archive only.
    pub(super) fn parse(
        texts: &[String],
        archives: &[SharedArchive],
        again: bool,
    ) -> Result<GivenUp, CliError> {
        let mut given_up = GivenUp::default();
        for text in texts {
            if let Ok(node) = text.parse::<NodeId>() {
                given_up.nodes.insert(node);
                continue;
            }
            let shared = text.parse::<StoreUrl>().map(|url| shared_form(&url)).ok();
            let known = shared.filter(|url| again || archives.iter().any(|archive| archive.url == *url));
            given_up.archives.insert(known.ok_or_else(|| {
                CliError::usage(format!(
                    "--assume-lost {text}: neither a member nor an archive of this volume"
                ))
                .hint("murphy promote --dry-run names the members and the archives")
            })?);
        }
        Ok(given_up)
    }
}

/// What the promoted node is, as far as archives are concerned.
pub(super) struct Promoted {
    pub(super) config: NodeConfig,
    pub(super) node: NodeId,
    pub(super) log: Arc<dyn Log>,
    pub(super) keys: VolumeKeys,
    pub(super) blocks: Arc<BlockStores>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) lost: Arc<dyn Losses>,
}

/// Packs that may be gone with the source before: those of entries that this node holds without their bytes, as it is whenever it is asked. A
/// promotion fetches entries, and bytes, while it goes on.
#[derive(Debug)]
pub(super) struct Lacking {
    /// What else is known to be lost.
    pub(super) known: Arc<dyn Losses>,
    pub(super) data: watch::Receiver<Lsn>,
    pub(super) log: Arc<dyn Log>,
}

impl Losses for Lacking {
    fn may_have(&self, since: Lsn) -> bool {
        let now = LostPacks { after: *self.data.borrow(), upto: self.log.durable().state().position.lsn };
        now.may_have(since) || self.known.may_have(since)
    }
}

/// The archives that a promotion seals, open.
pub(super) struct Places {
    /// All archives of the volume, as the log named them.
    pub(super) shared: Vec<SharedArchive>,
    pub(super) log: TakeOverLog,
    /// The full ones: how this node reaches them, and their packs.
    pub(super) full: Vec<(StoreUrl, Arc<dyn BlockStore>)>,
    /// The epochs that they are in.
    pub(super) epochs: Vec<Epoch>,
    /// The members that were given up.
    pub(super) given_up: BTreeSet<NodeId>,
}

impl Places {
    /// Opens every archive that is not given up, and asks each how far it is.
    pub(super) async fn open(
        promoted: &Promoted,
        shared: &[SharedArchive],
        given_up: &GivenUp,
    ) -> Result<Places, CliError> {
        let mut opened = Vec::new();
        for archive in shared.iter().filter(|archive| !given_up.archives.contains(&archive.url)) {
            opened.push(open_one(promoted, archive).await.map_err(|error| {
                CliError::new(format!("{} cannot be sealed: {error}", archive.url)).hint(format!(
                    "the source before could go on with it; --assume-lost {} gives it up, with what only it holds",
                    archive.url
                ))
            })?);
        }
        let full: Vec<(StoreUrl, Arc<dyn BlockStore>)> = opened
            .iter()
            .filter(|(_, fence, _)| fence.archive().descriptor().kind == ArchiveKind::Full)
            .map(|(url, fence, _)| (url.clone(), Arc::new(fence.archive().packs()) as Arc<dyn BlockStore>))
            .collect();
        let own: Arc<dyn BlockStore> = promoted.blocks.clone();
        let others = full.iter().map(|(_, packs)| Arc::clone(packs)).collect();
        let packs: Arc<dyn BlockStore> = Arc::new(BlockStores::new(own, others));
        let supplies =
            Supplies { log: Arc::clone(&promoted.log), packs, lost: Some(Arc::clone(&promoted.lost)) };
        let epochs = opened.iter().map(|(_, _, held)| held.epoch).collect();
        let places = opened
            .into_iter()
            .map(|(_, fence, _)| Arc::new(fence.with_supplies(supplies.clone())) as Arc<dyn Fence>)
            .collect();
        let log = TakeOverLog { log: Arc::clone(&promoted.log), keys: promoted.keys.clone(), places };
        Ok(Places { shared: shared.to_vec(), log, full, epochs, given_up: given_up.nodes.clone() })
    }
}

async fn open_one(
    promoted: &Promoted,
    shared: &SharedArchive,
) -> Result<(StoreUrl, ArchiveFence, Held), CliError> {
    let url = local_url(&promoted.config, shared)?;
    let asked = async {
        let archive: Archive = open_archive(&promoted.config, &url).await.map_err(failed)?;
        let fence = ArchiveFence::new(archive, promoted.node, Arc::clone(&promoted.clock), None);
        let held = fence.adopt().await.map_err(failed)?;
        Ok::<_, CliError>((fence, held))
    };
    let asked = tokio::time::timeout(ANSWER_MAX, asked).await;
    let (fence, held) = asked.map_err(|_| CliError::new("it does not answer in time"))??;
    Ok((url, fence, held))
}

/// What a promotion would do with an archive.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Outlook {
    pub(super) url: String,
    /// Up to where it holds the history, if it answers.
    pub(super) lsn: Option<u64>,
    /// What would be done.
    pub(super) act: &'static str,
    /// Why nothing can be done.
    pub(super) error: Option<String>,
    /// What it holds that this node lacks and nothing in it leads to: lost, unless another archive or a member has it.
    pub(super) unled: Option<String>,
}

impl Outlook {
    /// Looks at every archive; nothing is changed.
    pub(super) async fn of(
        promoted: &Promoted,
        shared: &[SharedArchive],
        given_up: &GivenUp,
        successor: &Successor,
    ) -> Vec<Outlook> {
        let tail = promoted.log.tail().position;
        let looks = shared.iter().map(|archive| async {
            if given_up.archives.contains(&archive.url) {
                return Outlook::without(&archive.url, GIVE_UP, None);
            }
            match open_one(promoted, archive).await {
                Ok((_, fence, held)) => {
                    let judged = Outlook::judged(&archive.url, held, &tail, successor);
                    let reach = reach(fence.archive(), None, tail.epoch, &promoted.log).await;
                    let unled = reach.map(|reach| reach.furthest().map(ToString::to_string));
                    let unled = unled
                        .unwrap_or_else(|error| Some(format!("what else it holds is not known ({error})")));
                    Outlook { unled, ..judged }
                }
                Err(error) => Outlook::without(&archive.url, REFUSED, Some(error.to_string())),
            }
        });
        futures::future::join_all(looks).await
    }

    fn without(url: &str, act: &'static str, error: Option<String>) -> Outlook {
        Outlook { url: url.to_owned(), lsn: None, act, error, unled: None }
    }

    fn judged(url: &str, held: Held, tail: &Position, successor: &Successor) -> Outlook {
        let (end, lsn) = (held.end, Some(held.end.lsn.get()));
        let (act, error) = match successor.judge(held, tail) {
            Ok(standing) if standing.is_sealed => (SEALED, None),
            Ok(standing) if standing.is_ahead => (FETCH, None),
            Ok(_) if end.lsn < tail.lsn => (SHIP, None),
            Ok(_) => (SEAL, None),
            Err(error @ FenceError::Sealed(_)) => (REFUSED, Some(format!("it was {error}"))),
            Err(error) => (REFUSED, Some(error.to_string())),
        };
        Outlook { lsn, ..Outlook::without(url, act, error) }
    }

    /// One line of a plan.
    pub(super) fn line(&self) -> String {
        let lsn = self.lsn.map_or_else(String::new, |lsn| format!(" (lsn {lsn})"));
        let what = match self.act {
            SEALED => "is sealed by this node already".to_owned(),
            FETCH => "is sealed; what only it holds is fetched first".to_owned(),
            SHIP => "is brought up to this mirror and sealed".to_owned(),
            SEAL => "is sealed".to_owned(),
            GIVE_UP => "is given up: what only it holds is lost, also if it was acknowledged".to_owned(),
            _ => format!("stands in the way: {}", self.error.as_deref().unwrap_or("it cannot be sealed")),
        };
        let unled = self.unled.as_ref().map_or_else(String::new, |unled| {
            format!("; {unled}, and nothing leads there: what this mirror lacks of it is lost")
        });
        format!("archive            {}{lsn} {what}{unled}", self.url)
    }
}

/// An archive that does not answer for so long is not there.
const ANSWER_MAX: Duration = Duration::from_secs(30);
const SEALED: &str = "sealed";
const FETCH: &str = "fetch and seal";
const SHIP: &str = "ship and seal";
const SEAL: &str = "seal";
const GIVE_UP: &str = "give up";
const REFUSED: &str = "none";

#[cfg(test)]
mod tests {
    use murphy_log::{MemoryLog, conformance::History};

    use super::*;

    #[derive(Debug)]
    struct Only(Lsn);

    impl Losses for Only {
        fn may_have(&self, since: Lsn) -> bool {
            since == self.0
        }
    }

    /// The fear: entries come from another member without their bytes, and the archive waits for those for ever; or bytes that did come are
    /// given up.
    #[test]
    fn what_may_be_lost_is_what_lacks_its_bytes_at_the_moment() {
        let origin = History::origin();
        let mut history = History::new(origin.position.epoch, origin);
        let log = Arc::new(MemoryLog::new(origin));
        log.claim(origin.position.epoch).unwrap();
        let data = watch::Sender::new(origin.position.lsn);
        let far = Lsn::new(1000);
        let lacking = Lacking {
            known: Arc::new(Only(far)),
            data: data.subscribe(),
            log: Arc::clone(&log) as Arc<dyn Log>,
        };
        let next = origin.position.lsn.next();
        assert!(!lacking.may_have(next) && lacking.may_have(far));
        log.append(&origin.position, history.frame(3)).unwrap();
        let end = log.tail().position.lsn;
        assert!(lacking.may_have(next) && lacking.may_have(end) && !lacking.may_have(end.next()));
        data.send_replace(next);
        assert!(!lacking.may_have(next) && lacking.may_have(end));
    }
}
