//! Applies limits, and rolls them back when one is refused.

use std::path::PathBuf;

use crate::cgroup::{Place, Unit};
use crate::limits::{
    Ceiling, HugepageLimit, IfMissing, Limits, Note, Present, Step, Version, cpu_weight, plan, properties_of,
};
use crate::{Cgroup, Error, control_file};

impl Cgroup {
    /// Sets the limits of a new cgroup without processes. After an error, remove it.
    ///
    /// # Errors
    /// [`Error::InvalidLimit`]; [`Error::ControllerMissing`] for a limit that this machine cannot
    /// enforce; [`Error::Write`] with file and value.
    pub fn apply(&self, limits: &Limits) -> Result<Vec<Note>, Error> {
        let steps = plan(self.version(), limits, &Present::default())?;
        let mut notes = Vec::new();
        self.carry_out(&steps, &mut notes, &mut None)?;
        Ok(notes)
    }

    /// Changes the limits of a cgroup with running processes: all of them, or, when the kernel
    /// refuses one, none.
    ///
    /// A memory limit below what is in use is refused. v1 tries to free memory and refuses on its
    /// own; v2 would kill, so there memory is reclaimed first (`memory.reclaim`, Linux 5.19) and
    /// the limit set only if that was enough.
    ///
    /// For a scope, systemd is updated afterwards, so that it does not restore the earlier values;
    /// if it does not answer within 30 s, the update fails.
    ///
    /// # Errors
    /// As [`Cgroup::apply`], also [`Error::LimitBelowUsage`] and [`Error::Unit`]; the earlier
    /// limits are then in force again, or the error is [`Error::NotRolledBack`].
    pub fn update(&self, limits: &Limits) -> Result<Vec<Note>, Error> {
        let present = self.present()?;
        let steps = plan(self.version(), limits, &present)?;
        if let (Place::Unified(_), Some(Ceiling::At(bytes @ 1..))) = (&self.place, limits.memory_limit_bytes)
        {
            self.make_room(bytes)?;
        }
        let mut notes = Vec::new();
        let mut done = Some(Vec::new());
        let changed = self.carry_out(&steps, &mut notes, &mut done).and_then(|()| match &self.unit {
            Some(unit) => self.tell(unit, &steps, &present),
            None => Ok(()),
        });
        let Err(error) = changed else { return Ok(notes) };
        let mut failures = Vec::new();
        for (file, earlier) in done.into_iter().flatten().rev() {
            failures.extend(self.write(&file, &earlier).err());
        }
        if failures.is_empty() {
            Err(error)
        } else {
            Err(Error::NotRolledBack { source: Box::new(error), failures })
        }
    }

    /// The kernel's values of the limits that are set in `asked`. Values that are missing or cannot
    /// be read are taken from `earlier`; so are shares if they have the same weight on v2.
    #[must_use]
    pub fn read_back(&self, asked: &Limits, earlier: &Limits) -> Limits {
        let number = |controller: &str, file: &str| {
            self.dir_of(controller).and_then(|dir| self.read_number(&dir.join(file)).ok().flatten())
        };
        let text = |controller: &str, file: &str| -> Option<String> {
            let bytes = self.read_if_there(&self.dir_of(controller)?.join(file)).ok()??;
            Some(String::from_utf8_lossy(bytes.trim_ascii()).into_owned())
        };
        let word = |controller: &str, file: &str, at: usize| -> Option<Ceiling> {
            ceiling(text(controller, file)?.split_ascii_whitespace().nth(at)?)
        };
        let (memory, swap, quota, period, shares) = match self.version() {
            Version::V1 => (
                word("memory", "memory.limit_in_bytes", 0),
                word("memory", "memory.memsw.limit_in_bytes", 0),
                word("cpu", "cpu.cfs_quota_us", 0),
                number("cpu", "cpu.cfs_period_us"),
                number("cpu", "cpu.shares"),
            ),
            Version::V2 => {
                let memory = word("memory", "memory.max", 0);
                let swap = match (word("memory", "memory.swap.max", 0), memory) {
                    (Some(Ceiling::At(swap)), Some(Ceiling::At(memory))) => {
                        Some(Ceiling::At(swap.saturating_add(memory)))
                    }
                    (Some(_), Some(_)) => Some(Ceiling::Unlimited),
                    _ => None,
                };
                let period = match word("cpu", "cpu.max", 1) {
                    Some(Ceiling::At(period)) => Some(period),
                    _ => None,
                };
                let shares = number("cpu", "cpu.weight").map(|weight| {
                    let known = [earlier.cpu_shares, asked.cpu_shares].into_iter().flatten();
                    known.into_iter().find(|shares| cpu_weight(*shares) == weight).unwrap_or_else(|| {
                        let mut shares = 2..=262_144;
                        shares.find(|shares| cpu_weight(*shares) >= weight).unwrap_or(262_144)
                    })
                });
                (memory, swap, word("cpu", "cpu.max", 0), period, shares)
            }
        };
        let suffix = match self.version() {
            Version::V1 => "limit_in_bytes",
            Version::V2 => "max",
        };
        let hugepages = asked.hugepages.iter().filter_map(|page| {
            let size = &page.page_size;
            let before = || earlier.hugepages.iter().find(|page| page.page_size == *size).cloned();
            match word("hugetlb", &format!("hugetlb.{size}.{suffix}"), 0) {
                Some(Ceiling::At(limit_bytes)) => {
                    Some(HugepageLimit { page_size: size.clone(), limit_bytes })
                }
                _ => before(),
            }
        });
        let unified = asked.unified.keys().filter_map(|key| {
            let value = text("unified", key).or_else(|| earlier.unified.get(key).cloned())?;
            Some((key.clone(), value))
        });
        let list = |asked: &str, earlier: &str, file| match asked {
            "" => String::new(),
            _ => text("cpuset", file).unwrap_or_else(|| earlier.to_owned()),
        };
        Limits {
            cpu_shares: asked.cpu_shares.and(shares.or(earlier.cpu_shares)),
            cpu_quota_us: asked.cpu_quota_us.and(quota.or(earlier.cpu_quota_us)),
            cpu_period_us: asked.cpu_period_us.and(period.or(earlier.cpu_period_us)),
            memory_limit_bytes: asked.memory_limit_bytes.and(memory.or(earlier.memory_limit_bytes)),
            memory_swap_limit_bytes: asked
                .memory_swap_limit_bytes
                .and(swap.or(earlier.memory_swap_limit_bytes)),
            pids_limit: asked.pids_limit.and(word("pids", "pids.max", 0).or(earlier.pids_limit)),
            cpuset_cpus: list(&asked.cpuset_cpus, &earlier.cpuset_cpus, "cpuset.cpus"),
            cpuset_mems: list(&asked.cpuset_mems, &earlier.cpuset_mems, "cpuset.mems"),
            hugepages: hugepages.collect(),
            unified: unified.collect(),
        }
    }

