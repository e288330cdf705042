//! gRPC clients in other languages: over a Unix socket they send any text as `:authority`, and it
//! means nothing.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::daemon::{SOON, rootful};
use berth_tests::deadline::{patience, within};
use berth_tests::pod::idle;
use berth_tests::program::output;
use berth_tests::skip::skip;
use prost::Message as _;
use tonic::Code;

/// The release of grpcio, which is C-core: the gRPC of Python, C++, Ruby and PHP.
const GRPCIO: &str = "grpcio==1.76.0";

/// Calls Version of the CRI, of an unknown service, and Facts of `berth.v1`, without generated
/// code: it sends an empty message, and receives bytes. The arguments are the socket and, unless
/// the library chooses it, the authority.
const SCRIPT: &str = r#"
import sys, grpc
options = [("grpc.default_authority", sys.argv[2])] if len(sys.argv) > 2 else []
channel = grpc.insecure_channel("unix://" + sys.argv[1], options=options)
def call(method):
    return channel.unary_unary(method, request_serializer=lambda x: x, response_deserializer=lambda x: x)(b"", timeout=10)
# Several on one connection: from the second on, headers are references to the first call's.
for _ in range(3):
    assert b"berth" in call("/runtime.v1.RuntimeService/Version")
    call("/runtime.v1.ImageService/ListImages")
try:
    call("/berth.v1.Berth/NoSuchCall")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error
print("served")
"#;

/// A Python that has grpcio, in its own environment below `target/`; or why there is none.
fn python() -> Result<Result<PathBuf, String>> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(GRPCIO.replace("==", "-"));
    let python = directory.join("bin/python");
    if has_grpc(&python) {
        return Ok(Ok(python));
    }
    let step = |command: &mut Command| output(command).map_err(|error| format!("{error:#}"));
    let made = step(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory)).and_then(|_| {
        let pip =
            ["-m", "pip", "install", "--quiet", "--only-binary=:all:", "--disable-pip-version-check", GRPCIO];
        step(Command::new(&python).args(pip))
    });
    if let Err(why) = made {
        return Ok(Err(why));
    }
    ensure!(has_grpc(&python), "pip has installed {GRPCIO}, and it cannot be imported");
    Ok(Ok(python))
}

fn has_grpc(python: &Path) -> bool {
    Command::new(python).args(["-c", "import grpc"]).output().is_ok_and(|done| done.status.success())
}

#[test]
fn a_stock_python_client_is_served_whatever_it_calls_the_socket() -> Result<()> {
    let python = match python()? {
        Ok(python) => python,
        Err(why) => {
            skip("clients::a_stock_python_client_is_served_whatever_it_calls_the_socket", &why);
            return Ok(());
        }
    };
    rootful(|daemon| {
        let socket = daemon.socket().to_string_lossy().into_owned();
        // Its own choice, the escaped path, comes first.
        for authority in
            [None, Some(socket.as_str()), Some("localhost"), Some("a b"), Some("[::1"), Some("%zz")]
        {
            let mut client = Command::new(&python);
            client.args(["-c", SCRIPT, &socket]).args(authority);
            let said = output(&mut client).with_context(|| format!("authority {authority:?}"))?;
            ensure!(said == "served\n", "authority {authority:?}: {said}");
        }
        Ok(())
    })
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A literal header of HPACK (RFC 7541 section 6.2.2) that is shorter than 127 bytes.
fn header(name: &str, value: &[u8]) -> Vec<u8> {
    let length = |bytes: &[u8]| u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    [&[0, length(name.as_bytes())], name.as_bytes(), &[length(value)], value].concat()
}

/// Calls Version with these headers before the usual ones, and returns the kinds of frames that
/// arrive on the stream until it ends.
fn ask(socket: &Path, headers: &[u8]) -> Result<Vec<u8>> {
    let block = [
        &[0x83, 0x86][..],
        headers,
        &header(":path", b"/runtime.v1.RuntimeService/Version"),
        &header("content-type", b"application/grpc"),
        &header("te", b"trailers"),
    ]
    .concat();
    let mut stream = UnixStream::connect(socket).context("connecting")?;
    stream.set_read_timeout(Some(patience(Duration::from_secs(20))))?;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")?;
    stream.write_all(&[frame(4, 0, 0, &[]), frame(1, 4, 1, &block), frame(0, 1, 1, &[0; 5])].concat())?;
    let mut kinds = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).context("reading a frame")?;
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        stream.read_exact(&mut payload).context("reading a payload")?;
        let (kind, flags) = (head[3], head[4]);
        if head[5..] == 1_u32.to_be_bytes() {
            kinds.push(kind);
            // END_STREAM of HEADERS or DATA, or RST_STREAM.
            if kind == 3 || flags & 1 == 1 {
                return Ok(kinds);
            }
        }
        ensure!(kind != 7, "the connection is closed: {payload:?}");
    }
}

