//! Attach: clients on the streams of a container's own program.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::pod::{Container, shell};
use berth_tests::streams::Command;
use tonic::Code;

/// Answers each line that it gets, on both outputs.
const ANSWER: &str = "while read line; do echo got $line; echo err $line >&2; done; echo over";

fn all(container: &Container) -> v1::AttachRequest {
    v1::AttachRequest {
        container_id: container.id.clone(),
        stdin: true,
        stdout: true,
        stderr: !container.status().is_ok_and(|status| status.log_path.is_empty()),
        tty: false,
    }
}

fn on_terminal(container: &Container) -> v1::AttachRequest {
    v1::AttachRequest { tty: true, stderr: false, ..all(container) }
}

/// Descriptors of a container's shim: they show whether a client is attached, which itself learns
/// nothing.
fn held(container: &Container) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", container.shim_pid()?))?.count())
}

/// Waits until the shim has so many descriptors.
fn holds(container: &Container, count: usize) -> Result<()> {
    within(SOON, "clients have come or left", || Ok((held(container)? == count).then_some(())))
}

/// What a client with all streams takes: an input has two ends.
const OF_A_CLIENT: usize = 4;

fn listening(name: &str, script: &str) -> v1::ContainerConfig {
    v1::ContainerConfig { stdin: true, ..shell(name, script) }
}

fn is_running(container: &Container) -> Result<()> {
    ensure!(container.status()?.state() == v1::ContainerState::ContainerRunning);
    Ok(())
}

fn ends(container: &Container) -> Result<v1::ContainerStatus> {
    within(SOON, "the container ends", || {
        let status = container.status()?;
        Ok((status.state() == v1::ContainerState::ContainerExited).then_some(status))
    })
}

#[test]
fn every_client_gets_the_output_from_then_on_and_its_input_reaches_the_program() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("attach")?;
        let main = pod.start(listening("main", ANSWER))?;
        let mut first = Command::attach(daemon, all(&main))?;
        first.say("one\n")?;
        assert_eq!(first.hear("got one\n")?, "got one\n");
        let mut second = Command::attach(daemon, all(&main))?;
        second.say("two\n")?;
        assert_eq!(second.hear("two\n")?, "got two\n");
        first.hear("got two\n")?;
        // One that leaves hurts neither the other nor the container.
        let before = held(&main)?;
        drop(first);
        holds(&main, before - OF_A_CLIENT)?;
        second.say("three\n")?;
        second.hear("got three\n")?;
        let mut only =
            Command::attach(daemon, v1::AttachRequest { stdin: false, stderr: false, ..all(&main) })?;
        holds(&main, before - OF_A_CLIENT + 1)?;
        let mut third = Command::attach(daemon, all(&main))?;
        third.say("four\n")?;
        for command in [&mut second, &mut third, &mut only] {
            command.hear("got four\n")?;
        }
        main.says("got four")?;
        main.stop(0)?;
        let [second, third, only] = [second, third, only].map(Command::finished);
        let (second, third) = (second?, third?);
        assert_eq!((second.stdout.as_str(), second.code()), ("", Some(0)));
        assert_eq!(second.stderr, "err two\nerr three\nerr four\n");
        assert_eq!(third.stderr, "err four\n");
        assert_eq!(only?.code(), Some(0));
        let log = main.ended()?;
        assert_eq!(log.stdout, "got one\ngot two\ngot three\ngot four\n");
        assert_eq!(log.stderr, "err one\nerr two\nerr three\nerr four\n");
        Ok(())
    })
}

