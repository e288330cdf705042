//! `berth images` and `berth rmi`: lists and removes images.

use berth_cri::v1::{Image, ListImagesRequest, RemoveImageRequest};

use super::stop::report;
use crate::args::RmiArgs;
use crate::daemon::{Daemon, answer, ask, image_spec};
use crate::error::Error;
use crate::names::{Inventory, listed, short_id};
use crate::output;
use crate::quantity::bytes_text;
use crate::table::Table;

/// Shown for an image without a name.
const NO_NAME: &str = "<none>";

/// Why an image was not removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// Containers use it.
    #[error("image `{image}` is in use by {}; remove them first, or the image's names with --force", listed(.users))]
    InUse {
        /// The image as requested.
        image: String,
        /// The containers.
        users: Vec<String>,
    },
}

/// Lists images, one row for each name.
///
/// # Errors
/// When a call to the daemon fails.
pub(crate) async fn list(daemon: &Daemon) -> Result<(), Error> {
    let request = ListImagesRequest::default();
    let images = ask("list images", daemon.images.clone().list_images(request)).await?.images;
    let mut rows: Vec<_> = images.iter().flat_map(rows_of).collect();
    rows.sort();
    let mut table = Table::new(["IMAGE", "ID", "SIZE"]);
    for row in rows {
        table.row(row);
    }
    Ok(output::text(&table.render())?)
}

/// A row for each tag, else for each digest reference, else one.
fn rows_of(image: &Image) -> Vec<[String; 3]> {
    let names = match (image.repo_tags.as_slice(), image.repo_digests.as_slice()) {
        ([], []) => &[NO_NAME.to_owned()],
        ([], digests) => digests,
        (tags, _) => tags,
    };
    names.iter().map(|name| [name.clone(), short_id(&image.id).to_owned(), bytes_text(image.size)]).collect()
}

/// Removes images, and prints the name of each.
///
/// # Errors
/// When an image is missing or cannot be removed; the others are removed.
pub(crate) async fn remove(daemon: &Daemon, args: &RmiArgs) -> Result<(), Error> {
    let inventory = daemon.inventory().await?;
    let mut outcomes = Vec::with_capacity(args.images.len());
    for image in &args.images {
        outcomes.push(remove_one(daemon, &inventory, image, args.force).await);
    }
    report(&args.images, outcomes)
}

async fn remove_one(daemon: &Daemon, inventory: &Inventory, image: &str, force: bool) -> Result<(), Error> {
    // To the CRI an absent image counts as removed; a user who mistyped a name wants to know.
    let Some(found) = daemon.image(image).await? else { return Err(Error::NoImage(image.to_owned())) };
    let users = users(inventory, &found.id);
    if !force && !users.is_empty() {
        return Err(ImageError::InUse { image: image.to_owned(), users }.into());
    }
    let request = RemoveImageRequest { image: Some(image_spec(image)) };
    answer(format!("remove image {image}"), daemon.images.clone().remove_image(request)).await?;
    Ok(())
}

/// The containers that use an image, by names that commands accept.
fn users(inventory: &Inventory, image_id: &str) -> Vec<String> {
    let using = inventory.containers.iter().filter(|container| container.image_id == image_id);
    let mut users: Vec<_> = using.map(|container| inventory.label(container)).collect();
    users.sort();
    users
}

#[cfg(test)]
mod tests {
    use berth_cri::v1::{Container, ContainerMetadata};

    use super::*;

    #[test]
    fn the_users_of_an_image_are_named() {
        let container = |name: &str, image: &str| Container {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image_id: image.into(),
            ..Container::default()
        };
        let containers =
            vec![container("b", "sha256:1"), container("c", "sha256:2"), container("a", "sha256:1")];
        let inventory = Inventory { containers, ..Inventory::default() };
        assert_eq!(users(&inventory, "sha256:1"), ["?/a", "?/b"]);
        assert!(users(&inventory, "sha256:3").is_empty());
    }

    fn names(tags: &[&str], digests: &[&str]) -> Vec<String> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let image = Image { repo_tags: owned(tags), repo_digests: owned(digests), ..Default::default() };
        rows_of(&image).into_iter().map(|[name, ..]| name).collect()
    }

    #[test]
    fn an_image_has_a_row_for_each_name() {
        assert_eq!(names(&["a:1", "b:2"], &["a@sha256:0"]), ["a:1", "b:2"]);
        assert_eq!(names(&[], &["a@sha256:0"]), ["a@sha256:0"]);
        assert_eq!(names(&[], &[]), [NO_NAME]);
    }
}
