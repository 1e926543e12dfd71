//! A mirror that joins anew with what it holds, and what of that it must not bring with it.
//!
//! Invariants:
//! - A promise is laid down only if this node has made it to itself, for a promotion that has begun nothing: one that was made to another node
//!   binds until a source leads that epoch.
//! - What a promotion has remembered stays: archives that it has sealed are still known as its own, and a later one asks for the same epoch
//!   again.

use std::{path::Path, sync::Arc};

use murphy_log::{DiskLog, Epoch, Position};
use murphy_mirror::{Ask, BorrowError, Dialer, ExchangeError, Refusal, Replica, Token};

use super::{
    promotion::ATTEMPTS,
    replica::{DiskReplica, forget_promise, write_promise},
};
use crate::{
    attempts,
    config::NodeConfig,
    error::{CliError, at},
};

/// A mirror whose lock is held, and which nobody serves.
pub(crate) struct Rejoining<'a> {
    directory: &'a Path,
    replica: DiskReplica,
}

impl<'a> Rejoining<'a> {
    /// Opens what is in `directory`, whose lock the caller holds.
    pub(crate) fn open(directory: &'a Path, config: &NodeConfig) -> Result<Rejoining<'a>, CliError> {
        Ok(Rejoining { directory, replica: DiskReplica::open(directory, config)? })
    }

    /// Lays down the promise that only this node itself relies on, if there is one. Until that is kept, dropping what is returned makes
    /// the promise again.
    pub(crate) fn lay_down_promise(&self) -> Result<LaidDown<'a>, CliError> {
        let attempts = attempts::load(&self.directory.join(ATTEMPTS))?;
        let (promised, log) = (self.replica.promised(), self.log());
        let begun = log.map(|log| log.recovery().epoch);
        let own = promised.filter(|promised| attempts.contains(promised) && begun != Some(*promised));
        if own.is_some() {
            forget_promise(self.directory).map_err(at(self.directory))?;
        }
        let binding = if own.is_some() { None } else { promised };
        Ok(LaidDown { directory: self.directory, own, binding })
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

    fn log(&self) -> Option<Arc<DiskLog>> {
        self.replica.use_log()
    }
}

/// A promise that was laid down, unless it is made again.
pub(crate) struct LaidDown<'a> {
    directory: &'a Path,
    own: Option<Epoch>,
    /// The promise that still binds this node.
    pub(crate) binding: Option<Epoch>,
}

impl LaidDown<'_> {
    /// Lays it down for good.
    pub(crate) fn keep(mut self) {
        self.own = None;
    }
}

impl Drop for LaidDown<'_> {
    fn drop(&mut self) {
        if let Some(epoch) = self.own
            && let Err(error) = write_promise(self.directory, epoch)
        {
            // The attempt is remembered, and promises again when it is made again.
            tracing::warn!(%error, "the promise of epoch {} is laid down although nothing came of it", epoch.number);
        }
    }
}
