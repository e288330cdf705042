//! Commits that fail on the way: what is left of them is nothing, and they can be tried again.
//! Needs root.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use berth_image::{Image, ImportError, ImportSource, LayerProgress, Progress, Store};

use support::*;

async fn import(store: &Store, image: &Built, progress: Arc<dyn Progress>) -> Result<Image, ImportError> {
    let dir = tempfile::tempdir().unwrap();
    image.write_layout(dir.path(), "app:v");
    let source = ImportSource::directory(dir.path()).unwrap();
    store.import(source, None, progress).await.map(|mut images| images.pop().unwrap())
}

/// Everything that the store has, also half made.
fn everything(root: &Path) -> Vec<String> {
    let directories = ["layers", "patches", "images"].into_iter();
    directories
        .flat_map(|directory| {
            names(&root.join(directory)).into_iter().map(move |name| format!("{directory}/{name}"))
        })
        .collect()
}

fn content(store: &Store, image: &Image, file: &str) -> Vec<u8> {
    let lower = directories(store.stored_layers(image)).unwrap();
    lower.iter().find_map(|dir| fs::read(dir.join(file)).ok()).unwrap()
}

/// Something that has the name which a directory of the image is to get: rename(2) fails with
/// `ENOTEMPTY`.
struct Obstacle(PathBuf);

impl Obstacle {
    fn put(path: PathBuf) -> Self {
        fs::create_dir_all(path.join("in the way")).unwrap();
        Self(path)
    }
}

impl Drop for Obstacle {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rename_that_fails_leaves_nothing_of_the_image_and_all_of_others() {
    // `d` has no entry in the layers above the first one, so there are patches.
    let base = Layer::new().add("d", Entry { kind: b'5', mode: 0o700, ..Entry::default() }, b"").tar();
    let middle = Layer::new().file("d/middle", b"m").tar();
    let of = |name: &str| {
        let top = Layer::new().file(&format!("d/{name}"), name.as_bytes()).tar();
        Built::new(&[base.clone(), middle.clone(), top], Packing::Gzip, Family::Oci, name)
    };
    let (other, image) = (of("other"), of("image"));
    let elsewhere = tempfile::tempdir().unwrap();
    import(&store(elsewhere.path()), &image, quiet()).await.unwrap();
    let whole = everything(elsewhere.path());

    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let first = import(&store, &other, quiet()).await.unwrap();
    let before = everything(dir.path());
    let entered: Vec<&String> = whole.iter().filter(|name| !before.contains(name)).collect();
    let kinds: Vec<&str> = entered.iter().map(|name| name.split('/').next().unwrap()).collect();
    assert_eq!(kinds, ["layers", "patches", "images"]);
    for name in entered {
        let obstacle = Obstacle::put(dir.path().join(name));
        let failed = import(&store, &image, quiet()).await.unwrap_err();
        let text = format!("{failed:?}");
        assert!(text.contains("operation: \"rename\""), "{name}: {text}");
        drop(obstacle);
        assert_eq!(store.list().iter().map(Image::id).collect::<Vec<_>>(), [first.id()], "{name}");
        soon("what was half done is gone", || everything(dir.path()) == before);
        assert_eq!(content(&store, &first, "d/middle"), b"m", "{name}");
    }
    let image = import(&store, &image, quiet()).await.unwrap();
    assert_eq!(content(&store, &image, "d/image"), b"image");
    assert_eq!(content(&store, &first, "d/other"), b"other");
}

/// A disk that loses what is written to it once it is full, which no caller learns before it is
/// synced: a file with holes, on a filesystem without room to fill them.
struct ThinDisk {
    dir: tempfile::TempDir,
}

impl ThinDisk {
    const METADATA_BYTES: usize = 2 << 20;

