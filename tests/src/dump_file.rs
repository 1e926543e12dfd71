//! A dump, taken apart as `docs/formats/snapshot.md` says, without any code of the program.
//!
//! Invariants:
//! - Every byte of the file is in exactly one part, so that equal parts mean an equal file.
//! - A file that is not as the document says is a panic: the document is what is tested.

use std::collections::BTreeMap;

/// The parts of a dump.
#[derive(Clone, PartialEq, Eq)]
pub struct DumpFile {
    /// The fields of the header, by the names that the document gives them.
    pub header: BTreeMap<&'static str, Vec<u8>>,
    /// Every block before the footer.
    pub blocks: Vec<DumpBlock>,
    /// The footer's block.
    pub footer: DumpFooter,
    /// The last 16 bytes.
    pub trailer: Vec<u8>,
}

/// A block: its head as it is, and its payload.
#[derive(Clone, PartialEq, Eq)]
pub struct DumpBlock {
    /// 1 names, 2 inodes, 3 rows.
    pub kind: u8,
    /// Its 32 bytes.
    pub head: Vec<u8>,
    /// What follows.
    pub payload: Vec<u8>,
    /// Of a block of rows: the rows, the table first in the key.
    pub rows: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What the last block says.
#[derive(Clone, PartialEq, Eq)]
pub struct DumpFooter {
    /// The block's head.
    pub head: Vec<u8>,
    /// Digest of the tree tables' rows.
    pub digest: Vec<u8>,
    /// BLAKE3 of the heads of all blocks before.
    pub heads_hash: Vec<u8>,
    /// Rows of each table.
    pub tables: BTreeMap<u8, u64>,
    /// Kind, length and rows of each block.
    pub blocks: Vec<(u8, u32, u32)>,
}

impl DumpFile {
    /// Takes a file apart.
    ///
    /// # Panics
    /// If it is not as the document says.
    pub fn parse(file: &[u8]) -> DumpFile {
        let mut rest = file;
        let mut header = BTreeMap::new();
        for (name, length) in HEADER {
            header.insert(name, take(&mut rest, length).to_vec());
        }
        assert_eq!(header["magic"], b"MURPHYSN", "the magic");
        let mut blocks = Vec::new();
        let footer = loop {
            let (head, payload) = take_block(&mut rest);
            if head[0] == FOOTER {
                break DumpFooter::parse(head, payload);
            }
            let rows =
                if head[0] == ROWS { rows(payload, number(&head[8..12]) as usize) } else { Vec::new() };
            blocks.push(DumpBlock { kind: head[0], head: head.to_vec(), payload: payload.to_vec(), rows });
        };
        assert_eq!(rest.len(), 16, "nothing follows the trailer");
        assert_eq!(footer.blocks.len(), blocks.len(), "the footer counts the blocks");
        DumpFile { header, blocks, footer, trailer: rest.to_vec() }
    }
}

impl DumpFooter {
    fn parse(head: &[u8], payload: &[u8]) -> DumpFooter {
        let mut rest = payload;
        let (digest, heads_hash) = (take(&mut rest, 16).to_vec(), take(&mut rest, 32).to_vec());
        let count = take(&mut rest, 1)[0];
        let tables = (0..count).map(|_| (take(&mut rest, 1)[0], number(take(&mut rest, 8)))).collect();
        let count = number(take(&mut rest, 4));
        let block =
            |rest: &mut &[u8]| (take(rest, 1)[0], number(take(rest, 4)) as u32, number(take(rest, 4)) as u32);
        let blocks = (0..count).map(|_| block(&mut rest)).collect();
        assert!(rest.is_empty(), "the footer ends with its blocks");
        DumpFooter { head: head.to_vec(), digest, heads_hash, tables, blocks }
    }
}

fn take_block<'a>(rest: &mut &'a [u8]) -> (&'a [u8], &'a [u8]) {
    let head = take(rest, 32);
    let payload = take(rest, number(&head[4..8]) as usize);
    let mut hashed = head[..16].to_vec();
    hashed.extend_from_slice(payload);
    assert_eq!(head[16..], blake3::hash(&hashed).as_bytes()[..16], "the checksum of a block");
    (head, payload)
}

/// The rows of a block of rows.
fn rows(payload: &[u8], count: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
    let streams = streams(payload);
    let empty = Vec::new();
    let stream = |id: u8| streams.get(&id).unwrap_or(&empty);
    let [shared, key_lengths, value_lengths] = [1, 2, 4].map(|id| column(stream(id), count));
    let (mut keys, mut values) = (&stream(3)[..], &stream(5)[..]);
    let (mut key, mut rows) = (Vec::new(), Vec::new());
    for at in 0..count {
        key.truncate(shared[at]);
        key.extend_from_slice(take(&mut keys, key_lengths[at]));
        rows.push((key.clone(), take(&mut values, value_lengths[at]).to_vec()));
    }
    assert!(keys.is_empty() && values.is_empty(), "every byte of the streams is in a row");
    rows
}

fn streams(payload: &[u8]) -> BTreeMap<u8, Vec<u8>> {
    // The first body begins where the heads end, which is known once their bodies fill the rest.
    let mut heads = Vec::new();
    let mut rest = payload;
    let mut bodies = 0;
    while bodies < rest.len() {
        let head = take(&mut rest, 10);
        bodies += number(&head[6..10]) as usize;
        heads.push(head);
    }
    heads.into_iter().map(|head| (head[0], body(head, &mut rest))).collect()
}

fn body(head: &[u8], rest: &mut &[u8]) -> Vec<u8> {
    let (plain, stored) = (number(&head[2..6]) as usize, take(rest, number(&head[6..10]) as usize));
    match head[1] {
        0 => stored.to_vec(),
        1 => zstd::bulk::decompress(stored, plain).expect("one zstd frame"),
        codec => panic!("codec {codec}"),
    }
}

/// A column of numbers as planes of bytes.
fn column(stream: &[u8], count: usize) -> Vec<usize> {
    let Some((planes, bytes)) = stream.split_first() else { return vec![0; count] };
    assert_eq!(bytes.len(), usize::from(*planes) * count, "the planes of a column");
    let plane = |plane: usize, at: usize| usize::from(bytes[plane * count + at]) << (8 * plane);
    (0..count).map(|at| (0..usize::from(*planes)).map(|k| plane(k, at)).sum()).collect()
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (taken, after) = rest.split_at_checked(length).expect("the file goes on");
    *rest = after;
    taken
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The fields of the header, in order, with their lengths in bytes.
const HEADER: [(&str, usize); 14] = [
    ("magic", 8),
    ("version", 2),
    ("zero", 2),
    ("epoch", 4),
    ("epoch id", 16),
    ("volume", 16),
    ("branch", 16),
    ("LSN", 8),
    ("chain hash", 32),
    ("digest", 16),
    ("inodes", 8),
    ("bytes", 8),
    ("created", 8),
    ("checksum", 16),
];
const ROWS: u8 = 3;
const FOOTER: u8 = 255;
