//! A node as people run it: a real kubelet on the runtime, with every kind of pod that it can have
//! from files.
//!
//! One kubelet and all pods at once, because most of the time is waiting. The tests that look at
//! pods run side by side; then the daemon is restarted, killed and replaced under all of them; then
//! they are deleted; and at last the logs of both programs are looked through. What is asserted
//! comes from the kubelet's API, from the pods' own answers and from the cgroups' files. Which
//! runtime it is, and on which machine, is in [`berth_tests::node`].

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

/// What follows one another, and in it what runs side by side.
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
