//! Too much of everything: output of commands, lines of logs, messages, streams of HTTP/2. Requests
//! of others are served all the same, and memory is bounded.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_tests::census::{Census, status_field};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::patience;
use berth_tests::log;
use berth_tests::pod::{container, idle, sharing, sharing_pod, shell, words};
use berth_tests::repeats::repeats;
use tonic::Code;

const MIB: u64 = 1 << 20;

/// The most memory that a process has had since [`forget_peak`], in bytes: proc(5), `VmHWM`.
fn peak(pid: i32) -> Result<u64> {
    let text = status_field(pid, "VmHWM").context("VmHWM")?;
    Ok(text.trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// Resets the count: proc(5), `clear_refs`.
fn forget_peak(pid: i32) -> Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").context("forgetting the peak")
}

#[test]
fn commands_that_flood_their_output_cost_a_bounded_memory_and_no_disk() -> Result<()> {
    const COMMANDS: u64 = 10;
    /// A kubelet takes 16 MiB. Besides, the daemon holds them again as the message, and part of
    /// each while it grows.
    const EACH: u64 = 64 * MIB;
    rootful(|daemon| {
        // One process, which is the same before and after, and beside it one that reaps what the
        // commands leave behind.
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("floods")))?;
        let main = pod.start(sharing(container("main", &["sleep", "1000"])))?;
        main.sh("true")?;
        let census = Census::take(daemon)?;
        let pid = i32::try_from(daemon.pid()?)?;
        forget_peak(pid)?;
        let before = peak(pid)?;
        std::thread::scope(|scope| -> Result<()> {
            let running: Vec<_> = (0..COMMANDS)
                .map(|number| {
                    let (client, id) = (daemon.client(), main.id.clone());
                    scope.spawn(move || {
                        // The last ones do not end on their own.
                        let (script, timeout) = if number < COMMANDS - 2 {
                            ("head -c 40000000 /dev/zero; head -c 40000000 /dev/zero >&2; exit 5", 120)
                        } else {
                            ("cat /dev/zero & cat /dev/zero >&2", 3)
                        };
                        let begun = Instant::now();
                        let answer = client.exec_sync(v1::ExecSyncRequest {
                            container_id: id,
                            cmd: words(&["sh", "-c", script]),
                            timeout,
                        });
                        (answer, timeout, begun.elapsed())
                    })
                })
                .collect();
            for command in running {
                let (answer, timeout, taken) = command.join().map_err(|_| anyhow!("a thread panicked"))?;
                match answer {
                    Ok(answer) => {
                        let kept = answer.stdout.len() + answer.stderr.len();
                        assert_eq!((answer.exit_code, timeout), (5, 120));
                        ensure!(kept <= berth_cri::MAX_MESSAGE_BYTES && kept > 15 << 20, "{kept} bytes");
                    }
                    Err(refused) => {
                        assert_eq!((refused.code(), timeout), (Code::DeadlineExceeded, 3), "{refused}");
                        ensure!(taken < patience(Duration::from_secs(20)), "it took {taken:?}");
                    }
                }
            }
            Ok(())
        })?;
        let more = peak(pid)?.saturating_sub(before);
        ensure!(more < COMMANDS * EACH, "{} MiB more", more / MIB);
        census.stays(daemon)
    })
}

