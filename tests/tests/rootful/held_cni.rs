//! Directories of CNI that a container holds, as the agents of networks have them mounted: the
//! daemon waits for none of them, and gives up nothing that a pod has of plugins.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_tests::census::status_field;
use berth_tests::cni::ONLY_CNI;
use berth_tests::daemon::{Daemon, SOON, own_namespaces, rootful, rootful_with};
use berth_tests::deadline::within;
use berth_tests::held::{Call, GIVEN_UP, Holder, MKDIR, Queued, held_children, waits_in};
use berth_tests::pod::{Pod, idle, security};
use tonic::Code;

/// A plugin that says what it was asked to do, and for which container.
const PLUGIN: &str = r#"#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_ARGS" >> TRACE
[ $CNI_COMMAND != ADD ] || echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.99.0.7/24"}]}'
"#;

fn configure(daemon: &Daemon, plugin: &str) -> Result<()> {
    let text = format!(r#"{{"cniVersion": "1.0.0", "name": "odd", "type": "{plugin}"}}"#);
    daemon.configure_cni("10-odd.conf", &text)
}

/// Has a network of one plugin, and returns where that leaves its trace.
fn network(daemon: &Daemon) -> Result<PathBuf> {
    let trace = daemon.cni().join("trace");
    daemon.install_cni_script("odd", &PLUGIN.replace("TRACE", &trace.to_string_lossy()))?;
    configure(daemon, "odd")?;
    is_ready(daemon, true)?;
    Ok(trace)
}

fn condition(daemon: &Daemon) -> Result<v1::RuntimeCondition> {
    let status = daemon.client().status(v1::StatusRequest::default())?.status.unwrap_or_default();
    let network = status.conditions.into_iter().find(|condition| condition.r#type == "NetworkReady");
    network.context("the condition of the network")
}

fn is_ready(daemon: &Daemon, ready: bool) -> Result<v1::RuntimeCondition> {
    within(SOON, "the condition of the network", || {
        let condition = condition(daemon)?;
        Ok((condition.status == ready).then_some(condition))
    })
}

/// A pod on the node's network, as an agent of a network is one.
fn agent(daemon: &Daemon, name: &str) -> v1::PodSandboxConfig {
    let mut config = daemon.pod_config(name);
    config.linux.get_or_insert_default().security_context.get_or_insert_default().namespace_options =
        Some(of_the_node());
    config
}

fn of_the_node() -> v1::NamespaceOption {
    v1::NamespaceOption { network: v1::NamespaceMode::Node.into(), ..own_namespaces() }
}

fn run(daemon: &Daemon, name: &str) -> Call<v1::RunPodSandboxResponse> {
    let request =
        v1::RunPodSandboxRequest { config: Some(daemon.pod_config(name)), runtime_handler: String::new() };
    let client = daemon.client();
    Call::begin(move || client.run_pod_sandbox(request))
}

/// That the daemon itself waits for nothing, answers, and makes pods that need no CNI.
fn serves(daemon: &Daemon, name: &str) -> Result<()> {
    condition(daemon)?;
    daemon.client().list_pod_sandbox(v1::ListPodSandboxRequest::default())?;
    let pod = daemon.pod_of(agent(daemon, name))?;
    let mut main = idle("main");
    security(&mut main).namespace_options = Some(of_the_node());
    ensure!(pod.start(main)?.sh("echo alive")? == "alive\n");
    pod.remove()?;
    let daemon = i32::try_from(daemon.pid()?)?;
    for thread in fs::read_dir(format!("/proc/{daemon}/task"))? {
        let thread = thread?.file_name().to_string_lossy().parse()?;
        let sleeps = || status_field(thread, "State").is_some_and(|state| state.starts_with('D'));
        // A moment for a disk is none of its business.
        within(SOON, "no thread of the daemon waits in the kernel", || Ok((!sleeps()).then_some(())))?;
    }
    Ok(())
}

fn asked(trace: &Path, command: &str, name: &str) -> Result<usize> {
    let calls = fs::read_to_string(trace)?;
    let wanted = format!("K8S_POD_NAME={name};");
    Ok(calls.lines().filter(|line| line.starts_with(command) && line.contains(&wanted)).count())
}

#[test]
fn configurations_that_are_held_leave_the_last_good_one_in_use() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        let trace = network(daemon)?;
        let before = daemon.pod("before")?;
        let held = daemon.cni().join("net.d");
        let Some(holder) = Holder::start(daemon, agent(daemon, "hostile"), &held)? else { return Ok(()) };
        let queued = Queued::start(&held)?;
        serves(daemon, "meanwhile")?;
        ensure!(run(daemon, "pod").answer()?.is_ok());

        // The next daemon does not know it.
        daemon.crash()?;
        let message = is_ready(daemon, false)?.message;
        ensure!(message.contains(&*held.to_string_lossy()), "{message}");
        serves(daemon, "of-the-next")?;
        let refused = run(daemon, "waits").refused()?;
        ensure!(refused.message().contains(&*held.to_string_lossy()), "{refused:?}");
        ensure!(held_children(daemon)? > 0, "who only looks was ended, so nobody knows when it answers");
        // What pods have is given back with the configuration that it came from.
        before.remove()?;
        assert_eq!(asked(&trace, "DEL", "before")?, 1);
        daemon.stop()?;
        daemon.start_again()?;
        ensure!(holder.holds(), "all the time");

        holder.remove()?;
        drop(queued);
        is_ready(daemon, true)?;
        daemon.pod("waits")?;
        Ok(())
    })
}

