//! Calls about images. A pull runs in the caller's task, so that a client that goes away cancels
//! it; a removal runs in its own task and ends whatever the client does.

use std::collections::BTreeMap;
use std::sync::Arc;

use berth_cri::v1;
use berth_image::{Credentials, Image, NoProgress, Reference, Secret};

use super::convert::{self, ImageView};
use super::error::CallError;
use super::image_service::ImageService;
use super::info;
use super::pages::{Items, PAGE, pages};
use super::runtime_service::apart;
use crate::clock::unix_ns;

impl ImageService {
    pub(super) fn list_images(
        &self,
        request: v1::ListImagesRequest,
    ) -> Result<v1::ListImagesResponse, CallError> {
        Ok(v1::ListImagesResponse { images: self.images(request.filter) })
    }

    pub(super) fn stream_images(
        &self,
        request: v1::StreamImagesRequest,
    ) -> Result<Items<v1::StreamImagesResponse>, CallError> {
        let images = self.images(request.filter);
        pages(PAGE, &images, |images| v1::StreamImagesResponse { images })
    }

    pub(super) fn image_status(
        &self,
        request: v1::ImageStatusRequest,
    ) -> Result<v1::ImageStatusResponse, CallError> {
        let spec = request.image.ok_or(CallError::Missing("image"))?;
        // An absent image is not an error.
        let Some(image) = self.node.images.find(&spec.image) else {
            return Ok(v1::ImageStatusResponse::default());
        };
        let info = if request.verbose { info::image(&image) } else { BTreeMap::new() };
        Ok(v1::ImageStatusResponse { image: Some(message(&image)), info })
    }

    pub(super) async fn pull_image(
        &self,
        request: v1::PullImageRequest,
    ) -> Result<v1::PullImageResponse, CallError> {
        let spec = request.image.ok_or(CallError::Missing("image"))?;
        let reference = Reference::parse(&spec.image)?;
        let credentials = credentials(request.auth, reference.domain())?;
        let image = self.node.images.pull(&reference, &credentials, Arc::new(NoProgress)).await?;
        tracing::info!(image = spec.image, id = %image.id(), "image pulled");
        Ok(v1::PullImageResponse { image_ref: image.id().to_string() })
    }

    pub(super) async fn remove_image(
        &self,
        request: v1::RemoveImageRequest,
    ) -> Result<v1::RemoveImageResponse, CallError> {
        let spec = request.image.ok_or(CallError::Missing("image"))?;
        let node = self.node.clone();
        apart(async move {
            let users = node.clone();
            if node.images.remove(&spec.image, move || users.images_in_use()).await? {
                tracing::info!(image = spec.image, "image removed");
            }
            Ok(())
        })
        .await?;
        Ok(v1::RemoveImageResponse {})
    }

    pub(super) fn image_fs_info(
        &self,
        _request: v1::ImageFsInfoRequest,
    ) -> Result<v1::ImageFsInfoResponse, CallError> {
        let usage = self.node.images.usage();
        let filesystem = v1::FilesystemUsage {
            timestamp: unix_ns(),
            // An existing directory, because the kubelet looks up its disk.
            fs_id: Some(v1::FilesystemIdentifier {
                mountpoint: self.node.layout.root().display().to_string(),
            }),
            used_bytes: Some(v1::UInt64Value { value: usage.bytes }),
            inodes_used: Some(v1::UInt64Value { value: usage.inodes }),
        };
        Ok(v1::ImageFsInfoResponse {
            image_filesystems: vec![filesystem.clone()],
            container_filesystems: vec![filesystem],
        })
    }

    fn images(&self, filter: Option<v1::ImageFilter>) -> Vec<v1::Image> {
        let wanted = filter.and_then(|filter| filter.image).map(|spec| spec.image);
        let images = match wanted.filter(|text| !text.is_empty()) {
            Some(text) => self.node.images.find(&text).into_iter().collect(),
            None => self.node.images.list(),
        };
        images.iter().map(message).collect()
    }
}

/// `Image`, the same for every call.
fn message(image: &Image) -> v1::Image {
    let id = image.id().to_string();
    convert::image(&ImageView {
        id: &id,
        repo_tags: image.repo_tags(),
        repo_digests: image.repo_digests(),
        size_bytes: image.size_bytes(),
        user: image.user(),
        annotations: &BTreeMap::new(),
    })
}

/// `AuthConfig`: user and password, else an identity token, else `auth`. If they are for another
/// host, they are not used at all.
fn credentials(auth: Option<v1::AuthConfig>, domain: &str) -> Result<Credentials, CallError> {
    let Some(auth) = auth else { return Ok(Credentials::Anonymous) };
    if !auth.server_address.is_empty() && host_of(&auth.server_address) != domain {
        return Ok(Credentials::Anonymous);
    }
    if !auth.username.is_empty() {
        return Ok(Credentials::Basic { username: auth.username, password: Secret::new(auth.password) });
    }
    if !auth.identity_token.is_empty() {
        return Ok(Credentials::IdentityToken(Secret::new(auth.identity_token)));
    }
    if !auth.auth.is_empty() {
        return Credentials::from_auth_field(&auth.auth)
            .map_err(|_| CallError::Auth("auth.auth: not base64 of user:password"));
    }
    if !auth.registry_token.is_empty() {
        return Ok(Credentials::RegistryToken(Secret::new(auth.registry_token)));
    }
    Ok(Credentials::Anonymous)
}

/// The host in `https://host/v1/`, `host`, or docker's name for its own registry.
fn host_of(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    match rest.split('/').next().unwrap_or(rest) {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        host => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_for_another_host_are_not_used() {
        let auth = |server: &str| {
            Some(v1::AuthConfig {
                username: "ann".to_owned(),
                password: "secret".to_owned(),
                server_address: server.to_owned(),
                ..v1::AuthConfig::default()
            })
        };
        for server in ["", "r.example", "https://r.example", "http://r.example/v2/"] {
            assert!(
                matches!(credentials(auth(server), "r.example"), Ok(Credentials::Basic { .. })),
                "{server}"
            );
        }
        for server in ["other.example", "https://r.example.evil", "r.example:5000"] {
            assert!(matches!(credentials(auth(server), "r.example"), Ok(Credentials::Anonymous)), "{server}");
        }
        assert!(matches!(
            credentials(auth("https://index.docker.io/v1/"), "docker.io"),
            Ok(Credentials::Basic { .. })
        ));
    }
}
