//! `murphy archive add|list|snapshot|remove|abandon`: where a volume is shipped to.
//!
//! Invariants:
//! - An archive is named by the shared form of its URL; its credentials stay with this node.
//! - Removing detaches, and giving up records: nothing in an archive is deleted.

use std::path::PathBuf;

use clap::Subcommand;
use jiff::tz::TimeZone;
use murphy_backup::{StrayKind, show_time};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::{
    format::parse_url,
    removal::{Agreement, unheard},
    source::node_of,
};
use crate::{
    archives::Abandoning,
    control::{ArchiveRemoval, Request},
    error::{CliError, Code, failed},
    output::Output,
    serve,
    status::{ArchiveStatus, Status},
};

/// Add, list or remove archives of a volume, or take a snapshot into them
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  murphy archive add /srv/home 's3://other/home?account=backup&credentials=file:/etc/murphy/backup'"
)]
pub(crate) struct ArchiveArgs {
    #[command(subcommand)]
    command: ArchiveCommand,
}

#[derive(Subcommand, Debug)]
enum ArchiveCommand {
    /// Make an archive and ship to it from now on
    #[command(after_help = "Example:\n  murphy archive add /srv/home 's3://other/home?account=backup'")]
    Add {
        /// The directory of a node, or a mount point
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Where it is made: file:///DIR, s3://BUCKET/PREFIX, gs:// or az://
        #[arg(value_name = "URL")]
        url: String,
        /// Keep the log and snapshots there, and no packs
        #[arg(long)]
        log_only: bool,
    },
    /// Show every archive, and how far it is behind
    #[command(after_help = "Example:\n  murphy archive list /srv/home")]
    List {
        /// The directory of a node, or a mount point
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Take a snapshot now, from which a restore is faster
    #[command(after_help = "Example:\n  murphy archive snapshot /srv/home")]
    Snapshot {
        /// The directory of a node, or a mount point
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Into this archive only
        #[arg(value_name = "URL")]
        url: Option<String>,
    },
    /// Ship to an archive no longer; nothing in it is deleted
    #[command(
        long_about = "Ship to an archive no longer; nothing in it is deleted\n\nPrints what stays and what is given up. Asks for the volume's name if it \
                      is the last archive, or with --assume-lost.",
        after_help = "Example:\n  murphy archive remove /srv/home 's3://other/home?account=backup' --dry-run"
    )]
    Remove(RemoveArgs),
    /// Give up slots that neither the log nor anything in the archive leads to
    #[command(
        long_about = "Give up slots that neither the log nor anything in the archive leads to\n\nA source that finds such slots does not \
                      start: it may have been put back to an earlier state, and they hold what it has acknowledged since. If they are those of a \
                      copy of its directory that ran as well, or what leads to them is lost everywhere, this records in the archive that they \
                      are given up. Nothing is deleted. Nobody may serve the node meanwhile.",
        after_help = "Example:\n  murphy archive abandon /srv/home s3://other-account/home --dry-run"
    )]
    Abandon(AbandonArgs),
}

#[derive(clap::Args, Debug)]
struct RemoveArgs {
    /// The directory of a node, or a mount point
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// The archive
    #[arg(value_name = "URL")]
    url: String,
    /// It is gone for good: do not wait for it, also if fsync does and no other archive acknowledges. What only it holds is given up, and
    /// whoever takes over through it all the same does not know of this node any more
    #[arg(long)]
    assume_lost: bool,
    #[command(flatten)]
    agreement: Agreement,
}

#[derive(clap::Args, Debug)]
struct AbandonArgs {
    /// The directory of a node
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// The archive
    #[arg(value_name = "URL")]
    url: String,
    /// Only print what would be given up
    #[arg(long)]
    dry_run: bool,
    /// The volume's name, instead of asking for it
    #[arg(long, value_name = "NAME")]
    confirm: Option<String>,
}

