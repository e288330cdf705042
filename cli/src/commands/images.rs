//! `berth images` and `berth rmi`: what images there are, and fewer of them.

use berth_cri::v1::{Image, ListImagesRequest, RemoveImageRequest};

use crate::args::RmiArgs;
use crate::daemon::{Daemon, answer, image_spec};
use crate::error::Error;
use crate::names::short_id;
use crate::output;
use crate::quantity::bytes_text;
use crate::table::Table;

use super::stop::report;

/// What is shown for an image without a name.
const NO_NAME: &str = "<none>";

/// Lists images, one row for each name.
///
/// # Errors
/// When the daemon cannot be asked.
pub(crate) async fn list(daemon: &Daemon) -> Result<(), Error> {
    let request = ListImagesRequest::default();
    let images = answer("list images", daemon.images.clone().list_images(request)).await?.images;
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

/// Removes images, and prints each name that was.
///
/// # Errors
/// When an image is not there, or could not be removed; the rest is.
pub(crate) async fn remove(daemon: &Daemon, args: &RmiArgs) -> Result<(), Error> {
    let mut outcomes = Vec::with_capacity(args.images.len());
    for image in &args.images {
        outcomes.push(remove_one(daemon, image).await);
    }
    report(&args.images, outcomes)
}

async fn remove_one(daemon: &Daemon, image: &str) -> Result<(), Error> {
    // To CRI an absent image is removed already; a person who mistyped a name wants to know.
    if daemon.image(image).await?.is_none() {
        return Err(Error::NoImage(image.to_owned()));
    }
    let request = RemoveImageRequest { image: Some(image_spec(image)) };
    answer(format!("remove image {image}"), daemon.images.clone().remove_image(request)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
