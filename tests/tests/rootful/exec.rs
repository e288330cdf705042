//! ExecSync.

use std::fs;

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_tests::census::status_field;
use berth_tests::cri::Client;
use berth_tests::daemon::{SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::pod::{idle, security, shell, words};
use berth_tests::skip::skip;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SIGCONT, SIGSTOP, kill};
use nix::unistd::Pid;
use tonic::Code;

#[test]
fn both_streams_and_the_code_come_back() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        let output = main.exec(&["sh", "-c", "echo out; echo err >&2; exit 7"])?;
        assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (7, "out\n", "err\n"));
        assert_eq!(main.exec(&["true"])?.code, 0);
        // Process 1 of a namespace is safe from its own signals; others are not.
        assert_eq!(main.exec(&["sh", "-c", "kill -9 $$"])?.code, 137);
        assert_eq!(main.exec(&["cat"])?.stdout, "", "the input is empty");
        assert_eq!(main.exec(&["sh", "-c", "pwd; echo $HOSTNAME $PATH"])?.stdout, "/\nexec /bin\n");
        assert!(main.exec(&["ps"])?.stdout.contains("sleep 1000"), "it is in the container's namespaces");
        Ok(())
    })
}

#[test]
fn environment_directory_and_arguments_are_the_containers() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("exec")?;
        let mut config = idle("main");
        config.working_dir = "/www".to_owned();
        config.envs = vec![v1::KeyValue { key: "WHO".to_owned(), value: b"me".to_vec() }];
        let main = pod.start(config)?;
        let output = main.exec(&["sh", "-c", "pwd; echo $WHO; echo \"$1|$2\"", "name", "a b", ""])?;
        assert_eq!(output.stdout, "/www\nme\na b|\n");
        Ok(())
    })
}

#[test]
fn what_takes_too_long_is_killed_with_all_it_started_and_the_container_lives() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        let late = main.exec_within(&["sh", "-c", "sleep 4321 & sleep 4322"], 1).err().context("too late")?;
        assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
        within(SOON, "nothing of it runs", || {
            Ok((!main.sh("ps -o args")?.contains("sleep 432")).then_some(()))
        })?;
        assert_eq!(main.status()?.state(), v1::ContainerState::ContainerRunning);
        Ok(())
    })
}

/// A program can make its output larger, to a mebibyte or, with `CAP_SYS_RESOURCE`, to more, and
/// leave it full.
#[test]
fn what_is_in_a_large_pipe_when_its_program_ends_comes_back_whole() -> Result<()> {
    let (_read, write) = nix::unistd::pipe()?;
    let allowed =
        [8 << 20, 1 << 20].into_iter().find(|size| fcntl(&write, FcntlArg::F_SETPIPE_SZ(*size)).is_ok());
    let size = allowed.context("no pipe may be so large")?;
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        let (shim, first) = (main.shim_pid()?, main.pid()?);
        let script = format!("kill -STOP $$; head -c {size} /dev/zero | tr '\\0' x");
        let signal = |pid, signal| kill(Pid::from_raw(pid), signal);
        let is = |pid: i32, state| status_field(pid, "State").is_some_and(|now| now.starts_with(state));
        let output = std::thread::scope(|scope| -> Result<_> {
            let exec = scope.spawn(|| main.exec(&["sh", "-c", &script]));
            let program = within(SOON, "it is there", || {
                let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"))?;
                let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
                Ok(pids.find(|pid| *pid != first && is(*pid, 'T')))
            })?;
            // As another process in the container that has it open.
            let pipe = fs::File::options().write(true).open(format!("/proc/{program}/fd/1"))?;
            fcntl(&pipe, FcntlArg::F_SETPIPE_SZ(size))?;
            signal(shim, SIGSTOP)?;
            signal(program, SIGCONT)?;
            let ended = within(SOON, "it has ended", || Ok(is(program, 'Z').then_some(())));
            signal(shim, SIGCONT)?;
            ended?;
            let output = exec.join().map_err(|_| anyhow!("the thread panicked"))??;
            drop(pipe);
            Ok(output)
        })?;
        assert_eq!((output.code, output.stdout.len()), (0, usize::try_from(size)?));
        Ok(())
    })
}

