//! A daemon for tests that serves Berth's own service over a real socket, with prepared answers.
//!
//! It knows nothing of pods and images; calls to the CRI are not implemented.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use berth_api::v1::berth_server::{Berth, BerthServer};
use berth_api::v1::{
    ImportEvent, ImportRequest, InfoRequest, InfoResponse, PullEvent, PullRequest, UsageRequest,
    UsageResponse,
};
use futures_util::Stream;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

use crate::daemon::Daemon;

/// The prepared answers, and the requests received.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// The events of a pull. A single error is the answer to the call itself.
    pub(crate) pull: Vec<Result<PullEvent, Status>>,
    /// The events of an import. A single error is the answer to the call itself, before anything is
    /// read.
    pub(crate) import: Vec<Result<ImportEvent, Status>>,
    /// The requested pulls.
    pub(crate) pulled: Arc<Mutex<Vec<PullRequest>>>,
    /// The requests of all imports.
    pub(crate) imported: Arc<Mutex<Vec<ImportRequest>>>,
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Berth for Script {
    type ImportStream = Events<ImportEvent>;
    type PullStream = Events<PullEvent>;

    async fn import(
        &self,
        request: Request<Streaming<ImportRequest>>,
    ) -> Result<Response<Self::ImportStream>, Status> {
        if let [Err(refusal)] = self.import.as_slice() {
            return Err(refusal.clone());
        }
        let mut requests = request.into_inner();
        while let Some(request) = requests.message().await? {
            self.imported.lock().unwrap().push(request);
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(self.import.clone()))))
    }

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        if let [Err(refusal)] = self.pull.as_slice() {
            return Err(refusal.clone());
        }
        self.pulled.lock().unwrap().push(request.into_inner());
        Ok(Response::new(Box::pin(tokio_stream::iter(self.pull.clone()))))
    }

    async fn usage(&self, _: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        Err(Status::unimplemented("not in the script"))
    }

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Err(Status::unimplemented("not in the script"))
    }
}

/// A connected fake. It ends with the test's runtime; its socket is removed with the directory.
#[derive(Debug)]
pub(crate) struct FakeDaemon {
    /// The connection.
    pub(crate) daemon: Daemon,
    _directory: tempfile::TempDir,
}

impl FakeDaemon {
    /// Starts a fake on its own socket and connects to it.
    pub(crate) async fn start(script: Script) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket: PathBuf = directory.path().join("berth.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let service = BerthServer::new(script).max_decoding_message_size(berth_cri::MAX_MESSAGE_BYTES);
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        Self { daemon: Daemon::connect(&socket).await.unwrap(), _directory: directory }
    }
}
