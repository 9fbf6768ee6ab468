//! The checks of `doctor` for a running engine: whether guest and engine respond, and what they are doing if not.
//!
//! A guest that hangs does not respond itself, so its CPUs are seen from outside. An engine that hangs in a healthy
//! guest is seen by the guest's busy threads.

use std::time::{Duration, Instant};

use bulkhead_protocol::{Description, GuestThread};
use tokio::time::timeout;

use super::{
    Check, kvm,
    symbols::{Symbols, SymbolsError},
};
use crate::{
    backend::api::Examination,
    cli::{
        client::{self, Client, ClientError},
        command,
        progress::Progress,
    },
    settings::Paths,
};
use bulkhead_ipc::report::chain;
use bulkhead_vmm::api::VcpuView;

/// Time for the engine to respond to `_ping`.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Most threads in a message.
const MAX_THREADS: usize = 8;

/// The checks of a running VM; none without one.
pub(super) async fn checks(paths: &Paths) -> Vec<Check> {
    let running = async {
        let Some(client) = Client::connect(paths).await? else { return Ok(Vec::new()) };
        // A backend without a VM, as after a failed start, has nothing that could respond; `status` has the reason.
        if client.status().await?.vmm_pid.is_none() {
            return Ok(Vec::new());
        }
        let _progress = Progress::show("examining the running engine");
        // At once: an engine that does not respond is compared with what the guest was doing at that time.
        let (examination, ping) = tokio::join!(client.examination(), ping(paths));
        let examination = examination?;
        let engine = ping.map_err(|problem| unanswered(&problem, examination.guest.as_ref()));
        Ok::<_, ClientError>(vec![
            Check { name: "guest", result: guest(&examination, &command(paths, "stop --force")) },
            Check { name: "engine", result: engine },
            Check { name: "kvm", result: Ok(kvm::describe(&examination.kvm, examination.vcpu_count())) },
        ])
    };
    running.await.unwrap_or_else(|error| vec![Check { name: "backend", result: Err(chain(&error)) }])
}

async fn ping(paths: &Paths) -> Result<String, String> {
    let started = Instant::now();
    match timeout(PING_TIMEOUT, client::ping(&paths.docker_socket())).await {
        Ok(Ok(())) => Ok(format!("responds after {} ms", started.elapsed().as_millis())),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!("no response within {} s", PING_TIMEOUT.as_secs())),
    }
}

fn guest(examination: &Examination, stop: &str) -> Result<String, String> {
    let Some(Description { load, memory_kib, available_kib, threads, .. }) = &examination.guest else {
        let symbols = examination.kernel.as_deref().map(Symbols::read);
        return Err(format!(
            "no response; {}; `{stop}` kills the VM, as in a power failure",
            vcpus(examination, symbols)
        ));
    };
    Ok(format!(
        "responds; load {load}, {} of {} MiB memory available, {threads} threads",
        available_kib / 1024,
        memory_kib / 1024
    ))
}

/// The problem of an engine that does not respond, with the guest's busy threads as its likely cause.
fn unanswered(problem: &str, guest: Option<&Description>) -> String {
    let Some(guest) = guest else { return problem.to_owned() };
    if guest.busiest.is_empty() {
        return format!("{problem}; no thread in the guest is busy");
    }
    let threads: Vec<_> = guest.busiest.iter().take(MAX_THREADS).map(thread).collect();
    format!("{problem}; busy in the guest: {}", threads.join(", "))
}

fn thread(thread: &GuestThread) -> String {
    let GuestThread { process, name, state, busy, waits } = thread;
    // The kernel function in which a sleeping thread waits says more than its state: a hung disk and a lock differ
    // there.
    let place = if waits.is_empty() { String::new() } else { format!(" in {waits}") };
    format!("{name} (process {process}, {state}{place}, {busy} %)")
}

/// The places of the vCPUs, each time that they were stopped, with the names of the kernel's functions if it has them.
fn vcpus(examination: &Examination, symbols: Option<Result<Symbols, SymbolsError>>) -> String {
    let (symbols, problem) = match symbols {
        None => (Symbols::default(), String::new()),
        Some(Ok(symbols)) => (symbols, String::new()),
        Some(Err(error)) => (Symbols::default(), format!("; {}", chain(&error))),
    };

    let (looks, starved) = (&examination.vcpus, examination.starved());
    let Some(count) = looks.iter().map(Vec::len).max() else { return "its process does not respond either".into() };
    let one = |index: usize| {
        let mut places: Vec<String> =
            looks.iter().filter_map(|look| Some(place(look.get(index)?.as_ref(), &symbols))).collect();
        // A vCPU that spins is in the same place each time; it is printed once.
        places.dedup();
        let starved = if starved.contains(&index) { ", and KVM withholds its interrupts" } else { "" };
        format!("vCPU {index} is {}{starved}", places.join(", then "))
    };
    (0..count).map(one).collect::<Vec<_>>().join("; ") + &problem
}

