//! Security contexts and namespaces: `LinuxSandboxSecurityContext` and
//! `LinuxContainerSecurityContext` into [`berth_model::security`].

use berth_cri::v1;
use berth_cri::v1::security_profile::ProfileType;
use berth_model::sandbox;
use berth_model::security::{ContainerSecurity, NamespaceMode, Namespaces, Profile, User};
use berth_sys::credentials::{CAPABILITIES, capability_number};

use super::field::{self, Field, Rejected, absolute_forward, at_most, inside, quoted};

/// Whether the node's kernel has SELinux enabled. If not, SELinux options have no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeLinux {
    /// Disabled or absent.
    Off,
    /// Enforcing or permissive.
    On,
}

/// The largest uid or gid: runc's and Kubernetes' limit. The kernel has one bit more, and reserves
/// the last number.
const MAX_UID: u32 = i32::MAX.cast_unsigned();

/// The most supplementary groups: `NGROUPS_MAX` of <linux/limits.h>.
const MAX_GROUPS: usize = 65_536;

/// Limit on paths in each of the two lists; the kubelet's own have about ten.
const MAX_PATHS: usize = 1024;

/// Limit on entries in each list of capabilities: twice the number of names.
const MAX_CAPABILITIES: usize = 2 * CAPABILITIES.len();

/// Kubernetes' prefix of a profile on the node.
const LOCALHOST: &str = "localhost/";

/// The namespaces of a sandbox. An absent message counts as zeros: all namespaces are the pod's.
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

/// The namespaces of a container in a sandbox with the namespaces `sandbox`.
///
/// Network and IPC are the sandbox's, and a message that says otherwise is refused. An absent
/// message does not say otherwise. The pid namespace "of the pod" is the sandbox's: its shared one,
/// the host's, or, if every container has its own, the container's own.
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
            return Err(entry.invalid("differs from the sandbox's"));
        }
    }
    let entry = field.of("pid");
    let (pid, target_id) = match mode(&entry, message.pid)? {
        NamespaceMode::Pod => (sandbox.pid, String::new()),
        NamespaceMode::Container => (NamespaceMode::Container, String::new()),
        NamespaceMode::Node if sandbox.pid == NamespaceMode::Node => (NamespaceMode::Node, String::new()),
        NamespaceMode::Node => return Err(entry.invalid("the sandbox is not in the host's pid namespace")),
        NamespaceMode::Target => {
            let target = field.of("target_id");
            if message.target_id.is_empty() {
                return Err(target.invalid("required, because pid is TARGET"));
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
        return Err(field.of("target_id").invalid("set, but pid is not TARGET"));
    }
    Ok(())
}

fn mode(field: &Field<'_>, number: i32) -> Result<NamespaceMode, Rejected> {
    match v1::NamespaceMode::try_from(number) {
        Ok(v1::NamespaceMode::Pod) => Ok(NamespaceMode::Pod),
        Ok(v1::NamespaceMode::Container) => Ok(NamespaceMode::Container),
        Ok(v1::NamespaceMode::Node) => Ok(NamespaceMode::Node),
        Ok(v1::NamespaceMode::Target) => Ok(NamespaceMode::Target),
        Err(_) => Err(field.invalid(format!("unknown namespace mode {number}"))),
    }
}

fn pod_or_node(field: &Field<'_>, number: i32) -> Result<NamespaceMode, Rejected> {
    match mode(field, number)? {
        mode @ (NamespaceMode::Pod | NamespaceMode::Node) => Ok(mode),
        NamespaceMode::Container | NamespaceMode::Target => {
            Err(field.invalid("the mode must be POD or NODE"))
        }
    }
}

/// Checks that no user namespace is requested: absent, or NODE without mappings.
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

/// Converts back to `NamespaceOption`, for a status.
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

/// The AppArmor profile of a sandbox, if its security context is acceptable. The rest of
/// it is about a process of the sandbox itself, which has fewer privileges than any request.
pub(super) fn sandbox_apparmor(
    field: &Field<'_>,
    message: &v1::LinuxSandboxSecurityContext,
    selinux: SeLinux,
) -> Result<Profile, Rejected> {
    check_selinux(&field.of("selinux_options"), message.selinux_options.as_ref(), selinux)?;
    #[expect(deprecated, reason = "still on the wire; clients older than the message say it this way")]
    let path = &message.seccomp_profile_path;
    seccomp(field, message.seccomp.as_ref(), path)?;
    apparmor(field, message.apparmor.as_ref(), "")
}

/// The security context of a container in `sandbox`. An absent message counts as zeros.
pub(super) fn container_security(
    field: &Field<'_>,
    message: Option<v1::LinuxContainerSecurityContext>,
    sandbox: &sandbox::Config,
    selinux: SeLinux,
) -> Result<ContainerSecurity, Rejected> {
    let message = message.unwrap_or_default();
    if message.privileged && !sandbox.privileged {
        return Err(field.of("privileged").invalid("the sandbox is not privileged"));
    }
    check_selinux(&field.of("selinux_options"), message.selinux_options.as_ref(), selinux)?;
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

/// Any options are accepted where SELinux is off: the kernel enforces none of them, and pods for
/// all kinds of nodes have them.
fn check_selinux(
    field: &Field<'_>,
    message: Option<&v1::SeLinuxOption>,
    selinux: SeLinux,
) -> Result<(), Rejected> {
    match message {
        Some(options) if selinux == SeLinux::On && *options != v1::SeLinuxOption::default() => {
            Err(field.not_offered("SELinux is enabled, and its options are"))
        }
        _ => Ok(()),
    }
}

/// The message wins over the deprecated string. Neither means no filter.
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

/// The message wins over the deprecated string. Neither means the runtime's default profile, where
/// the kernel has `AppArmor`.
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
                .invalid(format!("unknown profile type {}", message.profile_type)));
        }
    };
    if !message.localhost_ref.is_empty() {
        return Err(field.of("localhost_ref").invalid("set, but the profile type is not Localhost"));
    }
    Ok(profile)
}

