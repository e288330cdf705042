//! Checks that all readers interpret a JSON document the same way, where it matters.
//!
//! A manifest is verified by its digest, but its meaning depends on the reader if keys are
//! duplicate, or differ only in case (Go's decoder folds case, others do not). Documents in which a
//! key that is used is like that are refused before they are interpreted. Other keys do not matter,
//! and may be anything.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
#[error("not a JSON document that all parsers read the same way")]
pub struct AmbiguousJson(#[source] serde_json::Error);

/// Checks that no object has a key of `fields` twice, or one that differs from it only in case.
/// Objects below `free` (labels, annotations, history) may have any keys.
///
/// # Errors
/// [`AmbiguousJson`], also for anything that is no JSON, or nested deeper than serde_json's 128
/// levels.
pub(crate) fn check(bytes: &[u8], fields: &[&str], free: &[&str]) -> Result<(), AmbiguousJson> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    Check { fields, free }
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end())
        .map_err(AmbiguousJson)
}

/// The document in valid UTF-8 without lone surrogates: each is replaced by U+FFFD, as Go's decoder
/// does. Borrowed if there are none.
///
/// Builders put bytes of any encoding into labels and histories. No byte of JSON's own syntax is
/// touched.
pub(crate) fn tidy(bytes: &[u8]) -> Cow<'_, [u8]> {
    let mut text = match String::from_utf8_lossy(bytes) {
        Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
        Cow::Owned(text) => Cow::Owned(text.into_bytes()),
    };
    let mut at = 0;
    while let Some(backslash) = text.get(at..).and_then(|rest| rest.iter().position(|&b| b == b'\\')) {
        let escape = at + backslash;
        at = escape + 2;
        match unit(&text, escape) {
            Some(0xd800..=0xdbff) if matches!(unit(&text, escape + 6), Some(0xdc00..=0xdfff)) => {
                at = escape + 12
            }
            Some(0xd800..=0xdfff) => {
                if let Some(digits) = text.to_mut().get_mut(escape + 2..escape + 6) {
                    digits.copy_from_slice(b"fffd");
                }
            }
            _ => {}
        }
    }
    text
}

/// The UTF-16 unit of the escape `\uXXXX` at this place.
fn unit(text: &[u8], at: usize) -> Option<u16> {
    let digits = text.get(at..at + 6)?.strip_prefix(b"\\u")?;
    let digits =
        std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u16::from_str_radix(digits, 16).ok()
}

#[derive(Clone, Copy)]
struct Check<'a> {
    fields: &'a [&'a str],
    free: &'a [&'a str],
}

impl<'de> DeserializeSeed<'de> for Check<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Check<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let mut seen: HashSet<&str> = HashSet::new();
        while let Some(key) = items.next_key::<String>()? {
            if let Some(field) = self.fields.iter().find(|field| key.eq_ignore_ascii_case(field)) {
                if key != *field {
                    return Err(A::Error::custom("a key differs from a known one only in case"));
                }
                if !seen.insert(field) {
                    return Err(A::Error::custom("a key is there twice"));
                }
            }
            if self.free.contains(&key.as_str()) {
                items.next_value::<IgnoredAny>()?;
            } else {
                items.next_value_seed(self)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_that_readers_could_see_differently_are_refused() {
        let deep = "[".repeat(100_000);
        for (text, fine) in [
            (r#"{"layers":[{"size":1}],"x":null}"#, true),
            (r#"{"layers":1,"layers":2}"#, false),
            (r#"{"a":{"size":1,"size":1}}"#, false),
            (r#"{"Layers":1}"#, false),
            (r#"{"annotations":{"Layers":"x","a":"1"}}"#, true),
            (r#"{"annotations":{"a":"x","a":"1","size":1,"SIZE":[{}]}}"#, true),
            (r#"{"x":1,"x":2,"X":3}"#, true),
            (r#"{"annotations":1,"annotations":2}"#, true),
            ("\u{feff}{}", false),
            ("{}\0", false),
            ("{} {}", false),
            ("", false),
            (&deep, false),
        ] {
            let checked = check(text.as_bytes(), &["layers", "size"], &["annotations"]);
            assert_eq!(checked.is_ok(), fine, "{:.40}", text);
        }
    }

    #[test]
    fn bytes_that_are_no_text_become_replacement_characters() {
        for (bytes, wanted) in [
            (&b"{\"a\":\"b\"}"[..], "{\"a\":\"b\"}"),
            (b"\"a\xffb\xc3\"", "\"a\u{fffd}b\u{fffd}\""),
            (br#""\ud800x""#, r#""\ufffdx""#),
            (br#""\uDC00""#, r#""\ufffd""#),
            (br#""\ud83d\ude00""#, r#""\ud83d\ude00""#),
            (br#""\ud83d\ud83d\ude00""#, r#""\ufffd\ud83d\ude00""#),
            (br#""\\ud800""#, r#""\\ud800""#),
            (br#""\\\ud800""#, r#""\\\ufffd""#),
            (br#""\u12"#, r#""\u12"#),
            (br#""\"#, r#""\"#),
        ] {
            assert_eq!(String::from_utf8_lossy(&tidy(bytes)), wanted);
        }
        assert!(matches!(tidy(b"plain"), Cow::Borrowed(_)));
    }
}
