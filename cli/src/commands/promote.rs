//! `murphy promote`: making a mirror the source.
//!
//! Invariants:
//! - Nothing is changed before the volume's name was given, by somebody who could see the plan.

use std::path::PathBuf;

use serde_json::Value;

use super::source::node_of;
use crate::{
    control::Request,
    error::{CliError, Code},
    mirrors::PromoteOrder,
    output::Output,
    serve,
};

/// Make a mirror the source, after its source is gone
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Make a mirror the source, after its source is gone\n\nPrints what the mirror holds and what would be lost, asks for the \
                  volume's name, seals the archives and whoever could still acknowledge to the old source, and begins the \
                  next epoch. \
                  Mounts stay and take writes. An old source that comes back stops.\n\nOne that fails on the way is not taken \
                  back: who has promised the next epoch, and what was sealed, takes nothing from the old source any more, so that \
                  its fsyncs may fail, or it stops, though nobody has replaced it. Run it again: it goes on with the same epoch. \
                  If this mirror cannot finish, promote another one, with --assume-lost and this one's id if it has sealed an archive.",
    after_help = "Example:\n  murphy promote /srv/home --dry-run"
)]
pub(crate) struct PromoteArgs {
    /// The directory of the mirror, served or not, or its mount point
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Only print the plan; archives are asked, members are not
    #[arg(long)]
    dry_run: bool,
    /// The volume's name, instead of asking for it
    #[arg(long, value_name = "NAME")]
    confirm: Option<String>,
    /// Give up a member, or an archive by its URL, that does not answer: what only it has acknowledged is lost
    #[arg(long, value_name = "MEMBER|URL")]
    assume_lost: Vec<String>,
}

pub(crate) fn run(args: &PromoteArgs, output: &Output) -> Result<Code, CliError> {
    let directory = node_of(&args.directory)?;
    let order = |dry_run| Request::Promote(PromoteOrder { dry_run, assume_lost: args.assume_lost.clone() });
    let plan = serve::ask(&directory, &order(true), output, |_| Ok(()))?;
    if args.dry_run {
        output.data(&plan, text)?;
        return Ok(Code::Done);
    }
    if !output.is_json() {
        output.note(&text(&plan));
    }
    let effect = "this mirror becomes the source; the one before is shut out for good";
    output.confirm(args.confirm.as_deref(), plan["name"].as_str().unwrap_or_default(), effect)?;
    let done = serve::ask(&directory, &order(false), output, |_| Ok(()))?;
    output.data(&done, |done| {
        format!(
            "source of {} since lsn {}, in epoch {}",
            done["name"].as_str().unwrap_or_default(),
            done["metadata_lsn"],
            done["epoch"]
        )
    })?;
    Ok(Code::Done)
}

fn text(plan: &Value) -> String {
    let mut lines = vec![plan["text"].as_str().unwrap_or_default().to_owned()];
    if plan["source_connected"] == true {
        let heard = "The source was heard a moment ago: a promotion waits until it is silent,";
        lines.push(format!("{heard} and is refused while it lives"));
    }
    if let Some(note) = plan["ack_note"].as_str() {
        lines.push(note.to_owned());
    }
    lines.join("\n")
}
