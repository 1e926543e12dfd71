//! The house rules that a program can check: who may import whom, where a dependency may be seen, what documents point at.
//!
//! Invariants:
//! - Each rule here stands in `ARCHITECTURE.md` or in a document; when the rule changes, both change.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every file below `folder` with this ending, as (path from the root, contents).
fn files(folder: &str, ending: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // What builds have left, as those of `cargo fuzz`, is nobody's house.
                if !path.ends_with("target") {
                    folders.push(path);
                }
            } else if path.to_string_lossy().ends_with(ending) {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no {ending} files below {folder}");
    found
}

/// A line of code that names the crate `name`.
fn names_crate(text: &str, name: &str) -> bool {
    let path = format!("{name}::");
    text.lines().map(str::trim_start).filter(|line| !line.starts_with("//")).any(|line| {
        line.match_indices(&path).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            before.is_none_or(|before| !before.is_alphanumeric() && before != '_' && before != ':')
        })
    })
}

/// The fear: a test that is green because the machine was fast, or red because it was slow.
#[test]
fn tests_await_conditions_instead_of_sleeping() {
    // Where waiting is done, where timers are tested, and where time is virtual.
    let allowed =
        ["tests/src/wait.rs", "tests/src/driver.rs", "tests/src/simulation", "tests/src/bin/simulate.rs"];
    for (file, text) in files("tests", ".rs") {
        let may = allowed.iter().any(|allowed| file.starts_with(allowed));
        assert!(may || !text.contains(concat!("sleep", "(")), "{file} sleeps: use murphy_tests::wait_until");
    }
    // Tests inside a package: where the others are waited for, where time is virtual, and where a store takes its time.
    let allowed = [
        "mirror/src/tests.rs",
        "fs/src/fuse/tests.rs",
        "fs/src/data/fetch/tests",
        "fs/src/volume/tests/overwrites",
        "backup/src/take_over/silence/tests.rs",
        "cli/src/serve/level/tests.rs",
    ];
    for folder in ["log/src", "fs/src", "mirror/src", "backup/src", "cli/src"] {
        for (file, text) in files(folder, ".rs") {
            let from =
                if file.contains("tests") { 0 } else { text.find("\nmod tests {").unwrap_or(text.len()) };
            let sleeps = text[from..].contains(concat!("sleep", "("));
            let may = allowed.iter().any(|allowed| file.starts_with(allowed));
            assert!(may || !sleeps, "{file} sleeps: wait for what it waits for");
        }
    }
}

/// The fear: a second way from the mirror to the archive grows, and one cannot be changed without the other.
#[test]
fn crates_import_downwards_only() {
    let forbidden = [
        ("log/src", &["murphy_fs", "murphy_mirror", "murphy_backup", "murphy_cli"][..]),
        ("fs/src", &["murphy_mirror", "murphy_backup", "murphy_cli"]),
        ("mirror/src", &["murphy_backup", "murphy_cli"]),
        ("backup/src", &["murphy_mirror", "murphy_cli"]),
    ];
    for (folder, crates) in forbidden {
        for (file, text) in files(folder, ".rs") {
            for name in crates {
                assert!(!names_crate(&text, name), "{file} imports {name}");
            }
        }
    }
}

/// The fear: two modules that need each other, of which neither can be read, tested or moved alone.
#[test]
fn modules_import_downwards_only() {
    let forbidden = [
        ("cli/src/node", &["archives", "mirrors", "status", "serve", "commands"][..]),
        ("cli/src/places", &["archives", "mirrors", "node", "status", "serve", "commands"]),
        ("cli/src/archive_notes", &["archives", "mirrors", "node", "status", "serve", "commands"]),
        ("cli/src/mirror_notes", &["archives", "mirrors", "node", "status", "serve", "commands"]),
        ("cli/src/replaced", &["archives", "mirrors", "node", "status", "serve", "commands"]),
        ("cli/src/givers", &["archives", "mirrors", "node", "status", "serve", "commands"]),
        ("cli/src/status", &["archives", "mirrors", "serve", "commands"]),
        ("cli/src/archives", &["mirrors", "serve", "commands"]),
        ("cli/src/mirrors", &["serve", "commands"]),
        ("backup/src/surveyed", &["survey", "plan", "restore"]),
        ("backup/src/survey.rs", &["plan", "restore"]),
    ];
    let imports = |text: &str, name: &str| {
        let product = text.split("#[cfg(test)]").next().unwrap();
        let listed = |line: &str| {
            let line = line.trim_start();
            [format!("{name}::"), format!("{name},"), format!("{name}::{{")]
                .iter()
                .any(|part| line.starts_with(part))
        };
        let lists = product.split("use crate::{").skip(1).filter_map(|rest| rest.split("};").next());
        product.contains(&format!("crate::{name}::")) || lists.flat_map(str::lines).any(listed)
    };
    assert!(
        imports("use crate::{\n    node::Node,\n};", "node")
            && !imports("use crate::{\n    x::node,\n};", "node")
    );
    for (home, names) in forbidden {
        let crate_folder = home.split('/').next().unwrap();
        let inside = files(&format!("{crate_folder}/src"), ".rs").into_iter();
        let mut inside =
            inside.filter(|(file, _)| file.starts_with(home) && !file.contains("tests")).peekable();
        assert!(inside.peek().is_some(), "nothing is in {home}");
        for (file, text) in inside {
            for name in names {
                assert!(!imports(&text, name), "{file} imports {name}");
            }
        }
    }
}

