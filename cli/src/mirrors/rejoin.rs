//! A mirror that joins with what it holds, and how that stands to the source that it is about to follow.
//!
//! Invariants:
//! - Looking changes nothing, here and at the source.

use std::path::Path;

use murphy_log::{Epoch, Position};
use murphy_mirror::{Ask, BorrowError, Dialer, ExchangeError, Refusal, Replica, Token};
use tokio::runtime::Handle;

use super::replica::DiskReplica;
use crate::{config::NodeConfig, error::CliError};

/// A mirror whose lock is held, and which nobody serves.
pub(crate) struct Rejoining {
    replica: DiskReplica,
}

impl Rejoining {
    /// Opens what is in `directory`, whose lock the caller holds.
    pub(crate) fn open(
        directory: &Path,
        config: &NodeConfig,
        runtime: &Handle,
    ) -> Result<Rejoining, CliError> {
        Ok(Rejoining { replica: DiskReplica::open(directory, config, runtime)? })
    }

    /// The epoch that no source before may lead this node any more: the one it has promised, or follows.
    pub(crate) fn bound_to(&self) -> Option<Epoch> {
        let held = self.replica.state().map(|state| state.position.epoch);
        // Of two of one number the promise is the one that binds.
        held.into_iter().chain(self.replica.promised()).max_by_key(|epoch| epoch.number)
    }

    /// Where this log ends, if the source of `token` leads the epoch of that and has something else there, or nothing. What is of another
    /// epoch, or older than the source's log, is kept by whoever follows, once the histories have been compared.
    pub(crate) async fn parts_from(
        &self,
        dialer: &Dialer,
        token: &Token,
    ) -> Result<Option<Position>, ExchangeError> {
        let Some(end) = self.replica.state().map(|state| state.position) else { return Ok(None) };
        let ask = Ask { volume: token.volume, branch: token.branch, epoch: None };
        let lender = dialer.lender(&token.addresses, token.source_key, ask).await?;
        if lender.stands.promised != Some(end.epoch) {
            return Ok(None);
        }
        // It lends nothing behind an end that it does not have; and no more than that is asked.
        let mut lent = lender.frames(self.replica.keys(), end, end.lsn).await?;
        match lent.next().await {
            Ok(_) => Ok(None),
            Err(BorrowError::Exchange(ExchangeError::Refused(refused))) => match refused.reason {
                Refusal::OtherHistory => Ok(Some(end)),
                Refusal::Trimmed => Ok(None),
                _ => Err(ExchangeError::Refused(refused)),
            },
            Err(BorrowError::Exchange(error)) => Err(error),
            Err(BorrowError::Frame(error)) => Err(ExchangeError::Protocol(error.to_string())),
        }
    }
}
