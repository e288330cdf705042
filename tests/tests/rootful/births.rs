//! The state of a process at the instant in which others can see it, and what those others can do
//! with it: a container with `CAP_SYS_PTRACE` stops each birth in its pid namespace, examines it,
//! and speaks for it.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use berth_cri::v1;
use berth_tests::apparmor::{Loaded, is_enforced};
use berth_tests::daemon::{Daemon, SOON, own_namespaces, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::log::text;
use berth_tests::pod::{Container, Pod, idle, security, sharing, sharing_pod, shell};
use berth_tests::repeats::repeats;
use berth_tests::tracer::{self, Birth};
use tonic::Code;

/// The test that this program runs as a tracer.
const TRACER: &str = "births::the_tracer_stops_what_is_born_beside_it";

#[test]
fn the_tracer_stops_what_is_born_beside_it() -> Result<()> {
    tracer::obey()?;
    if !nix::unistd::geteuid().is_root() {
        berth_tests::skip::skip(TRACER, "only root may trace any process");
        return Ok(());
    }
    let births = tracer::in_own_namespace(TRACER)?;
    ensure!(!births.is_empty(), "it saw nothing");
    for birth in births {
        ensure!(matches!(birth.get("Name")?, "sh" | "sleep"), "{birth:?}");
        ensure!(birth.set("CapPrm")? != 0 && birth.get("fds")?.contains("pipe"), "{birth:?}");
    }
    Ok(())
}

fn tracing(pod: &Pod, order: &str, change: impl FnOnce(&mut v1::ContainerConfig)) -> Result<Container> {
    let mut config = tracer::in_container(TRACER, order)?;
    change(&mut config);
    let container = pod.start(config)?;
    container.says(tracer::READY)?;
    Ok(container)
}

/// Compares everything that a tracer saw of Berth's processes with the state of the program that
/// they became.
fn holds(tracer: &Container, program: &Container, what: &str) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{}/status", program.pid()?))?;
    let expected = |key: &str| -> Result<String> {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        Ok(line.with_context(|| format!("no {key}"))?.trim().replace('\t', " "))
    };
    let most = u64::from_str_radix(&expected("CapBnd")?, 16)?;
    let said = text(&tracer.log()?, "stdout");
    let births: Vec<Birth> = Birth::all(&said).into_iter().filter(Birth::is_a_shims).collect();
    ensure!(!births.is_empty(), "{what}: not one birth was seen: nothing was tried");
    for birth in &births {
        for set in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
            let has = birth.set(set)?;
            ensure!(has & !most == 0, "{what}: {set} is {has:x}, and its program has at most {most:x}");
        }
        for key in ["Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp"] {
            ensure!(birth.get(key)? == expected(key)?, "{what}: {key} is {:?}", birth.get(key)?);
        }
        if is_enforced() {
            let label = fs::read_to_string(format!("/proc/{}/attr/current", program.pid()?))?;
            ensure!(birth.get("label")? == label.trim(), "{what}: its label is {:?}", birth.get("label")?);
        }
        for kind in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
            let of_program = fs::read_link(format!("/proc/{}/ns/{kind}", program.pid()?))?;
            let of_host = fs::read_link(format!("/proc/self/ns/{kind}"))?;
            let is = birth.get(kind)?;
            // Each container has its own of these two, unless it has the host's.
            let fits = if matches!(kind, "mnt" | "cgroup") && of_program != of_host {
                *is != *of_host.to_string_lossy()
            } else {
                *is == *of_program.to_string_lossy()
            };
            ensure!(fits, "{what}: it is in another {kind} namespace");
        }
        for file in birth.get("fds")?.split(' ') {
            let kind = file.split(':').next().unwrap_or_default();
            ensure!(matches!(kind, "pipe" | "/dev/null"), "{what}: it has {file} open");
        }
    }
    Ok(())
}

