//! The argument blocks that every kernel row takes, Rust and C rows alike.
//!
//! One block per operation, `#[repr(C)]`, pointers and sizes only. A row trusts its block: the safe
//! functions of [`super`] check every length before they build one.

/// `y[m, n] = x[m, k] * w[n, k]^T` for a run of panels.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MatmulArgs {
    /// First panel.
    pub w: *const u8,
    /// Bytes from one panel to the next.
    pub panel_bytes: usize,
    /// Panels to multiply.
    pub panels: usize,
    /// Groups along `k`; for float formats `k` itself.
    pub groups: usize,
    /// Values of `k` in a group, a multiple of 16; 1 for float formats.
    pub group: usize,
    /// What follows the scales of a group: 0 nothing, 1 zero points (i16), 2 minima (f16).
    pub offset: u32,
    /// Activations: int8 for quantised formats, f32 for float formats; `m` rows.
    pub x: *const u8,
    /// Elements from one activation row to the next.
    pub x_stride: usize,
    /// One scale for each activation row and group; unused by float formats.
    pub x_scales: *const f32,
    /// The sum of each activation row and group; unused by float formats.
    pub x_sums: *const i32,
    /// Activation rows.
    pub m: usize,
    /// First output: row 0, first output row of the first panel.
    pub y: *mut f32,
    /// Elements from one output row to the next.
    pub y_stride: usize,
    /// Outputs to write in each row: at most what the panels have, and into the last of them.
    pub n: usize,
}

/// What may follow a matmul, in place: `y = clamp(y + bias)`, and then rounded to halves.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct EpilogueArgs {
    /// `m` rows of `n` floats.
    pub y: *mut f32,
    /// Elements from one row of `y` to the next.
    pub y_stride: usize,
    /// Rows.
    pub m: usize,
    /// Floats in a row.
    pub n: usize,
    /// `n` floats that are added to every row, or null.
    pub bias: *const f32,
    /// What is below becomes this; minus infinity changes nothing.
    pub low: f32,
    /// What is above becomes this; infinity changes nothing.
    pub high: f32,
    /// Where the f16 bits go, `m` rows of `n`; null for none.
    pub halves: *mut u16,
    /// Elements from one row of `halves` to the next.
    pub halves_stride: usize,
}

/// Quantises `m` rows of `k` floats to int8 with one scale and one sum a group.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct QuantizeArgs {
    /// `m` rows of `k` floats.
    pub x: *const f32,
    /// Elements from one input row to the next.
    pub x_stride: usize,
    /// Rows.
    pub m: usize,
    /// Floats in a row.
    pub k: usize,
    /// Values that share a scale.
    pub group: usize,
    /// Codes, `m` rows of `k` rounded up to whole groups; the padding is set to zero.
    pub q: *mut i8,
    /// One scale for each row and group.
    pub scales: *mut f32,
    /// The sum of the codes of each row and group.
    pub sums: *mut i32,
}

/// `y = x / rms(x) * weight` for `m` rows of `d` floats.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RmsNormArgs {
    /// `m` rows of `d` floats.
    pub x: *const f32,
    /// `d` floats.
    pub weight: *const f32,
    /// `m` rows of `d` floats.
    pub y: *mut f32,
    /// Rows.
    pub m: usize,
    /// Floats in a row.
    pub d: usize,
    /// Added to the mean of the squares.
    pub eps: f32,
}

/// `gate = silu(gate) * up`, element by element.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SwiGluArgs {
    /// Input and output.
    pub gate: *mut f32,
    /// The other factor.
    pub up: *const f32,
    /// Elements.
    pub len: usize,
}

/// `gate = gelu(gate) * up`, element by element, with the tanh form of GELU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GeGluArgs {
    /// Input and output.
    pub gate: *mut f32,
    /// The other factor.
    pub up: *const f32,
    /// Elements.
    pub len: usize,
}

/// `x = cap * tanh(x / cap)`, in place.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SoftCapArgs {
    /// Input and output.
    pub x: *mut f32,
    /// Elements.
    pub len: usize,
    /// The bound of the output's magnitude; above zero.
    pub cap: f32,
}

/// `x = softmax(x)`, in place.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SoftmaxArgs {
    /// Scores in, probabilities out.
    pub x: *mut f32,
    /// Elements.
    pub len: usize,
}

/// One step of attention: query rows of one KV head against the keys and values of one block.
///
/// Keys and values lie in chunks of 16 positions, one after the other. Float formats: keys `[d][16]`,
/// values `[16][d]`, aligned to the element. Integer formats: keys `[d / 4][16][4]` of i8, values `[16][d]` of
/// i8 or `[16][d / 32, rounded up][16]` bytes of two codes (columns 0 to 15 of 32 in the low nibbles, 16 to
/// 31 in the high ones, each less 8), both followed by 16 scales, f32, aligned to 4. `d` is a multiple of 16.
/// The running state of each query row is carried from block to block.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AttendArgs {
    /// `rows` query rows of `d` floats; unused by integer formats.
    pub q: *const f32,
    /// `rows` query rows of codes, `code = 128 * high + low`: `d` high bytes, `d` low bytes, `d` codes as
    /// i16; unused by float formats.
    pub q_codes: *const i8,
    /// One scale for each row of codes.
    pub q_scales: *const f32,
    /// The sum of each row of codes.
    pub q_sums: *const i32,
    /// Query rows.
    pub rows: usize,
    /// Floats of a head, padded to a multiple of 16.
    pub d: usize,
    /// Keys of this block.
    pub k: *const u8,
    /// Values of this block.
    pub v: *const u8,
    /// Keys that will be wanted after these, or NULL: fetched into the cache, never read.
    pub next_k: *const u8,
    /// Values that will be wanted after these, or NULL.
    pub next_v: *const u8,
    /// For each query row, the end of the positions of this block that it sees.
    pub visible: *const u32,
    /// For each query row, the first position of this block that it sees; none when not below `visible`.
    pub from: *const u32,
    /// Multiplied onto each score.
    pub scale: f32,
    /// Scores are bent to lie within this of zero, after the scale; 0 leaves them alone.
    pub softcap: f32,
    /// For each query row, the largest score so far; starts at minus infinity.
    pub max: *mut f32,
    /// For each query row, 16 partial sums of the weights; start at zero.
    pub sum: *mut f32,
    /// For each query row, `d` weighted sums of the values; start at zero.
    pub acc: *mut f32,
}
