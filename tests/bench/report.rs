//! Medians, ranges and ratios, as a table and as JSON.

use std::{collections::BTreeMap, fmt::Write, fs, process::Command};

use serde_json::{Map, Value, json};

use crate::{
    Result,
    launch::{Contender, OwnAccount, Setup},
    round::Sample,
};

/// Upper limit of the memory that our VMM may hold beside the guest's, in KiB.
const OVERHEAD_GOAL: f64 = 8.0 * 1024.0;

/// The machine on which the numbers were taken.
#[derive(Debug)]
pub struct Environment {
    cpu: String,
    cpus: usize,
    kernel: String,
    qemu: String,
    emulated: bool,
    load: String,
}

impl Environment {
    /// Reads the figures of this machine.
    pub fn read(emulated: bool) -> Result<Self> {
        let cpu = fs::read_to_string("/proc/cpuinfo")?;
        let cpu =
            cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("", |(_, cpu)| cpu);
        let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
        let qemu = qemu.map_err(|error| format!("qemu-system-x86_64 cannot be run: {error}"))?;
        let qemu = String::from_utf8_lossy(&qemu.stdout).lines().next().unwrap_or("").to_owned();
        Ok(Self {
            cpu: cpu.to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            qemu: qemu.trim_start_matches("QEMU emulator version ").to_owned(),
            emulated,
            load: load()?,
        })
    }

    /// The same as two lines of the table.
    pub fn place(&self) -> String {
        let Self { cpu, cpus, kernel, qemu, emulated, load } = self;
        let kind = if *emulated { "emulated" } else { "real" };
        let now = self::load().unwrap_or_default();
        format!("host: {cpu}, {cpus} CPUs ({kind}); Linux {kernel}; QEMU {qemu}\nload before: {load}, after: {now}\n")
    }

    /// For programs, with what the guest was.
    pub fn json(&self, guest: &str) -> Value {
        let Self { cpu, cpus, kernel, qemu, emulated, load } = self;
        json!({
            "cpu": cpu, "cpus": cpus, "kernel": kernel, "qemu": qemu, "emulated": emulated,
            "load_before": load, "load_after": self::load().unwrap_or_default(), "guest": guest,
        })
    }
}

