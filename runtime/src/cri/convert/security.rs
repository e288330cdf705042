//! Security contexts and namespaces: `LinuxSandboxSecurityContext` and `LinuxContainerSecurityContext` into [`berth_model::security`].

use super::field::{self, Field, Rejected, absolute_forward, at_most, quoted};
use berth_cri::v1;
use berth_cri::v1::security_profile::ProfileType;
use berth_model::sandbox;
use berth_model::security::{ContainerSecurity, NamespaceMode, Namespaces, Profile, User};
use berth_sys::credentials::{CAPABILITIES, capability_number};

/// The largest uid or gid: runc's and Kubernetes' limit. The kernel has one bit more, and keeps the very last number to itself.
const MAX_UID: u32 = i32::MAX.cast_unsigned();

/// The most supplementary groups: `NGROUPS_MAX` of <linux/limits.h>.
const MAX_GROUPS: usize = 65_536;

/// Paths in each of the two lists; the kubelet's own have about ten.
const MAX_PATHS: usize = 1024;

/// Entries in each list of capabilities: all names twice over.
const MAX_CAPABILITIES: usize = 2 * CAPABILITIES.len();

/// What Kubernetes puts before the name of a profile of the node's own.
const LOCALHOST: &str = "localhost/";

/// The namespaces of a sandbox. An absent message is one of zeros: everything the pod's.
pub(super) fn sandbox_namespaces(
    field: &Field<'_>,
    message: Option<&v1::NamespaceOption>,
) -> Result<Namespaces, Rejected> {
    let Some(message) = message else { return Ok(Namespaces::default()) };
    check_user_namespace(&field.of("userns_options"), message.userns_options.as_ref())?;
    let pid = mode(&field.of("pid"), message.pid)?;
    if pid == NamespaceMode::Target {
        return Err(field.of("pid").invalid("a sandbox has no other container to share with"));
    }
    no_target(field, message)?;
    Ok(Namespaces {
        network: pod_or_node(&field.of("network"), message.network)?,
        pid,
        ipc: pod_or_node(&field.of("ipc"), message.ipc)?,
        target_id: String::new(),
    })
}

/// The namespaces of a container in a sandbox that has `sandbox`.
///
/// Network and IPC are the sandbox's, and a message that says otherwise is refused. No message is none that says otherwise. Process ids "of
/// the pod" are those that the sandbox has: its shared ones, the host's, or, where every container has its own, the container's own.
fn container_namespaces(
    field: &Field<'_>,
    message: Option<&v1::NamespaceOption>,
    sandbox: &Namespaces,
) -> Result<Namespaces, Rejected> {
    let Some(message) = message else { return Ok(sandbox.clone()) };
    check_user_namespace(&field.of("userns_options"), message.userns_options.as_ref())?;
    for (name, asked, theirs) in
        [("network", message.network, sandbox.network), ("ipc", message.ipc, sandbox.ipc)]
    {
        let entry = field.of(name);
        if pod_or_node(&entry, asked)? != theirs {
            return Err(entry.invalid("it differs from the sandbox's"));
        }
    }
    let entry = field.of("pid");
    let (pid, target_id) = match mode(&entry, message.pid)? {
        NamespaceMode::Pod => (sandbox.pid, String::new()),
        NamespaceMode::Container => (NamespaceMode::Container, String::new()),
        NamespaceMode::Node if sandbox.pid == NamespaceMode::Node => (NamespaceMode::Node, String::new()),
        NamespaceMode::Node => return Err(entry.invalid("the host's process ids are not the sandbox's")),
        NamespaceMode::Target => {
            let target = field.of("target_id");
            if message.target_id.is_empty() {
                return Err(target.invalid("it is empty, and pid asks for a target"));
            }
            field::id(&target, &message.target_id)?;
            (NamespaceMode::Target, message.target_id.clone())
        }
    };
    if pid != NamespaceMode::Target {
        no_target(field, message)?;
    }
    Ok(Namespaces { network: sandbox.network, pid, ipc: sandbox.ipc, target_id })
}

fn no_target(field: &Field<'_>, message: &v1::NamespaceOption) -> Result<(), Rejected> {
    if !message.target_id.is_empty() {
        return Err(field.of("target_id").invalid("pid does not ask for a target"));
    }
    Ok(())
}

