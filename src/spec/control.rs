//! How many drafts are worth their time.
//!
//! A round of `k` drafts gives `E(k) = 1 + a1 + a1 a2 + ... + a1...ak` tokens, where `ai` is the chance
//! that draft `i` is accepted when those before it were (Leviathan et al. 2211.17192), and costs
//! `T(k + 1)`, the target's pass over `k + 1` rows, beside the drafting. The controller measures both
//! sides as generation goes on, takes the `k` with the most tokens a second, and plain decoding when that
//! is none. `T` is measured and not assumed, because it has steps: a kernel that works in tiles of four
//! rows makes five rows dear and eight cheap. All `k` are compared for that reason, not only neighbours.
//!
//! It holds no clock and no random numbers: the same reports give the same decisions.
#![forbid(unsafe_code)]

/// The most drafts in a round: with the token before them they fill the widest few-row kernel.
pub const MOST_DRAFTS: usize = 7;

/// Classes of a draft's confidence, which are accepted differently often.
const CLASSES: usize = 4;
/// How much of what is known about acceptance is left after a new report.
const MEMORY: f64 = 0.99;
/// The same after a probe, which is rare and must count for more.
const PROBE_MEMORY: f64 = 0.5;
/// Drafting that takes less than this share of a plain pass is free.
const FREE: f64 = 0.01;
/// How much a new time counts against the ones before: work of others and cold caches only ever make a
/// pass longer, so a shorter one says more.
const SHORTER: f64 = 0.5;
const LONGER: f64 = 0.1;
/// How much better than plain decoding a round must be expected to be, since figures are uncertain.
const MARGIN: f64 = 1.05;
/// Rounds without drafts before one is tried again; twice as many after each try that did
/// not turn drafting on.
const FIRST_PROBE: u32 = 32;
const LAST_PROBE: u32 = 256;

/// What a target pass over each number of rows costs.
#[derive(Clone, Debug, Default)]
struct Costs {
    seconds: [Option<f64>; MOST_DRAFTS + 1],
}

impl Costs {
    fn report(&mut self, rows: usize, seconds: f64) {
        let Some(slot) = rows.checked_sub(1).and_then(|row| self.seconds.get_mut(row)) else {
            return;
        };
        if !(seconds > 0.0 && seconds.is_finite()) {
            return;
        }
        *slot = Some(slot.map_or(seconds, |old| blend(old, seconds)));
    }

    /// Seconds of a pass over `rows` rows: measured, or on the line through the nearest measured ones, up
    /// to twice as many rows as have been measured. When only a single row has been, the second
    /// counts for a third of it.
    fn of(&self, rows: usize) -> Option<f64> {
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
}

/// What is known of a time after one more measurement.
fn blend(old: f64, new: f64) -> f64 {
    let news = if new < old { SHORTER } else { LONGER };
    // One interruption must not decide.
    old + news * (new.min(3.0 * old) - old)
}

/// How often drafts of one class were accepted, fading.
#[derive(Clone, Copy, Debug)]
struct Acceptance {
    accepted: f64,
    tried: f64,
}

impl Acceptance {
    fn rate(self) -> f64 {
        self.accepted / self.tried
    }

    fn report(&mut self, accepted: bool, memory: f64) {
        self.accepted = self.accepted * memory + f64::from(u8::from(accepted));
        self.tried = self.tried * memory + 1.0;
    }
}

/// What the controller has seen and decided.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Drafts that went through the target.
    pub drafted: u64,
    /// Drafts that it accepted.
    pub accepted: u64,
    /// Passes of the target, with drafts and without.
    pub passes: u64,
    /// Drafts at each place that were checked, those before them having been accepted.
    pub tried_at: [u64; MOST_DRAFTS],
    /// And were accepted.
    pub accepted_at: [u64; MOST_DRAFTS],
    /// Drafts of the last round.
    pub current: usize,
    /// Rounds that only served to look whether drafts are worth it again.
    pub probes: u64,
    /// Measured seconds of a target pass over 1, 2, ... rows, where there are any.
    pub pass_seconds: [Option<f64>; MOST_DRAFTS + 1],
    /// Measured seconds of drafting one token.
    pub draft_seconds: f64,
}

