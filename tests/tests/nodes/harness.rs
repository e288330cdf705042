//! Runs the steps on each network, and reports them as cargo's own harness does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_tests::cluster::nodes::{Network, Nodes, Traces, Underlay};
use berth_tests::skip::skip;
use berth_tests::{deadline, interrupts};
use nix::unistd::geteuid;

/// What happens to a cluster: its name, and a function that returns what it counted.
pub(crate) type Step = (&'static str, fn(&Nodes<'_>) -> Result<String>);

/// The name of the last step, the end of a cluster.
const END: &str = "the machine has nothing of the cluster";

/// The results so far.
#[derive(Default)]
struct Outcomes {
    passed: usize,
    failed: Vec<String>,
}

#[expect(clippy::print_stdout, reason = "what a test harness says")]
pub(crate) fn run(steps: &[Step]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |network: &Network| {
        filters.is_empty() || filters.iter().any(|part| network.name().contains(part.as_str()))
    };
    let networks: Vec<Network> = Network::ALL.into_iter().filter(wanted).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        for network in networks {
            let steps = steps.iter().map(|(step, _)| *step).chain([END]);
            steps.for_each(|step| println!("{}: test", test(network, step)));
        }
        return ExitCode::SUCCESS;
    }
    println!("running {} tests", networks.len() * (steps.len() + 1));
    let begin = Instant::now();
    let mut outcomes = Outcomes::default();
    if !geteuid().is_root() {
        skip("nodes", "needs root");
        outcomes.passed += 1;
    } else {
        // The step that runs fails then, and the cluster is cleaned up.
        if let Err(error) = interrupts::take_over(deadline::interrupt) {
            println!("nodes: FAILED: {error:#}");
            return ExitCode::FAILURE;
        }
        for network in networks {
            on(network, steps, &mut outcomes);
        }
    }
    let failed = outcomes.failed.len();
    if failed > 0 {
        println!("\nfailures:\n    {}", outcomes.failed.join("\n    "));
    }
    println!(
        "\ntest result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; finished in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        outcomes.passed,
        begin.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The name of a step as a test: one word.
fn test(network: Network, step: &str) -> String {
    format!("{}::{}", network.name(), step.replace(' ', "_"))
}

/// Runs the steps on a cluster with this network, up to the first that fails.
#[expect(clippy::print_stdout, reason = "what a test harness says")]
fn on(network: Network, steps: &[Step], outcomes: &mut Outcomes) {
    let name = network.name();
    let mut tell = |step: &str, begin: Instant, outcome: Result<String>| {
        let (test, took) = (test(network, step), begin.elapsed().as_millis());
        match outcome {
            Ok(counts) => {
                println!("test {test} ... ok ({took} ms): {counts}");
                outcomes.passed += 1;
                true
            }
            Err(error) => {
                println!("test {test} ... FAILED ({took} ms)\n{error:?}");
                outcomes.failed.push(test);
                false
            }
        }
    };
    let begin = Instant::now();
    if deadline::interrupted() {
        tell("start", begin, Err(anyhow!("interrupted")));
        return;
    }
    let underlay = match Underlay::create() {
        Ok(underlay) => underlay,
        Err(error) => {
            tell("start", begin, Err(error));
            return;
        }
    };
    let nodes = match count().and_then(|count| Nodes::start(&underlay, network, count)) {
        Ok(nodes) => nodes,
        Err(error) => {
            tell("start", begin, Err(error));
            return;
        }
    };
    println!("{name}: {} nodes are ready ({} ms)", nodes.nodes().len(), begin.elapsed().as_millis());
    let traces = nodes.traces();
    for (step, act) in steps {
        let begin = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| act(&nodes)))
            .unwrap_or_else(|_| Err(anyhow!("it panicked; the message is above")));
        if !tell(step, begin, outcome.with_context(|| nodes.last_words())) {
            break;
        }
    }
    let begin = Instant::now();
    drop(nodes);
    drop(underlay);
    tell(END, begin, traces.and_then(|traces| is_gone(&traces)));
}

/// Whatever became of the steps, the machine has nothing of the cluster.
fn is_gone(traces: &Traces) -> Result<String> {
    let left = traces.left();
    ensure!(left.is_empty(), "left: {left:?}");
    Ok("no process, mount, directory or cgroup".to_owned())
}

/// How many nodes there are.
fn count() -> Result<usize> {
    let Ok(count) = std::env::var("BERTH_TEST_NODES") else { return Ok(3) };
    let count = count.parse().with_context(|| format!("BERTH_TEST_NODES is {count:?}, not a number"))?;
    ensure!((2..=9).contains(&count), "BERTH_TEST_NODES is {count}, not from 2 to 9");
    Ok(count)
}
