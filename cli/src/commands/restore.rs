//! `murphy restore`: the plan, and what is asked before it is executed.
//!
//! Invariants:
//! - `--dry-run` writes nothing, not even a pin.
//! - Taking over asks for the volume's name; a copy does not, because it disturbs nobody.
//! - Who is neither sealed nor given up stops a take-over before anything is changed, and so does a source that is not silent.
//! - A tree with bytes is not restored where nothing could be read of them.

mod execute;
pub(super) mod pins;
mod proof;
mod succession;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::tz::TimeZone;
use murphy_backup::{
    Archive, ArchiveKind, RestoreError, RestorePlan, Silence, Target, Watch, plan_restore, planned_usage,
};
use murphy_fs::StoreUrl;
use murphy_log::{Clock, Epoch, Lsn, SystemClock, Usage};
use serde::Serialize;
use tokio::runtime::Runtime;

use self::{proof::Rehearsal, succession::Succession};
use super::format::parse_url;
use crate::{
    error::{CliError, Code, failed},
    node::{Staging, Turn, check_beside},
    output::Output,
    places::{check_there, open_store},
    take_over::GivenUp,
    units::bytes_text,
};

/// Make a node from archives, at any moment that they hold
#[derive(clap::Args, Debug)]
#[command(
    override_usage = "murphy restore [OPTIONS] <URL>... <DIR>",
    long_about = "Make a node from archives, at any moment that they hold\n\nThe copy is a branch of its own: it seals \
                  nothing, and production is not disturbed. With several archives each object is taken from the first \
                  that has it intact. With --take-over the node becomes the successor of a source that is gone. Exits with 3 if \
                  anything was damaged or missing on the way.",
    after_help = "Examples:\n  murphy restore s3://other-account/home /srv/home --at '10m ago' --dry-run\n  murphy \
                  restore s3://other-account/home /srv/home --take-over --blocks s3://new/home"
)]
pub(crate) struct RestoreArgs {
    /// One or more archives, then the directory of the new node
    #[arg(value_name = "URL|DIR", num_args = 1.., required = true)]
    places: Vec<String>,
    /// To this moment: RFC 3339, a local time, @unix, or an age like '10m ago'
    #[arg(long, value_name = "TIME", conflicts_with = "lsn")]
    at: Option<String>,
    /// To this entry
    #[arg(long, value_name = "LSN")]
    lsn: Option<u64>,
    /// Copy the packs there, and put new ones there; without it packs are read from the archives, and new ones go to DIR/blocks
    #[arg(long, value_name = "URL")]
    blocks: Option<String>,
    /// Become the successor of a source that is silent: its archives are watched for a minute first, and anything new in them stops
    /// it, whatever its clock says. Every archive that the volume's log names is read and sealed, also one that is not given; one
    /// that cannot be opened is refused
    #[arg(long, conflicts_with_all = ["at", "lsn"])]
    take_over: bool,
    /// The volume's name, as status shows it, instead of asking for it
    #[arg(long, value_name = "NAME", requires = "take_over")]
    confirm: Option<String>,
    /// Give up an archive by its URL, or a member: it is not sealed, and what only it has acknowledged is lost
    #[arg(long, value_name = "MEMBER|URL", requires = "take_over")]
    assume_lost: Vec<String>,
    /// Only print the plan
    #[arg(long)]
    dry_run: bool,
}

/// What a restore works with.
struct Restore {
    urls: Vec<StoreUrl>,
    archives: Vec<Archive>,
    directory: PathBuf,
    target: Target,
    blocks: Option<StoreUrl>,
    take_over: bool,
    assume_lost: Vec<String>,
    /// What that gives up.
    given_up: GivenUp,
    /// The source, since the plan of a take-over was made.
    watch: Option<Watch>,
    /// What was seen of it before anything was restored.
    silence: Option<Silence>,
    /// The epochs of archives that it gives up and that answer.
    given_up_epochs: Vec<Epoch>,
    /// Snapshots that turned out to be damaged.
    excluded: BTreeSet<String>,
    /// Nobody else makes the node meanwhile. A plan that is only printed needs none.
    turn: Option<Arc<Turn>>,
}

