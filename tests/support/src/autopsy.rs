//! The report of a test that gave up waiting: the threads that run and those that sleep, the answer of the engine, and
//! the state of guest and vCPUs.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs, io,
    io::Read,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use bulkhead::backend::api::Examination;

use crate::client;

/// Time between the two samples of the threads.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Time for the engine to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Reports the threads of some processes, the answer of the engine behind a socket, and its backend's view of the
/// guest.
pub fn report(processes: &[u32], socket: &Path, control: &Path) -> String {
    let before = threads(processes);
    thread::sleep(SAMPLE_INTERVAL);
    let mut text = String::from("--- threads: process, name, state, CPU, where it waits\n");
    for ((process, thread), now) in threads(processes) {
        // Clock ticks of USER_HZ, which is 100 for every program: of one second they are per cent.
        let busy = before.get(&(process, thread)).map_or(0, |before| now.ticks.saturating_sub(before.ticks));
        let _ = writeln!(text, "{process:7} {:15} {} {busy:3} % {}", now.name, now.state, now.waits);
    }
    let _ = writeln!(text, "--- {}: {}", socket.display(), ping(socket));
    let examined =
        client::ask(control, "GET", "/v1/examination").map_or_else(|error| error.to_string(), |(_, body)| body);
    let _ = writeln!(text, "--- {}: {}", control.display(), examined.trim_end());
    let starved = serde_json::from_str::<Examination>(&examined).unwrap_or_default().starved();
    if !starved.is_empty() {
        // scripts/lib/suites.sh looks for this line.
        let _ = writeln!(text, "--- KVM keeps interrupts from the vCPUs {starved:?}");
    }
    text
}

struct Thread {
    name: String,
    state: String,
    ticks: u64,
    waits: String,
}

/// By process and thread (proc_pid_stat(5), proc_pid_wchan(5)).
fn threads(processes: &[u32]) -> BTreeMap<(u32, u32), Thread> {
    let tasks = |process: &u32| {
        let entries = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
        let process = *process;
        entries.filter_map(move |entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            let stat = read("stat");
            // The name in parentheses may hold anything; field 3 follows it.
            let fields: Vec<_> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
            let ticks = |field: usize| fields.get(field - 3).and_then(|ticks| ticks.parse::<u64>().ok());
            let name = read("comm").trim_end().to_owned();
            let (state, ticks) = (fields.first()?.to_string(), ticks(14)? + ticks(15)?);
            Some(((process, id), Thread { name, state, ticks, waits: read("wchan") }))
        })
    };
    processes.iter().flat_map(tasks).collect()
}

/// Describes the outcome of one request.
fn ping(socket: &Path) -> String {
    let begun = Instant::now();
    match first_line(socket) {
        Ok(line) => format!("answers {line:?} after {:.2} s", begun.elapsed().as_secs_f64()),
        Err(error) => format!("no answer: {error}"),
    }
}

fn first_line(socket: &Path) -> io::Result<String> {
    let mut stream = client::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    client::request(&mut stream, "GET", "/_ping")?;
    let mut bytes = [0; 64];
    let length = stream.read(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..length]).lines().next().unwrap_or_default().to_owned())
}
