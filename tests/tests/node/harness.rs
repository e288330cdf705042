//! Runs tests in phases on one node, and reports them as cargo's own harness does: with its lines,
//! its filters, its `--list`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow};
use berth_tests::node::{Node, on_a_node};

/// A test of a node that has all its pods.
pub(crate) struct Test {
    /// The module and the function.
    pub(crate) name: &'static str,
    /// The test itself.
    pub(crate) run: fn(&Node<'_>) -> Result<()>,
}

/// Defines the constant `TESTS` of a module, with its functions.
macro_rules! tests {
    ($($test:ident),+ $(,)?) => {
        /// The tests of this module.
        pub(crate) const TESTS: &[crate::harness::Test] = &[$(crate::harness::Test {
            name: concat!(module_path!(), "::", stringify!($test)),
            run: $test,
        }),+];
    };
}
pub(crate) use tests;

/// A group of tests that the next group waits for.
pub(crate) enum Phase {
    /// All at once.
    SideBySide(&'static [&'static [Test]]),
    /// One after the other.
    InOrder(&'static [&'static [Test]]),
}

impl Phase {
    fn tests(&self) -> impl Iterator<Item = &'static Test> {
        let (Self::SideBySide(modules) | Self::InOrder(modules)) = self;
        modules.iter().copied().flatten()
    }
}

/// The results so far.
#[derive(Default)]
struct Outcomes {
    passed: usize,
    failed: Vec<&'static str>,
}

/// Runs the tests of all phases that the command line names (parts of their names; all of them
/// without any) on one node. A test that fails does not keep the others from running.
#[expect(clippy::print_stdout, reason = "what a test harness says")]
pub(crate) fn run(phases: &[Phase]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let wanted =
        |test: &Test| filters.is_empty() || filters.iter().any(|part| test.name.contains(part.as_str()));
    let all = phases.iter().flat_map(Phase::tests);
    if arguments.iter().any(|argument| argument == "--list") {
        all.filter(|test| wanted(test)).for_each(|test| println!("{}: test", test.name));
        return ExitCode::SUCCESS;
    }
    let (count, chosen) =
        all.fold((0, 0), |(count, chosen), test| (count + 1, chosen + usize::from(wanted(test))));
    println!("running {chosen} tests");
    let begin = Instant::now();
    let finished = Mutex::new(Outcomes::default());
    let outcomes = &finished;
    let mut called = false;
    let started = chosen == 0
        || match on_a_node(|node| {
            called = true;
            println!("the node has its pods ({} ms)", begin.elapsed().as_millis());
            for phase in phases {
                let tests = phase.tests().filter(|test| wanted(test));
                match phase {
                    Phase::InOrder(_) => tests.for_each(|test| tell(test, node, outcomes)),
                    Phase::SideBySide(_) => thread::scope(|scope| {
                        tests.for_each(|test| drop(scope.spawn(move || tell(test, node, outcomes))));
                    }),
                }
            }
            Ok(())
        }) {
            Ok(()) => true,
            Err(error) => {
                println!("the node: {error:?}");
                false
            }
        };
    let mut outcomes = finished.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !started {
        outcomes.failed.push("the node");
    } else if !called && chosen > 0 {
        // Skipped, which is counted elsewhere: like one that returned.
        outcomes.passed += 1;
    }
    let failed = outcomes.failed.len();
    if failed > 0 {
        println!("\nfailures:\n    {}", outcomes.failed.join("\n    "));
    }
    println!(
        "\ntest result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        outcomes.passed,
        count - chosen,
        begin.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs one test and reports its result.
#[expect(clippy::print_stdout, reason = "what a test harness says")]
fn tell(test: &'static Test, node: &Node<'_>, outcomes: &Mutex<Outcomes>) {
    let begin = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (test.run)(node)))
        .unwrap_or_else(|_| Err(anyhow!("it panicked; the message is above")));
    let took = begin.elapsed().as_millis();
    let mut outcomes = outcomes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match outcome {
        Ok(()) => {
            println!("test {} ... ok ({took} ms)", test.name);
            outcomes.passed += 1;
        }
        Err(error) => {
            println!("test {} ... FAILED ({took} ms)\n{error:?}\n{}", test.name, node.last_words());
            outcomes.failed.push(test.name);
        }
    }
}
