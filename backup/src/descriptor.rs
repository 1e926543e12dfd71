//! The archive and its descriptor `murphy.json`: whose history it holds, and where that begins.
//!
//! Invariants:
//! - An archive is of one branch. One that holds another, or a prefix that holds something else, is refused and left as it is.
//! - Nothing is entrusted to a store that has not been seen to honour put-if-absent.
//! - The first slot of an archive is the one after [`Descriptor::base`]; the snapshot there is what replay begins with.

use bytes::Bytes;
use futures::StreamExt;
use murphy_log::{BranchId, LogTime, Position, VolumeId, VolumeKeys};
use serde::{Deserialize, Serialize};

use crate::{
    document::{self, DOCUMENT_BYTES_MAX, DocumentError, PositionText},
    layout,
    slot::Lineage,
    store::{ArchiveStore, Creation, StoreError},
};

/// Whether an archive holds packs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArchiveKind {
    /// Everything that a restore needs.
    Full,
    /// Log and snapshots only: a restore needs the packs from elsewhere.
    Log,
}

/// What an archive says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Descriptor {
    /// Whose history it holds.
    pub lineage: Lineage,
    /// The volume's name when the archive was created.
    pub name: String,
    /// Whether it holds packs.
    pub kind: ArchiveKind,
    /// What is declared to die together with it.
    pub failure_domain: String,
    /// When it was created.
    pub created: LogTime,
    /// The position before its first slot.
    pub base: Position,
}

/// An archive whose descriptor has been read. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Archive {
    store: ArchiveStore,
    descriptor: Descriptor,
    keys: VolumeKeys,
}

impl Archive {
    /// Makes the archive that `descriptor` describes at `store`, or opens the one of the same branch that is there already.
    ///
    /// The store is tested first: it must honour put-if-absent.
    pub async fn create(store: ArchiveStore, descriptor: Descriptor) -> Result<Archive, OpenArchiveError> {
        if let Some(found) = Archive::find(&store, descriptor.lineage).await? {
            return Ok(found);
        }
        probe(&store).await?;
        match store.create(layout::DESCRIPTOR, descriptor.encode(&store)?).await? {
            Creation::Created | Creation::SameContent => Ok(Archive::new(store, descriptor)),
            Creation::Other(bytes) => {
                let found = Descriptor::decode(&store, &bytes)?;
                Archive::matching(store, found, descriptor.lineage)
            }
        }
    }

    /// The archive of this branch that is at `store` already; `None` if nothing is there that keeps one from being made. Changes nothing.
    pub async fn find(store: &ArchiveStore, lineage: Lineage) -> Result<Option<Archive>, OpenArchiveError> {
        if let Some(found) = read(store).await? {
            return Archive::matching(store.clone(), found, lineage).map(Some);
        }
        let mut listed = store.list("");
        while let Some(object) = listed.next().await {
            // An earlier attempt may have come as far as the test of the store.
            let object = object?.name;
            if !object.starts_with(PROBE_FOLDER) {
                return Err(OpenArchiveError::NotEmpty { url: store.label().to_owned(), object });
            }
        }
        Ok(None)
    }

    /// The same archive, begun at another position: for one that holds neither a slot nor a snapshot, because whoever began it came no further. Its
    /// packs stay.
    pub async fn begin_again(self, base: Position, created: LogTime) -> Result<Archive, OpenArchiveError> {
        let descriptor = Descriptor { base, created, ..self.descriptor };
        self.store.replace(layout::DESCRIPTOR, descriptor.encode(&self.store)?).await?;
        Ok(Archive::new(self.store, descriptor))
    }

    /// Opens the archive at `store`, of whatever branch.
    pub async fn open(store: ArchiveStore) -> Result<Archive, OpenArchiveError> {
        match read(&store).await? {
            Some(descriptor) => Ok(Archive::new(store, descriptor)),
            None => Err(OpenArchiveError::NoArchive { url: store.label().to_owned() }),
        }
    }

    /// Opens the archive at `store`, which must hold this branch.
    pub async fn open_for(store: ArchiveStore, lineage: Lineage) -> Result<Archive, OpenArchiveError> {
        let archive = Archive::open(store).await?;
        Archive::matching(archive.store, archive.descriptor, lineage)
    }

    fn matching(
        store: ArchiveStore,
        found: Descriptor,
        expected: Lineage,
    ) -> Result<Archive, OpenArchiveError> {
        if found.lineage == expected {
            return Ok(Archive::new(store, found));
        }
        let (url, name) = (store.label().to_owned(), found.name);
        let Lineage { volume, branch } = found.lineage;
        Err(OpenArchiveError::Another { url, name, volume, branch })
    }

    fn new(store: ArchiveStore, descriptor: Descriptor) -> Archive {
        let keys = VolumeKeys::derive(descriptor.lineage.volume);
        Archive { store, descriptor, keys }
    }

