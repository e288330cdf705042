//! The privileges of a process on its way into a pid namespace where others may trace it: never
//! more than its program's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::pod::{Container, Pod, container, idle, security, sharing, sharing_pod, shell, words};
use berth_tests::repeats::repeats;

/// capabilities(7).
const SYS_ADMIN: u64 = 1 << 21;

fn filtered_by(profile: v1::SecurityProfile, mut config: v1::ContainerConfig) -> v1::ContainerConfig {
    security(&mut config).seccomp = Some(profile);
    config
}

fn profile_file(daemon: &Daemon, text: &str) -> Result<v1::SecurityProfile> {
    let path = daemon.directory("profiles")?.join("profile.json");
    fs::write(&path, text).context("writing a profile")?;
    Ok(v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::Localhost.into(),
        localhost_ref: path.to_string_lossy().into_owned(),
    })
}

/// The kernel's view of a process: `/proc/<pid>/status`.
struct Status(BTreeMap<String, String>);

impl Status {
    fn of(container: &Container) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{}/status", container.pid()?)).context("its status")?;
        let lines = text.lines().filter_map(|line| line.split_once(":\t"));
        Ok(Self(lines.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()))
    }

    fn get(&self, key: &str) -> Result<&str> {
        self.0.get(key).map(String::as_str).with_context(|| format!("no {key}"))
    }

    fn set(&self, key: &str) -> Result<u64> {
        u64::from_str_radix(self.get(key)?, 16).with_context(|| key.to_owned())
    }
}

/// Examines a container between its creation and its start, and then its program.
fn before_and_after(pod: &Pod, config: v1::ContainerConfig) -> Result<(Status, Status)> {
    let container = pod.create(config)?;
    let before = Status::of(&container)?;
    container.start()?;
    let after = Status::of(&container)?;
    ensure!(container.sh("echo fine")? == "fine\n");
    container.remove()?;
    Ok((before, after))
}

#[test]
fn who_waits_for_its_start_has_the_filter_and_the_capabilities_of_its_program() -> Result<()> {
    type Change = fn(&mut v1::LinuxContainerSecurityContext);
    let changes: [(&str, Change); 7] = [
        ("as usual", |_| ()),
        ("no-new-privileges", |security| security.no_new_privs = true),
        ("another user", |security| security.run_as_user = Some(v1::Int64Value { value: 1000 })),
        ("without a filter", |security| {
            security.seccomp = Some(v1::SecurityProfile {
                profile_type: v1::security_profile::ProfileType::Unconfined.into(),
                ..Default::default()
            });
        }),
        ("without capabilities", |security| {
            let drop_capabilities = words(&["ALL"]);
            security.capabilities = Some(v1::Capability { drop_capabilities, ..Default::default() });
        }),
        ("with more", |security| {
            let add_capabilities = words(&["SYS_ADMIN", "NET_ADMIN"]);
            security.capabilities = Some(v1::Capability { add_capabilities, ..Default::default() });
        }),
        ("without a change of root", |security| security.readonly_rootfs = true),
    ];
    rootful(|daemon| {
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        for (index, (what, change)) in changes.into_iter().enumerate() {
            for tty in [false, true] {
                let mut config = sharing(idle(&format!("c{index}-{tty}")));
                config.tty = tty;
                change(security(&mut config));
                let (before, after) = before_and_after(&pod, config).context(what)?;
                for key in ["Seccomp", "NoNewPrivs", "Uid", "Gid", "Groups", "CapBnd", "CapInh"] {
                    ensure!(before.get(key)? == after.get(key)?, "{what}: {key} changes");
                }
                let (may, most) = (before.set("CapPrm")?, after.set("CapBnd")?);
                ensure!(may & !most == 0, "{what}: it may {may:x}, and its program at most {most:x}");
            }
        }
        Ok(())
    })
}

/// The part of CVE-2016-9962 that is left when nothing of the host is open: a process that traces
/// another before its program begins has everything that it has.
#[test]
fn processes_of_exec_have_the_capabilities_of_their_program_from_their_birth_on() -> Result<()> {
    const EXECS: usize = 250;
    // Only builtins: external programs would be among what it sees.
    const LOOK: &str = "echo ready; while [ ! -e /tmp/over ]; do for p in /proc/[2-9]* /proc/1?*; do \
        while read -r key value; do [ $key = CapPrm: ] && echo $value; done < $p/status; done 2>/dev/null; done";
    rootful(|daemon| {
        let pod = daemon.pod("look")?;
        let main = pod.start(in_own(shell("looks", LOOK)))?;
        main.says("ready")?;
        for _ in 0..repeats(EXECS)? {
            ensure!(main.exec(&["true"])?.code == 0);
        }
        main.call_off("/tmp/over");
        let said = main.ended()?.stdout;
        let seen: BTreeSet<&str> = said.lines().filter(|line| *line != "ready").collect();
        ensure!(!seen.is_empty(), "it saw none of {EXECS}");
        for set in seen {
            let set = u64::from_str_radix(set, 16).with_context(|| format!("it said {set:?}"))?;
            ensure!(set & SYS_ADMIN == 0, "it saw a process with {set:x}");
        }
        Ok(())
    })
}

fn in_own(mut config: v1::ContainerConfig) -> v1::ContainerConfig {
    security(&mut config).capabilities =
        Some(v1::Capability { add_capabilities: words(&["SYS_PTRACE"]), ..Default::default() });
    config
}

