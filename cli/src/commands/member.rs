//! `murphy member list|remove`: who belongs to a volume, and taking out those that are gone.
//!
//! Invariants:
//! - A member is named by its id, as `promote --assume-lost` names it.
//! - Removing takes nothing from the node that is removed: it keeps what it holds.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::Value;

use super::{
    removal::{Agreement, unheard},
    source::node_of,
};
use crate::{
    control::{MemberRemoval, Request},
    error::{CliError, Code, failed},
    mirrors::MemberStatus,
    output::Output,
    serve,
};

/// List or remove members of a volume
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  murphy member list /srv/home")]
pub(crate) struct MemberArgs {
    #[command(subcommand)]
    command: MemberCommand,
}

#[derive(Subcommand, Debug)]
enum MemberCommand {
    /// Show every member: mirrors, writers, observers and the source itself
    #[command(after_help = "Example:\n  murphy member list /srv/home")]
    List {
        /// The directory of a node, or a mount point
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Take members out: they follow, acknowledge and seal no more
    #[command(
        long_about = "Take members out: they follow, acknowledge and seal no more\n\nRun it at the source. A node that is removed keeps what it \
                      holds, is told when it comes back, and joins anew in a new directory, with the same block store. With --ack \
                      mirror=W the other mirrors must have everything that it may have acknowledged first, and there must be enough of them.\n\n\
                      Several are taken out one after the other. Those that hold another history than the source are given up together.\n\n\
                      Prints what would be given up; --assume-lost asks for the volume's name.",
        after_help = "Example:\n  murphy member remove /srv/home 0011223344556677889900aabbccddee --dry-run"
    )]
    Remove {
        /// The directory of the source, or its mount point
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// The ids of the members
        #[arg(value_name = "MEMBER", required = true)]
        nodes: Vec<String>,
        /// They are gone for good: give up what only they have acknowledged, and remove them also if too few mirrors are left for fsync
        #[arg(long)]
        assume_lost: bool,
        #[command(flatten)]
        agreement: Agreement,
    },
}

pub(crate) fn run(args: &MemberArgs, output: &Output) -> Result<Code, CliError> {
    match &args.command {
        MemberCommand::List { directory } => {
            let members = serve::ask(&node_of(directory)?, &Request::Members, output, |_| Ok(()))?;
            let members: Vec<MemberStatus> = serde_json::from_value(members).map_err(failed)?;
            for member in &members {
                output.data(member, MemberStatus::text)?;
            }
            if members.is_empty() && !output.is_json() {
                output.note("This volume has no member: murphy invite makes a token for one");
            }
        }
        MemberCommand::Remove { directory, nodes, assume_lost, agreement } => {
            let directory = node_of(directory)?;
            let order = |dry_run, confirmed| {
                let (nodes, assume_lost) = (nodes.clone(), *assume_lost);
                Request::MemberRemove(MemberRemoval { nodes, assume_lost, dry_run, confirmed })
            };
            let plan = serve::ask(&directory, &order(true, false), output, |_| Ok(()))?;
            let effect = "what only they have acknowledged is given up";
            let Some(agreed) = agreement.to(&plan, effect, output)? else { return Ok(Code::Done) };
            serve::ask(&directory, &order(false, agreed), output, |removed| output.data(&removed, told))?;
        }
    }
    Ok(Code::Done)
}

fn told(removed: &Value) -> String {
    let node = removed["removed"].as_str().unwrap_or_default();
    let mut lines = vec![format!("removed {node} at lsn {}", removed["lsn"])];
    let untold = unheard(removed);
    lines.extend(
        untold.map(|who| format!("not heard of yet by {who}: until then they would still answer it")),
    );
    if let Some(waits) = removed["waits"].as_str() {
        lines.push(format!("fsync waits for {waits}: it fails until another one joins"));
    }
    lines.join("\n")
}
