//! Draws the rows of a run as bars of their ratios, with marks at the targets.

use svg::Document;
use svg::node::element::{Line, Rectangle, Text, Title};

use crate::table::Row;

const WIDTH: f64 = 1040.0;
/// Left and right end of the scale; labels are on both sides.
const LEFT: f64 = 330.0;
const RIGHT: f64 = 700.0;
/// Position of the first row, and the distance between rows.
const TOP: f64 = 76.0;
const STEP: f64 = 24.0;
/// Ratio at the right end, where longer bars are cut.
const MOST: f64 = 2.0;

/// The text is legible on white only, so the background is white in dark mode, too.
const BACKGROUND: &str = "#ffffff";
const INK: &str = "#1f2328";
const GREY: &str = "#656d76";
const FAINT: &str = "#d0d7de";
const MET: &str = "#2f81c1";
const MISSED: &str = "#d1602b";
const PEER: &str = "#b4bcc5";

pub fn draw(rows: &[Row]) -> Document {
    let bottom = TOP + STEP * rows.len() as f64;
    let height = bottom + 20.0;
    let mut document = Document::new()
        .set("viewBox", (0.0, 0.0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .set("font-family", "system-ui, 'DejaVu Sans', sans-serif")
        .set("font-size", 12)
        .add(Title::new("Cost of handout compared with the minimum for the same work"))
        .add(Rectangle::new().set("width", WIDTH).set("height", height).set("fill", BACKGROUND))
        .add(
            text(16.0, 26.0, "Cost as a ratio to the reference on the right").set("font-size", 15),
        );
    let mut x = 16.0;
    for (colour, name) in
        [(MET, "handout"), (MISSED, "handout, above its target"), (PEER, "other program")]
    {
        document = document
            .add(bar(x, 40.0, 12.0, colour))
            .add(text(x + 18.0, 50.5, name).set("fill", GREY));
        x += 36.0 + 7.0 * name.len() as f64;
    }
    document = document
        .add(line(x, 38.0, 16.0, INK).set("stroke-width", 2.5))
        .add(text(x + 10.0, 50.5, "target: at most").set("fill", GREY));
    for (ratio, colour) in [(0.0, FAINT), (0.5, FAINT), (1.0, GREY), (1.5, FAINT), (2.0, FAINT)] {
        document = document.add(line(position(ratio), TOP - 6.0, bottom - TOP + 6.0, colour)).add(
            text(position(ratio), TOP - 10.0, &ratio.to_string())
                .set("text-anchor", "middle")
                .set("fill", GREY),
        );
    }
    for (row, number) in rows.iter().zip(0..) {
        document = add(document, row, TOP + STEP * f64::from(number));
    }
    document
}

fn add(document: Document, row: &Row, top: f64) -> Document {
    let colour = match row.met() {
        Some(true) => MET,
        Some(false) => MISSED,
        None => PEER,
    };
    let end = position(row.ratio());
    let base = top + 16.0;
    let beside = format!("{} {}", row.beside, row.unit.show(row.other));
    let mut document = document
        .add(text(LEFT - 10.0, base, &row.what).set("text-anchor", "end"))
        .add(bar(LEFT, top + 6.0, end - LEFT, colour));
    if let Some(target) = row.target {
        document =
            document.add(line(position(target), top + 3.0, 18.0, INK).set("stroke-width", 2.5));
    }
    if row.ratio() > MOST {
        // A gap marks a cut bar.
        document = document.add(bar(RIGHT - 14.0, top + 6.0, 4.0, BACKGROUND));
    }
    let ratio = format!("{:.2}", row.ratio());
    document
        .add(text(RIGHT + 46.0, base, &ratio).set("text-anchor", "end").set("font-weight", "bold"))
        .add(text(RIGHT + 58.0, base, &beside).set("fill", GREY).set("font-size", 11))
}

fn position(ratio: f64) -> f64 {
    LEFT + (RIGHT - LEFT) * ratio.clamp(0.0, MOST) / MOST
}

fn text(x: f64, y: f64, content: &str) -> Text {
    Text::new(content).set("x", round(x)).set("y", y).set("fill", INK)
}

fn bar(x: f64, y: f64, width: f64, colour: &str) -> Rectangle {
    let bar = Rectangle::new().set("x", round(x)).set("y", y).set("fill", colour);
    bar.set("width", round(width)).set("height", 12)
}

fn line(x: f64, y: f64, length: f64, colour: &str) -> Line {
    let line = Line::new().set("x1", round(x)).set("x2", round(x)).set("stroke", colour);
    line.set("y1", y).set("y2", y + length)
}

fn round(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}
