//! Workloads over several nodes, and what happens to nodes under them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_tests::cluster::Pod;
use berth_tests::cluster::nodes::Nodes;
use berth_tests::deadline::within;

use super::network::{asks, exec, hello, reach_each_other, resolve};
use super::{ROLLOUT, ROLLOUT_FLAG, pods_per_node};

/// The port of `web` on every node.
const WEB_PORT: u16 = 30090;

/// Between two requests of one client of a stream.
const PAUSE: Duration = Duration::from_millis(20);

/// How many of these pods are on each node.
fn spread(pods: &[Pod]) -> BTreeMap<&str, usize> {
    let mut spread = BTreeMap::new();
    for pod in pods {
        *spread.entry(pod.node.as_str()).or_default() += 1;
    }
    spread
}

/// Each pod of a StatefulSet has a name that leads to it from every node, before and after it was
/// replaced, and the name of their headless Service leads to all of them.
pub(crate) fn pods_of_a_stateful_set_have_names(nodes: &Nodes<'_>) -> Result<String> {
    let control = nodes.control();
    control.apply("nodes/db.yaml")?;
    control.kubectl(&["rollout", "status", ROLLOUT_FLAG, "statefulset/db"])?;
    let pods = control.pods("app=db")?;
    ensure!(pods.len() == 3 && spread(&pods).values().all(|count| *count <= 2), "{pods:?}");
    let mut answers = names_lead_to(nodes, &pods)?;
    control.kubectl(&["delete", "pod", "db-1"])?;
    let replaced = within(ROLLOUT, "another pod has its name", || {
        let now = control.pods("app=db")?;
        let is_new = now.iter().all(|pod| pod.ready && (pod.name != "db-1" || !pods.contains(pod)));
        Ok(Some(now).filter(|now| now.len() == 3 && is_new))
    })?;
    answers += names_lead_to(nodes, &replaced)?;
    Ok(format!("{} pods, {answers} answers by name", pods.len()))
}

fn names_lead_to(nodes: &Nodes<'_>, pods: &[Pod]) -> Result<usize> {
    let addresses: BTreeSet<String> = pods.iter().map(|pod| pod.address.clone()).collect();
    let mut answers = 0;
    for from in hello(nodes)? {
        within(ROLLOUT, "the headless Service's name leads to all of its pods", || {
            let found = resolve(nodes, &from.name, "db.default.svc.cluster.local")?;
            ensure!(found == addresses, "{} finds {found:?}, not {addresses:?}", from.name);
            Ok(Some(()))
        })?;
        for to in pods {
            let answer = asks(nodes, &from.name, &format!("http://{}.db:8080/", to.name))?;
            ensure!(answer == to.name, "{} answers to the name of {}", answer, to.name);
            answers += 1;
        }
    }
    Ok(answers)
}

/// Nine pods run, on all nodes, and their logs can be read afterwards.
pub(crate) fn a_job_runs_on_all_nodes(nodes: &Nodes<'_>) -> Result<String> {
    let control = nodes.control();
    control.apply("nodes/job.yaml")?;
    control.kubectl(&["wait", "--for=condition=Complete", ROLLOUT_FLAG, "job/sum"])?;
    let pods = control.pods("app=sum")?;
    let spread = spread(&pods);
    ensure!(pods.len() == 9 && spread.len() == nodes.nodes().len(), "{spread:?}");
    let log = control.kubectl(&["logs", "--selector=app=sum", "--tail=-1", "--max-log-requests=9"])?;
    let lines: BTreeSet<String> = log.lines().map(str::to_owned).collect();
    let wanted = (0..9).map(|index| format!("index {index}: {}", 42 + index)).collect();
    ensure!(lines == wanted, "the logs: {log:?}");
    let counts = format!("{} pods, {spread:?}", pods.len());
    control.delete("nodes/job.yaml")?;
    Ok(counts)
}

