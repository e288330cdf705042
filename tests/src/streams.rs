//! A client of the streaming URLs, as a kubelet is one: SPDY/3.1 over an upgraded HTTP/1.1
//! connection.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_streaming::spdy::connection::{Incoming, Limits, Role};
use berth_streaming::spdy::{Connection, Headers, ResetStatus, Stream};
use bytes::Bytes;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::daemon::{Daemon, SOON};
use crate::deadline::patience;

/// An upgraded connection.
#[derive(Debug)]
pub struct Client {
    tokio: Runtime,
    connection: Connection,
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// All that was left of its standard output.
    pub stdout: String,
    /// All that was left of its standard error.
    pub stderr: String,
    /// What the error stream said.
    pub status: serde_json::Value,
}

impl Finished {
    /// The exit code; `None` for another failure.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        if self.status["status"] == "Success" {
            return Some(0);
        }
        self.status.pointer("/details/causes/0/message")?.as_str()?.parse().ok()
    }
}

/// A connection of the daemon's own test host to the server of `url`, and the path to ask for.
///
/// # Errors
/// When nothing listens there.
pub fn dial<'a>(daemon: &Daemon, url: &'a str) -> Result<(TcpStream, &'a str)> {
    let rest = url.strip_prefix("http://").with_context(|| format!("{url} is not http"))?;
    let (address, _) = rest.split_once('/').context("the URL has no path")?;
    let path = &rest[address.len()..];
    let stream = daemon
        .host()
        .inside(|| Ok(TcpStream::connect(address)?))
        .with_context(|| format!("connecting to {address}"))?;
    Ok((stream, path))
}

/// Sends the request for an upgrade to SPDY and returns the head of the answer.
///
/// # Errors
/// When the connection breaks off before.
pub fn ask(stream: &mut TcpStream, path: &str, protocol: &str) -> Result<String> {
    stream.set_read_timeout(Some(patience(SOON)))?;
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: {protocol}\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut head = Vec::new();
    let mut byte = [0];
    // Not a byte of what comes after the head.
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(stream.read(&mut byte)? == 1, "closed after {:?}", String::from_utf8_lossy(&head));
        head.extend_from_slice(&byte);
    }
    Ok(String::from_utf8(head)?)
}

/// Lets this process have as many descriptors as it may: a client takes five, and a login shell's
/// limit is 1,024.
fn raise_descriptor_limit() {
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

impl Client {
    /// Connects to a URL with this sub-protocol.
    ///
    /// # Errors
    /// When the server refuses the upgrade.
    pub fn connect(daemon: &Daemon, url: &str, protocol: &str) -> Result<Self> {
        let (mut stream, path) = dial(daemon, url)?;
        let answer = ask(&mut stream, path, protocol)?;
        ensure!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        stream.set_nonblocking(true)?;
        raise_descriptor_limit();
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let connection = {
            let _inside = tokio.enter();
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let limits = Limits { streams: 1000, idle: Duration::from_secs(3600), stall: None };
            Connection::new(stream, Role::Client, limits, None)
        };
        Ok(Self { tokio, connection })
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// When the connection is over.
    pub fn open(&mut self, headers: &[(&str, &str)]) -> Result<Stream> {
        Ok(self.tokio.block_on(self.connection.open(&Headers::of(headers)))?)
    }

    /// Opens the two streams of a forwarded connection: error and data.
    ///
    /// # Errors
    /// When the connection is over.
    pub fn forward(&mut self, port: u16, id: &str) -> Result<(Stream, Stream)> {
        let port = port.to_string();
        let headers = |kind| [("streamType", kind), ("port", port.as_str()), ("requestID", id)];
        Ok((self.open(&headers("error"))?, self.open(&headers("data"))?))
    }

    /// Sends data.
    ///
    /// # Errors
    /// When the stream is closed.
    pub fn send(&self, stream: &Stream, text: impl Into<Bytes>) -> Result<()> {
        Ok(self.tokio.block_on(stream.outgoing.send(text.into()))?)
    }

    /// Says that no more data follows.
    ///
    /// # Errors
    /// When the stream is closed.
    pub fn finish(&self, stream: &Stream) -> Result<()> {
        Ok(self.tokio.block_on(stream.outgoing.finish())?)
    }

    /// Reads a stream to its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn all_of(&self, stream: &mut Stream) -> Result<Vec<u8>> {
        self.read(&mut stream.incoming, None)
    }

    /// Reads until what came has this text in it.
    ///
    /// # Errors
    /// When the stream ends before, or that does not come in time.
    pub fn until(&self, stream: &mut Stream, text: &str) -> Result<String> {
        let read = self.read(&mut stream.incoming, Some(text))?;
        let read = String::from_utf8_lossy(&read).into_owned();
        ensure!(read.contains(text), "{text:?} did not come, but {read:?}");
        Ok(read)
    }

    fn read(&self, from: &mut Incoming, until: Option<&str>) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let reading = async {
            while let Some(bytes) = from.receive().await {
                all.extend_from_slice(&bytes);
                if until.is_some_and(|text| String::from_utf8_lossy(&all).contains(text)) {
                    return;
                }
            }
        };
        let in_time = self.tokio.block_on(async { timeout(patience(SOON), reading).await });
        in_time.map_err(|_| anyhow!("nothing more after {:?}", String::from_utf8_lossy(&all)))?;
        Ok(all)
    }
}

