//! What a process inherits from its parent: a container's process gets nothing from the daemon,
//! however that was started.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::cgroup::Driver;
use berth_tests::daemon::{Setup, rootful_with};
use berth_tests::pod::{idle, security, sharing, sharing_pod};
use berth_tests::program::output;
use berth_tests::skip::skip;

/// A session keyring with a key that only its possessor can see, and the early memory failure
/// policy: add_key(2), keyctl(2), PR_MCE_KILL(2const), by their numbers on x86_64.
const ODDER: &str = r#"
    my ($kind, $name, $content) = ("user", "berth-test-secret", "x");
    syscall(250, 1, 0) != -1 or die "join a session keyring: $!";
    my $key = syscall(248, $kind, $name, $content, 1, -3);
    $key != -1 and syscall(250, 5, $key, 0x3f000000) != -1 or die "add a key: $!";
    open(my $keys, "<", "/proc/keys") or die "/proc/keys: $!";
    grep(/$name/, <$keys>) or die "the key cannot be seen";
    syscall(157, 33, 1, 1, 0, 0) != -1 or die "set the memory failure policy: $!";
    $SIG{CHLD} = "IGNORE";
    exec @ARGV;
"#;

/// A daemon with every inherited attribute set to something other than the default.
const ODD: Setup = Setup {
    network: "",
    configuration: "",
    disk_bytes: None,
    chroot: false,
    own_mounts: false,
    launcher: &[
        "nice",
        "-n",
        "5",
        "taskset",
        "-c",
        "0",
        "setarch",
        "-R",
        "ionice",
        "-c",
        "3",
        "chrt",
        "-b",
        "0",
        "sh",
        "-c",
        "echo 0 > /proc/self/coredump_filter; echo 1234 > /proc/self/timerslack_ns; exec \"$@\"",
        "sh",
        "perl",
        "-e",
        ODDER,
    ],
};

/// `PF_MCE_PROCESS` of the kernel's <linux/sched.h>, in field 9 of proc_pid_stat(5): it has its own
/// policy for memory failures.
const PF_MCE_PROCESS: u64 = 0x80;

/// The kernel's state of a process, line by line.
fn inherited(pid: i32) -> Result<Vec<String>> {
    let proc = Path::new("/proc").join(pid.to_string());
    let read = |name: &str| {
        fs::read_to_string(proc.join(name)).map(|text| text.trim().to_owned()).context(name.to_owned())
    };
    let status = read("status")?;
    let processors =
        status.lines().find(|line| line.starts_with("Cpus_allowed_list")).context("processors")?;
    let io = output(Command::new("ionice").args(["-p", &pid.to_string()]))?;
    let stat = read("stat")?;
    // proc_pid_stat(5): field 19 is the nice value, 41 the policy; the fields after the name begin
    // with the third.
    let fields: Vec<&str> = stat.rsplit(')').next().context("fields")?.split_ascii_whitespace().collect();
    Ok(vec![
        processors.to_owned(),
        format!("nice {}, policy {}", fields[16], fields[38]),
        format!("memory failure {:x}", fields[6].parse::<u64>()? & PF_MCE_PROCESS),
        // With class "none" the number means nothing.
        format!("io {}", io.split(':').next().unwrap_or_default()),
        format!("personality {}", read("personality")?),
        format!("slack {}", read("timerslack_ns")?),
        format!("coredump {}", read("coredump_filter")?),
    ])
}

