//! Tar archives: headers in, entries out, strictly.
//!
//! Layout of header blocks comes from the `tar` crate; the walk, PAX, GNU long names and the precedence of sizes are here, because
//! whoever reads those differently sees other entries (security class "parser differential"). Where two readers in the field could
//! disagree about an archive, this one refuses it: sizes on entries without content, doubled extension headers, a long name in both
//! extensions, data after the end, sparse files. What is accepted means what Go's `archive/tar` makes of it.
//!
//! Global PAX headers are read over and ignored. Extension headers are bounded by 1 MiB each.

use std::io::{self, Read};

use berth_sys::beneath::Timestamp;

use super::pax::{self, Overrides, PaxError};

/// Tar's unit.
const BLOCK: usize = 512;

/// Longest extension header (PAX or GNU long name). Attributes of one inode take 64 KiB, names 4 KiB each.
const MAX_EXTENSION: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    Regular,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// An entry's header with its extensions applied. Texts are bytes as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    /// Target of a symbolic or hard link; empty otherwise.
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// Permission bits, `0o7777` at most.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Bytes of content; 0 for all but regular files.
    pub(crate) size: u64,
    pub(crate) mtime: Timestamp,
    /// Major and minor number of a device.
    pub(crate) device: (u64, u64),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The stream below failed.
    #[error("read the archive")]
    Read(#[source] io::Error),
    /// The stream ended inside a header or inside content.
    #[error("archive is cut off")]
    Truncated,
    /// A header's checksum does not hold.
    #[error("header checksum does not match")]
    Checksum,
    /// A number in a header is none, or is out of range.
    #[error("bad {0} in a header")]
    Field(&'static str),
    /// A type that image layers do not have.
    #[error("entry type '{}' is not supported", char::from(*.0).escape_default())]
    UnsupportedType(u8),
    /// Extension header above 1 MiB.
    #[error("extension header is too long")]
    ExtensionTooLong,
    /// Two extension headers of one kind before an entry, or one before the end.
    #[error("extension header does not belong to one entry")]
    StrayExtension,
    /// A PAX and a GNU extension that give one entry different names.
    #[error("two extension headers disagree about a name")]
    ConflictingNames,
    /// A size on an entry that has no content.
    #[error("an entry without content has a size")]
    UnexpectedSize,
    /// A regular file whose name ends as a directory's.
    #[error("name of a file ends with a slash")]
    FileWithSlash,
    /// PAX records.
    #[error(transparent)]
    Pax(#[from] PaxError),
    /// One zero block only, or data after the two that end an archive.
    #[error("data after the end of the archive")]
    TrailingData,
}

/// Extension headers that wait for their entry.
#[derive(Default)]
struct Pending {
    pax: Option<Overrides>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.long_name.is_none() && self.long_link.is_none()
    }
}

/// Reads entries one after the other; the content of each with [`Archive::read_content`].
pub(crate) struct Archive<R> {
    input: R,
    /// Content of the current entry that was not read yet.
    remaining: u64,
    /// Zeros between that content and the next header.
    padding: u64,
    /// Bytes taken from the input.
    position: u64,
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, remaining: 0, padding: 0, position: 0 }
    }

    /// Where the content that [`Archive::read_content`] gives next lies in the stream.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The next entry; `None` after the last, when the rest of the stream was seen to be zeros.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, ArchiveError> {
        self.skip_content()?;
        let mut pending = Pending::default();
        loop {
            let Some(block) = self.header_block()? else {
                return if pending.is_empty() { Ok(None) } else { Err(ArchiveError::StrayExtension) };
            };
            check_sum(&block)?;
            let header = tar::Header::from_byte_slice(&block);
            let old = header.as_old();
            let size = number(&old.size, "size")?;
            match old.linkflag[0] {
                b'x' => {
                    let overrides = pax::parse(&self.extension(size)?)?;
                    if pending.pax.replace(overrides).is_some() {
                        return Err(ArchiveError::StrayExtension);
                    }
                }
                b'g' => drop(self.extension(size)?),
                b'L' => {
                    let name = until_nul(&self.extension(size)?).to_vec();
                    if pending.long_name.replace(name).is_some() {
                        return Err(ArchiveError::StrayExtension);
                    }
                }
                b'K' => {
                    let link = until_nul(&self.extension(size)?).to_vec();
                    if pending.long_link.replace(link).is_some() {
                        return Err(ArchiveError::StrayExtension);
                    }
                }
                _ => {
                    let entry = build(&block, pending)?;
                    self.remaining = entry.size;
                    self.padding = padding_of(entry.size);
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Reads content of the current entry; 0 at its end.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let wanted = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let target = buffer.get_mut(..wanted).unwrap_or_default();
        let length = read_some(&mut self.input, target)?;
        if length == 0 {
            return Err(ArchiveError::Truncated);
        }
        self.remaining -= length as u64;
        self.position += length as u64;
        Ok(length)
    }

    fn skip_content(&mut self) -> Result<(), ArchiveError> {
        let mut left = self.remaining + self.padding;
        let mut buffer = [0_u8; 8192];
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let length = read_some(&mut self.input, buffer.get_mut(..wanted).unwrap_or_default())?;
            if length == 0 {
                return Err(ArchiveError::Truncated);
            }
            left -= length as u64;
            self.position += length as u64;
        }
        (self.remaining, self.padding) = (0, 0);
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > MAX_EXTENSION {
            return Err(ArchiveError::ExtensionTooLong);
        }
        let whole = usize::try_from(size + padding_of(size)).map_err(|_| ArchiveError::ExtensionTooLong)?;
        let mut data = vec![0_u8; whole];
        if self.fill(&mut data)? != whole {
            return Err(ArchiveError::Truncated);
        }
        data.truncate(usize::try_from(size).map_err(|_| ArchiveError::ExtensionTooLong)?);
        Ok(data)
    }

    /// The next block that is not zeros, or `None` at the end. An archive without its closing zero blocks is taken, as everybody does.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, ArchiveError> {
        let mut block = [0_u8; BLOCK];
        match self.fill(&mut block)? {
            0 => return Ok(None),
            BLOCK if block.iter().any(|&b| b != 0) => return Ok(Some(block)),
            BLOCK => {}
            _ => return Err(ArchiveError::Truncated),
        }
        // The end is two zero blocks, then zeros up to the writer's record size. Go, bsdtar and GNU tar ignore what follows, `tar -i`
        // does not: so nothing may follow.
        let mut rest = [0_u8; 8192];
        loop {
            let length = read_some(&mut self.input, &mut rest)?;
            if length == 0 {
                return Ok(None);
            }
            self.position += length as u64;
            if rest.iter().take(length).any(|&b| b != 0) {
                return Err(ArchiveError::TrailingData);
            }
        }
    }

    /// Reads until `buffer` is full or the stream ends.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let length = read_some(&mut self.input, rest)?;
            if length == 0 {
                break;
            }
            done += length;
        }
        self.position += done as u64;
        Ok(done)
    }
}