fn mode(field: &Field<'_>, number: i32) -> Result<NamespaceMode, Rejected> {
    match v1::NamespaceMode::try_from(number) {
        Ok(v1::NamespaceMode::Pod) => Ok(NamespaceMode::Pod),
        Ok(v1::NamespaceMode::Container) => Ok(NamespaceMode::Container),
        Ok(v1::NamespaceMode::Node) => Ok(NamespaceMode::Node),
        Ok(v1::NamespaceMode::Target) => Ok(NamespaceMode::Target),
        Err(_) => Err(field.invalid(format!("there is no namespace mode with the number {number}"))),
    }
}

fn pod_or_node(field: &Field<'_>, number: i32) -> Result<NamespaceMode, Rejected> {
    match mode(field, number)? {
        mode @ (NamespaceMode::Pod | NamespaceMode::Node) => Ok(mode),
        NamespaceMode::Container | NamespaceMode::Target => {
            Err(field.invalid("this namespace is the pod's or the node's"))
        }
    }
}

/// No user namespace, which is said by silence or by "the node's" without mappings.
fn check_user_namespace(field: &Field<'_>, message: Option<&v1::UserNamespace>) -> Result<(), Rejected> {
    let Some(message) = message else { return Ok(()) };
    match mode(&field.of("mode"), message.mode)? {
        NamespaceMode::Pod => Err(field.not_offered("user namespaces are")),
        NamespaceMode::Node if message.uids.is_empty() && message.gids.is_empty() => Ok(()),
        NamespaceMode::Node => Err(field.invalid("the node's user namespace takes no mappings")),
        NamespaceMode::Container | NamespaceMode::Target => {
            Err(field.of("mode").invalid("a user namespace is the pod's or the node's"))
        }
    }
}

/// `NamespaceOption` again, as a status repeats it.
#[must_use]
pub fn namespace_options(namespaces: &Namespaces) -> v1::NamespaceOption {
    let number = |mode: NamespaceMode| -> i32 {
        match mode {
            NamespaceMode::Pod => v1::NamespaceMode::Pod,
            NamespaceMode::Container => v1::NamespaceMode::Container,
            NamespaceMode::Node => v1::NamespaceMode::Node,
            NamespaceMode::Target => v1::NamespaceMode::Target,
        }
        .into()
    };
    v1::NamespaceOption {
        network: number(namespaces.network),
        pid: number(namespaces.pid),
        ipc: number(namespaces.ipc),
        target_id: namespaces.target_id.clone(),
        userns_options: None,
    }
}

/// What a sandbox's security context must not ask for. The rest of it is about a process of the sandbox's own.
pub(super) fn check_sandbox(
    field: &Field<'_>,
    message: &v1::LinuxSandboxSecurityContext,
) -> Result<(), Rejected> {
    check_selinux(&field.of("selinux_options"), message.selinux_options.as_ref())?;
    #[expect(deprecated, reason = "still on the wire; clients older than the message say it this way")]
    let path = &message.seccomp_profile_path;
    seccomp(field, message.seccomp.as_ref(), path)?;
    apparmor(field, message.apparmor.as_ref(), "")?;
    Ok(())
}

/// The security context of a container in `sandbox`. An absent message is one of zeros.
pub(super) fn container_security(
    field: &Field<'_>,
    message: Option<v1::LinuxContainerSecurityContext>,
    sandbox: &sandbox::Config,
) -> Result<ContainerSecurity, Rejected> {
    let message = message.unwrap_or_default();
    if message.privileged && !sandbox.privileged {
        return Err(field.of("privileged").invalid("the sandbox is not privileged"));
    }
    check_selinux(&field.of("selinux_options"), message.selinux_options.as_ref())?;
    #[expect(deprecated, reason = "still on the wire; clients older than the messages say it this way")]
    let (seccomp_path, apparmor_name) = (&message.seccomp_profile_path, &message.apparmor_profile);
    let seccomp = seccomp(field, message.seccomp.as_ref(), seccomp_path)?;
    let apparmor = apparmor(field, message.apparmor.as_ref(), apparmor_name)?;
    let user = user(field, &message)?;
    let namespaces = container_namespaces(
        &field.of("namespace_options"),
        message.namespace_options.as_ref(),
        &sandbox.namespaces,
    )?;
    let asked = message.capabilities.unwrap_or_default();
    let list = field.of("capabilities");
    Ok(ContainerSecurity {
        privileged: message.privileged,
        namespaces,
        user,
        add_capabilities: capabilities(&list.of("add_capabilities"), &asked.add_capabilities)?,
        drop_capabilities: capabilities(&list.of("drop_capabilities"), &asked.drop_capabilities)?,
        add_ambient_capabilities: capabilities(
            &list.of("add_ambient_capabilities"),
            &asked.add_ambient_capabilities,
        )?,
        readonly_rootfs: message.readonly_rootfs,
        no_new_privileges: message.no_new_privs,
        seccomp,
        apparmor,
        masked_paths: paths(&field.of("masked_paths"), message.masked_paths)?,
        readonly_paths: paths(&field.of("readonly_paths"), message.readonly_paths)?,
    })
}

