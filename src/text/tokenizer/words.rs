//! The quick way from text to ids: cut into words here, and look words up that were met before.
//!
//! The `tokenizers` crate keeps for every character of a text where it came from, and merges every word
//! anew. Nobody here asks where a character came from, and texts are made of few words. So where the
//! pipeline of a tokenizer has one of the two shapes that models really use, words are cut by the same
//! patterns without that crate, and only words that are not remembered go to it. A test compares both
//! ways over texts and random characters.

use super::vocab::SPACE;
use regex_automata::meta::Regex;
use regex_automata::{Anchored, Input};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Mutex;

/// A pipeline that can be gone through here.
pub(super) struct Words {
    shape: Shape,
    /// What is remembered of plain text and of text whose special tokens count.
    remembered: [Mutex<Remembered>; 2],
}

enum Shape {
    /// Cut by one pattern after the other, then written in the code of byte-level BPE.
    Bytes(Vec<Cut>),
    /// Spaces begin words and are written as [`SPACE`].
    Spaces {
        /// Whether another one is put in front.
        prefix: bool,
    },
}

/// Makes every match, and everything between two matches, a word.
struct Cut {
    regex: Regex,
    /// Whether the second pattern of `regex` is a run of white space that leaves its last character to
    /// what follows: the one use that such patterns make of looking ahead.
    gives_back: bool,
}

/// The end of a pattern that looks ahead: white space up to the character before the next word, or all
/// of it when nothing follows.
const LOOKING_AHEAD: &str = r"|\s+(?!\S)|\s+";

impl Cut {
    /// The cut, if its pattern can be matched without looking around.
    fn new(pattern: &str) -> Option<Self> {
        let (rest, gives_back) = match pattern.strip_suffix(LOOKING_AHEAD) {
            Some(rest) => (rest, true),
            None => (pattern, false),
        };
        // In these, the other engine's syntax means something else or more.
        let counted = rest.split('}').zip(rest.split('}').skip(1));
        let counted = counted.filter(|(before, after)| {
            let count = before.rsplit_once('{').map_or("", |(_, count)| count);
            after.starts_with('+') && count.starts_with(|c: char| c.is_ascii_digit())
        });
        let is_plain = counted.count() == 0
            && !["(?=", "(?!", "(?<", "(?>", "++", "?+", "*+", "\\G", "\\K", "\\b"]
                .iter()
                .any(|beyond| rest.contains(beyond));
        if rest.is_empty() || !is_plain {
            return None;
        }
        let patterns = [rest, r"\s+"];
        let regex = Regex::new_many(&patterns[..1 + usize::from(gives_back)]).ok()?;
        // A match of nothing would be a word of nothing.
        let matches_nothing = regex
            .find(Input::new("").anchored(Anchored::Yes))
            .is_some_and(|found| found.is_empty());
        (!matches_nothing).then_some(Self { regex, gives_back })
    }

    fn each<'t, E>(
        &self,
        text: &'t str,
        word: &mut dyn FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = 0;
        while at < text.len() {
            let Some(found) = self.regex.find(Input::new(text).range(at..)) else { break };
            let (start, mut end) = (found.start(), found.end());
            if self.gives_back && found.pattern().as_usize() == 1 && end < text.len() {
                let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
                if last < end - start {
                    end -= last;
                }
            }
            if end <= at {
                break;
            }
            if at < start {
                word(&text[at..start])?;
            }
            word(&text[start..end])?;
            at = end;
        }
        if at < text.len() { word(&text[at..]) } else { Ok(()) }
    }
}

impl Words {
    /// The pipeline of these sections of a tokenizer's JSON, if it has a shape that is known here.
    /// `merges_within_words` says that no token has a space inside.
    pub(super) fn of(
        normalizer: &Value,
        cut: &Value,
        merges_within_words: impl FnOnce() -> bool,
    ) -> Option<Self> {
        let shape = match (normalizer, cut) {
            (Value::Null, _) => Shape::Bytes(byte_level(cut)?),
            _ => {
                let prefix = writes_spaces(normalizer)?;
                if !leaves_words_whole(cut) || !merges_within_words() {
                    return None;
                }
                Shape::Spaces { prefix }
            }
        };
        Some(Self { shape, remembered: Default::default() })
    }

    /// Whether what is written for a text begins with a space that is not in it.
    fn prefixes(&self) -> bool {
        matches!(self.shape, Shape::Spaces { prefix: true })
    }

