//! Hostile archives against a canary outside the root: each ends in an error or inside the root.
//! Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "what cannot be set up fails the test; skips are said aloud"
)]

mod support;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use berth_image::unpack::{Summary, UnpackError, unpack};
use berth_image::{Image, ImportError, ImportSource, Store};
use berth_sys::beneath::{Root, Walk};

use support::*;

struct Case {
    dir: tempfile::TempDir,
    canary: Canary,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let canary = Canary::new(&dir.path().join("canary"));
        fs::create_dir(dir.path().join("root")).unwrap();
        Self { dir, canary }
    }

    fn root(&self) -> std::path::PathBuf {
        self.dir.path().join("root")
    }

    fn unpack(&self, layer: Layer) -> Result<Summary, UnpackError> {
        unpack(&layer.tar()[..], &Root::open(&self.root()).unwrap())
    }
}

fn entry(kind: u8) -> Entry {
    Entry { kind, ..Entry::default() }
}

fn linked(kind: u8, target: &str) -> Entry {
    Entry { kind, link: target.into(), mode: 0o777, ..Entry::default() }
}

#[test]
fn no_path_leads_out_of_the_root() {
    let canary_path = Case::new();
    let to = canary_path.canary.path().to_owned();
    let mut cases: Vec<(&str, Layer)> = vec![
        ("file through an absolute link", Layer::new().symlink("a", &to).file("a/secret", b"owned")),
        ("file through a relative link", Layer::new().symlink("a", "../canary").file("a/secret", b"owned")),
        ("directory through a link", Layer::new().symlink("a", &to).dir("a/sub", 0o777)),
        ("link over a directory", Layer::new().dir("a", 0o755).symlink("a", &to).file("a/secret", b"owned")),
        ("directory over a link", Layer::new().symlink("a", &to).dir("a", 0o777).file("a/secret", b"owned")),
        ("parent components", Layer::new().file("../canary/secret", b"owned")),
        ("parent components inside", Layer::new().file("x/../../canary/secret", b"owned")),
        ("absolute name", Layer::new().file(&format!("{to}/secret"), b"owned")),
        ("root as a link", Layer::new().symlink("./", &to).file("secret", b"owned")),
        ("root as a file", Layer::new().file("./", b"")),
        ("root as a hard link", Layer::new().hard_link(".", "etc")),
        ("attributes through a link", Layer::new().symlink("a", &to).add("a", entry(b'5').mode(0o777), b"")),
        ("file over a link", Layer::new().symlink("a", &format!("{to}/secret")).file("a", b"owned")),
        ("device through a link", Layer::new().symlink("a", &to).node("a/dev", b'3', (1, 3), 0o666)),
        (
            "FIFO over a link",
            Layer::new().symlink("a", &format!("{to}/secret")).node("a", b'6', (0, 0), 0o666),
        ),
        (
            "hard link to an absolute path",
            Layer::new().hard_link("h", &format!("{to}/secret")).file("h", b"owned"),
        ),
        ("hard link up", Layer::new().hard_link("h", "../canary/secret")),
        (
            "hard link through a link",
            Layer::new().symlink("a", &to).hard_link("h", "a/secret").file("h", b"owned"),
        ),
        (
            "hard link to a link, then a file",
            Layer::new().symlink("a", &format!("{to}/secret")).hard_link("h", "a").file("h", b"x"),
        ),
        (
            "hard link to a link, then attributes",
            Layer::new().symlink("a", &format!("{to}/secret")).hard_link("h", "a").add("h", entry(b'5'), b""),
        ),
        (
            "hard link onto a linked directory",
            Layer::new().symlink("a", &to).file("f", b"f").hard_link("a/secret", "f"),
        ),
        ("hard link to a directory", Layer::new().dir("d", 0o755).hard_link("h", "d")),
        ("hard link to itself", Layer::new().hard_link("h", "h")),
        ("whiteout through a link", Layer::new().symlink("a", &to).file("a/.wh.secret", b"")),
        ("whiteout of the parent", Layer::new().file("a/.wh...", b"")),
        ("whiteout of the directory", Layer::new().file("a/.wh..", b"")),
        ("whiteout of nothing", Layer::new().file(".wh.", b"")),
        ("whiteout behind a parent", Layer::new().file("dne/../../.wh.canary", b"")),
        ("opaque through a link", Layer::new().symlink("a", &to).file("a/.wh..wh..opq", b"")),
        ("whiteout as a directory", Layer::new().dir(".wh.x", 0o755).file(".wh.x/y", b"")),
        ("whiteout as a link", Layer::new().symlink(".wh.x", &to)),
        ("opaque as a link", Layer::new().symlink(".wh..wh..opq", &to)),
        ("AUFS below a parent", Layer::new().file("../.wh..wh.plnk/secret", b"owned")),
        ("AUFS through a link", Layer::new().symlink("a", &to).file("a/.wh..wh.plnk/secret", b"owned")),
        ("AUFS as a link", Layer::new().symlink(".wh..wh.plnk", &to).file(".wh..wh.plnk/secret", b"owned")),
        ("whiteout in the middle", Layer::new().file(".wh.x/secret", b"")),
        (
            "whiteout name with a slash in PAX",
            Layer::new().add("x", entry(b'0').pax("path", b".wh.../canary"), b""),
        ),
        (
            "NUL in a PAX path",
            Layer::new().add("x", entry(b'0').pax("path", b"a\0/../../canary/secret"), b""),
        ),
        (
            "PAX link target",
            Layer::new()
                .add("a", linked(b'2', "x").pax("linkpath", to.as_bytes()), b"")
                .file("a/secret", b"owned"),
        ),
    ];
    let mut chain = Layer::new();
    for i in 0..41 {
        chain = chain.symlink(&format!("l{i}"), &format!("l{}", i + 1));
    }
    cases.push(("chain of 41 links", chain.symlink("l41", &to).file("l0/secret", b"owned")));
    for (name, layer) in cases {
        let case = Case::new();
        let result = case.unpack(layer);
        canary_path.canary.assert_untouched(name);
        case.canary.assert_untouched(name);
        // Whatever was made is removable, too.
        drop(result);
        fs::remove_dir_all(case.root()).unwrap();
    }
}

