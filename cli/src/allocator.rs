//! The program's allocator. Rows are many, small, made by one thread and freed by another; file data are few and large.
//!
//! Invariants:
//! - It is chosen here for everything that this crate is linked into, and tuned once, before there is anything to free.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Keeps freed memory for a second before the system gets it back: buffers of file data come and go, and would else be faulted in anew
/// each time.
#[expect(unsafe_code, reason = "the allocator has no safe way to set an option")]
pub fn keep_freed_memory() {
    // SAFETY: the option is of the version that is linked, and any number is valid for it; it may be set at any time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, PURGE_DELAY_MS) }
}

/// `mi_option_purge_delay` of version 2.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
const PURGE_DELAY_MS: std::ffi::c_long = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: a later version numbers its options anew, and another one is set.
    #[test]
    #[expect(unsafe_code, reason = "as above")]
    fn the_option_that_is_set_is_the_purge_delay() {
        // SAFETY: reading an option changes nothing.
        let before = unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        assert_eq!(before, 10, "the default of the purge delay, in milliseconds");
        keep_freed_memory();
        // SAFETY: as above.
        assert_eq!(unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) }, PURGE_DELAY_MS);
    }
}
