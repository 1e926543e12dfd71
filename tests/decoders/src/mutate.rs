//! Changes to bytes, as damage and malice make them.

use crate::Random;

/// Changes `bytes` in one to four ways; `others` lend parts of themselves.
pub(crate) fn mutate(bytes: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Random) {
    for _ in 0..=random.below(4) {
        change(bytes, others, random);
    }
    bytes.truncate(INPUT_MAX);
}

fn change(bytes: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Random) {
    if bytes.is_empty() {
        bytes.extend(random.bytes(8));
        return;
    }
    let (at, length) = (random.index(bytes.len()), bytes.len() as u64);
    match random.below(12) {
        0 | 1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at] = *pick(&[0, 1, 0x7f, 0x80, 0xff, b'0', b'9', b'"', b'-', b'%'], random),
        3 => bytes[at] = bytes[at].wrapping_add(*pick(&[1, 0xff], random)),
        4 => put(bytes, at, &number(length, random).to_le_bytes()[..4]),
        5 => put(bytes, at, &number(length, random).to_le_bytes()),
        6 => put(bytes, at, &number(length, random).to_be_bytes()),
        7 => bytes.truncate(at),
        8 => {
            let end = (at + 1 + random.index(32)).min(bytes.len());
            bytes.drain(at..end);
        }
        9 => {
            let end = (at + 1 + random.index(64)).min(bytes.len());
            let part = bytes[at..end].to_vec();
            let again = 1 + random.index(4);
            bytes.splice(at..at, part.repeat(again));
        }
        10 => {
            let count = 1 + random.index(16);
            let part = if random.below(2) == 0 {
                vec![*pick(&[0, 0xff], random); count]
            } else {
                random.bytes(count)
            };
            bytes.splice(at..at, part);
        }
        _ => {
            let other = pick(others, random);
            if !other.is_empty() {
                let from = random.index(other.len());
                let end = (from + 1 + random.index(256)).min(other.len());
                let replaced = (at + (end - from) * random.index(2)).min(bytes.len());
                bytes.splice(at..replaced, other[from..end].iter().copied());
            }
        }
    }
}

/// Numbers at which arithmetic breaks.
fn number(length: u64, random: &mut Random) -> u64 {
    let near = *pick(
        &[0, 1, length, 1 << 7, 1 << 16, 1 << 20, 1 << 22, 1 << 31, 1 << 32, 1 << 62, 1 << 63, u64::MAX],
        random,
    );
    *pick(&[near, near.wrapping_add(1), near.wrapping_sub(1)], random)
}

fn put(bytes: &mut [u8], at: usize, number: &[u8]) {
    let end = (at + number.len()).min(bytes.len());
    bytes[at..end].copy_from_slice(&number[..end - at]);
}

fn pick<'a, T>(of: &'a [T], random: &mut Random) -> &'a T {
    &of[random.index(of.len())]
}

/// Longer inputs only take longer.
const INPUT_MAX: usize = 64 << 10;
