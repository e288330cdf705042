//! The decoded length of Huffman-coded HPACK strings. The decoded bytes are not needed.
//!
//! The code (RFC 7541 Appendix B) is canonical: as left-aligned 32-bit numbers, the codes ascend
//! with their length. So the number of codes of each length determines where a code ends.

/// `(length in bits, number of codes)`, by RFC 7541 Appendix B. One of the last four is EOS.
const CODES: [(u32, u32); 21] = [
    (5, 10),
    (6, 26),
    (7, 32),
    (8, 6),
    (10, 5),
    (11, 3),
    (12, 2),
    (13, 6),
    (14, 2),
    (15, 3),
    (19, 3),
    (20, 8),
    (21, 13),
    (22, 26),
    (23, 29),
    (24, 12),
    (25, 4),
    (26, 15),
    (27, 19),
    (28, 29),
    (30, 4),
];

/// `(length in bits, the first left-aligned number that is no code of this length)`.
const ENDS: [(u32, u64); CODES.len()] = {
    let mut ends = [(0, 0); CODES.len()];
    let mut index = 0;
    let mut end: u64 = 0;
    while index < CODES.len() {
        let (length, count) = CODES[index];
        end += (count as u64) << (32 - length);
        ends[index] = (length, end);
        index += 1;
    }
    ends
};

/// The length of the decoded string, in bytes. The padding is not checked: the server decodes the
/// string and refuses an invalid one.
pub(super) fn decoded_length(coded: &[u8]) -> usize {
    let mut bytes = coded.iter();
    // The next bits, left-aligned.
    let (mut window, mut bits, mut length) = (0_u64, 0_u32, 0);
    loop {
        while bits <= 32 {
            let Some(byte) = bytes.next() else { break };
            window |= u64::from(*byte) << (56 - bits);
            bits += 8;
        }
        let Some((code, _)) = ENDS.iter().find(|(_, end)| window >> 32 < *end) else { return length };
        if *code > bits {
            return length;
        }
        // Padding is ones, fewer than eight: no code of seven bits or less consists of ones only,
        // so it ends here, too.
        window <<= code;
        bits -= code;
        length += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_complete() {
        assert_eq!(CODES.iter().map(|(_, count)| count).sum::<u32>(), 257, "256 bytes and EOS");
        assert_eq!(ENDS.last().unwrap().1, 1 << 32, "no number is left over");
    }

    #[test]
    fn the_examples_of_the_rfc_have_their_lengths() {
        // RFC 7541 sections C.4 and C.6.
        let cases: &[(&[u8], &str)] = &[
            (&[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff], "www.example.com"),
            (&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf], "no-cache"),
            (&[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xa9, 0x7d, 0x7f], "custom-key"),
            (&[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xb8, 0xe8, 0xb4, 0xbf], "custom-value"),
            (&[0x64, 0x02], "302"),
            (&[0xae, 0xc3, 0x77, 0x1a, 0x4b], "private"),
            (&[], ""),
        ];
        for (coded, text) in cases {
            assert_eq!(decoded_length(coded), text.len(), "{text}");
        }
    }
}
