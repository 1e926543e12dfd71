//! `murphy verify`: whether an archive can be restored.
//!
//! Invariants:
//! - The archive is changed by its proof alone.
//! - Whatever is wrong ends with exit code 3.

use jiff::tz::TimeZone;
use murphy_backup::{Archive, ArchiveKind, Finding, OpenArchiveError, VerifyReport, show_time, verify};
use murphy_log::{Clock, LogTime, NodeId, SystemClock};
use tokio::runtime::Runtime;

use super::format::parse_url;
use crate::{
    error::{CliError, Code, failed},
    node::random,
    output::Output,
    places::{check_there, open_store},
    progress::{Progress, ProgressLine},
};

/// Check that an archive holds all that a restore reads, intact
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Check that an archive holds all that a restore reads, intact\n\nEvery slot and snapshot is read; of packs as \
                  many as --data says, none by default: of the others it is only seen that they are there. A log archive has none: it is restored with the block store. Checksums, the chain of the log and what the snapshots name are compared; entries are not replayed: that the tree comes out as each of them says is seen by a restore alone. The result is kept in the archive as a proof. Exits with 3 if anything is wrong.",
    after_help = "Example:\n  murphy verify s3://other-account/home --data 100"
)]
pub(crate) struct VerifyArgs {
    /// The archive
    #[arg(value_name = "URL")]
    url: String,
    /// Read the contents of so many percent of the packs; of the others only that they are there
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    data: u8,
}

pub(crate) fn run(args: &VerifyArgs, output: &Output) -> Result<Code, CliError> {
    let url = parse_url("URL", &args.url)?;
    check_there(&url)?;
    let runtime = Runtime::new().map_err(failed)?;
    let clock = SystemClock::new();
    let began = clock.wall().as_nanos();
    let [a, b, c, d, e, f, g, h, ..] = random()?;
    let seed = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let line = ProgressLine::new(output);
    line.show(&Progress::new("verifying", 0, 0));
    let report = runtime.block_on(async {
        let archive = Archive::open(open_store(&url)?).await.map_err(|error| match error {
            OpenArchiveError::Descriptor { .. } => failed(error).damage().found(),
            error => failed(error),
        })?;
        let report = verify(&archive, args.data, seed).await;
        // Whoever verifies need not be a node of the volume; the proof then names nobody.
        let proof = report.proof(NodeId::default(), args.data, began, clock.wall().as_nanos());
        if let Err(error) = proof.keep(&archive).await {
            output.note(&format!("The proof is not kept: {error}"));
        }
        Ok::<_, CliError>(report)
    })?;
    drop(line);
    output.data(&report, text)?;
    Ok(if report.findings.is_empty() { Code::Done } else { Code::Found })
}

fn text(report: &VerifyReport) -> String {
    let mut lines: Vec<String> = report.findings.iter().map(Finding::to_string).collect();
    let unread = report.packs.saturating_sub(report.packs_read);
    let verdict = verdict(report.findings.len(), unread, report.kind);
    if report.horizon > 0 {
        lines.push(format!(
            "states before lsn {} are not verified: their bytes may be gone; {} packs of theirs are passed over",
            report.horizon, report.packs_below_horizon
        ));
    }
    if report.dead > 0 {
        lines.push(format!(
            "{} slots of a copy of the source, which has lost, are passed over: two processes had one node",
            report.dead
        ));
    }
    lines.extend(report.pins.iter().map(|pin| {
        let since = show_time(LogTime::from_nanos(pin.since), &TimeZone::system());
        format!("pinned from lsn {} on since {since}: {}", pin.lsn, pin.holder)
    }));
    lines.push(format!(
        "{verdict} up to lsn {}: {} slots with {} entries, {} snapshots, {} packs, {} of them read",
        report.position.lsn, report.slots, report.entries, report.snapshots, report.packs, report.packs_read
    ));
    lines.join("\n")
}

/// What so many findings mean in an archive of that kind, with so many packs that are there and were not read.
fn verdict(findings: usize, unread: u64, kind: ArchiveKind) -> String {
    match (findings, unread) {
        (0, _) if kind == ArchiveKind::Log => {
            "everything was read, and is intact; it is restored with the block store (restore --blocks): a log archive holds no packs"
                .to_owned()
        }
        (0, 0) => "everything was read, and is intact".to_owned(),
        (0, _) => format!(
            "nothing wrong was found, but {unread} packs were not read, only seen to be there (--data 100 reads them)"
        ),
        (_, 0) => format!("{findings} findings"),
        _ => format!("{findings} findings, and {unread} packs were not read"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: an operator trusts an archive of which no byte of data was read.
    #[test]
    fn what_was_not_read_is_not_called_good() {
        let (full, log) = (ArchiveKind::Full, ArchiveKind::Log);
        let unread = verdict(0, 5, full);
        assert!(unread.contains("5 packs were not read") && unread.contains("--data 100"), "{unread}");
        assert!(!unread.contains("intact"), "{unread}");
        assert_eq!(verdict(0, 0, full), "everything was read, and is intact");
        let found = verdict(2, 5, full);
        assert!(found.contains("2 findings") && found.contains("5 packs were not read"), "{found}");
        assert!(verdict(0, 0, log).contains("with the block store") && verdict(2, 0, log) == "2 findings");
    }
}
