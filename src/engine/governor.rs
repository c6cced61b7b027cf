//! What heat, power mode and memory pressure make of a run: the host reports, the governor decides.
//!
//! A phone that gets too hot is throttled by its system, hard and for minutes; asking for a little less
//! in time keeps more. The governor turns reports into one number, the *effort*, which a
//! proportional-integral controller moves so that the temperature settles at the target (45 °C by
//! default), and spends less effort in a fixed order: shorter drafts, fewer threads, pauses between
//! tokens, a smaller model, none at all. Between more threads and fewer it alternates from token to token,
//! in proportion: there is no step for the temperature to swing around.
//!
//! Only arithmetic over reports and a clock that the caller passes in, so that ten minutes of heat are
//! a test of milliseconds.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use std::time::Duration;

/// How hot the system says it is: `ProcessInfo.thermalState` on Apple's systems; on Android
/// `THERMAL_STATUS_NONE`, `LIGHT`, `MODERATE`, and `SEVERE` or worse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThermalLevel {
    /// No limit.
    #[default]
    Nominal,
    /// Warm: no more than now.
    Fair,
    /// Hot: less than now.
    Serious,
    /// Stop.
    Critical,
}

/// A report on heat. Every part may be missing; the most pessimistic one counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Heat {
    /// The system's level.
    pub level: Option<ThermalLevel>,
    /// Android's `getThermalHeadroom`: 1 is where the system throttles severely.
    pub headroom: Option<f32>,
    /// Degrees of the skin or the battery.
    pub celsius: Option<f32>,
}

/// How much of the machine this run may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PowerMode {
    /// Somebody is waiting for the text.
    #[default]
    Foreground,
    /// Nobody is waiting: a quarter of the threads, half the time.
    Background,
    /// The battery is low: half the threads and no drafts, whose rejected tokens cost energy.
    LowPower,
}

impl PowerMode {
    /// The most that a step in this mode may use.
    #[must_use]
    pub fn most(self) -> Step {
        match self {
            Self::Foreground => Step::FULL,
            Self::Background => Step { threads: 0.25, duty: 0.5, ..Step::FULL },
            Self::LowPower => Step { threads: 0.5, drafts: 0.0, ..Step::FULL },
        }
    }
}

/// Settings of the governor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GovernorConfig {
    /// The temperature to settle at, in °C.
    pub target_celsius: f32,
    /// From this on nothing runs until the target is reached again, in °C.
    pub critical_celsius: f32,
    /// Whether the host has named a smaller model to go on with.
    pub small_model: bool,
}

impl Default for GovernorConfig {
    fn default() -> Self {
        Self { target_celsius: 45.0, critical_celsius: 50.0, small_model: false }
    }
}

/// How the next token is to be made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The share of the usual draft length to draft, 0 to 1.
    pub drafts: f32,
    /// The share of the threads to use, above 0 to 1.
    pub threads: f32,
    /// The share of the time to work, above 0 to 1: after a step of `t` seconds, rest
    /// `t * (1 / duty - 1)`.
    pub duty: f32,
    /// Whether to go on with the smaller model.
    pub small_model: bool,
}

impl Step {
    /// No limits.
    pub const FULL: Self = Self { drafts: 1.0, threads: 1.0, duty: 1.0, small_model: false };

    /// The less of both in each measure.
    #[must_use]
    pub fn at_most(self, most: Self) -> Self {
        Self {
            drafts: self.drafts.min(most.drafts),
            threads: self.threads.min(most.threads),
            duty: self.duty.min(most.duty),
            small_model: self.small_model || most.small_model,
        }
    }

    /// How long to rest after working for `worked`.
    #[must_use]
    pub fn rest(&self, worked: Duration) -> Duration {
        worked.mul_f32(1.0 / self.duty - 1.0)
    }
}

/// Where in the effort each measure begins; below [`DUTY`] the share of working time falls in
/// proportion.
const DRAFTS: f32 = 0.9;
const THREADS: f32 = 0.6;
const DUTY: f32 = 0.6;
/// The least share of the time that is worked; and where the smaller model takes over.
const LEAST_DUTY: f32 = 0.1;
const SMALL_MODEL: f32 = 0.25;
/// And where the model itself comes back: apart, because coming back costs a pass over what was missed.
const WHOLE_MODEL: f32 = 0.4;

