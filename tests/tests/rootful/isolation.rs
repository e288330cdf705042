//! What a container may not do: capabilities, seccomp, paths, devices.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Setup, rootful, rootful_with};
use berth_tests::pod::{container, idle, security, words};
use berth_tests::program::output;
use berth_tests::streams;

/// The capabilities that images expect: Docker's and containerd's default set, by number
/// (capability.h).
const DEFAULT: [u32; 14] = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31];

fn mask(numbers: &[u32]) -> u64 {
    numbers.iter().fold(0, |mask, number| mask | 1 << number)
}

/// The sets of a process: Inh, Prm, Eff, Bnd, Amb (`proc_pid_status(5)`).
fn sets(status: &str) -> Result<[u64; 5]> {
    let mut sets = [0; 5];
    for (set, name) in sets.iter_mut().zip(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]) {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        *set = u64::from_str_radix(line.with_context(|| format!("no {name} in {status}"))?, 16)?;
    }
    Ok(sets)
}

#[test]
fn capabilities_are_exactly_those_of_the_request() -> Result<()> {
    rootful(|daemon| {
        // The daemon cannot grant what it lacks itself.
        let own =
            berth_tests::census::status_field(i32::try_from(daemon.pid()?)?, "CapBnd").context("CapBnd")?;
        let own = u64::from_str_radix(&own, 16)?;
        let default = mask(&DEFAULT);
        let net_admin = 1 << 12;
        let pod = daemon.pod("caps")?;
        let capability = |add: &[&str], drop: &[&str]| v1::Capability {
            add_capabilities: words(add),
            drop_capabilities: words(drop),
            ..Default::default()
        };
        type Change<'a> = Box<dyn Fn(&mut v1::LinuxContainerSecurityContext) + 'a>;
        let set = |value: v1::Capability| -> Change<'_> {
            Box::new(move |context| context.capabilities = Some(value.clone()))
        };
        let cases: Vec<(&str, Change<'_>, u64)> = vec![
            ("nothing asked", Box::new(|_| {}), default),
            ("one more", set(capability(&["NET_ADMIN"], &[])), default | net_admin),
            ("with CAP_ before it", set(capability(&["CAP_NET_ADMIN"], &[])), default | net_admin),
            ("one less", set(capability(&[], &["CHOWN"])), default & !1),
            ("all gone", set(capability(&[], &["ALL"])), 0),
            ("all gone but one", set(capability(&["NET_BIND_SERVICE"], &["ALL"])), 1 << 10),
            ("all but one", set(capability(&["ALL"], &["NET_ADMIN"])), own & !net_admin),
            ("privileged", Box::new(|context| context.privileged = true), own),
        ];
        let mut trusted = daemon.pod_config("trusted");
        trusted.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let trusted = daemon.pod_of(trusted)?;
        for (number, (what, change, expected)) in cases.iter().enumerate() {
            let mut config = idle(&format!("c{number}"));
            change(security(&mut config));
            let pod = if security(&mut config).privileged { &trusted } else { &pod };
            let main = pod.start(config)?;
            let [inheritable, permitted, effective, bounding, ambient] =
                sets(&main.sh("cat /proc/self/status")?)?;
            let expected = expected & own;
            assert_eq!((permitted, effective, bounding), (expected, expected, expected), "{what}");
            assert_eq!((inheritable, ambient), (0, 0), "{what}");
            assert_eq!(
                sets(&main.sh("cat /proc/1/status")?)?,
                sets(&main.sh("cat /proc/self/status")?)?,
                "{what}"
            );
            main.remove()?;
        }
        Ok(())
    })
}

#[test]
fn another_user_than_root_has_no_capability_but_the_ambient_ones() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("caps")?;
        let mut config = idle("main");
        security(&mut config).run_as_user = Some(v1::Int64Value { value: 1000 });
        let main = pod.start(config)?;
        let [inheritable, permitted, effective, bounding, ambient] =
            sets(&main.sh("cat /proc/self/status")?)?;
        assert_eq!((inheritable, permitted, effective, ambient), (0, 0, 0, 0));
        assert_eq!(bounding, mask(&DEFAULT));
        let mut config = idle("ambient");
        security(&mut config).run_as_user = Some(v1::Int64Value { value: 1000 });
        security(&mut config).capabilities = Some(v1::Capability {
            add_ambient_capabilities: words(&["NET_BIND_SERVICE"]),
            ..Default::default()
        });
        let main = pod.start(config)?;
        let [inheritable, permitted, effective, _, ambient] = sets(&main.sh("cat /proc/self/status")?)?;
        let bind = 1 << 10;
        assert_eq!((inheritable, permitted, effective, ambient), (bind, bind, bind, bind));
        Ok(())
    })
}

