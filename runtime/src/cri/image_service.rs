//! `runtime.v1.ImageService`: its calls, which are in [`super::image`].

use std::sync::Arc;

use berth_cri::v1;

use super::table::service;
use crate::node::Node;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct ImageService {
    pub(super) node: Arc<Node>,
}

service! {
    impl v1::image_service_server::ImageService as ImageService;
    calls {
        ListImages: list_images(ListImagesRequest) -> ListImagesResponse;
        ImageStatus: image_status(ImageStatusRequest) -> ImageStatusResponse;
        PullImage: pull_image(PullImageRequest) -> PullImageResponse, await;
        RemoveImage: remove_image(RemoveImageRequest) -> RemoveImageResponse, await;
        ImageFsInfo: image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
    }
    streams {
        StreamImages: stream_images(StreamImagesRequest) -> StreamImagesStream = StreamImagesResponse;
    }
}

impl ImageService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}
