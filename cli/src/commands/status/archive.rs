//! `murphy status URL`: what an archive holds, asked without a node.
//!
//! Invariants:
//! - The archive is not changed.
//! - No clock is believed to say whether the source lives.
//! - One of which nothing can be restored, or that is damaged on the way to its last moment, ends with exit code 3.

use std::time::Duration;

use jiff::tz::TimeZone;
use murphy_backup::{Archive, ArchiveKind, Holdings, Moment, OpenArchiveError, holdings};
use murphy_fs::StoreUrl;
use murphy_log::{Clock, SystemClock};
use tokio::runtime::Runtime;

use crate::{
    error::{CliError, Code, failed},
    output::Output,
    places::{check_there, open_store},
    units::{bytes_text, span_text},
};

pub(super) fn run(url: &StoreUrl, output: &Output) -> Result<Code, CliError> {
    check_there(url)?;
    let runtime = Runtime::new().map_err(failed)?;
    let held = runtime.block_on(async {
        let archive = Archive::open(open_store(url)?).await.map_err(|error| match error {
            OpenArchiveError::Descriptor { .. } => failed(error).damage().found(),
            error => failed(error),
        })?;
        holdings(&archive, SystemClock::new().wall(), &TimeZone::system()).await.map_err(failed)
    })?;
    output.data(&held, text)?;
    let is_sound = held.problems.is_empty() && held.last.is_some();
    Ok(if is_sound { Code::Done } else { Code::Found })
}

fn text(held: &Holdings) -> String {
    let kind = match held.kind {
        ArchiveKind::Full => "log, snapshots and packs",
        ArchiveKind::Log => "log and snapshots, no packs (restored with the block store)",
    };
    let mut lines = vec![
        line("volume", &format!("{} ({}), branch {}", held.name, held.volume, held.branch)),
        line("archive", &format!("{}: {kind}", held.url)),
        line("", &format!("made {}, dies with {}", held.created, held.failure_domain)),
    ];
    match (&held.first, &held.last) {
        (Some(first), Some(last)) => {
            lines.push(line("restores", &format!("from  {}", moment(first))));
            lines.push(line("", &format!("to    {}", moment(last))));
        }
        (None, Some(last)) => lines.push(line("restores", &format!("to {}", moment(last)))),
        (_, None) => lines.push(line("restores", "nothing")),
    }
    if held.horizon > 0 {
        let horizon = held.horizon;
        lines.push(line("", &format!("of what was before lsn {horizon} bytes of files may be gone")));
    }
    lines.push(line("source", &source(held)));
    lines.push(line(
        "snapshots",
        &match held.snapshots.last() {
            None => "none: a restore replays the whole log".to_owned(),
            Some(last) => {
                let (count, inodes, bytes) = (held.snapshots.len(), last.inodes, bytes_text(last.data_bytes));
                format!("{count}, the last one at lsn {}: {inodes} inodes, {bytes} in files", last.moment.lsn)
            }
        },
    ));
    lines.push(line("log", &format!("{} objects, {}", held.log_objects, bytes_text(held.log_bytes))));
    lines.push(line(
        "verified",
        &match &held.verified {
            None => "never (murphy verify URL)".to_owned(),
            Some(last) => {
                let (time, lsn, percent, findings) = (&last.time, last.lsn, last.data_percent, last.findings);
                format!("{time} up to lsn {lsn}, {percent} % of the packs read: {findings} findings")
            }
        },
    ));
    lines.extend(held.pins.iter().map(|pin| line("read by", &pin.holder)));
    lines.extend(held.notes.iter().map(|note| format!("note: {note}")));
    lines.extend(held.problems.iter().map(|problem| format!("problem: {problem}")));
    lines.join("\n")
}

/// Who has ended it, or how its source dated what it wrote last.
fn source(held: &Holdings) -> String {
    if let Some(sealed) = &held.sealed {
        let (node, epoch, time) = (&sealed.node, sealed.next_epoch, &sealed.time);
        return format!("sealed by node {node} for epoch {epoch}, {time}; nothing was archived since");
    }
    match (&held.last, held.age_ms) {
        (Some(last), Some(age)) => dated(last, age),
        _ => "has archived nothing".to_owned(),
    }
}

/// Clocks differ: only what comes while somebody watches is a sign of life.
fn dated(last: &Moment, age_ms: i64) -> String {
    let apart = span_text(Duration::from_millis(age_ms.unsigned_abs()));
    let apart = match age_ms < 0 {
        true => format!("{apart} ahead of this machine's"),
        false => format!("{apart} ago by this machine's"),
    };
    format!(
        "its last entry is dated {} by its own clock ({apart}); whether it lives shows within a minute: run it again, or restore \
         --take-over, which watches",
        last.time
    )
}

fn moment(moment: &Moment) -> String {
    format!("{} (lsn {})", moment.time, moment.lsn)
}

fn line(what: &str, text: &str) -> String {
    format!("{what:<12}{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: people take a source for dead, or alive, because its clock is not theirs.
    #[test]
    fn no_clock_says_whether_a_source_lives() {
        let last = Moment { lsn: 7, time: "2026-01-02 03:04:05".to_owned() };
        for (age_ms, told) in [
            (3_600_000, "60 minutes ago by this machine's"),
            (0, "0 seconds ago by this machine's"),
            (-7_200_000, "2 hours ahead of this machine's"),
        ] {
            let line = dated(&last, age_ms);
            assert!(line.contains("dated 2026-01-02 03:04:05 by its own clock"), "{line}");
            assert!(line.contains(told) && line.contains("whether it lives shows"), "{line}");
            assert!(!line.contains("silent") && !line.contains("lives:"), "{line}");
        }
    }
}
