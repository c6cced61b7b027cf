//! SVE rows, written in C (`kernels/sve_matmul.c`): stable Rust has no types for vectors of unknown length.

use super::abi::MatmulArgs;

unsafe extern "C" {
    /// Signed bytes.
    #[link_name = "nybl_sve_matmul_q8"]
    pub(super) fn matmul_q8(a: *const MatmulArgs);
    /// Four bits.
    #[link_name = "nybl_sve_matmul_q4"]
    pub(super) fn matmul_q4(a: *const MatmulArgs);
    /// Three bits.
    #[link_name = "nybl_sve_matmul_q3"]
    pub(super) fn matmul_q3(a: *const MatmulArgs);
    /// Two bits.
    #[link_name = "nybl_sve_matmul_q2"]
    pub(super) fn matmul_q2(a: *const MatmulArgs);
}
