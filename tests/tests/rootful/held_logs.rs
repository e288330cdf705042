//! Logs that somebody holds, or whose file system does not answer: the writer waits, and nobody
//! else does.

use std::fs;
use std::path::Path;
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::census::{Census, status_field};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::fuse::Hanging;
use berth_tests::log;
use berth_tests::pod::{Container, shell};
use berth_tests::skip::skip;
use nix::sys::signal::{SIGCONT, SIGKILL, SIGSTOP, SIGTERM, kill};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};
use nix::unistd::Pid;
use tonic::Status;

/// Reads a file past the page cache, into a page of memory that a file system does not deliver:
/// ext4 holds the lock of the file meanwhile.
const HOLD: &str = "
import mmap, os, sys
page = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
os.preadv(os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECT), [page], 0)
";

/// A log that is held until this is dropped.
struct Held {
    /// Ends first, and with it what waits.
    hanging: Option<Hanging>,
    holder: Child,
}

impl Held {
    fn hold(hanging: Hanging, directory: &Path, log: &Path) -> Result<Self> {
        let holder = Program::new("python3")
            .args(["-c", HOLD])
            .args([&directory.join("file"), log])
            .stdin(Stdio::null())
            .spawn()?;
        let held = Self { hanging: Some(hanging), holder };
        let holder = i32::try_from(held.holder.id())?;
        within(SOON, "the log is held", || Ok(waits(holder).then_some(())))?;
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.hanging.take());
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Whether a process waits in the kernel.
fn waits(pid: i32) -> bool {
    status_field(pid, "State").is_some_and(|state| state.starts_with('D'))
}

/// Children of a shim by what they are called.
fn children(shim: i32) -> Vec<i32> {
    let listed = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// The writer of a container's log.
fn writer(container: &Container) -> Result<i32> {
    let all = children(container.shim_pid()?);
    let name = |pid: &i32| status_field(*pid, "Name").unwrap_or_default();
    all.into_iter().find(|pid| name(pid) == "berth-shim-log").context("a writer")
}

fn prepared(daemon: &Daemon, test: &str) -> Result<Option<Hanging>> {
    if Program::new("python3").arg("--version").output().is_err() {
        skip(&format!("held_logs::{test}"), "no python3 here");
        return Ok(None);
    }
    if statfs(daemon.dir())?.filesystem_type() != EXT4_SUPER_MAGIC {
        skip(&format!("held_logs::{test}"), "logs are not on ext4, of which this is a property");
        return Ok(None);
    }
    let hanging = Hanging::mount_with_files(&daemon.directory("hanging")?)?;
    if hanging.is_none() {
        skip(&format!("held_logs::{test}"), "no FUSE here");
    }
    Ok(hanging)
}

fn reopen(daemon: &Daemon, container: &Container) -> Result<(), Status> {
    let request = v1::ReopenContainerLogRequest { container_id: container.id.clone() };
    daemon.client().reopen_container_log(request).map(drop)
}

/// Writes without an end as soon as it may, and ends by itself when it is asked to.
const WRITES: &str = "trap 'exit 7' TERM; echo begun; while [ ! -e /tmp/go ]; do sleep 0.05; done
yes & while :; do sleep 0.05; done";

#[test]
fn a_log_that_somebody_holds_keeps_nobody_from_exec_stop_and_the_exit_code() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        pod.idle("first")?.remove()?;
        let census = Census::take(daemon)?;
        let Some(hanging) = prepared(daemon, "a_log_that_somebody_holds")? else { return Ok(()) };
        let main = pod.start(shell("main", WRITES))?;
        main.says("begun")?;
        let path = main.log_path.clone();
        let held = Held::hold(hanging, &daemon.dir().join("hanging"), &path)?;
        main.sh("touch /tmp/go")?;
        let shim = main.shim_pid()?;
        within(SOON, "somebody waits for the log", || {
            Ok(children(shim).into_iter().chain([shim]).any(waits).then_some(()))
        })?;
        // And its output has nowhere to go.
        let (mut before, size) = (0, || Ok::<_, anyhow::Error>(fs::metadata(&path)?.len()));
        within(SOON, "nothing more is written", || {
            let now = size()?;
            Ok((std::mem::replace(&mut before, now) == now).then_some(()))
        })?;
        ensure!(!waits(shim), "the shim waits");
        let begin = Instant::now();
        for _ in 0..3 {
            ensure!(main.sh("echo alive")? == "alive\n");
        }
        ensure!(begin.elapsed() < patience(Duration::from_secs(10)), "{:?}", begin.elapsed());
        let refused = reopen(daemon, &main).err().context("it cannot be reopened")?;
        ensure!(refused.message().contains("does not answer"), "{refused}");
        let begin = Instant::now();
        main.stop(30)?;
        ensure!(begin.elapsed() < patience(Duration::from_secs(12)), "{:?}", begin.elapsed());
        let status = main.status()?;
        assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"), "{status:?}");
        within(SOON, "its shim ends", || Ok((!fs::exists(format!("/proc/{shim}"))?).then_some(())))?;
        let said = daemon.log()?;
        let told =
            said.lines().find(|line| line.contains("the log of a container") && line.contains(&main.id));
        ensure!(told.is_some(), "{said}");
        main.remove()?;
        drop(held);
        within(SOON, "what was missing is told", || {
            let lines = String::from_utf8(fs::read(&path)?)?;
            Ok(lines.trim_end().ends_with("the disk did not accept them]").then_some(()))
        })?;
        // Whole entries, the last one with them.
        log::read(&path)?;
        census.stays(daemon)
    })
}

