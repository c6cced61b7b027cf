//! Sessions that go through the model together come to what each of them comes to alone.

#[path = "support/mod.rs"]
mod support;

use nybl::Error;
use nybl::engine::cache::KvLimit;
use nybl::engine::governor::Heat;
use nybl::engine::load::Model;
use nybl::engine::session::batch::Batch;
use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::engine::speculate::Speculator;
use nybl::kernel::KvFormat;
use nybl::kv::sight::Streaming;
use nybl::spec::control::Controller;
use nybl::spec::draft::Ngram;
use nybl::text::sample::SamplerConfig;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::{data, open};

fn packed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nursery.nybl")
}

fn text() -> Vec<u32> {
    let text = std::fs::read_to_string(data("ids256.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Session `i` of a test: texts of different lengths, some of which end at the border of a block.
fn session(model: &Arc<Model>, settings: &SessionConfig, i: usize) -> Session {
    let temperature = if i.is_multiple_of(3) { 0.0 } else { 0.7 };
    let sampler = SamplerConfig { temperature, seed: i as u64, ..SamplerConfig::default() };
    let settings = SessionConfig { sampler, ..settings.clone() };
    let mut session = Session::new(Arc::clone(model), &settings).unwrap();
    let len = [5, 63, 64, 100, 127, 1, 30, 64, 90][i % 9];
    session.append(&text()[i..i + len]).unwrap();
    session
}

fn generate(session: &mut Session, count: usize) -> Vec<Next> {
    (0..count).map(|_| session.next().unwrap()).collect()
}

fn bits(session: &mut Session) -> Vec<u32> {
    session.logits().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// What session `i` does alone.
fn alone(settings: &SessionConfig, i: usize, count: usize) -> (Vec<Next>, Vec<u32>) {
    let mut session = session(&open(&packed()), settings, i);
    (generate(&mut session, count), bits(&mut session))
}

/// `count` tokens of each of `sessions`, which must go through `batch` together every time.
fn together(batch: &mut Batch, sessions: &mut [Session], count: usize) -> Vec<Vec<Next>> {
    let mut made = vec![Vec::new(); sessions.len()];
    for _ in 0..count {
        let mut all: Vec<_> = sessions.iter_mut().collect();
        // Nothing is missing after a prompt, or where a text has ended.
        let is_behind = |made: &&Vec<Next>| matches!(made.last(), Some(Next::Token(_)));
        assert_eq!(batch.decode(&mut all), Ok(made.iter().filter(is_behind).count()));
        assert_eq!(batch.decode(&mut all), Ok(0), "all is there");
        for (session, made) in sessions.iter_mut().zip(&mut made) {
            made.push(session.next().unwrap());
        }
    }
    made
}

#[test]
fn tokens_and_logits_are_those_of_each_session_alone() {
    let streaming = Some(Streaming { sinks: 4, window: 40 });
    let kinds = [KvFormat::F32, KvFormat::F16, KvFormat::I8, KvFormat::I4];
    let kinds = kinds.map(|kv_format| SessionConfig { kv_format, ..SessionConfig::default() });
    let endless = SessionConfig { streaming, ..kinds[1].clone() };
    for settings in kinds.iter().chain([&endless]) {
        let model = open(&packed());
        for count in [1, 2, 3, 4, 9] {
            let mut sessions: Vec<_> = (0..count).map(|i| session(&model, settings, i)).collect();
            let mut batch = Batch::new(&sessions[0], count).unwrap();
            let made = together(&mut batch, &mut sessions, 40);
            for (i, (session, made)) in sessions.iter_mut().zip(made).enumerate() {
                let (want, logits) = alone(settings, i, 40);
                assert_eq!(made, want, "session {i} of {count}, {settings:?}");
                assert!(bits(session) == logits, "session {i} of {count}, {settings:?}");
            }
        }
    }
}

#[test]
fn forks_share_their_blocks_and_part_in_one_pass() {
    let (model, settings) = (open(&packed()), SessionConfig::default());
    let mut trunk = session(&model, &settings, 3);
    let mut forks: Vec<_> = (0..3).map(|_| trunk.fork().unwrap()).collect();
    let sampler = |seed| SamplerConfig { temperature: 1.5, seed, ..SamplerConfig::default() };
    for (seed, fork) in forks.iter_mut().enumerate() {
        fork.set_sampler(sampler(seed as u64)).unwrap();
    }
    // The random numbers of all go on where the trunk's were: what differs is where a text begins to.
    for (i, fork) in forks.iter_mut().enumerate() {
        fork.append(&text()[..i]).unwrap();
    }
    let mut batch = Batch::new(&trunk, 3).unwrap();
    let made = together(&mut batch, &mut forks, 30);
    for (i, made) in made.into_iter().enumerate() {
        let mut alone = session(&open(&packed()), &settings, 3);
        alone.set_sampler(sampler(i as u64)).unwrap();
        alone.append(&text()[..i]).unwrap();
        assert_eq!(made, generate(&mut alone, 30), "fork {i}");
    }
}

#[test]
fn more_sessions_than_there_is_room_for_go_in_several_passes() {
    let (model, settings) = (open(&packed()), SessionConfig::default());
    let mut sessions: Vec<_> = (0..7).map(|i| session(&model, &settings, i)).collect();
    let mut batch = Batch::new(&sessions[0], 3).unwrap();
    let made = together(&mut batch, &mut sessions, 10);
    for (i, made) in made.into_iter().enumerate() {
        assert_eq!(made, alone(&settings, i, 10).0, "session {i}");
    }
}

#[test]
fn what_cannot_join_is_left_to_its_own_call() {
    let (model, settings) = (open(&packed()), SessionConfig::default());
    let mut ready = session(&model, &settings, 1);
    let mut fresh = session(&model, &settings, 2);
    let mut empty = Session::new(Arc::clone(&model), &settings).unwrap();
    let short = SessionConfig { context: 30, ..settings.clone() };
    let mut full = session(&model, &short, 6);
    generate(&mut ready, 1);
    let mut batch = Batch::new(&ready, 4).unwrap();
    assert_eq!(full.next(), Ok(Next::ContextFull));
    let mut all = [&mut ready, &mut fresh, &mut empty, &mut full];
    assert_eq!(batch.decode(&mut all), Ok(1));
    assert_eq!(batch.decode(&mut []), Ok(0));
    assert!(matches!(empty.next(), Err(Error::InvalidArgument(_))));
    let goes_on = generate(&mut ready, 1);
    assert_eq!(goes_on, alone(&settings, 1, 2).0[1..]);

    let other = SessionConfig { kv_format: KvFormat::I8, ..settings };
    let mut other = session(&model, &other, 0);
    let mut elsewhere = session(&open(&packed()), &SessionConfig::default(), 0);
    for stranger in [&mut other, &mut elsewhere] {
        let Err(Error::InvalidArgument(text)) = batch.decode(&mut [&mut ready, stranger]) else {
            panic!("taken")
        };
        assert!(text.starts_with("session 1 is of another model"), "{text}");
    }
    for most in [0, 257, usize::MAX] {
        let refused = Batch::new(&ready, most).err();
        assert!(matches!(refused, Some(Error::InvalidArgument(_))), "{most}: {refused:?}");
    }
}

#[test]
fn a_cancelled_session_or_heat_ends_the_pass_and_changes_nothing() {
    let (model, settings) = (open(&packed()), SessionConfig::default());
    let mut sessions: Vec<_> = (0..3).map(|i| session(&model, &settings, i)).collect();
    let mut batch = Batch::new(&sessions[0], 3).unwrap();
    let mut made = vec![Vec::new(); 3];
    for cancelled in [1, 0, 2] {
        for (session, made) in sessions.iter_mut().zip(&mut made) {
            made.push(session.next().unwrap());
        }
        sessions[cancelled].canceller().cancel();
        let mut all: Vec<_> = sessions.iter_mut().collect();
        assert_eq!(batch.decode(&mut all), Err(Error::Cancelled));
        let celsius = |celsius| Heat { celsius: Some(celsius), ..Heat::default() };
        model.runtime().report_heat(celsius(60.0)).unwrap();
        assert!(matches!(batch.decode(&mut all), Err(Error::ThermalPause { .. })));
        model.runtime().report_heat(celsius(30.0)).unwrap();
        assert_eq!(batch.decode(&mut all), Ok(3));
    }
    for (i, made) in made.into_iter().enumerate() {
        assert_eq!(made, alone(&settings, i, 3).0, "session {i}");
    }
}

#[test]
fn sessions_that_do_not_fit_into_memory_together_still_go_on() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("batch-spill");
    std::fs::create_dir_all(&folder).unwrap();
    let model = open(&packed());
    let probe = session(&open(&packed()), &SessionConfig::default(), 5);
    // A session of one token holds one block.
    let block = probe.bytes().0;
    let limit = KvLimit { memory: 5 * block, spill_folder: Some(folder), spill: 100 * block };
    let settings = SessionConfig { kv_limit: Some(limit), ..SessionConfig::default() };
    let mut sessions: Vec<_> = [3, 4, 8].map(|i| session(&model, &settings, i)).into();
    let mut batch = Batch::new(&sessions[0], 3).unwrap();
    let mut made = vec![Vec::new(); 3];
    let (mut joint, mut computed) = (0, 0);
    for _ in 0..50 {
        let mut all: Vec<_> = sessions.iter_mut().collect();
        let count = batch.decode(&mut all).unwrap();
        computed += count;
        joint += usize::from(count > 1);
        for (session, made) in sessions.iter_mut().zip(&mut made) {
            made.push(session.next().unwrap());
        }
    }
    // Three times two blocks do not fit into five: somebody stays behind every time.
    assert!(joint > 0 && computed < 150, "{joint} passes together, {computed} tokens");
    for (i, made) in [3, 4, 8].into_iter().zip(made) {
        assert_eq!(made, alone(&SessionConfig::default(), i, 50).0, "session {i}");
    }
}

#[test]
fn without_room_a_session_is_told_so_by_its_own_call() {
    let (model, settings) = (open(&packed()), SessionConfig::default());
    let block = session(&open(&packed()), &settings, 5).bytes().0;
    let limit = KvLimit { memory: 2 * block, spill_folder: None, spill: 0 };
    let settings = SessionConfig { kv_limit: Some(limit), ..settings };
    // Both have 63 tokens of a block of 64.
    let mut sessions: Vec<_> = [1, 1].map(|i| session(&model, &settings, i)).into();
    sessions[1].reset();
    sessions[1].append(&text()[100..163]).unwrap();
    let mut batch = Batch::new(&sessions[0], 2).unwrap();
    for computed in [0, 2, 0] {
        let mut all: Vec<_> = sessions.iter_mut().collect();
        assert_eq!(batch.decode(&mut all), Ok(computed));
        let full = |session: &mut Session| matches!(session.next(), Err(Error::KvExhausted { .. }));
        match sessions[0].tokens().len() {
            65 => assert!(sessions.iter_mut().all(full)),
            _ => sessions.iter_mut().for_each(|session| {
                assert!(matches!(session.next(), Ok(Next::Token(_))));
            }),
        }
    }
}

#[test]
fn a_drafter_may_stand_aside() {
    let (model, settings) = (open(&packed()), SessionConfig::default());
    let mut sessions: Vec<_> = (0..3)
        .map(|i| {
            let session = session(&model, &settings, i);
            Speculator::new(session, Box::new(Ngram::new()), Controller::always()).unwrap()
        })
        .collect();
    let mut batch = sessions[0].batch(3).unwrap();
    let mut made = vec![Vec::new(); 3];
    for step in 0..60 {
        // Together for a while, then each with its drafts, and together again.
        if step % 20 < 10 {
            let mut all: Vec<_> = sessions.iter_mut().collect();
            Speculator::decode_batch(&mut batch, &mut all).unwrap();
        }
        for (session, made) in sessions.iter_mut().zip(&mut made) {
            made.push(session.next().unwrap());
        }
    }
    for (i, (session, made)) in sessions.iter_mut().zip(made).enumerate() {
        assert_eq!(made, alone(&settings, i, 60).0, "session {i}");
        let metrics = session.metrics();
        assert!(metrics.decode_rate() > 0.0 && session.controller().unwrap().metrics().drafted > 0);
    }
}
