//! `berth` on a terminal and on pipes: what goes through `exec`, and what is left behind at each
//! end.

use std::fs;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::pod::Container;
use berth_tests::terminal::Terminal;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};

fn berth(daemon: &Daemon, arguments: &[&str]) -> Result<Command> {
    let mut command = daemon.berth()?;
    command.args(arguments);
    Ok(command)
}

/// Waits until no program of the container has `text` in its arguments.
fn gone(container: &Container, text: &str) -> Result<()> {
    within(SOON, "the program has ended", || Ok((!container.sh("ps -o args")?.contains(text)).then_some(())))
}

/// Waits until a program of the container has `text` in its arguments.
fn there(container: &Container, text: &str) -> Result<()> {
    within(SOON, "the program runs", || Ok(container.sh("ps -o args")?.contains(text).then_some(())))
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(child.id().try_into()?), signal)?)
}

#[test]
fn a_terminal_is_the_programs_and_is_given_back_at_its_end() -> Result<()> {
    rootful(|daemon| {
        let _main = daemon.pod("web")?.idle("main")?;
        let terminal = Terminal::open(101, 31)?;
        let before = terminal.settings()?;
        let script = "until stty size | grep -q '31 101'; do sleep 0.05; done; stty size
            until stty size | grep -q '42 123'; do sleep 0.05; done; stty size
            trap 'echo interrupted' INT; echo ready
            until [ \"$line\" ]; do read line; done; echo heard $line; exit 7";
        let program = terminal.run(&berth(daemon, &["exec", "-it", "web", "sh", "-c", script])?)?;
        terminal.becomes_raw()?;
        terminal.shows("31 101\r\n")?;
        terminal.resize(123, 42)?;
        terminal.shows("42 123\r\n")?;
        terminal.shows("ready\r\n")?;
        // Ctrl-C is the program's, not the command's.
        terminal.types("\x03")?;
        terminal.shows("interrupted\r\n")?;
        terminal.types("hi\r")?;
        terminal.shows("heard hi\r\n")?;
        assert_eq!(program.ended()?.code(), Some(7));
        assert!(terminal.settings()? == before, "the settings are those of before");
        Ok(())
    })
}

#[test]
fn a_terminal_is_given_back_at_every_other_end() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("web")?.idle("main")?;
        for (sent, code) in
            [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129), (Signal::SIGQUIT, 131), (Signal::SIGINT, 130)]
        {
            let terminal = Terminal::open(80, 24)?;
            let before = terminal.settings()?;
            let program = terminal.run(&berth(daemon, &["exec", "-it", "web", "sleep", "4321"])?)?;
            terminal.becomes_raw()?;
            there(&main, "sleep 4321")?;
            program.signal(sent)?;
            assert_eq!(program.ended()?.code(), Some(code), "{sent}");
            assert!(terminal.settings()? == before, "{sent}");
            gone(&main, "sleep 4321")?;
        }
        // The daemon goes away.
        let terminal = Terminal::open(80, 24)?;
        let before = terminal.settings()?;
        let program = terminal.run(&berth(daemon, &["exec", "-it", "web", "sleep", "4321"])?)?;
        terminal.becomes_raw()?;
        there(&main, "sleep 4321")?;
        daemon.kill()?;
        assert_eq!(program.ended()?.code(), Some(125));
        terminal.shows("lost the connection")?;
        assert!(terminal.settings()? == before);
        daemon.start_again()
    })
}

#[test]
fn a_command_without_a_terminal_takes_its_program_along() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("web")?.idle("main")?;
        for (sent, code) in
            [(Signal::SIGTERM, 143), (Signal::SIGHUP, 129), (Signal::SIGQUIT, 131), (Signal::SIGINT, 130)]
        {
            // It reads none of its input, and its output is not read.
            let script = "while :; do echo something; done; sleep 4321";
            let mut command = berth(daemon, &["exec", "-i", "web", "sh", "-c", script])?;
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            there(&main, "echo something")?;
            signal(&child, sent)?;
            let ended = within(SOON, "the command has ended", || Ok(child.try_wait()?))?;
            assert_eq!((ended.code(), ended.signal()), (Some(code), None), "{sent}");
            gone(&main, "echo something")?;
        }
        // The reader of its output goes away.
        let script = "while :; do echo something; done";
        let mut child =
            berth(daemon, &["exec", "web", "sh", "-c", script])?.stdout(Stdio::piped()).spawn()?;
        drop(child.stdout.take());
        let ended = within(SOON, "the command has ended", || Ok(child.try_wait()?))?;
        assert_eq!(ended.code(), Some(141));
        gone(&main, "echo something")?;
        // It takes longer than it may.
        let late = berth(daemon, &["exec", "--timeout", "1", "web", "sleep", "4321"])?.output()?;
        assert_eq!(late.status.code(), Some(125));
        assert!(String::from_utf8_lossy(&late.stderr).contains("did not end within 1 s"), "{late:?}");
        gone(&main, "sleep 4321")
    })
}

