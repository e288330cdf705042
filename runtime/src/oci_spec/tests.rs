//! The specs of containers, by what was asked for.

use berth_cgroup::{Access, DeviceKind, DevicePolicy, DeviceRule};
use berth_model::container::{Mount as AskedMount, Propagation, Resources};
use berth_model::layout::Layout;
use berth_model::security::Profile;
use oci_spec::runtime::{
    LinuxDeviceCgroup, LinuxDeviceType, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources, Mount,
};

use super::*;

/// Everything that a spec is made from, with an ordinary pod and image to start with.
#[derive(Debug)]
pub(crate) struct Fixture {
    pub(crate) container_id: ContainerId,
    pub(crate) sandbox_id: SandboxId,
    pub(crate) config: container::Config,
    pub(crate) sandbox: sandbox::Config,
    pub(crate) image: ImageConfig,
    pub(crate) hostname: String,
    pub(crate) mounts: Vec<ResolvedMount>,
    pub(crate) devices: Vec<ResolvedDevice>,
    pub(crate) host_devices: Vec<ResolvedDevice>,
    pub(crate) default_apparmor_profile: Option<&'static str>,
    pub(crate) cgroup_directories: Vec<CgroupDirectory>,
    pub(crate) target: Option<PathBuf>,
    pub(crate) seccomp: Option<LinuxSeccomp>,
    pub(crate) host: HostFacts,
}

/// All capabilities that Linux has.
pub(crate) const ALL_CAPABILITIES: CapabilityBits = (1 << 41) - 1;

impl Fixture {
    pub(crate) fn new() -> Self {
        let mut fixture = Self {
            container_id: ContainerId::from_bytes([0xc0; 32]),
            sandbox_id: SandboxId::from_bytes([0x50; 32]),
            config: container::Config::default(),
            sandbox: sandbox::Config::default(),
            image: ImageConfig { cmd: texts(&["/bin/image"]), ..ImageConfig::default() },
            hostname: "pod-host".to_owned(),
            mounts: Vec::new(),
            devices: Vec::new(),
            host_devices: Vec::new(),
            default_apparmor_profile: None,
            cgroup_directories: Vec::new(),
            target: None,
            seccomp: None,
            host: HostFacts { bounding: ALL_CAPABILITIES, unified_cgroups: true, ..HostFacts::default() },
        };
        // The kubelet's choice; the CRI's default is one for the pod.
        fixture.config.security.namespaces.pid = NamespaceMode::Container;
        fixture
    }

    pub(crate) fn build(&self) -> Result<Spec, SpecError> {
        let layout = Layout::new("/root".into(), "/state".into());
        build(&Inputs {
            container_id: &self.container_id,
            config: &self.config,
            files: &layout.container(&self.container_id),
            sandbox_id: &self.sandbox_id,
            sandbox: &self.sandbox,
            sandbox_files: &layout.sandbox(&self.sandbox_id),
            hostname: &self.hostname,
            image: &self.image,
            image_name: "registry.example/image:1",
            mounts: &self.mounts,
            devices: &self.devices,
            host_devices: &self.host_devices,
            default_apparmor_profile: self.default_apparmor_profile,
            cgroup_path: "kubepods/pod1/c0",
            cgroup_directories: &self.cgroup_directories,
            target_pid_namespace: self.target.as_deref(),
            seccomp: self.seccomp.as_ref(),
            rlimits: &crate::rlimits::check(&crate::rlimits::WrittenRlimits::new()).unwrap(),
            host: &self.host,
        })
    }

    /// As [`Self::build`] after `change`.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub(crate) fn privileged(self) -> Self {
        self.with(|fixture| {
            fixture.sandbox.privileged = true;
            fixture.config.security.privileged = true;
        })
    }

    /// Asks for a mount of `/host<path>`.
    pub(crate) fn mount(self, path: &str, change: impl FnOnce(&mut AskedMount)) -> Self {
        let mut asked = AskedMount {
            container_path: path.to_owned(),
            host_path: format!("/host{path}"),
            readonly: false,
            recursive_read_only: false,
            propagation: Propagation::Private,
        };
        change(&mut asked);
        self.with(|fixture| {
            fixture.config.mounts.push(asked.clone());
            fixture.mounts.push(ResolvedMount { source: PathBuf::from(&asked.host_path), asked });
        })
    }
}

pub(crate) fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

pub(crate) fn fuse(path: &str) -> ResolvedDevice {
    ResolvedDevice {
        container_path: path.into(),
        kind: DeviceKind::Char,
        major: 10,
        minor: 229,
        mode: 0o660,
        uid: 0,
        gid: 44,
        access: Access { read: true, write: true, mknod: false },
    }
}

fn process(fixture: &Fixture) -> oci_spec::runtime::Process {
    fixture.build().unwrap().process().clone().unwrap()
}

fn linux(fixture: &Fixture) -> Linux {
    fixture.build().unwrap().linux().clone().unwrap()
}

fn mounts(fixture: &Fixture) -> Vec<Mount> {
    fixture.build().unwrap().mounts().clone().unwrap()
}

fn destinations(fixture: &Fixture) -> Vec<String> {
    mounts(fixture).iter().map(|mount| mount.destination().display().to_string()).collect()
}

