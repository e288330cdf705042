//! Images for lists and statuses.

use super::security::uid_of_digits;
use berth_cri::v1;
use std::collections::BTreeMap;

/// What is known of an image.
#[derive(Debug, Clone, Copy)]
pub struct ImageView<'a> {
    /// `sha256:...` of its config, the same text wherever the image is named by its id.
    pub id: &'a str,
    /// Every `name:tag` of it.
    pub repo_tags: &'a [String],
    /// Every `name@sha256:...` of it.
    pub repo_digests: &'a [String],
    /// Bytes. The kubelet takes an image of none for a broken one, so an empty image is one byte large.
    pub size_bytes: u64,
    /// `User` of its config.
    pub user: &'a str,
    /// Annotations for `Image.spec`.
    pub annotations: &'a BTreeMap<String, String>,
}

/// The user that an image names, as far as the CRI tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageUser<'a> {
    /// None: root.
    Unset,
    /// A number.
    Uid(u32),
    /// Anything else, for the passwd file.
    Name(&'a str),
}

/// The user in the text of `User`: what is before the first colon. Digits that are too large for a uid are a name, which no passwd file has,
/// so that nobody takes them for a number modulo something.
#[must_use]
pub fn image_user(text: &str) -> ImageUser<'_> {
    let user = text.split_once(':').map_or(text, |(user, _)| user);
    match uid_of_digits(user) {
        _ if user.is_empty() => ImageUser::Unset,
        Some(uid) => ImageUser::Uid(uid),
        None => ImageUser::Name(user),
    }
}

/// The image in a list or status.
#[must_use]
pub fn image(view: &ImageView<'_>) -> v1::Image {
    let (uid, username) = match image_user(view.user) {
        ImageUser::Unset => (None, ""),
        ImageUser::Uid(uid) => (Some(v1::Int64Value { value: uid.into() }), ""),
        ImageUser::Name(name) => (None, name),
    };
    v1::Image {
        id: view.id.to_owned(),
        repo_tags: view.repo_tags.to_vec(),
        repo_digests: view.repo_digests.to_vec(),
        size: view.size_bytes.max(1),
        uid,
        username: username.to_owned(),
        spec: Some(v1::ImageSpec {
            image: view.id.to_owned(),
            annotations: view.annotations.clone(),
            ..v1::ImageSpec::default()
        }),
        pinned: false,
    }
}
