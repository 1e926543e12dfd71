//! What a tree may look like after a crash, path by path, and what it must look like: the ledger of one writer.
//!
//! A writer says what it is about to do ([`Ledger::begin`]), that the call returned ([`Ledger::done`]), and that fsync of file and directory
//! returned ([`Ledger::acknowledge`]). [`Ledger::check`] then holds a tree that came back from a crash against it.
//!
//! Invariants:
//! - After an acknowledgement a path has one allowed state, and everything that returned before it keeps its name: the log is one order.
//! - A state that a crash left behind is the only one that the next crash may show.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
};

/// A state in which a path may be found.
#[derive(Clone, PartialEq, Eq)]
pub enum Found {
    /// There is nothing.
    Absent,
    /// A file with the first `least` or more of these bytes, in order, and nothing else.
    Grown {
        /// How many of them at least.
        least: usize,
        /// All of them.
        bytes: Vec<u8>,
    },
    /// A file of which each byte is the old or the new one; both have the same length.
    Mixed {
        /// Before.
        old: Vec<u8>,
        /// After.
        new: Vec<u8>,
    },
}

impl Found {
    /// Exactly these bytes.
    pub fn whole(bytes: Vec<u8>) -> Found {
        Found::Grown { least: bytes.len(), bytes }
    }

    fn allows(&self, state: Option<&[u8]>) -> bool {
        match (self, state) {
            (Found::Absent, state) => state.is_none(),
            (_, None) => false,
            (Found::Grown { least, bytes }, Some(found)) => found.len() >= *least && bytes.starts_with(found),
            (Found::Mixed { old, new }, Some(found)) => {
                found.len() == new.len()
                    && found.iter().zip(old).zip(new).all(|((byte, old), new)| byte == old || byte == new)
            }
        }
    }
}

impl fmt::Debug for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Absent => f.write_str("absent"),
            Found::Grown { least, bytes } => write!(f, "{least} to {} bytes", bytes.len()),
            Found::Mixed { new, .. } => write!(f, "{} bytes, each old or new", new.len()),
        }
    }
}

/// What one writer did to one path.
#[derive(Debug)]
struct PathState {
    /// In which states a crash may leave it.
    allowed: Vec<Found>,
    /// In which once the log so far is durable; `None` if nothing has been done since it was.
    returned: Option<Vec<Found>>,
    /// What it holds if nothing crashes.
    live: Option<Vec<u8>>,
    /// The last line that speaks of it.
    line: Option<usize>,
}

/// The ledger of one writer: it alone touches its paths.
#[derive(Debug, Default)]
pub struct Ledger {
    paths: BTreeMap<PathBuf, PathState>,
    lines: usize,
    /// Renames of which a crash may show either side, and never both or none.
    moves: Vec<(PathBuf, PathBuf)>,
}

