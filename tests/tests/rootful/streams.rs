//! Exec and PortForward: the URLs, and what a client finds behind them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{Daemon, SOON, Setup, own_namespaces, programs, rootful, rootful_with};
use berth_tests::deadline::{patience, within};
use berth_tests::pod::{Container, idle, sharing, sharing_pod, shell, words};
use berth_tests::repeats::repeats;
use berth_tests::streams::{Client, Command, ask, dial};
use tonic::Code;

/// A request for a command with all three streams.
pub(crate) fn piped(container: &Container, command: &[&str]) -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: container.id.clone(),
        cmd: words(command),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    }
}

/// A request for a command with a terminal.
pub(crate) fn interactive(container: &Container, command: &[&str]) -> v1::ExecRequest {
    v1::ExecRequest { tty: true, stderr: false, ..piped(container, command) }
}

/// Descriptors, threads and resident memory of the daemon.
fn held(daemon: &Daemon) -> Result<(usize, usize)> {
    let process = std::path::PathBuf::from(format!("/proc/{}", daemon.pid()?));
    Ok((process.join("fd").read_dir()?.count(), process.join("task").read_dir()?.count()))
}

/// Waits until the daemon has no more descriptors than `before`.
fn back_to(daemon: &Daemon, before: usize) -> Result<()> {
    within(SOON, "the daemon's descriptors are closed", || Ok((held(daemon)?.0 <= before).then_some(())))
}

#[test]
fn streams_and_exit_code_go_through() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let script = "read a; echo out $a; echo err >&2; cat | wc -c; exit 7";
        let mut command = Command::start(daemon, piped(&main, &["sh", "-c", script]))?;
        command.say("hello\n")?;
        command.hear("out hello\n")?;
        // More than a pipe, the queues and the socket's buffers hold.
        command.say(vec![b'x'; 8 * 1024 * 1024])?;
        command.end_input()?;
        let finished = command.finished()?;
        assert_eq!((finished.stdout.trim(), finished.stderr.as_str()), ("8388608", "err\n"));
        assert_eq!(finished.code(), Some(7));

        let long =
            Command::start(daemon, piped(&main, &["sh", "-c", "head -c 20000000 /dev/zero | tr '\\0' x"]))?;
        let finished = long.finished()?;
        assert_eq!((finished.stdout.len(), finished.code()), (20_000_000, Some(0)));

        let missing = Command::start(daemon, piped(&main, &["/no/such/program"]))?.finished()?;
        assert_eq!(missing.status["reason"], "InternalError");
        let message = missing.status["message"].to_string();
        assert!(message.contains("/no/such/program") && message.contains("no such file"), "{message}");

        // Streams that are not asked for are absent, not another client's.
        let only = v1::ExecRequest {
            stdin: false,
            stderr: false,
            ..piped(&main, &["sh", "-c", "cat; echo x >&2; echo y"])
        };
        let finished = Command::start(daemon, only)?.finished()?;
        assert_eq!((finished.stdout.as_str(), finished.code()), ("y\n", Some(0)));
        Ok(())
    })
}

#[test]
fn a_command_that_leaves_something_behind_ends_all_the_same() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let start = Instant::now();
        let finished =
            Command::start(daemon, piped(&main, &["sh", "-c", "sleep 4321 & echo done"]))?.finished()?;
        assert_eq!((finished.stdout.as_str(), finished.code()), ("done\n", Some(0)));
        assert!(start.elapsed() < SOON / 2);
        assert!(main.sh("ps -o args")?.contains("sleep 4321"), "what it left behind goes on");
        Ok(())
    })
}

