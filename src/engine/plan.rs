//! What a model and its sessions will take, before anything is loaded.
//!
//! A phone's system ends a process that takes too much, without asking. So a host asks first: a plan reads
//! the head of the file and nothing else, says how many bytes will be a clean mapping (which the system takes
//! back when it likes) and how many will be dirty (which count against the process), and what to
//! change when these are too many. Buffers are not estimated: they are made by the same code, looked at and
//! dropped, and nobody touches their pages meanwhile.
#![forbid(unsafe_code)]

use super::session::{Extent, PREFILL_CHUNK, SessionConfig};
use crate::error::{Error, Result};
use crate::file::metadata::{Metadata, Value};
use crate::file::model_file::{ModelFile, Part};
use crate::kernel::KvFormat;
use crate::kernel::scores::Kept;
use crate::kv::BLOCK_TOKENS;
use crate::kv::store::{KvConfig, KvShape, KvStore};
use crate::model::config::Config;
use crate::model::forward::Scratch;
use crate::model::weights::Needs;
use crate::spec::control::MOST_DRAFTS;
use crate::spec::distribution::Distribution;

/// What is planned for.
#[derive(Clone, Debug)]
pub struct PlanConfig {
    /// The settings of every session.
    pub session: SessionConfig,
    /// Sessions at a time.
    pub sessions: usize,
    /// Whether they speculate. What a drafter takes is the drafter's own plan.
    pub speculates: bool,
    /// Bytes that may be dirty.
    pub budget: Option<usize>,
}

impl Default for PlanConfig {
    fn default() -> Self {
        Self { session: SessionConfig::default(), sessions: 1, speculates: false, budget: None }
    }
}

/// What a model and its sessions take, in bytes. The program and the stacks of its threads are not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Weights in the mapping of the file: clean, shared, taken back by the system when it needs memory.
    pub mapped: usize,
    /// Weights in private memory: all of them where the file has to be packed first.
    pub private: usize,
    /// The tokenizer, an estimate from the size of its vocabulary.
    pub tokenizer: usize,
    /// Keys and values of all sessions when their contexts are full.
    pub kv: usize,
    /// Keys and values for every thousand tokens of one session.
    pub kv_1k: usize,
    /// Buffers of all sessions.
    pub scratch: usize,
    /// Tokens that a session can hold.
    pub context: usize,
    /// The budget that was given.
    pub budget: Option<usize>,
    /// When the budget is exceeded: changes of which each alone makes everything fit, those that harm
    /// least first. When none does, one that takes several together. Empty when nothing helps.
    pub remedies: Vec<Remedy>,
    /// The dirty bytes that are left with every change that is known: no budget below can be met.
    pub least: usize,
}

/// A change of settings that makes a plan fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Remedy {
    /// Convert the file to `.nybl` once, so that its weights stay in the mapping.
    pub convert: bool,
    /// Another [`SessionConfig::prefill_chunk`]: prompts take longer, results do not change.
    pub prefill_chunk: Option<usize>,
    /// Another [`SessionConfig::kv_format`], which rounds keys and values.
    pub kv_format: Option<KvFormat>,
    /// Another [`SessionConfig::context`].
    pub context: Option<usize>,
    /// Dirty bytes then.
    pub dirty: usize,
}

impl Plan {
    /// Bytes that count against the process at most.
    #[must_use]
    pub fn dirty(&self) -> usize {
        self.private + self.tokenizer + self.kv + self.scratch
    }

    /// Whether the dirty bytes stay within the budget; true without one.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.budget.is_none_or(|budget| self.dirty() <= budget)
    }
}

/// Plans for `file`, of which only the head is read.
///
/// # Errors
/// [`Error::Corrupt`] or [`Error::Unsupported`] for a model that could not be run; [`Error::InvalidArgument`]
/// for settings that a session would refuse.
pub fn plan(file: &ModelFile, config: &PlanConfig) -> Result<Plan> {
    let planner = Planner::new(file, config)?;
    let asked = Remedy::default();
    let Sizes { private, kv, scratch } = planner.sizes(&asked)?;
    let settings = &config.session;
    let mut plan = Plan {
        mapped: if file.is_packed() { planner.matrices } else { 0 },
        private,
        tokenizer: planner.tokenizer,
        kv,
        kv_1k: 1000 * planner.shape.token_bytes(settings.kv_format),
        scratch,
        context: Extent::of(&planner.model, settings)?.context,
        budget: config.budget,
        remedies: Vec::new(),
        least: planner.dirty(&planner.harshest())?,
    };
    if let (false, Some(budget)) = (plan.fits(), config.budget) {
        plan.remedies = planner.remedies(budget)?;
    }
    Ok(plan)
}

