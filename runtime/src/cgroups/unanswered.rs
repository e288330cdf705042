//! Processes that systemd was asked to make a scope of, and did not answer for.

use crate::lock;
use crate::shim_client::Holder;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long a call may be on its way once systemd answers again.
const ON_ITS_WAY: Duration = Duration::from_secs(60);

/// A bus that hangs for long must not cost a number for each pod that is asked for meanwhile.
const MOST: usize = 256;

/// A call that timed out may reach systemd when its bus resumes, and names its process by a
/// number, which must not be another process's by then: systemd would put that one into the scope. So the
/// process is ended, but keeps its number until systemd has answered again.
#[derive(Debug, Default)]
pub(crate) struct Unanswered(Mutex<VecDeque<(Instant, Holder)>>);

impl Unanswered {
    /// Keeps the number of a process, which ends.
    pub(crate) fn keep(&self, holder: Holder) {
        holder.end();
        let mut kept = lock(&self.0);
        kept.push_back((Instant::now(), holder));
        if kept.len() > MOST {
            kept.pop_front();
        }
    }

    /// Takes to know that systemd answers: numbers that were kept long enough are given back.
    pub(crate) fn systemd_answers(&self) {
        let mut kept = lock(&self.0);
        kept.retain(|(since, _)| since.elapsed() < ON_ITS_WAY);
    }
}
