//! What a pack must survive and what it must refuse.

use proptest::prelude::*;

use super::*;
use crate::data::name::WriterId;

fn name() -> PackName {
    PackName::new(WriterId::from_u64(0x0123_4567_89ab_cdef), 42)
}

fn sealed(pieces: &[&[u8]]) -> SealedPack {
    let mut builder = PackBuilder::new(name());
    for piece in pieces {
        builder.add(piece).unwrap();
    }
    builder.finish().unwrap()
}

/// Bytes that do not compress and are the same in every run.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// The bytes of this pack in `docs/formats/pack.md` and on every store: a change here is a change of the format.
#[test]
fn a_pack_of_today_is_byte_for_byte_the_pack_of_version_0() {
    let pack = sealed(&[b"What can go", b" wrong will."]);
    let golden = concat!(
        "576861742063616e20676f2077726f6e672077696c6c2e",
        "efcdab8967452301",
        "2a00000000000000",
        "01000000020000001700000017000000",
        "00000000000000000000000000000000",
        "00000000170000001700000000000000",
        "7dd8745a5038be705ec8c4ab5f542eff",
        "7dd8745a5038be705ec8c4ab5f542eff",
        "4d5552504859504b",
        "0000000060000000",
        "149fa631025037b2e2149e19da88c274",
    );
    let hex: String = pack.bytes.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, golden);
    assert_eq!(pack.stored_len, 23 + 48 + 48 + 32);
}

/// A frame that zstd wrote once must be readable for ever, whatever later versions of it write.
#[test]
fn a_compressed_pack_of_version_0_stays_readable() {
    let golden = concat!(
        "28b52ffd60e8027d0000406d7572706879212e0100dd57152e",
        "efcdab89674523012a00000000000000",
        "0100000001000000e803000019000000",
        "00000000000000000000000000000000",
        "0000000019000000e803000001000000",
        "3a620027f692ed60339f951689552b03",
        "0bb7cdef45c608b3feb4639f43181026",
        "4d5552504859504b0000000060000000",
        "045322fbc9f4684e3bbd34073994aac6",
    );
    let bytes: Vec<u8> =
        (0..golden.len()).step_by(2).map(|at| u8::from_str_radix(&golden[at..at + 2], 16).unwrap()).collect();
    let digest = blake3::hash(&bytes[bytes.len() - 128..bytes.len() - 32]);
    let meta = PackMeta {
        name: name(),
        footer_digest: FooterDigest::from_bytes(*digest.as_bytes()),
        plain_len: 1000,
        stored_len: bytes.len() as u64,
    };
    let reader = PackReader::open(&meta, bytes.into()).unwrap();
    assert_eq!(reader.read(0..1000).unwrap(), b"murphy!.".repeat(125));
}

