//! The cost of isolation: two VMs beside each other, one with it and one without, in turns.

use std::{
    fs,
    time::{Duration, Instant},
};

use support::{
    engine::{START, images},
    home::{Home, OwnHome},
    process::{COMMAND, run, run_with},
};

/// Pairs of runs.
const ROUNDS: usize = 20;

/// Pairs of unpackings.
const UNPACKINGS: usize = 7;

/// Makes an archive of 20,000 files.
const PACK: &str =
    "mkdir /f && cd /f && i=0; while [ $i -lt 20000 ]; do echo $i >f$i; i=$((i+1)); done; tar cf /s/s.tar .";

/// Unpacks it and reads the attributes of each file; prints the times of its start and its end.
const UNPACK: &str = "mkdir /d; a=$(cut -d' ' -f1 /proc/uptime); tar xf /s/s.tar -C /d; \
                      find /d -type f -exec stat -t {} + >/list; echo $a $(cut -d' ' -f1 /proc/uptime)";

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn what_isolation_costs() {
    if std::env::var_os("BULKHEAD_TEST_COST").is_none() {
        println!("left out; BULKHEAD_TEST_COST=1 measures");
        return;
    }
    let homes = [false, true].map(|isolated| {
        let home = OwnHome(Home::new());
        home.bulkhead(&["settings", "set", "enhancedContainerIsolation", &isolated.to_string()], COMMAND).ok();
        home.bulkhead(&["start", "--timeout", "220"], START).ok();
        let image = fs::read(images().join("alpine.tar")).unwrap();
        run_with(home.docker_command(&["load", "--quiet"]), &image, COMMAND).ok();
        home
    });
    let times = in_turns(&homes, ROUNDS, |home| {
        let begun = Instant::now();
        run(home.docker_command(&["run", "--rm", "alpine", "true"]), COMMAND).ok();
        begun.elapsed()
    });
    print("docker run --rm alpine true", &times);
    for home in &homes {
        let command = home.docker_command(&["run", "--rm", "-v", "files:/s", "alpine", "sh", "-c", PACK]);
        run(command, COMMAND * 10).ok();
    }
    let times = in_turns(&homes, UNPACKINGS, |home| {
        let command = home.docker_command(&["run", "--rm", "-v", "files:/s:ro", "alpine", "sh", "-c", UNPACK]);
        let said = run(command, COMMAND * 10).ok();
        let seconds: Vec<f64> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
        Duration::from_secs_f64(seconds[1] - seconds[0])
    });
    print("unpacking and looking at 20000 files", &times);
}

/// Measures both so many times, in alternating order; the first round does not count.
fn in_turns(homes: &[OwnHome; 2], rounds: usize, measure: impl Fn(&Home) -> Duration) -> [Vec<Duration>; 2] {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=rounds {
        for which in [round % 2, (round + 1) % 2] {
            let time = measure(&homes[which]);
            if round > 0 {
                times[which].push(time);
            }
        }
    }
    times
}

fn print(what: &str, [off, on]: &[Vec<Duration>; 2]) {
    let [off, on] = [off, on].map(|times| {
        let mut times: Vec<_> = times.iter().map(Duration::as_secs_f64).collect();
        times.sort_by(f64::total_cmp);
        times
    });
    let (median, least) = (off.len() / 2, 0);
    println!(
        "{what}: ECI off {:.2} s, on {:.2} s, ratio {:.3}; of the fastest {:.3} (in an emulated machine only a hint)",
        off[median],
        on[median],
        on[median] / off[median],
        on[least] / off[least]
    );
}
