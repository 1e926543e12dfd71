//! The suites that need no mount.

mod cli;
mod follower;
mod house;
mod model;
mod volume;
