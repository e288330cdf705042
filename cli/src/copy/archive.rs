//! Reads a stream in the tar format: POSIX ustar, with PAX records and GNU long names. The stream
//! is not trusted: every length has a limit.
//!
//! The `tar` crate has the layout of a header. Its iterator is not used: it reads names of any
//! length into memory.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

/// Size of a block, in bytes: a header is one block, content is padded to whole blocks.
const BLOCK: usize = 512;

/// The limit on a name in a GNU entry, or on all PAX records of one file. A path has at most 4096
/// bytes.
const MAX_EXTENSION_BYTES: u64 = 1024 * 1024;

/// Bytes of content copied at a time.
const COPY_BYTES: usize = 64 * 1024;

/// The type of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file; its content follows.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this text.
    Symlink(Vec<u8>),
    /// A hard link to the entry with this path.
    HardLink(Vec<u8>),
    /// A device or FIFO.
    Special,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The path as written.
    pub(crate) path: Vec<u8>,
    /// Its type.
    pub(crate) kind: Kind,
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub(crate) mode: u32,
    /// Last change of its content, in seconds since 1970.
    pub(crate) modified: i64,
}

/// An archive that is being read.
#[derive(Debug)]
pub(crate) struct Archive<R> {
    from: R,
    /// Bytes left of the content of the current entry, and of its padding.
    content: u64,
    padding: u64,
}

