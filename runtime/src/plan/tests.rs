//! Plans by specs.

use berth_model::container::{Mount as Asked, Propagation as Travel};
use berth_model::security::NamespaceMode;
use berth_sys::credentials::{CAPABILITIES, CapabilityBits};
use oci_spec::runtime::{
    Capability, Hooks, LinuxIdMapping, LinuxNamespace, LinuxSeccomp, Process as SpecProcess,
};
use proptest::prelude::*;

use super::*;
use crate::oci_spec::tests::{ALL_CAPABILITIES, Fixture, fuse, texts};
use crate::oci_spec::{CgroupDirectory, ResolvedDevice, ResolvedMount};

const FILTER: &[u8] = &[6, 0, 0, 0, 0, 0, 255, 127];
const ENTRY: &[u8] = &[6, 0, 0, 0, 0, 0, 255, 126];

/// The plan of `spec` with what the fixture asks for beside it.
fn plan_of(spec: &Spec, fixture: &Fixture) -> Result<Launch, PlanError> {
    let filter = Filter { program: FILTER, flags: 2, entry: ENTRY };
    launch(
        spec,
        &Extra {
            container_id: &fixture.container_id,
            user: &fixture.config.security.user,
            image_user: &fixture.image.user,
            layers: &["/layers/2", "/layers/1"].map(|path| StoredLayer::Directory(path.into())),
            upper_dir: Path::new("/upper"),
            work_dir: Path::new("/work"),
            volumes: &[],
            log: Some((Path::new("/var/log/pods/x"), Path::new("main/0.log"))),
            exit_record: Path::new("/exit"),
            stdin: fixture.config.stdin,
            stdin_once: fixture.config.stdin_once,
            cgroup: &Cgroup { unified_dir: b"/sys/fs/cgroup/x".to_vec(), ..Cgroup::default() },
            seccomp: spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()).map(|_| filter),
            pid_namespace: match fixture.target {
                Some(_) => PidPath::Target,
                None => PidPath::Pod(Path::new("/pod/proc")),
            },
        },
    )
}

fn plan(fixture: &Fixture) -> Launch {
    plan_of(&fixture.build().unwrap(), fixture).unwrap()
}

fn mount_at<'a>(plan: &'a Launch, path: &str) -> &'a Mount {
    plan.mounts.iter().find(|mount| mount.target == path.as_bytes()).unwrap()
}

/// The bits of capabilities by name, worked out apart from the code under test.
fn bits(names: &[&str]) -> CapabilityBits {
    names
        .iter()
        .map(|name| 1 << CAPABILITIES.iter().position(|known| known == name).unwrap())
        .fold(0, |sum: u64, bit: u64| sum | bit)
}

#[test]
fn an_ordinary_container_becomes_a_plan() {
    let fixture = Fixture::new().mount("/data", |mount| mount.readonly = true);
    let plan = plan(&fixture);
    assert_eq!(plan.container_id, fixture.container_id.as_str());
    assert_eq!(plan.rootfs.lower_dirs, [b"/layers/2", b"/layers/1"]);
    let mount_point = format!("/state/containers/{}/rootfs", fixture.container_id);
    assert_eq!(plan.rootfs.mount_point, mount_point.as_bytes());
    assert_eq!(
        (plan.log_directory.as_slice(), plan.log_name.as_slice()),
        (&b"/var/log/pods/x"[..], &b"main/0.log"[..])
    );
    assert_eq!(plan.process.args, [b"/bin/image"]);
    assert_eq!(plan.namespaces.pid, Some(PidNamespace::Own(())));
    assert!(plan.namespaces.own_cgroup);
    let dev = mount_at(&plan, "/dev");
    assert_eq!(dev.attributes, berth_sys::mount::attr::NOSUID | berth_sys::mount::attr::STRICTATIME);
    let expected = Filesystem {
        fstype: "tmpfs".into(),
        options: texts(&["mode=755", "size=65536k"]),
        source: "tmpfs".into(),
    };
    assert_eq!(dev.source, Some(Source::Filesystem(expected)));
    let data = mount_at(&plan, "/data");
    let expected =
        Bind { source: b"/host/data".to_vec(), recursive: true, propagation: Propagation::Private.into() };
    assert_eq!((data.attributes, &data.source), (mount_options::RDONLY, &Some(Source::Bind(expected))));
    for mount in &plan.mounts {
        assert_eq!(mount.no_symlinks, [&b"/proc"[..], b"/sys", b"/dev"].contains(&&mount.target[..]));
    }
}

