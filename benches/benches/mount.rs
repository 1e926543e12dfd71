//! Create, stat, list, unlink, large writes and reads through the kernel, against the null file system in the same run.
//!
//! `cargo bench -p murphy-benches --bench mount -- [files=20000] [mib=1024] [runs=5] [reads=1] [clients=1] [threads=2]
//! [clone_fd=0] [read_ahead=1048576] [compressible=0]`

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::{io, num::NonZeroUsize, path::Path, process::ExitCode};

use murphy_benches::{
    engine::MountedVolume,
    mount_load::{Data, Load, Side, Target, compare},
    null_fs::NullMount,
};
use murphy_fs::MountOptions;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let mut load =
        Load { files: 20_000, mebibytes: 1024, clients: 1, runs: 5, reads: 1, data: Data::Incompressible };
    if !std::env::args().any(|argument| argument == "--bench") {
        // Built and run as a test, by `cargo test --all-targets`: only to see that it works.
        load = Load { files: 500, mebibytes: 4, runs: 1, ..load };
    }
    let mut options = MountOptions::new("bench");
    for argument in std::env::args().skip(1) {
        let Some((name, value)) = argument.split_once('=') else { continue };
        let value: usize = value.parse().map_err(|_| wrong(&argument))?;
        match name {
            "files" => load.files = value,
            "mib" => load.mebibytes = value,
            "runs" => load.runs = value,
            "reads" => load.reads = value,
            "clients" => load.clients = value,
            "threads" => options.threads = NonZeroUsize::new(value).ok_or_else(|| wrong(&argument))?,
            "clone_fd" => options.clone_fd = value != 0,
            "read_ahead" => options.read_ahead = u32::try_from(value).map_err(|_| wrong(&argument))?,
            "compressible" if value != 0 => load.data = Data::Compressible,
            "compressible" => load.data = Data::Incompressible,
            _ => return Err(wrong(&argument)),
        }
    }
    let scratch = tempfile::tempdir()?;
    let null = |_: &Path, mount_point: &Path| {
        let mount = NullMount::new(mount_point, &options).map_err(io::Error::other)?;
        Ok(Box::new(mount) as Box<dyn Target>)
    };
    let murphy = |state: &Path, mount_point: &Path| {
        Ok(Box::new(MountedVolume::new(state, mount_point, &options)?) as Box<dyn Target>)
    };
    let sides = [Side { name: "null", mount: &null }, Side { name: "murphy", mount: &murphy }];
    println!("{load:?}, {} threads, clone_fd {}", options.threads, options.clone_fd);
    println!("{}", compare(&load, &sides, scratch.path())?);
    Ok(())
}

fn wrong(argument: &str) -> io::Error {
    io::Error::other(format!("{argument:?} is not understood; see the top of benches/benches/mount.rs"))
}
