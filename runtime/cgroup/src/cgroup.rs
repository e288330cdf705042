//! One container's cgroup: its paths, creating it, finding it again, and joining it.
//!
//! # Joining
//! On v2 the child is cloned straight into [`Cgroup::unified_dir`] (`CLONE_INTO_CGROUP`). On v1 the
//! child itself, while it has one thread, writes `0` to each of [`Cgroup::join_files`], which are
//! `tasks` files. Writing a pid, or anything to `cgroup.procs`, takes the kernel's global lock over
//! all thread groups (`cgroup_threadgroup_rwsem`), whose writer waits for an RCU grace period when
//! it was not taken recently; a thread that moves only itself skips it. Measured on Linux 6.18, 2
//! cores, nine hierarchies, 50 ms between containers: 6.5 ms from outside through `cgroup.procs`,
//! 0.2 ms from inside through `tasks`.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::name::{Parent, check_id, is_unit};
use crate::{Direct, Driver, Ending, Error, Files, Hierarchy, Limits, Systemd, control_file, unit};

/// The v2 controllers that are enabled for containers, as far as the parent has them.
const DELEGATED: [&str; 6] = ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"];

/// A container's directory in one v1 hierarchy.
#[derive(Debug, Clone)]
pub(crate) struct LegacyDir {
    pub(crate) controllers: Vec<String>,
    pub(crate) path: PathBuf,
}

#[derive(Debug, Clone)]
pub(crate) enum Place {
    Unified(PathBuf),
    Legacy(Vec<LegacyDir>),
}

/// The systemd unit of a cgroup, and the connection to systemd.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    pub(crate) name: String,
    pub(crate) systemd: Systemd,
}

/// A cgroup. Dropping it does nothing; it is removed by [`Cgroup::remove`].
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: String,
    pub(crate) place: Place,
    /// Looks up names in its directories.
    pub(crate) files: Arc<dyn Files>,
    /// `None` with the cgroupfs driver, and for a scope of an earlier daemon until it is known how
    /// to reach systemd.
    pub(crate) unit: Option<Unit>,
}

/// The input of [`Cgroup::create_scope`].
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// An idle process of the caller: a scope cannot exist without one, and the container's own
    /// must not run before its limits are in force.
    pub process: u32,
    /// Its limits.
    pub limits: &'a Limits,
    /// How systemd ends it.
    pub ending: Ending<'a>,
}

impl Cgroup {
    /// Creates `<parent>/<id>` (or as [`crate::Naming`] has it): on v2 one directory, with the
    /// controllers handed down to it by the parent; on v1 one in the hierarchy of each controller
    /// that Berth uses, and in the others that have the parent. A v1 cpuset starts with its
    /// parent's processors and memory nodes, without which no process could join.
    ///
    /// A missing default parent is created first; so is a named one in the hierarchy that a kubelet
    /// omits, if it exists in the others. On failure, nothing of the leaf is left.
    ///
    /// # Errors
    /// [`Error::InvalidId`]; [`Error::ParentMissing`] with the directory that should exist;
    /// [`Error::AlreadyExists`]; [`Error::Create`]; [`Error::Write`] when the parent does not hand
    /// its controllers down (on v2, a parent that has processes of its own cannot).
    pub fn create(hierarchy: &Hierarchy, parent: &Parent, id: &str) -> Result<Self, Error> {
        check_id(parent, id)?;
        if parent.driver() != Driver::Cgroupfs {
            return Err(Error::WrongDriver { parent: parent.path().into() });
        }
        let path = format!("{}/{}", parent.path(), parent.leaf(id));
        let place = match hierarchy {
            Hierarchy::Unified { mount } => {
                let above = below(mount, parent.path());
                if parent.is_ours() {
                    make_unified_parent(mount, parent.path())?;
                } else if !above.is_dir() {
                    return Err(Error::ParentMissing { path: above });
                }
                hand_down_controllers(&above)?;
                let leaf = above.join(parent.leaf(id));
                make_directory(&leaf)?;
                Place::Unified(leaf)
            }
            Hierarchy::Legacy { mounts } => {
                let mut dirs: Vec<LegacyDir> = Vec::with_capacity(mounts.len());
                let (own, common): (Vec<_>, Vec<_>) =
                    mounts.iter().partition(|mount| mount.is_runtimes_own());
                for mount in common.into_iter().chain(own) {
                    let leaf = below(&mount.path, &path);
                    let may_make_parent = parent.is_ours() || (mount.is_runtimes_own() && !dirs.is_empty());
                    let made = match make_directory(&leaf) {
                        // The leaf is tried first: the default parent is missing only once in its
                        // life.
                        Err(Error::ParentMissing { .. }) if may_make_parent => {
                            make_legacy_parent(&mount.path, parent.path())
                                .and_then(|()| make_directory(&leaf))
                        }
                        other => other,
                    };
                    match made {
                        Ok(()) => dirs.push(LegacyDir { controllers: mount.controllers.clone(), path: leaf }),
                        Err(Error::ParentMissing { .. }) if !mount.is_needed() => {}
                        Err(error) => {
                            undo(&dirs);
                            return Err(error);
                        }
                    }
                }
                for dir in dirs.iter().filter(|dir| dir.controllers.iter().any(|name| name == "cpuset")) {
                    if let Err(error) = inherit_cpuset(&dir.path) {
                        undo(&dirs);
                        return Err(error);
                    }
                }
                Place::Legacy(dirs)
            }
        };
        Ok(Self { path, place, files: Arc::new(Direct), unit: None })
    }

