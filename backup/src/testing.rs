//! What this crate's tests share: a source of frames, golden bytes, and stores that misbehave.

mod faulty;
mod source;

pub(crate) use faulty::{Fault, FaultyStore};
pub(crate) use source::{Source, append};

use crate::descriptor::{Archive, ArchiveKind, Descriptor};

/// Compares `bytes` with the golden file `name`, which `MURPHY_GOLDEN=write` makes anew.
pub(crate) fn golden(name: &str, bytes: &[u8]) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/v0").join(name);
    if std::env::var("MURPHY_GOLDEN").is_ok_and(|value| value == "write") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(golden == bytes, "the bytes of {name} are not those of {}", path.display());
}

/// An archive of the [`Source`]'s branch in `store`.
pub(crate) async fn archive(store: &FaultyStore) -> Archive {
    archive_of(store, ArchiveKind::Full).await
}

pub(crate) async fn archive_of(store: &FaultyStore, kind: ArchiveKind) -> Archive {
    let source = Source::new();
    let descriptor = Descriptor {
        lineage: source.lineage(),
        name: "test".to_owned(),
        kind,
        failure_domain: "elsewhere".to_owned(),
        created: source.now(),
        base: source.base().position,
    };
    Archive::create(store.archive_store(), descriptor).await.unwrap()
}
