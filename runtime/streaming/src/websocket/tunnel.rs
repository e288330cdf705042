//! SPDY in the binary messages of a WebSocket, in both directions: `SPDY/3.1+portforward.k8s.io`.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{Link, accepted};
use crate::LINGER;

/// How often the client of a tunnel is pinged: load balancers drop idle connections.
const PING: Duration = Duration::from_secs(10);

/// Carries the bytes of `inner` in binary messages, until either side ends.
pub(crate) async fn tunnel<T>(io: T, inner: DuplexStream)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sink, mut stream) = accepted(io).await.split();
    let (mut from, mut to) = tokio::io::split(inner);
    let link = Link::default();
    let incoming = async {
        while let Some(message) = stream.next().await.and_then(|read| link.message(read)) {
            match message {
                Message::Binary(bytes) if to.write_all(&bytes).await.is_err() => return,
                Message::Text(_) => return link.blame(CloseCode::Unsupported),
                _ => {}
            }
        }
    };
    let outgoing = async {
        let mut buffer = vec![0; 32 * 1024];
        let mut pings = tokio::time::interval(PING);
        loop {
            let sent = tokio::select! {
                read = from.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(length) => {
                        let bytes = Bytes::copy_from_slice(buffer.get(..length).unwrap_or_default());
                        sink.send(Message::Binary(bytes)).await
                    }
                },
                _ = pings.tick() => sink.send(Message::Ping(Bytes::new())).await,
            };
            if sent.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = incoming => {}
        () = outgoing => {}
    }
    // What is forwarded ends meanwhile.
    drop((from, to));
    // The client may be gone.
    let _ = tokio::time::timeout(LINGER, sink.send(link.close())).await;
    link.see_off(sink, stream).await;
}