/// The extension headers of an entry.
#[derive(Debug, Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("invalid or unsupported tar archive: {what}"))
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(from: R) -> Self {
        Self { from, content: 0, padding: 0 }
    }

    /// The next entry; `None` at the end of the archive. Unread content of the previous entry is
    /// skipped.
    ///
    /// # Errors
    /// When the stream cannot be read, or is not an archive.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut extension = Extension::default();
        loop {
            self.copy_content(&mut io::sink())?;
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.entry_size().map_err(|_| malformed("malformed size"))?;
            match header.entry_type() {
                EntryType::XHeader => extension.take_records(&self.extension(size)?)?,
                // Applies to all following entries: none of it is used.
                EntryType::XGlobalHeader => drop(self.extension(size)?),
                EntryType::GNULongName => extension.path = Some(until_nul(self.extension(size)?)),
                EntryType::GNULongLink => extension.link = Some(until_nul(self.extension(size)?)),
                _ => return self.entry(&header, extension, size).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &Header, extension: Extension, size: u64) -> io::Result<Entry> {
        let path = extension.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = || {
            let link = extension.link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
            link.ok_or_else(|| malformed("link without a target"))
        };
        let kind = match header.entry_type() {
            // Before ustar a directory was a file whose name ends with a slash.
            EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink(link()?),
            EntryType::Link => Kind::HardLink(link()?),
            EntryType::Char | EntryType::Block | EntryType::Fifo => Kind::Special,
            _ => return Err(malformed("unsupported entry type, such as a sparse file")),
        };
        // Only files have content, whatever the size field of others says: tar(1) writes none for
        // them.
        let size = if kind == Kind::File { extension.size.unwrap_or(size) } else { 0 };
        (self.content, self.padding) = (size, padding(size));
        let mode = header.mode().map_err(|_| malformed("malformed mode"))? & 0o7777;
        let modified = header.mtime().ok().and_then(|time| i64::try_from(time).ok()).unwrap_or(0);
        Ok(Entry { path, kind, mode, modified })
    }

    /// Copies the content of the current entry, once.
    ///
    /// # Errors
    /// When the stream ends early, or `to` cannot be written.
    pub(crate) fn copy_content(&mut self, to: &mut impl Write) -> io::Result<()> {
        if self.content == 0 && self.padding == 0 {
            return Ok(());
        }
        let mut buffer = vec![0; COPY_BYTES];
        while self.content > 0 {
            let most = usize::try_from(self.content).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            let piece = buffer.get_mut(..most).unwrap_or_default();
            self.from.read_exact(piece)?;
            to.write_all(piece)?;
            self.content -= most as u64;
        }
        let rest = usize::try_from(self.padding).unwrap_or(0);
        self.from.read_exact(buffer.get_mut(..rest).unwrap_or_default())?;
        self.padding = 0;
        Ok(())
    }

    /// Reads the rest of the stream, so that its writer can end.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        io::copy(&mut self.from, &mut io::sink()).map(drop)
    }

    /// The next header; `None` at the end: two blocks of zeros, or the end of the stream.
    fn header(&mut self) -> io::Result<Option<Header>> {
        for _ in 0..2 {
            let mut block = [0; BLOCK];
            let mut filled = 0;
            while filled < BLOCK {
                match self.from.read(block.get_mut(filled..).unwrap_or_default()) {
                    Ok(0) if filled == 0 => return Ok(None),
                    Ok(0) => return Err(malformed("truncated header")),
                    Ok(length) => filled += length,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if block.iter().any(|byte| *byte != 0) {
                let header = Header::from_byte_slice(&block).clone();
                let sum = header.cksum().map_err(|_| malformed("malformed checksum"))?;
                return if sum == checksum(&block) {
                    Ok(Some(header))
                } else {
                    Err(malformed("header checksum mismatch"))
                };
            }
        }
        Ok(None)
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION_BYTES {
            return Err(malformed("a name is too long"));
        }
        (self.content, self.padding) = (size, padding(size));
        let mut bytes = Vec::new();
        self.copy_content(&mut bytes)?;
        Ok(bytes)
    }
}

fn padding(size: u64) -> u64 {
    let block = BLOCK as u64;
    (block - size % block) % block
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    bytes
}

/// The sum of all bytes, with the checksum field (148 to 155) as spaces.
fn checksum(block: &[u8; BLOCK]) -> u32 {
    let sum = |(at, byte): (usize, &u8)| u32::from(if (148..156).contains(&at) { b' ' } else { *byte });
    block.iter().enumerate().map(sum).sum()
}

impl Extension {
    /// Reads records of the form `LENGTH KEY=VALUE\n`, where the length includes itself. A value
    /// may have any bytes.
    fn take_records(&mut self, mut records: &[u8]) -> io::Result<()> {
        let wrong = || malformed("malformed PAX record");
        while !records.is_empty() {
            let digits =
                records.iter().position(|byte| *byte == b' ').filter(|at| *at < 20).ok_or_else(wrong)?;
            let length =
                std::str::from_utf8(records.get(..digits).unwrap_or_default()).map_err(|_| wrong())?;
            let length: usize = length.parse().map_err(|_| wrong())?;
            let record = records.get(digits + 1..length).and_then(|record| record.strip_suffix(b"\n"));
            let record = record.ok_or_else(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            let (key, value) = (record.get(..equals), record.get(equals + 1..).unwrap_or_default());
            match key {
                Some(b"path") => self.path = Some(value.to_vec()),
                Some(b"linkpath") => self.link = Some(value.to_vec()),
                Some(b"size") => {
                    let size = std::str::from_utf8(value).ok().and_then(|size| size.parse().ok());
                    self.size = Some(size.ok_or_else(wrong)?);
                }
                Some(key) if key.starts_with(b"GNU.sparse") => {
                    return Err(malformed("sparse files are not supported"));
                }
                _ => {}
            }
            records = records.get(length..).unwrap_or_default();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(bytes: &[u8]) -> io::Result<Vec<(Entry, Vec<u8>)>> {
        let mut archive = Archive::new(bytes);
        let mut entries = Vec::new();
        while let Some(entry) = archive.next()? {
            let mut content = Vec::new();
            archive.copy_content(&mut content)?;
            entries.push((entry, content));
        }
        Ok(entries)
    }

    fn header(kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o640);
        header.set_mtime(7);
        header.set_cksum();
        header
    }

    #[test]
    fn what_the_tar_crate_writes_is_read() {
        let mut builder = tar::Builder::new(Vec::new());
        let long = format!("d/{}", "n".repeat(300));
        for (path, content) in [("a", "x".repeat(513)), (long.as_str(), String::new())] {
            let mut header = header(EntryType::Regular, content.len() as u64);
            builder.append_data(&mut header, path, content.as_bytes()).unwrap();
        }
        let mut link = header(EntryType::Symlink, 0);
        builder.append_link(&mut link, "l", "m".repeat(200)).unwrap();
        let found = entries(&builder.into_inner().unwrap()).unwrap();
        let file = |path: &str| Entry { path: path.into(), kind: Kind::File, mode: 0o640, modified: 7 };
        assert_eq!(found[0], (file("a"), vec![b'x'; 513]));
        assert_eq!(found[1], (file(&long), vec![]));
        assert_eq!(found[2].0.kind, Kind::Symlink(vec![b'm'; 200]));
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn pax_records_say_paths_and_sizes_of_any_bytes() {
        let records = b"20 path=a\nb=c\xff/here\n13 size=3\x0a".to_vec();
        let mut extension = Extension::default();
        assert!(extension.take_records(&records).is_err(), "the lengths are wrong");
        let records = b"18 path=a\nb=c\xff/de\n9 size=3\n11 other=x\n";
        let mut extension = Extension::default();
        extension.take_records(records).unwrap();
        assert_eq!((extension.path.as_deref(), extension.size), (Some(&b"a\nb=c\xff/de"[..]), Some(3)));
        for wrong in [
            &b"x"[..],
            b"5 a=b",
            b"99 a=b\n",
            b"6 a\n",
            b"0 \n",
            b"11 size=abc\n",
            b"22 GNU.sparse.major=1\n",
        ] {
            assert!(Extension::default().take_records(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn only_files_have_content() {
        for (kind, name) in
            [(EntryType::Directory, "d/"), (EntryType::Symlink, "l"), (EntryType::Regular, "old/")]
        {
            let mut sized = header(kind, 600);
            sized.set_path(name).unwrap();
            sized.set_link_name("target").unwrap();
            sized.set_cksum();
            let file = header(EntryType::Regular, 0);
            let bytes = [&sized.as_bytes()[..], file.as_bytes()].concat();
            let found = entries(&bytes).unwrap();
            assert_eq!(found.len(), 2, "{found:?}");
            assert_eq!(found[1].0.kind, Kind::File);
        }
    }

    #[test]
    fn content_is_padded_to_blocks_whatever_its_length() {
        for (size, rest) in [(0, 0), (1, 511), (511, 1), (512, 0), (513, 511), (u64::MAX, 1)] {
            assert_eq!(padding(size), rest, "{size}");
        }
    }

    #[test]
    fn what_is_no_archive_is_refused_and_takes_no_memory() {
        let huge = header(EntryType::GNULongName, u64::MAX / 2);
        let mut damaged = header(EntryType::Regular, 0);
        damaged.as_mut_bytes()[0] ^= 1;
        let unknown = header(EntryType::GNUSparse, 0);
        let short = header(EntryType::Regular, 600);
        for bytes in [
            &huge.as_bytes()[..],
            damaged.as_bytes(),
            unknown.as_bytes(),
            short.as_bytes(),
            &[1; 100][..],
            &[1; 512],
        ] {
            assert!(entries(bytes).is_err());
        }
        for bytes in [&[][..], &[0; 512], &[0; 10_240]] {
            assert_eq!(entries(bytes).unwrap(), vec![]);
        }
    }
}
