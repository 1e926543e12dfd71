//! The suites that mount, through the kernel.

mod cli;
