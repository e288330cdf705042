//! Who unpacks when: layers of all pulls share the processor and the disk, and none holds a share
//! while waiting for the network.
//!
//! A thread has a permit only while there are bytes to work on. So a registry that is slow, or
//! means to be, keeps a thread and a connection of that pull, and nothing that another pull needs.
//! A pull that has bytes without end gives the permit back now and then: permits go in the order in
//! which they were asked for.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes, as packed, that are worked on before others get their turn.
const TURN: u64 = 8 << 20;

/// Bytes of a layer, which may not all be there yet.
pub(crate) trait LayerInput: Read {
    /// Whether a read gives something at once.
    fn is_ready(&mut self) -> bool {
        true
    }

    /// Waits until a read gives something at once, or an end or an error.
    fn wait(&mut self) {}

    /// Whether any read may take forever, and [`is_ready`](Self::is_ready) cannot say: of a file
    /// whose filesystem may not answer. It is read without a permit.
    fn may_stall(&self) -> bool {
        false
    }

    /// From now on, reads fail that would have to wait beyond this time from now.
    fn hurry(&mut self, _within: Duration) {}
}

/// Input that takes turns with that of others. Must be read on its own thread.
pub(crate) struct Turns<R> {
    input: R,
    permits: Arc<Semaphore>,
    runtime: Handle,
    permit: Option<OwnedSemaphorePermit>,
    /// Bytes read since the permit was given.
    done: u64,
    /// All bytes, for those who watch.
    moved: Arc<AtomicU64>,
}

impl<R: LayerInput> Turns<R> {
    pub(crate) fn new(input: R, permits: Arc<Semaphore>, runtime: Handle, moved: Arc<AtomicU64>) -> Self {
        Self { input, permits, runtime, permit: None, done: 0, moved }
    }
}

impl<R: LayerInput> Read for Turns<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let stalls = self.input.may_stall();
        if self.done >= TURN || stalls {
            self.permit = None;
        }
        if !self.input.is_ready() {
            self.permit = None;
            self.input.wait();
        }
        let read_already = if stalls { Some(self.input.read(buffer)?) } else { None };
        if self.permit.is_none() {
            let permit = self.runtime.block_on(Arc::clone(&self.permits).acquire_owned());
            self.permit = Some(permit.map_err(io::Error::other)?);
            self.done = 0;
        }
        let length = match read_already {
            Some(length) => length,
            None => self.input.read(buffer)?,
        };
        self.done += length as u64;
        self.moved.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

impl<R: LayerInput> LayerInput for Turns<R> {
    fn is_ready(&mut self) -> bool {
        self.input.is_ready()
    }

    fn wait(&mut self) {
        self.input.wait();
    }

    fn may_stall(&self) -> bool {
        self.input.may_stall()
    }

    fn hurry(&mut self, within: Duration) {
        self.input.hurry(within);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never ready before it is woken.
    struct Slow(std::sync::mpsc::Receiver<u8>, Option<u8>);

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some(byte) = self.1.take() else { return Ok(0) };
            buffer[0] = byte;
            Ok(1)
        }
    }

    impl LayerInput for Slow {
        fn is_ready(&mut self) -> bool {
            self.1.is_some()
        }

        fn wait(&mut self) {
            self.1 = self.0.recv().ok();
        }
    }

    /// A file on a filesystem that does not answer before it is woken.
    struct Stalled(std::sync::mpsc::Receiver<u8>);

    impl Read for Stalled {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Ok(byte) = self.0.recv() else { return Ok(0) };
            buffer[0] = byte;
            Ok(1)
        }
    }

    impl LayerInput for Stalled {
        fn may_stall(&self) -> bool {
            true
        }
    }

    struct Endless;

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            Ok(buffer.len())
        }
    }

    impl LayerInput for Endless {}

    #[tokio::test(flavor = "multi_thread")]
    async fn who_waits_for_bytes_holds_no_permit_and_who_has_many_gives_it_back() {
        let permits = Arc::new(Semaphore::new(1));
        let (sender, receiver) = std::sync::mpsc::channel();
        let (handle, moved) = (Handle::current(), Arc::new(AtomicU64::new(0)));
        let mut slow =
            Turns::new(Slow(receiver, None), Arc::clone(&permits), handle.clone(), Arc::clone(&moved));
        let slow = std::thread::spawn(move || slow.read(&mut [0; 10]).unwrap());
        let (wake, stalled) = std::sync::mpsc::channel();
        let mut stalled =
            Turns::new(Stalled(stalled), Arc::clone(&permits), handle.clone(), Arc::clone(&moved));
        let stalled = std::thread::spawn(move || stalled.read(&mut [0; 10]).unwrap());
        let others: Vec<_> = (0..3)
            .map(|_| {
                let mut many = Turns::new(Endless, Arc::clone(&permits), handle.clone(), Arc::clone(&moved));
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 1 << 20];
                    (0..50).map(|_| many.read(&mut buffer).unwrap()).sum::<usize>()
                })
            })
            .collect();
        for other in others {
            assert_eq!(other.join().unwrap(), 50 << 20);
        }
        assert!(!slow.is_finished() && !stalled.is_finished());
        sender.send(7).unwrap();
        wake.send(7).unwrap();
        assert_eq!(slow.join().unwrap() + stalled.join().unwrap(), 2);
        assert_eq!(permits.available_permits(), 1);
        assert_eq!(moved.load(Ordering::Relaxed), (150 << 20) + 2);
    }
}