    /// Sets the same values in systemd, and writes the files again: systemd has just written them,
    /// rounded.
    fn tell(&self, unit: &Unit, steps: &[Step], present: &Present) -> Result<(), Error> {
        let properties = properties_of(steps, present);
        if properties.is_empty() {
            return Ok(());
        }
        let fail = |source| Error::Unit { action: "change", unit: unit.name.clone(), source };
        unit.systemd.set(&unit.name, properties).map_err(fail)?;
        // Anything worth reporting was reported the first time.
        self.carry_out(steps, &mut Vec::new(), &mut None)
    }

    fn version(&self) -> Version {
        match self.place {
            Place::Unified(_) => Version::V2,
            Place::Legacy(_) => Version::V1,
        }
    }

    /// Reads the input of [`plan`].
    fn present(&self) -> Result<Present, Error> {
        let Some(memory) = self.dir_of("memory") else { return Ok(Present::default()) };
        match &self.place {
            Place::Legacy(_) => Ok(Present {
                memory_and_swap_bytes: self.read_number(&memory.join("memory.memsw.limit_in_bytes"))?,
                ..Present::default()
            }),
            Place::Unified(dir) => {
                let cpu_max = self.read_if_there(&dir.join("cpu.max"))?.unwrap_or_default();
                let mut words = cpu_max.split(u8::is_ascii_whitespace).map(String::from_utf8_lossy);
                let quota = words.next().unwrap_or_default().into_owned();
                let period = words.next().and_then(|period| period.parse().ok());
                Ok(Present {
                    memory_bytes: self.read_number(&memory.join("memory.max"))?,
                    cpu_quota: Some(quota).filter(|quota| !quota.is_empty()),
                    cpu_period_us: period,
                    ..Present::default()
                })
            }
        }
    }

    /// v2 only: ensures that a memory limit of `bytes` will not cause an OOM kill.
    fn make_room(&self, bytes: u64) -> Result<(), Error> {
        let Place::Unified(dir) = &self.place else { return Ok(()) };
        let usage = || Ok(self.read_number(&dir.join("memory.current"))?.unwrap_or(0));
        let excess = usage()?.saturating_sub(bytes);
        if excess == 0 {
            return Ok(());
        }
        // EAGAIN says that less than that could be freed, ENOENT that the kernel is too old: the
        // second look decides.
        let _ = self.write_value(&dir.join("memory.reclaim"), &excess.to_string());
        let usage_bytes = usage()?;
        if usage_bytes > bytes {
            return Err(Error::LimitBelowUsage { path: dir.clone(), limit_bytes: bytes, usage_bytes });
        }
        Ok(())
    }