#[test]
fn links_are_followed_inside_as_if_the_root_were_everything() {
    let case = Case::new();
    case.unpack(
        Layer::new()
            .dir("real", 0o755)
            .symlink("abs", "/real")
            .file("abs/f", b"x")
            .symlink("up", "../../real")
            .file("up/g", b"y"),
    )
    .unwrap();
    assert_eq!(fs::read(case.root().join("real/f")).unwrap(), b"x");
    assert_eq!(fs::read(case.root().join("real/g")).unwrap(), b"y");
}

#[test]
fn forged_whiteouts_and_overlay_attributes_have_no_effect() {
    for (name, layer) in [
        ("char 0:0", Layer::new().node("x", b'3', (0, 0), 0o600)),
        ("hard link to a whiteout", Layer::new().file(".wh.x", b"").hard_link("y", "x")),
        (
            "device number too large",
            Layer::new().add("x", Entry { kind: b'3', device: (4096, 0), ..Entry::default() }, b""),
        ),
    ] {
        assert!(matches!(Case::new().unpack(layer), Err(UnpackError::Refused { .. })), "{name}");
    }
    let case = Case::new();
    let mut dir = entry(b'5').pax("SCHILY.xattr.user.kept", b"1");
    for forged in [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.overlay.metacopy",
        "user.overlay.opaque",
        "security.ima",
        "security.selinux",
        "system.posix_acl_access",
    ] {
        dir = dir.pax(&format!("SCHILY.xattr.{forged}"), b"y");
    }
    case.unpack(Layer::new().add("d", dir, b"")).unwrap();
    let listed = std::process::Command::new("getfattr")
        .args(["-m", "-", "-d"])
        .arg(case.root().join("d"))
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("user.kept"), "{listed}");
    assert!(!["overlay", "ima", "selinux", "posix"].iter().any(|name| listed.contains(name)), "{listed}");
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let case = Case::new();
    let summary = case
        .unpack(
            Layer::new()
                .file("same", b"stays")
                .file(".wh.same", b"")
                .dir("dir", 0o755)
                .file("dir/kept", b"k")
                .file(".wh.dir", b"")
                .file(".wh.hidden", b"")
                .file(".wh.reborn", b"")
                .file("reborn/x", b"x")
                .file(".wh..wh..opq", b""),
        )
        .unwrap();
    let root = case.root();
    assert_eq!(fs::read(root.join("same")).unwrap(), b"stays");
    assert_eq!(fs::read(root.join("dir/kept")).unwrap(), b"k");
    let hidden = fs::symlink_metadata(root.join("hidden")).unwrap();
    assert!(hidden.file_type().is_char_device() && hidden.rdev() == 0);
    assert!(summary.opaque_root);
    let opaque = |path: &str| {
        let out = std::process::Command::new("getfattr")
            .args(["-n", "trusted.overlay.opaque"])
            .arg(root.join(path))
            .output();
        out.unwrap().status.success()
    };
    assert!(opaque("dir") && opaque("reborn"));
    assert!(!summary.implicit_dirs.contains(&"reborn".into()));
}