    /// `None` where that cannot be mounted.
    fn new() -> Option<Self> {
        let disk = Self { dir: tempfile::tempdir().unwrap() };
        for dir in ["under", "disk"] {
            fs::create_dir(disk.path(dir)).unwrap();
        }
        let run = |program: &str, arguments: &[&str], path: &Path, more: &[PathBuf]| {
            let status = Command::new(program).args(arguments).arg(path).args(more).status();
            status.is_ok_and(|status| status.success())
        };
        assert!(run("mount", &["-t", "tmpfs", "-o", "size=16m", "tmpfs"], &disk.path("under"), &[]));
        let file = disk.path("under/file");
        fs::File::create(&file).unwrap().set_len(32 << 20).unwrap();
        // Without a journal, which would make it read-only at the first error.
        let options = ["-q", "-F", "-t", "ext2", "-b", "4096", "-N", "1024", "-E", "nodiscard"];
        if !run("mke2fs", &options, &file, &[]) {
            return None;
        }
        // What the filesystem is made of has its place.
        let mut start = fs::read(&file).unwrap();
        start.truncate(Self::METADATA_BYTES);
        std::os::unix::fs::FileExt::write_all_at(
            &fs::OpenOptions::new().write(true).open(&file).unwrap(),
            &start,
            0,
        )
        .unwrap();
        let options = ["-t", "ext2", "-o", "loop,errors=continue"];
        run("mount", &options, &file, &[disk.path("disk")]).then_some(disk)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn root(&self) -> PathBuf {
        self.path("disk/store")
    }

    /// Takes the room under it.
    fn fill(&self) {
        let mut filler = fs::File::create(self.path("under/filler")).unwrap();
        while std::io::Write::write_all(&mut filler, &[0; 4096]).is_ok() {}
    }

    /// As other programs on the node do, which then get the error.
    fn synced_by_another(&self) -> bool {
        Command::new("sync").arg("--file-system").arg(self.path("disk")).status().unwrap().success()
    }

    fn relieve(&self) {
        fs::remove_file(self.path("under/filler")).unwrap();
    }
}

impl Drop for ThinDisk {
    fn drop(&mut self) {
        for name in ["disk", "under"] {
            let _ = Command::new("umount").arg("--lazy").arg(self.path(name)).status();
        }
    }
}

/// Has another program sync the disk just before the store does, and makes room then.
struct AnotherFirst(Arc<ThinDisk>);

impl Progress for AnotherFirst {
    fn layer(&self, _: LayerProgress) {}

    fn committing(&self) {
        assert!(!self.0.synced_by_another(), "nothing was lost");
        self.0.relieve();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_which_the_disk_lost_something_is_not_taken_whoever_was_told() {
    let Some(disk) = ThinDisk::new() else {
        skip_without("mke2fs or loop devices");
        return;
    };
    let disk = Arc::new(disk);
    let noise: Vec<u8> =
        (0..6_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_be_bytes()[3]).collect();
    let of = |name: &str, content: &[u8]| {
        Built::new(&[Layer::new().file(name, content).tar()], Packing::Plain, Family::Oci, name)
    };
    let (small, big) = (of("small", b"s"), of("big", &noise));
    let store = store(&disk.root());
    let first = import(&store, &small, quiet()).await.unwrap();
    let before = everything(&disk.root());
    for is_told in [true, false] {
        disk.fill();
        let progress = if is_told { quiet() } else { Arc::new(AnotherFirst(disk.clone())) };
        let failed = import(&store, &big, progress).await.unwrap_err();
        let text = format!("{failed:?}");
        assert!(text.contains("operation: \"sync\""), "{is_told}: {text}");
        if is_told {
            disk.relieve();
        }
        assert_eq!(store.list().iter().map(Image::id).collect::<Vec<_>>(), [first.id()], "{is_told}");
        soon("what was half done is gone", || everything(&disk.root()) == before);
        assert_eq!(content(&store, &first, "small"), b"s", "{is_told}");
    }
    let image = import(&store, &big, quiet()).await.unwrap();
    assert_eq!(content(&store, &image, "big"), noise);
}
