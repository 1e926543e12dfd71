//! `murphy demo`: builds regions, loses one for good, comes back, proves every byte.
//!
//! Everything is real: the program's own binary in processes of their own, FUSE mounts, SIGKILL. What was written is known from outside:
//! a ledger beside the mounts says what was acknowledged, and a plain directory goes through the same operations. Where there is no FUSE, or
//! `MURPHY_DEMO_WITHOUT_FUSE` is set, the same processes read and write through the library, and the demo says so.
//!
//! Invariants:
//! - What the demo made it removes, also when it fails; with `--keep` it leaves everything and says where.
//! - A difference in any byte makes it fail.

mod compare;
mod ledger;
mod nodes;
mod operations;
mod regions;
mod report;
mod restores;
mod rounds;
mod tree;

use std::path::{Path, PathBuf};

use crate::{
    error::{CliError, Code, at},
    output::Output,
};
use nodes::Way;
use report::Report;

/// What the demo is asked to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct DemoOptions {
    /// The tree to copy in; without it, sources found on this machine.
    pub(crate) tree: Option<PathBuf>,
    /// Where to leave everything.
    pub(crate) keep: Option<PathBuf>,
}

/// Runs the demo.
pub(crate) fn run(options: &DemoOptions, output: &Output) -> Result<Code, CliError> {
    let (way, why) = Way::choose();
    let place = Place::new(options.keep.as_deref(), way)?;
    let source = tree::Sources::choose(options.tree.as_deref())?;
    output.note(&format!(
        "Murphy's demo: {} files, {} of real sources; everything happens in {}.",
        source.files.len(),
        crate::units::bytes_text(source.bytes),
        place.path.display()
    ));
    if let Some(why) = why {
        output
            .note(&format!("There is no FUSE here ({why}): files are read and written through the library."));
    }
    let mut report = Report::new(&source, way);
    rounds::survive_a_kill(&place, &source, &mut report, output)?;
    regions::lose_a_region(&place, &source, &mut report, output)?;
    regions::lose_a_region_with_mirror_ack(&place, &source, &mut report, output)?;
    report.print(output)?;
    Ok(if report.is_proven() { Code::Done } else { Code::Failed })
}

/// The directory in which everything happens.
pub(super) struct Place {
    path: PathBuf,
    keep: bool,
    /// How volumes are reached.
    way: Way,
}

impl Place {
    fn new(keep: Option<&Path>, way: Way) -> Result<Place, CliError> {
        let path = match keep {
            Some(path) => path.to_owned(),
            None => std::env::temp_dir().join(format!("murphy-demo-{}", std::process::id())),
        };
        std::fs::create_dir_all(&path).map_err(at(&path))?;
        if std::fs::read_dir(&path).map_err(at(&path))?.next().is_some() {
            return Err(
                CliError::new(format!("{} is not empty", path.display())).hint("give --keep a new directory")
            );
        }
        let path = path.canonicalize().map_err(at(&path))?;
        Ok(Place { path, keep: keep.is_some(), way })
    }

    /// A new directory in it.
    fn directory(&self, name: &str) -> Result<PathBuf, CliError> {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path).map_err(at(&path))?;
        Ok(path)
    }

    /// A path in it.
    fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the demo's directory was not removed");
        }
    }
}