/// The fear: a dependency leaks, and replacing it means rewriting the house.
#[test]
fn dependencies_stay_where_they_are_hidden() {
    let rules: [(&str, &[&str], usize); 4] = [
        ("fjall", &["fs/src/index"], usize::MAX),
        ("fuser", &["fs/src/fuse"], usize::MAX),
        ("quinn", &["mirror/src"], 2),
        ("object_store", &["fs/src/data", "backup/src"], usize::MAX),
    ];
    for (name, homes, most) in rules {
        let mut seen = BTreeSet::new();
        for folder in ["log/src", "fs/src", "mirror/src", "backup/src", "cli/src"] {
            for (file, text) in files(folder, ".rs").into_iter().filter(|(_, text)| names_crate(text, name)) {
                assert!(
                    homes.iter().any(|home| file.starts_with(home)),
                    "{file} sees {name}: {}",
                    text.len()
                );
                if !file.contains("test") {
                    seen.insert(file);
                }
            }
        }
        assert!((1..=most).contains(&seen.len()), "{name} is seen in {seen:?}");
    }
}

/// The fear: a document leads a reader, at three in the morning, to a page that does not exist.
#[test]
fn links_in_documents_lead_somewhere() {
    let mut pages = files("docs", ".md");
    for page in ["README.md", "ARCHITECTURE.md"] {
        pages.push((page.to_owned(), fs::read_to_string(root().join(page)).unwrap()));
    }
    for (page, text) in pages {
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split('#').next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = root().join(&page).parent().unwrap().join(target);
            assert!(path.exists(), "{page} links to {target}");
        }
    }
}

/// The fear: a package that nobody can say the use of.
#[test]
fn every_dependency_has_its_line() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let listed = fs::read_to_string(root().join("docs/dependencies.md")).unwrap();
    let section = manifest.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let names = section.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name.trim());
    for name in names.filter(|name| !name.starts_with("murphy-") && !name.starts_with('#')) {
        let has_line = listed.lines().filter(|line| line.starts_with("| ")).any(|line| {
            let cell = line.split('|').nth(1).unwrap_or_default();
            cell.split([',', ' ', '*', '(']).any(|word| word == name)
        });
        assert!(has_line, "{name} has no line in docs/dependencies.md");
    }
}

/// The fear: a file is replaced in a way that no crash test has seen: a sync forgotten, of the file or of its directory.
#[test]
fn files_are_replaced_by_the_one_helper() {
    // The disk of the log is the helper. A node that is made gets its name from `Staging`; the demonstration renames what it tests.
    let exempt = ["log/src/files.rs", "cli/src/node/staging.rs", "cli/src/demo/operations.rs"];
    for folder in ["log/src", "fs/src", "mirror/src", "backup/src", "cli/src"] {
        for (file, text) in files(folder, ".rs")
            .into_iter()
            .filter(|(file, _)| !exempt.contains(&&file[..]) && !file.contains("tests"))
        {
            let product = text.split("#[cfg(test)]").next().unwrap();
            for call in ["fs::rename(", "fs::create_dir_all("] {
                let is_demo = file.starts_with("cli/src/demo") && call == "fs::create_dir_all(";
                assert!(
                    is_demo || !product.contains(call),
                    "{file} calls {call}: see murphy_log::replace_file"
                );
            }
        }
    }
}

/// The fear: a file that eats the project.
#[test]
fn no_file_is_longer_than_the_rule() {
    for folder in [
        "log/src",
        "fs/src",
        "mirror/src",
        "backup/src",
        "cli/src",
        "tests/src",
        "tests/suite",
        "tests/mount",
        "benches",
    ] {
        for (file, text) in files(folder, ".rs") {
            assert!(text.lines().count() <= LINES_MAX, "{file} has {} lines", text.lines().count());
            assert!(text.starts_with("//!"), "{file} does not say what it is for");
        }
    }
}

/// The fear: a page says that a danger is tested, and the test was renamed, or never written.
#[test]
fn every_fear_has_tests_that_exist_or_says_what_it_waits_for() {
    let page = fs::read_to_string(root().join("docs/testing.md")).unwrap();
    let table = page.split("\n## Fears\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let folders = [
        "log/src",
        "fs/src",
        "mirror/src",
        "backup/src",
        "cli/src",
        "tests/src",
        "tests/suite",
        "tests/mount",
    ];
    let sources: Vec<String> =
        folders.iter().flat_map(|folder| files(folder, ".rs")).map(|(_, text)| text).collect();
    let mut fears = 0;
    for line in table.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, fear, tests, waits, _] = cells[..] else { panic!("three cells: {line}") };
        assert!(!tests.is_empty() || !waits.is_empty(), "nothing looks for {fear}");
        for test in tests.split(", ").filter(|test| !test.is_empty()) {
            let head = format!("fn {}(", test.trim_matches('`'));
            assert!(sources.iter().any(|text| text.contains(&head)), "{test} does not exist: {fear}");
        }
        fears += 1;
    }
    assert!(fears > 40, "{fears} fears are not all");
}

const LINES_MAX: usize = 600;
