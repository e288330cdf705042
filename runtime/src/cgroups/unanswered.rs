//! Processes for which systemd was asked to create a scope, and did not answer.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::lock;
use crate::shim_client::Holder;

/// How long a call may still be in transit once systemd answers again.
const ON_ITS_WAY: Duration = Duration::from_secs(60);

/// The most pids kept: a bus that hangs for long must not cost one for each pod requested
/// meanwhile.
const MOST: usize = 256;

/// A call that timed out may reach systemd when its bus resumes, and names its process by a number,
/// which must not be another process's by then: systemd would put that one into the scope. So the
/// process is killed, but not reaped until systemd has answered again.
#[derive(Debug, Default)]
pub(crate) struct Unanswered(Mutex<VecDeque<(Instant, Holder)>>);

impl Unanswered {
    /// Keeps the pid of a process, which ends.
    pub(crate) fn keep(&self, holder: Holder) {
        holder.end();
        let mut kept = lock(&self.0);
        kept.push_back((Instant::now(), holder));
        if kept.len() > MOST {
            kept.pop_front();
        }
    }

    /// Notes that systemd answers: pids that were kept long enough are released.
    pub(crate) fn systemd_answers(&self) {
        let mut kept = lock(&self.0);
        kept.retain(|(since, _)| since.elapsed() < ON_ITS_WAY);
    }
}