fn mount_at(fixture: &Fixture, path: &str) -> Mount {
    let found: Vec<Mount> =
        mounts(fixture).into_iter().filter(|mount| mount.destination() == Path::new(path)).collect();
    let [mount] = found.as_slice() else { panic!("{path}: {found:?}") };
    mount.clone()
}

fn options(fixture: &Fixture, path: &str) -> String {
    mount_at(fixture, path).options().clone().unwrap().join(",")
}

#[test]
fn a_command_replaces_the_entrypoint_and_drops_the_cmd() {
    // Entrypoint and Cmd of the image, command and args of the request, what is run.
    type Texts = &'static [&'static str];
    let cases: &[(Texts, Texts, Texts, Texts, Option<Texts>)] = &[
        (&[], &["c"], &[], &[], Some(&["c"])),
        (&["e"], &[], &[], &[], Some(&["e"])),
        (&["e"], &["c"], &[], &[], Some(&["e", "c"])),
        (&["e"], &["c"], &["C"], &[], Some(&["C"])),
        (&["e"], &["c"], &[], &["A"], Some(&["e", "A"])),
        (&["e"], &["c"], &["C"], &["A"], Some(&["C", "A"])),
        (&[], &["c"], &[], &["A"], Some(&["A"])),
        (&[], &[], &["C", "with space", ""], &[], Some(&["C", "with space", ""])),
        (&[], &[], &[], &[], None),
        (&[""], &[], &[], &[], None),
        (&["e"], &[], &[""], &[], None),
    ];
    for (entrypoint, cmd, command, args, expected) in cases {
        let fixture = Fixture::new().with(|fixture| {
            fixture.image.entrypoint = texts(entrypoint);
            fixture.image.cmd = texts(cmd);
            fixture.config.command = texts(command);
            fixture.config.args = texts(args);
        });
        match expected {
            Some(expected) => assert_eq!(process(&fixture).args().clone().unwrap(), *expected),
            None => assert_eq!(fixture.build().unwrap_err(), SpecError::NoCommand, "{command:?} {args:?}"),
        }
    }
}

#[test]
fn later_variables_win_and_the_order_stays() {
    const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    type Texts = &'static [&'static str];
    type Pairs = &'static [(&'static str, &'static str)];
    let cases: &[(bool, Texts, Pairs, Texts)] = &[
        (false, &[], &[], &[PATH, "HOSTNAME=pod-host"]),
        (true, &[], &[], &[PATH, "TERM=xterm", "HOSTNAME=pod-host"]),
        (false, &["PATH=/image", "A=1"], &[], &["PATH=/image", "HOSTNAME=pod-host", "A=1"]),
        (
            true,
            &["A=1", "B=2", "A=3"],
            &[("B", "x=y"), ("TERM", "vt100"), ("C", ""), ("B", "last")],
            &[PATH, "TERM=vt100", "HOSTNAME=pod-host", "A=3", "B=last", "C="],
        ),
        // Nothing is assigned by these, and a line break is a byte like any other.
        (false, &["", "=", "=a", "NAME"], &[("N", "a\nb")], &[PATH, "HOSTNAME=pod-host", "N=a\nb"]),
        (false, &["HOSTNAME=image"], &[("PATH", "")], &["PATH=", "HOSTNAME=image"]),
    ];
    for (tty, image, envs, expected) in cases {
        let fixture = Fixture::new().with(|fixture| {
            fixture.config.tty = *tty;
            fixture.image.env = texts(image);
            fixture.config.envs =
                envs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        });
        assert_eq!(process(&fixture).env().clone().unwrap(), *expected);
    }
}

#[test]
fn hostile_text_is_refused_with_its_origin() {
    type Change = fn(&mut Fixture);
    let long = environment::MAX_TEXT_BYTES;
    let cases: &[(Change, SpecError)] = &[
        (
            |fixture| fixture.image.env = texts(&["A=\0"]),
            SpecError::NulByte { origin: "the image's Env", text: "A=\0".to_owned() },
        ),
        (
            |fixture| fixture.image.entrypoint = texts(&["/bin/\0sh"]),
            SpecError::NulByte { origin: "the image's Entrypoint", text: "/bin/\0sh".to_owned() },
        ),
        (
            |fixture| fixture.config.args = texts(&["a\0"]),
            SpecError::NulByte { origin: "args", text: "a\0".to_owned() },
        ),
        (
            |fixture| fixture.config.envs = vec![("A".to_owned(), "\0".to_owned())],
            SpecError::NulByte { origin: "envs", text: "\0".to_owned() },
        ),
        (
            |fixture| fixture.image.env = vec![format!("A={}", "x".repeat(environment::MAX_TEXT_BYTES))],
            SpecError::TextTooLong { origin: "the image's Env", length: long + 2 },
        ),
        (
            |fixture| fixture.image.working_dir = "app".to_owned(),
            SpecError::Path { origin: "the image's WorkingDir", path: "app".to_owned() },
        ),
        (
            |fixture| fixture.config.working_dir = "/a\0".to_owned(),
            SpecError::Path { origin: "working_dir", path: "/a\0".to_owned() },
        ),
        (|fixture| fixture.image.volumes = texts(&["/a\0"]), SpecError::Volume("/a\0".to_owned())),
        (
            |fixture| fixture.image.volumes = (0..=MAX_MOUNTS).map(|n| format!("/{n}")).collect(),
            SpecError::TooManyMounts { found: MAX_MOUNTS + 1 },
        ),
    ];
    for (change, expected) in cases {
        assert_eq!(Fixture::new().with(change).build().unwrap_err(), *expected);
    }
}