/// One security context and everything about privileges that must come of it.
struct Context {
    name: &'static str,
    change: fn(&mut Fixture),
    /// Bounding, effective and permitted.
    granted: CapabilityBits,
    /// Inheritable and ambient.
    ambient: CapabilityBits,
    user: (&'static str, Option<u32>, &'static [u32], bool),
    no_new_privileges: bool,
    filtered: bool,
    masked: bool,
    read_only: bool,
}

fn security_contexts() -> Vec<Context> {
    let default = bits(&[
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ]);
    let context = |name, change, granted| Context {
        name,
        change,
        granted,
        ambient: 0,
        user: ("", None, &[], false),
        no_new_privileges: false,
        filtered: false,
        masked: true,
        read_only: false,
    };
    vec![
        context("nothing asked for", |_| {}, default),
        context(
            "one more",
            |f| f.config.security.add_capabilities = texts(&["NET_ADMIN"]),
            default | bits(&["NET_ADMIN"]),
        ),
        context(
            "small letters and a prefix",
            |f| f.config.security.add_capabilities = texts(&["cap_net_admin"]),
            default | bits(&["NET_ADMIN"]),
        ),
        context(
            "one less",
            |f| f.config.security.drop_capabilities = texts(&["NET_RAW"]),
            default & !bits(&["NET_RAW"]),
        ),
        context(
            "one less that was not there",
            |f| f.config.security.drop_capabilities = texts(&["SYS_ADMIN"]),
            default,
        ),
        context("none", |f| f.config.security.drop_capabilities = texts(&["ALL"]), 0),
        context("all", |f| f.config.security.add_capabilities = texts(&["all"]), ALL_CAPABILITIES),
        context(
            "none but one",
            |f| {
                f.config.security.drop_capabilities = texts(&["ALL"]);
                f.config.security.add_capabilities = texts(&["NET_BIND_SERVICE"]);
            },
            bits(&["NET_BIND_SERVICE"]),
        ),
        context(
            "all but one",
            |f| {
                f.config.security.add_capabilities = texts(&["ALL"]);
                f.config.security.drop_capabilities = texts(&["SYS_ADMIN"]);
            },
            ALL_CAPABILITIES & !bits(&["SYS_ADMIN"]),
        ),
        context(
            "all and none",
            |f| {
                f.config.security.add_capabilities = texts(&["ALL"]);
                f.config.security.drop_capabilities = texts(&["ALL"]);
            },
            0,
        ),
        context(
            "one both added and dropped",
            |f| {
                f.config.security.add_capabilities = texts(&["KILL"]);
                f.config.security.drop_capabilities = texts(&["KILL"]);
            },
            default & !bits(&["KILL"]),
        ),
        context(
            "a daemon that lacks some",
            |f| {
                f.host.bounding = !bits(&["SYS_RESOURCE", "MKNOD"]);
                f.config.security.add_capabilities = texts(&["ALL"]);
            },
            ALL_CAPABILITIES & !bits(&["SYS_RESOURCE", "MKNOD"]),
        ),
        Context {
            ambient: bits(&["NET_ADMIN"]),
            ..context(
                "ambient",
                |f| f.config.security.add_ambient_capabilities = texts(&["NET_ADMIN"]),
                default | bits(&["NET_ADMIN"]),
            )
        },
        context(
            "ambient and dropped",
            |f| {
                f.config.security.add_ambient_capabilities = texts(&["KILL"]);
                f.config.security.drop_capabilities = texts(&["KILL"]);
            },
            default & !bits(&["KILL"]),
        ),
        Context {
            ambient: bits(&["KILL"]),
            ..context(
                "nothing but one ambient",
                |f| {
                    f.config.security.add_ambient_capabilities = texts(&["ALL", "KILL"]);
                    f.config.security.drop_capabilities = texts(&["ALL"]);
                },
                bits(&["KILL"]),
            )
        },
        context(
            "privileged is no set of its own in an ordinary container",
            |f| f.sandbox.privileged = true,
            default,
        ),
        Context {
            masked: false,
            ..context(
                "privileged",
                |f| {
                    f.sandbox.privileged = true;
                    f.config.security.privileged = true;
                    f.seccomp = Some(LinuxSeccomp::default());
                },
                ALL_CAPABILITIES,
            )
        },
        Context {
            user: ("app:users", None, &[], false),
            ..context("the image's user", |f| f.image.user = "app:users".into(), default)
        },
        Context {
            user: ("1000", None, &[], false),
            ..context(
                "a number over the image's user",
                |f| {
                    f.image.user = "root:root".into();
                    f.config.security.user.user = Some("1000".into());
                },
                default,
            )
        },
        Context {
            user: ("1000", Some(2000), &[3000, 4000], true),
            ..context(
                "groups, merged",
                |f| {
                    f.config.security.user = security::User {
                        user: Some("1000".into()),
                        group: Some(2000),
                        supplementary_groups: vec![3000, 4000],
                        merge_groups: true,
                    };
                },
                default,
            )
        },
        Context {
            user: ("app", None, &[0], false),
            ..context(
                "groups, strict",
                |f| {
                    f.config.security.user = security::User {
                        user: Some("app".into()),
                        supplementary_groups: vec![0],
                        ..security::User::default()
                    };
                },
                default,
            )
        },
        Context {
            no_new_privileges: true,
            ..context("no new privileges", |f| f.config.security.no_new_privileges = true, default)
        },
        Context {
            filtered: true,
            ..context("a filter", |f| f.seccomp = Some(LinuxSeccomp::default()), default)
        },
        Context {
            user: ("65534", None, &[], false),
            no_new_privileges: true,
            filtered: true,
            read_only: true,
            ..context(
                "the restricted pod security standard",
                |f| {
                    f.config.security.user.user = Some("65534".into());
                    f.config.security.drop_capabilities = texts(&["ALL"]);
                    f.config.security.no_new_privileges = true;
                    f.config.security.readonly_rootfs = true;
                    f.seccomp = Some(LinuxSeccomp::default());
                },
                0,
            )
        },
    ]
}

