//! `murphy ack`: what an fsync waits for.
//!
//! Invariants:
//! - A promise is given up only by somebody who has given the volume's name.

use std::path::PathBuf;

use serde_json::Value;

use super::source::node_of;
use crate::{
    control::{AckOrder, Request},
    error::{CliError, Code},
    output::Output,
    serve,
    settings::Ack,
};

/// Show or change what an fsync waits for
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Show or change what an fsync waits for\n\nWithout a level it shows which one is set and what is waited for now. With one it changes \
                  the setting of the volume, at the source. A level that promises more is in force when the command has returned: everything so \
                  far fulfils it then, and whoever may take over knows of it. local is in force at once, and waits for nobody to say so. A \
                  level that gives a promise up asks for the volume's name.",
    after_help = "Examples:\n  murphy ack /srv/home\n  murphy ack /srv/home mirror=2\n  murphy ack /srv/home local --confirm home"
)]
pub(crate) struct AckArgs {
    /// The directory of a node, or a mount point
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// local, mirror=W or archive, as at murphy format
    #[arg(value_name = "LEVEL")]
    level: Option<Ack>,
    /// Only print what would be given up
    #[arg(long, requires = "level")]
    dry_run: bool,
    /// The volume's name, instead of asking for it
    #[arg(long, value_name = "NAME", requires = "level")]
    confirm: Option<String>,
}

pub(crate) fn run(args: &AckArgs, output: &Output) -> Result<Code, CliError> {
    let directory = node_of(&args.directory)?;
    let ask = |dry_run, confirmed| {
        let order = AckOrder { level: args.level, dry_run, confirmed };
        serve::ask(&directory, &Request::Ack(order), output, |_| Ok(()))
    };
    let mut confirmed = false;
    if args.level.is_some() {
        let plan = ask(true, false)?;
        confirmed = plan["weakens"] == true;
        if args.dry_run {
            output.data(&plan, plan_text)?;
            return Ok(Code::Done);
        }
        if plan["weakens"] == true {
            if !output.is_json() {
                output.note(&plan_text(&plan));
            }
            let effect = "fsync promises less from then on";
            output.confirm(args.confirm.as_deref(), plan["name"].as_str().unwrap_or_default(), effect)?;
        }
    }
    let shown = ask(false, confirmed)?;
    output.data(&shown, text)?;
    Ok(Code::Done)
}

fn plan_text(plan: &Value) -> String {
    plan["text"].as_str().unwrap_or_default().to_owned()
}

fn text(shown: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut lines = vec![format!("{:<14}{}", "ack", word(&shown["ack"]))];
    if shown["in_force"] != true {
        lines.push(format!("{:<14}not yet: {} is in force", "", word(&shown["waits_for"])));
    }
    let every = if shown["sync"] == true { ", every operation" } else { "" };
    lines.push(format!("{:<14}{}{every}", "fsync waits", word(&shown["now"])));
    for mirror in shown["mirrors"].as_array().into_iter().flatten() {
        let counts = if mirror["acknowledges"] == true { "counts" } else { "does not count" };
        let connected = if mirror["connected"] == true { "" } else { ", not connected" };
        let (node, data) = (word(&mirror["node"]), &mirror["data_lsn"]);
        lines.push(format!("{:<14}{node}: {counts}, data {data}{connected}", "mirror"));
    }
    for archive in shown["archives"].as_array().into_iter().flatten() {
        let counts = if archive["acknowledges"] == true { "counts" } else { "does not count" };
        lines.push(format!("{:<14}{}: {counts}", "archive", word(&archive["url"])));
    }
    lines.join("\n")
}