/// Decides how many drafts a round has.
#[derive(Clone, Debug)]
pub struct Controller {
    costs: Costs,
    draft: Option<f64>,
    acceptance: [Acceptance; CLASSES],
    overall: Acceptance,
    limit: usize,
    always: bool,
    refused: u32,
    probe_after: u32,
    probing: bool,
    metrics: Metrics,
}

impl Default for Controller {
    fn default() -> Self {
        Self::new()
    }
}

impl Controller {
    /// A controller that knows nothing yet: it begins with one plain pass, to have something to compare
    /// with, and expects drafts to be accepted about as often as their confidence says.
    #[must_use]
    pub fn new() -> Self {
        let expected = |class: usize| Acceptance {
            accepted: 2.0 * (class + 1) as f64 / (CLASSES + 1) as f64,
            tried: 2.0,
        };
        Self {
            costs: Costs::default(),
            draft: None,
            acceptance: std::array::from_fn(expected),
            overall: Acceptance { accepted: 1.0, tried: 2.0 },
            limit: MOST_DRAFTS,
            always: false,
            refused: 0,
            probe_after: FIRST_PROBE,
            probing: false,
            metrics: Metrics::default(),
        }
    }

    /// One that takes every draft there is, up to its limit: for comparisons.
    #[must_use]
    pub fn always() -> Self {
        Self { always: true, ..Self::new() }
    }

    /// Caps the drafts of a round, as when the device is hot or low on power; 0 turns drafting off.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.min(MOST_DRAFTS);
    }

    /// The target took `seconds` over a pass of `rows` rows. A time that is none is ignored, as a clock
    /// too coarse for the pass may give.
    pub fn pass_took(&mut self, rows: usize, seconds: f64) {
        self.costs.report(rows, seconds);
        self.metrics.pass_seconds = self.costs.seconds;
    }

    /// Drafting `tokens` tokens took `seconds`.
    pub fn draft_took(&mut self, tokens: usize, seconds: f64) {
        let each = seconds / tokens.max(1) as f64;
        if !(each >= 0.0 && each.is_finite()) {
            return;
        }
        self.draft = Some(self.draft.map_or(each, |old| blend(old, each)));
        self.metrics.draft_seconds = self.draft.unwrap_or_default();
    }

    /// How many tokens to ask the drafter for: all that could be of use when drafting is next to free,
    /// otherwise as many as pay for their drafting too. 0 saves the drafting.
    #[must_use]
    pub fn ask(&self) -> usize {
        if self.always {
            return self.limit;
        }
        let Some(plain) = self.costs.of(1) else { return 0 };
        let cost = self.draft.unwrap_or(0.0);
        if cost < FREE * plain {
            return self.limit;
        }
        match self.best(&[self.overall.rate(); MOST_DRAFTS], cost) {
            0 if self.probe_is_due() => 1.min(self.limit),
            wanted => wanted,
        }
    }

    /// How many of the drafts with these confidences to check. What they cost to draft is spent by now
    /// and does not count.
    pub fn choose(&mut self, confidence: &[f32]) -> usize {
        let most = confidence.len().min(self.limit);
        self.probing = false;
        if self.always {
            return most;
        }
        let mut rates = [0.0; MOST_DRAFTS];
        for (rate, confidence) in rates.iter_mut().zip(confidence) {
            *rate = self.acceptance[class(*confidence)].rate();
        }
        let best = self.best(&rates[..most], 0.0);
        if best == 0 && most > 0 {
            // Drafts of no use were drafted for nothing.
            self.overall.report(false, MEMORY);
            self.probing = self.probe_is_due();
        }
        best + usize::from(self.probing)
    }

    /// A round is over: the first `accepted` of the drafts with these confidences stood.
    pub fn record(&mut self, confidence: &[f32], accepted: usize) {
        let drafted = confidence.len().min(MOST_DRAFTS);
        let metrics = &mut self.metrics;
        metrics.passes += 1;
        metrics.current = drafted;
        metrics.drafted += drafted as u64;
        metrics.accepted += accepted as u64;
        for (place, confidence) in confidence.iter().enumerate().take((accepted + 1).min(drafted)) {
            let stood = place < accepted;
            metrics.tried_at[place] += 1;
            metrics.accepted_at[place] += u64::from(stood);
            let memory = if self.probing { PROBE_MEMORY } else { MEMORY };
            self.acceptance[class(*confidence)].report(stood, memory);
            self.overall.report(stood, memory);
        }
        if drafted == 0 {
            self.refused = self.refused.saturating_add(1);
            return;
        }
        self.refused = 0;
        metrics.probes += u64::from(self.probing);
        self.probe_after =
            if self.probing { (self.probe_after * 2).min(LAST_PROBE) } else { FIRST_PROBE };
    }

    /// Everything seen and decided so far.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn probe_is_due(&self) -> bool {
        self.refused >= self.probe_after
    }

    /// The number of drafts, of these chances, with the most tokens a second.
    fn best(&self, rates: &[f64], draft_seconds: f64) -> usize {
        let Some(plain) = self.costs.of(1) else { return 0 };
        let (mut best, mut best_rate) = (0, MARGIN / plain);
        let (mut tokens, mut chance) = (1.0, 1.0);
        for (place, rate) in rates.iter().enumerate().take(self.limit) {
            chance *= rate;
            tokens += chance;
            let drafts = place + 1;
            let Some(pass) = self.costs.of(drafts + 1) else { break };
            let rate = tokens / (pass + drafts as f64 * draft_seconds);
            if rate > best_rate {
                (best, best_rate) = (drafts, rate);
            }
        }
        best
    }
}

