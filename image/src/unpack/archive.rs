//! Tar archives: headers in, entries out, strictly.
//!
//! Layout of header blocks comes from the `tar` crate; the walk, PAX, GNU long names and the
//! precedence of sizes are here, because a reader that interprets those differently sees other
//! entries (security class "parser differential"). Where two readers in the field could disagree
//! about an archive, this one refuses it: doubled extension headers, different names in both
//! extensions, data after the end. What is accepted means what Go's `archive/tar` makes of it:
//! links, directories and nodes have no content, whatever size they state.
//!
//! Global PAX headers are read over and ignored. Extension headers are bounded by 1 MiB each.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};

use berth_sys::beneath::Timestamp;

use super::pax::{self, Overrides, PaxError};
use super::sparse::{self, MapText, Segment, Source, SparseError};

/// Tar's unit.
const BLOCK: usize = 512;

/// Longest extension header (PAX or GNU long name). Attributes of one inode take 64 KiB, names 4
/// KiB each.
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
    /// Length of a regular file, holes included; 0 for all others.
    pub(crate) size: u64,
    /// The archive does not have the whole content in one piece.
    pub(crate) is_sparse: bool,
    pub(crate) mtime: Timestamp,
    /// Major and minor number of a device.
    pub(crate) device: (u64, u64),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What comes next in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes, at the start of the buffer.
    Data(usize),
    /// So many zeros that the archive does not have.
    Hole(u64),
    /// Nothing.
    End,
}

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The stream below failed.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    /// The stream ended inside a header or inside content.
    #[error("archive is truncated")]
    Truncated,
    /// A header's checksum does not hold.
    #[error("header checksum does not match")]
    Checksum,
    /// A number in a header is none, or is out of range.
    #[error("invalid {0} in a header")]
    Field(&'static str),
    /// A type that image layers do not have.
    #[error("entry type '{}' is not supported", char::from(*.0).escape_default())]
    UnsupportedType(u8),
    /// Extension header above 1 MiB.
    #[error("extension header is too long")]
    ExtensionTooLong,
    /// Two extension headers of one kind before an entry, or one before the end.
    #[error("extension header without an entry, or two for the same entry")]
    StrayExtension,
    /// A PAX and a GNU extension that give one entry different names.
    #[error("two extension headers disagree about a name")]
    ConflictingNames,
    /// A regular file whose name ends as a directory's.
    #[error("name of a file ends with a slash")]
    FileWithSlash,
    /// PAX records.
    #[error(transparent)]
    Pax(#[from] PaxError),
    /// A sparse file.
    #[error(transparent)]
    Sparse(#[from] SparseError),
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
    /// Bytes of the current entry that the archive has and that were not read yet.
    remaining: u64,
    /// The parts of the current file that were not read yet.
    parts: VecDeque<Segment>,
    /// Where in the file the next piece goes, and where the file ends.
    at: u64,
    end: u64,
    /// Zeros between that content and the next header.
    padding: u64,
    /// Bytes taken from the input.
    position: u64,
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, remaining: 0, parts: VecDeque::new(), at: 0, end: 0, padding: 0, position: 0 }
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
                    let (entry, stored, map) = build(&block, pending)?;
                    self.remaining = stored;
                    self.padding = padding_of(stored);
                    self.prepare(&entry, map)?;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Gets the map of the file that follows.
    fn prepare(&mut self, entry: &Entry, source: Option<Source>) -> Result<(), ArchiveError> {
        (self.at, self.end) = (0, entry.size);
        self.parts.clear();
        match source {
            None => {
                if entry.kind == EntryKind::Regular {
                    self.parts.push_back(Segment { offset: 0, length: entry.size });
                }
                return Ok(());
            }
            Some(Source::Known(map)) => self.parts = map,
            Some(Source::Blocks(map)) => self.parts = self.map_from_blocks(map)?,
            Some(Source::Content) => {
                let mut text = MapText::default();
                loop {
                    self.remaining = self.remaining.checked_sub(BLOCK as u64).ok_or(SparseError::Map)?;
                    if text.take(&self.whole_block()?)? {
                        break;
                    }
                }
                self.parts = text.into_map();
            }
        }
        Ok(sparse::check(&self.parts, self.end, self.remaining)?)
    }

    /// The extension blocks of an old GNU header, each of which says whether another follows.
    fn map_from_blocks(&mut self, mut map: VecDeque<Segment>) -> Result<VecDeque<Segment>, ArchiveError> {
        const PER_BLOCK: usize = 21;
        const PART: usize = 24;
        loop {
            let block = self.whole_block()?;
            add_parts(&mut map, block.get(..PER_BLOCK * PART).unwrap_or_default())?;
            if block.get(PER_BLOCK * PART) == Some(&0) {
                return Ok(map);
            }
        }
    }

    fn whole_block(&mut self) -> Result<[u8; BLOCK], ArchiveError> {
        let mut block = [0_u8; BLOCK];
        if self.fill(&mut block)? == BLOCK { Ok(block) } else { Err(ArchiveError::Truncated) }
    }

    /// Reads content of the current file; [`Piece::End`] at its end.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<Piece, ArchiveError> {
        while self.parts.front().is_some_and(|part| part.length == 0) {
            self.parts.pop_front();
        }
        let next = self.parts.front().map_or(self.end, |part| part.offset);
        if next > self.at {
            let hole = next - self.at;
            self.at = next;
            return Ok(Piece::Hole(hole));
        }
        let Some(part) = self.parts.front_mut() else { return Ok(Piece::End) };
        let wanted = usize::try_from(part.length).unwrap_or(usize::MAX).min(buffer.len());
        let target = buffer.get_mut(..wanted).unwrap_or_default();
        let length = read_some(&mut self.input, target)?;
        if length == 0 {
            return Err(ArchiveError::Truncated);
        }
        part.offset += length as u64;
        part.length -= length as u64;
        self.at += length as u64;
        self.remaining -= length as u64;
        self.position += length as u64;
        Ok(Piece::Data(length))
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

    /// The next block that is not zeros, or `None` at the end. An archive without its closing zero
    /// blocks is taken, as by others.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, ArchiveError> {
        let mut block = [0_u8; BLOCK];
        match self.fill(&mut block)? {
            0 => return Ok(None),
            BLOCK if block.iter().any(|&b| b != 0) => return Ok(Some(block)),
            BLOCK => {}
            _ => return Err(ArchiveError::Truncated),
        }
        // The end is two zero blocks, then zeros up to the writer's record size. Go, bsdtar and GNU
        // tar ignore what follows, `tar -i` does not: so nothing may follow.
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

/// Sum of all bytes with the checksum field as spaces; old writers summed signed bytes
/// (POSIX.1-1988 was read both ways).
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

/// Adds parts as old GNU headers have them: offset and length, twelve bytes each, until one that is
/// empty.
fn add_parts(map: &mut VecDeque<Segment>, bytes: &[u8]) -> Result<(), ArchiveError> {
    for part in bytes.chunks_exact(24) {
        let Some((offset, length)) =
            part.split_at_checked(12).filter(|(offset, _)| !offset.starts_with(b"\0"))
        else {
            break;
        };
        let segment = Segment { offset: number(offset, "offset")?, length: number(length, "length")? };
        sparse::push(map, segment)?;
    }
    Ok(())
}

/// An entry, the bytes that the archive has for it, and where the map is if it is sparse.
type Built = (Entry, u64, Option<Source>);

fn build(block: &[u8; BLOCK], pending: Pending) -> Result<Built, ArchiveError> {
    let header = tar::Header::from_byte_slice(block);
    let old = header.as_old();
    let mut pax = pending.pax.unwrap_or_default();

    let mut path = until_nul(&old.name).to_vec();
    let mut device = (0, 0);
    let type_flag = old.linkflag[0];
    if let Some(ustar) = header.as_ustar() {
        // The `star` variant has times where the end of the prefix would be, and says so in its
        // last four bytes.
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
    let sparse_name = pax.sparse.as_mut().and_then(|records| records.name.take());
    let path = one_name(path, sparse_name.or(pax.path), pending.long_name)?;
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
        b'S' => EntryKind::Regular,
        other => return Err(ArchiveError::UnsupportedType(other)),
    };
    if kind == EntryKind::Regular && path.ends_with(b"/") {
        return Err(ArchiveError::FileWithSlash);
    }
    let stated = match pax.size {
        Some(size) => size,
        None => number(&old.size, "size")?,
    };
    // A directory of the time before it had a type is skipped as the file that it looks like.
    let stored = if kind == EntryKind::Regular || type_flag == 0 { stated } else { 0 };
    let (size, map) = match (type_flag, pax.sparse) {
        (b'S', None) => old_gnu_map(header).map(|(size, map)| (size, Some(map)))?,
        (0 | b'0', Some(records)) if kind == EntryKind::Regular => {
            sparse::of_records(records).map(|(size, map)| (size, Some(map)))?
        }
        (_, Some(_)) => return Err(SparseError::Misplaced.into()),
        (_, None) if kind == EntryKind::Regular => (stored, None),
        (_, None) => (0, None),
    };
    let entry = Entry {
        path,
        link: if matches!(kind, EntryKind::HardLink | EntryKind::Symlink) { link } else { Vec::new() },
        kind,
        is_sparse: map.is_some(),
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
    };
    Ok((entry, stored, map))
}

/// Size and map of a sparse file with an old GNU header.
fn old_gnu_map(header: &tar::Header) -> Result<(u64, Source), ArchiveError> {
    let gnu = header.as_gnu().ok_or(SparseError::Form)?;
    let mut map = VecDeque::new();
    for part in &gnu.sparse {
        add_parts(&mut map, &[part.offset, part.numbytes].concat())?;
    }
    let size = number(&gnu.realsize, "size")?;
    Ok((size, if gnu.isextended[0] == 0 { Source::Known(map) } else { Source::Blocks(map) }))
}

/// The one name that the header and its extensions agree on. Readers differ in which extension
/// wins, so they must not disagree.
fn one_name(header: Vec<u8>, pax: Option<Vec<u8>>, gnu: Option<Vec<u8>>) -> Result<Vec<u8>, ArchiveError> {
    match (pax, gnu) {
        (Some(pax), Some(gnu)) if pax != gnu => Err(ArchiveError::ConflictingNames),
        (Some(name), _) | (None, Some(name)) => Ok(name),
        (None, None) => Ok(header),
    }
}

/// `u32::MAX` means "leave as it is" to chown(2), so it is not a valid id.
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

/// Octal text, with spaces and NULs around it, or GNU's base-256 (a set top bit, then a big-endian
/// two's complement number).
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
                match archive.read_content(&mut buffer)? {
                    Piece::Data(length) => content.extend_from_slice(&buffer[..length]),
                    // Random maps may have holes of any length.
                    Piece::Hole(length) => {
                        content.resize(content.len() + usize::try_from(length.min(1 << 20)).unwrap(), 0)
                    }
                    Piece::End => break,
                }
            }
            assert!(archive.read_content(&mut buffer)? == Piece::End);
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
        // A reader that trusts the header's size would find the entry "hidden" inside the content
        // of "big".
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
            ("directory with content", vec![&block_of(&header("d", tar::EntryType::Directory, 5), b"12345")]),
            ("hard link with content", vec![&block_of(&header("l", tar::EntryType::Link, 512), &[7; 512])]),
            ("sparse without GNU's header", vec![&block_of(&header("s", tar::EntryType::GNUSparse, 0), b"")]),
            ("sparse of no form", vec![&extension(b'x', b"22 GNU.sparse.major=1\n"), &file]),
            (
                "sparse directory",
                vec![
                    &extension(b'x', b"21 GNU.sparse.size=5\n25 GNU.sparse.map=0,0,5,0\n"),
                    &block_of(&header("d", tar::EntryType::Directory, 0), b""),
                ],
            ),
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
    fn entries_without_content_have_none_whatever_size_they_state() {
        let mut bytes = Vec::new();
        for kind in [
            tar::EntryType::Directory,
            tar::EntryType::Link,
            tar::EntryType::Symlink,
            tar::EntryType::Fifo,
            tar::EntryType::Char,
        ] {
            bytes.extend(block_of(&header("e", kind, 4096), b""));
        }
        bytes.extend(extension(b'x', b"13 size=4096\n"));
        bytes.extend(block_of(&header("l", tar::EntryType::Link, 0), b""));
        bytes.extend(block_of(&header("f", tar::EntryType::Regular, 1), b"x"));
        let found = entries(&bytes).unwrap();
        assert_eq!(found.len(), 7);
        assert!(found[..6].iter().all(|(_, content)| content.is_empty()));
        assert_eq!(found[6], ("f".into(), b"x".to_vec()));
        // A directory of the old kind is skipped with what it states.
        let mut old = header("d/", tar::EntryType::Regular, 5);
        old.as_old_mut().linkflag = [0];
        old.set_cksum();
        let mut bytes = block_of(&old, b"12345");
        bytes.extend(block_of(&header("f", tar::EntryType::Regular, 1), b"x"));
        assert_eq!(entries(&bytes).unwrap(), [("d/".into(), vec![]), ("f".into(), b"x".to_vec())]);
    }

    #[test]
    fn sparse_files_of_all_forms_are_read() {
        let pax = |records: &[(&str, &str)]| -> Vec<u8> {
            let text: String = records
                .iter()
                .map(|(key, value)| {
                    // All records here are shorter than 100 bytes.
                    let length = key.len() + value.len() + 3 + "GNU.sparse.".len() + 2;
                    format!("{length} GNU.sparse.{key}={value}\n")
                })
                .collect();
            extension(b'x', text.as_bytes())
        };
        let regular =
            |content: &[u8]| block_of(&header("raw", tar::EntryType::Regular, content.len() as u64), content);
        let mut expected = vec![0_u8; 3000];
        expected[1000..1005].copy_from_slice(b"hello");
        expected[2000..2002].copy_from_slice(b"hi");
        let data = b"hellohi";
        let after = block_of(&header("after", tar::EntryType::Regular, 1), b"x");

        let zero = [
            pax(&[
                ("size", "3000"),
                ("numblocks", "2"),
                ("offset", "1000"),
                ("numbytes", "5"),
                ("offset", "2000"),
                ("numbytes", "2"),
            ]),
            regular(data),
        ];
        let one = [
            pax(&[("size", "3000"), ("numblocks", "2"), ("name", "s"), ("map", "1000,5,2000,2")]),
            regular(data),
        ];
        let mut text = b"3\n1000\n5\n2000\n2\n3000\n0\n".to_vec();
        text.resize(512, 0);
        text.extend(data);
        let two =
            [pax(&[("major", "1"), ("minor", "0"), ("name", "s"), ("realsize", "3000")]), regular(&text)];
        // Four parts in the header, one in an extension block.
        let mut old = tar::Header::new_gnu();
        old.as_old_mut().name[..1].copy_from_slice(b"s");
        old.set_entry_type(tar::EntryType::GNUSparse);
        old.set_size(7);
        for field in ["mode", "uid", "gid", "mtime"] {
            match field {
                "mode" => old.set_mode(0o644),
                "uid" => old.set_uid(0),
                "gid" => old.set_gid(0),
                _ => old.set_mtime(1),
            }
        }
        let gnu = old.as_gnu_mut().unwrap();
        let octal =
            |field: &mut [u8; 12], value: u64| field.copy_from_slice(format!("{value:011o}\0").as_bytes());
        for (part, (offset, length)) in gnu.sparse.iter_mut().zip([(0, 0), (1000, 5), (1500, 0), (1600, 0)]) {
            octal(&mut part.offset, offset);
            octal(&mut part.numbytes, length);
        }
        gnu.isextended = [1];
        octal(&mut gnu.realsize, 3000);
        old.set_cksum();
        let mut block = format!("{:011o}\0{:011o}\0", 2000, 2).into_bytes();
        block.resize(512, 0);
        let old = [old.as_bytes().to_vec(), block_of(&tar::Header::new_old(), b"")[..0].to_vec(), block];
        let mut old = old.concat();
        old.extend(data);
        old.resize(old.len().next_multiple_of(512), 0);

        for (name, bytes, path) in [
            ("0.0", zero.concat(), "raw"),
            ("0.1", one.concat(), "s"),
            ("1.0", two.concat(), "s"),
            ("GNU", old, "s"),
        ] {
            let found =
                entries(&[bytes, after.clone()].concat()).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert_eq!(found[0].0, path, "{name}");
            assert!(found[0].1 == expected, "{name}");
            assert_eq!(found[1], ("after".into(), b"x".to_vec()), "{name}");
        }
        // A map that is not for the data that is there.
        for map in ["1000,5,2000,3", "1000,5", "2000,2,1000,5", "1000,5,2999,2"] {
            let bytes = [pax(&[("size", "3000"), ("name", "s"), ("map", map)]), regular(data)].concat();
            assert!(matches!(entries(&bytes), Err(ArchiveError::Sparse(_))), "{map}");
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
