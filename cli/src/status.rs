//! What a node knows of itself and of its copies, and what that means.
//!
//! Invariants:
//! - The verdict never says more than what is known: a copy that does not answer is not counted as one.

mod copies;

use std::{path::PathBuf, time::Duration};

use murphy_fs::SilentStore;
use serde::{Deserialize, Serialize};

use crate::{
    archive_notes::fenced_before,
    config::Fenced,
    error::{CliError, failed},
    node::Node,
    scrub_notes::{self, ScrubNote},
    settings::Settings,
    units::{APART_MAX, bytes_text, span_text},
};
pub(crate) use copies::{ArchiveStatus, MirrorStatus, ProofStatus};

/// What `status` shows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Who has taken over, if somebody has: then nothing here is the volume any more.
    pub(crate) fenced: Option<String>,
    /// One sentence: what would be lost.
    pub(crate) verdict: String,
    /// Whether there is no copy outside the node's failure domain.
    pub(crate) danger: bool,
    pub(crate) volume: String,
    pub(crate) name: String,
    pub(crate) branch: String,
    pub(crate) role: String,
    pub(crate) directory: PathBuf,
    /// The process that serves it, if there is one.
    pub(crate) running: Option<Running>,
    pub(crate) position: PositionText,
    pub(crate) digest: String,
    pub(crate) durable_lsn: u64,
    pub(crate) inodes: u64,
    pub(crate) bytes: u64,
    /// Bytes that were written and are in no stored pack yet.
    pub(crate) dirty_bytes: u64,
    pub(crate) ack: String,
    /// What an fsync waits for, while `ack` is not in force yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ack_before: Option<String>,
    pub(crate) sync: bool,
    pub(crate) window: String,
    pub(crate) blocks: String,
    /// What dies together with this node.
    pub(crate) failure_domain: String,
    /// What dies together with its block store.
    pub(crate) blocks_domain: String,
    /// What would be left, by what is lost.
    pub(crate) scenarios: Vec<Scenario>,
    pub(crate) archives: Vec<ArchiveStatus>,
    pub(crate) mirrors: Vec<MirrorStatus>,
    pub(crate) branches: Vec<String>,
    /// Where the node listens for others.
    #[serde(default)]
    pub(crate) listen: Option<String>,
    /// Whom a mirror follows.
    #[serde(default)]
    pub(crate) source: Option<SourceStatus>,
    /// A mirror that its source has removed.
    #[serde(default)]
    pub(crate) removed: bool,
    /// What somebody should do.
    #[serde(default)]
    pub(crate) advice: Option<String>,
    /// Up to where a mirror has the log.
    #[serde(default)]
    pub(crate) metadata_lsn: Option<u64>,
    /// Up to where the node has every byte too.
    #[serde(default)]
    pub(crate) data_lsn: Option<u64>,
    /// Why a mirror does not copy packs, if that is so.
    #[serde(default)]
    pub(crate) data_error: Option<String>,
    /// For how long a mirror has been behind its source, or has heard nothing.
    #[serde(default)]
    pub(crate) lag_ms: Option<u64>,
    /// Of a source: how far its log time is ahead of its wall clock; negative if it is behind.
    #[serde(default)]
    pub(crate) log_time_ahead_ms: Option<i64>,
    /// Of a source whose predecessor was lost with bytes: what became of them.
    #[serde(default)]
    pub(crate) packs: Option<PackStatus>,
    /// Packs that had to be read from archives since the process began, because the block store does not give them.
    #[serde(default)]
    pub(crate) packs_from_archives: u64,
    /// Stores that have not answered readers lately.
    #[serde(default)]
    pub(crate) silent_stores: Vec<SilentStoreStatus>,
    /// When the node last compared its index with its log by itself, and what it has found.
    #[serde(default)]
    pub(crate) scrubbed: Option<ScrubStatus>,
}

/// The last scrub.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ScrubStatus {
    /// Up to where index and log were compared.
    pub(crate) lsn: u64,
    /// How long ago it ended.
    pub(crate) seconds_ago: u64,
    pub(crate) took_ms: u64,
    /// What was wrong.
    pub(crate) trouble: Option<String>,
}

impl ScrubStatus {
    fn line(&self) -> String {
        let found = self.trouble.as_deref().unwrap_or("index and log are sound");
        format!("lsn {}, {} ago: {found}", self.lsn, span_text(Duration::from_secs(self.seconds_ago)))
    }
}

impl From<ScrubNote> for ScrubStatus {
    fn from(note: ScrubNote) -> ScrubStatus {
        let seconds_ago = note.age().as_secs();
        ScrubStatus { lsn: note.lsn, seconds_ago, took_ms: note.took_ms, trouble: note.trouble() }
    }
}

