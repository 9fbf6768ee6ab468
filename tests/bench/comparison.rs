//! Medians, ranges and ratios of contenders that ran in turns, row by row.

use std::{fmt::Write, time::Duration};

use serde_json::{Map, Value, json};

use crate::{
    launch::Machine,
    report::{Environment, spread},
};

/// The part that all runs have in common.
#[derive(Debug)]
pub struct Setup {
    /// The guest.
    pub machine: Machine,
    /// Time for which each row is measured.
    pub duration: Duration,
    /// Rounds.
    pub rounds: u32,
}

/// A measured quantity.
pub struct Row {
    /// Its name for programs.
    pub key: &'static str,
    /// Its name in the table.
    pub label: &'static str,
    unit: &'static str,
    decimals: usize,
    /// Set where more is better.
    pub more: bool,
    /// Factor by which a peer's goal is higher in this row.
    goal: f64,
}

impl Row {
    /// Makes a row from its names, the unit and decimals of its values, and the direction that is better.
    pub const fn new(key: &'static str, label: &'static str, unit: &'static str, decimals: usize, more: bool) -> Self {
        Self { key, label, unit, decimals, more, goal: 1.0 }
    }

    /// The same with a goal that is this many times a peer's.
    pub const fn goal(self, goal: f64) -> Self {
        Self { goal, ..self }
    }

    /// A value with its unit.
    pub fn show(&self, value: f64) -> String {
        format!("{value:.*} {}", self.decimals, self.unit)
    }
}

/// The values of one run of one contender.
#[derive(Debug)]
pub struct Sample {
    /// The round.
    pub round: u32,
    /// The contender's name.
    pub contender: String,
    /// By row.
    pub values: Vec<Option<f64>>,
}

impl Sample {
    /// Prints the values as they come in.
    pub fn print(&self, rows: &[Row]) {
        let show = |(row, value): (&Row, &Option<f64>)| {
            format!("{} {}", row.key, value.map_or("–".to_owned(), |value| row.show(value)))
        };
        let values: Vec<_> = rows.iter().zip(&self.values).map(show).collect();
        eprintln!("round {}: {}: {}", self.round, self.contender, values.join(", "));
    }
}

/// A contender beside ours.
pub struct Peer {
    /// Its name.
    pub name: String,
    /// The least ratio to it that is good enough; 0 for one that is there to be looked at.
    pub goal: f64,
}

/// Everything that was measured.
pub struct Report {
    /// The machine on which it was measured.
    pub environment: Environment,
    /// The guest.
    pub machine: String,
    /// The quantities.
    pub rows: &'static [Row],
    /// Our name.
    pub ours: String,
    /// The others that ran.
    pub peers: Vec<Peer>,
    /// Those that did not, with the reason.
    pub left_out: Vec<String>,
    /// Every run.
    pub samples: Vec<Sample>,
}

impl Report {
    fn values(&self, row: usize, contender: &str) -> Vec<(u32, f64)> {
        let of = self.samples.iter().filter(|sample| sample.contender == contender);
        of.filter_map(|sample| Some((sample.round, sample.values[row]?))).collect()
    }

    fn summary(&self, row: usize, contender: &str) -> Option<[f64; 3]> {
        spread(&self.values(row, contender).into_iter().map(|(_, value)| value).collect::<Vec<_>>())
    }

    /// The ratio of ours to the peer's, round by round, turned so that more than 1 is better in every row.
    fn ratio(&self, row: usize, peer: &str) -> Option<[f64; 3]> {
        let theirs = self.values(row, peer);
        let ratios: Vec<_> = self
            .values(row, &self.ours)
            .into_iter()
            .filter_map(|(round, ours)| {
                let (_, theirs) = theirs.iter().find(|(other, _)| *other == round)?;
                Some(if self.rows[row].more { ours / theirs } else { theirs / ours })
            })
            .collect();
        spread(&ratios)
    }

    /// All names, ours first.
    fn contenders(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.ours.as_str()).chain(self.peers.iter().map(|peer| peer.name.as_str()))
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
        for contender in self.contenders() {
            let _ = write!(text, "{contender:<30}");
        }
        for Peer { name: peer, .. } in &self.peers {
            let _ = write!(text, "{:<22}", format!("ours : {peer}"));
        }
        for (index, row) in self.rows.iter().enumerate() {
            let _ = write!(text, "\n{:<28}", row.label);
            for contender in self.contenders() {
                let cell = self.summary(index, contender).map_or("–".to_owned(), |spread| cell(row, spread));
                let _ = write!(text, "{cell:<30}");
            }
            for Peer { name: peer, .. } in &self.peers {
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
        let judged = self.peers.iter().filter(|peer| peer.goal > 0.0);
        judged
            .map(|Peer { name, goal }| {
                let missed: Vec<_> = (0..self.rows.len())
                    .filter(|row| {
                        self.ratio(*row, name).is_some_and(|[_, median, _]| median < *goal * self.rows[*row].goal)
                    })
                    .map(|row| self.rows[row].label)
                    .collect();
                let behind =
                    if missed.is_empty() { String::new() } else { format!(" (not in: {})", missed.join("; ")) };
                let higher = self.rows.iter().map(|row| row.goal).fold(1.0, f64::max);
                let higher =
                    if higher > 1.0 { format!(" (in those of names {})", goal * higher) } else { String::new() };
                (format!("at least {goal} of {name} in every row{higher}{behind}"), missed.is_empty())
            })
            .collect()
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let mut summary = Map::new();
        for (index, row) in self.rows.iter().enumerate() {
            let mut cells = Map::new();
            for contender in self.contenders() {
                if let Some([min, median, max]) = self.summary(index, contender) {
                    let mut cell = json!({"min": min, "median": median, "max": max});
                    if let Some([_, ratio, _]) = self.ratio(index, contender) {
                        cell["ours_better_by"] = json!(ratio);
                    }
                    cells.insert(contender.to_owned(), cell);
                }
            }
            summary.insert(row.key.to_owned(), cells.into());
        }
        let runs: Vec<_> = self
            .samples
            .iter()
            .map(|sample| {
                let values: Map<_, _> = self
                    .rows
                    .iter()
                    .zip(&sample.values)
                    .map(|(row, value)| (row.key.to_owned(), json!(value)))
                    .collect();
                json!({"round": sample.round, "contender": sample.contender, "values": values})
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
