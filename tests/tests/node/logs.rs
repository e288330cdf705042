//! The logs of containers while the kubelet rotates them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_tests::kubelet::Instance;
use berth_tests::log;
use berth_tests::node::{Node, soon};

use crate::harness::tests;

tests![rotation_loses_no_line];

/// The container writes while the kubelet rotates again and again; every line is in one of the
/// files, in order, and the kubelet's API returns the content of the newest.
fn rotation_loses_no_line(node: &Node<'_>) -> Result<()> {
    node.ready_pod("chatty")?;
    node.kubelet.run("chatty", "main", "touch /tmp/begin")?;
    soon("the kubelet has rotated three times and compressed", || {
        let files = files(node, "chatty")?;
        let compressed = files.iter().any(|path| path.extension().is_some_and(|end| end == "gz"));
        ensure!(files.len() > 3 && compressed, "the files are {files:?}");
        Ok(Some(()))
    })?;
    node.kubelet.run("chatty", "main", "touch /tmp/end")?;
    let count = soon("all lines are in the log", || {
        let lines = lines(node, "chatty")?;
        ensure!(lines.last().is_some_and(|line| line.ends_with(" is the last")), "{} lines", lines.len());
        Ok(Some(lines.len()))
    })?;
    soon("the kubelet's API gives the newest file", || {
        let newest = node.kubelet.log("chatty", "main", Instance::Current)?;
        // Empty, when the last line was also the last before a rotation.
        let last = newest.lines().last().map(number).transpose()?;
        Ok(last.is_none_or(|last| last == count).then_some(()))
    })
}

/// The lines of the container `main` of a pod in all its log files, which must be numbered 1, 2, 3
/// ... without a gap or a repetition. A file that the kubelet renames meanwhile is an error; a
/// second attempt helps.
pub(crate) fn lines(node: &Node<'_>, pod: &str) -> Result<Vec<String>> {
    let mut all = String::new();
    for path in files(node, pod)? {
        let bytes = if path.extension().is_some_and(|end| end == "gz") {
            let output = Command::new("gzip").arg("-dc").arg(&path).output().context("running gzip")?;
            ensure!(output.status.success(), "gzip of {}: {}", path.display(), output.status);
            output.stdout
        } else {
            fs::read(&path).with_context(|| format!("reading {}", path.display()))?
        };
        let entries = log::parse(&bytes).with_context(|| format!("the log {}", path.display()))?;
        all += &log::text(&entries, "stdout");
    }
    for (index, line) in all.lines().enumerate() {
        ensure!(number(line)? == index + 1, "line {} says {line:?}", index + 1);
    }
    Ok(all.lines().map(str::to_owned).collect())
}

fn number(line: &str) -> Result<usize> {
    let word = line.split(' ').next().unwrap_or_default();
    word.parse().with_context(|| format!("the log says {line:?}"))
}

/// The log files of the container `main` of a pod, the oldest first: the kubelet adds the time to
/// the name of a rotated file.
fn files(node: &Node<'_>, pod: &str) -> Result<Vec<PathBuf>> {
    let pod = node.kubelet.pod(pod)?;
    let directory = node.kubelet.log_directory(&pod, "main");
    let entries = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
    let mut files: Vec<PathBuf> =
        entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>().context("reading the log directory")?;
    files.retain(|path| path.extension().is_none_or(|end| end != "tmp"));
    // `0.log` comes first in the alphabet and last in time.
    files.sort();
    if !files.is_empty() {
        files.rotate_left(1);
    }
    Ok(files)
}
