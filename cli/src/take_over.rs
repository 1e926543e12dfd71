//! Taking over, by a promotion or a restore: the archives of the volume that stand in between, and who is given up.
//!
//! Invariants:
//! - Every archive that the volume's log names is sealed, or given up by its URL.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use murphy_backup::{Archive, ArchiveFence, PlaceStanding, Successor, TakeOverError, TakeOverLog, reach};
use murphy_fs::{Fence, FenceError, Held, RowKey, SettingRow, StoreUrl};
use murphy_log::{Clock, Epoch, Log, Lsn, NodeId, Position};
use serde::Serialize;

use crate::{
    config::NodeConfig,
    error::{CliError, failed},
    places::{local_url, open_archive},
    settings::{ARCHIVES, SharedArchive, shared_form},
};

/// What the order gives up: nobody waits for it, and what only it has is lost.
#[derive(Clone, Default)]
pub(crate) struct GivenUp {
    pub(crate) nodes: BTreeSet<NodeId>,
    /// Archives, in the shared form of their URLs.
    pub(crate) archives: BTreeSet<String>,
}

impl GivenUp {
    /// Reads what stands behind `--assume-lost`: ids of nodes, and URLs of archives of the volume. When it is tried `again`, any URL:
    /// an archive that the source before added at the last moment is known to another archive only. `plan` is the command that names them.
    pub(crate) fn parse(
        texts: &[String],
        archives: &[SharedArchive],
        again: bool,
        plan: &str,
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
                .hint(format!("{plan} --dry-run names the members and the archives"))
            })?);
        }
        Ok(given_up)
    }
}

/// The node that takes over, as archives meet it.
pub(crate) struct Taker<'a> {
    pub(crate) config: &'a NodeConfig,
    pub(crate) node: NodeId,
    pub(crate) clock: Arc<dyn Clock>,
}

/// An archive that has answered.
pub(crate) struct Opened {
    /// How this node reaches it.
    pub(crate) url: StoreUrl,
    pub(crate) fence: ArchiveFence,
    pub(crate) held: Held,
}

impl Taker<'_> {
    /// Opens an archive that the log names, and asks how far it is.
    pub(crate) async fn open(&self, shared: &SharedArchive) -> Result<Opened, CliError> {
        let url = local_url(self.config, shared)?;
        let late = || CliError::new("it does not answer in time");
        let archive = tokio::time::timeout(ANSWER_MAX, open_archive(self.config, &url)).await;
        let archive = archive.map_err(|_| late())?.map_err(failed)?;
        // All that it has got since it was made is looked at, which takes as long as it takes.
        let fence = self.fence(&archive);
        let held = archive.store().while_answering(ANSWER_MAX, fence.adopt()).await;
        let held = held.ok_or_else(late)?.map_err(failed)?;
        Ok(Opened { url, fence, held })
    }

    /// What becomes of an archive that is given up. One that is there is not given up without a word.
    pub(crate) async fn give_up(&self, shared: &SharedArchive) -> Outlook {
        let asked = tokio::time::timeout(GONE_ANSWER_MAX, self.open(shared)).await;
        let held = asked.ok().and_then(Result::ok).map(|opened| opened.held);
        let given_up = Outlook::given_up(&shared.url, held.as_ref().map(|held| held.end.lsn));
        Outlook { epoch: held.map(|held| held.epoch), ..given_up }
    }

    /// The fence at an archive that is open.
    pub(crate) fn fence(&self, archive: &Archive) -> ArchiveFence {
        ArchiveFence::new(archive.clone(), self.node, Arc::clone(&self.clock), None)
    }
}

/// The archives that are named by what `places`, which are sealed, hold behind the log, without those that are `known`: the source before may
/// have got that into one of them at the last moment.
pub(crate) async fn named_beyond(
    places: &TakeOverLog,
    known: &[String],
) -> Result<Vec<SharedArchive>, CliError> {
    let row = places.row_beyond(&RowKey::setting(ARCHIVES)).await.map_err(failed)?;
    let Some(row) = row else { return Ok(Vec::new()) };
    let row = SettingRow::decode(&row).map_err(failed)?;
    let named = serde_json::from_slice::<Vec<SharedArchive>>(&row.text);
    let mut named = named.map_err(|error| CliError::new(format!("the archives: {error}")))?;
    named.retain(|archive| !known.contains(&archive.url));
    Ok(named)
}