/// The calls made under a filter before the program begins are exactly those that the daemon
/// requires of the filter: any other call would end the process. A tracer gains nothing from them
/// that the pod does not have.
#[test]
fn the_first_process_of_a_pod_is_in_its_namespaces_and_under_a_filter() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("first")))?;
        let mut tracer = sharing(idle("tracer"));
        security(&mut tracer).capabilities =
            Some(v1::Capability { add_capabilities: words(&["SYS_PTRACE"]), ..Default::default() });
        let main = pod.start(tracer)?;
        let said = main.sh("for kind in net ipc uts; do \
             [ $(readlink /proc/1/ns/$kind) = $(readlink /proc/self/ns/$kind) ] && echo $kind; done; \
             grep -e ^NoNewPrivs: -e ^Seccomp: /proc/1/status; readlink /proc/1/ns/cgroup")?;
        let (common, cgroup) = said.trim_end().rsplit_once('\n').context("a cgroup namespace")?;
        assert_eq!(common, "net\nipc\nuts\nNoNewPrivs:\t1\nSeccomp:\t2");
        let hosts = fs::read_link("/proc/self/ns/cgroup")?;
        ensure!(cgroup.starts_with("cgroup:[") && Some(cgroup) != hosts.to_str(), "{cgroup}");
        Ok(())
    })
}

#[test]
fn a_filter_that_just_admits_entering_is_in_force_before_it() -> Result<()> {
    // The first lines are those of the list of the plan, `ENTERING`; the others are those of a
    // static busybox.
    const PROFILE: &str = r#"{"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": [
        "clone", "read", "write", "close", "sendmsg", "recvmsg", "setsid", "execve", "exit_group",
        "brk", "mmap", "mremap", "munmap", "madvise", "capset", "prctl",
        "arch_prctl", "set_tid_address", "set_robust_list", "rseq", "prlimit64", "readlinkat", "readlink", "getrandom",
        "mprotect", "uname", "newfstatat", "fstat", "getuid", "geteuid", "getgid", "getegid", "setuid", "setgid", "getpid",
        "getppid", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigsuspend", "clock_nanosleep", "nanosleep", "wait4", "fcntl", "dup2",
        "getcwd", "stat", "lseek", "sigaltstack", "poll", "openat", "getdents64", "sysinfo", "vfork", "fork", "clock_gettime"
        ]}, {"action": "SCMP_ACT_ALLOW", "names": ["ioctl"], "args": [{"index": 1, "value": 21518, "op": "SCMP_CMP_EQ"}]}
        , {"action": "SCMP_ACT_ERRNO", "errnoRet": 25, "names": ["ioctl"], "args": [{"index": 1, "value": 21518, "op": "SCMP_CMP_NE"}]}]}"#;
    rootful(|daemon| {
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        let profile = profile_file(daemon, PROFILE)?;
        for tty in [false, true] {
            let mut config = filtered_by(profile.clone(), sharing(idle(&format!("strict-{tty}"))));
            config.tty = tty;
            let (before, after) = before_and_after(&pod, config)?;
            ensure!(before.get("Seccomp")? == "2", "the filter is in force before the start");
            ensure!(before.set("CapPrm")? == after.set("CapPrm")?, "and so are the capabilities");
        }
        Ok(())
    })
}

/// There the last filter is installed inside. The filter in force until then allows only the calls
/// of entering in addition.
#[test]
fn a_filter_that_forbids_to_make_processes_is_in_force_all_the_same() -> Result<()> {
    const PROFILE: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"action": "SCMP_ACT_ERRNO", "names": ["clone", "clone3", "fork", "vfork"]}]}"#;
    rootful(|daemon| {
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        let profile = profile_file(daemon, PROFILE)?;
        let container = pod.create(filtered_by(profile, sharing(container("single", &["sleep", "1000"]))))?;
        let before = Status::of(&container)?;
        ensure!(before.get("Seccomp")? == "2" && before.set("CapPrm")? & SYS_ADMIN == 0);
        ensure!(before.get("NoNewPrivs")? == "1" && before.get("Seccomp_filters")? == "1");
        container.start()?;
        let after = Status::of(&container)?;
        ensure!(after.get("Seccomp")? == "2" && after.get("Seccomp_filters")? == "2");
        ensure!(before.set("CapPrm")? == after.set("CapPrm")?);
        for (script, works) in [("echo fine", true), ("cat /proc/self/status; true", false)] {
            let output = container.exec(&["sh", "-c", script])?;
            ensure!((output.code == 0) == works, "{script}: {output:?}");
            if !works {
                ensure!(output.stderr.contains("fork"), "{output:?}");
            }
        }
        Ok(())
    })
}

#[test]
fn a_container_that_has_not_started_is_no_target() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("target")?;
        let target = pod.create(idle("target"))?;
        let aimed = |name: &str| {
            let mut config = idle(name);
            security(&mut config).namespace_options = Some(v1::NamespaceOption {
                pid: v1::NamespaceMode::Target.into(),
                target_id: target.id.clone(),
                ..Default::default()
            });
            config
        };
        let Err(refused) = pod.create(aimed("early")) else { bail!("its process could be traced") };
        ensure!(refused.message().contains(&target.id), "{refused}");
        target.start()?;
        pod.start(aimed("debug"))?;
        Ok(())
    })
}
