//! Every kernel of this CPU against the scalar one, on weights and activations of any bits: shapes, tails,
//! group sizes, scales that are NaN, infinite or denormal. `cargo +nightly fuzz run kernels`.
#![no_main]

use arbitrary::Arbitrary;
use nybl::isa::Isa;
use nybl::kernel::layout::WHOLE_ROW;
use nybl::kernel::scores::maxima;
use nybl::kernel::{Activations, Epilogue, Format, Input, Kernels, Layout, MatmulJob, Packed};
use nybl::memory::Aligned;
use nybl::threads::Pool;
use std::sync::OnceLock;

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    format: u8,
    group: u8,
    n: u8,
    k: u16,
    m: u8,
    bias: bool,
    clamp: Option<[f32; 2]>,
    cap: f32,
    eps: f32,
    /// Whether activations are tame: of any bits, one NaN is soon everywhere.
    tame: bool,
    bytes: &'a [u8],
}

impl Case<'_> {
    /// Byte `i` of an endless pattern that begins with the input's bytes.
    fn byte(&self, i: usize) -> u8 {
        let Some(&byte) = self.bytes.get(i % self.bytes.len().max(1)) else { return i as u8 };
        byte.wrapping_add((i / self.bytes.len()) as u8)
    }

    fn float(&self, i: usize) -> f32 {
        let bits = u32::from_le_bytes([0, 1, 2, 3].map(|j| self.byte(i * 4 + j)));
        if self.tame { (bits % 2001) as f32 / 1000.0 - 1.0 } else { f32::from_bits(bits) }
    }

    fn floats(&self, from: usize, count: usize) -> Vec<f32> {
        (from..from + count).map(|i| self.float(i)).collect()
    }
}

/// What runs here, the scalar kernels first.
fn all() -> &'static (Pool, Vec<Kernels>) {
    static ALL: OnceLock<(Pool, Vec<Kernels>)> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut isas = vec![Isa::NONE];
        for (_, feature) in Isa::FEATURES {
            if Isa::detect().has(*feature) {
                isas.push(isas[isas.len() - 1].and(*feature));
            }
        }
        let kernels = isas.into_iter().map(|isa| Kernels::new(isa).expect("it has them"));
        (Pool::new(1).expect("a thread"), kernels.collect())
    })
}

/// Equal bits, or NaN both.
fn same(isa: Isa, what: &str, got: &[f32], want: &[f32]) {
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
    if let Some(at) = got.iter().zip(want).position(differs) {
        panic!("{what} by {isa}: [{at}] is {:e}, not {:e}", got[at], want[at]);
    }
}

libfuzzer_sys::fuzz_target!(|case: Case<'_>| {
    let (pool, kernels) = all();
    let format = Format::ALL[usize::from(case.format) % Format::ALL.len()];
    let group = [16, 32, 64, 128, WHOLE_ROW][usize::from(case.group) % 5];
    let (n, k) = (1 + usize::from(case.n), 1 + usize::from(case.k % 600));
    let m = 1 + usize::from(case.m % 12);
    elementwise(&case, pool, kernels);
    let Ok(layout) = Layout::new(format, group, n, k) else { return };
    let mut bytes = Aligned::<u8>::zeroed("weights", layout.bytes()).expect("small");
    bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = case.byte(i));
    let x = case.floats(7, m * k);
    let bias = case.floats(3, n);
    let epilogue = Epilogue { bias: case.bias.then_some(&bias[..]), clamp: case.clamp };
    let mut want: Option<(Vec<i8>, Vec<f32>, Vec<f32>)> = None;
    for kernels in kernels {
        let mut quantised = Activations::new(m, k).expect("small");
        let w = Packed::new(layout, &bytes).expect("as long as it has to be");
        let mut y = vec![0.0; m * n];
        let input = if format.is_quantised() {
            kernels.quantize(pool, &x, k, layout.group(), &mut quantised);
            Input::Quantised(&quantised)
        } else {
            Input::Float(&x)
        };
        kernels.matmul(pool, &mut [MatmulJob { w, x: input, y: &mut y, epilogue }]);
        let largest: Vec<f32> = y.chunks(n).flat_map(maxima).collect();
        let (mut scores, mut found) = (vec![0.0; m * n], vec![0.0; largest.len()]);
        let job = MatmulJob { w, x: input, y: &mut scores, epilogue };
        kernels.score(pool, job, &mut found);
        same(kernels.isa(), "scores", &scores, &y);
        same(kernels.isa(), "largest scores", &found, &largest);
        let (codes, scales) = match format.is_quantised() {
            true => (quantised.codes().to_vec(), quantised.scales().to_vec()),
            false => Default::default(),
        };
        match &want {
            None => want = Some((codes, scales, y)),
            Some((want_codes, want_scales, want_y)) => {
                assert_eq!(&codes, want_codes, "codes by {}", kernels.isa());
                same(kernels.isa(), "scales", &scales, want_scales);
                same(kernels.isa(), format.name(), &y, want_y);
            }
        }
    }
});

/// The kernels that work on rows of floats.
fn elementwise(case: &Case<'_>, pool: &Pool, kernels: &[Kernels]) {
    let len = 1 + usize::from(case.k % 300);
    let (x, up) = (case.floats(0, len), case.floats(len, len));
    let mut want: Option<[Vec<f32>; 5]> = None;
    for kernels in kernels {
        let mut norm = vec![0.0; len];
        kernels.rmsnorm(pool, &x, &up, case.eps, &mut norm);
        let (mut silu, mut gelu, mut cap, mut soft) = (x.clone(), x.clone(), x.clone(), x.clone());
        kernels.swiglu(pool, &mut silu, &up);
        kernels.geglu(pool, &mut gelu, &up);
        kernels.softcap(pool, &mut cap, case.cap);
        kernels.softmax(&mut soft);
        let got = [norm, silu, gelu, cap, soft];
        match &want {
            None => want = Some(got),
            Some(want) => {
                let names = ["rmsnorm", "swiglu", "geglu", "softcap", "softmax"];
                for ((name, got), want) in names.iter().zip(&got).zip(want) {
                    same(kernels.isa(), name, got, want);
                }
            }
        }
    }
}
