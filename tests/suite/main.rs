//! The suites that need no mount.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod cli;
#[cfg(test)]
mod follower;
mod house;
#[cfg(test)]
mod model;
#[cfg(test)]
mod races;
mod volume;
