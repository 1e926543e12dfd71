//! Executing a restore: into a directory beside the wanted one, proven, then published by a rename.
//!
//! Invariants:
//! - A copy writes nothing into the archives but records (that it reads there, that its branch reads their packs) and, in the end, its proof.
//! - What an archive has got after another one was sealed is restored too, before anything is published.
//! - A successor seals after everything else has succeeded; then it looks for packs, for a bounded time, and is published. Which epoch it begins was remembered durably
//!   before; killed at any moment, the same command goes on, as the same node.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use murphy_backup::{
    Archive, ArchiveFence, ArchiveKind, OnProgress, PackReport, Record, Registry, RestorePlan,
    RestoreProgress, Successor, TakeOverError, count_packs, restore_packs, restore_tree, take_over_at,
};
use murphy_fs::{
    BlockStore, Fence, FenceError, FjallIndex, FjallOptions, Index, ObjectBlockStore, SnapshotOrigin,
    StoreUrl, adopt_prefix,
};
use murphy_log::{
    BranchId, Clock, Epoch, EpochId, LogTime, Lsn, NodeId, OsFiles, Position, State, SystemClock,
};
use murphy_mirror::Identity;
use serde::Serialize;
use tokio::runtime::Runtime;

use super::{COMMAND, Restore, pins::Unwritten};
use crate::{
    attempts,
    config::NodeConfig,
    error::{CliError, failed},
    node::{CopyOf, Staging, Turn, begin_copy, index_directory, random, write_base_file},
    output::Output,
    progress::{Progress, ProgressLine},
    settings::{Settings, shared_form},
    take_over::{not_silent, way_past},
};

/// What was restored.
#[derive(Serialize)]
pub(super) struct Restored {
    pub(super) directory: PathBuf,
    pub(super) volume: String,
    pub(super) branch: String,
    pub(super) lsn: u64,
    pub(super) digest: String,
    pub(super) inodes: u64,
    pub(super) packs_copied: u64,
    /// Of those, how many replaced something damaged that the store had under their name.
    pub(super) packs_replaced: u64,
    pub(super) missing_packs: u64,
    /// Packs that no archive has shown, while one did not answer.
    pub(super) unanswered_packs: u64,
    /// Whether there are packs that were not looked for, because a take-over does not wait for long.
    pub(super) packs_cut_short: bool,
    /// Whether the tree says which are missing, so that the node asks whoever may have them.
    #[serde(skip)]
    pub(super) packs_are_asked_for: bool,
    #[serde(skip)]
    pub(super) position: Position,
    /// Of how many percent of the packs that the tree names the bytes came from the archives.
    #[serde(skip)]
    pub(super) percent_read: u8,
    /// Snapshots that turned out to be damaged, around which it was restored.
    pub(super) damaged_snapshots: usize,
    /// Archives that were read without a pin: what was deleted in them meanwhile was deleted without knowing of this.
    pub(super) unpinned: Vec<Unwritten>,
    /// Archives whose packs the copy reads and that do not know of its branch: nothing there keeps anybody from deleting them.
    pub(super) unregistered: Vec<Unwritten>,
}

impl Restore {
    /// Restores by `plan`, around what turns out to be damaged; once more if a take-over finds that the old source got more into an archive
    /// after another one had been sealed.
    pub(super) fn execute(
        &mut self,
        mut plan: RestorePlan,
        unpinned: &[Unwritten],
        runtime: &Runtime,
        output: &Output,
    ) -> Result<Restored, CliError> {
        for _ in 0..ROUNDS_MAX {
            match self.execute_once(plan, unpinned, runtime, output)? {
                Ok(restored) => return Ok(restored),
                Err(beyond) => {
                    output.note(&format!(
                        "The old source got entries up to lsn {beyond} into an archive after another one was sealed: they are restored too"
                    ));
                    plan = runtime.block_on(self.plan(&self.excluded))?;
                }
            }
        }
        Err(CliError::new("the archives go on while they are sealed").hint("run it again with the same DIR"))
    }

