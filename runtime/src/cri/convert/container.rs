//! `ContainerConfig` into [`container::Config`](Config).

use berth_cri::v1;
use berth_model::container::{Config, Device, Metadata, Mount, Propagation};
use berth_model::limit::{MAX_DEVICES, MAX_MOUNTS};
use berth_model::sandbox;

use super::field::{
    self, Field, Rejected, absolute, at_most, inside, no_longer_than, no_nul, quoted, relative_file,
};
use super::{SeLinux, resources, sandbox as sandbox_side, security, signal};

/// Limit on command, arguments and environment together, in bytes with their NULs. The kernel
/// allows a quarter of the stack's limit, 2 MiB mostly, and needs some of it for pointers.
const MAX_COMMAND_BYTES: usize = 1 << 20;

/// Annotations for CDI devices, from before there was a field for them.
const CDI_ANNOTATION: &str = "cdi.k8s.io/";

/// The container of a `CreateContainerRequest`, in its sandbox.
///
/// # Errors
/// [`Rejected`], with the first field that is wrong.
pub fn container_config(
    message: v1::ContainerConfig,
    sandbox: &sandbox::Config,
    selinux: SeLinux,
) -> Result<Config, Rejected> {
    let field = Field::root("config");
    sandbox_side::fits_a_record(&field, &message)?;
    let metadata = metadata(&field.of("metadata"), message.metadata)?;
    let (image, user_specified_image) = image(&field.of("image"), message.image)?;
    check_command_size(&field, &message.command, &message.args, &message.envs)?;
    let command = words(&field.of("command"), message.command)?;
    let args = words(&field.of("args"), message.args)?;
    if !message.working_dir.is_empty() {
        absolute(&field.of("working_dir"), &message.working_dir)?;
    }
    let envs = environment(&field.of("envs"), message.envs)?;
    let mounts = mounts(&field.of("mounts"), message.mounts)?;
    if !message.cdi_devices.is_empty() {
        return Err(field.of("cdi_devices").not_offered("CDI devices are"));
    }
    if let Some(key) = message.annotations.keys().find(|key| key.starts_with(CDI_ANNOTATION)) {
        return Err(field.of("annotations").key(key).not_offered("CDI devices are"));
    }
    if !message.log_path.is_empty() {
        relative_file(&field.of("log_path"), &message.log_path)?;
    }
    let linux = message.linux.unwrap_or_default();
    let linux_field = field.of("linux");
    Ok(Config {
        metadata,
        image,
        user_specified_image,
        command,
        args,
        working_dir: message.working_dir,
        envs,
        mounts,
        devices: devices(&field.of("devices"), message.devices)?,
        labels: sandbox_side::labels(&field.of("labels"), message.labels)?,
        annotations: sandbox_side::labels(&field.of("annotations"), message.annotations)?,
        log_path: message.log_path,
        stdin: message.stdin,
        stdin_once: message.stdin_once,
        tty: message.tty,
        stop_signal: signal::signal_number(&field.of("stop_signal"), message.stop_signal)?,
        resources: resources(&linux_field.of("resources"), &linux.resources.unwrap_or_default())?,
        security: security::container_security(
            &linux_field.of("security_context"),
            linux.security_context,
            sandbox,
            selinux,
        )?,
    })
}

fn metadata(field: &Field<'_>, message: Option<v1::ContainerMetadata>) -> Result<Metadata, Rejected> {
    let v1::ContainerMetadata { name, attempt } = message.ok_or_else(|| field.invalid("missing"))?;
    field::name(&field.of("name"), &name)?;
    Ok(Metadata { name, attempt })
}

/// The image, and the user's name for it.
fn image(field: &Field<'_>, message: Option<v1::ImageSpec>) -> Result<(String, String), Rejected> {
    let message = message.ok_or_else(|| field.invalid("missing"))?;
    field::name(&field.of("image"), &message.image)?;
    if !message.user_specified_image.is_empty() {
        field::name(&field.of("user_specified_image"), &message.user_specified_image)?;
    }
    Ok((message.image, message.user_specified_image))
}

