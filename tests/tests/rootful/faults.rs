//! Faults of the daemon, its shims and the machine: kills at every moment of a pod's creation, no
//! place to write logs, reused process ids, processes that hide, no descriptors left. Afterwards:
//! reports are true, requests can be repeated, and nothing is left.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_cri::v1::ContainerState::{ContainerCreated, ContainerExited, ContainerRunning};
use berth_tests::census::{Census, mounts_below};
use berth_tests::cri::Client;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::log;
use berth_tests::pod::{Container, idle, security, shell, volume, words};
use berth_tests::repeats::repeats;
use berth_tests::skip::skip;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SIGKILL, kill};
use nix::unistd::Pid;

/// How soon a daemon answers after its start, and again after an interrupted request, on a machine
/// that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(10);

fn is_alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn start_anew(daemon: &Daemon) -> Result<()> {
    let begun = Instant::now();
    daemon.start_again()?;
    daemon.client().status(v1::StatusRequest::default())?;
    let taken = begun.elapsed();
    ensure!(taken < patience(AT_ONCE), "it took {taken:?} to answer");
    Ok(())
}

/// Every listed object has a status that agrees.
fn what_is_told_is_true(client: &Client) -> Result<()> {
    for sandbox in client.sandboxes(v1::PodSandboxFilter::default())? {
        client.sandbox(&sandbox.id)?;
    }
    for container in client.containers(v1::ContainerFilter::default())? {
        let request = v1::ContainerStatusRequest { container_id: container.id.clone(), verbose: true };
        let answer = client.container_status(request)?;
        let state = answer.status.context("a status")?.state();
        let info: serde_json::Value = serde_json::from_str(answer.info.get("info").context("info")?)?;
        let pid = info.pointer("/pid").and_then(serde_json::Value::as_i64).unwrap_or_default();
        if state == ContainerRunning {
            ensure!(is_alive(i32::try_from(pid)?), "{} runs as {pid}, which is not there", container.id);
        }
    }
    Ok(())
}

/// What a kubelet does after an interruption: it lists the objects, requests the missing ones
/// again, and continues.
fn go_on_with_the_pod(daemon: &Daemon) -> Result<()> {
    let client = daemon.client();
    let config = daemon.pod_config("swept");
    let found = client.sandboxes(v1::PodSandboxFilter::default())?;
    let found = found
        .into_iter()
        .find(|sandbox| sandbox.metadata.as_ref().is_some_and(|named| named.name == "swept"));
    let sandbox = match found {
        Some(sandbox) => sandbox.id,
        None => daemon.pod_of(config.clone()).context("the pod can be asked for again")?.id,
    };
    let filter = v1::ContainerFilter { pod_sandbox_id: sandbox.clone(), ..Default::default() };
    let (container, state) = match client.containers(filter)?.into_iter().next() {
        Some(container) => (container.id.clone(), container.state()),
        None => {
            let request = v1::CreateContainerRequest {
                pod_sandbox_id: sandbox.clone(),
                config: Some(idle("main")),
                sandbox_config: Some(config),
            };
            let answer = client.create_container(request).context("the container can be asked for again")?;
            (answer.container_id, ContainerCreated)
        }
    };
    if state == ContainerCreated {
        client.start_container(v1::StartContainerRequest { container_id: container.clone() })?;
    }
    let answer = client.exec_sync(v1::ExecSyncRequest {
        container_id: container,
        cmd: words(&["true"]),
        timeout: 20,
    })?;
    ensure!(answer.exit_code == 0, "{answer:?}");
    Ok(client.remove_sandbox(&sandbox)?)
}

