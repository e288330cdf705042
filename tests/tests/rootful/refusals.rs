//! Requests that make no sense or cannot be fulfilled: an error that names the problem, and nothing
//! left behind.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use berth_cri::v1;
use berth_tests::census::Census;
use berth_tests::cri::image_spec;
use berth_tests::daemon::{Setup, rootful, rootful_with};
use berth_tests::forge::{Image, Layer};
use berth_tests::pod::{Pod, idle, limit, security, volume, words};
use nix::mount::MsFlags;
use serde_json::json;
use tonic::Code;

type ChangePod = Box<dyn Fn(&mut v1::PodSandboxConfig)>;
type ChangeContainer = Box<dyn Fn(&mut v1::ContainerConfig)>;

#[test]
fn pods_that_cannot_be_are_refused_by_name_and_leave_nothing() -> Result<()> {
    rootful(|daemon| {
        // One pod first: what the first of all pods creates on a host stays.
        daemon.pod("first")?.remove()?;
        let census = Census::take(daemon)?;
        let linux = |change: fn(&mut v1::LinuxPodSandboxConfig)| -> ChangePod {
            Box::new(move |config| change(config.linux.get_or_insert_default()))
        };
        let cases: Vec<(&str, ChangePod)> = vec![
            ("metadata", Box::new(|config| config.metadata = None)),
            (
                "metadata.name",
                Box::new(|config| config.metadata.get_or_insert_default().name = String::new()),
            ),
            ("hostname", Box::new(|config| config.hostname = "a/b".to_owned())),
            ("hostname", Box::new(|config| config.hostname = "x".repeat(65))),
            ("log_directory", Box::new(|config| config.log_directory = "relative".to_owned())),
            ("log_directory", Box::new(|config| config.log_directory = "/a/../b".to_owned())),
            ("cgroup_parent", linux(|linux| linux.cgroup_parent = "/a/../../b".to_owned())),
            (
                "no.such.sysctl",
                linux(|linux| drop(linux.sysctls.insert("no.such.sysctl".to_owned(), "1".to_owned()))),
            ),
            (
                "net.ipv4.ip_forward",
                linux(|linux| {
                    drop(linux.sysctls.insert("net.ipv4.ip_forward".to_owned(), "nonsense".to_owned()))
                }),
            ),
            // It would be the host's.
            (
                "vm.swappiness",
                linux(|linux| drop(linux.sysctls.insert("vm.swappiness".to_owned(), "1".to_owned()))),
            ),
            (
                "servers",
                Box::new(|config| {
                    config.dns_config = Some(v1::DnsConfig {
                        servers: words(&["1.1.1.1\noptions evil"]),
                        ..Default::default()
                    });
                }),
            ),
        ];
        for (field, change) in cases {
            let mut config = daemon.pod_config("web");
            change(&mut config);
            let refused =
                Pod::run(daemon.client(), config).err().with_context(|| format!("{field} is refused"))?;
            assert!(refused.message().contains(field), "{field}: {refused}");
            assert_eq!(refused.code(), Code::InvalidArgument, "{field}: {refused}");
        }
        let request = v1::RunPodSandboxRequest {
            config: Some(daemon.pod_config("web")),
            runtime_handler: "none-such".to_owned(),
        };
        let refused =
            daemon.client().run_pod_sandbox(request).err().context("an unknown handler is refused")?;
        assert!(refused.message().contains("none-such"), "{refused}");
        assert!(daemon.client().sandboxes(v1::PodSandboxFilter::default())?.is_empty());
        census.stays(daemon)?;
        daemon.pod("web").context("the name is not taken")?;
        Ok(())
    })
}

