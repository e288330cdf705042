//! SPDY in the binary messages of a WebSocket, in both directions: `SPDY/3.1+portforward.k8s.io`.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::accepted;

/// How often the client of a tunnel is pinged: load balancers drop idle connections.
const PING: Duration = Duration::from_secs(10);

/// Carries the bytes of `inner` in binary messages, until either side ends.
pub(crate) async fn tunnel<T>(io: T, inner: DuplexStream)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sink, mut stream) = accepted(io).await.split();
    let (mut from, mut to) = tokio::io::split(inner);
    let incoming = async {
        while let Some(Ok(message)) = stream.next().await {
            if let Message::Binary(bytes) = message
                && to.write_all(&bytes).await.is_err()
            {
                return;
            }
        }
    };
    let outgoing = async {
        let mut buffer = vec![0; 32 * 1024];
        let mut pings = tokio::time::interval(PING);
        loop {
            let sent = tokio::select! {
                read = from.read(&mut buffer) => match read {
                    Ok(0) | Err(_) => {
                        let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
                        let _ = sink.send(Message::Close(Some(normal))).await;
                        return;
                    }
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
}