#[test]
fn a_million_variables_are_too_many_and_take_no_time() {
    let fixture = Fixture::new().with(|fixture| {
        fixture.image.env = (0..1_000_000).map(|number| format!("{number:x}=")).collect();
    });
    assert!(matches!(fixture.build(), Err(SpecError::TooMuchText { .. })));
}

#[test]
fn the_working_directory_is_the_requests_or_the_images() {
    for (asked, image, expected) in [
        ("", "", "/"),
        ("", "/image", "/image"),
        ("/asked", "/image", "/asked"),
        // Only inside of the container can be seen where these lead; the shim looks.
        ("", "/proc/self/fd/3", "/proc/self/fd/3"),
        ("/a/../..", "", "/a/../.."),
    ] {
        let fixture = Fixture::new().with(|fixture| {
            fixture.config.working_dir = asked.to_owned();
            fixture.image.working_dir = image.to_owned();
        });
        assert_eq!(process(&fixture).cwd(), Path::new(expected));
    }
}

#[test]
fn an_ordinary_container_has_the_standard_mounts_in_order() {
    let fixture = Fixture::new();
    assert_eq!(
        destinations(&fixture),
        [
            "/proc",
            "/dev",
            "/sys",
            "/dev/pts",
            "/dev/mqueue",
            "/dev/shm",
            "/etc/hosts",
            "/etc/hostname",
            "/etc/resolv.conf",
            "/sys/fs/cgroup",
        ]
    );
    for (path, expected) in [
        ("/proc", "nosuid,noexec,nodev"),
        ("/dev", "nosuid,strictatime,mode=755,size=65536k"),
        ("/dev/pts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("/sys", "nosuid,noexec,nodev,ro"),
        ("/sys/fs/cgroup", "nosuid,noexec,nodev,relatime,ro"),
        ("/dev/shm", "rbind,rprivate,nosuid,noexec,nodev,rw"),
        ("/etc/hosts", "bind,rprivate,nosuid,noexec,nodev,rw"),
    ] {
        assert_eq!(options(&fixture, path), expected, "{path}");
    }
    let state = format!("/state/sandboxes/{}", fixture.sandbox_id);
    for (path, source) in [
        ("/dev/shm", "shm/shm"),
        ("/etc/resolv.conf", "shm/etc/resolv.conf"),
        ("/etc/hostname", "shm/etc/hostname"),
    ] {
        assert_eq!(mount_at(&fixture, path).source().clone().unwrap(), Path::new(&state).join(source));
    }
    assert_eq!(linux(&fixture).rootfs_propagation().as_deref(), Some("rprivate"));
}

#[test]
fn what_was_asked_for_wins_over_what_is_standard() {
    let standard = destinations(&Fixture::new());
    // The mount asked for, the standard ones that give way.
    let cases: &[(&str, &[&str])] = &[
        ("/etc/hosts", &["/etc/hosts"]),
        ("/etc//./hosts/", &["/etc/hosts"]),
        ("/dev/shm", &["/dev/shm"]),
        ("/dev/shm/below", &[]),
        ("/dev", &["/dev", "/dev/pts", "/dev/mqueue", "/dev/shm"]),
        ("/sys", &["/sys", "/sys/fs/cgroup"]),
        ("/sys/fs", &["/sys/fs/cgroup"]),
        ("/proc", &["/proc"]),
        // Not the kernel's: the files are put into whatever is there.
        ("/etc", &[]),
        ("/devices", &[]),
        ("/data", &[]),
    ];
    for (path, gone) in cases {
        let fixture = Fixture::new().mount(path, |_| {});
        let asked = mounts::clean(path).unwrap();
        let mut expected: Vec<&str> =
            standard.iter().map(String::as_str).filter(|path| !gone.contains(path)).collect();
        expected.push(&asked);
        expected.sort_by_key(|path| Path::new(path).components().count());
        assert_eq!(destinations(&fixture), expected, "{path}");
        let source = mount_at(&fixture, &asked).source().clone().unwrap();
        assert_eq!(source, Path::new(&format!("/host{path}")));
    }
}

#[test]
fn mounts_are_sorted_by_depth_and_else_keep_their_order() {
    let fixture = ["/z/y/x", "/b", "/z/y", "/a", "/z", "/a"]
        .iter()
        .fold(Fixture::new(), |fixture, path| fixture.mount(path, |_| {}));
    let own: Vec<String> = mounts(&fixture)
        .iter()
        .filter(|mount| mount.source().clone().unwrap().starts_with("/host"))
        .map(|mount| mount.destination().display().to_string())
        .collect();
    assert_eq!(own, ["/b", "/a", "/z", "/a", "/z/y", "/z/y/x"]);
}

#[test]
fn modes_and_propagation_become_options() {
    let cases: &[(Propagation, bool, bool, (&str, &str))] = &[
        (Propagation::Private, false, false, ("rbind,rprivate,rw", "rprivate")),
        (Propagation::Private, true, false, ("rbind,rprivate,ro", "rprivate")),
        (Propagation::Private, true, true, ("rbind,rprivate,rro", "rprivate")),
        (Propagation::HostToContainer, false, false, ("rbind,rslave,rw", "rslave")),
        (Propagation::Bidirectional, true, false, ("rbind,rshared,ro", "rshared")),
    ];
    for (propagation, readonly, recursive, (expected, root)) in cases {
        let fixture = Fixture::new().mount("/data", |mount| {
            mount.propagation = *propagation;
            mount.readonly = *readonly;
            mount.recursive_read_only = *recursive;
        });
        assert_eq!(options(&fixture, "/data"), *expected);
        assert_eq!(linux(&fixture).rootfs_propagation().as_deref(), Some(*root));
    }
    let both = Fixture::new()
        .mount("/a", |mount| mount.propagation = Propagation::Bidirectional)
        .mount("/b", |mount| mount.propagation = Propagation::HostToContainer);
    assert_eq!(linux(&both).rootfs_propagation().as_deref(), Some("rshared"));
}

#[test]
fn mounts_on_nothing_or_everything_are_refused() {
    for path in ["", "relative", "../up", "/nul\0"] {
        let expected = SpecError::Path { origin: "mounts: container_path", path: path.to_owned() };
        assert_eq!(Fixture::new().mount(path, |_| {}).build().unwrap_err(), expected);
    }
    for path in ["/", "//", "/..", "/a/.."] {
        let expected = SpecError::MountOnRoot(path.to_owned());
        assert_eq!(Fixture::new().mount(path, |_| {}).build().unwrap_err(), expected);
    }
}

#[test]
fn volumes_of_the_image_stay_writable_unless_something_is_there() {
    let fixture = Fixture::new()
        .with(|fixture| {
            fixture.image.volumes = texts(&[
                "/asked/",
                "/data",
                "/data//",
                "/dev/shm",
                "/etc/hosts",
                "/proc",
                "/proc/self",
                "/sys/fs/cgroup",
                "/var/db",
            ]);
        })
        .mount("/asked", |_| {});
    assert_eq!(mounts::image_volumes(&fixture.config, &fixture.image).unwrap(), ["/data", "/var/db"]);
}

#[test]
fn volumes_of_any_spelling_are_places_below_the_root() {
    let mut fixture = Fixture::new();
    for (text, found) in [
        ("data", Some("/data")),
        ("./data/", Some("/data")),
        ("a/../b//c", Some("/b/c")),
        ("../../srv", Some("/srv")),
        ("/data/../../opt/x", Some("/opt/x")),
        // What is there anyway.
        ("/", None),
        ("/.", None),
        (".", None),
        ("", None),
        ("data/..", None),
        ("a/../proc/self", None),
        ("../etc/hosts", None),
    ] {
        fixture.image.volumes = texts(&[text]);
        let volumes = mounts::image_volumes(&fixture.config, &fixture.image).unwrap();
        assert_eq!(volumes.first().map(String::as_str), found, "{text:?}");
    }
}

#[test]
fn cgroup_v1_shows_the_containers_own_directories_and_nothing_else() {
    let fixture = Fixture::new().with(|fixture| {
        fixture.host.unified_cgroups = false;
        fixture.cgroup_directories = ["cpu", "memory"]
            .iter()
            .map(|name| CgroupDirectory {
                name: (*name).to_owned(),
                directory: Path::new("/sys/fs/cgroup").join(name).join("kubepods/pod1/c0"),
            })
            .collect();
    });
    assert_eq!(mount_at(&fixture, "/sys/fs/cgroup").typ().as_deref(), Some("tmpfs"));
    assert!(options(&fixture, "/sys/fs/cgroup").ends_with(",ro"));
    assert_eq!(options(&fixture, "/sys/fs/cgroup/memory"), "bind,rprivate,nosuid,noexec,nodev,ro");
    assert!(
        !linux(&fixture)
            .namespaces()
            .clone()
            .unwrap()
            .iter()
            .any(|ns| ns.typ() == LinuxNamespaceType::Cgroup)
    );

    let privileged = fixture.privileged();
    assert!(options(&privileged, "/sys/fs/cgroup/cpu").ends_with(",rw"));
    let replaced = privileged.mount("/sys/fs/cgroup", |_| {});
    assert!(!destinations(&replaced).iter().any(|path| path.starts_with("/sys/fs/cgroup/")));
    let below = Fixture::new()
        .with(|fixture| fixture.host.unified_cgroups = false)
        .mount("/sys/fs/cgroup/systemd", |_| {});
    assert!(options(&below, "/sys/fs/cgroup").ends_with(",rw"));
}

#[test]
fn namespaces_are_the_pods_the_nodes_or_the_containers() {
    use LinuxNamespaceType as Kind;
    use NamespaceMode::{Container, Node, Pod, Target};
    let sandbox = |name: &str| format!("/state/sandboxes/{}/{name}", SandboxId::from_bytes([0x50; 32]));
    // Network, IPC and pid of the sandbox, pid of the container, and what is expected of network,
    // IPC, UTS, pid: "-" for the host's, "" for an own one, a name for a pinned one.
    let cases: &[(NamespaceMode, NamespaceMode, NamespaceMode, NamespaceMode, [&str; 4])] = &[
        (Pod, Pod, Container, Container, ["net", "ipc", "uts", ""]),
        (Pod, Pod, Pod, Pod, ["net", "ipc", "uts", "pid"]),
        (Pod, Pod, Pod, Container, ["net", "ipc", "uts", ""]),
        (Node, Pod, Container, Container, ["-", "ipc", "-", ""]),
        (Pod, Node, Container, Container, ["net", "-", "uts", ""]),
        (Node, Node, Node, Node, ["-", "-", "-", "-"]),
        (Pod, Pod, Node, Pod, ["net", "ipc", "uts", "-"]),
        (Pod, Pod, Container, Target, ["net", "ipc", "uts", "/proc/7/ns/pid"]),
    ];
    for (network, ipc, sandbox_pid, pid, expected) in cases {
        let fixture = Fixture::new().with(|fixture| {
            fixture.sandbox.namespaces.network = *network;
            fixture.sandbox.namespaces.ipc = *ipc;
            fixture.sandbox.namespaces.pid = *sandbox_pid;
            // Whatever the container's request says: network and IPC are the sandbox's.
            fixture.config.security.namespaces.network = Target;
            fixture.config.security.namespaces.pid = *pid;
            fixture.target = Some("/proc/7/ns/pid".into());
        });
        let spec = fixture.build().unwrap();
        let found = linux(&fixture).namespaces().clone().unwrap();
        for (kind, expected) in [Kind::Network, Kind::Ipc, Kind::Uts, Kind::Pid].into_iter().zip(expected) {
            let path =
                found.iter().find(|ns| ns.typ() == kind).map(|ns| ns.path().clone().unwrap_or_default());
            let expected = match *expected {
                "-" => None,
                "" => Some(PathBuf::new()),
                path if path.starts_with('/') => Some(PathBuf::from(path)),
                name => Some(PathBuf::from(sandbox(name))),
            };
            assert_eq!(path, expected, "{kind} {network:?} {ipc:?} {sandbox_pid:?} {pid:?}");
        }
        assert!(found.iter().any(|ns| ns.typ() == Kind::Mount && ns.path().is_none()));
        assert_eq!(spec.hostname().is_some(), *network == Pod);
        let shm = mount_at(&fixture, "/dev/shm").source().clone().unwrap();
        assert_eq!(shm == Path::new("/dev/shm"), *ipc == Node);
    }
}

#[test]
fn namespaces_that_cannot_be_are_refused() {
    use NamespaceMode::{Container, Pod, Target};
    let refused =
        |change: &dyn Fn(&mut Fixture)| Fixture::new().with(|fixture| change(fixture)).build().unwrap_err();
    assert_eq!(refused(&|f| f.config.security.namespaces.pid = Target), SpecError::NoTarget);
    assert_eq!(
        refused(&|f| {
            f.config.security.namespaces.pid = Pod;
            f.sandbox.namespaces.pid = Container;
        }),
        SpecError::NoSharedPid
    );
    assert_eq!(
        refused(&|f| f.sandbox.namespaces.network = Container),
        SpecError::NamespaceMode { kind: "network", mode: Container }
    );
    assert_eq!(
        refused(&|f| f.sandbox.namespaces.ipc = Target),
        SpecError::NamespaceMode { kind: "ipc", mode: Target }
    );
}

#[test]
fn masks_are_exactly_those_asked_for() {
    let fixture = Fixture::new().with(|fixture| {
        fixture.config.security.masked_paths = texts(&["/bin/ls"]);
        fixture.config.security.readonly_paths = texts(&["/proc/sys", "/etc"]);
    });
    let plain = linux(&fixture);
    assert_eq!(plain.masked_paths().clone().unwrap(), ["/bin/ls"]);
    assert_eq!(plain.readonly_paths().clone().unwrap(), ["/proc/sys", "/etc"]);
    let unmasked = linux(&Fixture::new());
    assert_eq!(
        (unmasked.masked_paths().clone(), unmasked.readonly_paths().clone()),
        (Some(vec![]), Some(vec![]))
    );
    let privileged = linux(&fixture.privileged());
    assert_eq!(
        (privileged.masked_paths().clone(), privileged.readonly_paths().clone()),
        (Some(vec![]), Some(vec![]))
    );
}

#[test]
fn a_privileged_container_has_everything_but_only_in_a_privileged_sandbox() {
    let fixture = Fixture::new().privileged().with(|fixture| {
        fixture.host_devices = vec![fuse("/dev/fuse")];
        fixture.host.bounding = 0b1011;
        fixture.host.apparmor = true;
        fixture.default_apparmor_profile = Some("berth-default");
        fixture.seccomp = Some(LinuxSeccomp::default());
        fixture.config.security.apparmor = Profile::RuntimeDefault;
        fixture.config.security.drop_capabilities = texts(&["ALL"]);
    });
    let linux = linux(&fixture);
    assert_eq!(linux.seccomp().clone(), None);
    assert!(linux.devices().clone().unwrap().iter().any(|device| device.path() == Path::new("/dev/fuse")));
    assert!(!linux.namespaces().clone().unwrap().iter().any(|ns| ns.typ() == LinuxNamespaceType::Cgroup));
    assert_eq!(options(&fixture, "/sys"), "nosuid,noexec,nodev,rw");
    assert!(options(&fixture, "/sys/fs/cgroup").ends_with(",rw"));
    let process = process(&fixture);
    assert_eq!(process.apparmor_profile().clone(), None);
    // All that the daemon has, and no more.
    assert_eq!(
        crate::plan::capability_bits(process.capabilities().clone().unwrap().permitted().iter().flatten()),
        0b1011
    );

    let refused = fixture.with(|fixture| fixture.sandbox.privileged = false).build();
    assert_eq!(refused.unwrap_err(), SpecError::PrivilegedSandbox);
}

#[test]
fn a_read_only_root_makes_the_etc_files_read_only_and_no_other_mount() {
    let fixture =
        Fixture::new().with(|fixture| fixture.config.security.readonly_rootfs = true).mount("/data", |_| {});
    assert_eq!(fixture.build().unwrap().root().clone().unwrap().readonly(), Some(true));
    for (path, read_only) in [
        ("/etc/hosts", true),
        ("/etc/resolv.conf", true),
        ("/data", false),
        ("/dev/shm", false),
        ("/dev", false),
    ] {
        let options = options(&fixture, path);
        assert_eq!(options.split(',').any(|option| option == "ro"), read_only, "{path}: {options}");
    }
}

#[test]
fn nodes_are_made_only_where_nothing_is_mounted() {
    let paths = |fixture: &Fixture| -> Vec<String> {
        linux(fixture).devices().iter().flatten().map(|device| device.path().display().to_string()).collect()
    };
    let default = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];
    assert_eq!(paths(&Fixture::new()), default);

    let with_fuse = |path: &str| Fixture::new().with(|fixture| fixture.devices = vec![fuse(path)]);
    assert_eq!(paths(&with_fuse("/dev/fuse")), [&default[..], &["/dev/fuse"]].concat());
    // In place of a default one.
    assert_eq!(paths(&with_fuse("/dev/full")), default);
    let full = linux(&with_fuse("/dev/full")).devices().clone().unwrap().remove(2);
    assert_eq!((full.major(), full.minor(), full.file_mode(), full.gid()), (10, 229, Some(0o660), Some(44)));
    // Not into what Berth mounts itself, where no device is.
    for path in ["/dev/shm/fuse", "/dev/pts/0", "/proc/x", "/proc/self/x", "/sys/x", "/etc/hosts", "/dev/shm"]
    {
        let refused = with_fuse(path).build();
        assert!(matches!(refused, Err(SpecError::DeviceOnMount(_))), "{path}: {refused:?}");
    }
    // Nor into the host's directories: what is asked for there has been found in them.
    assert_eq!(paths(&with_fuse("/dev/dri/fuse").mount("/dev/dri", |_| {})), default);
    assert_eq!(paths(&with_fuse("/dev/fuse").mount("/dev", |_| {})), Vec::<String>::new());
    // The host's are for privileged containers.
    let host = Fixture::new().with(|fixture| fixture.host_devices = vec![fuse("/dev/fuse")]);
    assert_eq!(paths(&host), default);
}