/// A command, run by Exec.
#[derive(Debug)]
pub struct Command {
    /// Its connection.
    pub client: Client,
    /// Its standard input.
    pub stdin: Option<Stream>,
    /// Its standard output.
    pub stdout: Option<Stream>,
    /// Its standard error.
    pub stderr: Option<Stream>,
    /// Sizes of its terminal.
    pub resize: Option<Stream>,
    error: Stream,
}

impl Command {
    /// Connects to a URL of Exec and opens the streams of the request.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn connect(daemon: &Daemon, url: &str, request: &berth_cri::v1::ExecRequest) -> Result<Self> {
        let mut client = Client::connect(daemon, url, "v4.channel.k8s.io")?;
        let error = client.open(&[("streamType", "error")])?;
        let mut open = |wanted, kind| -> Result<Option<Stream>> {
            if wanted { client.open(&[("streamType", kind)]).map(Some) } else { Ok(None) }
        };
        let stdin = open(request.stdin, "stdin")?;
        let stdout = open(request.stdout, "stdout")?;
        let stderr = open(request.stderr, "stderr")?;
        let resize = open(request.tty, "resize")?;
        Ok(Self { client, stdin, stdout, stderr, resize, error })
    }

    /// Runs a command in a container: Exec, and the connection.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn start(daemon: &Daemon, request: berth_cri::v1::ExecRequest) -> Result<Self> {
        let url = daemon.client().exec(request.clone())?.url;
        Self::connect(daemon, &url, &request)
    }

    /// Attaches to a container: Attach, and the connection.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub fn attach(daemon: &Daemon, request: berth_cri::v1::AttachRequest) -> Result<Self> {
        let url = daemon.client().attach(request.clone())?.url;
        Self::attach_at(daemon, &url, &request)
    }

    /// Connects to a URL of Attach and opens the streams of the request.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn attach_at(daemon: &Daemon, url: &str, request: &berth_cri::v1::AttachRequest) -> Result<Self> {
        let streams = berth_cri::v1::ExecRequest {
            container_id: request.container_id.clone(),
            cmd: Vec::new(),
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        Self::connect(daemon, url, &streams)
    }

    /// Sends standard input.
    ///
    /// # Errors
    /// When it was not asked for, or is closed.
    pub fn say(&self, text: impl Into<Bytes>) -> Result<()> {
        self.client.send(self.stdin.as_ref().context("no standard input")?, text)
    }

    /// Ends standard input.
    ///
    /// # Errors
    /// When it was not asked for, or is closed.
    pub fn end_input(&self) -> Result<()> {
        self.client.finish(self.stdin.as_ref().context("no standard input")?)
    }

    /// Reads standard output until it has this text.
    ///
    /// # Errors
    /// When that does not come in time.
    pub fn hear(&mut self, text: &str) -> Result<String> {
        self.client.until(self.stdout.as_mut().context("no standard output")?, text)
    }

    /// Says that no more output is wanted.
    ///
    /// # Errors
    /// When there is none.
    pub fn reset_output(&mut self) -> Result<()> {
        let stream = self.stdout.take().context("no standard output")?;
        self.client.tokio.block_on(stream.outgoing.reset(ResetStatus::Cancel));
        Ok(())
    }

    /// Says that the client's terminal has this size.
    ///
    /// # Errors
    /// When the command has no terminal.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        let size = format!("{{\"Width\":{width},\"Height\":{height}}}");
        self.client.send(self.resize.as_ref().context("no terminal")?, size)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn finished(mut self) -> Result<Finished> {
        let rest = |stream: &mut Option<Stream>| -> Result<String> {
            match stream {
                Some(stream) => Ok(String::from_utf8_lossy(&self.client.all_of(stream)?).into_owned()),
                None => Ok(String::new()),
            }
        };
        let (stdout, stderr) = (rest(&mut self.stdout)?, rest(&mut self.stderr)?);
        let status = self.client.all_of(&mut self.error)?;
        let status = serde_json::from_slice(&status).context("the error stream is no JSON")?;
        Ok(Finished { stdout, stderr, status })
    }
}