#[test]
fn output_waits_for_a_log_that_is_held_and_is_all_there_afterwards() -> Result<()> {
    const LINES: usize = 200_000;
    rootful(|daemon| {
        let Some(hanging) = prepared(daemon, "output_waits")? else { return Ok(()) };
        let script = format!("echo begun; while [ ! -e /tmp/go ]; do sleep 0.05; done; seq 1 {LINES}");
        let main = daemon.pod("web")?.start(shell("main", &script))?;
        main.says("begun")?;
        let held = Held::hold(hanging, &daemon.dir().join("hanging"), &main.log_path)?;
        main.sh("touch /tmp/go")?;
        let writer = writer(&main)?;
        within(SOON, "the writer waits", || Ok(waits(writer).then_some(())))?;
        // The same program writes on as soon as it can.
        drop(held);
        let said = main.ended()?.stdout;
        let mut lines = said.lines();
        assert_eq!(lines.next(), Some("begun"));
        assert_eq!(lines.enumerate().find(|(index, line)| line.parse() != Ok(index + 1)), None);
        assert_eq!(said.lines().count(), LINES + 1);
        Ok(())
    })
}

/// Ends it; there is another one soon.
fn replaced(container: &Container) -> Result<()> {
    let first = writer(container)?;
    kill(Pid::from_raw(first), SIGKILL)?;
    within(SOON, "there is another", || Ok(writer(container).ok().filter(|next| *next != first)))?;
    Ok(())
}

#[test]
fn a_writer_that_was_killed_at_once_is_replaced() -> Result<()> {
    rootful(|daemon| {
        let script = "trap 'echo last; exit 7' TERM; while :; do echo line; sleep 0.05; done";
        let main = daemon.pod("web")?.create(shell("main", script))?;
        // Once before there is anything to write, too.
        replaced(&main)?;
        main.start()?;
        for _ in 0..2 {
            replaced(&main)?;
            let before = fs::metadata(&main.log_path)?.len();
            within(SOON, "the log goes on", || {
                Ok((fs::metadata(&main.log_path)?.len() > before).then_some(()))
            })?;
        }
        let old = main.log_path.with_extension("old");
        fs::rename(&main.log_path, old)?;
        reopen(daemon, &main)?;
        main.says("line")?;
        main.stop(30)?;
        let ended = main.ended()?;
        assert_eq!(ended.status.exit_code, 7);
        assert!(ended.stdout.ends_with("last\n"), "{:?}", ended.stdout);
        Ok(())
    })
}

/// Writes numbers until it is stopped.
const COUNTS: &str = "n=0; while [ ! -e /tmp/end ]; do
seq $((n + 1)) $((n + 2000)); n=$((n + 2000)); sleep 0.01; done; echo $n >&2";

#[test]
fn nothing_is_lost_or_doubled_by_writers_that_are_killed_or_stopped_under_load() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let census = Census::take(daemon)?;
        let main = pod.start(shell("main", COUNTS))?;
        main.says("1")?;
        let size = || Ok::<_, anyhow::Error>(fs::metadata(&main.log_path)?.len());
        for turn in 0..4 {
            let before = size()?;
            within(SOON, "the log grows", || Ok((size()? > before).then_some(())))?;
            if turn % 2 == 0 {
                // Its queue is full, then.
                kill(Pid::from_raw(writer(&main)?), SIGSTOP)?;
                let mut before = 0;
                within(SOON, "nothing more is written", || {
                    let now = size()?;
                    Ok((std::mem::replace(&mut before, now) == now).then_some(()))
                })?;
                ensure!(main.sh("echo alive")? == "alive\n");
            }
            replaced(&main)?;
        }
        main.call_off("/tmp/end");
        let ended = main.ended()?;
        assert_eq!(ended.status.exit_code, 0);
        let (notes, last): (Vec<&str>, Vec<&str>) =
            ended.stderr.lines().partition(|line| line.ends_with("was killed and replaced]"));
        ensure!(!notes.is_empty());
        let lines = || ended.stdout.lines().enumerate();
        assert_eq!(lines().find(|(index, line)| line.parse() != Ok(index + 1)), None);
        assert_eq!([lines().count().to_string()], *last);
        main.remove()?;
        census.stays(daemon)
    })
}

