//! StopContainer and RemoveContainer.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use berth_cri::v1;
use berth_tests::daemon::{SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::pod::{container, idle, shell};
use tonic::Code;

/// A program that ignores requests to end.
const STUBBORN: &str = "trap 'echo asked' TERM; echo ready; while true; do sleep 0.1; done";

#[test]
fn a_program_that_handles_the_signal_ends_by_itself() -> Result<()> {
    rootful(|daemon| {
        let script = "trap 'echo bye; exit 5' TERM; echo ready; while true; do sleep 0.1; done";
        let main = daemon.pod("stop")?.start(shell("main", script))?;
        main.says("ready")?;
        main.stop(60)?;
        let ended = main.ended()?;
        assert_eq!((ended.status.exit_code, ended.stdout.as_str()), (5, "ready\nbye\n"));
        Ok(())
    })
}

#[test]
fn a_program_that_ignores_it_is_killed_after_the_grace_and_asked_once() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("stop")?.start(shell("main", STUBBORN))?;
        main.says("ready")?;
        let begin = Instant::now();
        main.stop(1)?;
        assert!(begin.elapsed() >= Duration::from_secs(1), "after {:?}", begin.elapsed());
        let status = main.status()?;
        assert_eq!((status.state(), status.exit_code), (v1::ContainerState::ContainerExited, 137));
        assert!(status.finished_at > 0);
        assert_eq!(main.ended()?.stdout, "ready\nasked\n");
        Ok(())
    })
}

#[test]
fn the_shorter_of_two_stops_wins() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("stop")?.start(shell("main", STUBBORN))?;
        main.says("ready")?;
        let first = main.clone();
        let begin = Instant::now();
        let thread = thread::spawn(move || first.stop(600));
        main.says("asked")?;
        main.stop(1)?;
        thread.join().map_err(|_| anyhow!("the thread panicked"))??;
        assert!(begin.elapsed() < patience(SOON), "the first stop ended with the second");
        assert_eq!(main.ended()?.stdout, "ready\nasked\n", "the signal came once");
        Ok(())
    })
}

#[test]
fn without_grace_it_is_killed_at_once() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("stop")?;
        for (name, seconds) in [("zero", 0), ("negative", -5)] {
            let main = pod.start(shell(name, STUBBORN))?;
            main.says("ready")?;
            main.stop(seconds)?;
            let ended = main.ended()?;
            assert_eq!((ended.status.exit_code, ended.stdout.as_str()), (137, "ready\n"), "{name}");
        }
        Ok(())
    })
}

#[test]
fn stopping_again_or_something_unknown_is_no_mistake() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("stop")?.idle("main")?;
        main.stop(10)?;
        let status = main.status()?;
        main.stop(10)?;
        assert_eq!(main.status()?, status);
        let client = daemon.client();
        for id in ["no-such-id", "00000000-0000-0000-0000-000000000000", &"f".repeat(64), "ü"] {
            client.stop(id, 0)?;
            client.remove(id)?;
            client.stop_sandbox(id)?;
            client.remove_sandbox(id)?;
        }
        assert_eq!(client.container(&"f".repeat(64)).err().map(|status| status.code()), Some(Code::NotFound));
        assert_eq!(client.sandbox(&"f".repeat(64)).err().map(|status| status.code()), Some(Code::NotFound));
        Ok(())
    })
}

#[test]
fn the_stop_signal_is_the_requests_or_the_images() -> Result<()> {
    rootful(|daemon| {
        let directory = daemon.directory("image")?;
        berth_tests::forge::Image::demo()?
            .with("StopSignal", serde_json::json!("SIGUSR1"))
            .write_layout(&directory, "localhost/signal:latest")?;
        daemon.client().import(&directory)?;
        let pod = daemon.pod("stop")?;
        let script = "for s in TERM USR1 QUIT; do trap \"echo $s; exit 0\" $s; done; echo ready; while true; do sleep 0.1; done";
        let said = |name: &str, image: bool, signal: v1::Signal| -> Result<String> {
            let mut config = shell(name, script);
            config.stop_signal = signal.into();
            if image {
                config.image = Some(berth_tests::cri::image_spec("localhost/signal"));
            }
            let main = pod.start(config)?;
            main.says("ready")?;
            main.stop(60)?;
            Ok(main.ended()?.stdout)
        };
        assert_eq!(said("default", false, v1::Signal::RuntimeDefault)?, "ready\nTERM\n");
        assert_eq!(said("image", true, v1::Signal::RuntimeDefault)?, "ready\nUSR1\n");
        assert_eq!(said("request", true, v1::Signal::Sigquit)?, "ready\nQUIT\n");
        Ok(())
    })
}

#[test]
fn what_was_only_created_can_be_stopped_and_removed() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("stop")?;
        let stopped = pod.create(idle("stopped"))?;
        let begin = Instant::now();
        stopped.stop(30)?;
        assert!(begin.elapsed() < patience(Duration::from_secs(20)), "no grace is for what does not run");
        assert_eq!(stopped.status()?.state(), v1::ContainerState::ContainerExited);
        let removed = pod.create(idle("removed"))?;
        removed.remove()?;
        assert_eq!(removed.status().err().map(|status| status.code()), Some(Code::NotFound));
        Ok(())
    })
}

#[test]
fn removing_what_runs_kills_it_and_all_it_started() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("stop")?.start(shell("main", "(sleep 1000 & sleep 1001) & sleep 1002"))?;
        let pid = main.pid()?;
        main.remove()?;
        assert_eq!(main.status().err().map(|status| status.code()), Some(Code::NotFound));
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        within(SOON, "its cgroup is gone", || Ok(daemon.cgroup().below(&main.id).is_empty().then_some(())))?;
        Ok(())
    })
}

#[test]
fn a_removal_during_a_stop_ends_both() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("stop")?.start(shell("main", STUBBORN))?;
        main.says("ready")?;
        let stopping = main.clone();
        let thread = thread::spawn(move || stopping.stop(600));
        main.says("asked")?;
        main.remove()?;
        thread.join().map_err(|_| anyhow!("the thread panicked"))?.context("the stop is done too")?;
        Ok(())
    })
}

#[test]
fn a_crowd_of_forks_is_ended() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("stop")?;
        // Each child creates others, in sessions of their own, and none waits for any.
        let script = "i=0; while [ $i -lt 200 ]; do i=$((i + 1)); setsid sleep 1000 & done; echo ready; wait";
        let main = pod.start(container("main", &["sh", "-c", script]))?;
        main.says("ready")?;
        main.stop(0)?;
        within(SOON, "its cgroup is gone", || Ok(daemon.cgroup().below(&main.id).is_empty().then_some(())))?;
        Ok(())
    })
}