pub(crate) fn run(args: &RestoreArgs, output: &Output) -> Result<Code, CliError> {
    let runtime = Runtime::new().map_err(failed)?;
    let began = SystemClock::new().wall();
    let mut restore = prepare(args, &runtime)?;
    if !args.dry_run {
        restore.turn = Some(Turn::take(&restore.directory, COMMAND)?);
        check_target(&restore.directory, restore.blocks.as_ref())?;
    }
    if restore.lacks_packs() && !args.take_over && !args.dry_run {
        // Before a pin is left in archives that are of no use alone.
        let plan = runtime.block_on(restore.plan(&restore.excluded))?;
        restore.check_bytes(restore.usage(&plan, &runtime)?)?;
    }
    // Before anything is planned: what a plan has seen must not be deleted before it is read.
    let mut pins = (!args.dry_run).then(|| pins::Pins::take(&restore, &runtime));
    let (mut plan, succession) = match args.take_over {
        true => restore.plan_succession(pins.as_mut(), &runtime).map(|(plan, taken)| (plan, Some(taken)))?,
        false => (runtime.block_on(restore.plan(&restore.excluded))?, None),
    };
    let has_bytes = restore.check_bytes(restore.usage(&plan, &runtime)?);
    if args.dry_run {
        plan.problems.extend(has_bytes.err().map(|error| match &error.hint {
            Some(hint) => format!("{error}: {hint}"),
            None => error.to_string(),
        }));
        output.data(&Printed { plan: &plan, take_over: succession.as_ref() }, Printed::text)?;
        return Ok(Code::Done);
    }
    has_bytes?;
    output.note(&Printed { plan: &plan, take_over: succession.as_ref() }.text());
    if let Some(succession) = succession {
        succession.check()?;
        let effect = "it becomes the source; the old one is shut out of these archives for good";
        output.confirm(args.confirm.as_deref(), &succession.name, effect)?;
        restore.given_up_epochs = succession.given_up_epochs();
        restore.given_up = succession.given_up;
        restore.silence = restore.watch_source(&runtime, output)?;
    }
    // What could not be read may have gone further than what was restored.
    let is_sound = plan.problems.is_empty();
    let unpinned = pins.as_ref().map_or(&[][..], pins::Pins::unpinned).to_vec();
    let rehearsal = Rehearsal { began, slots: plan.slots.len() as u64, problems: plan.problems.clone() };
    let restored = restore.execute(plan, &unpinned, &runtime, output)?;
    rehearsal.prove(&restore, &restored, &runtime, output);
    output.data(&restored, restored_text)?;
    let is_sound = is_sound && restored.missing_packs == 0 && restored.damaged_snapshots == 0;
    let is_sound = is_sound && restored.packs_replaced == 0;
    let is_sound = is_sound && restored.unanswered_packs == 0 && !restored.packs_cut_short;
    Ok(if is_sound { Code::Done } else { Code::Found })
}

fn prepare(args: &RestoreArgs, runtime: &Runtime) -> Result<Restore, CliError> {
    let Some((directory, urls)) = args.places.split_last().filter(|(_, urls)| !urls.is_empty()) else {
        return Err(CliError::usage("give at least one archive, then the directory of the new node"));
    };
    let urls: Vec<StoreUrl> = urls.iter().map(|url| parse_url("URL", url)).collect::<Result<_, _>>()?;
    let now = SystemClock::new().wall();
    let target = match (&args.at, args.lsn) {
        (Some(text), _) => Target::parse_at(text, now, &TimeZone::system()).map_err(CliError::usage)?,
        (None, Some(lsn)) => Target::Lsn(Lsn::new(lsn)),
        (None, None) => Target::Latest,
    };
    let blocks = args.blocks.as_deref().map(|url| parse_url("--blocks", url)).transpose()?;
    let mut archives = Vec::new();
    for url in &urls {
        check_there(url)?;
        archives.push(runtime.block_on(Archive::open(open_store(url)?)).map_err(failed)?);
    }
    let directory = PathBuf::from(directory);
    let (take_over, assume_lost) = (args.take_over, args.assume_lost.clone());
    let (given_up, given_up_epochs, excluded, turn, watch, silence) = Default::default();
    Ok(Restore {
        urls,
        archives,
        directory,
        target,
        blocks,
        take_over,
        assume_lost,
        given_up,
        watch,
        silence,
        given_up_epochs,
        excluded,
        turn,
    })
}

impl Restore {
    async fn plan(&self, excluded: &BTreeSet<String>) -> Result<RestorePlan, CliError> {
        let planned = plan_restore(&self.archives, self.target, excluded, &TimeZone::system()).await;
        planned.map_err(failed)
    }

    /// The archives that hold packs.
    fn full(&self) -> impl Iterator<Item = &Archive> {
        self.archives.iter().filter(|archive| archive.descriptor().kind == ArchiveKind::Full)
    }

    /// Whether no place is given from which a byte of a file could be read.
    fn lacks_packs(&self) -> bool {
        self.blocks.is_none() && self.full().next().is_none()
    }

