//! What is read through a pipe: by readers that go away, pause, begin late, or share the file with others.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::net::UnixStream,
    process::{Child, Command, Stdio},
};

use murphy_tests::{PATIENCE, Scratch, free_address, output_of, wait_for};

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

fn program(scratch: &Scratch, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_murphy-program"));
    command.args(arguments).current_dir(scratch.path(".")).stdin(Stdio::null());
    command
}

fn shell(scratch: &Scratch, script: &str) -> std::process::Output {
    let mut command = Command::new("sh");
    command.args(["-c", script]).env("M", env!("CARGO_BIN_EXE_murphy-program"));
    output_of(command.current_dir(scratch.path(".")).stdin(Stdio::null()))
}

/// Reads one line of what `child` says, goes away, and waits for its end.
fn read_a_line_and_go(mut child: Child) -> (String, Option<i32>) {
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let status = wait_for("the subscriber to end", PATIENCE, || child.try_wait().unwrap());
    (line, status.code())
}

/// The fear: `subscribe | head -1` reads and throws away the log for ever, with nothing new too, and holds a place of those that ask.
#[test]
fn a_subscriber_ends_with_its_reader() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.run(["serve", "node", "-d", "--listen", &free_address()]).expect_code(0);
    let token = scratch.run(["invite", "node", "--role", "observer"]).expect_code(0).stdout();
    fs::write(scratch.path("observer"), token).unwrap();
    for arguments in [&["subscribe", "node"][..], &["subscribe", "--token-file", "observer"]] {
        let child = program(&scratch, arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let (line, code) = read_a_line_and_go(child.unwrap());
        assert!(line.starts_with('{') && code == Some(0), "{arguments:?}: {code:?} {line}");
    }
}

/// The fear: what the help says of the first entry is refused wherever a log does not begin with the first of the volume.
#[test]
fn a_subscriber_begins_with_the_first_entry_that_is_there() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.run(["dump", "node", "tree"]).expect_code(0);
    scratch.run(["load", "tree", "copy", "--blocks", &scratch.url("blocks")]).expect_code(0);
    let first = |said: String| -> u64 {
        let line: serde_json::Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
        line["lsn"].as_u64().unwrap()
    };
    let at_rest = first(scratch.run(["subscribe", "copy"]).expect_code(0).stdout());
    assert!(at_rest > 1, "the log of a copy begins behind the dump");
    let before = (at_rest - 1).to_string();
    scratch.run(["subscribe", "copy", "--from", &before]).expect_error(1, "is not in this log");
    scratch.run(["serve", "copy", "-d", "--listen", &free_address()]).expect_code(0);
    let token = scratch.run(["invite", "copy", "--role", "observer"]).expect_code(0).stdout();
    fs::write(scratch.path("observer"), token).unwrap();
    for arguments in [&["subscribe", "copy"][..], &["subscribe", "--token-file", "observer"]] {
        let child = program(&scratch, arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let (line, _) = read_a_line_and_go(child.unwrap());
        assert_eq!(first(line), at_rest, "{arguments:?}");
    }
}

/// The fear: a dump in a script is written over, or behind something, with success, and nobody can load it.
#[test]
fn a_dump_goes_to_the_stdout_that_it_was_given() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    for served in [false, true] {
        if served {
            scratch.run(["serve", "node", "-d"]).expect_code(0);
        }
        let loads = |name: &str| {
            let copy = format!("{name}-{served}");
            scratch.run(["load", name, &copy, "--blocks", &scratch.url("blocks")]).expect_code(0);
        };
        let run = |script: &str| {
            let ran = shell(&scratch, script);
            assert!(ran.status.success(), "{script}: {}", String::from_utf8_lossy(&ran.stderr));
        };
        run(
            "($M dump node - && echo TAIL) >shared 2>said; test \"$(tail -c 5 shared)\" = TAIL && head -c -5 shared >plain",
        );
        loads("plain");
        run("head -c 100 /dev/zero >there && $M dump node - 1<>there 2>said");
        loads("there");
        run("$M dump node - 2>said | cat >piped");
        loads("piped");
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = program(&scratch, &["dump", "node", "-"]);
        let mut child =
            command.stdout(std::os::fd::OwnedFd::from(theirs)).stderr(Stdio::null()).spawn().unwrap();
        drop(command);
        std::io::copy(&mut &ours, &mut fs::File::create(scratch.path("socket")).unwrap()).unwrap();
        assert!(child.wait().unwrap().success());
        loads("socket");
        let broken = shell(&scratch, "{ $M dump node - 2>said; echo $? >code; } | true; cat code said");
        let said = String::from_utf8_lossy(&broken.stdout).into_owned();
        assert!(said.starts_with("1\n") && said.contains("stdout"), "{said}");
        // The next round makes them again.
        for name in ["shared", "plain", "there", "piped", "socket"] {
            fs::remove_file(scratch.path(name)).unwrap();
        }
    }
}