fn check_command_size(
    field: &Field<'_>,
    command: &[String],
    args: &[String],
    envs: &[v1::KeyValue],
) -> Result<(), Rejected> {
    let words: usize = command.iter().chain(args).map(|word| word.len() + 1).sum();
    let environment: usize = envs.iter().map(|env| env.key.len() + env.value.len() + 2).sum();
    let bytes = words + environment;
    if bytes > MAX_COMMAND_BYTES {
        return Err(field.invalid(format!(
            "command, args and envs have {bytes} bytes; the limit is {MAX_COMMAND_BYTES}"
        )));
    }
    Ok(())
}

fn words(field: &Field<'_>, words: Vec<String>) -> Result<Vec<String>, Rejected> {
    for (index, word) in words.iter().enumerate() {
        no_nul(&field.at(index), word)?;
    }
    Ok(words)
}

/// Values are often secrets, so messages never repeat them.
fn environment(field: &Field<'_>, envs: Vec<v1::KeyValue>) -> Result<Vec<(String, String)>, Rejected> {
    envs.into_iter()
        .enumerate()
        .map(|(index, v1::KeyValue { key, value })| {
            let entry = field.at(index);
            if key.is_empty() || key.contains(['=', '\0']) {
                return Err(entry
                    .of("key")
                    .invalid(format!("{} is not the name of a variable", quoted(&key))));
            }
            let value = String::from_utf8(value)
                .map_err(|_| entry.of("value").not_offered("values that are not UTF-8 are"))?;
            no_nul(&entry.of("value"), &value)?;
            Ok((key, value))
        })
        .collect()
}

fn mounts(field: &Field<'_>, mounts: Vec<v1::Mount>) -> Result<Vec<Mount>, Rejected> {
    at_most(field, mounts.len(), MAX_MOUNTS)?;
    mounts.into_iter().enumerate().map(|(index, message)| mount(&field.at(index), message)).collect()
}

