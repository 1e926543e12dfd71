//! Cells that are read, kept and given together.

use super::*;
use crate::data::{cell::SPAN_BYTES, location::StoreUrl, pack::PackReader};

/// The fear: a cell that is cached by itself and again within its span is given twice.
#[test]
fn cells_that_are_held_twice_are_given_once() {
    let (pack, plain) = large(40);
    let reader = PackReader::open(&pack.meta(), pack.bytes.clone()).unwrap();
    let stretch = |cells: Range<usize>| {
        let plain = Bytes::copy_from_slice(&plain[cells.start * CELL..cells.end * CELL]);
        Stretch { cells, plain }
    };
    let parts = [stretch(14..15), stretch(15..16), stretch(0..16), stretch(16..32), stretch(17..33)];
    let range = 14 * CELL + 5..32 * CELL + 7;
    let cut = reader.footer().assemble(range.start as u64..range.end as u64, &parts);
    assert_eq!(cut, plain[range]);
}

#[tokio::test]
async fn what_is_read_in_one_span_is_not_copied() {
    let (pack, plain) = large(40);
    let (store, meta) = (Liar::with(Lie::Honest, 0, &pack).await, pack.meta());
    let fetcher = fetcher(&[&store], None);
    assert_eq!(fetcher.read(&meta, 0..plain.len() as u64).await.unwrap(), plain);
    assert_eq!(store.gets(), 4, "the footer, and three spans");
    let span = 16 * CELL as u64..32 * CELL as u64;
    let (once, again) = (fetcher.try_cached(&meta, span.clone()), fetcher.try_cached(&meta, span));
    assert_eq!(once.unwrap().as_ptr(), again.unwrap().as_ptr());
    let across = 10 * CELL + 1..33 * CELL + 1;
    let read = fetcher.try_cached(&meta, across.start as u64..across.end as u64).unwrap();
    assert_eq!(read, plain[across]);
}

/// The fear: one damaged cell costs its span, or a span is believed of which one cell was not looked at.
#[tokio::test]
async fn a_damaged_cell_of_a_span_does_not_hide_its_neighbours() {
    let (pack, plain) = large(40);
    for damaged in [16, 23, 31] {
        let store = Liar::with(Lie::Flip((damaged * CELL + 9) as u64), u64::MAX, &pack).await;
        let fetcher = fetcher(&[&store], None);
        for cell in 0..40 {
            let range = cell * CELL..(cell + 1) * CELL;
            let all = fetcher.read(&pack.meta(), 0..plain.len() as u64).await;
            assert!(matches!(all, Err(ReadError::Damaged(_))), "{all:?}");
            let read = fetcher.read(&pack.meta(), range.start as u64..range.end as u64).await;
            match read {
                Ok(read) => assert_eq!(read, plain[range]),
                Err(error) => assert_eq!(cell, damaged, "{error}"),
            }
        }
        let honest = Liar::with(Lie::Honest, 0, &pack).await;
        let both = self::fetcher(&[&store, &honest], None);
        assert_eq!(both.read(&pack.meta(), 0..plain.len() as u64).await.unwrap(), plain);
    }
}

/// The fear: a reader whose reads do not begin where spans do is kept ahead of in pieces that are copied.
#[tokio::test]
async fn reading_ahead_brings_whole_spans_of_what_goes_on() {
    let (pack, plain) = large(64);
    let (store, meta) = (Liar::with(Lie::Honest, 0, &pack).await, pack.meta());
    let fetcher = fetcher(&[&store], None);
    let (end, cell) = (60 * CELL as u64, CELL as u64);
    assert!(fetcher.prefetch(&Handle::current(), &meta, 5 * cell..20 * cell, end));
    while fetcher.try_cached(&meta, 31 * cell..32 * cell).is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(fetcher.try_cached(&meta, 32 * cell..33 * cell), None, "the span after it was not asked for");
    assert!(fetcher.prefetch(&Handle::current(), &meta, 40 * cell..50 * cell, end));
    while fetcher.try_cached(&meta, 59 * cell..60 * cell).is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        fetcher.try_cached(&meta, 60 * cell..61 * cell),
        None,
        "what does not go on was not asked for"
    );
    let whole = fetcher.read(&meta, 5 * cell..32 * cell).await.unwrap();
    assert_eq!(whole, plain[5 * CELL..32 * CELL]);
}

#[test]
fn whole_spans_are_cut_out_of_a_run() {
    let (pack, _) = large(40);
    let reader = PackReader::open(&pack.meta(), pack.bytes.clone()).unwrap();
    let cut = |run| -> Vec<(usize, usize)> {
        cut_out_spans(reader.footer(), run).into_iter().map(|part| (part.start, part.end)).collect()
    };
    assert_eq!(cut(0..40), [(0, 16), (16, 32), (32, 40)]);
    assert_eq!(cut(8..24), [(8, 24)]);
    assert_eq!(cut(8..33), [(8, 16), (16, 32), (32, 33)]);
    assert_eq!(cut(32..40), [(32, 40)]);
    assert_eq!(cut(31..39), [(31, 39)]);
    assert_eq!(cut(3..4), [(3, 4)]);
}

