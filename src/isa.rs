//! What the CPU can do: the only place that asks it.
//!
//! A set of features decides which rows of the kernel table may run. The set can be narrowed, by
//! `NYBL_ISA` or by the API, which serves tests and is the ladder down when a device misbehaves.
//! Narrowing never changes a result: all rows give the same bits.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use std::fmt;

/// A set of CPU features, as the kernel table names them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Isa(u32);

/// Makes the feature constants, their names and the probe from one list.
macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $text:literal, $probe:expr;)*) => {
        impl Isa {
            $($(#[$doc])* pub const $name: Isa = Isa(1 << $bit);)*

            /// Every feature with its name, weakest first.
            pub const FEATURES: &'static [(&'static str, Isa)] = &[$(($text, Isa::$name)),*];

            /// The features of the CPU this runs on.
            #[must_use]
            pub fn detect() -> Isa {
                let mut have = Isa::NONE;
                $(if $probe { have = have.and(Isa::$name); })*
                have
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! x86 { ($($feature:tt),*) => { $(std::arch::is_x86_feature_detected!($feature))&&* } }
#[cfg(not(target_arch = "x86_64"))]
macro_rules! x86 {
    ($($feature:tt),*) => {
        false
    };
}

#[cfg(target_arch = "aarch64")]
macro_rules! arm {
    // All of these, where `|` leaves a choice.
    ($($($feature:tt)|+),+) => {
        $(($(std::arch::is_aarch64_feature_detected!($feature))||+))&&+
    };
}
#[cfg(not(target_arch = "aarch64"))]
macro_rules! arm {
    ($($($feature:tt)|+),+) => {
        false
    };
}

features! {
    /// Fixed-width vectors of the target's baseline; a bit of its own so that it can be masked.
    PORTABLE = 0, "portable", true;
    /// AVX2 with FMA and F16C, which no CPU has apart.
    AVX2 = 1, "avx2", x86!("avx2", "fma", "f16c");
    /// AVX-VNNI: dots of four bytes on 256 bits.
    AVXVNNI = 7, "avxvnni", x86!("avxvnni");
    /// AVX-512 F, BW, DQ, VL and VNNI.
    AVX512 = 2, "avx512", x86!("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni");
    /// Advanced SIMD, in every 64-bit Arm core.
    NEON = 3, "neon", arm!("neon");
    /// SDOT and UDOT (Armv8.2 and later).
    DOTPROD = 4, "dotprod", arm!("dotprod");
    /// SMMLA (Armv8.6 and later), and FCMLA, which is older (Armv8.3). Windows does not tell of FCMLA, but of
    /// another part of Armv8.3.
    I8MM = 5, "i8mm", arm!("i8mm", "fcma" | "jsconv");
    /// Scalable vectors of any length.
    SVE = 6, "sve", arm!("sve");
}

impl Isa {
    /// No feature: only the scalar rows run.
    pub const NONE: Isa = Isa(0);

    /// Both sets together.
    #[must_use]
    pub const fn and(self, other: Isa) -> Isa {
        Isa(self.0 | other.0)
    }

    /// What both sets have.
    #[must_use]
    pub const fn masked(self, mask: Isa) -> Isa {
        Isa(self.0 & mask.0)
    }

    /// Whether every feature of `needs` is here.
    #[must_use]
    pub const fn has(self, needs: Isa) -> bool {
        self.0 & needs.0 == needs.0
    }

    /// The bits, as the C interface reports them.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The features with these bits; unknown bits are dropped.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Isa {
        Isa(bits & ((1 << Self::FEATURES.len()) - 1))
    }

    /// The mask that a name stands for: the named feature and all weaker ones, or none for `scalar`.
    /// Several names with `+` between them, as a set is displayed, are those features and no others.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with the known names.
    pub fn up_to(name: &str) -> Result<Isa> {
        if name == "scalar" {
            return Ok(Isa::NONE);
        }
        if name.contains('+') {
            let sets = name.split('+').map(Self::named).collect::<Result<Vec<_>>>()?;
            return Ok(sets.into_iter().fold(Isa::NONE, Isa::and));
        }
        let last = Self::named(name)?;
        let until = Self::FEATURES.iter().take_while(|(_, feature)| *feature != last);
        Ok(until.fold(last, |all, (_, feature)| all.and(*feature)))
    }

    /// The one feature of this name.
    fn named(name: &str) -> Result<Isa> {
        match Self::FEATURES.iter().find(|(text, _)| *text == name) {
            Some((_, feature)) => Ok(*feature),
            None => {
                let known: Vec<_> = Self::FEATURES.iter().map(|(text, _)| *text).collect();
                Err(Error::InvalidArgument(format!(
                    "no instruction set is named {name:?}; known: scalar, {}",
                    known.join(", ")
                )))
            }
        }
    }

    /// The detected features, narrowed by the environment variable `NYBL_ISA` where it is set.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the variable holds an unknown name.
    pub fn from_environment() -> Result<Isa> {
        let have = Self::detect();
        match std::env::var("NYBL_ISA") {
            Ok(name) if !name.is_empty() => Ok(have.masked(Self::up_to(&name)?)),
            _ => Ok(have),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> =
            Self::FEATURES.iter().filter(|(_, x)| self.has(*x)).map(|(text, _)| *text).collect();
        f.write_str(if names.is_empty() { "scalar" } else { "" })?;
        f.write_str(&names.join("+"))
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_itself_and_everything_weaker() {
        let avx2 = Isa::up_to("avx2").unwrap();
        assert!(avx2.has(Isa::AVX2) && avx2.has(Isa::PORTABLE) && !avx2.has(Isa::AVX512));
        // The order of the list counts, not that of the bits, which are a promise to C.
        assert!(Isa::up_to("avx512").unwrap().has(Isa::AVXVNNI) && !avx2.has(Isa::AVXVNNI));
        assert_eq!(Isa::up_to("scalar").unwrap(), Isa::NONE);
    }

    #[test]
    fn names_with_plus_mean_themselves() {
        let set = Isa::NEON.and(Isa::SVE);
        assert_eq!(Isa::up_to(&set.to_string()).unwrap(), set);
        assert!(Isa::up_to("neon+mmx").is_err());
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let text = Isa::up_to("mmx").unwrap_err().to_string();
        assert!(text.contains("mmx") && text.contains("avx512"), "{text}");
    }
}
