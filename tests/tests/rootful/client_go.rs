//! The library that kubectl streams with, `client-go`, in a program of `tests/peers/streams`:
//! commands and forwarded ports over both of its transports.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::peers;
use berth_tests::pod::{Container, shell, words};
use berth_tests::repeats::repeats;
use berth_tests::streams::Command;

use crate::stream_faults::resident;
use crate::streams::piped;

const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// More than pipes, windows and sockets hold.
const MANY_BYTES: usize = 100 * 1000 * 1000;

/// The program with `arguments`, its streams piped.
fn streams(daemon: &Daemon, arguments: &[&str]) -> Result<Child> {
    let program = peers::directory("streams")?.join("streams");
    let mut command = daemon.host().command(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().context("starting the program")
}

fn url(container: &Container, daemon: &Daemon, command: &[&str], tty: bool) -> Result<String> {
    let request = v1::ExecRequest {
        container_id: container.id.clone(),
        cmd: words(command),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    Ok(daemon.client().exec(request)?.url)
}

/// Output, messages and exit code of a program that gets `input`.
fn run(mut child: Child, input: Vec<u8>) -> Result<(Vec<u8>, String, Option<i32>)> {
    let mut stdin = child.stdin.take().context("its input")?;
    // One that ends without reading everything breaks the pipe.
    let writing = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output()?;
    ensure!(writing.join().is_ok(), "the writing thread panicked");
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.stdout, messages, output.status.code()))
}

#[test]
fn commands_have_their_streams_and_exit_codes_over_both_transports() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("kubectl")?.idle("main")?;
        for transport in TRANSPORTS {
            let command = |words: &[&str], input: &[u8]| -> Result<_> {
                let url = url(&main, daemon, words, false)?;
                run(streams(daemon, &["run", transport, &url])?, input.to_vec())
            };
            let (out, messages, code) =
                command(&["sh", "-c", "cat; echo to stderr >&2; exit 42"], b"to stdin\n")?;
            assert_eq!((out.as_slice(), code), (&b"to stdin\n"[..], Some(42)), "{transport}: {messages}");
            ensure!(messages.starts_with("to stderr\n"), "{transport}: {messages}");

            let (_, messages, code) = command(&["/no/such/program"], b"")?;
            assert_eq!(code, Some(125), "{transport}: {messages}");
            ensure!(messages.contains("/no/such/program"), "{transport}: {messages}");

            let (out, messages, code) = command(&["sh", "-c", "kill -KILL $$"], b"")?;
            assert_eq!((out.len(), code), (0, Some(137)), "{transport}: {messages}");
        }
        Ok(())
    })
}

#[test]
fn no_byte_is_lost_in_either_direction() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("kubectl")?.idle("main")?;
        let input: Vec<u8> = (0..MANY_BYTES / 8).flat_map(|number| (number as u64).to_le_bytes()).collect();
        for transport in TRANSPORTS {
            let url = url(&main, daemon, &["cat"], false)?;
            let (out, messages, code) = run(streams(daemon, &["run", transport, &url])?, input.clone())?;
            assert_eq!((out.len(), code), (input.len(), Some(0)), "{transport}: {messages}");
            ensure!(out == input, "{transport}: other bytes came back");
        }
        Ok(())
    })
}

#[test]
fn a_terminal_has_its_size_and_its_program_the_exit_code() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("kubectl")?.idle("main")?;
        for transport in TRANSPORTS {
            // Before it has a size, stty complains.
            let script = "while ! stty size 2>/dev/null | grep -qx '33 111'; do sleep 0.05; done
                echo sized; read line; echo heard $line; exit 5";
            let url = url(&main, daemon, &["sh", "-c", script], true)?;
            let mut child = streams(daemon, &["run", transport, &url, "111x33"])?;
            let mut stdin = child.stdin.take().context("its input")?;
            let mut out = BufReader::new(child.stdout.take().context("its output")?);
            let mut line = String::new();
            out.read_line(&mut line)?;
            assert_eq!(line, "sized\r\n", "{transport}");
            stdin.write_all(b"hello\n")?;
            let mut rest = String::new();
            out.read_to_string(&mut rest)?;
            assert_eq!(rest, "hello\r\nheard hello\r\n", "{transport}");
            assert_eq!(child.wait()?.code(), Some(5), "{transport}");
        }
        Ok(())
    })
}