#[test]
fn exit_codes_of_exec_are_those_of_podman() -> Result<()> {
    rootful(|daemon| {
        let _main = daemon.pod("web")?.idle("main")?;
        for (arguments, code, said) in [
            (&["exec", "web", "sh", "-c", "exit 9"][..], 9, ""),
            (&["exec", "web", "sh", "-c", "kill -9 $$"], 137, ""),
            (&["exec", "web", "no-such-program"], 127, "no-such-program"),
            (&["exec", "web", "/etc/passwd"], 126, "/etc/passwd"),
            (&["exec", "-t", "web", "no-such-program"], 127, "no-such-program"),
            (&["exec", "nowhere", "true"], 125, "`nowhere`"),
            (&["exec", "--no-such-option", "web", "true"], 125, "--no-such-option"),
        ] {
            let output = berth(daemon, arguments)?.output()?;
            assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
            assert!(String::from_utf8_lossy(&output.stderr).contains(said), "{arguments:?}: {output:?}");
        }
        Ok(())
    })
}

#[test]
fn streams_of_exec_are_apart_binary_and_whole() -> Result<()> {
    const LENGTH: usize = 100 * 1024 * 1024;
    rootful(|daemon| {
        let main = daemon.pod("web")?.idle("main")?;
        let output = berth(daemon, &["exec", "web", "sh", "-c", "echo out; echo err >&2"])?.output()?;
        assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        // Without -i there is no input.
        let mut command = berth(daemon, &["exec", "web", "wc", "-c"])?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let _write_to_nobody = child.stdin.take().context("stdin")?.write_all(b"ignored");
        assert_eq!(child.wait_with_output()?.stdout, b"0\n");

        // Pseudo-random bytes, the same at each run.
        let mut state = 88_172_645_463_325_252_u64;
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .flatten()
        .take(LENGTH)
        .collect();
        let sum = Sha256::digest(&bytes);
        // The end of the input is passed on separately: the program answers after it.
        let mut command = berth(daemon, &["exec", "-i", "web", "sh", "-c", "cat >/tmp/all; cat /tmp/all"])?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("stdin")?;
        let writing = std::thread::spawn(move || stdin.write_all(&bytes));
        let output = child.wait_with_output()?;
        writing.join().expect("the writer does not panic")?;
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(output.stdout.len(), LENGTH);
        assert!(Sha256::digest(&output.stdout) == sum, "the bytes are others");
        main.sh("rm /tmp/all")?;
        // Input that cannot be read is not taken for an empty one.
        let mut command = berth(daemon, &["exec", "-i", "web", "cat"])?;
        let output = command.stdin(fs::File::open("/")?).output()?;
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        // Bytes that are no keys, since they are not typed, do not detach: ctrl-p, ctrl-q.
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        let run = ["run", "-i", "--name", "job", "--log-dir", &logs, berth_tests::daemon::IMAGE, "cat"];
        let mut child = berth(daemon, &run)?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        child.stdin.take().context("stdin")?.write_all(b"a\x10\x11b")?;
        assert_eq!(child.wait_with_output()?.stdout, b"a\x10\x11b");
        Ok(())
    })
}

#[test]
fn a_run_misses_nothing_of_what_its_program_says_first() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        for _ in 0..10 {
            for option in ["-t", "-i", "-it"] {
                let mut command = berth(
                    daemon,
                    &["run", option, "--log-dir", &logs, berth_tests::daemon::IMAGE, "echo", "hello"],
                )?;
                let output = command.stdin(Stdio::null()).output()?;
                let shown = String::from_utf8_lossy(&output.stdout);
                ensure!(output.status.success() && shown.trim_end() == "hello", "{option}: {output:?}");
            }
        }
        Ok(())
    })
}

