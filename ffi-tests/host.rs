//! What a host asks, sets and is told: plans, biases, stop strings, logarithms, figures, messages, memory that is
//! wanted back, and a smaller model under heat.

#[path = "support/mod.rs"]
mod support;

use nybl::Error;
use nybl::engine::cache::KvLimit;
use nybl::engine::draft::ModelDrafter;
use nybl::engine::governor::{GovernorConfig, Heat};
use nybl::engine::load::Model;
use nybl::engine::log::{Level, Log};
use nybl::engine::plan::{PlanConfig, plan};
use nybl::engine::pressure::{Freed, Pressure};
use nybl::engine::runtime::{Runtime, RuntimeConfig};
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::engine::text::{Event, TextSession};
use nybl::file::model_file::ModelFile;
use nybl::kernel::KvFormat;
use nybl::kv::sight::Streaming;
use nybl::spec::control::Controller;
use nybl::spec::distribution::Distribution;
use nybl::spec::draft::Ngram;
use nybl::text::sample::{Hook, Penalties, SamplerConfig};
use nybl::threads::Executor;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use support::{data, runtime};

fn packed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl")
}

fn open() -> Arc<Model> {
    support::open(&packed())
}

fn greedy() -> SessionConfig {
    SessionConfig { sampler: SamplerConfig::greedy(), ..SessionConfig::default() }
}

fn drawn(seed: u64) -> SessionConfig {
    let sampler = SamplerConfig { temperature: 1.0, seed, ..SamplerConfig::default() };
    SessionConfig { sampler, ..SessionConfig::default() }
}

fn prompt(model: &Model) -> Vec<u32> {
    model.tokenizer().unwrap().encode("Once upon a time", true, false).unwrap()
}

/// A session after the prompt, which speculates when asked to.
fn started(model: &Arc<Model>, config: &SessionConfig, speculates: bool) -> Speculator {
    let session = Session::new(Arc::clone(model), config).unwrap();
    let mut session = Speculator::plain(session);
    if speculates {
        session.attach(Box::new(Ngram::new()), Controller::always()).unwrap();
    }
    session.append(&prompt(model)).unwrap();
    session
}

fn generate(session: &mut Speculator, count: usize) -> Vec<u32> {
    let token = |_| match session.next().unwrap() {
        Next::Token(id) | Next::End(id) => id,
        Next::ContextFull => u32::MAX,
    };
    (0..count).map(token).collect()
}

#[test]
fn a_plan_says_what_a_session_then_takes() {
    for path in [packed(), data("nursery.F16.gguf")] {
        let file = ModelFile::open_path(&path).unwrap();
        let model = support::open(&path);
        for kv_format in KvFormat::ALL {
            for (context, prefill_chunk) in [(0, 0), (200, 17)] {
                let session =
                    SessionConfig { context, prefill_chunk, kv_format, ..SessionConfig::default() };
                let config = PlanConfig { session: session.clone(), ..PlanConfig::default() };
                let plan = plan(&file, &config).unwrap();
                let (private, mapped) = model.weight_bytes();
                assert_eq!(plan.mapped, mapped);
                // Vectors are private, too, and small.
                assert!((private..private + 100_000).contains(&plan.private), "{plan:?}");
                let mut session = Session::new(Arc::clone(&model), &session).unwrap();
                let buffers = plan.scratch - Distribution::most_bytes(model.vocab());
                assert_eq!(buffers, session.bytes().1);
                assert_eq!(plan.context, session.context());
                let tokens = vec![1; session.context()];
                session.append(&tokens).unwrap();
                let kv = session.bytes().0;
                assert_eq!(plan.kv, kv, "{kv_format:?}");
                assert!(plan.fits() && plan.remedies.is_empty() && plan.least <= plan.dirty());
                model.trim();
            }
        }
    }
}

