//! Figures as a picture: charts side by side in one SVG file, that a page can show at half its width each.

use nybl::Error;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

/// Width and height of one chart in pixels.
const CHART: (u32, u32) = (480, 360);
/// Told apart by colour-blind readers too (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(140, 140, 60),
];

/// How an axis is divided.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// By powers of two.
    Doubling,
    /// Around what is shown.
    Close,
}

/// Points of one kind.
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
    /// Joined by a line; single points otherwise.
    pub(crate) joined: bool,
    /// What stands beside each point, or nothing.
    pub(crate) labels: Vec<String>,
}

/// One chart.
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: (String, Scale),
    pub(crate) y: (String, Scale),
    pub(crate) series: Vec<Series>,
}

/// Draws `charts` into the file at `path`, two in a row.
pub(crate) fn draw(path: &Path, charts: &[Chart]) -> nybl::Result<()> {
    let columns = charts.len().clamp(1, 2) as u32;
    let rows = (charts.len() as u32).div_ceil(columns).max(1);
    let mut svg = String::new();
    {
        let size = (CHART.0 * columns, CHART.1 * rows);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = area.fill(&WHITE).map_err(|error| error.to_string()).and_then(|()| {
            let parts = area.split_evenly((rows as usize, columns as usize));
            charts.iter().zip(&parts).try_for_each(|(chart, part)| one(chart, part))
        });
        drawn.map_err(|reason| Error::Io { path: path.display().to_string(), reason })?;
    }
    std::fs::write(path, svg).map_err(|error| Error::io(path.display().to_string(), &error))
}

fn one(chart: &Chart, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), String> {
    drawn(chart, area).map_err(|error| error.to_string())
}

fn drawn(
    chart: &Chart,
    area: &DrawingArea<SVGBackend<'_>, Shift>,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let places = |scale: Scale, pick: fn(&(f64, f64)) -> f64| -> Vec<f64> {
        let points = chart.series.iter().flat_map(|series| &series.points);
        points.map(|point| place(scale, pick(point))).filter(|place| place.is_finite()).collect()
    };
    let (scale_x, scale_y) = (chart.x.1, chart.y.1);
    let x = span(scale_x, &places(scale_x, |point| point.0));
    let y = span(scale_y, &places(scale_y, |point| point.1));
    let mut context = ChartBuilder::on(area)
        .caption(&chart.title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(x, y)?;
    context
        .configure_mesh()
        .x_desc(&chart.x.0)
        .y_desc(&chart.y.0)
        .x_labels(8)
        .y_labels(8)
        .x_label_formatter(&|x| label(scale_x, *x))
        .y_label_formatter(&|y| label(scale_y, *y))
        .light_line_style(WHITE)
        .label_style(("sans-serif", 12))
        .axis_desc_style(("sans-serif", 13))
        .draw()?;
    for (at, series) in chart.series.iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        let points: Vec<_> =
            series.points.iter().map(|(x, y)| (place(scale_x, *x), place(scale_y, *y))).collect();
        if series.joined {
            let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
            context.draw_series(line)?.label(&series.name).legend(move |(x, y)| {
                Rectangle::new([(x, y - 4), (x + 10, y + 4)], colour.filled())
            });
            context
                .draw_series(points.iter().map(|point| Circle::new(*point, 2, colour.filled())))?;
        } else {
            context
                .draw_series(points.iter().map(|point| Circle::new(*point, 4, colour.filled())))?
                .label(&series.name)
                .legend(move |(x, y)| Circle::new((x + 5, y), 4, colour.filled()));
        }
        for (point, text) in points.iter().zip(&series.labels) {
            let style = ("sans-serif", 11).into_font().color(&colour);
            let text = EmptyElement::at(*point) + Text::new(text.clone(), (6, -5), style);
            context.draw_series(std::iter::once(text))?;
        }
    }
    if chart.series.len() > 1 {
        context
            .configure_series_labels()
            .position(match scale_y {
                Scale::Close => SeriesLabelPosition::UpperRight,
                _ => SeriesLabelPosition::LowerRight,
            })
            .background_style(WHITE.mix(0.8))
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 12))
            .draw()?;
    }
    Ok(())
}

/// Where a number lies along an axis.
fn place(scale: Scale, x: f64) -> f64 {
    if scale == Scale::Doubling { x.log2() } else { x }
}

/// What stands beside a place of an axis.
fn label(scale: Scale, place: f64) -> String {
    let x = if scale == Scale::Doubling { place.exp2() } else { place };
    // Not minus zero.
    let x = x + 0.0;
    if scale == Scale::Close {
        return format!("{x:.1}");
    }
    match x.abs() {
        x if x >= 10_000.0 => format!("{:.0}k", x * 1e-3),
        x if x >= 10.0 || x == x.round() => format!("{x:.0}"),
        x if x >= 1.0 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}

/// The part of an axis that shows all `places`.
fn span(scale: Scale, places: &[f64]) -> std::ops::Range<f64> {
    let (low, high) = places
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(*x), high.max(*x)));
    if low > high {
        return 0.0..1.0;
    }
    match scale {
        Scale::Linear => low.min(0.0)..if high > 0.0 { 1.1 * high } else { 1.0 },
        Scale::Doubling => low.floor()..(high + 0.2).ceil().max(low.floor() + 1.0),
        Scale::Close => {
            let room = (0.1 * (high - low)).max(0.01 * high.abs()).max(1e-6);
            low - room..high + room
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_names_its_axes_series_and_points() {
        let path = std::env::temp_dir().join(format!("nybl-picture-{}.svg", std::process::id()));
        let series = |name: &str, joined| Series {
            name: name.into(),
            points: vec![(1.0, 3.5), (64.0, 9.0)],
            joined,
            labels: vec!["first".into()],
        };
        let chart = |scale| Chart {
            title: "A title".into(),
            x: ("rows".into(), scale),
            y: ("speed".into(), Scale::Linear),
            series: vec![series("one", true), series("two", false)],
        };
        let charts = [chart(Scale::Linear), chart(Scale::Doubling), chart(Scale::Close)];
        draw(&path, &charts).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for text in ["A title", "rows", "speed", "one", "two", "first", "width=\"960\""] {
            assert!(svg.contains(text), "{text}");
        }
        let error = draw(Path::new("/no/such/folder/x.svg"), &charts).unwrap_err();
        assert!(error.to_string().contains("/no/such/folder"), "{error}");
    }

    #[test]
    fn an_axis_shows_all_there_is_even_if_that_is_nothing() {
        assert_eq!(span(Scale::Linear, &[]), 0.0..1.0);
        assert_eq!(span(Scale::Doubling, &[0.0]), 0.0..1.0);
        assert_eq!(span(Scale::Doubling, &[0.3, 4.9]), 0.0..6.0);
        assert_eq!(label(Scale::Doubling, 5.0), "32");
        assert_eq!(label(Scale::Doubling, 14.0), "16k");
        assert_eq!(label(Scale::Linear, 0.25), "0.25");
    }
}
