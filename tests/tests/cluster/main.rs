//! A whole Kubernetes cluster of one node on the daemon: common workloads, until nothing of them is
//! left.
//!
//! One cluster and one test, because a cluster takes half a minute to start. Assertions use the API
//! server, `kubectl` and the pods themselves; only at the end the daemon is asked what it still
//! has.

mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use berth_cri::v1;
use berth_tests::cgroup::CpuLimit;
use berth_tests::cluster::{ADDRESS, Cluster, NODE, Pod};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use serde_json::{Value, json};

/// Time for operations that take several servers and a few of their periods of seconds, for many
/// pods, on a machine that is busy with other things.
const ROLLOUT: Duration = Duration::from_secs(180);

/// [`ROLLOUT`] for kubectl.
const ROLLOUT_FLAG: &str = "--timeout=180s";

/// Time for the kubelet to collect ended containers. It does so once a minute.
const COLLECTION: Duration = Duration::from_secs(180);

#[test]
fn a_cluster_runs_its_workloads_on_the_daemon_and_leaves_nothing() -> Result<()> {
    rootful(|daemon| {
        let cluster = Cluster::start(daemon)?;
        workloads_come_and_go(&cluster, daemon).with_context(|| cluster.last_words())
    })
}

fn workloads_come_and_go(cluster: &Cluster, daemon: &Daemon) -> Result<()> {
    let before = cluster.remains()?;
    the_node_is_well(cluster).context("the node")?;
    // Its waits grow from restart to restart, so it is checked last.
    cluster.apply("crashing.yaml")?;

    a_deployment_is_scaled_and_rolled_over(cluster, daemon).context("the deployment")?;
    settings_are_files_and_environment(cluster).context("the ConfigMap and the Secret")?;
    limits_change_in_place(cluster, daemon).context("the resized pod")?;
    streams::commands_reach_into_a_pod(cluster, daemon).context("kubectl's commands")?;
    a_job_completes(cluster).context("the Job")?;
    jobs_of_a_cron_job_come_and_go(cluster).context("the CronJob")?;
    a_daemon_set_serves_on_the_node(cluster).context("the DaemonSet")?;
    a_stubborn_pod_ends_by_force(cluster, daemon).context("the stubborn pod")?;
    a_crashing_container_is_started_again_and_again(cluster).context("the crashing pod")?;

    the_node_is_well(cluster).context("the node in the end")?;
    leaves_nothing(cluster, daemon, &before)
}

/// Its conditions say so, and it reports its runtime and that runtime's features.
fn the_node_is_well(cluster: &Cluster) -> Result<()> {
    let node = cluster.get(&format!("/api/v1/nodes/{NODE}"))?;
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array).context("no conditions")?;
    for (kind, wanted) in
        [("Ready", "True"), ("MemoryPressure", "False"), ("DiskPressure", "False"), ("PIDPressure", "False")]
    {
        let condition = conditions.iter().find(|condition| condition.get("type") == Some(&Value::from(kind)));
        let condition = condition.with_context(|| format!("no condition {kind}"))?;
        ensure!(condition.get("status") == Some(&Value::from(wanted)), "{kind}: {condition}");
    }
    let runtime = node.pointer("/status/nodeInfo/containerRuntimeVersion").and_then(Value::as_str);
    ensure!(runtime.is_some_and(|runtime| runtime.starts_with("berth://")), "its runtime is {runtime:?}");
    let handlers =
        node.pointer("/status/runtimeHandlers").and_then(Value::as_array).context("no handlers")?;
    let default = handlers.iter().find(|handler| handler.get("name").is_none_or(|name| name == ""));
    let read_only = default.and_then(|handler| handler.pointer("/features/recursiveReadOnlyMounts"));
    ensure!(read_only == Some(&Value::from(true)), "the default handler is {default:?}");
    Ok(())
}

