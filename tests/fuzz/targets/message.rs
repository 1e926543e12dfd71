#![no_main]
//! See `murphy_tests::fuzz`.

libfuzzer_sys::fuzz_target!(|input: &[u8]| murphy_tests::fuzz::one("message", input));
