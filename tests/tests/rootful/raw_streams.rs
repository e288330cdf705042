//! Frames that no good client sends, byte by byte, and what the streaming server says to them.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Result, ensure};
use berth_streaming::spdy::connection::WINDOW;
use berth_streaming::spdy::{Decoder, Encoder, Frame, Headers, ResetStatus};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::pod::shell;
use berth_tests::streams::{Command, ask, dial};
use bytes::BytesMut;

use crate::stream_faults::resident;
use crate::streams::{forward_url, interactive, piped};

/// A SPDY client that sends what it is told to.
struct Raw {
    stream: TcpStream,
    encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
    /// What came on each stream.
    data: BTreeMap<u32, Vec<u8>>,
    resets: Vec<(u32, u32)>,
}

impl Raw {
    fn connect(daemon: &Daemon, url: &str, protocol: &str) -> Result<Self> {
        let (mut stream, path) = dial(daemon, url)?;
        let answer = ask(&mut stream, path, protocol)?;
        ensure!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        Ok(Self {
            stream,
            encoder: Encoder::default(),
            decoder: Decoder::default(),
            buffer: BytesMut::new(),
            data: BTreeMap::new(),
            resets: Vec::new(),
        })
    }

    fn open(&mut self, id: u32, headers: &[(&str, &str)]) -> Result<()> {
        let mut bytes = BytesMut::new();
        self.encoder.syn_stream(id, &Headers::of(headers), &mut bytes);
        Ok(self.stream.write_all(&bytes)?)
    }

    fn send(&mut self, id: u32, data: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(&frame(id, data))?)
    }

    /// Reads until `found` finds something.
    fn until<T>(&mut self, what: &str, found: impl Fn(&Self) -> Option<T>) -> Result<T> {
        loop {
            if let Some(found) = found(self) {
                return Ok(found);
            }
            let mut bytes = vec![0; 4096];
            let length = self.stream.read(&mut bytes)?;
            ensure!(length > 0, "closed before {what}: resets {:?}", self.resets);
            self.buffer.extend_from_slice(&bytes[..length]);
            while let Some(frame) = self.decoder.next(&mut self.buffer)? {
                match frame {
                    Frame::Data { stream, bytes, .. } => {
                        self.data.entry(stream).or_default().extend_from_slice(&bytes);
                    }
                    Frame::Reset { stream, status } => self.resets.push((stream, status)),
                    _ => {}
                }
            }
        }
    }

    fn hear(&mut self, stream: u32, text: &str) -> Result<()> {
        self.until(&format!("{text:?} on stream {stream}"), |it| {
            let heard = it.data.get(&stream).map(|bytes| String::from_utf8_lossy(bytes))?;
            heard.contains(text).then_some(())
        })
    }

    /// The status that a stream is reset with.
    fn reset(&mut self, stream: u32) -> Result<u32> {
        self.until(&format!("stream {stream} is reset"), |it| {
            it.resets.iter().find(|(reset, _)| *reset == stream).map(|(_, status)| *status)
        })
    }
}

fn frame(id: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    Encoder::data(id, data.len(), false, &mut bytes);
    bytes.extend_from_slice(data);
    bytes.to_vec()
}

