//! AppArmor on the machine: profiles that a test loads, and policy namespaces, in which they are
//! private to the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use berth_cri::v1;
use berth_cri::v1::security_profile::ProfileType;
use tempfile::NamedTempFile;

use crate::program::output;

/// The kernel's interface, in securityfs.
const KERNEL: &str = "/sys/kernel/security/apparmor";

/// Whether the kernel enforces profiles.
#[must_use]
pub fn is_enforced() -> bool {
    fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|enabled| enabled.starts_with(b"Y"))
}

/// A profile as a request names it; `name` is that of the profile on the node.
#[must_use]
pub fn profile(kind: ProfileType, name: &str) -> Option<v1::SecurityProfile> {
    Some(v1::SecurityProfile { profile_type: kind.into(), localhost_ref: name.to_owned() })
}

/// A profile in the kernel until this is dropped.
#[derive(Debug)]
pub struct Loaded {
    /// Its name, which only this test uses.
    pub name: String,
    file: NamedTempFile,
}

impl Loaded {
    /// Loads a profile with these rules (apparmor.d(5)), one per line.
    ///
    /// # Errors
    /// When the parser refuses it.
    pub fn load(what: &str, rules: &[&str]) -> Result<Self> {
        let name = format!("berth-test-{what}-{}", std::process::id());
        let file = NamedTempFile::new().context("a file for the profile")?;
        let text = format!(
            "profile {name} flags=(attach_disconnected, mediate_deleted) {{\n{}\n}}\n",
            rules.join("\n")
        );
        fs::write(file.path(), text).context("writing the profile")?;
        parse("--replace", file.path())?;
        Ok(Self { name, file })
    }

    /// The profile as a request names it.
    #[must_use]
    pub fn asked_for(&self) -> Option<v1::SecurityProfile> {
        profile(ProfileType::Localhost, &self.name)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ = parse("--remove", self.file.path());
    }
}

fn parse(option: &str, file: &Path) -> Result<String> {
    output(Command::new("apparmor_parser").arg(option).arg("--skip-cache").arg(file))
}

/// A policy namespace, until this is dropped: a process that is started in it (`aa-exec
/// --namespace`) sees and loads profiles only there.
#[derive(Debug)]
pub struct PolicyNamespace {
    name: &'static str,
}

impl PolicyNamespace {
    /// Creates one.
    ///
    /// # Errors
    /// When the kernel refuses, as when one of that name exists.
    pub fn create(name: &'static str) -> Result<Self> {
        let namespace = Self { name };
        fs::create_dir(namespace.directory()).context("making a namespace of policy")?;
        Ok(namespace)
    }

    /// Removes the profile `profile` from it.
    ///
    /// # Errors
    /// When it does not exist.
    pub fn remove_profile(&self, profile: &str) -> Result<()> {
        fs::write(Path::new(KERNEL).join(".remove"), format!(":{}:{profile}", self.name))
            .with_context(|| format!("removing the profile {profile} of {}", self.name))
    }

    fn directory(&self) -> PathBuf {
        Path::new(KERNEL).join("policy/namespaces").join(self.name)
    }
}

impl Drop for PolicyNamespace {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.directory());
    }
}
