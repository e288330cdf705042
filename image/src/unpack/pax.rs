//! PAX extended header records: strict parsing, bytes in, overrides out.
//!
//! A block is a sequence of `<length> <key>=<value>\n`, where the decimal length counts the whole
//! record (POSIX.1-2017, pax, "pax Extended Header"). Archive readers that skip a malformed record,
//! or split at newlines, see other entries than this reader does (CVE-2025-62518, CVE-2026-33055);
//! so any malformed record is an error. Records that mean nothing here are not kept, and take time
//! in proportion to their length.

use std::collections::{BTreeMap, VecDeque};

use berth_sys::beneath::Timestamp;

use super::decimal::decimal;
use super::is_wanted_xattr;
use super::sparse::{self, Segment, SparseError, SparseRecords};

/// Names and values of the extended attributes of one inode together: the kernel's `XATTR_LIST_MAX`
/// and `XATTR_SIZE_MAX`.
const MAX_XATTR_BYTES: usize = 65536;

const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

const SPARSE_PREFIX: &[u8] = b"GNU.sparse.";

/// What the records of one block say about the entry that follows. `None` leaves what the entry's
/// own header says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Overrides {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) uid: Option<u64>,
    pub(crate) gid: Option<u64>,
    pub(crate) mtime: Option<Timestamp>,
    /// Those that are set on files: name without the `SCHILY.xattr.` prefix, and value; the last
    /// value of a name counts.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    xattr_bytes: usize,
    pub(crate) sparse: Option<SparseRecords>,
}

/// What is wrong with a block of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PaxError {
    /// The length is missing, not decimal, or points outside the block.
    #[error("a PAX record has an invalid length")]
    Length,
    /// No `=`, an empty key, a NUL in the key or in a name, or no newline at the end.
    #[error("a PAX record is malformed")]
    Record,
    /// A number or a time is not one.
    #[error("a PAX record has an invalid value")]
    Value,
    /// Records of a sparse file.
    #[error(transparent)]
    Sparse(#[from] SparseError),
    /// More than 64 KiB for one inode.
    #[error("extended attributes take more than 64 KiB")]
    TooManyXattrs,
}

/// Parses a whole block.
pub(crate) fn parse(mut block: &[u8]) -> Result<Overrides, PaxError> {
    let mut found = Overrides::default();
    while !block.is_empty() {
        let (key, value, rest) = record(block)?;
        block = rest;
        apply(&mut found, key, value)?;
    }
    Ok(found)
}

/// Key, value, and what follows the record.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

fn record(block: &[u8]) -> Result<Record<'_>, PaxError> {
    let space = block.iter().take(20).position(|&b| b == b' ').ok_or(PaxError::Length)?;
    let (digits, _) = block.split_at_checked(space).ok_or(PaxError::Length)?;
    let length = decimal(digits).and_then(|n| usize::try_from(n).ok()).ok_or(PaxError::Length)?;
    if length <= space + 1 {
        return Err(PaxError::Length);
    }
    let (record, rest) = block.split_at_checked(length).ok_or(PaxError::Length)?;
    let body = record.get(space + 1..).ok_or(PaxError::Length)?;
    let body = body.strip_suffix(b"\n").ok_or(PaxError::Record)?;
    let equals = body.iter().position(|&b| b == b'=').ok_or(PaxError::Record)?;
    let (key, value) = body.split_at_checked(equals).ok_or(PaxError::Record)?;
    let value = value.get(1..).ok_or(PaxError::Record)?;
    if key.is_empty() || key.contains(&0) {
        return Err(PaxError::Record);
    }
    Ok((key, value, rest))
}

