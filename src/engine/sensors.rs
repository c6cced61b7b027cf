//! The temperature that Linux and Android show, where they let an app read it.
//!
//! What the governor holds is the temperature of what a hand touches. Of the kernel's thermal zones only those of
//! skin and battery say something about it; those of the chip are tens of degrees hotter whenever it works.
//! The battery's own file, in tenths of a degree, stands in where no zone has one.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Reports come this often.
pub const INTERVAL: Duration = Duration::from_secs(5);

/// Where the kernel shows what it measures.
const SYSFS: &str = "/sys/class";

/// A sensor that can be read.
#[derive(Clone, Debug, PartialEq)]
struct Sensor {
    path: PathBuf,
    /// Steps of the number in the file that make a degree.
    per_degree: f32,
}

/// Sensors of skin and battery.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sensors(Vec<Sensor>);

impl Sensors {
    /// Those that this process may read; none on most phones, where apps may not, and elsewhere than on Linux
    /// and Android.
    #[must_use]
    pub fn find() -> Self {
        Self::find_in(Path::new(SYSFS))
    }

    fn find_in(sysfs: &Path) -> Self {
        let zones = std::fs::read_dir(sysfs.join("thermal")).into_iter().flatten().flatten();
        let mut found: Vec<_> = zones
            .map(|zone| zone.path())
            .filter(|zone| {
                let kind = std::fs::read_to_string(zone.join("type")).unwrap_or_default();
                let kind = kind.to_ascii_lowercase();
                ["skin", "battery", "shell"].iter().any(|word| kind.contains(word))
            })
            .map(|zone| Sensor { path: zone.join("temp"), per_degree: 1000.0 })
            .collect();
        let battery = sysfs.join("power_supply/battery/temp");
        found.push(Sensor { path: battery, per_degree: 10.0 });
        found.retain(|sensor| sensor.celsius().is_some());
        Self(found)
    }

    /// Whether there are any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The highest temperature in degrees Celsius.
    #[must_use]
    pub fn celsius(&self) -> Option<f32> {
        self.0.iter().filter_map(Sensor::celsius).reduce(f32::max)
    }
}

impl Sensor {
    fn celsius(&self) -> Option<f32> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        let degrees = text.trim().parse::<i32>().ok()? as f32 / self.per_degree;
        // A sensor that is not there shows numbers such as -40 or 200.
        (0.0..=100.0).contains(&degrees).then_some(degrees)
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_of_skin_and_battery_counts_and_no_chip() {
        let root = std::env::temp_dir().join(format!("nybl-sensors-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert!(Sensors::find_in(&root).is_empty());
        for (zone, kind, temp) in [
            ("thermal_zone0", "cpu-0-0-usr\n", "81000\n"),
            ("thermal_zone1", "quiet-therm-SKIN\n", "38500\n"),
            ("thermal_zone2", "battery\n", "-40000\n"),
            ("cooling_device0", "battery-fan\n", "no number\n"),
        ] {
            write(&format!("thermal/{zone}/type"), kind);
            write(&format!("thermal/{zone}/temp"), temp);
        }
        let sensors = Sensors::find_in(&root);
        assert_eq!((sensors.0.len(), sensors.celsius()), (1, Some(38.5)));
        write("power_supply/battery/temp", "412\n");
        let sensors = Sensors::find_in(&root);
        assert_eq!((sensors.0.len(), sensors.celsius()), (2, Some(41.2)));
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(sensors.celsius(), None);
    }
}
