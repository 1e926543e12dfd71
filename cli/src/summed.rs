//! Small files of a node whose word counts: one line of JSON, and the checksum of it.
//!
//! A flipped digit of a promise, of an attempt or of who acknowledges would be believed like any other: two sources, or one that ends for
//! nothing.
//!
//! Invariants:
//! - A file is replaced as a whole, and is durable when [`write`] returns.
//! - What does not match its checksum is damaged, whatever it says.

use std::{fs, io, path::Path};

use murphy_log::{OsFiles, replace_file};
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{CliError, at, failed};

/// What the file at `path` says; `None` if there is none. One that is damaged is an error with this way out.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, way_out: &str) -> Result<Option<T>, CliError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(path)(error)),
    };
    let damaged = |what: &dyn std::fmt::Display| {
        CliError::new(format!("{} is damaged: {what}", path.display())).hint(way_out)
    };
    let line = line(&bytes).ok_or_else(|| damaged(&"it does not match its checksum"))?;
    serde_json::from_str(line).map(Some).map_err(|error| damaged(&error))
}

/// Replaces the file at `path`.
pub(crate) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), CliError> {
    let line = serde_json::to_string(value).map_err(failed)?;
    replace_file(&OsFiles, path, format!("{line}\n{}\n", sum(&line)).as_bytes()).map_err(at(path))
}

fn line(bytes: &[u8]) -> Option<&str> {
    let (line, found) = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?.split_once('\n')?;
    (found == sum(line)).then_some(line)
}

fn sum(line: &str) -> String {
    blake3::hash(line.as_bytes()).to_hex()[..SUM_CHARS].to_owned()
}

const SUM_CHARS: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    /// A lower number in a promise, and a mirror acknowledges to a source that was replaced.
    #[test]
    fn no_flipped_bit_of_a_small_file_is_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("promised.json");
        assert_eq!(read::<Vec<u32>>(&path, "put it back").unwrap(), None);
        write(&path, &vec![12, 345]).unwrap();
        assert_eq!(read(&path, "put it back").unwrap(), Some(vec![12, 345]));
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut damaged = good.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, damaged).unwrap();
            let refused = read::<Vec<u32>>(&path, "put it back").unwrap_err().to_string();
            assert!(refused.contains("promised.json is damaged"), "bit {bit}: {refused}");
        }
        fs::write(&path, b"").unwrap();
        assert!(read::<Vec<u32>>(&path, "put it back").is_err());
    }
}
