//! What the sequencer, views and the overlay share memory through.
//!
//! These are the locks of parking_lot, the cell of arc-swap and the atomics of the standard library. In this crate's own tests each use
//! of them is also a point at which a scheduler, if there is one, chooses who goes on.
//!
//! Invariants:
//! - Outside of tests this module is its `use` line.

#[cfg(test)]
pub(crate) use scheduled::{ArcSwap, AtomicU64, Mutex, RwLock, interleave};
#[cfg(not(test))]
pub(crate) use {
    arc_swap::ArcSwap,
    parking_lot::{Mutex, RwLock},
    std::sync::atomic::AtomicU64,
};

#[cfg(test)]
mod scheduled {
    use std::{
        cell::Cell,
        sync::{
            Arc,
            atomic::{self, Ordering},
        },
    };

    use arc_swap::Guard;
    use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
    use shuttle::{Config, Runner, rand::Rng as _, scheduler::RandomScheduler};

    /// Runs `scenario` in so many interleavings, drawn from `seed`, of the threads that it starts with shuttle.
    pub(crate) fn interleave(seed: u64, interleavings: usize, scenario: impl Fn() + Send + Sync + 'static) {
        struct Until;
        impl Drop for Until {
            fn drop(&mut self) {
                SCHEDULED.set(false);
            }
        }
        let mut config = Config::new();
        config.stack_size = STACK_BYTES;
        let scheduler = RandomScheduler::new_from_seed(seed, interleavings);
        // All threads of a scenario take turns on this one.
        SCHEDULED.set(true);
        let _until = Until;
        Runner::new(scheduler, config).run(scenario);
    }

    thread_local! {
        static SCHEDULED: Cell<bool> = const { Cell::new(false) };
    }

    /// Lets the scheduler choose; says whether there is one. Now and then for so long that the others can do whole operations: some
    /// windows are one step wide, and much has to happen in them.
    fn pause() -> bool {
        let scheduled = SCHEDULED.get();
        if scheduled {
            let is_long = shuttle::rand::thread_rng().gen_ratio(1, LONG_PAUSES);
            (0..if is_long { LONG_PAUSE_STEPS } else { 1 }).for_each(|_| shuttle::thread::yield_now());
        }
        scheduled
    }

    /// Takes a lock; who would wait lets others go on until it is free.
    fn take<G>(attempt: impl Fn() -> Option<G>, wait: impl Fn() -> G) -> G {
        while pause() {
            if let Some(guard) = attempt() {
                return guard;
            }
        }
        wait()
    }

    pub(crate) struct Mutex<T>(parking_lot::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) const fn new(value: T) -> Mutex<T> {
            Mutex(parking_lot::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            take(|| self.0.try_lock(), || self.0.lock())
        }
    }

    #[derive(Default)]
    pub(crate) struct RwLock<T>(parking_lot::RwLock<T>);

    impl<T> RwLock<T> {
        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            take(|| self.0.try_read(), || self.0.read())
        }

        pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
            take(|| self.0.try_write(), || self.0.write())
        }
    }

    pub(crate) struct ArcSwap<T>(arc_swap::ArcSwap<T>);

    impl<T> ArcSwap<T> {
        pub(crate) fn from_pointee(value: T) -> ArcSwap<T> {
            ArcSwap(arc_swap::ArcSwap::from_pointee(value))
        }

        pub(crate) fn load(&self) -> Guard<Arc<T>> {
            pause();
            self.0.load()
        }

        pub(crate) fn load_full(&self) -> Arc<T> {
            pause();
            self.0.load_full()
        }

        pub(crate) fn store(&self, value: Arc<T>) {
            pause();
            self.0.store(value);
        }
    }

    pub(crate) struct AtomicU64(atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) const fn new(value: u64) -> AtomicU64 {
            AtomicU64(atomic::AtomicU64::new(value))
        }

        pub(crate) fn load(&self, order: Ordering) -> u64 {
            pause();
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: u64, order: Ordering) {
            pause();
            self.0.store(value, order);
        }

        pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            pause();
            self.0.fetch_add(value, order)
        }
    }

    /// One pause of so many is long, ...
    const LONG_PAUSES: u32 = 20;
    /// ... and lasts so many choices of the scheduler.
    const LONG_PAUSE_STEPS: u32 = 60;
    /// What an unoptimized decision needs.
    const STACK_BYTES: usize = 1 << 20;
}
