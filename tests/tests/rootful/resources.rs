//! Limits: in the cgroup's files, and in force.

use anyhow::{Context as _, Result};
use berth_cri::v1;
use berth_tests::cgroup::CpuLimit;
use berth_tests::daemon::{SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::pod::{idle, limit, shell};
use tonic::Code;

const MIB: i64 = 1 << 20;

#[test]
fn limits_of_the_request_are_in_the_cgroup() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("limits")?;
        let mut config = idle("main");
        limit(
            &mut config,
            v1::LinuxContainerResources {
                cpu_quota: 20_000,
                cpu_period: 100_000,
                cpu_shares: 512,
                memory_limit_in_bytes: 64 * MIB,
                ..Default::default()
            },
        );
        let main = pod.start(config)?;
        let cgroup = daemon.cgroup();
        assert_eq!(cgroup.memory_limit_bytes(&main.id)?, 64 << 20);
        assert_eq!(cgroup.cpu_limit(&main.id)?, CpuLimit { quota_us: 20_000, period_us: 100_000 });
        let (file, value) = if cgroup.is_unified() { ("cpu.weight", "59") } else { ("cpu.shares", "512") };
        assert_eq!(cgroup.read("cpu", &main.id, file)?.trim(), value);
        let reported =
            main.status()?.resources.and_then(|resources| resources.linux).context("the limits")?;
        assert_eq!((reported.memory_limit_in_bytes, reported.cpu_quota), (64 * MIB, 20_000));
        // Exec is in there too: nothing runs outside the limits.
        assert_eq!(main.sh("cat /proc/self/cgroup")?, main.sh("cat /proc/1/cgroup")?);
        Ok(())
    })
}

#[test]
fn limits_can_be_changed_while_it_runs_and_stay_changed() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("limits")?;
        let mut config = idle("main");
        limit(
            &mut config,
            v1::LinuxContainerResources {
                memory_limit_in_bytes: 64 * MIB,
                cpu_shares: 100,
                ..Default::default()
            },
        );
        let main = pod.start(config)?;
        daemon.client().update_container_resources(v1::UpdateContainerResourcesRequest {
            container_id: main.id.clone(),
            linux: Some(v1::LinuxContainerResources {
                memory_limit_in_bytes: 96 * MIB,
                cpu_quota: 50_000,
                cpu_period: 100_000,
                ..Default::default()
            }),
            ..Default::default()
        })?;
        let look = || -> Result<()> {
            assert_eq!(daemon.cgroup().memory_limit_bytes(&main.id)?, 96 << 20);
            assert_eq!(
                daemon.cgroup().cpu_limit(&main.id)?,
                CpuLimit { quota_us: 50_000, period_us: 100_000 }
            );
            let reported =
                main.status()?.resources.and_then(|resources| resources.linux).context("limits")?;
            assert_eq!(
                (reported.memory_limit_in_bytes, reported.cpu_quota, reported.cpu_shares),
                (96 * MIB, 50_000, 100)
            );
            Ok(())
        };
        look()?;
        daemon.crash()?;
        look()?;
        main.stop(0)?;
        let refused = daemon.client().update_container_resources(v1::UpdateContainerResourcesRequest {
            container_id: main.id.clone(),
            linux: Some(v1::LinuxContainerResources::default()),
            ..Default::default()
        });
        assert_eq!(refused.err().map(|status| status.code()), Some(Code::FailedPrecondition));
        Ok(())
    })
}

#[test]
fn a_container_that_takes_too_much_memory_is_killed_and_the_reason_told() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("oom")?;
        let mut config = shell("main", "exec tail /dev/zero");
        limit(
            &mut config,
            v1::LinuxContainerResources { memory_limit_in_bytes: 16 * MIB, ..Default::default() },
        );
        let status = pod.run_container(config)?.status;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
        Ok(())
    })
}

#[test]
fn a_limit_of_processes_is_in_force() -> Result<()> {
    rootful(|daemon| {
        if !daemon.cgroup().is_unified() {
            // CRI has no field for it; `unified` is refused or ignored on v1, so there is nothing
            // to request.
            berth_tests::skip::skip(
                "resources::a_limit_of_processes_is_in_force",
                "CRI names a limit of processes only in `unified`, which is of cgroup v2",
            );
            return Ok(());
        }
        let mut config = shell("main", "for i in 1 2 3 4 5 6 7 8 9; do sleep 5 & done; echo all");
        limit(
            &mut config,
            v1::LinuxContainerResources {
                unified: [("pids.max".to_owned(), "5".to_owned())].into(),
                ..Default::default()
            },
        );
        let ended = daemon.pod("pids")?.run_container(config)?;
        assert!(ended.stderr.contains("fork"), "{ended:?}");
        Ok(())
    })
}

#[test]
fn what_a_container_uses_is_counted() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("stats")?;
        let main =
            pod.start(shell("main", "head -c 2000000 /dev/urandom > /tmp/data; echo done; sleep 1000"))?;
        let created = pod.create(idle("created"))?;
        main.says("done")?;
        let stats = within(SOON, "the use is counted", || {
            let request = v1::ContainerStatsRequest { container_id: main.id.clone() };
            let stats = daemon.client().container_stats(request)?.stats.context("stats")?;
            let cpu =
                stats.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds).map_or(0, |used| used.value);
            let layer =
                stats.writable_layer.as_ref().and_then(|layer| layer.used_bytes).map_or(0, |used| used.value);
            Ok((cpu > 0 && layer >= 2_000_000).then_some(stats))
        })?;
        let attributes = stats.attributes.context("whose they are")?;
        assert_eq!(
            (attributes.id.as_str(), attributes.metadata.unwrap_or_default().name.as_str()),
            (main.id.as_str(), "main")
        );
        let memory = stats.memory.context("memory")?;
        assert!(memory.working_set_bytes.is_some_and(|bytes| bytes.value > 0), "{memory:?}");
        let all = daemon.client().list_container_stats(v1::ListContainerStatsRequest::default())?.stats;
        let mut ids: Vec<String> = all.into_iter().filter_map(|stats| Some(stats.attributes?.id)).collect();
        ids.sort();
        let mut expected = [main.id, created.id];
        expected.sort();
        assert_eq!(ids, expected);
        Ok(())
    })
}
