//! Random programs of system calls, through the kernel: a mount, a tmpfs and the reference model must answer every call alike.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use murphy_log::ManualClock;
use murphy_tests::{
    Driver, Reference, Scratch, TreeRules,
    calls::{CallStep, Calls, Modelled, RealDirectory, agree, own_umask, programs},
    can_mount, compare_directories, number_from_env, skip,
};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

const TEST: &str = "a_mount_a_tmpfs_and_the_reference_answer_alike";

/// The fear: the model judges the library, and what the kernel makes of it is another file system.
#[test]
fn a_mount_a_tmpfs_and_the_reference_answer_alike() {
    if !can_mount(TEST) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        skip(TEST, "only root may be several users");
        return;
    }
    let Ok(memory) = tempfile::tempdir_in(MEMORY) else {
        skip(TEST, "there is no tmpfs");
        return;
    };
    own_umask();
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    scratch.format("node", "blocks");
    let mount = scratch.make_dir("mnt");
    scratch.run(["mount", "node", "mnt", "-d", "--allow-other"]).expect_code(0);
    // Everybody must come as far as the directories of the rounds.
    for path in [memory.path(), mount.parent().unwrap(), &mount] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let driver = Driver::new();
    let round = std::cell::Cell::new(0);
    let run = |program: &Vec<CallStep>| {
        round.set(round.get() + 1);
        let name = format!("round-{}", round.get());
        let outcome = contest(&driver, &mount.join(&name), &memory.path().join(&name), program);
        fs::remove_dir_all(mount.join(&name)).map_err(|error| error.to_string())?;
        fs::remove_dir_all(memory.path().join(&name)).map_err(|error| error.to_string())?;
        outcome
    };
    let (cases, seed) = (number_from_env("MURPHY_CASES", CASES), number_from_env("MURPHY_SEED", 1));
    let config = Config {
        cases: u32::try_from(cases).unwrap(),
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..Config::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let result = runner.run(&programs(STEPS), |program| run(&program).map_err(TestCaseError::fail));
    if let Err(TestError::Fail(why, program)) = &result {
        let steps: Vec<String> =
            program.iter().map(|step| format!("  {:?}: {:?}", step.who, step.call)).collect();
        panic!("MURPHY_SEED={seed} MURPHY_CASES={cases}\n{}\n{why}", steps.join("\n"));
    }
    result.unwrap();
    scratch.run(["fsck", "node", "--data"]).expect_code(0);
    scratch.umount("mnt");
}

fn contest(driver: &Driver, mount: &Path, memory: &Path, program: &[CallStep]) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let mut mounted = RealDirectory::new("the mount", mount).map_err(failed)?;
    let mut local = RealDirectory::new("tmpfs", memory).map_err(failed)?;
    let reference = Reference::new(Arc::new(ManualClock::default()));
    let mut modelled = Modelled::new(driver, &reference);
    let sides: &mut [&mut dyn Calls] = &mut [&mut local, &mut mounted, &mut modelled];
    agree(sides, program)?;
    // Times that nobody set were taken from two clocks.
    let differences = compare_directories(memory, mount, TreeRules::UNTIMED).map_err(failed)?;
    let told: Vec<String> = differences.iter().map(ToString::to_string).collect();
    if told.is_empty() { Ok(()) } else { Err(told.join("; ")) }
}

/// Where a tmpfs usually is.
const MEMORY: &str = "/dev/shm";
const CASES: u64 = 300;
const STEPS: usize = 150;
