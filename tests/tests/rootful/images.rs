//! Images without a registry: import, lists, removal.

use anyhow::{Context as _, Result};
use berth_tests::daemon::{IMAGE, programs, rootful};
use berth_tests::forge::{Image, Layer};
use berth_tests::pod::container;
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
