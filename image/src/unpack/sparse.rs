//! Sparse files: which parts of a file an archive has, and which are holes.
//!
//! Forms (GNU tar manual, "Storing Sparse Files"): the old GNU header with its extension blocks,
//! PAX 0.0 and 0.1 with the map in records, and PAX 1.0 with the map as text before the data. A map
//! must be in order, must stay within the file, and must account for every byte that the archive
//! has for it; readers differ in what they make of any other.

use std::collections::VecDeque;

/// Most parts of one file. As text in a PAX record they would take about as much as an extension
/// header may have.
pub(crate) const MAX_SEGMENTS: usize = 65_536;

/// A part of a file that has data, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// The PAX records of a sparse file, of which each form uses some.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct SparseRecords {
    pub(crate) major: Option<u64>,
    pub(crate) minor: Option<u64>,
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    pub(crate) real_size: Option<u64>,
    /// Stated number of parts.
    pub(crate) count: Option<u64>,
    pub(crate) map: VecDeque<Segment>,
    /// Form 0.0: an offset whose length has not been read yet.
    pub(crate) lone_offset: Option<u64>,
}

/// What is wrong with a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SparseError {
    /// Neither 0.0, 0.1 nor 1.0, or records that do not make one of them.
    #[error("unknown sparse file format")]
    Form,
    /// On something that has no content, or together with the other form.
    #[error("a sparse map for something that is not a regular file")]
    Misplaced,
    /// Not numbers, overlapping, out of order, beyond the end of the file, or not for the bytes
    /// that the archive has.
    #[error("a sparse map does not match its file")]
    Map,
    /// More than 65,536 parts.
    #[error("a sparse map has more than {MAX_SEGMENTS} segments")]
    TooLong,
}

/// Where a file's map comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// The records themselves.
    Known(VecDeque<Segment>),
    /// Text before the data.
    Content,
    /// Blocks between the header and the data, after those that the header has.
    Blocks(VecDeque<Segment>),
}

/// Reads the records of one entry: the size of the whole file, and where its map is.
pub(crate) fn of_records(records: SparseRecords) -> Result<(u64, Source), SparseError> {
    let size = match (records.size, records.real_size) {
        (Some(size), Some(other)) if size != other => return Err(SparseError::Form),
        (Some(size), _) | (None, Some(size)) => size,
        (None, None) => return Err(SparseError::Form),
    };
    if records.lone_offset.is_some() {
        return Err(SparseError::Map);
    }
    match (records.major, records.minor) {
        (Some(1), Some(0)) if records.map.is_empty() => Ok((size, Source::Content)),
        (Some(0), Some(0 | 1)) => known(records, size),
        // The first writers did not say which form it is.
        (None, None) if !records.map.is_empty() => known(records, size),
        _ => Err(SparseError::Form),
    }
}

fn known(records: SparseRecords, size: u64) -> Result<(u64, Source), SparseError> {
    let count = u64::try_from(records.map.len()).unwrap_or(u64::MAX);
    if records.count.is_some_and(|stated| stated != count) {
        return Err(SparseError::Map);
    }
    Ok((size, Source::Known(records.map)))
}

/// Holds a map against the file's size and the bytes of data that the archive has for it.
pub(crate) fn check(map: &VecDeque<Segment>, size: u64, data: u64) -> Result<(), SparseError> {
    let (mut end, mut sum) = (0_u64, 0_u64);
    for segment in map {
        if segment.offset < end {
            return Err(SparseError::Map);
        }
        end = segment.offset.checked_add(segment.length).ok_or(SparseError::Map)?;
        sum += segment.length;
    }
    if end > size || sum != data || i64::try_from(size).is_err() { Err(SparseError::Map) } else { Ok(()) }
}

/// Adds a part, up to the limit.
pub(crate) fn push(map: &mut VecDeque<Segment>, segment: Segment) -> Result<(), SparseError> {
    if map.len() == MAX_SEGMENTS {
        return Err(SparseError::TooLong);
    }
    map.push_back(segment);
    Ok(())
}

/// Reads the text of form 1.0 block by block: the number of parts, then offset and length of each,
/// every number on its own line.
#[derive(Debug, Default)]
pub(crate) struct MapText {
    count: Option<u64>,
    number: Option<u64>,
    offset: Option<u64>,
    map: VecDeque<Segment>,
}

impl MapText {
    /// Takes the next block. True when the map is whole; what follows in that block is padding.
    pub(crate) fn take(&mut self, block: &[u8]) -> Result<bool, SparseError> {
        for &byte in block {
            match byte {
                b'0'..=b'9' => {
                    let digits = self.number.unwrap_or(0);
                    let number = digits.checked_mul(10).and_then(|n| n.checked_add(u64::from(byte - b'0')));
                    self.number = Some(number.ok_or(SparseError::Map)?);
                }
                b'\n' => self.end_of_line()?,
                _ => return Err(SparseError::Map),
            }
            if self.is_whole() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn end_of_line(&mut self) -> Result<(), SparseError> {
        let number = self.number.take().ok_or(SparseError::Map)?;
        if self.count.is_none() {
            if number > MAX_SEGMENTS as u64 {
                return Err(SparseError::TooLong);
            }
            self.count = Some(number);
        } else if let Some(offset) = self.offset.take() {
            push(&mut self.map, Segment { offset, length: number })?;
        } else {
            self.offset = Some(number);
        }
        Ok(())
    }

    fn is_whole(&self) -> bool {
        self.count == Some(self.map.len() as u64) && self.number.is_none() && self.offset.is_none()
    }

    pub(crate) fn into_map(self) -> VecDeque<Segment> {
        self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(parts: &[(u64, u64)]) -> VecDeque<Segment> {
        parts.iter().map(|&(offset, length)| Segment { offset, length }).collect()
    }

    #[test]
    fn a_map_is_in_order_within_the_file_and_for_all_its_data() {
        for (parts, size, data, fine) in [
            (&[(0, 5), (10, 5)][..], 20, 10, true),
            (&[(0, 5), (5, 0), (20, 0)], 20, 5, true),
            (&[], 20, 0, true),
            (&[(0, 5), (4, 5)], 20, 10, false),
            (&[(10, 5), (0, 5)], 20, 10, false),
            (&[(16, 5)], 20, 5, false),
            (&[(0, 5)], 20, 6, false),
            (&[(0, 5)], 20, 4, false),
            (&[(u64::MAX, 5)], u64::MAX, 5, false),
            (&[(0, 5)], u64::MAX, 5, false),
        ] {
            assert_eq!(check(&map(parts), size, data).is_ok(), fine, "{parts:?} {size} {data}");
        }
    }

    #[test]
    fn the_text_of_a_map_is_read_over_the_borders_of_blocks() {
        let mut text = MapText::default();
        assert_eq!(text.take(b"2\n0\n51"), Ok(false));
        assert_eq!(text.take(b"2\n1024\n0\nrest"), Ok(true));
        assert_eq!(text.into_map(), map(&[(0, 512), (1024, 0)]));
        assert_eq!(MapText::default().take(b"0\n"), Ok(true));
        for bad in [&b"\n"[..], b"-1\n", b"1\n0\n\0", b"99999999999999999999\n", b"2\n1,5\n"] {
            assert_eq!(MapText::default().take(bad), Err(SparseError::Map), "{}", bad.escape_ascii());
        }
        assert_eq!(MapText::default().take(b"65537\n"), Err(SparseError::TooLong));
    }
}