#[test]
fn security_contexts_come_out_exactly() {
    let contexts = security_contexts();
    assert_eq!(contexts.len(), 24);
    for context in contexts {
        let name = context.name;
        let fixture = Fixture::new()
            .with(|fixture| {
                fixture.config.security.masked_paths = texts(&["/proc/kcore"]);
                fixture.config.security.readonly_paths = texts(&["/proc/sys"]);
            })
            .with(context.change);
        let plan = plan(&fixture);
        let sets = plan.process.capabilities;
        for (set, found) in
            [("bounding", sets.bounding), ("effective", sets.effective), ("permitted", sets.permitted)]
        {
            assert_eq!(found, context.granted, "{name}: {set}");
        }
        for (set, found) in [("inheritable", sets.inheritable), ("ambient", sets.ambient)] {
            assert_eq!(found, context.ambient, "{name}: {set}");
        }
        let user = &plan.process.user;
        let found = (user.user.as_str(), user.group, user.supplementary_groups.as_slice(), user.merge_groups);
        assert_eq!(found, context.user, "{name}");
        assert_eq!(plan.process.no_new_privileges, context.no_new_privileges, "{name}");
        let (filter, entry, flags): (&[u8], &[u8], u32) =
            if context.filtered { (FILTER, ENTRY, 2) } else { (&[], &[], 0) };
        assert_eq!(
            (
                plan.process.seccomp_filter.as_slice(),
                plan.process.entry_filter.as_slice(),
                plan.process.seccomp_flags
            ),
            (filter, entry, flags),
            "{name}"
        );
        let count = usize::from(context.masked);
        assert_eq!((plan.masked_paths.len(), plan.readonly_paths.len()), (count, count), "{name}");
        assert_eq!(plan.rootfs.read_only, context.read_only, "{name}");
        // The same for all of them.
        let files = plan.process.rlimits.iter().find(|limit| limit.resource == 7).unwrap();
        assert_eq!((files.soft, files.hard, plan.process.rlimits.len()), (1024, 524_288, 15), "{name}");
        assert_eq!(plan.process.umask, 0o022, "{name}");
    }
}

