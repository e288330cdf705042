//! GetContainerEvents: every change once, in order, with the state of its pod; and clients that
//! read slowly, go away, or see the daemon end.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_cri::v1::ContainerEventType as Kind;
use berth_cri::v1::ContainerState::{ContainerCreated, ContainerExited, ContainerRunning};
use berth_cri::v1::PodSandboxState::{SandboxNotready, SandboxReady};
use berth_tests::census::{Census, status_field};
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::events::{Brief, Events, brief};
use berth_tests::pod::{Container, idle, sharing_pod, shell};
use nix::sys::signal::{SIGKILL, kill};
use nix::unistd::Pid;
use tonic::Code;

const CREATED: Kind = Kind::ContainerCreatedEvent;
const STARTED: Kind = Kind::ContainerStartedEvent;
const STOPPED: Kind = Kind::ContainerStoppedEvent;
const DELETED: Kind = Kind::ContainerDeletedEvent;

/// More events than a subscriber may be behind, and than fit into its window.
const TOO_MANY: usize = 1500;

fn is(id: &str, kind: Kind) -> impl Fn(&v1::ContainerEventResponse) -> bool {
    move |event| event.container_id == id && event.container_event_type() == kind
}

/// A pod on the host's network: quick, since it has nothing to set up.
fn host_pod(daemon: &Daemon, name: &str) -> v1::PodSandboxConfig {
    let mut config = daemon.pod_config(name);
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    if let Some(options) = security.and_then(|security| security.namespace_options.as_mut()) {
        options.network = v1::NamespaceMode::Node.into();
        options.ipc = v1::NamespaceMode::Node.into();
    }
    config.hostname.clear();
    config
}

fn runs_until_told(name: &str) -> v1::ContainerConfig {
    shell(name, "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")
}

/// The states of a pod and its containers in an event.
fn states(
    event: &v1::ContainerEventResponse,
) -> (Option<v1::PodSandboxState>, Vec<(&str, v1::ContainerState)>) {
    let containers = event.containers_statuses.iter().map(|status| (status.id.as_str(), status.state()));
    (event.pod_sandbox_status.as_ref().map(v1::PodSandboxStatus::state), containers.collect())
}

#[test]
fn every_change_is_an_event_once_and_in_order_with_the_state_of_its_pod() -> Result<()> {
    rootful(|daemon| {
        let mut clients = [Events::subscribe(daemon)?, Events::subscribe(daemon)?];
        let pod = daemon.pod("web")?;
        let main = pod.create(runs_until_told("main"))?;
        main.start()?;
        main.says("ready")?;
        main.stop(30)?;
        let other = pod.create(idle("other"))?;
        main.remove()?;
        // Never started, and removed with the pod.
        pod.stop()?;
        pod.remove()?;
        let (pod_id, main_id, other_id) = (pod.id.as_str(), main.id.as_str(), other.id.as_str());
        let expected = [
            (pod_id, CREATED, SandboxReady, vec![]),
            (pod_id, STARTED, SandboxReady, vec![]),
            (main_id, CREATED, SandboxReady, vec![(main_id, ContainerCreated)]),
            (main_id, STARTED, SandboxReady, vec![(main_id, ContainerRunning)]),
            (main_id, STOPPED, SandboxReady, vec![(main_id, ContainerExited)]),
            (other_id, CREATED, SandboxReady, vec![(other_id, ContainerCreated), (main_id, ContainerExited)]),
            (main_id, DELETED, SandboxReady, vec![(other_id, ContainerCreated)]),
            (other_id, STOPPED, SandboxNotready, vec![(other_id, ContainerExited)]),
            (pod_id, STOPPED, SandboxNotready, vec![(other_id, ContainerExited)]),
            (other_id, DELETED, SandboxNotready, vec![]),
            (pod_id, DELETED, SandboxNotready, vec![]),
        ];
        for events in &mut clients {
            let all = events.until(is(pod_id, DELETED))?;
            let found: Vec<_> = all
                .iter()
                .map(|event| {
                    let (pod, containers) = states(event);
                    (event.container_id.as_str(), event.container_event_type(), pod, containers)
                })
                .collect();
            let expected: Vec<_> = expected
                .iter()
                .map(|(id, kind, pod, containers)| (*id, *kind, Some(*pod), containers.clone()))
                .collect();
            assert_eq!(found, expected);
            let mut before = 0;
            for event in &all {
                let pod = event.pod_sandbox_status.as_ref().context("a pod")?;
                let metadata = pod.metadata.as_ref().context("metadata")?;
                assert_eq!((pod.id.as_str(), metadata.uid.as_str()), (pod_id, "uid-of-web"));
                ensure!(pod.network.as_ref().is_some_and(|network| !network.ip.is_empty()), "{pod:?}");
                ensure!(event.created_at >= before.max(pod.created_at), "{event:?}");
                for status in &event.containers_statuses {
                    ensure!(event.created_at >= status.finished_at.max(status.started_at), "{event:?}");
                    ensure!(status.state() != ContainerExited || status.finished_at > 0, "{status:?}");
                    ensure!(status.image.is_some() && !status.log_path.is_empty(), "{status:?}");
                }
                before = event.created_at;
            }
            let stopped = all.iter().find(|event| is(main_id, STOPPED)(event)).context("its end")?;
            let status = stopped.containers_statuses.first().context("its status")?;
            assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"), "{status:?}");
        }
        Ok(())
    })
}

