//! The structure that `docs/ARCHITECTURE.md` promises, checked against the code.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The crates whose modules the map names.
const LARGE_CRATES: [&str; 10] = [
    "runtime/src",
    "shim/src",
    "image/src",
    "checkup/src",
    "runtime/cgroup/src",
    "runtime/cni/src",
    "runtime/network/src",
    "runtime/seccomp/src",
    "runtime/streaming/src",
    "sys/src",
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the repository").to_owned()
}

/// Our crates, each with those of ours that it depends on; test dependencies do not count.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--locked"])
        .current_dir(repository())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let needs = package["dependencies"].as_array().expect("dependencies");
            let ours = needs
                .iter()
                .filter(|need| need["kind"].is_null())
                .filter_map(|need| need["name"].as_str())
                .filter(|name| name.starts_with("berth-"))
                .map(str::to_owned)
                .collect();
            (package["name"].as_str().expect("a name").to_owned(), ours)
        })
        .collect()
}

#[test]
fn crates_depend_on_each_other_only_in_the_promised_directions() {
    let libraries =
        ["berth-cgroup", "berth-cni", "berth-image", "berth-network", "berth-seccomp", "berth-streaming"];
    let base = ["berth-model", "berth-sys"];
    let allowed: BTreeMap<&str, Vec<&str>> = BTreeMap::from([
        ("berth-api", vec![]),
        ("berth-cri", vec![]),
        ("berth-shim-proto", vec![]),
        ("berth-model", vec![]),
        ("berth-sys", vec![]),
        ("berth-cgroup", base.to_vec()),
        ("berth-cni", vec!["berth-sys"]),
        ("berth-image", base.to_vec()),
        ("berth-network", base.to_vec()),
        ("berth-seccomp", base.to_vec()),
        ("berth-streaming", vec![]),
        ("berth-shim", vec!["berth-shim-proto", "berth-sys"]),
        ("berth-checkup", vec!["berth-cni", "berth-sys"]),
        ("berth-cli", vec!["berth-api", "berth-checkup", "berth-cri", "berth-streaming", "berth-sys"]),
        (
            "berth-runtime",
            [&libraries[..], &base[..], &["berth-api", "berth-checkup", "berth-cri", "berth-shim-proto"]]
                .concat(),
        ),
        ("berth-tests", vec!["berth-api", "berth-cri", "berth-streaming"]),
    ]);
    let found = dependencies();
    assert_eq!(
        found.keys().map(String::as_str).collect::<Vec<_>>(),
        allowed.keys().copied().collect::<Vec<_>>()
    );
    for (name, needs) in found {
        for need in needs {
            assert!(allowed[name.as_str()].contains(&need.as_str()), "{name} depends on {need}");
        }
    }
}

#[test]
fn only_sys_has_unsafe_code() {
    for directory in [
        "proto/cri",
        "proto/berth",
        "proto/shim",
        "model",
        "image",
        "runtime",
        "runtime/cgroup",
        "runtime/cni",
        "runtime/network",
        "runtime/seccomp",
        "runtime/streaming",
        "checkup",
        "cli",
        "shim",
    ] {
        let sources = repository().join(directory).join("src");
        for root in
            ["lib.rs", "main.rs"].map(|name| sources.join(name)).into_iter().filter(|path| path.exists())
        {
            let text = std::fs::read_to_string(&root).expect("a source file");
            assert!(
                text.contains("#![forbid(unsafe_code)]"),
                "{} does not forbid unsafe code",
                root.display()
            );
        }
    }
}

/// A text between backquotes with a slash or a file ending is a path of the repository, or of the
/// part that its section is about.
#[test]
fn the_map_names_only_what_exists() {
    let text = std::fs::read_to_string(repository().join("docs/ARCHITECTURE.md")).expect("the map");
    let places = LARGE_CRATES.into_iter().chain(["", "cli/src", "tests"]);
    let places: Vec<PathBuf> = places.map(|place| repository().join(place)).collect();
    let mut checked = 0;
    for name in text.split('`').skip(1).step_by(2) {
        let is_path = name.ends_with(".rs")
            || (name.contains('/')
                && name.bytes().all(|byte| byte.is_ascii_lowercase() || b"/_.-".contains(&byte)));
        if !is_path || name.starts_with('/') {
            continue;
        }
        let exists = places.iter().any(|place| {
            let path = place.join(name);
            path.exists() || path.with_extension("rs").exists()
        });
        assert!(exists, "docs/ARCHITECTURE.md names {name}, which is not there");
        checked += 1;
    }
    assert!(checked > 30, "only {checked} names were found; is the test still looking?");
    for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        assert!(repository().join("docs").join(link).exists(), "docs/ARCHITECTURE.md links to {link}");
    }
}