#[test]
fn many_short_commands_leave_the_daemon_as_it_was() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("kubectl")?.idle("main")?;
        let held = || -> Result<(usize, usize)> {
            let process = std::path::PathBuf::from(format!("/proc/{}", daemon.pid()?));
            Ok((process.join("fd").read_dir()?.count(), process.join("task").read_dir()?.count()))
        };
        let turn = |number: usize| -> Result<()> {
            let url = url(&main, daemon, &["sh", "-c", &format!("exit {}", number % 100)], false)?;
            let transport = TRANSPORTS[number % 2];
            let (_, messages, code) = run(streams(daemon, &["run", transport, &url])?, Vec::new())?;
            ensure!(code == i32::try_from(number % 100).ok(), "{transport}: {code:?} {messages}");
            Ok(())
        };
        // A client in this process, which takes less time.
        let quick = |number: usize| -> Result<()> {
            let code = i32::try_from(number % 100)?;
            let request = piped(&main, &["sh", "-c", &format!("exit {code}")]);
            assert_eq!(Command::start(daemon, request)?.finished()?.code(), Some(code));
            Ok(())
        };
        for number in 0..20 {
            turn(number)?;
            quick(number)?;
        }
        let (before, memory) = (held()?, resident(daemon)?);
        for number in 0..repeats(100)? {
            turn(number)?;
        }
        for number in 0..repeats(400)? {
            quick(number)?;
        }
        let more = resident(daemon)?.saturating_sub(memory);
        // What the allocator of each thread keeps, and not 4 KiB of each command.
        ensure!(more < 2000, "the daemon holds {more} KiB more");
        berth_tests::deadline::within(
            berth_tests::daemon::SOON,
            "descriptors and threads are given back",
            || {
                let now = held()?;
                ensure!(now.0 <= before.0 && now.1 <= before.1, "{before:?} before, {now:?} now");
                Ok(Some(()))
            },
        )
    })
}

/// What is sent through each forwarded connection, in bytes.
const SENT: usize = 300_000;

/// The local ports that the program says it listens on, in the order of the pod's ports.
fn local_ports(out: &mut impl std::io::BufRead, count: usize) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for _ in 0..count {
        let mut line = String::new();
        out.read_line(&mut line)?;
        let local = line.strip_prefix("Forwarding from 127.0.0.1:").and_then(|rest| rest.split_once(' '));
        let (local, _) = local.with_context(|| format!("it says {line:?}"))?;
        ports.push(local.parse()?);
    }
    Ok(ports)
}

#[test]
fn ports_are_forwarded_for_many_connections_at_once() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("kubectl")?;
        // One gives back what it gets, the other its length.
        let server = pod.start(shell("server", "nc -ll -p 8080 -e cat & nc -ll -p 8081 -e wc -c & wait"))?;
        berth_tests::deadline::within(berth_tests::daemon::SOON, "both ports are listened on", || {
            Ok((server.sh("netstat -ltn")?.matches(":808").count() == 2).then_some(()))
        })?;
        for transport in TRANSPORTS {
            let request = v1::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080, 8081] };
            let url = daemon.client().port_forward(request)?.url;
            let mut child = streams(daemon, &["forward", transport, &url, "8080", "8081", "9"])?;
            let mut out = BufReader::new(child.stdout.take().context("its output")?);
            let ports = local_ports(&mut out, 3)?;
            let exchange = |local: u16, expected: &[u8]| -> Result<()> {
                let mut stream = daemon.host().inside(|| Ok(TcpStream::connect(("127.0.0.1", local))?))?;
                let mut writing = stream.try_clone()?;
                let write = std::thread::spawn(move || {
                    // Without a listener the connection is closed, sooner or later.
                    let _ = writing.write_all(&[b'x'; SENT]).and_then(|()| writing.shutdown(Shutdown::Write));
                });
                let mut heard = Vec::new();
                let read = stream.read_to_end(&mut heard);
                ensure!(write.join().is_ok(), "the writing thread panicked");
                ensure!(
                    heard == expected,
                    "{transport}: {} bytes for {}, {read:?}",
                    heard.len(),
                    expected.len()
                );
                Ok(())
            };
            let (same, length) = ([b'x'; SENT], format!("{SENT}\n"));
            std::thread::scope(|scope| -> Result<()> {
                let exchange = &exchange;
                let all: Vec<_> = (0..8)
                    .map(|number| {
                        let (local, expected) = if number % 2 == 0 {
                            (ports[0], &same[..])
                        } else {
                            (ports[1], length.as_bytes())
                        };
                        scope.spawn(move || exchange(local, expected))
                    })
                    .collect();
                for one in all {
                    one.join().ok().context("a thread panicked")??;
                }
                Ok(())
            })?;
            exchange(ports[0], &same)?;
            // The library gives up as a whole when the runtime says that one connection failed.
            exchange(ports[2], b"")?;
            let output = child.wait_with_output()?;
            let messages = String::from_utf8_lossy(&output.stderr);
            ensure!(messages.contains("port 9"), "{transport}: {messages}");
        }
        Ok(())
    })
}
