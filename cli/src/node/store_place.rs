//! Where a store of a new node may lie, and what is left there when nothing came of the node.
//!
//! Invariants:
//! - A store never lies in the directory that becomes the node: that must be empty until then.
//! - Of a directory that was made for a store nothing is left when the node was refused; what was there before is not touched.

use std::{
    fs,
    path::{Path, PathBuf},
};

use murphy_fs::StoreUrl;

use crate::error::{CliError, at};

/// Refuses a store in the directory of the new node. `option` is what named it. Nothing is made.
pub(crate) fn check_beside(directory: &Path, option: &str, store: &StoreUrl) -> Result<(), CliError> {
    let Some(own) = store.directory() else { return Ok(()) };
    let (own, target) = (resolved(own)?, resolved(directory)?);
    match own.starts_with(&target) {
        false => Ok(()),
        true => Err(CliError::usage(format!(
            "{option} {} lies in {}, which must be empty until the node is complete",
            own.display(),
            target.display()
        ))
        .hint("give a directory beside it")),
    }
}

/// Where `path` leads to, as far as it is there.
fn resolved(path: &Path) -> Result<PathBuf, CliError> {
    let path = std::path::absolute(path).map_err(at(path))?;
    let there = path.ancestors().find_map(|some| Some((some, some.canonicalize().ok()?)));
    let Some((some, there)) = there else { return Ok(path) };
    Ok(path.strip_prefix(some).map_or(there.clone(), |rest| there.join(rest)))
}

/// The directories that opening a store makes. They are removed again when this is dropped, as far as they are empty.
pub(crate) struct NewPlace {
    /// The deepest first.
    made: Vec<PathBuf>,
}

impl NewPlace {
    /// Looks before the store is opened: what is there is not ours to remove.
    pub(crate) fn before(store: &StoreUrl) -> NewPlace {
        let missing = store.directory().into_iter().flat_map(Path::ancestors);
        let missing = missing.take_while(|above| fs::symlink_metadata(above).is_err());
        NewPlace { made: missing.map(Path::to_owned).collect() }
    }

    /// The store is in use from now on.
    pub(crate) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for NewPlace {
    fn drop(&mut self) {
        let Some(store) = self.made.first() else { return };
        // Folders of objects that were deleted again.
        let inner = fs::read_dir(store).into_iter().flatten().flatten().map(|entry| entry.path());
        for directory in inner.chain(self.made.iter().cloned()) {
            if let Err(error) = fs::remove_dir(&directory) {
                tracing::debug!(directory = %directory.display(), %error, "what was begun there stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_resolved_as_far_as_it_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        let link = real.join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(resolved(&link.join("not/there")).unwrap(), real.join("not/there"));
        assert_eq!(resolved(&link).unwrap(), real);
    }

    /// The fear: the block store is made in the directory that must be empty to become the node, and every archive is sealed by then.
    #[test]
    fn a_store_below_the_directory_of_the_node_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        let node = folder.path().join("node");
        let url = |path: PathBuf| StoreUrl::from_directory(&path).unwrap();
        for inner in [node.join("blocks"), node.clone(), link.join("node/blocks/deep")] {
            let refused = check_beside(&node, "--blocks", &url(inner)).unwrap_err();
            assert!(refused.message.contains("lies in"), "{refused}");
        }
        for beside in [folder.path().join("node2"), folder.path().to_owned()] {
            check_beside(&node, "--blocks", &url(beside)).unwrap();
        }
    }

    /// The fear: what was there before is taken away with what was made, or is in the way of the next try.
    #[test]
    fn what_was_made_for_a_store_goes_and_what_was_there_stays() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there");
        fs::create_dir(&there).unwrap();
        let store = StoreUrl::from_directory(&there.join("a/b")).unwrap();
        let make = || {
            let place = NewPlace::before(&store);
            fs::create_dir_all(there.join("a/b/probe")).unwrap();
            place
        };
        drop(make());
        assert!(there.exists() && !there.join("a").exists());
        let used = make();
        fs::write(there.join("a/b/object"), "of somebody else").unwrap();
        drop(used);
        assert!(there.join("a/b/object").exists());
        make().keep();
        assert!(there.join("a/b/probe").exists());
    }
}