fn read_some(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
    loop {
        match input.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done.map_err(ArchiveError::Read),
        }
    }
}

/// Sum of all bytes with the checksum field as spaces; old writers summed signed bytes (POSIX.1-1988 was read both ways).
fn check_sum(block: &[u8; BLOCK]) -> Result<(), ArchiveError> {
    let header = tar::Header::from_byte_slice(block);
    let stated = number(&header.as_old().cksum, "checksum")?;
    let masked = |i: usize, b: u8| if (148..156).contains(&i) { b' ' } else { b };
    let unsigned: u64 = block.iter().enumerate().map(|(i, &b)| u64::from(masked(i, b))).sum();
    let signed: i64 = block.iter().enumerate().map(|(i, &b)| i64::from(masked(i, b).cast_signed())).sum();
    if stated == unsigned || i64::try_from(stated) == Ok(signed) {
        Ok(())
    } else {
        Err(ArchiveError::Checksum)
    }
}

fn build(block: &[u8; BLOCK], pending: Pending) -> Result<Entry, ArchiveError> {
    let header = tar::Header::from_byte_slice(block);
    let old = header.as_old();
    let pax = pending.pax.unwrap_or_default();

    let mut path = until_nul(&old.name).to_vec();
    let mut device = (0, 0);
    let type_flag = old.linkflag[0];
    if let Some(ustar) = header.as_ustar() {
        // The `star` variant has times where the end of the prefix would be, and says so in its last four bytes.
        let prefix = if block.ends_with(b"tar\0") { ustar.prefix.get(..131) } else { ustar.prefix.get(..) };
        let prefix = until_nul(prefix.unwrap_or_default());
        if !prefix.is_empty() {
            path = [prefix, b"/", &path].concat();
        }
    }
    if matches!(type_flag, b'3' | b'4') {
        let numbers = match (header.as_ustar(), header.as_gnu()) {
            (Some(ustar), _) => Some((&ustar.dev_major, &ustar.dev_minor)),
            (_, Some(gnu)) => Some((&gnu.dev_major, &gnu.dev_minor)),
            _ => None,
        };
        if let Some((major, minor)) = numbers {
            device = (number(major, "device number")?, number(minor, "device number")?);
        }
    }
    let path = one_name(path, pax.path, pending.long_name)?;
    let link = one_name(until_nul(&old.linkname).to_vec(), pax.link, pending.long_link)?;
    let kind = match type_flag {
        // Before POSIX there was no type for directories.
        0 if path.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' => EntryKind::Regular,
        b'1' => EntryKind::HardLink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::CharDevice,
        b'4' => EntryKind::BlockDevice,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        other => return Err(ArchiveError::UnsupportedType(other)),
    };
    if kind == EntryKind::Regular && path.ends_with(b"/") {
        return Err(ArchiveError::FileWithSlash);
    }
    let size = match pax.size {
        Some(size) => size,
        None => number(&old.size, "size")?,
    };
    if kind != EntryKind::Regular && size != 0 {
        return Err(ArchiveError::UnexpectedSize);
    }
    Ok(Entry {
        path,
        link: if matches!(kind, EntryKind::HardLink | EntryKind::Symlink) { link } else { Vec::new() },
        kind,
        mode: u32::try_from(number(&old.mode, "mode")? & 0o7777).unwrap_or(0),
        uid: owner(pax.uid, &old.uid, "uid")?,
        gid: owner(pax.gid, &old.gid, "gid")?,
        size,
        mtime: match pax.mtime {
            Some(time) => time,
            None => Timestamp { seconds: signed_number(&old.mtime, "mtime")?, nanoseconds: 0 },
        },
        device,
        xattrs: pax.xattrs,
    })
}