/// Ten replicas that answer; fifteen, although the daemon crashes meanwhile; killed ones are
/// replaced; another template replaces all; none.
fn a_deployment_is_scaled_and_rolled_over(cluster: &Cluster, daemon: &Daemon) -> Result<()> {
    cluster.apply("web.yaml")?;
    rolled_out(cluster)?;
    let first = serve(cluster, 10, "one")?;

    cluster.kubectl(&["scale", "deployment/web", "--replicas=15"])?;
    daemon.crash()?;
    rolled_out(cluster)?;
    let scaled = serve(cluster, 15, "one")?;
    for (name, pod) in &first {
        let now = scaled.get(name).with_context(|| format!("{name} is gone"))?;
        ensure!(now == pod, "scaling and a crash of the daemon leave {pod:?} alone: {now:?}");
    }
    let name = first.keys().next().context("there are ten")?;
    let log = cluster.kubectl(&["logs", name])?;
    ensure!(log == format!("serving {name}\n"), "the log of {name}: {log:?}");

    let killed: Vec<&str> = scaled.keys().take(3).map(String::as_str).collect();
    cluster.kubectl(&[&["delete", "pod", "--force", "--grace-period=0"], &killed[..]].concat())?;
    rolled_out(cluster)?;
    let replaced = serve(cluster, 15, "one")?;
    ensure!(killed.iter().all(|name| !replaced.contains_key(*name)), "{killed:?} were deleted: {replaced:?}");
    ended(daemon, killed.iter().filter_map(|name| scaled.get(*name)))?;

    cluster.kubectl(&["set", "env", "deployment/web", "VERSION=two"])?;
    rolled_out(cluster)?;
    let second = serve(cluster, 15, "two")?;
    ensure!(second.keys().all(|name| !replaced.contains_key(name)), "all pods are new: {second:?}");

    cluster.delete("web.yaml")?;
    within(ROLLOUT, "the deployment's pods are gone", || {
        Ok(cluster.pods("app=web")?.is_empty().then_some(()))
    })?;
    ended(daemon, second.values())
}

fn rolled_out(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["rollout", "status", ROLLOUT_FLAG, "deployment/web"]).map(drop)
}

/// There are exactly this many ready pods, none was ever restarted, each has its own address, and
/// each answers there with its own name and this version.
fn serve(cluster: &Cluster, count: usize, version: &str) -> Result<BTreeMap<String, Pod>> {
    // Those of an old template may take a moment longer to end than the rollout.
    let pods = within(ROLLOUT, "no other pods are there", || {
        let pods = cluster.pods("app=web")?;
        ensure!(pods.len() == count && pods.iter().all(|pod| pod.ready), "{count} ready pods, but {pods:?}");
        Ok(Some(pods))
    })?;
    let addresses: BTreeSet<_> = pods.iter().map(|pod| pod.address.as_str()).collect();
    ensure!(addresses.len() == count, "each pod has an address of its own: {addresses:?}");
    for pod in &pods {
        ensure!(pod.restart_count == 0, "no container was restarted: {pod:?}");
        let page = cluster.page(&pod.address, 8080, "/")?;
        ensure!(page == format!("{} {version}", pod.name), "{} answers {page:?}", pod.name);
    }
    Ok(pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect())
}

/// No cgroup of these pods is left, and so no process.
fn ended<'a>(daemon: &Daemon, pods: impl Iterator<Item = &'a Pod>) -> Result<()> {
    let uids: Vec<&str> = pods.map(|pod| pod.uid.as_str()).collect();
    ensure!(!uids.is_empty(), "there were pods");
    within(SOON, "the pods' cgroups are gone", || {
        let cgroups = daemon.cgroup().below("pod");
        let left = |uid: &&str| cgroups.iter().any(|path| path.to_string_lossy().contains(*uid));
        match uids.iter().find(|uid| left(uid)) {
            Some(uid) => bail!("one of pod {uid} is left"),
            None => Ok(Some(())),
        }
    })
}

/// Both are there as files with the right mode, and as variables; a change of the ConfigMap arrives
/// in the running container.
fn settings_are_files_and_environment(cluster: &Cluster) -> Result<()> {
    cluster.apply("settings.yaml")?;
    cluster.kubectl(&["wait", "--for=condition=Ready", ROLLOUT_FLAG, "pod/settings"])?;
    let log = cluster.kubectl(&["logs", "settings"])?;
    ensure!(log == "environment: good morning, open sesame\n", "its log: {log:?}");
    let address = cluster.pod("settings")?.address;
    let look = || cluster.page(&address, 8080, "/cgi-bin/look");
    let found = look()?;
    // The exit code of the last command: the secret cannot be written.
    let files = "good morning, open sesame\nfirst line\nsecond line\n400\nrefused";
    ensure!(found == files, "its files: {found:?}");

    let change = r#"{"data": {"greeting": "good evening"}}"#;
    cluster.kubectl(&["patch", "configmap", "settings", "--patch", change])?;
    within(ROLLOUT, "the change arrives", || Ok(look()?.starts_with("good evening, ").then_some(())))?;
    cluster.delete("settings.yaml")
}