/// A pack of 4 MiB in one piece: noise, text, or both by turns of `turn` bytes.
fn mixed(number: u64, turn: usize) -> (SealedPack, Vec<u8>) {
    let mut plain = noise(MAX_PACK_PLAIN);
    for (at, part) in plain.chunks_mut(turn).enumerate().filter(|(at, _)| at % 2 == 1) {
        part.fill(at as u8);
    }
    let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(9), number));
    builder.add(&plain).unwrap();
    (builder.finish().unwrap(), plain)
}

/// The fear: a span whose cells are stored in different ways is put together wrongly, or not all of it is verified.
#[tokio::test]
async fn spans_of_compressed_and_raw_cells_come_back_verified() {
    for turn in [CELL, 3 * CELL, 5000, SPAN_BYTES] {
        let (pack, plain) = mixed(1, turn);
        let (all, meta) = (0..plain.len() as u64, pack.meta());
        let honest = Liar::with(Lie::Honest, 0, &pack).await;
        assert_eq!(fetcher(&[&honest], None).read(&meta, all.clone()).await.unwrap(), plain);
        let cells_len = PackReader::open(&meta, pack.bytes.clone()).unwrap().footer().stored_range(0..64).end;
        for part in 0..23 {
            let liar = Liar::with(Lie::Flip(part * cells_len / 23), u64::MAX, &pack).await;
            let error = fetcher(&[&liar], None).read(&meta, all.clone()).await.unwrap_err();
            assert!(matches!(error, ReadError::Damaged(_)), "{error}");
            let both = fetcher(&[&liar, &honest], None);
            assert_eq!(both.read(&meta, all.clone()).await.unwrap(), plain);
        }
    }
}

/// The fear: of the many ways in which readers, read-ahead, eviction and the reuse of buffers meet, one gives other bytes, or none.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_of_a_directory_get_its_bytes_while_buffers_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let url = StoreUrl::from_directory(&folder.path().canonicalize().unwrap()).unwrap();
    let store = Arc::new(ObjectBlockStore::open(&url).unwrap());
    let mut packs = Vec::new();
    for (number, turn) in [(1, CELL), (2, MAX_PACK_PLAIN), (3, SPAN_BYTES)] {
        let (pack, plain) = mixed(number, turn);
        store.put(pack.name, pack.bytes.clone()).await.unwrap();
        packs.push((pack.meta(), plain));
    }
    let packs = Arc::new(packs);
    for cache in [0, 2 << 20, 5 << 20, 64 << 20] {
        let fetcher = PackFetcher::new(vec![Arc::clone(&store) as _], CellCache::new(cache), None);
        let readers = (0..6).map(|reader| {
            let (fetcher, packs) = (fetcher.clone(), Arc::clone(&packs));
            tokio::spawn(async move { read_at_random(&fetcher, &packs, reader + 1).await })
        });
        for reader in futures::future::join_all(readers).await {
            reader.unwrap();
        }
        assert_eq!(fetcher.stats().damaged, 0);
    }
}

/// Reads of every kind, of which the last few are held on to and looked at again.
async fn read_at_random(fetcher: &PackFetcher, packs: &[(PackMeta, Vec<u8>)], seed: u64) {
    let mut state = seed;
    let mut draw = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut held: std::collections::VecDeque<(usize, Range<usize>, Bytes)> =
        std::collections::VecDeque::new();
    for _ in 0..120 {
        let which = draw(3) as usize;
        let meta = &packs[which].0;
        let start = match draw(3) {
            0 => draw(4) * SPAN_BYTES as u64,
            1 => draw(64) * CELL as u64,
            _ => draw(meta.plain_len),
        };
        let length = [SPAN_BYTES as u64, CELL as u64, 1 + draw(3 << 20), 4096][draw(4) as usize];
        let range = start..meta.plain_len.min(start + length);
        if draw(2) == 0 {
            fetcher.prefetch(&Handle::current(), meta, range.clone(), meta.plain_len);
        }
        let read = match fetcher.try_cached(meta, range.clone()) {
            Some(read) => read,
            None if draw(8) == 0 => {
                // Whoever began a fetch may go away in its middle.
                let _ = futures::poll!(Box::pin(fetcher.read(meta, range.clone())));
                continue;
            }
            None => fetcher.read(meta, range.clone()).await.unwrap(),
        };
        held.push_back((which, range.start as usize..range.end as usize, read));
        if held.len() > 5 {
            held.pop_front();
        }
        for (which, range, read) in &held {
            assert!(*read == packs[*which].1[range.clone()], "bytes {range:?} of pack {which}");
        }
    }
}