fn check_selinux(field: &Field<'_>, message: Option<&v1::SeLinuxOption>) -> Result<(), Rejected> {
    match message {
        Some(options) if *options != v1::SeLinuxOption::default() => {
            Err(field.not_offered("SELinux options are"))
        }
        _ => Ok(()),
    }
}

/// The message wins over the string of old. Neither means no filter.
fn seccomp(
    parent: &Field<'_>,
    message: Option<&v1::SecurityProfile>,
    old: &str,
) -> Result<Profile, Rejected> {
    let field = parent.of("seccomp");
    let (field, profile) = match message {
        Some(message) => (field, profile(&field, message)?),
        None => {
            let field = parent.of("seccomp_profile_path");
            (field, old_profile(&field, old)?.unwrap_or_default())
        }
    };
    if let Profile::Localhost(file) = &profile {
        absolute_forward(&field, file)?;
    }
    Ok(profile)
}

/// The message wins over the string of old. Neither means the runtime's own profile, where the kernel has `AppArmor`.
fn apparmor(
    parent: &Field<'_>,
    message: Option<&v1::SecurityProfile>,
    old: &str,
) -> Result<Profile, Rejected> {
    let field = parent.of("apparmor");
    let (field, profile) = match message {
        Some(message) => (field, profile(&field, message)?),
        None => {
            let field = parent.of("apparmor_profile");
            (field, old_profile(&field, old)?.unwrap_or(Profile::RuntimeDefault))
        }
    };
    if let Profile::Localhost(name) = &profile {
        field::name(&field, name)?;
    }
    Ok(profile)
}

fn profile(field: &Field<'_>, message: &v1::SecurityProfile) -> Result<Profile, Rejected> {
    let profile = match ProfileType::try_from(message.profile_type) {
        Ok(ProfileType::RuntimeDefault) => Profile::RuntimeDefault,
        Ok(ProfileType::Unconfined) => Profile::Unconfined,
        Ok(ProfileType::Localhost) => {
            let text = message.localhost_ref.as_str();
            let name = text.strip_prefix(LOCALHOST).unwrap_or(text);
            return localhost(&field.of("localhost_ref"), name);
        }
        Err(_) => {
            return Err(field
                .of("profile_type")
                .invalid(format!("there is no profile type with the number {}", message.profile_type)));
        }
    };
    if !message.localhost_ref.is_empty() {
        return Err(field.of("localhost_ref").invalid("it is set, and the profile type is not Localhost"));
    }
    Ok(profile)
}

/// The strings before there was `SecurityProfile`; `None` for the empty one.
fn old_profile(field: &Field<'_>, text: &str) -> Result<Option<Profile>, Rejected> {
    match text {
        "" => Ok(None),
        "runtime/default" | "docker/default" => Ok(Some(Profile::RuntimeDefault)),
        "unconfined" => Ok(Some(Profile::Unconfined)),
        _ => match text.strip_prefix(LOCALHOST) {
            Some(name) => localhost(field, name).map(Some),
            None => Err(field.invalid(format!("{} is not a kind of profile", quoted(text)))),
        },
    }
}

fn localhost(field: &Field<'_>, name: &str) -> Result<Profile, Rejected> {
    if name.is_empty() {
        return Err(field.invalid("it names no profile"));
    }
    Ok(Profile::Localhost(name.to_owned()))
}

