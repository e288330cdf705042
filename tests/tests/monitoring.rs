//! A real kubelet's reports about pods, for `kubectl top`, Prometheus and autoscalers, in each of
//! the ways by which it can get the figures.
//!
//! One pod fetches a page of another; then `/stats/summary` and `/metrics/cadvisor` have to show
//! it. Each kubelet is alone on the machine: it has directories there that it shares with others.
//! `BERTH_TEST_CGROUP_DRIVER` chooses the cgroup driver.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use berth_tests::cgroup::Driver;
use berth_tests::daemon::{Daemon, IMAGE, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::kubelet::{Kubelet, Place};
use berth_tests::skip::skip;
use serde_json::Value;

/// The page's size. The figures have headers and acknowledgements on top, and nothing else of that
/// size.
const BYTES: u64 = 3_000_000;

/// The only place where a cAdvisor looks for CRI-O.
const CRIO: &str = "/var/run/crio";

/// What a kubelet is expected to know of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Everything.
    All,
    /// Processor time, memory and disks; neither names nor network.
    WithoutNamesAndNetwork,
}

static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_kubelet_that_asks_the_runtime_knows_everything() -> Result<()> {
    rootful(|daemon| on_a_kubelet(daemon, Some("cri-stats.conf"), Known::All))
}

#[test]
fn a_plain_kubelet_knows_neither_names_nor_network_for_metrics() -> Result<()> {
    rootful(|daemon| on_a_kubelet(daemon, None, Known::WithoutNamesAndNetwork))
}

#[test]
fn a_plain_kubelet_whose_cadvisor_is_answered_knows_everything() -> Result<()> {
    if Path::new(CRIO).exists() {
        skip(
            "a_plain_kubelet_whose_cadvisor_is_answered_knows_everything",
            "this machine has /var/run/crio already",
        );
        return Ok(());
    }
    rootful(|daemon| {
        let _removed = Removed(Path::new(CRIO));
        daemon.stop()?;
        let directory = daemon.directory("berth.toml.d")?;
        std::fs::write(directory.join("compat.toml"), "[compat]\ncadvisor = true\n")
            .context("writing the configuration")?;
        daemon.start_again()?;
        on_a_kubelet(daemon, None, Known::All)?;
        daemon.stop()?;
        ensure!(!Path::new(CRIO).exists(), "the daemon takes the directory away that it made");
        daemon.start_again()
    })
}

/// A directory of the host that is removed with the test, whatever the outcome.
struct Removed(&'static Path);

impl Drop for Removed {
    fn drop(&mut self) {
        // Only our own sockets can be in it: it did not exist before.
        let _ = std::fs::remove_dir_all(self.0);
    }
}

fn on_a_kubelet(daemon: &Daemon, settings: Option<&str>, known: Known) -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().context("making a directory for the kubelet")?;
    let kubelet = Kubelet::start(Place {
        peer: "kubelet",
        dir: dir.path(),
        socket: &daemon.socket(),
        host: Some(daemon.host()),
        address: false,
        driver: Driver::of_the_environment()?,
        settings,
    })?;
    watch(daemon, &kubelet, known).with_context(|| kubelet.last_words())
}

fn watch(daemon: &Daemon, kubelet: &Kubelet, known: Known) -> Result<()> {
    kubelet.run_pods("monitoring", &[("IMAGE", IMAGE), ("BYTES", &BYTES.to_string())])?;
    for name in ["server", "client"] {
        within(SOON, "the pod is ready", || Ok(Some(kubelet.pod(name)?).filter(|pod| pod.ready)))?;
    }
    let server = within(SOON, "the kubelet knows the server's address", || {
        let address = kubelet.pod("server")?.address;
        Ok((!address.is_empty()).then_some(address))
    })?;
    within(SOON, "the client fetches the page", || {
        kubelet.run("client", "main", &format!("wget -q -O /tmp/page http://{server}:8080/page")).map(Some)
    })?;
    for (name, sent, received) in [("server", "tx", "rx"), ("client", "rx", "tx")] {
        in_the_summary(kubelet, name, (sent, received), known)
            .with_context(|| format!("the summary of {name}"))?;
        in_the_metrics(kubelet, name, known).with_context(|| format!("the metrics of {name}"))?;
    }
    kubelet.delete_pods()?;
    within(SOON * 3, "the pods are gone, and nothing of them is left in cgroups", || {
        ensure!(kubelet.pods()?.is_empty(), "the kubelet has pods");
        let left = kubelet.cgroup().below("crio-");
        ensure!(left.is_empty(), "{left:?}");
        ensure!(
            daemon.client().sandboxes(Default::default())?.iter().all(|pod| pod.state != 0),
            "a pod runs"
        );
        Ok(Some(()))
    })
}