#[test]
fn a_daemon_killed_at_any_moment_of_a_pods_making_leaves_nothing_in_the_way() -> Result<()> {
    const TURNS: usize = 60;
    let turns = u32::try_from(repeats(TURNS)?)?;
    rootful(|daemon| {
        let make = || -> Result<Duration> {
            let begun = Instant::now();
            daemon.pod("swept")?.idle("main")?;
            Ok(begun.elapsed())
        };
        // The first one is slower than the following ones: its image has not been mounted before.
        // Each one that is not interrupted gives a better estimate of the duration.
        let mut whole = make()?;
        go_on_with_the_pod(daemon)?;
        daemon.crash()?;
        let census = Census::take(daemon)?.without_the_daemon();
        let bystander = daemon.pod("bystander")?;
        let beat =
            bystander.start(shell("beat", "i=0; while :; do i=$((i + 1)); echo $i; sleep 0.01; done"))?;
        let before = (beat.pid()?, beat.shim_pid()?, beat.status()?);
        let mut cut_off = 0;
        for turn in 0..turns {
            // From the first moment to a little after the last.
            let delay = whole * turn / turns * 5 / 4;
            let made = std::thread::scope(|scope| -> Result<Result<Duration>> {
                let making = scope.spawn(make);
                sleep(delay);
                daemon.kill()?;
                making.join().map_err(|_| anyhow!("the thread panicked"))
            })?;
            let what = || format!("killed after {delay:?} of {whole:?}");
            start_anew(daemon).with_context(what)?;
            what_is_told_is_true(&daemon.client()).with_context(what)?;
            let begun = Instant::now();
            go_on_with_the_pod(daemon).with_context(what)?;
            ensure!(
                begun.elapsed() < patience(AT_ONCE),
                "{}: it took {:?} to go on",
                what(),
                begun.elapsed()
            );
            match made {
                Ok(taken) => whole = whole.min(taken),
                Err(_) => cut_off += 1,
            }
        }
        ensure!(cut_off > turns / 4, "only {cut_off} of {turns} pods were cut off in their making");
        assert_eq!((beat.pid()?, beat.shim_pid()?, beat.status()?), before, "who stood by");
        beat.stop(0)?;
        for (index, line) in beat.ended()?.stdout.lines().enumerate() {
            assert_eq!(line.parse::<usize>().ok(), Some(index + 1), "no line is missing");
        }
        bystander.remove()?;
        census.stays(daemon)
    })
}

#[test]
fn thirty_pods_of_which_twenty_end_in_all_ways_while_the_daemon_is_away() -> Result<()> {
    rootful(|daemon| {
        let shared = daemon.directory("shared")?;
        let mut containers = Vec::new();
        for number in 0..30_i32 {
            let mut config = shell(
                "main",
                &format!("while [ ! -e /shared/go-{number} ]; do sleep 0.1; done; echo said; exit {number}"),
            );
            config.mounts = vec![volume(&shared, "/shared")];
            let main = daemon.pod(&format!("pod-{number}"))?.start(config)?;
            containers.push((number, main.pid()?, main.shim_pid()?, main));
        }
        daemon.kill()?;
        for (number, pid, shim, _) in &containers {
            match number {
                0..10 => fs::write(shared.join(format!("go-{number}")), "")?,
                10..15 => kill(Pid::from_raw(*pid), SIGKILL)?,
                15..20 => kill(Pid::from_raw(*shim), SIGKILL)?,
                _ => {}
            }
        }
        within(SOON, "those that end have ended", || {
            let gone = containers.iter().filter(|(number, pid, ..)| *number < 15 && !is_alive(*pid)).count();
            Ok((gone == 15).then_some(()))
        })?;
        start_anew(daemon)?;
        let mut seen = BTreeMap::new();
        for (number, pid, shim, main) in &containers {
            let status = match number {
                15..20 => main.ended()?.status,
                _ => main.status()?,
            };
            let expected = match number {
                0 => (ContainerExited, 0, "Completed"),
                1..10 => (ContainerExited, *number, "Error"),
                10..15 => (ContainerExited, 137, "Error"),
                15..20 => (ContainerExited, 255, "Unknown"),
                _ => (ContainerRunning, 0, ""),
            };
            assert_eq!(
                (status.state(), status.exit_code, status.reason.as_str()),
                expected,
                "{number}: {status:?}"
            );
            if *number >= 20 {
                assert_eq!((main.pid()?, main.shim_pid()?), (*pid, *shim), "{number}");
                assert_eq!(main.sh("echo alive")?, "alive\n");
            } else {
                ensure!(status.finished_at >= status.started_at, "{number}: {status:?}");
                within(SOON, "its process is gone", || Ok((!is_alive(*pid)).then_some(())))?;
            }
            if *number < 10 {
                assert_eq!(main.ended()?.stdout, "said\n", "{number}");
            }
            *seen.entry(status.state).or_insert(0) += 1;
        }
        assert_eq!(seen.into_values().collect::<Vec<_>>(), [10, 20]);
        Ok(())
    })
}

