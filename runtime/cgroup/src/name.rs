//! Names: which driver arranges them, and what a parent and a leaf look like with it.
//!
//! | driver | parent | leaf |
//! |---|---|---|
//! | cgroupfs | `/kubepods/burstable/pod1`, as CRI `LinuxPodSandboxConfig.cgroup_parent` has it | `<id>` |
//! | systemd | `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice`, from the last element of the same field | `berth-<id>.scope` |
//!
//! With [`Naming::Crio`] the leaf is `crio-<id>.scope` with both drivers.
//!
//! Kubelet extracts the id again: from a last element that ends in `.scope` it takes what follows
//! the last dash, any other is the id itself (`extractIDFromCgroupPath`). So an id must have no
//! dash with systemd.

use crate::{Driver, Error};

/// The longest path taken for a parent. `PATH_MAX` less room for the mount point, the id and a file
/// name.
const MAX_PARENT_BYTES: usize = 3072;

/// Deepest parent; a kubelet's is four.
const MAX_PARENT_DEPTH: usize = 32;

/// `NAME_MAX`, limits.h: the longest name of a directory. A unit's name has the same limit,
/// systemd.unit(5): 255 characters.
const MAX_NAME_BYTES: usize = 255;

const SLICE: &str = ".slice";
const SCOPE: &str = ".scope";
/// What the names of scopes begin with.
const SCOPE_PREFIX: &str = "berth-";
/// The same with [`Naming::Crio`].
const CRIO_PREFIX: &str = "crio-";

/// What the names of leaves look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Naming {
    /// `<id>`, with the systemd driver `berth-<id>.scope`.
    #[default]
    Own,
    /// `crio-<id>.scope` with both drivers, the only form that suits two readers: cAdvisor's
    /// handler for CRI-O takes cgroups that begin with `crio` and contain an id (cAdvisor 0.56,
    /// `container/crio/factory.go`); kubelet extracts the id only from a name that ends in
    /// `.scope`.
    Crio,
}

impl Naming {
    /// The other one.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Own => Self::Crio,
            Self::Crio => Self::Own,
        }
    }
}

/// Where a container's cgroup goes, relative to the root of the hierarchy, without a slash at the
/// end: `/kubepods/burstable/pod1`, or the empty string for the root itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    path: String,
    ours: bool,
    driver: Driver,
    naming: Naming,
}

impl Parent {
    /// The parent that the caller of CRI named. It may have to be created. With the systemd driver,
    /// its last element is the name of the slice, and the name determines its place:
    /// systemd.slice(5).
    ///
    /// # Errors
    /// [`Error::InvalidParent`] when it is empty, not absolute (a slice may be given by its name
    /// alone), has a `.` or `..` element or contains a NUL or line end, is too long or deep, or
    /// belongs to the other driver: its caller would look for the container elsewhere.
    pub fn named(driver: Driver, parent: &str) -> Result<Self, Error> {
        let path = match driver {
            Driver::Cgroupfs => {
                let path = normal(driver, parent)?;
                if path.ends_with(SLICE) {
                    return Err(invalid(
                        driver,
                        parent,
                        "it is a systemd slice; set the kubelet's cgroupDriver to cgroupfs, or Berth's [cgroup] driver to systemd",
                    ));
                }
                path
            }
            Driver::Systemd => slice_path(parent)?,
        };
        // What is missing of it is created, in every hierarchy.
        if path.matches('/').count() > MAX_PARENT_DEPTH {
            return Err(invalid(driver, parent, "it is deeper than 32 cgroups"));
        }
        Ok(Self { path, ours: false, driver, naming: Naming::Own })
    }

    /// The daemon's own parent for pods that name none, such as `/berth` or `berth.slice`. It is
    /// created when it is missing.
    ///
    /// # Errors
    /// [`Error::InvalidParent`], as for [`Parent::named`]; the root itself is refused too.
    pub fn default_of_daemon(driver: Driver, parent: &str) -> Result<Self, Error> {
        let parent_checked = Self::named(driver, parent)?;
        if parent_checked.path.is_empty() {
            return Err(invalid(driver, parent, "the root cannot be the default parent"));
        }
        Ok(Self { ours: true, ..parent_checked })
    }

    /// The parent of the cgroup at `path`, which an earlier run of the daemon created, with
    /// whatever driver it had then.
    ///
    /// # Errors
    /// [`Error::InvalidParent`].
    pub fn of(path: &str) -> Result<Self, Error> {
        let (parent, leaf) = path.rsplit_once('/').unwrap_or(("", path));
        let driver = if is_unit(path) { Driver::Systemd } else { Driver::Cgroupfs };
        let naming = if is_crio(leaf) { Naming::Crio } else { Naming::Own };
        Ok(Self { path: normal(driver, &format!("{parent}/"))?, ours: false, driver, naming })
    }

