//! Shims, starts and creations that take long or hang: nothing unknown is invented, and everything
//! that should end does.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_cri::v1::ContainerState::{ContainerExited, ContainerRunning};
use berth_tests::census::{Census, status_field};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::fuse::with_unkillable;
use berth_tests::pod::{Container, idle, shell, volume};
use berth_tests::skip::skip;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SIGCONT, SIGKILL, SIGSTOP, SIGTERM, kill};
use nix::unistd::Pid;
use tonic::Code;

/// Whether it is still running; one that a stopped shim has yet to reap is not.
fn is_alive(pid: i32) -> bool {
    status_field(pid, "State").is_some_and(|state| !state.starts_with('Z'))
}

#[test]
fn a_daemon_serves_before_slow_shims_answer_and_ends_none_of_their_containers() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let good = pod.idle("good")?;
        let slow = (0..8).map(|number| Ok(pod.idle(&format!("c{number}"))?)).collect::<Result<Vec<_>>>()?;
        let pids = slow.iter().map(Container::pid).collect::<Result<Vec<_>>>()?;
        let shims = slow.iter().map(Container::shim_pid).collect::<Result<Vec<_>>>()?;
        let before = slow.iter().map(Container::status).collect::<Result<Vec<_>, _>>()?;
        for shim in &shims {
            kill(Pid::from_raw(*shim), SIGSTOP)?;
        }
        // More often than the queue of a shim's socket has room for.
        for _ in 0..12 {
            let begin = Instant::now();
            daemon.crash()?;
            ensure!(begin.elapsed() < patience(Duration::from_secs(10)), "{:?}", begin.elapsed());
            assert_eq!(good.sh("echo alive")?, "alive\n");
        }
        // Longer than the daemon waits for a shim.
        sleep(Duration::from_secs(12));
        for (container, pid) in slow.iter().zip(&pids) {
            assert_eq!(container.status()?.state(), ContainerRunning);
            ensure!(is_alive(*pid));
        }
        let [stopped, others @ ..] = slow.as_slice() else { anyhow::bail!("containers") };
        let begin = Instant::now();
        stopped.stop(1)?;
        ensure!(begin.elapsed() < patience(Duration::from_secs(40)), "{:?}", begin.elapsed());
        let status = stopped.status()?;
        assert_eq!(
            (status.state(), status.exit_code, status.reason.as_str()),
            (ContainerExited, 255, "Unknown")
        );
        ensure!(!is_alive(pids[0]));
        for shim in &shims[1..] {
            kill(Pid::from_raw(*shim), SIGCONT)?;
        }
        for ((container, pid), before) in others.iter().zip(&pids[1..]).zip(&before[1..]) {
            within(SOON, "its shim is found again", || Ok(container.sh("echo alive").ok()))?;
            assert_eq!(container.pid()?, *pid);
            assert_eq!(&container.status()?, before);
        }
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn a_shim_that_drains_while_the_daemon_starts_tells_the_code_that_it_saw() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        for _ in 0..3 {
            let script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done";
            let main = pod.start(shell("main", script))?;
            // Process 1 does not get a signal that it does not catch yet.
            main.says("ready")?;
            let pid = main.pid()?;
            // A process outside the container holds its output open.
            let held = fs::File::options().write(true).open(format!("/proc/{pid}/fd/1"))?;
            daemon.kill()?;
            kill(Pid::from_raw(pid), SIGTERM)?;
            within(SOON, "its process has ended", || Ok((!is_alive(pid)).then_some(())))?;
            daemon.start_again()?;
            let first = main.status()?;
            ensure!(
                first.state() == ContainerRunning
                    || (first.state() == ContainerExited && first.exit_code == 7),
                "{first:?}"
            );
            let status = main.ended()?.status;
            assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"), "{status:?}");
            ensure!(status.started_at > 0 && status.finished_at >= status.started_at, "{status:?}");
            drop(held);
            main.remove()?;
        }
        Ok(())
    })
}

/// Freezes or thaws the processes of a container.
fn freeze(daemon: &Daemon, container: &Container, frozen: bool) -> Result<()> {
    let (file, word) = match (daemon.cgroup().is_unified(), frozen) {
        (true, true) => ("cgroup.freeze", "1"),
        (true, false) => ("cgroup.freeze", "0"),
        (false, true) => ("freezer.state", "FROZEN"),
        (false, false) => ("freezer.state", "THAWED"),
    };
    let directories = daemon.cgroup().below(&container.id);
    let directory =
        directories.iter().find(|directory| directory.join(file).exists()).context("a freezer")?;
    Ok(fs::write(directory.join(file), word)?)
}

