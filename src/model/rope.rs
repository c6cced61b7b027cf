//! Rotary position embedding (Su et al. 2021), and how models stretch it to longer texts.
//!
//! Every way to stretch it comes down to one divisor for each frequency and one factor on the rotated
//! vectors, so nothing behind this module knows which way a model took. Angles and their sines are
//! computed in f64 by portable code, so they are the same on every platform.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::file::metadata::Metadata;
use crate::memory::Aligned;
use crate::threads::Pool;
use std::f64::consts::PI;

/// Which floats of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `2 i` with `2 i + 1`: Llama weights as GGUF stores them.
    Neighbours,
    /// `i` with `i + rotated / 2`.
    Halves,
}

/// The rotary embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Leading floats of a head that are rotated.
    pub dim: usize,
    /// Which of them turn together.
    pub pairing: Pairing,
    /// The frequencies' divisors; none for all ones.
    pub divisors: Vec<f32>,
    /// What holds instead for sequences that may come to more tokens than so many (LongRoPE).
    pub long: Option<(usize, Vec<f32>)>,
    /// Multiplied onto rotated vectors.
    pub magnitude: f64,
}

/// The keys that are read here, below the architecture's name.
pub(super) const KEYS: &[&str] = &[
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.low_freq_factor",
    "rope.scaling.high_freq_factor",
    DIVISORS,
    LONG_DIVISORS,
    // Whether the model was trained further after it was stretched: of interest to people.
    "rope.scaling.finetuned",
];

/// One divisor for each frequency.
pub(super) const DIVISORS: &str = "rope.scaling.divisors";
/// The divisors for long sequences.
pub(super) const LONG_DIVISORS: &str = "rope.scaling.long_divisors";

impl Rope {
    /// Reads the keys of `architecture`, whose heads have `head_dim` floats.
    pub(super) fn read(
        metadata: &Metadata,
        architecture: &str,
        pairing: Pairing,
        head_dim: usize,
        context: usize,
    ) -> Result<Self> {
        let key = |suffix: &str| format!("{architecture}.{suffix}");
        let positive = |suffix: &str| positive(metadata, &key(suffix));
        let count = |suffix: &str| metadata.integer(&key(suffix), 1 << 24);
        let dim = count("rope.dimension_count")?.map_or(head_dim, |count| count as usize);
        if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
            let reason = format!("{dim} of the {head_dim} floats of a head cannot be rotated");
            return Err(metadata.error(&key("rope.dimension_count"), reason));
        }
        let theta = positive("rope.freq_base")?.unwrap_or(10_000.0);
        let mut rope =
            Self { theta, dim, pairing, divisors: Vec::new(), long: None, magnitude: 1.0 };

        let divisors = |suffix: &str| divisors(metadata, &key(suffix), dim / 2);
        let listed = divisors(DIVISORS)?;
        let long = divisors(LONG_DIVISORS)?;
        let linear = positive("rope.scale_linear")?.filter(|factor| *factor != 1.0);
        let kind = match metadata.text(&key("rope.scaling.type"))? {
            Some(kind) => kind,
            None if long.is_some() => "longrope",
            None if linear.is_some() => "linear",
            None => "none",
        };
        let required = |suffix: &str, value: Option<f64>| metadata.required(&key(suffix), value);
        let original = count("rope.scaling.original_context_length")?;
        let factor = positive("rope.scaling.factor")?.or(linear);
        // A list beside a way that makes one of its own would leave open which of them holds.
        if listed.is_some() && matches!(kind, "linear" | "yarn" | "llama3") {
            let reason = format!("lists divisors beside a scaling of the type {kind}");
            return Err(metadata.error(&key(DIVISORS), reason));
        }
        if long.is_some() && kind != "longrope" {
            let reason = format!("is for longrope, but the scaling is of the type {kind}");
            return Err(metadata.error(&key(LONG_DIVISORS), reason));
        }
        match kind {
            // GGUF files of Llama 3 list the divisors and name no type.
            "none" => rope.divisors = listed.unwrap_or_default(),
            "linear" => {
                rope.divisors = vec![required("rope.scaling.factor", factor)? as f32; dim / 2];
            }
            "yarn" => {
                let factor = required("rope.scaling.factor", factor)?;
                let original = original.map_or(context, |count| count as usize);
                let fast = positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0);
                let slow = positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0);
                rope.divisors = yarn(theta, dim, factor, original, (fast, slow));
                let attention = positive("rope.scaling.attn_factor")?;
                let attention = attention.or(positive("rope.scaling.yarn_attn_factor")?);
                let by_factor = if factor > 1.0 { 0.1 * libm::log(factor) + 1.0 } else { 1.0 };
                rope.magnitude = attention.unwrap_or(1.0) * by_factor;
            }
            "llama3" => {
                let of = |suffix: &str| required(suffix, positive(suffix)?);
                let factor = of("rope.scaling.factor")?;
                let original = of("rope.scaling.original_context_length")?;
                let low = of("rope.scaling.low_freq_factor")?;
                let high = of("rope.scaling.high_freq_factor")?;
                rope.divisors = llama3(theta, dim, factor, original, (low, high));
            }
            "longrope" => {
                let name = "rope.scaling.original_context_length";
                let original = required(name, original.map(|count| count as f64))? as usize;
                rope.divisors = metadata.required(&key(DIVISORS), listed)?;
                let long = metadata.required(&key(LONG_DIVISORS), long)?;
                let stretch = context as f64 / original as f64;
                rope.magnitude = match positive("rope.scaling.attn_factor")? {
                    Some(factor) => factor,
                    None if stretch <= 1.0 => 1.0,
                    // Ding et al. 2024, LongRoPE.
                    None => libm::sqrt(1.0 + libm::log(stretch) / libm::log(original as f64)),
                };
                rope.long = Some((original, long));
            }
            other => {
                let what = format!(
                    "rotary scaling of the type {other}; known are none, linear, llama3, yarn and longrope"
                );
                return Err(crate::error::Error::Unsupported(what));
            }
        }
        Ok(rope)
    }

    /// The same heads with another base and nothing stretched.
    pub(super) fn plain(&self, theta: f64) -> Self {
        Self { theta, divisors: Vec::new(), long: None, magnitude: 1.0, ..self.clone() }
    }

    /// Whether a sequence that may come to `context` tokens is rotated as a long one.
    #[must_use]
    pub fn is_long(&self, context: usize) -> bool {
        self.long.as_ref().is_some_and(|(original, _)| context > *original)
    }

    /// Radians that pair `i` turns with each position.
    fn frequencies(&self, context: usize) -> Vec<f64> {
        let divisors = match &self.long {
            Some((_, long)) if self.is_long(context) => long,
            _ => &self.divisors,
        };
        let divisor = |i: usize| divisors.get(i).map_or(1.0, |divisor| f64::from(*divisor));
        (0..self.dim / 2).map(|i| frequency(self.theta, self.dim, i) / divisor(i)).collect()
    }
}

