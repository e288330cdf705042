//! The rewritten stream against `h2`, which is what reads it in the daemon, and whose client is one
//! of those that write it.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::*;

const MAX_HEADERS: usize = 24;

/// A request as the server saw it.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    method: String,
    authority: Option<String>,
    path: String,
    headers: HeaderMap,
}

/// Serves all requests of a client, tells of each, and returns how the connection ended.
async fn serve(stream: DuplexStream, seen: UnboundedSender<Seen>) -> Result<(), h2::Error> {
    let mut builder = h2::server::Builder::new();
    builder.max_header_list_size(MAX_HEADER_LIST);
    let mut connection = builder.handshake::<_, bytes::Bytes>(Connection::of(stream, 0)).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        let _ = seen.send(Seen {
            method: request.method().to_string(),
            authority: request.uri().authority().map(ToString::to_string),
            path: request.uri().path().to_owned(),
            headers: request.headers().clone(),
        });
        respond.send_response(http::Response::new(()), true)?;
    }
    Ok(())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Sends `bytes` after the preface and empty settings, and ends after `requests` were seen. Returns
/// what the server saw, how it ended, and what it answered.
fn raw(bytes: &[u8], buffer: usize, requests: usize) -> (Vec<Seen>, Result<(), h2::Error>, Vec<u8>) {
    let sent = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".as_slice(), bytes].concat();
    let work = async {
        let (client, server) = duplex(buffer);
        let (sender, mut receiver) = unbounded_channel();
        let server = tokio::spawn(serve(server, sender));
        let (mut from, mut to) = tokio::io::split(client);
        let reading = tokio::spawn(async move {
            let mut answer = Vec::new();
            let _ = from.read_to_end(&mut answer).await;
            answer
        });
        // A server that has closed the connection does not read on.
        let _ = to.write_all(&sent).await;
        let mut seen = Vec::new();
        while seen.len() < requests {
            let Some(request) = receiver.recv().await else { break };
            seen.push(request);
        }
        if requests > 0 {
            let _ = to.shutdown().await;
        }
        let end = server.await.unwrap();
        drop(to);
        (seen, end, reading.await.unwrap())
    };
    runtime().block_on(async { tokio::time::timeout(Duration::from_secs(20), work).await.unwrap() })
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A whole request without a body.
fn request(stream: u32, block: &[u8]) -> Vec<u8> {
    frame(1, 0x5, stream, block)
}

/// POST, http, and a path of two bytes.
const REST: &[u8] = &[0x83, 0x86, 0x04, 2, b'/', b'x'];

fn string(text: &[u8]) -> Vec<u8> {
    let mut output = Vec::new();
    number(&mut output, 0, 7, text.len());
    [&output, text].concat()
}

fn number(output: &mut Vec<u8>, flags: u8, prefix: u32, mut value: usize) {
    let mask = (1_usize << prefix) - 1;
    if value < mask {
        output.push(flags | u8::try_from(value).unwrap());
        return;
    }
    output.push(flags | u8::try_from(mask).unwrap());
    value -= mask;
    while value >= 128 {
        output.push(u8::try_from(value % 128).unwrap() | 0x80);
        value /= 128;
    }
    output.push(u8::try_from(value).unwrap());
}

#[test]
fn any_authority_in_any_form_is_served() {
    let values: &[&[u8]] = &[
        b"localhost",
        b"run%2Fberth%2Fberth.sock",
        b"/run/berth/berth.sock",
        b"",
        b"unix:///run/berth/berth.sock",
        b"a b",
        b"[::1",
        b"user@",
        b"\xff\xfe",
        &[b'x'; 9000],
    ];
    let plain = string(b":authority");
    let coded = [0x88, 0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
    for value in values {
        for flags in [0x40, 0x00, 0x10] {
            for name in [&[flags | 1][..], &[&[flags], &plain[..]].concat(), &[&[flags], &coded[..]].concat()]
            {
                let block = [name, &string(value), REST].concat();
                // The second request refers to the first one's table where there is something in
                // it.
                let again =
                    [if flags == 0x40 && value.len() < 4000 { &[0xbe][..] } else { &[0x81] }, REST].concat();
                let (seen, end, _) = raw(&[request(1, &block), request(3, &again)].concat(), 1 << 16, 2);
                end.unwrap();
                assert_eq!(seen.len(), 2, "{:?}", String::from_utf8_lossy(value));
                for request in seen {
                    assert_eq!(request.authority.as_deref(), Some("localhost"));
                    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/x"));
                }
            }
        }
    }
}

#[test]
fn a_request_without_authority_is_served() {
    let (seen, end, _) = raw(&request(1, REST), 1 << 16, 1);
    end.unwrap();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].authority, None);
}