#[test]
fn the_cgroup_allows_the_default_devices_and_those_asked_for() {
    assert_eq!(device_policy(true, &[fuse("/dev/fuse")]), DevicePolicy::All);
    let DevicePolicy::Only(rules) = device_policy(false, &[fuse("/dev/fuse")]) else { panic!("all") };
    let asked = DeviceRule {
        kind: DeviceKind::Char,
        major: Some(10),
        minor: Some(229),
        access: Access { read: true, write: true, mknod: false },
    };
    assert_eq!(rules, [berth_cgroup::default_devices(), vec![asked]].concat());

    let rules = |fixture: &Fixture| linux(fixture).resources().clone().unwrap().devices().clone().unwrap();
    let text = |rule: &LinuxDeviceCgroup| {
        (rule.allow(), rule.typ(), rule.major(), rule.minor(), rule.access().clone().unwrap())
    };
    let some = rules(&Fixture::new().with(|fixture| fixture.devices = vec![fuse("/dev/fuse")]));
    assert_eq!(text(&some[0]), (false, Some(LinuxDeviceType::A), None, None, "rwm".to_owned()));
    assert_eq!(
        text(some.last().unwrap()),
        (true, Some(LinuxDeviceType::C), Some(10), Some(229), "rw".to_owned())
    );
    let all = rules(&Fixture::new().privileged());
    assert_eq!(
        all.iter().map(text).collect::<Vec<_>>(),
        [(true, Some(LinuxDeviceType::A), None, None, "rwm".to_owned())]
    );
}

