//! `murphy dump URL`: the tree of any moment that an archive holds, as one file.
//!
//! Invariants:
//! - No node is needed. The archive is changed by a record alone, which says that it is read and is taken back.
//! - The tree is proven by the digest of the log before anything of it is written.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use jiff::tz::TimeZone;
use murphy_backup::{
    Archive, OnProgress, RestoreError, RestorePlan, RestoreProgress, Target, plan_restore, restore_tree,
};
use murphy_fs::{FjallIndex, FjallOptions, Index, SnapshotOrigin, SnapshotProgress, StoreUrl};
use murphy_log::{Clock, Lsn, SystemClock};
use serde_json::json;
use tokio::runtime::Runtime;

use super::DumpArgs;
use crate::{
    commands::restore::pins::Pins,
    dump_file::{Dumped, check_new},
    error::{CliError, Code, at, failed},
    node::random,
    output::Output,
    places::{check_there, open_store},
    progress::{Progress, ProgressLine},
};

/// Writes what `args` name of the archive at `url` to `path`, or to stdout.
pub(super) fn run(
    url: &StoreUrl,
    args: &DumpArgs,
    path: Option<&Path>,
    output: &Output,
) -> Result<Code, CliError> {
    path.map(check_new).transpose()?;
    let target = target(args)?;
    check_there(url)?;
    let runtime = Runtime::new().map_err(failed)?;
    let archive = [runtime.block_on(Archive::open(open_store(url)?)).map_err(failed)?];
    // What a plan has seen must not be deleted before it is read.
    let _pins = Pins::of(&archive, &format!("dump to {}", args.file.display()), &runtime);
    let scratch = Scratch::new(path)?;
    let (index, plan, is_sound) = restore(&archive, target, &scratch, &runtime, output)?;
    let tree = index.snapshot();
    let origin = SnapshotOrigin { branch: archive[0].lineage().branch, created: SystemClock::new().wall() };
    let (line, inodes) = (ProgressLine::new(output), tree.state().map_or(0, |state| state.usage.inodes));
    let progress = |done: SnapshotProgress| line.show(&Progress::new("inodes dumped", done.inodes, inodes));
    let dumped = Dumped { tree: &*tree, keys: archive[0].keys(), origin };
    let summary = match path {
        None => dumped.write_to(&mut super::stdout()?, &progress)?,
        Some(path) => dumped.write_file(path, &progress)?,
    };
    drop(line);
    let state = summary.header.state;
    let done = json!({
        "lsn": state.position.lsn.get(),
        "digest": state.digest.to_string(),
        "inodes": state.usage.inodes,
        "as_of": plan.as_of,
        "problems": plan.problems,
    });
    super::told(args, &done, output)?;
    Ok(if is_sound { Code::Done } else { Code::Found })
}

fn target(args: &DumpArgs) -> Result<Target, CliError> {
    let now = SystemClock::new().wall();
    match (&args.at, args.lsn) {
        (Some(text), _) => Target::parse_at(text, now, &TimeZone::system()).map_err(CliError::usage),
        (None, Some(lsn)) => Ok(Target::Lsn(Lsn::new(lsn))),
        (None, None) => Ok(Target::Latest),
    }
}

/// The tree in an index of its own, by which plan, and whether nothing on the way was damaged.
fn restore(
    archive: &[Archive],
    target: Target,
    scratch: &Scratch,
    runtime: &Runtime,
    output: &Output,
) -> Result<(Arc<FjallIndex>, RestorePlan, bool), CliError> {
    let (mut excluded, zone) = (BTreeSet::new(), TimeZone::system());
    loop {
        let planned = plan_restore(archive, target, &excluded, &zone);
        let plan = runtime.block_on(planned).map_err(failed)?;
        let (lsn, as_of) = (plan.position.lsn, &plan.as_of);
        output.note(&format!("lsn {lsn}, as of {as_of}"));
        plan.problems.iter().for_each(|problem| output.note(&format!("problem: {problem}")));
        let index = Arc::new(FjallIndex::open(&scratch.0, FjallOptions::default()).map_err(failed)?);
        let (into, shown) = (Arc::clone(&index) as Arc<dyn Index>, on_progress(output, plan.entries));
        let folder = match runtime.block_on(restore_tree(archive, &plan, into, shown)) {
            Ok(_) => {
                let is_sound = excluded.is_empty() && plan.problems.is_empty();
                return Ok((index, plan, is_sound));
            }
            Err(
                RestoreError::Snapshot { ref folder, .. } | RestoreError::OtherSnapshot { ref folder, .. },
            ) => folder.clone(),
            Err(error) => return Err(failed(error)),
        };
        output.note(&format!("{folder} is damaged: an older snapshot is taken"));
        drop(index);
        FjallIndex::reset(&scratch.0).map_err(failed)?;
        excluded.insert(folder);
    }
}

fn on_progress(output: &Output, entries: u64) -> OnProgress {
    let line = Mutex::new(ProgressLine::new(output));
    Arc::new(move |done: RestoreProgress| {
        let shown = match done.entries {
            0 => Progress::new("rows loaded", done.rows, 0),
            replayed => Progress::new("entries replayed", replayed, entries),
        };
        line.lock().unwrap_or_else(PoisonError::into_inner).show(&shown);
    })
}

/// Where the tree is put together. Dropping it removes it.
struct Scratch(PathBuf);

impl Scratch {
    /// Beside the file, whose disk has room for a tree; of one that is only written to, where the system keeps what is temporary.
    fn new(file: Option<&Path>) -> Result<Scratch, CliError> {
        let folder = file.and_then(Path::parent).map_or_else(std::env::temp_dir, Path::to_owned);
        let [a, b, c, d, ..] = random()?;
        let path = folder.join(format!(".murphy-dump.{a:02x}{b:02x}{c:02x}{d:02x}"));
        fs::create_dir(&path).map_err(at(&path))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "it is left behind; it may be removed");
        }
    }
}
