//! Pods come and go, and nothing of them stays.

use anyhow::{Result, anyhow, ensure};
use berth_tests::census::Census;
use berth_tests::daemon::rootful;
use berth_tests::pod::shell;
use berth_tests::repeats::repeats;

/// The total number of pods, and how many threads create them.
const PODS: usize = 200;
const AT_ONCE: usize = 4;

#[test]
fn pods_that_come_and_go_leave_nothing() -> Result<()> {
    let each = repeats(PODS)? / AT_ONCE;
    ensure!(each >= 4, "with fewer pods, some are of no kind: {each}");
    rootful(|daemon| {
        // The first pod is not counted: what it creates on a host, a bridge and its rules, stays
        // for the others, and so does the daemon's connection to systemd, which its container
        // needs.
        let first = daemon.pod("first")?;
        first.idle("main")?;
        first.remove()?;
        let census = Census::take(daemon)?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..AT_ONCE)
                .map(|thread| {
                    scope.spawn(move || -> Result<()> {
                        for number in 0..each {
                            let pod = daemon.pod(&format!("pod-{thread}-{number}"))?;
                            match number % 4 {
                                // A container that ended, one that runs, one that was only created,
                                // and none at all.
                                0 => drop(pod.run_container(shell("main", "echo hello"))?),
                                1 => {
                                    let main = pod.idle("main")?;
                                    assert_eq!(main.exec(&["true"])?.code, 0);
                                    main.stop(10)?;
                                    main.remove()?;
                                }
                                2 => drop((pod.idle("main")?, pod.create(shell("other", "true"))?)),
                                _ => pod.stop()?,
                            }
                            pod.remove()?;
                        }
                        Ok(())
                    })
                })
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
        })?;
        census.stays(daemon)
    })
}

#[test]
fn a_daemon_that_ends_without_pods_leaves_no_mount() -> Result<()> {
    rootful(|daemon| {
        daemon.pod("web")?.remove()?;
        daemon.stop()?;
        let left = berth_tests::census::mounts_below(&daemon.dir().join("state"));
        assert!(left.is_empty(), "{left:?}");
        daemon.start_again()
    })
}