/// The smallest chunk that is proposed; a smaller one saves next to nothing.
const SMALL_CHUNK: usize = 16;

struct Sizes {
    private: usize,
    kv: usize,
    scratch: usize,
}

struct Planner<'a> {
    config: &'a PlanConfig,
    model: Config,
    shape: KvShape,
    needs: Needs,
    packed: bool,
    /// Bytes of packed matrices, wherever they will be.
    matrices: usize,
    /// Bytes that are private whatever the file is: vectors and orders.
    vectors: usize,
    tokenizer: usize,
}

impl<'a> Planner<'a> {
    fn new(file: &ModelFile, config: &'a PlanConfig) -> Result<Self> {
        let model = Config::read(file.metadata())?;
        let parts = file.parts()?;
        let (mut matrices, mut vectors, mut vocab) = (0, 0, None);
        let (mut layouts, mut has_orders) = (Vec::new(), false);
        for (name, part) in &parts {
            match *part {
                Part::Vector(len) => vectors += 4 * len,
                Part::Matrix(layout, order) => {
                    matrices += layout.bytes();
                    vectors += if order { 4 * layout.k() } else { 0 };
                    has_orders |= order;
                    layouts.push(layout);
                    if *name == "token_embd.weight" {
                        vocab = Some(layout.n());
                    }
                }
            }
        }
        let missing = || Error::corrupt(file.name(), "token_embd.weight", "is missing");
        let vocab = vocab.ok_or_else(missing)?;
        Ok(Self {
            config,
            shape: model.kv_shape(),
            model,
            needs: Needs::new(vocab, layouts.into_iter(), has_orders),
            packed: file.is_packed(),
            matrices,
            vectors,
            tokenizer: tokenizer_bytes(file.metadata()),
        })
    }

    /// The settings of a session with a change.
    fn settings(&self, change: &Remedy) -> SessionConfig {
        let mut settings = self.config.session.clone();
        settings.context = change.context.unwrap_or(settings.context);
        settings.prefill_chunk = change.prefill_chunk.unwrap_or(settings.prefill_chunk);
        settings.kv_format = change.kv_format.unwrap_or(settings.kv_format);
        settings
    }

    fn sizes(&self, change: &Remedy) -> Result<Sizes> {
        let settings = self.settings(change);
        let extent = Extent::of(&self.model, &settings)?;
        let (sessions, vocab) = (self.config.sessions.max(1), self.needs.vocab);
        let mut scratch = extent.scratch(&self.model, &self.needs)?.bytes()
            + Kept::bytes_for(vocab)
            + 4 * extent.context
            + Distribution::most_bytes(vocab);
        if self.config.speculates {
            let rows = MOST_DRAFTS + 1;
            let size = (rows, extent.context);
            scratch += Scratch::new(&self.model, &self.needs, size, rows)?.bytes();
            // The verifier's own distribution.
            scratch += Distribution::most_bytes(vocab);
        }
        let store = KvStore::with(&KvConfig {
            shape: self.shape,
            format: settings.kv_format,
            block_tokens: BLOCK_TOKENS,
            budget: 2 * BLOCK_TOKENS * self.shape.token_bytes(KvFormat::F32),
            fingerprint: 0,
        })?;
        let blocks = extent.room().div_ceil(BLOCK_TOKENS);
        let kv = store.sequence_bytes(blocks).saturating_mul(sessions);
        let limit = settings.kv_limit.map_or(usize::MAX, |limit| limit.memory);
        let private = if self.packed || change.convert { 0 } else { self.matrices };
        Ok(Sizes {
            private: private + self.vectors,
            kv: kv.min(limit),
            scratch: scratch.saturating_mul(sessions),
        })
    }

    fn dirty(&self, change: &Remedy) -> Result<usize> {
        let Sizes { private, kv, scratch } = self.sizes(change)?;
        Ok(private.saturating_add(kv).saturating_add(scratch).saturating_add(self.tokenizer))
    }

    /// Every change as far as it goes.
    fn harshest(&self) -> Remedy {
        let formats = self.smaller_formats();
        Remedy {
            convert: !self.packed,
            prefill_chunk: self.smaller_chunk(),
            kv_format: formats.last().copied(),
            context: self.takes_context().then(|| BLOCK_TOKENS.min(self.context())),
            dirty: 0,
        }
    }

