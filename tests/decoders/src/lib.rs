//! Fuzzing: one function for every decoder, and a campaign that needs nothing but a stable compiler.
//!
//! A [`Target`] takes bytes, decodes them and asserts what must hold: no panic, what was decoded encodes to bytes that decode to the same,
//! a refusal that says where or which. [`campaign`] feeds a target with mutations of its seeds; checksums are put right again after
//! most of them, because behind the checksum is where nobody has looked. The program `murphy-fuzz` runs campaigns and counts what they
//! allocate; the package in `tests/fuzz` gives the same functions to `cargo fuzz`.
//!
//! Invariants:
//! - One seed gives one campaign. A failure carries the bytes that caused it.
//! - An input whose refusal reads like no refusal before is kept and mutated further: that is how a campaign gets deeper.

mod allocations;
mod archive;
mod history;
mod mutate;
mod random;
mod seal;
mod tree;
mod words;

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

pub use allocations::CountingAllocator;
pub use random::{Random, number_from_env};

/// A decoder, and what its campaign begins with.
pub struct Target {
    /// What the decoder reads.
    pub name: &'static str,
    /// Decodes and asserts; `Err` is the text of the refusal.
    pub run: fn(&[u8]) -> Result<(), String>,
    /// Good bytes.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Bytes made to do harm: they are refused, and within the limits of memory.
    pub hostile: fn() -> Vec<Vec<u8>>,
    /// How its refusals name a place; `#` stands for a number, `*` for a name.
    pub places: &'static [&'static str],
    /// Puts checksums right.
    pub reseal: fn(&mut Vec<u8>),
    /// What a decoder may hold in memory at once however short its input is: the limits of its format, in bytes.
    pub allowance: usize,
}

/// All targets.
pub fn targets() -> Vec<Target> {
    let mut all = history::targets();
    all.extend(tree::targets());
    all.extend(archive::targets());
    all.extend(words::targets());
    all
}

/// Deliberate faults, each of which a campaign must find.
pub fn canaries() -> Vec<Target> {
    let canary = |name, run| Target {
        name,
        run,
        seeds: || vec![vec![0; 16]],
        hostile: Vec::new,
        places: PLACES,
        reseal: |bytes| bytes.truncate(64),
        allowance: SMALL,
    };
    vec![
        canary("canary-panic", |bytes| {
            let length = usize::from(*bytes.first().unwrap_or(&0));
            // The classic: a length from the input, used unchecked.
            if length > 200 { Err(format!("byte {}", bytes[length])) } else { Ok(()) }
        }),
        canary("canary-allocation", |bytes| {
            let claimed = bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
            drop(std::hint::black_box(Vec::<u8>::with_capacity(claimed)));
            Ok(())
        }),
        canary(
            "canary-silence",
            |bytes| if bytes.is_empty() { Err("it is wrong".to_owned()) } else { Ok(()) },
        ),
        canary("canary-vagueness", |bytes| match bytes.first() {
            Some(version @ 1..) => {
                Err(format!("format version {version} of the header is not known, only 0"))
            }
            _ => Ok(()),
        }),
    ]
}

/// The target called `name`, canaries included.
pub fn target(name: &str) -> Option<Target> {
    targets().into_iter().chain(canaries()).find(|target| target.name == name)
}

/// What a campaign came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Campaign {
    /// How many inputs were decoded or refused.
    pub executions: u64,
    /// How many of them were decoded.
    pub decoded: u64,
    /// How many different ways of refusing were seen.
    pub refusals: usize,
    /// The most that one execution held in memory, in bytes.
    pub peak: usize,
}

/// An input on which a target failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The input.
    pub input: Vec<u8>,
    /// What happened.
    pub what: String,
}

/// Runs `target` on its seeds, on the inputs that are kept for it, and on `executions` mutations of them.
pub fn campaign(target: &Target, seed: u64, executions: u64) -> Result<Campaign, Failure> {
    let mut random = Random::new(seed);
    let mut done = Campaign::default();
    let mut kinds = BTreeMap::new();
    let mut pool = (target.seeds)();
    for input in (target.hostile)() {
        if execute(target, &input, &mut done)?.is_ok() {
            return Err(Failure { input, what: "what is hostile is taken".to_owned() });
        }
    }
    for input in &pool {
        if let Err(refusal) = execute(target, input, &mut done)? {
            return Err(Failure { input: input.clone(), what: format!("a seed is refused: {refusal}") });
        }
    }
    let begun = pool.len();
    pool.extend(kept(target.name).iter().map(|input| prepared(target, input)));
    for input in &pool[begun..] {
        if let Err(refusal) = execute(target, input, &mut done)? {
            kinds.entry(kind_of(&refusal)).or_insert(0u64);
        }
    }
    for _ in 0..executions {
        // Half of the time the good ones: what was kept on the way leads into corners.
        let from = if random.below(2) == 0 { begun } else { pool.len() };
        let mut input = pool[random.index(from)].clone();
        mutate::mutate(&mut input, &pool, &mut random);
        if random.below(4) > 0 {
            (target.reseal)(&mut input);
        }
        if let Err(refusal) = execute(target, &input, &mut done)? {
            let seen = kinds.entry(kind_of(&refusal)).or_insert(0u64);
            *seen += 1;
            if *seen == 1 && pool.len() < POOL_MAX {
                pool.push(input);
            }
        }
    }
    done.refusals = kinds.len();
    Ok(done)
}