    /// The driver that a parent of this form belongs to.
    #[must_use]
    pub fn form_of(parent: &str) -> Driver {
        if parent.trim_end_matches('/').ends_with(SLICE) { Driver::Systemd } else { Driver::Cgroupfs }
    }

    /// The same parent with leaves that are named this way.
    #[must_use]
    pub fn with_naming(self, naming: Naming) -> Self {
        Self { naming, ..self }
    }

    /// What the names of its leaves look like.
    #[must_use]
    pub fn naming(&self) -> Naming {
        self.naming
    }

    /// The path, `/a/b`, or the empty string for the root.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether it is the daemon's own, to be created when missing.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// The driver that it belongs to.
    #[must_use]
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// The name of the directory of the leaf `id`.
    pub(crate) fn leaf(&self, id: &str) -> String {
        match (self.naming, self.driver) {
            (Naming::Crio, _) => format!("{CRIO_PREFIX}{id}{SCOPE}"),
            (Naming::Own, Driver::Cgroupfs) => id.to_owned(),
            (Naming::Own, Driver::Systemd) => format!("{SCOPE_PREFIX}{id}{SCOPE}"),
        }
    }

    /// The id in the name of a leaf, by any of the namings; nothing for names that are not of the
    /// form of leaves.
    pub(crate) fn id_of<'a>(&self, leaf: &'a str) -> Option<&'a str> {
        if is_crio(leaf) {
            return leaf.strip_prefix(CRIO_PREFIX)?.strip_suffix(SCOPE);
        }
        match self.driver {
            Driver::Cgroupfs => Some(leaf),
            Driver::Systemd => leaf.strip_prefix(SCOPE_PREFIX)?.strip_suffix(SCOPE),
        }
    }

    /// The name of the slice; nothing with the cgroupfs driver.
    pub(crate) fn slice(&self) -> Option<&str> {
        match self.driver {
            Driver::Cgroupfs => None,
            // The root slice is the root of the hierarchy.
            Driver::Systemd => {
                self.path.rsplit('/').next().map(|name| if name.is_empty() { "-.slice" } else { name })
            }
        }
    }
}

/// Whether the last element of a path is the name of a leaf with [`Naming::Crio`].
fn is_crio(leaf: &str) -> bool {
    leaf.starts_with(CRIO_PREFIX) && leaf.ends_with(SCOPE)
}

/// Whether the cgroup at `path` is a systemd unit: a scope in a slice that is at the place its name
/// says. Any other directory may have the same name, such as one that a container has created in
/// its own cgroup.
pub(crate) fn is_unit(path: &str) -> bool {
    let (parent, leaf) = path.rsplit_once('/').unwrap_or(("", path));
    leaf.ends_with(SCOPE) && (parent.is_empty() || slice_path(parent).is_ok_and(|slice| slice == parent))
}

fn invalid(driver: Driver, parent: &str, reason: &'static str) -> Error {
    Error::InvalidParent { parent: parent.into(), driver, reason }
}

/// `//a//b/` becomes `/a/b`. Elements that would climb are refused rather than resolved: no honest
/// caller writes them.
fn normal(driver: Driver, parent: &str) -> Result<String, Error> {
    let invalid = |reason| Err(invalid(driver, parent, reason));
    if !parent.starts_with('/') {
        return invalid("it is not an absolute path");
    }
    if parent.len() > MAX_PARENT_BYTES {
        return invalid("it is too long");
    }
    if parent.contains(['\0', '\n']) {
        return invalid("it contains a NUL byte or newline");
    }
    let mut path = String::with_capacity(parent.len());
    for element in parent.split('/').filter(|element| !element.is_empty()) {
        if element == "." || element == ".." {
            return invalid("it contains a '.' or '..' element");
        }
        if element.len() > MAX_NAME_BYTES {
            return invalid("an element is longer than 255 bytes");
        }
        path.push('/');
        path.push_str(element);
    }
    Ok(path)
}

