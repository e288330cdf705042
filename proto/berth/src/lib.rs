//! Berth's own small service beside CRI: import, pull progress.
