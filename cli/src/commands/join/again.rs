//! `murphy join` in the directory of a mirror: with what it holds it follows the source that the token is of.
//!
//! Invariants:
//! - Only a member comes back with what it holds. One that was removed may lack what was acknowledged since, hold what was given up, and have
//!   promised and sealed what binds it: a new directory has nothing of that. Over the same block store no whole pack is copied again.
//! - It ends no source with its first word: what it has promised and which epoch it follows is told before it is admitted, and what it holds of
//!   the source's own epoch is compared before that.

use std::{path::Path, sync::Arc};

use murphy_fs::{MemberRole, StoreUrl};
use murphy_log::Position;
use murphy_mirror::{ExchangeError, Identity, Refusal, Refused, Token};
use tokio::runtime::Runtime;

use super::{not_joined, redeemed};
use crate::{
    config::{NodeConfig, Role, Upstream},
    error::{CliError, failed},
    givers::dialer,
    mirrors::{Rejoining, keep_proof},
    node::NodeOpening,
    replaced::refuse_branch,
};

/// Lets the mirror in `directory` join anew: with what it holds it follows the source that the token is of.
pub(super) fn run(
    directory: &Path,
    token: &Token,
    blocks: Option<&StoreUrl>,
    runtime: &Runtime,
) -> Result<(NodeConfig, MemberRole), CliError> {
    let opening = NodeOpening::begin(directory)?;
    let held = opening.config.clone();
    refuse_branch(directory, &held)?;
    if held.role != Role::Mirror {
        let hint = if held.volume == token.volume { ELSEWHERE } else { ANOTHER_VOLUME };
        return Err(CliError::new(format!("{} is not a mirror's", directory.display())).hint(hint));
    }
    if (held.volume, held.branch) != (token.volume, token.branch) {
        let (volume, branch) = (held.volume, held.branch);
        return Err(CliError::new(format!(
            "{} holds volume {volume}, branch {branch}; the token is of volume {}, branch {}",
            directory.display(),
            token.volume,
            token.branch
        ))
        .hint(if volume == token.volume { ELSEWHERE } else { ANOTHER_VOLUME }));
    }
    if blocks.is_some_and(|blocks| *blocks != held.blocks) {
        return Err(CliError::usage(format!("this mirror keeps its packs in {}", held.blocks))
            .hint("leave --blocks out, or join in a new directory"));
    }
    let rejoining = Rejoining::open(directory, &held, runtime.handle())?;
    let identity = Arc::new(Identity::load_or_create(directory).map_err(failed)?);
    let dialer = dialer(&identity);
    match runtime.block_on(rejoining.parts_from(&dialer, token)) {
        Ok(None) => {}
        Ok(Some(end)) => return Err(lost(end)),
        Err(ExchangeError::Refused(Refused { reason: Refusal::Revoked, .. })) => {
            // It takes over from nobody from now on, whoever else knows.
            NodeConfig { removed: true, ..held }.write(directory)?;
            return Err(CliError::new("this mirror was removed from the volume").hint(ELSEWHERE));
        }
        Err(ExchangeError::Refused(Refused { reason: Refusal::UnknownMember, .. })) => {
            return Err(CliError::new("the source has never heard of this mirror").hint(ELSEWHERE));
        }
        Err(error @ (ExchangeError::Unreachable(_) | ExchangeError::NoAnswer)) => {
            return Err(not_joined(error));
        }
        Err(error) => return Err(failed(error).hint("the token is still good")),
    }
    let admitted = redeemed(token, directory, rejoining.bound_to(), identity, runtime)?;
    let config = NodeConfig {
        source: Some(Upstream { addresses: token.addresses.clone(), key: token.source_key }),
        removed: false,
        ..held
    };
    config.write(directory)?;
    keep_proof(directory, &admitted.proof)?;
    Ok((config, admitted.role))
}

/// The source lacks what a member holds of its epoch.
fn lost(end: Position) -> CliError {
    CliError::new(format!(
        "this mirror holds lsn {} of epoch {}, and the source, which leads it, does not: the source has lost entries",
        end.lsn, end.epoch.number
    ))
    .hint("murphy promote here goes on with them; to go on without them, murphy member remove with --assume-lost at the source, and join in a new directory then")
}

/// What to do with a directory that cannot be the mirror.
pub(super) const ELSEWHERE: &str = "join in a new directory, with the same --blocks (murphy status shows which): packs that are there are not copied again. If they lie in this directory, as without --blocks, do not delete it. It keeps what it holds; the token is still good";

/// A block store is of one volume.
const ANOTHER_VOLUME: &str = "join in a new directory, without --blocks or with one that has no packs of another volume; the token is still good";

/// What to do with a mirror that has promised a later epoch than the source leads.
pub(super) const PROMISED: &str = "somebody has begun to take over from that source, or has done so: join the one who leads the volume now, or run murphy promote again where it was begun; to follow this source all the same, join in a new directory (--blocks may be the same; if they lie in this one, keep it). The token is still good";
