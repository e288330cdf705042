//! The daemon dies at any moment, and so may shims: running containers continue, ends are reported
//! correctly, and half-created objects are removed.

use std::ffi::OsStr;
use std::fs;

use anyhow::{Context as _, Result};
use berth_cri::v1;
use berth_tests::census::Census;
use berth_tests::daemon::{SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::pod::{idle, limit, sharing_pod, shell, volume};
use nix::sys::signal::{SIGKILL, kill};
use nix::unistd::Pid;

#[test]
fn what_runs_goes_on_with_the_same_process_and_no_line_of_its_log_is_lost() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.start(shell("main", "i=0; while true; do i=$((i + 1)); echo $i; sleep 0.01; done"))?;
        let (pid, shim) = (main.pid()?, main.shim_pid()?);
        let before = main.status()?;
        for _ in 0..3 {
            daemon.kill()?;
            let length = fs::metadata(&main.log_path)?.len();
            within(SOON, "the log grows without a daemon", || {
                Ok((fs::metadata(&main.log_path)?.len() > length).then_some(()))
            })?;
            daemon.start_again()?;
            assert_eq!(main.status()?, before);
            assert_eq!((main.pid()?, main.shim_pid()?), (pid, shim));
            assert_eq!(main.sh("echo exec works")?, "exec works\n");
        }
        main.stop(0)?;
        for (index, line) in main.ended()?.stdout.lines().enumerate() {
            assert_eq!(line.parse::<usize>().ok(), Some(index + 1));
        }
        Ok(())
    })
}

#[test]
fn ends_while_the_daemon_is_away_are_told_truly() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let given = daemon.directory("volume")?;
        let waiting = |name: &str, then: &str| {
            let mut config = shell(name, &format!("while [ ! -e /volume/go ]; do sleep 0.05; done; {then}"));
            config.mounts = vec![volume(&given, "/volume")];
            limit(
                &mut config,
                v1::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() },
            );
            pod.start(config)
        };
        let good = waiting("good", "echo good; exit 0")?;
        let bad = waiting("bad", "exit 42")?;
        let hungry = waiting("hungry", "exec tail /dev/zero")?;
        let killed = pod.idle("killed")?;
        let alive = pod.idle("alive")?;
        let pids = [good.pid()?, bad.pid()?, hungry.pid()?, killed.pid()?];
        daemon.kill()?;
        fs::write(given.join("go"), "")?;
        kill(Pid::from_raw(pids[3]), SIGKILL)?;
        within(SOON, "all of them end", || {
            let gone = |pid: &i32| !std::path::Path::new(&format!("/proc/{pid}")).exists();
            Ok(pids.iter().all(gone).then_some(()))
        })?;
        daemon.start_again()?;
        for (container, code, reason) in [
            (&good, 0, "Completed"),
            (&bad, 42, "Error"),
            (&hungry, 137, "OOMKilled"),
            (&killed, 137, "Error"),
        ] {
            let status = container.status()?;
            assert_eq!(status.state(), v1::ContainerState::ContainerExited, "{status:?}");
            assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{status:?}");
            assert!(
                status.started_at >= status.created_at && status.finished_at >= status.started_at,
                "{status:?}"
            );
        }
        assert_eq!(good.ended()?.stdout, "good\n");
        assert_eq!(alive.status()?.state(), v1::ContainerState::ContainerRunning);
        Ok(())
    })
}

#[test]
fn a_created_container_can_be_started_by_the_next_daemon() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("web")?.create(shell("main", "echo begun"))?;
        daemon.crash()?;
        assert_eq!(main.status()?.state(), v1::ContainerState::ContainerCreated);
        main.start()?;
        assert_eq!(main.ended()?.stdout, "begun\n");
        Ok(())
    })
}

#[test]
fn a_container_whose_shim_is_killed_is_ended_and_told_as_that() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.start(shell("main", "sleep 1000 & sleep 1001"))?;
        let other = pod.idle("other")?;
        let pid = main.pid()?;
        kill(Pid::from_raw(main.shim_pid()?), SIGKILL)?;
        let status = main.ended()?.status;
        assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"), "{status:?}");
        assert!(!status.message.is_empty() && status.finished_at >= status.started_at, "{status:?}");
        within(SOON, "its processes are gone", || {
            let gone = !std::path::Path::new(&format!("/proc/{pid}")).exists();
            Ok((gone && daemon.cgroup().below(&main.id).is_empty()).then_some(()))
        })?;
        assert_eq!(other.sh("echo alive")?, "alive\n");
        main.remove()?;
        // The same without a daemon.
        let away = pod.idle("away")?;
        let shim = away.shim_pid()?;
        daemon.kill()?;
        kill(Pid::from_raw(shim), SIGKILL)?;
        daemon.start_again()?;
        let status = away.ended()?.status;
        assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"), "{status:?}");
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn what_a_crash_leaves_half_made_is_gone_after_the_next_start() -> Result<()> {
    rootful(|daemon| {
        daemon.pod("first")?.remove()?;
        daemon.crash()?;
        let census = Census::take(daemon)?.without_the_daemon();
        for round in 0..6_u64 {
            // The daemon dies somewhere in the middle of creating pods and containers, each round
            // at another point.
            std::thread::scope(|scope| -> Result<()> {
                let making = scope.spawn(|| {
                    for number in 0..100 {
                        let Ok(pod) = daemon.pod(&format!("pod-{round}-{number}")) else { return };
                        if pod.idle("main").is_err() {
                            return;
                        }
                    }
                });
                within(SOON, "some pods are there", || {
                    let sandboxes = daemon.client().sandboxes(v1::PodSandboxFilter::default())?;
                    Ok((sandboxes.len() as u64 > round).then_some(()))
                })?;
                daemon.kill()?;
                making.join().map_err(|_| anyhow::anyhow!("the thread panicked"))
            })?;
            daemon.start_again()?;
            let client = daemon.client();
            for sandbox in client.sandboxes(v1::PodSandboxFilter::default())? {
                assert_eq!(client.sandbox(&sandbox.id)?.state(), v1::PodSandboxState::SandboxReady);
            }
            for container in client.containers(v1::ContainerFilter::default())? {
                client.container(&container.id)?;
            }
            for sandbox in client.sandboxes(v1::PodSandboxFilter::default())? {
                client.remove_sandbox(&sandbox.id)?;
            }
            census.stays(daemon).with_context(|| format!("in round {round}"))?;
        }
        Ok(())
    })
}