#[test]
fn bounds_on_names_and_depth_are_kept() {
    let deep = "d/".repeat(1024) + "f";
    for (name, path, fine) in [
        ("depth 1024", "d/".repeat(1023) + "f", true),
        ("depth 1025", deep, false),
        ("name of 255", "n".repeat(255), true),
        ("name of 256", "n".repeat(256), false),
        ("path above 4095", ["n".repeat(250), "m".repeat(250)].join("/").repeat(9), false),
    ] {
        let case = Case::new();
        let unpacked = case.unpack(Layer::new().file(&path, b"x"));
        assert_eq!(unpacked.is_ok(), fine, "{name}: {unpacked:?}");
    }
    let case = Case::new();
    assert!(case.unpack(Layer::new().symlink("l", &"t".repeat(4095))).is_ok());
    assert!(case.unpack(Layer::new().symlink("m", &"t".repeat(4096))).is_err());
    assert!(case.unpack(Layer::new().symlink("e", "")).is_err());
}

async fn import(store: &Store, layers: &[Vec<u8>]) -> Result<Image, ImportError> {
    let image = Built::new(layers, Packing::Plain, Family::Oci, "hostile");
    let layout = tempfile::tempdir().unwrap();
    image.write_layout(layout.path(), "hostile:v");
    let source = ImportSource::directory(layout.path()).unwrap();
    store.import(source, None, quiet()).await.map(|mut images| images.pop().unwrap())
}

/// A path is bounded, but may begin at a link to where the one before it ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_tree_that_links_make_deeper_than_any_path_is_taken_and_deleted() {
    // In memory, where such a tree is made and removed quickly.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut layer = Layer::new();
    for number in 0..5 {
        let mut path = if number == 0 { "d".to_owned() } else { format!("link{}/d", number - 1) };
        for _ in 1..1000 {
            layer = layer.dir(&path, 0o755);
            path.push_str("/d");
        }
        layer = layer.dir(&path, 0o755).symlink(&format!("link{number}"), &path);
    }
    layer = layer.file("link4/file", b"x").hard_link("again", "link4/file");
    let store = store(dir.path());
    let image = import(&store, &[layer.tar()]).await.unwrap();
    let lower = directories(store.stored_layers(&image)).unwrap();
    let bottom = lower.last().unwrap();
    assert_eq!(fs::read(bottom.join("again")).unwrap(), b"x");
    let root = Root::open(bottom).unwrap();
    let mut walk = Walk::new(&root.open_dir(Path::new(".")).unwrap()).unwrap();
    while walk.step().unwrap() {}
    assert_eq!(walk.usage().inodes, 5 * 1000 + 5 + 1);
    assert!(store.remove("hostile:v", nobody).await.unwrap());
    soon("it is deleted", || names(&dir.path().join("layers")).is_empty());
}

/// Links of a lower layer that lead to and fro, and directories without an entry in their places
/// above.
#[tokio::test(flavor = "multi_thread")]
async fn layers_that_take_long_to_be_compared_are_refused() {
    let to_and_fro = "d/../".repeat(800);
    let layers = |count: usize| {
        let mut lower = Layer::new().dir("d", 0o755).symlink("link0", &format!("{to_and_fro}d"));
        for number in 1..30 {
            lower = lower.symlink(&format!("link{number}"), &format!("link{}/../{to_and_fro}d", number - 1));
        }
        let mut upper = Layer::new();
        for number in 0..count {
            lower = lower.symlink(&format!("in{number}"), "link29");
            upper = upper.file(&format!("in{number}/file{number}"), b"x");
        }
        [lower.tar(), upper.tar()]
    };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = store(dir.path());
    let image = import(&store, &layers(2)).await.unwrap();
    let lower = directories(store.stored_layers(&image)).unwrap();
    assert!(lower.iter().any(|dir| fs::read(dir.join("d/file1")).is_ok_and(|content| content == b"x")));
    let refused = format!("{:?}", import(&store, &layers(1000)).await.unwrap_err());
    assert!(refused.contains("take too long to be compared"), "{refused}");
    assert_eq!(store.list().len(), 1);
}

