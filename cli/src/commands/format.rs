//! `murphy format`: a new volume and its first node.
//!
//! Invariants:
//! - Nothing is made before all places were found to fit together: no two stores share a prefix, and `--ack archive` has an archive that
//!   survives the source.

use std::path::{Path, PathBuf};

use murphy_fs::StoreUrl;
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::{
    archives::check_outlives,
    error::{CliError, Code, failed},
    node::{self, NewNode, check_beside, failure_domain},
    output::Output,
    settings::{Ack, DEFAULT_WINDOW, Settings, SharedArchive, parse_name, shared_form},
    units::parse_duration,
};

/// Make a new volume and its first node
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Examples:\n  murphy format /srv/home --blocks 's3://bucket/home?region=eu-central-1'\n  murphy format /srv/home --blocks s3://bucket/home --archive 's3://other/home?account=backup&credentials=file:/etc/murphy/backup'"
)]
pub(crate) struct FormatArgs {
    /// The directory of the new node; it must not exist, or be empty
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Where file data goes: file:///DIR, s3://BUCKET/PREFIX, gs:// or az://
    #[arg(long, value_name = "URL")]
    blocks: String,
    /// Ship log, snapshots and packs there, continuously; may be given several times
    #[arg(long, value_name = "URL")]
    archive: Vec<String>,
    /// The same without packs
    #[arg(long, value_name = "URL")]
    log_archive: Vec<String>,
    /// The name of the volume; by default that of the directory
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    /// What fsync waits for: local, mirror=W or archive; murphy ack changes it
    #[arg(long, value_name = "LEVEL", default_value_t = Ack::Local)]
    ack: Ack,
    /// Let every operation wait as fsync does
    #[arg(long)]
    sync: bool,
    /// The span in which every moment can be restored; so far nothing is deleted
    #[arg(long, value_name = "TIME", default_value = DEFAULT_WINDOW, value_parser = checked_window)]
    window: String,
}

/// The URL of a store in an argument. It is parsed here because clap would repeat its text, which may hold a secret.
pub(super) fn parse_url(option: &str, text: &str) -> Result<StoreUrl, CliError> {
    text.parse().map_err(|error| CliError::usage(format!("{option}: {error}")))
}

fn checked_window(text: &str) -> Result<String, String> {
    parse_duration(text).map(|_| text.to_owned())
}

#[derive(Serialize)]
struct Formatted {
    volume: String,
    name: String,
    branch: String,
    directory: PathBuf,
    blocks: String,
}

pub(crate) fn run(args: &FormatArgs, output: &Output) -> Result<Code, CliError> {
    let directory = std::path::absolute(&args.directory).map_err(failed)?;
    let blocks = parse_url("--blocks", &args.blocks)?;
    let mut archives = Vec::new();
    for url in &args.archive {
        archives.push((parse_url("--archive", url)?, false));
    }
    for url in &args.log_archive {
        archives.push((parse_url("--log-archive", url)?, true));
    }
    check_beside(&directory, "--blocks", &blocks)?;
    for (url, log_only) in &archives {
        check_beside(&directory, if *log_only { "--log-archive" } else { "--archive" }, url)?;
    }
    check_places(&directory, &blocks, &archives, args.ack)?;
    let shared = archives.iter().map(|(url, log_only)| SharedArchive {
        known: true,
        ..SharedArchive::new(shared_form(url), *log_only)
    });
    let settings = Settings {
        name: name(args)?,
        ack: args.ack,
        sync: args.sync,
        window: args.window.clone(),
        archives: shared.collect(),
    };
    let runtime = Runtime::new().map_err(failed)?;
    let new = NewNode { blocks, settings, archives };
    let config = node::create(&directory, &new, runtime.handle())?;
    let formatted = Formatted {
        volume: config.volume.to_string(),
        name: config.name,
        branch: config.branch.to_string(),
        directory,
        blocks: config.blocks.to_string(),
    };
    output.data(&formatted, |formatted| {
        format!("volume {} ({}) in {}", formatted.name, formatted.volume, formatted.directory.display())
    })?;
    Ok(Code::Done)
}

/// Every store has a place of its own, and `--ack archive` an archive that does not die with the source.
fn check_places(
    directory: &Path,
    blocks: &StoreUrl,
    archives: &[(StoreUrl, bool)],
    ack: Ack,
) -> Result<(), CliError> {
    let mut places = vec![shared_form(blocks)];
    for (url, _) in archives {
        let place = shared_form(url);
        if places.contains(&place) {
            return Err(CliError::usage(format!(
                "{place} is given twice: every store has a prefix of its own"
            )));
        }
        places.push(place);
    }
    if ack != Ack::Archive {
        return Ok(());
    }
    let own = [failure_domain(directory)?, blocks.failure_domain()];
    check_outlives(&own, archives.iter().filter(|(_, log_only)| !log_only).map(|(url, _)| url))
}

fn name(args: &FormatArgs) -> Result<String, CliError> {
    if let Some(name) = &args.name {
        return Ok(name.clone());
    }
    let last = args.directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    parse_name(last).map_err(|_| {
        CliError::usage(format!("the name of {} cannot be that of a volume", args.directory.display()))
            .hint("give one with --name: letters, digits, '-', '_' and '.'")
    })
}
