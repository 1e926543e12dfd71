//! A look at fjall's files before fjall opens them.
//!
//! fjall (3.1.13) reads a few counts before it has checked anything and reserves memory for as much: one damaged byte then asks for
//! gigabytes, and a failed allocation ends the process instead of the call. Those counts are looked at here.
//!
//! ```text
//! version and table files:  sections ..., table of contents, trailer
//! table of contents         "TOC!", count 4, then for each section: position 8, length 8, length of its name 2, name
//! trailer                   "SFA!", version 1, checksum type 1, checksum 16, position of the contents 8, their length 8
//! ```
//!
//! Numbers are little-endian. A file of another form is left to fjall, which refuses it by itself.
//!
//! Invariants:
//! - A file that fjall would open is never refused.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

/// Refuses, with `InvalidData`, the files of the database in `dir` that would make fjall ask for memory without limit.
pub(super) fn check_files(dir: &Path) -> io::Result<()> {
    let keyspaces = match fs::read_dir(dir.join("keyspaces")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        keyspaces => keyspaces?,
    };
    for keyspace in keyspaces {
        let keyspace = keyspace?.path();
        for folder in [keyspace.clone(), keyspace.join("tables")] {
            if !folder.is_dir() {
                continue;
            }
            for file in fs::read_dir(&folder)? {
                let file = file?;
                if file.file_type()?.is_file() {
                    check_file(&file.path())?;
                }
            }
        }
    }
    Ok(())
}

fn check_file(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let Some(contents) = read_contents(&file, length)? else {
        return Ok(());
    };
    let damaged = |what: &str| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged: {what}", path.display()))
    };
    let sections = parse_contents(&contents).ok_or_else(|| damaged("its table of contents"))?;
    for section in sections {
        // Both begin with a count, of what an index never has.
        let is_count = [&b"blob_files"[..], b"blob_gc_stats", b"linked_blob_files"].contains(&section.name);
        if is_count {
            let mut count = [1; 4];
            let read = file.read_at(&mut count, section.position)?;
            if count[..read].iter().any(|byte| *byte != 0) {
                return Err(damaged("it has blobs"));
            }
        }
    }
    Ok(())
}

/// The table of contents, if the file has the form.
fn read_contents(file: &File, length: u64) -> io::Result<Option<Vec<u8>>> {
    let mut trailer = [0; TRAILER_BYTES];
    let Some(trailer_at) = length.checked_sub(TRAILER_BYTES as u64) else {
        return Ok(None);
    };
    file.read_exact_at(&mut trailer, trailer_at)?;
    let position = u64_at(&trailer, TRAILER_BYTES - 16);
    let long = trailer_at.checked_sub(position).filter(|long| (8..=MAX_CONTENTS_BYTES).contains(long));
    let (true, Some(long)) = (trailer.starts_with(b"SFA!"), long) else {
        return Ok(None);
    };
    let mut contents = vec![0; long as usize];
    file.read_exact_at(&mut contents, position)?;
    Ok(contents.starts_with(b"TOC!").then_some(contents))
}

struct Section<'a> {
    name: &'a [u8],
    position: u64,
}

/// `None` if there are not as many sections as the count says.
fn parse_contents(contents: &[u8]) -> Option<Vec<Section<'_>>> {
    let (count, mut rest) = contents.get(4..)?.split_at_checked(4)?;
    let count = u32::from_le_bytes(count.try_into().ok()?);
    if count as usize > rest.len() / SECTION_BYTES {
        return None;
    }
    let mut sections = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let (fixed, after) = rest.split_at_checked(SECTION_BYTES)?;
        let length = u16::from_le_bytes([fixed[16], fixed[17]]);
        let (name, after) = after.split_at_checked(usize::from(length))?;
        sections.push(Section { name, position: u64_at(fixed, 0) });
        rest = after;
    }
    Some(sections)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

const TRAILER_BYTES: usize = 38;
/// What a section has in the contents before its name.
const SECTION_BYTES: usize = 18;
/// Contents are a dozen short names.
const MAX_CONTENTS_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::conformance::{Reference, open, some_generations};

    fn visit(dir: &Path, check: &mut dyn FnMut(&Path)) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { visit(&path, check) } else { check(&path) }
        }
    }

    /// fjall would ask for up to 170 GB.
    #[test]
    fn a_damaged_count_is_refused_before_memory_is_reserved_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path());
        Reference::new(some_generations(3, 40)).ingest(&index, 0..3);
        drop(index);
        let tables = dir.path().join("tables");
        check_files(&tables).unwrap();
        let (mut contents_seen, mut counts_seen) = (0, 0);
        visit(&tables.join("keyspaces"), &mut |path| {
            let good = fs::read(path).unwrap();
            let file = File::open(path).unwrap();
            let Some(contents) = read_contents(&file, good.len() as u64).unwrap() else {
                return;
            };
            let count_at = u64_at(&good, good.len() - 16) + 4;
            let counts = parse_contents(&contents).unwrap();
            let counts = counts.iter().filter(|section| section.name.starts_with(b"blob_"));
            let counts: Vec<_> = counts.map(|section| section.position).collect();
            (contents_seen, counts_seen) = (contents_seen + 1, counts_seen + counts.len());
            for at in counts.into_iter().chain([count_at]) {
                let mut damaged = good.clone();
                damaged[at as usize + 3] ^= 0x40;
                fs::write(path, damaged).unwrap();
                assert!(check_files(&tables).is_err(), "{path:?} at byte {at}");
            }
            fs::write(path, good).unwrap();
        });
        assert!(contents_seen > 3 && counts_seen >= 6, "{contents_seen} contents, {counts_seen} counts");
    }
}