#[test]
fn the_layer_says_what_it_left_open() {
    let case = Case::new();
    let summary = case
        .unpack(
            Layer::new()
                .file("a/b/c", b"x")
                .dir("a/b", 0o700)
                .file("e/f", b"x")
                .file("e", b"now a file")
                .hard_link("link", "lower/file")
                .hard_link("again", "link")
                .hard_link("dropped", "lower/other")
                .file("dropped", b"own"),
        )
        .unwrap();
    assert_eq!(summary.implicit_dirs, ["", "a"].map(std::path::PathBuf::from));
    let links: Vec<_> =
        summary.lower_links.iter().map(|l| (l.name.to_str().unwrap(), l.target.to_str().unwrap())).collect();
    assert_eq!(links, [("again", "lower/file"), ("link", "lower/file")]);
    let mode = |path: &str| fs::metadata(case.root().join(path)).unwrap().mode() & 0o7777;
    assert_eq!((mode("a"), mode("a/b")), (0o755, 0o700));
}

#[test]
fn owners_modes_and_times_are_exact_whatever_the_order() {
    let case = Case::new();
    case.unpack(
        Layer::new()
            .add("d", entry(b'5').mode(0o2775).owner(7, 8).mtime(11), b"")
            .add("d/s", entry(b'0').mode(0o6755).owner(9, 10).mtime(12), b"x")
            .add("e/s", entry(b'0').mtime(13), b"x")
            .add("e", entry(b'5').mtime(14), b"")
            .add("d/l", linked(b'2', "nowhere").owner(11, 12).mtime(15), b"")
            .add("d/p", entry(b'6').mode(0o1666).owner(13, 14).mtime(16), b""),
    )
    .unwrap();
    let look = |path: &str| {
        let m = fs::symlink_metadata(case.root().join(Path::new(path))).unwrap();
        (m.mode() & 0o7777, m.uid(), m.gid(), m.mtime())
    };
    assert_eq!(look("d"), (0o2775, 7, 8, 11));
    assert_eq!(look("d/s"), (0o6755, 9, 10, 12));
    assert_eq!(look("e").3, 14);
    assert_eq!(look("d/l"), (0o777, 11, 12, 15));
    assert_eq!(look("d/p"), (0o1666, 13, 14, 16));
}

#[test]
fn bookkeeping_of_aufs_is_no_part_of_the_image() {
    let case = Case::new();
    let layer = Layer::new()
        .file(".wh..wh.aufs", b"")
        .dir(".wh..wh.orph", 0o700)
        .dir(".wh..wh.plnk", 0o700)
        .file(".wh..wh.plnk/1.2", b"content")
        .dir("d", 0o755)
        .file("d/.wh..wh.other", b"x")
        // AUFS made whiteouts hard links of one file.
        .hard_link("d/.wh.gone", ".wh..wh.aufs")
        .hard_link("d/.wh..wh..opq", ".wh..wh.aufs")
        .file("d/file", b"file");
    let summary = case.unpack(layer).unwrap();
    assert_eq!(summary.lower_links, []);
    let mut names: Vec<_> = fs::read_dir(case.root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["d"]);
    let gone = fs::symlink_metadata(case.root().join("d/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    assert_eq!(fs::read_dir(case.root().join("d")).unwrap().count(), 2);
    assert_eq!(fs::read(case.root().join("d/file")).unwrap(), b"file");
}

#[test]
fn a_sparse_file_has_its_content_and_takes_no_room_for_its_holes() {
    let case = Case::new();
    let size = 300_u64 << 30;
    let middle = size / 2;
    let sparse = |entry: Entry, size: u64, map: &str| {
        entry
            .pax("GNU.sparse.size", size.to_string().as_bytes())
            .pax("GNU.sparse.name", b"var/log/lastlog")
            .pax("GNU.sparse.map", map.as_bytes())
    };
    let entry = sparse(entry(b'0').mode(0o640), size, &format!("0,5,{middle},5"));
    let summary = case.unpack(Layer::new().add("GNUSparseFile.1/lastlog", entry, b"hellothere")).unwrap();
    assert_eq!(summary.inodes, 4);
    assert_eq!(summary.bytes, 4 * 4096);
    let path = case.root().join("var/log/lastlog");
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o7777), (size, 0o640));
    assert!(metadata.blocks() < 100, "{} blocks", metadata.blocks());
    let mut buffer = [7_u8; 8];
    let file = fs::File::open(&path).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer, middle - 1).unwrap();
    assert_eq!(&buffer, b"\0there\0\0");
}

