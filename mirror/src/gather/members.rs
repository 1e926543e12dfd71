//! The packs of a member, over a connection that is made when it is needed.
//!
//! Invariants:
//! - A connection that failed is never used again.

use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use murphy_fs::PackName;
use tokio::sync::Mutex;

use crate::{
    copier::PackSource,
    dial::{Dialer, PackFetchError},
    identity::PublicKey,
    lend::Lender,
    message::Ask,
};

/// Asks one member for packs.
#[derive(Debug)]
pub struct MemberPacks {
    dialer: Dialer,
    addresses: Vec<String>,
    key: PublicKey,
    ask: Ask,
    lender: Mutex<Option<Arc<Lender>>>,
}

impl MemberPacks {
    /// The member with this key, which listens at one of `addresses`, asked as `ask` says.
    pub fn new(dialer: Dialer, addresses: Vec<String>, key: PublicKey, ask: Ask) -> MemberPacks {
        MemberPacks { dialer, addresses, key, ask, lender: Mutex::default() }
    }

    /// Whether it is this member, at these addresses.
    pub fn is_of(&self, addresses: &[String], key: PublicKey) -> bool {
        self.addresses == addresses && self.key == key
    }

    async fn lender(&self) -> Result<Arc<Lender>, PackFetchError> {
        // Whoever comes meanwhile waits for the same connection.
        let mut lender = self.lender.lock().await;
        if let Some(lender) = &*lender {
            return Ok(Arc::clone(lender));
        }
        let made = self.dialer.lender(&self.addresses, self.key, self.ask).await.map_err(|error| {
            tracing::debug!(node = %self.key.node(), %error, "a member cannot be asked for packs");
            PackFetchError::NotConnected
        })?;
        let made = Arc::new(made);
        *lender = Some(Arc::clone(&made));
        Ok(made)
    }

    async fn forget(&self, failed: &Arc<Lender>) {
        let mut lender = self.lender.lock().await;
        if lender.as_ref().is_some_and(|lender| Arc::ptr_eq(lender, failed)) {
            *lender = None;
        }
    }
}

impl PackSource for MemberPacks {
    fn fetch(&self, pack: PackName) -> BoxFuture<'_, Result<Bytes, PackFetchError>> {
        let fetch = async move {
            let lender = self.lender().await?;
            let fetched = lender.packs.read(pack, 0..0).await;
            if matches!(fetched, Err(PackFetchError::Failed(_) | PackFetchError::NotConnected)) {
                self.forget(&lender).await;
            }
            fetched
        };
        fetch.boxed()
    }
}