    /// The size of the tree that `plan` leads to, where it matters.
    fn usage(&self, plan: &RestorePlan, runtime: &Runtime) -> Result<Usage, CliError> {
        if !self.lacks_packs() {
            return Ok(plan.route.start.usage);
        }
        runtime.block_on(planned_usage(&self.archives, plan)).map_err(failed)
    }

    /// Refuses a tree of that size if nothing could be read of its bytes.
    fn check_bytes(&self, usage: Usage) -> Result<(), CliError> {
        if usage.bytes == 0 || !self.lacks_packs() {
            return Ok(());
        }
        let named: Vec<&str> = self.archives.iter().map(Archive::url).collect();
        Err(CliError::new(format!(
            "none of these archives holds packs ({}), and there are {} in files: nothing of it could be read",
            named.join(", "),
            bytes_text(usage.bytes)
        ))
        .hint("give the volume's block store with --blocks (packs that are there are not copied), or an archive that holds packs"))
    }

    /// Leaves a damaged snapshot out of the plans to come. Any other error is given back.
    fn exclude(&mut self, error: RestoreError) -> Result<(), CliError> {
        let (RestoreError::Snapshot { folder, .. } | RestoreError::OtherSnapshot { folder, .. }) = &error
        else {
            return Err(failed(error));
        };
        tracing::warn!(%error, "restoring without this snapshot");
        self.excluded.insert(folder.clone());
        Ok(())
    }
}

/// Refuses a directory that could not become the node in the end, when archives may be sealed for it.
fn check_target(directory: &Path, blocks: Option<&StoreUrl>) -> Result<(), CliError> {
    Staging::check(directory)?;
    blocks.map_or(Ok(()), |blocks| check_beside(directory, "--blocks", blocks))
}

/// What is printed before anything happens.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    plan: &'a RestorePlan,
    #[serde(skip_serializing_if = "Option::is_none")]
    take_over: Option<&'a Succession>,
}

impl Printed<'_> {
    fn text(&self) -> String {
        let plan = plan_text(self.plan);
        match self.take_over.map(Succession::text) {
            Some(more) => format!("{plan}\n{more}"),
            None => plan,
        }
    }
}

fn restored_text(restored: &execute::Restored) -> String {
    let (inodes, lsn) = (restored.inodes, restored.lsn);
    let mut lines = vec![format!("{inodes} inodes of lsn {lsn} in {}", restored.directory.display())];
    if restored.packs_replaced > 0 {
        let replaced = restored.packs_replaced;
        lines.push(format!("note: {replaced} packs were there already, damaged, and have been replaced; others that use that store may have such ones too (murphy fsck DIR --data)"));
    }
    if restored.missing_packs > 0 {
        let missing = restored.missing_packs;
        let then = match restored.packs_are_asked_for {
            true => "once it is served, whoever may have them is asked (murphy status)",
            false => {
                "what is in them is EIO until one of these archives has them again; restored with --blocks, others are asked too"
            }
        };
        lines.push(format!("note: {missing} packs are missing; {then}"));
    }
    if restored.unanswered_packs > 0 {
        let unanswered = restored.unanswered_packs;
        lines.push(format!("note: for {unanswered} packs an archive did not answer, and no other has them"));
    }
    if restored.packs_cut_short {
        lines.push("note: not all packs were looked for: the take-over did not wait for that (murphy fsck DIR --data)".to_owned());
    }
    lines.extend(restored.unpinned.iter().map(|one| {
        format!(
            "note: {} was read without a pin, so that nobody who deletes there would have waited: {}",
            one.url, one.reason
        )
    }));
    lines.extend(restored.unregistered.iter().map(|one| {
        let way = "delete nothing there, or restore again with --blocks";
        format!("note: {} does not know of this copy, which reads its packs ({way}): {}", one.url, one.reason)
    }));
    lines.join("\n")
}

fn plan_text(plan: &RestorePlan) -> String {
    let mut lines =
        vec![format!("to lsn {} of epoch {}, as of {}", plan.position.lsn, plan.position.epoch, plan.as_of)];
    match &plan.snapshot {
        Some(base) => lines.push(format!(
            "from {} in {}: {} inodes, {}",
            base.name,
            base.archive,
            base.inodes,
            bytes_text(base.bytes)
        )),
        None => lines.push("from the beginning of the volume".to_owned()),
    }
    lines.push(format!(
        "then {} entries in {} slots; {} to read, about {:.1} minutes",
        plan.entries,
        plan.slots.len(),
        bytes_text(plan.bytes),
        plan.expected_minutes
    ));
    lines.extend(plan.notes.iter().map(|note| format!("note: {note}")));
    lines.extend(plan.problems.iter().map(|problem| format!("problem: {problem}")));
    lines.join("\n")
}

/// What is said of it to people.
const COMMAND: &str = "murphy restore";