#[test]
fn a_start_without_an_answer_is_made_definite_before_anybody_is_told() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        pod.idle("first")?.remove()?;
        let census = Census::take(daemon)?;
        let main = pod.create(shell("main", "echo it runs; while :; do sleep 1; done"))?;
        let pid = main.pid()?;
        freeze(daemon, &main, true)?;
        std::thread::scope(|scope| -> Result<()> {
            // Another one meanwhile delays nothing.
            let starts = [scope.spawn(|| main.start()), scope.spawn(|| main.start())];
            for start in starts {
                let begin = Instant::now();
                let told = start.join().map_err(|_| anyhow!("the thread panicked"))?;
                let refused = told.err().context("it did not start")?;
                ensure!(
                    begin.elapsed() < patience(Duration::from_secs(40)),
                    "{:?}: {refused}",
                    begin.elapsed()
                );
            }
            Ok(())
        })?;
        ensure!(!is_alive(pid), "the program cannot run any more");
        let status = main.status()?;
        assert_eq!(status.state(), ContainerExited, "{status:?}");
        ensure!(status.exit_code != 0, "{status:?}");
        assert_eq!(main.start().err().context("it is over")?.code(), Code::FailedPrecondition);
        ensure!(main.log()?.is_empty(), "it never ran");
        main.remove()?;
        census.stays(daemon)
    })
}

#[test]
fn a_start_that_hangs_keeps_nobody_from_stopping_and_removing() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        for stop in [true, false] {
            let main = pod.create(idle("main"))?;
            freeze(daemon, &main, true)?;
            std::thread::scope(|scope| -> Result<()> {
                let start = scope.spawn(|| main.start());
                sleep(Duration::from_secs(1));
                let begin = Instant::now();
                if stop {
                    main.stop(0)?;
                    assert_eq!(main.status()?.state(), ContainerExited);
                }
                main.remove()?;
                ensure!(begin.elapsed() < patience(Duration::from_secs(10)), "{:?}", begin.elapsed());
                // Either of the two may come first.
                let _ = start.join().map_err(|_| anyhow!("the thread panicked"))?;
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_second_start_is_refused_at_once_and_blocks_nobody() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("web")?.idle("main")?;
        for _ in 0..2 {
            assert_eq!(main.start().err().context("it runs")?.code(), Code::FailedPrecondition);
            daemon.crash()?;
        }
        let begin = Instant::now();
        main.remove()?;
        ensure!(begin.elapsed() < patience(Duration::from_secs(10)), "{:?}", begin.elapsed());
        Ok(())
    })
}

#[test]
fn a_daemon_that_dies_in_a_start_leaves_no_doubt_behind() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.create(shell("main", "echo it runs; while :; do sleep 1; done"))?;
        freeze(daemon, &main, true)?;
        std::thread::scope(|scope| -> Result<()> {
            let start = scope.spawn(|| main.start());
            sleep(Duration::from_secs(1));
            daemon.kill()?;
            ensure!(start.join().map_err(|_| anyhow!("the thread panicked"))?.is_err());
            Ok(())
        })?;
        daemon.start_again()?;
        // It may start at any moment, and a kubelet must not start another beside it.
        assert_eq!(main.status()?.state(), ContainerRunning);
        freeze(daemon, &main, false)?;
        main.says("it runs")?;
        within(SOON, "its shim is found again", || Ok(main.sh("echo alive").ok()))?;
        assert_eq!(main.status()?.state(), ContainerRunning);
        // The daemon that requested the start did not live to report it.
        let started = || -> Result<usize> {
            let log = daemon.log()?;
            let is_it = |line: &&str| line.contains("container started") && line.contains(&main.id);
            Ok(log.lines().filter(is_it).count())
        };
        within(SOON, "its start is reported", || Ok((started()? == 1).then_some(())))?;
        daemon.crash()?;
        main.sh("echo alive")?;
        assert_eq!(started()?, 1, "it is not reported again");
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn the_cgroup_of_a_removed_container_goes_with_its_last_process_however_late_that_ends() -> Result<()> {
    rootful(|daemon| {
        with_unkillable(daemon, "slow_shims::the_cgroup_of_a_removed_container", |main, hanging| {
            kill(Pid::from_raw(main.pid()?), SIGTERM)?;
            main.ended()?;
            main.remove()?;
            ensure!(!daemon.cgroup().below(&main.id).is_empty(), "it holds a process");
            // It learns now that there will be no answer.
            drop(hanging);
            within(SOON, "the cgroup is removed", || {
                Ok(daemon.cgroup().below(&main.id).is_empty().then_some(()))
            })
        })
    })
}

