//! Key/value metadata, in the encoding of GGUF version 3, which `.nybl` files use as well.
//!
//! One reader and one writer for both, and one set of keys: a converter copies what it does not know.
#![forbid(unsafe_code)]

use super::reader::{Reader, size};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer type of the file.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// Either float type.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    Text(String),
    /// Numbers of one integer type, widened.
    Integers(Vec<i64>),
    /// Floats of one type.
    Floats(Vec<f32>),
    /// Strings.
    Texts(Vec<String>),
}

/// All metadata of one file.
#[derive(Clone, Debug)]
pub struct Metadata {
    file: String,
    values: BTreeMap<String, Value>,
}

/// Most elements of an array: a multiple of any vocabulary, and a bound on what widening them costs.
const MAX_ELEMENTS: u64 = 1 << 22;

/// The type codes of the encoding.
mod code {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const TEXT: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}

/// Bytes of one element on file, if it has a fixed size.
fn width(code: u32) -> Option<usize> {
    match code {
        code::U8 | code::I8 | code::BOOL => Some(1),
        code::U16 | code::I16 => Some(2),
        code::U32 | code::I32 | code::F32 => Some(4),
        code::U64 | code::I64 | code::F64 => Some(8),
        _ => None,
    }
}

/// A scalar from its bytes, as many as [`width`] says.
fn scalar(code: u32, bytes: &[u8]) -> Value {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let raw = u64::from_le_bytes(wide);
    let [a, b, c, d, ..] = wide;
    let unused = 64 - 8 * bytes.len();
    match code {
        code::I8 | code::I16 | code::I32 | code::I64 => {
            Value::Signed((raw << unused).cast_signed() >> unused)
        }
        code::F32 => Value::Float(f64::from(f32::from_le_bytes([a, b, c, d]))),
        code::F64 => Value::Float(f64::from_bits(raw)),
        code::BOOL => Value::Bool(raw != 0),
        _ => Value::Unsigned(raw),
    }
}

impl Metadata {
    /// No metadata, for a file to be written.
    #[must_use]
    pub fn new(file: &str) -> Self {
        Self { file: file.into(), values: BTreeMap::new() }
    }

    /// Reads `count` pairs.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the key. Memory stays within a small multiple of the bytes read.
    pub fn read(file: &str, reader: &mut Reader<'_>, count: u64) -> Result<Self> {
        let mut metadata = Self::new(file);
        for index in 0..count {
            let key = reader.string(&format!("metadata key {index}"))?;
            let kind = reader.u32(key)?;
            let value = read_value(reader, key, kind)?;
            if metadata.values.insert(key.to_owned(), value).is_some() {
                return Err(reader.error(key, "appears twice"));
            }
        }
        Ok(metadata)
    }

    /// Appends all pairs to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        for (key, value) in &self.values {
            write_text(out, key);
            write_value(out, value);
        }
    }

    /// Pairs held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// All pairs in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Sets a value.
    pub fn set(&mut self, key: &str, value: Value) {
        self.values.insert(key.into(), value);
    }

    /// Takes a value out.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.values.remove(key)
    }

    /// Removes all keys that start with `prefix`.
    pub fn remove_prefix(&mut self, prefix: &str) {
        self.values.retain(|key, _| !key.starts_with(prefix));
    }

    /// Those pairs whose keys `keep` wants.
    #[must_use]
    pub fn only(&self, keep: impl Fn(&str) -> bool) -> Self {
        let kept = self.values.iter().filter(|(key, _)| keep(key));
        let values = kept.map(|(key, value)| (key.clone(), value.clone())).collect();
        Self { file: self.file.clone(), values }
    }

    /// An error about `key` of this file.
    #[must_use]
    pub fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::corrupt(&self.file, key, reason)
    }

    /// The value of a key that may be absent.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// An integer at most `limit`, if the key is there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is something else, negative, or larger.
    pub fn integer(&self, key: &str, limit: u64) -> Result<Option<u64>> {
        let number = match self.get(key) {
            None => return Ok(None),
            Some(Value::Unsigned(number)) => Some(*number),
            Some(Value::Signed(number)) => u64::try_from(*number).ok(),
            Some(_) => return Err(self.error(key, "is not an integer")),
        };
        match number {
            Some(number) if number <= limit => Ok(Some(number)),
            _ => Err(self.error(key, format!("is not between 0 and {limit}"))),
        }
    }

    /// A finite number, if the key is there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is something else.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(number)) if number.is_finite() => Ok(Some(*number)),
            Some(Value::Unsigned(number)) => Ok(Some(*number as f64)),
            Some(_) => Err(self.error(key, "is not a finite number")),
        }
    }

    /// A truth value, if the key is there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.error(key, "is not true or false")),
        }
    }

    /// Text, if the key is there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.error(key, "is not text")),
        }
    }

    /// A value that must be there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when `found` is nothing.
    pub fn required<T>(&self, key: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| self.error(key, "is missing from the metadata"))
    }
}

fn read_value(reader: &mut Reader<'_>, key: &str, kind: u32) -> Result<Value> {
    if kind == code::TEXT {
        return Ok(Value::Text(reader.string(key)?.to_owned()));
    }
    if kind == code::ARRAY {
        return read_array(reader, key);
    }
    match width(kind) {
        Some(width) => Ok(scalar(kind, reader.take(key, width)?)),
        None => Err(reader.error(key, format!("has the unknown type {kind}"))),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "arrays of f64 are kept as f32")]
