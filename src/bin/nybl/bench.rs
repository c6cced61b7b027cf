//! `nybl bench`: what a model file does on this machine, beside what the machine could do.
//!
//! Forward passes are timed, without tokenizer and sampler: decoding is one token a pass, with its logits; a
//! prefill is one prompt in chunks, with the logits of its last token. Which tokens go in does not change the
//! time, and neither does what lies in the cache, so a depth is filled with numbers instead of a prompt.
//! The limits (reading the same weights, the dot instruction) are measured in turn with it.

use crate::picture::{self, Chart, Scale, Series};
use crate::{Failure, default_model, rows};
use nybl::Error;
use nybl::engine::draft::ModelDrafter;
use nybl::engine::load::Model;
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::file::source::Source;
use nybl::kernel::{KvFormat, limits};
use nybl::kv::BLOCK_TOKENS;
use nybl::kv::blocks::BlockTable;
use nybl::kv::store::{KvConfig, KvStore};
use nybl::model::forward::{Chunk, Logits, Parts, Scratch};
use nybl::spec::control::Controller;
use nybl::spec::draft::{Drafter, Ngram};
use nybl::text::sample::SamplerConfig;
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Arguments of `nybl bench`.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
#[command(after_help = "Examples:
  nybl bench -m model.nybl --decode 64 --prefill 512
  nybl bench -m model.nybl --decode 32 --depth 4096 --kv i8 --threads 2 --json
  nybl bench -m model.nybl --cost 16 --load
  nybl bench --kernels
  nybl bench --speculate 200 --temp 0
  nybl bench -m model.nybl --svg figures.svg")]
pub(crate) struct Args {
    /// A .nybl or GGUF file, or a Hugging Face folder; it needs no tokenizer [default: the embedded model].
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Time N tokens, one after the other.
    #[arg(long, value_name = "N", group = "what", value_parser = count())]
    decode: Option<u64>,
    /// Time a prompt of N tokens.
    #[arg(long, value_name = "N", group = "what", value_parser = count())]
    prefill: Option<u64>,
    /// Time passes over 1 to M tokens: what checking drafts costs.
    #[arg(long, value_name = "M", group = "what", value_parser = count())]
    cost: Option<u64>,
    /// Time the opening of the file and its first token, from the disk and from the system's cache, and
    /// count the memory that is written meanwhile (Linux).
    #[arg(long, group = "what", requires = "model")]
    load: bool,
    /// Time every matmul of the kernel table that this CPU can run, beside the machine's limits.
    #[arg(long, group = "what")]
    kernels: bool,
    /// Time N tokens of text in turn plainly, with drafts where they pay, and with drafts always, which tells
    /// best how often they are accepted.
    #[arg(long, value_name = "N", group = "what", value_parser = count())]
    speculate: Option<u64>,
    /// The file of a smaller model that drafts [default: the embedded model's own, or else n-grams].
    #[arg(long, value_name = "FILE")]
    draft: Option<PathBuf>,
    /// What that text begins with.
    #[arg(long, default_value = "Once upon a time", value_name = "TEXT")]
    prompt: String,
    /// Its temperature; 0 always takes the likeliest token.
    #[arg(long = "temp", default_value_t = 0.8, value_name = "T")]
    temperature: f32,
    /// Draw what was measured; alone: the kernels under their roofline, decoding against depth, the cost of
    /// checking drafts, and what drafts bring.
    #[arg(long, value_name = "FILE", group = "what")]
    svg: Option<PathBuf>,
    /// Tokens in the cache before.
    #[arg(long, default_value_t = 0, value_name = "D")]
    depth: usize,
    /// Sequences that decode together, a token each in a pass; at most 256, as in a batch of sessions.
    #[arg(long, default_value_t = 1, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=256))]
    sequences: u64,
    /// Tokens of a prompt that go through the layers together; changes no result.
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = count())]
    chunk: u64,
    /// How keys and values are kept.
    #[arg(long, default_value = "f16", value_parser = ["f32", "f16", "i8", "i4"], value_name = "FORMAT")]
    kv: String,
    /// Threads [default and most: one on each core].
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    threads: usize,
    /// The strongest instruction set to use: scalar, portable, avx2, avx512, neon, dotprod, ...
    #[arg(long, value_name = "NAME")]
    isa: Option<String>,
    /// How often each is timed; the median counts.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = count())]
    runs: u64,
    /// Print one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// Tokens decoded at each depth, and most tokens of a pass, for a picture of all.
