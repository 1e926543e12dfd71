//! `murphy load`: a new node from a dump.
//!
//! Invariants:
//! - The copy is published only if every pack that it refers to is in its store.
//! - What was begun and failed is removed again, in the store too.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use murphy_fs::{
    FjallIndex, FjallOptions, Index, ReadSnapshotError, SnapshotReader, adopt_prefix, check_prefix,
    release_prefix,
};
use murphy_log::{BranchId, Epoch, EpochId, LogTime, OsFiles, State};
use tokio::runtime::Runtime;

use super::format::parse_url;
use crate::{
    check,
    config::NodeConfig,
    error::{CliError, Code, at, failed},
    node::{BaseWriter, CopyOf, NewPlace, Staging, Turn, begin_copy, check_beside, index_directory, random},
    output::Output,
    progress::{Progress, ProgressLine},
    settings::{Settings, parse_name},
};

/// Make a node from a dump
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Make a node from a dump\n\nThe copy is a branch of its own. The packs that the dump refers to must \
                  be in the block store: the one it was dumped from, or a copy of it.",
    after_help = "Example:\n  murphy load /backup/home.murphy /srv/copy --blocks s3://bucket/home"
)]
pub(crate) struct LoadArgs {
    /// The dump, or - for stdin
    #[arg(value_name = "FILE|-")]
    file: PathBuf,
    /// The directory of the new node; it must not exist, or be empty
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Where the packs are, and new ones go
    #[arg(long, value_name = "URL")]
    blocks: String,
    /// What the copy is called; by default as the volume that was dumped
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
}

pub(crate) fn run(args: &LoadArgs, output: &Output) -> Result<Code, CliError> {
    let blocks = parse_url("--blocks", &args.blocks)?;
    check_beside(&args.directory, "--blocks", &blocks)?;
    let runtime = Runtime::new().map_err(failed)?;
    let staging = Staging::beside(Turn::take(&args.directory, "murphy load")?)?;
    let base = Arc::new(Mutex::new(BaseWriter::begin(&OsFiles, &staging.path)?));
    let tee = Tee { input: open(&args.file)?, copy: Arc::clone(&base) };
    let bad = |error: ReadSnapshotError| CliError::new(format!("{}: {error}", args.file.display()));
    let reader = SnapshotReader::open(BufReader::with_capacity(BUFFER_BYTES, tee)).map_err(bad)?;
    let header = *reader.header();
    let (state, dumped) = {
        let index = FjallIndex::open(&index_directory(&staging.path), FjallOptions::default());
        let index = index.map_err(failed)?;
        let line = ProgressLine::new(output);
        let inodes = header.state.usage.inodes;
        let progress = |done: murphy_fs::SnapshotProgress| {
            line.show(&Progress::new("inodes loaded", done.inodes, inodes));
        };
        let state = reader.load_into(&index, &progress).map_err(bad)?;
        (state, Settings::in_tree(&*index.snapshot())?.name)
    };
    let base = Arc::into_inner(base).expect("the reader, which had the other half, is gone");
    base.into_inner().unwrap_or_else(PoisonError::into_inner).publish()?;
    let (branch, name) = (BranchId::from_bytes(random()?), args.name.clone().unwrap_or(dumped));
    let config = NodeConfig::new(header.volume, branch, name, blocks.clone());
    let place = NewPlace::before(&blocks);
    let opened = blocks.open().map_err(failed)?;
    let is_marked = runtime.block_on(check_prefix(&opened, header.volume)).is_ok();
    runtime.block_on(adopt_prefix(&opened, header.volume)).map_err(failed)?;
    let made = publish(&staging, &config, state, &runtime);
    if let (Err(_), false) = (&made, is_marked)
        && let Err(left) = runtime.block_on(release_prefix(&opened, header.volume))
    {
        tracing::warn!(error = %left, "the mark of the unfinished copy stays in the block store");
    }
    made?;
    place.keep();
    let loaded = serde_json::json!({
        "directory": args.directory,
        "volume": config.volume.to_string(),
        "branch": config.branch.to_string(),
        "lsn": state.position.lsn.get(),
        "digest": state.digest.to_string(),
        "inodes": state.usage.inodes,
    });
    output.data(&loaded, |loaded| {
        format!("{} inodes of lsn {}, in branch {}", loaded["inodes"], loaded["lsn"], config.branch)
    })?;
    Ok(Code::Done)
}

/// Begins the copy of the tree at `state`, and gives it its name if its store has every pack.
fn publish(staging: &Staging, config: &NodeConfig, state: State, runtime: &Runtime) -> Result<(), CliError> {
    config.write(&staging.path)?;
    let epoch = Epoch { number: state.position.epoch.number + 1, id: EpochId::from_bytes(random()?) };
    let not_before = LogTime::default();
    let copy = CopyOf { state, not_before, epoch, is_successor: false, lacking: Vec::new() };
    let node = begin_copy(&staging.path, config, &copy, runtime.handle())?;
    let missing = check::missing_packs(&node, runtime.handle())?;
    drop(node);
    if let Some(first) = missing.first() {
        let (blocks, count) = (&config.blocks, missing.len());
        return Err(CliError::new(format!("{blocks} lacks {count} packs of the dump: {first}"))
            .hint("give the block store that the dump was made over, or a copy of it"));
    }
    staging.publish()
}

fn open(path: &Path) -> Result<Box<dyn Read + Send>, CliError> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(io::stdin()));
    }
    Ok(Box::new(File::open(path).map_err(at(path))?))
}

/// Keeps a copy of everything that is read.
struct Tee {
    input: Box<dyn Read + Send>,
    copy: Arc<Mutex<BaseWriter<'static>>>,
}

impl Read for Tee {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(bytes)?;
        self.copy.lock().unwrap_or_else(PoisonError::into_inner).write_all(&bytes[..count])?;
        Ok(count)
    }
}

const BUFFER_BYTES: usize = 1 << 20;
