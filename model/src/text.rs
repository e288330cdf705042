//! Untrusted text, escaped for a line that people read.

use std::borrow::Cow;

/// The text with everything escaped (`\u{202e}`) that is not shown as itself or acts on what shows
/// it: controls and line ends, the separators U+2028 and U+2029, marks that turn the direction of
/// writing, other invisible characters, and code points without a meaning.
///
/// A backslash stays as it is: the result is for people, and not to be read back.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_printable) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_printable(character) {
            shown.push(character);
        } else {
            shown.extend(character.escape_default());
        }
    }
    Cow::Owned(shown)
}

/// The standard library's judgement, which follows Unicode's categories, but for the quotes and the
/// backslash that it escapes too.
fn is_printable(character: char) -> bool {
    if character.is_ascii() {
        return !character.is_ascii_control();
    }
    character.escape_debug().eq([character])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_seen_stays() {
        for text in ["", "a b/c:1.0@sha256", r#"quo"te' \n"#, "grün", "日本語", "€ – …"] {
            assert!(matches!(printable(text), Cow::Borrowed(shown) if shown == text), "{text}");
        }
    }

    #[test]
    fn what_is_not_seen_or_acts_is_escaped() {
        for (text, shown) in [
            ("a\nb\r\t\0", r"a\nb\r\t\u{0}"),
            ("\u{1b}[2J\u{9b}1m\u{7f}", r"\u{1b}[2J\u{9b}1m\u{7f}"),
            ("exe\u{202e}gpj", r"exe\u{202e}gpj"),
            ("a\u{2028}b\u{2029}", r"a\u{2028}b\u{2029}"),
            ("\u{2066}\u{2069}\u{200e}\u{200f}\u{61c}", r"\u{2066}\u{2069}\u{200e}\u{200f}\u{61c}"),
            ("a\u{200b}b\u{feff}\u{ad}", r"a\u{200b}b\u{feff}\u{ad}"),
            ("\u{e0041}\u{fff9}\u{85}\u{a0}", r"\u{e0041}\u{fff9}\u{85}\u{a0}"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }
}
