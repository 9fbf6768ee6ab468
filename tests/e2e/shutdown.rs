//! The last to run: the end of everything that the other tests used.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use support::{
    client::Events,
    engine::{Isolation, STOP, engine},
    home::{is_alive, pid},
    process::poll,
};

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_backend_that_is_asked_to_terminate_stops_in_order_and_leaves_nothing() {
    let engine = engine(Isolation::Either);
    let backend = pid(&engine.home.status(), "backendPid").unwrap();
    let events = Events::follow(&engine.home.control_socket());
    kill(Pid::from_raw(backend.cast_signed()), Signal::SIGTERM).unwrap();
    let stopping = events.until("the stop begins", STOP, |status| status["state"] == "stopping");
    assert_eq!(stopping["ending"], true, "{stopping}");
    events.until("the VM is down", STOP, |status| status["state"] == "stopped");
    events.end(STOP);
    poll("the backend is gone", STOP, || (!is_alive(backend)).then_some(()));
    engine.home.assert_nothing_runs();
    let console = std::fs::read_to_string(engine.home.path("state/bulkhead/default/console.log")).unwrap();
    assert!(console.contains("down"), "the guest was not asked: {console}");
    assert!(engine.home.bulkhead(&["stop"], STOP).ok().contains("not running"));
}
