//! What the daemon asks a worker, and what it is answered: protobuf in frames.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use berth_cgroup::{Access, DeviceKind};
use berth_model::container::Device;

use crate::oci_spec::ResolvedDevice;

/// A question.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Question {
    #[prost(oneof = "Ask", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15")]
    pub(super) ask: Option<Ask>,
}

/// What a question is about. Paths are bytes.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Ask {
    /// The source of a mount, which is made if it is absent: [`Tell::Path`].
    #[prost(bytes, tag = "1")]
    Source(Vec<u8>),
    /// To make a directory: [`Tell::Done`].
    #[prost(bytes, tag = "2")]
    Directory(Vec<u8>),
    /// The devices of a request: [`Tell::Devices`].
    #[prost(message, tag = "3")]
    Devices(AskedDevices),
    /// The device at a place below a directory: [`Tell::Devices`], of which there is one at most.
    #[prost(message, tag = "4")]
    DeviceBelow(Below),
    /// All devices of the host: [`Tell::Devices`].
    #[prost(message, tag = "5")]
    HostDevices(()),
    /// A seccomp profile: [`Tell::Content`].
    #[prost(bytes, tag = "6")]
    Profile(Vec<u8>),
    /// To rotate a log: [`Tell::Done`], whether there has to be a new one.
    #[prost(message, tag = "7")]
    Rotate(Rotate),
    /// To open files of a cgroup: [`Tell::Outcomes`], with a descriptor for each that is open.
    #[prost(message, tag = "8")]
    OpenControl(OpenControl),
    /// The cgroups below one: [`Tell::Tree`].
    #[prost(message, tag = "9")]
    Tree(AskedTree),
    /// To remove the directories of a cgroup: [`Tell::Outcomes`].
    #[prost(message, tag = "10")]
    RemoveCgroup(Paths),
    /// Something about CNI, [`super::cni::Asked`] as JSON: any number of [`Tell::At`], then
    /// [`Tell::Content`], a [`super::cni::Outcome`] as JSON.
    #[prost(message, tag = "11")]
    Cni(AskedCni),
    /// What the node lacks, with a [`berth_checkup::Daemon`] as JSON: [`Tell::Content`], the
    /// findings as JSON.
    #[prost(bytes, tag = "12")]
    Checkup(Vec<u8>),
    /// To look at what is imported: [`Tell::Done`], whether it is a directory.
    #[prost(bytes, tag = "13")]
    Import(Vec<u8>),
    /// To look for a file of a directory that is imported: [`Tell::Done`].
    #[prost(message, tag = "14")]
    Member(Below),
    /// To read a file that is imported: [`Tell::Done`] when it is open, then any number of
    /// [`Tell::Content`]. The last one is empty.
    #[prost(message, tag = "15")]
    Read(ReadFile),
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Paths {
    #[prost(bytes, repeated, tag = "1")]
    pub(super) paths: Vec<Vec<u8>>,
}

/// Files in or below these directories of one cgroup.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct OpenControl {
    #[prost(bytes, repeated, tag = "1")]
    pub(super) directories: Vec<Vec<u8>>,
    #[prost(bytes, repeated, tag = "2")]
    pub(super) paths: Vec<Vec<u8>>,
    #[prost(bool, tag = "3")]
    pub(super) for_writing: bool,
}

/// A directory, and how many below it are known already.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AskedTree {
    #[prost(bytes, tag = "1")]
    pub(super) directory: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub(super) known: u64,
}

/// Paths relative to the directory, which is the first with an empty one.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct FoundTree {
    #[prost(bytes, repeated, tag = "1")]
    pub(super) paths: Vec<Vec<u8>>,
    /// These are not all.
    #[prost(bool, tag = "2")]
    pub(super) is_cut: bool,
}

/// For each path errno(3), or 0.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Outcomes {
    #[prost(int32, repeated, tag = "1")]
    pub(super) errnos: Vec<i32>,
}

/// CRI `Device`, of which there are several.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AskedDevices {
    #[prost(message, repeated, tag = "1")]
    pub(super) devices: Vec<AskedDevice>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AskedDevice {
    #[prost(string, tag = "1")]
    pub(super) container_path: String,
    #[prost(string, tag = "2")]
    pub(super) host_path: String,
    #[prost(string, tag = "3")]
    pub(super) permissions: String,
}

/// A place below a directory.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Below {
    #[prost(bytes, tag = "1")]
    pub(super) top: Vec<u8>,
    #[prost(bytes, tag = "2")]
    pub(super) path: Vec<u8>,
}

/// A file, and from which byte on it is read.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ReadFile {
    #[prost(bytes, tag = "1")]
    pub(super) path: Vec<u8>,
    /// In the directory `path`.
    #[prost(bytes, optional, tag = "2")]
    pub(super) member: Option<Vec<u8>>,
    #[prost(uint64, tag = "3")]
    pub(super) offset: u64,
}

/// A log, and from how many bytes on it is rotated.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Rotate {
    #[prost(bytes, tag = "1")]
    pub(super) directory: Vec<u8>,
    #[prost(bytes, tag = "2")]
    pub(super) name: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub(super) limit: u64,
}

/// Something about CNI.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AskedCni {
    #[prost(bytes, tag = "1")]
    pub(super) asked: Vec<u8>,
    /// The directories that it may need.
    #[prost(bytes, repeated, tag = "2")]
    pub(super) paths: Vec<Vec<u8>>,
}

/// Where a worker is.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct At {
    #[prost(bytes, tag = "1")]
    pub(super) path: Vec<u8>,
    /// How long this may take, when it is a program that runs.
    #[prost(uint64, optional, tag = "2")]
    pub(super) milliseconds: Option<u64>,
}

