//! The sockets of other runtimes, which kubeadm detects.

use std::path::Path;

use crate::{Daemon, Finding, Grade, finding, text, without_var};

/// The sockets that kubeadm looks for (`defaultKnownCRISockets`), and their runtimes. Kubernetes
/// says `/var/run`, which is `/run`.
const OTHER_SOCKETS: [(&str, &str); 3] = [
    ("run/containerd/containerd.sock", "containerd"),
    ("run/crio/crio.sock", "CRI-O"),
    ("run/cri-dockerd.sock", "cri-dockerd"),
];

pub(crate) fn look(node: &Path, daemon: &Daemon) -> impl Iterator<Item = Finding> {
    let sockets = text(node, "proc/net/unix").unwrap_or_default();
    let berths = daemon.cadvisor_socket.as_ref().map(|path| path.to_string_lossy().into_owned());
    let endpoint = format!("unix://{}", daemon.socket.display());
    OTHER_SOCKETS.into_iter().filter(|(path, _)| node.join(path).exists()).map(move |(path, name)| {
        let is_berths = berths.as_deref().is_some_and(|own| without_var(own).strip_prefix('/') == Some(path));
        let text = if is_berths {
            format!("/{path} is Berth's own, for cAdvisor: kubeadm takes it for {name}'s; pass --cri-socket {endpoint}")
        } else if is_served(&sockets, path) {
            format!("{name} serves /{path}: kubeadm finds it too; pass --cri-socket {endpoint}, or stop and disable {name}")
        } else {
            format!(
                "/{path} is left over from {name}, which is not running, but kubeadm finds it: remove the file, or pass \
                 --cri-socket {endpoint}"
            )
        };
        finding(Grade::Note, "runtimes", text)
    })
}

/// Whether a process listens on a socket, by the table of proc(5), `/proc/net/unix`: `Num RefCount
/// Protocol Flags Type St Inode Path`, where `__SO_ACCEPTCON` of <linux/net.h> is among the flags.
fn is_served(sockets: &str, path: &str) -> bool {
    const LISTENS: u64 = 1 << 16;
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace();
        let flags = words.nth(3).and_then(|flags| u64::from_str_radix(flags, 16).ok()).unwrap_or(0);
        let place = words.nth(3).unwrap_or_default();
        flags & LISTENS != 0 && without_var(place).strip_prefix('/') == Some(path)
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
    fn the_socket_for_cadvisor_is_told_from_that_of_cri_o() {
        let socket = ("run/crio/crio.sock", Some(""));
        let daemon = |path: &str| Daemon { cadvisor_socket: Some(path.into()), ..daemon() };
        for (path, own) in
            [("/var/run/crio/crio.sock", true), ("/run/crio/crio.sock", true), ("/elsewhere", false)]
        {
            let troubles = troubles(&[socket], &daemon(path));
            let [trouble] = troubles.as_slice() else { panic!("{troubles:?}") };
            assert_eq!(trouble.text.contains("Berth's own"), own, "{path}: {trouble:?}");
        }
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