/// A filesystem that does not answer, like a network filesystem whose server is gone: nothing reads
/// from its descriptor.
struct Hung {
    _device: fs::File,
    path: std::path::PathBuf,
}

impl Hung {
    fn mount(path: &Path) -> Result<Option<Self>> {
        let Ok(device) = fs::File::options().read(true).write(true).open("/dev/fuse") else {
            return Ok(None);
        };
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let mounted = mount(Some("hung"), path, Some("fuse"), MsFlags::empty(), Some(options.as_str()));
        Ok(mounted.is_ok().then(|| Self { _device: device, path: path.to_owned() }))
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_creation_that_hangs_on_a_host_path_keeps_no_pod_from_being_stopped_and_removed() -> Result<()> {
    rootful(|daemon| {
        let census_pod = daemon.pod("first")?;
        census_pod.idle("first")?;
        census_pod.remove()?;
        let census = Census::take(daemon)?;
        let directory = daemon.directory("hung")?;
        let Some(hung) = Hung::mount(&directory)? else {
            skip("slow_shims::hung", "no FUSE here");
            return Ok(());
        };
        let (pod, other) = (daemon.pod("web")?, daemon.pod("other")?);
        let main = pod.idle("main")?;
        std::thread::scope(|scope| -> Result<()> {
            let creation = scope.spawn(|| {
                let mut config = idle("hangs");
                config.mounts = vec![volume(&directory.join("file"), "/volume")];
                pod.create(config)
            });
            sleep(Duration::from_secs(1));
            ensure!(!creation.is_finished(), "it hangs");
            let begin = Instant::now();
            other.remove()?;
            ensure!(begin.elapsed() < patience(Duration::from_secs(5)), "{:?}", begin.elapsed());
            let begin = Instant::now();
            pod.stop()?;
            assert_eq!(main.status()?.state(), ContainerExited);
            pod.remove()?;
            ensure!(begin.elapsed() < patience(Duration::from_secs(20)), "{:?}", begin.elapsed());
            let refused = creation.join().map_err(|_| anyhow!("the thread panicked"))?;
            assert_eq!(refused.err().context("the pod is gone")?.code(), Code::FailedPrecondition);
            Ok(())
        })?;
        // Everything that waits for it gets an error then.
        drop(hung);
        census.stays(daemon)
    })
}

#[test]
fn a_creation_that_its_client_gave_up_holds_its_name_until_it_is_done_or_undone() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("hung")?;
        let Some(hung) = Hung::mount(&directory)? else {
            skip("slow_shims::given_up", "no FUSE here");
            return Ok(());
        };
        let (pod, client) = (daemon.pod("web")?, daemon.client());
        let mut config = idle("main");
        config.mounts = vec![volume(&directory.join("file"), "/volume")];
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        ensure!(client.create_container_or_give_up(request, Duration::from_secs(1))?.is_none(), "it hangs");
        // It continues: another request by the client would be for a second one beside it.
        let again = pod.create(idle("main")).err().context("the name is held")?;
        assert_eq!(again.code(), Code::AlreadyExists, "{again:?}");
        ensure!(client.containers(v1::ContainerFilter::default())?.is_empty(), "half a container is listed");
        // Now it fails, and the name is free.
        drop(hung);
        let main = within(SOON, "the name is free", || Ok(Some(pod.create(idle("main"))?)))?;
        main.start()?;
        Ok(())
    })
}

#[test]
fn a_shim_that_dies_is_told_apart_from_one_that_only_lost_its_connection() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let (main, other) = (pod.idle("main")?, pod.idle("other")?);
        // Only the connection to the shim is gone.
        daemon.kill()?;
        fs::remove_file(daemon.state().join("containers").join(&main.id).join("shim.sock"))?;
        daemon.start_again()?;
        assert_eq!(main.status()?.state(), ContainerRunning);
        ensure!(is_alive(main.pid()?));
        main.stop(0)?;
        assert_eq!((main.status()?.state(), main.status()?.exit_code), (ContainerExited, 137));
        kill(Pid::from_raw(other.shim_pid()?), SIGKILL)?;
        let status = other.ended()?.status;
        assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"), "{status:?}");
        pod.remove()?;
        Ok(())
    })
}
