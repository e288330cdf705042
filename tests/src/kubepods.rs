//! The cgroups of pods, under the names by which a kubelet creates and finds them.
//!
//! | driver | pod | container |
//! |---|---|---|
//! | cgroupfs | `kubepods/burstable/pod<uid>` | `<pod>/<id>` |
//! | systemd | `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice`, `_` for `-` in the uid | `<pod>/<runtime>-<id>.scope` |
//!
//! A pod of the class Guaranteed has no class in its name. The names of pods are the kubelet's
//! (`pkg/kubelet/cm`), and so is the rule by which it finds a container's id: the part after the
//! last `-` of a scope, else the whole name.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::cgroup::{CpuLimit, Driver};
use crate::kubelet::{Kubelet, Pod};

/// The smallest number by which v1 means no memory limit: the greatest of 63 bits, in whole pages
/// of up to 64 KiB.
const V1_UNLIMITED: u64 = i64::MAX as u64 & !0xffff;

/// A cgroup of a pod or of a container, in whichever hierarchies the machine has.
#[derive(Debug)]
pub struct PodCgroup<'a> {
    kubelet: &'a Kubelet,
    /// Below the kubelet's own cgroup.
    path: PathBuf,
}

/// The limits in force in a cgroup; `None` for no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// CPU time.
    pub cpu: Option<CpuLimit>,
    /// `cpu.weight` of v2 or `cpu.shares` of v1, whose scales differ.
    pub cpu_weight: u64,
    /// Memory.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

impl Kubelet {
    /// The cgroup of a pod.
    #[must_use]
    pub fn pod_cgroup(&self, pod: &Pod) -> PodCgroup<'_> {
        let class = match pod.class.as_str() {
            "Burstable" => Some("burstable"),
            "BestEffort" => Some("besteffort"),
            _ => None,
        };
        let path = match (self.driver(), class) {
            (Driver::Cgroupfs, None) => format!("kubepods/pod{}", pod.uid),
            (Driver::Cgroupfs, Some(class)) => format!("kubepods/{class}/pod{}", pod.uid),
            (Driver::Systemd, None) => {
                format!("kubepods.slice/kubepods-pod{}.slice", pod.uid.replace('-', "_"))
            }
            (Driver::Systemd, Some(class)) => format!(
                "kubepods.slice/kubepods-{class}.slice/kubepods-{class}-pod{}.slice",
                pod.uid.replace('-', "_")
            ),
        };
        PodCgroup { kubelet: self, path: path.into() }
    }
}

impl PodCgroup<'_> {
    /// The cgroup of a container of this pod.
    ///
    /// # Errors
    /// When the pod's cgroup has none whose name gives this id.
    pub fn container(&self, id: &str) -> Result<Self> {
        let directory = self.directory("memory")?;
        let entries = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names = names.filter(|name| id_of(self.kubelet.driver(), name) == Some(id));
        match names.next() {
            Some(name) => Ok(Self { kubelet: self.kubelet, path: self.path.join(name) }),
            None => bail!("{} has no cgroup of the container {id}", directory.display()),
        }
    }

    /// The limits in its files.
    ///
    /// # Errors
    /// When it does not exist, or a file does not contain a number.
    pub fn limits(&self) -> Result<Limits> {
        if self.kubelet.cgroup().is_unified() {
            let cpu = self.read("cpu", "cpu.max")?;
            return Ok(Limits {
                cpu: match cpu.split_once(' ') {
                    Some(("max", _)) => None,
                    Some((quota, period)) => {
                        Some(CpuLimit { quota_us: number(quota)?, period_us: number(period)? })
                    }
                    None => bail!("cpu.max says {cpu:?}"),
                },
                cpu_weight: number(&self.read("cpu", "cpu.weight")?)?,
                memory_bytes: limit(&self.read("memory", "memory.max")?)?,
                pids: limit(&self.read("pids", "pids.max")?)?,
            });
        }
        let quota = self.read("cpu", "cpu.cfs_quota_us")?;
        Ok(Limits {
            cpu: match quota.as_str() {
                "-1" => None,
                quota => Some(CpuLimit {
                    quota_us: number(quota)?,
                    period_us: number(&self.read("cpu", "cpu.cfs_period_us")?)?,
                }),
            },
            cpu_weight: number(&self.read("cpu", "cpu.shares")?)?,
            memory_bytes: limit(&self.read("memory", "memory.limit_in_bytes")?)?
                .filter(|bytes| *bytes < V1_UNLIMITED),
            pids: limit(&self.read("pids", "pids.max")?)?,
        })
    }

    /// A file of it in the hierarchy of a controller, without the newline at its end.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, controller: &str, file: &str) -> Result<String> {
        let path = self.directory(controller)?.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim_end().to_owned())
    }

    /// Its directory in the hierarchy of a controller.
    ///
    /// # Errors
    /// When no hierarchy has the controller.
    pub fn directory(&self, controller: &str) -> Result<PathBuf> {
        Ok(self.kubelet.cgroup().directory(controller)?.join(&self.path))
    }

    /// Its path below the kubelet's own cgroup.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The container id that a kubelet sees in the name of a cgroup.
fn id_of(driver: Driver, name: &str) -> Option<&str> {
    match driver {
        Driver::Cgroupfs => Some(name),
        Driver::Systemd => name.strip_suffix(".scope")?.rsplit_once('-').map(|(_, id)| id),
    }
}

fn limit(text: &str) -> Result<Option<u64>> {
    if text == "max" { Ok(None) } else { number(text).map(Some) }
}

fn number(text: &str) -> Result<u64> {
    text.parse().with_context(|| format!("{text:?} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_in_names_as_a_kubelet_does() {
        let cases = [
            (Driver::Cgroupfs, "0a", Some("0a")),
            (Driver::Systemd, "berth-0a.scope", Some("0a")),
            (Driver::Systemd, "cri-containerd-0a.scope", Some("0a")),
            (Driver::Systemd, "0a.scope", None),
            (Driver::Systemd, "berth-0a", None),
        ];
        for (driver, name, id) in cases {
            assert_eq!(id_of(driver, name), id, "{name}");
        }
    }
}
