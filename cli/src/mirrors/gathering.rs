//! After a promotion without all bytes: the packs that this node may lack are looked for at archives and mirrors.
//!
//! Invariants:
//! - It goes on after every start until the tree says of each pack whether it is here or missing.

use std::sync::Arc;

use murphy_fs::BlockStores;
use murphy_log::Lsn;
use murphy_mirror::{ASKING, Gap, GatherError, GatherStatus, Gatherer, PackPlace, PackPlaces};
use tokio::sync::watch;

use super::{Mirroring, following::COPY_HELPERS, lock};
use crate::config::Promoted;

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
            places: Arc::new(Everybody { blocks: Arc::clone(&self.blocks) }),
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

/// The archives and stores that this node reads from, and every member that holds a copy.
struct Everybody {
    blocks: Arc<BlockStores>,
}

impl PackPlaces for Everybody {
    fn places(&self) -> Vec<PackPlace> {
        let stores = self.blocks.others().into_iter();
        stores.map(|store| PackPlace { name: store.label().into_owned(), source: Arc::new(store) }).collect()
    }
}

const AGAIN: std::time::Duration = std::time::Duration::from_secs(5);
