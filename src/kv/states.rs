//! The running states of attention: what a query row has summed over the positions it has seen so far.
//!
//! The softmax is taken online (Milakov and Gimelshein 2018): sums stand for weights relative to the largest score
//! so far. Two states of the same row, each over positions of its own, are joined into one over both.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::kernel::{LANES, exp};
use crate::memory::{self, Aligned};

/// The running state of query rows: largest score, sums of weights, weighted sums of values.
pub(super) struct States {
    max: Vec<f32>,
    pub(super) sum: Aligned<f32>,
    pub(super) acc: Aligned<f32>,
}

impl States {
    pub(super) fn new(rows: usize, padded_dim: usize) -> Result<Self> {
        Ok(Self {
            max: memory::zeroed("attention maxima", rows)?,
            sum: Aligned::zeroed("attention weights", rows * LANES)?,
            acc: Aligned::zeroed("attention sums", rows * padded_dim)?,
        })
    }

    pub(super) fn runs(
        &mut self,
        rows: usize,
        padded_dim: usize,
    ) -> impl Iterator<Item = State<'_>> {
        State { max: &mut self.max, sum: &mut self.sum, acc: &mut self.acc }.runs(rows, padded_dim)
    }

    pub(super) fn bytes(&self) -> usize {
        4 * self.max.len() + self.sum.bytes() + self.acc.bytes()
    }
}

/// The states of some rows.
pub(super) struct State<'a> {
    pub(super) max: &'a mut [f32],
    pub(super) sum: &'a mut [f32],
    pub(super) acc: &'a mut [f32],
}

impl<'a> State<'a> {
    /// The states of `rows` rows at a time.
    pub(super) fn runs(self, rows: usize, padded_dim: usize) -> impl Iterator<Item = State<'a>> {
        let runs = self.max.chunks_mut(rows).zip(self.sum.chunks_mut(rows * LANES));
        let runs = runs.zip(self.acc.chunks_mut(rows * padded_dim));
        runs.map(|((max, sum), acc)| State { max, sum, acc })
    }

    /// Whether a row has seen nothing. Even scores that are all NaN or minus infinity leave their mark.
    pub(super) fn is_empty(&self, row: usize) -> bool {
        self.max[row] == f32::NEG_INFINITY && self.sum[row * LANES..][..LANES] == [0.0; LANES]
    }

    pub(super) fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.acc.fill(0.0);
    }

    /// Adds the state of `row` in `part`, which has seen something, to this one.
    pub(super) fn join(&mut self, row: usize, part: &State<'_>, padded_dim: usize) {
        let lanes = row * LANES..(row + 1) * LANES;
        let sums = row * padded_dim..(row + 1) * padded_dim;
        let (ours, theirs) = (self.max[row], part.max[row]);
        if self.is_empty(row) {
            self.max[row] = theirs;
            self.sum[lanes.clone()].copy_from_slice(&part.sum[lanes]);
            self.acc[sums.clone()].copy_from_slice(&part.acc[sums]);
            return;
        }
        // A factor of one changes nothing, so it does not matter on which side it is.
        let (keep, add) =
            if theirs > ours { (exp(ours - theirs), 1.0) } else { (1.0, exp(theirs - ours)) };
        self.max[row] = if theirs > ours { theirs } else { ours };
        let join = |ours: &mut [f32], theirs: &[f32]| {
            for (ours, theirs) in ours.iter_mut().zip(theirs) {
                *ours = *ours * keep + theirs * add;
            }
        };
        join(&mut self.sum[lanes.clone()], &part.sum[lanes]);
        join(&mut self.acc[sums.clone()], &part.acc[sums]);
    }
}