#[test]
fn the_end_of_a_pods_first_process_is_in_the_log_when_it_comes_and_once() -> Result<()> {
    const TOLD: &str = "sandbox not ready: its first process ended";
    rootful(|daemon| {
        let told = || Ok::<_, anyhow::Error>(daemon.log()?.matches(TOLD).count());
        // One that this daemon created, and one that it found.
        for (restart, earlier) in [(false, 0), (true, 1)] {
            let pod = daemon.pod_of(sharing_pod(daemon.pod_config(&format!("web-{restart}"))))?;
            if restart {
                daemon.kill()?;
                daemon.start_again()?;
            }
            assert_eq!(told()?, earlier);
            kill(Pid::from_raw(pod.first_process()?), SIGKILL)?;
            within(SOON, "it is in the log", || Ok((told()? > earlier).then_some(())))?;
            assert_eq!(pod.status()?.state(), v1::PodSandboxState::SandboxNotready);
            pod.stop()?;
            pod.remove()?;
            assert_eq!(told()?, earlier + 1);
        }
        Ok(())
    })
}

#[test]
fn a_pod_that_lost_its_namespaces_is_not_ready_and_can_be_removed() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.start(idle("main"))?;
        daemon.kill()?;
        // As after a reboot: the runtime state is gone, and so are the processes.
        daemon.cgroup().end_everything();
        within(SOON, "the container has ended", || {
            Ok(berth_tests::census::processes_in_network(daemon.host().number()?).is_empty().then_some(()))
        })?;
        for mount in berth_tests::census::mounts_below(&daemon.state()).into_iter().rev() {
            nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH)?;
        }
        fs::remove_dir_all(daemon.state())?;
        daemon.start_again()?;
        assert_eq!(pod.status()?.state(), v1::PodSandboxState::SandboxNotready);
        assert_eq!(main.status()?.state(), v1::ContainerState::ContainerExited);
        pod.stop()?;
        pod.remove()?;
        daemon.pod("web")?;
        Ok(())
    })
}

#[test]
fn a_second_daemon_is_kept_from_what_the_first_one_has() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        let census = Census::take(daemon)?;
        let own = |name: &str| daemon.dir().join("second").join(name);
        fs::create_dir(daemon.dir().join("second"))?;
        let configuration = format!(
            "[cgroup]\nparent = \"{}\"\n[network]\nbridge = \"btsecond\"\nipv4 = \"10.99.0.0/16\"\nipv6 = \"off\"\n",
            daemon.cgroup().parent()
        );
        fs::write(own("berth.toml"), configuration)?;
        let first = daemon.dir().join("berth.toml");
        let own_file = own("berth.toml");
        for (what, root, state, socket, file) in [
            ("root", daemon.root(), own("state"), own("sock"), &own_file),
            ("state", own("root"), daemon.state(), own("sock"), &own_file),
            ("berth.sock", own("root"), own("state"), daemon.socket(), &own_file),
            ("network.bridge", own("root"), own("state"), own("sock"), &first),
        ] {
            // A daemon that is not refused would run forever.
            let output = daemon
                .host()
                .command("timeout")
                .arg(SOON.as_secs().to_string())
                .arg(berth_tests::daemon::programs()?.join("berthd"))
                .args([OsStr::new("--root"), root.as_os_str(), OsStr::new("--state"), state.as_os_str()])
                .args([OsStr::new("--socket"), socket.as_os_str(), OsStr::new("--config"), file.as_os_str()])
                .arg("--shim")
                .arg(berth_tests::daemon::programs()?.join("berth-shim"))
                .output()?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success(), "{what}: {said}");
            let last = said.lines().last().unwrap_or_default();
            assert!(last.contains(what) && last.contains("another"), "{what}: {said}");
            assert_eq!(main.sh("echo alive")?, "alive\n", "{what}");
            assert_eq!(pod.status()?.state(), v1::PodSandboxState::SandboxReady, "{what}");
        }
        // A daemon with the same parent cgroup starts, gets as far as its socket above, and does
        // not touch what is not its own.
        daemon.host().run("ip", &["link", "delete", "btsecond"])?;
        for mount in berth_tests::census::mounts_below(&own("")).into_iter().rev() {
            nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH)?;
        }
        daemon.host().run("nft", &["flush", "ruleset"])?;
        daemon.crash()?;
        assert_eq!(main.sh("echo alive")?, "alive\n");
        census.without_the_daemon().stays(daemon)
    })
}