/// The one name that the header and its extensions agree on. Readers differ in which extension wins, so they must not disagree.
fn one_name(header: Vec<u8>, pax: Option<Vec<u8>>, gnu: Option<Vec<u8>>) -> Result<Vec<u8>, ArchiveError> {
    match (pax, gnu) {
        (Some(pax), Some(gnu)) if pax != gnu => Err(ArchiveError::ConflictingNames),
        (Some(name), _) | (None, Some(name)) => Ok(name),
        (None, None) => Ok(header),
    }
}

/// `u32::MAX` means "leave as it is" to chown(2), so it is nobody's number.
fn owner(pax: Option<u64>, field: &[u8], name: &'static str) -> Result<u32, ArchiveError> {
    let id = match pax {
        Some(id) => id,
        None => number(field, name)?,
    };
    u32::try_from(id).ok().filter(|&id| id != u32::MAX).ok_or(ArchiveError::Field(name))
}

fn number(field: &[u8], name: &'static str) -> Result<u64, ArchiveError> {
    u64::try_from(signed_number(field, name)?).map_err(|_| ArchiveError::Field(name))
}

/// Octal text, with spaces and NULs around it, or GNU's base-256 (a set top bit, then a big-endian two's complement number).
fn signed_number(field: &[u8], name: &'static str) -> Result<i64, ArchiveError> {
    let bad = ArchiveError::Field(name);
    let Some((&first, rest)) = field.split_first() else { return Err(bad) };
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let head = if negative { first } else { first & 0x7f };
        let mut value = i128::from(if negative { i64::from(head.cast_signed()) } else { i64::from(head) });
        for &byte in rest {
            value = value.checked_mul(256).map(|v| v + i128::from(byte)).ok_or(ArchiveError::Field(name))?;
            if value > i128::from(i64::MAX) || value < i128::from(i64::MIN) {
                return Err(bad);
            }
        }
        return i64::try_from(value).map_err(|_| bad);
    }
    let blank = |b: &u8| matches!(b, b' ' | 0);
    let start = field.iter().position(|b| !blank(b)).unwrap_or(field.len());
    let digits: Vec<u8> = until_nul(field.get(start..).unwrap_or_default()).to_vec();
    let digits = digits.trim_ascii_end();
    if digits.is_empty() {
        return Ok(0);
    }
    digits
        .iter()
        .try_fold(0_i64, |value, &digit| match digit {
            b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
            _ => None,
        })
        .ok_or(bad)
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}