#[test]
fn containers_that_cannot_be_are_refused_by_name_and_leave_nothing() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let directory = daemon.directory("files")?;
        fs::write(directory.join("file"), "")?;
        let dir = directory.to_string_lossy().into_owned();
        let file = directory.join("file").to_string_lossy().into_owned();
        // The log's directory is a file, so no log can be in it.
        fs::write(daemon.logs().join("web/blocked"), "")?;
        pod.idle("first")?.remove()?;
        let census = Census::take(daemon)?;
        let secure = |change: fn(&mut v1::LinuxContainerSecurityContext)| -> ChangeContainer {
            Box::new(move |config| change(security(config)))
        };
        let mount = |container: &str, host: &str| {
            let (container_path, host_path) = (container.to_owned(), host.to_owned());
            let mount = v1::Mount { container_path, host_path, ..Default::default() };
            Box::new(move |config: &mut v1::ContainerConfig| config.mounts = vec![mount.clone()])
        };
        let device = |host: &str, container: &str| {
            let (container_path, host_path) = (container.to_owned(), host.to_owned());
            let device = v1::Device { container_path, host_path, permissions: "rw".to_owned() };
            Box::new(move |config: &mut v1::ContainerConfig| config.devices = vec![device.clone()])
        };
        let cases: Vec<(&str, ChangeContainer)> = vec![
            ("metadata", Box::new(|config| config.metadata = None)),
            (
                "localhost/none:such",
                Box::new(|config| config.image = Some(image_spec("localhost/none:such"))),
            ),
            ("image", Box::new(|config| config.image = None)),
            ("nobody-knows", secure(|context| context.run_as_username = "nobody-knows".to_owned())),
            ("log_path", Box::new(|config| config.log_path = "../../escape.log".to_owned())),
            ("log_path", Box::new(|config| config.log_path = "/absolute.log".to_owned())),
            ("blocked/main.log", Box::new(|config| config.log_path = "blocked/main.log".to_owned())),
            (
                "NO_SUCH_CAP",
                secure(|context| {
                    context.capabilities = Some(v1::Capability {
                        add_capabilities: words(&["NO_SUCH_CAP"]),
                        ..Default::default()
                    });
                }),
            ),
            ("container_path", mount("relative", "/tmp")),
            ("container_path", mount("/", "/tmp")),
            ("outside the container's root", mount("/data/../../etc", "/tmp")),
            ("host_path", mount("/data", "relative")),
            ("/bin/busybox/x", mount("/bin/busybox/x", &file)),
            ("working_dir", Box::new(|config| config.working_dir = "relative".to_owned())),
            (
                "envs",
                Box::new(|config| {
                    config.envs = vec![v1::KeyValue { key: "A=B".to_owned(), value: Vec::new() }];
                }),
            ),
            ("command", Box::new(|config| config.command = words(&["nul\0byte"]))),
            (
                "/dev/no-such-device",
                Box::new(|config| {
                    config.devices = vec![v1::Device {
                        container_path: "/dev/x".to_owned(),
                        host_path: "/dev/no-such-device".to_owned(),
                        permissions: "rw".to_owned(),
                    }];
                }),
            ),
            // Where Berth or the request mounts something, a node has no place.
            ("/proc/self/x", device("/dev/null", "/proc/self/x")),
            ("/dev/shm/x", device("/dev/null", "/dev/shm/x")),
            ("/etc/hosts", device("/dev/null", "/etc/hosts")),
            (
                "/data/null",
                Box::new(|config| {
                    config.mounts = vec![volume(Path::new("/tmp"), "/data")];
                    config.devices = vec![v1::Device {
                        container_path: "/data/null".to_owned(),
                        host_path: "/dev/null".to_owned(),
                        permissions: "rw".to_owned(),
                    }];
                }),
            ),
            (
                "memory",
                Box::new(|config| {
                    limit(
                        config,
                        v1::LinuxContainerResources { memory_limit_in_bytes: -5, ..Default::default() },
                    );
                }),
            ),
            (
                "target_id",
                secure(|context| {
                    context.namespace_options = Some(v1::NamespaceOption {
                        pid: v1::NamespaceMode::Target.into(),
                        target_id: "nobody".to_owned(),
                        ..Default::default()
                    });
                }),
            ),
            ("privileged", secure(|context| context.privileged = true)),
            ("masked_paths[1]", secure(|context| context.masked_paths = words(&["/proc/kcore", "//"]))),
            ("/etc/passwd: the source is a directory", mount("/etc/passwd", &dir)),
            ("/etc: the source is not a directory", mount("/etc", &file)),
            (
                "memory limit is too low",
                Box::new(|config| {
                    limit(
                        config,
                        v1::LinuxContainerResources { memory_limit_in_bytes: 4096, ..Default::default() },
                    );
                }),
            ),
            (
                "cpuset.cpus",
                Box::new(|config| {
                    limit(
                        config,
                        v1::LinuxContainerResources { cpuset_cpus: "8000".to_owned(), ..Default::default() },
                    );
                }),
            ),
        ];
        for (field, change) in cases {
            let mut config = idle("main");
            change(&mut config);
            let refused = pod.create(config).err().with_context(|| format!("{field} is refused"))?;
            assert!(refused.message().contains(field), "{field}: {refused}");
            assert_ne!(refused.code(), Code::Internal, "{field}: {refused}");
            assert!(daemon.client().containers(v1::ContainerFilter::default())?.is_empty(), "{field}");
        }
        assert!(!daemon.dir().join("escape.log").exists());
        census.stays(daemon)?;
        let unknown = v1::CreateContainerRequest {
            pod_sandbox_id: "0".repeat(64),
            config: Some(idle("main")),
            sandbox_config: None,
        };
        let refused = daemon.client().create_container(unknown).err().context("an unknown pod is refused")?;
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        pod.idle("main").context("the name is not taken")?;
        Ok(())
    })
}

