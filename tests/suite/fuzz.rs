//! Every decoder against bytes that damage and malice make, a bounded number of them, each campaign in a process of its own.
//!
//! Invariants:
//! - A campaign that nothing could fail in proves nothing: the canaries must.

use std::process::{Command, Output};

use murphy_tests::{fuzz, number_from_env, output_of};

/// Runs a campaign and returns what it printed.
fn run(name: &str, executions: u64) -> Output {
    let seed = number_from_env("MURPHY_SEED", 1);
    let program = env!("CARGO_BIN_EXE_murphy-fuzz");
    let arguments = [name.to_owned(), executions.to_string(), seed.to_string()];
    output_of(Command::new(program).args(arguments).env("RUST_BACKTRACE", "0"))
}

/// The fear: an object in a bucket, a packet or a file stops the program that was to survive everything; or a length in it takes all memory;
/// or a refusal that nobody can act upon.
#[test]
fn every_decoder_refuses_or_decodes_and_never_panics_or_bloats() {
    for target in fuzz::targets() {
        let usual = if SLOW.contains(&target.name) { FEW } else { MANY };
        let executions = number_from_env("MURPHY_EXECUTIONS", usual);
        let output = run(target.name, executions);
        let printed =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        eprintln!("{}", printed.trim_end());
        assert!(output.status.success(), "{printed}");
        assert!(!printed.contains(" 0 decoded"), "not one good input: {printed}");
    }
}

/// The fear: a campaign that finds nothing because it looks at nothing.
#[test]
fn a_planted_fault_is_found() {
    let found = ["it panics", "bytes of memory", "does not say where", "does not say where"];
    let canaries = fuzz::canaries();
    assert_eq!(canaries.len(), found.len());
    for (canary, what) in canaries.iter().zip(found) {
        let output = run(canary.name, MANY);
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && printed.contains(what), "{}: {printed}", canary.name);
    }
}

/// The fear: `cargo fuzz` knows fewer decoders than there are.
#[test]
fn every_target_has_its_fuzz_program() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    for target in fuzz::targets() {
        assert!(manifest.contains(&format!("name = \"{}\"", target.name)), "{}", target.name);
        let program = std::fs::read_to_string(folder.join(format!("targets/{}.rs", target.name))).unwrap();
        assert!(program.contains(&format!("\"{}\"", target.name)), "{}", target.name);
    }
}

/// The fear: what a long run under `cargo fuzz` has found is lost, or grows until nobody carries it. The campaigns begin with these inputs.
#[test]
fn every_target_keeps_a_small_corpus() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut bytes = 0;
    for target in fuzz::targets() {
        let kept =
            std::fs::read_dir(folder.join(target.name)).map(|found| found.flatten().collect::<Vec<_>>());
        let kept = kept.unwrap_or_else(|error| panic!("{}: {error}", target.name));
        assert!(kept.len() >= 3, "{}: {} inputs", target.name, kept.len());
        bytes += kept.iter().map(|input| input.metadata().unwrap().len()).sum::<u64>();
    }
    assert!(bytes < CORPUS_BYTES_MAX, "{bytes} bytes of kept inputs");
}

const CORPUS_BYTES_MAX: u64 = 1 << 20;
/// Executions of each decoder, and of those that start threads or recover a log each time.
const MANY: u64 = 20_000;
const FEW: u64 = 2_000;
const SLOW: [&str; 3] = ["snapshot", "segment", "tree"];