#[test]
fn a_user_of_the_request_is_one_name() {
    for name in ["", "app:0", ":0"] {
        let fixture =
            Fixture::new().with(|fixture| fixture.config.security.user.user = Some(name.to_owned()));
        let refused = plan_of(&fixture.build().unwrap(), &fixture);
        assert_eq!(refused.unwrap_err(), PlanError::User(name.to_owned()));
    }
}

#[test]
fn a_read_only_tmpfs_is_closed_after_the_mounts_in_it() {
    let fixture = Fixture::new().with(|fixture| {
        fixture.host.unified_cgroups = false;
        fixture.cgroup_directories =
            vec![CgroupDirectory { name: "cpu".into(), directory: "/sys/fs/cgroup/cpu/c0".into() }];
    });
    let with_mount = plan(&fixture);
    assert_eq!(mount_at(&with_mount, "/sys/fs/cgroup").attributes & mount_options::RDONLY, 0);
    assert_eq!(with_mount.readonly_paths, [b"/sys/fs/cgroup"]);
    assert_ne!(mount_at(&with_mount, "/sys/fs/cgroup/cpu").attributes & mount_options::RDONLY, 0);

    let empty = plan(&fixture.with(|fixture| fixture.cgroup_directories.clear()));
    assert_ne!(mount_at(&empty, "/sys/fs/cgroup").attributes & mount_options::RDONLY, 0);
    assert_eq!(empty.readonly_paths, Vec::<Vec<u8>>::new());
}

#[test]
fn namespaces_of_the_spec_are_the_plans() {
    let fixture = |network, ipc, pid| {
        Fixture::new().with(|fixture| {
            fixture.sandbox.namespaces.network = network;
            fixture.sandbox.namespaces.ipc = ipc;
            fixture.config.security.namespaces.pid = pid;
        })
    };
    let host = plan(&fixture(NamespaceMode::Node, NamespaceMode::Node, NamespaceMode::Node)).namespaces;
    let expected =
        Namespaces { pid: Some(PidNamespace::Host(())), own_cgroup: true, ..Namespaces::default() };
    assert_eq!(host, expected);
    let pod = plan(&fixture(NamespaceMode::Pod, NamespaceMode::Pod, NamespaceMode::Pod)).namespaces;
    let pinned = |name: &str| format!("/state/sandboxes/{}/{name}", Fixture::new().sandbox_id).into_bytes();
    assert_eq!(
        pod,
        Namespaces {
            network: pinned("net"),
            ipc: pinned("ipc"),
            uts: pinned("uts"),
            pid: Some(PidNamespace::Join(pinned("pid"))),
            own_cgroup: true,
            procfs: b"/pod/proc".to_vec(),
        }
    );
    let target = fixture(NamespaceMode::Pod, NamespaceMode::Pod, NamespaceMode::Target)
        .with(|fixture| fixture.target = Some("/proc/7/ns/pid".into()));
    let target = plan(&target).namespaces;
    assert_eq!((target.pid, target.procfs), (Some(PidNamespace::Target(())), Vec::new()));
}

