//! The main process of a container: its program, directory, limits and privileges.

use std::path::PathBuf;

use berth_model::limit::MAX_PATH_BYTES;
use berth_model::security::Profile;
use oci_spec::runtime::{Process, Spec, User};

use super::{Inputs, SpecError, capabilities, environment};

/// The umask of every container, independent of the daemon's.
const UMASK: u32 = 0o022;

/// The kernel's name for "no profile": requested as a profile, it would bypass the
/// check of the field.
const NO_PROFILE: &str = "unconfined";

pub(super) fn of_container(inputs: &Inputs<'_>) -> Result<Process, SpecError> {
    let config = inputs.config;
    let security = &config.security;
    let (args, env) = (args(inputs)?, environment::of_container(inputs)?);
    environment::check_total(&args, &env)?;

    let mut process = Process::default();
    process
        .set_terminal(Some(config.tty))
        .set_user(user(inputs))
        .set_args(Some(args))
        .set_env(Some(env))
        .set_cwd(working_directory(inputs)?)
        .set_capabilities(Some(capabilities::of_container(security, inputs.host.bounding)?))
        .set_rlimits(Some(inputs.rlimits.to_vec()))
        .set_no_new_privileges(Some(security.no_new_privileges))
        .set_apparmor_profile(apparmor_profile(inputs)?)
        .set_oom_score_adj(i32::try_from(config.resources.oom_score_adj).ok());
    Ok(process)
}

/// CRI `command` is the entrypoint and `args` its arguments: a command overrides both of the
/// image's, arguments alone only its `Cmd`.
fn args(inputs: &Inputs<'_>) -> Result<Vec<String>, SpecError> {
    let (config, image) = (inputs.config, inputs.image);
    let entrypoint = ("command", &config.command);
    let cmd = ("args", &config.args);
    let image_entrypoint = ("the image's Entrypoint", &image.entrypoint);
    let image_cmd = ("the image's Cmd", &image.cmd);
    let parts = match (config.command.is_empty(), config.args.is_empty()) {
        (false, _) => [entrypoint, cmd],
        (true, false) => [image_entrypoint, cmd],
        (true, true) => [image_entrypoint, image_cmd],
    };
    let mut all = Vec::new();
    for (origin, texts) in parts {
        for text in texts {
            environment::check(origin, text)?;
            all.push(text.clone());
        }
    }
    // An empty program name is not refused before execve(2), which reports a missing file.
    if all.first().is_none_or(String::is_empty) { Err(SpecError::NoCommand) } else { Ok(all) }
}

/// Kept as is, including `..` and links: it is resolved inside the container's root, and the shim
/// makes sure that the result is inside (CVE-2024-21626).
fn working_directory(inputs: &Inputs<'_>) -> Result<PathBuf, SpecError> {
    let (origin, text) = match (inputs.config.working_dir.as_str(), inputs.image.working_dir.as_str()) {
        ("", "") => return Ok(PathBuf::from("/")),
        ("", image) => ("the image's WorkingDir", image),
        (asked, _) => ("working_dir", asked),
    };
    if text.len() > MAX_PATH_BYTES {
        return Err(SpecError::PathTooLong { origin, length: text.len() });
    }
    if !text.starts_with('/') || text.contains('\0') {
        return Err(SpecError::Path { origin, path: text.to_owned() });
    }
    Ok(PathBuf::from(text))
}

/// The profile to change to on exec. A privileged container only has one that it names itself.
fn apparmor_profile(inputs: &Inputs<'_>) -> Result<Option<String>, SpecError> {
    let (security, host) = (&inputs.config.security, inputs.host);
    match &security.apparmor {
        Profile::Unconfined => Ok(None),
        Profile::RuntimeDefault if security.privileged || !host.apparmor => Ok(None),
        Profile::RuntimeDefault => inputs
            .default_apparmor_profile
            .map(|name| Some(name.to_owned()))
            .ok_or(SpecError::NoDefaultAppArmor),
        Profile::Localhost(name) if !host.apparmor => Err(SpecError::NoAppArmor(name.clone())),
        Profile::Localhost(name) => {
            // The name becomes part of a kernel command, `exec <name>`.
            let odd = name.is_empty() || name == NO_PROFILE || name.chars().any(char::is_control);
            if odd { Err(SpecError::AppArmorProfile(name.clone())) } else { Ok(Some(name.clone())) }
        }
    }
}

/// As far as known before the container's passwd file has been read; [`set_user`] adds the rest.
fn user(inputs: &Inputs<'_>) -> User {
    let asked = &inputs.config.security.user;
    let text = asked.user.as_deref().unwrap_or(&inputs.image.user);
    let (name, group) = text.split_once(':').unwrap_or((text, ""));
    let mut user = User::default();
    user.set_uid(name.parse().unwrap_or_default())
        .set_gid(asked.group.or_else(|| group.parse().ok()).unwrap_or_default())
        .set_umask(Some(UMASK))
        .set_additional_gids(Some(asked.supplementary_groups.clone()));
    user
}

/// Sets the actual user of the process, from the shim's report.
pub fn set_user(spec: &mut Spec, uid: u32, gid: u32, groups: &[u32]) {
    if let Some(process) = spec.process_mut() {
        process.user_mut().set_uid(uid).set_gid(gid).set_additional_gids(Some(groups.to_vec()));
    }
}
