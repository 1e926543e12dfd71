//! Histories for the benchmarks: frames as a source makes them, and what files of a node take.

use std::path::Path;

use murphy_fs::{DentryRow, DirectoryRow, Ino, InodeRow, Kind, Name, NameHasher, RowKey, Timespec};
use murphy_log::{
    Appender, Change, Digest, Entry, Epoch, EpochId, Frame, LogTime, Lsn, Requester, State, Usage, VolumeKeys,
};

/// The frames of `count` creates: directories of a thousand files, each with an inode, a name and its directory's row. Also
/// the state that they follow.
///
/// # Panics
/// If the log's own code refuses an entry of it.
pub fn creates(count: usize, keys: &VolumeKeys) -> (State, Vec<Frame>) {
    let mut frames = Vec::new();
    let base = for_each_create(count, keys, &mut |frame| frames.push(frame));
    (base, frames)
}

/// The state that such frames follow.
pub fn origin() -> State {
    State::origin(Epoch { number: 1, id: EpochId::from_bytes([2; 16]) })
}

/// Hands out the same frames one by one, and returns the state that they follow.
///
/// # Panics
/// As [`creates`].
pub fn for_each_create(count: usize, keys: &VolumeKeys, out: &mut dyn FnMut(Frame)) -> State {
    let base = origin();
    let mut appender = Appender::new(keys.clone(), base.position.epoch, base);
    let hasher = NameHasher::new(keys.derived("names of the replay benchmark"));
    let mut digest = Digest::default();
    let (mut directory, mut row) = (Ino::ROOT, DirectoryRow::default());
    let mut old_row: Option<Change> = None;
    for number in 0..count as u64 {
        let lsn = Lsn::FIRST.advanced(number);
        let time = LogTime::from_nanos(1_790_000_000_000_000_000 + number * 10_000);
        if number % 1000 == 0 {
            (directory, row, old_row) = (Ino::new(1 + number), DirectoryRow::default(), None);
        }
        let entry = create(lsn, time, directory, &mut row, &hasher);
        for change in &entry.changes {
            digest = digest.plus(row_digest(keys, change));
        }
        if let Some(old) = old_row.replace(entry.changes[2].clone()) {
            digest = digest.minus(row_digest(keys, &old));
        }
        let usage = Usage { inodes: number + 2, bytes: 0 };
        appender.push(&entry, digest, usage).expect("the entry is the next one");
        if appender.should_close(time) {
            std::iter::from_fn(|| appender.close(time, Lsn::ROOT)).for_each(&mut *out);
        }
    }
    std::iter::from_fn(|| appender.close(LogTime::default(), Lsn::ROOT)).for_each(out);
    base
}

fn row_digest(keys: &VolumeKeys, change: &Change) -> Digest {
    keys.row_digest(change.table, &change.key, change.value.as_deref().unwrap_or_default())
}

fn create(lsn: Lsn, time: LogTime, parent: Ino, directory: &mut DirectoryRow, hasher: &NameHasher) -> Entry {
    let (ino, now) = (Ino::born_at(lsn), Timespec::from(time));
    let name = Name::new(format!("file-{:08}.txt", lsn.get())).expect("a short name");
    let cookie = hasher.place(&name).get();
    let empty = InodeRow::empty(Kind::File, now);
    let inode = InodeRow { mode: 0o644, uid: 1000, gid: 1000, parent, cookie, ..empty };
    *directory = DirectoryRow { children: directory.children + 1, mtime: now, ctime: now, ..*directory };
    let dentry = DentryRow { named: Some((name.clone(), ino, Kind::File)), more: false };
    let change = |key: RowKey, value| Change { table: key.table(), key: key.key_bytes(), value: Some(value) };
    Entry {
        lsn,
        time,
        kind: 1,
        caller: Some(Requester { uid: 1000, gid: 1000, pid: 4242 }),
        request: None,
        names: vec![name.to_bytes()],
        changes: vec![
            change(RowKey::inode(ino), inode.encode()),
            change(RowKey::dentry(parent, cookie), dentry.encode()),
            change(RowKey::directory(parent), directory.encode()),
        ],
    }
}

/// Bytes that the files below `directory` take on disk.
///
/// # Panics
/// If it cannot be read.
pub fn bytes_on_disk(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(directory).expect("a directory");
    let sizes = entries.map(|entry| {
        let entry = entry.expect("a readable directory");
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_on_disk(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            // Removed meanwhile by whoever owns it.
            Err(_) => 0,
        }
    });
    sizes.sum()
}