#[test]
fn limits_keep_the_cris_sentinels() {
    use berth_cgroup::Ceiling;
    let resources = Resources {
        cpu_period_us: 100_000,
        cpu_quota_us: -1,
        cpu_shares: 2,
        memory_limit_bytes: 1 << 30,
        memory_swap_limit_bytes: -1,
        cpuset_cpus: "0-1".to_owned(),
        hugepage_limits: vec![("2MB".to_owned(), 0)],
        unified: [("memory.high".to_owned(), "1".to_owned())].into(),
        ..Resources::default()
    };
    let limits = |asked: &Resources| limits(&super::resources(asked).unwrap()).unwrap();
    let negative = Resources { cpu_shares: -5, cpu_period_us: i64::MIN, ..Resources::default() };
    let none = berth_cgroup::Limits::default();
    assert_eq!((limits(&Resources::default()), limits(&negative)), (none.clone(), none));
    let limits = limits(&resources);
    assert_eq!(limits.cpu_period_us, Some(100_000));
    assert_eq!(limits.cpu_quota_us, Some(Ceiling::Unlimited));
    assert_eq!(limits.cpu_shares, Some(2));
    assert_eq!(limits.memory_limit_bytes, Some(Ceiling::At(1 << 30)));
    assert_eq!(limits.memory_swap_limit_bytes, Some(Ceiling::Unlimited));
    assert_eq!((limits.cpuset_cpus.as_str(), limits.cpuset_mems.as_str()), ("0-1", ""));
    assert_eq!((limits.hugepages.len(), limits.unified.len(), limits.pids_limit), (1, 1, None));

    let fixture = Fixture::new().with(|fixture| fixture.config.resources = resources);
    let written = linux(&fixture).resources().clone().unwrap();
    assert_eq!(written.memory().unwrap().limit(), Some(1 << 30));
    assert_eq!(written.cpu().clone().unwrap().quota(), Some(-1));
    let huge = fixture.with(|f| f.config.resources.hugepage_limits = vec![("2MB".to_owned(), u64::MAX)]);
    assert!(matches!(huge.build(), Err(SpecError::Resource { field: "hugepage_limits", .. })));
}