/// A store that is asked for packs after all others, until it answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SilentStoreStatus {
    pub(crate) url: String,
    pub(crate) silent_ms: u64,
}

impl SilentStoreStatus {
    fn line(&self) -> String {
        let seconds = self.silent_ms / 1000;
        format!("{}: no answer to readers for {seconds} s; it is asked last until it answers", self.url)
    }
}

impl From<SilentStore> for SilentStoreStatus {
    fn from(store: SilentStore) -> SilentStoreStatus {
        let silent_ms = u64::try_from(store.silent_for.as_millis()).unwrap_or(u64::MAX);
        SilentStoreStatus { url: store.label, silent_ms }
    }
}

/// Packs that were lost with a source, or might have been.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct PackStatus {
    /// Found since the process began.
    pub(crate) found: u64,
    /// Still asked for.
    pub(crate) wanted: u64,
    /// Nobody has them.
    pub(crate) missing: u64,
}

/// A source, as its mirror sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SourceStatus {
    pub(crate) address: String,
    pub(crate) connected: bool,
    /// The last entry known to be durable there.
    pub(crate) lsn: u64,
    pub(crate) error: Option<String>,
}

impl SourceStatus {
    fn text(&self) -> String {
        let state = match (&self.error, self.connected) {
            (_, true) => "connected",
            (Some(error), false) => error,
            (None, false) => "not connected",
        };
        format!("{}: lsn {}, {state}", self.address, self.lsn)
    }
}

/// The process that serves a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Running {
    pub(crate) pid: u32,
    pub(crate) mounts: Vec<PathBuf>,
    /// Whether it ends with its last mount.
    pub(crate) ends_with_mounts: bool,
}

/// A position for programs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct PositionText {
    pub(crate) epoch: u32,
    pub(crate) epoch_id: String,
    pub(crate) lsn: u64,
    pub(crate) hash: String,
}

impl PositionText {
    pub(crate) fn new(position: &murphy_log::Position) -> PositionText {
        PositionText {
            epoch: position.epoch.number,
            epoch_id: position.epoch.id.to_string(),
            lsn: position.lsn.get(),
            hash: position.hash.to_string(),
        }
    }
}

/// What the loss of a failure domain would mean.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Scenario {
    /// What is lost.
    pub(crate) lost: String,
    /// Up to where a copy elsewhere has everything, bytes included; `None` if there is no copy.
    pub(crate) restorable_lsn: Option<u64>,
    /// The same in words.
    pub(crate) outcome: String,
}

/// The status of an open node.
pub(crate) fn of(
    node: &Node,
    running: Option<Running>,
    archives: Vec<ArchiveStatus>,
) -> Result<Status, CliError> {
    let settings = Settings::of(&node.volume)?;
    let state = node.volume.state();
    let failure_domain = node.failure_domain()?;
    let mut status = Status {
        fenced: fenced_before(&node.directory)?.or_else(|| node.config.fenced.as_ref().map(Fenced::text)),
        verdict: String::new(),
        danger: false,
        volume: node.config.volume.to_string(),
        name: settings.name.clone(),
        branch: node.config.branch.to_string(),
        role: node.config.role.as_str().to_owned(),
        directory: std::path::absolute(&node.directory).map_err(failed)?,
        running,
        position: PositionText::new(&state.position),
        digest: state.digest.to_string(),
        durable_lsn: node.volume.durable().lsn.get(),
        inodes: state.usage.inodes,
        bytes: state.usage.bytes,
        dirty_bytes: node.volume.dirty_bytes(),
        ack: settings.ack.to_string(),
        ack_before: None,
        sync: settings.sync,
        window: settings.window.clone(),
        blocks: node.config.blocks.to_string(),
        failure_domain: failure_domain.to_string(),
        blocks_domain: node.config.blocks.failure_domain().to_string(),
        scenarios: Vec::new(),
        archives,
        mirrors: Vec::new(),
        branches: Vec::new(),
        listen: None,
        source: None,
        removed: node.config.removed,
        advice: None,
        metadata_lsn: None,
        data_lsn: None,
        data_error: None,
        lag_ms: None,
        log_time_ahead_ms: None,
        packs: None,
        packs_from_archives: 0,
        silent_stores: Vec::new(),
        scrubbed: scrub_notes::load(&node.directory).map(ScrubStatus::from),
    };
    judge(&mut status);
    Ok(status)
}