#[test]
fn an_overrun_of_a_forwarded_connection_resets_it_and_no_other() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("streams")?;
        let main = pod.start(shell("main", "nc -ll -p 8080 -e cat & nc -ll -p 8081 -e sleep 1000 & wait"))?;
        within(SOON, "both ports are listened on", || {
            Ok((main.sh("netstat -ltn")?.matches(":808").count() == 2).then_some(()))
        })?;
        // The first connection makes what all of them use.
        Command::start(daemon, piped(&main, &["true"]))?.finished()?;
        let before = resident(daemon)?;
        let mut client = Raw::connect(daemon, &forward_url(daemon, &pod.id)?, "portforward.k8s.io")?;
        for (id, port, request) in [(1, "8081", "0"), (5, "8080", "1")] {
            for (id, kind) in [(id, "error"), (id + 2, "data")] {
                client.open(id, &[("streamType", kind), ("port", port), ("requestID", request)])?;
            }
        }
        client.send(7, b"before")?;
        client.hear(7, "before")?;
        let mut writing = client.stream.try_clone()?;
        let overrun = std::thread::spawn(move || -> Result<()> {
            // More than everything between here and the port holds.
            let piece = frame(3, &[b'x'; 16 * 1024]);
            for _ in 0..4096 {
                writing.write_all(&piece)?;
            }
            Ok(writing.write_all(&frame(7, b"after"))?)
        });
        assert_eq!(client.reset(3)?, ResetStatus::FlowControlError as u32);
        client.hear(1, "port 8081")?;
        client.hear(7, "after")?;
        ensure!(overrun.join().is_ok_and(|written| written.is_ok()), "not everything could be written");
        assert_eq!(client.resets.iter().filter(|(stream, _)| *stream == 7).count(), 0);
        let more = resident(daemon)?.saturating_sub(before);
        ensure!(more < 8 * 1024, "a client made the daemon hold {more} KiB");
        Ok(())
    })
}

#[test]
fn an_overrun_of_a_stream_that_is_only_written_resets_it_and_no_other() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let request = piped(&main, &["sh", "-c", "echo up; read line; echo heard $line; exit 5"]);
        let url = daemon.client().exec(request)?.url;
        let mut client = Raw::connect(daemon, &url, "v4.channel.k8s.io")?;
        for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
            client.open(id, &[("streamType", kind)])?;
        }
        // What came before the program ran does not count.
        client.hear(5, "up\n")?;
        for _ in 0..4 {
            client.send(7, &[b'x'; WINDOW / 4])?;
        }
        client.send(7, b"x")?;
        assert_eq!(client.reset(7)?, ResetStatus::FlowControlError as u32);
        client.send(3, b"me\n")?;
        client.hear(5, "heard me\n")?;
        client.hear(1, r#""message":"5""#)?;
        Ok(())
    })
}

/// Input that a program does not read waits, as in a pipe: `kubectl exec -i` depends on it.
#[test]
fn input_that_is_not_read_waits_at_the_client_and_output_still_comes() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        Command::start(daemon, piped(&main, &["true"]))?.finished()?;
        let before = resident(daemon)?;
        let script = "while [ ! -e /tmp/go ]; do echo tick; sleep 0.1; done; wc -c";
        let url = daemon.client().exec(piped(&main, &["sh", "-c", script]))?.url;
        let mut client = Raw::connect(daemon, &url, "v4.channel.k8s.io")?;
        for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
            client.open(id, &[("streamType", kind)])?;
        }
        let mut writing = client.stream.try_clone()?;
        let (sender, held) = std::sync::mpsc::channel();
        let overrun = std::thread::spawn(move || -> Result<()> {
            let piece = frame(3, &[b'x'; 16 * 1024]);
            for _ in 0..4096 {
                writing.write_all(&piece)?;
                let _ = sender.send(());
            }
            let mut end = BytesMut::new();
            Encoder::data(3, 0, true, &mut end);
            Ok(writing.write_all(&end)?)
        });
        // Nothing more is taken while the program writes ten lines.
        let mut ticks = 0;
        loop {
            let pieces = held.try_iter().count();
            client.data.remove(&5);
            client.hear(5, &"tick\n".repeat(10))?;
            ticks = if pieces == 0 { ticks + 1 } else { 0 };
            if ticks == 2 {
                break;
            }
        }
        ensure!(!overrun.is_finished(), "the server takes whatever comes");
        let more = resident(daemon)?.saturating_sub(before);
        ensure!(more < 8 * 1024, "a client makes the daemon hold {more} KiB");
        main.sh("touch /tmp/go")?;
        client.hear(5, &format!("{}\n", 4096 * 16 * 1024))?;
        client.hear(1, "Success")?;
        ensure!(overrun.join().is_ok_and(|written| written.is_ok()), "not everything could be written");
        ensure!(client.resets.is_empty(), "{:?}", client.resets);
        Ok(())
    })
}