/// Where systemd puts the slice that the last element of `parent` names: `a-b.slice` is in
/// `a.slice`, and `-.slice` is the root, systemd.slice(5). What kubelet writes before the last
/// element is redundant; both of its peers look at the last only.
fn slice_path(parent: &str) -> Result<String, Error> {
    let refuse = |reason| Err(invalid(Driver::Systemd, parent, reason));
    let path = normal(Driver::Systemd, &format!("/{parent}"))?;
    let name = path.rsplit('/').next().unwrap_or_default();
    let Some(stem) = name.strip_suffix(SLICE) else {
        return refuse(
            "it is not a slice, such as kubepods-pod1.slice; set the kubelet's cgroupDriver to systemd, or Berth's [cgroup] driver to cgroupfs",
        );
    };
    if stem == "-" {
        return Ok(String::new());
    }
    // What systemd takes for a unit's name, unit_name_is_valid, less `@`, which slices cannot have.
    if !stem
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'-' | b'_' | b'.' | b'\\'))
    {
        return refuse("the name of a slice may contain only letters, digits, and : - _ . \\");
    }
    if stem.is_empty() || stem.starts_with('-') || stem.ends_with('-') || stem.contains("--") {
        return refuse("a dash in the name of a slice must be between two parts");
    }
    let mut expanded = String::new();
    for (at, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
        expanded.push('/');
        expanded.push_str(stem.get(..at).unwrap_or_default());
        expanded.push_str(SLICE);
    }
    if expanded.len() > MAX_PARENT_BYTES {
        return refuse("it is too long");
    }
    Ok(expanded)
}

