//! The saved cursor: how far this node knows an archive to hold its log.
//!
//! Invariants:
//! - What a cursor says was archived, and durable in the log, when it was saved: recovery takes it as known durable.
//! - A file is replaced whole: after a crash there is the old cursor or the new one.

use std::{fs, io, path::PathBuf};

use murphy_log::{Epoch, OsFiles, replace_file};
use serde::{Deserialize, Serialize};

use crate::{
    document::{self, DocumentError, PositionText},
    walk::Boundary,
};

/// Where a shipper remembers how far it has come.
pub trait SaveCursor: Send + Sync {
    /// Returns when `boundary` is remembered durably. Called on a thread that may block.
    fn save(&self, boundary: &Boundary) -> Result<(), CursorError>;
}

/// Remembers nothing: for whoever ships once.
#[derive(Clone, Copy, Debug)]
pub struct NoCursor;

impl SaveCursor for NoCursor {
    fn save(&self, _: &Boundary) -> Result<(), CursorError> {
        Ok(())
    }
}

/// A cursor in a file of the node's directory.
#[derive(Clone, Debug)]
pub struct CursorFile {
    path: PathBuf,
}

impl CursorFile {
    /// The cursor at `path`, which need not exist.
    pub fn new(path: PathBuf) -> CursorFile {
        CursorFile { path }
    }

    /// What was saved last; `None` if nothing was.
    pub fn load(&self) -> Result<Option<Boundary>, CursorError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io(error)),
        };
        let parsed = document::decode::<CursorText>(CURSOR_KIND, &bytes).and_then(|text| text.parse());
        parsed.map(Some).map_err(|reason| CursorError::Damaged { path: self.path.clone(), reason })
    }

    fn io(&self, source: io::Error) -> CursorError {
        CursorError::Io { path: self.path.clone(), source }
    }
}

impl SaveCursor for CursorFile {
    fn save(&self, boundary: &Boundary) -> Result<(), CursorError> {
        let text = CursorText {
            position: boundary.position.into(),
            next_epoch: boundary.epoch.number,
            next_epoch_id: boundary.epoch.id.to_string(),
        };
        let bytes = document::encode(CURSOR_KIND, &text).map_err(|error| self.io(error.into()))?;
        replace_file(&OsFiles, &self.path, &bytes).map_err(|error| self.io(error))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CursorText {
    position: PositionText,
    next_epoch: u32,
    next_epoch_id: String,
}

impl CursorText {
    fn parse(&self) -> Result<Boundary, DocumentError> {
        let id = self.next_epoch_id.parse().map_err(|_| DocumentError::Field("next_epoch_id"))?;
        Ok(Boundary::before(self.position.position()?, Epoch { number: self.next_epoch, id }))
    }
}

/// Why a cursor cannot be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum CursorError {
    /// The file cannot be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not a cursor.
    #[error("{} is damaged: {reason}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: DocumentError,
    },
}

const CURSOR_KIND: &str = "archive cursor";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Source;

    #[test]
    fn a_cursor_is_loaded_as_it_was_saved_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let cursor = CursorFile::new(folder.path().join("archive-1.json"));
        assert_eq!(cursor.load().unwrap(), None);
        let mut source = Source::new();
        for _ in 0..2 {
            source.frames(1, 1);
            let boundary = Boundary::after(source.state().position);
            cursor.save(&boundary).unwrap();
            assert_eq!(cursor.load().unwrap(), Some(boundary));
        }
        fs::write(folder.path().join("archive-1.json"), b"{").unwrap();
        assert!(cursor.load().unwrap_err().to_string().contains("archive-1.json is damaged"));
    }
}