/// Requests to `web` without a pause while `act` runs: from outside to each node, and from a pod on
/// each node by name. None may be lost. Returns how many there were, and which versions answered.
fn under_a_stream<T>(
    nodes: &Nodes<'_>,
    act: impl FnOnce() -> Result<T>,
) -> Result<(T, u64, BTreeSet<String>)> {
    let pods = hello(nodes)?;
    for pod in &pods {
        exec(nodes, &pod.name, &["rm", "-f", "/tmp/stop"])?;
    }
    let stop = AtomicBool::new(false);
    let script = "asked=0; while [ ! -e /tmp/stop ]; do
        timeout 10 wget -q -O /tmp/answer http://web/ || echo \"lost after $asked, at $(date)\"
        asked=$((asked + 1)); sleep 0.1; done; echo \"$asked\"";
    thread::scope(|scope| {
        let (stop, mut streams) = (&stop, Vec::new());
        for node in nodes.nodes() {
            let web = nodes.outside()?;
            streams.push(scope.spawn(move || -> Result<(u64, BTreeSet<String>)> {
                let (mut asked, mut versions) = (0, BTreeSet::new());
                while !stop.load(Ordering::SeqCst) {
                    let page = web.page(&node.address, WEB_PORT, "/");
                    let page = page.with_context(|| format!("lost after {asked} to {}", node.name))?;
                    versions.extend(page.split_once(' ').map(|(_, version)| version.to_owned()));
                    asked += 1;
                    thread::sleep(PAUSE);
                }
                Ok((asked, versions))
            }));
        }
        for pod in &pods {
            streams.push(scope.spawn(|| {
                let output = exec(nodes, &pod.name, &["sh", "-c", script])?;
                let asked = output.parse().with_context(|| format!("from {}: {output}", pod.node))?;
                Ok((asked, BTreeSet::new()))
            }));
        }
        let acted = act();
        stop.store(true, Ordering::SeqCst);
        for pod in &pods {
            exec(nodes, &pod.name, &["touch", "/tmp/stop"])?;
        }
        let (mut asked, mut versions) = (0, BTreeSet::new());
        for stream in streams {
            let (more, others) = stream.join().map_err(|_| anyhow!("a stream panicked"))??;
            ensure!(more > 0, "a stream asked nothing");
            asked += more;
            versions.extend(others);
        }
        Ok((acted?, asked, versions))
    })
}

/// Every pod is replaced, and no request is lost.
pub(crate) fn a_rolling_update_loses_no_request(nodes: &Nodes<'_>) -> Result<String> {
    let control = nodes.control();
    control.apply("nodes/web.yaml")?;
    let rolled_out = || control.kubectl(&["rollout", "status", ROLLOUT_FLAG, "deployment/web"]);
    rolled_out()?;
    web_is_known(nodes)?;
    let before: Vec<Pod> = control.pods("app=web")?;
    let (after, asked, versions) = under_a_stream(nodes, || {
        control.kubectl(&["set", "env", "deployment/web", "VERSION=two"])?;
        rolled_out()?;
        within(ROLLOUT, "the old pods are gone", || {
            let pods = control.pods("app=web")?;
            Ok(Some(pods).filter(|pods| pods.len() == 6 && pods.iter().all(|pod| pod.ready)))
        })
    })?;
    let kept = after.iter().filter(|pod| before.iter().any(|old| old.uid == pod.uid)).count();
    ensure!(kept == 0, "every pod was replaced: {before:?}, {after:?}");
    ensure!(versions == BTreeSet::from(["one".to_owned(), "two".to_owned()]), "{versions:?} answered");
    Ok(format!("{} pods replaced, {asked} requests, 0 lost", before.len()))
}

/// Each node and each pod of `hello` gets an answer from `web`.
fn web_is_known(nodes: &Nodes<'_>) -> Result<()> {
    for (node, pod) in nodes.nodes().iter().zip(hello(nodes)?) {
        within(ROLLOUT, "web answers", || {
            nodes.control().page(&node.address, WEB_PORT, "/")?;
            asks(nodes, &pod.name, "http://web/").map(Some)
        })?;
    }
    Ok(())
}

