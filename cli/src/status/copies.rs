//! What is known of the copies of a node: its archives and its mirrors.
//!
//! Invariants:
//! - What is not known is not shown as a number.

use std::time::Duration;

use murphy_backup::{Proof, RESTORE};
use murphy_log::LogTime;
use serde::{Deserialize, Serialize};

use crate::units::{span_text, took_text};

/// What is known of an archive.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ArchiveStatus {
    pub(crate) url: String,
    pub(crate) log_only: bool,
    /// What dies together with it.
    pub(crate) domain: String,
    /// Up to where it restores; 0 if that is not known.
    pub(crate) lsn: u64,
    pub(crate) lag_ms: Option<u64>,
    pub(crate) error: Option<String>,
    /// The newest proof that somebody has left in it, as far as it was asked.
    #[serde(default)]
    pub(crate) proof: Option<ProofStatus>,
    /// It was asked, and has none.
    #[serde(default)]
    pub(crate) never_proven: bool,
}

/// What somebody has done with an archive to see that it can be restored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ProofStatus {
    /// `verify`, `restore`.
    pub(crate) kind: String,
    /// Up to where it holds.
    pub(crate) lsn: u64,
    /// How long ago it ended.
    pub(crate) seconds_ago: u64,
    /// How long it took.
    pub(crate) took_ms: u64,
    /// Of how many percent of the packs the contents were read.
    pub(crate) data_percent: u8,
    /// How much was wrong.
    pub(crate) findings: u64,
}

impl ProofStatus {
    /// The same, as of `now`.
    pub(crate) fn of(proof: &Proof, now: LogTime) -> ProofStatus {
        let (began, ended) = (LogTime::from_nanos(proof.began), LogTime::from_nanos(proof.ended));
        ProofStatus {
            kind: proof.kind.clone(),
            lsn: proof.position.lsn,
            seconds_ago: now.since(ended).as_secs(),
            took_ms: u64::try_from(ended.since(began).as_millis()).unwrap_or(u64::MAX),
            data_percent: proof.data_percent,
            findings: proof.findings.len() as u64,
        }
    }

    fn text(&self) -> String {
        let ProofStatus { lsn, data_percent, findings, .. } = self;
        let age = span_text(Duration::from_secs(self.seconds_ago));
        let took = took_text(Duration::from_millis(self.took_ms));
        let done = match self.kind.as_str() {
            RESTORE => "restored",
            _ => "verified",
        };
        match findings {
            0 => format!(
                "{done} up to lsn {lsn} {age} ago, in {took}, with {data_percent} % of its packs read"
            ),
            count => format!("found damaged {age} ago: {count} findings up to lsn {lsn} (murphy verify)"),
        }
    }
}

impl ArchiveStatus {
    /// What is known of whether it can be restored; `None` if it was not asked.
    pub(crate) fn proof_text(&self) -> Option<String> {
        match &self.proof {
            Some(proof) => Some(proof.text()),
            None => self.never_proven.then(|| "never verified nor restored".to_owned()),
        }
    }

    /// The archive for people.
    pub(crate) fn text(&self) -> String {
        let state = match (&self.error, self.lag_ms) {
            (Some(error), _) => error.clone(),
            (None, Some(lag)) => format!("lsn {}, {lag} ms behind", self.lsn),
            (None, None) if self.lsn == 0 => "not known yet how far it is".to_owned(),
            (None, None) => format!("lsn {}", self.lsn),
        };
        let kind = if self.log_only { " (log only)" } else { "" };
        let proof = self.proof_text().map(|proof| format!("; {proof}")).unwrap_or_default();
        format!("{}{kind}: {state}{proof}", self.url)
    }
}

/// What is known of a mirror.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct MirrorStatus {
    pub(crate) node: String,
    pub(crate) metadata_lsn: u64,
    pub(crate) data_lsn: u64,
    pub(crate) lag_ms: Option<u64>,
    #[serde(default)]
    pub(crate) connected: bool,
    /// Where it listens, as far as it has said.
    #[serde(default)]
    pub(crate) addresses: Vec<String>,
    /// What its copy dies with, as it says: its machine, and its block store.
    #[serde(default)]
    pub(crate) domains: Vec<String>,
    /// Why it does not follow, as it said when it was told who leads.
    #[serde(default)]
    pub(crate) refuses: Option<String>,
}

impl MirrorStatus {
    pub(super) fn text(&self) -> String {
        let domains = match self.domains.is_empty() {
            true => String::new(),
            false => format!(", in {}", self.domains.join(" and ")),
        };
        let refuses =
            self.refuses.as_ref().map_or_else(String::new, |why| format!("; does not follow: {why}"));
        format!("{}: lsn {}, data {}{domains}{refuses}", self.node, self.metadata_lsn, self.data_lsn)
    }
}

impl MirrorStatus {
    /// Whether its copy is there when everything in the failure domain `lost` is gone. One that has not said where it is counts for nothing.
    pub(super) fn survives(&self, lost: &str) -> bool {
        let is_elsewhere = !self.domains.is_empty() && self.domains.iter().all(|domain| domain != lost);
        self.connected && self.data_lsn > 0 && is_elsewhere
    }
}
