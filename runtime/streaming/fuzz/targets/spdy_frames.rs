//! See `berth_streaming::fuzzing::spdy_frames`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| berth_streaming::fuzzing::spdy_frames(data));
