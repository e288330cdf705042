//! Watches for the end of a pod's first process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use berth_model::state::SandboxEvent;
use berth_sys::process;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{PodProcess, Sandbox, lock};

/// How often a process without a descriptor is polled.
const LOOK: Duration = Duration::from_secs(1);

/// Waits in the background for the end of the pod's first process. Most pods have none.
pub(super) fn watch(sandbox: &Arc<Sandbox>) {
    let process = lock(&sandbox.process);
    // Without a runtime the daemon is stopping.
    let (Some(process), Ok(runtime)) = (&*process, tokio::runtime::Handle::try_current()) else { return };
    let pidfd = process.pidfd.as_ref().map(OwnedFd::try_clone);
    let sandbox = Arc::downgrade(sandbox);
    runtime.spawn(async move {
        if let Err(error) = ended(pidfd).await {
            tracing::debug!(%error, "cannot wait for a pod's first process; polling it every second");
            look(&sandbox).await;
        }
        if let Some(sandbox) = sandbox.upgrade() {
            sandbox.apply(SandboxEvent::ProcessEnded);
            // The task fails only when the daemon stops.
            let _ = tokio::task::spawn_blocking(move || sandbox.forget_untold()).await;
        }
    });
}

/// A pidfd is readable when its process has ended: pidfd_open(2).
async fn ended(pidfd: Option<io::Result<OwnedFd>>) -> io::Result<()> {
    let pidfd = pidfd.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))?;
    #[expect(deprecated, reason = "what is said against it is not true of a descriptor that is owned")]
    let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
    loop {
        let mut readable = pidfd.readable().await?;
        // Readiness is a hint; the descriptor itself says whether it is so.
        if process::has_ended(pidfd.as_fd())? {
            return Ok(());
        }
        readable.clear_ready();
    }
}

/// Until the process has ended, or the sandbox is gone.
async fn look(sandbox: &Weak<Sandbox>) {
    while let Some(sandbox) = sandbox.upgrade() {
        if lock(&sandbox.process).as_ref().is_none_or(PodProcess::has_ended) {
            return;
        }
        drop(sandbox);
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use berth_cgroup::{Driver, Parent};
    use berth_model::layout::Layout;
    use berth_model::record::{ProcessRecord, SandboxRecord};
    use berth_model::state::SandboxState;
    use tracing::dispatcher::{set_default, with_default};

    use super::*;
    use crate::events::Events;
    use crate::events::heard::Heard;
    use crate::sandbox::recover;
    use crate::snapshot::PodSnapshot;

    /// A hang guard.
    const HANGS: Duration = Duration::from_secs(60);

    /// A process that ends with this.
    struct First(Child);

    impl Drop for First {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// A ready sandbox whose first process is a child of this one.
    fn sandbox(by_descriptor: bool) -> (Arc<Sandbox>, First) {
        let child = First(Command::new("sleep").arg("1000").spawn().unwrap());
        let pid = i32::try_from(child.0.id()).unwrap();
        let record = ProcessRecord { pid, start_time: process::start_time(pid).unwrap() };
        let mut process = PodProcess::find(record).unwrap();
        if !by_descriptor {
            process.pidfd = None;
        }
        let record = SandboxRecord::default();
        let files = Layout::new("/nowhere/root".into(), "/nowhere/state".into()).sandbox(&record.id);
        let parent = Parent::named(Driver::Cgroupfs, "/nowhere").unwrap();
        let sandbox = recover::of_record(
            record,
            files,
            parent,
            Some(process),
            true,
            true,
            Events::new(|_| PodSnapshot::default()),
        );
        (Arc::new(sandbox), child)
    }

    #[tokio::test]
    async fn the_end_of_the_first_process_is_told_when_it_comes_and_once() {
        for by_descriptor in [true, false] {
            let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
            let heard = Heard::new(move |_| {
                let _ = tell.send(());
            });
            let _heard = set_default(&heard.dispatch());
            let (sandbox, child) = sandbox(by_descriptor);
            watch(&sandbox);
            tokio::task::yield_now().await;
            assert_eq!((sandbox.state(), heard.all().len()), (SandboxState::Ready, 0));
            drop(child);
            tokio::time::timeout(HANGS, told.recv()).await.unwrap().unwrap();
            assert_eq!(sandbox.state(), SandboxState::NotReady);
            sandbox.apply(SandboxEvent::Stopped);
            assert_eq!(heard.all(), ["sandbox not ready: its first process ended"]);
        }
    }

    #[test]
    fn a_sandbox_is_told_to_be_ready_when_it_can_be_seen_and_before_anything_else() {
        let (sandbox, _child) = sandbox(true);
        // The other thread is let go first, which it uses unless it has to wait.
        let heard = Heard::new(|said| {
            if said == "sandbox ready" {
                (0..10_000).for_each(|_| std::thread::yield_now());
            }
        });
        let visible = std::sync::atomic::AtomicBool::new(false);
        let is_visible = || visible.load(std::sync::atomic::Ordering::Acquire);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_visible() {
                    std::thread::yield_now();
                }
                with_default(&heard.dispatch(), || sandbox.apply(SandboxEvent::Stopped));
            });
            let show = || visible.store(true, std::sync::atomic::Ordering::Release);
            with_default(&heard.dispatch(), || sandbox.appear(show));
        });
        assert_eq!(heard.all(), ["sandbox ready", "sandbox not ready: it is being stopped"]);
    }
}