#[test]
fn no_new_privileges_is_set_when_asked_for() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("nnp")?;
        let read = "grep NoNewPrivs /proc/self/status";
        assert_eq!(pod.script(read, |_| {})?, "NoNewPrivs:\t0\n");
        assert_eq!(pod.script(read, |config| security(config).no_new_privs = true)?, "NoNewPrivs:\t1\n");
        let mut config = idle("main");
        security(&mut config).no_new_privs = true;
        assert_eq!(pod.start(config)?.sh(read)?, "NoNewPrivs:\t1\n", "for exec too");
        Ok(())
    })
}

#[test]
fn seccomp_is_on_by_default_in_exec_too_and_off_only_when_asked() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("seccomp")?;
        let read = "grep Seccomp: /proc/self/status";
        let main = pod.idle("main")?;
        assert_eq!(main.sh(read)?, "Seccomp:\t2\n");
        assert_eq!(pod.script(read, |_| {})?, "Seccomp:\t2\n");
        // unshare(2) needs CAP_SYS_ADMIN in the profile; a user namespace would not need it in the
        // kernel.
        let refused = main.exec(&["unshare", "-U", "true"])?;
        assert_ne!(refused.code, 0);
        assert!(refused.stderr.contains("not permitted"), "{refused:?}");
        let unconfined = v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::Unconfined.into(),
            localhost_ref: String::new(),
        };
        let free = |config: &mut v1::ContainerConfig| security(config).seccomp = Some(unconfined.clone());
        assert_eq!(pod.script(read, free)?, "Seccomp:\t0\n");
        assert_eq!(pod.script(read, |config| security(config).seccomp = None)?, "Seccomp:\t0\n");
        Ok(())
    })
}

#[test]
fn a_profile_of_the_nodes_is_loaded_and_a_bad_one_refused() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("seccomp")?;
        let directory = daemon.directory("profiles")?;
        let profile = |name: &str, text: &str| -> Result<v1::SecurityProfile> {
            fs::write(directory.join(name), text)?;
            Ok(v1::SecurityProfile {
                profile_type: v1::security_profile::ProfileType::Localhost.into(),
                localhost_ref: directory.join(name).to_string_lossy().into_owned(),
            })
        };
        let no_mkdir = profile(
            "no-mkdir.json",
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}"#,
        )?;
        let seen = pod.script("mkdir /tmp/x 2>&1; touch /tmp/y && echo touched", |config| {
            security(config).seccomp = Some(no_mkdir.clone());
        })?;
        assert!(seen.contains("Permission denied") && seen.ends_with("touched\n"), "{seen}");
        let mut bad = vec![profile("not-json", "{")?, profile("empty", "")?];
        for path in [directory.clone(), directory.join("no-such-file")] {
            bad.push(v1::SecurityProfile {
                profile_type: v1::security_profile::ProfileType::Localhost.into(),
                localhost_ref: path.to_string_lossy().into_owned(),
            });
        }
        for profile in bad {
            let mut config = idle("main");
            security(&mut config).seccomp = Some(profile.clone());
            let refused = pod.create(config).err().with_context(|| format!("{profile:?} is refused"))?;
            assert!(refused.message().contains("seccomp"), "{refused}");
            assert!(refused.message().contains(&profile.localhost_ref), "{refused}");
        }
        Ok(())
    })
}

#[test]
fn masked_paths_show_nothing_and_read_only_paths_take_nothing() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("paths")?;
        let main = pod.idle("main")?;
        assert_eq!(main.sh("cat /proc/kcore /proc/keys /proc/timer_list | wc -c")?, "0\n");
        assert_eq!(main.sh("ls -A /sys/firmware | wc -l")?, "0\n");
        for path in ["/proc/sys/kernel/hostname", "/proc/irq/default_smp_affinity"] {
            let wrote = main.exec(&["sh", "-c", &format!("echo x > {path}")])?;
            assert!(wrote.code != 0 && wrote.stderr.contains("Read-only"), "{path}: {wrote:?}");
        }
        // Lists replace the defaults; empty ones mean none.
        let mut config = idle("open");
        security(&mut config).masked_paths.clear();
        security(&mut config).readonly_paths.clear();
        let open = pod.start(config)?;
        assert_ne!(open.sh("cat /proc/timer_list /proc/keys /proc/version | wc -c")?, "0\n");
        let mut config = idle("own");
        security(&mut config).masked_paths = words(&["/www/index.html", "/home", "/no/such/path"]);
        security(&mut config).readonly_paths = words(&["/tmp", "/no/such/path"]);
        let own = pod.start(config)?;
        assert_eq!(
            own.sh("cat /www/index.html; ls -A /home; touch /tmp/x 2>/dev/null || echo read-only")?,
            "read-only\n"
        );
        Ok(())
    })
}

