//! `fsck`: whether a node holds what its log says, and whether that is a sound tree.
//!
//! Invariants:
//! - Nothing is changed. Everything is read from one view, while writes go on.
//! - Memory grows with the number of packs and of directories, not with that of files.

mod packs;

use murphy_fs::{
    DigestCheck, FINDINGS_MAX, IndexSnapshot, NameHasher, Table, check_digest, check_digest_while,
    check_tree_with,
};
use murphy_log::{Log, Lsn, State, VolumeKeys};
use murphy_mirror::Identity;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use self::packs::Look;
use crate::{
    error::{CliError, failed},
    node::Node,
    units::bytes_text,
};

/// Something that is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Finding {
    /// What is wrong, with numbers.
    pub(crate) finding: String,
}

impl Finding {
    pub(crate) fn text(&self) -> String {
        self.finding.clone()
    }
}

/// What was checked.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) lsn: u64,
    pub(crate) digest: String,
    pub(crate) inodes: u64,
    pub(crate) names: u64,
    pub(crate) extents: u64,
    pub(crate) packs: u64,
    /// Bytes of packs that were read and verified.
    pub(crate) verified_bytes: u64,
    pub(crate) findings: u64,
}

impl Summary {
    /// The summary for people.
    pub(crate) fn text(&self) -> String {
        let verified = match self.verified_bytes {
            0 => String::new(),
            bytes => format!(", {} of them verified", bytes_text(bytes)),
        };
        let found = match self.findings {
            0 => "sound".to_owned(),
            count => format!("{count} findings"),
        };
        format!(
            "{found} at lsn {}: {} inodes, {} names, {} extents, {} packs{verified}; digest {}",
            self.lsn, self.inodes, self.names, self.extents, self.packs, self.digest
        )
    }
}

/// Where findings go; no more than a limit.
struct Findings<'a> {
    found: &'a mut dyn FnMut(Finding),
    count: usize,
}

impl Findings<'_> {
    fn add(&mut self, text: String) {
        self.count += 1;
        match self.count {
            ..=FINDINGS_MAX => (self.found)(Finding { finding: text }),
            _ if self.count == FINDINGS_MAX + 1 => {
                (self.found)(Finding { finding: "more, which are counted and not listed".to_owned() });
            }
            _ => {}
        }
    }
}

/// What a comparison of an index with its log has shown.
pub(crate) struct Compared {
    /// What the index held.
    pub(crate) lsn: Lsn,
    /// How many rows were read.
    pub(crate) rows: u64,
    /// In what it is not what the log says; `None` if it is.
    pub(crate) differs: Option<String>,
}

/// Compares every row of `snapshot` with what the log says of all of them, by one thread that asks `go_on` now and then; `None` once that says
/// no.
pub(crate) fn compare_index(
    snapshot: &dyn IndexSnapshot,
    keys: &VolumeKeys,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<Compared>, CliError> {
    let state = state_of(snapshot)?;
    let found = check_digest_while(snapshot, keys, go_on).map_err(failed)?;
    Ok(found.map(|found| Compared {
        lsn: state.position.lsn,
        rows: found.rows.values().sum(),
        differs: differs(&found, &state),
    }))
}

fn state_of(snapshot: &dyn IndexSnapshot) -> Result<State, CliError> {
    snapshot.state().ok_or_else(|| CliError::new("the tree has no state to be compared with"))
}

fn differs(found: &DigestCheck, state: &State) -> Option<String> {
    (found.digest != state.digest).then(|| {
        format!(
            "the index has digest {}, the log says {} at lsn {}",
            found.digest, state.digest, state.position.lsn
        )
    })
}

/// Checks an open node and hands out what is wrong; with `data` every pack is read too.
pub(crate) fn check(
    node: &Node,
    data: bool,
    runtime: &Handle,
    found: &mut dyn FnMut(Finding),
) -> Result<Summary, CliError> {
    let mut findings = Findings { found, count: 0 };
    let view = node.volume.view_with_state();
    let state = state_of(&view)?;
    let digest = check_digest(&view, &node.keys).map_err(failed)?;
    if let Some(text) = differs(&digest, &state) {
        findings.add(text);
    }
    check_log(node, &mut findings);
    match Identity::load_existing(&node.directory) {
        Ok(Some(_)) => {}
        // It is nobody's.
        Ok(None) if node.config.is_branch() => {}
        Ok(None) => findings.add(
            "the identity is missing: the next start makes another one, which nobody knows; put the old one back"
                .to_owned(),
        ),
        Err(error) => findings.add(error.to_string()),
    }
    let rows = |table: Table| digest.rows.get(&table.number()).copied().unwrap_or(0);
    let hasher = NameHasher::of(&node.keys);
    let tree =
        check_tree_with(&view, &hasher, &mut |finding| findings.add(finding.to_string())).map_err(failed)?;
    let look = if data { Look::Cells } else { Look::All };
    let verified_bytes = packs::check_packs(node, &view, look, runtime, &mut findings)?;
    Ok(Summary {
        lsn: state.position.lsn.get(),
        digest: digest.digest.to_string(),
        inodes: rows(Table::Inode),
        names: tree.names,
        extents: rows(Table::Extent),
        packs: rows(Table::Pack),
        verified_bytes,
        findings: findings.count as u64,
    })
}

/// The packs that the tree of a node refers to and its store does not have, without those that the tree knows to be lost.
pub(crate) fn missing_packs(node: &Node, runtime: &Handle) -> Result<Vec<String>, CliError> {
    let mut missing = Vec::new();
    let mut found = |finding: Finding| missing.push(finding.finding);
    let mut findings = Findings { found: &mut found, count: 0 };
    packs::check_packs(node, &node.volume.view_with_state(), Look::Unknown, runtime, &mut findings)?;
    Ok(missing)
}

/// Reads every frame of the log: what is older than the index is read by nobody else until it is needed.
fn check_log(node: &Node, findings: &mut Findings<'_>) {
    let frames = match node.log.read(node.log.first()) {
        Ok(frames) => frames,
        Err(error) => return findings.add(error.to_string()),
    };
    if let Some(error) = frames.into_iter().find_map(Result::err) {
        findings.add(error.to_string());
    }
}