#[test]
fn a_full_disk_is_told_leaves_nothing_and_is_survived() -> Result<()> {
    let setup = Setup {
        configuration: "[image]\nmin_free_bytes = 0\nmin_free_percent = 0\n",
        disk_bytes: Some(24 << 20),
        ..Setup::default()
    };
    rootful_with(setup, |daemon| {
        let client = daemon.client();
        let pod = daemon.pod("web")?;
        pod.idle("first")?.remove()?;
        let census = Census::take(daemon)?;
        let images = client.images()?;
        let directory = daemon.directory("big")?;
        let content = vec![7; 40 << 20];
        Image::demo()?
            .on_top(Layer::of_files(&[("big", &content)]))
            .write_layout(&directory, "localhost/big:1")?;
        let refused = client.import(&directory).err().context("it does not fit")?;
        assert!(refused.message().contains("space") || refused.message().contains("full"), "{refused}");
        assert_eq!(client.images()?, images);
        census.stays(daemon).context("after the import")?;

        // Now to the last byte, so that not even a record can be written.
        let filler = daemon.root().join("filler");
        let mut file = fs::File::create(&filler)?;
        let mut chunk = vec![0; 1 << 16];
        while !chunk.is_empty() {
            if std::io::Write::write_all(&mut file, &chunk).is_err() {
                chunk.truncate(chunk.len() / 2);
            }
        }
        let refused =
            Pod::run(client.clone(), daemon.pod_config("full")).err().context("no room for a pod")?;
        assert!(refused.message().contains("space"), "{refused}");
        let refused = pod.create(idle("full")).err().context("no room for a container")?;
        assert!(refused.message().contains("space"), "{refused}");
        assert_eq!(client.sandboxes(v1::PodSandboxFilter::default())?.len(), 1);
        assert!(client.containers(v1::ContainerFilter::default())?.is_empty());
        drop(file);
        fs::remove_file(&filler)?;
        census.stays(daemon).context("after the full disk")?;
        assert_eq!(pod.script("echo again", |_| {})?, "again\n");
        daemon.pod("full")?;
        Ok(())
    })
}

#[test]
fn a_disk_that_has_to_stay_free_is_told_with_the_key_that_says_so() -> Result<()> {
    let setup = Setup {
        configuration: "[image]\nmin_free_bytes = 16777216\nmin_free_percent = 0\n",
        disk_bytes: Some(24 << 20),
        ..Setup::default()
    };
    rootful_with(setup, |daemon| {
        let directory = daemon.directory("next")?;
        Image::demo()?
            .on_top(Layer::of_files(&[("file", &[7; 3 << 20])]))
            .write_layout(&directory, "localhost/next:1")?;
        fs::write(daemon.root().join("filler"), vec![0; 10 << 20])?;
        let refused = daemon.client().import(&directory).err().context("it is not let in")?;
        for words in ["no space left", "are free", "16 MiB must stay free", "lower image.min_free_bytes"] {
            assert!(refused.message().contains(words), "{words}: {refused}");
        }
        fs::remove_file(daemon.root().join("filler"))?;
        daemon.client().import(&directory)?;
        Ok(())
    })
}

