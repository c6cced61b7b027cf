//! How byte-level vocabularies cut text into words before they merge bytes: regexes by name.

use serde_json::{Value, json};
/// How one family of models cuts text into words before it merges bytes.
pub(super) struct Cut {
    pub(super) names: &'static [&'static str],
    /// Applied one after the other, each to what the one before made.
    pub(super) patterns: &'static [&'static str],
    /// Whether a word that is a token needs no merges to become it.
    pub(super) whole_words: bool,
    pub(super) begins_with_bos: bool,
}

impl Cut {
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        CUTS.iter().find(|cut| cut.names.contains(&name))
    }
}

pub(super) const fn cut(names: &'static [&'static str], patterns: &'static [&'static str]) -> Cut {
    Cut { names, patterns, whole_words: false, begins_with_bos: false }
}

pub(super) const GPT_2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub(super) const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const QWEN_35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const MINICPM_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(super) const BAILING: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
pub(super) const DEEPSEEK_3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// The pre-tokenizers of llama.cpp for models of the Llama kind, by the names that GGUF files use.
/// Where llama.cpp rewrote a pattern for its own regex engine, this is the model's original.
#[rustfmt::skip]
pub(super) const CUTS: &[Cut] = &[
    cut(&["default", ""], &[r"[\p{P}$+<=>^~|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    cut(
        &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat",
          "a.x-4.0", "mellum", "exaone4"],
        &[GPT_2],
    ),
    cut(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
          "mellum2"],
        &[r"\p{N}", GPT_2],
    ),
    cut(&["falcon"], &[r"[\p{P}$+<=>^~|`]+", GPT_2, "[0-9][0-9][0-9]"]),
    Cut {
        whole_words: true,
        begins_with_bos: true,
        ..cut(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
              "lfm2"],
            &[LLAMA_3],
        )
    },
    cut(&["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], &[LLAMA_3]),
    cut(
        &["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo", "solar-open",
          "grok-2"],
        &[QWEN_2],
    ),
    cut(&["qwen35"], &[QWEN_35]),
    cut(&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[GPT_4O]),
    Cut { whole_words: true, begins_with_bos: true, ..cut(&["tekken"], &[TEKKEN]) },
    Cut { whole_words: true, ..cut(&["minicpm5"], &[r"\p{N}{1,3}", MINICPM_5]) },
    cut(&["seed-coder"], &[SEED]),
    cut(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    cut(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[r"\p{N}{1,3}", r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+", DEEPSEEK_3],
    ),
    cut(
        &["deepseek-coder"],
        &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
          r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+", r"\p{N}"],
    ),
];

/// A pre-tokenizer that makes every match, and everything between two matches, a word.
pub(super) fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

pub(super) fn sequence(steps: &[Value]) -> Value {
    if steps.is_empty() {
        return Value::Null;
    }
    json!({"type": "Sequence", "pretokenizers": steps})
}