#[test]
fn a_container_has_nothing_from_a_daemon_that_was_started_oddly() -> Result<()> {
    rootful_with(ODD, |daemon| {
        let odd = inherited(i32::try_from(daemon.pid()?)?)?;
        let online = fs::read_to_string("/sys/devices/system/cpu/online")?;
        let expected = vec![
            format!("Cpus_allowed_list:\t{}", online.trim()),
            "nice 0, policy 0".to_owned(),
            "memory failure 0".to_owned(),
            "io none".to_owned(),
            "personality 00000000".to_owned(),
            "slack 50000".to_owned(),
            "coredump 00000033".to_owned(),
        ];
        for (odd, expected) in odd.iter().zip(&expected) {
            ensure!(odd != expected || online.trim() == "0", "the daemon was not started oddly: {odd}");
        }
        // It learns how programs that it runs itself have ended: one sets up the network.
        let status = daemon.client().status(v1::StatusRequest::default())?.status.context("a status")?;
        for condition in &status.conditions {
            ensure!(condition.status, "{condition:?}");
        }
        let pod = daemon.pod("own")?;
        let main = pod.idle("main")?;
        assert_eq!(inherited(main.pid()?)?, expected, "a main process");
        let said = main.sh(
            "grep Cpus_allowed_list /proc/self/status; cut -d' ' -f19 /proc/self/stat; cat /proc/self/personality /proc/self/timerslack_ns \
             /proc/self/coredump_filter",
        )?;
        assert_eq!(said, format!("{}\n0\n00000000\n50000\n00000033\n", expected[0]), "a process of exec");
        // Processes that enter a pid namespace where others live take another path, and the first
        // process there is Berth's own.
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        let main = pod.start(sharing(idle("main")))?;
        assert_eq!(inherited(main.pid()?)?, expected, "a main process in a shared namespace");
        let first = main.sh("grep Cpus_allowed_list /proc/1/status; cat /proc/1/stat | cut -d' ' -f19")?;
        assert_eq!(first, format!("{}\n0\n", expected[0]), "the pod's first process");
        // Nothing is masked in a privileged one: it sees the keys that it possesses.
        let mut config = daemon.pod_config("keys");
        config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let mut privileged = idle("privileged");
        security(&mut privileged).privileged = true;
        let keys = daemon.pod_of(config)?.start(privileged)?.sh("cat /proc/keys")?;
        ensure!(keys.contains("keyring") && !keys.contains("berth-test-secret"), "{keys}");
        daemon.crash()?;
        assert_eq!(inherited(pod.start(sharing(idle("after")))?.pid()?)?, expected, "by the next daemon");
        Ok(())
    })
}

/// `vm.memfd_noexec` is a setting of a pid namespace, so the daemon gets its own here.
fn starts_containers_with(test: &str, noexec: &'static [&'static str]) -> Result<()> {
    if !fs::exists("/proc/sys/vm/memfd_noexec")? {
        skip(test, "this kernel has no vm.memfd_noexec");
        return Ok(());
    }
    if Driver::of_the_environment()? == Driver::Systemd {
        skip(test, "systemd would take the numbers of a pid namespace for the host's");
        return Ok(());
    }
    rootful_with(Setup { launcher: noexec, ..Setup::default() }, |daemon| {
        let main = daemon.pod("memory")?.start(idle("main"))?;
        assert_eq!(main.sh("echo fine; cat /proc/sys/vm/memfd_noexec")?.lines().next(), Some("fine"));
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        assert_eq!(pod.start(sharing(idle("main")))?.sh("echo fine")?, "fine\n");
        Ok(())
    })
}

/// Its own pid namespace, with the value of `$0` in `vm.memfd_noexec`.
const SETTING: [&str; 8] = [
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "sh",
    "-c",
    "echo \"$0\" > /proc/sys/vm/memfd_noexec && exec \"$@\"",
];
const UNLESS_ASKED: [&str; 9] = setting("1");
const NEVER: [&str; 9] = setting("2");

const fn setting(value: &'static str) -> [&'static str; 9] {
    let [a, b, c, d, e, f, g, h] = SETTING;
    [a, b, c, d, e, f, g, h, value]
}

#[test]
fn containers_start_where_files_in_memory_are_executable_only_if_asked_for() -> Result<()> {
    starts_containers_with(
        "containers_start_where_files_in_memory_are_executable_only_if_asked_for",
        &UNLESS_ASKED,
    )
}

#[test]
fn containers_start_where_no_file_in_memory_is_executable() -> Result<()> {
    starts_containers_with("containers_start_where_no_file_in_memory_is_executable", &NEVER)
}
