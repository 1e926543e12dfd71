//! The handles that the kernel holds, which are closed when the mount has ended.
//!
//! Invariants:
//! - A handle is in here from before the kernel learns of it until the kernel has released it.
//! - Whoever answers requests shares it: the last to go closes what is left, whatever took the connection away.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use crate::{FileSystem, Handle, Ino};

/// The open handles of one mount.
pub(super) struct Held {
    fs: Arc<dyn FileSystem>,
    open: Mutex<HashMap<Handle, Ino>>,
}

impl Held {
    pub(super) fn of(fs: &Arc<dyn FileSystem>) -> Arc<Held> {
        Arc::new(Held { fs: Arc::clone(fs), open: Mutex::default() })
    }

    /// The kernel is about to learn of `handle`.
    pub(super) fn opened(&self, ino: Ino, handle: Handle) {
        self.open.lock().insert(handle, ino);
    }

    /// The kernel has released `handle`.
    pub(super) fn released(&self, handle: Handle) {
        self.open.lock().remove(&handle);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for (handle, ino) in std::mem::take(self.open.get_mut()) {
            self.fs.release(ino, handle);
        }
    }
}
