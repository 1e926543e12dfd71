//! What the benchmarks share: loads, and what they are compared with.

pub mod cpu;
pub mod engine;
pub mod history;
pub mod mount_load;
pub mod null_fs;
