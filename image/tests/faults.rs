//! What the store makes of files that it cannot read, does not understand, or finds damaged, and of
//! what it cannot delete: nothing that may be in use is lost, nothing else is held up, and a pull
//! mends it. Needs root.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_image::{Credentials, Digest, Image, ImportSource, Reference, Store};

use support::*;

/// Two images on one base that leaves something open (`d` has no entry in the layers above it), so
/// that both have patches.
struct Pair {
    one: Built,
    two: Built,
}

impl Pair {
    fn new() -> Self {
        let base = Layer::new().add("d", Entry { kind: b'5', mode: 0o700, ..Entry::default() }, b"").tar();
        let middle = Layer::new().file("d/middle", b"m").tar();
        let of = |name: &str| {
            let top = Layer::new().file(&format!("d/{name}"), name.as_bytes()).tar();
            Built::new(&[base.clone(), middle.clone(), top], Packing::Gzip, Family::Oci, name)
        };
        Self { one: of("one"), two: of("two") }
    }

    async fn import_one(&self, store: &Store) -> Image {
        import(store, &self.one, "one:v").await
    }

    async fn import_two(&self, store: &Store) -> Image {
        import(store, &self.two, "two:v").await
    }
}

async fn import(store: &Store, image: &Built, name: &str) -> Image {
    let dir = tempfile::tempdir().unwrap();
    image.write_layout(dir.path(), name);
    let source = ImportSource::directory(dir.path()).unwrap();
    store.import(source, None, quiet()).await.unwrap().pop().unwrap()
}

/// Everything that the store keeps, but for what is half made or on its way out.
fn kept(root: &Path) -> Vec<String> {
    let directories = ["layers", "patches", "images"].into_iter();
    let names = directories.flat_map(|directory| {
        let names = names(&root.join(directory)).into_iter().filter(|name| !name.ends_with(".partial"));
        names.map(move |name| format!("{directory}/{name}"))
    });
    names.collect()
}

/// All files of records and documents, of layers, patches and images.
fn records(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for (directory, files) in [
        ("layers", ["layer.json", "open.json"].as_slice()),
        ("patches", &["layer.json"]),
        ("images", &["record.json", "config", "manifest"]),
    ] {
        for name in names(&root.join(directory)) {
            let files = files.iter().map(|file| root.join(directory).join(&name).join(file));
            found.extend(files.filter(|file| file.exists()));
        }
    }
    assert!(found.iter().any(|file| file.ends_with("open.json")), "{found:?}");
    found
}

fn flip_a_bit(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    // In the payload of a record, after its checksum.
    let position = bytes.len() - 5;
    bytes[position] ^= 1;
    fs::write(file, bytes).unwrap();
}

fn rewrite(file: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(file, text.replace(from, to)).unwrap();
}

fn read_through(store: &Store, name: &str, file: &str) -> Vec<u8> {
    let image = store.find(name).unwrap();
    let lower = directories(store.stored_layers(&image)).unwrap();
    lower.iter().find_map(|dir| fs::read(dir.join(file)).ok()).unwrap()
}

/// A filesystem mounted somewhere in a tree, so that the tree cannot be deleted (unlinkat(2),
/// EBUSY).
struct InTheWay<'a>(&'a Path);

impl<'a> InTheWay<'a> {
    fn mount(root: &'a Path, path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(path).status().unwrap();
        assert!(mounted.success());
        Self(root)
    }
}