fn apply(found: &mut Overrides, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
    // An empty value takes an earlier record back (POSIX, same section), except for attributes,
    // which may be empty.
    match key {
        b"path" => found.path = text(value)?,
        b"linkpath" => found.link = text(value)?,
        b"size" => found.size = number(value)?,
        b"uid" => found.uid = number(value)?,
        b"gid" => found.gid = number(value)?,
        b"mtime" => found.mtime = if value.is_empty() { None } else { Some(time(value)?) },
        _ => {
            if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                apply_xattr(found, name, value)?;
            } else if let Some(word) = key.strip_prefix(SPARSE_PREFIX) {
                apply_sparse(found.sparse.get_or_insert_default(), word, value)?;
            }
        }
    }
    Ok(())
}

fn apply_xattr(found: &mut Overrides, name: &[u8], value: &[u8]) -> Result<(), PaxError> {
    if name.is_empty() {
        return Err(PaxError::Record);
    }
    if !is_wanted_xattr(name) {
        return Ok(());
    }
    let earlier = found.xattrs.insert(name.to_vec(), value.to_vec());
    found.xattr_bytes += value.len();
    found.xattr_bytes -= earlier.as_ref().map_or(0, Vec::len);
    if earlier.is_none() {
        found.xattr_bytes += name.len();
    }
    if found.xattr_bytes > MAX_XATTR_BYTES { Err(PaxError::TooManyXattrs) } else { Ok(()) }
}

fn apply_sparse(found: &mut SparseRecords, word: &[u8], value: &[u8]) -> Result<(), PaxError> {
    let number = |value| decimal(value).ok_or(PaxError::Value);
    match word {
        b"major" => found.major = Some(number(value)?),
        b"minor" => found.minor = Some(number(value)?),
        b"name" => found.name = Some(text(value)?.ok_or(PaxError::Value)?),
        b"size" => found.size = Some(number(value)?),
        b"realsize" => found.real_size = Some(number(value)?),
        b"numblocks" => found.count = Some(number(value)?),
        b"map" if found.map.is_empty() => found.map = sparse_list(value)?,
        b"offset" if found.lone_offset.is_none() => found.lone_offset = Some(number(value)?),
        b"numbytes" => {
            let offset = found.lone_offset.take().ok_or(SparseError::Map)?;
            sparse::push(&mut found.map, Segment { offset, length: number(value)? })?;
        }
        _ => return Err(SparseError::Form.into()),
    }
    Ok(())
}

/// The map of a sparse file in form 0.1: `offset,length,offset,length...`.
fn sparse_list(text: &[u8]) -> Result<VecDeque<Segment>, PaxError> {
    let mut map = VecDeque::new();
    if text.is_empty() {
        return Ok(map);
    }
    let mut numbers = text.split(|&b| b == b',').map(decimal);
    while let Some(offset) = numbers.next() {
        let (Some(offset), Some(Some(length))) = (offset, numbers.next()) else {
            return Err(PaxError::Value);
        };
        sparse::push(&mut map, Segment { offset, length })?;
    }
    Ok(map)
}

