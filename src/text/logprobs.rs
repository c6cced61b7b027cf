//! How probable the model thought a token was, and which others it thought of.
#![forbid(unsafe_code)]

use crate::kernel::Kernels;

/// Natural logarithms of probabilities, as the model gives them: at temperature one, before any bias, hook,
/// penalty or cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// That of the token.
    pub token: f32,
    /// The likeliest tokens with theirs, likeliest first, the lowest id first on ties.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Those of `token` and of the `most` likeliest, from the logits that it was chosen from. The same
    /// bits on every instruction set. A NaN has no probability.
    #[must_use]
    pub fn of(kernels: &Kernels, logits: &[f32], token: u32, most: usize) -> Self {
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        let usable = logits.iter().zip(0..).filter(|(logit, _)| **logit > f32::NEG_INFINITY);
        let mut top: Vec<(f32, u32)> = usable.map(|(logit, id)| (*logit, id)).collect();
        let Some(best) = top.iter().map(|(logit, _)| *logit).reduce(f32::max) else {
            return Self { token: f32::NEG_INFINITY, top: Vec::new() };
        };
        let mut weights: Vec<f32> = top.iter().map(|(logit, _)| *logit).collect();
        // The likeliest token has one part in the sum of all.
        let certainty = if best == f32::INFINITY {
            1.0
        } else {
            kernels.softmax(&mut weights);
            weights.iter().copied().fold(0.0, f32::max)
        };
        let of_best = libm::log(f64::from(certainty)) as f32;
        let logprob = |logit: f32| match logit {
            _ if logit == best => of_best,
            _ if logit > f32::NEG_INFINITY => logit - best + of_best,
            _ => f32::NEG_INFINITY,
        };
        let most = most.min(top.len());
        if most > 0 && most < top.len() {
            top.select_nth_unstable_by(most - 1, order);
        }
        top.truncate(most);
        top.sort_unstable_by(order);
        Self {
            token: logits.get(token as usize).map_or(f32::NEG_INFINITY, |logit| logprob(*logit)),
            top: top.into_iter().map(|(logit, id)| (id, logprob(logit))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn they_are_the_logarithms_of_the_softmax() {
        let kernels = Kernels::new(Isa::detect()).unwrap();
        let logits = [0.0, 2_f32.ln(), f32::NAN, 5_f32.ln(), f32::NEG_INFINITY];
        let found = Logprobs::of(&kernels, &logits, 1, 2);
        let near = |a: f32, b: f64| assert!((f64::from(a) - b.ln()).abs() < 1e-6, "{a} for {b}");
        near(found.token, 0.25);
        assert_eq!((found.top.len(), found.top[0].0, found.top[1].0), (2, 3, 1));
        near(found.top[0].1, 0.625);
        assert_eq!(found.top[1].1.to_bits(), found.token.to_bits());
        let all = Logprobs::of(&kernels, &logits, 2, 100);
        assert_eq!((all.token, all.top.len()), (f32::NEG_INFINITY, 3));
        // So improbable that the probability itself is no number above zero.
        let far = Logprobs::of(&kernels, &[0.0, -200.0], 1, 0);
        assert_eq!((far.token, far.top.len()), (-200.0, 0));
        let certain = Logprobs::of(&kernels, &[1.0, f32::INFINITY], 0, 1);
        assert_eq!((certain.token, certain.top[0]), (f32::NEG_INFINITY, (1, 0.0)));
        let none = Logprobs::of(&kernels, &[f32::NAN], 0, 1);
        assert_eq!((none.token, none.top.len()), (f32::NEG_INFINITY, 0));
    }
}
