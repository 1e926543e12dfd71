//! The suites that need no mount.

mod model;
mod volume;