/// Effort given up for a degree too much, and the seconds in which the integral part gives up as much
/// again. A phone's skin follows power by tens of degrees within minutes: slow enough for these.
const GAIN: f32 = 0.1;
const INTEGRAL_SECONDS: f32 = 120.0;
/// How far below the target a report counts at most: from a cold start the effort then falls before the
/// target is reached, not after.
const COLDEST: f32 = -6.0;
/// Sensors count in halves or whole degrees: a difference as small as this is none, and reports are
/// smoothed over so many seconds.
const DEAD_BAND: f32 = 0.3;
const SMOOTH_SECONDS: f32 = 6.0;
/// A report says nothing about the time after this many seconds.
const STALE_SECONDS: f32 = 30.0;

/// A report, in degrees above the target.
#[derive(Clone, Copy, Debug)]
struct Report {
    excess: f32,
    smooth: f32,
    when: Duration,
}

/// The governor of a runtime.
#[derive(Clone, Debug)]
pub struct Governor {
    config: GovernorConfig,
    mode: PowerMode,
    effort: f32,
    /// The last report.
    last: Option<Report>,
    paused: bool,
    /// Whether the smaller model is on.
    small_model: bool,
    /// What rounding the threads to all or half of them still owes.
    owed: f32,
}

impl Governor {
    /// A governor that has had no report: full effort.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for temperatures that are no numbers or in the wrong order.
    pub fn new(config: GovernorConfig) -> Result<Self> {
        let ordered = config.target_celsius < config.critical_celsius;
        if !ordered || !config.target_celsius.is_finite() || !config.critical_celsius.is_finite() {
            return Err(Error::InvalidArgument(format!(
                "a target of {} °C and a limit of {} °C: both must be numbers, the target the lower one",
                config.target_celsius, config.critical_celsius
            )));
        }
        Ok(Self {
            config,
            mode: PowerMode::default(),
            effort: 1.0,
            last: None,
            paused: false,
            small_model: false,
            owed: 0.0,
        })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &GovernorConfig {
        &self.config
    }

    /// The present effort, 0 to 1.
    #[must_use]
    pub fn effort(&self) -> f32 {
        self.effort
    }

    /// Whether the host has named a smaller model.
    pub fn set_small_model(&mut self, named: bool) {
        self.config.small_model = named;
        self.small_model &= named;
    }

    /// Whether sessions that have a smaller model go on with it.
    #[must_use]
    pub fn small_model(&self) -> bool {
        self.small_model
    }

    /// The mode.
    #[must_use]
    pub fn mode(&self) -> PowerMode {
        self.mode
    }

    /// Sets the mode.
    pub fn set_mode(&mut self, mode: PowerMode) {
        self.mode = mode;
    }

    /// Takes a report at time `now`, on a clock that never goes back. A report without any part ends
    /// the governing of heat: full effort again.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a temperature or a headroom that is no number: nothing has changed.
    pub fn report(&mut self, heat: Heat, now: Duration) -> Result<()> {
        if [heat.celsius, heat.headroom].into_iter().flatten().any(|x| !x.is_finite()) {
            return Err(Error::InvalidArgument(
                "a temperature or a headroom that is no number: leave out what is not known".into(),
            ));
        }
        let Some(excess) = self.excess(heat) else {
            self.last = None;
            self.effort = 1.0;
            self.paused = false;
            self.small_model = false;
            return Ok(());
        };
        // The velocity form: what the controller changes, so that an effort at its end winds nothing up.
        let (smooth, rise, seconds) = match self.last {
            Some(last) => {
                let seconds = now.saturating_sub(last.when).as_secs_f32().min(STALE_SECONDS);
                let rise = (excess - last.smooth) * (1.0 - (-seconds / SMOOTH_SECONDS).exp());
                (last.smooth + rise, rise, seconds)
            }
            None => (excess, excess.max(0.0), 0.0),
        };
        let drift = if smooth.abs() < DEAD_BAND { 0.0 } else { smooth.max(COLDEST) };
        self.effort -= GAIN * (rise + drift * seconds / INTEGRAL_SECONDS);
        self.effort = self.effort.clamp(0.0, 1.0);
        self.choose_model();
        self.last = Some(Report { excess, smooth, when: now });
        let limit = self.config.critical_celsius - self.config.target_celsius;
        self.paused = excess >= limit || (self.paused && excess > 0.0);
        Ok(())
    }

    /// Whether anything may run at all.
    ///
    /// # Errors
    /// [`Error::ThermalPause`], as [`Governor::step`].
    pub fn check(&self) -> Result<()> {
        self.pause().map_or(Ok(()), |retry| Err(Error::ThermalPause { retry }))
    }

    /// The time after which another report and another try make sense, while nothing may run.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        self.paused.then(|| self.retry())
    }

