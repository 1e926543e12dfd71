//! `murphy archive add|list|snapshot|remove`: where a volume is shipped to.
//!
//! Invariants:
//! - An archive is named by the shared form of its URL; its credentials stay with this node.
//! - Removing detaches: nothing in an archive is deleted.

use std::path::PathBuf;

use clap::Subcommand;

use super::{format::parse_url, source::node_of};
use crate::{
    control::Request,
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
    #[command(after_help = "Example:\n  murphy archive remove /srv/home 's3://other/home?account=backup'")]
    Remove {
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
    },
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
        ArchiveCommand::Remove { directory, url, assume_lost } => {
            let url = parse_url("URL", url)?.to_string();
            let removed = ask(directory, &Request::ArchiveRemove { url, assume_lost: *assume_lost })?;
            output.data(&removed, |_| String::new())?;
        }
    }
    Ok(Code::Done)
}
