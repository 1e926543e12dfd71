//! The regions of a round: A with a source and its store, B with a mirror and its own, C with an archive.
//!
//! Invariants:
//! - What belongs to a region lies in one directory: who removes that has lost the region.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Stage,
    ledger::LEDGER,
    nodes::{Node, Served, number, wait_for},
    place::murphy,
};
use crate::error::{CliError, at};

/// A region with a node.
pub(super) struct Region {
    home: PathBuf,
    pub(super) served: Served,
}

impl Region {
    /// The only one of a volume, with a new volume in it.
    pub(super) fn format(stage: &Stage, round: &str, options: &[&str]) -> Result<Region, CliError> {
        let home = stage.place.directory(format!("{round}-a"))?;
        let mut format = murphy("format")?;
        format.arg(home.join(NODE)).args(["--name", round, "--blocks", &store(&home)]).args(options);
        stage.place.run(&mut format)?;
        Region::serve(stage, home)
    }

    /// One more, with a mirror of the source in `other` in it.
    fn join(stage: &Stage, round: &str, other: &Region) -> Result<Region, CliError> {
        let home = stage.place.directory(format!("{round}-b"))?;
        let token = stage.place.run(murphy("invite")?.arg(&other.served.node.directory))?;
        let token_file = home.join("token");
        std::fs::write(&token_file, token).map_err(at(&token_file))?;
        let mut join = murphy("join")?;
        join.arg(home.join(NODE)).arg("--token-file").arg(&token_file).args(["--blocks", &store(&home)]);
        stage.place.run(&mut join)?;
        Region::serve(stage, home)
    }

    fn serve(stage: &Stage, home: PathBuf) -> Result<Region, CliError> {
        let node = Node::new(stage.way, home.join(NODE), home.join("mount"));
        let served = Served::start(&stage.place, node, &["--listen", "127.0.0.1:0"])?;
        Ok(Region { home, served })
    }

    /// Its process dies; everything that is on its disk stays.
    pub(super) fn kill(self) -> Result<Node, CliError> {
        self.served.kill()
    }

    /// Its process dies, and node and store are gone.
    pub(super) fn destroy(self) -> Result<(), CliError> {
        let home = self.home.clone();
        self.kill()?;
        [NODE, STORE]
            .map(|part| home.join(part))
            .iter()
            .try_for_each(|part| std::fs::remove_dir_all(part).map_err(at(part)))
    }
}

/// Two regions with one volume.
pub(super) struct Regions {
    pub(super) a: Region,
    pub(super) b: Region,
}

impl Regions {
    /// Formats A, lets B join it, serves both, copies the sources in, and waits until B has every byte.
    pub(super) fn build(stage: &Stage, round: &str, options: &[&str]) -> Result<Regions, CliError> {
        let a = Region::format(stage, round, options)?;
        let b = Region::join(stage, round, &a)?;
        let (source, mirror) = (&a.served.node, &b.served.node);
        source.fill(&stage.sources, Path::new(LEDGER))?;
        let goal = source.durable_lsn()?;
        wait_for("region B to have every byte", COPY_MAX, || {
            Ok(number(&mirror.status()?, "data_lsn")? >= goal)
        })?;
        Ok(Regions { a, b })
    }
}

/// The URL of a region's block store.
fn store(home: &Path) -> String {
    format!("file://{}", home.join(STORE).display())
}

/// The URL of an archive in a region C.
pub(super) fn archive(stage: &Stage, round: &str) -> Result<String, CliError> {
    let home = stage.place.directory(format!("{round}-c"))?;
    Ok(format!("file://{}?domain=region-c", home.join("archive").display()))
}

const NODE: &str = "node";
const STORE: &str = "store";
const COPY_MAX: Duration = Duration::from_secs(120);
