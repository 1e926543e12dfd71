//! The suites that need no mount.

mod cli;
#[cfg(test)]
mod follower;
mod house;
#[cfg(test)]
mod model;
#[cfg(test)]
mod volume;
