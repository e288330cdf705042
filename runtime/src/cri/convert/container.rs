//! `ContainerConfig` into [`container::Config`](Config).

use super::field::{
    self, Field, Rejected, absolute, at_most, below_the_root, no_longer_than, no_nul, quoted, relative_file,
};
use super::{resources, sandbox as sandbox_side, security, signal};
use berth_cri::v1;
use berth_model::container::{Config, Device, Metadata, Mount, Propagation};
use berth_model::sandbox;

/// Mounts of one container.
const MAX_MOUNTS: usize = 1024;

/// Devices of one container.
const MAX_DEVICES: usize = 1024;

/// Command, arguments and environment together, in bytes with their NULs. The kernel takes a quarter of the stack's limit, 2 MiB mostly,
/// and needs some of it for pointers.
const MAX_COMMAND_BYTES: usize = 1 << 20;

/// Annotations that ask for CDI devices, from before there was a field for them.
const CDI_ANNOTATION: &str = "cdi.k8s.io/";

/// The container asked for by `CreateContainerRequest`, in the sandbox that exists.
///
/// # Errors
/// [`Rejected`], with the first field that is wrong.
pub fn container_config(message: v1::ContainerConfig, sandbox: &sandbox::Config) -> Result<Config, Rejected> {
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
        )?,
    })
}

fn metadata(field: &Field<'_>, message: Option<v1::ContainerMetadata>) -> Result<Metadata, Rejected> {
    let v1::ContainerMetadata { name, attempt } = message.ok_or_else(|| field.invalid("it is missing"))?;
    field::name(&field.of("name"), &name)?;
    Ok(Metadata { name, attempt })
}

/// The image, and what the user called it.
fn image(field: &Field<'_>, message: Option<v1::ImageSpec>) -> Result<(String, String), Rejected> {
    let message = message.ok_or_else(|| field.invalid("it is missing"))?;
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
            "command, args and envs have {bytes} bytes, and at most {MAX_COMMAND_BYTES} are accepted"
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

/// Values are often secrets: no message repeats one.
fn environment(field: &Field<'_>, envs: Vec<v1::KeyValue>) -> Result<Vec<(String, String)>, Rejected> {
    envs.into_iter()
        .enumerate()
        .map(|(index, v1::KeyValue { key, value })| {
            let entry = field.at(index);
            if key.is_empty() || key.contains(['=', '\0']) {
                return Err(entry.of("key").invalid(format!("{} is not a variable's name", quoted(&key))));
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
    below_the_root(&field.of("container_path"), &message.container_path)?;
    absolute(&field.of("host_path"), &message.host_path)?;
    let propagation = match v1::MountPropagation::try_from(message.propagation) {
        Ok(v1::MountPropagation::PropagationPrivate) => Propagation::Private,
        Ok(v1::MountPropagation::PropagationHostToContainer) => Propagation::HostToContainer,
        Ok(v1::MountPropagation::PropagationBidirectional) => Propagation::Bidirectional,
        Err(_) => {
            return Err(field
                .of("propagation")
                .invalid(format!("there is no propagation with the number {}", message.propagation)));
        }
    };
    if message.recursive_read_only {
        let entry = field.of("recursive_read_only");
        if !message.readonly {
            return Err(entry.invalid("it needs readonly"));
        }
        if propagation != Propagation::Private {
            return Err(entry.invalid("it needs private propagation"));
        }
    }
    Ok(Mount {
        container_path: message.container_path,
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
    below_the_root(&field.of("container_path"), &container_path)?;
    absolute(&field.of("host_path"), &host_path)?;
    let entry = field.of("permissions");
    no_longer_than(&entry, &permissions, "rwm".len())?;
    let once = |letter: char| permissions.matches(letter).count() == 1;
    if permissions.is_empty() || !permissions.chars().all(|letter| "rwm".contains(letter) && once(letter)) {
        return Err(entry.invalid(format!("{} is not some of r, w and m", quoted(&permissions))));
    }
    Ok(Device { container_path, host_path, permissions })
}