/// Containers that come into a pod whose processes are shared, and commands in them.
#[test]
fn what_is_born_in_a_shared_pid_namespace_is_its_program_from_the_first_moment() -> Result<()> {
    const TIMES: usize = 30;
    rootful(|daemon| {
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        let tracer = tracing(&pod, "watch", |config| *config = sharing(config.clone()))?;
        let program = pod.start(sharing(idle("program")))?;
        for number in 0..repeats(TIMES)? {
            pod.create(sharing(idle(&format!("c{number}"))))?.remove()?;
            ensure!(program.exec(&["true"])?.code == 0);
        }
        holds(&tracer, &program, "shared")
    })
}

/// A debug container comes into the pid namespace of a container that traces; commands into a
/// container that does, and whose program is under a filter.
#[test]
fn what_is_born_beside_a_target_is_its_program_from_the_first_moment() -> Result<()> {
    const TIMES: usize = 30;
    rootful(|daemon| {
        let pod = daemon.pod("targeted")?;
        let tracer = tracing(&pod, "watch", |_| ())?;
        let aimed = |name: &str| {
            let mut config = idle(name);
            security(&mut config).namespace_options = Some(v1::NamespaceOption {
                pid: v1::NamespaceMode::Target.into(),
                target_id: tracer.id.clone(),
                ..own_namespaces()
            });
            config
        };
        let debugger = pod.start(aimed("debugger"))?;
        ensure!(debugger.sh("cat /proc/1/comm")?.trim() == "tracer", "it sees another's processes");
        ensure!(debugger.sh("cat /proc/keys | wc -l")?.trim() == "0", "the target's procfs is not masked");
        for number in 0..repeats(TIMES)? {
            pod.create(aimed(&format!("d{number}")))?.remove()?;
        }
        holds(&tracer, &debugger, "targeted")
    })
}

/// A container whose profile lets it trace everything, even unconfined processes: it gets at
/// nothing that is not confined like itself.
#[test]
fn a_confined_tracer_gets_at_nothing_that_is_confined_otherwise() -> Result<()> {
    const TIMES: usize = 10;
    if !is_enforced() {
        let test = "births::a_confined_tracer_gets_at_nothing_that_is_confined_otherwise";
        berth_tests::skip::skip(test, "this kernel has no AppArmor");
        return Ok(());
    }
    rootful(|daemon| {
        let rules = ["file,", "capability,", "network,", "unix,", "signal,", "ptrace,"];
        let hostile =
            Loaded::load("hostile", &[&rules[..], &["ptrace (trace, read) peer=unconfined,"]].concat())?;
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        let tracer = tracing(&pod, "watch", |config| {
            *config = sharing(config.clone());
            security(config).apparmor = hostile.asked_for();
        })?;
        let like_it = |name: &str, no_new_privs: bool| {
            let mut config = sharing(idle(name));
            security(&mut config).apparmor = hostile.asked_for();
            security(&mut config).no_new_privs = no_new_privs;
            config
        };
        let others = pod.start(sharing(idle("others")))?;
        let programs =
            [pod.start(like_it("plain", false))?, pod.start(like_it("nnp", true))?, others.clone()];
        for number in 0..repeats(TIMES)? {
            pod.create(like_it(&format!("plain{number}"), false))?.remove()?;
            pod.create(like_it(&format!("nnp{number}"), true))?.remove()?;
            pod.create(sharing(idle(&format!("other{number}"))))?.remove()?;
            for program in &programs {
                ensure!(program.exec(&["true"])?.code == 0);
            }
            // Into the tracer's own container: it may stop that for good.
            let _ = tracer.exec_within(&["/t/tracer", "--list"], 20);
        }
        let births = Birth::all(&text(&tracer.log()?, "stdout"));
        ensure!(births.iter().any(Birth::is_a_shims), "not one birth was seen: nothing was tried");
        for birth in births {
            ensure!(birth.get("label")? == format!("{} (enforce)", hostile.name), "{birth:?}");
        }
        ensure!(others.sh("cat /proc/1/attr/current")? == "berth-default (enforce)\n", "process 1");
        Ok(())
    })
}