    /// How the next token is to be made.
    ///
    /// # Errors
    /// [`Error::ThermalPause`] with a time after which another report and another try make sense.
    pub fn step(&mut self) -> Result<Step> {
        self.check()?;
        self.choose_model();
        let (effort, mode) = (self.effort, self.mode);
        let drafts = ((effort - DRAFTS) / (1.0 - DRAFTS)).clamp(0.0, 1.0);
        let threads = ((effort - THREADS) / (DRAFTS - THREADS)).clamp(0.0, 1.0);
        let duty = (effort / DUTY).clamp(LEAST_DUTY, 1.0);
        let heat = Step {
            drafts,
            threads: if self.alternate(threads) { 1.0 } else { 0.5 },
            duty,
            small_model: self.small_model,
        };
        Ok(heat.at_most(mode.most()))
    }

    /// Whether the smaller model is on, with a distance between the two borders.
    fn choose_model(&mut self) {
        let border = if self.small_model { WHOLE_MODEL } else { SMALL_MODEL };
        self.small_model = self.config.small_model && self.effort < border;
    }

    /// Degrees above the target; levels and headroom are given the degrees they stand for.
    fn excess(&self, heat: Heat) -> Option<f32> {
        let limit = self.config.critical_celsius - self.config.target_celsius;
        let level = heat.level.map(|level| match level {
            ThermalLevel::Nominal => -limit,
            ThermalLevel::Fair => 0.0,
            ThermalLevel::Serious => limit * 0.6,
            ThermalLevel::Critical => limit,
        });
        // Severe throttling is a tenth away at 0.9: the target; from 1.1 on it is the limit.
        let headroom = heat.headroom.map(|headroom| (headroom - 0.9) / 0.2 * limit);
        let celsius = heat.celsius.map(|celsius| celsius - self.config.target_celsius);
        [level, headroom, celsius].into_iter().flatten().reduce(f32::max)
    }

    /// Whether the better of two settings is taken this time, so that on average it is taken in a share
    /// of `share`.
    fn alternate(&mut self, share: f32) -> bool {
        let owed = self.owed + share;
        let take = owed >= 1.0 - 1e-6;
        self.owed = if take { (owed - 1.0).max(0.0) } else { owed };
        take
    }

