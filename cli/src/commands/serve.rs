//! `murphy serve`, and the options that it shares with `mount`.
//!
//! Invariants:
//! - A node that is served already is not served again.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
    time::Duration,
};

use crate::{
    background,
    control::connect_lasting,
    error::{CliError, Code, at},
    node::NodeOptions,
    output::Output,
    serve::{self, Plan},
    units::{parse_bytes, parse_duration},
};

/// Serve a node without a mount
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  murphy serve /srv/home -d")]
pub(crate) struct ServeArgs {
    /// The directory of the node
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Go on in the background once it is served; messages go to DIR/murphy.log
    #[arg(short = 'd', long)]
    detach: bool,
    /// Listen for other nodes there, as in 10.0.0.7:7000; port 0 takes any. Others do not find a mirror on 0.0.0.0
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    #[command(flatten)]
    options: ServeOptions,
}

/// How a node is served. What is not given is taken from murphy.toml.
#[derive(clap::Args, Debug)]
pub(crate) struct ServeOptions {
    /// Begin to store data at most this long after it was written [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    flush_after: Option<Duration>,
    /// Answer no request later than this [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    io_timeout: Option<Duration>,
    /// Keep at most this much of a remote store on the local disk; 0 for nothing [default: 10G]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    cache_size: Option<u64>,
    /// Keep it there [default: DIR/cache]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Compare index and log of the node so often, slowly; 0s for never [default: 1d]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    scrub_every: Option<Duration>,
}

impl ServeOptions {
    /// The names of those that are given.
    pub(super) fn given(&self) -> Vec<&'static str> {
        let options = [
            ("--flush-after", self.flush_after.is_some()),
            ("--io-timeout", self.io_timeout.is_some()),
            ("--cache-size", self.cache_size.is_some()),
            ("--cache-dir", self.cache_dir.is_some()),
            ("--scrub-every", self.scrub_every.is_some()),
        ];
        options.into_iter().filter(|(_, is_given)| *is_given).map(|(name, _)| name).collect()
    }

    pub(super) fn node_options(&self) -> Result<NodeOptions, CliError> {
        let cache_dir = self.cache_dir.as_ref().map(|dir| std::path::absolute(dir).map_err(at(dir)));
        Ok(NodeOptions {
            flush_after: self.flush_after,
            io_timeout: self.io_timeout,
            cache_size: self.cache_size,
            cache_dir: cache_dir.transpose()?,
            scrub_every: self.scrub_every,
        })
    }
}

/// An address of this machine to listen at.
pub(super) fn parse_listen(text: &str) -> Result<SocketAddr, CliError> {
    let bad = |why: &dyn std::fmt::Display| {
        CliError::usage(format!("--listen {text}: {why}")).hint("an address looks like 0.0.0.0:7000")
    };
    let mut found = text.to_socket_addrs().map_err(|error| bad(&error))?;
    found.next().ok_or_else(|| bad(&"the name has no address"))
}

pub(crate) fn run(args: &ServeArgs, output: &Output) -> Result<Code, CliError> {
    let directory = std::path::absolute(&args.directory).map_err(at(&args.directory))?;
    let listen = args.listen.as_deref().map(parse_listen).transpose()?;
    if connect_lasting(&directory, output)?.is_some() {
        return Err(CliError::new(format!("node {} is served already", directory.display()))
            .hint("murphy status shows by which process"));
    }
    if args.detach && !background::is_child() {
        let pid = background::start(&directory)?;
        let started = serde_json::json!({ "serving": directory, "pid": pid });
        output.data(&started, |_| String::new())?;
        return Ok(Code::Done);
    }
    serve::run(&Plan { directory, options: args.options.node_options()?, mount: None, listen }, output)
}
