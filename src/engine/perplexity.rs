//! How well a model predicts a text, and how far its predictions are from those of another.
//!
//! Windows are those of llama.cpp's perplexity tool, so that figures can be compared: without a stride they
//! follow one another and the tokens of their second half count, each predicted from at least half a
//! window; with one they overlap, and the last `stride` tokens of each count. The first token of a window
//! is replaced by the one that begins a sequence, where the model wants that.
#![forbid(unsafe_code)]

use super::load::Model;
use super::score::Scorer;
use crate::error::{Error, Result};
use crate::kernel::KvFormat;
use crate::model::forward::Logits;
use std::ops::Range;

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Tokens in a window; at least 4.
    pub context: usize,
    /// Tokens between the starts of two windows, less than a window; none for windows that do not overlap.
    pub stride: Option<usize>,
    /// Most windows; none for all that the text has.
    pub windows: Option<usize>,
    /// Tokens that go through the layers together; changes no bit of the result.
    pub chunk: usize,
    /// Replaces the first token of each window.
    pub begin: Option<u32>,
    /// How keys and values are kept.
    pub kv_format: KvFormat,
}

impl Options {
    /// The tokens of a window that count: each is predicted from all before it.
    fn counted(&self) -> Range<usize> {
        match self.stride {
            None => self.context / 2 + 1..self.context,
            Some(stride) => self.context - stride..self.context,
        }
    }

    fn windows(&self, tokens: usize) -> Result<usize> {
        let wrong = |what: String| Err(Error::InvalidArgument(what));
        if self.context < 4 {
            return wrong(format!("a context of {} tokens: at least 4", self.context));
        }
        if self.stride.is_some_and(|stride| !(1..self.context).contains(&stride)) {
            return wrong(format!("a stride must be 1 to {}", self.context - 1));
        }
        let step = self.stride.unwrap_or(self.context);
        let Some(rest) = tokens.checked_sub(self.context) else {
            return wrong(format!(
                "the text has {tokens} tokens, which fill no window of {}: take a longer text or a \
                 shorter context",
                self.context
            ));
        };
        let all = rest / step + 1;
        Ok(self.windows.map_or(all, |most| most.min(all)).max(1))
    }
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Tokens that count.
    pub tokens: usize,
    /// Windows.
    pub windows: usize,
    /// `exp` of the mean of `-ln p` of the tokens that count.
    pub perplexity: f64,
    /// One standard error of it.
    pub perplexity_error: f64,
    /// The comparison with a reference.
    pub against: Option<Comparison>,
}

/// How far predictions are from those of a reference, at every token that counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Comparison {
    /// Perplexity of the reference.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence from the reference, in nats.
    pub kl_divergence: f64,
    /// One standard error of it.
    pub kl_error: f64,
    /// Its median.
    pub kl_median: f64,
    /// What 99% of the tokens stay below.
    pub kl_99: f64,
    /// The largest.
    pub kl_max: f64,
    /// The share of tokens where both find the same token likeliest, 0 to 1.
    pub top1_agreement: f64,
    /// Root of the mean square of the change of the probability of the text's own token.
    pub rms_delta_p: f64,
}

/// One token that counts.
#[derive(Clone, Copy, Default)]
struct Row {
    loss: f64,
    reference: Option<RowReference>,
}

#[derive(Clone, Copy, Default)]
struct RowReference {
    loss: f64,
    divergence: f64,
    agrees: bool,
}

/// Runs `tokens` through `model`, and through `reference` if there is one, window by window; after each
/// `progress` gets the report so far and the number of windows to come to.
///
/// # Errors
/// [`Error::InvalidArgument`] for options that make no sense, a text shorter than a window, and a
/// reference of another vocabulary; [`Error::ContextFull`] for windows longer than a model was trained
/// for; [`Error::OutOfMemory`].
pub fn perplexity(
    model: &Model,
    reference: Option<&Model>,
    tokens: &[u32],
    options: &Options,
    mut progress: impl FnMut(&Report, usize),
) -> Result<Report> {
    let vocab = model.vocab();
    if let Some(reference) = reference.filter(|reference| reference.vocab() != vocab) {
        return Err(Error::InvalidArgument(format!(
            "{} has {} tokens in its vocabulary, {} has {vocab}",
            reference.file(),
            reference.vocab(),
            model.file(),
        )));
    }
    let windows = options.windows(tokens.len())?;
    let chunk = options.chunk.min(options.context);
    let scorer = |model| Scorer::new(model, options.kv_format, options.context, chunk);
    let mut own = scorer(model)?;
    let mut other = reference.map(scorer).transpose()?;
    let counted = options.counted();
    let mut all: Vec<Row> = Vec::new();
    let mut report = Report::default();
    for window in 0..windows {
        let start = window * options.stride.unwrap_or(options.context);
        let text = &tokens[start..start + options.context];
        own.restart();
        other.iter_mut().for_each(Scorer::restart);
        let mut input = text.to_vec();
        if let Some(begin) = options.begin {
            input[0] = begin;
        }
        for (piece, input) in input.chunks(chunk).enumerate() {
            let first = piece * chunk;
            // The row after token i predicts token i + 1.
            let rows = first.max(counted.start - 1)..(first + input.len()).min(counted.end - 1);
            let want = if rows.is_empty() { Logits::None } else { Logits::All };
            let scores = own.push(input, want)?;
            let compared = other.as_mut().map(|other| other.push(input, want)).transpose()?;
            if rows.is_empty() {
                continue;
            }
            let from = all.len();
            all.resize(from + rows.len(), Row::default());
            model.runtime().pool().chunks_mut(&mut all[from..], 1, &|index, slot| {
                let row = rows.start + index;
                let own = scores.row(row - first, vocab).logits;
                let reference = compared.map(|scores| scores.row(row - first, vocab).logits);
                slot[0] = Row::of(own, reference, text[row + 1] as usize);
            });
        }
        report = summary(&all, window + 1);
        progress(&report, windows);
    }
    Ok(report)
}