/// The way past a seal of a node that was given up, in an archive that refuses all the same.
pub(crate) fn way_past(error: &TakeOverError, successor: &Successor) -> Option<String> {
    let TakeOverError::Fence { url, error: FenceError::Sealed(sealed) } = error else { return None };
    successor.given_up.contains(&sealed.by).then(|| {
        format!(
            "that node {} is given up does not pass its seal there, because nothing leads to it or this node holds entries behind it; --assume-lost '{url}' gives \
             up that archive, with whatever only it holds",
            sealed.by
        )
    })
}

/// A take-over that ends because the source is not known to be silent; nothing is sealed.
pub(crate) fn not_silent(error: TakeOverError) -> CliError {
    let way = match error {
        TakeOverError::Alive { .. } => {
            "nothing was changed. Whoever ships there would be shut out for good: stop it, or see that it cannot reach its archives any more, and run it again"
        }
        _ => "nothing was changed: run it again",
    };
    failed(error).hint(way)
}

/// What would be done with an archive.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Outlook {
    pub(crate) url: String,
    /// Up to where it holds the history, if it answers.
    pub(crate) lsn: Option<u64>,
    /// What would be done.
    pub(crate) act: &'static str,
    /// Why nothing can be done.
    pub(crate) error: Option<String>,
    /// The epoch that goes on there, of one that is given up and answers.
    #[serde(skip)]
    pub(crate) epoch: Option<Epoch>,
    /// What it holds that this node lacks and nothing in it leads to: lost, unless another archive or a member has it.
    pub(crate) unled: Option<String>,
}

impl Outlook {
    /// Looks at every archive; nothing is changed.
    pub(crate) async fn of(
        taker: &Taker<'_>,
        shared: &[SharedArchive],
        given_up: &GivenUp,
        (successor, log): (&Successor, &Arc<dyn Log>),
    ) -> Vec<Outlook> {
        let tail = log.tail().position;
        let looks = shared.iter().map(|archive| async {
            if given_up.archives.contains(&archive.url) {
                return taker.give_up(archive).await;
            }
            match taker.open(archive).await {
                Ok(opened) => {
                    let at = (&opened.fence as &dyn Fence, opened.held);
                    let judged = Outlook::judged(&archive.url, at, &tail, successor).await;
                    let reach = reach(opened.fence.archive(), None, tail.epoch, log).await;
                    let unled = reach.map(|reach| reach.furthest().map(ToString::to_string));
                    let unled = unled
                        .unwrap_or_else(|error| Some(format!("what else it holds is not known ({error})")));
                    Outlook { unled, ..judged }
                }
                Err(error) => Outlook::refused(&archive.url, error.to_string()),
            }
        });
        futures::future::join_all(looks).await
    }

    /// One that is given up. Where it ends, if it answers all the same.
    pub(crate) fn given_up(url: &str, lsn: Option<Lsn>) -> Outlook {
        Outlook { lsn: lsn.map(Lsn::get), ..Outlook::without(url, GIVE_UP, None) }
    }

    /// One that cannot be sealed.
    pub(crate) fn refused(url: &str, why: String) -> Outlook {
        Outlook::without(url, REFUSED, Some(why))
    }

    fn without(url: &str, act: &'static str, error: Option<String>) -> Outlook {
        Outlook { url: url.to_owned(), lsn: None, act, error, epoch: None, unled: None }
    }

    /// One that answers.
    pub(crate) async fn judged(
        url: &str,
        (place, held): (&dyn Fence, Held),
        tail: &Position,
        successor: &Successor,
    ) -> Outlook {
        let end = held.end;
        Outlook::stands(url, (end, tail), successor.judge_at(place, held, tail).await, FETCH)
    }

    /// The same for a tree that is restored up to `base`: nothing is fetched into that.
    pub(crate) async fn of_restored(
        url: &str,
        (place, held): (&dyn Fence, Held),
        base: &Position,
        successor: &Successor,
    ) -> Outlook {
        let end = held.end;
        Outlook::stands(url, (end, base), successor.judge_tree_at(place, held, base).await, BEYOND)
    }