#[test]
fn a_request_to_reopen_outlasts_a_writer_that_is_killed() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("web")?.start(shell("main", WRITES))?;
        main.says("begun")?;
        kill(Pid::from_raw(writer(&main)?), SIGSTOP)?;
        fs::rename(&main.log_path, main.log_path.with_extension("old"))?;
        let answer = std::thread::scope(|scope| {
            let asked = scope.spawn(|| reopen(daemon, &main));
            replaced(&main)?;
            asked.join().map_err(|_| anyhow::anyhow!("the thread panicked"))
        })?;
        answer?;
        ensure!(main.log_path.exists());
        Ok(())
    })
}

#[test]
fn a_writer_that_is_stopped_keeps_nobody_waiting_and_writes_when_it_goes_on() -> Result<()> {
    rootful(|daemon| {
        let script = "trap 'echo last; exit 7' TERM; echo begun; while :; do sleep 0.05; done";
        let main = daemon.pod("web")?.start(shell("main", script))?;
        main.says("begun")?;
        let (shim, writer, path) = (main.shim_pid()?, writer(&main)?, main.log_path.clone());
        kill(Pid::from_raw(writer), SIGSTOP)?;
        ensure!(main.sh("echo alive")? == "alive\n");
        let begin = Instant::now();
        main.stop(30)?;
        ensure!(begin.elapsed() < patience(Duration::from_secs(12)), "{:?}", begin.elapsed());
        assert_eq!(main.status()?.exit_code, 7);
        within(SOON, "its shim ends", || Ok((!fs::exists(format!("/proc/{shim}"))?).then_some(())))?;
        main.remove()?;
        kill(Pid::from_raw(writer), SIGCONT)?;
        within(SOON, "what was missing is written", || {
            Ok(log::text(&log::read(&path)?, "stdout").ends_with("last\n").then_some(()))
        })
    })
}

#[test]
fn no_writer_outlasts_its_shim_whoever_is_there_to_reap_it() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        for turn in 0..20 {
            let main = pod.create(shell("main", "echo line"))?;
            let (shim, writer) = (main.shim_pid()?, writer(&main)?);
            if turn % 4 == 0 {
                // Nothing was started.
                main.remove()?;
            } else {
                main.start()?;
                main.ended()?;
                main.remove()?;
            }
            // Not even as a zombie, which nothing reaps once the shim is gone.
            within(SOON, "the shim ends", || Ok((!fs::exists(format!("/proc/{shim}"))?).then_some(())))?;
            ensure!(!fs::exists(format!("/proc/{writer}"))?, "the writer is left, in turn {turn}");
        }
        Ok(())
    })
}

#[test]
fn a_log_directory_that_does_not_answer_is_not_reopened_and_hurts_nothing_else() -> Result<()> {
    rootful(|daemon| {
        let script = "trap 'exit 7' TERM; echo begun; while :; do sleep 0.05; done";
        let main = daemon.pod("web")?.start(shell("main", script))?;
        main.says("begun")?;
        let old = main.log_path.with_extension("old");
        fs::rename(&main.log_path, &old)?;
        let directory = main.log_path.parent().context("a directory")?;
        let Some(hanging) = Hanging::mount(directory)? else {
            skip("held_logs::a_log_directory", "no FUSE here");
            return Ok(());
        };
        let begin = Instant::now();
        for _ in 0..2 {
            let refused = reopen(daemon, &main).err().context("it cannot be reopened")?;
            ensure!(refused.message().contains("does not answer"), "{refused}");
            ensure!(main.sh("echo alive")? == "alive\n");
        }
        ensure!(begin.elapsed() < patience(Duration::from_secs(30)), "{:?}", begin.elapsed());
        drop(hanging);
        within(SOON, "it can be reopened", || Ok(reopen(daemon, &main).ok()))?;
        ensure!(main.log_path.exists());
        kill(Pid::from_raw(main.pid()?), SIGTERM)?;
        assert_eq!(main.ended()?.status.exit_code, 7);
        Ok(())
    })
}