#[test]
fn what_is_typed_just_before_the_keys_to_detach_is_the_programs() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        let script = "echo ready; while read line; do echo $line >>/tmp/lines; done";
        let arguments = [
            "run",
            "-it",
            "--name",
            "job",
            "--log-dir",
            &logs,
            berth_tests::daemon::IMAGE,
            "sh",
            "-c",
            script,
        ];
        let attach = ["attach", "job"];
        let mut expected = String::new();
        for number in 0..10 {
            let terminal = Terminal::open(80, 24)?;
            let program = terminal.run(&berth(daemon, if number == 0 { &arguments } else { &attach })?)?;
            terminal.becomes_raw()?;
            if number == 0 {
                terminal.shows("ready\r\n")?;
            } else {
                // It is attached when it echoes.
                terminal.types("x")?;
                terminal.shows("x")?;
                expected.push('x');
            }
            terminal.types(&format!("line {number}\n\x10\x11"))?;
            assert!(program.ended()?.success());
            expected += &format!("line {number}\n");
            within(SOON, "the line has come", || {
                let read = berth(daemon, &["exec", "job", "cat", "/tmp/lines"])?.output()?.stdout;
                Ok((String::from_utf8_lossy(&read) == expected).then_some(()))
            })?;
        }
        Ok(())
    })
}

#[test]
fn a_run_whose_terminal_goes_away_leaves_nothing_behind() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        for sent in [Signal::SIGHUP, Signal::SIGQUIT] {
            let run =
                ["run", "--name", "job", "--log-dir", &logs, berth_tests::daemon::IMAGE, "sleep", "4321"];
            let mut child = berth(daemon, &run)?.spawn()?;
            within(SOON, "it runs", || {
                let listed = berth(daemon, &["ps"])?.output()?.stdout;
                Ok(String::from_utf8_lossy(&listed).contains("job/main").then_some(()))
            })?;
            signal(&child, sent)?;
            within(SOON, "the command has ended", || Ok(child.try_wait()?))?;
            let pods = berth(daemon, &["pods", "--quiet"])?.output()?;
            ensure!(pods.status.success() && pods.stdout.is_empty(), "{sent}: {pods:?}");
            assert_eq!(fs::read_dir(&logs)?.count(), 0);
        }
        // One that ignores it goes on.
        let run = ["run", "--name", "job", "--log-dir", &logs, berth_tests::daemon::IMAGE, "sh", "-c"];
        let script = "echo started; while [ ! -e /tmp/end ]; do sleep 0.05; done; echo ended";
        let told = berth(daemon, &run)?;
        let mut nohup = Command::new("nohup");
        nohup.arg(told.get_program()).args(told.get_args()).arg(script).env("BERTH_SOCKET", daemon.socket());
        let child = nohup.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        within(SOON, "it runs", || {
            let log = berth(daemon, &["logs", "job"])?.output()?.stdout;
            Ok((log == b"started\n").then_some(()))
        })?;
        signal(&child, Signal::SIGHUP)?;
        ensure!(berth(daemon, &["exec", "job", "touch", "/tmp/end"])?.status()?.success());
        let output = child.wait_with_output()?;
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"started\nended\n"[..]));
        Ok(())
    })
}

/// The sockets that a process has open.
fn sockets(child: &Child) -> Result<usize> {
    let links = fs::read_dir(format!("/proc/{}/fd", child.id()))?;
    let is_socket = |entry: std::io::Result<fs::DirEntry>| {
        let target = entry.and_then(|entry| fs::read_link(entry.path()));
        target.is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
    };
    Ok(links.map(is_socket).filter(|is_one| *is_one).count())
}