/// Checks the name of a leaf.
pub(crate) fn check_id(parent: &Parent, id: &str) -> Result<(), Error> {
    let reason = if id.is_empty() {
        "it is empty"
    } else if id == "." || id == ".." {
        "it refers to another directory"
    } else if id.contains(['/', '\0', '\n']) {
        "it contains a slash, NUL byte or newline"
    } else if parent.leaf(id).len() > MAX_NAME_BYTES {
        "it is longer than 255 bytes"
    } else if (parent.driver == Driver::Systemd || parent.naming == Naming::Crio)
        && !id.bytes().all(|byte| byte.is_ascii_alphanumeric())
    {
        "the id in a scope's name may contain only letters and digits"
    } else {
        return Ok(());
    };
    Err(Error::InvalidId { id: id.into(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_made_normal_or_refused() {
        for (given, expected) in [
            ("/", Some("")),
            ("/kubepods/burstable/pod1", Some("/kubepods/burstable/pod1")),
            ("//kubepods///pod1/", Some("/kubepods/pod1")),
            ("/a b", Some("/a b")),
            ("/..a", Some("/..a")),
            ("", None),
            ("kubepods", None),
            ("/..", None),
            ("/a/../../b", None),
            ("/a/./b", None),
            ("/a\0b", None),
            ("/a\nb", None),
            ("/kubepods.slice/kubepods-pod1.slice", None),
            ("slice:prefix:id", None),
        ] {
            assert_eq!(
                Parent::named(Driver::Cgroupfs, given).ok().as_ref().map(Parent::path),
                expected,
                "{given:?}"
            );
        }
        assert!(Parent::named(Driver::Cgroupfs, &format!("/{}", "a/".repeat(2000))).is_err());
        assert!(Parent::named(Driver::Cgroupfs, &format!("/{}", "a".repeat(256))).is_err());
        let deep = |elements: usize| Parent::named(Driver::Cgroupfs, &"/a".repeat(elements));
        assert!(deep(MAX_PARENT_DEPTH).is_ok() && deep(MAX_PARENT_DEPTH + 1).is_err());
    }

    #[test]
    fn slices_are_where_their_names_say() {
        let pod = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a_1.slice";
        for (given, expected) in [
            (pod, Some(pod)),
            ("kubepods-burstable-pod0a_1.slice", Some(pod)),
            // The last element alone counts.
            ("/elsewhere/kubepods-burstable-pod0a_1.slice/", Some(pod)),
            ("/system.slice", Some("/system.slice")),
            ("berth.slice", Some("/berth.slice")),
            ("a\\x2db.slice", Some("/a\\x2db.slice")),
            ("-.slice", Some("")),
            ("/", None),
            ("", None),
            (".slice", None),
            ("-a.slice", None),
            ("a-.slice", None),
            ("a--b.slice", None),
            ("a b.slice", None),
            ("a@b.slice", None),
            ("ä.slice", None),
            ("../a.slice", None),
            ("/a/../b.slice", None),
            ("a\0.slice", None),
            ("a\n.slice", None),
            ("/kubepods/burstable/pod1", None),
            ("kubepods-pod1.slice:cri-containerd:0123", None),
            ("a.scope", None),
        ] {
            assert_eq!(
                Parent::named(Driver::Systemd, given).ok().as_ref().map(Parent::path),
                expected,
                "{given:?}"
            );
        }
        assert!(Parent::named(Driver::Systemd, &format!("{}.slice", "a".repeat(250))).is_err());
        assert!(Parent::named(Driver::Systemd, &format!("{}a.slice", "a-".repeat(120))).is_err());
    }

    #[test]
    fn a_parent_of_the_other_driver_is_refused_with_what_to_change() {
        for (driver, parent) in
            [(Driver::Cgroupfs, "/kubepods.slice/kubepods-pod1.slice"), (Driver::Systemd, "/kubepods/pod1")]
        {
            let text = Parent::named(driver, parent).unwrap_err().to_string();
            for word in [parent, &driver.to_string(), "cgroupDriver", "[cgroup] driver"] {
                assert!(text.contains(word), "{word:?} is not in {text:?}");
            }
        }
    }

    #[test]
    fn leaves_are_ids_or_scopes() {
        let slice = Parent::named(Driver::Systemd, "a-b.slice").unwrap();
        assert_eq!((slice.leaf("0a").as_str(), slice.slice()), ("berth-0a.scope", Some("a-b.slice")));
        assert_eq!(slice.id_of("berth-0a.scope"), Some("0a"));
        assert_eq!((slice.id_of("cri-containerd-0a.scope"), slice.id_of("berth-0a")), (None, None));
        let root = Parent::named(Driver::Systemd, "-.slice").unwrap();
        assert_eq!(root.slice(), Some("-.slice"));
        let plain = Parent::named(Driver::Cgroupfs, "/a").unwrap();
        assert_eq!((plain.leaf("0a").as_str(), plain.slice(), plain.id_of("0a")), ("0a", None, Some("0a")));
        for parent in [slice, plain].map(|parent| parent.with_naming(Naming::Crio)) {
            assert_eq!(parent.leaf("0a"), "crio-0a.scope");
            assert_eq!(parent.id_of("crio-0a.scope"), Some("0a"));
            assert_eq!(parent.clone().with_naming(Naming::Own).id_of("crio-0a.scope"), Some("0a"));
            assert!(check_id(&parent, "0a").is_ok() && check_id(&parent, "0-a").is_err());
        }
    }

    #[test]
    fn the_parent_of_a_recorded_cgroup_tells_its_driver() {
        for (path, parent, driver) in [
            ("/a.slice/a-b.slice/berth-0a.scope", "/a.slice/a-b.slice", Driver::Systemd),
            ("/berth/0a", "/berth", Driver::Cgroupfs),
            ("/0a", "", Driver::Cgroupfs),
            ("/berth-0a.scope", "", Driver::Systemd),
            ("/a.slice/crio-0a.scope", "/a.slice", Driver::Systemd),
            ("/kubepods/pod1/crio-0a.scope", "/kubepods/pod1", Driver::Cgroupfs),
            ("/berth/0a/b.slice/crio-0a.scope", "/berth/0a/b.slice", Driver::Cgroupfs),
        ] {
            let found = Parent::of(path).unwrap();
            assert_eq!((found.path(), found.driver()), (parent, driver), "{path}");
            assert_eq!(format!("{parent}/{}", found.leaf("0a")), path);
        }
        assert!(Parent::of("relative/0a").is_err());
        assert!(Parent::of("/../0a").is_err());
    }

    #[test]
    fn a_scope_that_is_not_where_systemd_has_its_slice_is_no_unit() {
        for (path, expected) in [
            ("/a.slice/a-b.slice/berth-0a.scope", true),
            ("/berth-0a.scope", true),
            ("/a.slice/a-b.slice/0a", false),
            ("/a-b.slice/berth-0a.scope", false),
            ("/a.slice/berth-0b.scope/a.slice/berth-0a.scope", false),
            ("/kubepods/pod1/0b/a.slice/berth-0a.scope", false),
        ] {
            assert_eq!(is_unit(path), expected, "{path}");
        }
    }

    #[test]
    fn the_default_parent_is_ours_and_not_the_root() {
        assert!(Parent::default_of_daemon(Driver::Cgroupfs, "/berth").unwrap().is_ours());
        assert!(Parent::default_of_daemon(Driver::Cgroupfs, "/").is_err());
        assert!(Parent::default_of_daemon(Driver::Systemd, "berth.slice").unwrap().is_ours());
        assert!(Parent::default_of_daemon(Driver::Systemd, "-.slice").is_err());
        assert!(!Parent::named(Driver::Cgroupfs, "/berth").unwrap().is_ours());
    }

    #[test]
    fn ids_are_single_names() {
        let plain = Parent::named(Driver::Cgroupfs, "/a").unwrap();
        for good in ["a", "0123abcd", "...", "a b", &"x".repeat(255)] {
            assert!(check_id(&plain, good).is_ok(), "{good:?}");
        }
        for bad in ["", ".", "..", "a/b", "/", "a\0", "a\nb", &"x".repeat(256)] {
            assert!(check_id(&plain, bad).is_err(), "{bad:?}");
        }
        let slice = Parent::named(Driver::Systemd, "a.slice").unwrap();
        for (id, good) in
            [("0123abcd", true), ("a-b", false), ("a.b", false), ("", false), (&"x".repeat(250), false)]
        {
            assert_eq!(check_id(&slice, id).is_ok(), good, "{id:?}");
        }
    }
}
