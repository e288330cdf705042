//! A command with its streams: what exec and attach have in common, on any transport.
//!
//! The sub-protocols are those of Kubernetes' remote command: `channel.k8s.io` and `v2` to `v4` of
//! it over SPDY, in which each stream has a header `streamType`; over WebSocket, messages whose
//! first byte is a channel.
//!
//! | version | on the error stream |
//! |---|---|
//! | 1 to 3 | nothing after success, else plain text |
//! | 4, 5 | a JSON object in the form of `metav1.Status`, always |

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{oneshot, watch};

use crate::budget::{self, End};
use crate::hangup::Hangup;
use crate::spdy::connection::{Closed, Incoming, Outgoing, Role};
use crate::spdy::{Connection, Limits, ResetStatus, Stream};
use crate::{IDLE, LEAVING, LINGER, STREAMS_WITHIN, websocket};

/// The streams that a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Standard input.
    pub stdin: bool,
    /// Standard output; of a terminal, all output.
    pub stdout: bool,
    /// Standard error; never with a terminal.
    pub stderr: bool,
    /// The command has a terminal, whose size the client may change.
    pub terminal: bool,
}

/// The size of a terminal in characters. Neither is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With this exit code.
    Exited(i32),
    /// Its program does not exist or cannot be run. The reason, as text for the client, and the
    /// exit code that a shell uses for it: 127 or 126.
    NotRun {
        /// The reason.
        text: String,
        /// The exit code of a shell.
        code: i32,
    },
    /// It could not be run, or its end is not known. Text for the client.
    Failed(String),
}

/// The client's end of the requested streams.
///
/// Output that is still queued when this is dropped is sent before the outcome.
#[derive(Debug)]
pub struct Session {
    /// Standard input, from the client.
    pub stdin: Option<Input>,
    /// Standard output, to the client.
    pub stdout: Option<Output>,
    /// Standard error, to the client.
    pub stderr: Option<Output>,
    /// The latest size of the client's terminal, once the client has sent one.
    pub size: Option<watch::Receiver<Option<Size>>>,
    /// Set when the client has said that it detaches: the program is to go on without it, if that
    /// can be.
    pub detached: Arc<AtomicBool>,
}

/// A future without a name.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Runs a command on the streams of a client. The future is dropped when the client goes away.
pub type Run = Box<dyn FnOnce(Session) -> BoxFuture<Outcome> + Send>;

/// Standard input, as it comes from the client.
#[derive(Debug)]
pub struct Input {
    data: budget::Receiver,
    /// Told when the connection is broken and everything that came before was received.
    drained: Option<oneshot::Sender<()>>,
}

impl Input {
    /// The input, and what resolves when the command has it all, or is gone.
    pub(crate) fn new(data: budget::Receiver) -> (Self, oneshot::Receiver<()>) {
        let (sender, drained) = oneshot::channel();
        (Self { data, drained: Some(sender) }, drained)
    }

    /// The next bytes; `None` at the end of the input. A broken connection is not an end: nothing
    /// comes then, and the command is given up.
    pub async fn receive(&mut self) -> Option<Bytes> {
        let received = self.data.receive().await;
        if received.is_none() && self.data.end() == End::Broken {
            drop(self.drained.take());
            return std::future::pending().await;
        }
        received
    }
}

/// Standard output or error, on its way to the client.
#[derive(Debug)]
pub struct Output(Way);

#[derive(Debug)]
enum Way {
    Spdy(Outgoing),
    WebSocket(websocket::Channel),
}

impl Output {
    pub(crate) fn over_websocket(channel: websocket::Channel) -> Self {
        Self(Way::WebSocket(channel))
    }

    /// Sends bytes; waits while the client is slow.
    ///
    /// # Errors
    /// [`Closed`] when the client no longer wants them.
    pub async fn send(&self, bytes: Bytes) -> Result<(), Closed> {
        match &self.0 {
            Way::Spdy(outgoing) => outgoing.send(bytes).await,
            Way::WebSocket(channel) => channel.send(&bytes).await,
        }
    }
}

/// A version of the sub-protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V1,
    V2,
    V3,
    V4,
    V5,
}

/// The sub-protocols over SPDY, by name.
pub(crate) const OVER_SPDY: [(&str, Version); 4] = [
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];

/// The reason of the cause that has a shell's exit code. It is Berth's own; Kubernetes' clients
/// print the message.
const SHELL_CODE: &str = "ShellExitCode";

