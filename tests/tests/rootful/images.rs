//! Images without a registry: import, lists, removal.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_tests::census::status_field;
use berth_tests::daemon::{Daemon, IMAGE, SOON, programs, rootful};
use berth_tests::deadline::within;
use berth_tests::forge::{Entry, Image, Layer};
use berth_tests::held::{Call, Keeper, UNLINKAT, waits_in};
use berth_tests::pod::container;
use berth_tests::registry::Registry;
use berth_tests::skip::skip;
use serde_json::json;

#[test]
fn every_form_of_an_image_can_be_imported_and_run() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        let note = |text: &str| Layer::of_files(&[("note", text.as_bytes())]);
        let directory = daemon.directory("layout")?;
        let of_layout =
            Image::demo()?.on_top(note("layout")).write_layout(&directory, "localhost/form:layout")?;
        let archive = daemon.dir().join("docker.tar");
        let of_archive =
            Image::demo()?.on_top(note("docker")).write_docker_archive(&archive, "localhost/form:docker")?;
        for (path, name, sealed) in [(&directory, "layout", of_layout), (&archive, "docker", of_archive)] {
            let imported = client.import(path)?;
            let imported = imported.first().context("one image")?;
            assert_eq!(imported.id, sealed.id, "{name}");
            let reference = format!("localhost/form:{name}");
            assert_eq!(imported.names, std::slice::from_ref(&reference), "{name}");
            let image = client.image(&reference)?.context("it is there")?;
            assert_eq!((image.id.as_str(), image.repo_tags), (sealed.id.as_str(), vec![reference.clone()]));
            assert!(image.size > 0);
            let mut config = container(name, &["cat", "/note"]);
            config.image = Some(berth_tests::cri::image_spec(&reference));
            assert_eq!(daemon.pod(name)?.run_container(config)?.stdout, name);
        }
        assert_eq!(client.images()?.len(), 3);
        Ok(())
    })
}

#[test]
fn an_image_is_found_by_every_name_and_gone_under_all_of_them() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        for (directory, name) in [("one", "localhost/app:one"), ("two", "localhost/app:two")] {
            let directory = daemon.directory(directory)?;
            Image::demo()?.with("Labels", json!({"of": "app"})).write_layout(&directory, name)?;
            client.import(&directory)?;
        }
        let image = client.image("localhost/app:one")?.context("the first name")?;
        let mut tags = image.repo_tags.clone();
        tags.sort();
        assert_eq!(tags, ["localhost/app:one", "localhost/app:two"], "the same content is one image");
        let bare = image.id.trim_start_matches("sha256:");
        for name in ["localhost/app:two", image.id.as_str(), bare, &bare[..12]] {
            assert_eq!(client.image(name)?.as_ref(), Some(&image), "{name}");
        }
        client.remove_image_of("localhost/app:two")?;
        for name in ["localhost/app:one", "localhost/app:two", image.id.as_str()] {
            assert_eq!(client.image(name)?, None, "{name}");
        }
        client.remove_image_of("localhost/app:two")?;
        client.remove_image_of(&format!("sha256:{}", "0".repeat(64)))?;
        assert_eq!(client.images()?.len(), 1, "the other image stays");
        assert!(client.image(IMAGE)?.is_some());
        Ok(())
    })
}

#[test]
fn removing_and_importing_again_leaves_no_byte_too_many() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        let census = berth_tests::census::Census::take(daemon)?;
        let directory = daemon.directory("layout")?;
        Image::demo()?.on_top(Layer::of_files(&[("x", b"y")])).write_layout(&directory, "localhost/x:1")?;
        for _ in 0..3 {
            client.import(&directory)?;
            client.remove_image_of("localhost/x:1")?;
        }
        census.stays(daemon)
    })
}

#[test]
fn images_are_there_after_a_crash() -> Result<()> {
    rootful(|daemon| {
        let before = daemon.client().images()?;
        daemon.crash()?;
        assert_eq!(daemon.client().images()?, before);
        let pod = daemon.pod("web")?;
        assert_eq!(pod.script("echo runs", |_| {})?, "runs\n");
        Ok(())
    })
}