/// As systemd does in a pod: it moves to a cgroup below its own and enables controllers for what is
/// below, after which no process may be in its own (cgroups(7), "no internal processes").
#[test]
fn a_container_that_manages_its_own_cgroups_can_be_entered() -> Result<()> {
    const MANAGE: &str = "
        own=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
        mkdir -p $own/init.scope/deep $own/other && echo $$ >$own/init.scope/cgroup.procs || exit 1
        for controller in $(cat $own/cgroup.controllers); do
            echo +$controller >$own/cgroup.subtree_control || exit 1
        done
        echo enabled: $(cat $own/cgroup.subtree_control)
        trap 'exit 0' TERM; sleep 1000 & wait";
    rootful(|daemon| {
        if !daemon.cgroup().is_unified() {
            skip(
                "exec::a_container_that_manages_its_own_cgroups_can_be_entered",
                "cgroup v1 allows processes in every cgroup",
            );
            return Ok(());
        }
        let mut config = daemon.pod_config("manages");
        config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let pod = daemon.pod_of(config)?;
        let mut config = shell("main", MANAGE);
        security(&mut config).privileged = true;
        let main = pod.start(config)?;
        let said = main.says("enabled:")?;
        ensure!(said.contains("memory"), "no controller that keeps processes out: {said}");
        let place =
            || fs::read_to_string(format!("/proc/{}/cgroup", main.pid()?)).map_err(anyhow::Error::from);
        let with_main = |output: &str| -> Result<()> {
            let (own, main) = (output.trim().rsplit('/').next(), place()?);
            ensure!(own == main.trim().rsplit('/').next(), "{output} and {main}");
            Ok(())
        };
        with_main(&main.sh("grep ^0:: /proc/self/cgroup")?)?;
        ensure!(place()?.trim().ends_with("/init.scope"), "{}", place()?);

        let late = main.exec_within(&["sh", "-c", "sleep 4331 & sleep 4332"], 1).err().context("too late")?;
        ensure!(late.code() == Code::DeadlineExceeded, "{late}");
        within(SOON, "nothing of it runs", || {
            Ok((!main.sh("ps -o args")?.contains("sleep 433")).then_some(()))
        })?;

        // Its main process may move on.
        main.sh("cd /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/1/cgroup)/deep && echo 1 >cgroup.procs")?;
        with_main(&main.sh("grep ^0:: /proc/self/cgroup")?)?;
        ensure!(place()?.trim().ends_with("/init.scope/deep"), "{}", place()?);

        // What is in other cgroups of the container ends with it, and all of them go.
        main.sh("sleep 4333 & cd /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/1/cgroup)/../../other && echo $! >cgroup.procs")?;
        main.stop(10)?;
        main.remove()?;
        ensure!(daemon.cgroup().below(&main.id).is_empty(), "{:?}", daemon.cgroup().below(&main.id));
        pod.remove()?;
        Ok(())
    })
}

#[test]
fn what_nobody_waits_for_any_more_is_killed_with_all_it_started() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        // A caller that gives up, and one whose connection ends; with a limit of the daemon's own
        // and without.
        for (seconds, closes) in [(0, false), (0, true), (600, false), (600, true)] {
            let client = if closes { Client::new(&daemon.socket())? } else { daemon.client() };
            let request = v1::ExecSyncRequest {
                container_id: main.id.clone(),
                cmd: words(&["sh", "-c", "sleep 4321 & sleep 4322"]),
                timeout: seconds,
            };
            let running = client.exec_sync_until(request, || {
                within(SOON, "it runs", || Ok(main.sh("ps -o args")?.contains("sleep 4322").then_some(())))
            })?;
            ensure!(running.is_none(), "it has ended by itself");
            drop(client);
            within(SOON, "nothing of it runs", || {
                Ok((!main.sh("ps -o args")?.contains("sleep 432")).then_some(()))
            })
            .with_context(|| format!("limit {seconds}, connection closed: {closes}"))?;
        }
        assert_eq!(main.status()?.state(), v1::ContainerState::ContainerRunning);
        // As many at once as there are clients.
        let gone: Vec<_> = (0..20)
            .map(|_| {
                let (client, id) = (daemon.client(), main.id.clone());
                std::thread::spawn(move || {
                    let cmd = words(&["sleep", "4323"]);
                    client.exec_sync_until(v1::ExecSyncRequest { container_id: id, cmd, timeout: 0 }, || {
                        std::thread::sleep(std::time::Duration::from_millis(300));
                        Ok(())
                    })
                })
            })
            .collect();
        for caller in gone {
            caller.join().map_err(|_| anyhow!("a caller panicked"))??;
        }
        within(SOON, "none of them runs", || {
            Ok((!main.sh("ps -o args")?.contains("sleep 4323")).then_some(()))
        })?;
        Ok(())
    })
}

