//! Volumes of every kind that a pod can have without an API server, as its containers see them.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests::node::{Node, soon};
use nix::mount::{MsFlags, mount};

use crate::harness::tests;

tests![
    an_empty_directory_is_shared_whole_and_in_parts,
    a_directory_in_memory_has_its_size,
    directories_and_files_of_the_host_are_there,
    what_is_to_be_read_only_is,
    mounts_pass_from_the_host_and_to_it,
    the_pods_own_fields_are_files,
];

fn an_empty_directory_is_shared_whole_and_in_parts(node: &Node<'_>) -> Result<()> {
    node.ready_pod("volumes")?;
    let name = &node.kubelet.pod("volumes")?.name;
    run(node, "writer", "cp /etc/hostname /disk/whole")?;
    run(node, "writer", "cp /etc/hostname /part/part")?;
    run(node, "writer", "cp /etc/hostname /named/named")?;
    // Another test creates a file of this name meanwhile.
    let files = run(node, "reader", "find /disk -type f ! -name x")?;
    let mut files: Vec<&str> = files.lines().collect();
    files.sort_unstable();
    let expected = [format!("/disk/of-{name}/named"), "/disk/parts/one/part".into(), "/disk/whole".into()];
    ensure!(files == expected, "the reader sees {files:?}");
    let read = run(node, "reader", "cat /disk/parts/one/part")?;
    ensure!(read.trim_end() == name, "the host name that the writer wrote: {read:?}");
    Ok(())
}

/// It is a tmpfs with the size of its limit, and the same for both containers.
fn a_directory_in_memory_has_its_size(node: &Node<'_>) -> Result<()> {
    node.ready_pod("volumes")?;
    let size = run(node, "writer", "df -k /memory")?;
    let line = size.lines().last().unwrap_or_default();
    let mut words = line.split_whitespace();
    ensure!((words.next(), words.next()) == (Some("tmpfs"), Some("4096")), "df says {size}");
    run(node, "writer", "dd if=/dev/zero of=/memory/fits bs=1M count=3")?;
    refused(node, "writer", "dd if=/dev/zero of=/memory/too-much bs=1M count=2", "No space left on device")?;
    let seen = run(node, "reader", "stat -c %s /memory/fits")?;
    ensure!(seen == "3145728\n", "the reader sees {seen:?}");
    run(node, "reader", "rm /memory/fits /memory/too-much").map(drop)
}

fn directories_and_files_of_the_host_are_there(node: &Node<'_>) -> Result<()> {
    node.ready_pod("volumes")?;
    run(node, "writer", "touch /directory/written")?;
    node.evidence("directory/written")?;
    let file = run(node, "writer", "cat /etc/file")?;
    ensure!(file == "a file of the node\n", "the file of the node says {file:?}");
    Ok(())
}

/// A mount, a mount below it, a root: read-only where they should be.
fn what_is_to_be_read_only_is(node: &Node<'_>) -> Result<()> {
    node.ready_pod("volumes")?;
    let read_only = "Read-only file system";
    refused(node, "reader", "touch /disk/x", read_only)?;
    refused(node, "reader", "touch /tree/x", read_only)?;
    refused(node, "reader", "touch /x", read_only)?;
    refused(node, "reader", "touch /etc/x", read_only)?;
    run(node, "reader", "touch /disk/parts/one/x")?;
    run(node, "reader", "rm /disk/parts/one/x")?;
    run(node, "reader", "touch /memory/x")?;
    run(node, "writer", "touch /x /tree/x").map(drop)
}

/// A mount made on the host while the pod runs is visible, and read-only where the volume is
/// recursively so; a mount made by a privileged container is visible on the host and in the others.
fn mounts_pass_from_the_host_and_to_it(node: &Node<'_>) -> Result<()> {
    node.ready_pod("volumes")?;
    let tree = node.kubelet.evidence().join("tree");
    // The kubelet and this test share a mount namespace, and the directory is on a mount that
    // propagates.
    let from_host = tree.join("from-host");
    fs::create_dir(&from_host).context("making a directory")?;
    mount(Some("tmpfs"), &from_host, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))
        .context("mounting")?;
    fs::write(from_host.join("file"), "mounted later\n").context("writing a file")?;
    let seen = run(node, "writer", "cat /tree/from-host/file")?;
    ensure!(seen == "mounted later\n", "the writer sees {seen:?}");
    refused(node, "reader", "cat /tree/from-host/file", "No such file")?;

    run(node, "mounter", "mkdir /tree/from-pod")?;
    run(node, "mounter", "mount -t tmpfs -o size=64k tmpfs /tree/from-pod")?;
    run(node, "mounter", "cp /etc/hostname /tree/from-pod/file")?;
    node.evidence("tree/from-pod/file").context("on the host")?;
    soon("the writer sees the mount", || run(node, "writer", "cat /tree/from-pod/file").map(Some))?;
    run(node, "mounter", "umount /tree/from-pod /tree/from-host")?;
    ensure!(!from_host.join("file").exists(), "the host's mount is taken away from within");
    Ok(())
}

fn the_pods_own_fields_are_files(node: &Node<'_>) -> Result<()> {
    node.ready_pod("volumes")?;
    let labels = run(node, "reader", "cat /pod/labels")?;
    ensure!(labels == "colour=\"green\"", "the labels are {labels:?}");
    let memory = run(node, "reader", "cat /pod/memory")?;
    ensure!(memory == "32", "the limit is {memory:?}");
    Ok(())
}

fn run(node: &Node<'_>, container: &str, command: &str) -> Result<String> {
    node.kubelet.run("volumes", container, command)
}

/// The command fails, and says so.
fn refused(node: &Node<'_>, container: &str, command: &str, words: &str) -> Result<()> {
    match run(node, container, command) {
        Ok(output) => bail!("{command:?} succeeds in {container}: {output}"),
        Err(error) => {
            ensure!(format!("{error:#}").contains(words), "{command:?} fails otherwise: {error:#}");
            Ok(())
        }
    }
}
