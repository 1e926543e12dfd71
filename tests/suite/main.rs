//! The suites that need no mount.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod cli;
mod copies;
mod crash;
mod demo;
mod flips;
mod follower;
mod forgotten;
mod fuzz;
mod house;
mod mirrors;
mod model;
mod races;
mod removals;
mod simulation;
mod stalls;
mod volume;
