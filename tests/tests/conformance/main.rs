//! critest, the conformance suite of the CRI, on the real daemon: all specs, first in series, then
//! in parallel, then those of streams over WebSocket.
//!
//! The daemon, critest, and a registry with images made from Debian packages share a private
//! network namespace. `tests/conformance/exceptions` lists the specs that are allowed not to pass.
//! Arguments are regular expressions that select specs by name; `--only=serial` runs one of the
//! passes. The full output is in `target/test-logs/conformance/`.

mod images;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_tests::critest::{Exceptions, Spec, Verdict, read_report};
use berth_tests::daemon::{Daemon, Setup};
use berth_tests::deadline::patience;
use berth_tests::registry::Registry;
use berth_tests::skip::skip;
use berth_tests::{interrupts, peers};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

/// One run of critest.
struct Pass {
    name: &'static str,
    /// How many specs run at once.
    at_once: u32,
    /// The specs, by a part of their names; all of them if it is `None`.
    specs: Option<&'static str>,
    options: &'static [&'static str],
}

const PASSES: [Pass; 3] = [
    Pass { name: "serial", at_once: 1, specs: None, options: &[] },
    Pass { name: "parallel", at_once: 4, specs: None, options: &[] },
    Pass {
        name: "websocket",
        at_once: 1,
        specs: Some("Streaming"),
        options: &["-websocket-exec", "-websocket-attach", "-websocket-portforward"],
    },
];

/// When critest gives up a pass, with this machine's patience. A pass takes under a minute on two
/// cores, and all have to end within the limit of `scripts/run-tests`.
const LIMIT: Duration = Duration::from_secs(9 * 60);

/// The process id of critest while it runs, else 0.
static RUNNING: AtomicI32 = AtomicI32::new(0);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

#[expect(clippy::print_stdout, reason = "what a test harness says")]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        PASSES.iter().for_each(|pass| println!("{}: test", pass.name));
        return ExitCode::SUCCESS;
    }
    let only = arguments.iter().find_map(|argument| argument.strip_prefix("--only="));
    let focus: Vec<&str> =
        arguments.iter().map(String::as_str).filter(|argument| !argument.starts_with('-')).collect();
    let begin = Instant::now();
    let mut counts = Counts::default();
    if geteuid().is_root() {
        if let Err(error) = run(only, &focus, &mut counts) {
            println!("conformance: FAILED: {error:#}");
            counts.failed += 1;
        }
    } else {
        skip("conformance", "needs root");
        counts.passed += 1;
    }
    let Counts { passed, failed, ignored } = counts;
    println!(
        "\ntest result: {}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; 0 filtered out; \
         finished in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        begin.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Specs of all passes.
#[derive(Default)]
struct Counts {
    passed: usize,
    failed: usize,
    ignored: usize,
}

/// Prints the results of a pass, and adds them to `counts`.
#[expect(clippy::print_stdout, reason = "what a test harness says")]
fn report(pass: &str, verdict: &Verdict, counts: &mut Counts) {
    let ignored = verdict.excepted.iter().map(|(_, specs)| specs).sum::<usize>();
    println!("{pass}: {} passed, {} failed, {ignored} excepted", verdict.passed, verdict.wrong.len());
    for (exception, specs) in &verdict.excepted {
        println!("{pass}: {specs} excepted, {exception}");
    }
    for wrong in &verdict.wrong {
        println!("{pass}: FAILED: {wrong}");
    }
    for exception in &verdict.outdated {
        println!("{pass}: all specs pass; remove from tests/conformance/exceptions: {exception}");
    }
    counts.passed += verdict.passed;
    counts.failed += verdict.wrong.len();
    counts.ignored += ignored;
}

/// The specs that are allowed not to pass on this machine.
fn exceptions() -> Result<Exceptions> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/exceptions");
    let text = fs::read_to_string(&file).context("reading the exceptions")?;
    let exceptions = Exceptions::parse(&text).with_context(|| file.display().to_string())?;
    let has_apparmor = Path::new("/sys/kernel/security/apparmor/profiles").exists();
    Ok(if has_apparmor { exceptions.without("AppArmor") } else { exceptions })
}