/// Up and down, by the API server's subresource `resize`: the limits in force change, the pod's
/// status and the container see it too, and the container is the same. One that has to be restarted
/// for it is. Beside that: mounts below a read-only one are read-only.
fn limits_change_in_place(cluster: &Cluster, daemon: &Daemon) -> Result<()> {
    cluster.apply("resized.yaml")?;
    cluster.kubectl(&["wait", "--for=condition=Ready", ROLLOUT_FLAG, "pod/resized"])?;
    let first = cluster.pod("resized")?;
    let write = cluster.page(&first.address, 8080, "/cgi-bin/write")?;
    ensure!(write.contains("Read-only file system"), "a write to a mount below: {write:?}");

    let resize = |container: &str, limits: &Value| {
        let containers = json!([{ "name": container, "resources": { "limits": limits } }]);
        let patch = json!({ "spec": { "containers": containers } }).to_string();
        cluster.kubectl(&["patch", "pod", "resized", "--subresource=resize", "--patch", &patch])
    };
    // Beside its own, the pod has the limits of `restarted`: 100m and 16 MiB.
    for (cpu, milli_cpu, memory, memory_bytes) in
        [("250m", 250, "96Mi", 96 << 20), ("120m", 120, "48Mi", 48 << 20)]
    {
        resize("server", &json!({ "cpu": cpu, "memory": memory }))?;
        let id = first.container_ids.get("server").context("it runs")?;
        in_force(daemon, id, milli_cpu, memory_bytes)?;
        in_force(daemon, &format!("pod{}", first.uid), milli_cpu + 100, memory_bytes + (16 << 20))?;
        let seen = cluster.page(&first.address, 8080, "/cgi-bin/look")?;
        ensure!(seen == memory_bytes.to_string(), "the container sees {seen:?}, not {memory_bytes}");
        within(ROLLOUT, "the pod's status has the new limits, and no resize is under way", || {
            let pod = cluster.get("/api/v1/namespaces/default/pods/resized")?;
            let limits = pod.pointer("/status/containerStatuses/1/resources/limits").context("no limits")?;
            ensure!(limits.get("cpu") == Some(&Value::from(cpu)), "{limits}");
            ensure!(limits.get("memory") == Some(&Value::from(memory)), "{limits}");
            let conditions = pod.pointer("/status/conditions").context("no conditions")?.to_string();
            ensure!(!conditions.contains("PodResize"), "{conditions}");
            Ok(Some(()))
        })?;
    }
    let pod = cluster.pod("resized")?;
    ensure!(pod == first, "nothing was restarted: {first:?}, and now {pod:?}");

    resize("restarted", &json!({ "memory": "24Mi" }))?;
    let restarted = within(ROLLOUT, "the other container was started again", || {
        let pod = cluster.pod("resized")?;
        Ok(Some(pod).filter(|pod| pod.ready && pod.container_ids != first.container_ids))
    })?;
    let id = restarted.container_ids.get("restarted").context("it runs")?;
    in_force(daemon, id, 100, 24 << 20)?;
    ensure!(
        restarted.container_ids.get("server") == first.container_ids.get("server"),
        "the server is left alone: {first:?}, and now {restarted:?}"
    );
    cluster.delete("resized.yaml")
}

/// The cgroup with this name gets these limits.
fn in_force(daemon: &Daemon, name: &str, milli_cpu: u64, memory_bytes: u64) -> Result<()> {
    within(ROLLOUT, &format!("{milli_cpu}m and {memory_bytes} bytes are in force"), || {
        let CpuLimit { quota_us, period_us } = daemon.cgroup().cpu_limit(name)?;
        let memory = daemon.cgroup().memory_limit_bytes(name)?;
        ensure!(
            quota_us * 1000 == period_us * milli_cpu && memory == memory_bytes,
            "{quota_us} of {period_us} us and {memory} bytes"
        );
        Ok(Some(()))
    })
}

/// Three pods end with success, and their logs can be read afterwards.
fn a_job_completes(cluster: &Cluster) -> Result<()> {
    cluster.apply("job.yaml")?;
    cluster.kubectl(&["wait", "--for=condition=Complete", ROLLOUT_FLAG, "job/sum"])?;
    let log = cluster.kubectl(&["logs", "--selector=job-name=sum", "--tail=-1"])?;
    let lines: BTreeSet<_> = log.lines().collect();
    ensure!(lines == BTreeSet::from(["index 0: 42", "index 1: 43", "index 2: 44"]), "the logs: {log:?}");
    cluster.delete("job.yaml")
}

/// Five Jobs made from it run; of those that have ended only the youngest stays, as the history
/// limit says.
fn jobs_of_a_cron_job_come_and_go(cluster: &Cluster) -> Result<()> {
    const JOBS: usize = 5;
    cluster.apply("tick.yaml")?;
    let mut ran = BTreeSet::new();
    for number in 1..=JOBS {
        cluster.kubectl(&["create", "job", &format!("tick-{number}"), "--from=cronjob/tick"])?;
        // What the limit removes may be gone before the next look, so each is seen to complete
        // before the next one.
        let job = format!("/apis/batch/v1/namespaces/default/jobs/tick-{number}");
        within(ROLLOUT, "the job completes", || {
            let job = cluster.get(&job)?;
            let succeeded = job.pointer("/status/succeeded").and_then(Value::as_u64);
            Ok((succeeded == Some(1)).then_some(()))
        })?;
        let log = cluster.kubectl(&["logs", &format!("job/tick-{number}")])?;
        ensure!(log == "tick\n", "the log of job {number}: {log:?}");
        ran.extend(cluster.pods(&format!("job-name=tick-{number}"))?.into_iter().map(|pod| pod.uid));
    }
    ensure!(ran.len() == JOBS, "each job had one pod: {ran:?}");
    within(ROLLOUT, "one job and its pod stay", || {
        let jobs = cluster.list("/apis/batch/v1/namespaces/default/jobs")?;
        let pods: Vec<_> = cluster.pods("")?.into_iter().filter(|pod| ran.contains(&pod.uid)).collect();
        Ok((jobs.len() == 1 && pods.len() == 1).then_some(()))
    })?;
    cluster.delete("tick.yaml")
}

