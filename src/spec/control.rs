//! How many drafts are worth their time.
//!
//! A round of `k` drafts gives `E(k) = 1 + a1 + a1 a2 + ... + a1...ak` tokens, where `ai` is the chance
//! that draft `i` is accepted when those before it were (Leviathan et al. 2211.17192), and costs
//! `T(k + 1)`, the target's pass over `k + 1` rows, beside the drafting. The controller measures both
//! sides as generation goes on, takes the `k` with the most tokens a second, and plain decoding when that
//! is none. `T` is measured and not assumed, because it has steps: a kernel that works in tiles of four
//! rows makes five rows dear and eight cheap. All `k` are compared for that reason, not only neighbours.
//!
//! Estimates can be wrong, and finding out costs time. So drafting has an account: it begins with most of
//! the time of one plain pass, gains a hundredth of the time that the text would take plainly, and
//! what its rounds save and lose against that. When it is empty there are no drafts. Whatever
//! drafter, text and device are like, that and the one round which empties it are all that drafts can cost.
//!
//! It holds no clock and no random numbers: the same reports give the same decisions.
#![forbid(unsafe_code)]

use super::cost::{Costs, blend};

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
/// How much better than plain decoding a round must be expected to be, since figures are uncertain.
const MARGIN: f64 = 1.05;
/// Rounds without drafts before one is tried again; twice as many after each try that did
/// not turn drafting on.
const FIRST_PROBE: u32 = 32;
const LAST_PROBE: u32 = 512;
/// Rounds with drafts before a plain pass is measured again.
const PLAIN_AGAIN: u32 = 128;
/// The account in plain passes: what it begins with, gains for each token, and holds at most.
const GRACE: f64 = 0.8;
const ALLOWANCE: f64 = 0.01;
const SAVINGS: f64 = 50.0;
/// How likely a draft must be to stand when next to none are allowed.
const LEAST_CHANCE: f64 = 0.7;
/// The most that one round pays for making good a time without drafts, in plain passes.
const MOST_CATCH_UP: f64 = 4.0;

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

/// Why rounds had no drafts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undrafted {
    /// A plain pass had to be measured.
    pub measuring: u64,
    /// The limit, the share or the end of the context left no room.
    pub limited: u64,
    /// Drafts were not expected to pay.
    pub not_worth: u64,
    /// The account was empty.
    pub overdrawn: u64,
    /// The drafter had nothing to say.
    pub not_found: u64,
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
    /// Rounds of 0, 1, ... drafts.
    pub rounds: [u64; MOST_DRAFTS + 1],
    /// Why those of 0 drafts had none.
    pub undrafted: Undrafted,
    /// Drafts of the last round.
    pub current: usize,
    /// The most drafts that the limit and the share allow.
    pub limit: usize,
    /// Rounds that only served to look whether drafts are worth it again.
    pub probes: u64,
    /// Drafts that ended early, because the source was not sure enough of one more.
    pub early_stops: u64,
    /// Measured seconds of a target pass over 1, 2, ... rows, where there are any.
    pub pass_seconds: [Option<f64>; MOST_DRAFTS + 1],
    /// Measured seconds of drafting one token.
    pub draft_seconds: f64,
    /// Seconds that sources took to make good times without drafts.
    pub catch_up_seconds: f64,
    /// Seconds that drafts are reckoned to have saved; negative when they have cost some.
    pub saved_seconds: f64,
}

/// Decides how many drafts a round has.
#[derive(Clone, Debug)]
pub struct Controller {
    costs: Costs,
    draft: Option<f64>,
    acceptance: [Acceptance; CLASSES],
    overall: Acceptance,
    limit: usize,
    share: f64,
    always: bool,
    /// In plain passes.
    account: f64,
    /// What making good a time without drafts took last, in plain passes.
    catch_up: f64,
    refused: u32,
    probe_after: u32,
    since_plain: u32,
    round: Round,
    metrics: Metrics,
}