#[test]
fn proc_sys_and_dev_have_what_containers_need_and_no_more() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("mounts")?;
        let main = pod.idle("main")?;
        assert_eq!(main.sh("readlink /proc/1/exe")?, "/bin/sh\n");
        let mut devices: Vec<String> = main.sh("ls /dev")?.lines().map(str::to_owned).collect();
        devices.sort();
        // A link to /proc/kcore, which some kernels lack.
        devices.retain(|name| name != "core");
        let expected = [
            "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
            "tty", "urandom", "zero",
        ];
        assert_eq!(devices, expected);
        assert_eq!(main.sh("echo x > /dev/null; head -c 3 /dev/zero | od -An -tx1 | tr -d ' '")?, "000000\n");
        let mounts = main.sh("cat /proc/mounts")?;
        let options = |place: &str| {
            let line = mounts.lines().find(|line| line.split(' ').nth(1) == Some(place));
            line.map(|line| line.to_owned()).with_context(|| format!("nothing on {place} in {mounts}"))
        };
        for (place, kind, option) in [
            ("/", "overlay", "rw"),
            ("/proc", "proc", "nosuid"),
            ("/sys", "sysfs", "ro"),
            ("/dev", "tmpfs", "nosuid"),
            ("/dev/pts", "devpts", "noexec"),
            ("/dev/mqueue", "mqueue", "noexec"),
            ("/dev/shm", "tmpfs", "nodev"),
        ] {
            let line = options(place)?;
            let mut words = line.split(' ').skip(2);
            assert_eq!(words.next(), Some(kind), "{line}");
            assert!(words.next().unwrap_or_default().split(',').any(|word| word == option), "{line}");
        }
        assert!(
            !mounts.contains("/tmp/berth-test") || !mounts.contains("/netns"),
            "none of the host's: {mounts}"
        );
        ensure!(main.exec(&["touch", "/sys/x"])?.code != 0);
        let cgroups =
            main.exec(&["sh", "-c", "ls /sys/fs/cgroup | wc -l; mkdir /sys/fs/cgroup/*/x /sys/fs/cgroup/x"])?;
        assert!(!cgroups.stdout.starts_with("0\n") && cgroups.code != 0, "{cgroups:?}");
        Ok(())
    })
}

#[test]
fn devices_of_the_host_cannot_be_made_and_opened() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("devices")?;
        let main = pod.idle("main")?;
        // The default capabilities allow creating nodes, but not opening them.
        for (name, kind, major, minor) in [
            ("mem", "c", "1", "1"),
            ("kmsg", "c", "1", "11"),
            ("disk", "b", "254", "0"),
            ("loop", "b", "7", "0"),
        ] {
            let path = format!("/tmp/{name}");
            main.sh(&format!("mknod {path} {kind} {major} {minor}"))?;
            let opened = main.exec(&["head", "-c", "1", &path])?;
            assert!(opened.code != 0 && opened.stderr.contains("not permitted"), "{name}: {opened:?}");
        }
        main.sh("mknod /tmp/null c 1 3; echo x > /tmp/null")?;
        // A requested device exists, with these rights and no others. Loop control: opening it does
        // nothing, and it is not among the devices that every container has.
        if !std::path::Path::new("/dev/loop-control").exists() {
            berth_tests::skip::skip(
                "isolation::devices (those asked for)",
                "this host has no /dev/loop-control",
            );
            return Ok(());
        }
        let mut config = idle("asked");
        config.devices = vec![v1::Device {
            container_path: "/dev/control".to_owned(),
            host_path: "/dev/loop-control".to_owned(),
            permissions: "r".to_owned(),
        }];
        let asked = pod.start(config)?;
        assert_eq!(
            asked.sh("stat -c '%F %t %T' /dev/control; : < /dev/control && echo opened")?,
            "character special file a ed\nopened\n"
        );
        let wrote = asked.exec(&["sh", "-c", ": > /dev/control"])?;
        assert!(wrote.code != 0 && wrote.stderr.contains("not permitted"), "it is for reading: {wrote:?}");
        let main_opened = main.exec(&["sh", "-c", "mknod /tmp/control c 10 237; : < /tmp/control"])?;
        assert!(main_opened.code != 0, "for who asked only: {main_opened:?}");
        Ok(())
    })
}

