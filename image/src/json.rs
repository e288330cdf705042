//! JSON that every reader reads alike.
//!
//! A manifest is verified by its digest, but what it means depends on the reader where keys are doubled, or differ only in case (Go's
//! decoder folds case, others do not). Such documents are refused before they are interpreted.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Why a document is not taken.
#[derive(Debug, thiserror::Error)]
#[error("not a JSON document that all readers would read alike")]
pub struct AmbiguousJson(#[source] serde_json::Error);

/// Checks that no object has a key twice, and no key that differs from one of `fields` only in case. Objects below `free` (labels,
/// annotations) may have any distinct keys.
///
/// # Errors
/// [`AmbiguousJson`], also for anything that is no JSON, or nested deeper than serde_json's 128 levels.
pub(crate) fn check(bytes: &[u8], fields: &[&str], free: &[&str]) -> Result<(), AmbiguousJson> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    Check { fields, free }
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end())
        .map_err(AmbiguousJson)
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
        let mut seen = HashSet::new();
        while let Some(key) = items.next_key::<String>()? {
            let folds = |field: &&str| key.eq_ignore_ascii_case(field) && key != *field;
            if self.fields.iter().any(folds) {
                return Err(A::Error::custom("a key differs from a known one only in case"));
            }
            let below =
                if self.free.contains(&key.as_str()) { Self { fields: &[], free: &[] } } else { self };
            if !seen.insert(key) {
                return Err(A::Error::custom("a key is there twice"));
            }
            items.next_value_seed(below)?;
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
            (r#"{"annotations":{"a":"x","a":"1"}}"#, false),
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
}
