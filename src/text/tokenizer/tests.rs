//! Small handmade vocabularies, and golden ids where the files are at hand.

use super::cuts::CUTS;
use super::pieces::byte_of;
use super::*;
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// A SentencePiece vocabulary: the specials 0 to 2, the bytes 3 to 258, then `pieces`.
fn spm(pieces: &[(&str, f32)]) -> Vocab {
    let mut v = Vocab {
        model: "llama".into(),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_bos: true,
        add_space_prefix: true,
        ..Vocab::default()
    };
    let specials = [("<unk>", 2), ("<s>", 3), ("</s>", 3)];
    let bytes = (0..=u8::MAX).map(|byte| (format!("<0x{byte:02X}>"), 6));
    for (text, kind) in specials.map(|(text, kind)| (text.into(), kind)).into_iter().chain(bytes) {
        push(&mut v, &text, 0.0, kind);
    }
    for (text, score) in pieces {
        push(&mut v, text, *score, 1);
    }
    v
}

fn push(v: &mut Vocab, text: &str, score: f32, kind: i32) -> u32 {
    v.tokens.push(text.into());
    v.scores.push(score);
    v.types.push(kind);
    v.tokens.len() as u32 - 1
}

/// A byte-level vocabulary: `<|s|>`, the 256 bytes as 1 to 256, then what `merges` make.
fn bpe(pre: &str, merges: &[&str]) -> Vocab {
    let table = byte_of();
    let mut v = Vocab {
        model: "gpt2".into(),
        pre: pre.into(),
        tokens: vec!["<|s|>".into()],
        types: vec![3],
        bos: Some(0),
        eos: Some(0),
        merges: merges.iter().map(|&merge| merge.into()).collect(),
        ..Vocab::default()
    };
    let bytes = (0..512).filter(|code| table[*code as usize].is_some());
    v.tokens.extend(bytes.map(|code| char::from_u32(code).unwrap().to_string()));
    v.tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    v.types.resize(v.tokens.len(), 1);
    v
}

fn id(v: &Vocab, text: &str) -> u32 {
    v.tokens.iter().position(|token| token == text).unwrap() as u32
}

fn plain(t: &Tokenizer, text: &str) -> Vec<u32> {
    t.encode(text, false, false).unwrap()
}

fn texts<'a>(v: &'a Vocab, ids: &[u32]) -> Vec<&'a str> {
    ids.iter().map(|id| v.tokens[*id as usize].as_str()).collect()
}

fn streamed(t: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = t.stream();
    let mut text: String = ids.iter().map(|id| stream.push(t, *id).unwrap()).collect();
    text += &stream.finish(t).unwrap();
    text
}

/// What SentencePiece's merging makes of a text, written down as plainly as possible.
fn merged_by_hand(v: &Vocab, text: &str) -> Vec<u32> {
    let ids: HashMap<_, _> = v.tokens.iter().map(String::as_str).zip(0..).collect();
    let text = format!(" {text}").replace(' ', "▁");
    let mut parts: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let score = |pair: &[String]| Some(v.scores[*ids.get(pair.concat().as_str())? as usize]);
        let best = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((score(pair)?, at)));
        let best = best.reduce(|a, b| if b.0 > a.0 { b } else { a });
        let Some((_, at)) = best else { break };
        let right = parts.remove(at + 1);
        parts[at] += &right;
    }
    let bytes = |part: &String| part.bytes().map(|b| 3 + u32::from(b)).collect();
    parts
        .iter()
        .flat_map(|p| ids.get(p.as_str()).map_or_else(|| bytes(p), |id| vec![*id]))
        .collect()
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end
    }

    fn text(&mut self, words: &[&str], most: usize) -> String {
        (0..=self.below(most)).map(|_| words[self.below(words.len())]).collect()
    }
}

#[test]
fn the_best_score_merges_first_and_the_leftmost_of_equals() {
    let mut pieces = vec![];
    // Runs in an order of ids that says nothing, all of one score, as Llama 2 has them.
    let runs: Vec<String> = [5, 2, 8, 3, 7, 4, 6].map(|n| "▁".repeat(n)).into();
    pieces.extend(runs.iter().map(|run| (run.as_str(), -1e9)));
    let ranked =
        ["ab", "▁a", "ba", "aba", "bb", "ababa", "▁ab", "aa", "aaa", "aaaa", "bab", "a", "b", "▁"];
    pieces.extend(ranked.iter().zip(0..).map(|(text, rank)| (*text, -(rank as f32))));
    let v = spm(&pieces);
    let t = Tokenizer::from_vocab(&v).unwrap();
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    for _ in 0..2000 {
        let text = random.text(&["a", "b", " ", "   ", "ab", "é", "ababa"], 20);
        let ids = plain(&t, &text);
        assert_eq!(texts(&v, &ids), texts(&v, &merged_by_hand(&v, &text)), "{text:?}");
        assert_eq!(t.decode(&ids).unwrap(), text);
        assert_eq!(streamed(&t, &ids), text);
    }
}