/// Removes a node of the host's `/dev` when the test is over.
struct HostNode(&'static str);

impl Drop for HostNode {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

#[test]
fn a_privileged_container_has_the_devices_that_the_host_has_by_then() -> Result<()> {
    rootful(|daemon| {
        let mut config = daemon.pod_config("privileged");
        config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let pod = daemon.pod_of(config)?;
        let node = HostNode("/dev/berth-test-plugged-in");
        output(Command::new("mknod").arg(node.0).args(["c", "1", "3"]))?;
        let list = |name: &str| {
            let mut config = idle(name);
            security(&mut config).privileged = true;
            pod.start(config)?.sh("ls /dev")
        };
        assert!(list("after")?.contains("berth-test-plugged-in"), "it came after the daemon");
        drop(node);
        assert!(!list("unplugged")?.contains("berth-test-plugged-in"), "and has gone");
        Ok(())
    })
}

#[test]
fn a_device_may_lie_outside_of_dev_and_in_what_is_mounted() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("devices")?;
        let node = daemon.directory("nodes")?.join("null");
        output(Command::new("mknod").arg(&node).args(["c", "1", "3"]))?;
        let node = node.to_string_lossy().into_owned();
        let device = |container_path: &str, host_path: &str| v1::Device {
            container_path: container_path.to_owned(),
            host_path: host_path.to_owned(),
            permissions: "rw".to_owned(),
        };
        let read = |path: &str| format!("stat -c '%F %t %T' {path}; echo x > {path} && echo written");
        let expected = "character special file 1 3\nwritten\n";
        let outside =
            pod.script(&read("/dev/mine"), |config| config.devices = vec![device("/dev/mine", &node)])?;
        assert_eq!(outside, expected);
        // The path turns back, and stays inside.
        let turned = pod.script(&read("/dev/mine"), |config| {
            config.devices = vec![device("/data/../dev/./mine", &node)];
        })?;
        assert_eq!(turned, expected);
        // The host's own directory of devices, and one of them on its own.
        let mounted = pod.script(&read("/host/null"), |config| {
            config.mounts = vec![v1::Mount {
                container_path: "/data/../host".to_owned(),
                host_path: "/dev".to_owned(),
                ..Default::default()
            }];
            config.devices = vec![device("/host/null", "/dev/null")];
        })?;
        assert_eq!(mounted, expected);
        Ok(())
    })
}

/// In the form of Docker's own default profile: an allow list with rules that depend on
/// capabilities, architectures and kernels.
#[test]
fn a_profile_in_dockers_form_gives_what_its_conditions_say() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("seccomp")?;
        let file = daemon.directory("profiles")?.join("docker.json");
        fs::write(&file, include_str!("seccomp-in-dockers-form.json"))?;
        let profile = v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::Localhost.into(),
            localhost_ref: file.to_string_lossy().into_owned(),
        };
        // By number where a shell has no command for it: unshare(2) needs CAP_SYS_ADMIN, and so
        // does everything else that the profile says about it.
        let script = "mkdir /tmp/a && echo made; hostname x 2>&1 | grep -o 'not permitted\\|not implemented'; \
            hostname; grep Seccomp: /proc/self/status; chroot / true && echo rooted; sync && echo synced";
        let seen = |caps: &[&str]| {
            pod.script(&format!("{script} || true"), |config| {
                let context = security(config);
                context.seccomp = Some(profile.clone());
                context.capabilities.get_or_insert_default().add_capabilities = words(caps);
            })
        };
        let plain = seen(&[])?;
        assert!(plain.starts_with("made\nnot permitted\n"), "{plain}");
        assert!(plain.contains("Seccomp:\t2\n") && plain.contains("rooted\n"), "{plain}");
        assert!(plain.ends_with("synced\n"), "minKernel 4.8 is met: {plain}");
        let admin = seen(&["SYS_ADMIN"])?;
        assert!(admin.contains("made\nx\n"), "sethostname(2) comes with the capability: {admin}");
        Ok(())
    })
}

