//! The suites that need no mount.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod cli;
mod copies;
mod follower;
mod fuzz;
mod house;
mod mirrors;
mod model;
mod races;
mod stalls;
mod volume;