const ALONE: (u64, u64) = (32, 8);
/// Tokens of its text.
const SPECULATED: u64 = 200;
/// Depths of that picture, as far as the model goes.
const DEPTHS: [usize; 6] = [0, 256, 512, 900, 1900, 4000];

fn joined(name: &str, points: Vec<(f64, f64)>) -> Series {
    Series { name: name.into(), points, joined: true, labels: Vec::new() }
}

fn count() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..1 << 24)
}

/// Runs the command.
pub(crate) fn bench(args: &Args) -> Result<(), Failure> {
    let mut objects = serde_json::Map::new();
    let mut charts = Vec::new();
    if args.load {
        // First, while nothing of the model is in this process.
        objects.insert("load".into(), load(args)?);
    }
    let start = Instant::now();
    let runtime = Arc::new(runtime(args)?);
    let model = match &args.model {
        Some(path) => Model::open_path(Arc::clone(&runtime), path)?,
        None => Model::open(Arc::clone(&runtime), default_model::target())?,
    };
    let opened = start.elapsed().as_secs_f64();
    let alone = args.svg.is_some()
        && !(args.kernels || args.load)
        && [args.decode, args.prefill, args.cost, args.speculate].iter().all(Option::is_none);
    let machine = format!("{} threads", runtime.pool().threads());
    if args.kernels || alone {
        let table = rows::measure(runtime.pool(), runtime.kernels().isa(), args.runs as usize)?;
        if !args.json && args.kernels {
            write!(std::io::stdout(), "{}", table.lines())?;
        }
        if args.json {
            objects.insert("kernels".into(), table.object());
        }
        charts.push(table.chart(&machine));
    }
    let mut bench = Bench::new(args, &model, if alone { ALONE } else { (0, 0) })?;
    if alone {
        let depths =
            DEPTHS.iter().copied().filter(|d| d + ALONE.0 as usize <= model.config().context);
        let mut rates = Vec::new();
        for depth in depths {
            let object = bench.decode(ALONE.0 as usize, depth)?;
            rates.push((depth as f64, object["tokens_per_second"].as_f64().unwrap_or(f64::NAN)));
            objects.insert(format!("decode_at_{depth}"), object);
        }
        charts.push(Chart {
            title: format!("Decoding, {} KV, {machine}", args.kv),
            x: ("tokens in the cache".into(), Scale::Linear),
            y: ("tokens/s".into(), Scale::Linear),
            series: vec![joined("tokens/s", rates)],
        });
    }
    if let Some(tokens) = args.decode {
        objects.insert("decode".into(), bench.decode(tokens as usize, args.depth)?);
    }
    if let Some(tokens) = args.prefill {
        objects.insert("prefill".into(), bench.prefill(tokens as usize)?);
    }
    if let Some(most) = args.cost.or(alone.then_some(ALONE.1)) {
        let object = bench.cost(most as usize)?;
        let over = object["over_one"].as_array().into_iter().flatten().filter_map(Value::as_f64);
        let over: Vec<_> = over.enumerate().map(|(at, cost)| (at as f64 + 1.0, cost)).collect();
        let apart = over.iter().map(|(m, _)| (*m, *m)).collect();
        charts.push(Chart {
            title: format!("A pass over M tokens, {machine}"),
            x: ("tokens M".into(), Scale::Linear),
            y: ("time over that of one".into(), Scale::Linear),
            series: vec![joined("one pass", over), joined("M passes", apart)],
        });
        objects.insert("cost".into(), object);
    }
    if let Some(tokens) = args.speculate.or(alone.then_some(SPECULATED)) {
        let object = speculate(args, Arc::clone(&runtime), &model, tokens as usize)?;
        let shares = object["acceptance_at"].as_array().into_iter().flatten();
        let shares = shares.filter_map(Value::as_f64).enumerate();
        let shares = shares.map(|(at, share)| (at as f64 + 1.0, 100.0 * share)).collect();
        let speed_up = object["speed_up"].as_f64().unwrap_or(f64::NAN);
        charts.push(Chart {
            title: format!(
                "Drafts: {speed_up:.2} times the speed, temperature {}",
                args.temperature
            ),
            x: ("place of the draft".into(), Scale::Linear),
            y: ("% accepted where those before were".into(), Scale::Linear),
            series: vec![joined("accepted", shares)],
        });
        objects.insert("speculation".into(), object);
    }
    if let Some(path) = &args.svg {
        picture::draw(path, &charts)?;
    }

    let mut out = std::io::stdout().lock();
    if !args.json {
        for (what, object) in &objects {
            writeln!(out, "{what}: {}", line(object))?;
        }
        return Ok(());
    }
    let (written, mapped) = model.weight_bytes();
    for (key, value) in [
        ("model", json!(model.config().name)),
        ("file", json!(args.model.as_ref().map(|path| path.display().to_string()))),
        ("isa", json!(runtime.kernels().isa().to_string())),
        ("threads", json!(runtime.pool().threads())),
        ("kv", json!(args.kv)),
        ("depth", json!(args.depth)),
        ("open_s", json!(opened)),
        ("weight_bytes", json!(written + mapped)),
        ("weight_bytes_of_a_token", json!(bench.weight_bytes)),
    ] {
        objects.insert(key.into(), value);
    }
    writeln!(out, "{}", Value::Object(objects))?;
    Ok(())
}