/// A target may have mounted something else over its `/proc`.
#[test]
fn a_target_that_has_covered_its_procfs_is_not_joined() -> Result<()> {
    rootful(|daemon| {
        let mut config = daemon.pod_config("covered");
        config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let pod = daemon.pod_of(config)?;
        let privileged = |name: &str, script: &str| {
            let mut config = shell(name, script);
            security(&mut config).privileged = true;
            config
        };
        for (name, cover) in [
            ("tmpfs", "mount -t tmpfs none /proc"),
            ("part", "mount --bind /proc/sys /proc"),
            (
                "another",
                "unshare -p -f sh -c 'mount -t proc none /mnt && sleep 1000' & sleep 2; mount --move /mnt /proc",
            ),
        ] {
            let script = format!("mkdir -p /mnt; {cover}; echo covered; sleep 1000");
            let target = pod.start(privileged(name, &script))?;
            target.says("covered")?;
            let mut config = idle(&format!("debug-{name}"));
            security(&mut config).namespace_options = Some(v1::NamespaceOption {
                pid: v1::NamespaceMode::Target.into(),
                target_id: target.id.clone(),
                ..own_namespaces()
            });
            match pod.create(config) {
                Err(refused) => ensure!(refused.message().contains("/proc"), "{name}: {refused}"),
                Ok(_) => bail!("{name}: it was joined"),
            }
        }
        Ok(())
    })
}

/// The tracer writes in place of the process that it stops, claiming that it continues as a process
/// of the host.
#[test]
fn a_process_of_the_host_that_is_named_from_inside_lives_on() -> Result<()> {
    const EXECS: usize = 150;
    rootful(|daemon| {
        let mut victim = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn()?;
        let outcome = name_victim(daemon, victim.id(), repeats(EXECS)?);
        let lives = victim.try_wait()?.is_none();
        victim.kill()?;
        victim.wait()?;
        outcome?;
        ensure!(lives, "a process of the host was killed");
        Ok(())
    })
}

fn name_victim(daemon: &Daemon, victim: u32, execs: usize) -> Result<()> {
    let pod = daemon.pod("forged")?;
    let tracer = tracing(&pod, &victim.to_string(), |_| ())?;
    for _ in 0..execs {
        // It fails, or it was faster than the tracer.
        let _ = tracer.exec_within(&["true"], 20);
    }
    let said = text(&tracer.log()?, "stdout");
    let births = Birth::all(&said);
    let forged = births.iter().filter(|birth| birth.is_a_shims() && matches!(birth.get("forged"), Ok("2")));
    ensure!(forged.count() > 0, "it could not speak for one birth: nothing was tried");
    // The shim works as before.
    within(SOON, "an exec works", || Ok(tracer.exec_within(&["true"], 20).ok()))?;
    tracer.stop(1)?;
    Ok(())
}

/// `kill -STOP -1` reaches a process of exec before it has become its program.
#[test]
fn a_process_that_is_stopped_on_its_way_holds_nobody() -> Result<()> {
    const EXECS: usize = 100;
    rootful(|daemon| {
        let pod = daemon.pod("stopped")?;
        let script = "while [ ! -e /tmp/over ]; do kill -STOP -1; done; echo over; exit 7";
        let container = pod.start(shell("stops", script))?;
        let mut held = 0;
        for _ in 0..repeats(EXECS)? {
            match container.exec_within(&["true"], 1) {
                Err(error) if error.code() == Code::DeadlineExceeded => held += 1,
                _ => continue,
            }
            // The loop continues: it answers, and later it has the end and its code.
            let begin = Instant::now();
            daemon
                .client()
                .reopen_container_log(v1::ReopenContainerLogRequest { container_id: container.id.clone() })?;
            ensure!(
                begin.elapsed() < patience(Duration::from_secs(5)),
                "reopening the log took {:?}",
                begin.elapsed()
            );
            if held == 3 {
                break;
            }
        }
        ensure!(held > 0, "no exec was stopped: nothing was tried");
        fs::write(format!("/proc/{}/root/tmp/over", container.pid()?), "")?;
        let ended = container.ended()?;
        ensure!(ended.status.exit_code == 7 && ended.stdout == "over\n", "{ended:?}");
        Ok(())
    })
}
