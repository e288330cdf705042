//! The commands of kubectl that reach into a pod: exec, cp, attach, port-forward and debug. They go
//! through the API server and the kubelet to the daemon's streaming server.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, ensure};
use berth_tests::cluster::Cluster;
use berth_tests::daemon::Daemon;
use berth_tests::deadline::within;

use super::{ROLLOUT, ROLLOUT_FLAG};

/// Between kubectl and the API server: the WebSocket of today's kubectl, and SPDY, which it falls
/// back to.
const WEBSOCKETS: [&str; 2] = ["true", "false"];

/// More than windows and pipes hold.
const BYTES: usize = 5_000_000;

pub(super) fn commands_reach_into_a_pod(cluster: &Cluster, daemon: &Daemon) -> Result<()> {
    cluster.apply("tools.yaml")?;
    cluster.kubectl(&["wait", "--for=condition=Ready", ROLLOUT_FLAG, "pod/tools"])?;
    for websockets in WEBSOCKETS {
        let kubectl = Kubectl { cluster, websockets };
        exec(&kubectl).with_context(|| format!("exec, websockets {websockets}"))?;
        copies(&kubectl, daemon).with_context(|| format!("cp, websockets {websockets}"))?;
        attach(&kubectl).with_context(|| format!("attach, websockets {websockets}"))?;
        port_forward(&kubectl, daemon).with_context(|| format!("port-forward, websockets {websockets}"))?;
        debug(&kubectl).with_context(|| format!("debug, websockets {websockets}"))?;
    }
    cluster.delete("tools.yaml")
}

struct Kubectl<'a> {
    cluster: &'a Cluster<'a>,
    websockets: &'static str,
}

impl Kubectl<'_> {
    /// A running kubectl, its streams piped.
    fn start(&self, arguments: &[&str]) -> Result<Child> {
        let mut command = self.cluster.kubectl_command()?;
        command
            .env("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", self.websockets)
            .env("KUBECTL_PORT_FORWARD_WEBSOCKETS", self.websockets)
            .args(arguments);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        child.with_context(|| format!("starting kubectl {arguments:?}"))
    }

    /// Output, messages and exit code of one that gets `input` and ends on its own.
    fn run(&self, arguments: &[&str], input: Vec<u8>) -> Result<(Vec<u8>, String, Option<i32>)> {
        let mut child = self.start(arguments)?;
        let mut stdin = child.stdin.take().context("its input")?;
        let writing = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output()?;
        ensure!(writing.join().is_ok(), "the writing thread panicked");
        Ok((output.stdout, String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code()))
    }
}

fn bytes() -> Vec<u8> {
    (0..BYTES / 8).flat_map(|number| (number as u64).to_le_bytes()).collect()
}

fn exec(kubectl: &Kubectl<'_>) -> Result<()> {
    let script = "cat; echo complaint >&2; exit 3";
    let (out, messages, code) = kubectl.run(&["exec", "-i", "tools", "--", "sh", "-c", script], bytes())?;
    ensure!(out == bytes(), "{} bytes came back: {messages}", out.len());
    ensure!(code == Some(3) && messages.contains("complaint\n"), "{code:?} {messages}");
    let (_, messages, code) = kubectl.run(&["exec", "tools", "--", "/no/such/program"], Vec::new())?;
    ensure!(code != Some(0) && messages.contains("/no/such/program"), "{code:?} {messages}");
    Ok(())
}

fn copies(kubectl: &Kubectl<'_>, daemon: &Daemon) -> Result<()> {
    let (there, back) = (daemon.dir().join("there"), daemon.dir().join("back"));
    fs::write(&there, bytes())?;
    for (from, to) in
        [(&*there.to_string_lossy(), "tools:/tmp/it"), ("tools:/tmp/it", &*back.to_string_lossy())]
    {
        let (_, messages, code) = kubectl.run(&["cp", from, to], Vec::new())?;
        ensure!(code == Some(0), "{from} to {to}: {messages}");
    }
    ensure!(fs::read(&back)? == bytes(), "another file came back");
    fs::remove_file(there)?;
    Ok(fs::remove_file(back)?)
}

/// What it says arrives, and the next one finds the program as it was.
fn attach(kubectl: &Kubectl<'_>) -> Result<()> {
    for word in ["one", "two"] {
        let mut child = kubectl.start(&["attach", "-i", "tools"])?;
        child.stdin.as_mut().context("its input")?.write_all(format!("{word}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        child.kill()?;
        child.wait()?;
        ensure!(line == format!("heard {word}\n"), "it heard {line:?}");
    }
    Ok(())
}

fn port_forward(kubectl: &Kubectl<'_>, daemon: &Daemon) -> Result<()> {
    let mut child = kubectl.start(&["port-forward", "--address=127.0.0.1", "pod/tools", ":8080"])?;
    // It says more with each connection, and a closed pipe would end it.
    let mut said = BufReader::new(child.stdout.take().context("its output")?);
    let mut line = String::new();
    said.read_line(&mut line)?;
    let port = line.strip_prefix("Forwarding from 127.0.0.1:").and_then(|rest| rest.split_once(' '));
    let port: u16 = port.with_context(|| format!("it says {line:?}"))?.0.parse()?;
    let exchange = || -> Result<()> {
        let mut stream = daemon.host().inside(|| Ok(TcpStream::connect(("127.0.0.1", port))?))?;
        let mut writing = stream.try_clone()?;
        let write = std::thread::spawn(move || -> std::io::Result<()> {
            writing.write_all(&bytes())?;
            writing.shutdown(Shutdown::Write)
        });
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard)?;
        let written = write.join().ok().context("the writing thread panicked")?;
        ensure!(heard == bytes(), "{} bytes came back, {written:?}", heard.len());
        Ok(())
    };
    let exchanged = (0..3).try_for_each(|number| exchange().with_context(|| format!("connection {number}")));
    child.kill()?;
    let output = child.wait_with_output()?;
    exchanged.with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

/// An ephemeral container among the processes of the pod's own.
fn debug(kubectl: &Kubectl<'_>) -> Result<()> {
    let name = format!("debugger-{}", kubectl.websockets);
    let named = format!("--container={name}");
    let image = "--image=localhost/berth/demo:latest";
    let flags = ["debug", "tools", image, "--image-pull-policy=Never", "--target=tools", &named];
    let script = "grep -qx nc /proc/[0-9]*/comm && echo it is there";
    let (_, messages, code) = kubectl.run(&[&flags[..], &["--", "sh", "-c", script]].concat(), Vec::new())?;
    ensure!(code == Some(0), "{messages}");
    within(ROLLOUT, "the debugger has looked", || {
        let log = kubectl.cluster.kubectl(&["logs", "tools", &format!("--container={name}")])?;
        Ok((log == "it is there\n").then_some(()))
    })
}