    /// Makes systemd create the scope `berth-<id>.scope` in the slice `parent`. Its process may end
    /// as soon as another is in the scope; the scope ends with its last process. Blocks for at most
    /// 30 s.
    ///
    /// systemd then has the limits, rounded to what it can express; [`Cgroup::apply`] has to
    /// follow. A slice that does not exist is created by systemd.
    ///
    /// # Errors
    /// [`Error::InvalidId`]; [`Error::InvalidLimit`]; [`Error::WrongDriver`]; [`Error::Unit`].
    pub fn create_scope(
        hierarchy: &Hierarchy,
        systemd: &Systemd,
        parent: &Parent,
        id: &str,
        scope: &Scope<'_>,
    ) -> Result<Self, Error> {
        check_id(parent, id)?;
        let (Hierarchy::Unified { mount }, Some(slice)) = (hierarchy, parent.slice()) else {
            return Err(Error::WrongDriver { parent: parent.path().into() });
        };
        let above = below(mount, parent.path());
        let name = parent.leaf(id);
        let mut properties = unit::of_scope(format!("Berth container {id}"), slice, scope.process);
        let before = scope.ending.before.map(|other| parent.leaf(other));
        properties.extend(unit::of_ending(&scope.ending, before));
        for property in crate::limits::properties(scope.limits)? {
            properties.retain(|(earlier, _)| *earlier != property.0);
            properties.push(property);
        }
        systemd.start(&name, properties, scope.process).map_err(|source| Error::Unit {
            action: "make",
            unit: name.clone(),
            source,
        })?;
        // systemd has done it for the controllers that it knows, which do not include huge pages.
        // Where they cannot be handed down, setting a limit on them reports it.
        let _ = hand_down_controllers(&above);
        let path = format!("{}/{name}", parent.path());
        let place = Place::Unified(below(mount, &path));
        Ok(Self { path, place, files: Arc::new(Direct), unit: Some(Unit { name, systemd: systemd.clone() }) })
    }

    /// The same cgroup with other [`Files`] to look up names in its directories, for use from the
    /// moment that a container may see them. Until then it is this thread.
    #[must_use]
    pub fn with_files(mut self, files: Arc<dyn Files>) -> Self {
        self.files = files;
        self
    }

    /// The same cgroup with a connection to systemd, if it is a scope: systemd then takes part in
    /// its changes and its end.
    #[must_use]
    pub fn with_systemd(mut self, systemd: Option<&Systemd>) -> Self {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        if is_unit(&self.path) {
            self.unit = systemd.map(|systemd| Unit { name: name.to_owned(), systemd: systemd.clone() });
        }
        self
    }

    /// Creates the directory of a leaf without processes, whose name shows other programs that a
    /// pod exists. With the systemd driver too it is not a unit, since a scope cannot exist without
    /// a process; systemd leaves unknown directories alone until their slice ends.
    ///
    /// # Errors
    /// As [`Cgroup::create`].
    pub fn create_empty(hierarchy: &Hierarchy, parent: &Parent, id: &str) -> Result<Self, Error> {
        let (Driver::Systemd, Hierarchy::Unified { mount }) = (parent.driver(), hierarchy) else {
            return Self::create(hierarchy, parent, id);
        };
        check_id(parent, id)?;
        let above = below(mount, parent.path());
        let path = format!("{}/{}", parent.path(), parent.leaf(id));
        let leaf = below(mount, &path);
        make_directory(&leaf)?;
        // Without controllers it only shows less.
        let _ = hand_down_controllers(&above);
        Ok(Self { path, place: Place::Unified(leaf), files: Arc::new(Direct), unit: None })
    }

