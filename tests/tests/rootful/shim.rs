//! The shim: its cost, and the resources it holds.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::census::{Census, status_field};
use berth_tests::daemon::{SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::fuse::Hanging;
use berth_tests::skip::skip;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SIGCONT, SIGKILL, SIGSTOP, kill};
use nix::unistd::Pid;
use tonic::{Code, Status};

/// The most private memory that a shim may have, in KiB: the budget of a pod of one container, of
/// which the program takes a part.
const MOST_PSS_KIB: u64 = 512;

fn gone(shim: i32) -> Result<()> {
    within(SOON, "the shim ends", || Ok((!Path::new(&format!("/proc/{shim}")).exists()).then_some(())))
}

#[test]
fn a_shim_is_one_small_thread() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let shims =
            (0..5).map(|number| pod.idle(&format!("c{number}"))?.shim_pid()).collect::<Result<Vec<i32>>>()?;
        for shim in shims {
            assert_eq!(status_field(shim, "Threads").as_deref(), Some("1"));
            let rollup = fs::read_to_string(format!("/proc/{shim}/smaps_rollup")).context("its memory")?;
            let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("Pss")?;
            let pss: u64 = pss.trim().trim_end_matches(" kB").parse()?;
            assert!(pss <= MOST_PSS_KIB, "{pss} KiB");
            let name = status_field(shim, "Name").context("its name")?;
            assert!(name.contains("berth-shim"), "{name}");
            let environment = fs::read(format!("/proc/{shim}/environ"))?;
            assert!(environment.is_empty(), "nothing of the daemon's environment");
        }
        Ok(())
    })
}

#[test]
fn a_shim_holds_its_own_container_only_and_ends_with_it() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let (main, other) = (pod.idle("main")?, pod.idle("other")?);
        let shim = main.shim_pid()?;
        let held: Vec<String> = fs::read_dir(format!("/proc/{shim}/fd"))?
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|target| target.to_string_lossy().into_owned())
            .collect();
        assert!(!held.iter().any(|target| target.contains(&other.id)), "{held:?}");
        assert!(!held.iter().any(|target| target.ends_with("other.log")), "{held:?}");
        main.stop(0)?;
        gone(shim)?;
        let left = daemon.state().join("containers").join(&main.id).join("shim.sock");
        main.remove()?;
        assert!(!left.exists(), "no socket is left");
        Ok(())
    })
}

/// The code of a call that has to fail, and within this time.
fn refused_within<T>(limit: Duration, call: impl FnOnce() -> Result<T, Status>) -> Result<Code> {
    let begin = Instant::now();
    let refused = call().err().context("it is refused")?;
    assert!(begin.elapsed() < patience(limit), "{:?}: {refused}", begin.elapsed());
    Ok(refused.code())
}

#[test]
fn a_shim_that_hangs_hurts_its_own_container_only_and_that_can_be_ended() -> Result<()> {
    rootful(|daemon| {
        let (pod, client) = (daemon.pod("web")?, daemon.client());
        let other = pod.idle("other")?;
        pod.idle("first")?.remove()?;
        let census = Census::take(daemon)?;
        let main = pod.idle("main")?;
        let shim = main.shim_pid()?;
        kill(Pid::from_raw(shim), SIGSTOP)?;
        thread::scope(|scope| -> Result<()> {
            let reopen = v1::ReopenContainerLogRequest { container_id: main.id.clone() };
            let client = &client;
            let endless =
                scope.spawn(|| refused_within(Duration::from_secs(40), || main.exec_within(&["true"], 0)));
            let reopen = scope
                .spawn(|| refused_within(Duration::from_secs(20), || client.reopen_container_log(reopen)));
            let begin = Instant::now();
            assert_eq!(other.sh("echo alive")?, "alive\n");
            assert_eq!(client.containers(v1::ContainerFilter::default())?.len(), 2);
            assert_eq!(client.list_container_stats(v1::ListContainerStatsRequest::default())?.stats.len(), 2);
            assert_eq!(main.status()?.state(), v1::ContainerState::ContainerRunning);
            assert!(begin.elapsed() < patience(Duration::from_secs(5)), "{:?}", begin.elapsed());
            let short = refused_within(Duration::from_secs(6), || main.exec_within(&["true"], 1))?;
            assert_eq!(short, Code::DeadlineExceeded);
            for thread in [endless, reopen] {
                let code = thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
                assert_eq!(code, Code::DeadlineExceeded);
            }
            Ok(())
        })?;
        let begin = Instant::now();
        main.stop(1)?;
        assert!(begin.elapsed() < patience(Duration::from_secs(20)), "{:?}", begin.elapsed());
        let status = main.ended()?.status;
        assert_eq!((status.exit_code, status.reason.as_str()), (255, "Unknown"), "{status:?}");
        gone(shim)?;
        main.remove()?;
        census.stays(daemon)
    })
}

