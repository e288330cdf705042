//! Pods, Services, host ports and names across nodes.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};
use berth_tests::cluster::Pod;
use berth_tests::cluster::nodes::{Node, Nodes, OUTSIDE};
use berth_tests::deadline::within;
use berth_tests::peers;

use super::{ROLLOUT, ROLLOUT_FLAG};

/// The page that says the pod's name and who asked for it.
const HELLO: &str = "/cgi-bin/hello";

/// The port of `hello` in its pods.
const PORT: u16 = 8080;

/// Its port on every node.
const HOST_PORT: u16 = 8088;

/// The ports on every node that lead to any pod of `hello`, and to those of the node.
const NODE_PORT: u16 = 30080;
const LOCAL_NODE_PORT: u16 = 30081;

/// The output of a command in a pod.
pub(crate) fn exec(nodes: &Nodes<'_>, pod: &str, command: &[&str]) -> Result<String> {
    let output = nodes.control().kubectl(&[&["exec", pod, "--"], command].concat())?;
    Ok(output.trim_end().to_owned())
}

/// The answer that a pod gets from a web server.
pub(crate) fn asks(nodes: &Nodes<'_>, pod: &str, url: &str) -> Result<String> {
    exec(nodes, pod, &["timeout", "10", "wget", "-q", "-O", "-", url])
}

/// The pods of `hello`, one for each node, in the nodes' order.
pub(crate) fn hello(nodes: &Nodes<'_>) -> Result<Vec<Pod>> {
    let pods = nodes.control().pods("app=hello")?;
    let of = |node: &str| {
        let mut pods = pods.iter().filter(|pod| pod.node == node && pod.ready);
        match (pods.next(), pods.next()) {
            (Some(pod), None) => Ok(pod.clone()),
            _ => bail!("{node} has one pod that is ready: {pods:?}"),
        }
    };
    nodes.nodes().iter().map(|node| of(&node.name)).collect()
}

/// An answer of `hello`: the name of the pod, and the address of the client that it saw.
type Answer = (String, String);

fn read(answer: &str) -> Result<Answer> {
    let (pod, client) = answer.split_once(' ').with_context(|| format!("it says {answer:?}"))?;
    let client = client.trim_matches(['[', ']']).trim_start_matches("::ffff:");
    Ok((pod.to_owned(), client.to_owned()))
}

/// Asks an address and a port.
type Ask<'a> = dyn Fn(&str, u16) -> Result<Answer> + 'a;

/// What asks, with a name for messages.
struct Asker<'a> {
    name: String,
    ask: Box<Ask<'a>>,
}

/// All pods of `hello`, all nodes, and the outside.
struct Askers<'a> {
    pods: Vec<Asker<'a>>,
    nodes: Vec<Asker<'a>>,
    outside: Asker<'a>,
}

fn askers<'a>(nodes: &'a Nodes<'_>, pods: &'a [Pod]) -> Askers<'a> {
    let pod = |pod: &'a Pod| Asker {
        name: format!("{} on {}", pod.name, pod.node),
        ask: Box::new(|address, port| {
            read(&asks(nodes, &pod.name, &format!("http://{address}:{port}{HELLO}"))?)
        }),
    };
    let node = |node: &'a Node| Asker {
        name: node.name.clone(),
        ask: Box::new(|address, port| read(&node.web.page(address, port, HELLO)?)),
    };
    Askers {
        pods: pods.iter().map(pod).collect(),
        nodes: nodes.nodes().iter().map(node).collect(),
        outside: Asker {
            name: "the outside".to_owned(),
            ask: Box::new(|address, port| read(&nodes.control().page(address, port, HELLO)?)),
        },
    }
}

impl Askers<'_> {
    fn all(&self) -> impl Iterator<Item = &Asker<'_>> {
        self.pods.iter().chain(&self.nodes).chain([&self.outside])
    }
}

impl Asker<'_> {
    /// It gets an answer from this pod; returns whom the pod saw.
    fn reaches(&self, pod: &Pod, address: &str, port: u16) -> Result<String> {
        let at = || format!("{} asks {address}:{port}", self.name);
        let (name, client) = (self.ask)(address, port).with_context(at)?;
        ensure!(name == pod.name, "{}: {name} answers, not {}", at(), pod.name);
        Ok(client)
    }

    /// It gets answers from each of these pods, and every time from one of them; returns how many
    /// answers that took.
    fn reaches_all(&self, pods: &[Pod], address: &str, port: u16) -> Result<usize> {
        let wanted: BTreeSet<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
        let (mut seen, mut answers) = (BTreeSet::new(), 0);
        while seen.len() < wanted.len() {
            // With three pods, this many answers without one of them is less likely than one in
            // 10^17.
            ensure!(answers < 100, "{} asks {address}:{port}: only {seen:?} answer", self.name);
            let (name, _) =
                (self.ask)(address, port).with_context(|| format!("{} asks {address}:{port}", self.name))?;
            ensure!(wanted.contains(name.as_str()), "{} asks {address}:{port}: {name} answers", self.name);
            seen.insert(name);
            answers += 1;
        }
        Ok(answers)
    }
}

/// Each gets an answer from every pod, also pods from themselves. A pod of another network sees the
/// address of the pod that asks.
pub(crate) fn pods_reach_pods(nodes: &Nodes<'_>) -> Result<String> {
    nodes.control().apply("nodes/hello.yaml")?;
    nodes.control().kubectl(&["rollout", "status", ROLLOUT_FLAG, "daemonset/hello"])?;
    reach_each_other(nodes)
}

