//! The packs that are known to be whole in the own store although the data position does not cover them yet, over restarts too.
//!
//! Invariants:
//! - What is remembered was put, or read whole, by a copier of this node, into the store and with the digest that are asked about.
//! - Nothing relies on it: whatever is forgotten, torn or damaged here is read once more.
//! - Memory and file have a limit.

use std::{
    collections::HashSet,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    path::PathBuf,
};

use murphy_fs::PackMeta;
use parking_lot::Mutex;

use super::CursorFile;

/// What was copied ahead of the data position.
#[derive(Debug)]
pub(super) struct Ahead {
    path: PathBuf,
    store: String,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    records: HashSet<Record>,
    /// Open once something was written; not any more after an error, so that no record follows a torn one.
    file: Option<File>,
    is_broken: bool,
}

/// A keyed hash of everything that was verified: a damaged one is that of no pack.
type Record = [u8; RECORD_BYTES];

impl Ahead {
    /// What is remembered beside `cursor` of the store with this label.
    pub(super) fn load(cursor: &CursorFile, store: &str) -> Ahead {
        let mut name = cursor.0.clone().into_os_string();
        name.push(".ahead");
        let path = PathBuf::from(name);
        let records = read_records(&path).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "packs that were copied ahead are read once more");
            HashSet::new()
        });
        let known = Mutex::new(Known { records, ..Known::default() });
        Ahead { path, store: store.to_owned(), known }
    }

    pub(super) fn has(&self, meta: &PackMeta) -> bool {
        self.known.lock().records.contains(&self.record(meta))
    }

    /// Remembers a pack that is whole in the store, durably. The note itself is not synced: a power cut costs reading it once more.
    pub(super) fn add(&self, meta: &PackMeta) {
        let record = self.record(meta);
        let mut known = self.known.lock();
        if known.records.len() >= RECORDS_MAX || !known.records.insert(record) || known.is_broken {
            return;
        }
        if let Err(error) = self.append(&mut known, &record) {
            tracing::warn!(path = %self.path.display(), %error, "after a restart packs are read once more");
            known.is_broken = true;
        }
    }

    /// Forgets everything: the saved cursor covers it.
    pub(super) fn clear(&self) {
        let mut known = self.known.lock();
        if known.records.is_empty() {
            return;
        }
        known.records.clear();
        known.file = None;
        if let Err(error) = truncate(&self.path, 0) {
            tracing::warn!(path = %self.path.display(), %error, "what the cursor covers is not forgotten");
        }
    }

    fn append(&self, known: &mut Known, record: &Record) -> io::Result<()> {
        let mut file = match known.file.take() {
            Some(file) => file,
            None => {
                let file = OpenOptions::new().create(true).append(true).open(&self.path)?;
                let length = file.metadata()?.len();
                file.set_len(length - length % RECORD_BYTES as u64)?;
                file
            }
        };
        file.write_all(record)?;
        known.file = Some(file);
        Ok(())
    }

    fn record(&self, meta: &PackMeta) -> Record {
        let mut hash = blake3::Hasher::new_derive_key(PURPOSE);
        hash.update(meta.footer_digest.as_bytes());
        hash.update(meta.name.to_string().as_bytes());
        hash.update(&[0]);
        hash.update(self.store.as_bytes());
        let mut record = [0; RECORD_BYTES];
        record.copy_from_slice(&hash.finalize().as_bytes()[..RECORD_BYTES]);
        record
    }
}

fn read_records(path: &PathBuf) -> io::Result<HashSet<Record>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HashSet::new()),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take((RECORDS_MAX * RECORD_BYTES) as u64).read_to_end(&mut bytes)?;
    let (records, _torn) = bytes.as_chunks::<RECORD_BYTES>();
    Ok(records.iter().copied().collect())
}

fn truncate(path: &PathBuf, length: u64) -> io::Result<()> {
    match OpenOptions::new().write(true).open(path) {
        Ok(file) => file.set_len(length),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

const PURPOSE: &str = "murphy copier ahead 0";
const RECORD_BYTES: usize = 16;
/// 16 MiB, for 4 TiB in packs of full size. What is beyond is read once more after a restart.
const RECORDS_MAX: usize = 1 << 20;