#[test]
fn a_spec_that_the_shim_cannot_carry_out_is_refused() {
    fn linux(spec: &mut Spec, change: impl FnOnce(&mut Linux)) {
        change(spec.linux_mut().as_mut().unwrap());
    }
    fn process(spec: &mut Spec, change: impl FnOnce(&mut SpecProcess)) {
        change(spec.process_mut().as_mut().unwrap());
    }
    fn namespace(kind: LinuxNamespaceType, path: Option<&str>) -> LinuxNamespace {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind).set_path(path.map(PathBuf::from));
        namespace
    }
    fn namespaces(spec: &mut Spec, list: Vec<LinuxNamespace>) {
        linux(spec, |linux| {
            linux.set_namespaces(Some(list));
        });
    }
    fn first_mount(spec: &mut Spec, change: impl FnOnce(&mut oci_spec::runtime::Mount)) {
        change(&mut spec.mounts_mut().as_mut().unwrap()[0]);
    }
    fn first_device(spec: &mut Spec, change: impl FnOnce(&mut LinuxDevice)) {
        linux(spec, |linux| {
            let mut devices = linux.devices().clone().unwrap();
            change(&mut devices[0]);
            linux.set_devices(Some(devices));
        });
    }
    use LinuxNamespaceType as Kind;
    type Change = fn(&mut Spec);
    let cases: Vec<(Change, PlanError)> = vec![
        (
            |s| {
                s.set_process(None);
            },
            PlanError::Missing("process"),
        ),
        (
            |s| {
                s.set_linux(None);
            },
            PlanError::Missing("linux"),
        ),
        (
            |s| {
                s.set_root(None);
            },
            PlanError::Missing("root"),
        ),
        (
            |s| {
                process(s, |p| {
                    p.set_args(None);
                })
            },
            PlanError::Missing("process.args"),
        ),
        (|s| namespaces(s, vec![]), PlanError::Missing("mount namespace")),
        (|s| namespaces(s, vec![namespace(Kind::User, None)]), PlanError::Namespace(Kind::User)),
        (|s| namespaces(s, vec![namespace(Kind::Time, None)]), PlanError::Namespace(Kind::Time)),
        (|s| namespaces(s, vec![namespace(Kind::Network, None)]), PlanError::Namespace(Kind::Network)),
        (|s| namespaces(s, vec![namespace(Kind::Mount, Some("/a"))]), PlanError::Namespace(Kind::Mount)),
        (|s| namespaces(s, vec![namespace(Kind::Cgroup, Some("/a"))]), PlanError::Namespace(Kind::Cgroup)),
        (
            |s| namespaces(s, vec![namespace(Kind::Pid, None), namespace(Kind::Pid, Some("/a"))]),
            PlanError::TwoNamespaces(Kind::Pid),
        ),
        (
            |s| namespaces(s, vec![namespace(Kind::Pid, Some("a"))]),
            PlanError::Relative { property: "linux.namespaces", path: "a".into() },
        ),
        (
            |s| {
                s.set_hooks(Some(Hooks::default()));
            },
            PlanError::Unsupported("hooks"),
        ),
        (
            |s| {
                s.set_domainname(Some("a".into()));
            },
            PlanError::Unsupported("domainname"),
        ),
        (
            |s| {
                linux(s, |l| {
                    l.set_sysctl(Some([("kernel.core_pattern".into(), "|/x".into())].into()));
                })
            },
            PlanError::Unsupported("linux.sysctl"),
        ),
        (
            |s| {
                linux(s, |l| {
                    l.set_uid_mappings(Some(vec![LinuxIdMapping::default()]));
                })
            },
            PlanError::Unsupported("linux.uidMappings"),
        ),
        (
            |s| {
                linux(s, |l| {
                    l.set_mount_label(Some("label".into()));
                })
            },
            PlanError::Unsupported("linux.mountLabel"),
        ),
        (
            |s| {
                process(s, |p| {
                    p.set_selinux_label(Some("label".into()));
                })
            },
            PlanError::Unsupported("process.selinuxLabel"),
        ),
        (
            |s| {
                linux(s, |l| {
                    l.set_rootfs_propagation(Some("unbindable".into()));
                })
            },
            PlanError::RootPropagation("unbindable".into()),
        ),
        (
            |s| {
                linux(s, |l| {
                    l.set_masked_paths(Some(vec!["proc".into()]));
                })
            },
            PlanError::Relative { property: "maskedPaths", path: "proc".into() },
        ),
        (
            |s| {
                process(s, |p| {
                    p.set_cwd("app".into());
                })
            },
            PlanError::Relative { property: "process.cwd", path: "app".into() },
        ),
        (
            |s| {
                first_mount(s, |m| {
                    m.set_destination("proc".into());
                })
            },
            PlanError::Relative { property: "mounts", path: "proc".into() },
        ),
        (
            |s| {
                first_mount(s, |m| {
                    m.set_typ(Some("ext4".into()));
                })
            },
            PlanError::Filesystem { destination: "/proc".into(), kind: "ext4".into() },
        ),
        (
            |s| {
                first_mount(s, |m| {
                    m.set_options(Some(vec!["nosymfollow".into()]));
                })
            },
            PlanError::MountOption {
                destination: "/proc".into(),
                source: OptionError::Unknown("nosymfollow".into()),
            },
        ),
        (
            |s| {
                first_mount(s, |m| {
                    m.set_uid_mappings(Some(vec![LinuxIdMapping::default()]));
                })
            },
            PlanError::Unsupported("mounts.uidMappings"),
        ),
        (
            |s| {
                first_mount(s, |m| {
                    m.set_typ(Some("tmpfs".into())).set_destination("/dev".into());
                    m.set_options(Some(vec!["ro".into()]));
                });
            },
            PlanError::WritableBelow("/dev".into()),
        ),
        (
            |s| {
                first_mount(s, |m| {
                    m.set_destination("/proc/sys/kernel".into());
                })
            },
            PlanError::InProc("/proc/sys/kernel".into()),
        ),
        (
            |s| {
                first_device(s, |d| {
                    d.set_major(-1);
                })
            },
            PlanError::Device("/dev/null".into()),
        ),
        (
            |s| {
                first_device(s, |d| {
                    d.set_minor(1 << 32);
                })
            },
            PlanError::Device("/dev/null".into()),
        ),
        (
            |s| {
                first_device(s, |d| {
                    d.set_typ(LinuxDeviceType::P);
                })
            },
            PlanError::Device("/dev/null".into()),
        ),
    ];
    let fixture = Fixture::new();
    for (change, expected) in cases {
        let mut spec = fixture.build().unwrap();
        change(&mut spec);
        assert_eq!(plan_of(&spec, &fixture).unwrap_err(), expected);
    }
}