#[test]
fn a_terminal_is_one_and_has_the_clients_size() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("streams")?;
        let main = pod.idle("main")?;
        let mut user = idle("user");
        berth_tests::pod::security(&mut user).run_as_user = Some(v1::Int64Value { value: 1000 });
        let user = pod.start(user)?;
        for (container, id) in [(&main, "0"), (&user, "1000")] {
            let script = "tty; stat -c 'owner %u' $(tty); echo term $TERM
                while ! stty size | grep -q '^42 123'; do sleep 0.05; done; stty size
                read line; echo heard $line; exit 3";
            let mut command = Command::start(daemon, interactive(container, &["sh", "-c", script]))?;
            let said = command.hear("term xterm\r\n")?;
            assert!(said.contains("/dev/pts/") && said.contains(&format!("owner {id}\r\n")), "{said}");
            command.resize(123, 42)?;
            command.hear("42 123\r\n")?;
            command.say("hi\n")?;
            let finished = command.finished()?;
            // What was typed is echoed by the terminal.
            assert!(finished.stdout.ends_with("hi\r\nheard hi\r\n"), "{finished:?}");
            assert_eq!(finished.code(), Some(3));
        }
        // Interrupts of the terminal reach the program, which leads its session.
        let mut command = Command::start(
            daemon,
            interactive(&main, &["sh", "-c", "trap 'exit 9' INT; echo ready; sleep 1000 & wait"]),
        )?;
        command.hear("ready")?;
        command.say("\u{3}")?;
        assert_eq!(command.finished()?.code(), Some(9));
        Ok(())
    })
}

#[test]
fn terminals_work_where_pods_share_their_processes() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("sharing")))?;
        let main = pod.start(sharing(idle("main")))?;
        let mut command =
            Command::start(daemon, interactive(&main, &["sh", "-c", "tty; read x; echo got $x"]))?;
        command.hear("/dev/pts/")?;
        command.say("it\n")?;
        let finished = command.finished()?;
        assert!(finished.stdout.contains("got it\r\n"), "{finished:?}");
        assert_eq!(finished.code(), Some(0));
        Ok(())
    })
}

#[test]
fn a_client_that_vanishes_takes_its_program_along() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let gone = || {
            within(SOON, "nothing of it runs", || {
                Ok((!main.sh("ps -o args")?.contains("sleep 432")).then_some(()))
            })
        };
        for request in [
            piped(&main, &["sh", "-c", "echo up; sleep 4321 & sleep 4322"]),
            interactive(&main, &["sh", "-c", "echo up; sleep 4321 & sleep 4322"]),
        ] {
            let mut command = Command::start(daemon, request)?;
            command.hear("up")?;
            drop(command);
            gone()?;
        }
        assert_eq!(main.status()?.state(), v1::ContainerState::ContainerRunning);
        Ok(())
    })
}

#[test]
fn all_of_a_session_ends_with_its_client_whatever_its_process_groups() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        // With job control, each job has its own group.
        let script = "trap '' HUP; set -m; sleep 4321 & sleep 4322 | sleep 4323 & echo up; sleep 4324";
        let mut command = Command::start(daemon, interactive(&main, &["sh", "-c", script]))?;
        command.hear("up")?;
        let groups = || -> Result<usize> {
            let listed =
                main.sh("for pid in /proc/[0-9]*; do cut -d' ' -f2,5 $pid/stat; done 2>/dev/null; true")?;
            let groups = listed.lines().filter(|line| line.starts_with("(sleep)"));
            Ok(groups.collect::<std::collections::BTreeSet<_>>().len())
        };
        // That of the container's own among them.
        within(SOON, "jobs have groups of their own", || Ok((groups()? >= 4).then_some(())))?;
        drop(command);
        within(SOON, "nothing of it runs", || {
            Ok((!main.sh("ps -o args")?.contains("sleep 432")).then_some(()))
        })?;
        Ok(())
    })
}

#[test]
fn programs_end_with_the_daemon_and_their_container_does_not() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let script = "echo up; sleep 4321 & sleep 4322";
        for crash in [false, true] {
            let (piped, terminal) =
                (piped(&main, &["sh", "-c", script]), interactive(&main, &["sh", "-c", script]));
            let mut commands = [Command::start(daemon, piped)?, Command::start(daemon, terminal)?];
            for command in &mut commands {
                command.hear("up")?;
            }
            let call = std::thread::spawn({
                let main = main.clone();
                move || main.exec_within(&["sh", "-c", "sleep 4323 & sleep 4324"], 0)
            });
            within(SOON, "all of them run", || {
                Ok((main.sh("ps -o args")?.matches("sleep 432").count() >= 6).then_some(()))
            })?;
            if crash {
                daemon.crash()?;
            } else {
                daemon.stop()?;
                daemon.start_again()?;
            }
            let _ = call.join();
            within(SOON, "none of them runs", || {
                Ok((!main.sh("ps -o args")?.contains("sleep 432")).then_some(()))
            })?;
            assert_eq!(main.status()?.state(), v1::ContainerState::ContainerRunning);
        }
        Ok(())
    })
}