#[test]
fn the_containers_end_ends_the_stream_after_all_its_output() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("attach")?;
        for (number, terminal) in [false, true].into_iter().enumerate() {
            let mut config = listening(&format!("c{number}"), "read go; seq 1 20000; echo last; exit 3");
            config.tty = terminal;
            let main = pod.start(config)?;
            let request = if terminal { on_terminal(&main) } else { all(&main) };
            let command = Command::attach(daemon, request)?;
            command.say("go\n")?;
            let finished = command.finished()?;
            assert_eq!(finished.code(), Some(0), "it says nothing of the program's own code");
            let lines: Vec<&str> = finished.stdout.lines().filter(|line| *line != "go").collect();
            assert_eq!((lines.len(), lines.last().copied()), (20_001, Some("last")));
            assert_eq!(ends(&main)?.exit_code, 3);
        }
        Ok(())
    })
}

#[test]
fn input_for_one_client_ends_with_it_and_other_input_does_not() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("attach")?;
        // By its end, and by a client that vanishes.
        for vanishes in [false, true] {
            let mut config = listening(&format!("once-{vanishes}"), "cat; echo over; exit 4");
            config.stdin_once = true;
            let main = pod.start(config)?;
            let mut command = Command::attach(daemon, all(&main))?;
            command.say("hello\n")?;
            command.hear("hello\n")?;
            if vanishes {
                drop(command);
            } else {
                command.end_input()?;
                let finished = command.finished()?;
                assert_eq!((finished.stdout.as_str(), finished.code()), ("over\n", Some(0)));
            }
            assert_eq!(ends(&main)?.exit_code, 4);
        }
        let main = pod.start(listening("more", ANSWER))?;
        for vanishes in [true, false, true] {
            let mut command = Command::attach(daemon, all(&main))?;
            command.say("hello\n")?;
            command.hear("got hello\n")?;
            if !vanishes {
                // The client has nothing more to do here.
                command.end_input()?;
                assert_eq!(command.finished()?.code(), Some(0));
            }
            is_running(&main)?;
        }
        // Unread input of a client that leaves.
        let mut config = listening("deaf", "echo up; sleep 1000");
        config.stdin_once = true;
        let deaf = pod.start(config)?;
        deaf.says("up")?;
        let command = Command::attach(daemon, all(&deaf))?;
        command.say(vec![b'x'; 16 * 1024])?;
        drop(command);
        is_running(&deaf)?;
        // And for a program that has none.
        let without = pod.start(shell("without", "echo up; read x; echo read $?; sleep 1000"))?;
        without.says("read 1")?;
        let command = Command::attach(daemon, all(&without))?;
        command.say("x\n")?;
        is_running(&without)?;
        Ok(())
    })
}

#[test]
fn a_terminal_has_the_size_of_whoever_changed_it_last() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("attach")?;
        let mut config = listening("main", "while read line; do tty; stty size; done");
        config.tty = true;
        config.stdin_once = true;
        let main = pod.start(config)?;
        let size = |command: &mut Command, rows: &str| {
            within(SOON, "the size has changed", || {
                command.say("x\n")?;
                Ok(command.hear("\r\n")?.contains(rows).then_some(()))
            })
        };
        let mut first = Command::attach(daemon, on_terminal(&main))?;
        first.resize(100, 40)?;
        first.say("x\n")?;
        first.hear("/dev/pts/0\r\n")?;
        size(&mut first, "40 100")?;
        let mut second = Command::attach(daemon, on_terminal(&main))?;
        second.resize(90, 30)?;
        size(&mut second, "30 90")?;
        first.resize(80, 20)?;
        size(&mut second, "20 80")?;
        // Neither ends the terminal's input.
        drop((first, second));
        let mut third = Command::attach(daemon, on_terminal(&main))?;
        size(&mut third, "20 80")?;
        // What the client thinks of the terminal does not matter.
        let mut plain = Command::attach(daemon, all(&main))?;
        plain.say("x\n")?;
        plain.hear("/dev/pts/0\r\n")?;
        Ok(())
    })
}

