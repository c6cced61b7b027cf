//! AVX-VNNI rows: VPDPBUSD on 256 bits, for CPUs of the desktop and the laptop, which have no AVX-512.
//!
//! A line is two vectors, which are walked one after the other, group by group: both would not fit sixteen registers.
//! Floats and everything element-wise are AVX2's rows.

use super::abi::MatmulArgs;
use super::avx2::Ymm;

super::vnni::entries!(
    "avxvnni,avx2,fma,f16c",
    Ymm<true>,
    [1, 2, 3, 4],
    8,
    [1, 2],
    2,
    [1, 2, 3, 4, 5, 6]
);
