//! `nybl plot`: perplexity against bits, from what `scripts/quantization_table.py` measured.

use crate::Failure;
use crate::picture::{Chart, Scale, Series, draw};
use nybl::Error;
use serde_json::Value;
use std::path::PathBuf;

/// Arguments of `nybl plot`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  scripts/quantization_table.py NAME MODEL CALIBRATION TEST --results results.json
  nybl plot results.json quantization.svg")]
pub(crate) struct Args {
    /// The results: for each model an object of \"WIDTH METHOD\" with perplexity and bits.
    results: PathBuf,
    /// The picture.
    svg: PathBuf,
}

/// Runs the command.
pub(crate) fn plot(args: &Args) -> Result<(), Failure> {
    let name = args.results.display().to_string();
    let text = std::fs::read_to_string(&args.results).map_err(|error| Error::io(&name, &error))?;
    let charts = charts(&text).map_err(|reason| Error::corrupt(name, "results", reason))?;
    draw(&args.svg, &charts)?;
    Ok(())
}

/// A chart for each model, points of one colour for each method; those of `best` say at which width they are.
fn charts(text: &str) -> Result<Vec<Chart>, String> {
    let results: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let models = results.as_object().filter(|models| !models.is_empty());
    let models = models.ok_or("are no object of models")?;
    let chart = |(model, rows): (&String, &Value)| {
        let mut series: Vec<Series> = Vec::new();
        for (key, row) in rows.as_object().ok_or_else(|| format!("{model} is no object"))? {
            let (width, method) =
                key.rsplit_once(' ').ok_or_else(|| format!("{model}: {key} names no method"))?;
            let number = |field: &str| {
                row[field].as_f64().ok_or_else(|| format!("{model}: {key} has no {field}"))
            };
            let point = (number("layer_bits_per_weight")?, number("perplexity")?);
            let at = series.iter().position(|series| series.name == method).unwrap_or_else(|| {
                let (name, points, labels) = (method.to_owned(), Vec::new(), Vec::new());
                series.push(Series { name, points, joined: false, labels });
                series.len() - 1
            });
            series[at].points.push(point);
            if method == "best" {
                series[at].labels.push(width.to_owned());
            }
        }
        // The worst is drawn first, and what matters lies on top.
        let worst = |series: &Series| series.points.iter().fold(0.0, |top: f64, p| top.max(p.1));
        series.sort_by(|a, b| worst(b).total_cmp(&worst(a)));
        Ok(Chart {
            title: format!("{model}: perplexity against bits"),
            x: ("bits per weight of the layers".into(), Scale::Close),
            y: ("perplexity on held-out text".into(), Scale::Close),
            series,
        })
    };
    models.iter().map(chart).collect()
}

#[cfg(test)]
mod tests {
    use super::charts;

    #[test]
    fn points_of_one_colour_for_each_method() {
        let row = |bits: f64, perplexity: f64| {
            format!(r#"{{"layer_bits_per_weight": {bits}, "perplexity": {perplexity}}}"#)
        };
        let text = format!(
            r#"{{"a": {{"w4 g32 rtn": {}, "w3 g32 rtn": {}, "w4 g32 best": {}}}}}"#,
            row(4.5, 10.0),
            row(3.5, 20.0),
            row(4.5, 9.0)
        );
        let charts = charts(&text).unwrap();
        let lines: Vec<_> = charts[0].series.iter().map(|s| (s.name.as_str(), &s.points)).collect();
        assert_eq!(charts[0].series[1].labels, ["w4 g32"]);
        assert_eq!(lines, [("rtn", &vec![(3.5, 20.0), (4.5, 10.0)]), ("best", &vec![(4.5, 9.0)])]);
    }

    #[test]
    fn what_is_no_result_is_named() {
        for (text, reason) in [
            ("[]", "no object of models"),
            (r#"{"a": 3}"#, "a is no object"),
            (r#"{"a": {"rtn": {}}}"#, "rtn names no method"),
            (r#"{"a": {"w4 rtn": {}}}"#, "w4 rtn has no layer_bits_per_weight"),
        ] {
            let error = charts(text).err().unwrap();
            assert!(error.contains(reason), "{error}");
        }
    }
}
