//! A Kubernetes cluster of several nodes on one machine, once with each kind of pod network: what
//! nodes have to do with each other, until nothing of it is left.
//!
//! The steps share a cluster, and run in their order; a step that fails ends the run of its
//! network. `BERTH_TEST_NODES` is how many nodes there are, and `BERTH_TEST_PODS` how many pods on
//! each. Arguments are parts of the names of networks, to run only these.

mod harness;
mod network;
mod workloads;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use self::harness::{Step, run};

/// Time for operations that take several servers and a few of their periods of seconds, for many
/// pods, on a machine that is busy with other things.
const ROLLOUT: Duration = Duration::from_secs(300);

/// [`ROLLOUT`] for kubectl.
const ROLLOUT_FLAG: &str = "--timeout=300s";

/// What happens to a cluster.
const STEPS: &[Step] = &[
    ("pods reach pods", network::pods_reach_pods),
    ("host ports lead to pods", network::host_ports_lead_to_pods),
    ("Services lead to pods", network::services_lead_to_pods),
    ("Services have names", network::services_have_names),
    ("pods of a StatefulSet have names", workloads::pods_of_a_stateful_set_have_names),
    ("a Job runs on all nodes", workloads::a_job_runs_on_all_nodes),
    ("a rolling update loses no request", workloads::a_rolling_update_loses_no_request),
    ("a node is drained", workloads::a_node_is_drained),
    ("a node vanishes and comes back", workloads::a_node_vanishes_and_comes_back),
    ("nodes are full of pods", workloads::nodes_are_full_of_pods),
    ("nothing is left", workloads::nothing_is_left),
];

fn main() -> ExitCode {
    run(STEPS)
}

/// How many pods each node gets.
fn pods_per_node() -> Result<usize> {
    let Ok(count) = std::env::var("BERTH_TEST_PODS") else { return Ok(110) };
    let count = count.parse().with_context(|| format!("BERTH_TEST_PODS is {count:?}, not a number"))?;
    ensure!((2..=110).contains(&count), "BERTH_TEST_PODS is {count}, not from 2 to 110");
    Ok(count)
}
