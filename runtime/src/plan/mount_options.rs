//! Parses the options of a mount: attributes, the kind of bind, propagation,
//! and options of the filesystem.
//!
//! The names are those of OCI runtime-spec 1.2, `config.md`, "Linux mount options", a subset: an
//! option that is unknown here is refused, because what it was meant to forbid would be allowed.

use berth_shim_proto::launch::Propagation;
use berth_sys::mount::attr;

pub(super) const RDONLY: u64 = attr::RDONLY;

/// Bits that each option sets and clears.
const ATTRIBUTES: [(&str, u64, u64); 11] = [
    ("ro", attr::RDONLY, 0),
    ("rw", 0, attr::RDONLY),
    ("nosuid", attr::NOSUID, 0),
    ("suid", 0, attr::NOSUID),
    ("nodev", attr::NODEV, 0),
    ("dev", 0, attr::NODEV),
    ("noexec", attr::NOEXEC, 0),
    ("exec", 0, attr::NOEXEC),
    ("noatime", attr::NOATIME, attr::ATIME_MASK),
    ("strictatime", attr::STRICTATIME, attr::ATIME_MASK),
    // The kernel's default, 0.
    ("relatime", 0, attr::ATIME_MASK),
];

/// Options of the filesystem itself, with a value: proc(5), tmpfs(5),
/// Documentation/filesystems/devpts.rst.
const WITH_VALUE: [(&str, &[&str]); 2] = [
    ("tmpfs", &["mode", "size", "nr_inodes", "uid", "gid"]),
    ("devpts", &["mode", "ptmxmode", "uid", "gid"]),
];

/// Those without a value.
const FLAGS: [(&str, &[&str]); 1] = [("devpts", &["newinstance"])];

/// An invalid option.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Not known.
    #[error("option {0:?} is unknown")]
    Unknown(String),
    /// A new filesystem has no peers to share mounts with.
    #[error("option {0:?} is for bind mounts only")]
    OnlyForBinds(String),
    /// It contradicts another option.
    #[error("option {0:?} contradicts an earlier one")]
    Contradicts(String),
}

/// A bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BindKind {
    /// Including the mounts below the source.
    pub(super) recursive: bool,
}

/// Parsed options.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// `MOUNT_ATTR_*` to set.
    pub(super) attributes: u64,
    /// Whether they apply to the mounts below, too.
    pub(super) recursive: bool,
    /// For bind mounts.
    pub(super) bind: Option<BindKind>,
    /// If given.
    pub(super) propagation: Option<Propagation>,
    /// `key=value` or a flag, for fsconfig(2).
    pub(super) of_filesystem: Vec<String>,
}

impl MountOptions {
    /// For a mount of the type `kind`; the last of `bind` and `rbind` counts, as for all options.
    pub(super) fn parse(kind: &str, options: &[String]) -> Result<Self, OptionError> {
        let mut parsed = Self::default();
        let is_bind = options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind"));
        if is_bind || kind == "bind" {
            parsed.bind = Some(BindKind { recursive: false });
        }
        for option in options {
            parsed.take(kind, option)?;
        }
        Ok(parsed)
    }

    fn take(&mut self, kind: &str, option: &str) -> Result<(), OptionError> {
        if let Some((_, set, clear)) = ATTRIBUTES.iter().find(|(name, ..)| *name == option) {
            // A recursive bit would be cleared for the mount and all below it.
            if self.recursive && clear & RDONLY != 0 {
                return Err(OptionError::Contradicts(option.to_owned()));
            }
            self.attributes = self.attributes & !clear | set;
            return Ok(());
        }
        match option {
            "bind" => self.bind = Some(BindKind { recursive: false }),
            "rbind" => self.bind = Some(BindKind { recursive: true }),
            "private" | "rprivate" => self.propagate(option, Propagation::Private)?,
            "slave" | "rslave" => self.propagate(option, Propagation::Slave)?,
            "shared" | "rshared" => self.propagate(option, Propagation::Shared)?,
            "rro" if self.bind.is_none() => return Err(OptionError::OnlyForBinds(option.to_owned())),
            "rro" => {
                self.attributes |= RDONLY;
                self.recursive = true;
            }
            _ if self.bind.is_none() && is_of_filesystem(kind, option) => {
                self.of_filesystem.push(option.to_owned())
            }
            _ => return Err(OptionError::Unknown(option.to_owned())),
        }
        Ok(())
    }