    /// Writes the steps. With `done`, earlier values are read first and kept there, in order.
    fn carry_out(
        &self,
        steps: &[Step],
        notes: &mut Vec<Note>,
        done: &mut Option<Vec<(PathBuf, String)>>,
    ) -> Result<(), Error> {
        let mut steps = steps.iter();
        while let Some(step) = steps.next() {
            let result = self.write_step(step, notes, done);
            match result {
                Err(Error::Write { ref source, .. })
                    if step.swaps_with_next && source.kind() == std::io::ErrorKind::InvalidInput =>
                {
                    let Some(next) = steps.next() else { return result };
                    self.write_step(next, notes, done)?;
                    self.write_step(step, notes, done)?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn write_step(
        &self,
        step: &Step,
        notes: &mut Vec<Note>,
        done: &mut Option<Vec<(PathBuf, String)>>,
    ) -> Result<(), Error> {
        let missing = |notes: &mut Vec<Note>, dir: PathBuf| match step.if_missing {
            IfMissing::Skip => Ok(()),
            IfMissing::Tell(note) => {
                notes.push(note);
                Ok(())
            }
            IfMissing::Fail => {
                Err(Error::ControllerMissing { limit: step.limit, controller: step.controller, path: dir })
            }
        };
        let Some(dir) = self.dir_of(step.controller) else { return missing(notes, self.main_dir()) };
        let path = dir.join(&step.file);
        let earlier = match done {
            Some(_) => self.read_if_there(&path)?,
            None => None,
        };
        match self.write_value(&path, &step.value) {
            Ok(()) => {
                if let (Some(done), Some(earlier)) = (done, earlier) {
                    done.push((path, String::from_utf8_lossy(earlier.trim_ascii()).into_owned()));
                }
                Ok(())
            }
            Err(source) if source.kind() == std::io::ErrorKind::NotFound && step.controller != "unified" => {
                missing(notes, dir.to_path_buf())
            }
            Err(source) => Err(Error::Write { path, value: step.value.clone(), source }),
        }
    }
}

/// A limit as a control file has it: v2's `max`, v1's -1, and v1's memory without a limit, which is
/// the greatest number of whole pages of up to 64 KiB.
fn ceiling(word: &str) -> Option<Ceiling> {
    const V1_UNLIMITED: u64 = i64::MAX as u64 & !0xffff;
    match word {
        "max" | "-1" => Some(Ceiling::Unlimited),
        _ => match control_file::number(word.as_bytes())? {
            V1_UNLIMITED.. => Some(Ceiling::Unlimited),
            number => Some(Ceiling::At(number)),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{Driver, Hierarchy, HugepageLimit, LegacyMount, Parent};

    /// A v1 cgroup of plain files.
    fn fake(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
        let root = tempfile::tempdir().unwrap();
        let controllers = ["cpu", "memory", "pids"].map(str::to_owned).to_vec();
        let mounts = vec![LegacyMount { path: root.path().to_path_buf(), controllers }];
        let cgroup = Cgroup::create(
            &Hierarchy::Legacy { mounts },
            &Parent::named(Driver::Cgroupfs, "/").unwrap(),
            "c",
        )
        .unwrap();
        for (file, value) in files {
            fs::write(root.path().join("c").join(file), value).unwrap();
        }
        (root, cgroup)
    }

    #[test]
    fn missing_controllers_are_errors_except_where_nothing_is_lost() {
        let (_root, cgroup) = fake(&[("memory.limit_in_bytes", "")]);
        let memory = Limits { memory_limit_bytes: Some(Ceiling::At(1 << 20)), ..Limits::default() };
        assert_eq!(cgroup.apply(&memory).unwrap(), [Note::NoSwapAccounting]);
        let huge = |limit_bytes| Limits {
            hugepages: vec![HugepageLimit { page_size: "2MB".into(), limit_bytes }],
            ..Limits::default()
        };
        assert_eq!(cgroup.apply(&huge(0)).unwrap(), []);
        let error = cgroup.apply(&huge(1)).unwrap_err();
        assert!(matches!(error, Error::ControllerMissing { limit: "hugepages", controller: "hugetlb", .. }));
        let error =
            cgroup.apply(&Limits { pids_limit: Some(Ceiling::At(1)), ..Limits::default() }).unwrap_err();
        assert!(matches!(error, Error::ControllerMissing { limit: "pids_limit", .. }));
    }

    #[test]
    fn a_refused_update_puts_the_earlier_values_back() {
        let (root, cgroup) = fake(&[
            ("cpu.shares", "1024\n"),
            ("cpu.cfs_quota_us", "-1\n"),
            ("memory.limit_in_bytes", "500\n"),
            ("memory.memsw.limit_in_bytes", "500\n"),
        ]);
        let limits = Limits {
            cpu_shares: Some(2),
            memory_limit_bytes: Some(Ceiling::At(900)),
            pids_limit: Some(Ceiling::At(7)),
            ..Limits::default()
        };
        assert!(matches!(cgroup.update(&limits), Err(Error::ControllerMissing { .. })));
        for (file, value) in
            [("cpu.shares", "1024"), ("memory.limit_in_bytes", "500"), ("memory.memsw.limit_in_bytes", "500")]
        {
            assert!(
                fs::read_to_string(root.path().join("c").join(file)).unwrap().starts_with(value),
                "{file}"
            );
        }
    }
}
