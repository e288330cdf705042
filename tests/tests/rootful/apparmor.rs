//! AppArmor: the runtime's own profile, one that is loaded on the node, and one that is not.
//!
//! On a kernel without AppArmor there is nothing to test, and each test counts itself as skipped.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use berth_cri::v1;
use berth_cri::v1::security_profile::ProfileType;
use berth_tests::apparmor::{Loaded, PolicyNamespace, is_enforced, profile};
use berth_tests::daemon::{Daemon, Setup, rootful_with};
use berth_tests::pod::{Pod, idle, security, sharing, sharing_pod, words};
use berth_tests::program::output;
use berth_tests::skip::skip;

/// The profile that confines a process (`apparmor(7)`).
const READ: &str = "cat /proc/self/attr/current";

fn with_apparmor(name: &str, test: impl FnOnce(&Daemon) -> Result<()>) -> Result<()> {
    with_apparmor_and(Setup::default(), name, test)
}

fn with_apparmor_and(setup: Setup<'_>, name: &str, test: impl FnOnce(&Daemon) -> Result<()>) -> Result<()> {
    if is_enforced() {
        return rootful_with(setup, test);
    }
    skip(&format!("apparmor::{name}"), "this kernel has no AppArmor");
    Ok(())
}

#[test]
fn the_default_profile_is_applied_in_exec_too_and_left_off_only_when_asked() -> Result<()> {
    with_apparmor("the_default_profile_is_applied_in_exec_too_and_left_off_only_when_asked", |daemon| {
        let pod = daemon.pod("apparmor")?;
        let main = pod.idle("main")?;
        assert_eq!(main.sh(READ)?, "berth-default (enforce)\n");
        assert_eq!(pod.script(READ, |_| {})?, "berth-default (enforce)\n");
        // Also a process that is born among others.
        let sharing_pod = daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?;
        let shared = sharing_pod.start(sharing(idle("shared")))?;
        assert_eq!(shared.sh(READ)?, "berth-default (enforce)\n");
        let main = fs::read_to_string(format!("/proc/{}/attr/current", shared.pid()?))?;
        assert_eq!(main, "berth-default (enforce)\n");
        let asked = pod.script(READ, |config| {
            security(config).apparmor = profile(ProfileType::RuntimeDefault, "");
        })?;
        assert_eq!(asked, "berth-default (enforce)\n");
        // Only the profile stands between this capability and a mount.
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
        let loaded = Loaded::load(
            "files",
            &["file,", "capability,", "network,", "signal,", "ptrace,", "deny /www/** r,"],
        )?;
        let name = &loaded.name;
        let read =
            format!("{READ}; cat /www/index.html 2>&1; cat /etc/passwd >/dev/null && echo other files");
        let script = |apparmor: Option<v1::SecurityProfile>, old: String| -> Result<String> {
            daemon.pod(&format!("pod-{}", old.len()))?.script(&read, |config| {
                security(config).apparmor = apparmor;
                #[expect(deprecated, reason = "kubelets before 1.30 have no other")]
                security(config).apparmor_profile.clone_from(&old);
            })
        };
        let seen = [script(loaded.asked_for(), String::new())?, script(None, format!("localhost/{name}"))?];
        for seen in seen {
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
        // Nothing prevents the right one.
        assert_eq!(pod.idle("main")?.sh(READ)?, "berth-default (enforce)\n");
        Ok(())
    })
}

/// Where others live, a process has its profile before it is born, and works with what that allows.
#[test]
fn a_profile_need_not_allow_what_entering_it_takes() -> Result<()> {
    with_apparmor("a_profile_need_not_allow_what_entering_it_takes", |daemon| {
        let loaded = Loaded::load("narrow", &["file,", "deny /tmp/forbidden x,"])?;
        let pod = daemon.pod_of(sharing_pod(daemon.pod_config("narrow")))?;
        let runtime_default = Some(v1::SecurityProfile::default());
        for (number, (user, no_new_privs, seccomp)) in [
            (0, false, None),
            (0, false, runtime_default.clone()),
            (1000, false, runtime_default.clone()),
            (1000, true, runtime_default),
            (1000, true, None),
        ]
        .into_iter()
        .enumerate()
        {
            let mut config = sharing(idle(&format!("c{number}")));
            let security = security(&mut config);
            security.apparmor = loaded.asked_for();
            security.run_as_user = Some(v1::Int64Value { value: user });
            security.no_new_privs = no_new_privs;
            security.seccomp = seccomp;
            let container = pod.start(config)?;
            let label = format!("{} (enforce)\n", loaded.name);
            ensure!(container.sh(READ)? == label, "{number}: exec");
            let of_main = fs::read_to_string(format!("/proc/{}/attr/current", container.pid()?))?;
            ensure!(of_main == label, "{number}: {of_main}");
            container.sh("printf '#!/bin/sh\\n' >/tmp/forbidden && chmod 755 /tmp/forbidden")?;
            let refused = container.exec(&["/tmp/forbidden"]).err().context("the profile forbids it")?;
            ensure!(refused.message().contains("/tmp/forbidden"), "{refused}");
        }
        Ok(())
    })
}

/// Requests of each kind of pod: with a pid namespace for each container, and for the pod.
fn pods(daemon: &Daemon) -> Result<[(Pod, Request); 2]> {
    let own = daemon.pod("own")?;
    Ok([(own, idle), (daemon.pod_of(sharing_pod(daemon.pod_config("shared")))?, |name| sharing(idle(name)))])
}

type Request = fn(&str) -> v1::ContainerConfig;

/// The daemon sees a kernel without profiles, and cannot run the parser.
#[test]
fn without_the_parser_only_what_is_unconfined_starts() -> Result<()> {
    const NAMESPACE: &str = "berth-test-no-parser";
    const HIDE: &str = "mount --bind /dev/null /usr/sbin/apparmor_parser && exec \"$@\"";
    let test = |daemon: &Daemon| -> Result<()> {
        let names_it = |refused: &tonic::Status| {
            let message = refused.message();
            ensure!(
                message.contains("berth-default")
                    && message.contains("apparmor_parser")
                    && message.contains("on the node"),
                "{refused}"
            );
            Ok(())
        };
        let pod = daemon.pod("own")?;
        names_it(&pod.create(idle("confined")).err().context("it is confined by nothing")?)?;
        let shared = sharing_pod(daemon.pod_config("shared"));
        names_it(&Pod::run(daemon.client(), shared.clone()).err().context("process 1 is not confined")?)?;
        let mut free = idle("free");
        security(&mut free).apparmor = profile(ProfileType::Unconfined, "");
        ensure!(pod.start(free.clone())?.sh(READ)? == "unconfined\n");
        let mut free_pod = sharing_pod(daemon.pod_config("free"));
        let of_pod = free_pod.linux.get_or_insert_default().security_context.get_or_insert_default();
        of_pod.apparmor = profile(ProfileType::Unconfined, "");
        ensure!(daemon.pod_of(free_pod)?.start(sharing(free))?.sh(READ)? == "unconfined\n");

        let mut unhide = Command::new("nsenter");
        unhide.arg("--mount").arg("--target").arg(daemon.pid()?.to_string());
        output(unhide.args(["umount", "/usr/sbin/apparmor_parser"]))?;
        ensure!(pod.start(idle("confined"))?.sh(READ)? == "berth-default (enforce)\n");
        let shared = daemon.pod_of(shared)?.start(sharing(idle("confined")))?;
        ensure!(shared.sh("cat /proc/1/attr/current")? == "berth-default (enforce)\n");
        Ok(())
    };
    let launcher = &[
        "aa-exec",
        "--namespace=berth-test-no-parser",
        "--profile=unconfined",
        "--",
        "unshare",
        "--mount",
        "--propagation=private",
        "sh",
        "-c",
        HIDE,
        "sh",
    ];
    let _namespace = if is_enforced() { Some(PolicyNamespace::create(NAMESPACE)?) } else { None };
    let setup = Setup { launcher, ..Setup::default() };
    with_apparmor_and(setup, "without_the_parser_only_what_is_unconfined_starts", test)
}

/// Removing a profile from the kernel leaves its processes unconfined.
#[test]
fn a_container_whose_profile_was_removed_does_not_start() -> Result<()> {
    const NAMESPACE: &str = "berth-test-removed";
    let namespace = if is_enforced() { Some(PolicyNamespace::create(NAMESPACE)?) } else { None };
    let test = |daemon: &Daemon| -> Result<()> {
        let namespace = namespace.as_ref().context("no namespace of policy")?;
        for (pod, request) in pods(daemon)? {
            let alone = pod.create(request("alone"))?;
            let replaced = pod.create(request("replaced"))?;
            namespace.remove_profile("berth-default")?;
            let refuses = |refused: Option<tonic::Status>| {
                let refused = refused.context("it runs without its profile")?;
                ensure!(
                    refused.message().contains("berth-default") && refused.message().contains("recreate"),
                    "{refused}"
                );
                Ok(())
            };
            refuses(alone.start().err())?;
            // The next one loads it again, which is too late for those that were created before.
            let next = pod.start(request("next"))?;
            ensure!(next.sh(READ)? == "berth-default (enforce)\n");
            refuses(replaced.start().err())?;
            replaced.remove()?;
            ensure!(pod.start(request("replaced"))?.sh(READ)? == "berth-default (enforce)\n");
        }
        Ok(())
    };
    let launcher = &["aa-exec", "--namespace=berth-test-removed", "--profile=unconfined", "--"];
    let setup = Setup { launcher, ..Setup::default() };
    with_apparmor_and(setup, "a_container_whose_profile_was_removed_does_not_start", test)
}