    /// The cgroup that [`Cgroup::create`] or [`Cgroup::create_scope`] would create now, without
    /// creating it: for callers that have to name its directories first. A hierarchy that lacks the
    /// parent is left out, unless the parent would be created in it.
    ///
    /// # Errors
    /// [`Error::InvalidId`].
    pub fn planned(hierarchy: &Hierarchy, parent: &Parent, id: &str) -> Result<Self, Error> {
        check_id(parent, id)?;
        let path = format!("{}/{}", parent.path(), parent.leaf(id));
        let place = match hierarchy {
            Hierarchy::Unified { mount } => Place::Unified(below(mount, &path)),
            Hierarchy::Legacy { mounts } => Place::Legacy(
                mounts
                    .iter()
                    .filter(|mount| {
                        mount.is_needed() || parent.is_ours() || below(&mount.path, parent.path()).is_dir()
                    })
                    .map(|mount| LegacyDir {
                        controllers: mount.controllers.clone(),
                        path: below(&mount.path, &path),
                    })
                    .collect(),
            ),
        };
        Ok(Self { path, place, files: Arc::new(Direct), unit: None })
    }

    /// The cgroup `<parent>/<id>` as an earlier run of the daemon may have left it, even if leaves
    /// had other names then: all of it, part of it, or nothing. Nothing is no error, so that
    /// stopping and removing work on whatever is left.
    ///
    /// # Errors
    /// [`Error::InvalidId`].
    pub fn open(hierarchy: &Hierarchy, parent: &Parent, id: &str) -> Result<Self, Error> {
        let named = Self::open_named(hierarchy, parent, id)?;
        if named.is_there() {
            return Ok(named);
        }
        let other = parent.clone().with_naming(parent.naming().other());
        match Self::open_named(hierarchy, &other, id) {
            Ok(other) if other.is_there() => Ok(other),
            _ => Ok(named),
        }
    }

    fn open_named(hierarchy: &Hierarchy, parent: &Parent, id: &str) -> Result<Self, Error> {
        check_id(parent, id)?;
        let path = format!("{}/{}", parent.path(), parent.leaf(id));
        Ok(Self { place: Self::place_of(hierarchy, &path), path, files: Arc::new(Direct), unit: None })
    }

    /// The cgroup of a parent itself, for its statistics.
    pub(crate) fn of_parent(hierarchy: &Hierarchy, parent: &Parent) -> Self {
        let path = parent.path().to_owned();
        Self { place: Self::place_of(hierarchy, &path), path, files: Arc::new(Direct), unit: None }
    }

    fn place_of(hierarchy: &Hierarchy, path: &str) -> Place {
        match hierarchy {
            Hierarchy::Unified { mount } => Place::Unified(below(mount, path)),
            Hierarchy::Legacy { mounts } => Place::Legacy(
                mounts
                    .iter()
                    .map(|mount| LegacyDir {
                        controllers: mount.controllers.clone(),
                        path: below(&mount.path, path),
                    })
                    .filter(|dir| dir.path.is_dir())
                    .collect(),
            ),
        }
    }

    /// Whether any of its directories exists.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.directories().any(Path::is_dir)
    }

    /// The path below the root of each hierarchy, `/kubepods/pod1/0123`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The v2 directory, to be opened (`O_PATH` is enough) for `CLONE_INTO_CGROUP`. Nothing on v1.
    #[must_use]
    pub fn unified_dir(&self) -> Option<PathBuf> {
        match &self.place {
            Place::Unified(dir) => Some(dir.clone()),
            Place::Legacy(_) => None,
        }
    }

    /// The v1 files into each of which a process with one thread writes `0` to join; see the head
    /// of this file. Nothing on v2.
    #[must_use]
    pub fn join_files(&self) -> Vec<PathBuf> {
        match &self.place {
            Place::Unified(_) => Vec::new(),
            Place::Legacy(dirs) => dirs.iter().map(|dir| dir.path.join("tasks")).collect(),
        }
    }

    /// All its directories, one on v2, one for each hierarchy on v1.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        let (unified, legacy) = match &self.place {
            Place::Unified(dir) => (Some(dir.as_path()), &[][..]),
            Place::Legacy(dirs) => (None, dirs.as_slice()),
        };
        unified.into_iter().chain(legacy.iter().map(|dir| dir.path.as_path()))
    }

    /// The directory that has the files of `controller`.
    pub(crate) fn dir_of(&self, controller: &str) -> Option<&Path> {
        match &self.place {
            Place::Unified(dir) => Some(dir),
            Place::Legacy(dirs) => dirs
                .iter()
                .find(|dir| dir.controllers.iter().any(|name| name == controller))
                .map(|dir| dir.path.as_path()),
        }
    }

    /// One directory to name the cgroup by in errors.
    pub(crate) fn main_dir(&self) -> PathBuf {
        self.directories().next().map_or_else(|| PathBuf::from(&self.path), Path::to_path_buf)
    }
}