fn frequency(theta: f64, dim: usize, i: usize) -> f64 {
    libm::pow(theta, -2.0 / dim as f64 * i as f64)
}

/// A number above zero, if the key is there.
pub(super) fn positive(metadata: &Metadata, key: &str) -> Result<Option<f64>> {
    match metadata.number(key)? {
        Some(number) if number <= 0.0 => Err(metadata.error(key, "is not above zero")),
        number => Ok(number),
    }
}

/// A list of as many divisors as there are frequencies, if the key is there.
fn divisors(metadata: &Metadata, key: &str, count: usize) -> Result<Option<Vec<f32>>> {
    use crate::file::metadata::Value;
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::Floats(list)) if list.len() != count => {
            let reason = format!("{} divisors for {count} frequencies", list.len());
            Err(metadata.error(key, reason))
        }
        Some(Value::Floats(list)) if list.iter().all(|x| x.is_normal() && *x > 0.0) => {
            Ok(Some(list.clone()))
        }
        Some(_) => Err(metadata.error(key, "is not a list of numbers above zero")),
    }
}

/// The divisors of YaRN (Peng et al. 2023): what turns more than `fast` times within the original
/// context stays, what turns less than `slow` times is stretched by the factor.
fn yarn(
    theta: f64,
    dim: usize,
    factor: f64,
    original: usize,
    (fast, slow): (f64, f64),
) -> Vec<f32> {
    let place = |turns: f64| {
        let length = original as f64 / (turns * 2.0 * PI);
        dim as f64 * libm::log(length) / (2.0 * libm::log(theta))
    };
    let low = libm::floor(place(fast)).max(0.0);
    let high = libm::ceil(place(slow)).min(dim as f64 - 1.0);
    let width = if low == high { 0.001 } else { high - low };
    let divisor = |i: usize| {
        let stretched = ((i as f64 - low) / width).clamp(0.0, 1.0);
        1.0 / (stretched / factor + 1.0 - stretched)
    };
    (0..dim / 2).map(|i| divisor(i) as f32).collect()
}

/// The divisors of Llama 3.1: waves longer than `original / low` positions are stretched by the factor,
/// those shorter than `original / high` stay.
fn llama3(theta: f64, dim: usize, factor: f64, original: f64, (low, high): (f64, f64)) -> Vec<f32> {
    let divisor = |i: usize| {
        let length = 2.0 * PI / frequency(theta, dim, i);
        if length < original / high {
            1.0
        } else if length > original / low {
            factor
        } else {
            let kept = (original / length - low) / (high - low);
            1.0 / ((1.0 - kept) / factor + kept)
        }
    };
    (0..dim / 2).map(|i| divisor(i) as f32).collect()
}

/// The sines of a chunk of positions, filled anew for each chunk.
pub(super) struct RopeTable {
    pairing: Pairing,
    magnitude: f64,
    frequencies: Vec<f64>,
    cos: Aligned<f32>,
    sin: Aligned<f32>,
}

