//! The store through its interface: imports, shared layers, removal, damage, full disks. Needs
//! root.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "what cannot be set up fails the test; skips are said aloud"
)]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use berth_image::{Digest, Image, ImportError, ImportSource, Reference, Store, StoreError, StoreOptions};

use support::*;

async fn import(store: &Store, image: &Built, name: &str) -> Result<Image, ImportError> {
    let dir = tempfile::tempdir().unwrap();
    image.write_layout(dir.path(), name);
    let source = ImportSource::directory(dir.path()).unwrap();
    store.import(source, None, quiet()).await.map(|mut images| images.pop().unwrap())
}

fn of(tars: &[Vec<u8>], label: &str) -> Built {
    Built::new(tars, Packing::Gzip, Family::Oci, label)
}

#[track_caller]
fn assert_empty(root: &Path) {
    for directory in ["layers", "patches", "images"] {
        soon(directory, || names(&root.join(directory)).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_go_with_the_last_image_that_needs_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let base = Layer::new().add("d", Entry { kind: b'5', mode: 0o700, ..Entry::default() }, b"").tar();
    let one = of(&[base.clone(), Layer::new().file("d/1", b"1").tar()], "one");
    let two = of(&[base, Layer::new().file("d/2", b"2").tar()], "two");
    import(&store, &one, "one:v").await.unwrap();
    let after_one = store.usage();
    import(&store, &two, "two:v").await.unwrap();
    assert_eq!(names(&dir.path().join("layers")).len(), 3);
    assert_eq!(names(&dir.path().join("patches")).len(), 2);
    assert!(store.remove("two:v", nobody).await.unwrap());
    assert_eq!(store.usage(), after_one);
    assert!(!store.remove("two:v", nobody).await.unwrap());
    assert!(store.find("one:v").is_some());

    // A container uses it: the names go, the layers stay, over a restart too.
    let image = store.find("one:v").unwrap();
    assert!(store.remove(&one.config.to_string(), containers_of(&[one.config])).await.unwrap());
    assert!(store.list().is_empty() && store.find("one:v").is_none());
    assert_eq!(directories(store.stored_layers(&image)).unwrap().len(), 3);
    drop(store);
    let store = support::store(dir.path());
    store.collect(containers_of(&[one.config])).await.unwrap();
    assert_eq!(directories(store.stored_layers(&image)).unwrap().len(), 3);
    store.collect(nobody).await.unwrap();
    assert!(matches!(directories(store.stored_layers(&image)), Err(StoreError::File { .. })));
    assert_empty(dir.path());
    assert_eq!(store.usage(), berth_image::Usage::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_cannot_open_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(dir.path());
    assert!(matches!(Store::open(dir.path(), options()), Err(StoreError::Locked { .. })));
    drop(first);
    store(dir.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_images_leave_nothing_behind() {
    let good = Layer::new().file("f", b"x").tar();
    let bomb = Layer::new().file("zeros", &vec![0; 30 << 20]).tar();
    let mut cut = of(std::slice::from_ref(&good), "cut");
    let layer = cut.layers[0];
    let blob = cut.blobs.get_mut(&layer).unwrap();
    blob.truncate(blob.len() / 2);
    let mut swapped = of(&[good.clone(), bomb.clone()], "swapped");
    let text = String::from_utf8(swapped.bytes(swapped.manifest).to_vec()).unwrap();
    let (a, b) = (swapped.layers[0].to_string(), swapped.layers[1].to_string());
    let text = text.replace(&a, "HERE").replace(&b, &a).replace("HERE", &b);
    swapped.manifest = Digest::of(text.as_bytes());
    swapped.blobs.insert(swapped.manifest, text.into_bytes());
    let mut garbage = of(std::slice::from_ref(&good), "garbage");
    let layer = garbage.layers[0];
    garbage.blobs.get_mut(&layer).unwrap().extend_from_slice(b"garbage behind");
    for (name, image) in [
        ("cut layer", cut),
        ("swapped layers", swapped),
        ("garbage behind the layer", garbage),
        ("gzip bomb", of(std::slice::from_ref(&bomb), "bomb")),
        ("bomb beside a good layer", of(&[good.clone(), bomb], "bomb2")),
        ("hard link to nothing", of(&[good.clone(), Layer::new().hard_link("l", "nowhere").tar()], "link")),
        (
            "hard link to a hidden file",
            of(&[good.clone(), Layer::new().file(".wh..wh..opq", b"").hard_link("l", "f").tar()], "link2"),
        ),
        (
            "hard link to a lower directory",
            of(&[Layer::new().dir("d", 0o755).tar(), Layer::new().hard_link("l", "d").tar()], "link3"),
        ),
        ("climbing path", of(&[Layer::new().file("../f", b"x").tar()], "climb")),
        ("not a tar", of(&[vec![1; 5000]], "notar")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions { max_image_bytes: 20 << 20, ..options() };
        let store = Store::open(dir.path(), options).unwrap();
        let failed = import(&store, &image, "x:v").await.expect_err(name);
        assert!(matches!(failed, ImportError::Content(_)), "{name}: {failed:?}");
        assert!(store.list().is_empty(), "{name}");
        assert_empty(dir.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_zstd_window_is_refused() {
    // A frame header that asks for a window of 2^31 (RFC 8878, section 3.1.1.1.2), then an empty
    // last block.
    let mut image = of(&[Layer::new().tar()], "window");
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0x00, 0x00].to_vec();
    let digest = Digest::of(&frame);
    let text = String::from_utf8(image.bytes(image.manifest).to_vec()).unwrap();
    let text = text.replace(&image.layers[0].to_string(), &digest.to_string());
    image.manifest = Digest::of(text.as_bytes());
    image.blobs.insert(image.manifest, text.into_bytes());
    image.blobs.insert(digest, frame);
    let dir = tempfile::tempdir().unwrap();
    let failed = import(&store(dir.path()), &image, "x:v").await.unwrap_err();
    assert!(format!("{failed:?}").contains("memory"), "{failed:?}");
    assert_empty(dir.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_gzip_members_are_one_layer() {
    let tar = Layer::new().file("f", &[5; 100_000]).tar();
    let mut image = Built::new(std::slice::from_ref(&tar), Packing::Plain, Family::Oci, "members");
    let packed: Vec<u8> = tar.chunks(tar.len() / 200).flat_map(|piece| Packing::Gzip.pack(piece)).collect();
    let digest = Digest::of(&packed);
    let text = String::from_utf8(image.bytes(image.manifest).to_vec()).unwrap();
    let text = text.replace(&image.layers[0].to_string(), &digest.to_string());
    image.manifest = Digest::of(text.as_bytes());
    image.blobs.insert(image.manifest, text.into_bytes());
    image.blobs.insert(digest, packed);
    let dir = tempfile::tempdir().unwrap();
    import(&store(dir.path()), &image, "x:v").await.unwrap();
}

/// A small tmpfs of the test's own.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", size, "tmpfs"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_named_and_removal_works_on_it() {
    let noise: Vec<u8> =
        (0..12_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_be_bytes()[3]).collect();
    let big = Built::new(&[Layer::new().file("big", &noise).tar()], Packing::Plain, Family::Oci, "big");
    let mut many = Layer::new();
    for i in 0..3000 {
        many = many.file(&format!("f{i}"), b"");
    }
    let many = of(&[many.tar()], "many");
    let small = of(&[Layer::new().file("small", b"s").tar()], "small");
    for (name, size, image) in [("blocks", "size=8m", &big), ("inodes", "size=64m,nr_inodes=1000", &many)] {
        let disk = SmallDisk::new(size);
        let root = disk.0.path();
        let store = store(root);
        import(&store, &small, "small:v").await.unwrap();
        let failed = import(&store, image, "big:v").await.unwrap_err();
        assert!(matches!(failed, ImportError::DiskFull(_)), "{name}: {failed:?}");
        assert_eq!((store.list().len(), names(&root.join("layers")).len()), (1, 1), "{name}");
        // To the last byte.
        let mut filler = File::create(root.join("filler")).unwrap();
        while filler.write_all(&[0; 4096]).is_ok() {}
        assert!(store.remove("small:v", nobody).await.unwrap(), "{name}");
        assert_empty(root);
        fs::remove_file(root.join("filler")).unwrap();
        import(&store, &small, "small:v").await.unwrap();
        drop(store);
    }
    let disk = SmallDisk::new("size=64m");
    let floor = StoreOptions { min_free_bytes: 60 << 20, ..options() };
    let store = Store::open(disk.0.path(), floor).unwrap();
    let status = Command::new("dd")
        .args(["if=/dev/zero", "bs=1M", "count=10", "status=none"])
        .arg(format!("of={}", disk.0.path().join("x").display()))
        .status();
    assert!(status.unwrap().success());
    let refused = import(&store, &small, "x:v").await.unwrap_err();
    assert!(matches!(refused, ImportError::DiskFull(_)), "{refused:?}");
    let mut words = refused.to_string();
    let mut cause: &dyn std::error::Error = &refused;
    while let Some(below) = cause.source() {
        words.push_str(&format!(": {below}"));
        cause = below;
    }
    // Not only that there is none left, but whose doing that is.
    for expected in [
        "no space left",
        "layer of 1 MiB",
        "54 MiB are free",
        "60 MiB must stay free",
        "lower image.min_free_bytes",
    ] {
        assert!(words.contains(expected), "{expected}: {words}");
    }
    drop(store);
    let options = StoreOptions { min_free_percent: 90, ..options() };
    let store = Store::open(disk.0.path(), options).unwrap();
    let refused = format!("{:?}", import(&store, &small, "x:v").await.unwrap_err());
    assert!(refused.contains("image.min_free_percent"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_of_docker_and_tar_files_of_layouts_are_imported() {
    let image = Built::new(
        &[Layer::new().file("f", b"x").tar(), Layer::new().file("g", b"y").tar()],
        Packing::Plain,
        Family::Oci,
        "archive",
    );
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir.path().join("store"));

    let layout = dir.path().join("layout");
    image.write_layout(&layout, "example.com/app:v1");
    let tar_path = dir.path().join("layout.tar");
    assert!(
        Command::new("tar")
            .arg("-C")
            .arg(&layout)
            .arg("-cf")
            .arg(&tar_path)
            .arg(".")
            .status()
            .unwrap()
            .success()
    );
    let images =
        store.import(ImportSource::archive(File::open(&tar_path).unwrap()), None, quiet()).await.unwrap();
    assert_eq!(images[0].id(), image.config);
    assert_eq!(images[0].repo_tags(), ["example.com/app:v1"]);
    assert_eq!(images[0].repo_digests(), [format!("example.com/app@{}", image.manifest)]);
    store.remove("example.com/app:v1", nobody).await.unwrap();

    // What docker save wrote before it wrote layouts: a link from one layer to another's file,
    // short names.
    let manifest = serde_json::json!([{
        "Config": format!("{}.json", image.config.hex()), "RepoTags": ["app:v2", "app:v3"],
        "Layers": ["one/layer.tar", "two/layer.tar"],
    }]);
    let archive = Layer::new()
        .file("real.tar", image.bytes(image.layers[0]))
        .symlink("one/layer.tar", "../real.tar")
        .file("two/layer.tar", image.bytes(image.layers[1]))
        .file(&format!("{}.json", image.config.hex()), image.bytes(image.config))
        .file("manifest.json", manifest.to_string().as_bytes())
        .tar();
    let path = dir.path().join("docker.tar");
    fs::write(&path, &archive).unwrap();
    let images =
        store.import(ImportSource::archive(File::open(&path).unwrap()), None, quiet()).await.unwrap();
    assert_eq!(images[0].id(), image.config);
    assert_eq!(images[0].repo_tags(), ["docker.io/library/app:v2", "docker.io/library/app:v3"]);

    let name = Reference::parse("given:name").unwrap();
    store.import(ImportSource::archive(File::open(&path).unwrap()), Some(&name), quiet()).await.unwrap();
    assert!(store.find("given:name").is_some() && store.find("app:v2").is_some());

    for (what, bytes) in [("empty", Vec::new()), ("other", Layer::new().file("readme", b"x").tar())] {
        fs::write(&path, bytes).unwrap();
        let failed =
            store.import(ImportSource::archive(File::open(&path).unwrap()), None, quiet()).await.unwrap_err();
        assert!(matches!(failed, ImportError::UnknownForm), "{what}: {failed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layout_cannot_make_us_read_files_of_the_host() {
    let image = of(&[Layer::new().file("f", b"x").tar()], "links");
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    image.write_layout(&layout, "a:b");
    let blob = layout.join("blobs/sha256").join(image.config.hex());
    let outside = dir.path().join("outside");
    fs::rename(&blob, &outside).unwrap();
    std::os::unix::fs::symlink(&outside, &blob).unwrap();
    let failed = store(&dir.path().join("store"))
        .import(ImportSource::directory(&layout).unwrap(), None, quiet())
        .await;
    assert!(matches!(failed, Err(ImportError::Missing(_))), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_layer_twice_is_mounted_once() {
    let layer = Layer::new().dir("d", 0o755).file("d/f", b"x").tar();
    let image = of(&[layer.clone(), Layer::new().file("d/.wh.f", b"").tar(), layer], "twice");
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir.path().join("store"));
    let imported = import(&store, &image, "x:v").await.unwrap();
    let tree = describe_overlay(&directories(store.stored_layers(&imported)).unwrap(), dir.path());
    assert!(tree.contains("|d/f|f|"), "{tree}");
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_lookups_find_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let image = of(&[Layer::new().tar()], "x");
    import(&store, &image, "x:v").await.unwrap();
    let hex = image.config.hex();
    for text in [
        "",
        " ",
        "x",
        "x:w",
        "..",
        "\0",
        &hex[..3],
        &hex.to_uppercase(),
        "sha256:",
        "../../etc",
        &"a".repeat(100_000),
    ] {
        assert!(store.find(text).is_none(), "{text:.40}");
    }
    for text in [
        "x:v",
        "docker.io/library/x:v",
        &hex,
        &hex[..12],
        &format!("sha256:{hex}"),
        &format!("sha256:{}", &hex[..12]),
    ] {
        assert!(store.find(text).is_some(), "{text}");
    }
}

/// An archive of an OCI image layout.
fn layout_tar(image: &Built, name: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    image.write_layout(dir.path(), name);
    let mut layer = Layer::new();
    for file in ["oci-layout", "index.json"] {
        layer = layer.file(file, &fs::read(dir.path().join(file)).unwrap());
    }
    for (digest, bytes) in &image.blobs {
        layer = layer.file(&format!("blobs/sha256/{}", digest.hex()), bytes);
    }
    layer.tar()
}

fn docker_tar(image: &Built, name: &str) -> Vec<u8> {
    let layers: Vec<String> = (0..image.layers.len()).map(|n| format!("{n}/layer.tar")).collect();
    let manifest = serde_json::json!([{"Config": "c.json", "RepoTags": [name], "Layers": layers}]);
    let mut layer = Layer::new()
        .file("manifest.json", manifest.to_string().as_bytes())
        .file("c.json", image.bytes(image.config));
    for (digest, name) in image.layers.iter().zip(&layers) {
        layer = layer.file(name, image.bytes(*digest));
    }
    layer.tar()
}

#[tokio::test(flavor = "multi_thread")]
async fn packed_archives_are_imported_under_the_same_limits() {
    let dir = tempfile::tempdir().unwrap();
    let image =
        of(&[Layer::new().file("f", &[7; 50_000]).tar(), Layer::new().file("g", b"x").tar()], "packed");
    let file_of = |bytes: &[u8]| {
        let path = dir.path().join("archive");
        fs::write(&path, bytes).unwrap();
        ImportSource::archive(File::open(&path).unwrap())
    };
    for (form, tar) in [("layout", layout_tar(&image, "p:v")), ("docker", docker_tar(&image, "p:v"))] {
        for packing in [Packing::Gzip, Packing::Zstd, Packing::Plain] {
            let root = tempfile::tempdir().unwrap();
            let store = store(root.path());
            let images = store.import(file_of(&packing.pack(&tar)), None, quiet()).await.unwrap();
            assert_eq!(images[0].id(), image.config, "{form}");
            assert_eq!(images[0].repo_tags(), ["docker.io/library/p:v"], "{form}");
        }
    }
    let root = tempfile::tempdir().unwrap();
    let small = Store::open(root.path(), StoreOptions { max_image_bytes: 1 << 20, ..options() }).unwrap();
    let full = Store::open(&root.path().join("full"), StoreOptions { min_free_bytes: u64::MAX, ..options() })
        .unwrap();
    for packing in [Packing::Gzip, Packing::Zstd] {
        let bomb = packing.pack(&Layer::new().file("manifest.json", &vec![b' '; 8 << 20]).tar());
        let failed = small.import(file_of(&bomb), None, quiet()).await.unwrap_err();
        assert!(chain(&failed).contains("exceeds the limit of 1048576 uncompressed bytes"), "{failed:?}");
        let packed = packing.pack(&layout_tar(&image, "p:v"));
        let failed = full.import(file_of(&packed), None, quiet()).await.unwrap_err();
        assert!(matches!(failed, ImportError::DiskFull(_)), "{failed:?}");
        let cut = &packed[..packed.len() - 20];
        assert!(small.import(file_of(cut), None, quiet()).await.is_err());
        let twice = packing.pack(&packed);
        assert!(small.import(file_of(&twice), None, quiet()).await.is_err());
        assert_empty(root.path());
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// An image with this configuration and these layers, in a layout with this platform beside its
/// manifest.
fn write_odd(dir: &Path, config: &str, layers: &str, platform: &str) -> Digest {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &str| {
        let digest = Digest::of(bytes.as_bytes());
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        (digest, bytes.len())
    };
    let (id, size) = put(config);
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{id}","size":{size}}}{layers}}}"#
    );
    let (digest, size) = put(&manifest);
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":{size},
            "annotations":{{"org.opencontainers.image.ref.name":"odd:v","x":null}}{platform}}}]}}"#
    );
    fs::write(dir.join("index.json"), index).unwrap();
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn images_without_layers_have_an_empty_root_and_outlive_a_restart() {
    for (config, layers) in [
        (r#"{"rootfs":{"type":"layers","diff_ids":[]},"config":{"Cmd":["/x"]}}"#, r#","layers":[]"#),
        (r#"{"rootfs":{"diff_ids":null},"os":"","architecture":""}"#, r#","layers":null"#),
        ("{}", ""),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let id = write_odd(&dir.path().join("layout"), config, layers, "");
        let root = dir.path().join("store");
        let source = || ImportSource::directory(&dir.path().join("layout")).unwrap();
        let images = store(&root).import(source(), None, quiet()).await.unwrap();
        assert_eq!(images[0].id(), id, "{config}");
        let again = store(&root);
        let image = again.find("odd:v").unwrap();
        let lower = directories(again.stored_layers(&image)).unwrap();
        assert_eq!(lower.len(), 1);
        assert_eq!(fs::read_dir(&lower[0]).unwrap().count(), 0);
        again.remove("odd:v", nobody).await.unwrap();
        assert_empty(&root);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_corrects_what_an_image_says_of_its_machine() {
    let here = std::env::consts::ARCH;
    let wrong = r#"{"os":"linux","architecture":"s390x"}"#;
    for (platform, fine) in [
        (format!(r#","platform":{{"os":"linux","architecture":"{here}"}}"#), true),
        (r#","platform":{"os":"","architecture":""}"#.to_owned(), false),
        (String::new(), false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_odd(&dir.path().join("layout"), wrong, "", &platform);
        let root = dir.path().join("store");
        let imported = store(&root)
            .import(ImportSource::directory(&dir.path().join("layout")).unwrap(), None, quiet())
            .await;
        assert_eq!(imported.is_ok(), fine, "{platform}: {imported:?}");
        assert_eq!(store(&root).find("odd:v").is_some(), fine, "{platform}");
    }
}