/// The ids of the cgroups directly below `parent`, in any hierarchy: what an earlier daemon may
/// have left there. Empty when the parent does not exist.
///
/// # Errors
/// [`Error::Read`].
pub fn leftovers(hierarchy: &Hierarchy, parent: &Parent) -> Result<BTreeSet<String>, Error> {
    let mounts: Vec<&Path> = match hierarchy {
        Hierarchy::Unified { mount } => vec![mount],
        Hierarchy::Legacy { mounts } => mounts.iter().map(|mount| mount.path.as_path()).collect(),
    };
    let mut names = BTreeSet::new();
    for mount in mounts {
        let above = below(mount, parent.path());
        let found =
            control_file::sub_directories(&above).map_err(|source| Error::Read { path: above, source })?;
        for dir in found {
            // A name that is not UTF-8 is not one of ours.
            let name = dir.file_name().and_then(OsStr::to_str);
            names.extend(name.and_then(|name| parent.id_of(name)).map(str::to_owned));
        }
    }
    Ok(names)
}

/// The most directories that [`leaves`] looks at.
const MAX_LOOKED_AT: usize = 50_000;

/// What [`leaves`] has found.
#[derive(Debug, Default)]
pub struct Leaves {
    /// The parents and ids of the leaves.
    pub found: Vec<(Parent, String)>,
    /// There are more directories than the limit; the rest were not looked at.
    pub is_cut: bool,
}

/// The leaves below any parent whose ids `is_id` accepts, as the hierarchy of the memory controller
/// has them, or the only one.
///
/// What is below a leaf belongs to its container, which may give it any name and mark, so it is not
/// looked at. Nor can other containers hide a leaf by making many cgroups: deeper ones come later.
///
/// # Errors
/// [`Error::Read`].
pub fn leaves(hierarchy: &Hierarchy, is_id: impl Fn(&str) -> bool) -> Result<Leaves, Error> {
    leaves_among(hierarchy, is_id, MAX_LOOKED_AT)
}

fn leaves_among(hierarchy: &Hierarchy, is_id: impl Fn(&str) -> bool, most: usize) -> Result<Leaves, Error> {
    let mut leaves = Leaves::default();
    let Some(mount) = hierarchy.mount_of("memory") else { return Ok(leaves) };
    let (mut next, mut looked_at) = (VecDeque::from([mount.to_path_buf()]), 0);
    while let Some(dir) = next.pop_front() {
        let below =
            control_file::sub_directories(&dir).map_err(|source| Error::Read { path: dir, source })?;
        looked_at += below.len();
        if looked_at > most {
            leaves.is_cut = true;
            break;
        }
        for dir in below {
            let path = dir.strip_prefix(mount).ok().and_then(Path::to_str).map(|path| format!("/{path}"));
            // A name that is not text, or not the path of a cgroup of ours, is skipped.
            let Some((parent, path)) = path.and_then(|path| Some((Parent::of(&path).ok()?, path))) else {
                continue;
            };
            let leaf = path.rsplit('/').next().unwrap_or_default();
            match parent.id_of(leaf).filter(|id| is_id(id)) {
                Some(id) => {
                    let id = id.to_owned();
                    leaves.found.push((parent, id));
                }
                None => next.push_back(dir),
            }
        }
    }
    Ok(leaves)
}

/// `path` is absolute or empty, normal, and checked by [`Parent`] and [`check_id`].
fn below(mount: &Path, path: &str) -> PathBuf {
    mount.join(path.trim_start_matches('/'))
}

/// mkdir(2) with its two expected refusals distinguished.
fn make_directory(path: &Path) -> Result<(), Error> {
    std::fs::create_dir(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            Error::ParentMissing { path: path.parent().map(Path::to_path_buf).unwrap_or_default() }
        }
        io::ErrorKind::AlreadyExists => Error::AlreadyExists { path: path.into() },
        _ => Error::Create { path: path.into(), source },
    })
}

