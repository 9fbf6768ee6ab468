//! The network's rows: the same guest behind Bulkhead's network process and behind QEMU's ways to an unprivileged one.

mod contender;
mod rows;
mod traffic;

use std::net::{Ipv4Addr, TcpListener};

use crate::{
    Environment, Result,
    comparison::{Peer, Report, Sample, Setup},
};
use contender::{Running, Way};
use traffic::Guest;

/// Measures all that can be run, in turns.
pub fn run(setup: &Setup, environment: Environment) -> Result<Report> {
    let (mut ways, mut left_out) = (Vec::new(), Vec::new());
    for way in Way::ALL {
        match way.missing() {
            None => ways.push(way),
            Some(reason) => left_out.push(format!("{way} is left out: {reason}")),
        }
    }
    for reason in &left_out {
        eprintln!("{reason}");
    }
    let mut samples = Vec::new();
    for round in 1..=setup.rounds {
        let done = persist(setup, &ways, round).map_err(|error| format!("round {round}: {error}"))?;
        for sample in &done {
            sample.print(&rows::ROWS);
        }
        samples.extend(done);
    }
    let machine = format!("{} vCPUs, {} MiB", setup.machine.cpus, setup.machine.memory_mib);
    let peers = ways.iter().filter(|way| **way != Way::Bulkhead);
    let peers = peers.map(|way| Peer { name: way.to_string(), goal: way.goal() }).collect();
    let ours = Way::Bulkhead.to_string();
    Ok(Report { environment, machine, rows: &rows::ROWS, ours, peers, left_out, samples })
}

/// Runs a round, once more if that fails.
fn persist(setup: &Setup, ways: &[Way], round: u32) -> Result<Vec<Sample>> {
    one(setup, ways, round).or_else(|error| {
        eprintln!("a round failed and runs again: {error}");
        one(setup, ways, round)
    })
}

/// Runs one round. All guests are up at the same time and have their turns row by row, so that other work of the
/// machine slows all of them down alike.
fn one(setup: &Setup, ways: &[Way], round: u32) -> Result<Vec<Sample>> {
    let mut guests = Vec::new();
    for way in ways {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let running = Running::start(setup, *way, listener.local_addr()?.port())?;
        let guest = Guest::meet(&listener, running).map_err(|error| format!("{way}: {error}"))?;
        guests.push((guest, Sample { round, contender: way.to_string(), values: vec![None; rows::ROWS.len()] }));
    }
    // Another contender is the first in each round.
    let first = round as usize % guests.len().max(1);
    guests.rotate_left(first);
    for step in rows::STEPS {
        for (guest, sample) in &mut guests {
            let measured = step(guest, setup.duration).map_err(|error| {
                format!("{}: {error}\nthe guest's last output:\n{}", sample.contender, guest.last_words())
            })?;
            for (row, value) in measured {
                sample.values[row] = Some(value);
            }
        }
    }
    guests.rotate_right(first);
    Ok(guests.into_iter().map(|(_, sample)| sample).collect())
}
