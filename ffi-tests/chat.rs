//! `nybl chat`, as a user talks to it: answers, what is kept between them, and what can be typed besides.

#[path = "support/mod.rs"]
mod support;

use nybl::engine::session::{Next, Session, SessionConfig};
use nybl::text::sample::SamplerConfig;
use nybl::text::template::Conversation;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::{data, open, templated};

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant:{% endif %}";

fn temporary(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Twelve likeliest tokens an answer, so that every answer can be told in advance.
fn chat(model: &Path, options: &[&str], lines: &[&str]) -> (Vec<Value>, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_nybl"))
        .args(["chat", "--json", "--temp", "0", "-n", "12", "-m"])
        .arg(model)
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for line in lines {
        writeln!(stdin, "{line}").unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    let answers = String::from_utf8(output.stdout).unwrap();
    (answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), errors)
}

fn model_with_template(name: &str) -> PathBuf {
    let path = temporary(name);
    std::fs::write(&path, templated(TEMPLATE)).unwrap();
    path
}

/// What the library answers to a conversation in a session of its own.
fn answer(model: &Path, messages: &Value) -> String {
    let model = open(model);
    let (tokenizer, messages) = (model.tokenizer().unwrap(), messages.to_string());
    let conversation =
        Conversation { messages: &messages, add_generation_prompt: true, ..Default::default() };
    let ids = model.chat_template().unwrap().encode(&conversation, tokenizer).unwrap();
    let sampler = SamplerConfig { temperature: 0.0, ..SamplerConfig::default() };
    let config = SessionConfig { sampler, ..SessionConfig::default() };
    let mut session = Session::new(std::sync::Arc::clone(&model), &config).unwrap();
    session.append(&ids).unwrap();
    let mut stream = tokenizer.stream_after(&ids).unwrap();
    let mut text = String::new();
    for _ in 0..12 {
        match session.next().unwrap() {
            Next::Token(id) => text += &stream.push(tokenizer, id).unwrap(),
            _ => break,
        }
    }
    text += &stream.finish(tokenizer).unwrap();
    text.trim().into()
}

#[test]
fn answers_are_those_of_the_whole_conversation_and_only_news_is_computed() {
    let model = model_with_template("chat-turns.gguf");
    let (answers, _) = chat(&model, &["--system", "Be kind."], &["Tom had a dog.", "And then?"]);
    let mut messages = json!([
        { "role": "system", "content": "Be kind." },
        { "role": "user", "content": "Tom had a dog." },
    ]);
    let first = answer(&model, &messages);
    assert_eq!(answers[0]["text"], first);
    let said = messages.as_array_mut().unwrap();
    said.push(json!({ "role": "assistant", "content": first }));
    said.push(json!({ "role": "user", "content": "And then?" }));
    assert_eq!(answers[1]["text"], answer(&model, &messages));
    // The first prompt at least: how the answer is tokenized again, the template decides.
    assert_eq!(answers[0]["reused_tokens"], 0);
    assert!(answers[1]["reused_tokens"].as_u64() >= answers[0]["prompt_tokens"].as_u64());
    assert!(answers[1]["prompt_tokens"].as_u64().unwrap() > 0);
    assert_eq!(answers.len(), 2);
}

#[test]
fn a_saved_conversation_goes_on_in_another_process() {
    let model = model_with_template("chat-save.gguf");
    let file = temporary("conversation.json");
    let file = file.to_str().unwrap();
    let lines = ["Lily saw a bird.", "It was red.", "/stats"];
    let (want, _) = chat(&model, &[], &lines);
    chat(&model, &[], &["Lily saw a bird.", &format!("/save {file}")]);
    let (got, errors) = chat(&model, &[], &[&format!("/load {file}"), "It was red.", "/stats"]);
    assert_eq!(got[0]["text"], want[1]["text"], "{errors}");
    assert_eq!(got[0]["reused_tokens"], want[1]["reused_tokens"]);
    assert_eq!(got[1]["context_tokens"], want[2]["context_tokens"]);
}

#[test]
fn a_turn_can_be_undone_and_all_of_them() {
    let model = model_with_template("chat-undo.gguf");
    let lines = ["One day", "Sam ran.", "/undo", "Sam ran.", "/reset", "One day"];
    let (answers, _) = chat(&model, &[], &lines);
    assert_eq!(answers[1]["text"], answers[2]["text"]);
    assert_eq!(answers[0]["text"], answers[3]["text"]);
    assert_eq!(answers[3]["reused_tokens"], 0);
}

#[test]
fn a_full_context_forgets_the_first_turns() {
    let model = model_with_template("chat-full.gguf");
    let long = "The cat sat on the mat and looked at the moon. ".repeat(4);
    let (answers, errors) = chat(&model, &["--context", "160"], &[&long, &long, &long]);
    assert_eq!(answers.len(), 3);
    assert!(errors.contains("forgotten"), "{errors}");
    assert!(answers.iter().all(|answer| answer["context_tokens"].as_u64().unwrap() <= 160));
}

#[test]
fn without_a_template_both_write_one_text_in_turns() {
    let model = data("nursery.F16.gguf");
    let options = ["--seed", "1"];
    let (answers, errors) =
        chat(&model, &options, &["Once upon a time", "The next day", "/system Be kind.", "/stats"]);
    assert!(errors.contains("no chat template"), "{errors}");
    assert_eq!(answers.len(), 3, "{errors}");
    assert!(answers.iter().take(2).all(|answer| !answer["text"].as_str().unwrap().is_empty()));
    // Nothing but the second line was new.
    assert!(answers[1]["reused_tokens"].as_u64() > answers[0]["prompt_tokens"].as_u64());
    assert_eq!(answers[2]["answers"], 2);
}

#[test]
fn a_command_that_fails_changes_nothing() {
    let model = model_with_template("chat-errors.gguf");
    let damaged = temporary("damaged.json");
    std::fs::write(&damaged, r#"{ "turns": [ { "user": 3 } ] }"#).unwrap();
    let load = format!("/load {}", damaged.display());
    let lines = ["Max and Mia", "/dance", "/save", "/load no/such/file", &load, "play", "//play"];
    let (answers, errors) = chat(&model, &[], &lines);
    for reason in [
        "/dance is no command",
        "/save needs a file name",
        "no/such/file",
        "has a turn that is none",
    ] {
        assert!(errors.contains(reason), "{reason}: {errors}");
    }
    let (want, _) = chat(&model, &[], &["Max and Mia", "play", "//play"]);
    let texts = |answers: &[Value]| answers.iter().map(|a| a["text"].clone()).collect::<Vec<_>>();
    assert_eq!(texts(&answers), texts(&want));
}
