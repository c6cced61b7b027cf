//! Which cores to compute on: the big ones, where cores are unlike.
//!
//! A phone has two or three kinds of core. One matrix shared among all of them is finished when the
//! slowest core has done its last tile, and the small ones give more heat than speed to work that waits
//! for memory. The kernel of Linux and Android says what each core is worth: `cpu_capacity` (0 to 1024),
//! or where that is missing its highest frequency. Elsewhere, and where all cores are alike, the system
//! is left to choose.
#![forbid(unsafe_code)]

use std::path::Path;

/// Where the kernel describes the cores.
const SYSFS: &str = "/sys/devices/system/cpu";
/// A core worth less than this share of the best one is a small one. Middle cores of phones are at 0.6
/// to 0.9, small ones at 0.2 to 0.5.
const SMALL: f64 = 0.55;

/// Which cores the workers of a pool may run on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CorePolicy {
    /// The big ones where they differ; all where they are alike.
    #[default]
    Auto,
    /// Every core that this process may use.
    All,
    /// The small ones where they differ: least heat, for work that nobody waits for.
    Small,
    /// These, by number.
    These(Vec<usize>),
}

impl CorePolicy {
    /// The cores to pin workers to, or nothing where the system is to choose.
    pub(crate) fn choose(&self, allowed: &[usize]) -> Option<Vec<usize>> {
        self.choose_from(allowed, Path::new(SYSFS))
    }

    /// Cores that [`CorePolicy::choose`] leaves, or those that the process may use at once.
    #[cfg(feature = "engine")]
    pub(crate) fn count(&self) -> usize {
        let parallel = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.choose(&crate::threads::allowed_cores())
            .map_or(parallel, |cores| cores.len().min(parallel))
    }

    fn choose_from(&self, allowed: &[usize], sysfs: &Path) -> Option<Vec<usize>> {
        let wanted: Vec<usize> = match self {
            Self::All => return None,
            Self::These(cores) => {
                cores.iter().copied().filter(|core| allowed.contains(core)).collect()
            }
            Self::Auto | Self::Small => {
                let worth: Option<Vec<f64>> =
                    allowed.iter().map(|core| worth(sysfs, *core)).collect();
                let worth = worth?;
                let best = worth.iter().copied().fold(0.0, f64::max);
                let small = |worth: &f64| *worth < best * SMALL;
                if !worth.iter().any(small) {
                    return None;
                }
                let keep_small = *self == Self::Small;
                let kept = allowed.iter().zip(&worth).filter(|(_, w)| small(w) == keep_small);
                kept.map(|(core, _)| *core).collect()
            }
        };
        (!wanted.is_empty()).then_some(wanted)
    }
}

fn worth(sysfs: &Path, core: usize) -> Option<f64> {
    let read = |file: &str| {
        let text = std::fs::read_to_string(sysfs.join(format!("cpu{core}/{file}"))).ok()?;
        text.trim().parse::<f64>().ok().filter(|worth| *worth > 0.0)
    };
    read("cpu_capacity").or_else(|| read("cpufreq/cpuinfo_max_freq"))
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    /// A kernel's description of cores with these values in `file`.
    fn machine(name: &str, file: &str, values: &[u32]) -> std::path::PathBuf {
        let root = std::env::temp_dir().join(format!("nybl-cores-{}-{name}", std::process::id()));
        for (core, value) in values.iter().enumerate() {
            let path = root.join(format!("cpu{core}/{file}"));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    #[test]
    fn big_and_middle_cores_are_taken_and_small_ones_left() {
        let all = [0, 1, 2, 3, 4, 5, 6, 7];
        let phone = machine("phone", "cpu_capacity", &[250, 250, 250, 250, 744, 744, 744, 1024]);
        let choose = |policy: CorePolicy| policy.choose_from(&all, &phone);
        assert_eq!(choose(CorePolicy::Auto), Some(vec![4, 5, 6, 7]));
        assert_eq!(choose(CorePolicy::Small), Some(vec![0, 1, 2, 3]));
        assert_eq!(choose(CorePolicy::All), None);
        assert_eq!(choose(CorePolicy::These(vec![7, 9])), Some(vec![7]));
        // Only what the process may use counts: in the background Android takes the big cores away.
        assert_eq!(CorePolicy::Auto.choose_from(&all[..4], &phone), None);
        std::fs::remove_dir_all(phone).unwrap();
    }

    #[test]
    fn frequencies_stand_in_for_capacities() {
        let old = machine("old", "cpufreq/cpuinfo_max_freq", &[1_300_000, 1_300_000, 2_800_000]);
        assert_eq!(CorePolicy::Auto.choose_from(&[0, 1, 2], &old), Some(vec![2]));
        std::fs::remove_dir_all(old).unwrap();
    }

    #[test]
    fn like_and_unknown_cores_are_left_to_the_system() {
        let server = machine("server", "cpu_capacity", &[1024, 1024]);
        assert_eq!(CorePolicy::Auto.choose_from(&[0, 1], &server), None);
        assert_eq!(CorePolicy::Auto.choose_from(&[0, 1, 2], &server), None);
        assert_eq!(CorePolicy::Auto.choose_from(&[0, 1], Path::new("/nowhere")), None);
        std::fs::remove_dir_all(server).unwrap();
    }
}