#[test]
fn a_pod_that_is_stopped_reports_the_ends_of_its_containers_first() -> Result<()> {
    rootful(|daemon| {
        let mut events = Events::subscribe(daemon)?;
        let own = daemon.pod("own")?;
        let shared = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        for pod in [&own, &shared] {
            let mut expected = BTreeSet::new();
            for name in ["one", "two", "three"] {
                expected.insert(pod.start(shell(name, "exec sleep 1000"))?.id);
            }
            // Each stop looks for containers to end; one of them reports.
            std::thread::scope(|scope| -> Result<()> {
                let stops = [(); 3].map(|()| scope.spawn(|| pod.stop()));
                for stop in stops {
                    stop.join().map_err(|_| anyhow!("the thread panicked"))??;
                }
                Ok(())
            })?;
            pod.remove()?;
            let all = events.until(is(&pod.id, DELETED))?;
            let stopped = all.iter().filter(|event| event.container_event_type() == STOPPED);
            let mut stopped: Vec<String> = stopped.map(|event| event.container_id.clone()).collect();
            assert_eq!(stopped.pop().as_ref(), Some(&pod.id), "the pod is the last to stop: {stopped:?}");
            assert_eq!(stopped.into_iter().collect::<BTreeSet<_>>(), expected);
        }
        Ok(())
    })
}

#[test]
fn what_an_event_says_is_in_the_lists_when_it_comes() -> Result<()> {
    rootful(|daemon| {
        let mut events = Events::subscribe(daemon)?;
        let client = daemon.client();
        std::thread::scope(|scope| -> Result<()> {
            let acting = scope.spawn(|| -> Result<Container> {
                let pod = daemon.pod("web")?;
                let main = pod.start(shell("main", "exit 3"))?;
                main.ended()?;
                main.remove()?;
                pod.remove()?;
                Ok(main)
            });
            let mut seen = 0;
            loop {
                let event = events.receive()?;
                let id = &event.container_id;
                let is_pod = event.pod_sandbox_status.as_ref().is_some_and(|pod| pod.id == *id);
                if is_pod {
                    match (event.container_event_type(), client.sandbox(id)) {
                        (DELETED, found) => {
                            assert_eq!(found.err().map(|status| status.code()), Some(Code::NotFound));
                            break;
                        }
                        (STOPPED, Ok(found)) => assert_eq!(found.state(), SandboxNotready),
                        (STOPPED, Err(_)) => {}
                        (_, found) => drop(found?),
                    }
                } else {
                    match (event.container_event_type(), client.container(id)) {
                        (DELETED, found) => {
                            assert_eq!(found.err().map(|status| status.code()), Some(Code::NotFound));
                        }
                        (_, Err(status)) => ensure!(status.code() == Code::NotFound, "{status}"),
                        (CREATED, Ok(_)) => {}
                        (STARTED, Ok(found)) => ensure!(found.state() != ContainerCreated, "{found:?}"),
                        (STOPPED, Ok(found)) => assert_eq!(found.exit_code, 3, "{found:?}"),
                    }
                }
                seen += 1;
            }
            assert_eq!(seen, 7);
            acting.join().map_err(|_| anyhow!("the thread panicked"))??;
            Ok(())
        })
    })
}

#[test]
fn containers_that_end_at_once_have_all_their_events() -> Result<()> {
    rootful(|daemon| {
        let mut events = Events::subscribe(daemon)?;
        let ids = std::thread::scope(|scope| -> Result<Vec<String>> {
            let workers: Vec<_> = (0..4)
                .map(|worker| {
                    scope.spawn(move || -> Result<Vec<String>> {
                        let pod = daemon.pod(&format!("pod-{worker}"))?;
                        let run = |number: usize| {
                            let main = pod.start(shell(&format!("main-{number}"), "true"))?;
                            main.remove()?;
                            Ok(main.id)
                        };
                        (0..25).map(run).collect()
                    })
                })
                .collect();
            let mut ids = Vec::new();
            for worker in workers {
                ids.extend(worker.join().map_err(|_| anyhow!("the thread panicked"))??);
            }
            Ok(ids)
        })?;
        let last = daemon.pod_of(host_pod(daemon, "last"))?;
        let mut of_each: BTreeMap<String, Vec<Kind>> = BTreeMap::new();
        let mut before = 0;
        for event in events.until(is(&last.id, CREATED))? {
            ensure!(event.created_at >= before, "times do not fall: {event:?}");
            before = event.created_at;
            of_each.entry(event.container_id.clone()).or_default().push(event.container_event_type());
        }
        assert_eq!(ids.len(), 100);
        for id in &ids {
            assert_eq!(of_each.get(id).context("no event")?, &[CREATED, STARTED, STOPPED, DELETED], "{id}");
        }
        Ok(())
    })
}

