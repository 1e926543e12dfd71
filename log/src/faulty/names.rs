//! The names on a faulty disk: what processes see, what is certain, and what lies between.
//!
//! Invariants:
//! - A rename is not torn: a power cut leaves the old name or the new one.
//! - A name whose directory is not there after a power cut is not there either.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use super::Chance;

pub(super) type NodeId = u64;

/// What a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Node {
    File(NodeId),
    Directory,
}

#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Add(PathBuf, Node),
    Remove(PathBuf),
    /// What had the first name gets the second.
    Rename(PathBuf, PathBuf, Node),
}

impl NameChange {
    /// Whether syncing `directory` makes it certain.
    fn is_in(&self, directory: &Path) -> bool {
        match self {
            NameChange::Add(path, _) | NameChange::Remove(path) => path.parent() == Some(directory),
            NameChange::Rename(from, to, _) => {
                from.parent() == Some(directory) || to.parent() == Some(directory)
            }
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Names {
    visible: BTreeMap<PathBuf, Node>,
    durable: BTreeMap<PathBuf, Node>,
    /// What has happened to the visible names since they were durable, in order.
    pending: Vec<NameChange>,
}

impl Default for Names {
    fn default() -> Names {
        let root = BTreeMap::from([(PathBuf::from("/"), Node::Directory)]);
        Names { visible: root.clone(), durable: root, pending: Vec::new() }
    }
}

impl Names {
    pub(super) fn find(&self, path: &Path) -> Option<Node> {
        self.visible.get(path).copied()
    }

    pub(super) fn visible(&self) -> impl Iterator<Item = (&PathBuf, &Node)> {
        self.visible.iter()
    }

    /// The files that have a name, each once or more.
    pub(super) fn files(&self) -> impl Iterator<Item = NodeId> {
        self.visible.values().filter_map(|node| match node {
            Node::File(node) => Some(*node),
            Node::Directory => None,
        })
    }

    pub(super) fn change(&mut self, change: NameChange) -> io::Result<()> {
        if let NameChange::Add(path, _) | NameChange::Rename(_, path, _) = &change
            && path.parent().and_then(|parent| self.find(parent)) != Some(Node::Directory)
        {
            return Err(io::ErrorKind::NotFound.into());
        }
        if !apply(&mut self.visible, &change) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.pending.push(change);
        Ok(())
    }

    /// Makes what has happened in `directory` certain.
    pub(super) fn sync(&mut self, directory: &Path) {
        let (synced, left) =
            std::mem::take(&mut self.pending).into_iter().partition(|one| one.is_in(directory));
        self.pending = left;
        let synced: Vec<NameChange> = synced;
        for change in synced {
            apply(&mut self.durable, &change);
        }
    }

    /// What a power cut leaves.
    pub(super) fn survivors(&self, chance: &mut Chance) -> Names {
        let mut left = self.durable.clone();
        for change in &self.pending {
            if chance.keeps() {
                // What it builds on may have been lost, and then it is lost too.
                apply(&mut left, change);
            }
        }
        let is_reachable =
            |path: &PathBuf| path.ancestors().skip(1).all(|above| left.get(above) == Some(&Node::Directory));
        let left: BTreeMap<PathBuf, Node> = left
            .iter()
            .filter(|(path, _)| is_reachable(path))
            .map(|(path, node)| (path.clone(), *node))
            .collect();
        Names { visible: left.clone(), durable: left, pending: Vec::new() }
    }
}

/// Says whether what it works on was there.
fn apply(names: &mut BTreeMap<PathBuf, Node>, change: &NameChange) -> bool {
    match change {
        NameChange::Add(path, node) => {
            names.insert(path.clone(), *node);
            true
        }
        NameChange::Remove(path) => names.remove(path).is_some(),
        NameChange::Rename(from, to, Node::File(node)) => {
            // If the first name was lost, or is another file's by now, the second is still that of this one.
            if names.get(from) == Some(&Node::File(*node)) {
                names.remove(from);
            }
            names.insert(to.clone(), Node::File(*node));
            true
        }
        NameChange::Rename(from, to, Node::Directory) => {
            let moved: Vec<PathBuf> = names.keys().filter(|path| path.starts_with(from)).cloned().collect();
            if !moved.is_empty() {
                names.retain(|path, _| !path.starts_with(to));
            }
            for path in &moved {
                let (Some(node), Ok(rest)) = (names.remove(path), path.strip_prefix(from)) else { continue };
                names.insert(if path == from { to.clone() } else { to.join(rest) }, node);
            }
            !moved.is_empty()
        }
    }
}