#[test]
fn what_is_not_http2_goes_to_the_server_as_it_is() {
    let mut frames = Frames::default();
    let sent = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_eq!(frames.pass(sent), sent.len());
    let mut frames = Frames::default();
    frames.feed(&sent[..1]);
    frames.feed(b"RIX");
    assert_eq!(frames.output, b"GRIX");
}

#[test]
fn too_many_headers_are_refused_and_the_connection_goes_on() {
    // One entry of 3,000 bytes in the table, and forty references to it in a block of 41 bytes and
    // a few.
    let big = [&[0x40][..], &string(b"big"), &string(&[b'v'; 3000])].concat();
    let bomb = [REST, &[0xbe; 40]].concat();
    let sent = [request(1, &[REST, &big].concat()), request(3, &bomb), request(5, &[REST, &[0xbe]].concat())];
    let (seen, end, answer) = raw(&sent.concat(), 1 << 16, 2);
    end.unwrap();
    assert_eq!(seen.len(), 2, "the first and the last");
    assert_eq!(seen[1].headers["big"].len(), 3000);
    // HEADERS with END_STREAM: 431, without a call of the service.
    let answered =
        answer.windows(6).any(|head| head[0] == 1 && head[1] & 1 == 1 && head[2..] == 3_u32.to_be_bytes());
    assert!(answered, "{answer:?}");
}

#[test]
fn what_cannot_be_read_ends_the_connection_in_due_form() {
    let block = |part: &[u8]| frame(1, 0, 1, part);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("index", request(1, &[REST, &[0xc0]].concat())),
        ("index 0", request(1, &[0x80])),
        ("short", request(1, &[0x83, 0x04, 5, b'/'])),
        ("number", request(1, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f])),
        ("table", request(1, &[0x3f, 0xff, 0x7f, 0x83])),
        ("padding", frame(1, 0xd, 1, &[9, 0x83])),
        ("priority", frame(1, 0x25, 1, &[0, 0, 0])),
        ("amid a block", [block(REST), frame(0, 0, 1, b"x")].concat()),
        ("of another stream", [block(REST), frame(9, 4, 3, REST)].concat()),
        ("without a block", frame(9, 4, 1, REST)),
        ("empty continuations", [block(REST), frame(9, 0, 1, &[]).repeat(1000)].concat()),
        ("large continuations", [block(REST), frame(9, 0, 1, &[0; 16_000]).repeat(8)].concat()),
        ("large frame", frame(1, 5, 1, &[0; 16_385])),
    ];
    for (name, bytes) in cases {
        let (seen, end, answer) = raw(&bytes, 1 << 18, 0);
        assert!(seen.is_empty(), "{name}: {seen:?}");
        let error = end.expect_err(name);
        assert!(error.is_go_away() || error.is_reset() || error.reason().is_some(), "{name}: {error:?}");
        let mut resets = Vec::new();
        Resets::default().watch(&answer, |reset| resets.push(reset));
        assert!(resets.iter().any(|reset| matches!(reset, Reset::Connection { .. })), "{name}: {resets:?}");
    }
}

#[test]
fn a_small_buffer_stays_after_a_large_request() {
    let mut frames = Frames::default();
    frames.feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    frames.feed(&request(1, &[REST, &[0x00], &string(b"big"), &string(&[b'v'; 15_000])].concat()));
    assert!(frames.output.len() > 15_000);
    let mut connection = Connection::of(tokio::io::empty(), 0);
    connection.frames = frames;
    let mut buffer = vec![0; 1 << 16];
    connection.hand_over(&mut ReadBuf::new(&mut buffer));
    assert!(connection.frames.output.capacity() <= KEEP);
    assert!(connection.frames.held() <= KEEP);
}