#[test]
fn a_cache_that_is_held_keeps_pods_waiting_and_loses_none() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        let trace = network(daemon)?;
        let before = daemon.pod("before")?;
        let held = daemon.cni().join("cache/results");
        let Some(holder) = Holder::start(daemon, agent(daemon, "hostile"), &held)? else { return Ok(()) };

        let first = run(daemon, "first");
        within(SOON, "a child of the daemon waits", || Ok((held_children(daemon)? > 0).then_some(())))?;
        serves(daemon, "meanwhile")?;
        let refused = first.refused()?;
        assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused:?}");
        for words in [&*held.to_string_lossy(), "did not answer within", "a container keeps"] {
            ensure!(refused.message().contains(words), "{refused:?}");
        }
        assert_eq!(asked(&trace, "ADD", "first")?, 0, "attached without an entry in the cache");
        // It is known now, and nothing is made before the next one is refused.
        let refused = run(daemon, "second").refused()?;
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        ensure!(refused.message().contains("has not answered for"), "{refused:?}");

        let (client, id) = (daemon.client(), before.id.clone());
        let stop = move || client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id });
        let refused = Call::begin(stop).refused()?;
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        ensure!(refused.message().contains(&*held.to_string_lossy()), "{refused:?}");
        daemon.crash()?;
        serves(daemon, "of-the-next")?;
        daemon.stop()?;
        daemon.start_again()?;
        ensure!(holder.holds(), "all the time");

        holder.remove()?;
        within(SOON, "the pod can be stopped", || Ok(before.stop().ok()))?;
        before.remove()?;
        assert_eq!(asked(&trace, "DEL", "before")?, 1);
        let pod = within(SOON, "pods are made again", || Ok(daemon.pod("first").ok()))?;
        pod.remove()?;
        nothing_is_left(daemon)
    })
}

#[test]
fn plugins_that_are_held_keep_only_their_pods_waiting() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        network(daemon)?;
        let held = daemon.cni().join("bin");
        let Some(holder) = Holder::start(daemon, agent(daemon, "hostile"), &held)? else { return Ok(()) };
        let queued = Queued::start(&held)?;
        // A name that the kernel has not in memory.
        configure(daemon, "other")?;
        let first = run(daemon, "first");
        within(SOON, "a child of the daemon waits", || Ok((held_children(daemon)? > 0).then_some(())))?;
        serves(daemon, "meanwhile")?;
        let refused = first.refused()?;
        assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused:?}");
        ensure!(refused.message().contains(&*held.join("other").to_string_lossy()), "{refused:?}");
        ensure!(holder.holds(), "all the time");
        holder.remove()?;
        drop(queued);
        // What could not be made is given back to it.
        daemon.install_cni_script("other", "#!/bin/sh\n")?;
        configure(daemon, "odd")?;
        let pod = within(SOON, "pods are made again", || Ok(daemon.pod("first").ok()))?;
        pod.remove()?;
        nothing_is_left(daemon)
    })
}

