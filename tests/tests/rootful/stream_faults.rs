//! What streaming clients do that no good one does, and a server that cannot listen.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_streaming::spdy::{Encoder, Headers};
use berth_tests::daemon::{Daemon, SOON, Setup, rootful, rootful_with};
use berth_tests::deadline::{patience, within};
use berth_tests::pod::shell;
use berth_tests::streams::{Command, ask, dial};
use bytes::BytesMut;
use tonic::Code;

use crate::forward::{forward, greeted, serve};
use crate::streams::{forward_url, piped};

/// The resident memory of the daemon in KiB that is its own.
pub(crate) fn resident(daemon: &Daemon) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.split_whitespace().next().context("no number")?.parse()?)
}

#[test]
fn what_a_hostile_client_sends_and_nobody_reads_takes_little_memory() -> Result<()> {
    const STREAMS: u32 = 1000;
    rootful(|daemon| {
        let pod = daemon.pod("streams")?;
        // The first connection makes what all of them use.
        let main = pod.idle("main")?;
        Command::start(daemon, piped(&main, &["true"]))?.finished()?;
        let before = resident(daemon)?;
        let mut clients = Vec::new();
        for _ in 0..4 {
            let url = forward_url(daemon, &pod.id)?;
            let (mut stream, path) = dial(daemon, &url)?;
            ensure!(ask(&mut stream, path, "portforward.k8s.io")?.starts_with("HTTP/1.1 101 "), "no upgrade");
            // Data streams whose error streams never come: they are not read.
            let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
            for number in 0..STREAMS {
                let (port, id) = ("80", number.to_string());
                let headers = Headers::of(&[("streamType", "data"), ("port", port), ("requestID", &id)]);
                encoder.syn_stream(2 * number + 1, &headers, &mut bytes);
            }
            stream.write_all(&bytes)?;
            let frames = (0..STREAMS).cycle().map(|number| {
                bytes.clear();
                Encoder::data(2 * number + 1, 16 * 1024, false, &mut bytes);
                bytes.resize(bytes.len() + 16 * 1024, 7);
                bytes.to_vec()
            });
            flood(&mut stream, frames)?;
            clients.push(stream);
        }
        let more = resident(daemon)?.saturating_sub(before) / 4;
        // A budget of 1 MiB, 4 KiB for each stream, and what the allocator keeps.
        ensure!(more < 8 * 1024, "a client makes the daemon hold {more} KiB");
        // And others are served.
        assert_eq!(Command::start(daemon, piped(&main, &["true"]))?.finished()?.code(), Some(0));
        Ok(())
    })
}

#[test]
fn a_client_whose_machine_vanishes_while_output_comes_takes_its_program_along() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let mut command = Command::start(daemon, piped(&main, &["sh", "-c", "echo up; exec yes 4321"]))?;
        command.hear("4321\n4321")?;
        // Nothing arrives any more, without notice.
        daemon.host().run("ip", &["link", "set", "lo", "down"])?;
        within(2 * SOON, "the program is gone", || {
            Ok((!main.sh("ps -o args")?.contains("yes 4321")).then_some(()))
        })?;
        Ok(())
    })
}

/// Sends frames of 16 KiB until the server takes no more: that is in its socket's buffers and ours.
fn flood(stream: &mut TcpStream, frames: impl Iterator<Item = Vec<u8>>) -> Result<()> {
    stream.set_nonblocking(true)?;
    let mut full = None;
    for frame in frames.take(32 * 1024) {
        let mut rest = &frame[..];
        while !rest.is_empty() {
            match stream.write(rest) {
                Ok(length) => {
                    rest = &rest[length..];
                    full = None;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let since = *full.get_or_insert_with(Instant::now);
                    if since.elapsed() > Duration::from_secs(1) {
                        return Ok(());
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    anyhow::bail!("the server takes whatever comes")
}

/// Its close is behind what is not read, so TCP does not deliver it.
#[test]
fn a_client_that_closes_behind_input_that_is_not_read_takes_its_program_along() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let request = |seconds: &str| v1::ExecRequest {
            container_id: main.id.clone(),
            cmd: vec!["sleep".to_owned(), seconds.to_owned()],
            stdin: true,
            stdout: true,
            ..v1::ExecRequest::default()
        };
        let [spdy_url, websocket_url] =
            ["2001", "2002"].map(|seconds| daemon.client().exec(request(seconds)));
        let (spdy_url, websocket_url) = (spdy_url?.url, websocket_url?.url);
        let (mut spdy, path) = dial(daemon, &spdy_url)?;
        ensure!(ask(&mut spdy, path, "v4.channel.k8s.io")?.starts_with("HTTP/1.1 101 "), "no upgrade");
        let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
        for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout")] {
            encoder.syn_stream(id, &Headers::of(&[("streamType", kind)]), &mut bytes);
        }
        spdy.write_all(&bytes)?;
        bytes.clear();
        Encoder::data(3, 16 * 1024, false, &mut bytes);
        bytes.resize(bytes.len() + 16 * 1024, 7);
        flood(&mut spdy, std::iter::repeat(bytes.to_vec()))?;

        let (mut websocket, path) = dial(daemon, &websocket_url)?;
        let upgrade = format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        );
        websocket.write_all(upgrade.as_bytes())?;
        // A masked message of 16,000 bytes on channel 0, with a mask of zeros.
        let mut frame = vec![0x82, 0x80 | 126, 0x3e, 0x80];
        frame.resize(4 + 4 + 16_000, 0);
        flood(&mut websocket, std::iter::repeat(frame))?;

        let programs = || main.sh("ps -o args");
        ensure!(programs()?.contains("sleep 2001") && programs()?.contains("sleep 2002"), "they run");
        drop((spdy, websocket));
        within(SOON, "the programs are gone", || Ok((!programs()?.contains("sleep 200")).then_some(())))?;
        Ok(())
    })
}

