//! The randomness of a simulated process: `getrandom(2)`, answered from the seed.
//!
//! Everything that asks the operating system for randomness (hash maps, tokio's choice between branches, ids) asks this symbol, which takes
//! the place of libc's in a program that links it. A thread that simulates gets numbers of its seed; every other thread those of the system.
//!
//! Invariants:
//! - On a thread that has not begun a simulation nothing changes.

use std::cell::Cell;

/// From now on this thread gets the numbers of `seed`. To be called before the thread makes its first hash map.
pub(super) fn begin(seed: u64) {
    STREAM.set(Some(seed));
}

/// What libc calls so.
///
/// # Safety
/// `buffer` points to `length` bytes that may be written, as for libc's.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, flags: u32) -> isize {
    let Some(mut state) = STREAM.get() else {
        // SAFETY: the arguments are passed on as they came.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as isize };
    };
    for at in 0..length {
        if at % 8 == 0 {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        }
        let word = mix(state) >> (8 * (at % 8));
        // SAFETY: `at` is below `length`.
        unsafe { buffer.add(at).write(word as u8) };
    }
    STREAM.set(Some(state));
    length as isize
}

/// The finalizer of splitmix64.
fn mix(state: u64) -> u64 {
    let word = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

thread_local! {
    static STREAM: Cell<Option<u64>> = const { Cell::new(None) };
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, thread};

    use super::*;

    fn drawn(seed: Option<u64>) -> (Vec<u32>, murphy_fs::WriterId) {
        let draw = move || {
            seed.into_iter().for_each(begin);
            let map: HashMap<u32, ()> = (0..100).map(|number| (number, ())).collect();
            (map.into_keys().collect(), murphy_fs::WriterId::random().unwrap())
        };
        thread::spawn(draw).join().unwrap()
    }

    /// The fear: a seed that is a different schedule in each process.
    #[test]
    fn a_seeded_thread_draws_the_same_and_others_do_not() {
        assert_eq!(drawn(Some(7)), drawn(Some(7)));
        assert_ne!(drawn(Some(7)), drawn(Some(8)));
        assert_ne!(drawn(None), drawn(None));
    }
}