    fn propagate(&mut self, option: &str, propagation: Propagation) -> Result<(), OptionError> {
        // A new mount is private.
        if self.bind.is_none() && propagation != Propagation::Private {
            return Err(OptionError::OnlyForBinds(option.to_owned()));
        }
        self.propagation = Some(propagation);
        Ok(())
    }
}

fn is_of_filesystem(kind: &str, option: &str) -> bool {
    let known = |table: &[(&str, &[&str])], name: &str| {
        table.iter().any(|(filesystem, names)| *filesystem == kind && names.contains(&name))
    };
    match option.split_once('=') {
        Some((key, value)) => known(&WITH_VALUE, key) && !value.is_empty() && !value.contains('\0'),
        None => known(&FLAGS, option),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: &str, options: &str) -> Result<MountOptions, OptionError> {
        let options: Vec<String> = options.split_whitespace().map(str::to_owned).collect();
        MountOptions::parse(kind, &options)
    }

    #[test]
    fn attributes_add_up_and_the_last_word_counts() {
        for (options, expected) in [
            ("", 0),
            ("ro", attr::RDONLY),
            ("ro rw", 0),
            ("rw ro nosuid nodev noexec", attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC),
            ("nosuid suid nodev dev noexec exec", 0),
            ("noatime strictatime", attr::STRICTATIME),
            ("strictatime noatime ro", attr::NOATIME | attr::RDONLY),
            ("noatime relatime", 0),
        ] {
            for kind in ["tmpfs", "bind"] {
                let parsed = parse(kind, options).unwrap();
                assert_eq!(parsed.attributes, expected, "{kind} {options}");
                assert!(!parsed.recursive && parsed.of_filesystem.is_empty());
            }
        }
    }

    #[test]
    fn binds_are_told_from_filesystems() {
        let bind = |recursive| Some(BindKind { recursive });
        for (kind, options, expected, propagation) in [
            ("bind", "", bind(false), None),
            ("", "rbind rslave", bind(true), Some(Propagation::Slave)),
            ("none", "bind rshared", bind(false), Some(Propagation::Shared)),
            ("bind", "rbind rprivate ro", bind(true), Some(Propagation::Private)),
            ("proc", "nosuid", None, None),
            ("tmpfs", "private", None, Some(Propagation::Private)),
        ] {
            let parsed = parse(kind, options).unwrap();
            assert_eq!((parsed.bind, parsed.propagation), (expected, propagation), "{kind} {options}");
        }
        let recursive = parse("bind", "rbind rro").unwrap();
        assert_eq!((recursive.attributes, recursive.recursive), (attr::RDONLY, true));
    }

    #[test]
    fn a_filesystem_gets_its_own_options_and_no_others() {
        let parsed = parse("tmpfs", "nosuid mode=755 size=64k").unwrap();
        assert_eq!(parsed.of_filesystem, ["mode=755", "size=64k"]);
        let parsed = parse("devpts", "newinstance ptmxmode=0666 gid=5").unwrap();
        assert_eq!(parsed.of_filesystem, ["newinstance", "ptmxmode=0666", "gid=5"]);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for (kind, option) in [
            ("tmpfs", "nosymfollow"),
            ("tmpfs", "newinstance"),
            ("tmpfs", "mode"),
            ("tmpfs", "mode="),
            ("tmpfs", "size=1\0k"),
            ("tmpfs", "RO"),
            ("tmpfs", "ro=1"),
            ("tmpfs", "ro,rw"),
            ("tmpfs", "remount"),
            ("bind", "mode=755"),
            ("bind", "idmap"),
            ("bind", "unbindable"),
            ("proc", "hidepid=0"),
            ("cgroup2", "nsdelegate"),
            ("overlay", "lowerdir=/"),
        ] {
            assert_eq!(parse(kind, option), Err(OptionError::Unknown(option.to_owned())), "{kind}");
        }
        assert_eq!(MountOptions::parse("bind", &[String::new()]), Err(OptionError::Unknown(String::new())));
        for option in ["rshared", "slave", "rro"] {
            assert_eq!(parse("sysfs", option), Err(OptionError::OnlyForBinds(option.to_owned())));
        }
        assert_eq!(parse("bind", "rro rw"), Err(OptionError::Contradicts("rw".to_owned())));
    }
}