    /// The same; `Err` with up to where the archives hold the history, if that is beyond what was restored.
    fn execute_once(
        &mut self,
        plan: RestorePlan,
        unpinned: &[Unwritten],
        runtime: &Runtime,
        output: &Output,
    ) -> Result<Result<Restored, Lsn>, CliError> {
        let first = self.archives.first().cloned();
        let first = first.ok_or_else(|| CliError::usage("give at least one archive"))?;
        let lineage = first.lineage();
        let staging = self.staging(lineage.branch)?;
        let identity = Identity::load_or_create(&staging.path).map_err(failed)?;
        let branch = if self.take_over { lineage.branch } else { BranchId::from_bytes(random()?) };
        let mut unregistered = match !self.take_over && self.blocks.is_none() {
            true => runtime.block_on(self.register(branch, identity.node())),
            false => Vec::new(),
        };
        let line = Arc::new(Mutex::new(ProgressLine::new(output)));
        let progress = on_progress(&line, plan.entries);
        let (index, state, as_of) = self.restore_tree(&staging, plan, runtime, &progress)?;
        self.check_tree(state, &index, &staging)?;
        let origin = SnapshotOrigin { branch: lineage.branch, created: SystemClock::new().wall() };
        write_base_file(&OsFiles, &staging.path, &*index.snapshot(), first.keys(), origin)?;
        let (config, copied) = self.restore_blocks(&staging, branch, &index, runtime, &progress)?;
        let percent_read = copied.as_ref().map_or(0, percent_copied);
        let lacks_packs = copied.as_ref().is_some_and(|copied| !copied.is_complete());
        if lacks_packs && !self.take_over {
            // It reads there what may still come.
            unregistered = runtime.block_on(self.register(branch, identity.node()));
        }
        let published = NodeConfig { blocks: self.final_blocks()?, ..config.clone() };
        published.write(&staging.path)?;
        let epoch = match self.take_over {
            true => match runtime.block_on(self.seal(&staging, state, identity.node()))? {
                (epoch, reached) if reached <= state.position.lsn => epoch,
                (_, beyond) => return Ok(Err(beyond)),
            },
            false => Epoch { number: state.position.epoch.number + 1, id: EpochId::from_bytes(random()?) },
        };
        let unfinished = |error: CliError| if self.take_over { unpublished(&error, &staging) } else { error };
        // What was copied is known. A copy that reads in archives disturbs nobody, and nobody waits for it.
        let looks = copied.is_none() && self.take_over;
        let mut packs = match copied {
            Some(copied) => copied,
            None if looks => self.look_for_packs(&index, runtime, &progress).map_err(unfinished)?,
            None => PackReport::default(),
        };
        let (packs_are_asked_for, lacking) = (lacks_packs || looks, std::mem::take(&mut packs.uncalled));
        drop(index);
        // A branch of its own has a log time of its own.
        let not_before = if self.take_over { as_of } else { LogTime::default() };
        let copy = CopyOf { state, not_before, epoch, is_successor: self.take_over, lacking };
        let begun = begin_copy(&staging.path, &config, &copy, runtime.handle()).map(drop);
        begun.and_then(|()| staging.publish()).map_err(unfinished)?;
        for example in &packs.examples {
            output.note(&format!("Not found: {example}"));
        }
        Ok(Ok(Restored {
            directory: self.directory.clone(),
            volume: lineage.volume.to_string(),
            branch: branch.to_string(),
            lsn: state.position.lsn.get(),
            digest: state.digest.to_string(),
            inodes: state.usage.inodes,
            packs_copied: packs.copied,
            packs_replaced: packs.replaced,
            missing_packs: packs.missing,
            unanswered_packs: packs.unanswered,
            packs_cut_short: packs.is_cut_short,
            packs_are_asked_for,
            position: state.position,
            percent_read,
            damaged_snapshots: self.excluded.len(),
            unpinned: unpinned.to_vec(),
            unregistered,
        }))
    }

    /// The directory in which the node is made. A take-over of `branch` that was cut short may have sealed: it is gone on with, by the node that has.
    fn staging(&self, branch: BranchId) -> Result<Staging, CliError> {
        let turn = match &self.turn {
            Some(turn) => Arc::clone(turn),
            None => Turn::take(&self.directory, COMMAND)?,
        };
        match self.take_over {
            true => Staging::resume(turn, &remembered(branch)),
            false => Staging::beside(turn),
        }
    }

    /// Says in every archive whose packs will be read that this branch refers to them. Returns those that did not take it.
    async fn register(&self, branch: BranchId, node: NodeId) -> Vec<Unwritten> {
        let mut unregistered = Vec::new();
        for archive in self.full() {
            let mut registry = Registry::new(archive.clone());
            let record = Record::Owner { branch: branch.to_string() };
            if let Err(error) = registry.append(node, SystemClock::new().wall(), record).await {
                tracing::warn!(url = archive.url(), %error, "it does not know of this copy");
                unregistered.push(Unwritten::new(archive, &error));
            }
        }
        unregistered
    }

