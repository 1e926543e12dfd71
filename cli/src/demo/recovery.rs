//! What people do after the disaster: they promote the mirror, or start the node again, and write.
//!
//! Invariants:
//! - A recovery ends when a new file is durable in what came back, not when a command returns.

use std::path::Path;

use serde_json::Value;

use super::{
    Stage,
    judge::Position,
    nodes::{Node, Served, clock, number},
    operations::Operation,
    place::murphy,
};
use crate::error::CliError;

/// What came back.
pub(super) struct Recovered {
    /// Up to where it had everything when it began anew.
    pub(super) position: Position,
    /// The last that it had heard of the source.
    pub(super) source_lsn: u64,
    /// Entries in its log.
    pub(super) entries: u64,
    pub(super) took_ms: u64,
}

/// Promotes the mirror in region B, after the plan was shown.
pub(super) fn promote(stage: &Stage, b: &Node, name: &str) -> Result<Recovered, CliError> {
    let start = clock();
    let command = |options: &[&str]| -> Result<String, CliError> {
        stage.place.run(murphy("promote")?.arg(&b.directory).args(options))
    };
    stage.note(&format!("$ murphy promote {} --dry-run", b.directory.display()));
    stage.note(command(&["--dry-run"])?.trim_end());
    stage.note(&format!("$ murphy promote {} --confirm {name} --json", b.directory.display()));
    let said = command(&["--confirm", name, "--json"])?;
    let done: Value = serde_json::from_str(&said).map_err(CliError::new)?;
    let position =
        Position { metadata_lsn: number(&done, "metadata_lsn")?, data_lsn: number(&done, "data_lsn")? };
    let source_lsn = number(&done, "source_lsn")?;
    stage.note(&format!(
        "metadata position lsn {}, data position lsn {}, source last known lsn {source_lsn}; source of {name} in epoch {} now",
        position.metadata_lsn, position.data_lsn, done["epoch"]
    ));
    write_again(b)?;
    let took_ms = start.elapsed().as_millis() as u64;
    Ok(Recovered { position, source_lsn, entries: b.durable_lsn()?, took_ms })
}

/// Starts a node again whose process was killed. Its disk has everything.
pub(super) fn restart(stage: &Stage, node: Node) -> Result<(Served, Recovered), CliError> {
    let start = clock();
    let served = Served::start(&stage.place, node, &[])?;
    let entries = served.node.durable_lsn()?;
    write_again(&served.node)?;
    let took_ms = start.elapsed().as_millis() as u64;
    let position = Position { metadata_lsn: entries, data_lsn: entries };
    Ok((served, Recovered { position, source_lsn: entries, entries, took_ms }))
}

/// A new file, durable when this returns.
fn write_again(node: &Node) -> Result<(), CliError> {
    node.apply(&Operation::Write { path: "back-again".into(), seed: 1, length: 100 }, Path::new(""))
}