#[test]
fn a_container_can_be_attached_to_before_its_start_and_not_after_its_end() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("attach")?;
        let main = pod.create(listening("main", "echo first; read line; echo got $line"))?;
        let before = held(&main)?;
        let mut command = Command::attach(daemon, all(&main))?;
        holds(&main, before + OF_A_CLIENT)?;
        main.start()?;
        command.hear("first\n")?;
        command.say("it\n")?;
        assert_eq!(command.finished()?.stdout, "got it\n");
        let client = daemon.client();
        let refused = |request: v1::AttachRequest| {
            client.attach(request.clone()).err().with_context(|| format!("{request:?}"))
        };
        ends(&main)?;
        let ended = refused(all(&main))?;
        assert_eq!(ended.code(), Code::FailedPrecondition, "{ended}");
        let running = pod.idle("running")?;
        for (request, code) in [
            (v1::AttachRequest { container_id: "0".repeat(64), ..all(&running) }, Code::NotFound),
            (v1::AttachRequest { tty: true, ..all(&running) }, Code::InvalidArgument),
            (
                v1::AttachRequest { stdin: false, stdout: false, stderr: false, ..all(&running) },
                Code::InvalidArgument,
            ),
        ] {
            let refused = refused(request)?;
            assert_eq!(refused.code(), code, "{refused}");
        }
        // A container that ends between the call and the client.
        let url = client.attach(all(&running))?.url;
        running.stop(0)?;
        let finished = Command::attach_at(daemon, &url, &all(&running))?.finished()?;
        assert_eq!(finished.status["reason"], "InternalError", "{finished:?}");
        Ok(())
    })
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody_and_is_told_what_it_lost() -> Result<()> {
    const WRITTEN: usize = 100_000_000;
    rootful(|daemon| {
        let pod = daemon.pod("attach")?;
        let script = format!("read go; head -c {WRITTEN} /dev/zero | tr '\\0' x; exit 5");
        let mut config = listening("main", &script);
        // A log of that length says nothing.
        config.log_path = String::new();
        let main = pod.start(config)?;
        let request = v1::AttachRequest { stderr: false, ..all(&main) };
        let before = held(&main)?;
        let deaf = Command::attach(daemon, request.clone())?;
        holds(&main, before + OF_A_CLIENT - 1)?;
        let going = Command::attach(daemon, request)?;
        going.say("go\n")?;
        // It ends, although nothing was read.
        assert_eq!(ends(&main)?.exit_code, 5);
        for command in [deaf, going] {
            let finished = command.finished()?;
            assert_eq!(finished.code(), Some(0));
            let said = finished.stdout.split_once("[berth: ").context("it is told")?.1;
            let first: usize = said.split(' ').next().context("a number")?.parse()?;
            let kept = finished.stdout.bytes().filter(|byte| *byte == b'x').count();
            let lost: usize = finished
                .stdout
                .split("[berth: ")
                .skip(1)
                .filter_map(|rest| rest.split(' ').next()?.parse::<usize>().ok())
                .sum();
            ensure!(first > 0 && kept + lost == WRITTEN, "{kept} and {lost}");
        }
        Ok(())
    })
}

#[test]
fn a_new_daemon_can_be_attached_to_and_the_container_notices_nothing() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("attach")?;
        let main = pod.start(listening("main", ANSWER))?;
        for crash in [true, false] {
            let mut command = Command::attach(daemon, all(&main))?;
            command.say("hello\n")?;
            command.hear("got hello\n")?;
            if crash {
                daemon.crash()?;
            } else {
                daemon.stop()?;
                daemon.start_again()?;
            }
            ensure!(command.finished().is_err(), "no status was made up");
            is_running(&main)?;
        }
        let mut command = Command::attach(daemon, all(&main))?;
        command.say("again\n")?;
        command.hear("got again\n")?;
        Ok(())
    })
}

