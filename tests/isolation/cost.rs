//! What isolation costs: two VMs beside each other, one with it and one without, in turns.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::{
    engine::{START, images},
    home::{Home, OwnHome},
    process::{COMMAND, run, run_with},
};

/// Pairs of runs.
const ROUNDS: usize = 20;

/// Unpacks 20,000 files and looks at each.
const FILES: &str = "mkdir /s && cd /s && i=0; while [ $i -lt 20000 ]; do echo $i >f$i; i=$((i+1)); done; tar cf /s.tar .; \
                     mkdir /d; a=$(cut -d' ' -f1 /proc/uptime); tar xf /s.tar -C /d; find /d -type f -exec stat -t {} + >/list; \
                     echo $a $(cut -d' ' -f1 /proc/uptime)";

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
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=ROUNDS {
        for (home, times) in homes.iter().zip(&mut times) {
            let begun = Instant::now();
            run(home.docker_command(&["run", "--rm", "alpine", "true"]), COMMAND).ok();
            // The first of each does not count.
            if round > 0 {
                times.push(begun.elapsed());
            }
        }
    }
    print("docker run --rm alpine true", &times);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..3 {
        for (home, times) in homes.iter().zip(&mut times) {
            let command = home.docker_command(&["run", "--rm", "alpine", "sh", "-c", FILES]);
            let said = run(command, COMMAND * 10).ok();
            let seconds: Vec<f64> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
            times.push(Duration::from_secs_f64(seconds[1] - seconds[0]));
        }
    }
    print("unpacking and looking at 20000 files", &times);
}

fn print(what: &str, [off, on]: &[Vec<Duration>; 2]) {
    let median = |times: &[Duration]| {
        let mut times = times.to_vec();
        times.sort();
        times[times.len() / 2].as_secs_f64()
    };
    let (off, on) = (median(off), median(on));
    println!("{what}: ECI off {off:.2} s, on {on:.2} s, ratio {:.3} (in an emulated machine only a hint)", on / off);
}
