//! What this crate's tests share: a source of frames, golden bytes, and stores that misbehave.

mod faulty;
mod source;

pub(crate) use faulty::{Fault, FaultyStore, Life, Loss};
pub(crate) use source::{Source, append};

use murphy_log::{Frame, NodeId, Position};

use crate::{
    descriptor::{Archive, ArchiveKind, Descriptor},
    layout,
    slot::encode_slot,
};

/// Compares `bytes` with the golden file `archive_<name>.hex`, which `MURPHY_GOLDEN=write` makes anew.
pub(crate) fn golden(name: &str, bytes: &[u8]) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v0");
    let path = folder.join(format!("archive_{name}.hex"));
    let line =
        |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ") + "\n";
    let text: String = bytes.chunks(16).map(line).collect();
    if std::env::var("MURPHY_GOLDEN").is_ok_and(|value| value == "write") {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(golden == text, "the bytes of {name} are not those of {}", path.display());
}

/// An archive of the [`Source`]'s branch in `store`.
pub(crate) async fn archive(store: &FaultyStore) -> Archive {
    archive_of(store, ArchiveKind::Full).await
}

pub(crate) async fn archive_of(store: &FaultyStore, kind: ArchiveKind) -> Archive {
    let descriptor = Descriptor { kind, ..descriptor() };
    Archive::create(store.archive_store(), descriptor).await.unwrap()
}

/// What the archives of tests say of themselves.
pub(crate) fn descriptor() -> Descriptor {
    let source = Source::new();
    Descriptor {
        lineage: source.lineage(),
        name: "test".to_owned(),
        kind: ArchiveKind::Full,
        failure_domain: "elsewhere".to_owned(),
        created: source.now(),
        base: source.base().position,
    }
}

/// Puts the slot of `frames` where it belongs, whatever is there, and returns its end.
pub(crate) async fn put(store: &FaultyStore, frames: &[Frame]) -> Position {
    let bytes = encode_slot(Source::new().lineage(), NodeId::default(), frames).unwrap();
    store.overwrite(&layout::slot(frames[0].epoch().number, frames[0].first()), bytes).await;
    frames.last().unwrap().position()
}
