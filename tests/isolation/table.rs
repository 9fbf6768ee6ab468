//! Rows, their proofs and the table of their outcomes.

use std::{
    fmt::Write,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    time::Instant,
};

use support::engine::Engine;

use crate::shell;

/// Longest part of a message in the table.
const SHORT: usize = 110;

/// The expected outcome of a command.
#[derive(Clone, Copy)]
pub enum Expect {
    /// It succeeds and prints this.
    Says(&'static str),
    /// It succeeds and prints something for which this holds.
    Holds(fn(&str) -> bool),
    /// It fails with the code and prints this among other things.
    Fails(i32, &'static str),
}

/// The proof of a row.
#[derive(Clone, Copy)]
pub enum Proof {
    /// The lines that a user types.
    Lines(&'static str, Expect),
    /// More than a line.
    Code(fn(&Engine) -> Result<(), String>),
    /// Another test, by suite and name.
    In(&'static str),
    /// Does not apply, for the reason given.
    Other(&'static str),
}

/// A row of docs/isolation.md: its table and number or name, its claim, the proof.
pub struct Row(pub &'static str, pub &'static str, pub Proof);

/// The outcome of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Passed,
    Failed(String),
    /// Not built or not tried yet, for the reason given.
    NotBuilt(String),
    Elsewhere(&'static str),
    Other(&'static str),
}

impl From<Result<(), String>> for State {
    fn from(result: Result<(), String>) -> Self {
        result.map_or_else(Self::Failed, |()| Self::Passed)
    }
}

/// Tries a line.
pub fn check(engine: &Engine, lines: &str, expect: Expect) -> Result<(), String> {
    let ran = shell(engine, lines);
    let (code, said) = (ran.status.code(), ran.stdout);
    let holds = match expect {
        Expect::Says(text) => code == Some(0) && said == text,
        Expect::Holds(holds) => code == Some(0) && holds(&said),
        Expect::Fails(expected, text) => code == Some(expected) && said.contains(text),
    };
    if holds { Ok(()) } else { Err(format!("status {code:?}: {}", said.trim_end())) }
}

/// Turns a panic of a test into its row's message.
pub fn guarded(test: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(test)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default())
    })
}

impl Row {
    pub fn attempt(&self, engine: &Engine) -> State {
        match self.2 {
            Proof::Lines(lines, expect) => guarded(|| check(engine, lines, expect)).into(),
            Proof::Code(test) => guarded(|| test(engine)).into(),
            Proof::In(test) => State::Elsewhere(test),
            Proof::Other(why) => State::Other(why),
        }
    }
}

/// The rows with their outcomes.
pub struct Table {
    rows: Vec<(String, String, State)>,
    /// The time of the last row.
    last: Instant,
}

impl Default for Table {
    fn default() -> Self {
        Self { rows: Vec::new(), last: Instant::now() }
    }
}

impl Table {
    pub fn add(&mut self, row: &str, what: &str, state: State) {
        // The time shows where that of the suite goes.
        println!("== {row}: {what}: {state:?} ({:.1} s)", self.last.elapsed().as_secs_f64());
        self.last = Instant::now();
        self.rows.push((row.to_owned(), what.to_owned(), state));
    }

    /// Prints all rows, writes the part `title` of the report, and panics if a row failed.
    pub fn finish(self, title: &str) {
        let mut counts = [0; 5];
        for (row, what, state) in &self.rows {
            let (index, word, detail) = state.words();
            counts[index] += 1;
            println!("{row:<14} {what:<62} {word:<16} {}", short(detail));
        }
        let [passed, failed, later, elsewhere, other] = counts;
        println!(
            "{passed} passed, {failed} failed, {later} not built yet, {elsewhere} in other tests, {other} do not apply"
        );
        // A run of some rows says nothing about the others.
        if let (Some(directory), None) =
            (std::env::var_os("BULKHEAD_TEST_REPORT"), std::env::var_os("BULKHEAD_TEST_ROWS"))
        {
            let file = Path::new(&directory).join(format!("{}.md", title.to_lowercase().replace(' ', "-")));
            fs::create_dir_all(&directory).and_then(|()| fs::write(file, self.markdown(title))).unwrap();
        }
        let wrong = |state: &State| matches!(state, State::Failed(_));
        let failed: Vec<_> = self.rows.iter().filter(|(.., state)| wrong(state)).collect();
        assert!(failed.is_empty(), "{failed:#?}");
    }

    /// The rows as a section of the report, in Markdown.
    fn markdown(&self, title: &str) -> String {
        let mut text = format!("\n## {title}\n\n| Row | Behaviour | Outcome |\n|---|---|---|\n");
        for (row, what, state) in &self.rows {
            let (_, word, detail) = state.words();
            let separator = if detail.is_empty() { "" } else { ": " };
            // A bar within a cell would begin another one.
            let line = [row, what].map(|cell| cell.replace('|', "\\|")).join(" | ");
            // Writing to a string cannot fail.
            let _ = writeln!(text, "| {line} | {word}{separator}{} |", short(detail).replace('|', "\\|"));
        }
        text
    }
}

impl State {
    /// The state's place among the counts, its word in the table, and the details.
    fn words(&self) -> (usize, &'static str, &str) {
        match self {
            Self::Passed => (0, "passed", ""),
            Self::Failed(why) => (1, "FAILED", why),
            Self::NotBuilt(why) => (2, "not built yet", why),
            Self::Elsewhere(test) => (3, "in another test", test),
            Self::Other(why) => (4, "does not apply", why),
        }
    }
}

/// The start of a message, on one line.
fn short(detail: &str) -> String {
    detail.replace('\n', " | ").chars().take(SHORT).collect()
}