/// The one node has one pod, which has the node's address and answers there.
fn a_daemon_set_serves_on_the_node(cluster: &Cluster) -> Result<()> {
    cluster.apply("node-web.yaml")?;
    cluster.kubectl(&["rollout", "status", ROLLOUT_FLAG, "daemonset/node-web"])?;
    let pods = cluster.pods("app=node-web")?;
    let [pod] = &pods[..] else { bail!("one pod, but {pods:?}") };
    ensure!(pod.address == ADDRESS, "it has the node's address: {pod:?}");
    let page = cluster.page(ADDRESS, 8099, "/")?;
    ensure!(page == format!("node {NODE}"), "it answers {page:?}");
    cluster.delete("node-web.yaml")?;
    within(SOON, "it answers no more", || Ok(cluster.page(ADDRESS, 8099, "/").is_err().then_some(())))
}

/// The API server forgets it at once. The kubelet still gives it the grace period of its manifest,
/// since it is not told of the force; then its processes have to end.
fn a_stubborn_pod_ends_by_force(cluster: &Cluster, daemon: &Daemon) -> Result<()> {
    cluster.apply("stubborn.yaml")?;
    cluster.kubectl(&["wait", "--for=condition=Ready", ROLLOUT_FLAG, "pod/stubborn"])?;
    let pod = cluster.pod("stubborn")?;
    ensure!(!daemon.cgroup().below(&pod.uid).is_empty(), "its cgroup is named after it: {pod:?}");
    cluster.kubectl(&["delete", "pod", "stubborn", "--wait=false"])?;
    within(SOON, "it is asked to end", || {
        Ok(cluster.kubectl(&["logs", "stubborn"])?.contains("no\n").then_some(()))
    })?;
    cluster.kubectl(&["delete", "pod", "stubborn", "--force", "--grace-period=0"])?;
    let pods = cluster.pods("")?;
    ensure!(pods.iter().all(|other| other.uid != pod.uid), "the API server has forgotten it: {pods:?}");
    ended(daemon, [pod].iter())
}

/// It waits longer and longer, is counted, and its previous output can be read.
fn a_crashing_container_is_started_again_and_again(cluster: &Cluster) -> Result<()> {
    let pod = within(ROLLOUT, "it waits for its third start", || {
        let pod = cluster.pod("crashing")?;
        Ok(Some(pod).filter(|pod| pod.restart_count >= 2 && pod.waiting == "CrashLoopBackOff"))
    })?;
    ensure!(pod.previous_exit_code == Some(7), "its exit code is kept: {pod:?}");
    let log = cluster.kubectl(&["logs", "crashing", "--previous"])?;
    ensure!(log == "crashing soon\n", "its log: {log:?}");
    cluster.delete("crashing.yaml")
}

/// Neither the API server, nor the kubelet, nor the daemon, nor the machine has anything of a pod.
fn leaves_nothing(cluster: &Cluster, daemon: &Daemon, before: &BTreeSet<String>) -> Result<()> {
    let pods = cluster.pods("")?;
    ensure!(pods.is_empty(), "the API server has no pod: {pods:?}");
    let client = daemon.client();
    within(COLLECTION, "the kubelet has the daemon remove everything", || {
        let containers = client.containers(v1::ContainerFilter::default())?;
        let sandboxes = client.sandboxes(v1::PodSandboxFilter::default())?;
        ensure!(containers.is_empty() && sandboxes.is_empty(), "{containers:?} {sandboxes:?}");
        Ok(Some(()))
    })?;
    within(COLLECTION, "the kubelet removes its files of pods", || {
        let files = cluster.pod_files();
        ensure!(files.is_empty(), "left: {files:?}");
        Ok(Some(()))
    })?;
    within(SOON, "the machine has what it had before", || {
        let now = cluster.remains()?;
        let (left, missing): (Vec<_>, Vec<_>) =
            (now.difference(before).collect(), before.difference(&now).collect());
        ensure!(left.is_empty() && missing.is_empty(), "left: {left:?}; missing: {missing:?}");
        Ok(Some(()))
    })
}