/// The directories on the way from `mount` (not included) to `path` (included).
fn steps(mount: &Path, path: &str) -> Vec<PathBuf> {
    let mut at = mount.to_path_buf();
    let mut steps = Vec::new();
    for element in path.split('/').filter(|element| !element.is_empty()) {
        at.push(element);
        steps.push(at.clone());
    }
    steps
}

/// Creates a parent that a pod names, where it is missing. With the cgroupfs driver only: systemd
/// creates a slice with its first scope. On v1 it is created in the hierarchies in which a
/// container must have a cgroup. On an error, empty directories may be left.
///
/// # Errors
/// [`Error::Create`]; [`Error::Read`] and [`Error::Write`] when its cpuset cannot be filled or
/// controllers cannot be handed down to it.
pub fn create_parent(hierarchy: &Hierarchy, parent: &Parent) -> Result<(), Error> {
    match (parent.driver(), hierarchy) {
        (Driver::Systemd, _) => Ok(()),
        (Driver::Cgroupfs, Hierarchy::Unified { mount }) => make_unified_parent(mount, parent.path()),
        (Driver::Cgroupfs, Hierarchy::Legacy { mounts }) => mounts
            .iter()
            .filter(|mount| mount.is_needed())
            .try_for_each(|mount| make_legacy_parent(&mount.path, parent.path())),
    }
}