    /// A phone cools by about a degree in five seconds at first; a minute at most.
    fn retry(&self) -> Duration {
        let excess = self.last.map_or(0.0, |last| last.excess);
        Duration::from_secs_f32((excess * 5.0).clamp(5.0, 60.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A phone: skin temperature follows power as a resistor and a capacitor would.
    struct Phone {
        celsius: f32,
        /// Degrees that full power ends above the surroundings, and the seconds it takes.
        degrees: f32,
        seconds: f32,
        /// What the sensor rounds to.
        resolution: f32,
    }

    impl Phone {
        fn run(&mut self, power: f32, ambient: f32, seconds: f32) {
            let goal = ambient + power * self.degrees;
            self.celsius += (goal - self.celsius) * (1.0 - (-seconds / self.seconds).exp());
        }

        fn sensor(&self) -> f32 {
            (self.celsius / self.resolution).round() * self.resolution
        }
    }

    /// Power and tokens per second of a step, both as shares of the full ones: drafts make a token cheap in
    /// time but not in energy, the second half of the threads adds less speed than heat.
    fn cost(step: Step) -> (f32, f32) {
        let speed = (1.0 - 0.25 * (1.0 - step.drafts)) * (0.4 + 0.6 * step.threads);
        let power = (1.0 - 0.1 * (1.0 - step.drafts)) * (0.2 + 0.8 * step.threads);
        (power * step.duty, speed * step.duty)
    }

    /// Ten minutes of surroundings, a value each second: a room, a pocket, the sun, a room again.
    fn trace(second: u32) -> f32 {
        match second {
            0..=149 => 24.0,
            150..=299 => 24.0 + (second - 150) as f32 * 0.04,
            300..=449 => 30.0,
            _ => 30.0 - ((second - 450) as f32 * 0.03).min(3.0),
        }
    }

    /// Power and tokens per second of each constant effort, the greatest first.
    fn efforts() -> Vec<(f32, f32)> {
        let mut governor = Governor::new(GovernorConfig::default()).unwrap();
        let mut average = |effort: u16| {
            governor.effort = f32::from(effort) / 500.0;
            let steps = (0..200).map(|_| cost(governor.step().unwrap()));
            let (power, speed) =
                steps.fold((0.0, 0.0), |sum, step| (sum.0 + step.0, sum.1 + step.1));
            (power / 200.0, speed / 200.0)
        };
        (0..=500).rev().map(&mut average).collect()
    }

    /// Tokens per second that keep the phone at 45 °C for good, by the best constant effort.
    fn sustainable(efforts: &[(f32, f32)], phone: &Phone, ambient: f32) -> f32 {
        let cool = |(power, _): &&(f32, f32)| ambient + power * phone.degrees <= 45.0;
        efforts.iter().find(cool).unwrap().1
    }

    #[test]
    fn ten_minutes_settle_at_the_target_without_swinging() {
        let constant = efforts();
        for (degrees, seconds, resolution, every) in [
            (30.0, 90.0, 0.1, 1),
            (30.0, 90.0, 1.0, 2),
            (45.0, 60.0, 0.5, 2),
            (25.0, 200.0, 0.5, 5),
            (60.0, 40.0, 0.1, 1),
        ] {
            let mut phone = Phone { celsius: 24.0, degrees, seconds, resolution };
            let mut governor = Governor::new(GovernorConfig::default()).unwrap();
            let (mut speed, mut best, mut hottest) = (0.0, 0.0, 0.0_f32);
            let mut efforts = Vec::new();
            for second in 0..600 {
                let ambient = trace(second);
                if second % every == 0 {
                    let heat = Heat { celsius: Some(phone.sensor()), ..Heat::default() };
                    governor.report(heat, Duration::from_secs(second.into())).unwrap();
                }
                for _ in 0..10 {
                    let (power, rate) = cost(governor.step().unwrap());
                    phone.run(power, ambient, 0.1);
                    speed += rate / 10.0;
                }
                best += sustainable(&constant, &phone, ambient);
                hottest = hottest.max(phone.celsius);
                efforts.push(governor.effort());
            }
            let name = format!("{degrees} degrees in {seconds} s, rounded to {resolution}");
            assert!(hottest < 45.0, "{name}: {hottest} °C");
            assert!(speed > 0.8 * best, "{name}: {speed} of {best}");
            // Swings: after the first minutes the effort turns round only as often as the trace does,
            // a turn being a move of more than a twentieth against the last one.
            let (mut turns, mut rising, mut extreme) = (0, false, efforts[200]);
            for effort in &efforts[200..] {
                let ahead = if rising { effort - extreme } else { extreme - effort };
                if ahead > 0.0 {
                    extreme = *effort;
                } else if ahead < -0.05 {
                    (turns, rising, extreme) = (turns + 1, !rising, *effort);
                }
            }
            assert!(turns <= 3, "{name}: {turns} turns");
        }
    }

    #[test]
    fn without_a_governor_the_same_phones_overheat() {
        let mut phone = Phone { celsius: 24.0, degrees: 30.0, seconds: 90.0, resolution: 0.1 };
        (0..600).for_each(|second| phone.run(1.0, trace(second), 1.0));
        assert!(phone.celsius > 50.0);
    }

    #[test]
    fn measures_come_in_their_order() {
        let mut governor =
            Governor::new(GovernorConfig { small_model: true, ..Default::default() });
        let governor = governor.as_mut().unwrap();
        let mut average = |effort: f32| {
            governor.effort = effort;
            let steps: Vec<_> = (0..1000).map(|_| governor.step().unwrap()).collect();
            let mean = |of: fn(&Step) -> f32| steps.iter().map(of).sum::<f32>() / 1000.0;
            (mean(|s| s.drafts), mean(|s| s.threads), mean(|s| s.duty), steps[0].small_model)
        };
        let close = |a: f32, b: f32| (a - b).abs() < 0.01;
        assert_eq!(average(1.0), (1.0, 1.0, 1.0, false));
        let (drafts, threads, duty, small) = average(0.95);
        assert!(close(drafts, 0.5) && close(threads, 1.0) && close(duty, 1.0) && !small);
        let (drafts, threads, duty, small) = average(0.75);
        assert!(close(drafts, 0.0) && close(threads, 0.75) && close(duty, 1.0) && !small);
        let (drafts, threads, duty, small) = average(0.3);
        assert!(close(drafts, 0.0) && close(threads, 0.5) && close(duty, 0.5) && !small);
        assert!(average(0.2).3 && average(0.35).3 && !average(0.45).3 && !average(0.35).3);
        assert!(close(average(0.0).2, LEAST_DUTY));
    }

    #[test]
    fn the_limit_pauses_until_the_target_is_reached() {
        let mut governor = Governor::new(GovernorConfig::default()).unwrap();
        let mut at = |celsius: f32, second: u64| {
            let heat = Heat { celsius: Some(celsius), ..Heat::default() };
            governor.report(heat, Duration::from_secs(second)).unwrap();
            governor.step()
        };
        assert!(at(49.0, 0).is_ok());
        let Err(Error::ThermalPause { retry }) = at(51.0, 1) else { panic!("not paused") };
        assert_eq!(retry.as_secs(), 30);
        assert!(at(46.0, 60).is_err());
        assert!(at(44.9, 90).is_ok());
    }

    #[test]
    fn levels_and_headroom_count_where_degrees_are_unknown() {
        let run = |heat: Heat| {
            let mut governor = Governor::new(GovernorConfig::default()).unwrap();
            for second in 0..120 {
                governor.report(heat, Duration::from_secs(second)).unwrap();
            }
            (governor.effort(), governor.step().is_ok())
        };
        let level = |level| Heat { level: Some(level), ..Heat::default() };
        assert_eq!(run(level(ThermalLevel::Nominal)), (1.0, true));
        assert_eq!(run(level(ThermalLevel::Fair)), (1.0, true));
        assert!(run(level(ThermalLevel::Serious)).0 < 0.6);
        assert!(!run(level(ThermalLevel::Critical)).1);
        assert_eq!(run(Heat { headroom: Some(0.5), ..Heat::default() }), (1.0, true));
        assert!(run(Heat { headroom: Some(1.0), ..Heat::default() }).0 < 0.8);
        assert!(!run(Heat { headroom: Some(1.2), ..level(ThermalLevel::Nominal) }).1);
    }

    #[test]
    fn modes_limit_what_heat_would_allow() {
        let mut governor = Governor::new(GovernorConfig::default()).unwrap();
        assert_eq!(governor.step().unwrap(), Step::FULL);
        governor.set_mode(PowerMode::Background);
        let step = governor.step().unwrap();
        assert_eq!((step.threads, step.duty), (0.25, 0.5));
        assert_eq!(step.rest(Duration::from_millis(20)), Duration::from_millis(20));
        governor.set_mode(PowerMode::LowPower);
        assert_eq!(governor.step().unwrap().drafts, 0.0);
    }

    #[test]
    fn nonsense_is_refused_and_changes_nothing() {
        let config = GovernorConfig { critical_celsius: 40.0, ..GovernorConfig::default() };
        assert!(Governor::new(config).is_err());
        let mut governor = Governor::new(GovernorConfig::default()).unwrap();
        let nan = Heat { celsius: Some(f32::NAN), ..Heat::default() };
        assert!(governor.report(nan, Duration::ZERO).is_err());
        assert_eq!(governor.effort(), 1.0);
    }

    #[test]
    fn silence_ends_the_governing() {
        let mut governor = Governor::new(GovernorConfig::default()).unwrap();
        let hot = Heat { celsius: Some(60.0), ..Heat::default() };
        governor.report(hot, Duration::ZERO).unwrap();
        assert!(governor.step().is_err());
        governor.report(Heat::default(), Duration::from_secs(1)).unwrap();
        assert_eq!(governor.step().unwrap(), Step::FULL);
    }
}