#[test]
fn logs_that_are_flooded_and_rotated_all_the_time_lose_no_byte() -> Result<()> {
    const LINES: u32 = 400_000;
    const BYTES: usize = 20_000_000;
    rootful(|daemon| {
        let pod = daemon.pod("floods")?;
        let numbers = pod.start(shell("numbers", &format!("seq 1 {LINES}")))?;
        let both = pod.start(shell("both", &format!("seq 1 {LINES} & seq 1 {LINES} >&2; wait")))?;
        let endless = pod.start(shell("endless", &format!("head -c {BYTES} /dev/zero | tr '\\0' x")))?;
        let bytewise =
            pod.start(shell("bytewise", "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); printf y; done"))?;
        let containers = [&numbers, &both, &endless, &bytewise];
        let shims = containers.iter().map(|main| main.shim_pid()).collect::<Result<Vec<_>>>();
        let mut parts: BTreeMap<usize, Vec<PathBuf>> = BTreeMap::new();
        let (begun, mut turns, mut over) = (Instant::now(), 0, false);
        while !over {
            ensure!(begun.elapsed() < patience(SOON), "they have not ended after {turns} rotations");
            over = true;
            for (number, main) in containers.iter().enumerate() {
                if main.status()?.state() == v1::ContainerState::ContainerRunning && main.log_path.exists() {
                    over = false;
                    let old = main.log_path.with_extension(format!("log.{turns}"));
                    fs::rename(&main.log_path, &old)?;
                    let request = v1::ReopenContainerLogRequest { container_id: main.id.clone() };
                    // It may end at this moment; then the rest of its log is in the renamed file.
                    let _ = daemon.client().reopen_container_log(request);
                    parts.entry(number).or_default().push(old);
                }
            }
            turns += 1;
        }
        // On an emulated processor a rotation takes longer than the printing meanwhile.
        ensure!(turns > repeats(4)?.max(2), "only {turns} rotations");
        for shim in shims.unwrap_or_default() {
            if let Ok(most) = peak(shim) {
                ensure!(most < 8 * MIB, "a shim had {} KiB", most / 1024);
            }
        }
        let expected = (1..=LINES).fold(String::new(), |mut text, number| {
            let _ = writeln!(text, "{number}");
            text
        });
        for (number, main) in containers.iter().enumerate() {
            let mut files = parts.remove(&number).unwrap_or_default();
            files.extend(main.log_path.exists().then(|| main.log_path.clone()));
            let mut entries = Vec::new();
            for file in files {
                entries.extend(log::read(&file)?);
            }
            let (stdout, stderr) = (log::text(&entries, "stdout"), log::text(&entries, "stderr"));
            let expected = match number {
                0 => (expected.clone(), String::new()),
                1 => (expected.clone(), expected.clone()),
                2 => ("x".repeat(BYTES), String::new()),
                _ => ("y".repeat(20_000), String::new()),
            };
            ensure!(
                (&stdout, &stderr) == (&expected.0, &expected.1),
                "container {number}: {} and {} bytes of {} and {}",
                stdout.len(),
                stderr.len(),
                expected.0.len(),
                expected.1.len()
            );
        }
        Ok(())
    })
}

#[test]
fn requests_beyond_every_measure_are_refused_by_a_code_and_in_time() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        let pod = daemon.pod("measure")?;
        let main = pod.idle("main")?;
        let pid = daemon.pid()?;
        let begun = Instant::now();
        let too_long = v1::ExecSyncRequest {
            container_id: main.id.clone(),
            cmd: vec!["x".repeat(17 << 20)],
            timeout: 0,
        };
        let refused = client.exec_sync(too_long).err().context("17 MiB are refused")?;
        ensure!([Code::OutOfRange, Code::ResourceExhausted].contains(&refused.code()), "{refused}");
        let mut config = daemon.pod_config("labels");
        config.labels = (0..1_000_000).map(|number| (number.to_string(), String::new())).collect();
        let refused = daemon.pod_of(config).err().context("a million labels are refused")?.to_string();
        ensure!(refused.contains("the limit is"), "{refused}");
        for seconds in [i64::MAX, i64::MIN, -1] {
            let request = v1::ExecSyncRequest {
                container_id: main.id.clone(),
                cmd: words(&["echo", "here"]),
                timeout: seconds,
            };
            match client.exec_sync(request) {
                Ok(answer) => assert_eq!(answer.stdout, b"here\n", "{seconds}"),
                Err(refused) => assert_eq!(refused.code(), Code::InvalidArgument, "{seconds}: {refused}"),
            }
        }
        for seconds in [i64::MAX, i64::MIN, -1] {
            // Process 1 does not get a signal that it does not catch yet.
            let script = "trap 'exit 0' TERM; echo ready; sleep 1000 & wait";
            let stopped = pod.start(shell(&format!("stop{seconds}"), script))?;
            stopped.says("ready")?;
            match stopped.stop(seconds) {
                Ok(()) => assert_eq!(stopped.status()?.state(), v1::ContainerState::ContainerExited),
                Err(refused) => assert_eq!(refused.code(), Code::InvalidArgument, "{seconds}: {refused}"),
            }
        }
        ensure!(begun.elapsed() < patience(SOON), "it took {:?}", begun.elapsed());
        assert_eq!((daemon.pid()?, main.sh("echo alive")?.as_str()), (pid, "alive\n"));
        Ok(())
    })
}

/// Frames of HTTP/2: RFC 9113, section 6.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut frame = length.iter().skip(1).copied().collect::<Vec<u8>>();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The headers of a call without compression: RFC 7541, section 6.2.2.
fn headers(path: &str) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap_or(0));
            block.extend(text.as_bytes());
        }
    }
    block
}