/// Runs all passes, or only the one with this name. When it returns, the daemon is gone, with
/// everything that it and critest created.
#[expect(clippy::print_stdout, reason = "what a test harness says")]
fn run(only: Option<&str>, focus: &[&str], counts: &mut Counts) -> Result<()> {
    let passes: Vec<&Pass> = PASSES.iter().filter(|pass| only.is_none_or(|only| pass.name == only)).collect();
    ensure!(!passes.is_empty(), "there is no pass {only:?}");
    let exceptions = exceptions()?;
    let programs = peers::directory("critest")?;
    pass_on_signals()?;
    // A private IPC namespace, because critest leaves shared memory behind in the host's.
    let daemon = Daemon::start(Setup { launcher: &["unshare", "--ipc"], ..Setup::default() })?;
    let registry = Registry::start(&daemon, 5000)?;
    images::provide(&daemon, &registry)?;
    let logs = match std::env::var_os("BERTH_TEST_LOGS") {
        Some(logs) => Path::new(&logs).join("conformance"),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-logs/conformance"),
    };
    fs::create_dir_all(&logs).context("making a directory for the logs")?;
    for pass in passes {
        let focus = if focus.is_empty() { pass.specs.as_slice() } else { focus };
        let critest = Critest { programs: &programs, daemon: &daemon, logs: &logs, pass };
        let begin = Instant::now();
        let specs = critest.run(focus);
        println!("{}: {:.0} s", pass.name, begin.elapsed().as_secs_f64());
        fs::copy(daemon.dir().join("log"), logs.join("berthd.log")).context("keeping the daemon's log")?;
        report(pass.name, &exceptions.check(&specs?, focus.is_empty()), counts);
    }
    Ok(())
}

/// A run of critest.
struct Critest<'a> {
    programs: &'a Path,
    daemon: &'a Daemon,
    logs: &'a Path,
    pass: &'a Pass,
}

impl Critest<'_> {
    fn run(&self, focus: &[&str]) -> Result<Vec<Spec>> {
        ensure!(!INTERRUPTED.load(Ordering::SeqCst), "interrupted");
        let output = self.logs.join(format!("{}.log", self.pass.name));
        let log = File::create(&output).context("making the log")?;
        // For log files, volumes and seccomp profiles of the specs.
        let temporary = self.daemon.directory(&format!("critest-{}", self.pass.name))?;
        let report = self.logs.join(format!("{}.json", self.pass.name));
        let _ = fs::remove_file(&report);
        let mut command = self.command(&report, focus)?;
        let mut critest = command
            .env("TMPDIR", &temporary)
            .current_dir(&temporary)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the log")?)
            .stderr(log)
            .spawn()
            .context("starting critest")?;
        RUNNING.store(i32::try_from(critest.id())?, Ordering::SeqCst);
        let ended = critest.wait();
        RUNNING.store(0, Ordering::SeqCst);
        let status = ended.context("waiting for critest")?;
        ensure!(!INTERRUPTED.load(Ordering::SeqCst), "interrupted");
        // The exit status says no more than the report, if there is one.
        let json = fs::read(&report)
            .with_context(|| format!("critest left no report ({status}); see {}", output.display()))?;
        let specs = read_report(&json).with_context(|| format!("{status}; see {}", output.display()))?;
        Ok(specs)
    }

    /// The command that runs critest in the daemon's namespaces.
    fn command(&self, report: &Path, focus: &[&str]) -> Result<Command> {
        let endpoint = format!("unix://{}", self.daemon.socket().display());
        let mut command = self.daemon.host().command("nsenter");
        command
            .arg(format!("--ipc=/proc/{}/ns/ipc", self.daemon.pid()?))
            .arg("--")
            .arg(self.programs.join("critest"))
            // Both: critest takes one that is missing from /etc/crictl.yaml, which may be for
            // another runtime, and which it reads before it looks at `-config`.
            .arg(format!("-runtime-endpoint={endpoint}"))
            .arg(format!("-image-endpoint={endpoint}"))
            .arg("-ginkgo.no-color")
            .arg(format!("-ginkgo.timeout={}s", patience(LIMIT).as_secs()))
            .arg(format!("-ginkgo.json-report={}", report.display()))
            .args(self.pass.options)
            .args(focus.iter().map(|words| format!("-ginkgo.focus={words}")));
        if self.pass.at_once > 1 {
            // Run by ginkgo, which critest looks up in PATH.
            let path = std::env::var("PATH").context("no PATH")?;
            command
                .arg(format!("-parallel={}", self.pass.at_once))
                .env("PATH", format!("{}:{path}", self.programs.display()));
        }
        Ok(command)
    }
}

/// Makes SIGINT and SIGTERM end critest instead of this program, which then cleans up.
fn pass_on_signals() -> Result<()> {
    interrupts::take_over(|| {
        INTERRUPTED.store(true, Ordering::SeqCst);
        let critest = RUNNING.load(Ordering::SeqCst);
        if critest != 0 {
            let _ = kill(Pid::from_raw(critest), Signal::SIGTERM);
        }
    })
}
