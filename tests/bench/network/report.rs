//! The network's medians, ranges and ratios.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::{
    Sample,
    contender::Way,
    rows::{ROWS, Row},
};
use crate::report::{Environment, spread};

/// Everything that was measured.
pub struct Report {
    /// The machine on which it was measured.
    pub environment: Environment,
    /// The guest.
    pub machine: String,
    /// The contenders that ran.
    pub ways: Vec<Way>,
    /// Those that did not, with the reason.
    pub left_out: Vec<String>,
    /// Every run.
    pub samples: Vec<Sample>,
}

impl Report {
    fn values(&self, row: usize, way: Way) -> Vec<(u32, f64)> {
        let of = self.samples.iter().filter(|sample| sample.way == way);
        of.filter_map(|sample| Some((sample.round, sample.values[row]?))).collect()
    }

    fn summary(&self, row: usize, way: Way) -> Option<[f64; 3]> {
        spread(&self.values(row, way).into_iter().map(|(_, value)| value).collect::<Vec<_>>())
    }

    /// The ratio of ours to the peer's, round by round, turned so that more than 1 is better in every row.
    fn ratio(&self, row: usize, peer: Way) -> Option<[f64; 3]> {
        let theirs = self.values(row, peer);
        let ratios: Vec<_> = self
            .values(row, Way::Bulkhead)
            .into_iter()
            .filter_map(|(round, ours)| {
                let (_, theirs) = theirs.iter().find(|(other, _)| *other == round)?;
                Some(if ROWS[row].more { ours / theirs } else { theirs / ours })
            })
            .collect();
        spread(&ratios)
    }

    fn peers(&self) -> impl Iterator<Item = Way> {
        self.ways.iter().copied().filter(|way| *way != Way::Bulkhead)
    }

    /// A table for the terminal.
    pub fn table(&self) -> String {
        let rounds = self.samples.iter().map(|sample| sample.round).max().unwrap_or(0);
        let mut text = self.environment.place();
        let _ = writeln!(
            text,
            "guest: {}; rounds: {rounds}; median (least–most); “ours : x” above 1 means that ours is better",
            self.machine
        );
        let _ = write!(text, "\n{:<28}", "");
        for way in &self.ways {
            let _ = write!(text, "{:<30}", way.to_string());
        }
        for peer in self.peers() {
            let _ = write!(text, "{:<22}", format!("ours : {peer}"));
        }
        for (index, row) in ROWS.iter().enumerate() {
            let _ = write!(text, "\n{:<28}", row.label);
            for way in &self.ways {
                let cell = self.summary(index, *way).map_or("–".to_owned(), |spread| cell(row, spread));
                let _ = write!(text, "{cell:<30}");
            }
            for peer in self.peers() {
                let cell = self
                    .ratio(index, peer)
                    .map_or("–".to_owned(), |[least, median, most]| format!("{median:.2} ({least:.2}–{most:.2})"));
                let _ = write!(text, "{cell:<22}");
            }
        }
        text.push('\n');
        for line in &self.left_out {
            let _ = write!(text, "\n{line}");
        }
        for (goal, met) in self.goals() {
            let _ = write!(text, "\n{goal}: {}", if met { "yes" } else { "NO" });
        }
        text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
    }

    /// Each peer's goal, with the rows that miss it.
    fn goals(&self) -> Vec<(String, bool)> {
        self.peers()
            .map(|peer| {
                let missed: Vec<_> = (0..ROWS.len())
                    .filter(|row| self.ratio(*row, peer).is_some_and(|[_, median, _]| median < peer.goal()))
                    .map(|row| ROWS[row].label)
                    .collect();
                let behind =
                    if missed.is_empty() { String::new() } else { format!(" (not in: {})", missed.join("; ")) };
                (format!("at least {} of {peer} in every row{behind}", peer.goal()), missed.is_empty())
            })
            .collect()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let mut summary = Map::new();
        for (index, row) in ROWS.iter().enumerate() {
            let mut cells = Map::new();
            for way in &self.ways {
                if let Some([min, median, max]) = self.summary(index, *way) {
                    let mut cell = json!({"min": min, "median": median, "max": max});
                    if let Some([_, ratio, _]) = self.ratio(index, *way) {
                        cell["ours_better_by"] = json!(ratio);
                    }
                    cells.insert(way.to_string(), cell);
                }
            }
            summary.insert(row.key.to_owned(), cells.into());
        }
        let runs: Vec<_> = self
            .samples
            .iter()
            .map(|sample| {
                let values: Map<_, _> =
                    ROWS.iter().zip(&sample.values).map(|(row, value)| (row.key.to_owned(), json!(value))).collect();
                json!({"round": sample.round, "contender": sample.way.to_string(), "values": values})
            })
            .collect();
        let goals: Map<_, _> = self.goals().into_iter().map(|(goal, met)| (goal, met.into())).collect();
        json!({
            "environment": self.environment.json(&self.machine),
            "left_out": self.left_out,
            "summary": summary,
            "goals": goals,
            "runs": runs,
        })
    }
}

fn cell(row: &Row, [least, median, most]: [f64; 3]) -> String {
    let bare = |value: f64| row.show(value).split(' ').next().unwrap_or_default().to_owned();
    format!("{} ({}–{})", row.show(median), bare(least), bare(most))
}