#[test]
fn what_a_plan_proposes_fits() {
    for path in [packed(), data("nursery.F16.gguf")] {
        let file = ModelFile::open_path(&path).unwrap();
        let of = |budget| {
            let config = PlanConfig {
                sessions: 2,
                speculates: true,
                budget: Some(budget),
                ..PlanConfig::default()
            };
            plan(&file, &config).unwrap()
        };
        let all = of(usize::MAX);
        assert!(all.fits() && all.least < all.dirty());
        let (mut single, mut combined) = (0, 0);
        for step in 0..=40 {
            let budget = all.least + (all.dirty() - 1 - all.least) * step / 40;
            let plan = of(budget);
            assert!(!plan.fits() && !plan.remedies.is_empty(), "{budget} of {plan:?}");
            for remedy in &plan.remedies {
                assert!(remedy.dirty <= budget && remedy.dirty < all.dirty());
                let changes = [
                    remedy.convert,
                    remedy.prefill_chunk.is_some(),
                    remedy.kv_format.is_some(),
                    remedy.context.is_some(),
                ];
                let changes = changes.into_iter().filter(|change| *change).count();
                single += usize::from(changes == 1);
                combined += usize::from(changes > 1);
                if remedy.convert {
                    continue;
                }
                // The same settings, asked for, are what it says.
                let session = SessionConfig {
                    context: remedy.context.unwrap_or(0),
                    prefill_chunk: remedy.prefill_chunk.unwrap_or(0),
                    kv_format: remedy.kv_format.unwrap_or_default(),
                    ..SessionConfig::default()
                };
                let config =
                    PlanConfig { session, sessions: 2, speculates: true, budget: Some(budget) };
                let again = nybl::engine::plan::plan(&file, &config).unwrap();
                assert!(again.fits() && again.dirty() == remedy.dirty);
            }
        }
        assert!(single > 0 && combined > 0, "{single} and {combined}");
        let plan = of(all.least - 1);
        assert!(!plan.fits() && plan.remedies.is_empty());
    }
}

#[test]
fn a_plan_for_an_endless_session_is_that_of_its_window() {
    let streaming = Some(Streaming { sinks: 4, window: 100 });
    let session = SessionConfig { context: 1 << 20, streaming, ..greedy() };
    let config = PlanConfig { session: session.clone(), ..PlanConfig::default() };
    let plan = plan(&ModelFile::open_path(&packed()).unwrap(), &config).unwrap();
    let session = Session::new(open(), &session).unwrap();
    let buffers = plan.scratch - Distribution::most_bytes(session.model().vocab());
    assert_eq!((buffers, plan.context), (session.bytes().1, 1 << 20));
    assert!(plan.kv < 1 << 21);
}

#[test]
fn a_bias_and_a_hook_change_the_choice_with_and_without_drafts() {
    let model = open();
    let plain = generate(&mut started(&model, &greedy(), false), 30);
    let banned = plain[3];
    let config = SessionConfig { logit_bias: vec![(banned, f32::NEG_INFINITY)], ..greedy() };
    let without = generate(&mut started(&model, &config, false), 30);
    assert_eq!(plain[..3], without[..3]);
    assert!(!without.contains(&banned));
    for speculates in [false, true] {
        assert_eq!(generate(&mut started(&model, &config, speculates), 30), without);
        // The same as a hook; and later on neither.
        let mut session = started(&model, &greedy(), speculates);
        session.set_logits_hook(Some(Hook::new(move |_, logits| {
            logits[banned as usize] = f32::NEG_INFINITY;
        })));
        assert_eq!(generate(&mut session, 30), without);
        session.set_logits_hook(None);
        session.truncate(prompt(&model).len());
        assert_eq!(generate(&mut session, 30), plain);
        // Both: the hook sees what the bias has done.
        let mut session = started(&model, &config, speculates);
        session.set_logits_hook(Some(Hook::new(move |_, logits| {
            assert_eq!(logits[banned as usize], f32::NEG_INFINITY);
            logits[banned as usize] = f32::INFINITY;
        })));
        assert_eq!(generate(&mut session, 3), [banned; 3]);
        session.set_logits_hook(Some(Hook::new(|_, logits| logits.fill(f32::NEG_INFINITY))));
        let error = session.next().err().unwrap();
        assert!(
            matches!(&error, Error::InvalidArgument(why) if why.contains("no token")),
            "{error}"
        );
        session.set_logits_hook(None);
        session.set_logit_bias(&[]).unwrap();
        session.truncate(prompt(&model).len());
        assert_eq!(generate(&mut session, 30), plain);
        assert!(session.set_logit_bias(&[(1 << 30, 0.0)]).is_err());
        assert!(session.set_logit_bias(&[(1, f32::NAN)]).is_err());
    }
}

