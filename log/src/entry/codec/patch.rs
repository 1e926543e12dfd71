//! A value as what differs from a row that the frame has written before.
//!
//! A file that is copied is written as four entries, each of which carries the whole row of its inode. What a frame stores of
//! the later ones is which row they begin from, and the bytes that are not the same.
//!
//! Invariants:
//! - What is made from a patch has the length that was said before it, whatever the patch says.
//! - Only the stored form knows patches: the body, which the chain is computed over, has every value in full.

use super::{Cursor, DecodeError, recent::MAX_REMEMBERED_VALUE, token::Marks};

/// What a row before says of the bytes of a value that are left when its tokens are cut out.
///
/// The beginnings of both values stand side by side until the first byte that differs, and their ends from then on: rows
/// differ in the length of a number in their middle.
pub(super) struct Guess {
    by_beginning: [u8; MAX_REMEMBERED_VALUE],
    by_end: [u8; MAX_REMEMBERED_VALUE],
    length: usize,
}

impl Guess {
    /// What `before`, the value of a remembered row, says of a value with these marks of which `left` bytes are left; `None` if
    /// the value is too long to be patched.
    pub(super) fn of(before: &[u8], marks: Marks<'_>, left: usize) -> Option<Guess> {
        let whole = left + marks.cut();
        if whole > MAX_REMEMBERED_VALUE {
            return None;
        }
        let (mut by_beginning, mut by_end) = ([0; MAX_REMEMBERED_VALUE], [0; MAX_REMEMBERED_VALUE]);
        by_beginning[..before.len()].copy_from_slice(before);
        let kept = whole.min(before.len());
        by_end[whole - kept..whole].copy_from_slice(&before[before.len() - kept..]);
        let mut guess = Guess { by_beginning, by_end, length: left };
        let (mut from, mut to) = (0, 0);
        for mark in marks {
            guess.close_up(from, to, mark.gap);
            (from, to) = (from + mark.gap + mark.length(), to + mark.gap);
        }
        guess.close_up(from, to, whole - from);
        Some(guess)
    }

    fn close_up(&mut self, from: usize, to: usize, length: usize) {
        self.by_beginning.copy_within(from..from + length, to);
        self.by_end.copy_within(from..from + length, to);
    }

    /// Appends what has to be said to make `left` of this.
    pub(super) fn push_patch(&self, left: &[u8], out: &mut Vec<u8>) {
        debug_assert_eq!(left.len(), self.length);
        let (mut at, mut guess) = (0, &self.by_beginning);
        while at < left.len() {
            let equal = common(&left[at..], &guess[at..]);
            if at + equal == left.len() {
                out.push(ALL_THE_REST);
                return;
            }
            let equal = equal.min(MAX_STEP);
            let start = at + equal;
            at = start;
            if equal < MAX_STEP || left[at] != guess[at] {
                guess = &self.by_end;
                at = (start + 1..left.len().min(start + MAX_STEP))
                    .find(|&at| common(&left[at..], &guess[at..]) >= WORTH_A_STEP)
                    .unwrap_or(left.len().min(start + MAX_STEP));
            }
            out.push((equal << 4 | (at - start)) as u8);
            out.extend_from_slice(&left[start..at]);
        }
    }

    /// Reads a patch and makes the bytes that are left of the value.
    pub(super) fn patched(&self, cursor: &mut Cursor<'_>) -> Result<Patched, DecodeError> {
        let mut made = Patched { bytes: [0; MAX_REMEMBERED_VALUE], length: self.length };
        let (mut at, mut guess) = (0, &self.by_beginning);
        while at < self.length {
            let step = usize::from(cursor.byte()?);
            let (equal, other) = match step {
                0 => (self.length - at, 0),
                _ => (step >> 4, step & MAX_STEP),
            };
            if equal + other > self.length - at {
                return Err(cursor.malformed("a patch beyond its value"));
            }
            made.bytes[at..at + equal].copy_from_slice(&guess[at..at + equal]);
            at += equal;
            made.bytes[at..at + other].copy_from_slice(cursor.take(other)?);
            at += other;
            if other > 0 {
                guess = &self.by_end;
            }
        }
        Ok(made)
    }
}

/// What was made from a patch.
#[derive(Clone, Debug)]
pub(super) struct Patched {
    bytes: [u8; MAX_REMEMBERED_VALUE],
    length: usize,
}

impl Patched {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// How many bytes are equal from the beginning on.
fn common(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

/// A step: everything that is left is as the row before has it.
const ALL_THE_REST: u8 = 0;
/// The most bytes that one step takes over, and the most that it writes out.
const MAX_STEP: usize = 15;
/// Fewer equal bytes are written out with what stands around them: a step is a byte itself.
const WORTH_A_STEP: usize = 2;