/// Its pods move to the other nodes, and no request is lost. Afterwards it gets pods again.
pub(crate) fn a_node_is_drained(nodes: &Nodes<'_>) -> Result<String> {
    let control = nodes.control();
    let node = &nodes.nodes().get(1).context("there are several")?.name;
    let there = |pods: &[Pod]| pods.iter().filter(|pod| pod.node == *node).count();
    let moved = there(&control.pods("app=web")?);
    ensure!(moved > 0, "{node} has no pod of web");
    let ((), asked, _) = under_a_stream(nodes, || {
        control.kubectl(&["drain", node, "--ignore-daemonsets", ROLLOUT_FLAG])?;
        control.kubectl(&["rollout", "status", ROLLOUT_FLAG, "deployment/web"])?;
        let pods = control.pods("")?;
        let left: Vec<&Pod> =
            pods.iter().filter(|pod| pod.node == *node && !pod.name.starts_with("hello-")).collect();
        ensure!(left.is_empty(), "{node} still has {left:?}");
        Ok(())
    })?;
    control.kubectl(&["uncordon", node])?;
    control.kubectl(&["rollout", "restart", "deployment/web"])?;
    control.kubectl(&["rollout", "status", ROLLOUT_FLAG, "deployment/web"])?;
    ensure!(there(&control.pods("app=web")?) > 0, "{node} has pods again");
    Ok(format!("{moved} pods moved, {asked} requests, 0 lost"))
}

/// Its pods are replaced on other nodes, and Services do without them. When it is back, nothing of
/// the old ones is left on it, its DaemonSet's pod runs again, and it has a part in everything.
pub(crate) fn a_node_vanishes_and_comes_back(nodes: &Nodes<'_>) -> Result<String> {
    let control = nodes.control();
    let node = nodes.nodes().last().context("there are several")?;
    let (before, begin) = (control.pods("")?, Instant::now());
    let lost: Vec<&Pod> = before.iter().filter(|pod| pod.node == node.name).collect();
    ensure!(lost.iter().any(|pod| pod.name.starts_with("web-")), "{} has no pod of web", node.name);
    nodes.vanish(node)?;
    within(ROLLOUT, "the node is missed", || {
        let name = format!("/api/v1/nodes/{}", node.name);
        let conditions = control.get(&name)?.pointer("/status/conditions").cloned().unwrap_or_default();
        let conditions = conditions.as_array().cloned().unwrap_or_default();
        let ready = conditions.iter().find(|condition| condition.get("type") == Some(&"Ready".into()));
        let ready = ready.and_then(|condition| condition.get("status")).cloned();
        Ok((ready == Some("Unknown".into())).then_some(()))
    })?;
    let missed = begin.elapsed().as_secs();
    let elsewhere = |pods: Vec<Pod>| pods.into_iter().filter(|pod| pod.node != node.name && pod.ready);
    within(ROLLOUT, "its pods are replaced", || {
        Ok((elsewhere(control.pods("app=web")?).count() == 6).then_some(()))
    })?;
    let mut answers = 0;
    for other in nodes.nodes().iter().filter(|other| other.name != node.name) {
        for _ in 0..50 {
            control.page(&other.address, WEB_PORT, "/").context("a Service goes on")?;
            answers += 1;
        }
    }

    nodes.come_back(node)?;
    within(ROLLOUT, "its old pods are gone, and the DaemonSet's and the StatefulSet's are back", || {
        let pods = control.pods("")?;
        let old = pods.iter().filter(|pod| lost.iter().any(|lost| lost.uid == pod.uid && !keeps(lost)));
        ensure!(old.count() == 0 && pods.iter().all(|pod| pod.ready), "{pods:?}");
        ensure!(pods.iter().filter(|pod| pod.name.starts_with("db-")).count() == 3, "{pods:?}");
        hello(nodes).map(Some)
    })?;
    reach_each_other(nodes)?;
    Ok(format!("missed after {missed} s, {} pods lost, {answers} answers meanwhile, 0 lost", lost.len()))
}