/// Soft and hard value of a line of `/proc/PID/limits`.
fn limits_of(limits: &str, name: &str) -> Result<(String, String)> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).context(name.to_owned())?;
    let mut words = line.split_whitespace().map(str::to_owned);
    words.next().zip(words.next()).with_context(|| format!("two values in {line:?}"))
}

#[test]
fn resource_limits_of_a_program_do_not_depend_on_how_the_daemon_was_started() -> Result<()> {
    rootful(|daemon| {
        // Limits that a unit file or a shell may have set. Only hard ones bind, and only a daemon
        // that may not raise them.
        let daemon_has =
            ["--nofile=4321:", "--core=0:", "--stack=1048576:", "--memlock=65536:", "--nproc=5000:"];
        let pid = daemon.pid()?.to_string();
        daemon.host().run("prlimit", &[&["--pid", &pid], &daemon_has[..]].concat())?;
        let own = fs::read_to_string(format!("/proc/{pid}/limits"))?;
        assert_eq!(limits_of(&own, "Max open files")?.0, "4321");
        let main = daemon.pod("limits")?.idle("main")?;
        let limits = main.sh("cat /proc/self/limits")?;
        assert_eq!(main.sh("cat /proc/1/limits")?, limits, "exec has what the program has");
        assert_eq!(main.sh("ulimit -Sn")?, "1024\n");
        for (name, soft, hard) in [
            ("Max open files", "1024", "524288"),
            ("Max core file size", "unlimited", "unlimited"),
            ("Max stack size", "8388608", "unlimited"),
            ("Max locked memory", "8388608", "8388608"),
            ("Max processes", "unlimited", "unlimited"),
            ("Max address space", "unlimited", "unlimited"),
        ] {
            let (found_soft, found_hard) = limits_of(&limits, name)?;
            let (_, most) = limits_of(&own, name)?;
            // Without CAP_SYS_RESOURCE the daemon's own hard limit is the maximum.
            let lowered = found_hard == most && (found_soft == soft || found_soft == most);
            assert!(
                lowered || (found_soft == soft && found_hard == hard),
                "{name}: {found_soft}, {found_hard}; {most}"
            );
        }
        assert_eq!(main.sh("umask")?, "0022\n");
        Ok(())
    })
}

#[test]
fn a_program_inherits_no_signals_that_are_ignored_or_blocked() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("inherits")?;
        // Without a shell, which would change some itself.
        let states = ["grep", "-e", "^SigBlk", "-e", "^SigIgn", "/proc/self/status"];
        let none = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n";
        assert_eq!(pod.run_container(container("program", &states))?.stdout, none);
        assert_eq!(pod.idle("main")?.exec(&states)?.stdout, none, "exec");
        Ok(())
    })
}

/// The privileges of a process, from /proc.
const PRIVILEGES: &str = "grep -e ^Uid -e ^Gid -e ^Groups -e ^Cap -e ^NoNewPrivs -e ^Seccomp /proc/$WHO/status; umask; cat /proc/$WHO/limits; id";

#[test]
fn exec_has_the_privileges_of_the_program_in_every_security_context() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("contexts")?;
        let id = |value: i64| Some(v1::Int64Value { value });
        let mut number = 0;
        for (user, group) in [(None, None), (id(0), id(7)), (id(1000), None), (id(4242), id(4343))] {
            for (add, ambient, drop) in [
                (&[][..], &[][..], &[][..]),
                (&["NET_ADMIN"], &[], &["ALL"]),
                (&["KILL"], &["NET_RAW"], &["CHOWN"]),
            ] {
                for no_new_privs in [false, true] {
                    number += 1;
                    let mut config = idle(&format!("c{number}"));
                    let context = security(&mut config);
                    (context.run_as_user, context.run_as_group) = (user, group);
                    context.no_new_privs = no_new_privs;
                    context.supplemental_groups = vec![77, 88];
                    context.supplemental_groups_policy = number % 2;
                    context.capabilities = Some(v1::Capability {
                        add_capabilities: words(add),
                        add_ambient_capabilities: words(ambient),
                        drop_capabilities: words(drop),
                    });
                    let what = format!("{context:?}");
                    let main = pod.start(config)?;
                    let of = |who: &str| main.sh(&PRIVILEGES.replace("$WHO", who));
                    assert_eq!(of("1")?, of("self")?, "{what}");
                    main.remove()?;
                }
            }
        }
        assert_eq!(number, 24);
        Ok(())
    })
}