impl RopeTable {
    /// Room for `most` positions of sequences that may come to `context` tokens.
    pub(super) fn new(rope: &Rope, most: usize, context: usize) -> Result<Self> {
        let pairs = rope.dim / 2;
        Ok(Self {
            pairing: rope.pairing,
            magnitude: rope.magnitude,
            frequencies: rope.frequencies(context),
            cos: Aligned::zeroed("rotary table", most * pairs)?,
            sin: Aligned::zeroed("rotary table", most * pairs)?,
        })
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.cos.bytes() + self.sin.bytes()
    }

    /// Prepares the angles of rows at these positions.
    pub(super) fn fill(&mut self, positions: impl Iterator<Item = usize>) {
        let pairs = self.frequencies.len();
        for (row, position) in positions.enumerate() {
            for (i, frequency) in self.frequencies.iter().enumerate() {
                let (sin, cos) = libm::sincos(position as f64 * frequency);
                self.cos[row * pairs + i] = (cos * self.magnitude) as f32;
                self.sin[row * pairs + i] = (sin * self.magnitude) as f32;
            }
        }
    }

    /// Rotates every head of rows of `width` floats.
    pub(super) fn rotate(&self, pool: &Pool, head_dim: usize, width: usize, rows: &mut [f32]) {
        let pairs = self.frequencies.len();
        pool.chunks_mut(rows, width, &|row, x| {
            let cos = &self.cos[row * pairs..(row + 1) * pairs];
            let sin = &self.sin[row * pairs..(row + 1) * pairs];
            for head in x.chunks_exact_mut(head_dim) {
                match self.pairing {
                    Pairing::Neighbours => {
                        let pairs = head.as_chunks_mut::<2>().0.iter_mut();
                        for (([a, b], cos), sin) in pairs.zip(cos).zip(sin) {
                            turn(a, b, *cos, *sin);
                        }
                    }
                    Pairing::Halves => {
                        let (first, second) = head[..2 * pairs].split_at_mut(pairs);
                        let pairs = first.iter_mut().zip(second);
                        for (((a, b), cos), sin) in pairs.zip(cos).zip(sin) {
                            turn(a, b, *cos, *sin);
                        }
                    }
                }
            }
        });
    }
}

fn turn(a: &mut f32, b: &mut f32, cos: f32, sin: f32) {
    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::metadata::Value;

    fn read(pairs: &[(&str, Value)]) -> Result<Rope> {
        let mut metadata = Metadata::new("test.gguf");
        for (key, value) in pairs {
            metadata.set(&format!("x.rope.{key}"), value.clone());
        }
        Rope::read(&metadata, "x", Pairing::Halves, 8, 64)
    }

    fn text(text: &str) -> Value {
        Value::Text(text.into())
    }

    #[test]
    fn what_stretches_the_wavelengths_becomes_divisors() {
        let plain = read(&[]).unwrap();
        assert_eq!((plain.theta, plain.dim, plain.divisors.len()), (10_000.0, 8, 0));
        let linear = [("scaling.type", text("linear")), ("scaling.factor", Value::Float(4.0))];
        assert_eq!(read(&linear).unwrap().divisors, [4.0; 4]);
        assert_eq!(read(&[("scale_linear", Value::Float(2.0))]).unwrap().divisors, [2.0; 4]);
        let yarn = [("scaling.type", text("yarn")), ("scaling.factor", Value::Float(4.0))];
        let yarn = read(&yarn).unwrap();
        assert_eq!((yarn.divisors[0], yarn.divisors[3]), (1.0, 4.0));
        assert!((yarn.magnitude - 1.138_629).abs() < 1e-6);
    }

    #[test]
    #[cfg_attr(miri, ignore = "libm takes square roots in assembly")]
    fn long_texts_have_divisors_of_their_own() {
        let pairs = [
            ("scaling.divisors", Value::Floats(vec![1.0; 4])),
            ("scaling.long_divisors", Value::Floats(vec![2.0; 4])),
            ("scaling.original_context_length", Value::Unsigned(16)),
        ];
        let rope = read(&pairs).unwrap();
        assert!(!rope.is_long(16) && rope.is_long(17));
        assert_eq!(rope.frequencies(17)[0], 0.5);
        assert!((rope.magnitude - 1.5_f64.sqrt()).abs() < 1e-12);
        assert!(read(&pairs[..2]).is_err() && read(&pairs[1..]).is_err());
    }

    #[test]
    fn contradictions_and_unknown_types_are_refused() {
        let list = |n: usize| ("scaling.divisors", Value::Floats(vec![1.0; n]));
        let factor = ("scaling.factor", Value::Float(2.0));
        for pairs in [
            vec![("scaling.type", text("dynamic"))],
            vec![("scaling.type", text("longrope"))],
            vec![("scaling.type", text("linear"))],
            vec![("scaling.type", text("linear")), factor, list(4)],
            vec![list(3)],
            vec![("scaling.divisors", Value::Floats(vec![1.0, 0.0, 1.0, 1.0]))],
            vec![("dimension_count", Value::Unsigned(7))],
            vec![("freq_base", Value::Float(0.0))],
        ] {
            assert!(read(&pairs).is_err(), "{pairs:?}");
        }
    }
}
