//! Tells the kernel that what it has cached is no longer true.
//!
//! Invariants:
//! - A notification is sent by a thread of its own. It can wait for locks of the kernel that a request holds, so that sending it
//!   from a request's thread could wait for itself.
//! - Nobody waits for a notification. If the queue is full it is dropped, counted and reported.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
};

use fuser::INodeNo;

use super::growth::Length;
use crate::{Ino, Name};

/// Sends invalidations to the kernel. Cheap to clone; the thread ends with the last clone, or with the mount.
///
/// Each method returns false if the queue was full: the kernel then keeps what it has until its lifetime ends, and the caller
/// shortens lifetimes for a while ([`crate::Mount::set_lifetimes`]).
#[derive(Clone, Debug)]
pub struct Notifier {
    queue: SyncSender<Notice>,
    dropped: Arc<AtomicU64>,
}

/// What the kernel is to forget.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Notice {
    /// The attributes of an inode.
    Attributes(Ino),
    /// The pages of a file, and its attributes.
    Data(Ino),
    /// The listing of a directory, and its attributes.
    Listing(Ino),
    /// What a name in a directory stands for.
    Entry(Ino, Name),
    /// The same of a name that is gone.
    Deleted(Ino, Ino, Name),
    /// Nothing: a file is longer now.
    Length(Length),
}

impl Notice {
    /// The inode whose answers it makes untrue: of a name, the directory.
    pub(super) fn ino(&self) -> Ino {
        match self {
            Notice::Attributes(ino) | Notice::Data(ino) | Notice::Listing(ino) => *ino,
            Notice::Entry(parent, _) | Notice::Deleted(parent, _, _) => *parent,
            Notice::Length(length) => length.ino,
        }
    }
}

impl Notifier {
    pub(super) fn new(kernel: fuser::Notifier) -> io::Result<Notifier> {
        Notifier::start(QUEUE_MAX, move |notice| send(&kernel, notice))
    }

    fn start(
        limit: usize,
        send: impl FnMut(&Notice) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Notifier> {
        let (queue, notices) = sync_channel(limit);
        thread::Builder::new().name("fuse-notify".into()).spawn(move || deliver(&notices, send))?;
        Ok(Notifier { queue, dropped: Arc::default() })
    }

    /// The attributes of an inode have changed, its bytes have not.
    #[must_use = "false means that the kernel was not told"]
    pub fn attributes(&self, ino: Ino) -> bool {
        self.push(Notice::Attributes(ino))
    }

    /// The bytes of a file (or the listing of a directory, or the target of a symlink) have changed, and its attributes.
    #[must_use = "false means that the kernel was not told"]
    pub fn data(&self, ino: Ino) -> bool {
        self.push(Notice::Data(ino))
    }

    /// A name has appeared, or means something else now.
    #[must_use = "false means that the kernel was not told"]
    pub fn entry(&self, parent: Ino, name: &Name) -> bool {
        self.push(Notice::Entry(parent, name.clone()))
    }

    /// A name of `child` is gone; those who watch the directory hear of it.
    #[must_use = "false means that the kernel was not told"]
    pub fn deleted(&self, parent: Ino, child: Ino, name: &Name) -> bool {
        self.push(Notice::Deleted(parent, child, name.clone()))
    }

    /// How many notifications were dropped because the queue was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Once the mount has ended there is no cache to be wrong, and nothing is dropped.
    fn push(&self, notice: Notice) -> bool {
        let full = matches!(self.queue.try_send(notice), Err(TrySendError::Full(_)));
        if full {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        !full
    }
}

fn deliver(notices: &Receiver<Notice>, mut send: impl FnMut(&Notice) -> io::Result<()>) {
    for notice in notices {
        match send(&notice) {
            Ok(()) => {}
            Err(error) if has_ended(&error) => return,
            Err(error) => tracing::warn!(?notice, %error, "the kernel refused an invalidation"),
        }
    }
}

/// Whether there is no mount any more, and so no cache.
pub(super) fn has_ended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOTCONN))
}

/// An offset below 0 leaves the pages alone, a length of 0 means up to the end. What the kernel does not know is fine with fuser.
pub(super) fn send(kernel: &fuser::Notifier, notice: &Notice) -> io::Result<()> {
    let node = |ino: &Ino| INodeNo(ino.get());
    match notice {
        Notice::Attributes(ino) => kernel.inval_inode(node(ino), -1, 0),
        Notice::Data(ino) | Notice::Listing(ino) => kernel.inval_inode(node(ino), 0, 0),
        Notice::Entry(parent, name) => kernel.inval_entry(node(parent), OsStr::from_bytes(name.as_bytes())),
        Notice::Deleted(parent, child, name) => {
            kernel.delete(node(parent), node(child), OsStr::from_bytes(name.as_bytes()))
        }
        Notice::Length(length) => kernel.store(node(&length.ino), length.length - 1, &[length.last]),
    }
}

/// Notifications that wait at most; each takes about 100 bytes.
const QUEUE_MAX: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_full_queue_drops_counts_and_says_so_but_never_waits() {
        let (release, held) = channel::<()>();
        let notifier = Notifier::start(2, move |_| held.recv().map_err(io::Error::other)).unwrap();
        // One in the blocked hands of the thread at most, two in the queue, and one too many.
        let sent = (0..4).filter(|number| notifier.attributes(Ino::new(*number))).count();
        assert!(sent < 4);
        assert_eq!(notifier.dropped(), 4 - sent as u64);
        drop(release);
    }

    #[test]
    fn the_end_of_the_mount_ends_the_thread_and_is_no_loss() {
        let (said, heard) = channel::<()>();
        let notifier = Notifier::start(1, move |_| {
            let _keeps_the_channel_open = &said;
            Err(io::Error::from_raw_os_error(libc::ENODEV))
        })
        .unwrap();
        assert!(notifier.data(Ino::ROOT));
        assert!(heard.recv().is_err(), "the thread has dropped its end");
        assert!(notifier.deleted(Ino::ROOT, Ino::new(2), &Name::new("x").unwrap()));
        assert_eq!(notifier.dropped(), 0);
    }
}