    fn stands(
        url: &str,
        (end, tail): (Position, &Position),
        standing: Result<PlaceStanding, FenceError>,
        beyond: &'static str,
    ) -> Outlook {
        let lsn = Some(end.lsn.get());
        let (act, error) = match standing {
            Ok(standing) if standing.is_sealed => (SEALED, None),
            Ok(standing) if standing.is_ahead => (beyond, None),
            Ok(_) if end.lsn < tail.lsn => (SHIP, None),
            Ok(_) => (SEAL, None),
            Err(error @ FenceError::Sealed(_)) => (REFUSED, Some(format!("it was {error}"))),
            Err(error) => (REFUSED, Some(error.to_string())),
        };
        Outlook { lsn, ..Outlook::without(url, act, error) }
    }

    /// Whether it has not answered, or is none of the volume's.
    pub(crate) fn is_unasked(&self) -> bool {
        self.act == REFUSED && self.lsn.is_none()
    }

    /// Whether it has answered, and somebody else has sealed it, or it holds another history.
    pub(crate) fn is_refused(&self) -> bool {
        self.act == REFUSED && self.lsn.is_some()
    }

    /// Which one, and why it cannot be sealed.
    pub(crate) fn why_not(&self) -> String {
        format!("{}: {}", self.url, self.error.as_deref().unwrap_or("it cannot be sealed"))
    }

    /// One line of a plan.
    pub(crate) fn line(&self) -> String {
        let lsn = self.lsn.map_or_else(String::new, |lsn| format!(" (lsn {lsn})"));
        let what = match self.act {
            SEALED => "is sealed by this node already".to_owned(),
            FETCH => "is sealed; what only it holds is fetched first".to_owned(),
            BEYOND => "goes on behind what is restored: that is carried over if an archive is sealed already, and stops the restore otherwise".to_owned(),
            SHIP => "is brought up to this node and sealed".to_owned(),
            SEAL => "is sealed".to_owned(),
            GIVE_UP if self.lsn.is_some() => {
                "ANSWERS, and is given up all the same: what only it holds is lost, also if it was acknowledged; without --assume-lost it is read and sealed".to_owned()
            }
            GIVE_UP => "is given up: what only it holds is lost, also if it was acknowledged".to_owned(),
            _ => format!("stands in the way: {}", self.error.as_deref().unwrap_or("it cannot be sealed")),
        };
        let unled = self.unled.as_ref().map_or_else(String::new, |unled| {
            format!("; {unled}, and nothing leads there: what this node lacks of it is lost")
        });
        format!("archive            {}{lsn} {what}{unled}", self.url)
    }
}

/// An archive that answers nothing for so long is not there.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// One that people call lost is asked so long.
const GONE_ANSWER_MAX: Duration = Duration::from_secs(5);
const SEALED: &str = "sealed";
const FETCH: &str = "fetch and seal";
const BEYOND: &str = "seal, and restore what comes behind";
const SHIP: &str = "ship and seal";
const SEAL: &str = "seal";
const GIVE_UP: &str = "give up";
const REFUSED: &str = "none";

#[cfg(test)]
mod tests {
    use murphy_fs::Sealed;
    use murphy_log::{EpochId, State};

    use super::*;

    /// The fear: whoever took over is gone and given up, its archive refuses all the same, and nobody says by which name that is passed.
    #[test]
    fn a_seal_that_giving_up_its_node_does_not_pass_names_the_archive_as_it_is_given_up() {
        let epoch = |number| Epoch { number, id: EpochId::from_bytes([9; 16]) };
        let (gone, url) = (NodeId::from_bytes([7; 16]), "s3://a/b?account=c".to_owned());
        let sealed = Sealed { base: State::origin(epoch(1)).position, next: epoch(2), by: gone };
        let error = TakeOverError::Fence { url: url.clone(), error: FenceError::Sealed(sealed) };
        let mut successor =
            Successor { node: NodeId::default(), attempts: Vec::new(), given_up: BTreeSet::new() };
        assert_eq!(way_past(&error, &successor), None);
        successor.given_up.insert(gone);
        let way = way_past(&error, &successor).unwrap();
        assert!(way.contains(&format!("--assume-lost '{url}'")) && way.contains(&gone.to_string()), "{way}");
    }

    #[test]
    fn an_archive_that_answers_is_not_given_up_without_a_word() {
        let away = Outlook::given_up("file:///a", None).line();
        let there = Outlook::given_up("file:///a", Some(Lsn::new(9))).line();
        assert!(!away.contains("ANSWERS") && there.contains("ANSWERS") && there.contains("lsn 9"), "{there}");
    }
}
