//! `NamespaceMode.TARGET`: a container that joins the pid namespace of another one, and only that
//! one.

use std::fs::{self, OpenOptions};
use std::process::{Child, Command};

use anyhow::{Context as _, Result, bail, ensure};
use berth_cri::v1;
use berth_tests::daemon::{SOON, own_namespaces, rootful};
use berth_tests::deadline::within;
use berth_tests::pod::{Container, idle, security};
use berth_tests::skip::skip;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

fn debugger(name: &str, target: &Container) -> v1::ContainerConfig {
    let mut config = idle(name);
    security(&mut config).namespace_options = Some(v1::NamespaceOption {
        pid: v1::NamespaceMode::Target.into(),
        target_id: target.id.clone(),
        ..own_namespaces()
    });
    config
}

/// Starts a process of the host whose number is `pid`.
fn decoy(pid: i32) -> Result<Child> {
    for _ in 0..200 {
        // proc_sys_kernel(5): the number after this one is tried first.
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string())?;
        let mut child = Command::new("sleep").arg("60").spawn()?;
        if child.id() == pid.unsigned_abs() {
            return Ok(child);
        }
        child.kill()?;
        child.wait()?;
    }
    bail!("no process got the number {pid}")
}

#[test]
fn a_target_whose_number_another_process_has_is_not_joined() -> Result<()> {
    if !fs::exists("/proc/sys/kernel/ns_last_pid")? {
        skip(
            "a_target_whose_number_another_process_has_is_not_joined",
            "this kernel lets nobody choose the number of a process",
        );
        return Ok(());
    }
    rootful(|daemon| {
        let pod = daemon.pod("debugged")?;
        let target = pod.idle("target")?;
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid"));
        let there = pod.start(debugger("there", &target))?;
        assert_eq!(namespace(there.pid()?)?, namespace(target.pid()?)?, "a target that runs is joined");
        there.remove()?;

        let pid = target.pid()?;
        // The shim waits for the end of its output, and the daemon has not been told of the end by
        // then.
        let _output = OpenOptions::new().write(true).open(format!("/proc/{pid}/fd/1"))?;
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        within(SOON, "the target is reaped", || Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(())))?;
        let mut decoy = decoy(pid).context("taking the target's number")?;
        let running = target.status()?.state() == v1::ContainerState::ContainerRunning;
        let outcome = pod.create(debugger("debugger", &target));
        decoy.kill()?;
        decoy.wait()?;
        ensure!(running, "the daemon knew of the end already: nothing was tried");
        match outcome {
            Err(refused) => {
                assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
                ensure!(refused.message().contains(&target.id), "{refused}");
            }
            Ok(made) => bail!("it is in the namespace of another process: {:?}", namespace(made.pid()?)?),
        }
        Ok(())
    })
}