/// `key value` for every number of an object; lists as they are.
fn line(object: &Value) -> String {
    let Value::Object(object) = object else { return object.to_string() };
    let shown = object.iter().map(|(key, value)| match value.as_f64() {
        Some(number) if number.fract() != 0.0 => format!("{key} {number:.4}"),
        _ => format!("{key} {value}"),
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn runtime(args: &Args) -> nybl::Result<Runtime> {
    let isa = args.isa.clone();
    Runtime::new(&RuntimeConfig { threads: args.threads, isa, ..RuntimeConfig::default() })
}

fn kv_format(name: &str) -> KvFormat {
    KvFormat::ALL.into_iter().find(|format| format.name() == name).unwrap_or_default()
}

/// A model and room for what is timed on it.
struct Bench<'a> {
    args: &'a Args,
    model: &'a Model,
    scratch: Scratch,
    store: KvStore,
    /// Bytes of the weights that every token goes through.
    weight_bytes: usize,
}

impl<'a> Bench<'a> {
    /// Room for what `args` ask for; for `alone.0` tokens at any depth and passes over `alone.1`, too.
    fn new(args: &'a Args, model: &'a Model, alone: (u64, u64)) -> Result<Self, Failure> {
        let config = model.config();
        let longest = [args.decode, args.prefill, args.cost].into_iter().flatten().max();
        let longest = longest.unwrap_or(0) as usize;
        let deepest = DEPTHS[DEPTHS.len() - 1] + alone.0 as usize;
        let context = match alone {
            (0, _) => args.depth + longest,
            _ => deepest.min(config.context),
        };
        if context > config.context {
            return Err(Error::ContextFull { limit: config.context }.into());
        }
        let cost = args.cost.unwrap_or(1).max(alone.1);
        let logits = cost.max(args.sequences) as usize;
        let most = args.prefill.map_or(1, |n| n.min(args.chunk)) as usize;
        let most = most.max(logits);
        let scratch = Scratch::new(config, &model.weights().needs(), (most, context), logits)?;
        let shape = config.kv_shape();
        let tokens = (context + 2 * BLOCK_TOKENS) * args.sequences as usize;
        let store = KvStore::with(&KvConfig {
            shape,
            format: kv_format(&args.kv),
            block_tokens: BLOCK_TOKENS,
            budget: tokens.saturating_mul(shape.token_bytes(KvFormat::F32)),
            fingerprint: 0,
        })?;
        let matrices: usize = weights(model).iter().map(|bytes| bytes.len()).sum();
        Ok(Self { args, model, scratch, store, weight_bytes: matrices })
    }

    /// A sequence of `depth` tokens, of numbers that keys and values could have.
    fn deep(&mut self, depth: usize) -> nybl::Result<BlockTable> {
        let mut table = BlockTable::default();
        let shape = self.store.shape();
        let width = shape.n_kv_heads * shape.head_dim;
        let numbers: Vec<f32> =
            (0..width + 64).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.02).collect();
        self.store.reserve(&mut table, depth)?;
        for position in 0..depth {
            let [keys, values] = [position % 61, position % 47].map(|at| &numbers[at..at + width]);
            for layer in 0..shape.n_layers {
                self.store.write(&table, layer, position, keys, values);
            }
        }
        table.commit(depth);
        Ok(table)
    }

    /// Runs `tokens` after those of `table` and keeps them. Seconds.
    fn pass(&mut self, table: &mut BlockTable, tokens: usize, want: Logits) -> nybl::Result<f64> {
        let vocab = self.model.vocab();
        let ids: Vec<u32> =
            (0..tokens).map(|i| ((table.len() + i) * 7919 % vocab) as u32).collect();
        let parts = parts(self.model);
        let start = Instant::now();
        self.store.reserve(table, tokens)?;
        let chunk = self.scratch.most();
        for ids in ids.chunks(chunk) {
            self.scratch.forward(parts, ids, &mut self.store, table, want)?;
            table.commit(ids.len());
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// Runs a token of each of `tables` in one pass and keeps them. Seconds.
    fn step(&mut self, tables: &mut [BlockTable]) -> nybl::Result<f64> {
        let (parts, vocab) = (parts(self.model), self.model.vocab());
        let ids: Vec<u32> = tables
            .iter()
            .enumerate()
            .map(|(i, it)| ((it.len() + i) * 7919 % vocab) as u32)
            .collect();
        let start = Instant::now();
        tables.iter_mut().try_for_each(|table| self.store.reserve(table, 1))?;
        let chunks = ids.chunks(1).zip(&*tables);
        let chunks: Vec<_> =
            chunks.map(|(tokens, table)| Chunk { tokens, parents: None, table }).collect();
        self.scratch.forward_batch(parts, &chunks, &mut self.store)?;
        tables.iter_mut().for_each(|table| table.commit(1));
        Ok(start.elapsed().as_secs_f64())
    }

    fn decode(&mut self, tokens: usize, depth: usize) -> nybl::Result<Value> {
        let sequences = self.args.sequences as usize;
        let mut deep = self.deep(depth)?;
        let mut times = Vec::new();
        let mut read = Vec::new();
        for run in 0..=self.args.runs {
            let reading = self.read_seconds();
            let mut tables = (0..sequences)
                .map(|_| self.store.fork(&mut deep))
                .collect::<nybl::Result<Vec<_>>>()?;
            let mut time = 0.0;
            for _ in 0..tokens {
                time += self.step(&mut tables)?;
            }
            for mut table in tables {
                self.store.truncate(&mut table, 0);
            }
            // The first one brings everything into memory.
            if run > 0 {
                times.push(time);
                read.push(reading);
            }
        }
        self.store.truncate(&mut deep, 0);
        let passes = tokens as f64 / median(&mut times);
        let rate = passes * sequences as f64;
        let layers = self.model.config();
        let kv = layers.kv_shape().token_bytes(kv_format(&self.args.kv));
        // Tokens seen on average.
        let seen = depth as f64 + (tokens as f64 + 1.0) / 2.0;
        let bytes = self.weight_bytes as f64 + seen * (kv * sequences) as f64;
        let bandwidth = self.weight_bytes as f64 / median(&mut read);
        Ok(json!({
            "tokens": tokens,
            "sequences": sequences,
            "tokens_per_second": rate,
            "milliseconds_per_token": 1e3 / rate,
            "gb_per_second": passes * bytes * 1e-9,
            "read_gb_per_second": bandwidth * 1e-9,
            "fraction_of_read_bandwidth": passes * bytes / bandwidth,
        }))
    }

    fn prefill(&mut self, tokens: usize) -> nybl::Result<Value> {
        let mut deep = self.deep(self.args.depth)?;
        let runtime = self.model.runtime();
        let (pool, isa) = (runtime.pool(), runtime.kernels().isa());
        let (mut times, mut peaks) = (Vec::new(), Vec::new());
        for run in 0..=self.args.runs {
            peaks.extend(limits::dots(pool, isa));
            let mut table = self.store.fork(&mut deep)?;
            let time = self.pass(&mut table, tokens, Logits::Last)?;
            self.store.truncate(&mut table, 0);
            if run > 0 {
                times.push(time);
            }
        }
        self.store.truncate(&mut deep, 0);
        let rate = tokens as f64 / median(&mut times);
        let layers = self.model.weights().layers.iter();
        let matrices = layers.flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        let products: usize = matrices.map(|w| w.layout().n() * w.layout().k()).sum();
        let peak = (!peaks.is_empty()).then(|| median(&mut peaks));
        Ok(json!({
            "tokens": tokens,
            "tokens_per_second": rate,
            "milliseconds": 1e3 * tokens as f64 / rate,
            "gop_per_second": 2e-9 * rate * products as f64,
            "dot_gop_per_second": peak.map(|peak| 2e-9 * peak),
            "fraction_of_dot_peak": peak.map(|peak| rate * products as f64 / peak),
        }))
    }

    fn cost(&mut self, most: usize) -> nybl::Result<Value> {
        let mut deep = self.deep(self.args.depth)?;
        let mut times = vec![Vec::new(); most];
        for run in 0..=self.args.runs {
            for (m, times) in times.iter_mut().enumerate() {
                let mut table = self.store.fork(&mut deep)?;
                let time = self.pass(&mut table, m + 1, Logits::All)?;
                self.store.truncate(&mut table, 0);
                if run > 0 {
                    times.push(time);
                }
            }
        }
        self.store.truncate(&mut deep, 0);
        let times: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
        Ok(json!({
            "milliseconds": times.iter().map(|time| round(1e3 * time)).collect::<Vec<_>>(),
            "over_one": times.iter().map(|time| round(time / times[0])).collect::<Vec<_>>(),
        }))
    }

    /// Reading the weights once, as the threads of the model would.
    fn read_seconds(&self) -> f64 {
        limits::read_seconds(self.model.runtime().pool(), &weights(self.model))
    }
}

/// The same text plainly, with drafts where they pay, and with drafts always, in turn. The drafters keep what they
/// have learnt about this device.
fn speculate(
    args: &Args,
    runtime: Arc<Runtime>,
    model: &Arc<Model>,
    tokens: usize,
) -> Result<Value, Failure> {
    let sampler = SamplerConfig {
        temperature: args.temperature,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.05,
        seed: 1,
        ..SamplerConfig::default()
    };
    let kv_format = kv_format(&args.kv);
    let config = SessionConfig { sampler, kv_format, ..SessionConfig::default() };
    let draft = match (&args.draft, &args.model) {
        (Some(path), _) => Some(Model::open_path(runtime, path)?),
        (None, None) => Some(Model::open(runtime, default_model::draft())?),
        (None, Some(_)) => None,
    };
    let drafted = |controller| -> nybl::Result<Speculator> {
        let drafter: Box<dyn Drafter> = match &draft {
            Some(draft) => Box::new(ModelDrafter::new(Arc::clone(draft), model)?),
            None => Box::new(Ngram::new()),
        };
        Speculator::new(Session::new(Arc::clone(model), &config)?, drafter, controller)
    };
    let mut ways = [
        Speculator::plain(Session::new(Arc::clone(model), &config)?),
        drafted(Controller::new())?,
        drafted(Controller::always())?,
    ];
    let prompt = model.tokenizer()?.encode(&args.prompt, true, false)?;
    let mut times = [const { Vec::new() }; 3];
    let mut written = 0;
    for _ in 0..args.runs {
        for (way, times) in ways.iter_mut().zip(&mut times) {
            way.reset();
            way.append(&prompt)?;
            let start = Instant::now();
            for _ in 0..tokens {
                if !matches!(way.next()?, Next::Token(_)) {
                    break;
                }
            }
            times.push(start.elapsed().as_secs_f64());
        }
        if ways[1..].iter().any(|way| way.tokens() != ways[0].tokens()) {
            let why =
                "drafts have changed the text: please report this with the model and the prompt";
            return Err(Error::Unsupported(why.into()).into());
        }
        written += ways[0].tokens().len() - prompt.len();
    }
    let each = written as f64 / args.runs as f64;
    let faster = |way: &[f64]| {
        let mut ratios: Vec<f64> =
            times[0].iter().zip(way).map(|(plain, way)| plain / way).collect();
        median(&mut ratios)
    };
    let (speed_up, always) = (faster(&times[1]), faster(&times[2]));
    let metrics = ways[2].controller().map(|controller| controller.metrics().clone());
    let metrics = metrics.unwrap_or_default();
    let shares = metrics.accepted_at.iter().zip(metrics.tried_at);
    let shares = shares.map(|(yes, all)| (all > 0).then(|| *yes as f64 / all as f64));
    Ok(json!({
        "tokens": each,
        "temperature": args.temperature,
        "plain_tokens_per_second": each / median(&mut times[0]),
        "tokens_per_second": each / median(&mut times[1]),
        "speed_up": speed_up,
        "speed_up_of_drafting_always": always,
        "tokens_per_pass_of_drafting_always": written as f64 / metrics.passes as f64,
        "acceptance_at": shares.collect::<Vec<_>>(),
    }))
}

/// What a forward pass works with.
fn parts(model: &Model) -> Parts<'_> {
    let (config, weights) = (model.config(), model.weights());
    let (kernels, pool) = (model.runtime().kernels(), model.runtime().pool());
    Parts { config, weights, kernels, pool, gate: None }
}

/// The bytes that every token goes through: all matrices but an embedding that is only looked up.
fn weights(model: &Model) -> Vec<&[u8]> {
    let layers = model.weights().layers.iter();
    let matrices = layers.flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
    matrices.chain([model.weights().head()]).map(|matrix| matrix.packed().bytes()).collect()
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

fn round(x: f64) -> f64 {
    (x * 1e4).round() / 1e4
}

/// Opening and a first token after a prompt of eight, with a file that is not in memory (as far as this
/// process can bring that about) and with one that is.
fn load(args: &Args) -> Result<Value, Failure> {
    let path = args.model.as_deref().ok_or_else(|| {
        Error::InvalidArgument("the embedded model is loaded with the program: name a file".into())
    })?;
    let mut object = serde_json::Map::new();
    for cached in [false, true] {
        let mut times = [const { Vec::new() }; 2];
        let mut written = Vec::new();
        for _ in 0..args.runs {
            if !cached {
                Source::forget_cached(path)?;
            }
            let before = private_bytes();
            let start = Instant::now();
            let model = Model::open_path(Arc::new(runtime(args)?), path)?;
            times[0].push(start.elapsed().as_secs_f64());
            let config =
                SessionConfig { kv_format: kv_format(&args.kv), ..SessionConfig::default() };
            let mut session = Session::new(Arc::clone(&model), &config)?;
            session.append(&[1; 8].map(|id: u32| id % model.vocab() as u32))?;
            session.next()?;
            times[1].push(start.elapsed().as_secs_f64());
            let (kv, scratch) = session.bytes();
            let after = private_bytes();
            if let (Some(before), Some(after)) = (before, after) {
                written.push((after.saturating_sub(before), kv + scratch));
            }
        }
        let name = if cached { "warm" } else { "cold" };
        let [open, first] = &mut times;
        object.insert(format!("{name}_open_s"), json!(median(open)));
        object.insert(format!("{name}_first_token_s"), json!(median(first)));
        if let (true, Some((dirty, buffers))) = (cached, written.first()) {
            object.insert("dirty_bytes".into(), json!(dirty));
            object.insert("kv_and_scratch_bytes".into(), json!(buffers));
        }
    }
    let bytes = std::fs::metadata(path)?.len();
    object.insert("file_bytes".into(), json!(bytes));
    Ok(Value::Object(object))
}

/// Bytes of this process that no file holds, where the system tells.
fn private_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