/// Whether a pod stays on its node whatever becomes of it.
fn keeps(pod: &Pod) -> bool {
    pod.name.starts_with("hello-")
}

/// As many pods as are asked for run on each node, have addresses of their own, and answer.
pub(crate) fn nodes_are_full_of_pods(nodes: &Nodes<'_>) -> Result<String> {
    let control = nodes.control();
    for name in ["nodes/web.yaml", "nodes/db.yaml", "nodes/dns.yaml"] {
        control.delete(name)?;
    }
    within(ROLLOUT, "only one pod is left on each node", || {
        Ok((control.pods("")?.len() == nodes.nodes().len()).then_some(()))
    })?;
    control.apply("nodes/many.yaml")?;
    let count = nodes.nodes().len() * (pods_per_node()? - 1);
    let begin = Instant::now();
    control.kubectl(&["scale", "deployment/many", &format!("--replicas={count}")])?;
    let pods = within(FULL, "all of them are ready", || {
        let pods = control.pods("app=many")?;
        let ready = pods.iter().filter(|pod| pod.ready).count();
        ensure!(ready == count, "{ready} of {} pods are ready", pods.len());
        Ok(Some(pods))
    })?;
    let took = begin.elapsed().as_secs();
    let addresses: BTreeSet<&str> = pods.iter().map(|pod| pod.address.as_str()).collect();
    ensure!(addresses.len() == count, "each pod has an address of its own: {addresses:?}");
    for pod in &pods {
        ensure!(pod.restart_count == 0, "no container was restarted: {pod:?}");
        let page = control.page(&pod.address, 8080, "/")?;
        ensure!(page == pod.name, "{} answers {page:?}", pod.name);
    }
    let spread = format!("{:?}", spread(&pods));
    let begin = Instant::now();
    control.kubectl(&["scale", "deployment/many", "--replicas=0"])?;
    within(FULL, "all of them are gone", || Ok(control.pods("app=many")?.is_empty().then_some(())))?;
    control.delete("nodes/many.yaml")?;
    Ok(format!("{spread} and one more each, ready in {took} s, gone in {} s", begin.elapsed().as_secs()))
}

/// Time for hundreds of pods to come or go.
const FULL: Duration = Duration::from_secs(1200);

/// Nothing of a pod is left anywhere, and the firewall's rules are as they were without pods.
pub(crate) fn nothing_is_left(nodes: &Nodes<'_>) -> Result<String> {
    nodes.control().delete("nodes/hello.yaml")?;
    within(ROLLOUT, "the API server has no pods", || {
        Ok(nodes.control().list("/api/v1/pods")?.is_empty().then_some(()))
    })?;
    for node in nodes.nodes() {
        within(ROLLOUT, &format!("{} has nothing of a pod", node.name), || {
            let left = node.pods_remains()?;
            ensure!(left.is_empty(), "left: {left:?}");
            let network = node.pods.split_once(".0/").context("the node's network")?.0;
            let rules = node.rules()?.into_iter();
            let rules: Vec<String> = rules.filter(|rule| names_a_pod(rule, network)).collect();
            ensure!(rules.is_empty(), "left: {rules:?}");
            Ok(Some(()))
        })?;
    }
    Ok(format!("{} nodes", nodes.nodes().len()))
}

/// Whether a rule has an address of a pod in the network of this prefix. The first two are the
/// network's and the node's.
fn names_a_pod(rule: &str, network: &str) -> bool {
    rule.split(|letter: char| !letter.is_ascii_digit() && letter != '.').any(|word| {
        let number = word.strip_prefix(network).and_then(|rest| rest.strip_prefix('.'));
        number.and_then(|number| number.parse::<u8>().ok()).is_some_and(|number| (2..255).contains(&number))
    })
}