    fn remedies(&self, budget: usize) -> Result<Vec<Remedy>> {
        // What harms least comes first.
        let mut steps = Vec::new();
        if !self.packed {
            steps.push(Remedy { convert: true, ..Remedy::default() });
        }
        if let Some(chunk) = self.smaller_chunk() {
            steps.push(Remedy { prefill_chunk: Some(chunk), ..Remedy::default() });
        }
        for format in self.smaller_formats() {
            steps.push(Remedy { kv_format: Some(format), ..Remedy::default() });
        }
        let mut found = Vec::new();
        for step in &steps {
            found.extend(self.if_it_fits(*step, budget)?);
        }
        found.extend(self.longest_context(Remedy::default(), budget)?);
        if !found.is_empty() {
            return Ok(found);
        }
        let mut all = Remedy::default();
        for step in steps {
            all.convert |= step.convert;
            all.prefill_chunk = step.prefill_chunk.or(all.prefill_chunk);
            all.kv_format = step.kv_format.or(all.kv_format);
            if let Some(fits) = self.if_it_fits(all, budget)? {
                return Ok(vec![fits]);
            }
        }
        Ok(self.longest_context(all, budget)?.into_iter().collect())
    }

    fn if_it_fits(&self, mut change: Remedy, budget: usize) -> Result<Option<Remedy>> {
        change.dirty = self.dirty(&change)?;
        Ok((change.dirty <= budget).then_some(change))
    }

    /// `change` with the longest context in whole blocks that fits.
    fn longest_context(&self, change: Remedy, budget: usize) -> Result<Option<Remedy>> {
        if !self.takes_context() {
            return Ok(None);
        }
        let blocks = |blocks: usize| Remedy { context: Some(blocks * BLOCK_TOKENS), ..change };
        let (mut fits, mut exceeds) = (0, self.context().div_ceil(BLOCK_TOKENS));
        while exceeds - fits > 1 {
            let middle = fits.midpoint(exceeds);
            if self.dirty(&blocks(middle))? <= budget { fits = middle } else { exceeds = middle }
        }
        if fits == 0 { Ok(None) } else { self.if_it_fits(blocks(fits), budget) }
    }

    fn context(&self) -> usize {
        match self.config.session.context {
            0 => self.model.context,
            context => context,
        }
    }

    /// Whether a shorter context takes less. An endless sequence is as long as its window.
    fn takes_context(&self) -> bool {
        self.config.session.streaming.is_none()
    }

    fn smaller_chunk(&self) -> Option<usize> {
        let chunk = match self.config.session.prefill_chunk {
            0 => PREFILL_CHUNK,
            chunk => chunk,
        };
        (chunk.min(self.context()) > SMALL_CHUNK).then_some(SMALL_CHUNK)
    }

    fn smaller_formats(&self) -> Vec<KvFormat> {
        let now = self.shape.token_bytes(self.config.session.kv_format);
        let quantises = self.shape.padded_dim() <= 1024;
        let smaller = |format: &KvFormat| {
            self.shape.token_bytes(*format) < now && (quantises || !format.is_quantised())
        };
        KvFormat::ALL.into_iter().filter(smaller).collect()
    }
}

/// About what the tokenizer takes that `metadata` describes, in bytes: from the length of its JSON, or for each token
/// and each merge of a vocabulary, as measured over several of 32,000 to 150,000 tokens.
#[must_use]
pub fn tokenizer_bytes(metadata: &Metadata) -> usize {
    if let Some(Value::Text(json)) = metadata.get("tokenizer.huggingface.json") {
        return json.len() * JSON_FACTOR;
    }
    let size_of = |key: &str, each: usize| match metadata.get(key) {
        Some(Value::Texts(texts)) => texts.iter().map(|text| text.len() + each).sum(),
        _ => 0,
    };
    let merges = size_of("tokenizer.ggml.merges", MERGE_BYTES);
    // Without merges they are made of the scores: about two for each token.
    let token_bytes = if merges == 0 { SCORED_TOKEN_BYTES } else { TOKEN_BYTES };
    size_of("tokenizer.ggml.tokens", token_bytes) + merges
}

const JSON_FACTOR: usize = 3;
const TOKEN_BYTES: usize = 80;
const MERGE_BYTES: usize = 40;
const SCORED_TOKEN_BYTES: usize = 230;