/// The code of the Close that a server sends for these bytes, which is the last that it says.
fn close_code(daemon: &Daemon, url: &str, protocol: &str, bytes: &[u8]) -> Result<u16> {
    let (mut stream, path) = dial(daemon, url)?;
    stream.set_read_timeout(Some(patience(SOON)))?;
    let upgrade = format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\n\r\n"
    );
    stream.write_all(upgrade.as_bytes())?;
    stream.write_all(bytes)?;
    // All of it arrives, however much of ours the server has left unread.
    let mut said = Vec::new();
    stream.read_to_end(&mut said)?;
    ensure!(said.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&said));
    match said.as_slice() {
        [.., 0x88, 2, high, low] => Ok(u16::from_be_bytes([*high, *low])),
        _ => anyhow::bail!("no Close at the end of {:?}", String::from_utf8_lossy(&said)),
    }
}

#[test]
fn what_a_websocket_may_not_carry_ends_it_with_its_code() -> Result<()> {
    // A final frame of this kind, masked with zeros.
    let masked = |kind: u8, payload: &[u8]| -> Result<Vec<u8>> {
        let length = u16::try_from(payload.len())?.to_be_bytes();
        Ok([&[0x80 | kind, 0x80 | 126][..], &length, &[0; 4], payload].concat())
    };
    let (text, binary) = (1, 2);
    let large = [&[0x82, 0x80 | 127][..], &(1_u64 << 20).to_be_bytes(), &vec![0; 4 + (1 << 20)]].concat();
    let unmasked = [0x82, 2, 0, b'x'];
    rootful(|daemon| {
        let pod = daemon.pod("streams")?;
        let main = pod.start(shell("main", "nc -ll -p 8080 -e cat & wait"))?;
        within(SOON, "it listens", || Ok(main.sh("netstat -ltn")?.contains(":8080 ").then_some(())))?;
        let sleep = interactive(&main, &["sleep", "4321"]);
        for (code, protocol, bytes) in [
            (1002, "v5.channel.k8s.io", unmasked.to_vec()),
            (1002, "v5.channel.k8s.io", masked(3, b"x")?),
            (1007, "v4.channel.k8s.io", masked(text, b"\x00\xff")?),
            (1007, "v4.base64.channel.k8s.io", masked(text, b"0!")?),
            (1007, "v4.channel.k8s.io", masked(binary, b"\x0480x24")?),
            (1009, "v4.channel.k8s.io", large.clone()),
        ] {
            let url = daemon.client().exec(sleep.clone())?.url;
            assert_eq!(close_code(daemon, &url, protocol, &bytes)?, code, "exec, {protocol}");
        }
        within(SOON, "the programs are gone", || {
            Ok((!main.sh("ps -o args")?.contains("sleep 4321")).then_some(()))
        })?;
        for (code, protocol, bytes) in [
            (1002, "v4.channel.k8s.io", unmasked.to_vec()),
            (1007, "v4.base64.channel.k8s.io", masked(text, b"0!")?),
            (1009, "v4.channel.k8s.io", large.clone()),
            (1002, "SPDY/3.1+portforward.k8s.io", unmasked.to_vec()),
            (1003, "SPDY/3.1+portforward.k8s.io", masked(text, b"x")?),
            (1009, "SPDY/3.1+portforward.k8s.io", large),
        ] {
            let url = forward_url(daemon, &pod.id)?;
            assert_eq!(close_code(daemon, &url, protocol, &bytes)?, code, "port forward, {protocol}");
        }
        Ok(())
    })
}