#[test]
fn the_cgroup_keeps_what_the_finished_spec_says() {
    use berth_cgroup::Ceiling;
    let fixture = Fixture::new().with(|fixture| {
        fixture.devices = vec![fuse("/dev/fuse")];
        fixture.config.resources.memory_limit_bytes = 1 << 30;
        fixture.config.resources.cpu_shares = 2;
    });
    let mut spec = fixture.build().unwrap();
    let (limits, devices) = of_cgroup(&spec).unwrap();
    assert_eq!(limits.memory_limit_bytes, Some(Ceiling::At(1 << 30)));
    assert_eq!(devices, device_policy(false, &[fuse("/dev/fuse")]));

    // As something does that adjusts a spec before the cgroup is made.
    let adjust = |spec: &mut Spec, change: &dyn Fn(&mut LinuxResources)| {
        change(spec.linux_mut().as_mut().unwrap().resources_mut().as_mut().unwrap());
    };
    adjust(&mut spec, &|resources| {
        let memory = LinuxMemoryBuilder::default().limit(1_i64 << 20).swap(-1_i64).build().unwrap();
        resources.set_memory(Some(memory));
        resources.set_pids(Some(LinuxPidsBuilder::default().limit(9_i64).build().unwrap()));
        resources.cpu_mut().as_mut().unwrap().set_cpus(Some("0".to_owned()));
        let mut gpu = LinuxDeviceCgroup::default();
        gpu.set_allow(true).set_typ(Some(LinuxDeviceType::C)).set_major(Some(195)).set_minor(Some(-1));
        resources.devices_mut().as_mut().unwrap().push(gpu);
    });
    let (limits, devices) = of_cgroup(&spec).unwrap();
    assert_eq!(limits.memory_limit_bytes, Some(Ceiling::At(1 << 20)));
    assert_eq!(limits.memory_swap_limit_bytes, Some(Ceiling::Unlimited));
    assert_eq!((limits.pids_limit, limits.cpu_shares), (Some(Ceiling::At(9)), Some(2)));
    assert_eq!(limits.cpuset_cpus, "0");
    let DevicePolicy::Only(rules) = devices else { panic!("all") };
    let gpu = DeviceRule { kind: DeviceKind::Char, major: Some(195), minor: None, access: Access::ALL };
    assert_eq!(rules.last(), Some(&gpu));

    let refused = |change: &dyn Fn(&mut LinuxResources)| {
        let mut spec = spec.clone();
        adjust(&mut spec, change);
        of_cgroup(&spec).unwrap_err()
    };
    let deny = |major| {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(false).set_typ(Some(LinuxDeviceType::C)).set_major(major);
        rule
    };
    for rule in [deny(None), deny(Some(1))] {
        let error = refused(&|resources| resources.devices_mut().as_mut().unwrap().push(rule.clone()));
        assert_eq!(error, SpecError::Unsupported { property: "devices" });
    }
    let error = refused(&|resources| {
        resources.devices_mut().as_mut().unwrap()[0].set_major(Some(-2));
    });
    assert_eq!(error, SpecError::Resource { field: "devices", value: -2 });
    let error = refused(&|resources| {
        resources.memory_mut().as_mut().unwrap().set_swappiness(Some(0));
    });
    assert_eq!(error, SpecError::Unsupported { property: "memory.swappiness" });
    // Without a list nothing is allowed.
    adjust(&mut spec, &|resources| {
        resources.set_devices(None);
    });
    assert_eq!(of_cgroup(&spec).unwrap().1, DevicePolicy::Only(Vec::new()));
    let all = of_cgroup(&Fixture::new().privileged().build().unwrap()).unwrap();
    assert_eq!(all.1, DevicePolicy::All);
}