    /// The tree in an index, and the log time of its last entry; a snapshot that turns out to be damaged is left out of the next plan, and counted.
    fn restore_tree(
        &mut self,
        staging: &Staging,
        mut plan: RestorePlan,
        runtime: &Runtime,
        progress: &OnProgress,
    ) -> Result<(Arc<FjallIndex>, State, LogTime), CliError> {
        let directory = index_directory(&staging.path);
        loop {
            let index = Arc::new(FjallIndex::open(&directory, FjallOptions::default()).map_err(failed)?);
            let into = Arc::clone(&index) as Arc<dyn Index>;
            let restored = runtime.block_on(restore_tree(&self.archives, &plan, into, Arc::clone(progress)));
            match restored {
                Ok(state) => return Ok((index, state, plan.route.end_time.unwrap_or_default())),
                Err(error) => self.exclude(error)?,
            }
            drop(index);
            FjallIndex::reset(&directory).map_err(failed)?;
            plan = runtime.block_on(self.plan(&self.excluded))?;
        }
    }

    /// Refuses a tree that nobody could use, or that another node may go on with.
    fn check_tree(&self, state: State, index: &FjallIndex, staging: &Staging) -> Result<(), CliError> {
        if state.usage.inodes == 0 {
            let lsn = state.position.lsn;
            return Err(CliError::new(format!("at lsn {lsn} the volume had no root directory yet"))
                .hint("choose a later moment (--lsn is rounded down to the end of what was decided together); if there is none, nothing was shipped to this archive yet"));
        }
        self.check_bytes(state.usage)?;
        if self.take_over {
            self.check_named(&*index.snapshot(), staging.kept())?;
        }
        Ok(())
    }

    /// Where new packs go once the node has its name.
    pub(super) fn final_blocks(&self) -> Result<StoreUrl, CliError> {
        match &self.blocks {
            Some(url) => Ok(url.clone()),
            None => {
                let directory = std::path::absolute(&self.directory).map_err(failed)?;
                StoreUrl::from_directory(&directory.join(OWN_BLOCKS)).map_err(failed)
            }
        }
    }

    /// The node's configuration while it has its temporary name, and what became of the packs if they were to be copied.
    fn restore_blocks(
        &self,
        staging: &Staging,
        branch: BranchId,
        index: &Arc<FjallIndex>,
        runtime: &Runtime,
        progress: &OnProgress,
    ) -> Result<(NodeConfig, Option<PackReport>), CliError> {
        let first = self.archives.first().ok_or_else(|| CliError::usage("give at least one archive"))?;
        let volume = first.lineage().volume;
        let own = match &self.blocks {
            Some(url) => url.clone(),
            None => StoreUrl::from_directory(&staging.path.join(OWN_BLOCKS)).map_err(failed)?,
        };
        let opened = own.open().map_err(failed)?;
        runtime.block_on(adopt_prefix(&opened, volume)).map_err(failed)?;
        let full = self.urls.iter().zip(&self.archives);
        let full = full.filter(|(_, archive)| archive.descriptor().kind == ArchiveKind::Full);
        let name = Settings::in_tree(&*index.snapshot())?.name_or(first);
        let mut config = NodeConfig::new(volume, branch, name, own.clone());
        if self.take_over {
            let own = self.urls.iter().filter(|url| shared_form(url) != url.to_string());
            config.archives = own.cloned().collect();
            config.archives_given_up.clone_from(&self.given_up.archives);
        }
        let full: Vec<(&StoreUrl, &Archive)> = full.collect();
        let urls = || full.iter().map(|(url, _)| (*url).clone()).collect();
        let sources: Vec<Arc<dyn BlockStore>> =
            full.iter().map(|(_, archive)| Arc::new(archive.packs()) as Arc<dyn BlockStore>).collect();
        if self.blocks.is_none() {
            config.packs_from = urls();
            return Ok((config, None));
        }
        let target: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::open(&own).map_err(failed)?);
        let tree = index.snapshot();
        let copied = runtime.block_on(restore_packs(&sources, &tree, target, Arc::clone(progress)));
        let copied = copied.map_err(failed)?;
        if !copied.is_complete() {
            // An archive that did not answer, or is mended, may still give what is missing.
            config.packs_from = urls();
        }
        Ok((config, Some(copied)))
    }

    /// Where packs stay in the archives: asks, for a successor, which packs of the tree none of them has. People should know what it lacks, and
    /// mirrors and archives must not wait for that. It does not come late because of that.
    fn look_for_packs(
        &self,
        index: &Arc<FjallIndex>,
        runtime: &Runtime,
        progress: &OnProgress,
    ) -> Result<PackReport, CliError> {
        let sources: Vec<Arc<dyn BlockStore>> =
            self.full().map(|archive| Arc::new(archive.packs()) as Arc<dyn BlockStore>).collect();
        let tree = index.snapshot();
        let looking = count_packs(&sources, &tree, COUNT_PATIENCE, Arc::clone(progress));
        runtime.block_on(looking).map_err(failed)
    }

    /// Ends the epoch of the old source in every archive, for an epoch that was remembered before. Says which, and up to where they hold the
    /// history then.
    async fn seal(&self, staging: &Staging, state: State, node: NodeId) -> Result<(Epoch, Lsn), CliError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let fence = |archive: &Archive| ArchiveFence::new(archive.clone(), node, Arc::clone(&clock), None);
        let fences: Vec<ArchiveFence> = self.archives.iter().map(fence).collect();
        let mut known = vec![state.position.epoch];
        known.extend(self.given_up_epochs.iter().copied());
        let mut held = Vec::new();
        for fence in &fences {
            let one = fence.adopt().await.map_err(failed)?;
            known.push(one.epoch);
            held.push(one);
        }
        // Of an archive that was sealed already the old source has heard.
        if !held.iter().flat_map(|held| &held.seals).any(|seal| seal.by == node)
            && let Some(silence) = &self.silence
        {
            let checks = fences.iter().zip(&held).map(|(fence, held)| silence.check(fence, held));
            checks.collect::<Result<(), _>>().map_err(not_silent)?;
        }
        // What cannot be published must not seal anything.
        staging.clear_the_way()?;
        let path = staging.keep(&remembered(self.archives[0].lineage().branch))?;
        let mut attempts = attempts::load(&path)?;
        let next = Successor::next_epoch(&attempts, &known, EpochId::from_bytes(random()?));
        if attempts.last() != Some(&next) {
            attempts.push(next);
            attempts::remember(&path, &attempts)?;
        }
        let successor = Successor { node, attempts, given_up: self.given_up.nodes.clone() };
        let own = self.blocks.as_ref().map(ObjectBlockStore::open).transpose().map_err(failed)?;
        let own = own.map(|own| Arc::new(own) as Arc<dyn BlockStore>);
        let silence = self.silence.as_ref();
        let taken = take_over_at(&fences, (&successor, own), state.position, silence).await;
        let reached = taken.map_err(|error| {
            let unfinished = staging.path.display();
            if let Some(way) = way_past(&error, &successor) {
                return failed(&error).hint(way);
            }
            failed(&error).hint(match error {
                TakeOverError::Fence { error: FenceError::Sealed(_), .. } => format!(
                    "if that was an attempt of your own, go on with the DIR that it was given; what this one has is kept in {unfinished}"
                ),
                TakeOverError::Fence { ref url, error: FenceError::Unavailable { .. } } => format!(
                    "run it again with the same DIR: it goes on with {unfinished}; without that archive, --assume-lost '{url}' gives it up, with whatever only it holds"
                ),
                TakeOverError::Lags { ref url, .. } | TakeOverError::Gap { ref url, .. } => format!(
                    "name an archive that has those entries as well, if there is one; --assume-lost '{url}' gives this one up, with whatever only it holds"
                ),
                TakeOverError::Behind { .. } => {
                    format!("run it again with the same DIR: it goes on with {unfinished} and reads that too")
                }
                _ => format!("run it again with the same DIR: it goes on with {unfinished}"),
            })
        })?;
        Ok((next, reached))
    }
}

