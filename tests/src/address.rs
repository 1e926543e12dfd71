//! Addresses at which the programs of a test listen.
//!
//! Invariants:
//! - A process gives out an address once, and outside of the range from which the kernel takes ports for sockets that ask for none: nobody takes
//!   it while the node that listens there is dead for a moment.

use std::{
    hash::{BuildHasher, RandomState},
    net::UdpSocket,
    sync::{
        OnceLock,
        atomic::{AtomicU16, Ordering},
    },
};

/// An address of this machine that nobody uses, and no other caller gets.
///
/// # Panics
/// If every one of them is used.
pub fn free_address() -> String {
    // Two suites that run at once begin in different places.
    static BEGIN: OnceLock<u16> = OnceLock::new();
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    let begin = *BEGIN.get_or_init(|| (RandomState::new().hash_one(()) % u64::from(PORTS)) as u16);
    loop {
        let given = GIVEN.fetch_add(1, Ordering::Relaxed);
        assert!(given < PORTS, "{PORTS} ports were given out");
        let address = format!("127.0.0.1:{}", FIRST_PORT + (begin + given) % PORTS);
        if UdpSocket::bind(&address).is_ok() {
            return address;
        }
    }
}

const FIRST_PORT: u16 = 12_000;
/// They end below 32,768, where the ports of the kernel begin unless somebody has set that.
const PORTS: u16 = 20_000;