#[test]
fn output_that_a_client_does_not_want_any_more_stops_no_program() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let script = "trap 'exit 9' PIPE; echo up; read go; head -c 1000000 /dev/zero || exit 9; exit 5";
        // A terminal goes on without a reader; a pipe is closed.
        for (request, codes) in [
            (interactive(&main, &["sh", "-c", script]), [5].as_slice()),
            (piped(&main, &["sh", "-c", script]), &[9]),
        ] {
            let mut command = Command::start(daemon, request)?;
            command.hear("up")?;
            command.reset_output()?;
            command.say("go\n")?;
            let code = command.finished()?.code().context("a code")?;
            ensure!(codes.contains(&code), "{code}");
        }
        Ok(())
    })
}

#[test]
fn what_clients_leave_in_every_way_is_nothing() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("streams")?;
        let main = pod.start(shell("main", "nc -ll -p 8080 -e cat & sleep 1000 & wait"))?;
        let round = |number: usize| -> Result<()> {
            let request =
                if number.is_multiple_of(2) { interactive(&main, &["cat"]) } else { piped(&main, &["cat"]) };
            let mut command = Command::start(daemon, request)?;
            command.say("x\n")?;
            command.hear("x")?;
            if number.is_multiple_of(2) {
                command.resize(80, u16::try_from(number % 100 + 1)?)?;
            }
            if number.is_multiple_of(3) {
                command.say("\u{4}")?;
                command.end_input()?;
                if !number.is_multiple_of(2) {
                    command.finished()?;
                }
            }
            let url = forward_url(daemon, &pod.id)?;
            let mut client = Client::connect(daemon, &url, "portforward.k8s.io")?;
            let (_, mut data) = client.forward(8080, "0")?;
            client.send(&data, "ping")?;
            client.until(&mut data, "ping")?;
            if number.is_multiple_of(2) {
                client.finish(&data)?;
                client.all_of(&mut data)?;
            }
            Ok(())
        };
        within(SOON, "it listens", || Ok(main.sh("netstat -ltn")?.contains(":8080 ").then_some(())))?;
        for number in 0..6 {
            round(number)?;
        }
        let before = settled(daemon)?;
        for number in 0..repeats(100)? {
            round(number)?;
        }
        back_to(daemon, before)?;
        Ok(())
    })
}

/// The descriptors of the daemon once their number does not fall any more.
fn settled(daemon: &Daemon) -> Result<usize> {
    let mut last = held(daemon)?.0;
    within(SOON, "the daemon's descriptors are closed", || {
        std::thread::sleep(Duration::from_millis(500));
        let now = held(daemon)?.0;
        let same = now == last;
        last = now;
        Ok(same.then_some(now))
    })
}

pub(crate) fn forward_url(daemon: &Daemon, sandbox: &str) -> Result<String> {
    let request = v1::PortForwardRequest { pod_sandbox_id: sandbox.to_owned(), port: vec![8080] };
    Ok(daemon.client().port_forward(request)?.url)
}

