//! The deadline of a call (`grpc-timeout`), whose end is DEADLINE_EXCEEDED.
//!
//! tonic's server ends a call at its deadline too, but with CANCELLED. Whichever answer a client
//! has first counts, its own or the server's, and callers tell the two codes apart.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

/// Puts [`WithDeadline`] around a service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallDeadline;

impl<S> Layer<S> for CallDeadline {
    type Service = WithDeadline<S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithDeadline(inner)
    }
}

/// A service whose calls fail with DEADLINE_EXCEEDED once they are polled after their deadline.
/// Being polled then is what tonic's own timer around this service is for: it was started later.
#[derive(Debug, Clone)]
pub(crate) struct WithDeadline<S>(S);

impl<S, B> Service<Request<B>> for WithDeadline<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // Nothing is added to a deadline that is further away than the clock can tell.
        let deadline = timeout(request.headers()).and_then(|timeout| Instant::now().checked_add(timeout));
        let mut answer = Box::pin(self.0.call(request));
        let Some(deadline) = deadline else { return answer };
        Box::pin(poll_fn(move |context| match answer.as_mut().poll(context) {
            Poll::Pending if Instant::now() >= deadline => {
                let status = Status::deadline_exceeded("the deadline of the call has passed");
                Poll::Ready(Ok(status.into_http()))
            }
            polled => polled,
        }))
    }
}

/// What `grpc-timeout` says: up to eight digits and a unit (gRPC over HTTP/2, "Requests"). Anything
/// else is no timeout, as for tonic.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        let of = |text: &'static str| {
            timeout(&HeaderMap::from_iter([(
                http::HeaderName::from_static("grpc-timeout"),
                http::HeaderValue::from_static(text),
            )]))
        };
        for (text, expected) in [
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
            ("2M", Duration::from_secs(120)),
            ("0S", Duration::ZERO),
            ("15m", Duration::from_millis(15)),
            ("15u", Duration::from_micros(15)),
            ("15n", Duration::from_nanos(15)),
        ] {
            assert_eq!(of(text), Some(expected), "{text}");
        }
        for text in ["", "m", "1", "1s", "-1m", "+1m", "1 m", "100000000m", "1mm"] {
            assert_eq!(of(text), None, "{text}");
        }
        assert_eq!(timeout(&HeaderMap::new()), None);
    }
}
