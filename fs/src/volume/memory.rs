//! The memory that dirty data keeps, counted with each buffer, whoever holds a part of it.
//!
//! Invariants:
//! - A buffer counts with all that was allocated for it, and with what stands around it, until the last part of it is dropped.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use tokio::sync::Notify;

/// What all buffers of a volume take.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    bytes: AtomicU64,
    /// Woken when it became less.
    pub(crate) released: Notify,
}

impl Memory {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The same bytes, counted from now on; for those of whom nobody else keeps more than is seen here.
    pub(crate) fn count(self: &Arc<Memory>, bytes: Bytes) -> Bytes {
        let counted = Counted::new(self, bytes.len());
        Bytes::from_owner(Kept { bytes, _counted: counted })
    }
}

/// A buffer that grows at its end. It is at most twice as large as what it holds.
#[derive(Debug)]
pub(crate) struct Growing {
    bytes: Vec<u8>,
    counted: Counted,
}

impl Growing {
    /// A buffer of just that size.
    pub(crate) fn holding(bytes: &[u8], memory: &Arc<Memory>) -> Growing {
        let counted = Counted::new(memory, bytes.len());
        Growing { bytes: bytes.to_vec(), counted }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.counted.grow(self.bytes.capacity());
    }

    /// How many bytes were allocated for it.
    pub(crate) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Growing {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

struct Kept {
    bytes: Bytes,
    _counted: Counted,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A buffer in the count.
#[derive(Debug)]
struct Counted {
    capacity: u64,
    memory: Arc<Memory>,
}

impl Counted {
    fn new(memory: &Arc<Memory>, capacity: usize) -> Counted {
        let capacity = capacity as u64;
        memory.bytes.fetch_add(capacity + AROUND_BYTES, Ordering::Relaxed);
        Counted { capacity, memory: Arc::clone(memory) }
    }

    fn grow(&mut self, capacity: usize) {
        let capacity = (capacity as u64).max(self.capacity);
        self.memory.bytes.fetch_add(capacity - self.capacity, Ordering::Relaxed);
        self.capacity = capacity;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.memory.bytes.fetch_sub(self.capacity + AROUND_BYTES, Ordering::Relaxed);
        self.memory.released.notify_waiters();
    }
}

/// What a buffer takes beside its bytes: its place in the file's map, its owner, what the allocator rounds up.
pub(crate) const AROUND_BYTES: u64 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: what is counted is not what is held, and the limit of dirty data limits something else.
    #[test]
    fn a_buffer_counts_until_its_last_part_is_gone() {
        let memory = Arc::new(Memory::default());
        let mut growing = Growing::holding(b"0123456789", &memory);
        assert_eq!(memory.bytes(), 10 + AROUND_BYTES);
        for _ in 0..1000 {
            growing.push(b"0123456789");
            assert_eq!(memory.bytes(), growing.capacity() as u64 + AROUND_BYTES);
            assert!(growing.capacity() <= 2 * growing.as_ref().len());
        }
        let before = memory.bytes();
        let part = growing.freeze().slice(3..4);
        assert_eq!(memory.bytes(), before);
        let kept = memory.count(Bytes::from_static(b"0123"));
        assert_eq!(memory.bytes(), before + 4 + AROUND_BYTES);
        drop(part);
        assert_eq!(memory.bytes(), 4 + AROUND_BYTES);
        drop(kept);
        assert_eq!(memory.bytes(), 0);
    }
}
