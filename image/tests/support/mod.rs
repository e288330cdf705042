//! What the integration tests of the image crate share: images made byte by byte, a real registry,
//! and a way to look at trees.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of this")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    missing_debug_implementations,
    reason = "what cannot be set up fails the test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_image::{Digest, InUse, NoProgress, Progress, Store, StoreError, StoreOptions, StoredLayer};

// The rule of the rootful tests: what did not run is counted as that.
#[path = "../../../tests/src/skip.rs"]
mod skipped;

/// Notes that the test which this is called in does not run, for want of a program.
pub fn skip_without(program: &str) {
    let thread = std::thread::current();
    skipped::skip(thread.name().unwrap_or("a test"), &format!("{program} is not installed"));
}

/// Reports go nowhere.
pub fn quiet() -> Arc<dyn Progress> {
    Arc::new(NoProgress)
}

/// A store in its own directory, without a floor of free space that a small disk could not meet.
pub fn store(root: &Path) -> Store {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Store::open(root, options()) {
            // A program that another test starts has all descriptors until its exec, so also the
            // lock of a store that was just closed (flock(2)).
            Err(StoreError::Locked { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// See [`store`].
pub fn options() -> StoreOptions {
    StoreOptions { min_free_bytes: 0, min_free_percent: 0, ..StoreOptions::default() }
}

/// For calls that ask which images containers use: none.
pub fn nobody() -> InUse {
    Some(BTreeSet::new())
}

/// For calls that ask which images containers use: these.
pub fn containers_of(ids: &[Digest]) -> impl FnOnce() -> InUse + Send + 'static {
    let ids = ids.iter().copied().collect();
    move || Some(ids)
}

/// The names in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits until something holds that happens in the background.
#[track_caller]
pub fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A tar archive under construction.
#[derive(Default)]
pub struct Layer {
    bytes: Vec<u8>,
}

/// The header fields of an entry; the rest are fixed.
#[derive(Clone)]
pub struct Entry {
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: u64,
    pub link: Vec<u8>,
    pub device: (u32, u32),
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            kind: b'0',
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_000_000_000,
            link: Vec::new(),
            device: (0, 0),
            pax: Vec::new(),
        }
    }
}

impl Entry {
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub fn mtime(mut self, mtime: u64) -> Self {
        self.mtime = mtime;
        self
    }

    pub fn pax(mut self, key: &str, value: &[u8]) -> Self {
        self.pax.push((key.as_bytes().to_vec(), value.to_vec()));
        self
    }
}

impl Layer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry; names and targets that do not fit go into a PAX header.
    pub fn add(mut self, path: impl AsRef<[u8]>, mut entry: Entry, content: &[u8]) -> Self {
        let path = path.as_ref();
        if path.len() > 100 {
            entry.pax.push((b"path".to_vec(), path.to_vec()));
        }
        if entry.link.len() > 100 {
            entry.pax.push((b"linkpath".to_vec(), entry.link.clone()));
        }
        if !entry.pax.is_empty() {
            let records: Vec<u8> = entry.pax.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
            self.block(b"pax", b'x', &Entry::default(), &records);
        }
        self.block(path, entry.kind, &entry, content);
        self
    }

    fn block(&mut self, path: &[u8], kind: u8, entry: &Entry, content: &[u8]) {
        let mut header = tar::Header::new_ustar();
        let old = header.as_old_mut();
        let length = path.len().min(100);
        old.name[..length].copy_from_slice(&path[..length]);
        let length = entry.link.len().min(100);
        old.linkname[..length].copy_from_slice(&entry.link[..length]);
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.gid);
        header.set_mtime(entry.mtime);
        header.set_size(content.len() as u64);
        header.set_device_major(entry.device.0).unwrap();
        header.set_device_minor(entry.device.1).unwrap();
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.add(path, Entry::default(), content)
    }

    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.add(path, Entry { kind: b'5', mode, ..Entry::default() }, b"")
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.add(path, Entry { kind: b'2', mode: 0o777, link: target.into(), ..Entry::default() }, b"")
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.add(path, Entry { kind: b'1', link: target.into(), ..Entry::default() }, b"")
    }

    pub fn node(self, path: &str, kind: u8, device: (u32, u32), mode: u32) -> Self {
        self.add(path, Entry { kind, device, mode, ..Entry::default() }, b"")
    }

    /// The whole archive.
    pub fn tar(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}

fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// How a layer is packed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    pub fn pack(self, tar: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => tar.to_vec(),
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(tar).unwrap();
                encoder.finish().unwrap()
            }
            Self::Zstd => zstd::encode_all(tar, 1).unwrap(),
        }
    }
}

