//! A daemon at its limit of open files: a call succeeds, or says that there are no descriptors
//! left.

use std::time::Duration;
use std::{fs, thread};

use anyhow::{Result, ensure};
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::pod::{Pod, idle, sharing_pod};
use tonic::Status;

/// Sets the daemon's soft limit only, which a process may raise again.
fn limit(daemon: &Daemon, most: usize) -> Result<()> {
    let limit = format!("--nofile={most}:");
    daemon.host().run("prlimit", &["--pid", &daemon.pid()?.to_string(), &limit]).map(drop)
}

/// How many descriptors the daemon holds at rest: the fewest that are seen for a while, as what
/// the last call needed may be closed after its answer.
fn held_at_rest(daemon: &Daemon) -> Result<usize> {
    const LOOKS: u32 = 30;
    const BETWEEN: Duration = Duration::from_millis(50);
    let directory = format!("/proc/{}/fd", daemon.pid()?);
    let mut fewest = usize::MAX;
    for _ in 0..LOOKS {
        fewest = fewest.min(fs::read_dir(&directory)?.count());
        thread::sleep(BETWEEN);
    }
    Ok(fewest)
}

/// An operation to attempt, whose results are then removed.
type Attempt<'a> = Box<dyn Fn() -> Result<(), Status> + 'a>;

#[test]
fn calls_of_a_daemon_without_descriptors_name_them() -> Result<()> {
    /// With this many fewer descriptors than the daemon holds at rest nothing succeeds, and with
    /// this many more everything does.
    const FEWER: usize = 4;
    const MORE: usize = 12;
    const UNLIMITED: usize = 4096;
    rootful(|daemon| {
        let pod = daemon.pod("pod")?;
        let main = pod.idle("main")?;
        main.exec(&["true"])?;
        let held = held_at_rest(daemon)?;
        let attempts: [(&str, Attempt<'_>); 5] = [
            ("CreateContainer", Box::new(|| pod.create(idle("more")).map(drop))),
            ("RunPodSandbox", Box::new(|| Pod::run(daemon.client(), daemon.pod_config("other")).map(drop))),
            (
                "RunPodSandbox with a shared pid namespace",
                Box::new(|| Pod::run(daemon.client(), sharing_pod(daemon.pod_config("shared"))).map(drop)),
            ),
            ("ExecSync", Box::new(|| main.exec(&["true"]).map(drop))),
            // Nothing is listening there; finding that out takes a name and a connection.
            ("PullImage", Box::new(|| daemon.client().pull("localhost:1/absent/image:v1").map(drop))),
        ];
        for (call, attempt) in &attempts {
            let (mut lacking, mut done) = (0, 0);
            for most in (held - FEWER..held + MORE).step_by(2) {
                limit(daemon, most)?;
                let outcome = attempt();
                limit(daemon, UNLIMITED)?;
                match outcome {
                    Ok(()) => done += 1,
                    Err(error) if error.message().contains("Connection refused") => done += 1,
                    Err(error) => {
                        let message = error.message();
                        ensure!(
                            message.contains("Too many open files"),
                            "{call}, {held} held, at most {most}: {message}"
                        );
                        lacking += 1;
                    }
                }
                for container in daemon.client().containers(Default::default())? {
                    if container.id != main.id {
                        daemon.client().remove(&container.id)?;
                    }
                }
                for sandbox in daemon.client().sandboxes(Default::default())? {
                    if sandbox.id != pod.id {
                        daemon.client().remove_sandbox(&sandbox.id)?;
                    }
                }
            }
            ensure!(lacking > 0 && done > 0, "{call}: {lacking} lacked descriptors, {done} were done");
        }
        Ok(())
    })
}

#[test]
fn a_daemon_that_could_answer_nobody_refuses_to_start_and_says_why() -> Result<()> {
    const LEAST: usize = 64;
    rootful(|daemon| {
        let main = daemon.pod("pod")?.idle("main")?;
        daemon.kill()?;
        for most in [30, 40, LEAST - 1] {
            let said = daemon.fail_to_start_under(&["prlimit", &format!("--nofile={most}:{most}")])?;
            let words = format!("the limit on open files is {most}, and berthd needs at least {LEAST}");
            ensure!(said.contains(&words), "{said}");
        }
        daemon.start_under(&["prlimit", &format!("--nofile={LEAST}:{LEAST}")])?;
        ensure!(main.sh("echo alive")? == "alive\n");
        let other = daemon.pod("other")?;
        ensure!(other.idle("main")?.sh("echo alive")? == "alive\n");
        Ok(other.remove()?)
    })
}