#[test]
fn a_container_whose_shim_hangs_before_its_start_can_be_removed() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        pod.idle("first")?.remove()?;
        let census = Census::take(daemon)?;
        let main = pod.create(berth_tests::pod::idle("main"))?;
        let shim = main.shim_pid()?;
        kill(Pid::from_raw(shim), SIGSTOP)?;
        let code = refused_within(Duration::from_secs(20), || main.start())?;
        assert_eq!(code, Code::DeadlineExceeded);
        main.remove()?;
        gone(shim)?;
        census.stays(daemon)
    })
}

#[test]
fn a_shim_that_cannot_even_begin_says_why() -> Result<()> {
    rootful(|daemon| {
        daemon.stop()?;
        for mount in berth_tests::census::mounts_below(&daemon.state()).into_iter().rev() {
            umount2(&mount, MntFlags::MNT_DETACH)?;
        }
        // Room for a few pods, and soon for none.
        let (tmpfs, flags) = (Some("tmpfs"), MsFlags::empty());
        mount(Some("state"), &daemon.state(), tmpfs, flags, Some("size=1m,nr_inodes=60"))?;
        daemon.start_again()?;
        let pod = daemon.pod("web")?;
        // What is opened once for the first container does not count: the connection to systemd.
        pod.idle("first")?.remove()?;
        let census = Census::take(daemon)?;
        let filler = daemon.state().join("filler");
        fs::create_dir(&filler)?;
        // A container needs two directories, and its shim a socket in one: there is only no room
        // for the socket.
        let mut files = 0;
        while fs::write(filler.join(files.to_string()), "").is_ok() {
            files += 1;
        }
        let refused = pod.idle("none").err().context("no room for a directory")?;
        assert!(refused.message().contains("No space left"), "{refused}");
        for file in 0..2 {
            fs::remove_file(filler.join(file.to_string()))?;
        }
        let refused = pod.idle("socket").err().context("no room for a socket")?;
        let words = "start the container's shim: shim.sock: no space left";
        assert!(refused.message().contains(words), "{refused}");
        assert!(daemon.client().containers(v1::ContainerFilter::default())?.is_empty());
        fs::remove_dir_all(&filler)?;
        census.stays(daemon)?;
        assert_eq!(pod.script("echo again", |_| {})?, "again\n");
        Ok(())
    })
}

/// An abandoned request is withdrawn if the shim has not read it yet.
#[test]
fn execs_of_a_shim_that_hangs_do_not_pile_up_in_the_daemon() -> Result<()> {
    const AT_A_TIME: usize = 40;
    const EACH: usize = 12;
    rootful(|daemon| {
        let main = daemon.pod("hangs")?.idle("main")?;
        let open = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", daemon.pid()?))?.count()) };
        ensure!(main.exec(&["true"])?.code == 0);
        let before = open()?;
        let shim = Pid::from_raw(main.shim_pid()?);
        kill(shim, SIGSTOP)?;
        thread::scope(|scope| {
            for _ in 0..AT_A_TIME {
                scope.spawn(|| {
                    for _ in 0..EACH {
                        let _ = main.exec_within(&["true"], 1);
                    }
                });
            }
        });
        let held =
            within(
                SOON,
                "the descriptors are closed",
                || Ok(Some(open()?).filter(|now| *now <= before + 20)),
            );
        kill(shim, SIGCONT)?;
        held?;
        within(SOON, "an exec works", || Ok(main.exec_within(&["true"], 20).ok()))?;
        Ok(())
    })
}

