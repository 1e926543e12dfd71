//! A column of times: seconds and nanoseconds as distances from the time before.
//!
//! Invariants:
//! - Nanoseconds go forward modulo one second, so that steps of microseconds stay small across a second's end.

use super::{
    block::BlockFault,
    streams::{Column, StreamReader, StreamWriter, unzigzag, zigzag},
};
use crate::Timespec;

/// Collects times.
#[derive(Default)]
pub(super) struct TimesWriter {
    last: Timespec,
    seconds: Vec<u64>,
    nanos: Vec<u64>,
}

impl TimesWriter {
    pub(super) fn push(&mut self, time: Timespec) {
        self.seconds.push(zigzag(self.last.seconds.cast_unsigned(), time.seconds.cast_unsigned()));
        self.nanos.push(u64::from((time.nanos + SECOND - self.last.nanos) % SECOND));
        self.last = time;
    }

    /// Stores the column as the streams `id` and `id + 1`.
    pub(super) fn store(&self, id: u8, streams: &mut StreamWriter) {
        streams.numbers(id, &self.seconds);
        streams.numbers(id + 1, &self.nanos);
    }
}

/// Gives times back.
pub(super) struct TimesReader {
    last: Timespec,
    seconds: Column,
    nanos: Column,
}

impl TimesReader {
    pub(super) fn new(id: u8, count: usize, streams: &mut StreamReader) -> Result<TimesReader, BlockFault> {
        let (seconds, nanos) = (streams.numbers(id, count)?, streams.numbers(id + 1, count)?);
        Ok(TimesReader { last: Timespec::default(), seconds, nanos })
    }

    pub(super) fn next(&mut self) -> Result<Timespec, BlockFault> {
        let seconds = unzigzag(self.last.seconds.cast_unsigned(), self.seconds.next()?).cast_signed();
        let step = self.nanos.next32()?;
        let time = Timespec { seconds, nanos: self.last.nanos.wrapping_add(step) % SECOND };
        if step >= SECOND || time < Timespec::MIN || time > Timespec::MAX {
            return Err(BlockFault("a time is out of range"));
        }
        self.last = time;
        Ok(time)
    }
}

const SECOND: u32 = 1_000_000_000;
