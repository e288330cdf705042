//! Noticing that a peer is gone without notice: its machine died, or its network.
//!
//! TCP's own probes cover a connection on which nothing is sent: they end it when their answers do
//! not come. Not so one on which something waits to be acknowledged: the kernel retries for a
//! quarter of an hour. `TCP_USER_TIMEOUT` of tcp(7) would be shorter, but also ends a living peer
//! that reads nothing for that time, such as a pager. So this checks what tells them apart: a
//! living peer answers each probe.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use tokio::time::Instant;

use crate::hangup::Hangup;

/// For how long a TCP peer has acknowledged nothing, while something that was sent to it waits to
/// be acknowledged; `None` when all of it has been.
pub type Unacknowledged = fn(BorrowedFd<'_>) -> io::Result<Option<Duration>>;

/// How often this is checked.
const EVERY: Duration = Duration::from_secs(10);

/// How long a peer may be silent: as long as one on which nothing is sent.
const SILENCE: Duration = Duration::from_secs(30);

/// Since when a peer owes an answer. That its last answer was long ago means nothing by itself: the
/// kernel probes a peer that has no room less and less often.
#[derive(Debug, Default)]
struct Owing(Option<Instant>);

impl Owing {
    /// Checks once; returns whether the peer has vanished.
    fn look(&mut self, now: Instant, unacknowledged: Option<Duration>) -> bool {
        let Some(silent) = unacknowledged else {
            self.0 = None;
            return false;
        };
        match self.0 {
            // It has answered since.
            Some(since) if silent < now - since => self.0 = Some(now),
            Some(since) => return now - since >= SILENCE,
            None => self.0 = Some(now),
        }
        false
    }
}

/// Shuts the connection down when its peer has vanished, which ends it everywhere else. Never
/// resolves.
pub(crate) async fn watch(peer: Option<Hangup>, unacknowledged: Unacknowledged) {
    let mut owing = Owing::default();
    while let Some(peer) = &peer {
        tokio::time::sleep(EVERY).await;
        if unacknowledged(peer.socket()).is_ok_and(|silent| owing.look(Instant::now(), silent)) {
            tracing::debug!("a streaming client no longer answers");
            peer.shut_down();
            break;
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_answers_now_and_then_is_there() {
        let start = Instant::now();
        let seconds = |seconds: u64| Duration::from_secs(seconds);
        for (looks, vanished) in [
            // Everything arrives.
            (vec![(0, None), (100, None), (200, None)], false),
            // The kernel has just sent one of its probes, which come every two minutes.
            (vec![(0, Some(119)), (10, None), (120, Some(120)), (130, None)], false),
            // Each check finds a probe that has not been answered yet, and that was answered by the
            // next check.
            (vec![(0, Some(50)), (10, Some(5)), (20, Some(5)), (30, Some(5)), (40, Some(5))], false),
            (vec![(0, Some(1)), (10, Some(11)), (20, Some(21)), (30, Some(31))], true),
            (vec![(0, None), (10, Some(90)), (20, Some(100)), (30, Some(110)), (40, Some(120))], true),
            (vec![(0, Some(1)), (10, Some(11)), (20, Some(21))], false),
        ] {
            let mut owing = Owing::default();
            let mut gone = false;
            for (at, silent) in looks.iter().copied() {
                gone = owing.look(start + seconds(at), silent.map(seconds));
            }
            assert_eq!(gone, vanished, "{looks:?}");
        }
    }
}
