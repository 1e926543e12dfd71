//! The suites that need no mount.

mod cli;
mod house;
mod model;
mod volume;