fn read_array(reader: &mut Reader<'_>, key: &str) -> Result<Value> {
    let kind = reader.u32(key)?;
    let count = reader.u64(key)?;
    // A string costs at least its length field. With this, a count cannot ask for more elements than
    // the file has bytes.
    let least = width(kind).unwrap_or(8) as u64;
    let fits = count <= MAX_ELEMENTS && count * least <= reader.left() as u64;
    if !fits {
        let reason = format!("an array of {count} elements where {} bytes are left", reader.left());
        return Err(reader.error(key, reason));
    }
    let count = size(count);
    if kind == code::TEXT {
        let mut texts = Vec::new();
        for _ in 0..count {
            texts.push(reader.string(key)?.to_owned());
        }
        return Ok(Value::Texts(texts));
    }
    let Some(width) = width(kind) else {
        return Err(reader.error(key, format!("is an array of the unsupported type {kind}")));
    };
    let elements = reader.take(key, count * width)?.chunks_exact(width);
    Ok(match kind {
        code::F32 | code::F64 => Value::Floats(
            elements
                .map(|bytes| match scalar(kind, bytes) {
                    Value::Float(number) => number as f32,
                    _ => 0.0,
                })
                .collect(),
        ),
        _ => Value::Integers(
            elements
                .map(|bytes| match scalar(kind, bytes) {
                    Value::Signed(number) => number,
                    Value::Unsigned(number) => number.cast_signed(),
                    Value::Bool(value) => i64::from(value),
                    _ => 0,
                })
                .collect(),
        ),
    })
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn write_value(out: &mut Vec<u8>, value: &Value) {
    let head = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let array = |out: &mut Vec<u8>, kind: u32, count: usize| {
        out.extend(code::ARRAY.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        Value::Unsigned(number) => {
            head(out, code::U64);
            out.extend(number.to_le_bytes());
        }
        Value::Signed(number) => {
            head(out, code::I64);
            out.extend(number.to_le_bytes());
        }
        Value::Float(number) => {
            head(out, code::F64);
            out.extend(number.to_le_bytes());
        }
        Value::Bool(value) => {
            head(out, code::BOOL);
            out.push(u8::from(*value));
        }
        Value::Text(text) => {
            head(out, code::TEXT);
            write_text(out, text);
        }
        Value::Integers(numbers) => {
            array(out, code::I64, numbers.len());
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        Value::Floats(numbers) => {
            array(out, code::F32, numbers.len());
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        Value::Texts(texts) => {
            array(out, code::TEXT, texts.len());
            texts.iter().for_each(|text| write_text(out, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Metadata {
        let mut metadata = Metadata::new("test");
        metadata.set("a.count", Value::Unsigned(7));
        metadata.set("a.minus", Value::Signed(-7));
        metadata.set("b.eps", Value::Float(1e-5));
        metadata.set("b.flag", Value::Bool(true));
        metadata.set("c.name", Value::Text("nursery".into()));
        metadata.set("d.ids", Value::Integers(vec![1, -2]));
        metadata.set("d.scores", Value::Floats(vec![0.5, -1.0]));
        metadata.set("d.tokens", Value::Texts(vec!["a".into(), String::new()]));
        metadata
    }

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        sample().write(&mut bytes);
        let mut reader = Reader::new("test", &bytes);
        let read = Metadata::read("test", &mut reader, 8).unwrap();
        assert_eq!(read.values, sample().values);
        assert_eq!(reader.left(), 0);
    }

    #[test]
    fn every_truncation_is_an_error_that_names_the_file() {
        let mut bytes = Vec::new();
        sample().write(&mut bytes);
        for end in (0..bytes.len()).step_by(if cfg!(miri) { 29 } else { 1 }) {
            let mut reader = Reader::new("short.gguf", &bytes[..end]);
            let error = Metadata::read("short.gguf", &mut reader, 8).unwrap_err();
            assert!(error.to_string().starts_with("short.gguf: "), "{error}");
        }
    }

    #[test]
    fn claims_beyond_the_file_are_refused_before_memory_is_taken() {
        let mut bytes = Vec::new();
        write_text(&mut bytes, "k");
        bytes.extend(code::ARRAY.to_le_bytes());
        bytes.extend(code::U8.to_le_bytes());
        bytes.extend(u64::MAX.to_le_bytes());
        let mut reader = Reader::new("test", &bytes);
        let error = Metadata::read("test", &mut reader, 1).unwrap_err().to_string();
        assert!(error.contains("elements"), "{error}");
    }

    #[test]
    fn keys_that_appear_twice_and_arrays_of_arrays_are_refused() {
        let refused = |bytes: &[u8], count| {
            let mut reader = Reader::new("test", bytes);
            Metadata::read("test", &mut reader, count).unwrap_err().to_string()
        };
        let mut bytes = Vec::new();
        sample().write(&mut bytes);
        let error = refused(&bytes.repeat(2), 16);
        assert!(error.contains("a.count: appears twice"), "{error}");
        let mut bytes = Vec::new();
        write_text(&mut bytes, "k");
        bytes.extend(code::ARRAY.to_le_bytes());
        bytes.extend(code::ARRAY.to_le_bytes());
        bytes.extend(0_u64.to_le_bytes());
        let error = refused(&bytes, 1);
        assert!(error.contains("array of the unsupported type"), "{error}");
    }

    #[test]
    fn wrong_types_and_ranges_are_named() {
        let metadata = sample();
        assert!(metadata.integer("b.eps", 10).is_err());
        assert!(metadata.integer("a.count", 6).is_err());
        assert!(metadata.integer("a.minus", 6).is_err());
        assert_eq!(metadata.integer("missing", 6), Ok(None));
        assert!(metadata.bool("a.count").unwrap_err().to_string().contains("a.count"));
        assert!(metadata.text("a.count").unwrap_err().to_string().contains("a.count"));
    }
}