#[test]
fn a_client_that_does_not_read_misses_events_and_gets_an_error() -> Result<()> {
    rootful(|daemon| {
        let (mut waits, mut reads) = (Events::subscribe_and_wait(daemon)?, Events::subscribe(daemon)?);
        std::thread::scope(|scope| -> Result<()> {
            // Four events for each pod.
            let workers: Vec<_> = (0..4)
                .map(|worker| {
                    scope.spawn(move || -> Result<()> {
                        for number in 0..TOO_MANY / 16 {
                            let pod = daemon.pod_of(host_pod(daemon, &format!("pod-{worker}-{number}")))?;
                            pod.stop()?;
                            pod.remove()?;
                        }
                        Ok(())
                    })
                })
                .collect();
            let mut removed = 0;
            while removed < TOO_MANY / 16 * 4 {
                removed += usize::from(reads.receive()?.container_event_type() == DELETED);
            }
            for worker in workers {
                worker.join().map_err(|_| anyhow!("the thread panicked"))??;
            }
            Ok(())
        })?;
        let (read, status) = waits.end()?;
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        ensure!(status.message().contains("missed"), "{status:?}");
        ensure!(read < TOO_MANY, "{read} events were kept for it");
        // It may come back.
        let mut again = Events::subscribe(daemon)?;
        let pod = daemon.pod_of(host_pod(daemon, "again"))?;
        assert_eq!(brief(&again.receive()?), (pod.id.clone(), CREATED));
        Ok(())
    })
}

#[test]
fn clients_that_go_away_leave_nothing_behind() -> Result<()> {
    rootful(|daemon| {
        daemon.pod("first")?.remove()?;
        let census = Census::take(daemon)?;
        let clients = (0..50).map(|_| Events::subscribe(daemon)).collect::<Result<Vec<_>>>()?;
        daemon.pod("web")?.remove()?;
        drop(clients);
        daemon.pod("web")?.remove()?;
        census.stays(daemon)
    })
}

#[test]
fn a_daemon_that_stops_ends_the_streams_and_the_next_one_does_not_repeat_events() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.start(runs_until_told("main"))?;
        let mut clients = (0..3).map(|_| Events::subscribe(daemon)).collect::<Result<Vec<_>>>()?;
        daemon.stop()?;
        for events in &mut clients {
            let (read, status) = events.end()?;
            assert_eq!((read, status.code()), (0, Code::Unavailable), "{status:?}");
            ensure!(status.message().contains("stopping"), "{status:?}");
        }
        daemon.start_again()?;
        let mut events = Events::subscribe(daemon)?;
        main.stop(30)?;
        assert_eq!(brief(&events.receive()?), (main.id.clone(), STOPPED));
        pod.remove()?;
        let rest: Vec<Brief> = events.until(is(&pod.id, DELETED))?.iter().map(brief).collect();
        let of = |id: &str, kind| (id.to_owned(), kind);
        assert_eq!(rest, [of(&pod.id, STOPPED), of(&main.id, DELETED), of(&pod.id, DELETED)]);
        Ok(())
    })
}

/// How often the log says this of an object.
fn logged(daemon: &Daemon, id: &str, what: &str) -> Result<usize> {
    Ok(daemon.log()?.lines().filter(|line| line.contains(what) && line.contains(id)).count())
}

#[test]
fn an_end_that_no_daemon_saw_is_reported_once_by_the_next_one() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("web")))?;
        let (own, lost) = (daemon.pod("own")?, daemon.pod("lost")?);
        let seen = own.start(runs_until_told("seen"))?;
        let unseen = own.start(runs_until_told("unseen"))?;
        let killed = lost.start(runs_until_told("killed"))?;
        seen.stop(30)?;
        let (first, main, shim) = (pod.first_process()?, unseen.pid()?, killed.shim_pid()?);
        daemon.kill()?;
        for pid in [first, main, shim] {
            kill(Pid::from_raw(pid), SIGKILL)?;
        }
        within(SOON, "they have ended", || {
            Ok((![first, main, shim].into_iter().any(is_alive)).then_some(()))
        })?;
        let ends = || -> Result<[usize; 4]> {
            Ok([
                logged(daemon, &pod.id, "sandbox not ready")?,
                logged(daemon, &seen.id, "container ended")?,
                logged(daemon, &unseen.id, "container ended")?,
                logged(daemon, &killed.id, "container ended")?,
            ])
        };
        assert_eq!(ends()?, [0, 1, 0, 0]);
        for _ in 0..3 {
            daemon.start_again()?;
            for ended in [&seen, &unseen, &killed] {
                ended.ended()?;
            }
            assert_eq!(pod.status()?.state(), SandboxNotready);
            within(SOON, "all ends are reported", || Ok((ends()? == [1; 4]).then_some(())))?;
            daemon.kill()?;
        }
        daemon.start_again()?;
        assert_eq!(ends()?, [1; 4]);
        for container in [&seen, &unseen, &killed] {
            assert_eq!(logged(daemon, &container.id, "container started")?, 1);
        }
        Ok(())
    })
}

fn is_alive(pid: i32) -> bool {
    status_field(pid, "State").is_some_and(|state| !state.starts_with('Z'))
}