/// The name of a static pod has the node's at its end.
fn full(name: &str) -> String {
    format!("{name}-berth-test")
}

fn in_the_summary(kubelet: &Kubelet, name: &str, (most, least): (&str, &str), known: Known) -> Result<()> {
    within(SOON, "the figures are there", || {
        let summary: Value = serde_json::from_str(&kubelet.get("/stats/summary")?).context("reading it")?;
        let pods = summary.pointer("/pods").and_then(Value::as_array).context("no pods")?;
        let pod =
            pods.iter().find(|pod| pod.pointer("/podRef/name").and_then(Value::as_str) == Some(&*full(name)));
        let pod = pod.context("no such pod")?;
        let number = |pointer: &str| {
            pod.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no {pointer} in {pod}"))
        };
        for (pointer, at_least) in [
            ("/cpu/usageCoreNanoSeconds", 1_000_000),
            ("/memory/workingSetBytes", 100_000),
            ("/containers/0/cpu/usageCoreNanoSeconds", 1_000_000),
            ("/containers/0/memory/workingSetBytes", 100_000),
            ("/containers/0/rootfs/usedBytes", BYTES),
            ("/containers/0/logs/usedBytes", 1),
        ] {
            ensure!(number(pointer)? >= at_least, "{pointer} is {}", number(pointer)?);
        }
        ensure!(number("/containers/0/memory/workingSetBytes")? < 64 << 20, "it is limited to less");
        match known {
            Known::WithoutNamesAndNetwork => {
                ensure!(pod.get("network").is_none(), "there is a network: {pod}")
            }
            Known::All => {
                ensure!(pod.pointer("/network/name").and_then(Value::as_str) == Some("eth0"), "{pod}");
                let (most, least) =
                    (number(&format!("/network/{most}Bytes"))?, number(&format!("/network/{least}Bytes"))?);
                ensure!((BYTES..BYTES * 12 / 10).contains(&most), "{most} bytes");
                ensure!((1..BYTES / 2).contains(&least), "{least} bytes the other way");
            }
        }
        Ok(Some(()))
    })
}

fn in_the_metrics(kubelet: &Kubelet, name: &str, known: Known) -> Result<()> {
    let pod = format!("pod=\"{}\"", full(name));
    let labels = |container: &str| {
        [format!("container=\"{container}\""), "namespace=\"default\"".to_owned(), pod.clone()]
    };
    within(SOON, "the metrics are there", || {
        let text = kubelet.get("/metrics/cadvisor")?;
        let value = |metric: &str, labels: &[String]| -> Option<f64> {
            let line = text.lines().find(|line| {
                line.strip_prefix(metric).is_some_and(|rest| rest.starts_with('{'))
                    && labels.iter().all(|label| line.contains(label.as_str()))
            })?;
            line.rsplit_once("} ")?.1.split(' ').next()?.parse().ok()
        };
        let memory = value("container_memory_working_set_bytes", &labels("main"));
        let cpu = value("container_cpu_usage_seconds_total", &labels("main"));
        let network = value(
            "container_network_receive_bytes_total",
            &[vec![pod.clone(), "interface=\"eth0\"".to_owned()]].concat(),
        );
        match known {
            Known::WithoutNamesAndNetwork => {
                ensure!(
                    memory.is_none() && cpu.is_none() && network.is_none(),
                    "{memory:?} {cpu:?} {network:?}"
                );
            }
            Known::All => {
                let memory = memory.context("no memory")?;
                ensure!((100_000.0..64e6).contains(&memory), "{memory} bytes of memory");
                ensure!(cpu.context("no processor time")? >= 0.0, "{cpu:?}");
                let network = network.context("no network")?;
                ensure!(network > 0.0 && (name != "client" || network >= 3e6), "{network} bytes received");
                let image = [labels("main").to_vec(), vec![format!("image=\"{IMAGE}\"")]].concat();
                ensure!(value("container_memory_working_set_bytes", &image).is_some(), "no image");
                let k8s = [labels("main").to_vec(), vec![format!("name=\"k8s_main_{}_default_", full(name))]]
                    .concat();
                ensure!(value("container_memory_working_set_bytes", &k8s).is_some(), "no name");
            }
        }
        Ok(Some(()))
    })
}
