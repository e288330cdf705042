//! The filesystem that writable layers are on, and block devices by name.

use std::collections::HashMap;
use std::path::Path;

use berth_cgroup::DeviceIo;

use crate::node::Node;

/// What holds for all containers of a look.
pub(crate) struct Disk {
    /// The source of the mount that writable layers are on, as `/dev/sda1`.
    pub(crate) device: String,
    /// Its bytes, free bytes, inodes and free inodes.
    pub(crate) space: Option<(u64, u64, u64, u64)>,
    /// Names of block devices by their numbers.
    names: HashMap<(u32, u32), String>,
}

impl Disk {
    pub(crate) fn new(node: &Node) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let root = node.layout.root();
        Self {
            device: source_of(&mounts, root).unwrap_or_default().to_owned(),
            space: berth_sys::file::space(root).ok(),
            names: HashMap::new(),
        }
    }

    /// `/dev/sda` for 8:0, as the links in `/sys/dev/block` have it; the numbers themselves for a
    /// device that is gone.
    pub(crate) fn name_of(&mut self, io: &DeviceIo) -> &str {
        self.names.entry((io.major, io.minor)).or_insert_with(|| {
            let link = std::fs::read_link(format!("/sys/dev/block/{}:{}", io.major, io.minor));
            let name = link.ok().and_then(|link| Some(link.file_name()?.to_str()?.to_owned()));
            name.map_or_else(|| format!("{}:{}", io.major, io.minor), |name| format!("/dev/{name}"))
        })
    }
}

/// The source of the mount that has `path`, from the text of proc_pid_mountinfo(5): of those that
/// it is below, the one with the longest mount point, and of these the last, which covers the
/// others.
fn source_of<'a>(mounts: &'a str, path: &Path) -> Option<&'a str> {
    let mut best: Option<(usize, &str)> = None;
    for line in mounts.lines() {
        let Some((head, tail)) = line.split_once(" - ") else { continue };
        let (Some(point), Some(source)) = (head.split(' ').nth(4), tail.split(' ').nth(1)) else { continue };
        if path.starts_with(point) && best.is_none_or(|(length, _)| point.len() >= length) {
            best = Some((point.len(), source));
        }
    }
    best.map(|(_, source)| source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_of_a_directory_is_that_of_the_mount_on_top() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
            2 1 8:2 / /var rw shared:1 - xfs /dev/sdb1 rw\n\
            3 1 8:3 / /var/lib/berth rw - ext4 /dev/sdc1 rw\n\
            4 1 8:3 /x /var/lib/berth rw - ext4 /dev/sdd1 rw\nodd\n5 1 8:1 / /odd\n";
        for (path, expected) in [
            ("/var/lib/berth", Some("/dev/sdd1")),
            ("/var/lib/berthx", Some("/dev/sdb1")),
            ("/srv", Some("/dev/sda1")),
        ] {
            assert_eq!(source_of(mounts, Path::new(path)), expected, "{path}");
        }
        assert_eq!(source_of("", Path::new("/")), None);
    }
}
