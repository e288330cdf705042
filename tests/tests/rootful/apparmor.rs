//! AppArmor: the runtime's own profile, one that the node has loaded, and one that it has not.
//!
//! On a kernel without AppArmor there is nothing to hold, and each test counts itself as skipped.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use berth_cri::v1;
use berth_cri::v1::security_profile::ProfileType;
use berth_tests::daemon::{Daemon, rootful};
use berth_tests::pod::{idle, security, sharing, sharing_pod, words};
use berth_tests::program::output;
use berth_tests::skip::skip;

/// What a process is confined by (`apparmor(7)`).
const READ: &str = "cat /proc/self/attr/current";

fn with_apparmor(name: &str, test: impl FnOnce(&Daemon) -> Result<()>) -> Result<()> {
    if fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|enabled| enabled.starts_with(b"Y")) {
        return rootful(test);
    }
    skip(&format!("apparmor::{name}"), "this kernel has no AppArmor");
    Ok(())
}

fn profile(kind: ProfileType, name: &str) -> Option<v1::SecurityProfile> {
    Some(v1::SecurityProfile { profile_type: kind.into(), localhost_ref: name.to_owned() })
}

#[test]
fn the_default_profile_is_applied_in_exec_too_and_left_off_only_when_asked() -> Result<()> {
    with_apparmor("the_default_profile_is_applied_in_exec_too_and_left_off_only_when_asked", |daemon| {
        let pod = daemon.pod("apparmor")?;
        let main = pod.idle("main")?;
        assert_eq!(main.sh(READ)?, "berth-default (enforce)\n");
        assert_eq!(pod.script(READ, |_| {})?, "berth-default (enforce)\n");
        // A process that is born among others, too.
        let sharing_pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        let shared = sharing_pod.start(sharing(idle("shared")))?;
        assert_eq!(shared.sh(READ)?, "berth-default (enforce)\n");
        let main = fs::read_to_string(format!("/proc/{}/attr/current", shared.pid()?))?;
        assert_eq!(main, "berth-default (enforce)\n");
        let asked = pod.script(READ, |config| {
            security(config).apparmor = profile(ProfileType::RuntimeDefault, "");
        })?;
        assert_eq!(asked, "berth-default (enforce)\n");
        // Only the profile is between this capability and a mount.
        let mount = "mount -t tmpfs none /tmp 2>&1 && echo mounted || echo refused";
        let with_mount = |config: &mut v1::ContainerConfig| {
            security(config).capabilities.get_or_insert_default().add_capabilities = words(&["SYS_ADMIN"]);
        };
        let refused = pod.script(mount, with_mount)?;
        assert!(refused.contains("ermission denied") && refused.ends_with("refused\n"), "{refused}");
        let free = |config: &mut v1::ContainerConfig| {
            with_mount(config);
            security(config).apparmor = profile(ProfileType::Unconfined, "");
        };
        assert_eq!(pod.script(mount, free)?, "mounted\n");
        assert_eq!(pod.script(READ, free)?, "unconfined\n");
        Ok(())
    })
}

#[test]
fn a_profile_that_the_node_has_loaded_is_applied() -> Result<()> {
    with_apparmor("a_profile_that_the_node_has_loaded_is_applied", |daemon| {
        let folder = daemon.folder("profiles")?;
        let name = format!("berth-test-{}", std::process::id());
        let file = folder.join(&name);
        fs::write(
            &file,
            format!(
                "profile {name} flags=(attach_disconnected, mediate_deleted) {{\n  file,\n  capability,\n  network,\n  \
                 signal,\n  ptrace,\n  deny /www/** r,\n}}\n"
            ),
        )?;
        let parser =
            |option: &str| output(Command::new("apparmor_parser").arg(option).arg("--skip-cache").arg(&file));
        parser("--replace")?;
        let read =
            format!("{READ}; cat /www/index.html 2>&1; cat /etc/passwd >/dev/null && echo other files");
        let script = |apparmor: Option<v1::SecurityProfile>, old: String| -> Result<String> {
            daemon.pod(&format!("pod-{}", old.len()))?.script(&read, |config| {
                security(config).apparmor = apparmor;
                #[expect(deprecated, reason = "kubelets before 1.30 have no other")]
                security(config).apparmor_profile.clone_from(&old);
            })
        };
        let seen = (
            script(profile(ProfileType::Localhost, &name), String::new()),
            script(None, format!("localhost/{name}")),
        );
        parser("--remove")?;
        for seen in [seen.0?, seen.1?] {
            assert!(seen.starts_with(&format!("{name} (enforce)\n")), "{seen}");
            assert!(seen.contains("Permission denied") && seen.ends_with("other files\n"), "{seen}");
        }
        Ok(())
    })
}

#[test]
fn a_profile_that_is_not_loaded_is_refused_by_name() -> Result<()> {
    with_apparmor("a_profile_that_is_not_loaded_is_refused_by_name", |daemon| {
        let pod = daemon.pod("apparmor")?;
        for name in ["no-such-profile", "berth", "berth-default-not", "//&unconfined", "a profile"] {
            let mut config = idle("main");
            security(&mut config).apparmor = profile(ProfileType::Localhost, name);
            let refused = pod.create(config).err().with_context(|| format!("{name:?} is refused"))?;
            assert!(refused.message().contains("apparmor") && refused.message().contains(name), "{refused}");
        }
        // Nothing is in the way of the right one.
        assert_eq!(pod.idle("main")?.sh(READ)?, "berth-default (enforce)\n");
        Ok(())
    })
}