#[test]
fn settings_change_between_tokens_and_drafts_do_not_notice() {
    let model = open();
    let run = |speculates| {
        let mut session = started(&model, &drawn(5), speculates);
        let mut tokens = generate(&mut session, 17);
        let penalties = Penalties { repeat: 1.3, frequency: 0.2, ..Penalties::default() };
        session
            .set_sampler(SamplerConfig { temperature: 0.7, penalties, ..drawn(5).sampler })
            .unwrap();
        tokens.extend(generate(&mut session, 17));
        session.set_sampler(SamplerConfig::greedy()).unwrap();
        assert!(session.set_sampler(SamplerConfig { top_p: 7.0, ..drawn(5).sampler }).is_err());
        tokens.extend(generate(&mut session, 17));
        tokens
    };
    assert_eq!(run(false), run(true));
}

/// The events of a text session: kinds and tokens, and the text of all of them.
fn events(session: &mut TextSession, count: usize) -> (Vec<Event>, String) {
    let (mut events, mut all) = (Vec::new(), String::new());
    for _ in 0..count {
        let (event, text) = session.next().unwrap();
        all.push_str(text);
        events.push(event);
        if !matches!(event, Event::Token(_)) {
            break;
        }
    }
    (events, all)
}

#[test]
fn a_stop_string_ends_the_text_exactly_there() {
    let model = open();
    let tokenizer = model.tokenizer().unwrap();
    let plain = generate(&mut started(&model, &greedy(), false), 60);
    let text = tokenizer.decode(&[prompt(&model), plain.clone()].concat()).unwrap();
    let text = text.strip_prefix("Once upon a time").unwrap().to_owned();
    // Pieces of the text, in the middle of words and of tokens, over several of them.
    let boundaries: Vec<_> = text.char_indices().map(|(at, _)| at).collect();
    for (start, length) in [(20, 1), (31, 3), (47, 9), (60, 25)] {
        let stop = &text[boundaries[start]..boundaries[start + length]];
        let found = text.find(stop).unwrap();
        // The token with which the string is complete.
        let complete = (1..plain.len()).find(|count| {
            let ids = [&prompt(&model)[..], &plain[..*count]].concat();
            tokenizer.decode(&ids).unwrap()["Once upon a time".len()..].contains(stop)
        });
        let complete = complete.unwrap();
        for speculates in [false, true] {
            let mut session = TextSession::new(started(&model, &greedy(), speculates));
            session.stop_at(vec!["never in it".into(), stop.into()]).unwrap();
            let (events, said) = events(&mut session, 60);
            assert_eq!(said, text[..found], "up to {stop:?}");
            assert_eq!(events.len(), complete);
            assert_eq!(events.last(), Some(&Event::Stop(plain[complete - 1])));
            let tokens = session.as_session().tokens();
            assert_eq!(tokens[prompt(&model).len()..], plain[..complete]);
            // It can go on, and the sequence ends where it was stopped for everything else.
            let mut fork = session.fork().unwrap();
            fork.stop_at(Vec::new()).unwrap();
            session.stop_at(Vec::new()).unwrap();
            for id in &plain[complete..] {
                assert_eq!(session.next().unwrap().0, Event::Token(*id));
            }
            assert_eq!(fork.next().unwrap().0, Event::Token(plain[complete]));
            assert!(session.stop_at(vec![String::new()]).is_err());
        }
    }
}