#[test]
fn a_child_that_holds_the_output_does_not_hold_the_answer() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        let output = main.exec_within(&["sh", "-c", "echo begun; sleep 1000 &"], 20)?;
        assert_eq!((output.code, output.stdout.as_str()), (0, "begun\n"));
        Ok(())
    })
}

#[test]
fn output_is_cut_to_what_a_kubelet_can_take() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        // A kubelet takes answers of 16 MiB; the rest of the message is small.
        let room = (berth_cri::MAX_MESSAGE_BYTES - 1024)..=berth_cri::MAX_MESSAGE_BYTES;
        for script in [
            "head -c 20000000 /dev/zero; exit 5",
            "head -c 20000000 /dev/zero; head -c 17000000 /dev/zero >&2; exit 5",
        ] {
            let answer = daemon.client().exec_sync(v1::ExecSyncRequest {
                container_id: main.id.clone(),
                cmd: words(&["sh", "-c", script]),
                timeout: 60,
            })?;
            let kept = answer.stdout.len() + answer.stderr.len();
            assert!(room.contains(&kept), "{kept} bytes of {script}");
            assert_eq!((answer.exit_code, answer.stderr.is_empty()), (5, !script.contains("&2")));
        }
        let exact = daemon.client().exec_sync(v1::ExecSyncRequest {
            container_id: main.id.clone(),
            cmd: words(&["sh", "-c", "seq 1 200000"]),
            timeout: 60,
        })?;
        let expected: Vec<u8> =
            (1..=200_000).flat_map(|number: u32| format!("{number}\n").into_bytes()).collect();
        assert!(exact.stdout == expected, "{} bytes", exact.stdout.len());
        Ok(())
    })
}

#[test]
fn a_program_that_is_not_there_is_an_error_that_names_it() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        for (program, code) in
            [("no-such-program", "127"), ("/no/such/program", "127"), ("/etc/passwd", "126")]
        {
            let refused = main.exec(&[program]).err().with_context(|| format!("{program} is refused"))?;
            assert!(refused.message().contains(program) && refused.message().contains(code), "{refused}");
        }
        let empty = main.exec(&[]).err().context("no program is refused")?;
        assert_eq!(empty.code(), Code::InvalidArgument, "{empty}");
        Ok(())
    })
}

#[test]
fn exec_needs_a_container_that_runs() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("exec")?;
        let created = pod.create(idle("created"))?;
        assert_eq!(created.exec(&["true"]).err().map(|status| status.code()), Some(Code::FailedPrecondition));
        let ended = pod.start(shell("ended", "true"))?;
        ended.ended()?;
        assert_eq!(ended.exec(&["true"]).err().map(|status| status.code()), Some(Code::FailedPrecondition));
        ended.remove()?;
        assert_eq!(ended.exec(&["true"]).err().map(|status| status.code()), Some(Code::NotFound));
        Ok(())
    })
}

#[test]
fn the_containers_end_is_the_commands_end() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        let running = main.clone();
        let thread =
            std::thread::spawn(move || running.exec_within(&["sh", "-c", "touch /tmp/on; sleep 1000"], 0));
        within(SOON, "the command runs", || {
            Ok((main.exec(&["test", "-e", "/tmp/on"])?.code == 0).then_some(()))
        })?;
        main.stop(0)?;
        match thread.join().map_err(|_| anyhow!("the thread panicked"))? {
            Ok(output) => assert_eq!(output.code, 137),
            Err(status) => assert_ne!(status.code(), Code::DeadlineExceeded, "{status}"),
        }
        Ok(())
    })
}

#[test]
fn many_commands_at_once_get_each_its_own_output() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("exec")?.idle("main")?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16)
                .map(|number| {
                    let main = main.clone();
                    scope.spawn(move || -> Result<()> {
                        for turn in 0..5 {
                            let output =
                                main.exec(&["sh", "-c", &format!("echo {number}-{turn}; exit {number}")])?;
                            assert_eq!((output.code, output.stdout), (number, format!("{number}-{turn}\n")));
                        }
                        Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
        })
    })
}
