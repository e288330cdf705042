//! `berth port-forward`: listening here, and what comes of connections.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::pod::{Pod, shell};

/// A running port-forward, killed when dropped, and the addresses that it announced.
pub(crate) struct Forward {
    child: Child,
    pub(crate) addresses: Vec<String>,
    stderr: Arc<Mutex<String>>,
}

impl Forward {
    /// All that it has said beside.
    fn said(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn forward(daemon: &Daemon, arguments: &[&str], lines: usize) -> Result<Forward> {
    let mut command = daemon.berth()?;
    let mut child =
        command.arg("port-forward").args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stdout = BufReader::new(child.stdout.take().context("stdout")?);
    let remarks = BufReader::new(child.stderr.take().context("stderr")?);
    let stderr = Arc::new(Mutex::new(String::new()));
    let collected = stderr.clone();
    std::thread::spawn(move || {
        for line in remarks.lines().map_while(Result::ok) {
            collected.lock().unwrap_or_else(PoisonError::into_inner).push_str(&(line + "\n"));
        }
    });
    let mut forward = Forward { child, addresses: Vec::new(), stderr };
    for line in stdout.lines().take(lines) {
        let line = line?;
        let (address, _) = line.split_once(" -> ").with_context(|| line.clone())?;
        forward.addresses.push(address.to_owned());
    }
    ensure!(forward.addresses.len() == lines, "it announced only {:?}", forward.addresses);
    Ok(forward)
}

fn connect(daemon: &Daemon, address: &str) -> Result<TcpStream> {
    let stream = daemon.host().inside(|| Ok(TcpStream::connect(address)?))?;
    stream.set_read_timeout(Some(patience(SOON)))?;
    Ok(stream)
}

/// Sends, finishes, and reads the whole answer.
fn ask(stream: &TcpStream, text: &[u8]) -> Result<Vec<u8>> {
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || -> Result<()> {
            let mut to = stream;
            to.write_all(text)?;
            Ok(stream.shutdown(Shutdown::Write)?)
        });
        let (mut from, mut answer) = (stream, Vec::new());
        from.read_to_end(&mut answer)?;
        sending.join().expect("the sender does not panic")?;
        Ok(answer)
    })
}

/// A pod with a server on port 8080 that sends everything back.
pub(crate) fn serve(daemon: &Daemon) -> Result<Pod> {
    let pod = daemon.pod("web")?;
    let main = pod.start(shell("main", "nc -ll -p 8080 -e cat & sleep 1000 & wait"))?;
    within(SOON, "it listens", || Ok(main.sh("netstat -ltn")?.contains(":8080 ").then_some(())))?;
    Ok(pod)
}

/// Connects and waits until the server has accepted: its queue is short.
pub(crate) fn greeted(daemon: &Daemon, address: &str) -> Result<TcpStream> {
    let mut stream = connect(daemon, address)?;
    stream.write_all(b"?")?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    ensure!(byte == *b"?", "{byte:?} came back");
    Ok(stream)
}

#[test]
fn connections_go_to_the_pod_side_by_side_from_both_loopback_addresses() -> Result<()> {
    rootful(|daemon| {
        let _pod = serve(daemon)?;
        let forward = forward(daemon, &["web", ":8080", "9090:8080"], 4)?;
        let any = &forward.addresses[0];
        let port = any.rsplit(':').next().context("a port")?;
        let expected = [format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
        assert_eq!(&forward.addresses[..2], &expected);
        assert_eq!(&forward.addresses[2..], ["127.0.0.1:9090", "[::1]:9090"]);
        // One that says nothing and one that reads nothing hold up no others.
        let _silent = greeted(daemon, any)?;
        let mut deaf = greeted(daemon, any)?;
        deaf.write_all(&vec![b'x'; 1024 * 1024])?;
        let long: Vec<u8> = (0..8_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let streams = (0..30)
            .map(|number| greeted(daemon, &forward.addresses[number % 4]))
            .collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let asked: Vec<_> = streams
                .iter()
                .enumerate()
                .map(|(number, stream)| {
                    let text = if number == 0 { long.clone() } else { format!("number {number}").into() };
                    scope.spawn(move || {
                        let answer = ask(stream, &text)?;
                        let same = answer.iter().zip(&text).take_while(|(one, other)| one == other).count();
                        ensure!(
                            answer == text,
                            "{} of {} bytes, the same for {same}",
                            answer.len(),
                            text.len()
                        );
                        Ok(())
                    })
                })
                .collect();
            for thread in asked {
                thread.join().expect("the client does not panic").with_context(|| forward.said())?;
            }
            Ok(())
        })
    })
}

#[test]
fn what_cannot_be_forwarded_is_told_and_ends_nothing() -> Result<()> {
    rootful(|daemon| {
        let _pod = serve(daemon)?;
        let forward = forward(daemon, &["web", ":81", ":8080"], 4)?;
        // The pod's server refuses; the client sees an end.
        let mut refused = connect(daemon, &forward.addresses[0])?;
        assert_eq!(refused.read(&mut [0]).unwrap_or(0), 0);
        within(SOON, "the reason is told", || {
            let said = forward.said();
            Ok((said.contains("web:81") && said.contains("refused")).then_some(()))
        })?;
        // A restarted daemon is found again.
        daemon.crash()?;
        within(SOON, "the other port still works", || {
            Ok((ask(&greeted(daemon, &forward.addresses[2])?, b"hello")? == b"hello").then_some(()))
        })?;
        // A taken port, a pod that is not there, and one that is stopped.
        let taken = forward.addresses[0].rsplit(':').next().context("a port")?.to_owned();
        for (arguments, said) in [
            (vec!["web".to_owned(), format!("{taken}:80")], taken.as_str()),
            (vec!["nowhere".to_owned(), "80".to_owned()], "`nowhere`"),
            (vec!["web".to_owned(), "http".to_owned()], "`http`"),
        ] {
            let output = daemon.berth()?.arg("port-forward").args(&arguments).output()?;
            assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
            assert!(String::from_utf8_lossy(&output.stderr).contains(said), "{output:?}");
        }
        daemon.berth()?.args(["stop", "web"]).output()?;
        let output = daemon.berth()?.args(["port-forward", "web", "80"]).output()?;
        assert!(String::from_utf8_lossy(&output.stderr).contains("stopped"), "{output:?}");
        Ok(())
    })
}