/// How a header is written.
#[derive(Debug, Clone)]
struct Written {
    name: usize,
    value: usize,
    /// 0x40, 0x00 or 0x10.
    flags: u8,
    /// Whether tables are used for it, if it is there.
    refer: bool,
}

const NAMES: [&str; 6] = ["grpc-timeout", "te-x", "user-agent", "cookie", "content-type", "x"];

fn value(number: usize) -> Vec<u8> {
    // From nothing to more than the table has.
    let length = [0, 1, 9, 60, 500, 1900, 4100][number % 7];
    vec![b'a' + u8::try_from(number % 26).unwrap(); length]
}

fn written() -> impl Strategy<Value = Written> {
    (0..NAMES.len(), 0_usize..40, prop::sample::select(vec![0x40, 0x40, 0x00, 0x10]), any::<bool>())
        .prop_map(|(name, value, flags, refer)| Written { name, value, flags, refer })
}

/// An encoder after RFC 7541, without Huffman coding, that encodes anything.
#[derive(Debug)]
struct Encoder {
    table: Vec<(Vec<u8>, Vec<u8>)>,
    limit: usize,
}

impl Encoder {
    fn size(&self) -> usize {
        self.table.iter().map(|(name, value)| name.len() + value.len() + 32).sum()
    }

    fn shrink(&mut self, room: usize) {
        while !self.table.is_empty() && self.size() + room > self.limit {
            self.table.pop();
        }
    }

    fn resize(&mut self, output: &mut Vec<u8>, limit: usize) {
        number(output, 0x20, 5, limit);
        self.limit = limit;
        self.shrink(0);
    }