fn percent_copied(packs: &PackReport) -> u8 {
    let all = packs.copied + packs.present + packs.missing + packs.unanswered;
    // Nothing to be copied is nothing that was shown.
    (packs.copied * 100).checked_div(all).and_then(|percent| u8::try_from(percent).ok()).unwrap_or(0)
}

/// The file in which a take-over of `branch` remembers which epoch it begins.
pub(super) fn remembered(branch: BranchId) -> String {
    format!("{branch}.json")
}

/// The successor for which every archive is sealed, and which did not get its name.
fn unpublished(error: &CliError, staging: &Staging) -> CliError {
    let why = error.hint.as_ref().map_or_else(String::new, |hint| format!(" ({hint})"));
    CliError::new(format!("{error}{why}; the archives are sealed for the successor in {}", staging.path.display()))
        .hint("leave that directory, see that DIR is not there or empty, and run the same command again: it goes on with it")
}

fn on_progress(line: &Arc<Mutex<ProgressLine>>, entries: u64) -> OnProgress {
    let line = Arc::clone(line);
    Arc::new(move |done: RestoreProgress| {
        let shown = match done {
            RestoreProgress { packs: 1.., .. } => Progress::new("packs restored", done.packs, 0),
            RestoreProgress { entries: 1.., .. } => Progress::new("entries replayed", done.entries, entries),
            _ => Progress::new("rows loaded", done.rows, 0),
        };
        line.lock().unwrap_or_else(PoisonError::into_inner).show(&shown);
    })
}

/// So often a tree is restored anew because more was archived meanwhile: once, since every archive is sealed then.
const ROUNDS_MAX: usize = 3;
/// How long a take-over looks for packs once it has sealed; the volume has no source meanwhile.
const COUNT_PATIENCE: Duration = Duration::from_secs(60);
/// The block store of a copy, in its own directory, unless another is given.
const OWN_BLOCKS: &str = "blocks";