#[test]
fn a_container_lives_on_without_its_image() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        let main = daemon.pod("web")?.idle("main")?;
        client.remove_image_of(IMAGE)?;
        assert_eq!(client.image(IMAGE)?, None);
        assert_eq!(main.sh("cat /www/index.html | wc -l")?, "1\n");
        main.remove()?;
        client.import(&programs()?.join("images/demo.tar"))?;
        Ok(())
    })
}

/// The directory `held` in a layer, wherever that is by now.
fn held_directory(daemon: &Daemon) -> Result<Option<PathBuf>> {
    fn find(directory: &Path) -> Option<PathBuf> {
        let entries = fs::read_dir(directory).ok()?.flatten();
        let mut below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        below.find_map(|entry| match entry.file_name() == "held" {
            true => Some(entry.path()),
            false => find(&entry.path()),
        })
    }
    Ok(find(&daemon.root().join("layers")))
}

/// Whether a thread of the daemon waits in the kernel to delete something.
fn deletes(daemon: &Daemon) -> Result<Option<()>> {
    let pid = daemon.pid()?;
    let threads = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    let mut ids = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    Ok(ids.any(|id: i32| waits_in(id, UNLINKAT)).then_some(()))
}

/// Deleting a layer can take as long as it likes: here for as long as another process keeps a
/// directory in it locked.
#[test]
fn a_removal_that_deletes_still_is_answered_and_delays_no_pull_and_no_start() -> Result<()> {
    rootful(|daemon| {
        let client = daemon.client();
        let (large, other) = ("localhost/large:1", Image::demo()?.on_top(Layer::of_files(&[("x", b"y")])));
        let entries = [("held", Entry::Directory), ("held/file", Entry::File(b""))];
        let layout = daemon.directory("layout")?;
        Image::demo()?.on_top(Layer::of_entries(&entries)).write_layout(&layout, large)?;
        client.import(&layout)?;
        let held = held_directory(daemon)?.context("the layer is there")?;
        let place = daemon.directory("hanging")?;
        let Some(keeper) = Keeper::start(&held, &place)? else {
            skip("images::a_removal", "no FUSE or no /usr/bin/perl here");
            return Ok(());
        };

        let (remover, name) = (daemon.client(), large.to_owned());
        Call::begin(move || remover.remove_image_of(&name)).answer()??;
        assert_eq!(client.image(large)?, None);
        within(SOON, "its layer is being deleted", || deletes(daemon))?;
        let registry = Registry::start(daemon, 5000)?;
        let pulled = registry.push("team/app", "v1", &other.seal())?;
        client.pull(&pulled)?;
        client.remove_image_of(&pulled)?;
        assert_eq!(client.images()?.len(), 1);
        deletes(daemon)?.context("it is being deleted all the time")?;

        let killed = i32::try_from(daemon.pid()?)?;
        std::thread::scope(|scope| {
            let kill = scope.spawn(|| daemon.kill());
            within(SOON, "it is killed", || {
                let pending = status_field(killed, "ShdPnd").unwrap_or_default();
                Ok(pending.ends_with("100").then_some(()))
            })?;
            drop(keeper);
            kill.join().map_err(|_| anyhow!("the thread panicked"))?
        })?;

        let held = held_directory(daemon)?.context("half of the layer is left")?;
        let keeper = Keeper::start(&held, &place)?.context("there was FUSE before")?;
        daemon.start_again()?;
        client.pull(&pulled)?;
        within(SOON, "the next daemon deletes it", || deletes(daemon))?;
        client.pull(&pulled)?;
        assert_eq!(daemon.pod("web")?.script("echo runs", |_| {})?, "runs\n");
        deletes(daemon)?.context("it is being deleted all the time")?;
        drop(keeper);
        within(SOON, "nothing of it is left", || Ok(held_directory(daemon)?.is_none().then_some(())))?;
        ensure!(client.image(&pulled)?.is_some());
        Ok(())
    })
}