/// Runs `target` once and checks what every target promises.
pub fn execute(target: &Target, input: &[u8], done: &mut Campaign) -> Result<Result<(), String>, Failure> {
    let failure = |what| Failure { input: input.to_vec(), what };
    let before = allocations::begin();
    let result = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let peak = allocations::peak().saturating_sub(before);
    let result = result.map_err(|panic| failure(format!("it panics: {}", panic_text(&*panic))))?;
    let limit = target.allowance + PER_BYTE * input.len();
    if peak > limit {
        return Err(failure(format!("{} bytes of input take {peak} bytes of memory", input.len())));
    }
    if let Err(refusal) = &result
        && !says_where(refusal, target.places)
    {
        return Err(failure(format!("the refusal does not say where: {refusal:?}")));
    }
    done.executions += 1;
    done.decoded += u64::from(result.is_ok());
    done.peak = done.peak.max(peak);
    Ok(result)
}

/// One execution for `cargo fuzz`.
///
/// # Panics
/// If the target fails.
pub fn one(name: &str, input: &[u8]) {
    let target = target(name).expect("every fuzz program is called like its target");
    if let Err(failure) = execute(&target, &prepared(&target, input), &mut Campaign::default()) {
        panic!("{name}: {}", failure.what);
    }
}

/// What an input of `cargo fuzz` stands for: if it ends with an odd byte, everything before that byte, with the checksums put right.
pub fn prepared(target: &Target, input: &[u8]) -> Vec<u8> {
    let mut input = input.to_vec();
    if input.pop_if(|last| *last % 2 == 1).is_some() {
        (target.reseal)(&mut input);
    }
    input
}

/// The inputs that are kept for the target `name`: what `cargo fuzz` found worth keeping.
fn kept(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let Ok(entries) = fs::read_dir(&folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths.iter().filter_map(|path| fs::read(path).ok()).collect()
}

/// The bytes of a golden file, as the formats' tests wrote them.
fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/v0").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    if !name.ends_with(".hex") {
        return text.into_bytes();
    }
    text.split_whitespace().map(|digits| u8::from_str_radix(digits, 16).expect("two digits")).collect()
}

/// Whether a refusal names a place in one of these ways.
fn says_where(refusal: &str, places: &[&str]) -> bool {
    places.iter().any(|place| match (place.strip_suffix('#'), place.strip_suffix('*')) {
        (Some(before), _) => followed(refusal, before, |byte| byte.is_ascii_digit()),
        (_, Some(before)) => followed(refusal, before, |byte| byte.is_ascii_lowercase()),
        _ => refusal.contains(place),
    })
}

fn followed(refusal: &str, before: &str, by: fn(u8) -> bool) -> bool {
    refusal
        .match_indices(before)
        .any(|(at, _)| refusal.as_bytes().get(at + before.len()).is_some_and(|byte| by(*byte)))
}

/// A refusal without its numbers and quoted texts.
fn kind_of(refusal: &str) -> String {
    let unquoted: String = refusal.split('"').step_by(2).collect();
    unquoted.chars().filter(|char| !char.is_ascii_hexdigit()).take(KIND_CHARS).collect()
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// What a decoder without inner limits may take: errors, tables, a few small buffers.
const SMALL: usize = 64 << 10;
/// How many bytes of memory one byte of input may take.
const PER_BYTE: usize = 64;
/// More inputs are not kept.
const POOL_MAX: usize = 400;
const KIND_CHARS: usize = 80;
/// How the refusals of most decoders name a place: in bytes, or as the number of the part that is wrong, or as its field.
const PLACES: &[&str] =
    &["byte #", "offset #", "line #", "character #", "lsn #", "entry #", "block #", "cell #", "field *"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_without_a_place_is_told_from_one_with() {
        assert!(says_where("entry 4 is malformed at byte 17", &["byte #"]));
        assert!(says_where("an impossible value in the field mode", PLACES));
        for vague in ["it is wrong", "format version 7", "a field", "byte by byte", "200 bytes", "field 7"] {
            assert!(!says_where(vague, PLACES), "{vague}");
        }
        assert_eq!(kind_of("byte 17 of \"a\""), kind_of("byte 9 of \"b\""));
    }
}