#[test]
fn ports_of_pods_are_reached_by_either_loopback_address() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("ports")?;
        let main =
            pod.start(shell("main", "nc -ll -p 8080 -e cat & httpd -f -p '[::1]:8086' & sleep 1000 & wait"))?;
        within(SOON, "both listen", || {
            let listening = main.sh("netstat -ltn")?;
            Ok((listening.contains(":8080 ") && listening.contains(":8086 ")).then_some(()))
        })?;
        let mut hosts = daemon.pod_config("hosts");
        hosts.linux.get_or_insert_default().security_context.get_or_insert_default().namespace_options =
            Some(v1::NamespaceOption { network: v1::NamespaceMode::Node.into(), ..own_namespaces() });
        let hosts = daemon.pod_of(hosts)?;
        let listener = daemon.host().inside(|| Ok(std::net::TcpListener::bind("127.0.0.1:8090")?))?;
        let echo = std::thread::spawn(move || -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            std::io::copy(&mut stream.try_clone()?, &mut stream)?;
            Ok(())
        });
        for (sandbox, port) in [(&pod, 8080), (&hosts, 8090)] {
            let mut client =
                Client::connect(daemon, &forward_url(daemon, &sandbox.id)?, "portforward.k8s.io")?;
            // One that fails takes nothing along.
            let (mut error, mut none) = client.forward(9, "0")?;
            let text = String::from_utf8(client.all_of(&mut error)?)?;
            assert!(text.contains("port 9") && text.contains("refused"), "{text}");
            assert!(client.all_of(&mut none)?.is_empty());
            let (mut error, mut data) = client.forward(port, "1")?;
            let text = vec![b'x'; 1024 * 1024];
            client.send(&data, text.clone())?;
            client.finish(&data)?;
            assert!(client.all_of(&mut data)? == text, "port {port}");
            assert!(client.all_of(&mut error)?.is_empty());
        }
        let mut client = Client::connect(daemon, &forward_url(daemon, &pod.id)?, "portforward.k8s.io")?;
        let (_error, mut data) = client.forward(8086, "0")?;
        client.send(&data, "GET / HTTP/1.0\r\n\r\n")?;
        client.until(&mut data, "HTTP/1.")?;
        echo.join().ok().context("the echo panicked")??;
        // A sandbox that was stopped has no ports, also for a client that came before.
        let mut client = Client::connect(daemon, &forward_url(daemon, &pod.id)?, "portforward.k8s.io")?;
        pod.stop()?;
        let (mut error, _data) = client.forward(8080, "2")?;
        assert!(String::from_utf8(client.all_of(&mut error)?)?.contains("not ready"));
        let request = v1::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![] };
        assert_eq!(
            daemon.client().port_forward(request).err().context("stopped")?.code(),
            Code::FailedPrecondition
        );
        Ok(())
    })
}

#[test]
fn requests_that_make_no_sense_are_refused() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let client = daemon.client();
        let none = v1::ExecRequest { stdin: false, stdout: false, stderr: false, ..piped(&main, &["true"]) };
        let both = v1::ExecRequest { tty: true, ..piped(&main, &["true"]) };
        let unknown = v1::ExecRequest { container_id: "0".repeat(64), ..piped(&main, &["true"]) };
        for (request, code) in [
            (none, Code::InvalidArgument),
            (both, Code::InvalidArgument),
            (piped(&main, &[]), Code::InvalidArgument),
            (unknown, Code::NotFound),
        ] {
            let refused = client.exec(request.clone()).err().with_context(|| format!("{request:?}"))?;
            assert_eq!(refused.code(), code, "{refused}");
        }
        let request =
            |id: &str, port| v1::PortForwardRequest { pod_sandbox_id: id.to_owned(), port: vec![port] };
        let refused = client.port_forward(request("none", 80)).err().context("unknown")?;
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        main.stop(0)?;
        let refused = client.exec(piped(&main, &["true"])).err().context("it has ended")?;
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        Ok(())
    })
}

#[test]
fn a_url_is_good_once_and_its_token_is_in_no_log() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let url = daemon.client().exec(piped(&main, &["true"]))?.url;
        let token = url.rsplit('/').next().context("a token")?.to_owned();
        ensure!(token.len() >= 32, "{url}");
        let status = |url: &str| -> Result<String> {
            let (mut stream, path) = dial(daemon, url)?;
            Ok(ask(&mut stream, path, "v4.channel.k8s.io")?.split(' ').nth(1).unwrap_or_default().to_owned())
        };
        assert_eq!(status(&url.replace("/exec/", "/attach/"))?, "404");
        assert_eq!(status(&url)?, "101");
        assert_eq!(status(&url)?, "404");
        // After a restart there is another server, or at least none that knows the token.
        let url = daemon.client().exec(piped(&main, &["true"]))?.url;
        daemon.stop()?;
        daemon.start_again()?;
        ensure!(status(&url).map_or(true, |status| status == "404"), "a token outlived its daemon");
        ensure!(!daemon.log()?.contains(&token), "the log has a token");
        Ok(())
    })
}