/// What the threat model names as `module::test…` is a test of the rootful suite, or the beginning
/// of one's name.
#[test]
fn the_threat_model_names_only_tests_that_exist() {
    let text = std::fs::read_to_string(repository().join("docs/security.md")).expect("the threat model");
    let mut checked = 0;
    for (module, test) in text.split('`').skip(1).step_by(2).filter_map(|name| name.split_once("::")) {
        if module.contains(' ') {
            // Of a crate, whose module and tests are its own.
            continue;
        }
        let suite = repository().join(format!("tests/tests/rootful/{module}.rs"));
        if !suite.exists() {
            // Of the crate named before it in the same list.
            continue;
        }
        let suite = std::fs::read_to_string(suite).expect("a source file");
        let wanted = format!("fn {}", test.trim_end_matches(['*', '…']));
        assert!(suite.contains(&wanted), "docs/security.md names {module}::{test}, which is not there");
        checked += 1;
    }
    assert!(checked > 20, "only {checked} tests were found; is the test still looking?");
}

#[test]
fn the_map_names_every_module_of_the_large_crates() {
    let text = std::fs::read_to_string(repository().join("docs/ARCHITECTURE.md")).expect("the map");
    let mut checked = 0;
    for directory in LARGE_CRATES {
        for entry in std::fs::read_dir(repository().join(directory)).expect("a directory").flatten() {
            let name = entry.file_name().into_string().expect("a name");
            let wanted = match name.strip_suffix(".rs") {
                Some("lib" | "main") => continue,
                Some(_) => format!("`{name}`"),
                None => format!("`{name}/`"),
            };
            assert!(text.contains(&wanted), "docs/ARCHITECTURE.md does not name {directory}/{name}");
            checked += 1;
        }
    }
    assert!(checked > 30, "only {checked} modules were found");
}

/// All source files that are written by hand, with their content.
fn sources() -> Vec<(PathBuf, String)> {
    let mut directories = ["proto", "model", "sys", "image", "runtime", "checkup", "cli", "shim", "tests"]
        .map(|name| repository().join(name))
        .to_vec();
    let mut found = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                if path.file_name().is_none_or(|name| name != "generated") {
                    directories.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file");
                found.push((path, text));
            }
        }
    }
    assert!(found.len() > 100, "only {} files were found", found.len());
    found
}

#[test]
fn every_source_file_says_what_it_is_for() {
    for (path, text) in sources() {
        assert!(text.starts_with("//!"), "{} does not begin with its purpose", path.display());
    }
}

/// The most columns of a comment. Code may have more; `rustfmt` leaves comments alone.
const COMMENT_WIDTH: usize = 100;

/// Rows of tables and drawings cannot be broken.
#[test]
fn comments_are_no_wider_than_they_may_be() {
    for (path, text) in sources() {
        let mut is_drawing = false;
        for (number, line) in text.lines().enumerate() {
            let Some(comment) = line.trim_start().strip_prefix("//") else { continue };
            let comment = comment.trim_start_matches(['/', '!', ' ']);
            is_drawing ^= comment.starts_with("```");
            assert!(
                is_drawing || comment.starts_with('|') || line.chars().count() <= COMMENT_WIDTH,
                "{}:{}: a comment is wider than {COMMENT_WIDTH} columns",
                path.display(),
                number + 1
            );
        }
    }
}

/// First the standard library, then other crates, then this one, with an empty line in between.
/// `rustfmt` keeps
/// such groups, but cannot make them.
#[test]
fn every_file_imports_in_the_same_order() {
    for (path, text) in sources() {
        let modules: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.split_once("mod ").filter(|(before, _)| !before.trim_end().contains(' ')))
            .filter_map(|(_, name)| name.strip_suffix(';'))
            .collect();
        let group = |line: &str| {
            let name = line.strip_prefix("use ")?.split([':', ';', ' ']).next()?;
            Some(match name {
                "std" | "core" | "alloc" => 0,
                "crate" | "super" | "self" => 2,
                name if modules.contains(name) => 2,
                _ => 1,
            })
        };
        let mut before = None;
        let mut empty = true;
        for (number, line) in text.lines().enumerate() {
            if let Some(group) = group(line) {
                assert!(
                    before.is_none_or(|before| before == group || (before < group && empty)),
                    "{}:{}: this import belongs elsewhere",
                    path.display(),
                    number + 1
                );
                before = Some(group);
            }
            empty = line.is_empty();
        }
    }
}
