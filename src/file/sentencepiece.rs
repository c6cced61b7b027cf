//! `tokenizer.model`, the vocabulary of SentencePiece, as the metadata of GGUF has it.
//!
//! The file is a Protocol Buffers message, `ModelProto` of
//! <https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto>, of which a few
//! fields matter: a reader of those is shorter than a library for all messages.
#![forbid(unsafe_code)]

use super::metadata::{Metadata, Value};
use super::reader::{Reader, size};
use crate::error::{Error, Result};

/// One field of a message: its number, and its value.
struct Field<'a> {
    number: u64,
    value: Wire<'a>,
}

/// A value as it lies on file.
enum Wire<'a> {
    Varint(u64),
    Float(f32),
    Bytes(&'a [u8]),
    Other,
}

/// Seven bits a byte, the lowest first, the top bit set on all but the last.
fn varint(reader: &mut Reader<'_>, field: &str) -> Result<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = reader.u8(field)?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(number);
        }
    }
    Err(reader.error(field, "has a number of more than 64 bits"))
}

/// Calls `each` with every field of a message in order.
fn fields<'a>(
    file: &str,
    what: &str,
    message: &'a [u8],
    mut each: impl FnMut(Field<'a>) -> Result<()>,
) -> Result<()> {
    let mut at = 0;
    while at < message.len() {
        let mut reader = Reader::new(file, &message[at..]);
        let key = varint(&mut reader, what)?;
        let value = match key & 7 {
            0 => Wire::Varint(varint(&mut reader, what)?),
            1 => {
                reader.take(what, 8)?;
                Wire::Other
            }
            2 => {
                let length = varint(&mut reader, what)?;
                if length > reader.left() as u64 {
                    return Err(reader.error(what, format!("claims {length} bytes, has fewer")));
                }
                let start = at + reader.position();
                reader.take(what, size(length))?;
                Wire::Bytes(&message[start..start + size(length)])
            }
            5 => Wire::Float(f32::from_bits(reader.u32(what)?)),
            kind => return Err(reader.error(what, format!("has a field of the kind {kind}"))),
        };
        at += reader.position();
        each(Field { number: key >> 3, value })?;
    }
    Ok(())
}

/// Puts the vocabulary of `message`, the contents of `file`, into `metadata`.
///
/// # Errors
/// [`Error::Corrupt`] naming the file; [`Error::Unsupported`] for a model that is not BPE.
pub(super) fn read(file: &str, message: &[u8], metadata: &mut Metadata) -> Result<()> {
    let (mut tokens, mut scores, mut types) = (Vec::new(), Vec::new(), Vec::new());
    // What is not written has these values: a unigram model, a space in front, a few ids.
    let (mut kind, mut prefix, mut specials) = (1, true, [0_u64, 1, 2]);
    fields(file, "message", message, |field| {
        match (field.number, field.value) {
            (1, Wire::Bytes(piece)) => {
                let what = format!("piece {}", tokens.len());
                let (mut token, mut score, mut kind) = ("", 0.0, 1);
                fields(file, &what, piece, |field| {
                    match (field.number, field.value) {
                        (1, Wire::Bytes(text)) => {
                            let text = std::str::from_utf8(text);
                            token =
                                text.map_err(|_| Error::corrupt(file, &what, "is not UTF-8"))?;
                        }
                        (2, Wire::Float(value)) => score = value,
                        (3, Wire::Varint(value)) => kind = i64::try_from(value).unwrap_or(-1),
                        _ => {}
                    }
                    Ok(())
                })?;
                tokens.push(token.to_owned());
                scores.push(score);
                types.push(kind);
            }
            (2, Wire::Bytes(trainer)) => fields(file, "trainer_spec", trainer, |field| {
                match (field.number, field.value) {
                    (3, Wire::Varint(value)) => kind = value,
                    (40, Wire::Varint(id)) => specials[0] = id,
                    (41, Wire::Varint(id)) => specials[1] = id,
                    (42, Wire::Varint(id)) => specials[2] = id,
                    _ => {}
                }
                Ok(())
            })?,
            (3, Wire::Bytes(normalizer)) => fields(file, "normalizer_spec", normalizer, |field| {
                if let (3, Wire::Varint(value)) = (field.number, field.value) {
                    prefix = value != 0;
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    if kind != 2 {
        let what =
            "a SentencePiece model that is not BPE; a tokenizer.json beside it would be read";
        return Err(Error::Unsupported(format!("{file}: {what}")));
    }
    metadata.set("tokenizer.ggml.model", Value::Text("llama".into()));
    metadata.set("tokenizer.ggml.tokens", Value::Texts(tokens));
    metadata.set("tokenizer.ggml.scores", Value::Floats(scores));
    metadata.set("tokenizer.ggml.token_type", Value::Integers(types));
    metadata.set("tokenizer.ggml.add_space_prefix", Value::Bool(prefix));
    for (key, id) in ["unknown", "bos", "eos"].iter().zip(specials) {
        // An id that there is not is minus one.
        if let Ok(id) = u32::try_from(id) {
            let key = format!("tokenizer.ggml.{key}_token_id");
            metadata.set(&key, Value::Unsigned(id.into()));
        }
    }
    Ok(())
}

#[cfg(all(test, feature = "text"))]
mod tests {
    use super::*;
    use crate::text::vocabulary::tokenizer;

    const MODEL: &[u8] = include_bytes!("../../ffi-tests/fixtures/sentencepiece/tokenizer.model");

    #[test]
    #[cfg_attr(miri, ignore = "too many bytes for it")]
    fn ids_are_those_of_sentencepiece() {
        let mut metadata = Metadata::new("folder");
        read("tokenizer.model", MODEL, &mut metadata).unwrap();
        let tokenizer = tokenizer(&metadata, 600).unwrap().expect("a tokenizer");
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), &[2][..]));
        let pairs = include_str!("../../ffi-tests/fixtures/sentencepiece/ids.json");
        let pairs: Vec<(String, Vec<u32>)> = serde_json::from_str(pairs).unwrap();
        assert!(pairs.len() > 5);
        for (text, ids) in pairs {
            assert_eq!(tokenizer.encode(&text, false, false).unwrap(), ids, "{text:?}");
            // The mark of a space is one when it is written out.
            assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace('\u{2581}', " "));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "too many bytes for it")]
    fn every_truncation_is_a_status() {
        for end in 0..MODEL.len() {
            let mut metadata = Metadata::new("folder");
            // Where it ends between two fields, a message of fewer pieces is left.
            if let Err(error) = read("a.model", &MODEL[..end], &mut metadata) {
                assert!(error.to_string().contains("a.model"), "{error}");
            }
        }
        let mut metadata = Metadata::new("folder");
        let error = read("a.model", &[0x80; 20], &mut metadata).unwrap_err().to_string();
        assert!(error.contains("64 bits"), "{error}");
        let error = read("a.model", &[0x0a, 0xff, 0x01], &mut metadata).unwrap_err().to_string();
        assert!(error.contains("255 bytes"), "{error}");
    }
}