/// [`pods_reach_pods`] with pods that are there.
pub(crate) fn reach_each_other(nodes: &Nodes<'_>) -> Result<String> {
    let pods = hello(nodes)?;
    let askers = askers(nodes, &pods);
    let mut answers = 0;
    for to in &pods {
        let node = nodes.node(&to.node)?;
        let network = node.pods.split_once(".0/").context("the node's network")?.0;
        ensure!(to.address.starts_with(&format!("{network}.")), "{to:?} is in {}", node.pods);
        for from in askers.all() {
            from.reaches(to, &to.address, PORT)?;
            answers += 1;
        }
        for (from, asker) in pods.iter().zip(&askers.pods) {
            let client = asker.reaches(to, &to.address, PORT)?;
            ensure!(client == from.address, "{} sees {client}, not {from:?}", to.name);
            answers += 1;
        }
    }
    Ok(format!("{} pods, {answers} answers", pods.len()))
}

/// The host port of each node leads to the pod on it: from outside, from nodes, also by loopback,
/// and from pods. The pod sees a client that is not on the node.
pub(crate) fn host_ports_lead_to_pods(nodes: &Nodes<'_>) -> Result<String> {
    let pods = hello(nodes)?;
    let askers = askers(nodes, &pods);
    let mut answers = 0;
    for ((to, node), own) in pods.iter().zip(nodes.nodes()).zip(&askers.nodes) {
        for from in askers.all() {
            from.reaches(to, &node.address, HOST_PORT)?;
            answers += 1;
        }
        own.reaches(to, "127.0.0.1", HOST_PORT)?;
        let client = askers.outside.reaches(to, &node.address, HOST_PORT)?;
        ensure!(client == OUTSIDE, "{} sees {client}", to.name);
        answers += 2;
    }
    Ok(format!("{} host ports, {answers} answers", pods.len()))
}

/// The address of a Service leads pods and nodes to every pod of it, a pod to itself as well; so
/// does its port on each node, also from outside. With `externalTrafficPolicy: Local` that port
/// leads to the node's own pod, which sees the client.
pub(crate) fn services_lead_to_pods(nodes: &Nodes<'_>) -> Result<String> {
    let pods = hello(nodes)?;
    let askers = askers(nodes, &pods);
    let service = nodes.control().get("/api/v1/namespaces/default/services/hello")?;
    let service =
        service.pointer("/spec/clusterIP").and_then(serde_json::Value::as_str).context("no address")?;
    let mut answers = 0;
    for from in askers.pods.iter().chain(&askers.nodes) {
        answers += from.reaches_all(&pods, service, 80)?;
    }
    for node in nodes.nodes() {
        for from in askers.all() {
            answers += from.reaches_all(&pods, &node.address, NODE_PORT)?;
        }
    }
    for (to, node) in pods.iter().zip(nodes.nodes()) {
        let client = askers.outside.reaches(to, &node.address, LOCAL_NODE_PORT)?;
        ensure!(client == OUTSIDE, "{} sees {client}", to.name);
        answers += 1;
    }
    Ok(format!("3 Services, {answers} answers"))
}

/// The cluster's DNS runs in pods, and tells every pod the addresses of Services. Pods get answers
/// by those names.
pub(crate) fn services_have_names(nodes: &Nodes<'_>) -> Result<String> {
    let coredns = peers::directory("coredns")?.canonicalize().context("finding CoreDNS")?;
    nodes.control().apply_with("nodes/dns.yaml", "@COREDNS@", &coredns.to_string_lossy())?;
    nodes.control().kubectl(&["rollout", "status", ROLLOUT_FLAG, "deployment/dns"])?;
    let service = nodes.control().get("/api/v1/namespaces/default/services/hello")?;
    let service =
        service.pointer("/spec/clusterIP").and_then(serde_json::Value::as_str).context("no address")?;
    let pods = hello(nodes)?;
    let askers = askers(nodes, &pods);
    let mut answers = 0;
    for (pod, asker) in pods.iter().zip(&askers.pods) {
        let found = within(ROLLOUT, "the name is known", || {
            resolve(nodes, &pod.name, "hello.default.svc.cluster.local").map(Some)
        })?;
        ensure!(found == BTreeSet::from([service.to_owned()]), "{} finds {found:?}", asker.name);
        for name in ["hello", "hello.default", "hello.default.svc.cluster.local"] {
            answers += asker.reaches_all(&pods, name, 80)?;
        }
        let unknown = resolve(nodes, &pod.name, "unknown.default.svc.cluster.local");
        ensure!(unknown.is_err(), "{} finds {unknown:?}", asker.name);
    }
    Ok(format!("{} pods, {answers} answers by name", pods.len()))
}

/// The addresses that a pod finds for a name.
pub(crate) fn resolve(nodes: &Nodes<'_>, pod: &str, name: &str) -> Result<BTreeSet<String>> {
    let output = exec(nodes, pod, &["timeout", "10", "nslookup", "-type=a", &format!("{name}.")])?;
    // The first one is the server's.
    let addresses = output.lines().filter_map(|line| line.strip_prefix("Address"));
    let addresses = addresses.filter_map(|line| line.split_whitespace().last());
    let found: BTreeSet<String> = addresses.skip(1).map(str::to_owned).collect();
    ensure!(!found.is_empty(), "{pod} finds nothing: {output:?}");
    Ok(found)
}