/// The deprecated strings from before `SecurityProfile`; `None` for an empty one.
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
        return Err(field.invalid("does not name a profile"));
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
        return Err(field.of("run_as_username").invalid("run_as_user is set as well"));
    }
    let user = by_number.or(by_name);
    let group_field = field.of("run_as_group");
    let group = message.run_as_group.map(|value| user_number(&group_field, value.value)).transpose()?;
    if group.is_some() && user.is_none() {
        return Err(group_field.invalid("requires run_as_user or run_as_username"));
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
            return Err(field.of("supplemental_groups_policy").invalid(format!("unknown policy {policy}")));
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

/// A name, or a number in digits, for the passwd file of the image. A colon would end the name and
/// begin a group.
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

/// A uid of one to ten digits: Rust's own parser would accept a sign.
pub(super) fn uid_of_digits(text: &str) -> Option<u32> {
    let digits = (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits {
        return None;
    }
    text.parse().ok().filter(|number| *number <= MAX_UID)
}

/// Names without `CAP_`, upper case, each once, or `ALL`.
///
/// An unknown name is refused in every list: it cannot be added, and not dropping it would
/// leave a capability that was meant to be dropped.
fn capabilities(field: &Field<'_>, names: &[String]) -> Result<Vec<String>, Rejected> {
    at_most(field, names.len(), MAX_CAPABILITIES)?;
    let mut known: Vec<String> = Vec::new();
    for (index, text) in names.iter().enumerate() {
        let name = if ["ALL", "CAP_ALL"].iter().any(|all| text.eq_ignore_ascii_case(all)) {
            "ALL"
        } else {
            capability_number(text)
                .and_then(|number| CAPABILITIES.get(usize::try_from(number).ok()?).copied())
                .ok_or_else(|| field.at(index).invalid(format!("unknown capability {}", quoted(text))))?
        };
        if !known.iter().any(|other| other == name) {
            known.push(name.to_owned());
        }
    }
    Ok(known)
}

fn paths(field: &Field<'_>, paths: Vec<String>) -> Result<Vec<String>, Rejected> {
    at_most(field, paths.len(), MAX_PATHS)?;
    // The root itself cannot be hidden.
    paths.into_iter().enumerate().map(|(index, path)| inside(&field.at(index), path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> v1::LinuxContainerSecurityContext {
        v1::LinuxContainerSecurityContext::default()
    }

    fn checked(message: v1::LinuxContainerSecurityContext) -> Result<ContainerSecurity, Rejected> {
        container_security(&Field::root("s"), Some(message), &sandbox::Config::default(), SeLinux::On)
    }

    fn value(value: i64) -> Option<v1::Int64Value> {
        Some(v1::Int64Value { value })
    }

    fn profile_of(profile_type: i32, localhost_ref: &str) -> Option<v1::SecurityProfile> {
        Some(v1::SecurityProfile { profile_type, localhost_ref: localhost_ref.into() })
    }

    #[test]
    fn selinux_options_are_taken_where_the_kernel_has_it_off() {
        let options = v1::SeLinuxOption {
            user: "system_u".into(),
            role: "system_r".into(),
            r#type: "spc_t".into(),
            level: "s0:c123,c456".into(),
        };
        let message = v1::LinuxContainerSecurityContext { selinux_options: Some(options), ..context() };
        let asked = |selinux| {
            container_security(&Field::root("s"), Some(message.clone()), &sandbox::Config::default(), selinux)
        };
        assert_eq!(asked(SeLinux::Off), checked(context()), "and have no effect");
        assert!(matches!(asked(SeLinux::On), Err(Rejected::NotOffered { .. })));
    }

    #[test]
    fn an_absent_context_is_one_of_zeros() {
        let found = container_security(&Field::root("s"), None, &sandbox::Config::default(), SeLinux::On);
        let expected = ContainerSecurity {
            user: User { merge_groups: true, ..User::default() },
            apparmor: Profile::RuntimeDefault,
            ..ContainerSecurity::default()
        };
        assert_eq!(found, Ok(expected));
        assert_eq!(checked(context()), found);
    }

    #[test]
    fn a_seccomp_profile_is_the_message_then_the_string_then_none() {
        let file = |path: &str| Some(Profile::Localhost(path.into()));
        let cases: &[(Option<v1::SecurityProfile>, &str, Option<Profile>)] = &[
            (None, "", Some(Profile::Unconfined)),
            (profile_of(0, ""), "", Some(Profile::RuntimeDefault)),
            (profile_of(1, ""), "", Some(Profile::Unconfined)),
            (profile_of(2, "/p/a.json"), "", file("/p/a.json")),
            (profile_of(2, "localhost//p/a.json"), "", file("/p/a.json")),
            (profile_of(0, ""), "unconfined", Some(Profile::RuntimeDefault)),
            (profile_of(1, ""), "nonsense", Some(Profile::Unconfined)),
            (profile_of(2, ""), "", None),
            (profile_of(2, "localhost/"), "", None),
            (profile_of(2, "a.json"), "", None),
            (profile_of(2, "localhost/a.json"), "", None),
            (profile_of(2, "/p/../../etc/shadow"), "", None),
            (profile_of(2, "/p\0"), "", None),
            (profile_of(0, "/p/a.json"), "", None),
            (profile_of(1, "/p/a.json"), "", None),
            (profile_of(3, ""), "", None),
            (profile_of(-1, ""), "", None),
            (None, "runtime/default", Some(Profile::RuntimeDefault)),
            (None, "docker/default", Some(Profile::RuntimeDefault)),
            (None, "unconfined", Some(Profile::Unconfined)),
            (None, "localhost//p/a.json", file("/p/a.json")),
            (None, "localhost/a.json", None),
            (None, "localhost/", None),
            (None, "Unconfined", None),
            (None, "/p/a.json", None),
        ];
        for (message, old, expected) in cases {
            let found = seccomp(&Field::root("s"), message.as_ref(), old).ok();
            assert_eq!(&found, expected, "{message:?} {old:?}");
        }
    }

    #[test]
    fn an_apparmor_profile_is_the_message_then_the_string_then_the_default() {
        let named = |name: &str| Some(Profile::Localhost(name.into()));
        let cases: &[(Option<v1::SecurityProfile>, &str, Option<Profile>)] = &[
            (None, "", Some(Profile::RuntimeDefault)),
            (profile_of(0, ""), "unconfined", Some(Profile::RuntimeDefault)),
            (profile_of(1, ""), "runtime/default", Some(Profile::Unconfined)),
            (profile_of(2, "mine"), "localhost/other", named("mine")),
            (profile_of(2, "localhost/mine"), "", named("mine")),
            (None, "localhost/mine", named("mine")),
            (None, "unconfined", Some(Profile::Unconfined)),
            (None, "mine", None),
            (profile_of(2, ""), "localhost/mine", None),
            (profile_of(2, "a\nb"), "", None),
            (profile_of(0, "mine"), "", None),
        ];
        for (message, old, expected) in cases {
            let found = apparmor(&Field::root("s"), message.as_ref(), old).ok();
            assert_eq!(&found, expected, "{message:?} {old:?}");
        }
    }

    #[test]
    fn a_user_is_a_number_or_a_name_and_a_group_needs_one() {
        // run_as_user, run_as_username, run_as_group -> user and group
        type Expected = Option<(Option<&'static str>, Option<u32>)>;
        let cases: &[(Option<i64>, &str, Option<i64>, Expected)] = &[
            (None, "", None, Some((None, None))),
            (Some(0), "", None, Some((Some("0"), None))),
            (Some(2_147_483_647), "", Some(2_147_483_647), Some((Some("2147483647"), Some(2_147_483_647)))),
            (None, "www-data", Some(33), Some((Some("www-data"), Some(33)))),
            (None, "1000", None, Some((Some("1000"), None))),
            (None, "+1000", None, Some((Some("+1000"), None))),
            (Some(2_147_483_648), "", None, None),
            (Some(4_294_967_296), "", None, None),
            (Some(-1), "", None, None),
            (Some(i64::MIN), "", None, None),
            (None, "", Some(0), None),
            (Some(1), "", Some(-1), None),
            (Some(1), "", Some(4_294_967_295), None),
            (Some(1), "root", None, None),
            (None, "www-data:0", None, None),
            (None, "a b", None, None),
            (None, "a\n", None, None),
            (None, "a\0", None, None),
            (None, "4294967296", None, None),
            (None, "99999999999999999999", None, None),
        ];
        for (number, name, group, expected) in cases {
            let found = checked(v1::LinuxContainerSecurityContext {
                run_as_user: number.and_then(value),
                run_as_username: (*name).into(),
                run_as_group: group.and_then(value),
                ..context()
            });
            let found =
                found.as_ref().ok().map(|security| (security.user.user.as_deref(), security.user.group));
            assert_eq!(found, *expected, "{number:?} {name:?} {group:?}");
        }
    }

    #[test]
    fn digits_are_a_uid_and_nothing_like_them_is() {
        let cases = [
            ("0", Some(0)),
            ("0000000007", Some(7)),
            ("2147483647", Some(2_147_483_647)),
            ("2147483648", None),
            ("4294967296", None),
            ("00000000007", None),
            ("", None),
            ("+1", None),
            ("-1", None),
            (" 1", None),
            ("1_000", None),
            ("0x1", None),
            ("١", None),
        ];
        for (text, expected) in cases {
            assert_eq!(uid_of_digits(text), expected, "{text:?}");
        }
    }

    #[test]
    fn groups_and_their_policy_are_checked() {
        let of = |groups: Vec<i64>, policy: i32| {
            checked(v1::LinuxContainerSecurityContext {
                supplemental_groups: groups,
                supplemental_groups_policy: policy,
                ..context()
            })
            .map(|security| (security.user.supplementary_groups, security.user.merge_groups))
        };
        assert_eq!(of(vec![5, 0, 5], 0), Ok((vec![5, 0, 5], true)));
        assert_eq!(of(vec![], 1), Ok((vec![], false)));
        for (groups, policy) in [
            (vec![], 2),
            (vec![], -1),
            (vec![-1], 0),
            (vec![1 << 31], 0),
            (vec![i64::MAX], 1),
            (vec![1; 65_537], 0),
        ] {
            assert!(of(groups.clone(), policy).is_err(), "{policy} {} groups", groups.len());
        }
    }

    #[test]
    fn capabilities_have_one_spelling_afterwards() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            capabilities(&Field::root("c"), &names)
        };
        assert_eq!(of(&[]).unwrap(), Vec::<String>::new());
        assert_eq!(
            of(&["NET_ADMIN", "cap_net_admin", "Cap_Sys_Time", "all", "CAP_ALL"]).unwrap(),
            ["NET_ADMIN", "SYS_TIME", "ALL"]
        );
        for bad in ["", "CAP_", "NET_ADMINN", "CAP_CAP_CHOWN", "NET ADMIN", "NET_ADMIN\0", "0", "ALL "] {
            assert!(of(&["CHOWN", bad]).unwrap_err().to_string().starts_with("c[1]: "), "{bad:?}");
        }
        assert!(of(&vec!["CHOWN"; MAX_CAPABILITIES + 1]).is_err());
    }

    #[test]
    fn every_list_of_capabilities_is_looked_at() {
        let bad = || vec!["NONSENSE".to_owned()];
        let cases = [
            ("add_capabilities", v1::Capability { add_capabilities: bad(), ..Default::default() }),
            ("drop_capabilities", v1::Capability { drop_capabilities: bad(), ..Default::default() }),
            (
                "add_ambient_capabilities",
                v1::Capability { add_ambient_capabilities: bad(), ..Default::default() },
            ),
        ];
        for (name, list) in cases {
            let refused =
                checked(v1::LinuxContainerSecurityContext { capabilities: Some(list), ..context() })
                    .unwrap_err();
            assert!(refused.to_string().starts_with(&format!("s.capabilities.{name}[0]: ")), "{refused}");
        }
    }

    #[test]
    fn privileges_selinux_and_paths_are_checked() {
        assert!(checked(v1::LinuxContainerSecurityContext { privileged: true, ..context() }).is_err());
        let allowing = sandbox::Config { privileged: true, ..sandbox::Config::default() };
        let message = v1::LinuxContainerSecurityContext {
            privileged: true,
            masked_paths: vec!["/proc/kcore".into()],
            seccomp: profile_of(0, ""),
            ..context()
        };
        let security = container_security(&Field::root("s"), Some(message), &allowing, SeLinux::On).unwrap();
        assert!(security.privileged);
        assert_eq!(security.masked_paths, ["/proc/kcore"], "kept as asked");
        assert_eq!(security.seccomp, Profile::RuntimeDefault, "kept as asked");

        let options = v1::SeLinuxOption { r#type: "spc_t".into(), ..Default::default() };
        let refused =
            checked(v1::LinuxContainerSecurityContext { selinux_options: Some(options), ..context() });
        assert!(matches!(refused, Err(Rejected::NotOffered { .. })), "{refused:?}");

        for bad in ["", "proc/kcore", "/proc/../../etc", "/proc/..", "/proc\0", "/", "//", "/."] {
            let masked = v1::LinuxContainerSecurityContext { masked_paths: vec![bad.into()], ..context() };
            let readonly =
                v1::LinuxContainerSecurityContext { readonly_paths: vec![bad.into()], ..context() };
            assert!(checked(masked).is_err(), "masked {bad:?}");
            assert!(checked(readonly).is_err(), "readonly {bad:?}");
        }
        let many = vec!["/a".into(); MAX_PATHS + 1];
        assert!(checked(v1::LinuxContainerSecurityContext { masked_paths: many, ..context() }).is_err());
    }

    #[test]
    fn a_container_has_the_namespaces_of_its_sandbox() {
        use NamespaceMode::{Container, Node, Pod, Target};
        // Of the sandbox: network, pid, ipc. Of the message: the same as numbers, and the target.
        // Then the pid mode that comes out.
        type Case = ([NamespaceMode; 3], [i32; 3], &'static str, Option<NamespaceMode>);
        let cases: &[Case] = &[
            ([Pod, Pod, Pod], [0, 0, 0], "", Some(Pod)),
            ([Pod, Container, Pod], [0, 1, 0], "", Some(Container)),
            ([Pod, Pod, Pod], [0, 1, 0], "", Some(Container)),
            ([Node, Node, Node], [2, 2, 2], "", Some(Node)),
            ([Node, Container, Pod], [2, 1, 0], "", Some(Container)),
            ([Pod, Container, Pod], [0, 3, 0], "abc", Some(Target)),
            // "The pod's" is what the sandbox has.
            ([Pod, Container, Pod], [0, 0, 0], "", Some(Container)),
            ([Pod, Node, Pod], [0, 0, 0], "", Some(Node)),
            // The host's only where the sandbox has it too.
            ([Pod, Pod, Pod], [2, 0, 0], "", None),
            ([Pod, Pod, Pod], [0, 2, 0], "", None),
            ([Pod, Container, Pod], [0, 2, 0], "", None),
            ([Pod, Pod, Pod], [0, 0, 2], "", None),
            ([Node, Pod, Pod], [0, 0, 0], "", None),
            ([Pod, Pod, Node], [0, 0, 0], "", None),
            ([Pod, Pod, Pod], [1, 0, 0], "", None),
            ([Pod, Pod, Pod], [0, 0, 3], "", None),
            ([Pod, Pod, Pod], [0, 4, 0], "", None),
            ([Pod, Pod, Pod], [-1, 0, 0], "", None),
            ([Pod, Pod, Pod], [0, 3, 0], "", None),
            ([Pod, Pod, Pod], [0, 3, 0], "a\n", None),
            ([Pod, Pod, Pod], [0, 1, 0], "abc", None),
        ];
        for ([network, pid, ipc], [asked_network, asked_pid, asked_ipc], target, expected) in cases {
            let of_sandbox = Namespaces { network: *network, pid: *pid, ipc: *ipc, target_id: String::new() };
            let message = v1::NamespaceOption {
                network: *asked_network,
                pid: *asked_pid,
                ipc: *asked_ipc,
                target_id: (*target).into(),
                userns_options: None,
            };
            let found = container_namespaces(&Field::root("n"), Some(&message), &of_sandbox);
            let expected =
                expected.map(|pid| Namespaces { pid, target_id: (*target).into(), ..of_sandbox.clone() });
            assert_eq!(found.ok(), expected, "{of_sandbox:?} {message:?}");
        }
    }

    #[test]
    fn silence_about_namespaces_means_the_sandboxs() {
        let of_sandbox = Namespaces {
            network: NamespaceMode::Node,
            pid: NamespaceMode::Container,
            ipc: NamespaceMode::Node,
            target_id: String::new(),
        };
        assert_eq!(container_namespaces(&Field::root("n"), None, &of_sandbox), Ok(of_sandbox));
    }

    #[test]
    fn namespaces_are_echoed() {
        for [network, pid, ipc] in [[0, 0, 0], [2, 1, 0], [0, 2, 2], [2, 2, 2]] {
            let message = v1::NamespaceOption { network, pid, ipc, ..Default::default() };
            let namespaces = sandbox_namespaces(&Field::root("n"), Some(&message)).unwrap();
            assert_eq!(namespace_options(&namespaces), message);
        }
        let target =
            Namespaces { pid: NamespaceMode::Target, target_id: "abc".into(), ..Namespaces::default() };
        let message = namespace_options(&target);
        assert_eq!((message.pid, message.target_id.as_str()), (3, "abc"));
    }
}
