//! The sockets of other runtimes, which kubeadm finds by itself.

use crate::{Finding, Grade, finding, text};
use std::path::Path;

/// Where kubeadm looks for sockets (`defaultKnownCRISockets`), with whose each is. Kubernetes says `/var/run`, which is `/run`.
const OTHER_SOCKETS: [(&str, &str); 3] = [
    ("run/containerd/containerd.sock", "containerd"),
    ("run/crio/crio.sock", "CRI-O"),
    ("run/cri-dockerd.sock", "cri-dockerd"),
];

pub(crate) fn look(node: &Path) -> impl Iterator<Item = Finding> {
    let sockets = text(node, "proc/net/unix").unwrap_or_default();
    OTHER_SOCKETS.into_iter().filter(|(path, _)| node.join(path).exists()).map(move |(path, name)| {
        let text = if is_served(&sockets, path) {
            format!("{name} serves /{path}: kubeadm finds it too; pass --cri-socket, or stop and disable {name}")
        } else {
            format!(
                "/{path} is left over from {name}, which does not run: kubeadm finds it all the same; remove the file, or pass \
                 --cri-socket"
            )
        };
        finding(Grade::Note, "runtimes", text)
    })
}

/// Whether somebody listens on a socket, by the table of proc(5), `/proc/net/unix`: `Num RefCount Protocol Flags Type St Inode Path`, where
/// `__SO_ACCEPTCON` of <linux/net.h> is among the flags.
fn is_served(sockets: &str, path: &str) -> bool {
    const LISTENS: u64 = 1 << 16;
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace();
        let flags = words.nth(3).and_then(|flags| u64::from_str_radix(flags, 16).ok()).unwrap_or(0);
        let place = words.nth(3).unwrap_or_default();
        let place = place.strip_prefix("/var").unwrap_or(place);
        flags & LISTENS != 0 && place.strip_prefix('/') == Some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{daemon, each_is_named, troubles};

    #[test]
    fn sockets_that_nobody_serves_are_leftovers() {
        use Grade::Note;
        each_is_named(&[
            ("run/containerd/containerd.sock", Some(""), Note, "runtimes", "left over from containerd"),
            ("run/crio/crio.sock", Some(""), Note, "runtimes", "left over from CRI-O"),
            ("run/cri-dockerd.sock", Some(""), Note, "runtimes", "--cri-socket"),
        ]);
    }

    #[test]
    fn sockets_that_are_served_are_told_from_leftovers() {
        let head = "Num       RefCount Protocol Flags    Type St Inode Path\n";
        let socket = ("run/containerd/containerd.sock", Some(""));
        for (flags, place, served) in [
            ("00010000", "/run/containerd/containerd.sock", true),
            ("00010000", "/var/run/containerd/containerd.sock", true),
            // Connected to, not listened on.
            ("00000000", "/run/containerd/containerd.sock", false),
            ("00010000", "/run/containerd/containerd.sock.ttrpc", false),
            ("00010000", "@/run/containerd/containerd.sock", false),
            ("garbage", "", false),
        ] {
            let table = format!("{head}0000000000000000: 00000002 00000000 {flags} 0001 01 12345 {place}\n");
            let troubles = troubles(&[socket, ("proc/net/unix", Some(&table))], &daemon());
            let [trouble] = troubles.as_slice() else { panic!("{troubles:?}") };
            assert_eq!(trouble.text.contains("containerd serves"), served, "{flags} {place}: {trouble:?}");
        }
    }
}
