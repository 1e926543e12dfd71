#![no_main]
//! See `murphy_decoders`.

use murphy_decoders::{CountingAllocator, one};

#[global_allocator]
static COUNTING: CountingAllocator = CountingAllocator;

libfuzzer_sys::fuzz_target!(|input: &[u8]| one("entry", input));