#[test]
fn a_filter_belongs_to_a_profile_and_a_profile_to_a_filter() {
    let fixture = Fixture::new();
    let plain = fixture.build().unwrap();
    let fixture = fixture.with(|fixture| fixture.seccomp = Some(LinuxSeccomp::default()));
    let filtered = fixture.build().unwrap();
    let with = |spec: &Spec, program: Option<&[u8]>| {
        let cgroup = Cgroup::default();
        let user = security::User::default();
        launch(
            spec,
            &Extra {
                container_id: &fixture.container_id,
                user: &user,
                image_user: "",
                layers: &[],
                upper_dir: Path::new("/u"),
                work_dir: Path::new("/w"),
                volumes: &[],
                log: None,
                exit_record: Path::new("/e"),
                stdin: false,
                stdin_once: false,
                cgroup: &cgroup,
                seccomp: program.map(|program| Filter { program, flags: 0, entry: &[] }),
                pid_namespace: PidPath::Target,
            },
        )
    };
    assert!(with(&plain, None).is_ok());
    assert!(with(&filtered, Some(FILTER)).is_ok());
    for (spec, program) in [(&plain, Some(FILTER)), (&filtered, None), (&filtered, Some(&[][..]))] {
        assert_eq!(with(spec, program).unwrap_err(), PlanError::Seccomp);
    }
}

fn any_mount() -> impl Strategy<Value = Asked> {
    let part =
        prop::sample::select(vec!["dev", "sys", "proc", "etc", "hosts", "shm", "fs", "cgroup", "a", "b"]);
    let travel = prop::sample::select(vec![Travel::Private, Travel::HostToContainer, Travel::Bidirectional]);
    (prop::collection::vec(part, 1..4), any::<bool>(), any::<bool>(), travel).prop_map(
        |(parts, readonly, recursive, propagation)| Asked {
            // What is below /proc is refused, so it lies elsewhere here.
            container_path: format!("/{}", parts.join("/")).replace("/proc/", "/p/"),
            host_path: "/host".into(),
            readonly,
            recursive_read_only: readonly && recursive && propagation == Travel::Private,
            propagation,
        },
    )
}

