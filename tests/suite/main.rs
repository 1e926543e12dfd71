//! The suites that need no mount.

mod cli;
mod follower;
mod house;
#[cfg(test)]
mod follower;
#[cfg(test)]
mod model;
#[cfg(test)]
mod volume;
