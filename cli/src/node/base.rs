//! `DIR/base/`: the snapshot that a log begins after, when it does not begin with the volume.
//!
//! Invariants:
//! - A base is complete and verified before it has its name; it is never changed.

use std::{
    io::{self, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use murphy_fs::{Index, IndexSnapshot, SnapshotOrigin, SnapshotReader, write_snapshot};
use murphy_log::{FileReader, FileWriter, Files, Lsn, State, VolumeKeys, rename_durably, unfinished};

use crate::error::{CliError, at, failed};

/// A base that is being written. It has no name before [`BaseWriter::publish`].
pub(crate) struct BaseWriter<'a> {
    files: &'a dyn Files,
    node: PathBuf,
    out: FileWriter,
}

impl<'a> BaseWriter<'a> {
    /// Begins the base of the node in `node`.
    pub(crate) fn begin(files: &'a dyn Files, node: &Path) -> Result<BaseWriter<'a>, CliError> {
        let folder = node.join(BASE);
        files.create_dir(&folder).map_err(at(&folder))?;
        let partial = unfinished(&base_file(node));
        let out = FileWriter::new(files.create(&partial).map_err(at(&partial))?);
        Ok(BaseWriter { files, node: node.to_owned(), out })
    }

    /// Gives what was written its name; durable when it returns.
    pub(crate) fn publish(self) -> Result<(), CliError> {
        let path = base_file(&self.node);
        let published = self.out.sync().and_then(|()| rename_durably(self.files, &unfinished(&path), &path));
        published.map_err(at(&path))
    }
}

impl Write for BaseWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes the tree in `source` as the base of the node in `node`.
pub(crate) fn write_base_file(
    files: &dyn Files,
    node: &Path,
    source: &dyn IndexSnapshot,
    keys: &VolumeKeys,
    origin: SnapshotOrigin,
) -> Result<(), CliError> {
    let mut out = BufWriter::new(BaseWriter::begin(files, node)?);
    write_snapshot(source, keys, origin, &mut out, &|_| {}).map_err(failed)?;
    let base = out.into_inner().map_err(|error| at(&base_file(node))(error.into_error()))?;
    base.publish()
}

/// Loads the base of a node, if it has one, into an index that holds nothing; the log must go on where it ends.
pub(super) fn load_base_file(
    files: &dyn Files,
    node: &Path,
    index: &dyn Index,
    log_begins: Lsn,
) -> Result<Option<State>, CliError> {
    let path = base_file(node);
    let file = match files.open(&path) {
        Ok(file) => FileReader::new(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(&path)(error)),
    };
    let bad = |error: &dyn std::fmt::Display| {
        CliError::new(format!("{}: {error}", path.display()))
            .hint("restore the node from an archive, or seed it from a mirror")
            .wrong()
    };
    let reader = SnapshotReader::open(BufReader::new(file)).map_err(|error| bad(&error))?;
    let base = reader.header().state.position;
    if base.lsn.next() < log_begins {
        return Err(bad(&format!("it ends at lsn {}, the log begins at {log_begins}", base.lsn)));
    }
    reader.load_into(index, &|_| {}).map(Some).map_err(|error| bad(&error))
}

/// The state of the base of a node, as its header says, if it has one that can be read.
pub(super) fn base_state(node: &Path) -> Option<State> {
    let file = std::fs::File::open(base_file(node)).ok()?;
    Some(SnapshotReader::open(BufReader::new(file)).ok()?.header().state)
}

/// Where the base of a node is.
pub(crate) fn base_file(node: &Path) -> PathBuf {
    node.join(BASE).join(FILE)
}

const BASE: &str = "base";
const FILE: &str = "base.snapshot";

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use murphy_fs::MemoryIndex;
    use murphy_log::{
        BranchId, ChainHash, Digest, Epoch, EpochId, LogTime, Position, Usage, VolumeId, faulty::FaultyDisk,
    };

    use super::*;

    fn keys() -> VolumeKeys {
        VolumeKeys::derive(VolumeId::from_bytes([1; 16]))
    }

    /// An index with so many rows, and the state that they make.
    fn tree(rows: u8) -> (MemoryIndex, State) {
        let index = MemoryIndex::new();
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([7; 16]) };
        let position = Position { epoch, lsn: Lsn::new(1000 + u64::from(rows)), hash: ChainHash::default() };
        let mut digest = Digest::default();
        let rows: Vec<_> = (0..rows)
            .map(|number| {
                let key = murphy_fs::RowKey::setting(&format!("s{number:03}"));
                (key, Some(Bytes::from(vec![number; 64])))
            })
            .collect();
        for (key, value) in &rows {
            if murphy_fs::Table::in_digest(key.table())
                && let Some(value) = value
            {
                digest = digest.plus(keys().row_digest(key.table(), key.key(), value));
            }
        }
        let state = State { position, digest, usage: Usage::default() };
        index.ingest(&mut rows.into_iter(), &state).unwrap();
        (index, state)
    }

    fn write(disk: &FaultyDisk, rows: u8) -> State {
        let (index, state) = tree(rows);
        let origin = SnapshotOrigin { branch: BranchId::from_bytes([2; 16]), created: LogTime::default() };
        write_base_file(disk, Path::new("/node"), &*index.snapshot(), &keys(), origin).unwrap();
        state
    }

    fn loaded(disk: &FaultyDisk) -> Option<State> {
        load_base_file(disk, Path::new("/node"), &MemoryIndex::new(), Lsn::FIRST).unwrap()
    }

    /// A log that begins after a base is worth nothing without it.
    #[test]
    fn a_base_is_there_whole_or_not_at_all_and_stays() {
        let disk = FaultyDisk::new();
        disk.create_dir(Path::new("/node")).unwrap();
        disk.record();
        let first = write(&disk, 20);
        let published = disk.recorded();
        let second = write(&disk, 250);
        for (at, moment) in disk.take_recorded().into_iter().enumerate() {
            for crashed in (0..20).map(|seed| moment.after_power_cut(seed)).chain([moment.after_kill()]) {
                let found = loaded(&crashed);
                assert!(found.is_some() || at + 1 < published, "moment {at}: the base is gone");
                assert!(found.is_none_or(|state| state == first || state == second), "moment {at}");
                // Whatever a crash has left there is in nobody's way.
                write(&crashed, 20);
                assert_eq!(loaded(&crashed.after_power_cut(0)), Some(first));
            }
        }
    }

    #[test]
    fn no_flipped_bit_in_a_base_passes() {
        let disk = FaultyDisk::new();
        disk.create_dir(Path::new("/node")).unwrap();
        write(&disk, 20);
        let path = base_file(Path::new("/node"));
        let bytes = disk.contents().into_iter().find(|(found, _)| *found == path).unwrap().1;
        for bit in 0..bytes.len() * 8 {
            let damaged = disk.after_kill();
            damaged.damage(&path, |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            let index = MemoryIndex::new();
            let refused = load_base_file(&damaged, Path::new("/node"), &index, Lsn::FIRST);
            assert!(refused.is_err(), "byte {} of {}", bit / 8, bytes.len());
        }
    }
}
