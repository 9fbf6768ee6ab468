//! One run of one contender.

use std::{
    fs,
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use crate::{
    Result,
    agent::{Peer, Way},
    console::Console,
    launch::{Contender, OwnAccount, Running, Setup},
    process::{Exits, Memory},
};

/// Time for a run until init, and from there until the engine answers.
const HAPPENING_TIMEOUT: Duration = Duration::from_secs(240);

/// The reports of the threads around a VM.
pub enum Happening {
    /// init runs.
    Init {
        /// Arrival of its line.
        at: Instant,
        /// The exits until then.
        exits: Option<Exits>,
    },
    /// The engine answered.
    Ping {
        /// Arrival of the answer.
        at: Instant,
    },
    /// The run failed.
    Failed(String),
    /// The console's last output, when its reader ends.
    Console(String),
}

/// The figures of one run.
#[derive(Debug)]
pub struct Sample {
    /// From the start of the process to init, in milliseconds.
    pub init_ms: f64,
    /// To the engine's answer.
    pub ping_ms: Option<f64>,
    /// VM exits until init.
    pub exits: Option<Exits>,
    /// Our VMM's own account at init.
    pub own: Option<OwnAccount>,
    /// Memory at init.
    pub memory_init: Memory,
    /// Memory when the engine had answered.
    pub memory_engine: Option<Memory>,
}

/// Boots the contender, measures and kills it; leaves nothing behind.
pub fn run(setup: &Setup, contender: Contender, init_only: bool) -> Result<Sample> {
    clean(setup);
    setup.make_data_disk()?;
    let console = Console::make(&setup.console())?;
    let (happenings, happened) = mpsc::channel();
    let reachable = contender == Contender::Bulkhead || setup.vhost_vsock;
    // Declared before the process: dropped after it, when nothing can come from the guest any more.
    let way = Way::of(setup, contender);
    let (meeting, agent) = way.meet(reachable)?;
    let _peer = meeting.map(|meeting| Peer::start(way, meeting, happenings.clone()));
    let started = Instant::now();
    let mut running = Running::start(setup, contender, agent)?;
    let reader = console.watch(running.pid(), happenings);
    let measured = measure(&mut running, &happened, started, contender, init_only || !reachable);
    drop(running);
    drop(reader);
    clean(setup);
    measured.map_err(|error| match happened.try_iter().find_map(last_words) {
        Some(words) => format!("{error}\nthe guest's last output:\n{words}").into(),
        None => error,
    })
}

fn last_words(happening: Happening) -> Option<String> {
    if let Happening::Console(words) = happening { Some(words) } else { None }
}

fn measure(
    running: &mut Running,
    happened: &Receiver<Happening>,
    started: Instant,
    contender: Contender,
    init_only: bool,
) -> Result<Sample> {
    let ms = |at: Instant| at.duration_since(started).as_secs_f64() * 1000.0;
    let (init_ms, exits) = match next(running, happened)? {
        Happening::Init { at, exits } => (ms(at), exits),
        _ => return Err("the engine answered before init was seen".into()),
    };
    let own = running.own_account()?;
    let memory = |pid| Memory::read(pid, contender.guest_mapping());
    let memory_init = memory(running.pid())?;
    let mut sample = Sample { init_ms, ping_ms: None, exits, own, memory_init, memory_engine: None };
    if !init_only {
        if let Happening::Ping { at } = next(running, happened)? {
            sample.ping_ms = Some(ms(at));
        }
        sample.memory_engine = Some(memory(running.pid())?);
    }
    Ok(sample)
}

/// The next report; a failure is an error.
fn next(running: &mut Running, happened: &Receiver<Happening>) -> Result<Happening> {
    let deadline = Instant::now() + HAPPENING_TIMEOUT;
    loop {
        match happened.recv_timeout(Duration::from_millis(500)) {
            Ok(Happening::Failed(reason)) => return Err(reason.into()),
            Ok(Happening::Console(_)) => {}
            Ok(happening) => return Ok(happening),
            Err(RecvTimeoutError::Timeout) => running.check()?,
            Err(RecvTimeoutError::Disconnected) => return Err("the threads around the machine have ended".into()),
        }
        if Instant::now() > deadline {
            return Err(format!("nothing happened for {} s", HAPPENING_TIMEOUT.as_secs()).into());
        }
    }
}

fn clean(setup: &Setup) {
    for path in [setup.console(), setup.vsock(), setup.data()] {
        let _ = fs::remove_file(path);
    }
}