    fn write(&mut self, output: &mut Vec<u8>, name: &[u8], value: &[u8], flags: u8, refer: bool) {
        let place = |whole: bool| {
            self.table.iter().position(|(n, v)| n == name && (!whole || v == value)).map(|place| place + 62)
        };
        if let Some(index) = place(true).filter(|_| refer) {
            return number(output, 0x80, 7, index);
        }
        let prefix = if flags == 0x40 { 6 } else { 4 };
        match place(false).filter(|_| refer) {
            Some(index) => number(output, flags, prefix, index),
            None => {
                output.push(flags);
                output.extend(string(name));
            }
        }
        output.extend(string(value));
        if flags == 0x40 {
            let size = name.len() + value.len() + 32;
            self.shrink(size);
            if size <= self.limit {
                self.table.insert(0, (name.to_vec(), value.to_vec()));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// All forms of HPACK, of frames, and of cutting the stream.
    #[test]
    fn all_headers_arrive_from_any_encoder(
        requests in prop::collection::vec(
            (prop::collection::vec(written(), 0..6), 0_usize..5, any::<bool>(), 0..8_usize, prop::option::of(0_usize..4096)),
            1..30,
        ),
        cuts in prop::collection::vec(1_usize..300, 1..4),
        buffer in 1_usize..5000,
    ) {
        let authorities: [&[u8]; 5] = [b"run%2Fberth.sock", b"/run/berth.sock", b"", b"localhost", &[b'%'; 300]];
        let mut encoder = Encoder { table: Vec::new(), limit: 4096 };
        let (mut bytes, mut expected, mut stream) = (Vec::new(), Vec::new(), 1_u32);
        for (headers, authority, refer, padding, limit) in requests {
            let mut block = Vec::new();
            if let Some(limit) = limit {
                encoder.resize(&mut block, limit);
            }
            block.extend(REST);
            encoder.write(&mut block, b":authority", authorities[authority], 0x40, refer);
            let mut map = HeaderMap::new();
            for header in headers {
                let value = value(header.value);
                encoder.write(&mut block, NAMES[header.name].as_bytes(), &value, header.flags, header.refer);
                map.append(NAMES[header.name], HeaderValue::from_bytes(&value).unwrap());
            }
            let list = map.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum::<usize>();
            // Large lists are a test of their own.
            prop_assume!(list < 15_000);
            let mut parts = Vec::new();
            let mut rest = &block[..];
            for cut in cuts.iter().take(3) {
                if rest.len() > *cut {
                    parts.push(&rest[..*cut]);
                    rest = &rest[*cut..];
                }
            }
            parts.push(rest);
            let first = [
                &[u8::try_from(padding).unwrap()][..], &[0, 0, 0, 0, 7], parts[0], &vec![0; padding],
            ].concat();
            let last = if parts.len() == 1 { 0x4 } else { 0 };
            bytes.extend(frame(1, 0x29 | last, stream, &first));
            for (index, part) in parts.iter().enumerate().skip(1) {
                bytes.extend(frame(9, if index + 1 == parts.len() { 4 } else { 0 }, stream, part));
            }
            bytes.extend(frame(6, 0, 0, &[5; 8]));
            stream += 2;
            expected.push(map);
        }
        let (seen, end, _) = raw(&bytes, buffer, expected.len());
        prop_assert!(end.is_ok(), "{end:?}");
        prop_assert_eq!(seen.len(), expected.len());
        for (seen, expected) in seen.into_iter().zip(expected) {
            prop_assert_eq!(seen.authority.as_deref(), Some("localhost"));
            prop_assert_eq!(seen.headers, expected);
        }
    }

    /// A client of `h2`, with Huffman coding and its own use of the table.
    #[test]
    fn all_headers_arrive_from_a_real_client(
        requests in prop::collection::vec(prop::collection::vec((0..NAMES.len(), 0_usize..60), 0..MAX_HEADERS), 1..30),
        authority in "[a-z0-9.-]{1,200}",
        body in prop::collection::vec(any::<u8>(), 0..40_000),
        // Each end of `h2` stops reading while it cannot write, so there must be room for its
        // answers to what is on the way, as there is in a socket.
        buffer in 1_000_usize..70_000,
    ) {
        let result = runtime().block_on(async {
            let (client, server) = duplex(buffer);
            let (seen_sender, mut seen_receiver) = unbounded_channel();
            let server = tokio::spawn(serve(server, seen_sender));
            let (mut sender, connection) = h2::client::handshake(client).await.unwrap();
            let connection = tokio::spawn(connection);
            let mut expected = Vec::new();
            for headers in requests {
                let mut map = HeaderMap::new();
                for (name, number) in headers {
                    let name = HeaderName::from_static(NAMES[name]);
                    let text = format!("{}{number}", "Value, of {a} \"header\"~ ".repeat(number / 8));
                    map.append(name, HeaderValue::from_str(&text).unwrap());
                }
                let mut request = Request::post(format!("http://{authority}/x")).body(()).unwrap();
                *request.headers_mut() = map.clone();
                sender = sender.ready().await.unwrap();
                let (response, mut stream) = sender.send_request(request, body.is_empty()).unwrap();
                if !body.is_empty() {
                    // The server answers without reading it.
                    let _ = stream.send_data(bytes::Bytes::from(body.clone()), true);
                }
                response.await.unwrap();
                expected.push(map);
            }
            drop(sender);
            let _ = connection.await;
            let _ = server.await.unwrap();
            let mut seen = Vec::new();
            while let Some(request) = seen_receiver.recv().await {
                seen.push(request);
            }
            (seen, expected)
        });
        let (seen, expected) = result;
        prop_assert_eq!(seen.len(), expected.len());
        for (seen, expected) in seen.into_iter().zip(expected) {
            prop_assert_eq!(seen.authority.as_deref(), Some("localhost"));
            prop_assert_eq!(seen.headers, expected);
        }
    }

    /// Bytes of any kind neither panic nor grow without end.
    #[test]
    fn junk_is_harmless(bytes in prop::collection::vec(any::<u8>(), 0..3000), kind in prop::sample::select(vec![1_u8, 9])) {
        let mut frames = Frames::default();
        frames.feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        frames.feed(&frame(kind, 0x4, 1, &bytes));
        frames.feed(&bytes);
        prop_assert!(frames.output.len() < 10 * 16_384 * 4);
    }
}