    /// Its objects.
    pub fn store(&self) -> &ArchiveStore {
        &self.store
    }

    /// What it says of itself.
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Whose history it holds.
    pub fn lineage(&self) -> Lineage {
        self.descriptor.lineage
    }

    /// The keys of its volume.
    pub fn keys(&self) -> &VolumeKeys {
        &self.keys
    }

    /// What messages call it.
    pub fn url(&self) -> &str {
        self.store.label()
    }
}

impl Descriptor {
    fn encode(&self, store: &ArchiveStore) -> Result<Bytes, OpenArchiveError> {
        let text = DescriptorText {
            volume: self.lineage.volume.to_string(),
            branch: self.lineage.branch.to_string(),
            name: self.name.clone(),
            kind: self.kind,
            failure_domain: self.failure_domain.clone(),
            created: self.created.as_nanos(),
            base: self.base.into(),
        };
        document::encode(DESCRIPTOR_KIND, &text).map_err(|error| OpenArchiveError::Descriptor {
            object: store.object(layout::DESCRIPTOR),
            reason: DocumentError::Syntax(error.to_string()),
        })
    }

    /// Reads a descriptor.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor, DocumentError> {
        document::decode::<DescriptorText>(DESCRIPTOR_KIND, bytes).and_then(DescriptorText::parse)
    }

    fn decode(store: &ArchiveStore, bytes: &[u8]) -> Result<Descriptor, OpenArchiveError> {
        Descriptor::parse(bytes).map_err(|reason| OpenArchiveError::Descriptor {
            object: store.object(layout::DESCRIPTOR),
            reason,
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DescriptorText {
    volume: String,
    branch: String,
    name: String,
    kind: ArchiveKind,
    failure_domain: String,
    /// Nanoseconds since 1970.
    created: u64,
    base: PositionText,
}

impl DescriptorText {
    fn parse(self) -> Result<Descriptor, DocumentError> {
        let volume = self.volume.parse().map_err(|_| DocumentError::Field("volume"))?;
        let branch = self.branch.parse().map_err(|_| DocumentError::Field("branch"))?;
        Ok(Descriptor {
            lineage: Lineage { volume, branch },
            name: self.name,
            kind: self.kind,
            failure_domain: self.failure_domain,
            created: LogTime::from_nanos(self.created),
            base: self.base.position()?,
        })
    }
}

async fn read(store: &ArchiveStore) -> Result<Option<Descriptor>, OpenArchiveError> {
    match store.get(layout::DESCRIPTOR, DOCUMENT_BYTES_MAX).await {
        Ok(bytes) => Descriptor::decode(store, &bytes).map(Some),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Creates one object twice and sees whether the second put is refused and the first object kept. The object stays: it is a few
/// bytes, and deleting is a right that an archive's writer need not have.
async fn probe(store: &ArchiveStore) -> Result<(), OpenArchiveError> {
    let id = getrandom::u64().map_err(OpenArchiveError::Random)?;
    let name = format!("{PROBE_FOLDER}{id:016x}");
    let first = store.create(&name, Bytes::from_static(b"first")).await?;
    let second = store.create(&name, Bytes::from_static(b"second")).await?;
    let kept = store.get(&name, PROBE_BYTES_MAX).await?;
    let honoured = first != Creation::SameContent
        && second == Creation::Other(Bytes::from_static(b"first"))
        && kept == b"first".as_slice();
    if honoured { Ok(()) } else { Err(OpenArchiveError::PutIfAbsent { url: store.label().to_owned() }) }
}

/// Why an archive cannot be used; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenArchiveError {
    /// There is none.
    #[error("{url} holds no archive")]
    NoArchive {
        /// Where.
        url: String,
    },
    /// There is something that is not ours.
    #[error("{url} is not empty and no archive: it holds {object}")]
    NotEmpty {
        /// Where.
        url: String,
        /// One of the objects there.
        object: String,
    },
    /// It belongs to somebody else.
    #[error("{url} is the archive of another history: volume {name:?} ({volume}), branch {branch}")]
    Another {
        /// Where.
        url: String,
        /// The name of the volume it holds.
        name: String,
        /// The volume it holds.
        volume: VolumeId,
        /// The branch it holds.
        branch: BranchId,
    },
    /// Its descriptor cannot be used.
    #[error("{object} cannot be used: {reason}")]
    Descriptor {
        /// The object.
        object: String,
        /// Why.
        reason: DocumentError,
    },
    /// The store overwrites.
    #[error(
        "{url} does not honour put-if-absent: a second object of the same name replaced the first or was accepted"
    )]
    PutIfAbsent {
        /// Where.
        url: String,
    },
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No randomness.
    #[error("the operating system gives no random bytes: {0}")]
    Random(getrandom::Error),
}

const DESCRIPTOR_KIND: &str = "archive";
const PROBE_FOLDER: &str = "probe/";
const PROBE_BYTES_MAX: u64 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fault, FaultyStore, Source};

    fn descriptor() -> Descriptor {
        let source = Source::new();
        Descriptor {
            lineage: source.lineage(),
            name: "photos".to_owned(),
            kind: ArchiveKind::Full,
            failure_domain: "s3:other".to_owned(),
            created: LogTime::from_nanos(1_700_000_000_000_000_000),
            base: source.base().position,
        }
    }

    fn another() -> Descriptor {
        let lineage = Lineage { branch: BranchId::from_bytes([0xbb; 16]), ..descriptor().lineage };
        Descriptor { lineage, name: "music".to_owned(), ..descriptor() }
    }

    #[tokio::test]
    async fn an_archive_is_found_again() {
        let store = FaultyStore::new();
        Archive::create(store.archive_store(), descriptor()).await.unwrap();
        let again =
            Archive::create(store.archive_store(), Descriptor { name: "x".to_owned(), ..descriptor() });
        assert_eq!(again.await.unwrap().descriptor(), &descriptor());
        let opened = Archive::open_for(store.archive_store(), descriptor().lineage).await.unwrap();
        assert_eq!(opened.descriptor(), &descriptor());
    }

    #[tokio::test]
    async fn an_archive_of_another_branch_is_refused_by_name() {
        let store = FaultyStore::new();
        Archive::create(store.archive_store(), descriptor()).await.unwrap();
        let before = store.names().await;
        let refused = Archive::create(store.archive_store(), another()).await.unwrap_err();
        assert!(refused.to_string().contains("\"photos\""), "{refused}");
        let refused = Archive::open_for(store.archive_store(), another().lineage).await.unwrap_err();
        assert!(matches!(refused, OpenArchiveError::Another { .. }), "{refused}");
        assert_eq!(store.names().await, before);
    }

    #[tokio::test]
    async fn a_prefix_that_is_not_ours_is_refused_and_left_alone() {
        let store = FaultyStore::new();
        store.overwrite("holiday/1.jpg", Bytes::from_static(b"jpeg")).await;
        let refused = Archive::create(store.archive_store(), descriptor()).await.unwrap_err();
        assert!(refused.to_string().contains("holiday/1.jpg"), "{refused}");
        assert_eq!(store.names().await, ["holiday/1.jpg"]);
        let nothing = Archive::open(FaultyStore::new().archive_store()).await.unwrap_err();
        assert!(matches!(nothing, OpenArchiveError::NoArchive { .. }));
    }

    /// The network broke between the test of the store and the descriptor.
    #[tokio::test]
    async fn a_creation_that_was_broken_off_can_be_repeated() {
        let store = FaultyStore::new();
        store.fail(layout::DESCRIPTOR, Fault::PutFails, usize::MAX);
        Archive::create(store.archive_store(), descriptor()).await.unwrap_err();
        store.heal();
        Archive::create(store.archive_store(), descriptor()).await.unwrap();
    }

    #[tokio::test]
    async fn a_store_that_ignores_put_if_absent_is_refused() {
        let store = FaultyStore::new();
        store.fail("", Fault::PutOverwrites, usize::MAX);
        let refused = Archive::create(store.archive_store(), descriptor()).await.unwrap_err();
        assert!(matches!(refused, OpenArchiveError::PutIfAbsent { .. }), "{refused}");
        assert!(!store.names().await.contains(&layout::DESCRIPTOR.to_owned()));
    }

    #[tokio::test]
    async fn a_descriptor_of_a_later_format_is_refused_clearly() {
        let store = FaultyStore::new();
        let text = br#"{"murphy":"archive","version":9,"body":{}}"#;
        store.overwrite(layout::DESCRIPTOR, Bytes::from_static(text)).await;
        let refused = Archive::open(store.archive_store()).await.unwrap_err().to_string();
        assert!(
            refused.contains("format version 9") && refused.contains("murphy.json in test://store"),
            "{refused}"
        );
    }

    /// Two processes create one archive at the same moment: the second must find out whose it is.
    #[tokio::test]
    async fn a_race_for_an_empty_prefix_has_one_winner() {
        let (ours, theirs) = (FaultyStore::new(), FaultyStore::new());
        let won = Archive::create(theirs.archive_store(), another()).await.unwrap();
        let bytes = theirs.archive_store().get(layout::DESCRIPTOR, 1 << 20).await.unwrap();
        ours.overwrite(layout::DESCRIPTOR, bytes).await;
        // The first look and the list come too early to see it.
        ours.fail(layout::DESCRIPTOR, Fault::Lost, 1);
        ours.fail(layout::DESCRIPTOR, Fault::ListLags, 1);
        let lost = Archive::create(ours.archive_store(), descriptor()).await.unwrap_err();
        assert!(matches!(lost, OpenArchiveError::Another { branch, .. } if branch == won.lineage().branch));
    }
}
