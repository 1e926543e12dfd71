//! CPU time: of all figures the one that a busy machine changes least.

/// CPU time of this process so far, in nanoseconds.
pub fn process_cpu_nanos() -> u128 {
    cpu_nanos(rustix::time::ClockId::ProcessCPUTime)
}

/// CPU time of this thread so far, in nanoseconds.
pub fn thread_cpu_nanos() -> u128 {
    cpu_nanos(rustix::time::ClockId::ThreadCPUTime)
}

fn cpu_nanos(clock: rustix::time::ClockId) -> u128 {
    let time = rustix::time::clock_gettime(clock);
    time.tv_sec.unsigned_abs() as u128 * 1_000_000_000 + time.tv_nsec.unsigned_abs() as u128
}
