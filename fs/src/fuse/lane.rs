//! A lane: notices on their way to the kernel, in order, each at most once, sent by a thread of its own.
//!
//! Invariants:
//! - A notice that waits already is not added again; one that is being sent is.
//! - Whoever adds waits while the lane is full. Nothing is dropped. One that was closed sends what it has and takes no more.

use std::{
    collections::{HashSet, VecDeque},
    io,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

use super::notify::{Notice, has_ended};

/// The mount has ended, or the lane was closed.
#[derive(Debug)]
pub(super) struct Ended;

/// Notices on their way.
#[derive(Debug, Default)]
pub(super) struct Lane {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    order: VecDeque<Notice>,
    waiting: HashSet<Notice>,
    sending: Option<Notice>,
    /// How many were added, and how many of them were sent.
    added: u64,
    sent: u64,
    closed: bool,
    ended: bool,
}

impl Lane {
    /// Adds a notice, waiting while too many are on their way.
    pub(super) fn push(&self, notice: Notice) -> Result<(), Ended> {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.order.len() >= LANE_MAX && !state.ended);
        self.add(&mut state, notice)
    }

    /// Adds a notice even if the lane is full. For those who must not wait, and of whom there are few: each waits until it was sent.
    pub(super) fn push_now(&self, notice: Notice) -> Result<(), Ended> {
        self.add(&mut self.state.lock(), notice)
    }

    fn add(&self, state: &mut State, notice: Notice) -> Result<(), Ended> {
        if state.ended || state.closed {
            return Err(Ended);
        }
        if state.waiting.insert(notice.clone()) {
            state.order.push_back(notice);
            state.added += 1;
            self.changed.notify_all();
        }
        Ok(())
    }

    /// How many have been added.
    pub(super) fn added(&self) -> u64 {
        self.state.lock().added
    }

    /// Whether as many have been sent, or the lane has ended.
    pub(super) fn has_sent(&self, count: u64) -> bool {
        let state = self.state.lock();
        state.sent >= count || state.ended
    }

    /// Whether this notice has been added and not been sent.
    pub(super) fn owes(&self, notice: &Notice) -> bool {
        let state = self.state.lock();
        state.sending.as_ref() == Some(notice) || state.waiting.contains(notice)
    }

    /// Takes nothing more; what waits is sent.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
    }

    /// Ends the lane: what waits is not sent.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        (state.order, state.waiting) = (VecDeque::new(), HashSet::new());
        self.changed.notify_all();
    }

    /// Waits at most `timeout` until everything that has been added has been sent, or the lane has ended.
    pub(super) fn wait_sent(&self, timeout: Duration) -> bool {
        let mut state = self.state.lock();
        let goal = state.added;
        self.changed.wait_while_for(&mut state, |state| state.sent < goal && !state.ended, timeout);
        state.sent >= goal || state.ended
    }

    /// Sends with `send` until the end of the lane or of the mount, and tells `refused` what the kernel does not take.
    pub(super) fn deliver(
        &self,
        send: impl Fn(&Notice) -> io::Result<()>,
        refused: impl Fn(&Notice, &io::Error),
    ) {
        while let Some(notice) = self.next() {
            match send(&notice) {
                Ok(()) => {}
                Err(error) if has_ended(&error) => self.end(),
                Err(error) => refused(&notice, &error),
            }
        }
    }

    fn next(&self) -> Option<Notice> {
        let mut state = self.state.lock();
        state.sent += u64::from(state.sending.take().is_some());
        self.changed.notify_all();
        self.changed.wait_while(&mut state, |state| state.order.is_empty() && !state.ended);
        let notice = state.order.pop_front()?;
        state.waiting.remove(&notice);
        state.sending = Some(notice.clone());
        Some(notice)
    }
}

/// Notices in a lane at most; each takes about 200 bytes.
const LANE_MAX: usize = 1 << 16;
