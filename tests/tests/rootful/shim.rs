//! The shim: what one costs, and what it holds.

use std::fs;

use anyhow::{Context as _, Result};
use berth_tests::census::status_field;
use berth_tests::daemon::rootful;

/// The most own memory that a shim may have, in KiB: the budget of a pod of one container, of which the program takes a part.
const MOST_PSS_KIB: u64 = 512;

#[test]
fn a_shim_is_one_small_thread() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let shims =
            (0..5).map(|number| pod.idle(&format!("c{number}"))?.shim_pid()).collect::<Result<Vec<i32>>>()?;
        for shim in shims {
            assert_eq!(status_field(shim, "Threads").as_deref(), Some("1"));
            let rollup = fs::read_to_string(format!("/proc/{shim}/smaps_rollup")).context("its memory")?;
            let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("Pss")?;
            let pss: u64 = pss.trim().trim_end_matches(" kB").parse()?;
            assert!(pss <= MOST_PSS_KIB, "{pss} KiB");
            let name = status_field(shim, "Name").context("its name")?;
            assert!(name.contains("berth-shim"), "{name}");
            let environment = fs::read(format!("/proc/{shim}/environ"))?;
            assert!(environment.is_empty(), "nothing of the daemon's environment");
        }
        Ok(())
    })
}

#[test]
fn a_shim_holds_its_own_container_only_and_ends_with_it() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let (main, other) = (pod.idle("main")?, pod.idle("other")?);
        let shim = main.shim_pid()?;
        let held: Vec<String> = fs::read_dir(format!("/proc/{shim}/fd"))?
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .map(|target| target.to_string_lossy().into_owned())
            .collect();
        assert!(!held.iter().any(|target| target.contains(&other.id)), "{held:?}");
        assert!(!held.iter().any(|target| target.ends_with("other.log")), "{held:?}");
        main.stop(0)?;
        berth_tests::deadline::within(berth_tests::daemon::SOON, "the shim ends", || {
            Ok((!std::path::Path::new(&format!("/proc/{shim}")).exists()).then_some(()))
        })?;
        let left = daemon.state().join("containers").join(&main.id).join("shim.sock");
        main.remove()?;
        assert!(!left.exists(), "no socket is left");
        Ok(())
    })
}
