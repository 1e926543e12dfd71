//! The suites that need no mount.

mod follower;
mod model;
mod volume;