#[test]
fn images_that_say_what_cannot_be_are_refused_by_what_they_say_and_leave_nothing() -> Result<()> {
    rootful(|daemon| {
        let (client, pod) = (daemon.client(), daemon.pod("web")?);
        pod.idle("first")?.remove()?;
        let census = Census::take(daemon)?;
        let long = |length: usize| json!("/a".repeat(length / 2));
        let layers = |count: usize| -> Result<Image> {
            let one = |number: usize| Layer::of_files(&[(format!("f{number}").as_str(), b"x")]);
            Ok((1..count).fold(Image::demo()?, |image, number| image.on_top(one(number))))
        };
        let variables: Vec<String> =
            (0..30).map(|number| format!("E{number}={}", "x".repeat(100_000))).collect();
        let far = format!("/{}", "a".repeat(5000));
        let cases: Vec<(&str, Image)> = vec![
            (
                "WorkingDir: the path is too long (200000 bytes)",
                Image::demo()?.with("WorkingDir", long(200_000)),
            ),
            ("WorkingDir: \"www\" is not an absolute path", Image::demo()?.with("WorkingDir", json!("www"))),
            ("User has 1000000 bytes", Image::demo()?.with("User", json!("a".repeat(1_000_000)))),
            ("StopSignal \"SIGNOPE\" is not a signal", Image::demo()?.with("StopSignal", json!("SIGNOPE"))),
            ("environment have 3", Image::demo()?.with("Env", json!(variables))),
            ("Volumes", Image::demo()?.with("Volumes", json!({far: {}}))),
        ];
        let mut number = 0;
        let mut import = |image: Image| -> Result<_> {
            number += 1;
            let directory = daemon.directory(&format!("image-{number}"))?;
            let name = format!("localhost/odd:{number}");
            image.write_layout(&directory, &name)?;
            Ok((client.import(&directory), name))
        };
        for (words, image) in cases {
            let (imported, name) = import(image)?;
            imported.with_context(|| format!("{words} is no fault of its bytes"))?;
            let mut config = idle("main");
            config.image = Some(image_spec(&name));
            let refused = pod.create(config).err().with_context(|| format!("{words} is refused"))?;
            assert!(refused.message().contains(words), "{words}: {refused}");
            assert_eq!(refused.code(), Code::InvalidArgument, "{words}: {refused}");
            client.remove_image_of(&name)?;
        }
        let (refused, _) = import(layers(501)?)?;
        let refused = refused.err().context("501 layers")?;
        assert!(refused.message().contains("501 layers; the limit is 500"), "{refused}");
        // The maximum, and as many variables as real pods have, are accepted.
        let many: Vec<String> = (0..10_000).map(|number| format!("E{number}=x")).collect();
        let (imported, name) = import(layers(500)?.with("Env", json!(many)))?;
        imported?;
        let said =
            pod.script("env | grep -c ^E; ls /f499", |config| config.image = Some(image_spec(&name)))?;
        assert_eq!(said, "10000\n/f499\n");
        for container in client.containers(v1::ContainerFilter::default())? {
            client.remove(&container.id)?;
        }
        client.remove_image_of(&name)?;
        census.stays(daemon)
    })
}

#[test]
fn a_root_that_becomes_read_only_is_told_and_what_runs_goes_on() -> Result<()> {
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        pod.idle("first")?.remove()?;
        let main = pod.idle("main")?;
        let census = Census::take(daemon)?.without_the_daemon();
        let root = daemon.root();
        let none = None::<&str>;
        nix::mount::mount(Some(&root), &root, none, MsFlags::MS_BIND, none)?;
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        nix::mount::mount(none, &root, none, read_only, none)?;
        let refused = Pod::run(daemon.client(), daemon.pod_config("new")).err().context("no new pod")?;
        assert!(refused.message().contains("Read-only file system"), "{refused}");
        let refused = pod.create(idle("new")).err().context("no new container")?;
        assert!(refused.message().contains("Read-only file system"), "{refused}");
        assert_eq!(main.sh("echo alive")?, "alive\n");
        // A daemon that starts on it says what to do, and changes nothing.
        daemon.kill()?;
        let refused = format!("{:?}", daemon.start_again().err().context("it does not start")?);
        let words = format!("{} is on a read-only file system: mount it writable", root.display());
        assert!(refused.contains(&words), "{refused}");
        nix::mount::umount2(&root, nix::mount::MntFlags::MNT_DETACH)?;
        daemon.start_again()?;
        assert_eq!(main.sh("echo alive")?, "alive\n");
        census.stays(daemon)?;
        main.stop(0)?;
        main.remove()?;
        Ok(())
    })
}