fn user(field: &Field<'_>, message: &v1::LinuxContainerSecurityContext) -> Result<User, Rejected> {
    let by_number = message
        .run_as_user
        .map(|value| user_number(&field.of("run_as_user"), value.value))
        .transpose()?
        .map(|number| number.to_string());
    let by_name = match message.run_as_username.as_str() {
        "" => None,
        text => Some(user_name(&field.of("run_as_username"), text)?),
    };
    if by_number.is_some() && by_name.is_some() {
        return Err(field.of("run_as_username").invalid("run_as_user is set too"));
    }
    let user = by_number.or(by_name);
    let group_field = field.of("run_as_group");
    let group = message.run_as_group.map(|value| user_number(&group_field, value.value)).transpose()?;
    if group.is_some() && user.is_none() {
        return Err(group_field.invalid("it is set, and neither run_as_user nor run_as_username is"));
    }
    let groups_field = field.of("supplemental_groups");
    at_most(&groups_field, message.supplemental_groups.len(), MAX_GROUPS)?;
    let supplementary_groups = message
        .supplemental_groups
        .iter()
        .enumerate()
        .map(|(index, number)| user_number(&groups_field.at(index), *number))
        .collect::<Result<_, _>>()?;
    let policy = message.supplemental_groups_policy;
    let merge_groups = match v1::SupplementalGroupsPolicy::try_from(policy) {
        Ok(v1::SupplementalGroupsPolicy::Merge) => true,
        Ok(v1::SupplementalGroupsPolicy::Strict) => false,
        Err(_) => {
            return Err(field
                .of("supplemental_groups_policy")
                .invalid(format!("there is no policy with the number {policy}")));
        }
    };
    Ok(User { user, group, supplementary_groups, merge_groups })
}

fn user_number(field: &Field<'_>, number: i64) -> Result<u32, Rejected> {
    u32::try_from(number)
        .ok()
        .filter(|number| *number <= MAX_UID)
        .ok_or_else(|| field.invalid(format!("{number} is not between 0 and {MAX_UID}")))
}

/// A name, or a number in digits, for the passwd file of the image. A colon would end the name and begin a group.
fn user_name(field: &Field<'_>, text: &str) -> Result<String, Rejected> {
    field::name(field, text)?;
    if text.contains(':') || text.chars().any(char::is_whitespace) {
        return Err(field.invalid(format!("{} is not a user name", quoted(text))));
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) && uid_of_digits(text).is_none() {
        return Err(field.invalid(format!("{} is not between 0 and {MAX_UID}", quoted(text))));
    }
    Ok(text.to_owned())
}

/// The uid that one to ten digits mean, and nothing else: Rust's own parser takes a sign.
pub(super) fn uid_of_digits(text: &str) -> Option<u32> {
    let digits = (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits {
        return None;
    }
    text.parse().ok().filter(|number| *number <= MAX_UID)
}

/// Names without `CAP_`, upper case, each once, or `ALL`.
///
/// A name that is not known is refused in each list: adding it cannot be done, and not taking it away would leave what was meant to go.
fn capabilities(field: &Field<'_>, names: &[String]) -> Result<Vec<String>, Rejected> {
    at_most(field, names.len(), MAX_CAPABILITIES)?;
    let mut known: Vec<String> = Vec::new();
    for (index, text) in names.iter().enumerate() {
        let name = if ["ALL", "CAP_ALL"].iter().any(|all| text.eq_ignore_ascii_case(all)) {
            "ALL"
        } else {
            capability_number(text)
                .and_then(|number| CAPABILITIES.get(usize::try_from(number).ok()?).copied())
                .ok_or_else(|| field.at(index).invalid(format!("there is no capability {}", quoted(text))))?
        };
        if !known.iter().any(|other| other == name) {
            known.push(name.to_owned());
        }
    }
    Ok(known)
}

fn paths(field: &Field<'_>, paths: Vec<String>) -> Result<Vec<String>, Rejected> {
    at_most(field, paths.len(), MAX_PATHS)?;
    for (index, path) in paths.iter().enumerate() {
        absolute_forward(&field.at(index), path)?;
    }
    Ok(paths)
}