/// The families of media types.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Oci,
    Docker,
}

/// An image in parts: content by digest, and which of it is the manifest.
#[derive(Clone)]
pub struct Built {
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    pub manifest: Digest,
    pub manifest_type: &'static str,
    pub config: Digest,
    pub layers: Vec<Digest>,
}

impl Built {
    pub fn new(tars: &[Vec<u8>], packing: Packing, family: Family, label: &str) -> Self {
        let mut blobs = BTreeMap::new();
        let mut put = |bytes: Vec<u8>| {
            let digest = Digest::of(&bytes);
            blobs.insert(digest, bytes);
            digest
        };
        let (config_type, manifest_type, layer_type) = match family {
            Family::Oci => (
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.oci.image.manifest.v1+json",
                match packing {
                    Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
                    Packing::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
                    Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
                },
            ),
            Family::Docker => (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            ),
        };
        let diff_ids: Vec<String> = tars.iter().map(|tar| Digest::of(tar).to_string()).collect();
        let config = serde_json::json!({
            "created": "2020-01-01T00:00:00Z", "architecture": "amd64", "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/true"], "User": "1000:5", "WorkingDir": "/w",
                       "Labels": {"label": label}, "StopSignal": "SIGINT", "Volumes": {"/v": {}}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string()
        .into_bytes();
        let mut layers = Vec::new();
        let mut descriptors = Vec::new();
        for tar in tars {
            let packed = packing.pack(tar);
            let size = packed.len();
            let digest = put(packed);
            layers.push(digest);
            descriptors.push(
                serde_json::json!({"mediaType": layer_type, "digest": digest.to_string(), "size": size}),
            );
        }
        let config_size = config.len();
        let config = put(config);
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": manifest_type,
            "config": {"mediaType": config_type, "digest": config.to_string(), "size": config_size},
            "layers": descriptors,
        });
        let manifest = put(manifest.to_string().into_bytes());
        Self { blobs, manifest, manifest_type, config, layers }
    }

    pub fn simple(label: &str) -> Self {
        Self::new(&[Layer::new().file("file", label.as_bytes()).tar()], Packing::Gzip, Family::Oci, label)
    }

    pub fn bytes(&self, digest: Digest) -> &[u8] {
        &self.blobs[&digest]
    }

    /// Writes an OCI image layout with this image under a name.
    pub fn write_layout(&self, dir: &Path, name: &str) {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        for (digest, bytes) in &self.blobs {
            fs::write(dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        }
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": self.manifest_type, "digest": self.manifest.to_string(),
                "size": self.bytes(self.manifest).len(),
                "annotations": {"org.opencontainers.image.ref.name": name},
            }],
        });
        fs::write(dir.join("index.json"), index.to_string()).unwrap();
    }
}

/// Debian's `docker-registry` on a free port of loopback, with its own data.
pub struct Registry {
    child: Child,
    pub address: String,
    _dir: tempfile::TempDir,
}

impl Registry {
    /// `None` if the program is not installed: the caller says that it skips.
    pub fn start() -> Option<Self> {
        Self::start_with("")
    }

    /// The same over TLS, with this certificate and key.
    pub fn start_tls(certificate: &Path, key: &Path) -> Option<Self> {
        Self::start_with(&format!(
            ", tls: {{certificate: {}, key: {}}}",
            certificate.display(),
            key.display()
        ))
    }