/// An answer.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Answer {
    #[prost(oneof = "Tell", tags = "1, 2, 3, 4, 5, 6, 7, 8")]
    pub(super) tell: Option<Tell>,
}

/// What an answer says.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Tell {
    #[prost(message, tag = "1")]
    Failed(Failure),
    #[prost(bytes, tag = "2")]
    Path(Vec<u8>),
    #[prost(bool, tag = "3")]
    Done(bool),
    #[prost(message, tag = "4")]
    Devices(FoundDevices),
    #[prost(bytes, tag = "5")]
    Content(Vec<u8>),
    #[prost(message, tag = "6")]
    Outcomes(Outcomes),
    #[prost(message, tag = "7")]
    Tree(FoundTree),
    /// Not the answer yet, but where it is looked for.
    #[prost(message, tag = "8")]
    At(At),
}

/// Why something could not be done.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Failure {
    /// With all causes.
    #[prost(string, tag = "1")]
    pub(super) text: String,
    /// Where it happened, if that is not clear from the question.
    #[prost(bytes, tag = "2")]
    pub(super) path: Vec<u8>,
    /// errno(3), or 0.
    #[prost(int32, tag = "3")]
    pub(super) errno: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct FoundDevices {
    #[prost(message, repeated, tag = "1")]
    pub(super) devices: Vec<FoundDevice>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct FoundDevice {
    #[prost(bytes, tag = "1")]
    container_path: Vec<u8>,
    #[prost(bool, tag = "2")]
    block: bool,
    #[prost(uint32, tag = "3")]
    major: u32,
    #[prost(uint32, tag = "4")]
    minor: u32,
    #[prost(uint32, tag = "5")]
    mode: u32,
    #[prost(uint32, tag = "6")]
    uid: u32,
    #[prost(uint32, tag = "7")]
    gid: u32,
    #[prost(bool, tag = "8")]
    read: bool,
    #[prost(bool, tag = "9")]
    write: bool,
    #[prost(bool, tag = "10")]
    mknod: bool,
}

impl Ask {
    /// The paths of the host that are looked at.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        match self {
            Self::Source(path) | Self::Directory(path) | Self::Profile(path) | Self::Import(path) => {
                vec![path_of(path).to_owned()]
            }
            Self::Devices(asked) => {
                asked.devices.iter().map(|device| PathBuf::from(&device.host_path)).collect()
            }
            Self::DeviceBelow(below) | Self::Member(below) => {
                vec![path_of(&below.top).join(path_of(&below.path))]
            }
            Self::Read(read) => {
                let path = path_of(&read.path);
                vec![
                    read.member.as_ref().map_or_else(|| path.to_owned(), |member| path.join(path_of(member))),
                ]
            }
            Self::HostDevices(()) => vec![PathBuf::from("/dev")],
            Self::Rotate(rotate) => vec![path_of(&rotate.directory).join(path_of(&rotate.name))],
            Self::OpenControl(open) => paths_of(&open.directories),
            Self::Tree(asked) => vec![path_of(&asked.directory).to_owned()],
            Self::RemoveCgroup(asked) => paths_of(&asked.paths),
            Self::Cni(cni) => cni.paths.iter().map(|path| path_of(path).to_owned()).collect(),
            Self::Checkup(_) => Vec::new(),
        }
    }

    /// Whether it is about a cgroup.
    pub(super) fn is_of_a_cgroup(&self) -> bool {
        matches!(self, Self::OpenControl(_) | Self::Tree(_) | Self::RemoveCgroup(_))
    }

    /// Whether it certainly changes nothing, also when it is answered late.
    pub(super) fn only_looks(&self) -> bool {
        matches!(
            self,
            Self::Devices(_)
                | Self::DeviceBelow(_)
                | Self::HostDevices(())
                | Self::Profile(_)
                | Self::Checkup(_)
                | Self::Import(_)
                | Self::Member(_)
                | Self::Read(_)
        )
    }
}

impl From<Ask> for Question {
    fn from(ask: Ask) -> Self {
        Self { ask: Some(ask) }
    }
}

impl From<Tell> for Answer {
    fn from(tell: Tell) -> Self {
        Self { tell: Some(tell) }
    }
}

/// A path in a message.
pub(super) fn path_of(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Paths in a message.
pub(super) fn paths_of(bytes: &[Vec<u8>]) -> Vec<PathBuf> {
    bytes.iter().map(|bytes| path_of(bytes).to_owned()).collect()
}

/// A path for a message.
pub(super) fn bytes_of(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

impl From<&Device> for AskedDevice {
    fn from(device: &Device) -> Self {
        let Device { container_path, host_path, permissions } = device.clone();
        Self { container_path, host_path, permissions }
    }
}

impl From<AskedDevice> for Device {
    fn from(asked: AskedDevice) -> Self {
        let AskedDevice { container_path, host_path, permissions } = asked;
        Self { container_path, host_path, permissions }
    }
}

impl From<ResolvedDevice> for FoundDevice {
    fn from(device: ResolvedDevice) -> Self {
        Self {
            container_path: device.container_path.into_os_string().into_vec(),
            block: device.kind == DeviceKind::Block,
            major: device.major,
            minor: device.minor,
            mode: device.mode,
            uid: device.uid,
            gid: device.gid,
            read: device.access.read,
            write: device.access.write,
            mknod: device.access.mknod,
        }
    }
}

impl From<FoundDevice> for ResolvedDevice {
    fn from(found: FoundDevice) -> Self {
        Self {
            container_path: OsString::from_vec(found.container_path).into(),
            kind: if found.block { DeviceKind::Block } else { DeviceKind::Char },
            major: found.major,
            minor: found.minor,
            mode: found.mode,
            uid: found.uid,
            gid: found.gid,
            access: Access { read: found.read, write: found.write, mknod: found.mknod },
        }
    }
}