/// A connection that has sent the preface of every client.
fn connect(daemon: &Daemon) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(daemon.socket())?;
    stream.set_read_timeout(Some(patience(Duration::from_secs(10))))?;
    // A server may refuse more data from a client that reads nothing.
    stream.set_write_timeout(Some(Duration::from_millis(500)))?;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")?;
    stream.write_all(&frame(SETTINGS, 0, 0, &[]))?;
    Ok(stream)
}

const VERSION: &str = "/runtime.v1.RuntimeService/Version";

/// A gRPC message in a frame of data: a byte for compression, four for the length.
fn message(bytes: &[u8]) -> Vec<u8> {
    let mut message = vec![0];
    message.extend(u32::try_from(bytes.len()).unwrap_or(0).to_be_bytes());
    message.extend(bytes);
    message
}

/// Whether the call on stream 1 is answered with a message; an error has headers only.
fn is_answered(daemon: &Daemon, body: &[u8]) -> Result<bool> {
    let mut stream = connect(daemon)?;
    stream.write_all(&frame(HEADERS, END_HEADERS, 1, &headers(VERSION)))?;
    stream.write_all(&frame(DATA, END_STREAM, 1, &message(body)))?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).context("an answer")?;
        let [high, middle, low, kind, flags, ..] = head;
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, high, middle, low]))?];
        stream.read_exact(&mut payload)?;
        match kind {
            DATA => return Ok(true),
            HEADERS if flags & END_STREAM != 0 => return Ok(false),
            _ => {}
        }
    }
}

#[test]
fn streams_that_break_the_protocol_disturb_nobody_else() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("protocol")?;
        let main = pod.idle("main")?;
        let pid = i32::try_from(daemon.pid()?)?;
        ensure!(is_answered(daemon, b"\x0a\x01v")?, "a good call by hand");
        // Invalid text, a length beyond the end, a field beyond the message, a group without an
        // end.
        for bad in [
            &b"\x0a\x02\xff\xfe"[..],
            b"\x0a\x7fv",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x0b\x0b\x0b\x0b",
        ] {
            ensure!(!is_answered(daemon, bad)?, "{bad:?} is answered");
        }
        let block = headers(VERSION);
        let rapid_reset: Vec<u8> = (0..20_000_u32)
            .flat_map(|number| {
                let stream = number * 2 + 1;
                [frame(HEADERS, END_HEADERS, stream, &block), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])]
                    .concat()
            })
            .collect();
        let mut endless_headers = frame(HEADERS, 0, 1, &block);
        for number in 0..20_000 {
            let name = format!("x-{number:06}");
            let more = [&[0, 8][..], name.as_bytes(), &[100], &[b'x'; 100]].concat();
            endless_headers.extend(frame(CONTINUATION, 0, 1, &more));
        }
        let mut empty_data = frame(HEADERS, END_HEADERS, 1, &block);
        for _ in 0..200_000 {
            empty_data.extend(frame(DATA, 0, 1, &[]));
        }
        let settings: Vec<u8> = (0..100_000).flat_map(|_| frame(SETTINGS, 0, 0, &[])).collect();
        let not_http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec();
        forget_peak(pid)?;
        let before = peak(pid)?;
        for (what, flood) in [
            ("rapid reset", rapid_reset),
            ("endless headers", endless_headers),
            ("empty data", empty_data),
            ("settings", settings),
            ("another protocol", not_http),
        ] {
            let slowest = std::thread::scope(|scope| -> Result<Duration> {
                let flooding = scope.spawn(|| -> Result<()> {
                    for _ in 0..2 {
                        let mut stream = connect(daemon)?;
                        // The daemon may close it in the middle, as intended.
                        let _ = stream.write_all(&flood);
                    }
                    Ok(())
                });
                let mut slowest = Duration::ZERO;
                while !flooding.is_finished() {
                    let begun = Instant::now();
                    daemon.client().version(v1::VersionRequest::default())?;
                    slowest = slowest.max(begun.elapsed());
                }
                flooding.join().map_err(|_| anyhow!("the thread panicked"))??;
                Ok(slowest)
            })
            .with_context(|| what)?;
            ensure!(slowest < patience(Duration::from_secs(5)), "{what}: another client waited {slowest:?}");
            ensure!(daemon.pid()? == u32::try_from(pid)? && main.sh("echo alive")? == "alive\n", "{what}");
        }
        let more = peak(pid)?.saturating_sub(before);
        ensure!(more < 128 * MIB, "{} MiB more", more / MIB);
        pod.start(idle("next"))?;
        Ok(())
    })
}