fn padding_of(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(path: &str, kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(1);
        header.set_uid(0);
        header.set_gid(0);
        header.set_cksum();
        header
    }

    fn block_of(header: &tar::Header, content: &[u8]) -> Vec<u8> {
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    fn entries(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, ArchiveError> {
        let mut archive = Archive::new(bytes);
        let mut found = Vec::new();
        while let Some(entry) = archive.next_entry()? {
            let mut content = Vec::new();
            let mut buffer = [0; 100];
            loop {
                let length = archive.read_content(&mut buffer)?;
                if length == 0 {
                    break;
                }
                content.extend_from_slice(&buffer[..length]);
            }
            found.push((String::from_utf8(entry.path).unwrap(), content));
        }
        Ok(found)
    }

    fn extension(kind: u8, content: &[u8]) -> Vec<u8> {
        block_of(&header("ext", tar::EntryType::new(kind), content.len() as u64), content)
    }

    #[test]
    fn what_the_tar_crate_writes_is_read() {
        let long = "d/".repeat(150) + "f";
        let mut builder = tar::Builder::new(Vec::new());
        for path in ["a", &long] {
            let mut header = tar::Header::new_gnu();
            header.set_size(700);
            header.set_mode(0o4755);
            builder.append_data(&mut header, path, &[7_u8; 700][..]).unwrap();
        }
        let bytes = builder.into_inner().unwrap();
        let found = entries(&bytes).unwrap();
        assert_eq!(found, [("a".into(), vec![7; 700]), (long, vec![7; 700])]);
    }

    #[test]
    fn the_pax_size_decides_where_the_next_header_is() {
        // A reader that trusts the header's size would find the entry "hidden" inside the content of "big".
        let hidden = block_of(&header("hidden", tar::EntryType::Regular, 0), b"");
        let mut bytes = extension(b'x', b"12 size=512\n");
        bytes.extend(block_of(&header("big", tar::EntryType::Regular, 0), b""));
        bytes.extend(&hidden);
        let found = entries(&bytes).unwrap();
        assert_eq!(found, [("big".into(), hidden)]);
    }

    #[test]
    fn archives_that_readers_could_see_differently_are_refused() {
        let file = block_of(&header("f", tar::EntryType::Regular, 0), b"");
        let pax = extension(b'x', b"10 path=p\n");
        let zero = vec![0; BLOCK];
        for (name, parts) in [
            ("two PAX headers", vec![&pax, &pax, &file]),
            ("PAX header at the end", vec![&file, &pax]),
            ("PAX header before the end mark", vec![&pax, &zero, &zero]),
            ("conflicting long names", vec![&pax, &extension(b'L', b"other\0"), &file]),
            ("two GNU names", vec![&extension(b'L', b"a\0"), &extension(b'L', b"a\0"), &file]),
            ("data after one zero block", vec![&file, &zero, &file]),
            ("data after the end", vec![&file, &zero, &zero, &file]),
            ("directory with a size", vec![&block_of(&header("d", tar::EntryType::Directory, 5), b"12345")]),
            ("hard link with a size", vec![&block_of(&header("l", tar::EntryType::Link, 512), &[0; 512])]),
            ("GNU sparse", vec![&block_of(&header("s", tar::EntryType::GNUSparse, 0), b"")]),
            ("PAX sparse", vec![&extension(b'x', b"22 GNU.sparse.major=1\n"), &file]),
            ("unknown type", vec![&block_of(&header("v", tar::EntryType::new(b'V'), 0), b"")]),
            ("file with a slash", vec![&block_of(&header("f/", tar::EntryType::Regular, 0), b"")]),
            ("header cut", vec![&file[..300].to_vec()]),
            ("content cut", vec![&block_of(&header("f", tar::EntryType::Regular, 2000), &[1; 500])]),
        ] {
            let bytes: Vec<u8> = parts.into_iter().flatten().copied().collect();
            assert!(entries(&bytes).is_err(), "{name}");
        }
    }

    #[test]
    fn extensions_above_their_limit_are_refused_unread() {
        let bytes = header("x", tar::EntryType::XHeader, MAX_EXTENSION + 1).as_bytes().to_vec();
        assert!(matches!(entries(&bytes), Err(ArchiveError::ExtensionTooLong)));
        let bytes = header("x", tar::EntryType::GNULongName, 1 << 33).as_bytes().to_vec();
        assert!(matches!(entries(&bytes), Err(ArchiveError::ExtensionTooLong)));
    }

    #[test]
    fn global_headers_are_read_over() {
        let mut bytes = extension(b'g', b"15 path=global\n");
        bytes.extend(block_of(&header("f", tar::EntryType::Regular, 0), b""));
        assert_eq!(entries(&bytes).unwrap(), [("f".into(), vec![])]);
    }

    #[test]
    fn numbers_are_read_as_gnu_tar_writes_them() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"644\09\0", Some(0o644)),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"+644\0", None),
            (b"-1\0", None),
            (b"8\0", None),
            (b"77777777777777777777777", None),
            (b"6 4\0", None),
        ] {
            assert_eq!(signed_number(field, "x").ok(), value, "{:?}", field.escape_ascii().to_string());
        }
    }

    #[test]
    fn a_flipped_bit_in_a_header_is_noticed() {
        let mut bytes = block_of(&header("f", tar::EntryType::Regular, 0), b"");
        bytes[0] ^= 1;
        assert!(matches!(entries(&bytes), Err(ArchiveError::Checksum)));
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_result(mut bytes in proptest::collection::vec(any::<u8>(), 0..2000), fix in any::<bool>()) {
            if fix && bytes.len() >= BLOCK {
                let mut header = tar::Header::new_old();
                header.as_mut_bytes().copy_from_slice(&bytes[..BLOCK]);
                header.set_cksum();
                bytes[..BLOCK].copy_from_slice(header.as_bytes());
            }
            let _ = entries(&bytes);
        }
    }
}