fn mount(field: &Field<'_>, message: v1::Mount) -> Result<Mount, Rejected> {
    if message.image.is_some() || !message.image_sub_path.is_empty() {
        return Err(field.of("image").not_offered("mounts of images are"));
    }
    if !message.uid_mappings.is_empty() || !message.gid_mappings.is_empty() {
        return Err(field.of("uid_mappings").not_offered("mounts with id mappings are"));
    }
    if !message.mount_options.is_empty() {
        return Err(field.of("mount_options").not_offered("further mount options are"));
    }
    let container_path = inside(&field.of("container_path"), message.container_path)?;
    absolute(&field.of("host_path"), &message.host_path)?;
    let propagation = match v1::MountPropagation::try_from(message.propagation) {
        Ok(v1::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(v1::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(v1::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => {
            return Err(field
                .of("propagation")
                .invalid(format!("unknown propagation {}", message.propagation)));
        }
    };
    if message.recursive_read_only {
        let entry = field.of("recursive_read_only");
        if !message.readonly {
            return Err(entry.invalid("requires readonly"));
        }
        if propagation != Propagation::Private {
            return Err(entry.invalid("requires private propagation"));
        }
    }
    Ok(Mount {
        container_path,
        host_path: message.host_path,
        readonly: message.readonly,
        recursive_read_only: message.recursive_read_only,
        propagation,
    })
}

fn devices(field: &Field<'_>, devices: Vec<v1::Device>) -> Result<Vec<Device>, Rejected> {
    at_most(field, devices.len(), MAX_DEVICES)?;
    devices.into_iter().enumerate().map(|(index, message)| device(&field.at(index), message)).collect()
}

fn device(field: &Field<'_>, message: v1::Device) -> Result<Device, Rejected> {
    let v1::Device { container_path, host_path, permissions } = message;
    let container_path = inside(&field.of("container_path"), container_path)?;
    absolute(&field.of("host_path"), &host_path)?;
    let entry = field.of("permissions");
    no_longer_than(&entry, &permissions, "rwm".len())?;
    let once = |letter: char| permissions.matches(letter).count() == 1;
    if permissions.is_empty() || !permissions.chars().all(|letter| "rwm".contains(letter) && once(letter)) {
        return Err(entry.invalid(format!("{} is not a combination of r, w and m", quoted(&permissions))));
    }
    Ok(Device { container_path, host_path, permissions })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use berth_model::security::{NamespaceMode, Namespaces};

    use super::*;

    fn asked() -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "web".into(), attempt: 2 }),
            image: Some(v1::ImageSpec {
                image: "sha256:abc".into(),
                user_specified_image: "nginx:latest".into(),
                ..Default::default()
            }),
            command: vec!["/bin/sh".into(), String::new()],
            args: vec!["-c".into(), "echo \n ä".into()],
            working_dir: "/srv".into(),
            envs: vec![
                v1::KeyValue { key: "A".into(), value: b"1=2".to_vec() },
                v1::KeyValue { key: "A".into(), value: vec![] },
            ],
            mounts: vec![v1::Mount {
                container_path: "/data".into(),
                host_path: "/srv/data".into(),
                readonly: true,
                recursive_read_only: true,
                selinux_relabel: true,
                ..Default::default()
            }],
            devices: vec![v1::Device {
                container_path: "/dev/fuse".into(),
                host_path: "/dev/fuse".into(),
                permissions: "mrw".into(),
            }],
            labels: BTreeMap::from([("a".into(), "b".into())]),
            annotations: BTreeMap::from([("c".into(), "d".into())]),
            log_path: "web/2.log".into(),
            stdin: true,
            stdin_once: true,
            tty: true,
            linux: Some(v1::LinuxContainerConfig {
                resources: Some(v1::LinuxContainerResources { cpu_shares: 2, ..Default::default() }),
                security_context: Some(v1::LinuxContainerSecurityContext {
                    readonly_rootfs: true,
                    ..Default::default()
                }),
            }),
            stop_signal: v1::Signal::Sigquit.into(),
            ..Default::default()
        }
    }

    fn convert(message: v1::ContainerConfig) -> Result<Config, Rejected> {
        container_config(message, &sandbox::Config::default(), SeLinux::On)
    }

    #[test]
    fn what_a_kubelet_asks_for_is_kept() {
        let config = convert(asked()).unwrap();
        let expected = Config {
            metadata: Metadata { name: "web".into(), attempt: 2 },
            image: "sha256:abc".into(),
            user_specified_image: "nginx:latest".into(),
            command: vec!["/bin/sh".into(), String::new()],
            args: vec!["-c".into(), "echo \n ä".into()],
            working_dir: "/srv".into(),
            envs: vec![("A".into(), "1=2".into()), ("A".into(), String::new())],
            mounts: vec![Mount {
                container_path: "/data".into(),
                host_path: "/srv/data".into(),
                readonly: true,
                recursive_read_only: true,
                propagation: Propagation::Private,
            }],
            devices: vec![Device {
                container_path: "/dev/fuse".into(),
                host_path: "/dev/fuse".into(),
                permissions: "mrw".into(),
            }],
            labels: asked().labels,
            annotations: asked().annotations,
            log_path: "web/2.log".into(),
            stdin: true,
            stdin_once: true,
            tty: true,
            stop_signal: Some(3),
            resources: config.resources.clone(),
            security: config.security.clone(),
        };
        assert_eq!(config, expected);
        assert_eq!(config.resources.cpu_shares, 2);
        assert!(config.security.readonly_rootfs);
    }

    #[test]
    fn a_name_and_an_image_are_enough() {
        let namespaces = Namespaces {
            network: NamespaceMode::Node,
            pid: NamespaceMode::Container,
            ..Namespaces::default()
        };
        let sandbox = sandbox::Config { namespaces: namespaces.clone(), ..sandbox::Config::default() };
        let message =
            v1::ContainerConfig { metadata: asked().metadata, image: asked().image, ..Default::default() };
        let config = container_config(message, &sandbox, SeLinux::On).unwrap();
        assert_eq!(config.security.namespaces, namespaces);
        assert_eq!(config.stop_signal, None);
    }

    #[test]
    fn propagation_travels() {
        for (number, expected) in
            [(0, Propagation::Private), (1, Propagation::HostToContainer), (2, Propagation::Bidirectional)]
        {
            let mut message = asked();
            message.mounts[0].recursive_read_only = false;
            message.mounts[0].propagation = number;
            assert_eq!(convert(message).unwrap().mounts[0].propagation, expected);
        }
    }

    type Change = fn(&mut v1::ContainerConfig);

    #[test]
    fn each_wrong_field_is_named() {
        let cases: &[(&str, Change)] = &[
            ("config.metadata", |m| m.metadata = None),
            ("config.metadata.name", |m| m.metadata.as_mut().unwrap().name.clear()),
            ("config.metadata.name", |m| m.metadata.as_mut().unwrap().name = "n".repeat(1025)),
            ("config.image", |m| m.image = None),
            ("config.image.image", |m| m.image.as_mut().unwrap().image.clear()),
            ("config.image.image", |m| m.image.as_mut().unwrap().image = "a\n".into()),
            ("config.image.user_specified_image", |m| {
                m.image.as_mut().unwrap().user_specified_image = "x".repeat(2000);
            }),
            ("config.command[1]", |m| m.command[1] = "a\0b".into()),
            ("config.args[0]", |m| m.args[0] = "\0".into()),
            ("config", |m| m.args = vec!["a".repeat(1 << 19); 3]),
            ("config", |m| m.args = vec![String::new(); (1 << 20) + 1]),
            ("config", |m| m.envs[0].value = vec![b'a'; 1 << 20]),
            ("config", |m| m.log_path = "a".repeat(8 << 20)),
            ("config.working_dir", |m| m.working_dir = "srv".into()),
            ("config.working_dir", |m| m.working_dir = "/srv\0".into()),
            ("config.envs[0].key", |m| m.envs[0].key.clear()),
            ("config.envs[1].key", |m| m.envs[1].key = "A=B".into()),
            ("config.envs[1].key", |m| m.envs[1].key = "A\0".into()),
            ("config.envs[0].value", |m| m.envs[0].value = b"a\0b".to_vec()),
            ("config.mounts", |m| m.mounts = vec![m.mounts[0].clone(); MAX_MOUNTS + 1]),
            ("config.mounts[0].container_path", |m| m.mounts[0].container_path.clear()),
            ("config.mounts[0].container_path", |m| m.mounts[0].container_path = "data".into()),
            ("config.mounts[0].container_path", |m| m.mounts[0].container_path = "/data/../../etc".into()),
            ("config.mounts[0].container_path", |m| m.mounts[0].container_path = "//.".into()),
            ("config.mounts[0].host_path", |m| m.mounts[0].host_path.clear()),
            ("config.mounts[0].host_path", |m| m.mounts[0].host_path = "srv".into()),
            ("config.mounts[0].host_path", |m| m.mounts[0].host_path = format!("/{}", "a/".repeat(3000))),
            ("config.mounts[0].propagation", |m| m.mounts[0].propagation = 3),
            ("config.mounts[0].recursive_read_only", |m| m.mounts[0].readonly = false),
            ("config.mounts[0].recursive_read_only", |m| m.mounts[0].propagation = 1),
            ("config.devices", |m| m.devices = vec![m.devices[0].clone(); MAX_DEVICES + 1]),
            ("config.devices[0].container_path", |m| m.devices[0].container_path = "/dev/../../mem".into()),
            ("config.devices[0].host_path", |m| m.devices[0].host_path = "fuse".into()),
            ("config.devices[0].permissions", |m| m.devices[0].permissions.clear()),
            ("config.devices[0].permissions", |m| m.devices[0].permissions = "rx".into()),
            ("config.devices[0].permissions", |m| m.devices[0].permissions = "rr".into()),
            ("config.devices[0].permissions", |m| m.devices[0].permissions = "rwmr".into()),
            ("config.devices[0].permissions", |m| m.devices[0].permissions = "RW".into()),
            ("config.labels", |m| drop(m.labels.insert("big".into(), "x".repeat(1 << 20)))),
            ("config.annotations", |m| drop(m.annotations.insert("big".into(), "x".repeat(1 << 20)))),
            ("config.log_path", |m| m.log_path = "/etc/passwd".into()),
            ("config.log_path", |m| m.log_path = "web/../../x".into()),
            ("config.log_path", |m| m.log_path = "web/".into()),
            ("config.log_path", |m| m.log_path = "a\0".into()),
            ("config.stop_signal", |m| m.stop_signal = 66),
            ("config.linux.resources.oom_score_adj", |m| {
                m.linux.as_mut().unwrap().resources.as_mut().unwrap().oom_score_adj = 1001;
            }),
            ("config.linux.security_context.run_as_group", |m| {
                m.linux.as_mut().unwrap().security_context.as_mut().unwrap().run_as_group =
                    Some(v1::Int64Value { value: 5 });
            }),
            ("config.linux.security_context.privileged", |m| {
                m.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
            }),
        ];
        for (index, (field, change)) in cases.iter().enumerate() {
            let mut message = asked();
            change(&mut message);
            match convert(message) {
                Err(Rejected::Invalid { field: found, reason }) => {
                    assert_eq!(&found, field, "case {index}: {reason}");
                    assert!(reason.len() < 1024, "case {index}: {} bytes", reason.len());
                }
                other => panic!("case {index}, {field}: {:?}", other.map(|_| ())),
            }
        }
    }

    #[test]
    fn what_is_not_offered_is_said_so() {
        let cases: &[(&str, Change)] = &[
            ("config.mounts[0].image", |m| m.mounts[0].image = Some(v1::ImageSpec::default())),
            ("config.mounts[0].image", |m| m.mounts[0].image_sub_path = "etc".into()),
            ("config.mounts[0].uid_mappings", |m| m.mounts[0].uid_mappings = vec![v1::IdMapping::default()]),
            ("config.mounts[0].uid_mappings", |m| m.mounts[0].gid_mappings = vec![v1::IdMapping::default()]),
            ("config.mounts[0].mount_options", |m| m.mounts[0].mount_options = vec!["noexec".into()]),
            ("config.cdi_devices", |m| m.cdi_devices = vec![v1::CdiDevice { name: "v/c=d".into() }]),
            ("config.annotations[\"cdi.k8s.io/x\"]", |m| {
                m.annotations.insert("cdi.k8s.io/x".into(), "v/c=d".into());
            }),
            ("config.envs[0].value", |m| m.envs[0].value = vec![0xff]),
            ("config.linux.security_context.namespace_options.userns_options", |m| {
                m.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options =
                    Some(v1::NamespaceOption {
                        userns_options: Some(v1::UserNamespace::default()),
                        ..Default::default()
                    });
            }),
        ];
        for (field, change) in cases {
            let mut message = asked();
            change(&mut message);
            match convert(message) {
                Err(Rejected::NotOffered { field: found, .. }) => assert_eq!(&found, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_largest_request_fits_a_record() {
        let path = format!("/{}", "\u{1}".repeat(4000));
        let mount = v1::Mount { container_path: path.clone(), host_path: path, ..Default::default() };
        let mut message = asked();
        message.mounts = vec![mount; MAX_MOUNTS];
        let config = convert(message.clone()).unwrap();
        let bytes = serde_json::to_vec(&config).unwrap().len() as u64;
        let most = berth_model::record::MAX_BYTES;
        assert!(bytes > most / 2 && bytes < most, "{bytes}: the case is near the limit, and below it");
        message.args = vec!["a".repeat(1 << 19)];
        assert!(convert(message).is_err(), "and there is no room beside it");
    }

    #[test]
    fn the_value_of_a_variable_is_in_no_message() {
        for value in [b"hunter2\0".to_vec(), b"hunter2\xff".to_vec()] {
            let mut message = asked();
            message.envs[0].value = value;
            let refused = format!("{:?}", convert(message).unwrap_err());
            assert!(!refused.contains("hunter2"), "{refused}");
        }
    }
}
