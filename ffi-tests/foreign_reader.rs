//! A reader in another language, written from `docs/formats.md`, reads what is packed here.

use nybl::file::metadata::{Metadata, Value};
use nybl::file::nybl::{Kind, Writer};
use nybl::kernel::{Format, Layout, Packed};
use nybl::memory::Aligned;
use nybl::quant::format::unpack_row;
use nybl::quant::rtn;
use std::path::Path;
use std::process::Command;

#[test]
fn python_reads_every_quantised_format() {
    let (n, k) = (130, 72);
    let x: Vec<f32> = (0..n * k).map(|i| ((i * 37 % 1009) as f32 - 500.0) / 700.0).collect();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("foreign.nybl");
    let formats = Format::ALL.into_iter().filter(|format| format.is_quantised());
    let mut tensors = Vec::new();
    for format in formats {
        let layout = Layout::new(format, if format == Format::Q3 { 16 } else { 32 }, n, k).unwrap();
        let mut bytes = Aligned::<u8>::zeroed("test", layout.bytes()).unwrap();
        let rows = layout.panel_rows() * k;
        for (panel, x) in bytes.chunks_exact_mut(layout.panel_bytes()).zip(x.chunks(rows)) {
            rtn::pack_panel(&layout, x.len() / k, x, panel).unwrap();
        }
        tensors.push((format.name().to_owned(), layout, bytes));
    }
    let mut plan: Vec<_> =
        tensors.iter().map(|(name, layout, _)| (name.clone(), Kind::Matrix(*layout))).collect();
    plan.push(("vector".into(), Kind::Vector(3)));
    let mut metadata = Metadata::new("foreign");
    metadata.set("general.architecture", Value::Text("none".into()));
    metadata.set("a.number", Value::Float(0.5));
    metadata.set("b.list", Value::Integers(vec![1, -2]));
    let mut writer = Writer::create(&path, &metadata, &plan).unwrap();
    for (_, _, bytes) in &tensors {
        writer.append(bytes).unwrap();
    }
    writer.append(&[1.0_f32, 2.5, -3.0].map(f32::to_le_bytes).concat()).unwrap();
    writer.finish().unwrap();

    let read = |tensor: &str| -> Vec<f32> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/ffi-tests/fixtures/read_nybl.py");
        let output = Command::new("python3").arg(script).arg(&path).arg(tensor).output();
        let output = output.expect("this test needs python3");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    assert_eq!(read("vector"), [1.0, 2.5, -3.0]);
    for (name, layout, bytes) in &tensors {
        let packed = Packed::new(*layout, bytes).unwrap();
        let got = read(name);
        assert_eq!(got.len(), n * k, "{name}");
        let mut row = vec![0.0; k];
        for (index, got) in got.chunks(k).enumerate() {
            unpack_row(&packed, index, &mut row);
            assert_eq!(row, got, "{name} row {index}");
        }
    }
}
