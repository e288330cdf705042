//! See `berth_streaming::fuzzing::websocket`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| berth_streaming::fuzzing::websocket(data));
