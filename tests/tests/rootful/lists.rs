//! Lists, their filters, and the runtime's description of itself.

use anyhow::{Context as _, Result};
use berth_cri::v1;
use berth_tests::cgroup::Driver;
use berth_tests::daemon::rootful;
use berth_tests::pod::{idle, shell};
use tonic::Code;

fn labels(pairs: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn filters_of_containers_are_combined() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        let (web, db) = (daemon.pod("web")?, daemon.pod("db")?);
        let mut config = idle("running");
        config.labels = labels(&[("app", "web"), ("tier", "front")]);
        let running = web.start(config)?;
        let mut config = shell("ended", "true");
        config.labels = labels(&[("app", "web")]);
        let ended = web.start(config)?;
        ended.ended()?;
        let created = db.create(idle("created"))?;
        let none = v1::ContainerFilter::default;
        let state = |state: v1::ContainerState| Some(v1::ContainerStateValue { state: state.into() });
        let cases = [
            (none(), vec![&running, &ended, &created]),
            (v1::ContainerFilter { id: running.id.clone(), ..none() }, vec![&running]),
            (v1::ContainerFilter { id: running.id[..13].to_owned(), ..none() }, vec![&running]),
            (v1::ContainerFilter { id: "0".repeat(64), ..none() }, vec![]),
            (
                v1::ContainerFilter { state: state(v1::ContainerState::ContainerRunning), ..none() },
                vec![&running],
            ),
            (
                v1::ContainerFilter { state: state(v1::ContainerState::ContainerCreated), ..none() },
                vec![&created],
            ),
            (v1::ContainerFilter { pod_sandbox_id: web.id.clone(), ..none() }, vec![&running, &ended]),
            (
                v1::ContainerFilter { label_selector: labels(&[("app", "web")]), ..none() },
                vec![&running, &ended],
            ),
            (
                v1::ContainerFilter {
                    label_selector: labels(&[("app", "web"), ("tier", "front")]),
                    ..none()
                },
                vec![&running],
            ),
            (v1::ContainerFilter { label_selector: labels(&[("app", "")]), ..none() }, vec![]),
            (v1::ContainerFilter { id: running.id.clone(), pod_sandbox_id: db.id.clone(), ..none() }, vec![]),
        ];
        for (filter, expected) in cases {
            let mut found: Vec<String> =
                client.containers(filter.clone())?.into_iter().map(|container| container.id).collect();
            let mut expected: Vec<String> =
                expected.into_iter().map(|container| container.id.clone()).collect();
            found.sort();
            expected.sort();
            assert_eq!(found, expected, "{filter:?}");
        }
        let listed = client.containers(v1::ContainerFilter { id: running.id.clone(), ..none() })?;
        let listed = listed.first().context("listed")?;
        let status = running.status()?;
        assert_eq!(listed.pod_sandbox_id, web.id);
        assert_eq!(
            (&listed.labels, listed.created_at, listed.state),
            (&status.labels, status.created_at, status.state)
        );
        assert_eq!(listed.image_id, status.image_id);
        Ok(())
    })
}

#[test]
fn filters_of_pods_are_combined() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        let mut config = daemon.pod_config("web");
        config.labels = labels(&[("app", "web")]);
        let web = daemon.pod_of(config)?;
        let gone = daemon.pod("gone")?;
        gone.stop()?;
        let none = v1::PodSandboxFilter::default;
        let state = |state: v1::PodSandboxState| Some(v1::PodSandboxStateValue { state: state.into() });
        let cases = [
            (none(), vec![&web.id, &gone.id]),
            (v1::PodSandboxFilter { id: web.id[..10].to_owned(), ..none() }, vec![&web.id]),
            (
                v1::PodSandboxFilter { state: state(v1::PodSandboxState::SandboxReady), ..none() },
                vec![&web.id],
            ),
            (
                v1::PodSandboxFilter { state: state(v1::PodSandboxState::SandboxNotready), ..none() },
                vec![&gone.id],
            ),
            (v1::PodSandboxFilter { label_selector: labels(&[("app", "web")]), ..none() }, vec![&web.id]),
            (v1::PodSandboxFilter { label_selector: labels(&[("app", "db")]), ..none() }, vec![]),
        ];
        for (filter, mut expected) in cases {
            let found = client.sandboxes(filter.clone())?;
            let mut found: Vec<&String> = found.iter().map(|sandbox| &sandbox.id).collect();
            found.sort();
            expected.sort();
            assert_eq!(found, expected, "{filter:?}");
        }
        Ok(())
    })
}

#[test]
fn the_beginning_of_an_id_will_do_when_it_is_one_only() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let main = pod.idle("main")?;
        assert_eq!(daemon.client().container(&main.id[..12])?.id, main.id);
        assert_eq!(daemon.client().sandbox(&pod.id[..12])?.id, pod.id);
        for number in 0..17 {
            // Seventeen ids cannot all begin differently.
            daemon.pod(&format!("pod-{number}"))?;
        }
        let all = daemon.client().sandboxes(v1::PodSandboxFilter::default())?;
        let begins = |digit: &str| all.iter().filter(|sandbox| sandbox.id.starts_with(digit)).count();
        let digits = "0123456789abcdef";
        let twice = digits
            .split("")
            .find(|digit| !digit.is_empty() && begins(digit) > 1)
            .context("two of one digit")?;
        let refused = daemon.client().sandbox(twice).err().context("two are meant")?;
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        Ok(())
    })
}

#[test]
fn the_runtime_says_what_it_is_and_that_it_is_well() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        let version = client.version(v1::VersionRequest::default())?;
        assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("berth", "v1"));
        assert!(!version.version.is_empty() && !version.runtime_version.is_empty());
        let status = client.status(v1::StatusRequest { verbose: true })?;
        let conditions = status.status.context("a status")?.conditions;
        for kind in ["RuntimeReady", "NetworkReady"] {
            let condition =
                conditions.iter().find(|condition| condition.r#type == kind).context("a condition")?;
            assert!(condition.status, "{condition:?}");
        }
        assert!(status.info.contains_key("config"), "{:?}", status.info);
        assert!(status.runtime_handlers.iter().any(|handler| handler.name.is_empty()), "the default one");
        let driver = client.runtime_config(v1::RuntimeConfigRequest::default())?.linux.context("a driver")?;
        let expected = match daemon.cgroup().driver() {
            Driver::Cgroupfs => v1::CgroupDriver::Cgroupfs,
            Driver::Systemd => v1::CgroupDriver::Systemd,
        };
        assert_eq!(driver.cgroup_driver(), expected);
        let disk = client.image_fs_info(v1::ImageFsInfoRequest::default())?;
        let images = disk.image_filesystems.first().context("a filesystem")?;
        let place = &images.fs_id.as_ref().context("its place")?.mountpoint;
        assert!(std::path::Path::new(place).is_dir(), "{place}");
        assert!(images.used_bytes.is_some_and(|used| used.value > 0), "{images:?}");
        Ok(())
    })
}

#[test]
fn calls_that_are_not_offered_say_so() -> Result<()> {
    rootful(|daemon| {
        let main = daemon.pod("web")?.idle("main")?;
        let request = v1::CheckpointContainerRequest { container_id: main.id, ..Default::default() };
        let refused = daemon.client().checkpoint_container(request).err().context("not offered")?;
        assert_eq!(refused.code(), Code::Unimplemented);
        assert!(refused.message().contains("checkpoint and restore are not offered"), "{refused}");
        Ok(())
    })
}
