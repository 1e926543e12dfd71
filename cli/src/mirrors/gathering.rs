//! After a promotion without all bytes: the packs that this node may lack are looked for at archives and mirrors.
//!
//! Invariants:
//! - It goes on after every start until the tree says of each pack whether it is here or missing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use futures::future::BoxFuture;
use murphy_fs::{BlockStore, BlockStores, MemberRow, StoreUrl, Volume};
use murphy_log::{Lsn, NodeId};
use murphy_mirror::{
    ASKING, Ask, Dialer, Gap, GatherError, GatherStatus, Gatherer, MemberPacks, PackPlace, PackPlaces,
};
use tokio::sync::watch;

use super::{Mirroring, book::VolumeBook, following::COPY_HELPERS, lock};
use crate::{
    archive_packs::ArchivePacks,
    config::{NodeConfig, Promoted},
    givers::Member,
    places::local_url,
    settings::{Settings, shared_form},
};

impl Mirroring {
    /// Looks for packs that the promotion lacked, or that are missing since an earlier one.
    pub(super) fn begin_gathering(self: &Arc<Mirroring>) {
        let promoted = self.config().promoted.clone().filter(Promoted::lacks_bytes);
        let gap = promoted.map(|promoted| Gap {
            after: Lsn::new(promoted.data_lsn),
            upto: Lsn::new(promoted.metadata_lsn),
        });
        let status = watch::Sender::new(GatherStatus::default());
        *lock(&self.gathering) = Some(status.subscribe());
        let gatherer = Gatherer {
            volume: self.volume.clone(),
            store: self.blocks.own(),
            places: Arc::new(self.everybody()),
            gap,
            clock: Arc::clone(&self.clock),
            helpers: COPY_HELPERS,
            asking: ASKING,
            status,
        };
        let (this, mut stopped) = (Arc::downgrade(self), self.stop.subscribe());
        self.runtime.spawn(async move {
            let gather = async {
                while let Err(error) = gatherer.settle().await {
                    pause_after(error).await;
                }
                if let (Some(_), Some(mirroring)) = (gap, this.upgrade()) {
                    mirroring.note_gathered();
                }
                while let Err(error) = gatherer.look_again().await {
                    pause_after(error).await;
                }
            };
            tokio::select! {
                () = gather => {}
                _ = stopped.wait_for(|stop| *stop) => {}
            }
        });
    }

    fn everybody(&self) -> Everybody {
        let config = self.config();
        let given_up = config.promoted.as_ref().map(|promoted| promoted.given_up.clone());
        Everybody {
            config: config.clone(),
            volume: self.volume.clone(),
            blocks: Arc::clone(&self.blocks),
            book: Arc::clone(&self.book),
            own: self.identity.node(),
            dialer: self.dialer.clone(),
            // Packs never change: whoever leads may be lent them.
            ask: Ask { volume: config.volume, branch: config.branch, epoch: None },
            given_up: given_up.unwrap_or_default(),
            members: Mutex::default(),
            seen: Mutex::new(self.book.changes()),
        }
    }

    fn note_gathered(&self) {
        let noted = self.change_config(|config| {
            if let Some(promoted) = &mut config.promoted {
                promoted.is_gathered = true;
            }
        });
        match noted {
            Ok(()) => tracing::info!("the bytes that the promotion lacked are here, or known to be missing"),
            // The rows say it, too; they are only read again.
            Err(error) => tracing::warn!(%error, "that all bytes are gathered is not noted"),
        }
    }
}

async fn pause_after(error: GatherError) {
    tracing::warn!(%error, "the gathering of packs begins again");
    tokio::time::sleep(AGAIN).await;
}

/// The archives that this node reads from, those of the volume, and every member that holds a copy.
struct Everybody {
    config: NodeConfig,
    volume: Volume,
    blocks: Arc<BlockStores>,
    book: Arc<VolumeBook>,
    own: NodeId,
    dialer: Dialer,
    ask: Ask,
    /// Members that nobody waits for.
    given_up: Vec<String>,
    /// Members that were asked before, over connections that may still stand.
    members: Mutex<BTreeMap<NodeId, Arc<MemberPacks>>>,
    /// Changes of the members, as far as they were asked.
    seen: Mutex<watch::Receiver<u64>>,
}

impl Everybody {
    /// The packs of a member as it can be reached now. One of which nobody knows where it listens cannot be reached.
    fn member(&self, node: NodeId, row: &MemberRow) -> Option<Arc<MemberPacks>> {
        let Member { addresses, key, .. } = Member::of_row(node, row.clone())?;
        let mut members = lock(&self.members);
        if let Some(known) = members.get(&node).filter(|known| known.is_of(&addresses, key)) {
            return Some(Arc::clone(known));
        }
        let member = Arc::new(MemberPacks::new(self.dialer.clone(), addresses, key, self.ask));
        members.insert(node, Arc::clone(&member));
        Some(member)
    }
}

impl Everybody {
    /// The archives of the volume that are not among those that this node reads from: they were given up, or came later.
    fn more_archives(&self, read: &[Arc<dyn BlockStore>]) -> Vec<Arc<dyn BlockStore>> {
        let archives = Settings::of(&self.volume).map(|settings| settings.archives);
        let archives = archives.unwrap_or_else(|error| {
            tracing::warn!(%error, "the archives of the volume are not asked for packs");
            Vec::new()
        });
        let full = archives.iter().filter(|archive| !archive.log_only);
        let urls = full.filter_map(|archive| local_url(&self.config, archive).ok());
        let is_read = |url: &StoreUrl| {
            let names = [url.to_string(), shared_form(url)];
            read.iter().any(|store| names.iter().any(|name| *name == store.label()))
        };
        urls.filter(|url| !is_read(url))
            .map(|url| Arc::new(ArchivePacks::new(url, self.config.volume)) as Arc<dyn BlockStore>)
            .collect()
    }
}

impl PackPlaces for Everybody {
    fn places(&self) -> Vec<PackPlace> {
        lock(&self.seen).borrow_and_update();
        let place = |store: Arc<dyn BlockStore>, is_awaited| PackPlace {
            name: store.label().into_owned(),
            source: Arc::new(store),
            is_awaited,
        };
        let read = self.blocks.others();
        let more = self.more_archives(&read);
        let stores = read.into_iter().map(|store| place(store, true));
        let stores = stores.chain(more.into_iter().map(|store| place(store, false)));
        let members = self.book.holders().into_iter().filter(|(node, _)| *node != self.own);
        let members = members.filter_map(|(node, row)| {
            let name = format!("member {node}");
            let is_awaited = !self.given_up.contains(&node.to_string());
            Some(PackPlace { name, source: self.member(node, &row)?, is_awaited })
        });
        stores.chain(members).collect()
    }

    /// A member that comes back says where it listens, also if that is where it did before.
    fn changed(&self) -> BoxFuture<'_, ()> {
        let mut changes = lock(&self.seen).clone();
        Box::pin(async move {
            if changes.changed().await.is_err() {
                // There is no book any more: this node is about to end.
                std::future::pending::<()>().await;
            }
        })
    }
}

const AGAIN: std::time::Duration = std::time::Duration::from_secs(5);