fn make_if_missing(path: &Path) -> Result<(), Error> {
    match make_directory(path) {
        // Another container of the same daemon may create it at the same moment.
        Ok(()) | Err(Error::AlreadyExists { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// A parent on v1. A cpuset in it must not stay empty, or none below it could be filled.
fn make_legacy_parent(mount: &Path, path: &str) -> Result<(), Error> {
    for step in steps(mount, path) {
        make_if_missing(&step)?;
        for file in CPUSET_FILES.iter().filter(|file| step.join(file).exists()) {
            filled_cpuset(&step, file)?;
        }
    }
    Ok(())
}

/// A parent on v2, with the controllers handed down all the way.
fn make_unified_parent(mount: &Path, path: &str) -> Result<(), Error> {
    let mut above = mount.to_path_buf();
    for step in steps(mount, path) {
        hand_down_controllers(&above)?;
        make_if_missing(&step)?;
        above = step;
    }
    Ok(())
}

/// Makes `dir` hand its controllers to its children where it does not yet:
/// `cgroup.subtree_control`, Documentation/admin-guide/cgroup-v2.rst, "Enabling and Disabling".
///
/// For a named parent this is the only change, and it has to be done here: kubelet hands
/// controllers down *to* the pod's cgroup, not below it.
fn hand_down_controllers(dir: &Path) -> Result<(), Error> {
    let control = dir.join("cgroup.subtree_control");
    let handed = control_file::read(&Direct, &control)?;
    let has = |list: &[u8], name: &str| {
        list.split(|byte| byte.is_ascii_whitespace()).any(|word| word == name.as_bytes())
    };
    if DELEGATED.iter().all(|name| has(&handed, name)) {
        return Ok(());
    }
    let available = control_file::read(&Direct, &dir.join("cgroup.controllers"))?;
    let mut request = String::new();
    for name in DELEGATED {
        if has(&available, name) && !has(&handed, name) {
            request.push_str(if request.is_empty() { "+" } else { " +" });
            request.push_str(name);
        }
    }
    if request.is_empty() { Ok(()) } else { control_file::write(&Direct, &control, &request) }
}

/// The two files without which a v1 cpuset takes no process: a new one has them empty, and joining
/// it gets `ENOSPC`, cpuset(7).
const CPUSET_FILES: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// Gives a new v1 cpuset its parent's processors and memory nodes.
fn inherit_cpuset(dir: &Path) -> Result<(), Error> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for file in CPUSET_FILES {
        control_file::write(&Direct, &dir.join(file), &filled_cpuset(parent, file)?)?;
    }
    Ok(())
}

/// The content of a cpuset's file, after filling it from the parents if it is empty.
fn filled_cpuset(dir: &Path, file: &str) -> Result<String, Error> {
    let path = dir.join(file);
    let value = control_file::read(&Direct, &path)?;
    let value = value.trim_ascii();
    if !value.is_empty() {
        return Ok(String::from_utf8_lossy(value).into_owned());
    }
    // Ends at the root of the hierarchy, which is never empty; above it there is no such file,
    // which the read reports.
    let Some(parent) = dir.parent() else {
        return Err(Error::Malformed { path, expected: "processors or memory nodes" });
    };
    let value = filled_cpuset(parent, file)?;
    control_file::write(&Direct, &path, &value)?;
    Ok(value)
}

/// Removes what a failed creation made. These directories are empty and not yet known to anyone, so
/// this can only fail where making them would have failed; the first error is the one to report.
fn undo(dirs: &[LegacyDir]) {
    for dir in dirs {
        let _ = std::fs::remove_dir(&dir.path);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{LegacyMount, Naming};

    /// A v1 tree of plain directories with one hierarchy per name.
    fn fake_legacy(names: &[&str]) -> (tempfile::TempDir, Hierarchy) {
        let root = tempfile::tempdir().unwrap();
        let mounts = names
            .iter()
            .map(|name| {
                let path = root.path().join(name);
                fs::create_dir(&path).unwrap();
                LegacyMount { path, controllers: name.split(',').map(str::to_owned).collect() }
            })
            .collect();
        (root, Hierarchy::Legacy { mounts })
    }

    fn fake_unified(available: &str) -> (tempfile::TempDir, Hierarchy) {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), available).unwrap();
        fs::write(root.path().join("cgroup.subtree_control"), "").unwrap();
        let mount = root.path().to_path_buf();
        (root, Hierarchy::Unified { mount })
    }

    fn parent(path: &str) -> Parent {
        Parent::named(Driver::Cgroupfs, path).unwrap()
    }

    #[test]
    fn a_leaf_is_made_in_every_legacy_hierarchy() {
        let (root, hierarchy) = fake_legacy(&["cpu,cpuacct", "memory", "pids"]);
        let cgroup = Cgroup::create(&hierarchy, &parent("/"), "c1").unwrap();
        assert_eq!(cgroup.path(), "/c1");
        assert_eq!(cgroup.directories().count(), 3);
        assert!(root.path().join("cpu,cpuacct/c1").is_dir());
        assert_eq!(cgroup.unified_dir(), None);
        let expected =
            ["cpu,cpuacct/c1/tasks", "memory/c1/tasks", "pids/c1/tasks"].map(|file| root.path().join(file));
        assert_eq!(cgroup.join_files(), expected);
        assert_eq!(cgroup.dir_of("cpuacct"), Some(root.path().join("cpu,cpuacct/c1").as_path()));
        assert_eq!(cgroup.dir_of("hugetlb"), None);
    }

    #[test]
    fn a_missing_named_parent_is_named_and_nothing_is_left() {
        let (root, hierarchy) = fake_legacy(&["cpu", "memory", "pids"]);
        fs::create_dir(root.path().join("cpu/pod")).unwrap();
        let error = Cgroup::create(&hierarchy, &parent("/pod"), "c1").unwrap_err();
        assert!(matches!(error, Error::ParentMissing { path } if path == root.path().join("memory/pod")));
        assert!(!root.path().join("cpu/pod/c1").exists());
        assert!(!root.path().join("memory/pod").exists());
    }

    #[test]
    fn a_named_parent_is_made_in_the_hierarchy_that_a_kubelet_leaves_out() {
        let (root, hierarchy) = fake_legacy(&["devices", "memory", "pids"]);
        fs::create_dir_all(root.path().join("memory/kubepods/pod")).unwrap();
        let named = parent("/kubepods/pod");
        let error = Cgroup::create(&hierarchy, &named, "c1").unwrap_err();
        assert!(
            matches!(error, Error::ParentMissing { path } if path == root.path().join("pids/kubepods/pod"))
        );
        assert!(!root.path().join("devices/kubepods").exists());

        fs::create_dir_all(root.path().join("pids/kubepods/pod")).unwrap();
        let cgroup = Cgroup::create(&hierarchy, &named, "c1").unwrap();
        assert_eq!(cgroup.directories().count(), 3);
        assert_eq!(cgroup.dir_of("devices"), Some(root.path().join("devices/kubepods/pod/c1").as_path()));
    }

    #[test]
    fn hierarchies_that_nothing_depends_on_are_followed_where_the_parent_is() {
        let (root, hierarchy) = fake_legacy(&["memory", "blkio", "name=systemd"]);
        for name in ["memory", "blkio"] {
            fs::create_dir(root.path().join(name).join("pod")).unwrap();
        }
        let cgroup = Cgroup::create(&hierarchy, &parent("/pod"), "c1").unwrap();
        assert_eq!(cgroup.directories().count(), 2);
        assert!(!root.path().join("name=systemd/pod").exists());
    }

    #[test]
    fn a_default_parent_is_made_and_its_leaves_are_listed() {
        let (root, hierarchy) = fake_legacy(&["cpu", "memory"]);
        let ours = Parent::default_of_daemon(Driver::Cgroupfs, "/deep/berth").unwrap();
        assert!(leftovers(&hierarchy, &ours).unwrap().is_empty());
        for id in ["a", "b"] {
            Cgroup::create(&hierarchy, &ours, id).unwrap();
        }
        fs::remove_dir(root.path().join("cpu/deep/berth/b")).unwrap();
        fs::write(root.path().join("cpu/deep/berth/tasks"), "").unwrap();
        assert_eq!(leftovers(&hierarchy, &ours).unwrap().into_iter().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn leaves_are_found_below_any_parent() {
        let (root, hierarchy) = fake_legacy(&["cpu", "memory"]);
        for path in ["kubepods/pod1/0a", "kubepods/pod1/other", "kubepods/pod2/crio-0b.scope", "0c/0d"] {
            fs::create_dir_all(root.path().join("memory").join(path)).unwrap();
        }
        for path in ["a.slice/a-b.slice/berth-0e.scope", "a.slice/0f.service/x"] {
            fs::create_dir_all(root.path().join("memory").join(path)).unwrap();
        }
        fs::create_dir_all(root.path().join("cpu/kubepods/pod3/0f")).unwrap();
        let is_id = |id: &str| id.len() == 2 && id.starts_with('0');
        let mut found = leaves(&hierarchy, is_id).unwrap().found;
        found.sort_by(|one, other| one.1.cmp(&other.1));
        let found: Vec<_> = found.iter().map(|(parent, id)| (parent.path(), id.as_str())).collect();
        assert_eq!(
            found,
            [("/kubepods/pod1", "0a"), ("/kubepods/pod2", "0b"), ("", "0c"), ("/a.slice/a-b.slice", "0e")]
        );
    }

    #[test]
    fn what_is_below_a_leaf_is_neither_found_nor_counted() {
        let (root, hierarchy) = fake_legacy(&["memory"]);
        let memory = root.path().join("memory");
        for path in
            ["pod/0a/0b", "pod/0a/x.slice/berth-0c.scope", "pod/0d", "other/0x/y.slice/berth-0e.scope"]
        {
            fs::create_dir_all(memory.join(path)).unwrap();
        }
        for number in 0..20 {
            fs::create_dir(memory.join(format!("pod/0a/{number}"))).unwrap();
        }
        let is_id = |id: &str| id.len() == 2 && id.starts_with('0') && id != "0x";
        let found = leaves_among(&hierarchy, is_id, 20).unwrap();
        let mut ids: Vec<_> = found.found.iter().map(|(_, id)| id.as_str()).collect();
        ids.sort_unstable();
        assert_eq!((ids, found.is_cut), (vec!["0a", "0d"], false));
    }

    #[test]
    fn many_cgroups_hide_none_that_is_less_deep() {
        let (root, hierarchy) = fake_legacy(&["memory"]);
        let memory = root.path().join("memory");
        let strangers = memory.join("others/stranger");
        for path in ["a/pod/0a", "z/pod/0b", "others/stranger"] {
            fs::create_dir_all(memory.join(path)).unwrap();
        }
        fs::create_dir(strangers.join("deep")).unwrap();
        for number in 0..20 {
            fs::create_dir(strangers.join("deep").join(number.to_string())).unwrap();
        }
        let is_id = |id: &str| id.len() == 2 && id.starts_with('0');
        let found = leaves_among(&hierarchy, is_id, 20).unwrap();
        let mut ids: Vec<_> = found.found.iter().map(|(_, id)| id.as_str()).collect();
        ids.sort_unstable();
        assert_eq!((ids, found.is_cut), (vec!["0a", "0b"], true));
    }

    #[test]
    fn a_leaf_is_found_again_whatever_leaves_are_called_now() {
        for (hierarchy, parent) in [
            (fake_legacy(&["cpu", "memory"]), parent("/")),
            (fake_unified("cpu memory"), parent("/")),
            (fake_unified("cpu memory"), Parent::named(Driver::Systemd, "-.slice").unwrap()),
        ] {
            let (_root, hierarchy) = hierarchy;
            let crio = parent.clone().with_naming(Naming::Crio);
            let made = Cgroup::create_empty(&hierarchy, &crio, "0a").unwrap();
            assert_eq!(made.path(), "/crio-0a.scope");
            assert!(matches!(
                Cgroup::create_empty(&hierarchy, &crio, "0a"),
                Err(Error::AlreadyExists { .. })
            ));
            let found = Cgroup::open(&hierarchy, &parent, "0a").unwrap();
            assert_eq!(found.path(), "/crio-0a.scope");
            assert_eq!(leftovers(&hierarchy, &parent).unwrap().into_iter().collect::<Vec<_>>(), ["0a"]);
            found.remove(std::time::Duration::ZERO).unwrap();
            assert!(!Cgroup::open(&hierarchy, &parent, "0a").unwrap().is_there());
        }
    }

    #[test]
    fn an_existing_leaf_is_refused_and_stays_whole() {
        let (root, hierarchy) = fake_legacy(&["cpu", "memory"]);
        fs::create_dir(root.path().join("memory/c1")).unwrap();
        let error = Cgroup::create(&hierarchy, &parent("/"), "c1").unwrap_err();
        assert!(matches!(error, Error::AlreadyExists { .. }));
        assert!(!root.path().join("cpu/c1").exists());
        assert!(root.path().join("memory/c1").exists());
    }

    #[test]
    fn opening_finds_what_is_there() {
        let (root, hierarchy) = fake_legacy(&["cpu", "memory"]);
        assert_eq!(Cgroup::open(&hierarchy, &parent("/"), "c1").unwrap().directories().count(), 0);
        fs::create_dir(root.path().join("memory/c1")).unwrap();
        let cgroup = Cgroup::open(&hierarchy, &parent("/"), "c1").unwrap();
        assert_eq!(cgroup.directories().collect::<Vec<_>>(), [root.path().join("memory/c1")]);
    }

    #[test]
    fn ids_that_climb_are_refused() {
        let (_root, hierarchy) = fake_legacy(&["cpu"]);
        for id in ["..", "a/../../b", ""] {
            assert!(matches!(Cgroup::create(&hierarchy, &parent("/"), id), Err(Error::InvalidId { .. })));
            assert!(matches!(Cgroup::open(&hierarchy, &parent("/"), id), Err(Error::InvalidId { .. })));
        }
    }

    #[test]
    fn an_empty_cpuset_is_filled_from_the_nearest_parent_that_has_one() {
        let (root, _) = fake_legacy(&["cpuset"]);
        let top = root.path().join("cpuset");
        let leaf = top.join("pod/c1");
        fs::create_dir_all(&leaf).unwrap();
        for (dir, cpus) in [(top.clone(), "0-3\n"), (top.join("pod"), "\n"), (leaf.clone(), "\n")] {
            fs::write(dir.join("cpuset.cpus"), cpus).unwrap();
            fs::write(dir.join("cpuset.mems"), "0\n").unwrap();
        }
        inherit_cpuset(&leaf).unwrap();
        for dir in [top.join("pod"), leaf] {
            assert!(fs::read_to_string(dir.join("cpuset.cpus")).unwrap().starts_with("0-3"));
        }
    }

    #[test]
    fn controllers_are_handed_down_once_and_only_those_that_are_there() {
        let (root, hierarchy) = fake_unified("cpuset cpu io memory pids rdma misc\n");
        let cgroup = Cgroup::create(&hierarchy, &parent("/"), "c1").unwrap();
        assert_eq!(cgroup.unified_dir(), Some(root.path().join("c1")));
        assert!(cgroup.join_files().is_empty());
        let control = root.path().join("cgroup.subtree_control");
        assert_eq!(fs::read_to_string(&control).unwrap(), "+cpu +cpuset +io +memory +pids");
        fs::write(&control, "cpuset cpu io memory pids\n").unwrap();
        Cgroup::create(&hierarchy, &parent("/"), "c2").unwrap();
        assert_eq!(fs::read_to_string(&control).unwrap(), "cpuset cpu io memory pids\n");
    }

    #[test]
    fn a_missing_named_parent_is_named_on_v2_too() {
        let (root, hierarchy) = fake_unified("cpu memory pids\n");
        let error = Cgroup::create(&hierarchy, &parent("/kubepods/pod1"), "c1").unwrap_err();
        assert!(matches!(error, Error::ParentMissing { path } if path == root.path().join("kubepods/pod1")));
        assert!(!root.path().join("kubepods").exists());
    }
}
