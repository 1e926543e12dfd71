//! The small files of a node that carry a checksum, read and written as somebody does who was not told how the program does it: a line
//! of JSON, and the first half of its BLAKE3 in hexadecimal on a second line.

use std::{fs, path::Path};

use serde_json::Value;

/// What the file says; `None` if there is none, or it is being replaced.
pub fn read_summed(path: &Path) -> Option<Value> {
    let text = fs::read_to_string(path).ok()?;
    let (line, sum) = text.strip_suffix('\n')?.split_once('\n')?;
    assert_eq!(sum, sum_of(line), "{}", path.display());
    serde_json::from_str(line).ok()
}

/// Writes a file that says this.
///
/// # Panics
///
/// If it cannot be written.
pub fn write_summed(path: &Path, value: &Value) {
    let line = value.to_string();
    fs::write(path, format!("{line}\n{}\n", sum_of(&line))).expect("a directory of a node");
}

fn sum_of(line: &str) -> String {
    blake3::hash(line.as_bytes()).to_hex()[..32].to_owned()
}