#[test]
fn a_log_that_has_no_room_blocks_nobody_and_says_how_much_it_lost() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("logs/full")?;
        mount(Some("logs"), &directory, Some("tmpfs"), MsFlags::empty(), Some("size=256k"))
            .context("mounting a small disk")?;
        let pod = daemon.pod("full")?;
        let shared = daemon.directory("shared")?;
        let mut config = shell(
            "main",
            "seq 1 300000; seq 1 100000 >&2; touch /shared/done; while [ ! -e /shared/go ]; do sleep 0.05; done; echo after; exit 3",
        );
        config.mounts = vec![volume(&shared, "/shared")];
        let main = pod.start(config)?;
        within(SOON, "the program goes on without a log", || Ok(shared.join("done").exists().then_some(())))?;
        assert_eq!(main.sh("echo alive")?, "alive\n");
        let old = daemon.dir().join("old");
        fs::copy(&main.log_path, &old)?;
        fs::remove_file(&main.log_path)?;
        daemon
            .client()
            .reopen_container_log(v1::ReopenContainerLogRequest { container_id: main.id.clone() })?;
        fs::write(shared.join("go"), "")?;
        let ended = main.ended()?;
        assert_eq!((ended.status.exit_code, ended.stdout.as_str()), (3, "after\n"));
        // The bytes of the entries: those written and those lost.
        let (_, lost) = ended.stderr.split_once("[berth: ").with_context(|| format!("{:?}", ended.stderr))?;
        let lost: u64 = lost.split(' ').next().context("a number")?.parse()?;
        ensure!(lost > 10_000_000, "400,000 entries are more than {lost} bytes");
        // The content begins with the first output; the disk may have cut the last entry short.
        let bytes = fs::read(&old)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').context("an entry")?;
        let entries = log::parse(bytes.get(..=whole).context("entries")?)?;
        for (index, line) in log::text(&entries, "stdout").lines().enumerate() {
            assert_eq!(line.parse::<usize>().ok(), Some(index + 1));
        }
        ensure!(mounts_below(&directory).len() == 1);
        Ok(())
    })
}

/// A process with exactly this number, as the kernel reuses it some time after its owner has ended:
/// proc(5), `/proc/sys/kernel/ns_last_pid`.
fn decoy(pid: i32) -> Option<Child> {
    for _ in 0..100 {
        fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).ok()?;
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().ok()?;
        if i32::try_from(child.id()).ok()? == pid {
            return Some(child);
        }
        child.kill().ok()?;
        child.wait().ok()?;
    }
    None
}

#[test]
fn processes_that_got_the_numbers_of_a_container_and_its_shim_are_left_alone() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("decoys")?;
        let main = pod.idle("main")?;
        let (pid, shim) = (main.pid()?, main.shim_pid()?);
        daemon.kill()?;
        // Without an exit record, and without a cgroup: the machine was restarted.
        kill(Pid::from_raw(shim), SIGKILL)?;
        kill(Pid::from_raw(pid), SIGKILL)?;
        daemon.cgroup().end_everything();
        within(SOON, "both are gone", || Ok((!is_alive(pid) && !is_alive(shim)).then_some(())))?;
        let (Some(mut first), Some(mut second)) = (decoy(pid), decoy(shim)) else {
            skip("faults::decoys", "this kernel does not let a test choose a process id");
            return Ok(());
        };
        let checked = (|| -> Result<()> {
            daemon.start_again()?;
            let status = main.ended()?.status;
            assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"), "{status:?}");
            main.stop(1)?;
            ensure!(main.exec(&["true"]).is_err(), "nothing runs in it");
            main.remove()?;
            pod.stop()?;
            pod.remove()?;
            daemon.crash()?;
            ensure!(first.try_wait()?.is_none() && second.try_wait()?.is_none(), "a decoy was signalled");
            Ok(())
        })();
        for decoy in [&mut first, &mut second] {
            let _ = decoy.kill();
            let _ = decoy.wait();
        }
        checked
    })
}

