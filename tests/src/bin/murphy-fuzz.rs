//! Runs fuzz campaigns in a process of their own, counting what they allocate: `murphy-fuzz TARGET [EXECUTIONS [SEED]]`,
//! `murphy-fuzz TARGET --input FILE`, `murphy-fuzz --seeds DIRECTORY`, `murphy-fuzz list`.

#![expect(clippy::print_stdout, reason = "what a campaign came to is asked for")]

use std::process::ExitCode;

use murphy_tests::fuzz::{Campaign, CountingAllocator, Target, campaign, execute, prepared, target, targets};

#[global_allocator]
static COUNTING: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(text) => {
            eprintln!("Error: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<String, String> {
    match arguments {
        ["list"] => Ok(targets().iter().map(|target| target.name).collect::<Vec<_>>().join("\n")),
        [name, "--input", file] => {
            let input = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
            let target = found(name)?;
            let input = prepared(&target, &input);
            let result = execute(&target, &input, &mut Campaign::default());
            let result = result.map_err(|failure| failure.what)?;
            Ok(result.map_or_else(|refusal| format!("refused: {refusal}"), |()| "decoded".to_owned()))
        }
        ["--seeds", folder] => targets().iter().map(|target| write_seeds(target, folder)).collect(),
        [name, rest @ ..] if rest.len() <= 2 => {
            let number = |at: usize, usual: u64| {
                rest.get(at)
                    .map_or(Ok(usual), |text| text.parse().map_err(|_| format!("{text:?} is not a number")))
            };
            let (executions, seed) = (number(0, 100_000)?, number(1, 1)?);
            let done = campaign(&found(name)?, seed, executions).map_err(|failure| {
                let hex: String = failure.input.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{name}, seed {seed}: {}\ninput: {hex}", failure.what)
            })?;
            Ok(format!(
                "{name}: {} executions, {} decoded, {} kinds of refusal, at most {} KiB",
                done.executions,
                done.decoded,
                done.refusals,
                done.peak >> 10
            ))
        }
        _ => Err("usage: murphy-fuzz TARGET [EXECUTIONS [SEED]]".to_owned()),
    }
}

/// Writes what the campaign of a target begins with, as a corpus for `cargo fuzz`: the golden bytes and what the formats' own writers make.
fn write_seeds(target: &Target, folder: &str) -> Result<String, String> {
    let (name, folder) = (target.name, format!("{folder}/{}", target.name));
    std::fs::create_dir_all(&folder).map_err(|error| format!("{folder}: {error}"))?;
    let seeds = [(target.seeds)(), (target.hostile)()].concat();
    let seeds: Vec<_> = seeds.iter().filter(|seed| seed.len() <= SEED_BYTES_MAX).collect();
    for (number, seed) in seeds.iter().enumerate() {
        // The odd byte at the end asks for right checksums.
        let path = format!("{folder}/seed-{number}");
        std::fs::write(&path, [seed, &[1][..]].concat()).map_err(|error| format!("{path}: {error}"))?;
    }
    Ok(format!("{name}: {} seeds\n", seeds.len()))
}

/// Longer inputs slow `cargo fuzz` down.
const SEED_BYTES_MAX: usize = 16 << 10;

fn found(name: &str) -> Result<Target, String> {
    target(name).ok_or_else(|| format!("no target is called {name}"))
}
