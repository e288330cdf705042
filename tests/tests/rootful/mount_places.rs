//! Where a request may mount something: not over files of the kernel on which the runtime and the
//! isolation of containers depend, whatever links lead there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Result, ensure};
use berth_tests::daemon::rootful;
use berth_tests::pod::{idle, shell, volume};

#[test]
fn nothing_is_mounted_in_proc_by_its_name_or_through_a_link_of_a_volume() -> Result<()> {
    rootful(|daemon| {
        let given = daemon.directory("given")?;
        fs::write(given.join("file"), "given\n")?;
        let shared = daemon.directory("shared")?;
        for (name, target) in [
            ("proc", "/proc"),
            ("self", "/proc/self"),
            ("climbing", "../../../../proc/1"),
            ("attr", "/proc/self/attr/current"),
            ("cpuinfo", "/proc/cpuinfo"),
            ("sysrq", "/proc/sysrq-trigger"),
            ("dev", "/dev"),
            ("pts", "/dev/pts"),
        ] {
            symlink(target, shared.join(name))?;
        }
        // Another pod that shares the volume may have written these.
        let (directory, file) = (given.clone(), given.join("file"));
        let pod = daemon.pod("places")?;
        let mut number = 0;
        for (source, place) in [
            (&directory, "/proc"),
            (&directory, "/proc/sys"),
            (&directory, "/proc/self"),
            (&file, "/proc/version"),
            (&file, "/proc/sysrq-trigger"),
            (&file, "/proc/1/attr/current"),
            (&directory, "/proc/absent"),
            (&directory, "/volume/proc"),
            (&directory, "/volume/self"),
            (&directory, "/volume/climbing"),
            (&file, "/volume/attr"),
            (&file, "/volume/sysrq"),
            // An allowed place, but only by its own name.
            (&file, "/volume/cpuinfo"),
            (&directory, "/volume/dev"),
            (&directory, "/volume/pts"),
            (&file, "/volume/dev/null"),
            (&directory, "/volume/proc/sys"),
        ] {
            number += 1;
            let mut config = idle(&format!("c{number}"));
            config.tty = number % 2 == 0;
            config.mounts = vec![volume(&shared, "/volume"), volume(source, place)];
            let refused = match pod.create(config) {
                Ok(_) => anyhow::bail!("{} was mounted on {place}", source.display()),
                Err(refused) => refused,
            };
            ensure!(refused.message().contains(place), "{place}: {refused}");
        }
        assert_eq!(fs::read_dir(&given)?.count(), 1, "nothing was made in what was to be mounted");
        Ok(())
    })
}

#[test]
fn a_link_in_a_dev_of_the_host_that_was_asked_for_can_be_mounted_through() -> Result<()> {
    rootful(|daemon| {
        let given = daemon.directory("given")?.join("file");
        fs::write(&given, "given\n")?;
        let name = format!("/dev/berth-test-{}", std::process::id());
        let target = format!("{name}.target");
        fs::write(&target, "the host's\n")?;
        symlink(&target, &name)?;
        let mut config = shell("main", &format!("cat {name} {target}"));
        config.mounts = vec![volume(Path::new("/dev"), "/dev"), volume(&given, &name)];
        let ended = daemon.pod("dev")?.run_container(config);
        let hosts = fs::read_to_string(&target);
        fs::remove_file(&name)?;
        fs::remove_file(&target)?;
        assert_eq!(ended?.stdout, "given\ngiven\n");
        assert_eq!(hosts?, "the host's\n");
        Ok(())
    })
}

#[test]
fn what_tools_replace_in_proc_can_be_replaced() -> Result<()> {
    rootful(|daemon| {
        let given = daemon.directory("given")?;
        fs::write(given.join("file"), "given\n")?;
        let pod = daemon.pod("lxcfs")?;
        let mut config =
            shell("main", "cat /proc/cpuinfo /proc/uptime; ls /proc/1/status /host/proc/1/status");
        config.mounts = vec![
            volume(&given.join("file"), "/proc/cpuinfo"),
            volume(&given.join("file"), "/proc/uptime"),
            // A container that observes the host has its /proc elsewhere, and may mount in there.
            volume(Path::new("/proc"), "/host/proc"),
            volume(&given.join("file"), "/host/proc/version"),
        ];
        let ended = pod.run_container(config)?;
        assert_eq!(
            (ended.stdout.as_str(), ended.status.exit_code),
            ("given\ngiven\n/host/proc/1/status\n/proc/1/status\n", 0),
            "{}",
            ended.stderr
        );
        // The kernel's own filesystem may replace the container's.
        let mut config = shell("proc", "grep -c ' /proc proc ' /proc/mounts; cat /proc/keys | wc -c");
        config.mounts = vec![volume(Path::new("/proc"), "/proc")];
        let ended = pod.run_container(config)?;
        assert_eq!((ended.stdout.as_str(), ended.status.exit_code), ("1\n0\n", 0), "{}", ended.stderr);
        let mut config = idle("part");
        config.mounts = vec![volume(Path::new("/proc/sys"), "/proc")];
        ensure!(pod.create(config).is_err(), "a part of a procfs has nothing where the masks go");
        Ok(())
    })
}