/// What has happened since the last round was recorded.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    drafts: usize,
    catch_up: f64,
    probing: bool,
    why_none: Option<fn(&mut Undrafted) -> &mut u64>,
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
            share: 1.0,
            always: false,
            account: GRACE,
            catch_up: 0.0,
            refused: 0,
            probe_after: FIRST_PROBE,
            since_plain: 0,
            round: Round::default(),
            metrics: Metrics { limit: MOST_DRAFTS, ..Metrics::default() },
        }
    }

    /// One that takes every draft there is, up to its limit: for comparisons.
    #[must_use]
    pub fn always() -> Self {
        Self { always: true, ..Self::new() }
    }

    /// Caps the drafts of a round; 0 turns drafting off.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.min(MOST_DRAFTS);
        self.metrics.limit = self.most();
    }

    /// Shortens drafts to this share, 0 to 1, of what they may be, as for heat or to save energy. The less
    /// is left, the likelier a draft must be to stand, since work on the others is thrown away.
    pub fn set_share(&mut self, share: f32) {
        self.share = f64::from(share).clamp(0.0, 1.0);
        self.metrics.limit = self.most();
    }

    fn most(&self) -> usize {
        self.limit.min((self.share * MOST_DRAFTS as f64).round() as usize)
    }

    /// The chance below which a draft is not worth its energy.
    fn least_chance(&self) -> f64 {
        (1.0 - self.share) * LEAST_CHANCE
    }

    /// The target took `seconds` over a pass of `rows` rows. A time that is none is ignored, as a clock
    /// too coarse for the pass may give.
    pub fn pass_took(&mut self, rows: usize, seconds: f64) {
        self.costs.report(rows, seconds);
        self.metrics.pass_seconds = self.costs.measured();
    }

    /// Drafting `tokens` tokens took `seconds`.
    pub fn draft_took(&mut self, tokens: usize, seconds: f64) {
        self.round.drafts += tokens;
        let each = seconds / tokens.max(1) as f64;
        if !(each >= 0.0 && each.is_finite()) {
            return;
        }
        // A draft is worth nothing when it takes as long as the target; longer means an interruption.
        let each = self.costs.of(1).map_or(each, |plain| each.min(plain));
        self.draft = Some(self.draft.map_or(each, |old| blend(old, each)));
        self.metrics.draft_seconds = self.draft.unwrap_or_default();
    }

    /// The source took `seconds` to make good a time without drafts.
    pub fn catch_up_took(&mut self, seconds: f64) {
        if seconds >= 0.0 && seconds.is_finite() {
            self.round.catch_up += seconds;
            self.metrics.catch_up_seconds += seconds;
        }
    }

    /// How many tokens to ask the drafter for; 0 saves the drafting.
    pub fn ask(&mut self) -> usize {
        self.round = Round::default();
        let most = self.most();
        let none: fn(&mut Undrafted) -> &mut u64 = if most == 0 {
            |why| &mut why.limited
        } else if self.always {
            return most;
        } else if self.since_plain >= PLAIN_AGAIN || self.costs.of(1).is_none() {
            |why| &mut why.measuring
        } else if self.account <= 0.0 || (self.refused > 0 && self.account < self.catch_up) {
            |why| &mut why.overdrawn
        } else {
            match self.draft {
                // Its cost is not known.
                None => return 1,
                Some(_) if self.drafts_are_free() => return most,
                Some(cost) if self.best(&[self.overall.rate(); MOST_DRAFTS], cost) > 0 => {
                    return most;
                }
                Some(_) if self.probe_is_due() => return 1,
                Some(_) => |why| &mut why.not_worth,
            }
        };
        self.round.why_none = Some(none);
        0
    }

    /// Whether to draft one more token after those with these confidences: whether the best that may
    /// come of it beats the best of stopping here.
    #[must_use]
    pub fn go_on(&self, confidence: &[f32]) -> bool {
        let drafted = confidence.len();
        if self.always || drafted == 0 || self.drafts_are_free() {
            return drafted < self.most();
        }
        let (Some(plain), Some(cost)) = (self.costs.of(1), self.draft) else { return false };
        let mut rates = [self.overall.rate(); MOST_DRAFTS];
        for (rate, confidence) in rates.iter_mut().zip(confidence) {
            *rate = self.acceptance[class(*confidence)].rate();
        }
        let (mut stop, mut more) = (1.0 / (plain + drafted as f64 * cost), 0.0_f64);
        self.each_length(&rates, |drafts, tokens, pass| {
            let rate = tokens / (pass + drafts.max(drafted) as f64 * cost);
            let side = if drafts <= drafted { &mut stop } else { &mut more };
            *side = side.max(rate);
        });
        more > stop
    }

    /// The source ended a draft early because [`Controller::go_on`] said so.
    pub fn stopped_early(&mut self) {
        self.metrics.early_stops += 1;
    }

    /// How many of the drafts with these confidences to check. What they cost to draft is spent by now
    /// and does not count.
    pub fn choose(&mut self, confidence: &[f32]) -> usize {
        let most = confidence.len().min(self.most());
        if self.always {
            return most;
        }
        let mut rates = [0.0; MOST_DRAFTS];
        for (rate, confidence) in rates.iter_mut().zip(confidence) {
            *rate = self.acceptance[class(*confidence)].rate();
        }
        let best = self.best(&rates[..most], 0.0);
        if best > 0 || most == 0 {
            return best;
        }
        // Drafts of no use were drafted for nothing.
        self.overall.report(false, MEMORY);
        self.round.probing = self.probe_is_due();
        self.round.why_none = Some(|why| &mut why.not_worth);
        usize::from(self.round.probing)
    }

    /// A round is over: the first `accepted` of the drafts with these confidences stood.
    pub fn record(&mut self, confidence: &[f32], accepted: usize) {
        let drafted = confidence.len().min(MOST_DRAFTS);
        let round = std::mem::take(&mut self.round);
        self.settle(round, drafted, accepted);
        let metrics = &mut self.metrics;
        metrics.passes += 1;
        metrics.current = drafted;
        metrics.rounds[drafted] += 1;
        metrics.drafted += drafted as u64;
        metrics.accepted += accepted as u64;
        for (place, confidence) in confidence.iter().enumerate().take((accepted + 1).min(drafted)) {
            let stood = place < accepted;
            metrics.tried_at[place] += 1;
            metrics.accepted_at[place] += u64::from(stood);
            let memory = if round.probing { PROBE_MEMORY } else { MEMORY };
            self.acceptance[class(*confidence)].report(stood, memory);
            self.overall.report(stood, memory);
        }
        if drafted == 0 {
            *round.why_none.unwrap_or(|why| &mut why.not_found)(&mut metrics.undrafted) += 1;
            self.refused = self.refused.saturating_add(1);
            self.since_plain = 0;
            return;
        }
        self.refused = 0;
        self.since_plain += 1;
        metrics.probes += u64::from(round.probing);
        self.probe_after =
            if round.probing { (self.probe_after * 2).min(LAST_PROBE) } else { FIRST_PROBE };
    }

    /// Books the gain or loss of a round, which took so much longer than its tokens would have plainly.
    fn settle(&mut self, round: Round, drafted: usize, accepted: usize) {
        let (Some(plain), Some(pass)) = (self.costs.of(1), self.costs.of(drafted + 1)) else {
            return;
        };
        let drafting = round.drafts as f64 * self.draft.unwrap_or_default();
        let catch_up = round.catch_up.min(MOST_CATCH_UP * plain);
        if catch_up > FREE * plain {
            self.catch_up = catch_up / plain;
        }
        let tokens = (accepted + 1) as f64;
        let saved = tokens * plain - (pass + drafting + catch_up);
        self.metrics.saved_seconds += saved;
        self.account = (self.account + ALLOWANCE * tokens + saved / plain).min(SAVINGS);
    }

    /// Everything seen and decided so far.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn probe_is_due(&self) -> bool {
        self.refused >= self.probe_after
    }

    fn drafts_are_free(&self) -> bool {
        self.costs.of(1).is_some_and(|plain| self.draft.unwrap_or(plain) < FREE * plain)
    }

    /// The number of drafts, of these chances, with the most tokens a second.
    fn best(&self, rates: &[f64], draft_seconds: f64) -> usize {
        let Some(plain) = self.costs.of(1) else { return 0 };
        let (mut best, mut best_rate) = (0, MARGIN / plain);
        self.each_length(rates, |drafts, tokens, pass| {
            let rate = tokens / (pass + drafts as f64 * draft_seconds);
            if rate > best_rate {
                (best, best_rate) = (drafts, rate);
            }
        });
        best
    }

    /// Calls `each` with every number of drafts that may be checked, the tokens to expect of it, and the
    /// seconds of its pass, given the chances of the drafts.
    fn each_length(&self, rates: &[f64], mut each: impl FnMut(usize, f64, f64)) {
        let (mut tokens, mut chance) = (1.0, 1.0);
        for (place, rate) in rates.iter().enumerate().take(self.most()) {
            chance *= rate;
            tokens += chance;
            let Some(pass) = self.costs.of(place + 2) else { return };
            if chance < self.least_chance() {
                return;
            }
            each(place + 1, tokens, pass);
        }
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
        /// What it costs to draft at all.
        catch_up: f64,
    }

    /// Tokens a second over `rounds` rounds, in units of plain decoding.
    fn speed(controller: &mut Controller, world: &World, rounds: usize, seed: u64) -> f64 {
        let (mut random, mut time, mut tokens) = (Random(seed), 0.0, 0);
        for _ in 0..rounds {
            let (asked, mut drafts) = (controller.ask(), Vec::new());
            while drafts.len() < asked && controller.go_on(&drafts) {
                drafts.push(0.9);
            }
            if asked > 0 {
                let drafting = drafts.len() as f64 * world.draft;
                controller.draft_took(drafts.len(), drafting);
                controller.catch_up_took(world.catch_up);
                time += drafting + world.catch_up;
            }
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
                    let world = World { pass, draft, acceptance, catch_up: 0.0 };
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
        let bad = World { pass: FLAT, draft: 0.1, acceptance: 0.0, catch_up: 0.0 };
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
        speed(
            &mut controller,
            &World { pass: TILES, draft: 0.0, acceptance: 0.7, catch_up: 0.0 },
            2000,
            3,
        );
        assert_eq!(controller.metrics().current, 3, "four rows");
    }

    #[test]
    fn a_hot_device_gets_no_more_than_its_limit() {
        let mut controller = Controller::new();
        controller.set_limit(2);
        let good = World { pass: FLAT, draft: 0.0, acceptance: 1.0, catch_up: 0.0 };
        speed(&mut controller, &good, 100, 4);
        assert_eq!(controller.metrics().current, 2);
        assert_eq!(controller.metrics().tried_at[2], 0);
        controller.set_limit(0);
        assert_eq!((controller.ask(), controller.choose(&[1.0; 4])), (0, 0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "long, and only arithmetic")]
    fn useless_drafts_cost_at_most_three_hundredths_from_the_hundredth_token_on() {
        for pass in [FLAT, LINEAR, TILES] {
            for draft in [0.0, 0.1, 0.5] {
                for catch_up in [0.0, 0.5, 1.5] {
                    for acceptance in [0.0, 0.05] {
                        for rounds in [100, 200, 400, 2000] {
                            let world = World { pass, draft, acceptance, catch_up };
                            let speed = speed(&mut Controller::new(), &world, rounds, 1);
                            let case = format!("{draft} {catch_up} {acceptance} {rounds}");
                            assert!(speed >= 0.97, "{case} {}: {speed}", pass(8));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_smaller_share_means_fewer_and_likelier_drafts() {
        let mut controller = Controller::new();
        for rows in 1..=8 {
            controller.pass_took(rows, 1.0);
        }
        let mut chosen = |share, confidence: f32| {
            controller.set_share(share);
            let chosen = controller.choose(&[confidence; 7]);
            assert!(chosen <= controller.metrics().limit);
            chosen
        };
        assert_eq!([1.0, 0.7, 0.3, 0.1, 0.0].map(|share| chosen(share, 1.0)), [7, 5, 2, 1, 0]);
        assert_eq!([1.0, 0.7, 0.3, 0.1].map(|share| chosen(share, 0.3)), [7, 1, 0, 0]);
        assert_eq!([-1.0, 2.0, f32::NAN].map(|share| chosen(share, 1.0)), [0, 7, 0]);
    }

    #[test]
    fn a_source_that_is_not_sure_stops() {
        let mut controller = Controller::new();
        for rows in 1..=8 {
            controller.pass_took(rows, 1.0 + 0.05 * (rows - 1) as f64);
        }
        controller.draft_took(1, 0.05);
        assert!(controller.go_on(&[1.0, 1.0]));
        assert!(!controller.go_on(&[0.3, 0.1]));
        assert!(!controller.go_on(&[0.1]));
        assert!(!controller.go_on(&[1.0; 7]), "as long as a draft may be");
    }

    #[test]
    fn every_round_without_drafts_has_a_reason() {
        let mut controller = Controller::new();
        let world = World { pass: LINEAR, draft: 0.3, acceptance: 0.1, catch_up: 1.0 };
        speed(&mut controller, &world, 300, 5);
        controller.set_limit(0);
        speed(&mut controller, &world, 10, 5);
        let metrics = controller.metrics();
        let Undrafted { measuring, limited, not_worth, overdrawn, not_found } = metrics.undrafted;
        assert_eq!(
            measuring + limited + not_worth + overdrawn + not_found,
            metrics.rounds[0],
            "{metrics:?}"
        );
        assert!(measuring > 0 && limited == 10 && overdrawn > 0 && not_found == 0);
        assert_eq!(metrics.rounds.iter().sum::<u64>(), 310);
        assert!(metrics.saved_seconds < 0.0 && metrics.catch_up_seconds > 0.0);
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