#[test]
fn ports_are_forwarded_on_the_channels_of_a_websocket() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("ports")?;
        let main = pod.start(shell("main", "nc -ll -p 8080 -e cat & sleep 1000 & wait"))?;
        within(SOON, "it listens", || Ok(main.sh("netstat -ltn")?.contains(":8080 ").then_some(())))?;
        let url = |port: Vec<i32>| -> Result<String> {
            let request = v1::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port };
            Ok(daemon.client().port_forward(request)?.url)
        };
        let ask = |url: &str| -> Result<TcpStream> {
            let (mut stream, path) = dial(daemon, url)?;
            stream.set_read_timeout(Some(patience(SOON)))?;
            let request = format!(
                "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                 Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                 Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
            );
            stream.write_all(request.as_bytes())?;
            Ok(stream)
        };
        for url in [url(vec![8080, 9])?, format!("{}?port=8080&port=9", url(vec![])?)] {
            let mut stream = ask(&url)?;
            // A masked frame on channel 0, with a mask of zeros.
            let hello = [&[0x82, 0x80 | 6, 0, 0, 0, 0, 0][..], b"hello"].concat();
            stream.write_all(&hello)?;
            let mut heard = Vec::new();
            let has = |heard: &[u8], part: &[u8]| heard.windows(part.len()).any(|window| window == part);
            // Both ports on all four channels, the echo, and why the second one failed.
            let (first, second) = (8080_u16.to_le_bytes(), 9_u16.to_le_bytes());
            let parts: Vec<Vec<u8>> = vec![
                b"101 Switching Protocols".to_vec(),
                [&[0x82, 3, 0][..], &first].concat(),
                [&[0x82, 3, 1][..], &first].concat(),
                [&[0x82, 3, 2][..], &second].concat(),
                [&[0x82, 3, 3][..], &second].concat(),
                [&[0x82, 6, 0][..], b"hello"].concat(),
                b"port 9 in sandbox".to_vec(),
            ];
            let mut buffer = [0; 4096];
            while !parts.iter().all(|part| has(&heard, part)) {
                let length = stream.read(&mut buffer).context("waiting for the rest")?;
                ensure!(length > 0, "closed after {}", String::from_utf8_lossy(&heard));
                heard.extend_from_slice(&buffer[..length]);
            }
        }
        let mut stream = ask(&url(vec![])?)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("?port=80"), "{answer}");
        Ok(())
    })
}

#[test]
fn an_address_in_use_delays_streams_and_nothing_else() -> Result<()> {
    let setup = Setup { configuration: "[streaming]\naddress = '127.0.0.1:41234'\n", ..Setup::default() };
    rootful_with(setup, |daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let request = piped(&main, &["true"]);
        ensure!(daemon.client().exec(request.clone())?.url.starts_with("http://127.0.0.1:41234/exec/"));
        daemon.stop()?;
        let listener = daemon.host().inside(|| Ok(std::net::TcpListener::bind("127.0.0.1:41234")?))?;
        daemon.start_again()?;
        let refused = daemon.client().exec(request.clone()).err().context("nobody listens")?;
        assert_eq!(refused.code(), Code::Unavailable);
        ensure!(
            refused.message().contains("127.0.0.1:41234") && refused.message().contains("in use"),
            "{refused}"
        );
        ensure!(daemon.log()?.contains("cannot listen on streaming.address"), "it is not in the log");
        assert_eq!(main.sh("echo served")?, "served\n");
        drop(listener);
        within(SOON, "the streaming server is listening", || Ok(daemon.client().exec(request.clone()).ok()))?;
        assert_eq!(Command::start(daemon, request)?.finished()?.code(), Some(0));
        Ok(())
    })
}

/// The command comes through a socket of its own.
#[test]
fn an_address_in_use_is_nothing_to_the_command() -> Result<()> {
    let setup = Setup { configuration: "[streaming]\naddress = '127.0.0.1:41235'\n", ..Setup::default() };
    rootful_with(setup, |daemon| {
        let pod = serve(daemon)?;
        let program = pod.start(shell("program", "while :; do echo alive; sleep 0.1; done"))?;
        daemon.stop()?;
        let _taken = daemon.host().inside(|| Ok(std::net::TcpListener::bind("127.0.0.1:41235")?))?;
        daemon.start_again()?;
        let refused = daemon.client().exec(piped(&program, &["true"])).err().context("nobody listens")?;
        assert_eq!(refused.code(), Code::Unavailable);

        let output =
            daemon.berth()?.args(["exec", "web/program", "sh", "-c", "echo here; exit 3"]).output()?;
        ensure!(output.status.code() == Some(3) && output.stdout == b"here\n", "{output:?}");
        let output = daemon.berth()?.args(["cp", "web/program:/etc/passwd", "-"]).output()?;
        ensure!(output.status.success() && !output.stdout.is_empty(), "{output:?}");
        greeted(daemon, &forward(daemon, &["web", ":8080"], 2)?.addresses[0])?;
        let mut attach = daemon.berth()?;
        let mut attached = attach.args(["attach", "web/program"]).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(attached.stdout.take().context("stdout")?).read_line(&mut line)?;
        let _ = attached.kill();
        attached.wait()?;
        assert_eq!(line, "alive\n");
        Ok(())
    })
}
