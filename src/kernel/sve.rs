//! SVE rows, written in C (`kernels/sve_*.c`): stable Rust has no types for vectors of unknown length.

use super::abi::MatmulArgs;

unsafe extern "C" {
    /// Four bits, symmetric.
    #[link_name = "nybl_sve_matmul_q4"]
    pub(super) fn matmul_q4(a: *const MatmulArgs);
    /// Four bits with a zero point.
    #[link_name = "nybl_sve_matmul_q4z"]
    pub(super) fn matmul_q4z(a: *const MatmulArgs);
    /// Four bits with a minimum.
    #[link_name = "nybl_sve_matmul_q4m"]
    pub(super) fn matmul_q4m(a: *const MatmulArgs);
    /// Signed bytes.
    #[link_name = "nybl_sve_matmul_q8"]
    pub(super) fn matmul_q8(a: *const MatmulArgs);
}
