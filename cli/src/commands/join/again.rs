//! `murphy join` in the directory of a mirror: it becomes a member again, with what it holds.
//!
//! Invariants:
//! - It brings nothing that would end the source with its first word: no promise that only it relies on, and, once it was removed, no end of the
//!   log that the source does not have. That end is kept as a branch.
//! - What the source does not have is given up only by a mirror that was removed. From one that is a member it may be what was acknowledged.
//! - Until the source has admitted it, its directory stays as it was.

use std::{path::Path, sync::Arc};

use murphy_fs::{MemberRole, StoreUrl};
use murphy_log::Position;
use murphy_mirror::{Dialer, ExchangeError, Identity, Refusal, Refused, Token};
use tokio::runtime::Runtime;

use super::{not_joined, redeemed};
use crate::{
    config::{NodeConfig, Role, Upstream},
    error::{CliError, at, failed},
    givers::dialer,
    mirrors::{Rejoining, keep_proof},
    node::{MirrorOpening, keep_aside},
};

/// Lets the mirror in `directory` join anew: with what it holds it follows the source that the token is of.
pub(super) fn run(
    directory: &Path,
    token: &Token,
    blocks: Option<&StoreUrl>,
    runtime: &Runtime,
) -> Result<(NodeConfig, MemberRole), CliError> {
    let opening = MirrorOpening::begin(directory)?;
    let held = opening.config.clone();
    let elsewhere = "join in a new directory; --blocks may be the same";
    if held.role != Role::Mirror {
        return Err(CliError::new(format!("{} is not a mirror's", directory.display())).hint(elsewhere));
    }
    if (held.volume, held.branch) != (token.volume, token.branch) {
        let (volume, branch) = (held.volume, held.branch);
        return Err(CliError::new(format!(
            "{} holds volume {volume}, branch {branch}; the token is of volume {}, branch {}",
            directory.display(),
            token.volume,
            token.branch
        ))
        .hint(elsewhere));
    }
    if blocks.is_some_and(|blocks| *blocks != held.blocks) {
        return Err(CliError::usage(format!("this mirror keeps its packs in {}", held.blocks))
            .hint("leave --blocks out, or join in a new directory"));
    }
    let rejoining = Rejoining::open(directory, &held)?;
    let identity = Arc::new(Identity::load_or_create(directory).map_err(failed)?);
    let dialer = dialer(&identity);
    let was_removed = was_removed(&rejoining, held.removed, (&dialer, token), runtime)?;
    let laid_down = rejoining.lay_down_promise()?;
    let admitted = redeemed(token, directory, laid_down.binding, identity, runtime)?;
    laid_down.keep();
    part_ways(directory, &rejoining, was_removed, (&dialer, token), runtime)?;
    let config = NodeConfig {
        source: Some(Upstream { addresses: token.addresses.clone(), key: token.source_key }),
        removed: false,
        ..held
    };
    config.write(directory)?;
    keep_proof(directory, &admitted.proof)?;
    Ok((config, admitted.role))
}

/// Whether the source has removed this mirror. Refuses if it has not, and lacks what the mirror holds of its epoch.
fn was_removed(
    rejoining: &Rejoining<'_>,
    known: bool,
    (dialer, token): (&Dialer, &Token),
    runtime: &Runtime,
) -> Result<bool, CliError> {
    match runtime.block_on(rejoining.parts_from(dialer, token)) {
        Ok(Some(end)) if !known => Err(lost(end)),
        Ok(_) | Err(ExchangeError::Refused(Refused { reason: Refusal::UnknownMember, .. })) => Ok(known),
        Err(ExchangeError::Refused(Refused { reason: Refusal::Revoked, .. })) => Ok(true),
        Err(error) => Err(not_joined(error)),
    }
}

/// Lets a mirror that was removed put aside what it holds, if that ends in something else than the source has.
fn part_ways(
    directory: &Path,
    rejoining: &Rejoining<'_>,
    was_removed: bool,
    (dialer, token): (&Dialer, &Token),
    runtime: &Runtime,
) -> Result<(), CliError> {
    let unknown = |error: ExchangeError| {
        CliError::new(format!(
            "the source has admitted this mirror, and does not say what it has of its log: {error}"
        ))
        .hint("run murphy join again, with a new token, before the mirror is served")
    };
    match runtime.block_on(rejoining.parts_from(dialer, token)).map_err(unknown)? {
        None => Ok(()),
        Some(end) if !was_removed => Err(lost(end)),
        Some(end) => {
            let kept = keep_aside(directory, None, end).map_err(at(directory))?;
            tracing::warn!("the source goes on without the end of this mirror's log, which is kept: {kept}");
            Ok(())
        }
    }
}

/// The source lacks what a member holds of its epoch.
fn lost(end: Position) -> CliError {
    CliError::new(format!(
        "this mirror holds lsn {} of epoch {}, and the source, which leads it, does not: the source has lost entries",
        end.lsn, end.epoch.number
    ))
    .hint("murphy promote here goes on with them; to go on without them, murphy member remove with --assume-lost at the source, and join then")
}

/// What to do with a mirror that has promised a later epoch than the source leads.
pub(super) const PROMISED: &str = "somebody has begun to take over from that source, or has done so: join the one who leads the volume now, or run murphy promote again where it was begun; to follow this source all the same, join in a new directory (--blocks may be the same). The token is still good";