fn class(confidence: f32) -> usize {
    ((confidence * CLASSES as f32).ceil().max(1.0) as usize).min(CLASSES) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::random::Random;

    /// A device and a text: what passes cost and how often a draft is right.
    struct World {
        pass: fn(usize) -> f64,
        draft: f64,
        acceptance: f64,
    }

    /// Tokens a second over `rounds` rounds, in units of plain decoding.
    fn speed(controller: &mut Controller, world: &World, rounds: usize, seed: u64) -> f64 {
        let (mut random, mut time, mut tokens) = (Random(seed), 0.0, 0);
        for _ in 0..rounds {
            let asked = controller.ask();
            if asked > 0 {
                time += asked as f64 * world.draft;
                controller.draft_took(asked, asked as f64 * world.draft);
            }
            let drafts = vec![0.9; asked];
            let k = controller.choose(&drafts);
            let right = |random: &mut Random| f64::from(random.unit()) < world.acceptance;
            let accepted = (0..k).take_while(|_| right(&mut random)).count();
            let pass = (world.pass)(k + 1);
            controller.pass_took(k + 1, pass);
            controller.record(&drafts[..k], accepted);
            time += pass;
            tokens += accepted + 1;
        }
        tokens as f64 / time * (world.pass)(1)
    }

    /// The best that any fixed number of drafts can do.
    fn best(world: &World) -> f64 {
        let rate = |k: usize| {
            let tokens: f64 = (0..=k).map(|i| world.acceptance.powi(i as i32)).sum();
            tokens / ((world.pass)(k + 1) + k as f64 * world.draft) * (world.pass)(1)
        };
        (0..=MOST_DRAFTS).map(rate).fold(0.0, f64::max)
    }

    const FLAT: fn(usize) -> f64 = |rows| 1.0 + 0.05 * (rows - 1) as f64;
    const LINEAR: fn(usize) -> f64 = |rows| rows as f64;
    const TILES: fn(usize) -> f64 = |rows| rows.div_ceil(4) as f64 + 0.02 * rows as f64;

    #[test]
    #[cfg_attr(miri, ignore = "long, and only arithmetic")]
    fn within_a_tenth_of_the_best_fixed_length_and_never_slower_than_none() {
        for pass in [FLAT, LINEAR, TILES] {
            for draft in [0.0, 0.1, 0.4] {
                for acceptance in [0.0, 0.2, 0.5, 0.8, 0.95, 1.0] {
                    let world = World { pass, draft, acceptance };
                    let speed = speed(&mut Controller::new(), &world, 3000, 1);
                    let best = best(&world);
                    let case = format!("{draft} {acceptance} {}: {speed} of {best}", pass(8));
                    assert!(speed >= 0.9 * best, "{case}");
                    assert!(speed >= 0.985, "{case}");
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "long, and only arithmetic")]
    fn the_text_may_change() {
        let mut controller = Controller::new();
        let bad = World { pass: FLAT, draft: 0.1, acceptance: 0.0 };
        assert!(speed(&mut controller, &bad, 2000, 1) > 0.97);
        let current = controller.metrics().current;
        assert_eq!(current, 0, "turned off");
        assert!(controller.metrics().probes > 0);
        let good = World { acceptance: 0.95, ..bad };
        speed(&mut controller, &good, 3000, 2);
        assert!(controller.metrics().current >= 4, "turned on again");
    }

    #[test]
    #[cfg_attr(miri, ignore = "long, and only arithmetic")]
    fn steps_in_the_cost_are_used_to_their_edge() {
        let mut controller = Controller::new();
        speed(&mut controller, &World { pass: TILES, draft: 0.0, acceptance: 0.7 }, 2000, 3);
        assert_eq!(controller.metrics().current, 3, "four rows");
    }

    #[test]
    fn a_hot_device_gets_no_more_than_its_limit() {
        let mut controller = Controller::new();
        controller.set_limit(2);
        let good = World { pass: FLAT, draft: 0.0, acceptance: 1.0 };
        speed(&mut controller, &good, 100, 4);
        assert_eq!(controller.metrics().current, 2);
        assert_eq!(controller.metrics().tried_at[2], 0);
        controller.set_limit(0);
        assert_eq!((controller.ask(), controller.choose(&[1.0; 4])), (0, 0));
    }

    #[test]
    fn what_the_source_is_sure_of_counts() {
        let mut controller = Controller::new();
        for rows in 1..=8 {
            controller.pass_took(rows, 1.0 + 0.3 * (rows - 1) as f64);
        }
        for _ in 0..50 {
            controller.record(&[1.0, 0.1], 1);
        }
        assert_eq!(controller.choose(&[1.0, 1.0, 0.1, 0.1]), 2);
        assert_eq!(controller.choose(&[0.1, 1.0]), 0);
    }

    #[test]
    fn times_that_are_none_are_ignored() {
        let mut controller = Controller::new();
        controller.pass_took(1, 1.0);
        for none in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            controller.pass_took(1, none);
            controller.pass_took(2, none);
        }
        controller.pass_took(0, 1.0);
        controller.pass_took(99, 1.0);
        controller.draft_took(1, f64::NAN);
        let metrics = controller.metrics();
        assert_eq!(metrics.pass_seconds[..2], [Some(1.0), None]);
        assert_eq!(metrics.draft_seconds, 0.0);
        assert_eq!(controller.choose(&[f32::NAN]), 0);
    }

    #[test]
    fn metrics_count_what_was_checked() {
        let mut controller = Controller::always();
        assert_eq!(controller.choose(&[0.0; 20]), MOST_DRAFTS);
        controller.record(&[0.5; 3], 1);
        controller.record(&[0.5; 2], 2);
        controller.record(&[], 0);
        let metrics = controller.metrics();
        assert_eq!((metrics.drafted, metrics.accepted, metrics.passes), (5, 3, 3));
        assert_eq!(metrics.tried_at[..3], [2, 2, 0]);
        assert_eq!(metrics.accepted_at[..3], [2, 1, 0]);
    }
}
