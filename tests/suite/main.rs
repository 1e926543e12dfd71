//! The suites that need no mount.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod cli;
mod crash;
mod flips;
mod follower;
mod house;
mod mirrors;
mod model;
mod races;
mod volume;