fn text(value: &[u8]) -> Result<Option<Vec<u8>>, PaxError> {
    if value.contains(&0) {
        return Err(PaxError::Record);
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn number(value: &[u8]) -> Result<Option<u64>, PaxError> {
    if value.is_empty() { Ok(None) } else { decimal(value).map(Some).ok_or(PaxError::Value) }
}

/// `[-]<seconds>[.<fraction>]`; digits after the ninth are cut.
fn time(value: &[u8]) -> Result<Timestamp, PaxError> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |&b| b == b'.');
    let seconds =
        parts.next().and_then(decimal).and_then(|n| i64::try_from(n).ok()).ok_or(PaxError::Value)?;
    let mut nanoseconds = 0_u32;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return Err(PaxError::Value);
        }
        let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
        nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    }
    Ok(match (negative, nanoseconds) {
        (false, _) => Timestamp { seconds, nanoseconds },
        (true, 0) => Timestamp { seconds: -seconds, nanoseconds: 0 },
        // Nanoseconds count forward from the second before.
        (true, _) => Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record_of(key: &[u8], value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        let mut record = format!("{length} ").into_bytes();
        record.extend_from_slice(key);
        record.push(b'=');
        record.extend_from_slice(value);
        record.push(b'\n');
        record
    }

    #[test]
    fn known_records_are_read() {
        let mut block = record_of(b"path", b"a\nb=c");
        block.extend(record_of(b"size", b"10000000000"));
        block.extend(record_of(b"mtime", b"-1.25"));
        block.extend(record_of(b"SCHILY.xattr.user.x", b"1=\n2\0"));
        block.extend(record_of(b"SCHILY.xattr.user.x", b""));
        block.extend(record_of(b"comment", b""));
        let found = parse(&block).unwrap();
        assert_eq!(found.path.as_deref(), Some(&b"a\nb=c"[..]));
        assert_eq!(found.size, Some(10_000_000_000));
        assert_eq!(found.mtime, Some(Timestamp { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(found.xattrs, BTreeMap::from([(b"user.x".to_vec(), Vec::new())]));
    }

    #[test]
    fn times_are_read_to_the_nanosecond() {
        for (text, seconds, nanoseconds) in
            [("0", 0, 0), ("1.5", 1, 500_000_000), ("1.0000000019", 1, 1), ("-1", -1, 0), ("7.", 7, 0)]
        {
            assert_eq!(time(text.as_bytes()), Ok(Timestamp { seconds, nanoseconds }), "{text}");
        }
        for text in ["", "-", "+1", "1.-5", "1e3", " 1", "99999999999999999999", ".5"] {
            assert_eq!(time(text.as_bytes()), Err(PaxError::Value), "{text:?}");
        }
    }

    #[test]
    fn malformed_records_are_errors_not_skipped() {
        for (block, why) in [
            (&b"x"[..], PaxError::Length),
            (b"5 a=b", PaxError::Record),
            (b"6 a=bc", PaxError::Record),
            (b"+6 a=b\n", PaxError::Length),
            (b"-6 a=b\n", PaxError::Length),
            (b"0 a=b\n", PaxError::Length),
            (b"2 a=b\n", PaxError::Length),
            (b"7 a=b\n", PaxError::Length),
            (b"18446744073709551616 a=b\n", PaxError::Length),
            (b"6 abc\n", PaxError::Record),
            (b"5 =b\n", PaxError::Record),
            (b"7 a\0=b\n", PaxError::Record),
            (b"10 path=\0\n", PaxError::Record),
            (b"11 size=-1\n", PaxError::Value),
            (b"11 uid=0x1\n", PaxError::Value),
            (b"22 GNU.sparse.major=x\n", PaxError::Value),
            (b"22 GNU.sparse.other=1\n", PaxError::Sparse(SparseError::Form)),
            (b"25 GNU.sparse.numbytes=1\n", PaxError::Sparse(SparseError::Map)),
            (b"6 a=b\n\0\0\0", PaxError::Length),
        ] {
            assert_eq!(parse(block), Err(why), "{:?}", block.escape_ascii().to_string());
        }
    }

    #[test]
    fn too_many_attributes_are_refused() {
        let block = record_of(b"SCHILY.xattr.user.big", &vec![b'x'; 65536]);
        assert_eq!(parse(&block), Err(PaxError::TooManyXattrs));
        // A later value takes the place of an earlier one, and what is not set on files does not
        // count.
        let half = vec![b'x'; 40_000];
        let block =
            [record_of(b"SCHILY.xattr.user.a", &half), record_of(b"SCHILY.xattr.user.a", &half)].concat();
        assert_eq!(parse(&block).unwrap().xattrs.len(), 1);
        let block = record_of(b"SCHILY.xattr.trusted.big", &vec![b'x'; 65536]);
        assert!(parse(&block).unwrap().xattrs.is_empty());
    }

    #[test]
    fn the_time_for_a_block_is_in_proportion_to_its_length() {
        let names = |prefix: &str, count: usize| -> Vec<u8> {
            (0..count)
                .flat_map(|n| record_of(format!("SCHILY.xattr.{prefix}{n:04x}").as_bytes(), b""))
                .collect()
        };
        // As many names as an extension header takes. By comparing each with all others this took
        // seconds.
        let started = std::time::Instant::now();
        for _ in 0..20 {
            assert_eq!(parse(&names("user.", 21_000)), Err(PaxError::TooManyXattrs));
            assert!(parse(&names("trusted.", 21_000)).unwrap().xattrs.is_empty());
            assert_eq!(parse(&names("user.", 7_000)).unwrap().xattrs.len(), 7_000);
        }
        assert!(started.elapsed() < std::time::Duration::from_secs(10), "{:?}", started.elapsed());
    }

    #[test]
    fn sparse_records_of_all_forms_are_read() {
        let of = |records: &[(&str, &str)]| {
            let block: Vec<u8> = records
                .iter()
                .flat_map(|(key, value)| record_of(format!("GNU.sparse.{key}").as_bytes(), value.as_bytes()))
                .collect();
            parse(&block).map(|found| found.sparse.unwrap())
        };
        let parts: VecDeque<Segment> =
            [(0, 5), (10, 5)].into_iter().map(|(offset, length)| Segment { offset, length }).collect();
        let found = of(&[
            ("size", "20"),
            ("numblocks", "2"),
            ("offset", "0"),
            ("numbytes", "5"),
            ("offset", "10"),
            ("numbytes", "5"),
        ]);
        assert_eq!(sparse::of_records(found.unwrap()), Ok((20, sparse::Source::Known(parts.clone()))));
        let listed = [("size", "20"), ("numblocks", "2"), ("name", "f"), ("map", "0,5,10,5")];
        assert_eq!(sparse::of_records(of(&listed).unwrap()), Ok((20, sparse::Source::Known(parts))));
        let text = [("major", "1"), ("minor", "0"), ("name", "f"), ("realsize", "20")];
        assert_eq!(sparse::of_records(of(&text).unwrap()), Ok((20, sparse::Source::Content)));
        for odd in [
            &[("major", "2"), ("minor", "0"), ("size", "20")][..],
            &[("major", "1"), ("size", "20")],
            &[("major", "1"), ("minor", "0")],
            &[("size", "20"), ("realsize", "21")],
            &[("size", "20"), ("numblocks", "3"), ("map", "0,5,10,5")],
            &[("size", "20"), ("offset", "1")],
            &[("name", "f")],
        ] {
            assert!(sparse::of_records(of(odd).unwrap()).is_err(), "{odd:?}");
        }
        for odd in [&[("offset", "1"), ("offset", "2")][..], &[("numbytes", "2")], &[("name", "")]] {
            assert!(of(odd).is_err(), "{odd:?}");
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_back(
            path in proptest::collection::vec(1_u8.., 1..300),
            value in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut block = record_of(b"path", &path);
            block.extend(record_of(b"SCHILY.xattr.user.v", &value));
            let found = parse(&block).unwrap();
            prop_assert_eq!(found.path, Some(path));
            prop_assert_eq!(found.xattrs, BTreeMap::from([(b"user.v".to_vec(), value)]));
        }

        #[test]
        fn any_bytes_end_in_a_result(block in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&block);
        }
    }

    #[test]
    fn a_list_has_pairs_of_numbers() {
        assert_eq!(
            sparse_list(b"0,5,10,5"),
            Ok([(0, 5), (10, 5)].map(|(offset, length)| Segment { offset, length }).into())
        );
        for bad in [&b"0"[..], b"0,5,", b"0,5,7", b",", b"0,-5", b"a,b"] {
            assert_eq!(sparse_list(bad), Err(PaxError::Value), "{}", bad.escape_ascii());
        }
    }
}