#[test]
fn clients_that_typed_more_than_is_read_and_left_are_not_kept_in_any_number() -> Result<()> {
    const MANY: usize = 40;
    /// What is kept of them: two descriptors each.
    const KEPT: usize = 2 * 8;
    rootful(|daemon| {
        let pod = daemon.pod("attach")?;
        let deaf =
            pod.start(listening("deaf", "echo up; while [ ! -e /tmp/go ]; do sleep 0.05; done; wc -c"))?;
        deaf.says("up")?;
        // What the first exec leaves is not the question.
        deaf.sh("true")?;
        let before = held(&deaf)?;
        for _ in 0..MANY {
            let command = Command::attach(daemon, v1::AttachRequest { stdout: false, ..all(&deaf) })?;
            command.say(vec![b'x'; 16 * 1024])?;
            // The daemon has passed on everything when it is answered.
            command.end_input()?;
            assert_eq!(command.finished()?.code(), Some(0));
        }
        within(SOON, "who has left is forgotten", || Ok((held(&deaf)? <= before + KEPT).then_some(())))?;
        ensure!(held(&deaf)? > before, "what the last ones typed may be read yet");
        ensure!(deaf.sh("echo alive")? == "alive\n");
        // The program reads on, and has what was kept.
        deaf.sh("touch /tmp/go")?;
        holds(&deaf, before)?;
        Ok(())
    })
}

#[test]
fn no_more_clients_are_attached_than_there_are_places() -> Result<()> {
    const PLACES: usize = 256;
    rootful(|daemon| {
        let main = daemon.pod("attach")?.start(listening("main", ANSWER))?;
        let before = held(&main)?;
        let request = v1::AttachRequest { stdin: false, stderr: false, ..all(&main) };
        let mut commands = (1..PLACES)
            .map(|_| Command::attach(daemon, request.clone()))
            .collect::<Result<Vec<Command>>>()?;
        // Good for a minute, in which there may be time for one client, and not for all.
        let late = daemon.client().attach(request.clone())?.url;
        commands.push(Command::attach(daemon, request.clone())?);
        holds(&main, before + PLACES)?;
        let refused = daemon.client().attach(request.clone()).err().context("there is no place")?;
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        // So is one with an earlier URL.
        let finished = Command::attach_at(daemon, &late, &request)?.finished()?;
        assert_eq!(finished.status["reason"], "InternalError", "{finished:?}");
        commands.truncate(PLACES - 1);
        holds(&main, before + PLACES - 1)?;
        let mut next = within(SOON, "there is a place", || Ok(Command::attach(daemon, all(&main)).ok()))?;
        next.say("hello\n")?;
        next.hear("got hello\n")?;
        Ok(())
    })
}

/// Resident memory of a process, in KiB.
fn resident(pid: impl std::fmt::Display) -> Result<usize> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    // Not of files: pages of the programs count for less as long as daemons of other tests have
    // them too.
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).context("Pss_Anon")?;
    Ok(pss.trim().trim_end_matches(" kB").parse()?)
}

#[test]
fn an_idle_stream_costs_little() -> Result<()> {
    const MANY: usize = 200;
    /// Of the daemon and the shim, in KiB.
    const MOST: usize = 32;
    rootful(|daemon: &Daemon| {
        let pod = daemon.pod("attach")?;
        let main = pod.start(listening("main", ANSWER))?;
        let shim = main.shim_pid()?;
        let attach = |count: usize| -> Result<Vec<Command>> {
            let (mut commands, before) = (Vec::new(), held(&main)?);
            for _ in 0..count {
                commands.push(Command::attach(daemon, all(&main))?);
            }
            holds(&main, before + count * OF_A_CLIENT)?;
            // All of them are there, and have been woken.
            if let Some(command) = commands.first() {
                command.say("hello\n")?;
            }
            for command in &mut commands {
                command.hear("got hello\n")?;
            }
            Ok(commands)
        };
        // What the daemon takes once for all.
        let alone = held(&main)?;
        drop(attach(20)?);
        holds(&main, alone)?;
        let measure = || Ok::<_, anyhow::Error>(resident(daemon.pid()?)? + resident(shim)?);
        let before = measure()?;
        let commands = attach(MANY)?;
        let each = measure()?.saturating_sub(before) / MANY;
        ensure!((1..=MOST).contains(&each), "{each} KiB");
        drop(commands);
        Ok(())
    })
}
