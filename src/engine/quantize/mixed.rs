//! Which matrix gets how many bits, when a budget is to be spent where it helps most.
//!
//! Each matrix is rounded alone to 3, 4 and 8 bits, and the layer run with it: how far the residual stream
//! behind the layer moves is what the matrix costs. Then the upgrade that takes off most of it for a bit is
//! bought, until the budget is spent.
#![forbid(unsafe_code)]

use super::layer::{Floats, LINEARS, copy, matrix, pack_codes};
use super::streams::Streams;
use super::{Calibration, Options, method, table, tables_of};
use crate::error::{Error, Result};
use crate::file::nybl::Kind;
use crate::kernel::{Format, Layout};
use crate::quant::dense::Machine;
use std::collections::BTreeMap;

/// Sequences that matrices are tried on.
const SEQUENCES: usize = 4;

struct Candidate {
    name: String,
    /// Layout and cost of each choice, of ever more bits.
    choices: Vec<(Layout, f64)>,
    chosen: usize,
}

/// The formats of all matrices of the layers that fit into `budget` bits per weight.
///
/// # Errors
/// [`Error::InvalidArgument`] for a budget that three bits exceed already; as [`super::quantize`].
pub(super) fn assign(
    machine: Machine<'_>,
    floats: &Floats<'_>,
    options: &Options,
    calibration: Option<&Calibration>,
    budget: f64,
    advance: &mut impl FnMut(),
) -> Result<BTreeMap<String, Format>> {
    let Some(calibration) = calibration else {
        return Err(Error::InvalidArgument("mixed bits need a calibration text".into()));
    };
    let embedding = &floats.checkpoint.tensors["token_embd.weight"];
    let (format, group) = tables_of(options)?;
    let layout = Layout::new(format, group, embedding.n(), embedding.k())?;
    let plan = [("token_embd.weight".to_owned(), Kind::Matrix(layout))];
    let embedding = table(machine, floats, "token_embd.weight", &plan)?;
    let whole = calibration.tokens.len().min(calibration.sequence * SEQUENCES);
    let calibration = Calibration { tokens: calibration.tokens[..whole].to_vec(), ..*calibration };
    let mut streams = Streams::new(machine, floats, &embedding, &calibration)?;
    let size = streams.floats(SEQUENCES);
    let formats = match options.zero_points {
        false => [Format::Q3, Format::Q4, Format::Q8],
        true => [Format::Q3Z, Format::Q4Z, Format::Q8],
    };
    let mut candidates = Vec::new();
    for index in 0..floats.config.n_layers {
        let original = floats.layer(machine, index)?;
        let behind = streams.behind(index, &original.layer, size);
        let importance = streams.importance(index, &original.layer)?;
        for (at, part) in LINEARS.into_iter().enumerate() {
            let w = &original.floats[at];
            let h = &importance[at];
            let mut choices = Vec::new();
            for format in formats {
                let layout = Layout::new(format, options.group, w.len() / h.len(), h.len())?;
                let linear = method::Linear { w, format, group: options.group };
                let rows = method::rounded(machine, &linear, h)?;
                let mut trial = copy(&original.layer);
                if let Some(slot) = matrix(&mut trial, part) {
                    *slot = pack_codes(machine, layout, &rows)?;
                }
                choices.push((layout, streams.trial(index, &trial, &behind)));
            }
            let name = format!("blk.{index}.{part}.weight");
            candidates.push(Candidate { name, choices, chosen: 0 });
        }
        streams.run(index, &original.layer, &original.layer);
        advance();
    }
    spend(&mut candidates, budget)?;
    let formats = candidates.into_iter().map(|candidate| {
        let format = candidate.choices[candidate.chosen].0.format();
        (candidate.name, format)
    });
    Ok(formats.collect())
}

/// Buys upgrades, the best bargain first.
fn spend(candidates: &mut [Candidate], budget: f64) -> Result<()> {
    let weights: usize = candidates.iter().map(|c| c.choices[0].0.n() * c.choices[0].0.k()).sum();
    let all = (budget * weights as f64 / 8.0) as usize;
    let mut spent: usize = candidates.iter().map(|c| c.choices[0].0.bytes()).sum();
    if !budget.is_finite() || spent > all {
        let least = spent as f64 * 8.0 / weights as f64;
        let what = format!("a budget of {budget} bits per weight: three bits take {least:.3}");
        return Err(Error::InvalidArgument(what));
    }
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (at, candidate) in candidates.iter().enumerate() {
            let (now, cost) = &candidate.choices[candidate.chosen];
            for next in candidate.chosen + 1..candidate.choices.len() {
                let (layout, less) = &candidate.choices[next];
                let more = layout.bytes().saturating_sub(now.bytes());
                let gain = (cost - less) / more.max(1) as f64;
                let affordable = spent + more <= all;
                if affordable && gain > 0.0 && best.is_none_or(|(most, ..)| gain > most) {
                    best = Some((gain, at, next));
                }
            }
        }
        let Some((_, at, next)) = best else { return Ok(()) };
        let candidate = &mut candidates[at];
        spent += candidate.choices[next].0.bytes();
        spent -= candidate.choices[candidate.chosen].0.bytes();
        candidate.chosen = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_goes_where_it_helps() {
        let layout = |format| Layout::new(format, 128, 128, 128).unwrap();
        let candidate = |name: &str, costs: [f64; 3]| Candidate {
            name: name.into(),
            choices: [Format::Q3, Format::Q4, Format::Q8]
                .into_iter()
                .zip(costs)
                .map(|(format, cost)| (layout(format), cost))
                .collect(),
            chosen: 0,
        };
        let mut both = [candidate("dull", [1.0, 0.9, 0.8]), candidate("keen", [5.0, 1.0, 0.1])];
        spend(&mut both, 3.7).unwrap();
        assert_eq!([both[0].chosen, both[1].chosen], [0, 1]);
        both.iter_mut().for_each(|candidate| candidate.chosen = 0);
        spend(&mut both, 6.2).unwrap();
        assert_eq!([both[0].chosen, both[1].chosen], [1, 2]);
        assert!(spend(&mut both, 3.0).is_err());
    }
}
