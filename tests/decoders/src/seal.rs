//! Checksums put right: what a clever enemy, or a writer with a fault, would have stored.

use std::ops::Range;

use murphy_log::{FRAME_HEADER_BYTES, FRAME_MAGIC, FrameHeader, SEGMENT_HEADER_BYTES};

/// The first `N` bytes of BLAKE3 over the parts.
pub(crate) fn short<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut hasher = blake3::Hasher::new();
    parts.iter().for_each(|part| {
        hasher.update(part);
    });
    let mut sum = [0; N];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..N]);
    sum
}

/// Puts the first 16 bytes of the hash of `over` at `at`, if both are there.
pub(crate) fn sum(bytes: &mut [u8], over: Range<usize>, at: usize) {
    if bytes.len() >= over.end && bytes.len() >= at + 16 {
        let sum: [u8; 16] = short(&[&bytes[over]]);
        bytes[at..at + 16].copy_from_slice(&sum);
    }
}

/// A frame at the start of `bytes`: gives it its checksum and says how long it is.
pub(crate) fn frame(bytes: &mut [u8]) -> Option<usize> {
    if !bytes.starts_with(&FRAME_MAGIC) || bytes.len() < FRAME_HEADER_BYTES {
        return None;
    }
    let length = FrameHeader::parse(bytes).ok()?.frame_len();
    let body = bytes.get(FRAME_HEADER_BYTES..length)?;
    let sum: [u8; 16] = short(&[&bytes[..FRAME_HEADER_BYTES - 16], body]);
    bytes[FRAME_HEADER_BYTES - 16..FRAME_HEADER_BYTES].copy_from_slice(&sum);
    Some(length)
}

/// Every frame that begins in `bytes`.
pub(crate) fn frames(bytes: &mut [u8]) {
    let mut at = 0;
    while at < bytes.len() {
        at += frame(&mut bytes[at..]).unwrap_or(1);
    }
}

/// A segment: its header, its marks, its frames.
pub(crate) fn segment(bytes: &mut [u8]) {
    sum(bytes, 0..SEGMENT_HEADER_BYTES - 16, SEGMENT_HEADER_BYTES - 16);
    let mut at = SEGMENT_HEADER_BYTES;
    while at + MARK_BYTES <= bytes.len() {
        if bytes[at..].starts_with(MARK_MAGIC) {
            mark(bytes, at);
            at += MARK_BYTES;
        } else {
            at += frame(&mut bytes[at..]).unwrap_or(1);
        }
    }
}

/// Gives the mark at `at` the tag that belongs to its place in the segment that is `bytes`.
pub(crate) fn mark(bytes: &mut [u8], at: usize) {
    let mut material = bytes[168..200].to_vec();
    material.extend_from_slice(&bytes[88..96]);
    let key = blake3::derive_key("murphy 2026 segment mark v0", &material);
    let mut tagged = bytes[at..at + 16].to_vec();
    tagged.extend_from_slice(&(at as u64).to_le_bytes());
    let tag = blake3::keyed_hash(&key, &tagged);
    bytes[at + 16..at + MARK_BYTES].copy_from_slice(&tag.as_bytes()[..16]);
}

/// A document of an archive: JSON whose body is summed in its one compact form.
pub(crate) fn document(kind: &str, bytes: &mut Vec<u8>) {
    let Some(body) = value_of(bytes, b"\"body\"") else { return };
    let Some(sum_at) = value_of(bytes, b"\"blake3\"").filter(|found| found.start > body.end) else { return };
    let compact = compacted(&bytes[body]);
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind.as_bytes()).update(&[0]).update(&0u32.to_le_bytes()).update(&compact);
    let text = format!("\"{}\"", hasher.finalize().to_hex());
    bytes.splice(sum_at, text.into_bytes());
}

/// Where the value of the last field `name` stands.
fn value_of(bytes: &[u8], name: &[u8]) -> Option<Range<usize>> {
    let at = bytes.windows(name.len()).rposition(|window| window == name)? + name.len();
    let start = at + bytes[at..].iter().position(|byte| !matches!(byte, b':' | b' ' | b'\n'))?;
    let (mut depth, mut quoted, mut escaped) = (0, false, false);
    for (offset, byte) in bytes[start..].iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'{' | b'[' if !quoted => depth += 1,
            b'}' | b']' if !quoted => depth -= 1,
            _ => {}
        }
        if depth == 0 && !quoted {
            return Some(start..start + offset + 1);
        }
    }
    None
}

/// JSON without the white space between its tokens.
fn compacted(bytes: &[u8]) -> Vec<u8> {
    let (mut quoted, mut escaped) = (false, false);
    let keep = |byte: &&u8| {
        let space = matches!(byte, b' ' | b'\n' | b'\r' | b'\t') && !quoted;
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ => {}
        }
        !space
    };
    bytes.iter().filter(keep).copied().collect()
}

/// The first bytes of the mark before a frame.
pub(crate) const MARK_MAGIC: &[u8] = b"MsyX";
/// The length of a mark.
pub(crate) const MARK_BYTES: usize = 32;