/// Shows what nothing leads to, and gives it up once the volume's name was given.
fn abandon(args: &AbandonArgs, output: &Output) -> Result<Code, CliError> {
    let url = parse_url("URL", &args.url)?;
    let runtime = Runtime::new().map_err(failed)?;
    let abandoning = Abandoning::of(&node_of(&args.directory)?, &url, &runtime)?;
    let held = abandoning.archived();
    for stray in abandoning.strays() {
        let written = match &stray.kind {
            StrayKind::Slot { written, .. } => Some(show_time(*written, &TimeZone::system())),
            StrayKind::Seal(_) | StrayKind::BrokenSeal(_) | StrayKind::Damaged(_) => None,
        };
        let line = json!({ "object": stray.object, "first": stray.key.1.get(), "last": stray.last().get(), "written": written });
        output.data(&line, |_| match &written {
            Some(written) => format!("{stray}, written {written}"),
            None => stray.to_string(),
        })?;
    }
    if abandoning.strays().is_empty() {
        output.note(&format!("Nothing: {url} holds what leads to lsn {held}, and what this log has"));
        return Ok(Code::Done);
    }
    if args.dry_run {
        return Ok(Code::Done);
    }
    let effect = "what only these objects hold is lost; whoever goes on passes them over";
    output.confirm(args.confirm.as_deref(), &abandoning.name, effect)?;
    abandoning.perform(&runtime)?;
    Ok(Code::Done)
}

pub(crate) fn run(args: &ArchiveArgs, output: &Output) -> Result<Code, CliError> {
    let ask = |directory: &PathBuf, request: &Request| {
        serve::ask(&node_of(directory)?, request, output, |_| Ok(()))
    };
    match &args.command {
        ArchiveCommand::Add { directory, url, log_only } => {
            let url = parse_url("URL", url)?.to_string();
            let added = ask(directory, &Request::ArchiveAdd { url, log_only: *log_only })?;
            output.data(&added, |added| format!("archive {}", added["url"].as_str().unwrap_or_default()))?;
        }
        ArchiveCommand::List { directory } => {
            let status: Status = serde_json::from_value(ask(directory, &Request::Status)?).map_err(failed)?;
            for archive in &status.archives {
                output.data(archive, ArchiveStatus::text)?;
            }
            if status.archives.is_empty() && !output.is_json() {
                output.note("This volume has no archive: murphy archive add makes one");
            }
        }
        ArchiveCommand::Snapshot { directory, url } => {
            let url = url.as_deref().map(|url| parse_url("URL", url)).transpose()?;
            let request = Request::ArchiveSnapshot { url: url.map(|url| url.to_string()) };
            let taken = ask(directory, &request)?;
            for one in taken.as_array().into_iter().flatten() {
                output.data(one, |one| {
                    format!("snapshot at lsn {} in {}", one["lsn"], one["url"].as_str().unwrap_or_default())
                })?;
            }
        }
        ArchiveCommand::Abandon(args) => return abandon(args, output),
        ArchiveCommand::Remove(args) => remove(args, output)?,
    }
    Ok(Code::Done)
}

/// Shows what is given up, and removes the archive once that is agreed to.
fn remove(args: &RemoveArgs, output: &Output) -> Result<(), CliError> {
    let (directory, url) = (node_of(&args.directory)?, parse_url("URL", &args.url)?.to_string());
    let ask = |dry_run, confirmed| {
        let order = ArchiveRemoval { url: url.clone(), assume_lost: args.assume_lost, dry_run, confirmed };
        serve::ask(&directory, &Request::ArchiveRemove(order), output, |_| Ok(()))
    };
    let plan = ask(true, false)?;
    match args.agreement.to(&plan, "it is shipped to no longer", output)? {
        Some(agreed) => output.data(&ask(false, agreed)?, kept_for),
        None => Ok(()),
    }
}

/// Who still looks for an archive that was removed, and which of the others acknowledge nothing yet.
fn kept_for(removed: &Value) -> String {
    let kept = |untold| {
        format!(
            "not heard of yet by {untold}: keep the archive until then; one that takes over before looks for it, and finds there which others there are"
        )
    };
    let waiting = removed["waiting"].as_array().into_iter().flatten().filter_map(|one| {
        let names: Vec<&str> = one["waits_for"].as_array()?.iter().filter_map(Value::as_str).collect();
        let who = if names.is_empty() { "everybody who may take over".to_owned() } else { names.join(", ") };
        Some(format!(
            "{} acknowledges nothing before it is known that it was heard of by {who}; who is gone for good is taken out with murphy member remove or archive remove, --assume-lost",
            one["archive"].as_str()?
        ))
    });
    unheard(removed).map(kept).into_iter().chain(waiting).collect::<Vec<_>>().join("\n")
}