#[test]
fn what_was_held_back_comes_when_the_text_ends_otherwise() {
    let model = open();
    let plain = generate(&mut started(&model, &greedy(), false), 20);
    let tokenizer = model.tokenizer().unwrap();
    let text = tokenizer.decode(&[prompt(&model), plain].concat()).unwrap();
    let text = text.strip_prefix("Once upon a time").unwrap();
    let context = prompt(&model).len() + 20;
    // It begins with the last character, so that this one is held back.
    let stop = format!("{}that never comes", text.chars().next_back().unwrap());
    let config = SessionConfig { context, ..greedy() };
    let mut session = TextSession::new(started(&model, &config, false));
    session.stop_at(vec![stop]).unwrap();
    let (events, said) = events(&mut session, 100);
    assert_eq!((events.last(), said.as_str()), (Some(&Event::ContextFull), text));
}

#[test]
fn logarithms_are_those_of_the_model_and_the_same_bits_with_drafts() {
    let model = open();
    for config in [greedy(), drawn(3)] {
        let run = |speculates: bool| {
            let mut session = started(&model, &config, false);
            if speculates {
                let drafter = ModelDrafter::new(open(), &model).unwrap();
                session.attach(Box::new(drafter), Controller::always()).unwrap();
            }
            assert!(session.logprobs().is_none());
            session.report_logprobs(Some(4));
            let mut all = Vec::new();
            for _ in 0..60 {
                let next = session.next().unwrap();
                let (token, logprobs) = session.logprobs().unwrap();
                assert!(next == Next::Token(token) || next == Next::End(token));
                all.push((token, logprobs.clone()));
            }
            let used = session.controller().map_or(0, |c| c.metrics().accepted);
            (all, used)
        };
        let ((plain, _), (drafted, accepted)) = (run(false), run(true));
        assert!(accepted > 0);
        assert_eq!(plain, drafted);
        for (token, logprobs) in &plain {
            assert!(logprobs.top.is_sorted_by(|a, b| a.1 >= b.1) && logprobs.top.len() == 4);
            assert!(logprobs.token <= logprobs.top[0].1 && logprobs.top[0].1 <= 0.0);
            if config.sampler.is_greedy() {
                assert_eq!(logprobs.top[0], (*token, logprobs.token));
            }
        }
        // Against the logits themselves.
        let mut session = started(&model, &config, false);
        let loss = support::loss(session.logits().unwrap(), plain[0].0);
        assert!((loss + f64::from(plain[0].1.token)).abs() < 1e-5);
    }
}

#[test]
fn a_session_counts_what_it_does() {
    let model = open();
    let mut session = started(&model, &greedy(), true);
    let count = prompt(&model).len() as u64;
    let metrics = session.metrics();
    assert_eq!(
        (metrics.prompt_tokens, metrics.decoded_tokens, metrics.first_token),
        (count, 0, None)
    );
    generate(&mut session, 40);
    let metrics = session.metrics();
    // The first one came from the prompt's own pass; one may have ended the text.
    assert!((30..40).contains(&metrics.decoded_tokens), "{metrics:?}");
    assert!(metrics.first_token.unwrap() >= metrics.prompt_time);
    assert!(metrics.prompt_rate() > 0.0 && metrics.decode_rate() > 0.0);
    assert_eq!(metrics.reused_tokens, 0);
    // What another session of the model has computed is found.
    let long: Vec<u32> = (0..200).map(|i| 5 + i % 50).collect();
    let mut first = started(&model, &greedy(), false);
    first.append(&long).unwrap();
    let mut second = started(&model, &greedy(), false);
    second.append(&long).unwrap();
    assert!(second.metrics().reused_tokens >= 128, "{:?}", second.metrics());
}