/// The text on the error stream; `None` for none.
pub(crate) fn status(version: Version, outcome: &Outcome) -> Option<Bytes> {
    const NON_ZERO: &str = "command terminated with non-zero exit code";
    if version < Version::V4 {
        return match outcome {
            Outcome::Exited(0) => None,
            Outcome::Exited(code) => Some(format!("{NON_ZERO}: {code}").into()),
            Outcome::NotRun { text, .. } | Outcome::Failed(text) => Some(text.clone().into()),
        };
    }
    let status = match outcome {
        Outcome::Exited(0) => serde_json::json!({ "metadata": {}, "status": "Success" }),
        Outcome::Exited(code) => serde_json::json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("{NON_ZERO}: {code}"),
            "reason": "NonZeroExitCode",
            "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
        }),
        Outcome::NotRun { text, code } => {
            failure(text, &[serde_json::json!({ "reason": SHELL_CODE, "message": code.to_string() })])
        }
        Outcome::Failed(text) => failure(text, &[]),
    };
    Some(status.to_string().into())
}

/// The status of a command that failed on its own, with more causes than its message.
fn failure(text: &str, more: &[serde_json::Value]) -> serde_json::Value {
    let causes = [&[serde_json::json!({ "message": text })], more].concat();
    serde_json::json!({
        "metadata": {},
        "status": "Failure",
        "message": format!("Internal error occurred: {text}"),
        "reason": "InternalError",
        "details": { "causes": causes },
        "code": 500,
    })
}

/// The outcome in a status of version 4 or 5, if it has one. For clients: the reverse of
/// [`status`].
pub(crate) fn outcome(status: &[u8]) -> Option<Outcome> {
    let status: serde_json::Value = serde_json::from_slice(status).ok()?;
    if status["status"] == "Success" {
        return Some(Outcome::Exited(0));
    }
    let causes = status["details"]["causes"].as_array().map_or(&[][..], Vec::as_slice);
    let cause = |reason: &str| causes.iter().find(|cause| cause["reason"] == reason)?["message"].as_str();
    if status["reason"] == "NonZeroExitCode" {
        return Some(Outcome::Exited(cause("ExitCode")?.parse().ok()?));
    }
    let said = causes.iter().filter(|cause| cause["reason"].is_null()).find_map(|it| it["message"].as_str());
    let text = said.or(status["message"].as_str())?.to_owned();
    Some(match cause(SHELL_CODE).and_then(|code| code.parse().ok()) {
        Some(code) => Outcome::NotRun { text, code },
        None => Outcome::Failed(text),
    })
}

/// The sizes in a resize stream: JSON objects one after the other, cut anywhere.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    bytes: Vec<u8>,
    /// Whether the client has said that it detaches: `{"Detach":true}`.
    detaches: bool,
}

/// A size has some 30 bytes.
const MAX_SIZE_BYTES: usize = 4096;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WrittenSize {
    #[serde(default)]
    detach: bool,
    width: Option<u16>,
    height: Option<u16>,
}

/// The stream does not contain sizes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoSize;

impl Sizes {
    /// The last size in the data so far; `None` if none is complete, or it has a zero in it.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Option<Size>, NoSize> {
        self.bytes.extend_from_slice(bytes);
        let (mut last, mut read) = (None, 0);
        let mut sizes = serde_json::Deserializer::from_slice(&self.bytes).into_iter::<WrittenSize>();
        loop {
            match sizes.next() {
                Some(Ok(WrittenSize { width: Some(width), height: Some(height), .. })) => {
                    read = sizes.byte_offset();
                    if width > 0 && height > 0 {
                        last = Some(Size { width, height });
                    }
                }
                Some(Ok(WrittenSize { detach: true, .. })) => {
                    read = sizes.byte_offset();
                    self.detaches = true;
                }
                Some(Ok(_)) => return Err(NoSize),
                Some(Err(error)) if !error.is_eof() => return Err(NoSize),
                Some(Err(_)) | None => break,
            }
        }
        self.bytes.drain(..read);
        if self.bytes.len() > MAX_SIZE_BYTES { Err(NoSize) } else { Ok(last) }
    }
}