/// Says anew what the copies are worth, after more of them are known.
pub(crate) fn judge_again(status: &mut Status) {
    judge(status);
    if status.role == "mirror" {
        let data = status.data_lsn.unwrap_or(0);
        let from = status.source.as_ref().map_or("its source", |source| source.address.as_str());
        status.danger = false;
        status.verdict = match status.removed {
            true => format!("REMOVED: no mirror of {from} any more; it holds everything up to lsn {data}"),
            false => format!("A mirror of {from}: everything up to lsn {data} survives its loss"),
        };
        status.advice = advice(status);
    }
    if let Some(trouble) = status.scrubbed.as_ref().and_then(|scrubbed| scrubbed.trouble.clone()) {
        status.danger = true;
        status.verdict = format!("DAMAGED: {trouble}. {}", status.verdict);
        status.advice = Some(MEND.to_owned());
    }
}

/// What to do about a mirror that does not follow.
fn advice(status: &Status) -> Option<String> {
    let follows = status.source.as_ref().is_some_and(|source| source.connected);
    if status.removed {
        return Some(JOIN_ELSEWHERE.to_owned());
    }
    if follows || status.running.is_none() {
        return None;
    }
    let lost =
        "the source does not answer. If it is gone for good, murphy promote makes this node the source";
    let listens = match status.listen {
        Some(_) => {
            "If another mirror has taken over, that one tells this one within moments whom to follow; if it does not,"
        }
        None => "If another mirror has taken over, this one does not hear of it, since it does not listen:",
    };
    Some(format!("{lost}. {listens} {JOIN_AGAIN} and follow it"))
}

/// Says what the copies are worth, for the loss of each thing that the node stands on.
fn judge(status: &mut Status) {
    let mut domains = vec![status.failure_domain.clone(), status.blocks_domain.clone()];
    domains.dedup();
    status.scenarios = domains.into_iter().map(|lost| scenario(status, lost)).collect();
    status.danger = status.scenarios.iter().any(|scenario| scenario.restorable_lsn.is_none());
    let worst = status.scenarios.iter().min_by_key(|scenario| scenario.restorable_lsn);
    if let Some(reason) = &status.fenced {
        status.danger = true;
        status.verdict = format!("FENCED: another source has taken over: {reason}");
        return;
    }
    status.verdict = worst.map_or_else(String::new, |scenario| match scenario.restorable_lsn {
        Some(_) => format!("Safe: {}", scenario.outcome),
        None => format!("DANGER: {}", scenario.outcome),
    });
}

/// What is left when everything in the failure domain `lost` is.
fn scenario(status: &Status, lost: String) -> Scenario {
    let survives = |archive: &&ArchiveStatus| {
        // A log archive needs the packs of the block store.
        let bytes = !archive.log_only || status.blocks_domain != lost;
        archive.domain != lost && bytes && archive.lsn > 0 && archive.error.is_none()
    };
    let archive = status.archives.iter().filter(survives).max_by_key(|archive| archive.lsn);
    let mirror = status.mirrors.iter().filter(|mirror| mirror.survives(&lost));
    let mirror = mirror.max_by_key(|mirror| mirror.data_lsn);
    let best = archive.map(|archive| (archive.lsn, archive.url.clone(), archive.proof_text()));
    let best = best.max(mirror.map(|mirror| (mirror.data_lsn, format!("mirror {}", mirror.node), None)));
    match best {
        Some((lsn, place, proof)) => {
            let behind = status.durable_lsn.saturating_sub(lsn);
            let proof = proof.map(|proof| format!("; it was {proof}")).unwrap_or_default();
            let unstored = match status.dirty_bytes {
                0 => String::new(),
                bytes => format!(", and {} that are not stored yet", bytes_text(bytes)),
            };
            let outcome = format!(
                "without {lost}, {place} has everything up to lsn {lsn}; {behind} entries would be lost{unstored}{proof}"
            );
            Scenario { lost, restorable_lsn: Some(lsn), outcome }
        }
        None => {
            let outcome = format!("no copy outside {lost}: if it is lost, everything is");
            Scenario { lost, restorable_lsn: None, outcome }
        }
    }
}

