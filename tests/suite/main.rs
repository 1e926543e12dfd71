//! The suites that need no mount.

mod model;
mod races;
mod volume;
