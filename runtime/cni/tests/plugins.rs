//! Networks of plugins that are scripts: what they are given, and what becomes of those that
//! misbehave.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use berth_cni::{Attachment, Cache, Host, Network, NetworkConfig, NetworkError, PluginError};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A plugin that keeps what it was given, in files named by command and type, and passes the result
/// on.
const HONEST: &str = r#"#!/bin/sh
me=$(basename "$0")
cat > "$TRACE/$CNI_COMMAND.$me.json"
env > "$TRACE/$CNI_COMMAND.$me.env"
echo "$CNI_COMMAND $me" >> "$TRACE/order"
[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion": "VERSION", "ips": [{"address": "10.0.0.2/24"}]}'
exit 0
"#;

struct Node {
    top: TempDir,
    directories: Vec<PathBuf>,
    cache: Cache,
}

impl Node {
    fn new() -> Self {
        let top = tempfile::tempdir().unwrap();
        let directory = top.path().join("bin");
        fs::create_dir(&directory).unwrap();
        fs::create_dir(top.path().join("trace")).unwrap();
        let cache = Cache::new(&top.path().join("cache"));
        Self { directories: vec![top.path().join("none"), directory], cache, top }
    }

    fn plugin(&self, name: &str, script: &str) {
        let trace = self.top.path().join("trace");
        let path = self.directories[1].join(name);
        // Written by another process: a file that is open for writing cannot be run, and a child
        // that another test is starting would hold ours open for a moment.
        let mut install = Command::new("install")
            .args(["-m", "755", "/dev/stdin"])
            .arg(path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let script = script.replace("$TRACE", trace.to_str().unwrap());
        install.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(install.wait().unwrap().success());
    }

    fn network<'a>(&'a self, config: &'a NetworkConfig) -> Network<'a> {
        Network { config, host: self.host() }
    }

    fn host(&self) -> Host<'_> {
        Host { directories: &self.directories, cache: &self.cache, announce: &|_| {}, caller: None }
    }

    fn given(&self, command: &str, plugin: &str) -> Value {
        serde_json::from_slice(&fs::read(self.trace(&format!("{command}.{plugin}.json"))).unwrap()).unwrap()
    }

    fn environment(&self, command: &str, plugin: &str) -> Vec<String> {
        let text = fs::read_to_string(self.trace(&format!("{command}.{plugin}.env"))).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        // The shell's own.
        lines.retain(|line| !["PWD=", "OLDPWD=", "SHLVL=", "_="].iter().any(|own| line.starts_with(own)));
        lines.sort();
        lines
    }

    fn trace(&self, name: &str) -> PathBuf {
        self.top.path().join("trace").join(name)
    }
}

fn config(version: &str, plugins: &Value) -> NetworkConfig {
    let text = json!({"cniVersion": version, "name": "net", "plugins": plugins}).to_string();
    NetworkConfig::from_json(text.as_bytes()).unwrap()
}

fn attachment() -> Attachment {
    let mut capabilities = Map::new();
    capabilities.insert("portMappings".into(), json!([{"hostPort": 80, "containerPort": 8080}]));
    capabilities.insert("bandwidth".into(), json!({"ingressRate": 1000}));
    Attachment {
        container_id: "c0ffee".into(),
        interface: "eth0".into(),
        netns: "/run/netns/pod".into(),
        args: vec![("IgnoreUnknown".into(), "1".into()), ("K8S_POD_NAME".into(), "web".into())],
        capabilities,
    }
}

fn later() -> Instant {
    Instant::now() + PATIENCE
}

fn whole(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[test]
fn a_chain_is_added_checked_and_deleted_in_reverse() {
    let node = Node::new();
    for plugin in ["first", "second"] {
        node.plugin(plugin, &HONEST.replace("VERSION", "1.0.0"));
    }
    let plugins = json!([
        {"type": "first", "bridge": "cni0"},
        {"type": "second", "capabilities": {"portMappings": true}}]);
    let config = config("1.0.0", &plugins);
    let network = node.network(&config);
    let result = network.add(&attachment(), later()).unwrap();
    assert_eq!(result.addresses[0].address.to_string(), "10.0.0.2");

    assert_eq!(
        node.given("ADD", "first"),
        json!({"type": "first", "bridge": "cni0", "name": "net", "cniVersion": "1.0.0"})
    );
    let second = node.given("ADD", "second");
    assert_eq!(second["prevResult"]["ips"][0]["address"], "10.0.0.2/24");
    assert_eq!(second["runtimeConfig"], json!({"portMappings": [{"hostPort": 80, "containerPort": 8080}]}));
    let path = std::env::join_paths(&node.directories).unwrap().into_string().unwrap();
    let environment = |netns: &str, command: &str| {
        [
            "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=web".to_owned(),
            format!("CNI_COMMAND={command}"),
            "CNI_CONTAINERID=c0ffee".to_owned(),
            "CNI_IFNAME=eth0".to_owned(),
            format!("CNI_NETNS={netns}"),
            format!("CNI_PATH={path}"),
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        ]
    };
    assert_eq!(node.environment("ADD", "first"), environment("/run/netns/pod", "ADD"));

    let entries = node.cache.of_container("c0ffee").unwrap();
    let [entry] = entries.as_slice() else { panic!("{entries:?}") };
    network.check(entry, later()).unwrap();
    assert_eq!(node.given("CHECK", "first")["prevResult"]["ips"][0]["address"], "10.0.0.2/24");
    entry.delete(None, node.host(), later()).unwrap();
    assert_eq!(node.given("DEL", "first")["prevResult"]["ips"][0]["address"], "10.0.0.2/24");
    assert_eq!(node.environment("DEL", "second"), environment("", "DEL"));
    assert!(node.cache.of_container("c0ffee").unwrap().is_empty());
    let order = fs::read_to_string(node.trace("order")).unwrap();
    let order: Vec<&str> = order.lines().collect();
    assert_eq!(order, ["ADD first", "ADD second", "CHECK first", "CHECK second", "DEL second", "DEL first"]);
}

#[test]
fn each_version_is_spoken_as_it_was() {
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let node = Node::new();
        // A plugin of another version than its neighbours.
        node.plugin("first", &HONEST.replace("VERSION", "1.0.0"));
        node.plugin("second", &HONEST.replace("VERSION", version));
        let config = config(version, &json!([{"type": "first"}, {"type": "second"}]));
        let network = node.network(&config);
        network.add(&attachment(), later()).unwrap();
        let previous = node.given("ADD", "second")["prevResult"].clone();
        assert_eq!(previous["cniVersion"], version);
        let is_old = version.starts_with("0.");
        assert_eq!(previous["ips"][0].get("version"), is_old.then(|| json!("4")).as_ref(), "{version}");
        let entry = node.cache.of_container("c0ffee").unwrap().remove(0);
        network.check(&entry, later()).unwrap();
        network.status(later()).unwrap();
        network.collect(&[], "eth0", later()).unwrap();
        entry.delete(None, node.host(), later()).unwrap();
        let asked = |command: &str| node.trace(&format!("{command}.first.json")).exists();
        assert_eq!(asked("CHECK"), version >= "0.4.0", "{version}");
        assert_eq!((asked("STATUS"), asked("GC")), (version == "1.1.0", version == "1.1.0"), "{version}");
        assert_eq!(node.given("DEL", "first").get("prevResult").is_some(), version >= "0.4.0", "{version}");
    }
}

#[test]
fn what_is_collected_is_what_the_cache_does_not_have() {
    let node = Node::new();
    node.plugin("first", &HONEST.replace("VERSION", "1.1.0"));
    let config = config("1.1.0", &json!([{"type": "first"}]));
    let network = node.network(&config);
    network.add(&attachment(), later()).unwrap();
    network.collect(&[], "eth0", later()).unwrap();
    assert_eq!(
        node.given("GC", "first")["cni.dev/valid-attachments"],
        json!([{"containerID": "c0ffee", "ifname": "eth0"}])
    );
    // A container that is there although the cache has lost it; and nothing while a file is
    // damaged.
    network.collect(&["beef".to_owned(), "c0ffee".to_owned()], "eth0", later()).unwrap();
    assert_eq!(
        node.given("GC", "first")["cni.dev/valid-attachments"],
        json!([
            {"containerID": "beef", "ifname": "eth0"},
            {"containerID": "c0ffee", "ifname": "eth0"}])
    );
    fs::write(node.top.path().join("cache/results/net-dead-eth0"), "{").unwrap();
    fs::remove_file(node.trace("GC.first.json")).unwrap();
    network.collect(&[], "eth0", later()).unwrap();
    assert!(!node.trace("GC.first.json").exists());
    assert!(!node.environment("GC", "first").iter().any(|line| line.starts_with("CNI_CONTAINERID")));
}

#[test]
fn an_attachment_that_failed_can_be_deleted() {
    let node = Node::new();
    node.plugin("first", &HONEST.replace("VERSION", "1.0.0"));
    node.plugin(
        "second",
        "#!/bin/sh\n[ $CNI_COMMAND = DEL ] || { echo '{\"code\": 11, \"msg\": \"not yet\"}'; exit 1; }",
    );
    let plugins = json!([{"type": "first"}, {"type": "second"}]);
    let config = config("1.0.0", &plugins);
    let error = node.network(&config).add(&attachment(), later()).unwrap_err();
    assert_eq!(whole(&error), "CNI plugin second of network net failed on ADD: code 11: not yet");
    let entry = node.cache.of_container("c0ffee").unwrap().remove(0);
    assert_eq!(entry.result, None);
    entry.delete(Some(Path::new("/run/netns/pod")), node.host(), later()).unwrap();
    assert!(node.given("DEL", "first").get("prevResult").is_none());
    assert!(node.cache.all().unwrap().entries.is_empty());
}

#[test]
fn plugins_that_misbehave_are_named_and_hold_nothing() {
    let node = Node::new();
    let answer = "{\"ips\": [{\"address\": \"10.0.0.2/24\"}]}";
    for (script, says) in [
        ("exit 3", "exit status: 3"),
        ("echo oops >&2; exit 1", "exit status: 1: oops"),
        ("kill -9 $$", "signal: 9 (SIGKILL)"),
        ("echo garbage", "its result cannot be read: expected value"),
        ("exit 0", "its result cannot be read: EOF"),
        ("sleep 1000 & yes", "it printed more than 1 MiB and was killed"),
        ("echo '{\"cniVersion\": \"7.0.0\"}'", "its result has cniVersion \"7.0.0\", not 1.0.0"),
        ("echo '{\"ips\": [{\"address\": \"10.0.0.2\"}]}'", "its result has ips.address \"10.0.0.2\""),
    ] {
        node.plugin("bad", &format!("#!/bin/sh\n{script}\n"));
        let config = config("1.0.0", &json!([{"type": "bad"}]));
        let error = whole(&node.network(&config).add(&attachment(), later()).unwrap_err());
        assert!(error.starts_with("CNI plugin bad of network net failed on ADD: "), "{error}");
        assert!(error.contains(says), "{script}: {error}");
    }
    // These are odd, but did what they were asked for.
    for script in
        ["head -c 3000000 /dev/zero >&2".to_owned(), "exec 0<&-".to_owned(), "sleep 1000 &".to_owned()]
    {
        node.plugin("odd", &format!("#!/bin/sh\n{script}\necho '{answer}'\n"));
        let config = config("1.0.0", &json!([{"type": "odd"}]));
        let result = node.network(&config).add(&attachment(), later());
        assert!(result.is_ok(), "{script}: {result:?}");
    }
}

#[test]
fn a_plugin_that_never_ends_is_killed_with_its_children() {
    let node = Node::new();
    node.plugin("slow", "#!/bin/sh\ntrap '' TERM INT HUP\nsleep 1000 &\necho $! > \"$TRACE/child\"\nwait");
    let config = config("1.0.0", &json!([{"type": "slow"}]));
    let begin = Instant::now();
    let deadline = begin + Duration::from_millis(500);
    let error = node.network(&config).add(&attachment(), deadline).unwrap_err();
    let NetworkError::Plugin { source, .. } = &error else { panic!("{error}") };
    assert!(matches!(**source, PluginError::Late { .. }), "{error}");
    assert!(begin.elapsed() < PATIENCE);
    let Ok(child) = fs::read_to_string(node.trace("child")) else { return };
    let stat = PathBuf::from(format!("/proc/{}/stat", child.trim()));
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(begin.elapsed() < PATIENCE, "{child} is still running");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_cannot_be_passed_on_is_refused_before_any_plugin_runs() {
    let node = Node::new();
    node.plugin("first", HONEST);
    let config = config("1.0.0", &json!([{"type": "first"}]));
    for (change, says) in [
        (
            (|asked: &mut Attachment| asked.container_id = "../x".into()) as fn(&mut Attachment),
            "container id",
        ),
        (|asked| asked.container_id = String::new(), "container id"),
        (|asked| asked.interface = "a/b".into(), "interface"),
        (|asked| asked.interface = "x".repeat(16), "interface"),
        (|asked| asked.args[1].1 = "web;K8S_POD_NAMESPACE=kube-system".into(), "K8S_POD_NAME"),
    ] {
        let mut asked = attachment();
        change(&mut asked);
        let error = node.network(&config).add(&asked, later()).unwrap_err().to_string();
        assert!(error.starts_with(says), "{error}");
    }
    assert!(node.cache.all().unwrap().entries.is_empty());
    assert!(!node.trace("order").exists());
    let missing =
        NetworkConfig::from_json(br#"{"cniVersion": "1.0.0", "name": "n", "type": "nowhere"}"#).unwrap();
    let error = whole(&node.network(&missing).add(&attachment(), later()).unwrap_err());
    assert!(
        error.contains("CNI plugin nowhere of network n failed on ADD: it is not installed in /"),
        "{error}"
    );
}