impl Status {
    /// The status for people.
    pub(crate) fn text(&self) -> String {
        let mut lines = vec![self.verdict.clone()];
        lines.extend(self.advice.clone());
        lines.push(String::new());
        lines.extend(self.other_scenarios());
        let mut row = |name: &str, value: String| lines.push(format!("{name:<14}{value}"));
        row("volume", format!("{} ({})", self.name, self.volume));
        row("branch", self.branch.clone());
        row("role", self.role.clone());
        row("node", self.directory.display().to_string());
        match &self.running {
            Some(running) => {
                row("process", running.pid.to_string());
                running.mounts.iter().for_each(|mount| row("mount", mount.display().to_string()));
            }
            None => row("process", "none; nothing is served".to_owned()),
        }
        row("position", format!("lsn {} in epoch {}", self.position.lsn, self.position.epoch));
        row("durable", format!("lsn {}", self.durable_lsn));
        row("digest", self.digest.clone());
        row("tree", format!("{} inodes, {}", self.inodes, bytes_text(self.bytes)));
        if self.dirty_bytes > 0 {
            row("not stored", bytes_text(self.dirty_bytes));
        }
        row("fsync waits", self.fsync_text());
        row("window", self.window.clone());
        row("blocks", self.blocks.clone());
        self.archives.iter().for_each(|archive| row("archive", archive.text()));
        self.mirrors.iter().for_each(|mirror| row("mirror", mirror.text()));
        if let Some(listen) = &self.listen {
            row("listens", listen.clone());
        }
        self.source.iter().for_each(|source| row("source", source.text()));
        if let Some(data) = self.data_lsn {
            let trouble = self.data_error.as_ref().map(|error| format!(", not copied further: {error}"));
            row("data", format!("lsn {data}{}", trouble.unwrap_or_default()));
        }
        if let Some(PackStatus { found, wanted, missing }) = self.packs {
            row("lost packs", format!("{missing} missing, {wanted} asked for, {found} found"));
        }
        if self.packs_from_archives > 0 {
            let count = self.packs_from_archives;
            row(
                "packs",
                format!(
                    "{count} read from archives: the block store did not give them intact, or not in time (murphy fsck --data says whether it has them)"
                ),
            );
        }
        let scrubbed = self.scrubbed.as_ref().map_or_else(|| "not yet".to_owned(), ScrubStatus::line);
        row("scrubbed", scrubbed);
        self.silent_stores.iter().for_each(|store| row("silent", store.line()));
        self.clock_text().into_iter().for_each(|clock| row("clock", clock));
        self.lag_ms.iter().for_each(|lag| row("behind", format!("{lag} ms")));
        self.branches.iter().for_each(|branch| row("branch", branch.clone()));
        lines.join("\n")
    }

    /// What else may be lost than what the verdict says, and an empty line behind it.
    fn other_scenarios(&self) -> Vec<String> {
        let others = self.scenarios.iter().filter(|scenario| !self.verdict.ends_with(&scenario.outcome));
        let mut lines: Vec<String> = others.map(|scenario| format!("  {}", scenario.outcome)).collect();
        lines.extend((!lines.is_empty()).then(String::new));
        lines
    }

    /// What people should know of the clocks of a source, if they do not agree.
    fn clock_text(&self) -> Option<String> {
        let ahead = self.log_time_ahead_ms?;
        let apart = Duration::from_millis(ahead.unsigned_abs());
        let how = if ahead > 0 { "ahead of" } else { "behind" };
        (apart > APART_MAX).then(|| {
            format!(
                "log time is {} {how} the wall clock; --at means log time (docs/semantics.md, Clocks)",
                span_text(apart)
            )
        })
    }

    /// What an fsync waits for.
    fn fsync_text(&self) -> String {
        let every = if self.sync { ", every operation" } else { "" };
        match &self.ack_before {
            None => format!("{}{every}", self.ack),
            Some(before) => {
                format!("{before}{every}; {} is set, and not in force yet (murphy ack)", self.ack)
            }
        }
    }
}

