//! A container that makes its directory tree as deep as it can: much deeper than any path, stack or
//! table of descriptors.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{SOON, Setup, rootful_with};
use berth_tests::deadline::within;
use berth_tests::pod::shell;

const DEPTH: u64 = 100_000;

/// From the bottom to the top, since a path has at most 4096 bytes and a shell looks up the path of
/// its directory.
const SCRIPT: &str = "
    p=/next/$(printf 'd/%.0s' $(seq 199))
    mkdir /tree
    for i in $(seq 500); do mkdir -p ${p%/} && mv /tree ${p}d && mv /next /tree || exit 1; done
    echo deep
    while :; do sleep 0.05; done";

#[test]
fn a_tree_of_a_hundred_thousand_levels_is_counted_and_removed() -> Result<()> {
    let setup = Setup {
        // In memory, where such a tree is quickly created and removed.
        disk_bytes: Some(64 << 20),
        configuration: "[image]\nmin_free_bytes = 0\nmin_free_percent = 0\n",
        ..Setup::default()
    };
    rootful_with(setup, |daemon| {
        let pod = daemon.pod("deep")?;
        let main = pod.start(shell("main", SCRIPT))?;
        let other = pod.idle("other")?;
        main.says("deep")?;
        let inodes = || -> Result<u64> {
            let request = v1::ContainerStatsRequest { container_id: main.id.clone() };
            let stats = daemon.client().container_stats(request)?.stats.context("statistics")?;
            let layer = stats.writable_layer.context("a writable layer")?;
            Ok(layer.inodes_used.context("inodes")?.value)
        };
        // Each call counts for a while and reports its progress.
        within(SOON, "all of it is counted", || Ok((inodes()? >= DEPTH).then_some(())))?;
        main.stop(0)?;
        main.remove()?;
        let trash = daemon.root().join("trash");
        within(SOON, "the tree is deleted", || Ok(fs::read_dir(&trash)?.next().is_none().then_some(())))?;
        ensure!(other.exec(&["true"])?.code == 0, "the daemon serves");
        Ok(())
    })
}
