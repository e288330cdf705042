//! A nasty image as this crate unpacks and stacks it, against what `umoci unpack` makes of the same
//! image. Needs root.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod support;

use std::process::Command;

use berth_image::ImportSource;

use support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_nasty_image_is_the_tree_that_umoci_makes() {
    if Command::new("umoci").arg("--version").output().is_err() {
        skip_without("umoci");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = Built::new(&nasty_layers(), Packing::Gzip, Family::Oci, "nasty");
    let layout = dir.path().join("layout");
    image.write_layout(&layout, "latest");

    let bundle = dir.path().join("bundle");
    let umoci = Command::new("umoci")
        .args(["unpack", "--image", &format!("{}:latest", layout.display())])
        .arg(&bundle)
        .output()
        .unwrap();
    assert!(umoci.status.success(), "{}", String::from_utf8_lossy(&umoci.stderr));

    let store = store(&dir.path().join("store"));
    let images = store.import(ImportSource::directory(&layout).unwrap(), None, quiet()).await.unwrap();
    let lower = directories(store.stored_layers(&images[0])).unwrap();
    let ours = without_unknown_times(&describe_overlay(&lower, dir.path()));
    let theirs = without_unknown_times(&describe(&bundle.join("rootfs")));
    let difference: Vec<String> = ours
        .lines()
        .filter(|line| !theirs.contains(line))
        .map(|line| format!("+ {line}"))
        .chain(theirs.lines().filter(|line| !ours.contains(line)).map(|line| format!("- {line}")))
        .collect();
    assert!(difference.is_empty(), "ours +, umoci's -:\n{}", difference.join("\n"));
    assert_eq!(ours, theirs);
}

/// Directories that no layer describes have the time of the unpacking with umoci, and none with us.
fn without_unknown_times(tree: &str) -> String {
    let unknown =
        |path: &str| ["deep", "deep/a", "deep/a/b", "long", "once"].contains(&path) || path.ends_with("ddd");
    let line = |line: &str| {
        let mut fields: Vec<&str> = line.split('|').collect();
        if fields[0] == "M" && unknown(fields[1]) {
            fields[5] = "";
        }
        fields.join("|")
    };
    tree.lines().map(line).collect::<Vec<_>>().join("\n")
}

fn nasty_layers() -> Vec<Vec<u8>> {
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let long = format!("long/{}/{}", "d".repeat(150), "f".repeat(200));
    let base = Layer::new()
        .add("./", Entry { kind: b'5', mode: 0o755, ..Entry::default() }, b"")
        .add("usr", Entry { kind: b'5', ..Entry::default() }.mode(0o751).owner(3, 4).mtime(1234), b"")
        .add("usr/lib", Entry { kind: b'5', ..Entry::default() }.mode(0o1777).mtime(77), b"")
        .file("usr/lib/libc.so", b"libc")
        .symlink("lib", "usr/lib")
        .add("usr/bin", Entry { kind: b'5', ..Entry::default() }.mode(0o755), b"")
        .add("usr/bin/su", Entry::default().mode(0o4755).owner(0, 42), b"setuid")
        .add("usr/bin/sgid", Entry::default().mode(0o2755).owner(5, 6), b"setgid")
        .add(
            "usr/bin/ping",
            Entry::default().mode(0o755).pax("SCHILY.xattr.security.capability", capability),
            b"caps",
        )
        .add(
            "etc",
            Entry { kind: b'5', ..Entry::default() }.mode(0o700).pax("SCHILY.xattr.user.dir", b"d"),
            b"",
        )
        .add(
            "etc/passwd",
            Entry::default().mtime(99).pax("SCHILY.xattr.user.note", b"a=\nb"),
            b"root:x:0:0\n",
        )
        .hard_link("etc/passwd.link", "etc/passwd")
        .file("etc/removed", b"gone")
        .dir("opaque", 0o755)
        .file("opaque/old", b"old")
        .add("opaque/sub", Entry { kind: b'5', ..Entry::default() }.mode(0o711).mtime(4242), b"")
        .file("opaque/sub/old", b"old")
        .dir("replaced-by-file", 0o755)
        .file("replaced-by-file/x", b"x")
        .file("replaced-by-dir", b"file")
        .dir("gone", 0o755)
        .file("gone/a", b"a")
        .dir("back", 0o700)
        .file("back/before", b"before")
        .node("dev-null", b'3', (1, 3), 0o666)
        .node("loop", b'4', (7, 0), 0o660)
        .node("pipe", b'6', (0, 0), 0o622)
        .symlink("dangling", "../../../nowhere")
        .symlink("absolute", "/etc/passwd")
        .add(&long, Entry::default(), b"long names")
        .add("fraction", Entry::default().pax("mtime", b"1500000000.123456789"), b"ns")
        .add("big-owner", Entry::default().pax("uid", b"3000000").pax("gid", b"3000001"), b"o")
        .add("caf\u{e9}", Entry::default(), b"utf8")
        .add("empty", Entry::default().mode(0), b"")
        .file("deep/a/b/c", b"deep")
        .file("lower-file", b"of the lower layer")
        .tar();
    let middle = Layer::new()
        // No entries for usr and usr/lib: their attributes must survive.
        .file("usr/lib/new.so", b"new")
        .file("etc/.wh.removed", b"")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/new", b"new")
        .file("replaced-by-file", b"now a file")
        .dir("replaced-by-dir", 0o750)
        .file("replaced-by-dir/y", b"y")
        .file(".wh.gone", b"")
        .add("etc/passwd", Entry::default().mtime(100), b"root:x:0:0:changed\n")
        // No entry for lib, which is a link below: the content belongs where it leads.
        .file("lib/through-link.so", b"through")
        .add("lib/modules", Entry { kind: b'5', ..Entry::default() }.mode(0o710).mtime(31337), b"")
        .file("lib/modules/m", b"m")
        .file("lib/.wh.libc.so", b"")
        .file("once/twice", b"1")
        .file("once/twice", b"2")
        .tar();
    let top = Layer::new()
        // A hard link to a file two layers down.
        .hard_link("lower-link", "lower-file")
        .hard_link("usr/lib/second-link", "lower-file")
        .file(".wh.back", b"")
        .dir("back", 0o705)
        .file("back/after", b"after")
        .file("deep/a/b/d", b"deeper")
        .tar();
    vec![base, middle, top]
}