#[test]
fn every_flipped_bit_of_a_pack_is_detected() {
    let noise = noise(50);
    let pack = sealed(&[&b"a line of text, "[..].repeat(40), &noise]);
    let meta = pack.meta();
    PackReader::open(&meta, pack.bytes.clone()).unwrap().verify().unwrap();
    for at in 0..pack.bytes.len() {
        for bit in 0..8 {
            let mut bytes = pack.bytes.to_vec();
            bytes[at] ^= 1 << bit;
            let bytes = Bytes::from(bytes);
            let result = PackReader::open(&meta, bytes.clone()).and_then(|reader| reader.verify());
            assert_eq!(result.unwrap_err().pack, name(), "byte {at}, bit {bit}");
            let by_name = PackReader::open_by_name(name(), bytes).and_then(|reader| reader.verify());
            assert_eq!(by_name.unwrap_err().pack, name(), "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn every_truncated_or_padded_pack_is_refused() {
    let pack = sealed(&[b"some bytes", &[7; 3000]]);
    for len in 0..pack.bytes.len() {
        let short = PackReader::open(&pack.meta(), pack.bytes.slice(..len));
        assert!(matches!(short.unwrap_err().damage, PackDamage::Length { .. }), "{len}");
        assert!(PackReader::open_by_name(name(), pack.bytes.slice(..len)).is_err(), "{len}");
        // The same when the log is damaged in the same way: the footer says otherwise.
        let meta = PackMeta { stored_len: len as u64, ..pack.meta() };
        assert!(PackReader::open(&meta, pack.bytes.slice(..len)).is_err(), "{len}");
    }
    let padded = [&pack.bytes[..], &[0]].concat();
    assert!(PackReader::open(&pack.meta(), padded.into()).is_err());
}

#[test]
fn a_pack_under_another_name_or_of_another_length_is_refused() {
    let pack = sealed(&[b"some bytes"]);
    let renamed = PackMeta { name: PackName::new(WriterId::from_u64(1), 42), ..pack.meta() };
    let error = PackReader::open(&renamed, pack.bytes.clone()).unwrap_err();
    assert_eq!(error.damage, PackDamage::FooterField { field: "name" });
    assert_eq!(error.to_string(), "pack 0000000000000001-42: the footer has a wrong value in the field name");
    let by_name = PackReader::open_by_name(renamed.name, pack.bytes.clone()).unwrap_err();
    assert_eq!(by_name.damage, PackDamage::FooterField { field: "name" });
    PackReader::open_by_name(name(), pack.bytes.clone()).unwrap().verify().unwrap();
    let longer = PackMeta { plain_len: 11, ..pack.meta() };
    assert!(PackReader::open(&longer, pack.bytes.clone()).is_err());
    let huge = PackMeta { stored_len: u64::MAX, ..pack.meta() };
    assert!(PackFooter::parse(&huge, &pack.bytes).is_err());
}

/// A writer gone wrong has the right digest, so every field must hold by itself.
#[test]
fn a_footer_with_a_right_digest_and_wrong_fields_is_refused() {
    let pack = sealed(&[&noise(70_000), b"x"]);
    let footer_at = pack.bytes.len() - 32 - 48 - 2 * 48;
    for at in footer_at..pack.bytes.len() - 32 {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = pack.bytes.to_vec();
            if bytes[at] == value {
                continue;
            }
            bytes[at] = value;
            let end = bytes.len() - 32;
            let digest = *blake3::hash(&bytes[footer_at..end]).as_bytes();
            let check = bytes.len() - 16;
            bytes[check..].copy_from_slice(&digest[..16]);
            let meta = PackMeta { footer_digest: FooterDigest::from_bytes(digest), ..pack.meta() };
            let read = PackReader::open(&meta, bytes.into()).and_then(|reader| reader.verify());
            // The count of pieces is advice about how to fetch; nothing else may change unnoticed.
            let advice = (footer_at + 20..footer_at + 24).contains(&at);
            assert!(read.is_err() || advice, "byte {} of the footer as {value}", at - footer_at);
        }
    }
}

#[test]
fn a_damaged_cell_does_not_hide_its_neighbours() {
    let bytes = noise(3 * CELL_BYTES);
    let pack = sealed(&[&bytes]);
    let mut damaged = pack.bytes.to_vec();
    damaged[CELL_BYTES + 5] ^= 1;
    let reader = PackReader::open(&pack.meta(), damaged.into()).unwrap();
    assert_eq!(reader.read(0..10).unwrap(), bytes[..10]);
    let fault = PackDamage::Cell { cell: 1, fault: CellFault::StoredHash };
    assert_eq!(reader.read(0..CELL_BYTES as u64 + 1).unwrap_err().damage, fault);
    let error = reader.verify().unwrap_err().to_string();
    assert_eq!(error, "pack 0123456789abcdef-42: cell 1: its stored bytes have another hash");
}

#[test]
fn a_piece_up_to_a_cell_lies_in_one_cell_and_a_larger_one_begins_one() {
    let mut builder = PackBuilder::new(name());
    let sizes = [10, 65_000, 526, 1, 100_000, 30_000, 20_000, CELL_BYTES];
    let offsets: Vec<u64> = sizes.iter().map(|&n| builder.add(&noise(n)).unwrap().as_u64()).collect();
    let pack = builder.finish().unwrap();
    let reader = PackReader::open(&pack.meta(), pack.bytes.clone()).unwrap();
    for (&at, &size) in offsets.iter().zip(&sizes) {
        let plain = at..at + size as u64;
        assert_eq!(
            reader.footer().cells_covering(&plain).len(),
            size.div_ceil(CELL_BYTES),
            "piece of {size}"
        );
        assert_eq!(reader.read(plain).unwrap(), noise(size));
    }
    assert_eq!(reader.footer().piece_count() as usize, sizes.len());
}

/// Twice as many cells as bytes would need is the worst that pieces can do; the format has room for it.
#[test]
fn the_worst_mix_of_pieces_stays_within_the_cells_of_a_pack() {
    for (small, large) in [(1, CELL_BYTES), (CELL_BYTES / 2 + 1, CELL_BYTES / 2 + 1), (1, CELL_BYTES + 1)] {
        let mut builder = PackBuilder::new(name());
        let (small, large) = (vec![0; small], vec![0; large]);
        while builder.add(&small).is_ok() && builder.add(&large).is_ok() {}
        let pack = builder.finish().unwrap();
        let reader = PackReader::open(&pack.meta(), pack.bytes).unwrap();
        assert!(reader.footer().cell_count() <= 127, "{}", reader.footer().cell_count());
    }
}

#[test]
fn a_full_pack_refuses_one_more_byte_and_stays_as_it_was() {
    let mut builder = PackBuilder::new(name());
    builder.add(&noise(MAX_PACK_PLAIN)).unwrap();
    let refused = AddPieceError::NoRoom { pack: name(), piece: 1, room: 0 };
    assert_eq!(builder.add(&[1]), Err(refused));
    assert_eq!(builder.add(&[]), Err(AddPieceError::Empty));
    let pack = builder.finish().unwrap();
    assert!(pack.bytes.len() <= MAX_PACK_STORED);
    let reader = PackReader::open(&pack.meta(), pack.bytes.clone()).unwrap();
    assert_eq!(reader.read(0..u64::MAX).unwrap(), noise(MAX_PACK_PLAIN));
    assert!(PackBuilder::new(name()).finish().is_none());
}

fn piece() -> impl Strategy<Value = Vec<u8>> {
    (prop_oneof![1usize..200, 1usize..150_000], any::<bool>(), any::<u8>())
        .prop_map(|(len, noisy, byte)| if noisy { noise(len) } else { vec![byte; len] })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_piece_and_every_range_comes_back(
        pieces in proptest::collection::vec(piece(), 1..20),
        cuts in proptest::collection::vec((0.0..1.0f64, 0.0..1.0f64), 8),
    ) {
        let mut builder = PackBuilder::new(name());
        let mut plain = Vec::new();
        for piece in &pieces {
            prop_assert_eq!(builder.add(piece).unwrap().as_u64(), plain.len() as u64);
            plain.extend_from_slice(piece);
        }
        let pack = builder.finish().unwrap();
        let reader = PackReader::open(&pack.meta(), pack.bytes.clone()).unwrap();
        prop_assert_eq!(reader.footer(), &PackFooter::parse(&pack.meta(), &pack.bytes).unwrap());
        for (start, len) in cuts {
            let start = (start * plain.len() as f64) as usize;
            let end = start + (len * (plain.len() - start) as f64) as usize;
            prop_assert_eq!(&reader.read(start as u64..end as u64).unwrap(), &plain[start..end]);
        }
        prop_assert_eq!(reader.read(0..u64::MAX).unwrap(), plain);
    }

    #[test]
    fn no_bytes_whatever_make_the_parser_panic(tail in proptest::collection::vec(any::<u8>(), 0..400), stored: u64) {
        for stored_len in [stored, tail.len() as u64] {
            let digest = FooterDigest::from_bytes([0; 32]);
            let meta = PackMeta { name: name(), footer_digest: digest, plain_len: 1, stored_len };
            prop_assert!(PackFooter::parse(&meta, &tail).is_err());
        }
    }
}
