//! Every row of the kernel table, called through its raw function pointer, against the scalar row of
//! its operation; and the scalar rows against the definitions written once more in this file.
//!
//! One trial a row, so a new row is tested from the moment it stands in the table. The safe wrapper is
//! left out on purpose: a row must keep to its argument block even where the wrapper would have hidden
//! that it does not, and what a callee saves is looked at after each call. So each case runs three times: with every
//! buffer flush against an unmapped page on its right, on its left, and between canaries at an address that is aligned
//! to 4 bytes only. Under Miri, which finds each access out of bounds by itself, cases take turns with the three.
//!
//! - `NYBL_ISA` masks CPU features; rows that are masked or missing are reported as ignored.
//! - `NYBL_EXPECT=row,row` fails the run when one of these rows does not exist or was not run; `avx2`
//!   or `*-avx2` stands for all rows that end so. A CI lane thus proves that it tests what it says.
//! - `NYBL_SEED` replaces the seed, which every failure prints.
//!
//! Design after checkasm of the dav1d project.

mod cases;
mod guard;
mod registers;

use cases::{
    AttendCase, Case, EpilogueCase, GatedCase, Gelu, MatmulCase, QuantizeCase, RmsNormCase, Silu,
    SoftCapCase, SoftmaxCase,
};
use guard::{Arena, Place};
use libtest_mimic::{Arguments, Completion, Trial};
use nybl::isa::Isa;
use nybl::kernel::{Op, ROWS, Row};
use std::process::ExitCode;

fn main() -> ExitCode {
    guard::name_faults();
    let have = match Isa::from_environment() {
        Ok(have) => have,
        Err(error) => {
            eprintln!("NYBL_ISA: {error}");
            return ExitCode::FAILURE;
        }
    };
    let seed = match std::env::var("NYBL_SEED").ok().map(|text| text.parse()) {
        None => 0x6e79_626c,
        Some(Ok(seed)) => seed,
        Some(Err(error)) => {
            eprintln!("NYBL_SEED: {error}");
            return ExitCode::FAILURE;
        }
    };
    let expect = std::env::var("NYBL_EXPECT").unwrap_or_default();
    let expect: Vec<String> =
        expect.split(',').map(|x| x.trim().to_owned()).filter(|x| !x.is_empty()).collect();
    let mut trials: Vec<Trial> = ROWS.iter().map(|row| trial(row, have, &expect, seed)).collect();
    trials.push(Trial::test("a damaged register is found", || {
        registers::finds_damage().map_err(Into::into)
    }));
    for name in expect {
        if !ROWS.iter().any(|row| stands_for(&name, row)) {
            let wrong = format!("NYBL_EXPECT names {name}, and no row of this build is named so");
            trials.push(Trial::test(format!("expect {name}"), move || Err(wrong.into())));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Whether an item of `NYBL_EXPECT` means this row.
fn stands_for(item: &str, row: &Row) -> bool {
    let isa = item.strip_prefix("*-").unwrap_or(item);
    row.name == item || row.name.rsplit('-').next() == Some(isa)
}

fn trial(row: &'static Row, have: Isa, expect: &[String], seed: u64) -> Trial {
    if have.has(row.needs) {
        return Trial::test(row.name, move || check(row, seed).map_err(Into::into));
    }
    let missing = format!("needs {}, have {have}", row.needs);
    if expect.iter().any(|item| stands_for(item, row)) {
        return Trial::test(row.name, move || {
            Err(format!("NYBL_EXPECT asks for {}, which {missing}", row.name).into())
        });
    }
    Trial::ignorable_test(row.name, || Ok(Completion::ignored_with(missing)))
}

/// All cases of a row.
fn check(row: &Row, seed: u64) -> Result<(), String> {
    match row.op {
        Op::Matmul(format) => each(row, seed, MatmulCase::all(format, seed)),
        Op::Epilogue => each(row, seed, EpilogueCase::all(seed)),
        Op::Quantize => each(row, seed, QuantizeCase::all(seed)),
        Op::RmsNorm => each(row, seed, RmsNormCase::all(seed)),
        Op::SwiGlu => each(row, seed, GatedCase::<Silu>::all(seed)),
        Op::GeGlu => each(row, seed, GatedCase::<Gelu>::all(seed)),
        Op::SoftCap => each(row, seed, SoftCapCase::all(seed)),
        Op::Softmax => each(row, seed, SoftmaxCase::all(seed)),
        Op::Attend(format) => each(row, seed, AttendCase::all(format, seed)),
    }
}

fn each<C: Case>(row: &Row, seed: u64, cases: impl Iterator<Item = C>) -> Result<(), String> {
    let run = C::function(row.run).ok_or("the function is of another operation")?;
    let oracle = ROWS.iter().find(|other| other.op == row.op).ok_or("no oracle")?;
    let is_oracle = oracle.name == row.name;
    let oracle = C::function(oracle.run).ok_or("the oracle is of another operation")?;
    let arena = &mut Arena::default();
    for (index, case) in cases.enumerate() {
        let name = format!("{}: NYBL_SEED={seed} {}", row.name, case.describe());
        let named = |what| format!("{name}: {what}");
        let want = if is_oracle {
            case.define()
        } else {
            case.run(oracle, arena, Place::Middle).map_err(named)?
        };
        let places = if cfg!(miri) { &Place::ALL[index % 3..][..1] } else { &Place::ALL[..] };
        for place in places.iter().copied() {
            let name = format!("{name}, {place:?}");
            let named = |what| format!("{name}: {what}");
            registers::watch(run);
            let checked = registers::checked::<C::Args>;
            let got = guard::announce(&name, || case.run(checked, arena, place)).map_err(named)?;
            registers::verdict().map_err(named)?;
            for (got, want) in got.iter().zip(&want) {
                got.equals(want, row.contract).map_err(named)?;
            }
            if is_oracle {
                case.approximates(&got).map_err(named)?;
            }
        }
    }
    Ok(())
}