/// Each of 39 links leads through 1,600 directories, and then through the link before it.
fn with_long_links(mut layer: Layer) -> Layer {
    let through = "a/../".repeat(800);
    for number in 0..39 {
        let before = if number == 0 { "a".to_owned() } else { format!("l{}", number - 1) };
        layer = layer.symlink(&format!("l{number}"), &format!("{through}{before}"));
    }
    layer
}

/// Where they lead is found out once, for all kinds of entries.
#[test]
fn paths_that_lead_through_many_links_are_taken() {
    let case = Case::new();
    let mut layer = with_long_links(Layer::new().dir("a", 0o755).file("a/target", b"x"));
    for number in 0..300 {
        layer = layer
            .file(&format!("l38/file{number}"), b"x")
            .file(&format!("other{number}"), b"")
            .hard_link(&format!("link{number}"), "l38/target")
            .file(&format!("l37/.wh.gone{number}"), b"")
            .hard_link(&format!("lower{number}"), &format!("l36/absent{number}"))
            .file(&format!("l38/made{number}/file"), b"");
    }
    let summary = case.unpack(layer.file("l38/.wh..wh..opq", b"")).unwrap();
    assert_eq!(summary.lower_links.len(), 300);
    assert_eq!(fs::read_dir(case.root().join("a")).unwrap().count(), 1 + 3 * 300);
    assert_eq!(fs::metadata(case.root().join("a/target")).unwrap().nlink(), 1 + 300);
}

#[test]
fn a_link_that_is_replaced_leads_elsewhere() {
    let case = Case::new();
    let through = |layer: Layer, number: usize| {
        layer
            .file(&format!("link/{number}"), b"")
            .file(&format!("link/below/{number}"), b"")
            .hard_link(&format!("hard{number}"), &format!("link/{number}"))
            .file("between", b"")
    };
    let layer = Layer::new().dir("a/inside", 0o755).symlink("a/back", "..").symlink("link", "a/back/a");
    let layer = through(layer, 1).symlink("link", "b");
    let layer = through(layer.dir("b", 0o755), 2).symlink("a/back", "inside").symlink("link", "a/back");
    let layer = through(layer, 3).dir("link", 0o755);
    case.unpack(through(layer, 4)).unwrap();
    for (number, place) in [(1, "a"), (2, "b"), (3, "a/inside"), (4, "link")] {
        for path in [format!("{place}/{number}"), format!("{place}/below/{number}")] {
            assert!(case.root().join(&path).is_file(), "{path}");
        }
        assert_eq!(fs::metadata(case.root().join(format!("hard{number}"))).unwrap().nlink(), 2, "{place}");
    }
}

/// For each entry they lead elsewhere, as far as anyone knows.
#[test]
fn paths_that_lead_through_links_for_long_are_refused() {
    type Add = fn(Layer, usize) -> Layer;
    let layers: [(&str, Add); 4] = [
        ("file", |layer, number| layer.file(&format!("l38/file{number}"), b"")),
        ("directory", |layer, number| layer.file(&format!("l38/directory{number}/file"), b"")),
        ("whiteout", |layer, number| layer.file(&format!("l38/.wh.name{number}"), b"")),
        ("hard link", |layer, number| layer.hard_link(&format!("link{number}"), "l38/target")),
    ];
    for (kind, add) in layers {
        let mut layer = with_long_links(Layer::new().dir("a", 0o755).file("a/target", b"x"));
        for number in 0..100 {
            layer = add(layer.symlink("again", "a").symlink("again", "a"), number);
        }
        let refused = Case::new().unpack(layer).unwrap_err();
        assert!(matches!(refused, UnpackError::TooManySteps), "{kind}: {refused}");
    }
    // Lower layers are asked about these at the end.
    let mut layer = with_long_links(Layer::new().dir("a", 0o755));
    for number in 0..100 {
        layer = layer.hard_link(&format!("link{number}"), "l38/absent/file");
    }
    layer = layer.symlink("l0", "absent/directory");
    let refused = Case::new().unpack(layer).unwrap_err();
    assert!(matches!(refused, UnpackError::TooManySteps), "{refused}");
}