    fn start_with(http: &str) -> Option<Self> {
        if !Path::new("/usr/bin/docker-registry").exists() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let config = dir.path().join("config.yml");
        let data = dir.path().join("data");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"{http}}}\n",
                data.display()
            ),
        )
        .unwrap();
        let child = Command::new("/usr/bin/docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(Self { child, address, _dir: dir })
    }

    pub fn push(&self, repository: &str, tag: &str, image: &Built) {
        for (digest, bytes) in image.blobs.iter().filter(|(digest, _)| **digest != image.manifest) {
            let (status, location) = self.http(
                "POST",
                &format!("/v2/{repository}/blobs/uploads/"),
                "application/octet-stream",
                b"",
            );
            assert_eq!(status, 202);
            let location = location.unwrap();
            let path = location.strip_prefix(&format!("http://{}", self.address)).unwrap_or(&location);
            let (status, _) =
                self.http("PUT", &format!("{path}&digest={digest}"), "application/octet-stream", bytes);
            assert_eq!(status, 201);
        }
        self.put_manifest(repository, tag, image.manifest_type, image.bytes(image.manifest));
        self.put_manifest(
            repository,
            &image.manifest.to_string(),
            image.manifest_type,
            image.bytes(image.manifest),
        );
    }

    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) {
        let (status, _) = self.http("PUT", &format!("/v2/{repository}/manifests/{tag}"), media_type, bytes);
        assert_eq!(status, 201);
    }

    fn http(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> (u16, Option<String>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        let mut location = None;
        loop {
            line.clear();
            reader.read_line(&mut line).unwrap();
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("Location: ") {
                location = Some(value.trim().to_owned());
            }
        }
        let _ = reader.read_to_end(&mut Vec::new());
        (status, location)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory beside the tree that must not be reached, and what it looked like.
pub struct Canary {
    dir: PathBuf,
    before: String,
}

impl Canary {
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("secret"), "host secret").unwrap();
        fs::write(dir.join("sub/other"), "other").unwrap();
        fs::set_permissions(dir.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
        Self { dir: dir.to_owned(), before: Self::look(dir) }
    }

    pub fn path(&self) -> &str {
        self.dir.to_str().unwrap()
    }

    pub fn assert_untouched(&self, context: &str) {
        assert_eq!(self.before, Self::look(&self.dir), "{context}");
    }

    /// With the number of names of each inode: a hard link into an image would be a way in.
    fn look(dir: &Path) -> String {
        let links = |name: &str| fs::metadata(dir.join(name)).unwrap().nlink();
        format!("{}\n{} {} {}", describe(dir), links(""), links("secret"), links("sub/other"))
    }
}

/// Everything about a tree as text: one line per entry, sorted; inodes of hard links numbered by
/// their first name.
pub fn describe(dir: &Path) -> String {
    describe_with(dir, &format!("cd '{}'", dir.display()))
}

/// Layers that are all directories.
pub fn directories(layers: Result<Vec<StoredLayer>, StoreError>) -> Result<Vec<PathBuf>, StoreError> {
    Ok(layers?.into_iter().map(|StoredLayer::Directory(path)| path).collect())
}

/// The same for an overlay of these lower directories, top first, mounted read-only in a mount
/// namespace of its own.
pub fn describe_overlay(lower: &[PathBuf], scratch: &Path) -> String {
    let mount = scratch.join("merged");
    let empty = scratch.join("empty");
    fs::create_dir_all(&mount).unwrap();
    fs::create_dir_all(&empty).unwrap();
    let mut dirs: Vec<String> = lower.iter().map(|dir| dir.to_str().unwrap().to_owned()).collect();
    if dirs.len() == 1 {
        // Overlayfs wants two lower directories where there is no upper one.
        dirs.push(empty.to_str().unwrap().to_owned());
    }
    let enter = format!(
        "mount -t overlay overlay -o 'lowerdir={}' '{}' && cd '{}'",
        dirs.join(":"),
        mount.display(),
        mount.display()
    );
    describe_with(&mount, &enter)
}

fn describe_with(dir: &Path, enter: &str) -> String {
    let script = format!(
        r#"{enter} && find . -printf 'M|%P|%y|%m|%U:%G|%T@|%l||%D:%i\n' | sort \
           && find . -type f -print0 | sort -z | xargs -0 -r sha256sum | sed 's/^/C|/' \
           && find . \( -type b -o -type c \) -print0 | sort -z | xargs -0 -r stat -c 'D|%n|%t:%T' \
           && getfattr -R -P -h -d -m '^(user\.|security\.capability|trusted\.)' -e hex . 2>/dev/null | sed 's/^/X|/'; true"#
    );
    let output = Command::new("unshare")
        .args(["-m", "--propagation", "private", "bash", "-c", &script])
        // The newer way of mount(8) hands the layers over as one string, of at most 255 bytes:
        // fsconfig(2).
        .env("LIBMOUNT_FORCE_MOUNT2", "always")
        .output()
        .unwrap();
    assert!(!output.stdout.is_empty(), "{}: {}", dir.display(), String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Inode numbers mean nothing: each is named after its first path. Names that cannot be seen
    // do not count. The root's time means nothing at all.
    let mut names: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let entries = || text.lines().map(|line| line.split('|').collect::<Vec<_>>());
    for fields in entries().filter(|fields| fields.len() == 9 && fields[2] != "d") {
        names.entry(fields[8]).or_default().push(fields[1]);
    }
    let mut lines = Vec::new();
    for mut fields in entries() {
        let mut same = String::new();
        if fields.len() == 9 {
            let inode = fields[8];
            fields.truncate(7);
            if fields[1].is_empty() {
                fields[5] = "";
            }
            if let Some([first, _, ..]) = names.get(inode).map(Vec::as_slice) {
                same = format!("|same as {first}");
            }
        }
        lines.push(fields.join("|") + &same);
    }
    lines.join("\n")
}