impl Row {
    fn of(logits: &[f32], reference: Option<&[f32]>, token: usize) -> Self {
        let (top, total) = likeliest_and_total(logits);
        let loss = total - f64::from(logits[token]);
        let reference = reference.map(|reference| {
            let (reference_top, reference_total) = likeliest_and_total(reference);
            let divergence = logits.iter().zip(reference).map(|(q, p)| {
                let (q, p) = (f64::from(*q) - total, f64::from(*p) - reference_total);
                p.exp() * (p - q)
            });
            RowReference {
                loss: reference_total - f64::from(reference[token]),
                divergence: divergence.sum(),
                agrees: top == reference_top,
            }
        });
        Self { loss, reference }
    }
}

/// The first of the largest logits, and the logarithm of the sum of their exponentials.
fn likeliest_and_total(logits: &[f32]) -> (usize, f64) {
    let better = |best: usize, (id, x): (usize, &f32)| if *x > logits[best] { id } else { best };
    let top = logits.iter().enumerate().fold(0, better);
    let most = f64::from(logits[top]);
    let total: f64 = logits.iter().map(|x| (f64::from(*x) - most).exp()).sum();
    (top, most + total.ln())
}

/// Mean and one standard error.
fn mean(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / count;
    let squares = values.map(|x| (x - mean) * (x - mean)).sum::<f64>();
    (mean, (squares / (count - 1.0).max(1.0) / count).sqrt())
}

fn summary(rows: &[Row], windows: usize) -> Report {
    let (loss, error) = mean(rows.iter().map(|row| row.loss));
    let references: Option<Vec<_>> =
        rows.iter().map(|row| row.reference.map(|reference| (row.loss, reference))).collect();
    let against = references.map(|rows| {
        let mut sorted: Vec<_> = rows.iter().map(|(_, row)| row.divergence).collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
        let (kl_divergence, kl_error) = mean(sorted.iter().copied());
        let delta = |own: f64, row: &RowReference| (-own).exp() - (-row.loss).exp();
        let squares = rows.iter().map(|(own, row)| delta(*own, row) * delta(*own, row));
        Comparison {
            perplexity: mean(rows.iter().map(|(_, row)| row.loss)).0.exp(),
            kl_divergence,
            kl_error,
            kl_median: at(0.5),
            kl_99: at(0.99),
            kl_max: at(1.0),
            top1_agreement: mean(rows.iter().map(|(_, row)| f64::from(u8::from(row.agrees)))).0,
            rms_delta_p: mean(squares).0.sqrt(),
        }
    });
    let perplexity = loss.exp();
    let perplexity_error = error * perplexity;
    Report { tokens: rows.len(), windows, perplexity, perplexity_error, against }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: Options = Options {
        context: 8,
        stride: None,
        windows: None,
        chunk: 3,
        begin: None,
        kv_format: KvFormat::F32,
    };

    #[test]
    fn windows_are_those_of_the_definition() {
        // Of eight tokens the last three are predicted from half a window at least.
        assert_eq!(OPTIONS.counted(), 5..8);
        assert_eq!(OPTIONS.windows(8).unwrap(), 1);
        assert_eq!(OPTIONS.windows(23).unwrap(), 2);
        let strided = Options { stride: Some(3), ..OPTIONS };
        assert_eq!(strided.counted(), 5..8);
        assert_eq!(strided.windows(13).unwrap(), 2);
        assert_eq!(strided.windows(14).unwrap(), 3);
        assert!(Options { stride: Some(8), ..OPTIONS }.windows(100).is_err());
        assert!(Options { stride: Some(0), ..OPTIONS }.windows(100).is_err());
        let error = OPTIONS.windows(7).unwrap_err().to_string();
        assert!(error.contains("7 tokens"), "{error}");
    }

    #[test]
    fn a_row_by_hand() {
        // p = (1/4, 3/4) against the reference's (1/2, 1/2).
        let logits = [1000.0, 1000.0 + 3.0_f32.ln()];
        let row = Row::of(&logits, Some(&[-7.0, -7.0]), 0);
        let reference = row.reference.unwrap();
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-4, "{a} {b}");
        near(row.loss, 4.0_f64.ln());
        near(reference.loss, 2.0_f64.ln());
        near(reference.divergence, 0.5 * 2.0_f64.ln() + 0.5 * (2.0_f64 / 3.0).ln());
        assert!(!reference.agrees);
        let report = summary(&[row, row], 1);
        near(report.perplexity, 4.0);
        near(report.against.unwrap().rms_delta_p, 0.25);
    }
}