#[test]
fn processes_that_hide_in_cgroups_of_their_own_or_behind_a_parent_that_left_are_ended() -> Result<()> {
    const GRACE: i64 = 1;
    rootful(|daemon| {
        let mut config = daemon.pod_config("hides");
        let linux = config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        context.privileged = true;
        context.namespace_options = Some(v1::NamespaceOption::default());
        let pod = daemon.pod_of(config)?;
        let trusted = |mut config: v1::ContainerConfig| {
            security(&mut config).privileged = true;
            security(&mut config).namespace_options = Some(v1::NamespaceOption::default());
            config
        };
        let ends = |main: &Container| -> Result<()> {
            let begun = Instant::now();
            main.stop(GRACE)?;
            ensure!(
                begun.elapsed() < patience(Duration::from_secs(6)),
                "the stop took {:?}",
                begun.elapsed()
            );
            within(SOON, "its cgroup is gone", || {
                Ok(daemon.cgroup().below(&main.id).is_empty().then_some(()))
            })
        };
        // In cgroups below its own, one of them frozen by the container itself. On version 2 a
        // privileged one sees all of the host's.
        let hide = "set -- /sys/fs/cgroup/*; \
            [ ! -e /sys/fs/cgroup/cgroup.controllers ] || set -- /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup); \
            for c; do [ -e $c/cgroup.procs ] || continue; \
            mkdir -p $c/deep/deeper && { setsid sleep 1000 & } && echo $! > $c/deep/deeper/cgroup.procs; \
            for f in freezer.state cgroup.freeze; do [ -e $c/deep/$f ] || continue; \
            case $f in freezer.state) echo FROZEN;; *) echo 1;; esac > $c/deep/$f; echo frozen; done; done 2>/dev/null; \
            trap '' TERM; echo hidden; while :; do sleep 1; done";
        for pid in [v1::NamespaceMode::Pod, v1::NamespaceMode::Container] {
            let mut config = trusted(shell("cgroups", hide));
            security(&mut config).namespace_options =
                Some(v1::NamespaceOption { pid: pid.into(), ..Default::default() });
            let main = pod.start(config)?;
            let said = main.says("hidden")?;
            ensure!(said.contains("frozen"), "nothing was frozen: {said}");
            ends(&main)?;
            main.remove()?;
        }
        // The parent ends; in the pod's pid namespace that ends none of them.
        let leave = "for i in 1 2 3 4 5; do (setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' > /dev/null 2>&1 &); done; echo left";
        let main = pod.start(trusted(shell("daemons", leave)))?;
        assert_eq!(main.ended()?.stdout, "left\n");
        within(SOON, "its cgroup is gone", || Ok(daemon.cgroup().below(&main.id).is_empty().then_some(())))?;
        // It creates new ones faster than they can be counted.
        let bomb = "trap '' TERM; echo begins; i=0; while [ $i -lt 60 ]; do i=$((i + 1)); \
            (setsid sh -c 'while :; do (sleep 0.05 &); sleep 0.02; done' &); done; while :; do sleep 1; done";
        let main = pod.start(trusted(shell("bomb", bomb)))?;
        main.says("begins")?;
        ends(&main)?;
        pod.remove()?;
        Ok(())
    })
}

/// Seconds of processor time that a process has used: proc(5), `stat`, in ticks of a hundredth.
fn processor_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("a stat line")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / 100.0)
}

#[test]
fn a_daemon_without_descriptors_waits_and_goes_on_when_it_has_some_again() -> Result<()> {
    const MORE: usize = 20;
    const CONNECTIONS: usize = 300;
    rootful(|daemon| {
        let shared = daemon.directory("shared")?;
        let mut config = shell("main", "while [ ! -e /shared/go ]; do sleep 0.05; done; exit 7");
        config.mounts = vec![volume(&shared, "/shared")];
        let main = daemon.pod("few")?.start(config)?;
        let pid = daemon.pid()?;
        let held = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        // Only the soft one, which a process may raise again.
        let limit = format!("--nofile={}:", held + MORE);
        daemon.host().run("prlimit", &["--pid", &pid.to_string(), &limit])?;
        // Connections that are no longer accepted wait in the socket's queue, and then in
        // connect(2): not on this thread.
        let socket = daemon.socket();
        let connecting: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let socket = socket.clone();
                std::thread::spawn(move || UnixStream::connect(socket))
            })
            .collect();
        within(SOON, "all descriptors are taken", || {
            Ok((fs::read_dir(format!("/proc/{pid}/fd"))?.count() + 2 >= held + MORE).then_some(()))
        })?;
        fs::write(shared.join("go"), "")?;
        let begun = processor_seconds(pid)?;
        sleep(Duration::from_secs(2));
        let used = processor_seconds(pid)? - begun;
        ensure!(used < 1.0, "it took {used} seconds of two to wait");
        assert_eq!(daemon.pid()?, pid);
        ensure!(is_alive(i32::try_from(pid)?), "it ended: {}", daemon.last_words());
        // Each is released as soon as it exists.
        daemon.host().run("prlimit", &["--pid", &pid.to_string(), "--nofile=4096:"])?;
        for connection in connecting {
            drop(connection.join().map_err(|_| anyhow!("the thread panicked"))?);
        }
        let client = Client::new(&daemon.socket())?;
        within(SOON, "a new client is served", || {
            client.version(v1::VersionRequest::default())?;
            Ok(Some(()))
        })?;
        assert_eq!(main.ended()?.status.exit_code, 7, "the end is not lost");
        daemon.pod("next")?.idle("main")?;
        Ok(())
    })
}