/// How many plugins that were killed may be unable to end.
const MOST_PLUGINS: usize = 8;

/// How long plugins may take, and who asked waits for them.
const OPERATION: Duration = Duration::from_secs(60);

/// The processes that make something in `held`, which wait in the kernel.
fn makers(held: &Path) -> Result<usize> {
    let mut found = 0;
    for process in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let is_maker = words.starts_with(b"mkdir")
            && words.windows(held.as_os_str().len()).any(|part| part == held.as_os_str().as_encoded_bytes());
        found += usize::from(is_maker && waits_in(pid, MKDIR));
    }
    Ok(found)
}

#[test]
fn plugins_that_cannot_end_are_no_more_than_some() -> Result<()> {
    rootful_with(ONLY_CNI, |daemon| {
        network(daemon)?;
        let held = daemon.cni().join("held");
        fs::create_dir(&held)?;
        let Some(holder) = Holder::start(daemon, agent(daemon, "hostile"), &held)? else { return Ok(()) };
        // As plugins have others hand out addresses.
        let plugin =
            format!("#!/bin/sh\n[ $CNI_COMMAND != ADD ] || mkdir {}/$CNI_CONTAINERID\n", held.display());
        daemon.install_cni_script("slow", &plugin)?;
        configure(daemon, "slow")?;
        let calls: Vec<_> = (0..MOST_PLUGINS).map(|number| run(daemon, &format!("pod-{number}"))).collect();
        within(SOON, "all wait", || Ok((makers(&held)? == MOST_PLUGINS).then_some(())))?;
        serves(daemon, "meanwhile")?;
        for call in calls {
            let refused = call.answer_within(OPERATION + GIVEN_UP)?.err().context("it is refused")?;
            ensure!(refused.message().contains("did not finish within"), "{refused:?}");
        }
        let refused = run(daemon, "one-more").refused()?;
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        ensure!(refused.message().contains("8 were killed and cannot end"), "{refused:?}");
        ensure!(refused.message().contains(&*daemon.cni().join("bin/slow").to_string_lossy()), "{refused:?}");
        assert_eq!(makers(&held)?, MOST_PLUGINS);
        ensure!(holder.holds(), "all the time");

        holder.remove()?;
        within(SOON, "they end", || Ok((makers(&held)? == 0).then_some(())))?;
        configure(daemon, "odd")?;
        let pod = within(SOON, "pods are made again", || Ok(daemon.pod("one-more").ok()))?;
        pod.remove()?;
        nothing_is_left(daemon)
    })
}

#[test]
fn pods_on_the_bridge_need_none_of_them() -> Result<()> {
    rootful(|daemon| {
        let before = daemon.pod("before")?;
        let results = daemon.cni().join("cache/results");
        fs::create_dir_all(&results)?;
        let Some(holder) = Holder::start(daemon, agent(daemon, "hostile"), &results)? else { return Ok(()) };
        let queued = Queued::start(&results)?;
        serves(daemon, "meanwhile")?;
        before.remove()?;
        let pod = daemon.pod("pod")?;
        daemon.crash()?;
        serves(daemon, "of-the-next")?;
        pod.remove()?;
        bridged(&daemon.pod("last")?)?;
        ensure!(holder.holds(), "all the time");
        holder.remove()?;
        drop(queued);
        Ok(())
    })
}

fn bridged(pod: &Pod) -> Result<()> {
    ensure!(pod.ip()?.starts_with("10.88."), "{}", pod.ip()?);
    Ok(())
}

/// Also of pods that could not be made, a while later.
fn nothing_is_left(daemon: &Daemon) -> Result<()> {
    within(SOON, "nothing is left", || {
        let pinned = fs::read_dir(daemon.state().join("netns")).map_or(0, Iterator::count);
        Ok((pinned == 0 && daemon.cni_attachments()?.is_empty()).then_some(()))
    })
}