#[test]
fn any_authority_is_served_and_a_refused_request_is_logged() -> Result<()> {
    rootful(|daemon| {
        let socket = daemon.socket();
        let path = socket.to_string_lossy().into_owned();
        let escaped = path.trim_start_matches('/').replace('/', "%2F");
        // Headers, data, trailers.
        let served = [1, 0, 1];
        for authority in [path.as_bytes(), escaped.as_bytes(), b"localhost", b"", b"\xff\x01", b"[", b"a@"] {
            let kinds = ask(&socket, &header(":authority", authority))?;
            ensure!(kinds == served, "{:?}: {kinds:?}", String::from_utf8_lossy(authority));
        }
        ensure!(ask(&socket, &[])? == served, "none at all");
        ensure!(!daemon.log()?.contains("refused a request"), "nothing was refused");
        // A request with two paths has no meaning.
        ensure!(ask(&socket, &header(":path", b"/x"))?.contains(&3), "it is reset");
        within(Duration::from_secs(10), "the log says so", || {
            let log = daemon.log()?;
            let line = log.lines().find(|line| line.contains("refused a request"));
            Ok(line.is_some_and(|line| line.contains(&format!("pid={}", std::process::id()))).then_some(()))
        })?;
        let many: Vec<u8> = (0..130).flat_map(|_| header("x", &[b'x'; 100])).collect();
        ensure!(ask(&socket, &many).is_ok(), "too many headers are answered");
        ensure!(daemon.log()?.contains("its headers have more than 16384 bytes"), "and the log says so");
        Ok(())
    })
}

/// Calls ExecSync with this `grpc-timeout`, and returns the status that the server answers with.
/// The client has no timer of its own.
async fn status_of_exec(socket: PathBuf, timeout: &str, request: &v1::ExecSyncRequest) -> Result<String> {
    let stream = tokio::net::UnixStream::connect(socket).await?;
    let (mut client, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let head = http::Request::post("http://localhost/runtime.v1.RuntimeService/ExecSync")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(())?;
    let (answer, mut body) = client.send_request(head, false)?;
    let message = request.encode_to_vec();
    let length = u32::try_from(message.len())?.to_be_bytes();
    body.send_data([&[0][..], &length, &message].concat().into(), true)?;
    let answer = tokio::time::timeout(patience(SOON), answer).await.context("no answer")??;
    let status = answer.headers().get("grpc-status").context("an answer without an error")?;
    Ok(status.to_str()?.to_owned())
}

#[test]
fn a_call_that_is_ended_at_its_deadline_says_so() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("deadline")?.start(idle("main"))?;
        let request = v1::ExecSyncRequest {
            container_id: main.id.clone(),
            cmd: ["sleep", "1000"].map(str::to_owned).to_vec(),
            timeout: 0,
        };
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // In units coarser and finer than the resolution of timers.
        for timeout in ["300m", "1m", "900u", "1n", "0S"] {
            let status = tokio.block_on(status_of_exec(daemon.socket(), timeout, &request))?;
            ensure!(status == (Code::DeadlineExceeded as i32).to_string(), "{timeout}: {status}");
        }
        Ok(())
    })
}
