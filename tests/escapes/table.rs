//! The attempts, the containers that made them, and their outcomes.

use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::real::{self, Real};

/// Longest detail in the table.
const DETAIL: usize = 90;

/// The outcome of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded.
    Open(String),
    /// It was refused.
    Refused(String),
    /// Its target does not exist.
    Absent(String),
}

impl Outcome {
    fn word(&self) -> &'static str {
        match self {
            Self::Open(_) => "OPEN",
            Self::Refused(_) => "refused",
            Self::Absent(_) => "absent",
        }
    }

    fn detail(&self) -> &str {
        let (Self::Open(text) | Self::Refused(text) | Self::Absent(text)) = self;
        text
    }
}

/// The kind of container that made an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Column {
    On,
    OnPrivileged,
    Off,
    OffPrivileged,
    /// No container: the program on the machine itself.
    NoWall,
}

impl Column {
    const ALL: [Self; 5] = [Self::On, Self::OnPrivileged, Self::Off, Self::OffPrivileged, Self::NoWall];

    fn title(self) -> &'static str {
        match self {
            Self::On => "ECI on",
            Self::OnPrivileged => "on, priv.",
            Self::Off => "ECI off",
            Self::OffPrivileged => "off, priv.",
            Self::NoWall => "no wall",
        }
    }

    pub fn privileged(self) -> bool {
        matches!(self, Self::OnPrivileged | Self::OffPrivileged)
    }

    pub fn isolated(self) -> bool {
        matches!(self, Self::On | Self::OnPrivileged)
    }
}

/// The lines of the probe, among other output.
pub fn lines(output: &str) -> Vec<(String, Outcome)> {
    let parse = |line: &str| {
        let mut words = line.splitn(3, '\t');
        let (name, word, detail) = (words.next()?, words.next()?, words.next()?);
        let make = match word {
            "open" => Outcome::Open,
            "refused" => Outcome::Refused,
            "absent" => Outcome::Absent,
            _ => return None,
        };
        Some((name.to_owned(), make(detail.to_owned())))
    };
    output.lines().filter_map(parse).collect()
}

/// One outcome of several: open if any is, and with the names of those that are.
pub fn any<'a>(several: impl Iterator<Item = (&'a str, &'a Outcome)>) -> Outcome {
    let several: Vec<_> = several.collect();
    assert!(!several.is_empty(), "nothing was tried");
    let open: Vec<_> =
        several.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Open(_))).map(|(n, _)| *n).collect();
    if !open.is_empty() {
        return Outcome::Open(open.join("; "));
    }
    let refused = several.iter().find(|(_, outcome)| matches!(outcome, Outcome::Refused(_)));
    refused.unwrap_or(&several[0]).1.clone()
}

/// The table.
#[derive(Debug, Default)]
pub struct Table {
    /// In the order in which they came.
    rows: Vec<(String, BTreeMap<Column, Outcome>)>,
    /// Other ways into a container with isolation on: the way, the attempt and how it ended.
    extra: Vec<(String, String, Outcome)>,
}

impl Table {
    pub fn set(&mut self, column: Column, name: &str, outcome: Outcome) {
        let index = self.rows.iter().position(|(row, _)| row == name).unwrap_or_else(|| {
            self.rows.push((name.to_owned(), BTreeMap::new()));
            self.rows.len() - 1
        });
        if let (true, Outcome::Open(detail)) = (column.isolated(), &outcome) {
            println!("open in {column:?}: {name}: {detail}");
        }
        self.rows[index].1.insert(column, outcome);
    }

    pub fn extend(&mut self, column: Column, lines: Vec<(String, Outcome)>) {
        for (name, outcome) in lines {
            self.set(column, &name, outcome);
        }
    }

    pub fn extra(&mut self, way: &str, lines: Vec<(String, Outcome)>) {
        assert!(!lines.is_empty(), "{way}: the probe did not run");
        self.extra.extend(lines.into_iter().map(|(name, outcome)| (way.to_owned(), name, outcome)));
    }

    pub fn print(&self) {
        let tried = |column: &Column| self.rows.iter().any(|(_, cells)| cells.contains_key(column));
        let columns: Vec<_> = Column::ALL.into_iter().filter(tried).collect();
        print!("{:<42}", "attempt");
        for column in &columns {
            print!(" {:<10}", column.title());
        }
        println!(" detail");
        for (name, cells) in &self.rows {
            print!("{name:<42}");
            for column in columns.iter().copied() {
                let known = column.isolated() && real::is_known_open(name);
                let word = match cells.get(&column) {
                    None => "-",
                    Some(Outcome::Open(_)) if known => "OPEN*",
                    Some(outcome) => outcome.word(),
                };
                print!(" {word:<10}");
            }
            let worst = cells.iter().find(|(column, it)| column.isolated() && matches!(it, Outcome::Open(_)));
            let shown = worst.or_else(|| cells.last_key_value()).map_or("", |(_, outcome)| outcome.detail());
            println!(" {}", shown.chars().take(DETAIL).collect::<String>());
        }
        let mut ways: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        for (way, name, outcome) in &self.extra {
            let (all, open) = ways.entry(way).or_default();
            *all += 1;
            *open += usize::from(matches!(outcome, Outcome::Open(_)) && !real::is_known_open(name));
        }
        for (way, (all, open)) in ways {
            println!("ECI on, {way}: {open} of {all} attempts open");
        }
        for (name, why) in real::KNOWN_OPEN {
            println!("* {name}: {why}");
        }
        for (name, real) in real::ATTEMPTS {
            if let Real::Never(why) = real {
                println!("not open even without isolation: {name}: {why}");
            }
        }
    }