#[test]
fn apparmor_profiles_are_exact_or_refused() {
    let named = |name: &str| Profile::Localhost(name.to_owned());
    let default = Some("berth-default");
    // Asked for, AppArmor in the kernel, privileged, the profile or none; an error where there is
    // no result.
    let cases: &[(Profile, bool, bool, Option<Option<&str>>)] = &[
        (Profile::Unconfined, true, false, Some(None)),
        (Profile::RuntimeDefault, true, false, Some(default)),
        (Profile::RuntimeDefault, true, true, Some(None)),
        (Profile::RuntimeDefault, false, false, Some(None)),
        (named("own"), true, false, Some(Some("own"))),
        (named("own"), true, true, Some(Some("own"))),
        (named("own"), false, false, None),
        (named(""), true, false, None),
        (named("unconfined"), true, false, None),
        (named("unconfined_foo"), true, false, Some(Some("unconfined_foo"))),
        (named("own\nexec unconfined"), true, false, None),
        (named("own\0"), true, false, None),
    ];
    for (asked, enforced, privileged, expected) in cases {
        let fixture = Fixture::new().with(|fixture| {
            fixture.host.apparmor = *enforced;
            fixture.default_apparmor_profile = default;
            fixture.sandbox.privileged = true;
            fixture.config.security.privileged = *privileged;
            fixture.config.security.apparmor = asked.clone();
        });
        let found = fixture.build().map(|spec| spec.process().clone().unwrap().apparmor_profile().clone());
        match expected {
            Some(expected) => assert_eq!(found.unwrap().as_deref(), *expected, "{asked:?}"),
            None => assert!(
                matches!(
                    found,
                    Err(SpecError::AppArmorProfile(_)
                        | SpecError::NoAppArmor(_)
                        | SpecError::NoDefaultAppArmor)
                ),
                "{asked:?}: {found:?}"
            ),
        }
    }
}