#[test]
fn a_command_whose_shim_is_killed_is_not_said_to_have_lost_its_container() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        for streamed in [false, true] {
            let main = pod.idle(&format!("main-{streamed}"))?;
            let shim = Pid::from_raw(main.shim_pid()?);
            let command = ["sh", "-c", "echo begun > /tmp/begun; exec sleep 1000"];
            let said = thread::scope(|scope| -> Result<String> {
                let running = scope.spawn(|| -> Result<String> {
                    if streamed {
                        let request = v1::ExecRequest {
                            container_id: main.id.clone(),
                            cmd: berth_tests::pod::words(&command),
                            stdout: true,
                            ..v1::ExecRequest::default()
                        };
                        let finished = berth_tests::streams::Command::start(daemon, request)?.finished()?;
                        return Ok(finished.status.to_string());
                    }
                    let refused = main.exec_within(&command, 0).err().context("it cannot be answered")?;
                    ensure!(refused.code() == Code::Unknown, "{refused}");
                    Ok(refused.message().to_owned())
                });
                within(SOON, "it runs", || Ok(main.sh("cat /tmp/begun").ok()))?;
                kill(shim, SIGKILL)?;
                running.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
            })?;
            ensure!(said.contains("the shim of container") && said.contains("was killed"), "{said}");
            // And an attached client of a container that ends gets an error.
            let main = pod.idle(&format!("ends-{streamed}"))?;
            thread::scope(|scope| -> Result<()> {
                let running = scope.spawn(|| main.exec_within(&command, 0));
                within(SOON, "it runs", || Ok(main.sh("cat /tmp/begun").ok()))?;
                main.stop(0)?;
                let ended = running.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
                ensure!(ended.is_ok_and(|ended| ended.code == 137), "by its container's end");
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// Checks that a process on its way has its three streams, two pipes to the shim, perhaps the pidfd
/// of its container's main process, with AppArmor the procfs file by which it confines itself, and
/// nothing else of the shim's.
fn holds_its_own_only(pid: i32) -> Result<()> {
    let mut others = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let is_stream = path.file_name().is_some_and(|name| ["0", "1", "2"].iter().any(|own| name == *own));
        if !is_stream {
            others.push(fs::read_link(path)?.to_string_lossy().into_owned());
        }
    }
    let count = |kind: &str| others.iter().filter(|link| link.starts_with(kind)).count();
    let (pipes, pidfds) = (count("pipe:"), count("anon_inode:[pidfd]") + count("pidfd:"));
    let confining = |link: &&String| *link == "/proc" || link.ends_with("/attr/apparmor/exec");
    let confining = others.iter().filter(confining).count();
    let expected = pipes == 2 && pidfds <= 1 && confining <= 1;
    ensure!(expected && others.len() == pipes + pidfds + confining, "{others:?}");
    Ok(())
}

#[test]
fn a_process_that_waits_for_its_start_has_nothing_of_its_shim() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let mut config = berth_tests::pod::idle("terminal");
        (config.tty, config.stdin) = (true, true);
        for config in [berth_tests::pod::idle("main"), config] {
            let main = pod.create(config)?;
            let pid = main.pid()?;
            // The answer may come while it still closes what it made its terminal with.
            within(SOON, "it has nothing but its own", || holds_its_own_only(pid).map(Some))?;
        }
        Ok(())
    })
}

#[test]
fn execs_that_hang_in_a_working_directory_neither_wake_a_shim_for_ever_nor_stay_open_in_it() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("volume")?;
        // What is mounted there later appears in the container.
        for (kind, flags) in [(Some("tmpfs"), MsFlags::empty()), (None, MsFlags::MS_SHARED)] {
            mount(kind, &directory, kind, flags, None::<&str>)?;
        }
        let mut config = berth_tests::pod::idle("main");
        config.working_dir = "/volume".to_owned();
        let mut volume = berth_tests::pod::volume(&directory, "/volume");
        volume.set_propagation(v1::MountPropagation::PropagationHostToContainer);
        config.mounts = vec![volume];
        let pod = daemon.pod("web")?;
        let main = pod.start(config)?;
        main.sh("true")?;
        let shim = main.shim_pid()?;
        let open = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{shim}/fd"))?.count()) };
        let before = open()?;
        let Some(hanging) = Hanging::mount(&directory)? else {
            skip("shim::execs_that_hang", "no FUSE here");
            return Ok(());
        };
        thread::scope(|scope| -> Result<()> {
            let execs: Vec<_> = (0..8).map(|_| scope.spawn(|| main.exec_within(&["true"], 1))).collect();
            within(SOON, "one waits and cannot be killed", || {
                let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"))?;
                let mut states =
                    children.split_whitespace().filter_map(|pid| status_field(pid.parse().ok()?, "State"));
                Ok(states.any(|state| state.starts_with('D')).then_some(()))
            })?;
            let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"))?;
            let hang = |pid: &i32| status_field(*pid, "State").is_some_and(|state| state.starts_with('D'));
            for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(hang) {
                holds_its_own_only(pid)?;
            }
            for exec in execs {
                let refused = exec.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
                ensure!(refused.err().context("it hangs")?.code() == Code::DeadlineExceeded);
            }
            Ok(())
        })?;
        within(SOON, "what they had open in the shim is closed", || Ok((open()? <= before).then_some(())))?;
        within(SOON, "the shim sleeps", || {
            let sleeps = || status_field(shim, "State").is_some_and(|state| state.starts_with('S'));
            Ok((0..1000).all(|_| sleeps()).then_some(()))
        })?;
        // It does everything else.
        main.stop(0)?;
        assert_eq!(main.status()?.exit_code, 137);
        drop(hanging);
        gone(shim)?;
        Ok(main.remove()?)
    })
}