#[test]
fn a_runtime_says_what_it_does_to_its_own_host_only() {
    let heard: [Arc<Mutex<Vec<String>>>; 2] = Default::default();
    let models = [0, 1].map(|index| {
        let ears = Arc::clone(&heard[index]);
        let log = Log::to(Level::Info, move |_, text| ears.lock().unwrap().push(text.to_owned()));
        let config = RuntimeConfig { threads: 1 + index, log, ..RuntimeConfig::default() };
        let runtime = Arc::new(Runtime::new(&config).unwrap());
        (index == 0).then(|| Model::open_path(Arc::clone(&runtime), &packed()).unwrap());
        runtime
    });
    models[0].report_heat(Heat { celsius: Some(60.0), ..Heat::default() }).unwrap();
    let of = |index: usize| heard[index].lock().unwrap().join("\n");
    assert!(
        of(0).contains("1 threads") && of(0).contains("nursery.nybl") && of(0).contains("too hot")
    );
    assert!(of(1).contains("2 threads") && !of(1).contains("nursery") && !of(1).contains("hot"));
    assert!(models[1].governor().check().is_ok(), "heat of another runtime");
}

#[test]
fn memory_is_given_back_in_order_and_no_token_changes() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let limit = KvLimit { memory: 64 << 20, spill_folder: Some(folder.into()), spill: 64 << 20 };
    let config = SessionConfig { kv_limit: Some(limit), ..drawn(9) };
    let model = open();
    let runtime = model.runtime();
    let long: Vec<u32> = (0..200).map(|i| 5 + i % 50).collect();
    let run = |pressure: &dyn Fn() -> Freed| {
        // A prefix that nobody holds.
        let mut gone = started(&model, &config, false);
        gone.append(&long).unwrap();
        drop(gone);
        let mut session = started(&model, &config, false);
        let mut tokens = generate(&mut session, 70);
        let before = session.bytes().0;
        let freed = pressure();
        assert_eq!(before - session.bytes().0, freed.prefixes + freed.spilled);
        tokens.extend(generate(&mut session, 70));
        (tokens, freed)
    };
    let (wanted, _) = run(&Freed::default);
    let (tokens, freed) = run(&|| runtime.relieve(Pressure::Moderate));
    assert_eq!(tokens, wanted);
    assert!(freed.prefixes > 0 && freed.spilled == 0 && freed.pages == 0 && freed.deferred == 0);
    let (tokens, freed) = run(&|| runtime.relieve(Pressure::High));
    assert_eq!(tokens, wanted);
    assert!(freed.prefixes > 0 && freed.spilled > 0 && freed.pages == 0, "{freed:?}");
    let (tokens, freed) = run(&|| runtime.relieve(Pressure::Critical));
    assert_eq!(tokens, wanted);
    assert!(freed.prefixes > 0 && freed.spilled > 0 && freed.pages > 500_000, "{freed:?}");
    assert_eq!(run(&|| runtime.relieve(Pressure::None)), (wanted, Freed::default()));
}

