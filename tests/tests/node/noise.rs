//! The programs' messages while all goes well, or fails as it should: none is repeated endlessly.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use berth_tests::node::Node;

use crate::harness::tests;

tests![the_kubelet_repeats_no_complaint, the_daemon_repeats_no_complaint];

/// More lines of one kind than this are a repetition.
const OFTEN: usize = 3;

fn the_kubelet_repeats_no_complaint(node: &Node<'_>) -> Result<()> {
    let log = node.kubelet.own_log()?;
    repeats(
        &log,
        kubelet_complaint,
        &[
            ("pod=\"default/crash-", "it is to crash"),
            ("pod=\"default/refused-", "it is to be refused"),
            ("in pod refused-", "it is to be refused"),
            ("/no/such/program", "it is to be refused"),
            ("pod=\"default/hooks-", "one of its hooks is to fail"),
            ("in pod hooks-", "one of its hooks is to fail"),
            ("/tmp/slow", "it is to take longer than it may"),
            ("connect: connection refused", "the daemon is to be away"),
            ("code = Unavailable", "the daemon is to be away"),
            ("transport: Error while dialing", "the daemon is to be away"),
            ("status check may not have completed yet", "the kubelet has just started"),
            ("desc = context canceled", "the kubelet is to end"),
            ("Housekeeping took longer than expected", "the machine is slow"),
            ("] \"Could not get metadata\"", "its watch of manifests finds some that go"),
            ("] \"Unable to process watch event\"", "its watch of manifests finds some that go"),
            (
                "watcher.go",
                "it watches the cgroups of the whole machine, some of which are gone when it looks",
            ),
            ("failed to check if node is newer", "a kubelet without an API server says it every time"),
            ("code = NotFound desc = container", "it asks once more for what it has had removed"),
        ],
    )
}

/// What the node lacks is logged once in each life of the daemon, of which there are several.
fn the_daemon_repeats_no_complaint(node: &Node<'_>) -> Result<()> {
    let log = node.daemon_log()?;
    let lives: Vec<&str> = log.split(" berthd is serving ").collect();
    ensure!(lives.len() > 1, "each life begins with that line: {:?}", log.lines().next());
    for life in lives {
        repeats(
            life,
            daemon_complaint,
            &[
                ("/no/such/program", "it is to be refused"),
                ("the command did not finish within", "one is to take longer than it may"),
            ],
        )?;
    }
    Ok(())
}

/// Fails when there are complaints of one kind more than [`OFTEN`], except for those that contain
/// one of the `allowed` texts.
fn repeats(log: &str, complaint: fn(&str) -> Option<String>, allowed: &[(&str, &str)]) -> Result<()> {
    let mut kinds: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for line in log.lines().filter(|line| !allowed.iter().any(|(text, _)| line.contains(text))) {
        if let Some(kind) = complaint(line) {
            kinds.entry(kind).or_default().push(line);
        }
    }
    kinds.retain(|_, lines| lines.len() > OFTEN);
    if kinds.is_empty() {
        return Ok(());
    }
    let told: Vec<String> = kinds
        .values()
        .map(|lines| format!("{} times: {}", lines.len(), lines.first().copied().unwrap_or_default()))
        .collect();
    bail!("said again and again:\n{}", told.join("\n"))
}

/// The kind of a klog line at the levels error and warning: its place in the source, `E1121
/// 06:33:24.052164 17631 kubelet.go:2420] ...`.
fn kubelet_complaint(line: &str) -> Option<String> {
    if !line.starts_with(['E', 'W']) || !line.get(1..5)?.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(line.split_whitespace().nth(3)?.to_owned())
}

/// The kind of a line of the daemon at the levels error and warning: its message without digits.
fn daemon_complaint(line: &str) -> Option<String> {
    let (_, message) = line.split_once(" WARN ").or_else(|| line.split_once(" ERROR "))?;
    Some(message.chars().filter(|char| !char.is_ascii_digit()).collect())
}
