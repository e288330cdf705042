//! Containers that end while the disk under the durable root has not a single byte left: their exit
//! codes are reported all the same.

use std::fs::{self, OpenOptions};
use std::io::Write as _;

use anyhow::{Result, ensure};
use berth_tests::daemon::{Daemon, SOON, Setup, rootful_with};
use berth_tests::deadline::within;
use berth_tests::pod::{Container, shell};
use nix::sys::signal::{SIGTERM, kill};
use nix::unistd::Pid;

/// Takes all free space, down to the last block.
fn fill(daemon: &Daemon) -> Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(daemon.root().join("filler"))?;
    for size in [1 << 20, 4096, 1] {
        let block = vec![0; size];
        while file.write_all(&block).is_ok() {}
    }
    ensure!(fs::write(daemon.root().join("more"), "x").is_err(), "there is room left");
    Ok(())
}

fn ends_with_seven(container: &Container) -> Result<()> {
    let status = container.ended()?.status;
    ensure!((status.exit_code, status.reason.as_str()) == (7, "Error"), "{status:?}");
    Ok(())
}

#[test]
fn an_exit_code_survives_a_full_disk_and_a_daemon_that_was_away() -> Result<()> {
    let setup = Setup {
        configuration: "[image]\nmin_free_bytes = 0\nmin_free_percent = 0\n",
        disk_bytes: Some(32 << 20),
        ..Setup::default()
    };
    rootful_with(setup, |daemon| {
        let pod = daemon.pod("full")?;
        let script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done";
        let (seen, unseen) = (pod.start(shell("seen", script))?, pod.start(shell("unseen", script))?);
        seen.says("ready")?;
        unseen.says("ready")?;
        fill(daemon)?;
        seen.stop(20)?;
        ends_with_seven(&seen)?;
        let pid = unseen.pid()?;
        daemon.kill()?;
        kill(Pid::from_raw(pid), SIGTERM)?;
        within(SOON, "it ends", || Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(())))?;
        daemon.start_again()?;
        ends_with_seven(&unseen)?;
        ends_with_seven(&seen)
    })
}
