//! Scores of a vocabulary, and the largest of every block of them.
//!
//! A sampler keeps some dozens of 30 to 260 thousand tokens. A block whose largest score is below the k-th of those
//! largest has none of the k best, so whoever knows them looks at few scores. The matmul that makes the scores finds
//! them while its outputs are in the first cache ([`super::Kernels::score`]).
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::memory::Aligned;

/// Scores in a block; the last one of a row may have fewer.
pub const BLOCK: usize = 64;

/// Rows of scores.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    /// One row of the vocabulary's length after the other.
    pub logits: &'a [f32],
    /// For each row the largest of every block, as [`maxima`] has them; where nobody looked for them, none.
    pub maxima: Option<&'a [f32]>,
}

impl<'a> From<&'a [f32]> for Scores<'a> {
    fn from(logits: &'a [f32]) -> Self {
        Self { logits, maxima: None }
    }
}

impl Scores<'_> {
    /// Row `row` of a vocabulary of `vocab` tokens.
    ///
    /// # Panics
    /// When there is no such row.
    #[must_use]
    pub fn row(self, row: usize, vocab: usize) -> Self {
        let blocks = vocab.div_ceil(BLOCK);
        Self {
            logits: &self.logits[row * vocab..][..vocab],
            maxima: self.maxima.map(|maxima| &maxima[row * blocks..][..blocks]),
        }
    }
}

/// The largest of every block of one row, minus infinity where all are that or NaN.
pub fn maxima(row: &[f32]) -> impl Iterator<Item = f32> {
    row.chunks(BLOCK).map(largest)
}

fn largest(scores: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    // In lanes, of which the compiler makes vectors.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = scores.chunks_exact(lanes.len());
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *score);
        }
    }
    lanes.into_iter().fold(rest, larger)
}

/// One row of scores, kept.
pub struct Kept {
    logits: Aligned<f32>,
    maxima: Aligned<f32>,
    knows_maxima: bool,
}

impl Kept {
    /// Zeros for a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn zeroed(vocab: usize) -> Result<Self> {
        Ok(Self {
            logits: Aligned::zeroed("logits", vocab)?,
            maxima: Aligned::zeroed("the largest logits", vocab.div_ceil(BLOCK))?,
            knows_maxima: false,
        })
    }

    /// The bytes of one for a vocabulary of `vocab` tokens.
    #[must_use]
    pub const fn bytes_for(vocab: usize) -> usize {
        (4 * vocab).next_multiple_of(64) + (4 * vocab.div_ceil(BLOCK)).next_multiple_of(64)
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        Self::bytes_for(self.logits.len())
    }

    /// Becomes a copy of `row`.
    ///
    /// # Panics
    /// When the vocabulary is another.
    pub fn copy(&mut self, row: Scores<'_>) {
        self.logits.copy_from_slice(row.logits);
        self.knows_maxima = row.maxima.is_some();
        if let Some(maxima) = row.maxima {
            self.maxima.copy_from_slice(maxima);
        }
    }

    /// The row.
    #[must_use]
    pub fn scores(&self) -> Scores<'_> {
        Scores { logits: &self.logits, maxima: self.knows_maxima.then_some(&self.maxima) }
    }
}