#[test]
fn resource_limits_can_be_configured() -> Result<()> {
    let setup =
        Setup { configuration: "[container.rlimits]\nnofile = \"256:512\"\ncore = 0\n", ..Setup::default() };
    rootful_with(setup, |daemon| {
        let main = daemon.pod("limits")?.idle("main")?;
        assert_eq!(main.sh("ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc")?, "256\n512\n0\n0\n");
        let more = main.exec(&["sh", "-c", "ulimit -Hn 513"])?;
        // Root of a container may not raise them again either.
        assert_ne!(more.code, 0, "{more:?}");
        Ok(())
    })
}

#[test]
fn nothing_of_the_daemon_is_open_in_a_container() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("fds")?.idle("main")?;
        // What a shell or ls opens itself is in the container; what the daemon or the shim left
        // open would not be.
        for (what, process) in [("the program", "1"), ("exec", "$$")] {
            let open = main.sh(&format!(
                "for fd in /proc/{process}/fd/*; do echo -n \"${{fd##*/}} \"; readlink $fd || echo; done"
            ))?;
            for line in open.lines() {
                let (number, target) = line.split_once(' ').unwrap_or((line, ""));
                let known = target.is_empty() || target.starts_with("pipe:") || target == "/dev/null";
                let own = target.starts_with("/proc/");
                assert!(
                    if number.parse::<u32>()? < 3 { known } else { own || target.is_empty() },
                    "{what}: {open}"
                );
            }
        }
        Ok(())
    })
}

/// The holder of a descriptor of an inode can change its mode, and with the capability its owner.
#[test]
fn no_stream_of_a_container_is_a_file_of_the_host() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let look = |file: &str| format!("stat -L -c '%d %t:%T' {file}");
        let unwanted = v1::ExecRequest {
            container_id: main.id.clone(),
            cmd: words(&["sh", "-c", &format!("exec 3>&1; {} >&2", look("/proc/self/fd/3"))]),
            stderr: true,
            ..Default::default()
        };
        let unwanted = streams::Command::start(daemon, unwanted)?.finished()?;
        for (what, found) in [
            ("input of the program", main.sh(&look("/proc/1/fd/0"))?),
            ("input of an exec", main.sh(&look("/proc/$$/fd/0"))?),
            ("output of an exec", unwanted.stderr),
        ] {
            let (device, null) = found.trim().split_once(' ').with_context(|| format!("{what}: {found}"))?;
            assert_eq!(null, "1:3", "{what} is the null device");
            assert_ne!(device.parse::<u64>()?, fs::metadata("/dev/null")?.dev(), "{what} is the host's");
        }
        Ok(())
    })
}

/// The mount points, except for those of tests.
fn host_mounts() -> Result<std::collections::BTreeSet<String>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.filter(|point| !point.contains("berth-test-")).map(str::to_owned).collect())
}

/// Where the daemon's own root is not that of its mount namespace, a container could be left in a
/// namespace that begins with the host's files: its own processes below a root that they can climb
/// out of, and processes of exec right in the host.
#[test]
fn a_container_of_a_daemon_in_a_chroot_has_a_namespace_without_the_host() -> Result<()> {
    rootful_with(Setup { chroot: true, ..Setup::default() }, |daemon| {
        let before = host_mounts()?;
        let main = daemon.pod("chroot")?.start(idle("main"))?;
        let files = main.sh("ls -a /")?;
        ensure!(files.contains("www"), "a program of exec sees the image: {files}");
        let mounts = main.sh("cat /proc/self/mountinfo")?;
        assert_eq!(mounts, main.sh("cat /proc/1/mountinfo")?, "the main process and exec are in one tree");
        let root: Vec<&str> = mounts.lines().filter(|line| line.split(' ').nth(4) == Some("/")).collect();
        ensure!(root.len() == 1 && root[0].contains(" - overlay "), "one root, the container's: {root:?}");
        // A process that joins the namespace from outside begins at its root, wherever the
        // container's processes have theirs.
        let pid = main.pid()?;
        let joined = Command::new("nsenter")
            .arg(format!("--mount=/proc/{pid}/ns/mnt"))
            .args(["/bin/ls", "-a", "/"])
            .output()
            .context("joining the namespace")?;
        assert_eq!(String::from_utf8_lossy(&joined.stdout), files, "the namespace's root is the image");
        let after = host_mounts()?;
        ensure!(before.is_subset(&after), "the host has lost mounts: {before:?}, and now {after:?}");
        Ok(())
    })
}
