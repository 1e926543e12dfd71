//! Memory for what is read, used again and again: what comes fresh from the system is faulted in page by page, which takes longer than
//! reading.
//!
//! Invariants:
//! - A buffer that was given away belongs to one [`Bytes`] and its clones; when the last of them is gone, and not before, it is used again.
//! - At most [`FREE_MAX`] buffers wait to be used again.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::cell::SPAN_BYTES;

/// Buffers that are free. Those of [`SPAN_BYTES`] come back, all others are given back to the system.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    free: Mutex<Vec<Box<[u8]>>>,
}

impl Buffers {
    /// A buffer of so many bytes, which have any value.
    pub(super) fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let used = if length == SPAN_BYTES { self.free.lock().pop() } else { None };
        let bytes = used.unwrap_or_else(|| vec![0; length].into_boxed_slice());
        Buffer { bytes, home: Arc::clone(self) }
    }
}

/// Memory that can be written until it is given away.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    home: Arc<Buffers>,
}

impl Buffer {
    /// All of it, to be written.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The first `length` bytes of it, which are the caller's now; if they are not all, without the memory of the others.
    pub(super) fn freeze(self, length: usize) -> Bytes {
        if length < self.bytes.len() {
            return Bytes::copy_from_slice(&self.bytes[..length]);
        }
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes.len() == SPAN_BYTES {
            let mut free = self.home.free.lock();
            if free.len() < FREE_MAX {
                free.push(std::mem::take(&mut self.bytes));
            }
        }
    }
}

/// How many free buffers are kept; no more are being filled at a time.
const FREE_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: a buffer is filled with other bytes while somebody still reads it.
    #[test]
    fn a_buffer_is_used_again_only_when_nobody_has_any_of_it() {
        let buffers = Arc::new(Buffers::default());
        let mut first = buffers.take(SPAN_BYTES);
        first.bytes_mut().fill(1);
        let (whole, place) = (first.freeze(SPAN_BYTES), buffers.take(SPAN_BYTES).as_ref().as_ptr());
        let part = whole.slice(100..200);
        drop(whole);
        let mut others: Vec<Buffer> = (0..FREE_MAX).map(|_| buffers.take(SPAN_BYTES)).collect();
        assert!(
            others.iter().any(|other| other.as_ref().as_ptr() == place),
            "what was dropped is used again"
        );
        others.iter_mut().for_each(|other| other.bytes_mut().fill(2));
        assert_eq!(part, [1; 100][..]);
        let held = part.as_ptr();
        drop(part);
        assert_eq!(buffers.take(SPAN_BYTES).as_ref()[100..].as_ptr(), held);
    }

    #[test]
    fn no_more_are_kept_than_may_be() {
        let buffers = Arc::new(Buffers::default());
        drop((0..3 * FREE_MAX).map(|_| buffers.take(SPAN_BYTES)).collect::<Vec<_>>());
        drop(buffers.take(100));
        assert_eq!(buffers.free.lock().len(), FREE_MAX);
        assert!(buffers.free.lock().iter().all(|free| free.len() == SPAN_BYTES));
    }

    #[test]
    fn what_is_shorter_than_its_buffer_does_not_hold_it() {
        let buffers = Arc::new(Buffers::default());
        let mut buffer = buffers.take(SPAN_BYTES);
        buffer.bytes_mut()[..3].copy_from_slice(b"abc");
        assert_eq!(buffer.freeze(3), "abc");
        assert_eq!(buffers.free.lock().len(), 1);
    }
}