fn any_fixture() -> impl Strategy<Value = Fixture> {
    let names = || prop::collection::vec(prop::sample::select(CAPABILITIES.to_vec()), 0..4);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let devices =
        prop::collection::vec(prop::sample::select(vec!["/dev/fuse", "/dev/a/b", "/a", "/dev/null"]), 0..3);
    (flags, names(), names(), prop::collection::vec(any_mount(), 0..5), devices, any::<u64>()).prop_map(
        |((privileged, unified, readonly, tty, no_new_privileges), add, drop, mounts, devices, bounding)| {
            Fixture::new().with(|fixture| {
                fixture.sandbox.privileged = privileged;
                fixture.host.bounding = bounding & ALL_CAPABILITIES;
                fixture.host.unified_cgroups = unified;
                fixture.host_devices = vec![fuse("/dev/host")];
                fixture.cgroup_directories =
                    vec![CgroupDirectory { name: "cpu".into(), directory: "/sys/fs/cgroup/cpu/c0".into() }];
                let config = &mut fixture.config;
                config.tty = tty;
                config.security.privileged = privileged;
                config.security.readonly_rootfs = readonly;
                config.security.no_new_privileges = no_new_privileges;
                config.security.add_capabilities = texts(&add);
                config.security.drop_capabilities = texts(&drop);
                config.security.masked_paths = texts(&["/proc/kcore"]);
                config.mounts.clone_from(&mounts);
                fixture.mounts =
                    mounts.into_iter().map(|asked| ResolvedMount { asked, source: "/host".into() }).collect();
                fixture.devices =
                    devices.into_iter().map(|path| ResolvedDevice { uid: 7, ..fuse(path) }).collect();
            })
        },
    )
}