fn place(view: Option<&VcpuView>, symbols: &Symbols) -> String {
    let Some(view) = view else { return "unresponsive".into() };
    let VcpuView { rip, rflags: _, cr3, user, halted, pending, in_service } = view;
    let function = symbols.place(*rip).map_or_else(String::new, |place| format!(" ({place})"));
    let place = match (*halted, *user) {
        (true, _) => format!("halted at {rip:#x}{function}"),
        // The page tables tell programs apart, as `rip` is an address of the program.
        (_, true) => format!("in a program at {rip:#x}, page tables {cr3:#x}"),
        (_, false) => format!("in the kernel at {rip:#x}{function}"),
    };
    // Interrupt vectors of the local APIC: requested ones, and those whose handlers have not ended yet (EOI).
    let vectors = |what: &str, vectors: &[u8]| {
        let list: Vec<_> = vectors.iter().map(u8::to_string).collect();
        if list.is_empty() { String::new() } else { format!(", {what} {}", list.join(" ")) }
    };
    let off = if view.takes_interrupts() { "" } else { ", interrupts off" };
    format!("{place}{off}{}{}", vectors("pending", pending), vectors("in service", in_service))
}

#[cfg(test)]
mod tests {
    use super::{super::symbols, *};

    fn view(rip: u64) -> VcpuView {
        VcpuView { rip, rflags: 0x202, ..VcpuView::default() }
    }

    #[test]
    fn a_vcpu_that_stays_in_one_place_is_shown_once_with_its_interrupts() {
        let spinning = VcpuView { rflags: 2, pending: vec![33, 236], in_service: vec![236], ..view(0x10) };
        let looks = [vec![Some(view(0x10)), None], vec![Some(spinning.clone()), None], vec![Some(spinning), None]];
        let examined = |vcpus| Examination { vcpus, ..Examination::default() };
        let vcpus = |examination: &Examination| super::vcpus(examination, None);
        assert_eq!(
            vcpus(&examined(looks.into())),
            "vCPU 0 is in the kernel at 0x10, then in the kernel at 0x10, interrupts off, pending 33 236, in service \
             236; vCPU 1 is unresponsive"
        );
        assert_eq!(vcpus(&examined(Vec::new())), "its process does not respond either");
        let starved = vec![Some(VcpuView { rflags: 0x202, pending: vec![236], ..view(0x10) })];
        assert_eq!(
            vcpus(&examined(vec![starved.clone(), starved])),
            "vCPU 0 is in the kernel at 0x10, pending 236, and KVM withholds its interrupts"
        );
    }

    #[test]
    fn a_vcpu_in_the_kernel_is_shown_with_the_function_and_one_in_a_program_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinux");
        let address = 0xffff_ffff_8123_4000;
        std::fs::write(&path, symbols::tests::kernel(&[(address, 2, "__send_to_port")])).unwrap();
        let program = VcpuView { user: true, ..view(0x40_1000) };
        let samples = vec![vec![Some(view(address + 0x42)), Some(program)]];
        let mut examination = Examination { vcpus: samples, kernel: Some(path.clone()), ..Examination::default() };
        let told = guest(&examination, "stop").unwrap_err();
        assert!(told.contains("vCPU 0 is in the kernel at 0xffffffff81234042 (__send_to_port+0x42);"), "{told}");
        assert!(told.contains("vCPU 1 is in a program at 0x401000, page tables"), "{told}");
        std::fs::write(&path, "a bzImage").unwrap();
        let told = guest(&examination, "stop").unwrap_err();
        assert!(told.contains("0xffffffff81234042;") && told.contains("not a valid ELF file"), "{told}");
        examination.kernel = None;
        assert!(!guest(&examination, "stop").unwrap_err().contains("ELF"));
    }

    #[test]
    fn an_engine_that_does_not_respond_is_shown_with_busy_threads() {
        let busy = GuestThread { process: 7, name: "dockerd".into(), state: 'R', busy: 98, waits: String::new() };
        let stuck = GuestThread { state: 'D', busy: 0, waits: "io_schedule".into(), ..busy.clone() };
        let mut guest = Description {
            load: "1.0".into(),
            memory_kib: 2048,
            available_kib: 1024,
            threads: 9,
            busiest: vec![busy, stuck],
        };
        assert_eq!(
            unanswered("no response within 10 s", Some(&guest)),
            "no response within 10 s; busy in the guest: dockerd (process 7, R, 98 %), dockerd (process 7, D in io_schedule, \
             0 %)"
        );
        guest.busiest.clear();
        assert_eq!(unanswered("no", Some(&guest)), "no; no thread in the guest is busy");
    }
}
