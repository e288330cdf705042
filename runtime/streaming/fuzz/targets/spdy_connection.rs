//! See `berth_streaming::fuzzing::spdy_connection`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| berth_streaming::fuzzing::spdy_connection(data));