/// How a mirror comes back that was removed.
const JOIN_ELSEWHERE: &str = "stop this node, and murphy join in a new directory, with a token of murphy invite at the source and with --blocks as shown here: no pack is copied again. If they lie in this directory, as without --blocks, do not delete it. It keeps what it holds";
/// What to do about a node whose scrub has found damage.
const MEND: &str = "start this node again while an archive or another member answers: its index is made anew from its log, and what is damaged in its log is fetched from there";
/// How a mirror comes to another source.
const JOIN_AGAIN: &str = "stop this node, and murphy join DIR with a token of murphy invite at the source";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A source at lsn 100, on a machine that its block store shares.
    fn source() -> Status {
        let status = json!({
            "fenced": null, "verdict": "", "danger": false, "volume": "v", "name": "home", "branch": "b",
            "role": "source", "directory": "/srv/home", "running": null,
            "position": { "epoch": 1, "epoch_id": "e", "lsn": 100, "hash": "h" },
            "digest": "d", "durable_lsn": 100, "inodes": 1, "bytes": 0, "dirty_bytes": 0, "ack": "local",
            "sync": false, "window": "30d", "blocks": "file:///srv/blocks", "failure_domain": "here",
            "blocks_domain": "here", "scenarios": [], "archives": [], "mirrors": [], "branches": [],
        });
        serde_json::from_value(status).unwrap()
    }

    fn judged(archives: &[(&str, bool, Option<&str>)], mirrors: &[bool]) -> Status {
        let elsewhere: Vec<_> =
            mirrors.iter().map(|connected| (*connected, &["there", "over there"][..])).collect();
        judged_in(archives, &elsewhere)
    }

    fn judged_in(archives: &[(&str, bool, Option<&str>)], mirrors: &[(bool, &[&str])]) -> Status {
        let mut status = source();
        status.archives = archives
            .iter()
            .map(|(domain, log_only, error)| ArchiveStatus {
                url: format!("s3://{domain}"),
                log_only: *log_only,
                domain: (*domain).to_owned(),
                lsn: 90,
                lag_ms: None,
                error: error.map(str::to_owned),
                never_proven: false,
                proof: None,
            })
            .collect();
        status.mirrors = mirrors
            .iter()
            .map(|(connected, domains)| MirrorStatus {
                node: "m".to_owned(),
                addresses: Vec::new(),
                domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
                metadata_lsn: 100,
                data_lsn: 95,
                lag_ms: Some(0),
                connected: *connected,
                refuses: None,
            })
            .collect();
        judge(&mut status);
        status
    }

    /// The fear: the verdict says that all is safe, and the copy that it counts on has been dead for a week.
    #[test]
    fn a_copy_that_does_not_answer_is_not_counted() {
        assert!(judged(&[], &[]).danger);
        assert!(judged(&[("here", false, None)], &[]).danger, "it dies with the node");
        assert!(judged(&[("there", true, None)], &[]).danger, "its bytes die with the node");
        assert!(judged(&[("there", false, Some("no answer"))], &[]).danger);
        assert!(judged(&[], &[false]).danger);
        let safe = judged(&[("there", false, None)], &[false]);
        assert_eq!((safe.danger, safe.scenarios[0].restorable_lsn), (false, Some(90)));
        let best = judged(&[("there", false, None)], &[false, true]);
        assert_eq!(best.scenarios[0].restorable_lsn, Some(95));
        assert!(best.verdict.contains("5 entries would be lost"), "{}", best.verdict);
    }

    /// The fear: a mirror on the same machine, or above the same account, is taken for the copy that outlives it.
    #[test]
    fn a_mirror_that_dies_with_the_same_thing_is_not_counted() {
        for domains in [&["here", "there"][..], &["there", "here"], &["here"], &[]] {
            assert!(judged_in(&[], &[(true, domains)]).danger, "{domains:?}");
        }
        assert!(!judged_in(&[], &[(true, &["here"]), (true, &["there"])]).danger);
        // Each loss is judged by itself.
        let mut status = judged_in(&[], &[(true, &["over there", "account"])]);
        status.blocks_domain = "account".to_owned();
        judge(&mut status);
        let restorable: Vec<_> = status.scenarios.iter().map(|scenario| scenario.restorable_lsn).collect();
        assert_eq!((restorable, status.danger), (vec![Some(95), None], true));
    }

    #[test]
    fn a_source_that_was_replaced_is_never_safe() {
        let mut status = judged(&[("there", false, None)], &[true]);
        status.fenced = Some("sealed at 7".to_owned());
        judge(&mut status);
        assert!(status.danger && status.verdict.contains("another source has taken over: sealed at 7"));
    }

    /// The fear: a source whose clock was once wrong dates its log a year ahead, and nobody hears of it before somebody wants a moment back.
    #[test]
    fn a_log_time_that_is_not_the_wall_clock_is_told() {
        let line = |ahead| Status { log_time_ahead_ms: ahead, ..source() }.clock_text();
        for agree in [None, Some(0), Some(60_000), Some(-60_000)] {
            assert_eq!(line(agree), None);
        }
        let (ahead, behind) = (line(Some(7_200_000)).unwrap(), line(Some(-90_000)).unwrap());
        assert!(ahead.starts_with("log time is 2 hours ahead of the wall clock"), "{ahead}");
        assert!(behind.starts_with("log time is 90 seconds behind the wall clock"), "{behind}");
        assert!(line(Some(i64::MIN)).is_some());
        let status = Status { log_time_ahead_ms: Some(7_200_000), ..source() };
        assert!(status.text().contains("clock         log time is 2 hours ahead"), "{}", status.text());
    }
}