    /// Calls `ids` with what the model is to make tokens of, word after word, unless it is remembered.
    pub(super) fn encode<E>(
        &self,
        text: &str,
        parse_special: bool,
        out: &mut Vec<u32>,
        mut ids: impl FnMut(&str, &mut Vec<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        // When another thread holds the memory, this one goes without.
        let mut remembered = self.remembered[usize::from(parse_special)].try_lock().ok();
        let mut spelled = String::new();
        let mut first = self.prefixes();
        self.each(text, &mut |word| {
            // The first word is written with the space in front, so it is another word.
            let prefixed = std::mem::take(&mut first);
            let memory = remembered.as_deref_mut().filter(|_| !prefixed);
            if let Some(known) = memory.as_ref().and_then(|memory| memory.get(word)) {
                out.extend_from_slice(known);
                return Ok(());
            }
            let start = out.len();
            spelled.clear();
            self.spell(word, prefixed, &mut spelled);
            ids(&spelled, out)?;
            if let Some(memory) = memory {
                memory.keep(word, &out[start..]);
            }
            Ok(())
        })
    }

    fn each<'t, E>(
        &self,
        text: &'t str,
        word: &mut dyn FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        fn walk<'t, E>(
            cuts: &[Cut],
            text: &'t str,
            word: &mut dyn FnMut(&'t str) -> Result<(), E>,
        ) -> Result<(), E> {
            match cuts {
                [] => word(text),
                [cut, rest @ ..] => cut.each(text, &mut |part| walk(rest, part, word)),
            }
        }
        match &self.shape {
            Shape::Bytes(_) if text.is_empty() => Ok(()),
            Shape::Bytes(cuts) => walk(cuts, text, word),
            Shape::Spaces { .. } => {
                let mut start = 0;
                let mut in_spaces = true;
                for (at, c) in text.char_indices() {
                    let is_space = c == ' ' || c == SPACE;
                    if is_space && !in_spaces {
                        word(&text[start..at])?;
                        start = at;
                    }
                    in_spaces = is_space;
                }
                if start < text.len() { word(&text[start..]) } else { Ok(()) }
            }
        }
    }

    /// A word as the model reads it.
    fn spell(&self, word: &str, prefixed: bool, out: &mut String) {
        match self.shape {
            Shape::Bytes(_) => out.extend(word.bytes().map(|byte| CHARS[usize::from(byte)])),
            Shape::Spaces { .. } => {
                if prefixed {
                    out.push(SPACE);
                }
                out.extend(word.chars().map(|c| if c == ' ' { SPACE } else { c }));
            }
        }
    }
}

/// The character of each byte in the code of byte-level BPE.
static CHARS: [char; 256] = {
    let mut chars = ['\0'; 256];
    let (mut byte, mut next) = (0, 0x100);
    while byte < 256 {
        let printable = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if printable { byte as u32 } else { next };
        next += !printable as u32;
        if let Some(c) = char::from_u32(code) {
            chars[byte] = c;
        }
        byte += 1;
    }
    chars
};

/// The cuts of a byte-level pipeline.
fn byte_level(cut: &Value) -> Option<Vec<Cut>> {
    let alone = std::slice::from_ref(cut);
    let steps = cut["pretokenizers"].as_array().map_or(alone, Vec::as_slice);
    let (last, before) = steps.split_last()?;
    let mut cuts = before.iter().map(pattern_of).collect::<Option<Vec<_>>>()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    match last["use_regex"].as_bool() {
        Some(false) => {}
        // As the crate reads a file without the key.
        Some(true) | None => cuts.push(super::cuts::GPT_2.into()),
    }
    cuts.iter().map(|pattern| Cut::new(pattern)).collect()
}

/// The pattern that a step of a pipeline isolates.
fn pattern_of(step: &Value) -> Option<Cow<'static, str>> {
    match step["type"].as_str()? {
        "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
            Some(step["pattern"]["Regex"].as_str()?.to_owned().into())
        }
        "Digits" if step["individual_digits"] == true => Some(r"\p{N}".into()),
        "Digits" => Some(r"\p{N}+".into()),
        _ => None,
    }
}

/// Whether a normalizer only writes spaces as [`SPACE`], and whether it puts one in front.
fn writes_spaces(normalizer: &Value) -> Option<bool> {
    let alone = std::slice::from_ref(normalizer);
    let steps = normalizer["normalizers"].as_array().map_or(alone, Vec::as_slice);
    let space = SPACE.to_string();
    let replaces = |step: &Value| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == space
    };
    let prepends = |step: &Value| step["type"] == "Prepend" && step["prepend"] == space;
    match steps {
        [only] if replaces(only) => Some(false),
        [first, second] if prepends(first) && replaces(second) => Some(true),
        _ => None,
    }
}

/// Whether cutting at the spaces of a text, of which the normalizer has left none, changes nothing more
/// than merging word by word does.
fn leaves_words_whole(cut: &Value) -> bool {
    let steps = cut["pretokenizers"].as_array();
    match steps.map(Vec::as_slice) {
        Some([step]) => pattern_of(step).is_some_and(|p| *p == *super::vocab::word_pattern()),
        Some(_) => false,
        // Gemma's files cut at spaces after having replaced them.
        None => cut.is_null() || cut["type"] == "Split" && cut["pattern"]["String"] == " ",
    }
}

/// Words and their ids, at most so many.
#[derive(Default)]
struct Remembered {
    places: HashMap<Box<str>, (u32, u32)>,
    ids: Vec<u32>,
}

/// Most words that are remembered: of natural text a large part, and two megabytes.
const MOST_WORDS: usize = 1 << 15;
/// Bytes of the longest word that is.
const LONGEST: usize = 48;

impl Remembered {
    fn get(&self, word: &str) -> Option<&[u32]> {
        let (start, count) = *self.places.get(word)?;
        self.ids.get(start as usize..)?.get(..count as usize)
    }

    fn keep(&mut self, word: &str, ids: &[u32]) {
        if word.len() > LONGEST {
            return;
        }
        if self.places.len() == MOST_WORDS {
            self.places.clear();
            self.ids.clear();
        }
        let place = (self.ids.len() as u32, ids.len() as u32);
        self.places.insert(word.into(), place);
        self.ids.extend_from_slice(ids);
    }
}
