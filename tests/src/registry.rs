//! A real registry, Debian's `docker-registry`, on loopback of a test's host.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use reqwest::StatusCode;
use reqwest::blocking::{Client, Response};
use reqwest::header::{CONTENT_TYPE, LOCATION};

use crate::daemon::{Daemon, SOON};
use crate::deadline::within;
use crate::forge::Sealed;
use crate::host::Host;

/// The path in Debian's package.
const PROGRAM: &str = "/usr/bin/docker-registry";

/// A running registry, ended on drop.
#[derive(Debug)]
pub struct Registry<'host> {
    process: Child,
    host: &'host Host,
    data: PathBuf,
    /// The blobs that it has, with a repository for each.
    blobs: Mutex<HashMap<String, String>>,
    /// Host and port, as references name them.
    pub address: String,
}

impl<'host> Registry<'host> {
    /// Starts one on this port of the daemon's host, with its data in the daemon's directory.
    ///
    /// # Errors
    /// When the program is missing (the message says what to install), or does not answer in time.
    pub fn start(daemon: &'host Daemon, port: u16) -> Result<Self> {
        ensure!(Path::new(PROGRAM).exists(), "no {PROGRAM}: apt-get install docker-registry");
        let directory = daemon.directory(&format!("registry-{port}"))?;
        let data = directory.join("data");
        let address = format!("127.0.0.1:{port}");
        let configuration = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            data.display()
        );
        let file = directory.join("config.yml");
        fs::write(&file, configuration).context("configuring the registry")?;
        let log = fs::File::create(directory.join("log")).context("the registry's log")?;
        let host = daemon.host();
        let process = host
            .command(PROGRAM)
            .arg("serve")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("sharing the registry's log")?)
            .stderr(log)
            .spawn()
            .context("starting docker-registry")?;
        let registry = Self { process, host, data, blobs: Mutex::default(), address };
        within(SOON, "docker-registry answers", || {
            let answer = registry.ask(|http, root| http.get(format!("{root}/v2/")).send())?;
            Ok(answer.status().is_success().then_some(()))
        })?;
        Ok(registry)
    }

    /// Pushes an image to it, and returns the reference with the tag.
    ///
    /// # Errors
    /// When the registry refuses a part.
    pub fn push(&self, repository: &str, tag: &str, image: &Sealed) -> Result<String> {
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        for (digest, bytes) in &image.blobs {
            let known = blobs.get(digest).map(|from| format!("?mount={digest}&from={from}"));
            let begun = self.ask(|http, root| {
                let uploads = format!("{root}/v2/{repository}/blobs/uploads/");
                http.post(uploads + known.as_deref().unwrap_or_default()).send()
            })?;
            if known.is_some() && begun.status() == StatusCode::CREATED {
                continue;
            }
            let location =
                begun.headers().get(LOCATION).context("no place to upload to")?.to_str()?.to_owned();
            let put = self.ask(|http, root| {
                let location = if location.starts_with('/') { format!("{root}{location}") } else { location };
                http.put(format!("{location}&digest={digest}")).body(bytes.clone()).send()
            })?;
            ensure!(put.status().is_success(), "the registry refuses {digest}: {}", put.status());
            blobs.insert(digest.clone(), repository.to_owned());
        }
        let put = self.ask(|http, root| {
            http.put(format!("{root}/v2/{repository}/manifests/{tag}"))
                .header(CONTENT_TYPE, "application/vnd.oci.image.manifest.v1+json")
                .body(image.manifest.clone())
                .send()
        })?;
        ensure!(put.status().is_success(), "the registry refuses the manifest: {}", put.status());
        Ok(format!("{}/{repository}:{tag}", self.address))
    }

    /// Changes the bytes that it has for a digest, and serves from now on.
    ///
    /// # Errors
    /// When it has none.
    pub fn corrupt(&self, digest: &str, change: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let hex = digest.trim_start_matches("sha256:");
        let start = hex.get(..2).context("a digest")?;
        let path = self.data.join("docker/registry/v2/blobs/sha256").join(start).join(hex).join("data");
        let mut bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        change(&mut bytes);
        fs::write(&path, bytes).with_context(|| format!("changing {}", path.display()))
    }

    fn ask(
        &self,
        request: impl FnOnce(&Client, &str) -> reqwest::Result<Response> + Send,
    ) -> Result<Response> {
        let root = format!("http://{}", self.address);
        self.host.inside(|| {
            // Refused when another test of this process was first, which is just as good. Only
            // plain HTTP is spoken here.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let client =
                Client::builder().no_proxy().timeout(SOON).build().context("making an HTTP client")?;
            request(&client, &root).context("asking the registry")
        })
    }
}

impl Drop for Registry<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
