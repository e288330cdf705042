//! Files of the image store that cannot be read, are damaged or cannot be deleted, and images that
//! are removed while in use: no container loses its layers, and no call waits.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use berth_cri::v1;
use berth_tests::cri::image_spec;
use berth_tests::daemon::{Daemon, SOON, rootful};
use berth_tests::deadline::within;
use berth_tests::forge::{Image, Layer};
use berth_tests::pod::{Container, Pod, shell};
use berth_tests::repeats::repeats;
use nix::mount::{MsFlags, mount};

/// An image beside the demo image, with which it shares the lowest layer.
const APP: &str = "localhost/app:1";

/// Reads one file of each of the two layers.
const LOOK: &str = "cat /note && ls /bin | wc -l";

fn import_app(daemon: &Daemon) -> Result<()> {
    let directory = daemon.directory("app")?;
    Image::demo()?.on_top(Layer::of_files(&[("note", b"noted\n")])).write_layout(&directory, APP)?;
    daemon.client().import(&directory)?;
    Ok(())
}

fn of_app(name: &str, script: &str) -> v1::ContainerConfig {
    v1::ContainerConfig { image: Some(image_spec(APP)), ..shell(name, script) }
}

/// A container of the image that does nothing, and the files it sees.
fn idle_app(pod: &Pod) -> Result<(Container, String)> {
    let main = pod.start(of_app("main", "sleep 100000"))?;
    let seen = main.sh(LOOK)?;
    Ok((main, seen))
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in directory.read_dir().with_context(|| format!("listing {}", directory.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// The names in the store's directories, except for those being removed.
fn layers(daemon: &Daemon) -> Result<Vec<String>> {
    let mut names = names(&daemon.root().join("layers"))?;
    names.retain(|name| !name.ends_with(".partial"));
    Ok(names)
}

/// The files of this name below one of the store's directories.
fn files(daemon: &Daemon, directory: &str, name: &str) -> Result<Vec<PathBuf>> {
    let directory = daemon.root().join(directory);
    let files = names(&directory)?.into_iter().map(|entry| directory.join(entry).join(name));
    Ok(files.filter(|file| file.exists()).collect())
}

/// Makes the daemon look for unneeded layers, as it does when an image or a container is removed.
fn remove_something_else(daemon: &Daemon, pod: &Pod) -> Result<()> {
    let directory = daemon.directory("else")?;
    Image::demo()?.on_top(Layer::of_files(&[("else", b"x")])).write_layout(&directory, "localhost/else:1")?;
    daemon.client().import(&directory)?;
    let mut config = shell("else", "true");
    config.image = Some(image_spec("localhost/else:1"));
    let other = pod.start(config)?;
    daemon.client().remove_image_of("localhost/else:1")?;
    other.ended()?;
    Ok(other.remove()?)
}

fn a_pod_still_runs(daemon: &Daemon, pod: &Pod) -> Result<()> {
    remove_something_else(daemon, pod)?;
    within(SOON, "what is on its way out is gone", || {
        let left = names(&daemon.root().join("layers"))?;
        Ok((!left.iter().any(|name| name.ends_with(".partial"))).then_some(()))
    })
}

#[test]
fn a_file_that_cannot_be_read_at_the_start_costs_no_container_anything() -> Result<()> {
    rootful(|daemon| {
        import_app(daemon)?;
        let pod = daemon.pod("web")?;
        let (main, seen) = idle_app(&pod)?;
        let before = layers(daemon)?;
        for (directory, name) in [("layers", "layer.json"), ("images", "record.json"), ("images", "config")] {
            let unread = files(daemon, directory, name)?;
            daemon.kill()?;
            for file in &unread {
                // Reading a directory is an error that says nothing about the file (read(2),
                // EISDIR).
                fs::rename(file, file.with_extension("aside"))?;
                fs::create_dir(file)?;
            }
            daemon.start_again()?;
            assert_eq!(main.sh(LOOK)?, seen, "{name}");
            if directory == "layers" {
                // The image can be used: only other images need the record.
                let other = pod.start(of_app("other", "cat /note"))?;
                assert_eq!(other.ended()?.stdout, "noted\n");
                other.remove()?;
            }
            ensure!(daemon.log()?.contains("cannot be read now"), "{name}: it is not told");
            for file in &unread {
                fs::remove_dir(file)?;
                fs::rename(file.with_extension("aside"), file)?;
            }
            within(SOON, "the images are listed again, without a restart", || {
                Ok((daemon.client().images()?.len() == 2).then_some(()))
            })?;
            assert_eq!(layers(daemon)?, before, "{name}");
            assert_eq!(main.sh(LOOK)?, seen, "{name}");
        }
        Ok(())
    })
}

#[test]
fn a_downgrade_and_an_upgrade_lose_nothing() -> Result<()> {
    rootful(|daemon| {
        import_app(daemon)?;
        let pod = daemon.pod("web")?;
        let (main, seen) = idle_app(&pod)?;
        let (before, images) = (layers(daemon)?, daemon.client().images()?);
        let mut records = files(daemon, "layers", "layer.json")?;
        records.extend(files(daemon, "images", "record.json")?);
        let rewrite = |from: &str, to: &str| -> Result<()> {
            for file in &records {
                let text = fs::read_to_string(file)?;
                ensure!(text.contains(from), "{text}");
                fs::write(file, text.replace(from, to))?;
            }
            Ok(())
        };
        daemon.kill()?;
        rewrite("\"version\":1", "\"version\":2")?;
        daemon.start_again()?;
        assert_eq!(main.sh(LOOK)?, seen);
        assert_eq!(daemon.client().images()?, [], "what this version does not understand is not used");
        ensure!(daemon.log()?.contains("record version 2"), "it is not told");
        let other = daemon.pod("other")?;
        other.remove()?;
        daemon.kill()?;
        rewrite("\"version\":2", "\"version\":1")?;
        daemon.start_again()?;
        assert_eq!((layers(daemon)?, daemon.client().images()?), (before, images));
        assert_eq!(main.sh(LOOK)?, seen);
        Ok(())
    })
}

#[test]
fn a_damaged_record_costs_no_container_anything_and_an_import_mends_it() -> Result<()> {
    rootful(|daemon| {
        import_app(daemon)?;
        let pod = daemon.pod("web")?;
        let (main, seen) = idle_app(&pod)?;
        for (directory, name) in [("layers", "layer.json"), ("images", "record.json")] {
            let damaged = files(daemon, directory, name)?;
            daemon.kill()?;
            for file in &damaged {
                let mut bytes = fs::read(file)?;
                // In the payload.
                let position = bytes.len() - 4;
                *bytes.get_mut(position).context("a record")? ^= 1;
                fs::write(file, bytes)?;
            }
            daemon.start_again()?;
            assert_eq!(main.sh(LOOK)?, seen, "{name}");
            let doctor = daemon.berth()?.arg("doctor").output()?;
            let told = String::from_utf8_lossy(&doctor.stdout).matches("is damaged").count();
            assert_eq!(told, damaged.len(), "{name}: {doctor:?}");
            daemon.client().import(&berth_tests::daemon::programs()?.join("images/demo.tar"))?;
            a_pod_still_runs(daemon, &pod).context(name)?;
            assert_eq!(main.sh(LOOK)?, seen, "{name}");
            import_app(daemon)?;
            assert_eq!(pod.run_container(of_app(name, "cat /note"))?.stdout, "noted\n", "{name}");
            assert_eq!(daemon.client().images()?.len(), 2, "{name}");
            let faults = daemon.log()?.matches("is damaged").count();
            daemon.crash()?;
            assert_eq!(daemon.log()?.matches("is damaged").count(), faults, "{name}: not mended");
            assert_eq!(main.sh(LOOK)?, seen, "{name}");
        }
        pod.remove()?;
        within(SOON, "what was replaced goes with its container", || {
            Ok((layers(daemon)?.len() == 2).then_some(()))
        })
    })
}

#[test]
fn a_container_made_while_its_image_is_removed_has_all_of_it() -> Result<()> {
    const ROUNDS: usize = 60;
    let rounds = u64::try_from(repeats(ROUNDS)?)?;
    rootful(|daemon| {
        let pod = daemon.pod("web")?;
        let mut made = 0;
        for round in 0..rounds {
            import_app(daemon)?;
            let name = format!("main-{round}");
            let created = scope(|scope| -> Result<_> {
                let creating = scope.spawn(|| pod.create(of_app(&name, LOOK)));
                sleep(Duration::from_micros(round % 30 * 800));
                daemon.client().remove_image_of(APP)?;
                creating.join().map_err(|_| anyhow!("the thread panicked"))
            })?;
            // Either there is no image any more, or the container has it.
            let Ok(main) = created else { continue };
            main.start()?;
            let ended = main.ended()?;
            ensure!(
                ended.status.exit_code == 0 && ended.stdout.starts_with("noted\n"),
                "round {round}: {ended:?}"
            );
            main.remove()?;
            made += 1;
        }
        ensure!(made > 0, "no container was made");
        within(SOON, "nothing of the image is left", || Ok((layers(daemon)?.len() == 1).then_some(())))
    })
}

#[test]
fn layers_go_with_the_last_container_that_used_them() -> Result<()> {
    rootful(|daemon| {
        import_app(daemon)?;
        let pod = daemon.pod("web")?;
        let (first, seen) = idle_app(&pod)?;
        let second = pod.start(of_app("second", "sleep 100000"))?;
        daemon.client().remove_image_of(APP)?;
        first.remove()?;
        daemon.crash()?;
        assert_eq!((second.sh(LOOK)?, layers(daemon)?.len()), (seen, 2));
        second.stop(0)?;
        assert_eq!(layers(daemon)?.len(), 2, "an ended container can be looked at");
        pod.remove()?;
        within(SOON, "the layer goes", || Ok((layers(daemon)?.len() == 1).then_some(())))?;
        within(
            SOON,
            "and its record",
            || Ok((names(&daemon.root().join("images"))?.len() == 1).then_some(())),
        )
    })
}

#[test]
fn layers_stay_while_there_may_be_a_container_that_nobody_knows() -> Result<()> {
    rootful(|daemon| {
        import_app(daemon)?;
        let stranger = daemon.root().join("containers").join("ab".repeat(32));
        fs::create_dir(&stranger)?;
        daemon.client().remove_image_of(APP)?;
        assert_eq!(daemon.client().image(APP)?, None);
        assert_eq!(layers(daemon)?.len(), 2);
        fs::remove_dir(&stranger)?;
        daemon.pod("web")?.idle("main")?.remove()?;
        within(SOON, "the layer goes", || Ok((layers(daemon)?.len() == 1).then_some(())))
    })
}

#[test]
fn layers_stay_under_a_container_whose_record_cannot_be_read() -> Result<()> {
    rootful(|daemon| {
        import_app(daemon)?;
        let pod = daemon.pod("web")?;
        let (main, seen) = idle_app(&pod)?;
        daemon.kill()?;
        let mut aside = Vec::new();
        for directory in [daemon.root(), daemon.state()] {
            let record = directory.join("containers").join(&main.id).join("record");
            if record.exists() {
                fs::rename(&record, record.with_extension("aside"))?;
                fs::create_dir(&record)?;
                aside.push(record);
            }
        }
        ensure!(!aside.is_empty(), "no record was found");
        daemon.start_again()?;
        daemon.client().remove_image_of(APP)?;
        remove_something_else(daemon, &pod)?;
        assert_eq!((daemon.client().image(APP)?, main.sh(LOOK)?), (None, seen.clone()));
        daemon.kill()?;
        for record in aside {
            fs::remove_dir(&record)?;
            fs::rename(record.with_extension("aside"), record)?;
        }
        daemon.start_again()?;
        assert_eq!(main.sh(LOOK)?, seen);
        pod.remove()?;
        within(SOON, "then they go", || Ok((layers(daemon)?.len() == 1).then_some(())))
    })
}

#[test]
fn what_cannot_be_deleted_keeps_the_daemon_from_nothing() -> Result<()> {
    rootful(|daemon| {
        import_app(daemon)?;
        // A tree with a mount in it cannot be deleted (unlinkat(2), EBUSY).
        let stuck = |directory: PathBuf| -> Result<()> {
            let place = directory.join("mounted");
            fs::create_dir_all(&place)?;
            Ok(mount(Some("stuck"), &place, Some("tmpfs"), MsFlags::empty(), None::<&str>)?)
        };
        for layer in files(daemon, "layers", "fs/note")? {
            stuck(layer.parent().context("a layer")?.to_owned())?;
        }
        daemon.client().remove_image_of(APP)?;
        assert_eq!((daemon.client().image(APP)?, layers(daemon)?.len()), (None, 1));
        daemon.kill()?;
        for directory in ["layers/x.0.partial", "images/x.1.partial", "trash/x.2"] {
            stuck(daemon.root().join(directory))?;
        }
        fs::create_dir_all(daemon.root().join("trash/y.3/deep/deeper"))?;
        daemon.start_again()?;
        daemon.pod("web")?.idle("main")?;
        import_app(daemon)?;
        daemon.client().remove_image_of(APP)?;
        within(SOON, "all else is deleted", || {
            Ok((!daemon.root().join("trash/y.3").exists()
                && names(&daemon.root().join("layers"))?.len() == 3)
                .then_some(()))
        })
    })
}
