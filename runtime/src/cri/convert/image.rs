//! Images for lists and statuses.

use std::collections::BTreeMap;

use berth_cri::v1;

use super::security::uid_of_digits;

/// An image.
#[derive(Debug, Clone, Copy)]
pub struct ImageView<'a> {
    /// `sha256:...` of its config, its id everywhere.
    pub id: &'a str,
    /// Its `name:tag` references.
    pub repo_tags: &'a [String],
    /// Its `name@sha256:...` references.
    pub repo_digests: &'a [String],
    /// In bytes. The kubelet treats an image of size 0 as broken, so an empty image has one byte.
    pub size_bytes: u64,
    /// `User` of its config.
    pub user: &'a str,
    /// Annotations for `Image.spec`.
    pub annotations: &'a BTreeMap<String, String>,
}

/// The user of an image, as the CRI represents it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageUser<'a> {
    /// None: root.
    Unset,
    /// A number.
    Uid(u32),
    /// Anything else, for the passwd file.
    Name(&'a str),
}

/// The user in `User`: the part before the first colon. Digits that are too large for a uid are a
/// name, which no passwd file has, so that they are not taken for a number modulo something.
#[must_use]
pub fn image_user(text: &str) -> ImageUser<'_> {
    let user = text.split_once(':').map_or(text, |(user, _)| user);
    match uid_of_digits(user) {
        _ if user.is_empty() => ImageUser::Unset,
        Some(uid) => ImageUser::Uid(uid),
        None => ImageUser::Name(user),
    }
}

/// The image for a list or status.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_what_comes_before_the_colon() {
        let cases = [
            ("", ImageUser::Unset),
            (":1004", ImageUser::Unset),
            ("1002", ImageUser::Uid(1002)),
            ("0", ImageUser::Uid(0)),
            ("www-data", ImageUser::Name("www-data")),
            ("1003:1004", ImageUser::Uid(1003)),
            ("www-data:1004", ImageUser::Name("www-data")),
            ("1:2:3", ImageUser::Uid(1)),
            ("+1000", ImageUser::Name("+1000")),
            (" 0", ImageUser::Name(" 0")),
            ("4294967296", ImageUser::Name("4294967296")),
            ("2147483648", ImageUser::Name("2147483648")),
            ("99999999999999999999", ImageUser::Name("99999999999999999999")),
        ];
        for (text, expected) in cases {
            assert_eq!(image_user(text), expected, "{text:?}");
        }
    }

    #[test]
    fn an_image_has_an_id_a_size_and_either_a_uid_or_a_name() {
        let (tags, digests) =
            (["docker.io/library/a:1".to_owned()], ["docker.io/library/a@sha256:0".to_owned()]);
        let annotations = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let view = ImageView {
            id: "sha256:abc",
            repo_tags: &tags,
            repo_digests: &digests,
            size_bytes: 0,
            user: "0:5",
            annotations: &annotations,
        };
        let message = image(&view);
        assert_eq!((message.id.as_str(), message.size), ("sha256:abc", 1));
        assert_eq!(
            (message.repo_tags.as_slice(), message.repo_digests.as_slice()),
            (&tags[..], &digests[..])
        );
        assert_eq!((message.uid, message.username.as_str()), (Some(v1::Int64Value { value: 0 }), ""));
        assert_eq!(message.spec.as_ref().map(|spec| &spec.annotations), Some(&annotations));
        assert!(!message.pinned);
        let named = image(&ImageView { user: "www-data", size_bytes: 7, ..view });
        assert_eq!((named.uid, named.username.as_str(), named.size), (None, "www-data", 7));
        let unset = image(&ImageView { user: "", ..view });
        assert_eq!((unset.uid, unset.username.as_str()), (None, ""));
        assert_eq!(image(&view), image(&view), "the same image is the same message");
    }
}
