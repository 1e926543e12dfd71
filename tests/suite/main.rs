//! The suites that need no mount.

mod cli;
mod model;
mod volume;