impl Ledger {
    /// Lines so far: acknowledged operations.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// Paths that it knows.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.paths.keys().map(PathBuf::as_path)
    }

    /// What a path holds if nothing crashes.
    pub fn live(&self, path: &Path) -> Option<&[u8]> {
        self.paths.get(path)?.live.as_deref()
    }

    /// Whether a crash can leave it in one state only, once the log so far is durable.
    pub fn is_certain(&self, path: &Path) -> bool {
        self.paths.get(path).is_some_and(|state| {
            let states = state.returned.as_ref().unwrap_or(&state.allowed);
            let whole = |found: &Found| match found {
                Found::Absent => true,
                Found::Grown { least, bytes } => *least == bytes.len(),
                Found::Mixed { old, new } => old == new,
            };
            matches!(&states[..], [one] if whole(one))
        })
    }

    /// From now on a crash may also leave `path` in one of these states.
    pub fn begin(&mut self, path: &Path, states: impl IntoIterator<Item = Found>) {
        self.state(path).allowed.extend(states);
    }

    /// A name is about to move to one that is free: a crash shows one of them.
    pub fn begin_move(&mut self, from: &Path, to: &Path) {
        self.begin(from, [Found::Absent]);
        let moved = self.live(from).map(|bytes| Found::whole(bytes.to_vec()));
        self.begin(to, moved);
        self.moves.push((from.to_owned(), to.to_owned()));
    }

    /// The call returned: the path holds `live`, and once the log is durable a crash leaves one of `states`.
    pub fn done(&mut self, path: &Path, live: Option<Vec<u8>>, states: Vec<Found>) {
        let state = self.state(path);
        state.live = live;
        state.returned = Some(states);
    }

    /// fsync of the file and of its directory returned, after the call that left the paths with what they hold: one more line.
    pub fn acknowledge(&mut self, paths: &[&Path]) {
        self.lines += 1;
        for state in self.paths.values_mut() {
            if let Some(returned) = state.returned.take() {
                state.allowed = returned;
            }
        }
        for path in paths {
            let line = self.lines;
            let state = self.state(path);
            state.allowed = vec![state.live.clone().map_or(Found::Absent, Found::whole)];
            state.line = Some(line);
        }
        self.moves.clear();
    }

    /// Holds a tree that came back from a crash against every path; what is found is what counts from now on.
    ///
    /// # Errors
    /// What cannot be read, with its path.
    pub fn check(&mut self, root: &Path) -> io::Result<Vec<String>> {
        let mut wrong = Vec::new();
        for (from, to) in std::mem::take(&mut self.moves) {
            let there = [&from, &to].map(|path| fs::symlink_metadata(root.join(path)).is_ok());
            if there[0] == there[1] {
                wrong.push(format!(
                    "a rename of {} to {} was torn: {there:?} are there",
                    from.display(),
                    to.display()
                ));
            }
        }
        for (path, state) in &mut self.paths {
            let found = read(&root.join(path))?;
            if !state.allowed.iter().any(|allowed| allowed.allows(found.as_deref())) {
                let length = found.as_ref().map(Vec::len);
                wrong.push(format!(
                    "{}: {length:?} bytes found, allowed are {:?}; last line {:?}",
                    path.display(),
                    state.allowed,
                    state.line
                ));
            }
            state.allowed = vec![found.clone().map_or(Found::Absent, Found::whole)];
            state.returned = None;
            state.live = found;
        }
        Ok(wrong)
    }

    /// Holds a tree that nothing has happened to against what every path should hold.
    ///
    /// # Errors
    /// What cannot be read, with its path.
    pub fn check_live(&self, root: &Path) -> io::Result<Vec<String>> {
        let mut wrong = Vec::new();
        for (path, state) in &self.paths {
            let found = read(&root.join(path))?;
            if found != state.live {
                let lengths = (found.map(|bytes| bytes.len()), state.live.as_ref().map(Vec::len));
                wrong.push(format!("{}: found and expected bytes: {lengths:?}", path.display()));
            }
        }
        Ok(wrong)
    }

    fn state(&mut self, path: &Path) -> &mut PathState {
        self.paths.entry(path.to_owned()).or_insert_with(|| PathState {
            allowed: vec![Found::Absent],
            returned: None,
            live: None,
            line: None,
        })
    }
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(bytes: &[u8], acknowledged: bool) -> Ledger {
        let (mut ledger, path) = (Ledger::default(), Path::new("f"));
        ledger.begin(path, [Found::Grown { least: 0, bytes: bytes.to_vec() }]);
        ledger.done(path, Some(bytes.to_vec()), vec![Found::Grown { least: 0, bytes: bytes.to_vec() }]);
        if acknowledged {
            ledger.acknowledge(&[path]);
        }
        ledger
    }

    fn verdict(mut ledger: Ledger, found: Option<&[u8]>) -> bool {
        let root = tempfile::tempdir().unwrap();
        if let Some(found) = found {
            fs::write(root.path().join("f"), found).unwrap();
        }
        ledger.check(root.path()).unwrap().is_empty()
    }

    /// The judge itself: a ledger that lets everything pass proves nothing.
    #[test]
    fn loss_and_foreign_bytes_are_seen_and_what_is_allowed_passes() {
        for (found, unsynced, synced) in [
            (None, true, false),
            (Some(&b""[..]), true, false),
            (Some(b"con"), true, false),
            (Some(b"content"), true, true),
            (Some(b"contents"), false, false),
            (Some(b"\0\0\0"), false, false),
            (Some(b"cont\0nt"), false, false),
        ] {
            assert_eq!(verdict(written(b"content", false), found), unsynced, "unsynced {found:?}");
            assert_eq!(verdict(written(b"content", true), found), synced, "synced {found:?}");
        }
    }

    /// A rename-over shows the old or the new, and an fsync of anything later makes it the new.
    #[test]
    fn a_replaced_file_is_the_old_or_the_new_one() {
        let replaced = || {
            let mut ledger = written(b"old", true);
            ledger.begin(Path::new("f"), [Found::whole(b"newer".to_vec())]);
            ledger.done(Path::new("f"), Some(b"newer".to_vec()), vec![Found::whole(b"newer".to_vec())]);
            ledger
        };
        for (found, allowed) in [
            (Some(&b"old"[..]), true),
            (Some(b"newer"), true),
            (Some(b""), false),
            (Some(b"new"), false),
            (None, false),
        ] {
            assert_eq!(verdict(replaced(), found), allowed, "{found:?}");
        }
        let mut later = replaced();
        later.acknowledge(&[]);
        assert!(!verdict(later, Some(b"old")));
    }

    /// Renames are one step.
    #[test]
    fn a_torn_rename_is_seen() {
        for (names, whole) in [(&["f"][..], true), (&["g"], true), (&["f", "g"], false), (&[], false)] {
            let mut ledger = written(b"x", true);
            ledger.begin_move(Path::new("f"), Path::new("g"));
            let root = tempfile::tempdir().unwrap();
            names.iter().for_each(|name| fs::write(root.path().join(name), b"x").unwrap());
            assert_eq!(ledger.check(root.path()).unwrap().is_empty(), whole, "{names:?}");
        }
    }
}
