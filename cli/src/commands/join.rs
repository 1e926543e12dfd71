//! `murphy join`: a new node that will follow.
//!
//! Invariants:
//! - A token is read from a file or stdin; it never stands in the arguments.
//! - The directory appears when the source has admitted the node; before, everything begun is taken back.

mod again;

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use murphy_fs::{MemberRole, OpenedStore, StoreUrl, check_prefix, claim_prefix, release_prefix};
use murphy_log::Epoch;
use murphy_mirror::{Admitted, ExchangeError, Identity, MAX_TOKEN_CHARS, Refusal, Refused, Token};
use tokio::runtime::Runtime;

use super::format::parse_url;
use crate::{
    config::{NodeConfig, Role, Upstream},
    error::{CliError, Code, at, failed},
    givers::dialer,
    mirrors::keep_proof,
    node::{NewPlace, Staging, Turn, check_beside},
    output::Output,
};

/// Make this directory a mirror of the volume that a token invites to
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Make this directory a mirror of the volume that a token invites to\n\nThe token is redeemed at once. Then serve or mount the \
                  directory: it follows its source, and copies the packs into its own store.\n\nA directory that is a mirror of the volume already, and a member, follows the source of the token \
                  with what it holds: after its source was replaced. One that was removed joins in a new directory, with the same --blocks.",
    after_help = "Example:\n  murphy join /srv/home --token-file token --blocks s3://other-region/home"
)]
pub(crate) struct JoinArgs {
    /// The directory of the new node, which must not exist, or be empty; or that of a mirror whose source was replaced
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// The file that holds the token, or - for stdin
    #[arg(long, value_name = "FILE|-")]
    token_file: PathBuf,
    /// The mirror's own store for file data; by default a folder in DIR
    #[arg(long, value_name = "URL")]
    blocks: Option<String>,
}

pub(crate) fn run(args: &JoinArgs, output: &Output) -> Result<Code, CliError> {
    let token = read_token(&args.token_file)?;
    if !token.role.holds_copy() {
        return Err(CliError::new(format!("the token is for an {}, which holds no copy", token.role))
            .hint("follow the volume with murphy subscribe --token-file"));
    }
    let blocks = args.blocks.as_deref().map(|url| parse_url("--blocks", url)).transpose()?;
    let directory = std::path::absolute(&args.directory).map_err(at(&args.directory))?;
    let runtime = Runtime::new().map_err(failed)?;
    if NodeConfig::is_in(&directory) {
        let (config, role) = again::run(&directory, &token, blocks.as_ref(), &runtime)?;
        return told(&directory, &config, role, output);
    }
    if let Some(blocks) = &blocks {
        check_beside(&directory, "--blocks", blocks)?;
    }
    let staging = Staging::beside(Turn::take(&directory, "murphy join")?)?;
    let place = blocks.as_ref().map(NewPlace::before);
    let own = staging.path.join(BLOCKS);
    let (url, opened) = match blocks {
        Some(url) => (url.clone(), url.open().map_err(failed)?),
        None => {
            std::fs::create_dir(&own).map_err(at(&own))?;
            let opened = StoreUrl::from_directory(&own).map_err(failed)?.open().map_err(failed)?;
            (StoreUrl::from_directory(&directory.join(BLOCKS)).map_err(failed)?, opened)
        }
    };
    let claimed = claim(&opened, &token, &runtime)?;
    let made = redeem(&staging, &token, url, &directory, &runtime);
    if let (Err(_), true) = (&made, claimed)
        && let Err(left) = runtime.block_on(release_prefix(&opened, token.volume))
    {
        tracing::warn!(error = %left, "the mark of the unfinished mirror stays in the block store");
    }
    let (config, role) = made?;
    place.into_iter().for_each(NewPlace::keep);
    told(&directory, &config, role, output)
}

fn told(directory: &Path, config: &NodeConfig, role: MemberRole, output: &Output) -> Result<Code, CliError> {
    let joined = serde_json::json!({
        "directory": directory,
        "volume": config.volume.to_string(),
        "branch": config.branch.to_string(),
        "role": role.to_string(),
        "blocks": config.blocks.to_string(),
    });
    output.data(&joined, |_| {
        format!("joined volume {} as a {role}: serve or mount {}", config.volume, directory.display())
    })?;
    Ok(Code::Done)
}

/// Redeems the token for the node with this identity.
fn redeemed(
    token: &Token,
    directory: &Path,
    promised: Option<Epoch>,
    identity: Arc<Identity>,
    runtime: &Runtime,
) -> Result<Admitted, CliError> {
    let dialer = dialer(&identity);
    let name = directory.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let joining = dialer.join_again(token, name, Vec::new(), promised);
    runtime.block_on(joining).map_err(not_joined)
}

/// Why the source did not take a node, with the way out.
fn not_joined(error: ExchangeError) -> CliError {
    match error {
        ExchangeError::Refused(Refused { reason: Refusal::Fenced, .. }) => {
            failed(error).hint(again::PROMISED)
        }
        ExchangeError::Refused(Refused { reason: Refusal::Revoked, .. }) => {
            failed(error).hint(again::ELSEWHERE)
        }
        ExchangeError::Refused(_) => failed(error).hint("ask for a new token: murphy invite at the source"),
        ExchangeError::Unreachable(_) | ExchangeError::NoAnswer => {
            failed(error).hint("is the source served with --listen, and does UDP reach it?")
        }
        ExchangeError::Protocol(_) => failed(error),
    }
}

/// Takes a prefix for the packs; says whether it was nobody's before. One that this volume used before is as good.
fn claim(opened: &OpenedStore, token: &Token, runtime: &Runtime) -> Result<bool, CliError> {
    match runtime.block_on(claim_prefix(opened, token.volume)) {
        Ok(()) => Ok(true),
        Err(error) => match runtime.block_on(check_prefix(opened, token.volume)) {
            Ok(()) => Ok(false),
            Err(_) => Err(failed(error).hint("every volume has a prefix of its own: give another --blocks")),
        },
    }
}

fn redeem(
    staging: &Staging,
    token: &Token,
    blocks: StoreUrl,
    directory: &Path,
    runtime: &Runtime,
) -> Result<(NodeConfig, MemberRole), CliError> {
    let identity = Arc::new(Identity::load_or_create(&staging.path).map_err(failed)?);
    let config = NodeConfig {
        role: Role::Mirror,
        source: Some(Upstream { addresses: token.addresses.clone(), key: token.source_key }),
        ..NodeConfig::new(token.volume, token.branch, token.volume.to_string(), blocks)
    };
    config.write(&staging.path)?;
    let admitted = redeemed(token, directory, None, identity, runtime)?;
    keep_proof(&staging.path, &admitted.proof)?;
    staging.publish()?;
    Ok((config, admitted.role))
}

/// Reads a token; it never stands in the arguments.
pub(super) fn read_token(path: &Path) -> Result<Token, CliError> {
    let limit = MAX_TOKEN_CHARS as u64 + 1;
    let mut bytes = Vec::new();
    if path.as_os_str() == "-" {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        let file = File::open(path).map_err(at(path))?;
        file.take(limit).read_to_end(&mut bytes).map_err(at(path))?;
    }
    let token = Token::parse(&String::from_utf8_lossy(&bytes));
    token.map_err(|error| CliError::new(format!("{}: {error}", path.display())))
}

const BLOCKS: &str = "blocks";