impl Drop for InTheWay<'_> {
    fn drop(&mut self) {
        // Wherever the tree was moved to meanwhile.
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        for place in places.filter(|place| Path::new(place).starts_with(self.0)) {
            let _ = Command::new("umount").arg("--lazy").arg(place).status();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_read_for_a_while_costs_nothing() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
    {
        let store = store(dir.path());
        pair.import_one(&store).await;
        pair.import_two(&store).await;
    }
    let before = kept(dir.path());
    let aside = dir.path().join("aside");
    for file in records(dir.path()) {
        let name = file.display();
        // read(2) of a directory fails with EISDIR: an error that says nothing about what is
        // damaged.
        fs::rename(&file, &aside).unwrap();
        fs::create_dir(&file).unwrap();
        let store = store(dir.path());
        store.sweep();
        store.collect(nobody).await.unwrap();
        store.collect(containers_of(&[pair.one.config])).await.unwrap();
        assert_eq!(kept(dir.path()), before, "{name}");
        let of_image = file.ends_with("record.json") || file.ends_with("config");
        assert_eq!(store.list().len(), if of_image { 1 } else { 2 }, "{name}");
        // Of the documents for people only a manifest is of no account, and open.json is read when
        // it is needed.
        let is_told = !file.ends_with("manifest") && !file.ends_with("open.json");
        assert_eq!(store.faults().len(), usize::from(is_told), "{name}: {:?}", store.faults());
        assert_eq!(store.look_again(), is_told, "{name}");

        fs::remove_dir(&file).unwrap();
        fs::rename(&aside, &file).unwrap();
        assert!(!store.look_again(), "{name}");
        assert_eq!(store.list().len(), 2, "{name}");
        assert_eq!(store.faults(), [""; 0], "{name}");
        for image in ["one", "two"] {
            assert_eq!(read_through(&store, &format!("{image}:v"), &format!("d/{image}")), image.as_bytes());
        }
    }
    assert_eq!(names(&dir.path().join("quarantine")), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_a_later_version_survives_an_earlier_one() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
    let tags = |store: &Store| {
        let mut tags: Vec<String> = store.list().iter().flat_map(|i| i.repo_tags().to_vec()).collect();
        tags.sort();
        tags
    };
    let before = {
        let store = store(dir.path());
        pair.import_one(&store).await;
        pair.import_two(&store).await;
        tags(&store)
    };
    let all = kept(dir.path());
    let is_record = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "json");
    let files: Vec<PathBuf> = records(dir.path()).into_iter().filter(is_record).collect();
    for later in [files.clone(), files.iter().take(1).cloned().collect()] {
        for file in &later {
            rewrite(file, "\"version\":1", "\"version\":2");
        }
        {
            let store = store(dir.path());
            store.sweep();
            assert!(!store.faults().is_empty());
            assert!(store.faults()[0].contains("version 2"), "{:?}", store.faults());
            // Whatever this version does meanwhile.
            import(&store, &Built::simple("other"), "other:v").await;
            assert!(store.remove("other:v", containers_of(&[pair.one.config])).await.unwrap());
            store.collect(nobody).await.unwrap();
            soon("the other image is gone", || kept(dir.path()) == all);
        }
        for file in &later {
            rewrite(file, "\"version\":2", "\"version\":1");
        }
        let store = store(dir.path());
        assert_eq!((tags(&store), store.faults()), (before.clone(), Vec::new()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_the_record_of_a_layer_costs_nothing_and_a_pull_mends_it() {
    for (directory, file) in [("layers", "layer.json"), ("layers", "open.json"), ("patches", "layer.json")] {
        let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
        pair.import_one(&store(dir.path())).await;
        let before = kept(dir.path());
        let damaged: Vec<PathBuf> = records(dir.path())
            .into_iter()
            .filter(|path| path.ends_with(file) && path.starts_with(dir.path().join(directory)))
            .collect();
        for file in &damaged {
            flip_a_bit(file);
        }
        let store = store(dir.path());
        store.collect(containers_of(&[pair.one.config])).await.unwrap();
        assert_eq!(kept(dir.path()), before, "{directory}/{file}");
        assert_eq!(read_through(&store, "one:v", "d/one"), b"one", "{directory}/{file}");
        let mounted = directories(store.stored_layers(&store.find("one:v").unwrap())).unwrap();

        // Another image on these layers is not held up, and the pull of the same one mends what is
        // left.
        pair.import_two(&store).await;
        assert_eq!(read_through(&store, "two:v", "d/middle"), b"m", "{directory}/{file}");
        pair.import_one(&store).await;
        assert_eq!(store.faults(), [""; 0], "{directory}/{file}");
        assert_eq!(directories(store.stored_layers(&store.find("one:v").unwrap())).unwrap(), mounted);
        // What a container has mounted stays, under another name, over a restart and until the
        // container goes.
        let replaced = || kept(dir.path()).iter().filter(|name| name.ends_with(".replaced")).count();
        assert_eq!(replaced(), damaged.len(), "{directory}/{file}");
        drop(store);
        let store = support::store(dir.path());
        assert_eq!(store.faults(), [""; 0], "{directory}/{file}");
        assert_eq!(store.list().len(), 2);
        store.collect(containers_of(&[pair.one.config])).await.unwrap();
        assert_eq!(replaced(), damaged.len(), "{directory}/{file}");
        store.collect(nobody).await.unwrap();
        assert_eq!(replaced(), 0, "{directory}/{file}");
        assert_eq!(read_through(&store, "one:v", "d/one"), b"one", "{directory}/{file}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_of_an_image_that_is_here_mends_what_it_stands_on() {
    let Some(registry) = Registry::start() else { return skip_without("docker-registry") };
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
    registry.push("app", "v", &pair.one);
    let reference = Reference::parse(&format!("{}/app:v", registry.address)).unwrap();
    let good = {
        let store = store(dir.path());
        let image = store.pull(&reference, &Credentials::Anonymous, quiet()).await.unwrap();
        image.raw_manifest().to_vec()
    };
    let before = kept(dir.path());
    for file in records(dir.path()) {
        flip_a_bit(&file);
        {
            let store = store(dir.path());
            let image = store.pull(&reference, &Credentials::Anonymous, quiet()).await.unwrap();
            assert_eq!(image.repo_tags(), [reference.to_string()], "{}", file.display());
            assert_eq!(image.raw_manifest(), good, "{}", file.display());
            assert_eq!(read_through(&store, &reference.to_string(), "d/one"), b"one", "{}", file.display());
        }
        // Mended on disk too, and with all that was replaced gone.
        let store = store(dir.path());
        store.pull(&reference, &Credentials::Anonymous, quiet()).await.unwrap();
        assert_eq!(store.faults(), [""; 0], "{}", file.display());
        store.collect(nobody).await.unwrap();
        assert_eq!(kept(dir.path()), before, "{}", file.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_image_is_not_listed_its_layers_stay_in_use_and_a_pull_brings_it_back() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 5] = [
        ("a bit of the record", |image| flip_a_bit(&image.join("record.json"))),
        ("an empty record", |image| fs::write(image.join("record.json"), "").unwrap()),
        ("a bit of the configuration", |image| flip_a_bit(&image.join("config"))),
        ("both", |image| {
            flip_a_bit(&image.join("record.json"));
            flip_a_bit(&image.join("config"));
        }),
        ("no layer", |image| {
            let layers = image.join("../../layers");
            fs::remove_dir_all(layers.join(&names(&layers)[0])).unwrap();
        }),
    ];
    for (name, damage) in damages {
        let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
        let id = pair.one.config;
        pair.import_one(&store(dir.path())).await;
        let image = dir.path().join("images").join(id.hex());
        damage(&image);
        let before = kept(dir.path());
        {
            let store = store(dir.path());
            assert!(store.list().is_empty(), "{name}");
            assert!(store.faults()[0].contains("damaged"), "{name}: {:?}", store.faults());
            // Not with a container on it, and not while it is not known whether there is one.
            store.collect(containers_of(&[id])).await.unwrap();
            store.collect(|| None).await.unwrap();
            // Nor when a container goes: a pull of it finds the layers.
            store.collect_soon(nobody);
            assert_eq!(kept(dir.path()), before, "{name}");
            pair.import_one(&store).await;
            assert_eq!(store.faults(), [""; 0], "{name}");
            assert_eq!(store.list()[0].repo_tags(), ["docker.io/library/one:v"], "{name}");
            store.collect(containers_of(&[id])).await.unwrap();
            assert_eq!(read_through(&store, "one:v", "d/one"), b"one", "{name}");
        }
        // It is unused: it goes to quarantine, and takes no room.
        damage(&image);
        let store = store(dir.path());
        store.collect(nobody).await.unwrap();
        soon(name, || kept(dir.path()).is_empty());
        let aside = names(&dir.path().join("quarantine"));
        assert!(aside.iter().any(|name| *name == id.hex()), "{name}: {aside:?}");
        pair.import_one(&store).await;
        assert_eq!(read_through(&store, "one:v", "d/one"), b"one", "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_manifest_is_written_again_by_a_pull() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
    let good = pair.import_one(&store(dir.path())).await.raw_manifest().to_vec();
    let file = dir.path().join("images").join(pair.one.config.hex()).join("manifest");
    for bad in ["garbage", "", "{}"] {
        fs::write(&file, bad).unwrap();
        let store = store(dir.path());
        assert_eq!(store.list().len(), 1, "{bad:?}: nothing hangs on it");
        let image = pair.import_one(&store).await;
        assert_eq!(image.raw_manifest(), good);
        assert_eq!(fs::read(&file).unwrap(), good);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_while_the_image_of_a_container_is_not_known() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
    let store = store(dir.path());
    pair.import_one(&store).await;
    pair.import_two(&store).await;
    let of_one = fs::read_dir(dir.path().join("layers")).unwrap().count();
    // As if a person had taken the record of an image away, under its containers.
    let stranger = Digest::of(b"stranger");
    assert!(store.remove("one:v", containers_of(&[stranger])).await.unwrap());
    assert!(store.find("one:v").is_none());
    assert_eq!(names(&dir.path().join("layers")).len(), of_one);
    store.collect(nobody).await.unwrap();
    assert_eq!(kept(dir.path()).len(), 3 + 2 + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_keeps_the_layers_of_an_image_that_is_removed() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
    let store = store(dir.path());
    pair.import_one(&store).await;
    assert!(store.lease("two:v").is_none());
    let lease = store.lease("one:v").unwrap();
    let second = store.lease(&pair.one.config.to_string()).unwrap();
    let lower = directories(lease.stored_layers()).unwrap();
    assert!(store.remove("one:v", nobody).await.unwrap());
    assert!(store.lease("one:v").is_none() && store.list().is_empty());
    // Pulled again and removed again, under the same lease.
    pair.import_one(&store).await;
    assert!(store.remove("one:v", nobody).await.unwrap());
    drop(second);
    store.collect(nobody).await.unwrap();
    assert_eq!(directories(lease.stored_layers()).unwrap(), lower);
    assert_eq!(
        fs::read(lower[0].join("d/one")).or_else(|_| fs::read(lower[1].join("d/one"))).unwrap(),
        b"one"
    );
    drop(lease);
    store.collect_soon(nobody);
    soon("all of it goes", || kept(dir.path()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_deleted_keeps_nobody_from_anything() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
    {
        let store = store(dir.path());
        pair.import_one(&store).await;
        let layer = directories(store.stored_layers(&store.find("one:v").unwrap())).unwrap().pop().unwrap();
        let _mounted = InTheWay::mount(dir.path(), &layer.join("mounted"));
        // The image is not listed any more, and that is what was asked for.
        assert!(store.remove("one:v", nobody).await.unwrap());
        assert!(store.list().is_empty() && kept(dir.path()).is_empty());
        soon("all but the one tree is deleted", || {
            let left = |directory: &str| names(&dir.path().join(directory)).len();
            (left("layers"), left("patches"), left("images")) == (1, 0, 0)
        });
        pair.import_one(&store).await;
        fs::create_dir_all(dir.path().join("layers/f.77.partial/fs/d")).unwrap();
        fs::create_dir_all(dir.path().join("layers/g.78.partial/fs/d")).unwrap();
    }
    let _mounted = InTheWay::mount(dir.path(), &dir.path().join("layers/f.77.partial/fs/mounted"));
    let store = store(dir.path());
    assert!(dir.path().join("layers/g.78.partial").exists(), "opening deletes nothing");
    assert_eq!(read_through(&store, "one:v", "d/one"), b"one");
    store.sweep();
    soon("the other one is deleted", || !dir.path().join("layers/g.78.partial").exists());
    assert!(dir.path().join("layers/f.77.partial").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_name_of_something_on_its_way_out_comes_again() {
    let (dir, image) = (tempfile::tempdir().unwrap(), Built::simple("x"));
    drop(store(dir.path()));
    let diff_id = Digest::of(&Layer::new().file("file", b"x").tar());
    for number in 0..20 {
        let left = dir.path().join("layers").join(format!("{}.{number}.partial", diff_id.hex()));
        fs::create_dir_all(left.join("fs/left")).unwrap();
    }
    let store = store(dir.path());
    // Before anything is swept.
    let imported = import(&store, &image, "x:v").await;
    let tree = directories(store.stored_layers(&imported)).unwrap().pop().unwrap();
    assert_eq!(names(&tree), ["file"]);
    soon("they are deleted", || names(&dir.path().join("layers")).len() == 1);
    assert_eq!(names(&tree), ["file"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_not_the_stores_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    drop(store(dir.path()));
    for directory in ["layers", "patches", "images"] {
        fs::create_dir_all(dir.path().join(directory).join("lost+found/x")).unwrap();
        fs::write(dir.path().join(directory).join("notes.txt"), "x").unwrap();
    }
    let store = store(dir.path());
    store.sweep();
    store.collect(nobody).await.unwrap();
    for directory in ["layers", "patches", "images"] {
        assert_eq!(names(&dir.path().join(directory)), ["lost+found", "notes.txt"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_be_read_can_be_removed_by_its_id() {
    let (dir, pair) = (tempfile::tempdir().unwrap(), Pair::new());
    let id = pair.one.config;
    pair.import_one(&store(dir.path())).await;
    let record = dir.path().join("images").join(id.hex()).join("record.json");
    fs::remove_file(&record).unwrap();
    fs::create_dir(&record).unwrap();
    let store = store(dir.path());
    store.collect(nobody).await.unwrap();
    assert_eq!(kept(dir.path()).len(), 3 + 2 + 1);
    assert!(store.remove(&id.to_string(), containers_of(&[id])).await.unwrap());
    assert!(!store.remove(&id.to_string(), containers_of(&[id])).await.unwrap());
    assert_eq!(names(&dir.path().join("layers")).len(), 3);
    store.collect(nobody).await.unwrap();
    soon("its layers go", || kept(dir.path()).is_empty());
}