#[test]
fn words_are_merged_apart_only_if_no_token_has_a_space_inside() {
    let pieces = [("▁", -1.0), ("a", -2.0), ("b", -3.0), ("▁b", -4.0), ("▁a", -5.0)];
    let mut v = spm(&pieces);
    // The second token with one text has a longer name, but no other text.
    push(&mut v, "▁b", -4.0, 1);
    let t = Tokenizer::from_vocab(&v).unwrap();
    assert!(t.to_json().unwrap().contains("Isolated"));
    assert_eq!(texts(&v, &plain(&t, "a b")), ["▁a", "▁b"]);

    let across = push(&mut v, "a▁b", -0.5, 1);
    let t = Tokenizer::from_vocab(&v).unwrap();
    assert!(!t.to_json().unwrap().contains("Isolated"));
    assert_eq!(plain(&t, "a b"), [id(&v, "▁"), across]);
}

#[test]
fn a_character_the_vocabulary_lacks_is_its_bytes_and_streams_whole() {
    let v = spm(&[("▁", -1.0), ("a", -2.0)]);
    let t = Tokenizer::from_vocab(&v).unwrap();
    let ids = plain(&t, "a🦙a");
    assert_eq!(texts(&v, &ids), ["▁", "a", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", "a"]);
    let mut stream = t.stream();
    let pieces: Vec<_> = ids.iter().map(|id| stream.push(&t, *id).unwrap()).collect();
    assert_eq!(pieces, ["", "a", "", "", "", "🦙", "a"]);
    assert_eq!(stream.finish(&t).unwrap(), "");
    // Cut off, and broken off: what can no longer become a character is one U+FFFD.
    assert_eq!(streamed(&t, &ids[..5]), "a\u{FFFD}");
    let broken = [ids[1], ids[2], ids[3], ids[1], ids[5], ids[1]];
    assert_eq!(streamed(&t, &broken), "a\u{FFFD}a\u{FFFD}a");
}

#[test]
fn streaming_is_decoding_whatever_the_ids() {
    let mut random = Random(7);
    let spaced = spm(&[("▁", -1.0), ("▁a", -2.0), ("é", -3.0)]);
    let unspaced = Vocab { add_space_prefix: false, ..spaced.clone() };
    for v in [spaced, unspaced, bpe("gpt-2", &["a b", "Ã ©"])] {
        let t = Tokenizer::from_vocab(&v).unwrap();
        for _ in 0..300 {
            let ids: Vec<_> = (0..20).map(|_| random.below(t.vocab_size()) as u32).collect();
            let whole = t.decode(&ids).unwrap();
            assert_eq!(streamed(&t, &ids), whole);
            let bytes = ids.iter().flat_map(|id| t.pieces.get(*id).unwrap()).copied();
            let bytes: Vec<u8> = bytes.collect();
            let strip = usize::from(v.add_space_prefix && bytes.starts_with(b" "));
            assert_eq!(whole, String::from_utf8_lossy(&bytes[strip..]));
        }
    }
}

#[test]
fn the_space_in_front_is_there_once_and_goes_again() {
    let mut v = spm(&[("▁", -1.0), ("a", -2.0), ("▁a", -3.0)]);
    let t = Tokenizer::from_vocab(&v).unwrap();
    assert_eq!(texts(&v, &plain(&t, "a a")), ["▁a", "▁a"]);
    assert_eq!(texts(&v, &plain(&t, " a")), ["▁", "▁a"]);
    assert_eq!(t.decode(&plain(&t, " a")).unwrap(), " a");
    assert!(plain(&t, "").is_empty());
    let a = id(&v, "▁a");
    assert_eq!(t.decode(&[1, a, a]).unwrap(), "a a", "a special token is no text");
    let mut stream = t.stream();
    assert_eq!(stream.push(&t, a).unwrap() + &stream.push(&t, a).unwrap(), "a a");
    stream.finish(&t).unwrap();
    assert_eq!(stream.push(&t, a).unwrap(), "a", "a new text");

    v.add_space_prefix = false;
    let t = Tokenizer::from_vocab(&v).unwrap();
    assert_eq!(texts(&v, &plain(&t, "a a")), ["a", "▁a"]);
    assert_eq!(t.decode(&[a]).unwrap(), " a");
}

#[test]
fn plain_text_never_becomes_a_control_token() {
    // Every step from characters to "<s>" is a token, and the last has the best score of all.
    let mut v =
        spm(&[("▁", -1.0), ("<", -2.0), ("s", -3.0), (">", -4.0), ("<s", -5.0), ("s>", -6.0)]);
    let single = push(&mut v, "§", 0.0, 3);
    let t = Tokenizer::from_vocab(&v).unwrap();
    assert_eq!(texts(&v, &plain(&t, "<s>")), ["▁", "<s", ">"]);
    assert_eq!(t.encode("<s>s", true, true).unwrap(), [1, 1, id(&v, "▁"), id(&v, "s")]);
    assert_eq!(t.encode("s§", false, true).unwrap().last(), Some(&single));
    assert!(matches!(t.encode("s§", false, false), Err(Error::InvalidArgument(_))));
    assert_eq!(t.decode(&[1, single, 2, 0]).unwrap(), "");
    // Written out, a byte token is six characters.
    assert!(!plain(&t, "<0x41>").contains(&(3 + 0x41)));

    // Whole words that are tokens, and merges that make one.
    let mut v = bpe("llama-bpe", &["s t", "st op"]);
    v.tokens.push("op".into());
    v.types.push(1);
    v.merges.insert(0, "o p".into());
    let stop = id(&v, "stop");
    v.types[stop as usize] = 3;
    let t = Tokenizer::from_vocab(&v).unwrap();
    assert!(!plain(&t, "stop").contains(&stop));
    assert_eq!(t.decode(&plain(&t, "stop")).unwrap(), "stop");
    assert_eq!(t.encode("stop", false, true).unwrap(), [stop]);

    v.pre = "gpt-2".into();
    assert_eq!(texts(&v, &plain(&Tokenizer::from_vocab(&v).unwrap(), "stop")), ["st", "op"]);

    // The same vocabulary as someone else's JSON, where the merge is still in the list.
    let json = t.to_json().unwrap().replace(r#"["s","t"]"#, r#"["s","t"],["st","op"]"#);
    let t = Tokenizer::from_json(json.as_bytes(), None, vec![], false).unwrap();
    assert_eq!(t.encode("stop", false, true).unwrap(), [stop]);
    assert!(!plain(&t, "stop").contains(&stop));
    assert_eq!(t.decode(&plain(&t, "stop")).unwrap(), "stop");
}

#[test]
fn special_ids_are_special_even_if_the_types_forget_them() {
    let pieces = [("▁", -1.0), ("<", -2.0), ("s", -3.0), (">", -4.0), ("<s", -5.0)];
    for types in [vec![1; 264], vec![]] {
        let v = Vocab { types, ..spm(&pieces) };
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert_eq!(texts(&v, &plain(&t, "<s>é")), ["▁", "<s", ">", "<0xC3>", "<0xA9>"]);
        assert_eq!(t.decode(&[1, 2, 3 + 0x41]).unwrap(), "A");
        let lone = Vocab { eos: Some(id(&v, "s")), ..v.clone() };
        let t = Tokenizer::from_vocab(&lone).unwrap();
        assert_eq!(t.decode(&plain(&t, "ss")).unwrap(), "ss");
    }
}

#[test]
fn user_defined_tokens_are_found_in_any_text_the_longest_first() {
    let mut v = spm(&[("▁", -1.0), ("a", -2.0), ("<", -3.0)]);
    let short = push(&mut v, "<a", 0.0, 4);
    let long = push(&mut v, "<a b>", 0.0, 4);
    let t = Tokenizer::from_vocab(&v).unwrap();
    for special in [false, true] {
        let ids = t.encode("a<a b><a", false, special).unwrap();
        assert_eq!(ids, [id(&v, "▁"), id(&v, "a"), long, short]);
        assert_eq!(t.decode(&ids).unwrap(), "a<a b><a");
    }
    // In a byte-level vocabulary their names are text, not byte code.
    let mut v = bpe("gpt-2", &[]);
    v.tokens.push("éé".into());
    v.types.push(4);
    let t = Tokenizer::from_vocab(&v).unwrap();
    assert_eq!(plain(&t, "aééb"), [id(&v, "a"), 257, id(&v, "b")]);
    assert_eq!(t.decode(&[257]).unwrap(), "éé");
}

#[test]
fn of_tokens_with_the_same_text_the_first_encodes_and_all_decode() {
    let mut v = spm(&[("▁", -1.0), ("a", -2.0), ("b", -3.0), ("ab", -4.0)]);
    let first = id(&v, "ab");
    let again = push(&mut v, "ab", 9.0, 1);
    let control = push(&mut v, "ab", 0.0, 3);
    let user = push(&mut v, "ab", 0.0, 4);
    let odd = push(&mut v, "\u{FDD0}x:y", 0.0, 1);
    let t = Tokenizer::from_vocab(&v).unwrap();
    let json = t.to_json().unwrap();
    let same = Tokenizer::from_json(json.as_bytes(), Some(1), vec![2], true).unwrap();
    for t in [t, same] {
        assert_eq!(t.vocab_size(), v.tokens.len());
        for special in [false, true] {
            let ids = t.encode("ab", false, special).unwrap();
            assert_eq!(ids, [id(&v, "▁"), first]);
        }
        assert_eq!(t.decode(&[first, again, user]).unwrap(), "ababab");
        assert_eq!(t.decode(&[control]).unwrap(), "");
        assert_eq!(t.decode(&[odd]).unwrap(), "\u{FDD0}x:y");
    }
}

#[test]
fn bytes_merge_as_listed_and_characters_stream_whole() {
    let v = bpe("gpt-2", &["h e", "l l", "he ll", "Ġ w", "ð Ł", "h e"]);
    let t = Tokenizer::from_vocab(&v).unwrap();
    let ids = plain(&t, "hello w🦙");
    assert_eq!(texts(&v, &ids), ["hell", "o", "Ġw", "ðŁ", "¦", "Ļ"]);
    let mut stream = t.stream();
    let pieces: Vec<_> = ids.iter().map(|id| stream.push(&t, *id).unwrap()).collect();
    assert_eq!(pieces, ["hell", "o", " w", "", "", "🦙"]);
    assert_eq!(t.decode(&ids).unwrap(), "hello w🦙");
    assert_eq!(t.encode("<|s|>", false, true).unwrap(), [0]);
    assert_eq!(t.decode(&plain(&t, "<|s|>")).unwrap(), "<|s|>");
    assert_eq!(t.encode("o", true, false).unwrap(), [id(&v, "o")], "no BOS unless wanted");

    let v = bpe("gpt-2", &["a b", "b c"]);
    let twice = Vocab { merges: ["a b", "b c", "a b"].map(String::from).into(), ..v.clone() };
    assert_eq!(texts(&v, &plain(&Tokenizer::from_vocab(&twice).unwrap(), "abc")), ["ab", "c"]);
}

#[test]
fn a_merge_that_makes_no_token_is_named() {
    for (prefix, merge, wrong) in [
        ("", ["Ġ", "a"], "merge 1: \"Ġ\" and \"a\" make no token"),
        ("b", ["b", "é"], "merge 1: \"é\" does not begin with \"b\""),
        ("", ["b", "a"], "`ba` out of vocabulary"),
    ] {
        let json = json!({
            "model": {
                "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "é": 4},
                "merges": [["a", "b"], merge], "continuing_subword_prefix": prefix
            },
            "decoder": {
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                "use_regex": false
            }
        });
        let error = Tokenizer::from_json(json.to_string().as_bytes(), None, vec![], false);
        let error = error.expect_err("no such token").to_string();
        assert!(error.contains("model") && error.contains(wrong), "{error}");
    }
}

#[test]
fn what_the_vocabulary_cannot_say_is_an_error_or_unknown() {
    let mut v = bpe("gpt-2", &[]);
    let at = id(&v, "z") as usize;
    v.tokens.remove(at);
    v.types.remove(at);
    let t = Tokenizer::from_vocab(&v).unwrap();
    for text in ["z", "az", "za", "a b z"] {
        assert!(matches!(t.encode(text, false, false), Err(Error::InvalidArgument(_))), "{text}");
    }
    assert_eq!(plain(&t, "ay").len(), 2);

    let v = Vocab {
        model: "llama".into(),
        tokens: ["<unk>", "▁", "a"].map(String::from).into(),
        scores: vec![0.0, -1.0, -2.0],
        unk: Some(0),
        ..Vocab::default()
    };
    let t = Tokenizer::from_vocab(&v).unwrap();
    assert_eq!(plain(&t, "xya"), [0, 2], "one token for what is unknown in a row");
    for v in [Vocab { unk: None, ..v.clone() }, Vocab { eos: Some(0), ..v }] {
        let t = Tokenizer::from_vocab(&v).unwrap();
        assert!(matches!(t.encode("xya", false, false), Err(Error::InvalidArgument(_))));
    }
}

#[test]
fn every_named_cut_loses_nothing() {
    let text =
        "I'll 'VE  12345\t\r\n\n  x=\"ÀéÇ\" 漢字かな 한국어 🦙👨‍👩‍👧 e\u{301} <|s|> \u{A0}...\n ";
    for name in CUTS.iter().flat_map(|cut| cut.names) {
        let t = Tokenizer::from_vocab(&bpe(name, &["a b"])).unwrap();
        assert_eq!(t.decode(&plain(&t, text)).unwrap(), text, "{name}");
    }
    let words = |pre: &str, text: &str| {
        // A merge for every pair of neighbours, so that a word is one token.
        let v = bpe(pre, &["1 2", "12 3", "123 4", "Ġ a", "! !", "!! Ċ", "a b", "Ġ Ġ"]);
        let ids = plain(&Tokenizer::from_vocab(&v).unwrap(), text);
        texts(&v, &ids).join("|")
    };
    assert_eq!(words("gpt-2", "1234 a!!\n"), "1234|Ġa|!!|Ċ");
    assert_eq!(words("smollm", "1234 a!!\n"), "1|2|3|4|Ġa|!!|Ċ");
    assert_eq!(words("llama-bpe", "1234 a!!\n"), "123|4|Ġa|!!Ċ");
    assert_eq!(words("qwen2", "1234 a!!\n"), "1|2|3|4|Ġa|!!Ċ");
    assert_eq!(words("default", "1234 a!!\n"), "123|4|Ġa|!!|Ċ");
    assert_eq!(words("", "1234   a"), words("default", "1234   a"));
    assert_eq!(words("gpt-2", "   a"), "ĠĠ|Ġa");
    // Without a merge that makes it, a word that is a token counts only for some models.
    for (pre, whole) in [("llama-bpe", 1), ("qwen2", 2)] {
        let mut v = bpe(pre, &["a b"]);
        v.tokens.push("xy".into());
        v.types.push(1);
        assert_eq!(plain(&Tokenizer::from_vocab(&v).unwrap(), "xy").len(), whole);
    }
}

#[test]
fn names_nobody_knows_are_unsupported_and_the_known_ones_listed() {
    let error = |v: Vocab| match Tokenizer::from_vocab(&v) {
        Err(Error::Unsupported(why)) => why,
        other => panic!("{other:?}"),
    };
    let why = error(bpe("klingon", &[]));
    assert!(why.contains("klingon") && why.contains("llama-bpe") && why.contains("qwen2"), "{why}");
    let why = error(Vocab { model: "bert".into(), ..bpe("", &[]) });
    assert!(why.contains("bert") && why.contains("llama") && why.contains("gpt2"), "{why}");
    assert!(Vocab::adds_bos_by_default("llama", "default"));
    assert!(Vocab::adds_bos_by_default("gpt2", "llama-bpe"));
    assert!(!Vocab::adds_bos_by_default("gpt2", "qwen2"));
}

#[test]
fn a_vocabulary_that_contradicts_itself_is_refused_by_key() {
    let good = spm(&[("▁", -1.0), ("a", -2.0)]);
    let list = bpe("gpt-2", &["a b"]);
    let refused = |key: &str, v: &Vocab, edit: &dyn Fn(&mut Vocab)| {
        let mut v = v.clone();
        edit(&mut v);
        match Tokenizer::from_vocab(&v) {
            Err(Error::Corrupt { path, field, reason }) => {
                assert_eq!((path.as_str(), field), ("tokenizer", format!("tokenizer.ggml.{key}")));
                assert!(!reason.is_empty());
            }
            other => panic!("{key}: {other:?}"),
        }
    };
    refused("tokens", &good, &|v| *v = Vocab { model: "llama".into(), ..Vocab::default() });
    refused("tokens", &good, &|v| v.tokens[5].clear());
    refused("tokens", &good, &|v| v.tokens[260] = "a".repeat(100_000));
    refused("scores", &good, &|v| v.scores.clear());
    refused("scores", &good, &|v| v.scores.truncate(9));
    refused("scores", &good, &|v| v.scores[4] = f32::NAN);
    refused("token_type", &good, &|v| v.types.push(1));
    refused("token_type", &good, &|v| v.types[0] = 7);
    refused("token_type", &good, &|v| v.types[0] = -1);
    refused("bos_token_id", &good, &|v| v.bos = Some(261));
    refused("bos_token_id", &good, &|v| v.bos = None);
    refused("eos_token_id", &good, &|v| v.eos = Some(u32::MAX));
    refused("unknown_token_id", &good, &|v| v.unk = Some(261));
    refused("merges", &list, &|v| v.merges.clear());
    for merge in ["", "a", "ab", " ", "a b c", "a nix", "nix b", "b a", " b", "a "] {
        refused("merges", &list, &|v| v.merges.push(merge.into()));
    }
}

#[test]
fn pieces_that_all_divide_into_each_other_cannot_fill_the_memory() {
    let runs: Vec<String> = (1..600).map(|n| "a".repeat(n)).collect();
    let pieces: Vec<_> = runs.iter().map(|run| (run.as_str(), -(run.len() as f32))).collect();
    assert!(matches!(Tokenizer::from_vocab(&spm(&pieces)), Err(Error::Corrupt { .. })));
    let t = Tokenizer::from_vocab(&spm(&pieces[..64])).unwrap();
    assert_eq!(plain(&t, &"a".repeat(64 * 100)).len(), "▁".len() + 100);
}

#[test]
fn control_tokens_that_end_a_turn_end_the_text() {
    let mut v = spm(&[("▁", -1.0)]);
    let turn = push(&mut v, "<|im_end|>", 0.0, 3);
    push(&mut v, "<|eot_id|>", 0.0, 1);
    assert_eq!(Tokenizer::from_vocab(&v).unwrap().eos(), [2, turn]);
    v.eos = Some(turn);
    assert_eq!(Tokenizer::from_vocab(&v).unwrap().eos(), [turn]);
    v.eos = None;
    assert_eq!(Tokenizer::from_vocab(&v).unwrap().eos(), [turn]);
}

#[test]
fn ids_that_name_no_token_are_refused_and_leave_a_stream_as_it_was() {
    let t = Arc::new(Tokenizer::from_vocab(&bpe("gpt-2", &[])).unwrap());
    let refused = |r: Result<String>| assert!(matches!(r, Err(Error::InvalidArgument(_))));
    refused(t.decode(&[0, 257]));
    let mut stream = t.stream();
    let bytes = plain(&t, "é");
    assert_eq!(stream.push(&t, bytes[0]).unwrap(), "");
    refused(stream.push(&t, u32::MAX));
    assert_eq!(stream.push(&t, bytes[1]).unwrap(), "é");
    let other = Arc::clone(&t);
    let ids = std::thread::spawn(move || plain(&other, "é")).join().unwrap();
    assert_eq!(ids, bytes);
}

#[test]
fn json_is_the_same_tokenizer_again() {
    let mut v = spm(&[("▁", -1.0), ("a", -2.0), ("b", -3.0), ("ab", -4.0), ("▁a", -5.0)]);
    push(&mut v, "<u>", 0.0, 4);
    let text = "a ab <s> é<u>  <|s|>";
    for v in [v, bpe("llama-bpe", &["a b", "Ġ a"]), bpe("default", &["a b"])] {
        let t = Tokenizer::from_vocab(&v).unwrap();
        let json = t.to_json().unwrap();
        let again =
            Tokenizer::from_json(json.as_bytes(), t.bos(), t.eos().into(), t.add_bos()).unwrap();
        let split = t.to_split().unwrap().expect("ids without gaps");
        assert_eq!(split.tokens.len(), v.tokens.len());
        let joined = Tokenizer::from_split(&split, t.bos(), t.eos().into(), t.add_bos()).unwrap();
        for again in [again, joined] {
            assert_eq!(again.to_json().unwrap(), json);
            assert_eq!(format!("{again:?}"), format!("{t:?}"));
            for special in [false, true] {
                let ids = t.encode(text, special, special).unwrap();
                assert_eq!(again.encode(text, special, special).unwrap(), ids);
                assert_eq!(again.decode(&ids).unwrap(), t.decode(&ids).unwrap());
            }
        }
    }
}

#[test]
fn split_parts_that_contradict_each_other_are_refused() {
    let t = Tokenizer::from_vocab(&bpe("llama-bpe", &["a b", "ab a"])).unwrap();
    let sound = t.to_split().unwrap().unwrap();
    let refused = |change: &dyn Fn(&mut Split<'static>), word: &str| {
        let mut split = sound.clone();
        change(&mut split);
        let error = Tokenizer::from_split(&split, None, vec![], false).unwrap_err().to_string();
        assert!(error.starts_with("tokenizer: ") && error.contains(word), "{error}");
    };
    refused(&|split| split.merges.to_mut().push(1), "pairs");
    refused(&|split| split.merges.to_mut().extend([0, 1 << 40]), "merge 2");
    refused(&|split| split.merges.to_mut().extend([-1, 0]), "merge 2");
    refused(&|split| split.tokens.to_mut()[1] = split.tokens[0].clone(), "two tokens");
    refused(&|split| split.rest = t.to_json().unwrap().into(), "beside it");
    refused(&|split| split.rest.to_mut().truncate(9), "json");
    // A megabyte named thousands of times takes kilobytes of the file.
    refused(
        &|split| {
            split.tokens.to_mut().push("x".repeat(1 << 20));
            let last = split.tokens.len() as i64 - 1;
            split.merges.to_mut().extend([last; 20_000]);
        },
        "too long",
    );
    let gaps = r#"{"model":{"type":"BPE","vocab":{"a":0,"b":5},"merges":[]},"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false}}"#;
    let t = Tokenizer::from_json(gaps.as_bytes(), None, vec![], false).unwrap();
    assert_eq!(t.to_split().unwrap(), None);
}

#[test]
fn json_that_is_wrong_is_refused_by_section() {
    let json = Tokenizer::from_vocab(&bpe("gpt-2", &["a b"])).unwrap().to_json().unwrap();
    let read = |json: &str| Tokenizer::from_json(json.as_bytes(), None, vec![], false);
    assert!(read(&json).is_ok());
    let refused = |field: &str, json: &str| match read(json) {
        Err(Error::Corrupt { field: found, .. }) => assert_eq!(found, field),
        other => panic!("{field}: {other:?}"),
    };
    refused("json", "");
    refused("json", "[1]");
    refused("json", &json[..json.len() - 1]);
    refused("json", &"[".repeat(100_000));
    refused("model", "{}");
    let edited = |from: &str, to: &str| {
        assert!(json.contains(from), "{from}");
        json.replace(from, to)
    };
    refused("model", &edited(r#"["a","b"]"#, r#"["a","nix"]"#));
    refused("model", &edited(r#""ab":257"#, r#""ab":4294967295"#));
    refused("model", &edited(r#""ab":257"#, r#""ab":256"#));
    // Here the crate computes a negative length and panics.
    refused("model", &edited(r#"subword_prefix":null"#, r#"subword_prefix":"long prefix""#));
    refused("added_tokens", &edited(r#"[{"id":0"#, r#"[{"id":9"#));
    refused("added_tokens", &edited(r#"[{"id":0"#, r#"[{"no":0"#));
    refused("pre_tokenizer", &edited(r#"\\p{L}+"#, r#"\\p{L+"#));
    let chance = read(&edited(r#""dropout":null"#, r#""dropout":1.0"#)).unwrap();
    assert_eq!(plain(&chance, "ab"), [257], "no merge is left to chance");
    let other = edited(r#""type":"BPE""#, r#""type":"Unigram""#);
    assert!(matches!(read(&other), Err(Error::Unsupported(_))));
    let mut other: Value = serde_json::from_str(&json).unwrap();
    other["decoder"] = json!({"type": "CTC"});
    assert!(matches!(read(&other.to_string()), Err(Error::Unsupported(_))));

    let with = |bos, eos| Tokenizer::from_json(json.as_bytes(), bos, eos, bos.is_none());
    assert!(matches!(with(Some(258), vec![]), Err(Error::Corrupt { .. })));
    assert!(matches!(with(Some(0), vec![258]), Err(Error::Corrupt { .. })));
    assert!(matches!(with(None, vec![]), Err(Error::Corrupt { .. })), "a BOS to add, but none");
}

/// Both ways to the ids of a text: remembered words, and all steps of the crate.
fn both_ways(t: &mut Tokenizer, texts: &[String]) {
    let name = format!("{t:?}");
    assert!(t.words.is_some(), "{name}: no quick way");
    let ways = |t: &Tokenizer| -> Vec<_> {
        let flags = [false, true].into_iter();
        flags.flat_map(|special| texts.iter().map(move |x| t.encode(x, false, special))).collect()
    };
    // Twice, so that the second time everything is remembered.
    let (first, second) = (ways(t), ways(t));
    let words = t.words.take();
    let slow = ways(t);
    t.words = words;
    for (i, slow) in slow.iter().enumerate() {
        assert_eq!(&first[i], slow, "{name}: {:?}", texts[i % texts.len()]);
        assert_eq!(&second[i], slow, "{name}: {:?}", texts[i % texts.len()]);
    }
}

/// Texts of what patterns treat differently.
fn tricky_texts(count: usize) -> Vec<String> {
    let parts = [
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u{A0}",
        "\u{3000}",
        "\u{2028}",
        "a",
        "B",
        "ſ",
        "é",
        "e\u{301}",
        "'s",
        "'LL",
        "'",
        "12",
        "٣",
        "½",
        "漢字",
        "ひ",
        "한",
        "🦙",
        "👨‍👩‍👧",
        "...",
        "!",
        "/",
        "-",
        "_",
        "▁",
        "<s>",
        "<|s|>",
        "<u>",
        "\u{200D}",
        "ǅ",
        "ªº",
        "\u{FDD0}",
    ];
    let mut random = Random(11);
    (0..count).map(|_| random.text(&parts, 14)).chain([String::new()]).collect()
}

#[test]
fn remembered_words_are_what_all_steps_of_the_crate_give() {
    let texts = tricky_texts(400);
    let mut slow_only = Vec::new();
    for cut in CUTS {
        let v = bpe(cut.names[0], &["a b", "Ġ a", "1 2", "Ċ Ċ"]);
        let mut t = Tokenizer::from_vocab(&v).unwrap();
        match t.words {
            Some(_) => both_ways(&mut t, &texts),
            None => slow_only.push(cut.names[0]),
        }
    }
    // Patterns with possessive repetitions, which the quick engine lacks, or with what looks like one.
    assert_eq!(slow_only, ["bailingmoe", "deepseek-v3"]);
    let pieces = [("▁", -1.0), ("a", -2.0), ("B", -3.0), ("▁▁", -4.0), ("▁a", -5.0), ("12", -6.0)];
    let mut v = spm(&pieces);
    push(&mut v, "<u>", 0.0, 4);
    for add_space_prefix in [true, false] {
        let v = Vocab { add_space_prefix, ..v.clone() };
        let mut t = Tokenizer::from_vocab(&v).unwrap();
        both_ways(&mut t, &texts);
        let json = t.to_json().unwrap();
        let mut again = Tokenizer::from_json(json.as_bytes(), Some(1), vec![2], true).unwrap();
        both_ways(&mut again, &texts);
    }
}

#[test]
fn real_vocabularies_remember_words_rightly() {
    let mut texts = tricky_texts(200);
    for name in ["tinyshakespeare.txt", "wikitext2_wiki.test.raw", "calibration_datav3.txt"] {
        let Some(text) = shared_text(&format!("text/{name}")) else { return };
        texts.extend(text.lines().step_by(97).map(String::from));
        texts.push(text.chars().skip(10_000).take(20_000).collect());
    }
    for name in ["gpt2", "smollm2"] {
        let json = shared(&format!("tokenizers/{name}/tokenizer.json")).unwrap();
        both_ways(&mut Tokenizer::from_json(&json, None, vec![], false).unwrap(), &texts);
    }
}

#[test]
fn more_words_than_are_remembered_come_out_right() {
    let mut t = Tokenizer::from_vocab(&bpe("gpt-2", &["a b", "Ġ a"])).unwrap();
    let text: String = (0..40_000).map(|i| format!(" a{i}")).collect();
    both_ways(&mut t, &[text.clone(), text]);
}

/// What a prompt may be made of to take long: bounded by the length of the text, not by its square.
#[test]
fn a_megabyte_of_one_thing_is_bounded() {
    let a = spm(&[("▁", -1.0), ("a", -2.0), ("aa", -3.0), ("▁▁", -4.0), ("aaaa", -5.0)]);
    let length = if cfg!(debug_assertions) { 200_000 } else { 1_000_000 };
    for v in [a, bpe("llama-bpe", &["a a", "aa aa", "Ġ Ġ"]), bpe("default", &[])] {
        let t = Tokenizer::from_vocab(&v).unwrap();
        for unit in ["a", " ", "🦙", "\n", "a\u{301}", "\u{FFFD}", "<|s|>", " \n"] {
            let text = unit.repeat(length / unit.len());
            assert_eq!(t.decode(&plain(&t, &text)).unwrap(), text);
        }
    }
}

/// A file of the folder with test data next to the checkout, if there is such a folder.
fn shared(path: &str) -> Option<Vec<u8>> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared"));
    if !folder.is_dir() {
        eprintln!("skipped: ../shared/{path} is not here");
        return None;
    }
    Some(std::fs::read(folder.join(path)).unwrap())
}

fn shared_text(path: &str) -> Option<String> {
    shared(path).map(|bytes| String::from_utf8(bytes).unwrap())
}

#[test]
fn qwen2_has_the_ids_of_llama_cpp() {
    let Some(vocab) = shared("tokenizers/qwen2.5/vocab.json") else { return };
    let merges = shared_text("tokenizers/qwen2.5/merges.txt").unwrap();
    let vocab: HashMap<String, usize> = serde_json::from_slice(&vocab).unwrap();
    let mut v = Vocab { model: "gpt2".into(), pre: "qwen2".into(), ..Vocab::default() };
    v.tokens.resize(vocab.len(), String::new());
    for (text, id) in vocab {
        v.tokens[id] = text;
    }
    v.merges = merges.lines().map(String::from).collect();
    let t = Tokenizer::from_vocab(&v).unwrap();
    let texts = shared_text("tokenizers/ggml-vocab-qwen2.gguf.inp").unwrap();
    let golden = shared_text("tokenizers/ggml-vocab-qwen2.gguf.out").unwrap();
    for (text, ids) in texts.split("\n__ggml_vocab_test__\n").zip(golden.lines()) {
        let ids: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(plain(&t, text), ids, "{text:?}");
        assert_eq!(t.decode(&ids).unwrap(), text);
        assert_eq!(streamed(&t, &ids), text);
    }
}

#[test]
fn gpt2_from_hugging_face_has_the_ids_of_another_program() {
    let Some(json) = shared("tokenizers/gpt2/tokenizer.json") else { return };
    let t = Tokenizer::from_json(&json, None, vec![50256], false).unwrap();
    let text = shared_text("tokenizers/gpt2/monty-python-credits.txt").unwrap();
    let golden = shared("tokenizers/gpt2/monty-python-credits-gpt2.json").unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let ids = plain(&t, &text);
    assert_eq!(json!(ids), golden["token_ids"]);
    assert_eq!(t.decode(&ids).unwrap(), text);
}

#[test]
fn a_hugging_face_file_and_its_vocabulary_alone_are_the_same_tokenizer() {
    for (path, text, pre) in [
        ("tokenizers/smollm2/tokenizer.json", "text/calibration_datav3.txt", "smollm"),
        ("models/nursery/tokenizer.json", "text/nursery_val.txt", "gpt-2"),
    ] {
        let Some(json) = shared(path) else { return };
        let t = Tokenizer::from_json(&json, None, vec![1], false).unwrap();
        let file: Value = serde_json::from_slice(&json).unwrap();
        let mut v = Vocab { model: "gpt2".into(), pre: pre.into(), ..Vocab::default() };
        v.tokens.resize(t.vocab_size(), String::new());
        v.types.resize(t.vocab_size(), 1);
        for (text, id) in file["model"]["vocab"].as_object().unwrap() {
            v.tokens[id.as_u64().unwrap() as usize] = text.clone();
        }
        for token in file["added_tokens"].as_array().unwrap() {
            v.types[token["id"].as_u64().unwrap() as usize] = 3;
        }
        v.merges = file["model"]["merges"]
            .as_array()
            .unwrap()
            .iter()
            .map(|merge| match merge {
                Value::String(line) => line.clone(),
                pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
            })
            .collect();
        let from_vocab = Tokenizer::from_vocab(&v).unwrap();
        let mut text = shared_text(text).unwrap();
        text.insert_str(0, &v.tokens[1]);
        let ids = plain(&t, &text);
        assert!(ids == plain(&from_vocab, &text), "{path}");
        assert!(t.decode(&ids).unwrap() == text, "{path}");
        assert_eq!(t.encode(&text, false, true).unwrap()[0], 1);
    }
}
