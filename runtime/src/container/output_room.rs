//! The memory that the output of all ExecSync commands may use together.
//!
//! Each command has its own limit ([`super::exec::MAX_OUTPUT`]), and whoever may run one may run
//! many. Output without room is read and discarded, as is output over a command's own limit;
//! nothing waits for room, as commands that hold some could wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// As much as 16 commands that fill both their streams. Probes and hooks write some hundred bytes.
const ALL: usize = 512 * 1024 * 1024;

/// Room that is handed out in parts. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct OutputRoom {
    free: Arc<AtomicUsize>,
}

impl Default for OutputRoom {
    fn default() -> Self {
        Self::of(ALL)
    }
}

impl OutputRoom {
    fn of(bytes: usize) -> Self {
        Self { free: Arc::new(AtomicUsize::new(bytes)) }
    }

    /// An empty buffer for one stream, of which at most `most` bytes are kept.
    pub(crate) fn stream(&self, most: usize) -> Kept {
        Kept { bytes: Vec::new(), most, room: self.clone() }
    }

    /// Takes up to `wanted` bytes of room, and returns how many.
    fn take(&self, wanted: usize) -> usize {
        let mut taken = 0;
        // Only the sum matters; it orders nothing else.
        let _ = self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| {
            taken = wanted.min(free);
            Some(free - taken)
        });
        taken
    }
}

/// The kept output of a stream. Returns its room when dropped.
#[derive(Debug)]
pub(crate) struct Kept {
    bytes: Vec<u8>,
    most: usize,
    room: OutputRoom,
}

impl Kept {
    /// Appends as much as there is room for; the rest is lost.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let wanted = bytes.len().min(self.most - self.bytes.len());
        let taken = self.room.take(wanted);
        self.bytes.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        if taken < wanted {
            // No gap in the middle: only a prefix is kept.
            self.most = self.bytes.len();
        }
    }

    /// Returns the bytes, and releases their room.
    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        let bytes = std::mem::take(&mut self.bytes);
        self.room.free.fetch_add(bytes.len(), Ordering::Relaxed);
        bytes
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.room.free.fetch_add(self.bytes.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(room: &OutputRoom) -> usize {
        room.free.load(Ordering::Relaxed)
    }

    #[test]
    fn a_stream_keeps_its_beginning() {
        let room = OutputRoom::of(100);
        let mut kept = room.stream(5);
        for part in [&b"abc"[..], b"", b"def", b"g"] {
            kept.add(part);
        }
        assert_eq!(free(&room), 95);
        assert_eq!(kept.into_bytes(), b"abcde");
        assert_eq!(free(&room), 100);
    }

    #[test]
    fn all_together_keep_no_more_than_there_is_room_for() {
        let room = OutputRoom::of(10);
        let (mut first, mut second) = (room.stream(8), room.stream(8));
        first.add(b"1234567");
        second.add(b"abcdefgh");
        // Room that comes back is for others: there would be a gap.
        drop(first);
        second.add(b"i");
        let mut third = room.stream(8);
        third.add(b"ABCDEFGH");
        assert_eq!(
            (second.into_bytes().as_slice(), third.into_bytes().as_slice()),
            (&b"abc"[..], &b"ABCDEFG"[..])
        );
        assert_eq!(free(&room), 10);
    }

    #[test]
    fn no_room_is_lost_or_made_by_many_at_once() {
        let room = OutputRoom::of(1000);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for turn in 0..1000 {
                        let mut kept = room.stream(400);
                        kept.add(&[0; 300]);
                        kept.add(&[0; 300]);
                        assert!(kept.bytes.len() <= 400);
                        if turn % 2 == 0 {
                            drop(kept.into_bytes());
                        }
                    }
                });
            }
        });
        assert_eq!(free(&room), 1000);
    }
}