/// Passes sizes on until the stream ends or no longer contains sizes, and that the client detaches.
async fn follow_sizes(mut incoming: Incoming, sizes: watch::Sender<Option<Size>>, detached: Arc<AtomicBool>) {
    let mut parsed = Sizes::default();
    while let Some(bytes) = incoming.receive().await {
        match parsed.push(&bytes) {
            Ok(Some(size)) => drop(sizes.send_replace(Some(size))),
            Ok(None) => {}
            Err(NoSize) => return,
        }
        if parsed.detaches {
            detached.store(true, Ordering::Release);
        }
    }
}

/// The streams of a client over SPDY, as they come.
#[derive(Debug, Default)]
struct Streams {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Streams {
    /// The place for a stream of this type, if it is requested.
    fn place(&mut self, kind: &str, wanted: Wanted, version: Version) -> Option<&mut Option<Stream>> {
        match kind {
            "error" => Some(&mut self.error),
            "stdin" if wanted.stdin => Some(&mut self.stdin),
            "stdout" if wanted.stdout => Some(&mut self.stdout),
            "stderr" if wanted.stderr => Some(&mut self.stderr),
            "resize" if wanted.terminal && version >= Version::V3 => Some(&mut self.resize),
            _ => None,
        }
    }

    fn complete(&self, wanted: Wanted, version: Version) -> bool {
        self.error.is_some()
            && self.stdin.is_some() == wanted.stdin
            && self.stdout.is_some() == wanted.stdout
            && self.stderr.is_some() == wanted.stderr
            && self.resize.is_some() == (wanted.terminal && version >= Version::V3)
    }
}

/// Waits for the requested streams; `None` when they do not come in time.
async fn collect(connection: &mut Connection, wanted: Wanted, version: Version) -> Option<Streams> {
    let mut streams = Streams::default();
    while !streams.complete(wanted, version) {
        let stream = connection.accept().await?;
        let kind = stream.headers.get("streamtype").unwrap_or_default().to_owned();
        match streams.place(&kind, wanted, version) {
            Some(place @ None) => {
                stream.outgoing.reply().await.ok()?;
                *place = Some(stream);
            }
            // Not requested, or there already.
            _ => stream.outgoing.reset(ResetStatus::RefusedStream).await,
        }
    }
    Some(streams)
}

/// Serves one command over a SPDY connection.
pub(crate) async fn over_spdy<T>(io: T, hangup: Option<Hangup>, wanted: Wanted, version: Version, run: Run)
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    // Five streams at most; a client may open some that are refused.
    let limits = Limits { streams: 8, idle: IDLE, stall: None };
    let mut connection = Connection::new(io, Role::Server, limits, hangup);
    let collected = tokio::time::timeout(STREAMS_WITHIN, collect(&mut connection, wanted, version)).await;
    let Ok(Some(Streams { error: Some(error), stdin, stdout, stderr, resize })) = collected else {
        tracing::debug!("client did not open the streams of its command");
        return connection.close().await;
    };
    connection.accept_no_more();
    let error = error.without_input();
    let detached = Arc::new(AtomicBool::new(false));
    let (size, following) = resize
        .map(|stream| {
            let (sender, size) = watch::channel(None);
            (size, tokio::spawn(follow_sizes(stream.incoming, sender, detached.clone())))
        })
        .unzip();
    let ends: Vec<Outgoing> =
        stdout.iter().chain(stderr.iter()).map(|stream| stream.outgoing.clone()).collect();
    let (stdin, drained) = stdin.map(|stream| Input::new(stream.incoming.0)).unzip();
    let session = Session {
        stdin,
        stdout: stdout.map(|stream| Output(Way::Spdy(stream.without_input()))),
        stderr: stderr.map(|stream| Output(Way::Spdy(stream.without_input()))),
        size,
        detached,
    };
    let mut running = run(session);
    let outcome = tokio::select! {
        // First: the command must not mistake a broken connection for the end of its input.
        biased;
        () = connection.closed() => None,
        outcome = &mut running => Some(outcome),
    };
    if outcome.is_none() {
        // It may have said that it detaches.
        if let Some(following) = following {
            let _ = tokio::time::timeout(LEAVING, following).await;
        }
        hand_out(running, drained).await;
    }
    if let Some(outcome) = outcome {
        let say = async {
            for end in ends {
                // A stream that the client has reset needs no end.
                let _ = end.finish().await;
            }
            if let Some(status) = status(version, &outcome) {
                error.send(status).await?;
            }
            error.finish().await?;
            connection.written().await
        };
        // The client may read the rest as slowly as it read while the program ran.
        let said = tokio::select! {
            said = tokio::time::timeout(IDLE, say) => matches!(said, Ok(Ok(()))),
            () = connection.closed() => false,
        };
        if said {
            // The client closes when it has read the status; if the connection is closed before,
            // the status may be lost with it.
            let _ = tokio::time::timeout(LINGER, connection.closed()).await;
        }
    }
    connection.close().await;
}