fn load() -> Result<String> {
    Ok(fs::read_to_string("/proc/loadavg")?.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

/// One measured quantity.
struct Quantity {
    key: &'static str,
    label: &'static str,
    unit: &'static str,
    divisor: f64,
    decimals: usize,
    value: fn(&Sample) -> Option<f64>,
}

#[rustfmt::skip]
const QUANTITIES: [Quantity; 7] = [
    Quantity { key: "init_ms", label: "process start to init", unit: "ms", divisor: 1.0, decimals: 0,
        value: |sample| Some(sample.init_ms) },
    Quantity { key: "ping_ms", label: "process start to _ping", unit: "ms", divisor: 1.0, decimals: 0,
        value: |sample| sample.ping_ms },
    Quantity { key: "exits", label: "VM exits until init", unit: "", divisor: 1.0, decimals: 0,
        value: |sample| sample.exits.as_ref().map(|exits| exits.total as f64) },
    Quantity { key: "init_rss_kib", label: "overhead at init, RSS", unit: "MiB", divisor: 1024.0, decimals: 1,
        value: |sample| Some(sample.memory_init.resident as f64) },
    Quantity { key: "init_pss_kib", label: "overhead at init, PSS", unit: "MiB", divisor: 1024.0, decimals: 1,
        value: |sample| Some(sample.memory_init.proportional as f64) },
    Quantity { key: "engine_rss_kib", label: "overhead at _ping, RSS", unit: "MiB", divisor: 1024.0, decimals: 1,
        value: |sample| sample.memory_engine.map(|memory| memory.resident as f64) },
    Quantity { key: "engine_pss_kib", label: "overhead at _ping, PSS", unit: "MiB", divisor: 1024.0, decimals: 1,
        value: |sample| sample.memory_engine.map(|memory| memory.proportional as f64) },
];

/// Everything that was measured.
pub struct Report {
    environment: Environment,
    machine: String,
    samples: Vec<(u32, Contender, Sample)>,
    failures: BTreeMap<Contender, u32>,
}

impl Report {
    /// A report on these rounds.
    pub fn new(
        environment: Environment,
        setup: &Setup,
        samples: Vec<(u32, Contender, Sample)>,
        failures: BTreeMap<Contender, u32>,
    ) -> Self {
        let machine = format!("{} vCPUs, {} MiB", setup.machine.cpus, setup.machine.memory_mib);
        Self { environment, machine, samples, failures }
    }

    fn values(&self, quantity: &Quantity, contender: Contender) -> Vec<(u32, f64)> {
        self.samples
            .iter()
            .filter(|(_, whose, _)| *whose == contender)
            .filter_map(|(round, _, sample)| Some((*round, (quantity.value)(sample)?)))
            .collect()
    }

    /// Ours over the peer's, round by round.
    fn ratios(&self, quantity: &Quantity, peer: Contender) -> Vec<f64> {
        let theirs = self.values(quantity, peer);
        let ours = self.values(quantity, Contender::Bulkhead);
        ours.iter()
            .filter_map(|(round, our)| theirs.iter().find(|(other, _)| other == round).map(|(_, their)| our / their))
            .collect()
    }

    fn summary(&self, quantity: &Quantity, contender: Contender) -> Option<[f64; 3]> {
        spread(&self.values(quantity, contender).into_iter().map(|(_, value)| value).collect::<Vec<_>>())
    }

    /// A table of medians, ranges and ratios with the goals.
    pub fn table(&self) -> String {
        const PEERS: [Contender; 2] = [Contender::Microvm, Contender::Q35];
        let rounds = self.samples.iter().map(|(round, ..)| *round).max().unwrap_or(0);
        let mut text = self.environment.place();
        let _ =
            writeln!(text, "guest: {}; rounds: {rounds}; median (least–most), ratios are ours to theirs", self.machine);
        let _ = write!(text, "\n{:<24}", "");
        for contender in Contender::ALL {
            let _ = write!(text, "{:<28}", contender.to_string());
        }
        for peer in PEERS {
            let _ = write!(text, "{:<20}", format!("ours / {peer}"));
        }
        for quantity in &QUANTITIES {
            let _ = write!(text, "\n{:<24}", quantity.label);
            for contender in Contender::ALL {
                let cell = self.summary(quantity, contender).map_or("–".to_owned(), |spread| quantity.show(spread));
                let _ = write!(text, "{cell:<28}");
            }
            for peer in PEERS {
                let cell = spread(&self.ratios(quantity, peer))
                    .map_or("–".to_owned(), |[least, median, most]| format!("{median:.2} ({least:.2}–{most:.2})"));
                let _ = write!(text, "{cell:<20}");
            }
        }
        let _ = write!(text, "\n\nour VMM by its own account, until init (medians): {}", self.own_account());
        for (contender, count) in &self.failures {
            let _ = write!(text, "\nruns of {contender} that failed and were repeated: {count}");
        }
        for (goal, met) in self.goals() {
            let _ = write!(text, "\n{goal}: {}", if met { "yes" } else { "NO" });
        }
        text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
    }

    /// The goals that all of this serves, and whether they are met.
    fn goals(&self) -> Vec<(String, bool)> {
        let init = &QUANTITIES[0];
        let mut goals = Vec::new();
        for peer in [Contender::Microvm, Contender::Q35] {
            if let Some([_, median, _]) = spread(&self.ratios(init, peer)) {
                goals.push((format!("sooner at init than {peer}"), median < 1.0));
            }
        }
        let overhead = |key| QUANTITIES.iter().find(|quantity| quantity.key == key);
        let most = ["init_rss_kib", "engine_rss_kib"]
            .into_iter()
            .filter_map(|key| self.summary(overhead(key)?, Contender::Bulkhead))
            .map(|[_, _, most]| most)
            .fold(0.0, f64::max);
        goals.push(("never more than 8 MiB beyond guest memory (RSS)".to_owned(), most <= OVERHEAD_GOAL));
        goals
    }

    /// Medians of what our VMM tells of itself.
    fn own_account(&self) -> String {
        let own: Vec<_> = self.samples.iter().filter_map(|(_, _, sample)| sample.own.as_ref()).collect();
        let median = |pick: &dyn Fn(&OwnAccount) -> f64| {
            spread(&own.iter().map(|account| pick(account)).collect::<Vec<_>>()).map_or(0.0, |[_, median, _]| median)
        };
        let mut text =
            format!("first entry into the guest after {:.0} ms", median(&|own| own.built_us as f64 / 1000.0));
        for kind in own.first().iter().flat_map(|first| first.statistics.exits.keys()) {
            let count = median(&|own| own.statistics.exits.get(kind).map_or(0.0, |count| *count as f64));
            let _ = write!(text, ", {kind} exits {count:.0}");
        }
        text
    }

    /// Every number, for programs.
    pub fn json(&self) -> Value {
        let runs: Vec<_> =
            self.samples.iter().map(|(round, contender, sample)| run(*round, *contender, sample)).collect();
        let mut summary = Map::new();
        for quantity in &QUANTITIES {
            let mut row = Map::new();
            for contender in Contender::ALL {
                if let Some([min, median, max]) = self.summary(quantity, contender) {
                    let mut cell = json!({"min": min, "median": median, "max": max});
                    if let Some([_, ratio, _]) = spread(&self.ratios(quantity, contender)) {
                        cell["ours_to_this"] = json!(ratio);
                    }
                    row.insert(contender.to_string(), cell);
                }
            }
            summary.insert(quantity.key.to_owned(), row.into());
        }
        let failures: Map<_, _> =
            self.failures.iter().map(|(contender, count)| (contender.to_string(), (*count).into())).collect();
        let goals: Map<_, _> = self.goals().into_iter().map(|(goal, met)| (goal, met.into())).collect();
        json!({
            "environment": self.environment.json(&self.machine),
            "summary": summary,
            "failed_runs": failures,
            "goals": goals,
            "runs": runs,
        })
    }
}

fn run(round: u32, contender: Contender, sample: &Sample) -> Value {
    json!({
        "round": round,
        "contender": contender.to_string(),
        "init_ms": sample.init_ms,
        "ping_ms": sample.ping_ms,
        "exits": sample.exits.as_ref().map(|exits| exits.total),
        "exit_kinds": sample.exits.as_ref().map(|exits| &exits.kinds),
        "own_exits": sample.own.as_ref().map(|own| &own.statistics.exits),
        "own_entry_us": sample.own.as_ref().map(|own| own.built_us),
        "memory_at_init": sample.memory_init.json(),
        "memory_at_ping": sample.memory_engine.map(|memory| memory.json()),
    })
}

impl Quantity {
    fn show(&self, [least, median, most]: [f64; 3]) -> String {
        let number = |value: f64| format!("{:.*}", self.decimals, value / self.divisor);
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        format!("{}{unit} ({}–{})", number(median), number(least), number(most))
    }
}

/// The least, the median and the most of some values.
pub fn spread(values: &[f64]) -> Option<[f64; 3]> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (least, most) = (*sorted.first()?, *sorted.last()?);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
    Some([least, median, most])
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        assert_eq!(spread(&[4.0, 1.0, 3.0, 2.0]), Some([1.0, 2.5, 4.0]));
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some([1.0, 2.0, 3.0]));
        assert_eq!(spread(&[]), None);
    }
}
