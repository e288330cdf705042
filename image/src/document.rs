//! The forms of indexes, manifests and configurations, and what is read of them.
//!
//! Only fields that are used are named here, and only those can cause a document to be refused; any
//! other content is ignored. `null` is the same as absent, as in every other reader. Nothing is
//! ever written back from these types: the raw bytes are kept.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};

/// Reads a document, which is an object.
///
/// # Errors
/// What the parser says.
pub(crate) fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice::<Object<T>>(bytes).map(|Object(document)| document)
}

/// An object only: serde would also accept a list as a structure, by the order of its fields.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }

        deserializer.deserialize_map(Entries(PhantomData))
    }
}

fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Object::deserialize(from).map(|Object(value)| value)
}

fn object_or_nothing<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    Ok(Option::<Object<T>>::deserialize(from)?.map(|Object(value)| value))
}

fn object_or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    object_or_nothing(from).map(Option::unwrap_or_default)
}

fn objects<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    let objects = Option::<Vec<Object<T>>>::deserialize(from)?.unwrap_or_default();
    Ok(objects.into_iter().map(|Object(value)| value).collect())
}

/// Points at content (OCI image-spec 1.1, descriptor.md).
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: u64,
    #[serde(default, deserialize_with = "object_or_nothing")]
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    pub(crate) annotations: Texts,
}

/// The machine that an entry of an index is for.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Platform {
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) os: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) architecture: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) variant: String,
}

/// image-spec, image-index.md.
#[derive(Debug, Deserialize)]
pub(crate) struct Index {
    #[serde(default, deserialize_with = "objects")]
    pub(crate) manifests: Vec<Descriptor>,
}

/// image-spec, manifest.md.
#[derive(Debug, Deserialize)]
pub(crate) struct ManifestDocument {
    #[serde(deserialize_with = "object")]
    pub(crate) config: Descriptor,
    #[serde(default, deserialize_with = "objects")]
    pub(crate) layers: Vec<Descriptor>,
}

/// image-spec, config.md.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ConfigDocument {
    #[serde(default, deserialize_with = "text_or_nothing")]
    pub(crate) created: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) os: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) architecture: String,
    #[serde(default, deserialize_with = "object_or_default")]
    pub(crate) rootfs: RootFs,
    #[serde(default, deserialize_with = "object_or_default")]
    pub(crate) config: Execution,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) diff_ids: Vec<String>,
}

/// The execution parameters of an image.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Execution {
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) entrypoint: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) cmd: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) env: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) working_dir: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) user: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) stop_signal: String,
    #[serde(default)]
    pub(crate) volumes: Keys,
    #[serde(default)]
    pub(crate) labels: Texts,
}

/// Keys and values of an object. A value other than text counts as empty; of a duplicate key the
/// last counts, as in Go. What is no object has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Texts(pub(crate) BTreeMap<String, String>);

/// The keys of an object, whatever their values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Keys(pub(crate) Vec<String>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let entries = deserializer.deserialize_any(Loose)?.entries;
        Ok(Self(entries.into_iter().map(|(key, value)| (key, value.unwrap_or_default())).collect()))
    }
}

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut keys: Vec<String> =
            deserializer.deserialize_any(Loose)?.entries.into_iter().map(|(key, _)| key).collect();
        keys.sort();
        keys.dedup();
        Ok(Self(keys))
    }
}

fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(from).map(Option::unwrap_or_default)
}

fn text_or_nothing<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    from.deserialize_any(Loose).map(|value| value.text)
}

/// Any value: a text, or the entries of an object; of everything else nothing.
#[derive(Default)]
struct Value {
    text: Option<String>,
    entries: Vec<(String, Option<String>)>,
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Loose)
    }
}

struct Loose;

impl<'de> Visitor<'de> for Loose {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Value, E> {
        Ok(Value::default())
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Value, E> {
        Ok(Value::default())
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Value, E> {
        Ok(Value::default())
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Value, E> {
        Ok(Value::default())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value { text: Some(text.to_owned()), entries: Vec::new() })
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut value = Value::default();
        while let Some((key, Value { text, .. })) = items.next_entry::<String, Value>()? {
            value.entries.push((key, text));
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_decides_nothing_may_be_anything() {
        let text = r#"{
            "created": 7, "history": {"x": [1]}, "author": null, "variant": null,
            "config": {
                "Labels": {"a": null, "b": "1", "c": {"d": [1]}, "b": "2"}, "Volumes": {"/v": null, "/w": {}, "/v": 1},
                "Env": null, "ExposedPorts": 5, "Healthcheck": [], "Cmd": ["x"]
            }
        }"#;
        let found: ConfigDocument = serde_json::from_str(text).unwrap();
        assert_eq!(found.created, None);
        assert_eq!(found.config.cmd, ["x"]);
        let labels =
            [("a", ""), ("b", "2"), ("c", "")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(found.config.labels.0, BTreeMap::from(labels));
        assert_eq!(found.config.volumes.0, ["/v", "/w"]);
        for odd in ["null", "5", "[1]", r#""x""#] {
            let text = format!(r#"{{"config":{{"Labels":{odd},"Volumes":{odd}}},"created":{odd}}}"#);
            let found: ConfigDocument = serde_json::from_str(&text).unwrap();
            assert!(found.config.labels.0.is_empty() && found.config.volumes.0.is_empty(), "{odd}");
        }
    }

    #[test]
    fn what_decides_is_of_its_form() {
        for odd in [
            r#"{"config":{"Cmd":"x"}}"#,
            r#"{"config":{"Cmd":[null]}}"#,
            r#"{"config":{"Env":{"a":"b"}}}"#,
            r#"{"config":{"User":0}}"#,
            r#"{"config":[]}"#,
            r#"{"rootfs":{"diff_ids":[1]}}"#,
            r#"{"config":["x"]}"#,
            r#"{"os":1}"#,
            r#"["2020-01-01", "linux"]"#,
        ] {
            assert!(read::<ConfigDocument>(odd.as_bytes()).is_err(), "{odd}");
        }
    }
}