/// Memory is wanted while a session is inside a pass: nobody waits, and the session gives it back.
#[test]
fn a_session_inside_a_pass_gives_memory_back_afterwards() {
    let (told, inside) = channel();
    let (go, hang) = channel::<()>();
    let hang = Mutex::new(hang);
    let armed = Arc::new(AtomicBool::new(false));
    let trap = Arc::clone(&armed);
    // Threads of the host, who stops the first job that comes once the trap is set.
    let executor: Executor = Arc::new(move |tiles, tile| {
        if trap.swap(false, Ordering::Relaxed) {
            told.send(()).unwrap();
            hang.lock().unwrap().recv().unwrap();
        }
        (0..tiles).for_each(tile);
    });
    let config = RuntimeConfig { threads: 2, executor: Some(executor), ..Default::default() };
    let model = Model::open_path(Arc::new(Runtime::new(&config).unwrap()), &packed()).unwrap();
    let mut gone = started(&model, &greedy(), false);
    gone.append(&(0..200).map(|i| 5 + i % 50).collect::<Vec<_>>()).unwrap();
    drop(gone);
    let mut session = Speculator::plain(Session::new(Arc::clone(&model), &greedy()).unwrap());
    let before = session.bytes().0;
    let ids: Vec<u32> = (100..140).collect();
    armed.store(true, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let run = scope.spawn(|| session.append(&ids).map(|()| session.bytes().0));
        inside.recv().unwrap();
        let freed = model.runtime().relieve(Pressure::Moderate);
        assert_eq!(freed, Freed { deferred: 1, ..Freed::default() });
        go.send(()).unwrap();
        let after = run.join().unwrap().unwrap();
        assert!(after < before, "{after} of {before}");
    });
}

#[test]
fn a_smaller_model_goes_on_under_heat_and_the_model_itself_afterwards() {
    // A first report eight degrees above the target leaves a fifth of the effort.
    let governor = GovernorConfig { critical_celsius: 60.0, ..GovernorConfig::default() };
    let config = RuntimeConfig { threads: 2, governor, ..RuntimeConfig::default() };
    let model = Model::open_path(Arc::new(Runtime::new(&config).unwrap()), &packed()).unwrap();
    for config in [greedy(), drawn(11)] {
        let wanted = generate(&mut started(&model, &config, false), 60);
        let mut session = started(&model, &config, false);
        // One with the same weights, whose tokens are therefore the same.
        let small = Model::open_path(runtime(1, None), &packed()).unwrap();
        session.set_small_model(Some(small)).unwrap();
        let mut tokens = generate(&mut session, 20);
        assert_eq!(session.small_model_tokens(), 0);
        let hot = Heat { celsius: Some(53.0), ..Heat::default() };
        model.runtime().report_heat(hot).unwrap();
        assert!(model.runtime().governor().small_model());
        tokens.extend(generate(&mut session, 20));
        assert_eq!(session.small_model_tokens(), 20);
        session.canceller().cancel();
        assert_eq!(session.next(), Err(Error::Cancelled));
        model.runtime().report_heat(Heat::default()).unwrap();
        tokens.extend(generate(&mut session, 20));
        assert_eq!(session.small_model_tokens(), 20);
        assert_eq!(tokens, wanted);
    }
}

#[test]
fn a_session_in_the_background_lets_others_go_first_and_says_the_same() {
    let model = open();
    let ids: Vec<u32> = (0..220).map(|i| 5 + i % 90).collect();
    let wanted = {
        let mut session = started(&model, &drawn(2), false);
        session.append(&ids).unwrap();
        generate(&mut session, 10)
    };
    model.trim();
    let config = SessionConfig { background: true, ..drawn(2) };
    let mut behind = started(&model, &config, false);
    std::thread::scope(|scope| {
        let background = scope.spawn(|| {
            behind.append(&ids).unwrap();
            generate(&mut behind, 10)
        });
        let mut session = started(&model, &drawn(4), false);
        generate(&mut session, 30);
        assert_eq!(background.join().unwrap(), wanted);
    });
    // What waits in the background can be cancelled, like everything.
    behind.canceller().cancel();
    assert_eq!(behind.next(), Err(Error::Cancelled));
}

#[test]
fn a_drafting_model_and_a_hook_agree_with_the_session_alone() {
    let model = open();
    let config = SessionConfig { logit_bias: vec![(7, -2.0), (9, 3.0)], ..drawn(21) };
    let wanted = generate(&mut started(&model, &config, false), 50);
    let mut session = started(&model, &config, false);
    let drafter = ModelDrafter::new(open(), &model).unwrap();
    session.attach(Box::new(drafter), Controller::always()).unwrap();
    assert_eq!(generate(&mut session, 50), wanted);
}
