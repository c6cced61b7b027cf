//! The families of models: what the name of an architecture says that no key of a file does.
//!
//! There is one forward pass. A family is a row of [`FAMILIES`]: facts that its authors left to the
//! program, under the name that GGUF files use.
#![forbid(unsafe_code)]

use super::rope::Pairing;

/// The function that the gate of a feed-forward network goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU in its tanh form.
    Gelu,
}

/// Which layers have the sliding window of a model, where its file does not list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Windows {
    /// All of them.
    All,
    /// All but every so many-th.
    AllBut(usize),
}

/// One architecture.
#[derive(Debug)]
pub(super) struct Family {
    /// Its name in GGUF files.
    pub(super) name: &'static str,
    /// Which floats of a head turn together.
    pub(super) pairing: Pairing,
    /// Whether queries, keys and values have biases.
    pub(super) qkv_bias: bool,
    /// Whether each head of queries and keys is normalised.
    pub(super) qk_norm: bool,
    /// Whether the outputs of attention and of the feed-forward network are normalised.
    pub(super) post_norms: bool,
    /// The gate's function.
    pub(super) activation: Activation,
    /// Whether embeddings are multiplied by the root of their width.
    pub(super) scales_embedding: bool,
    /// Whether scores and logits may be bent to lie within a cap.
    pub(super) caps: &'static [&'static str],
    /// Which layers have the window.
    pub(super) windows: Windows,
    /// The base of the wavelengths in layers with a window, where it is another one there.
    pub(super) windowed_theta: Option<f64>,
    /// Every so many-th layer does not rotate; 0 for none.
    pub(super) unrotated_step: usize,
    /// Layers of the one size whose scores are scaled by the width of the model over its heads instead of
    /// the length of a head: no key of a GGUF file says so.
    pub(super) scaled_by_width: usize,
}

const LLAMA: Family = Family {
    name: "llama",
    pairing: Pairing::Neighbours,
    qkv_bias: false,
    qk_norm: false,
    post_norms: false,
    activation: Activation::Silu,
    scales_embedding: false,
    caps: &[],
    windows: Windows::All,
    windowed_theta: None,
    unrotated_step: 0,
    scaled_by_width: 0,
};

/// Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size".
const GEMMA_2: Family = Family {
    name: "gemma2",
    pairing: Pairing::Halves,
    post_norms: true,
    activation: Activation::Gelu,
    scales_embedding: true,
    caps: &["attn_logit_softcapping", "final_logit_softcapping"],
    windows: Windows::AllBut(2),
    scaled_by_width: 46,
    ..LLAMA
};

/// Every architecture that can be run. Mistral and SmolLM2 are `llama`.
pub(super) static FAMILIES: &[Family] = &[
    LLAMA,
    Family { name: "qwen2", pairing: Pairing::Halves, qkv_bias: true, ..LLAMA },
    Family { name: "qwen3", pairing: Pairing::Halves, qk_norm: true, ..LLAMA },
    GEMMA_2,
    // Gemma Team 2025, "Gemma 3 Technical Report".
    Family {
        name: "gemma3",
        qk_norm: true,
        caps: &["final_logit_softcapping"],
        windows: Windows::AllBut(6),
        windowed_theta: Some(10_000.0),
        scaled_by_width: 62,
        ..GEMMA_2
    },
    Family { name: "phi3", pairing: Pairing::Halves, ..LLAMA },
    Family { name: "smollm3", unrotated_step: 4, ..LLAMA },
];

impl Family {
    /// The family of that name.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.name == name)
    }

    /// All names, for messages.
    pub(super) fn names() -> String {
        FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
    }

    /// Whether a layer has the window, where the file does not say.
    pub(super) fn has_window(&self, layer: usize) -> bool {
        match self.windows {
            Windows::All => true,
            Windows::AllBut(step) => !(layer + 1).is_multiple_of(step),
        }
    }

    /// Whether a layer rotates, where the file does not say.
    pub(super) fn rotates(&self, layer: usize) -> bool {
        self.unrotated_step == 0 || !(layer + 1).is_multiple_of(self.unrotated_step)
    }
}
