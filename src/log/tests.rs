use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{
    limit::{BURST, Limits},
    *,
};

/// A writer whose text the test reads.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_kind_of_line_that_comes_without_end_is_left_out_and_another_is_not() {
    let memory = Memory::default();
    let writer = memory.clone();
    let subscriber = tracing_subscriber::registry().with(plain(move || writer.clone()));
    tracing::subscriber::with_default(subscriber, || {
        for number in 0..2000 {
            tracing::warn!(number, "a disk request failed");
        }
        tracing::warn!("a line of another kind");
    });
    let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
    let noisy = text.lines().filter(|line| line.contains("a disk request failed")).count();
    // One more for each second that the loop took.
    assert!((BURST as usize..BURST as usize + 30).contains(&noisy), "{noisy}");
    assert_eq!(text.lines().filter(|line| line.contains("a line of another kind")).count(), 1);
}

#[test]
fn the_next_line_tells_how_many_were_left_out() {
    let (mut limits, start) = (Limits::default(), Instant::now());
    let admitted = (0..BURST + 7).filter(|_| limits.admit("kind", start).is_some()).count();
    assert_eq!(admitted, BURST as usize);
    assert_eq!(limits.admit("kind", start + Duration::from_secs(1)), Some(7));
    assert_eq!(limits.admit("kind", start + Duration::from_secs(1)), None);
    assert_eq!(limits.admit("other", start), Some(0));
}

#[test]
fn a_long_line_is_cut_and_stays_a_line() {
    let long = [b'x'; 3 * MAX_LINE];
    let line = cut(&long);
    assert_eq!((line.len(), line.last()), (MAX_LINE, Some(&b'\n')));
    assert_eq!(cut(b"short\n").as_ref(), b"short\n");
}

/// Names the part of a panicking process that the test below plays in a process of its own.
const PART: &str = "BULKHEAD_TEST_PANIC";

#[test]
fn a_panic_of_a_thread_or_a_task_ends_the_process_with_a_message_in_the_log() {
    match std::env::var(PART).as_deref() {
        Ok("thread") => {
            to_standard_error();
            abort_on_panic();
            let _ = std::thread::spawn(|| panic!("a queue is upside down")).join();
        }
        Ok("task") => {
            to_standard_error();
            abort_on_panic();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(async { tokio::spawn(async { panic!("a queue is {}", "upside down") }).await });
        }
        _ => {
            for part in ["thread", "task"] {
                let name = "log::tests::a_panic_of_a_thread_or_a_task_ends_the_process_with_a_message_in_the_log";
                let mut process = Command::new(std::env::current_exe().unwrap());
                process.args([name, "--exact", "--nocapture"]).env(PART, part).env_remove(LEVEL).stdout(Stdio::null());
                let output = process.output().unwrap();
                let text = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{part}: {text}");
                assert!(text.contains("ERROR") && text.contains("a queue is upside down"), "{part}: {text}");
                assert!(text.contains("src/log/tests.rs:"), "{part}: {text}");
            }
        }
    }
}

proptest! {
    #[test]
    fn each_line_is_written_or_counted_and_no_more_than_the_limit(pauses in proptest::collection::vec(0_u64..3000, 0..400)) {
        let (mut limits, start) = (Limits::default(), Instant::now());
        let mut now = start;
        let (mut written, mut told) = (0_u64, 0);
        for pause in &pauses {
            now += Duration::from_millis(*pause);
            if let Some(left_out) = limits.admit((), now) {
                written += 1;
                told += left_out;
            }
        }
        let elapsed = now.duration_since(start).as_secs();
        prop_assert!(written <= u64::from(BURST) + elapsed);
        prop_assert!(written + told <= pauses.len() as u64);
        // A last line, after long enough, tells of the rest.
        let rest = limits.admit((), now + Duration::from_secs(1)).unwrap();
        prop_assert_eq!(written + told + rest, pauses.len() as u64);
    }
}
