//! What a target pass over each number of rows costs, as measured while generation goes on.
#![forbid(unsafe_code)]

use super::control::MOST_DRAFTS;

/// How much a new time counts against the ones before: work of others and cold caches only ever make a
/// pass longer, so a shorter one says more.
const SHORTER: f64 = 0.5;
const LONGER: f64 = 0.1;

/// Seconds of a pass over 1, 2, ... rows, where there are any.
#[derive(Clone, Debug, Default)]
pub(super) struct Costs {
    seconds: [Option<f64>; MOST_DRAFTS + 1],
}

impl Costs {
    /// A pass over `rows` rows took so long. A time that is none is ignored.
    pub(super) fn report(&mut self, rows: usize, seconds: f64) {
        let Some(Some(old)) = rows.checked_sub(1).map(|row| self.seconds.get(row).copied()) else {
            return;
        };
        if !(seconds > 0.0 && seconds.is_finite()) {
            return;
        }
        // Its rows could have gone one by one: a pass that took longer than that was interrupted.
        let one_by_one = self.seconds[0].map(|one| rows as f64 * one).filter(|_| rows > 1);
        let seconds = one_by_one.map_or(seconds, |most| seconds.min(most));
        let Some(old) = old else {
            self.seconds[rows - 1] = Some(seconds);
            return;
        };
        // A longer context and a hotter device make passes over any number of rows longer, also over those
        // that are not run at the moment: what is compared are ratios.
        let drift = blend(old, seconds) / old;
        self.seconds.iter_mut().flatten().for_each(|seconds| *seconds *= drift);
    }

    /// Seconds of a pass over `rows` rows: measured, or on the line through the nearest measured ones, up
    /// to twice as many rows as have been measured. When only a single row has been, the second
    /// counts for a third of it.
    pub(super) fn of(&self, rows: usize) -> Option<f64> {
        let at = |row: usize| self.seconds[row - 1].map(|seconds| (row, seconds));
        let most = (1..=MOST_DRAFTS + 1).rev().find_map(at)?.0;
        if rows > 2 * most {
            return None;
        }
        let below = (1..=rows).rev().find_map(at)?;
        if below.0 == rows {
            return Some(below.1);
        }
        let above = (rows..=MOST_DRAFTS + 1).find_map(at);
        let other = above.or_else(|| (1..below.0).rev().find_map(at));
        let slope = other
            .map_or(below.1 / 3.0, |other| (other.1 - below.1) / (other.0 as f64 - below.0 as f64));
        Some(below.1 + slope.max(0.0) * (rows - below.0) as f64)
    }

    /// What has been measured.
    pub(super) fn measured(&self) -> [Option<f64>; MOST_DRAFTS + 1] {
        self.seconds
    }
}

/// What is known of a time after one more measurement.
pub(super) fn blend(old: f64, new: f64) -> f64 {
    let news = if new < old { SHORTER } else { LONGER };
    // One interruption must not decide.
    old + news * (new.min(3.0 * old) - old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slower_device_is_slower_for_every_number_of_rows() {
        let mut costs = Costs::default();
        costs.report(1, 1.0);
        costs.report(5, 1.5);
        for _ in 0..100 {
            costs.report(5, 3.0);
        }
        let ratio = costs.of(5).unwrap() / costs.of(1).unwrap();
        assert!((ratio - 1.5).abs() < 1e-9 && costs.of(1).unwrap() > 1.9);
    }

    #[test]
    fn an_interrupted_pass_counts_as_its_rows_one_by_one_at_most() {
        let mut costs = Costs::default();
        costs.report(1, 1.0);
        costs.report(2, 70.0);
        assert_eq!(costs.of(2), Some(2.0));
        for _ in 0..10 {
            costs.report(2, 1.1);
        }
        assert!(costs.of(2).unwrap() / costs.of(1).unwrap() < 2.1);
    }

    #[test]
    fn rows_between_and_beyond_the_measured_ones() {
        let mut costs = Costs::default();
        assert_eq!(costs.of(1), None);
        costs.report(2, 1.0);
        assert_eq!(costs.of(1), None, "nothing is known of fewer rows");
        costs.report(1, 0.5);
        assert_eq!((costs.of(3), costs.of(4), costs.of(5)), (Some(1.5), Some(2.0), None));
    }
}