    /// Panics unless every attempt was made with isolation on and failed.
    pub fn judge_isolation(&self) {
        let mut wrong = Vec::new();
        let isolated = self.rows.iter().flat_map(|(name, cells)| {
            let cells = cells.iter().filter(|(column, _)| column.isolated());
            cells.map(move |(column, outcome)| (format!("{column:?}"), name, outcome))
        });
        let extra = self.extra.iter().map(|(way, name, outcome)| (way.clone(), name, outcome));
        for (way, name, outcome) in isolated.chain(extra) {
            if matches!(outcome, Outcome::Open(_)) && !real::is_known_open(name) {
                wrong.push(format!("{way}: {name} succeeded: {}", outcome.detail()));
            }
        }
        for (name, _) in real::ATTEMPTS {
            let isolated = |cells: &BTreeMap<Column, Outcome>| cells.keys().any(|column| column.isolated());
            let made = self.rows.iter().any(|(row, cells)| row == name && isolated(cells));
            if !made {
                wrong.push(format!("{name} was not tried"));
            }
        }
        for (name, _) in self.rows.iter().filter(|(name, _)| real::of(name).is_none()) {
            wrong.push(format!("{name} is not in the list of attempts"));
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// Panics unless every attempt succeeded without isolation where it is said to.
    pub fn judge_reality(&self) {
        let mut wrong = Vec::new();
        for (name, cells) in &self.rows {
            let open = |column| matches!(cells.get(&column), Some(Outcome::Open(_)));
            match real::of(name) {
                None => wrong.push(format!("{name} is not in the list of attempts")),
                Some(Real::Default) if !open(Column::Off) => {
                    wrong.push(format!("{name} is not open without isolation"));
                }
                Some(Real::Privileged) if !open(Column::OffPrivileged) => {
                    wrong.push(format!("{name} is not open to a privileged container without isolation"));
                }
                Some(Real::Never(_)) if open(Column::Off) || open(Column::OffPrivileged) => {
                    wrong.push(format!("{name} is said to be open never, and is open without isolation"));
                }
                Some(_) => {}
            }
        }
        for (name, real) in real::ATTEMPTS {
            if !matches!(real, Real::Never(_)) && !self.rows.iter().any(|(row, _)| row == name) {
                wrong.push(format!("{name} was not tried"));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// The names of the attempts that were made in a column.
    pub fn names(&self, column: Column) -> Vec<&str> {
        let tried = self.rows.iter().filter(|(_, cells)| cells.contains_key(&column));
        tried.map(|(name, _)| name.as_str()).collect()
    }

    /// Panics unless each of the requests had its effect where it has to, and nowhere else.
    pub fn judge_requests<'a>(&self, column: Column, requests: impl Iterator<Item = (&'a str, bool)>) {
        let wrong = requests.filter_map(|(name, succeeds)| {
            let cells = self.rows.iter().find(|(row, _)| row == name).map(|(_, cells)| cells);
            let Some(outcome) = cells.and_then(|cells| cells.get(&column)) else {
                return Some(format!("{name} was not tried"));
            };
            let open = matches!(outcome, Outcome::Open(_));
            (open != succeeds).then(|| format!("{name}: its effect should be {succeeds} and is {open}"))
        });
        let wrong: Vec<_> = wrong.collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

/// The one table of both tests, so that the second prints the columns of the first as well.
pub struct Shared(MutexGuard<'static, Table>);

impl Shared {
    pub fn lock() -> Self {
        static TABLE: Mutex<Table> = Mutex::new(Table { rows: Vec::new(), extra: Vec::new() });
        // The rows of a test that failed are still right.
        Self(TABLE.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Deref for Shared {
    type Target = Table;

    fn deref(&self) -> &Table {
        &self.0
    }
}

impl DerefMut for Shared {
    fn deref_mut(&mut self) -> &mut Table {
        &mut self.0
    }
}

impl Drop for Shared {
    /// Prints the table, also when a test panics before its end.
    fn drop(&mut self) {
        self.0.print();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_probe_are_found_among_others() {
        let output = "Step 2/2\nbpf\trefused\tmaking a map: no\na\tb\tc\nclock\topen\tset\tit\n";
        let expected =
            [("bpf", Outcome::Refused("making a map: no".into())), ("clock", Outcome::Open("set\tit".into()))];
        assert_eq!(lines(output), expected.map(|(name, outcome)| (name.to_owned(), outcome)));
    }

    #[test]
    fn one_way_that_is_open_is_enough() {
        let (refused, open) = (Outcome::Refused("r".into()), Outcome::Open("o".into()));
        assert_eq!(any([("a", &refused), ("b", &open)].into_iter()), Outcome::Open("b".into()));
        assert_eq!(any([("a", &Outcome::Absent("x".into())), ("b", &refused)].into_iter()), refused);
    }

    #[test]
    #[should_panic(expected = "OnPrivileged: bpf succeeded: loaded")]
    fn a_success_with_isolation_on_is_wrong() {
        let mut table = Table::default();
        table.set(Column::OnPrivileged, "bpf", Outcome::Open("loaded".into()));
        table.judge_isolation();
    }

    #[test]
    #[should_panic(expected = "bpf is not open to a privileged container without isolation")]
    fn an_attempt_that_is_not_real_is_wrong() {
        let mut table = Table::default();
        table.set(Column::OnPrivileged, "bpf", Outcome::Refused("no".into()));
        table.judge_reality();
    }
}