/// Gives a command what its client sent before it left, such as a line that was typed before the
/// keys to detach.
pub(crate) async fn hand_out(running: BoxFuture<Outcome>, drained: Option<oneshot::Receiver<()>>) {
    let Some(drained) = drained else { return };
    let _ = tokio::time::timeout(LEAVING, async {
        tokio::select! {
            _ = drained => {}
            _ = running => {}
        }
    })
    .await;
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;
    use tokio::io::duplex;

    use super::*;
    use crate::spdy::Headers;

    #[test]
    fn a_status_has_the_form_that_clients_parse() {
        let json = |outcome| {
            let bytes = status(Version::V4, &outcome).unwrap();
            serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()
        };
        assert_eq!(json(Outcome::Exited(0))["status"], "Success");
        let failed = json(Outcome::Exited(137));
        assert_eq!((&failed["status"], &failed["reason"]), (&"Failure".into(), &"NonZeroExitCode".into()));
        let cause = &failed["details"]["causes"][0];
        assert_eq!((&cause["reason"], &cause["message"]), (&"ExitCode".into(), &"137".into()));
        let failed = json(Outcome::Failed("no \"such\" thing".to_owned()));
        assert_eq!(failed["message"], "Internal error occurred: no \"such\" thing");
        assert_eq!((&failed["reason"], &failed["code"]), (&"InternalError".into(), &500.into()));
        for version in [Version::V1, Version::V2, Version::V3] {
            assert_eq!(status(version, &Outcome::Exited(0)), None);
            assert!(status(version, &Outcome::Exited(3)).unwrap().ends_with(b": 3"));
        }
    }

    #[test]
    fn a_status_is_read_as_it_was_written() {
        for written in [
            Outcome::Exited(0),
            Outcome::Exited(137),
            Outcome::NotRun { text: "no file".to_owned(), code: 127 },
            Outcome::Failed("the shim is gone".to_owned()),
        ] {
            assert_eq!(outcome(&status(Version::V4, &written).unwrap()), Some(written));
        }
        // From another server, without causes.
        let other =
            br#"{"status":"Failure","message":"Internal error occurred: x","reason":"InternalError"}"#;
        assert_eq!(outcome(other), Some(Outcome::Failed("Internal error occurred: x".to_owned())));
        for no_status in [&b""[..], b"{", b"{}", br#"{"status":"Failure","reason":"NonZeroExitCode"}"#] {
            assert_eq!(outcome(no_status), None);
        }
    }

    #[test]
    fn sizes_are_read_whole_and_zeros_ignored() {
        let mut sizes = Sizes::default();
        assert_eq!(sizes.push(br#"{"Width":80,"He"#), Ok(None));
        assert_eq!(sizes.push(br#"ight":24}"#), Ok(Some(Size { width: 80, height: 24 })));
        let two = br#"{"Width":1,"Height":2}{"Width":3,"Height":4} {"Wi"#;
        assert_eq!(sizes.push(two), Ok(Some(Size { width: 3, height: 4 })));
        assert_eq!(sizes.push(br#"dth":0,"Height":4}"#), Ok(None));
        assert_eq!(sizes.push(br#"{"Width":70000,"Height":4}"#), Err(NoSize));
        assert_eq!(Sizes::default().push(b"{}"), Err(NoSize));
        let mut leaving = Sizes::default();
        assert_eq!(
            leaving.push(br#"{"Detach":false,"Width":3,"Height":4}"#),
            Ok(Some(Size { width: 3, height: 4 }))
        );
        assert!(!leaving.detaches);
        assert_eq!(leaving.push(br#"{"Detach":true}"#), Ok(None));
        assert!(leaving.detaches);
        assert_eq!(Sizes::default().push(b"hello"), Err(NoSize));
        assert_eq!(Sizes::default().push(&[b' '; MAX_SIZE_BYTES + 1]), Err(NoSize));
    }

    proptest! {
        #[test]
        fn any_bytes_are_sizes_or_refused(pieces in prop::collection::vec("[ -~]{0,40}", 0..10)) {
            let mut sizes = Sizes::default();
            for piece in pieces {
                if sizes.push(piece.as_bytes()).is_err() {
                    break;
                }
            }
        }
    }

    const ALL: Wanted = Wanted { stdin: true, stdout: true, stderr: true, terminal: false };

    fn echo() -> Run {
        Box::new(|mut session| {
            Box::pin(async move {
                let (mut stdin, stdout) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
                while let Some(bytes) = stdin.receive().await {
                    if stdout.send(bytes).await.is_err() {
                        return Outcome::Failed("closed".to_owned());
                    }
                }
                session.stderr.unwrap().send(Bytes::from_static(b"done")).await.unwrap();
                Outcome::Exited(3)
            })
        })
    }

    async fn all_of(stream: &mut Stream) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = stream.incoming.receive().await {
            all.extend_from_slice(&bytes);
        }
        all
    }

    async fn open(client: &mut Connection, kind: &str) -> Stream {
        client.open(&Headers::of(&[("streamType", kind)])).await.unwrap()
    }

    #[tokio::test]
    async fn a_command_gets_its_streams_in_any_order_and_its_status_comes_last() {
        let (near, far) = duplex(1024);
        let server = tokio::spawn(over_spdy(far, None, ALL, Version::V4, echo()));
        let limits = Limits { streams: 100, idle: IDLE, stall: None };
        let mut client = Connection::new(near, Role::Client, limits, None);
        let mut stderr = open(&mut client, "stderr").await;
        let mut unwanted = open(&mut client, "resize").await;
        let stdin = open(&mut client, "stdin").await;
        let mut stdout = open(&mut client, "stdout").await;
        let mut error = open(&mut client, "error").await;
        let text = vec![b'x'; 100_000];
        stdin.outgoing.send(text.clone().into()).await.unwrap();
        stdin.outgoing.finish().await.unwrap();
        assert!(all_of(&mut stdout).await == text);
        assert_eq!(all_of(&mut stderr).await, b"done");
        assert_eq!(all_of(&mut error).await, status(Version::V4, &Outcome::Exited(3)).unwrap());
        assert_eq!(unwanted.incoming.receive().await, None);
        client.close().await;
        server.await.unwrap();
    }

    /// A pager that is left alone on its first page.
    #[tokio::test(start_paused = true)]
    async fn a_client_that_pauses_at_the_end_gets_all_output_and_the_status() {
        let (near, far) = duplex(1024);
        // It fits into the writer's queue: the program ends at once.
        let output = Bytes::from(vec![b'x'; 300_000]);
        let (sent, ended) = (output.clone(), oneshot::channel::<()>());
        let run: Run = Box::new(move |session| {
            Box::pin(async move {
                session.stdout.unwrap().send(sent).await.unwrap();
                drop(ended.0);
                Outcome::Exited(3)
            })
        });
        let wanted = Wanted { stdout: true, ..Wanted::default() };
        let server = tokio::spawn(over_spdy(far, None, wanted, Version::V4, run));
        let limits = Limits { streams: 100, idle: IDLE, stall: None };
        let mut client = Connection::new(near, Role::Client, limits, None);
        let (mut stdout, mut error) = (open(&mut client, "stdout").await, open(&mut client, "error").await);
        assert!(ended.1.await.is_err());
        tokio::time::sleep(10 * LINGER).await;
        assert_eq!(all_of(&mut stdout).await, output);
        assert_eq!(all_of(&mut error).await, status(Version::V4, &Outcome::Exited(3)).unwrap());
        client.close().await;
        server.await.unwrap();
    }

    /// A command that reports when its input has ended.
    pub(crate) fn reading_its_input(ended: oneshot::Sender<()>) -> Run {
        Box::new(move |mut session| {
            Box::pin(async move {
                while session.stdin.as_mut().unwrap().receive().await.is_some() {}
                let _ = ended.send(());
                Outcome::Exited(0)
            })
        })
    }

    /// A terminal that is detached right after a line was typed.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_client_sends_before_it_leaves_is_the_commands() {
        for _ in 0..100 {
            let (near, far) = duplex(1024);
            let (began, begin) = oneshot::channel::<()>();
            let kept = Arc::new(Mutex::new(Vec::new()));
            let keeper = kept.clone();
            let run: Run = Box::new(move |mut session| {
                Box::pin(async move {
                    let _ = began.send(());
                    while let Some(bytes) = session.stdin.as_mut().unwrap().receive().await {
                        // As long as a write to a busy program's terminal takes.
                        tokio::task::yield_now().await;
                        keeper.lock().unwrap().extend_from_slice(&bytes);
                    }
                    Outcome::Exited(0)
                })
            });
            let wanted = Wanted { stdin: true, ..Wanted::default() };
            let server = tokio::spawn(over_spdy(far, None, wanted, Version::V4, run));
            let limits = Limits { streams: 100, idle: IDLE, stall: None };
            let mut client = Connection::new(near, Role::Client, limits, None);
            let (stdin, _error) = (open(&mut client, "stdin").await, open(&mut client, "error").await);
            begin.await.unwrap();
            for piece in ["exit", "\n"] {
                stdin.outgoing.send(Bytes::from_static(piece.as_bytes())).await.unwrap();
            }
            client.close().await;
            server.await.unwrap();
            assert_eq!(*kept.lock().unwrap(), b"exit\n");
        }
    }

    /// A program that does not read does not keep its command alive.
    #[tokio::test(start_paused = true)]
    async fn a_command_that_does_not_read_ends_soon_after_its_client_has_left() {
        let (near, far) = duplex(1024);
        let run: Run = Box::new(|session| {
            Box::pin(async move {
                let _session = session;
                std::future::pending().await
            })
        });
        let wanted = Wanted { stdin: true, ..Wanted::default() };
        let server = tokio::spawn(over_spdy(far, None, wanted, Version::V4, run));
        let limits = Limits { streams: 100, idle: IDLE, stall: None };
        let mut client = Connection::new(near, Role::Client, limits, None);
        let (stdin, _error) = (open(&mut client, "stdin").await, open(&mut client, "error").await);
        stdin.outgoing.send(Bytes::from_static(b"unread")).await.unwrap();
        client.close().await;
        tokio::time::timeout(2 * LEAVING, server).await.unwrap().unwrap();
    }

    /// Some programs act on what they have read once their input ends.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_connection_that_breaks_is_not_the_end_of_the_input() {
        for _ in 0..100 {
            let (near, far) = duplex(1024);
            let (sender, input_ended) = oneshot::channel::<()>();
            let run = reading_its_input(sender);
            let wanted = Wanted { stdin: true, ..Wanted::default() };
            let server = tokio::spawn(over_spdy(far, None, wanted, Version::V4, run));
            let limits = Limits { streams: 100, idle: IDLE, stall: None };
            let mut client = Connection::new(near, Role::Client, limits, None);
            let (stdin, mut error) = (open(&mut client, "stdin").await, open(&mut client, "error").await);
            stdin.outgoing.send(Bytes::from_static(b"half a file")).await.unwrap();
            assert!(client.written().await.is_ok());
            drop(client);
            assert!(input_ended.await.is_err());
            assert!(all_of(&mut error).await.is_empty());
            server.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_client_that_goes_away_ends_its_command() {
        let (near, far) = duplex(1024);
        let (sender, ended) = oneshot::channel::<()>();
        let run: Run = Box::new(move |_session| {
            Box::pin(async move {
                let _sender = sender;
                std::future::pending().await
            })
        });
        let wanted = Wanted { stdout: true, ..Wanted::default() };
        let server = tokio::spawn(over_spdy(far, None, wanted, Version::V4, run));
        let limits = Limits { streams: 100, idle: IDLE, stall: None };
        let mut client = Connection::new(near, Role::Client, limits, None);
        let (_out, _error) = (open(&mut client, "stdout").await, open(&mut client, "error").await);
        drop(client);
        assert!(ended.await.is_err());
        server.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn streams_that_never_come_are_not_waited_for() {
        let (near, far) = duplex(1024);
        let run: Run = Box::new(|_| Box::pin(async { unreachable!("it has no streams") }));
        let start = tokio::time::Instant::now();
        let server = tokio::spawn(over_spdy(far, None, ALL, Version::V4, run));
        let limits = Limits { streams: 100, idle: IDLE, stall: None };
        let mut client = Connection::new(near, Role::Client, limits, None);
        let _error = open(&mut client, "error").await;
        server.await.unwrap();
        assert!(start.elapsed() >= STREAMS_WITHIN);
    }
}