/// Whether everything in the plan is named by the spec, read the other way round than the plan was
/// made.
fn grants_only(spec: &Spec, plan: &Launch) -> Result<(), TestCaseError> {
    let process = spec.process().as_ref().unwrap();
    let linux = spec.linux().as_ref().unwrap();
    let named = |set: &Option<oci_spec::runtime::Capabilities>, bit: usize| {
        set.iter().flatten().any(|capability: &Capability| capability.to_string() == CAPABILITIES[bit])
    };
    let spec_sets = process.capabilities().clone().unwrap();
    let sets = plan.process.capabilities;
    for (set, bits) in [
        (spec_sets.bounding(), sets.bounding),
        (spec_sets.effective(), sets.effective),
        (spec_sets.permitted(), sets.permitted),
        (spec_sets.inheritable(), sets.inheritable),
        (spec_sets.ambient(), sets.ambient),
    ] {
        for bit in 0..64 {
            prop_assert!(
                bits & (1 << bit) == 0 || (bit < CAPABILITIES.len() && named(set, bit)),
                "capability {}",
                bit
            );
        }
    }
    let mounts = spec.mounts().clone().unwrap_or_default();
    prop_assert_eq!(mounts.len(), plan.mounts.len());
    for (asked, planned) in mounts.iter().zip(&plan.mounts) {
        prop_assert_eq!(asked.destination().as_os_str().as_bytes(), planned.target.as_slice());
        let options = asked.options().clone().unwrap_or_default();
        let has = |name: &str| options.iter().any(|option| option == name);
        let closed_later = plan.readonly_paths.contains(&planned.target);
        prop_assert!(
            !(has("ro") || has("rro")) || closed_later || planned.attributes & mount_options::RDONLY != 0
        );
        prop_assert_eq!(has("rro"), planned.attributes_recursive);
        for (name, bit) in [("nosuid", 2), ("nodev", 4), ("noexec", 8)] {
            prop_assert!(
                !has(name) || planned.attributes & bit != 0,
                "{} on {:?}",
                name,
                asked.destination()
            );
        }
        match planned.source.as_ref().unwrap() {
            Source::Bind(bind) => {
                prop_assert_eq!(
                    asked.source().as_ref().unwrap().as_os_str().as_bytes(),
                    bind.source.as_slice()
                );
                prop_assert_eq!(bind.propagation == i32::from(Propagation::Shared), has("rshared"));
                prop_assert_eq!(bind.propagation == i32::from(Propagation::Slave), has("rslave"));
                prop_assert_eq!(bind.recursive, has("rbind"));
            }
            Source::Filesystem(filesystem) => {
                prop_assert_eq!(asked.typ().as_ref(), Some(&filesystem.fstype));
                prop_assert!(filesystem.options.iter().all(|option| options.contains(option)));
            }
        }
    }
    let devices: Vec<_> = linux.devices().iter().flatten().map(|device| device.path().clone()).collect();
    let planned: Vec<_> = plan
        .devices
        .iter()
        .map(|device| PathBuf::from(String::from_utf8(device.path.clone()).unwrap()))
        .collect();
    prop_assert_eq!(devices, planned);
    for path in linux.masked_paths().iter().flatten() {
        prop_assert!(plan.masked_paths.contains(&path.clone().into_bytes()));
    }
    prop_assert_eq!(plan.process.no_new_privileges, process.no_new_privileges().unwrap_or(false));
    prop_assert_eq!(plan.rootfs.read_only, spec.root().clone().unwrap().readonly().unwrap_or(false));
    let has = |kind| linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == kind);
    prop_assert_eq!(plan.namespaces.network.is_empty(), !has(LinuxNamespaceType::Network));
    prop_assert_eq!(plan.namespaces.ipc.is_empty(), !has(LinuxNamespaceType::Ipc));
    prop_assert_eq!(plan.namespaces.uts.is_empty(), !has(LinuxNamespaceType::Uts));
    prop_assert_eq!(plan.namespaces.pid == Some(PidNamespace::Host(())), !has(LinuxNamespaceType::Pid));
    Ok(())
}

proptest! {
    #[test]
    fn a_plan_grants_nothing_that_the_spec_does_not_name(
        fixture in any_fixture(),
        kept_mounts in prop::collection::vec(any::<bool>(), 20),
        kept_devices in prop::collection::vec(any::<bool>(), 20),
        kept_namespaces in prop::collection::vec(any::<bool>(), 8),
        kept_sets in prop::collection::vec(any::<bool>(), 5),
    ) {
        // What a container is asked for always becomes a plan.
        let mut spec = fixture.build().unwrap();
        grants_only(&spec, &plan_of(&spec, &fixture).unwrap())?;

        // And whatever is taken out of the spec is gone from the plan.
        let mut kept = kept_mounts.into_iter().cycle();
        spec.mounts_mut().as_mut().unwrap().retain(|_| kept.next().unwrap());
        let linux = spec.linux_mut().as_mut().unwrap();
        let mut kept = kept_devices.into_iter().cycle();
        let mut devices = linux.devices().clone().unwrap();
        devices.retain(|_| kept.next().unwrap());
        linux.set_devices(Some(devices));
        let mut kept = kept_namespaces.into_iter();
        let mut namespaces = linux.namespaces().clone().unwrap();
        namespaces.retain(|namespace| namespace.typ() == LinuxNamespaceType::Mount || kept.next().unwrap());
        linux.set_namespaces(Some(namespaces));
        let process = spec.process_mut().as_mut().unwrap();
        let mut sets = process.capabilities().clone().unwrap();
        if !kept_sets[0] { sets.set_bounding(None); }
        if !kept_sets[1] { sets.set_effective(None); }
        if !kept_sets[2] { sets.set_permitted(None); }
        if !kept_sets[3] { sets.set_inheritable(None); }
        if !kept_sets[4] { sets.set_ambient(None); }
        process.set_capabilities(Some(sets));
        grants_only(&spec, &plan_of(&spec, &fixture).unwrap())?;
    }
}
