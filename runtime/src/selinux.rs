//! Whether SELinux is enabled.
//!
//! Berth does not label anything. Where SELinux is disabled there is nothing to label, so a pod's
//! `seLinuxOptions` are accepted and have no effect, as with other runtimes. Where it is enabled
//! they are refused: a container without its label would not be confined as requested.

use std::path::Path;

/// The kernel's list of filesystems: proc_filesystems(5).
const FILESYSTEMS: &str = "/proc/filesystems";

/// Whether SELinux is enabled, enforcing or permissive. The kernel registers `selinuxfs` only then
/// (security/selinux/selinuxfs.c). If the list cannot be read it counts as enabled.
pub(crate) fn is_enabled() -> bool {
    is_listed(Path::new(FILESYSTEMS))
}

fn is_listed(filesystems: &Path) -> bool {
    match std::fs::read_to_string(filesystems) {
        Ok(text) => text.lines().any(|line| line.split_whitespace().last() == Some("selinuxfs")),
        Err(error) => {
            tracing::warn!(path = %filesystems.display(), %error, "cannot tell whether SELinux is enabled; assuming that it is");
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_on_when_the_kernel_has_its_filesystem_and_when_nobody_knows() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("filesystems");
        assert!(is_listed(&list), "unknown is not off");
        for (text, expected) in [
            ("nodev\tsysfs\nnodev\tselinuxfs\n\text4\n", true),
            ("nodev\tsysfs\nnodev\tsecurityfs\n\text4\n", false),
            ("nodev\tnotselinuxfs\nselinuxfs ext4\n", false),
            ("", false),
        ] {
            std::fs::write(&list, text).unwrap();
            assert_eq!(is_listed(&list), expected, "{text:?}");
        }
    }
}
