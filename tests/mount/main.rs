//! The suites on real mounts. Where `/dev/fuse` is missing or mounting is not allowed, each test says on stderr that it was skipped;
//! with `MURPHY_REQUIRE_FUSE=1` that is a failure instead.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod ack;
mod archives;
mod at_rest;
mod bad_archive;
mod bad_input;
mod cli;
mod crash;
mod demo;
mod dumps;
mod ending;
mod gather;
mod growing;
mod huge;
mod log_archive;
mod lost;
mod members;
mod mend;
mod mirror_cache;
mod mirrors;
mod model;
mod moments;
mod places;
mod readers;
mod rot;
mod s3;
mod settled;
mod stale;
mod stranded;
mod successors;
mod take_over;
mod tree;