#[test]
fn half_open_connections_do_not_delay_a_command() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let run = || -> Result<Duration> {
            let start = Instant::now();
            let finished = Command::start(daemon, piped(&main, &["true"]))?.finished()?;
            assert_eq!(finished.code(), Some(0));
            Ok(start.elapsed())
        };
        let alone = run()?;
        let url = daemon.client().exec(piped(&main, &["true"]))?.url;
        let mut strangers: Vec<TcpStream> = Vec::new();
        // As many as this process may have open; the server keeps 512 at the most.
        let limits = fs::read_to_string("/proc/self/limits")?;
        let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).context("a limit")?;
        let files: usize = files.split_whitespace().next().context("a soft limit")?.parse()?;
        let many = files.saturating_sub(200).min(2000);
        ensure!(many > 600, "a limit of {files} open files is too low for this test");
        for number in 0..many {
            let (mut stream, _) = dial(daemon, &url)?;
            if number % 2 == 0 {
                // The oldest have been closed by now.
                let _ = stream.write_all(b"GET /exec/");
            }
            strangers.push(stream);
        }
        let beside = run()?;
        ensure!(
            beside < alone + patience(Duration::from_secs(1)),
            "alone {alone:?}, beside {many} half-open connections {beside:?}"
        );
        // They are closed by the server.
        within(SOON, "half-open connections are closed", || Ok((held(daemon)?.0 < 300).then_some(())))?;
        Ok(())
    })
}

#[test]
fn a_server_with_a_certificate_speaks_tls() -> Result<()> {
    let files = tempfile::tempdir()?;
    let (certificate, key) = (files.path().join("server.crt"), files.path().join("server.key"));
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-days", "2", "-subj", "/CN=berth", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .context("openssl makes a certificate")?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let configuration = format!(
        "[streaming]\ntls_certificate = '{}'\ntls_key = '{}'\n",
        certificate.display(),
        key.display()
    );
    // A setup is written down in a test; this one has a path in it.
    let setup = Setup { configuration: Box::leak(configuration.into_boxed_str()), ..Setup::default() };
    rootful_with(setup, |daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let url = daemon.client().exec(piped(&main, &["true"]))?.url;
        let rest = url.strip_prefix("https://").with_context(|| url.clone())?;
        let (address, path) = rest.split_once('/').context("a path")?;
        for (path, status) in [("exec/none", "404"), (path, "400")] {
            let client = format!(
                "printf 'GET /{path} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' | openssl s_client -quiet \
                 -verify_return_error -CAfile {} -connect {address} 2>&1",
                certificate.display()
            );
            let answer = daemon.host().run("sh", &["-c", &client])?;
            ensure!(answer.contains(&format!("HTTP/1.1 {status} ")), "{answer}");
        }
        // The command has another way in, which leads through no network at all.
        let mut elsewhere = std::process::Command::new("unshare");
        elsewhere.arg("--net").arg(programs()?.join("berth")).env("BERTH_SOCKET", daemon.socket());
        let said = berth_tests::program::output(elsewhere.args(["exec", "streams", "echo", "hello"]))?;
        assert_eq!(said, "hello\n");
        let streams = berth_api::streams_socket(&daemon.socket());
        let mode = fs::metadata(&streams)?.permissions().mode() & 0o7777;
        assert_eq!(mode, 0o600, "{}", streams.display());
        // Its clients need tokens like all others.
        let mut stream = UnixStream::connect(&streams)?;
        stream.set_read_timeout(Some(patience(SOON)))?;
        stream.write_all(b"POST /exec/none HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
        Ok(())
    })
}

/// What has been read so far is not all that was to come.
#[test]
fn a_client_that_vanishes_is_not_the_end_of_its_programs_input() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("streams")?.idle("main")?;
        let script = "echo up; cat >/dev/null; echo read >/tmp/ended; sleep 1000";
        for number in 0..repeats(30)? {
            let mut command = Command::start(daemon, piped(&main, &["sh", "-c", script]))?;
            command.hear("up")?;
            command.say("half a file")?;
            drop(command);
            within(SOON, "nothing of it runs", || {
                Ok((!main.sh("ps -o args")?.contains("cat >/dev/null")).then_some(()))
            })?;
            ensure!(main.sh("ls /tmp")?.is_empty(), "the program saw an end of its input, round {number}");
        }
        Ok(())
    })
}