#[test]
fn unknown_capabilities_are_refused_by_field() {
    for (field, change) in [
        (
            "capabilities.add_capabilities",
            (|f, list| f.config.security.add_capabilities = list) as fn(&mut Fixture, _),
        ),
        ("capabilities.drop_capabilities", |f, list| f.config.security.drop_capabilities = list),
        ("capabilities.add_ambient_capabilities", |f, list| {
            f.config.security.add_ambient_capabilities = list
        }),
    ] {
        for name in ["", "NET", "NET_ADMIN ", "CAP_CAP_KILL", "NET_ADMIN\0", "41"] {
            let fixture = Fixture::new().with(|fixture| change(fixture, texts(&["KILL", name])));
            assert_eq!(fixture.build().unwrap_err(), SpecError::Capability { field, name: name.to_owned() });
        }
    }
}

#[test]
fn annotations_are_berths_own_and_never_the_pods() {
    let fixture = Fixture::new().with(|fixture| {
        fixture.sandbox.metadata.name = "pod".to_owned();
        fixture.sandbox.metadata.namespace = "space".to_owned();
        fixture.sandbox.metadata.uid = "uid".to_owned();
        fixture.sandbox.log_directory = "/var/log/pods/x".to_owned();
        fixture.config.metadata.name = "main".to_owned();
        for annotations in [&mut fixture.config.annotations, &mut fixture.sandbox.annotations] {
            annotations.insert("run.oci.hooks.stdout".to_owned(), "/etc/cron.d/x".to_owned());
            annotations.insert("io.kubernetes.cri.container-type".to_owned(), "sandbox".to_owned());
        }
    });
    let found = fixture.build().unwrap().annotations().clone().unwrap();
    let sandbox_id = fixture.sandbox_id.to_string();
    let expected: HashMap<String, String> = [
        ("container-type", "container"),
        ("container-name", "main"),
        ("image-name", "registry.example/image:1"),
        ("sandbox-id", &sandbox_id),
        ("sandbox-name", "pod"),
        ("sandbox-namespace", "space"),
        ("sandbox-uid", "uid"),
        ("sandbox-log-directory", "/var/log/pods/x"),
    ]
    .into_iter()
    .map(|(name, value)| (format!("io.kubernetes.cri.{name}"), value.to_owned()))
    .collect();
    assert_eq!(found, expected);
}

#[test]
fn the_spec_says_who_the_process_turned_out_to_be() {
    let mut spec = Fixture::new().with(|fixture| fixture.image.user = "1000:100".to_owned()).build().unwrap();
    let user = |spec: &Spec| spec.process().clone().unwrap().user().clone();
    assert_eq!((user(&spec).uid(), user(&spec).gid(), user(&spec).umask()), (1000, 100, Some(0o022)));
    set_user(&mut spec, 5, 6, &[6, 7]);
    assert_eq!((user(&spec).uid(), user(&spec).gid()), (5, 6));
    assert_eq!(user(&spec).additional_gids().clone(), Some(vec![6, 7]));
}

#[test]
fn a_spec_survives_being_written_down() {
    let spec = Fixture::new().mount("/data", |_| {}).build().unwrap();
    let written = serde_json::to_vec(&spec).unwrap();
    assert_eq!(serde_json::from_slice::<Spec>(&written).unwrap(), spec);
    let json: serde_json::Value = serde_json::from_slice(&written).unwrap();
    assert_eq!(json["ociVersion"], "1.2.0");
    assert_eq!(json["process"]["capabilities"]["inheritable"], serde_json::json!([]));
    assert_eq!(json["linux"]["cgroupsPath"], "/kubepods/pod1/c0");
}
