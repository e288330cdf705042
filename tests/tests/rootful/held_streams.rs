//! Streams whose locks a container holds: a process with the other end waits in the kernel and
//! cannot be killed. That may be the container's own shim, and never the daemon.

use std::process::{Child, Command as Program, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::census::waiting_in_kernel;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::fuse::Hanging;
use berth_tests::pod::{Container, idle, volume, words};
use berth_tests::skip::skip;
use berth_tests::streams::Command;

/// Fills its output and, beside that, has the kernel copy a file to it: for that the pipe is locked
/// until the file is read.
const HOLD_A_PIPE: &str = "yes & cat /volume/file";

/// Asks a terminal for its size, to be written to a page of a file: the size is locked until that
/// is read.
const HOLD_A_TERMINAL: &str = "
import fcntl, mmap, os, sys, termios
page = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
terminal = os.open(sys.argv[2], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
fcntl.ioctl(terminal, termios.TIOCGWINSZ, page, True)
";

/// A process outside the container's namespaces, but in its cgroup, that holds the size of its
/// terminal: as one inside could that has more than a shell.
fn hold_terminal(daemon: &Daemon, container: &Container, file: &str) -> Result<Child> {
    let listed = daemon.cgroup().read("memory", &container.id, "cgroup.procs")?;
    let terminal = listed
        .lines()
        .filter_map(|pid| std::fs::read_link(format!("/proc/{pid}/fd/0")).ok().map(|link| (pid, link)))
        .find_map(|(pid, link)| link.starts_with("/dev/pts").then(|| format!("/proc/{pid}/fd/0")))
        .context("a process with a terminal")?;
    let join: String = daemon
        .cgroup()
        .below(&container.id)
        .iter()
        .map(|directory| format!("echo $$ >'{}/cgroup.procs'; ", directory.display()))
        .collect();
    let script = format!("{join} exec python3 -c \"$1\" '{file}' '{terminal}'");
    Ok(Program::new("sh").args(["-c", &script, "sh", HOLD_A_TERMINAL]).stdin(Stdio::null()).spawn()?)
}

/// That the daemon does what it should at once, for others and for itself.
fn answers(other: &Container, held: &[Container]) -> Result<()> {
    let begin = Instant::now();
    for container in held {
        ensure!(container.status()?.state() == v1::ContainerState::ContainerRunning);
    }
    for _ in 0..10 {
        ensure!(other.sh("echo alive")? == "alive\n");
    }
    ensure!(begin.elapsed() < patience(Duration::from_secs(5)), "{:?}", begin.elapsed());
    Ok(())
}

#[test]
fn streams_that_containers_hold_keep_no_daemon_from_serving_ending_and_starting() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("hanging")?;
        let Some(hanging) = Hanging::mount_with_files(&directory)? else {
            skip("held_streams::streams_that_containers_hold", "no FUSE here");
            return Ok(());
        };
        if Program::new("python3").arg("--version").output().is_err() {
            skip("held_streams::streams_that_containers_hold", "no python3 here");
            return Ok(());
        }
        let pod = daemon.pod("web")?;
        let other = pod.idle("other")?;
        // More of each kind than the daemon has threads that serve.
        let many = thread::available_parallelism()?.get() + 1;
        let make = |kind: &str| {
            let make = |number| {
                let mut config = idle(&format!("{kind}{number}"));
                config.mounts = vec![volume(&directory, "/volume")];
                Ok(pod.start(config)?)
            };
            (0..many).map(make).collect::<Result<Vec<Container>>>()
        };
        let (sync, piped, terminals) = (make("sync")?, make("piped")?, make("terminal")?);
        let request = |container: &Container, command: &[&str], terminal| v1::ExecRequest {
            container_id: container.id.clone(),
            cmd: words(command),
            tty: terminal,
            stdin: true,
            stdout: true,
            stderr: !terminal,
        };
        let calls: Vec<_> = sync
            .iter()
            .map(|container| {
                let container = container.clone();
                thread::spawn(move || container.exec_within(&["sh", "-c", HOLD_A_PIPE], 0).map(drop))
            })
            .collect();
        // Their clients read, so that the daemon does.
        let mut readers = Vec::new();
        for container in &piped {
            let command = Command::start(daemon, request(container, &["sh", "-c", HOLD_A_PIPE], false))?;
            readers.push(thread::spawn(move || command.finished().map(drop)));
        }
        for container in sync.iter().chain(&piped) {
            within(SOON, "it holds its pipe", || {
                Ok((waiting_in_kernel(daemon, &container.id)? > 0).then_some(()))
            })?;
        }
        let file = directory.join("file").to_string_lossy().into_owned();
        let (mut commands, mut holders) = (Vec::new(), Vec::new());
        for container in &terminals {
            let mut command =
                Command::start(daemon, request(container, &["sh", "-c", "echo up; cat"], true))?;
            command.hear("up")?;
            holders.push(hold_terminal(daemon, container, &file)?);
            within(SOON, "it holds its terminal", || {
                Ok((waiting_in_kernel(daemon, &container.id)? > 0).then_some(()))
            })?;
            command.resize(100, 50)?;
            commands.push(command);
        }
        let held: Vec<Container> = sync.iter().chain(&piped).chain(&terminals).cloned().collect();
        answers(&other, &held)?;
        // Also when its clients give up.
        drop(commands);
        answers(&other, &held)?;

        let begin = Instant::now();
        daemon.crash()?;
        ensure!(begin.elapsed() < patience(Duration::from_secs(10)), "{:?}", begin.elapsed());
        answers(&other, &held)?;
        for thread in calls {
            let _ = thread.join();
        }
        for thread in readers {
            let _ = thread.join();
        }
        thread::scope(|scope| {
            let ends: Vec<_> = held
                .iter()
                .map(|container| {
                    scope.spawn(|| -> Result<()> {
                        container.stop(1)?;
                        Ok(container.remove()?)
                    })
                })
                .collect();
            // A container that has its own file system ends that with itself.
            drop(hanging);
            for end in ends {
                end.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        for mut holder in holders {
            holder.wait()?;
        }
        for container in &held {
            ensure!(daemon.cgroup().below(&container.id).is_empty(), "{}", container.id);
        }
        Ok(())
    })
}
