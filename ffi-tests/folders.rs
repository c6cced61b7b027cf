//! Hugging Face folders against GGUF files of the same models.

#[path = "support/mod.rs"]
mod support;

use nybl::engine::load::Model;
use nybl::engine::session::{Session, SessionConfig};
use nybl::file::checkpoint::Checkpoint;
use std::sync::Arc;
use support::{runtime, shared};

#[test]
fn a_folder_is_the_same_model_as_its_gguf_file() {
    for name in ["nursery", "nursery-draft"] {
        let (folder, file) =
            (shared(&format!("models/{name}")), shared(&format!("models/{name}/{name}.F32.gguf")));
        if !file.exists() {
            eprintln!("skipped: no {}", file.display());
            continue;
        }
        let (a, b) = (Checkpoint::open(&folder).unwrap(), Checkpoint::open(&file).unwrap());
        assert!(a.tensors.keys().eq(b.tensors.keys()));
        for (name, tensor) in &a.tensors {
            let other = &b.tensors[name];
            if tensor.is_vector() {
                assert_eq!(tensor.vector().unwrap(), other.vector().unwrap(), "{name}");
                continue;
            }
            assert_eq!((tensor.n(), tensor.k()), (other.n(), other.k()), "{name}");
            let (mut x, mut y) = (Vec::new(), Vec::new());
            tensor.rows(0, tensor.n(), &mut x).unwrap();
            other.rows(0, other.n(), &mut y).unwrap();
            assert!(x == y, "{name}");
        }
        let logits = |path| {
            let model = Model::open_path(runtime(1, None), path).unwrap();
            let mut session = Session::new(Arc::clone(&model), &SessionConfig::default()).unwrap();
            session.append(&[0, 5, 17, 300]).unwrap();
            let id = session.next().unwrap();
            (format!("{id:?}"), model.tokenizer().unwrap().encode("the sea", false, false).unwrap())
        };
        assert_eq!(logits(&folder), logits(&file));
    }
}
