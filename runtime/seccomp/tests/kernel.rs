//! RuntimeDefault installed for real. Filters belong to threads, so each test puts one on a thread
//! that then ends.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::fs;
use std::process::Command;
use std::thread;

use berth_seccomp::{compile, default_profile};
use berth_sys::{ns, process};

/// Runs on its own thread, under the filter for these capabilities.
fn under_filter<T: Send + 'static>(
    capabilities: &'static [&str],
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let confined = move || {
        let filter = compile(&default_profile(capabilities.iter().copied())).unwrap();
        process::set_no_new_privileges().unwrap();
        process::install_seccomp(&filter.bytes, filter.flags).unwrap();
        work()
    };
    thread::spawn(confined).join().unwrap()
}

fn succeeds(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().unwrap().status.success()
}

#[test]
fn ordinary_programs_run_under_the_default_profile() {
    under_filter(&[], || {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
        assert!(succeeds("sh", &["-c", "ls -l /proc/self/fd | sort >/dev/null && sleep 0.01"]));
        // Falls back from clone3 to clone.
        thread::spawn(|| ()).join().unwrap();
        std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    });
}

#[test]
fn what_the_default_profile_refuses_fails_with_eperm() {
    const EPERM: Option<i32> = Some(1);
    const CLONE_NEWUTS: i32 = 0x0400_0000;
    under_filter(&["CAP_CHOWN"], || {
        assert_eq!(ns::unshare(CLONE_NEWUTS).unwrap_err().raw_os_error(), EPERM);
        assert!(!succeeds("unshare", &["--user", "true"]));
        assert!(!succeeds("mount", &["-t", "tmpfs", "tmpfs", "/mnt"]));
    });
    under_filter(&["CAP_SYS_ADMIN"], || ns::unshare(CLONE_NEWUTS).unwrap());
}