#[test]
fn run_on_a_terminal_is_left_by_keys_joined_again_and_ends_with_its_program() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        let terminal = Terminal::open(101, 31)?;
        let before = terminal.settings()?;
        let script = "until stty size | grep -q '31 101'; do sleep 0.05; done; echo ready
            while read line; do echo \"heard $line\"; [ \"$line\" != bye ] || exit 7; done";
        let image = berth_tests::daemon::IMAGE;
        let run = ["run", "-it", "--name", "job", "--log-dir", &logs, image, "sh", "-c", script];
        let program = terminal.run(&berth(daemon, &run)?)?;
        terminal.becomes_raw()?;
        terminal.shows("ready\r\n")?;
        // The first key alone is not the keys: it is the program's.
        terminal.types("one\r")?;
        terminal.shows("heard one\r\n")?;
        terminal.types("\x10\x11")?;
        assert_eq!(program.ended()?.code(), Some(0));
        terminal.shows("detached")?;
        assert!(terminal.settings()? == before, "the settings are those of before");
        // Other keys, on another terminal.
        let terminal = Terminal::open(80, 24)?;
        let attach = berth(daemon, &["attach", "--detach-keys", "ctrl-x,y", "job"])?;
        let program = terminal.run(&attach)?;
        terminal.becomes_raw()?;
        terminal.types("two\r")?;
        terminal.shows("heard two\r\n")?;
        terminal.types("\x18y")?;
        assert_eq!(program.ended()?.code(), Some(0));
        // And to its end.
        let terminal = Terminal::open(80, 24)?;
        let program = terminal.run(&berth(daemon, &["attach", "job"])?)?;
        terminal.becomes_raw()?;
        terminal.types("bye\r")?;
        terminal.shows("heard bye\r\n")?;
        assert_eq!(program.ended()?.code(), Some(7));
        Ok(())
    })
}

#[test]
fn a_program_of_exec_that_is_detached_from_keeps_running() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("web")?.idle("main")?;
        // It writes more than its terminal holds after everybody has left.
        let script = "stty -echo; echo ready; read line; echo $line >/tmp/line; until [ -e /tmp/end ]; do echo 4321; done; \
                      echo ended >>/tmp/line; sleep 4322";
        let terminal = Terminal::open(80, 24)?;
        let program = terminal.run(&berth(daemon, &["exec", "-it", "web", "sh", "-c", script])?)?;
        terminal.becomes_raw()?;
        terminal.shows("ready\r\n")?;
        terminal.types("typed\n\x10\x11")?;
        assert_eq!(program.ended()?.code(), Some(0));
        terminal.shows("detached from the program")?;
        within(SOON, "it has the line", || Ok((main.sh("cat /tmp/line")? == "typed\n").then_some(())))?;
        main.sh("touch /tmp/end")?;
        within(SOON, "it goes on", || Ok((main.sh("cat /tmp/line")? == "typed\nended\n").then_some(())))?;
        there(&main, "sleep 4322")?;
        // Without keys, they are the program's.
        let terminal = Terminal::open(80, 24)?;
        let script = "stty raw -echo; echo ready; head -c 2 | od -An -tx1; sleep 4323";
        let arguments = ["exec", "-it", "--detach-keys", "", "web", "sh", "-c", script];
        let program = terminal.run(&berth(daemon, &arguments)?)?;
        terminal.becomes_raw()?;
        terminal.shows("ready")?;
        terminal.types("\x10\x11")?;
        terminal.shows("10 11")?;
        // Whoever leaves in another way takes the program along.
        program.signal(Signal::SIGTERM)?;
        gone(&main, "sleep 4323")?;
        there(&main, "sleep 4322")
    })
}

#[test]
fn a_command_that_waits_for_a_program_without_streams_can_be_interrupted() -> Result<()> {
    rootful(|daemon| {
        let logs = daemon.directory("logs")?.to_string_lossy().into_owned();
        let script = "until [ -e /tmp/go ]; do sleep 0.05; done; exec sleep 4321 </dev/null >/dev/null 2>&1";
        let run = ["run", "-d", "--name", "job", "--log-dir", &logs, berth_tests::daemon::IMAGE];
        ensure!(berth(daemon, &run)?.args(["sh", "-c", script]).status()?.success());
        let mut child = berth(daemon, &["attach", "job"])?.stdout(Stdio::null()).spawn()?;
        let mut most = 0;
        within(SOON, "the streams are there", || {
            let attached = sockets(&child)?;
            let grown = std::mem::replace(&mut most, attached) < attached;
            let listed = berth(daemon, &["exec", "job", "ps", "-o", "args"])?.output()?.stdout;
            Ok((!grown && attached > 0 && !listed.is_empty()).then_some(()))
        })?;
        ensure!(berth(daemon, &["exec", "job", "touch", "/tmp/go"])?.status()?.success());
        within(SOON, "the streams have ended", || Ok((sockets(&child)? < most).then_some(())))?;
        signal(&child, Signal::SIGTERM)?;
        let ended = within(SOON, "the command has ended", || Ok(child.try_wait()?))?;
        assert_eq!(ended.code(), Some(143));
        Ok(())
    })
}
