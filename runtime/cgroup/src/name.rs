//! Names: which driver arranges them, and what a parent and an id must look like.
//!
//! With the cgroupfs driver a container's cgroup is `<parent>/<id>` below the root of each hierarchy (CRI
//! `LinuxPodSandboxConfig.cgroup_parent`; kubelet cuts the id out of the last path element again). The systemd driver, where the parent is
//! a slice and the leaf a scope made over D-Bus, will be a second arm of [`Driver`].

use std::fmt;

use crate::Error;

/// Who arranges the cgroups of this node: CRI `LinuxRuntimeConfiguration.cgroup_driver`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Driver {
    /// Directories are made and removed directly.
    Cgroupfs,
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroupfs => f.write_str("cgroupfs"),
        }
    }
}

/// The longest path taken for a parent. `PATH_MAX` less room for the mount point, the id and a file name.
const MAX_PARENT_BYTES: usize = 3072;

/// `NAME_MAX`: the longest name of a directory, limits.h.
const MAX_NAME_BYTES: usize = 255;

/// Where a container's cgroup goes, relative to the root of the hierarchy, without a slash at the end: `/kubepods/burstable/pod1`, or
/// the empty string for the root itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    path: String,
    ours: bool,
}

impl Parent {
    /// The parent that the caller of CRI named. It must exist; it is never created.
    ///
    /// # Errors
    /// [`Error::InvalidParent`] when it is empty, not absolute, has a `.` or `..` element or a NUL or line end in it, is too long, or is a systemd
    /// slice (whose caller believes in the other driver, and would look for the container elsewhere).
    pub fn named(parent: &str) -> Result<Self, Error> {
        let path = normal(parent)?;
        if path.ends_with(".slice") {
            return Err(invalid(parent, "it is a systemd slice"));
        }
        Ok(Self { path, ours: false })
    }

    /// The daemon's own parent for pods that name none, such as `/berth`. It is created when it is missing.
    ///
    /// # Errors
    /// [`Error::InvalidParent`], as for [`Parent::named`]; the root itself is refused too.
    pub fn default_of_daemon(parent: &str) -> Result<Self, Error> {
        let path = normal(parent)?;
        if path.is_empty() {
            return Err(invalid(parent, "the root cannot be the default parent"));
        }
        Ok(Self { path, ours: true })
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
}

fn invalid(parent: &str, reason: &'static str) -> Error {
    Error::InvalidParent { parent: parent.into(), driver: Driver::Cgroupfs, reason }
}

/// `//a//b/` becomes `/a/b`. What would climb is refused rather than resolved: no honest caller writes it.
fn normal(parent: &str) -> Result<String, Error> {
    if !parent.starts_with('/') {
        return Err(invalid(parent, "it is not an absolute path"));
    }
    if parent.len() > MAX_PARENT_BYTES {
        return Err(invalid(parent, "it is too long"));
    }
    if parent.contains(['\0', '\n']) {
        return Err(invalid(parent, "it has a NUL or a line end in it"));
    }
    let mut path = String::with_capacity(parent.len());
    for element in parent.split('/').filter(|element| !element.is_empty()) {
        if element == "." || element == ".." {
            return Err(invalid(parent, "it has a '.' or '..' element"));
        }
        if element.len() > MAX_NAME_BYTES {
            return Err(invalid(parent, "an element is longer than 255 bytes"));
        }
        path.push('/');
        path.push_str(element);
    }
    Ok(path)
}

/// Checks the name of a leaf.
pub(crate) fn check_id(id: &str) -> Result<(), Error> {
    let reason = if id.is_empty() {
        "it is empty"
    } else if id == "." || id == ".." {
        "it means another directory"
    } else if id.contains(['/', '\0', '\n']) {
        "it has a slash, a NUL or a line end in it"
    } else if id.len() > MAX_NAME_BYTES {
        "it is longer than 255 bytes"
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
            assert_eq!(Parent::named(given).ok().as_ref().map(Parent::path), expected, "{given:?}");
        }
        assert!(Parent::named(&format!("/{}", "a/".repeat(2000))).is_err());
        assert!(Parent::named(&format!("/{}", "a".repeat(256))).is_err());
    }

    #[test]
    fn the_default_parent_is_ours_and_not_the_root() {
        assert!(Parent::default_of_daemon("/berth").unwrap().is_ours());
        assert!(Parent::default_of_daemon("/").is_err());
        assert!(!Parent::named("/berth").unwrap().is_ours());
    }

    #[test]
    fn ids_are_single_names() {
        for good in ["a", "0123abcd", "...", "a b", &"x".repeat(255)] {
            assert!(check_id(good).is_ok(), "{good:?}");
        }
        for bad in ["", ".", "..", "a/b", "/", "a\0", "a\nb", &"x".repeat(256)] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
    }
}
