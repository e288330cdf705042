//! A node as in practice: a real kubelet on the runtime, with every kind of pod that it can have
//! from files.
//!
//! One kubelet and all pods at once, because most of the time is waiting. The tests that look at
//! pods run side by side; then the daemon is restarted, killed and replaced under all of them; then
//! they are deleted; and finally the logs of both programs are checked. Assertions use the
//! kubelet's API, the pods' own answers and the cgroups' files. The choice of runtime and machine
//! is in [`berth_tests::node`].

mod crashes;
mod daemon;
mod deletion;
mod harness;
mod lifecycle;
mod logs;
mod noise;
mod probes;
mod resources;
mod security;
mod statistics;
mod volumes;

use std::process::ExitCode;

use crate::harness::{Phase, run};

/// The phases follow one another; the tests in one run side by side.
const PHASES: [Phase; 4] = [
    Phase::SideBySide(&[
        crashes::TESTS,
        lifecycle::TESTS,
        logs::TESTS,
        probes::TESTS,
        resources::TESTS,
        security::TESTS,
        statistics::TESTS,
        volumes::TESTS,
    ]),
    Phase::InOrder(&[daemon::TESTS]),
    Phase::InOrder(&[deletion::TESTS]),
    Phase::InOrder(&[noise::TESTS]),
];

fn main() -> ExitCode {
    run(&PHASES)
}
