//! Whatever way a sequence came into the cache, its logits are the same bits.

#[path = "support/mod.rs"]
mod support;

use nybl::Error;
use nybl::engine::convert::{Recipe, convert};
use nybl::engine::load::Model;
use nybl::engine::session::{Session, SessionConfig};
use nybl::kernel::KvFormat;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::{data, open, runtime};

/// A text that crosses two KV blocks.
fn tokens() -> Vec<u32> {
    let text = std::fs::read_to_string(data("ids256.json")).unwrap();
    let ids: Vec<u32> = serde_json::from_str(&text).unwrap();
    ids[..150].to_vec()
}

fn session(model: &Arc<Model>) -> Session {
    Session::new(Arc::clone(model), &SessionConfig::default()).unwrap()
}

fn bits(session: &mut Session) -> Vec<u32> {
    session.logits().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// The logits after `tokens` in a session that has seen nothing else.
fn plain(model: &Arc<Model>, tokens: &[u32]) -> Vec<u32> {
    let mut session = session(model);
    session.append(tokens).unwrap();
    bits(&mut session)
}

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn a_truncated_sequence_goes_on_as_if_it_had_never_been_longer() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let want = plain(&model, &text[..140]);
    for len in [0, 1, 63, 64, 65, 100, 128, 139, 140] {
        let mut session = session(&model);
        session.append(&text[..100]).unwrap();
        session.append(&[7; 40]).unwrap();
        session.truncate(len.min(100));
        session.append(&text[len.min(100)..140]).unwrap();
        assert!(bits(&mut session) == want, "truncated to {len}");
    }
}

#[test]
fn a_cached_prefix_gives_the_bits_of_a_computed_one() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let mut session = session(&model);
    session.append(&text).unwrap();
    for len in [63, 64, 65, 128, 129, 150] {
        session.reset();
        session.append(&text[..len]).unwrap();
        assert!(bits(&mut session) == plain(&model, &text[..len]), "{len} tokens");
    }
    session.reset();
    let other = [&text[..70], &[5; 20]].concat();
    session.append(&other).unwrap();
    assert!(bits(&mut session) == plain(&model, &other));
}

#[test]
fn forks_go_their_own_ways() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let mut trunk = session(&model);
    trunk.append(&text[..70]).unwrap();
    let alone = trunk.bytes().0;
    let mut forks: Vec<_> = (0..3).map(|_| trunk.fork().unwrap()).collect();
    assert_eq!(trunk.bytes().0, alone);
    for (i, fork) in forks.iter_mut().enumerate() {
        let own = vec![10 + i as u32; 30];
        fork.append(&own).unwrap();
        assert!(bits(fork) == plain(&model, &[&text[..70], &own].concat()), "fork {i}");
    }
    trunk.append(&text[70..]).unwrap();
    assert!(bits(&mut trunk) == plain(&model, &text));
    // Every fork has room for a whole context of its own.
    drop(trunk);
    for fork in &mut forks {
        let left = fork.context() - fork.tokens().len();
        fork.append(&vec![3; left]).unwrap();
    }
}

#[test]
fn a_restored_session_goes_on_where_the_saved_one_was() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let path = temporary("cache-restored");
    let mut first = session(&model);
    first.append(&text[..100]).unwrap();
    first.save(&path).unwrap();
    // Another runtime with another file handle, as in another process.
    let mut second = session(&open(&data("nursery.F16.gguf")));
    second.append(&[1, 2, 3]).unwrap();
    second.restore(&path).unwrap();
    assert_eq!(second.tokens(), &text[..100]);
    assert!(bits(&mut second) == bits(&mut first));
    second.append(&text[100..]).unwrap();
    assert!(bits(&mut second) == plain(&model, &text));
}

#[test]
fn halves_take_half_the_memory_and_obey_the_same_rules() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let config = SessionConfig { kv_format: KvFormat::F16, ..SessionConfig::default() };
    let half = || Session::new(Arc::clone(&model), &config).unwrap();
    let (mut full, mut first) = (session(&model), half());
    full.append(&text).unwrap();
    first.append(&text).unwrap();
    assert_eq!(2 * first.bytes().0, full.bytes().0);
    let want = bits(&mut first);
    let far = first.logits().unwrap().iter().zip(full.logits().unwrap());
    let far = far.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far > 0.0 && far < 0.02, "{far}");

    let (mut fork, path) = (first.fork().unwrap(), temporary("cache-half"));
    first.save(&path).unwrap();
    fork.truncate(90);
    fork.append(&text[90..]).unwrap();
    let mut restored = half();
    restored.restore(&path).unwrap();
    assert!(bits(&mut fork) == want && bits(&mut restored) == want);
    assert!(full.restore(&path).is_err());
}

#[test]
fn a_snapshot_that_cannot_be_used_changes_nothing() {
    let (model, text) = (open(&data("nursery.F16.gguf")), tokens());
    let path = temporary("cache-foreign");
    let mut first = session(&model);
    first.append(&text[..100]).unwrap();
    first.save(&path).unwrap();

    let packed = temporary("cache-q8.nybl");
    let recipe = Recipe::Bytes { group: 64 };
    convert(&runtime(1, None), &data("nursery.F16.gguf"), &packed, &recipe.into(), |_, _| {})
        .unwrap();
    let other = open(&packed);
    let mut second = session(&other);
    second.append(&text[..5]).unwrap();
    let error = second.restore(&path).unwrap_err();
    assert!(matches!(&error, Error::Unsupported(text) if text.contains("made by")), "{error}");

    let config = SessionConfig { context: 64, ..SessionConfig::default() };
    let mut small = Session::new(Arc::clone(&model), &config).unwrap();
    small.append(&text[..5]).unwrap();
    assert!(matches!(small.restore(&path), Err(Error::ContextFull { limit: 64 })));

    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(matches!(session(&model).restore(&path), Err(Error::Corrupt { .. })));
    assert!(bits(&mut second) == plain(&other, &text[..5]));
    assert!(bits(&mut small) == plain(&model, &text[..5]));
}
