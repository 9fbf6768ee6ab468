//! The life of one VM as data: which input leads from which state to which, and which action follows. No I/O here.
//!
//! `Stopped` → `Starting` (a VM boots) → `Running` (its engine answers) → `Stopping`, after which the backend exits or,
//! for a restart, the next VM is `Starting`. An engine that ends leads back to `Starting` without a new VM. A guest
//! that resets itself boots again. `Failed` is the end of a start that gave up, broke, or reset [`MAX_RESETS`] times
//! before its engine answered; `start` leads out of it.
//!
//! Invariants, which the property test at the end checks: at most one VM exists, an action is only given to a VM that
//! exists, and none is left when the backend exits.

use bulkhead_protocol::Stage;

use super::{
    api::{Outcome, StageTime, StateName},
    events::VmEnd,
};

/// Resets in a row, without the engine answering between them, after which the start has failed.
const MAX_RESETS: u32 = 3;

/// Progress of a start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Stages reached, in order.
    pub stages: Vec<StageTime>,
    /// The reason that a stage which was reached is missing again, for the user.
    pub note: Option<String>,
}

impl Progress {
    /// Returns the next stage.
    pub fn waiting_for(&self) -> Stage {
        match self.stages.last().map(|reached| reached.stage) {
            None => Stage::Kernel,
            Some(Stage::Kernel) => Stage::Agent,
            Some(Stage::Agent) => Stage::Disk,
            Some(Stage::Disk | Stage::Engine) => Stage::Engine,
        }
    }
}

/// The continuation of a VM's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// The backend exits.
    Exit,
    /// A new VM boots.
    Boot,
    /// The start has failed, for this reason.
    Fail(String),
}

/// The state of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// There is no VM.
    Stopped,
    /// A VM runs; its engine does not answer yet.
    Starting(Progress),
    /// The engine answers.
    Running(Progress),
    /// The VM is going down.
    Stopping(Then),
    /// There is no VM, for this reason. The backend stays, so that `status` can report it.
    Failed(String),
}

/// An input of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The user asks for the engine.
    Start,
    /// The user asks for the end of VM and backend.
    Stop {
        /// At once, without asking the guest.
        force: bool,
    },
    /// The user asks for a new VM.
    Restart,
    /// The VM could not be made.
    BootFailed(String),
    /// The agent is connected and can be asked to shut down.
    AgentConnected,
    /// The agent's connection ended.
    AgentLost,
    /// The guest reached a stage.
    Reached(StageTime),
    /// The guest gave up.
    GuestFailed(String),
    /// The engine ended, and init is starting it again.
    EngineDown(String),
    /// The time for the shutdown is over.
    GraceExpired,
    /// The VM's processes are gone.
    Ended(VmEnd),
}

/// An action for the supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make a VM.
    Boot,
    /// Ask the agent to power off, and send [`Input::GraceExpired`] when it takes too long.
    Shutdown,
    /// End the VM at once.
    Kill,
    /// Exit the backend.
    Exit,
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    state: State,
    /// The agent is connected.
    agent: bool,
    boots: u64,
    resets: u32,
}

impl Default for Machine {
    fn default() -> Self {
        Self { state: State::Stopped, agent: false, boots: 0, resets: 0 }
    }
}

impl Machine {
    /// The state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Number of VMs started so far.
    pub fn boots(&self) -> u64 {
        self.boots
    }

    /// Returns the number of the VM that a request just made is about: the one that runs or the one that follows it.
    pub fn awaited_boot(&self) -> u64 {
        self.boots + u64::from(self.state == State::Stopping(Then::Boot))
    }

    /// Applies one input; returns the answer to a request, and the action.
    pub fn apply(&mut self, input: Input) -> (Outcome, Option<Action>) {
        match input {
            Input::Start => self.start(),
            Input::Stop { force } => self.stop(force),
            Input::Restart => self.restart(),
            other => (Outcome::Begun, self.report(other)),
        }
    }

    fn boot(&mut self) -> Action {
        self.state = State::Starting(Progress::default());
        self.agent = false;
        self.boots += 1;
        Action::Boot
    }

    fn start(&mut self) -> (Outcome, Option<Action>) {
        match &self.state {
            State::Stopped | State::Failed(_) => {
                self.resets = 0;
                (Outcome::Begun, Some(self.boot()))
            }
            State::Starting(_) | State::Running(_) | State::Stopping(Then::Boot) => (Outcome::Already, None),
            // The failed VM is still going down; the new one boots after it, since both would open the data disk.
            State::Stopping(Then::Fail(_)) => {
                self.state = State::Stopping(Then::Boot);
                (Outcome::Begun, None)
            }
            // The backend is about to give the profile up. The command line waits for that and starts another one.
            State::Stopping(Then::Exit) => (Outcome::Ending, None),
        }
    }

    fn stop(&mut self, force: bool) -> (Outcome, Option<Action>) {
        let action = match &self.state {
            State::Stopped | State::Failed(_) => Some(Action::Exit),
            State::Starting(_) | State::Running(_) => Some(self.take_down(Then::Exit, force)),
            // The agent was asked already. A second `stop` may only speed it up.
            State::Stopping(_) => {
                self.state = State::Stopping(Then::Exit);
                force.then_some(Action::Kill)
            }
        };
        (Outcome::Begun, action)
    }

    fn restart(&mut self) -> (Outcome, Option<Action>) {
        match &self.state {
            State::Stopped | State::Failed(_) => self.start(),
            State::Starting(_) | State::Running(_) => {
                self.resets = 0;
                (Outcome::Begun, Some(self.take_down(Then::Boot, false)))
            }
            // A stop is not taken back.
            State::Stopping(Then::Exit) => (Outcome::Ending, None),
            State::Stopping(_) => {
                self.state = State::Stopping(Then::Boot);
                (Outcome::Begun, None)
            }
        }
    }

    /// Starts to take the VM down.
    fn take_down(&mut self, then: Then, force: bool) -> Action {
        self.state = State::Stopping(then);
        // Without an agent the guest cannot be asked: its disk is not mounted yet, or it is broken.
        if self.agent && !force { Action::Shutdown } else { Action::Kill }
    }

    /// Applies an input that is not a request. The guest decides when most of them arrive: each has to be harmless in
    /// every state.
    fn report(&mut self, input: Input) -> Option<Action> {
        match input {
            Input::AgentConnected => self.agent = true,
            Input::AgentLost => self.agent = false,
            Input::BootFailed(reason) => self.state = State::Failed(reason),
            Input::Reached(reached) => self.reached(reached),
            Input::EngineDown(reason) => self.engine_down(reason),
            Input::GuestFailed(reason) => {
                // Its disk may be mounted, so the guest is shut down in order and not killed. While it is stopping
                // already, the reason of that stop stays.
                if matches!(self.state, State::Starting(_) | State::Running(_)) {
                    return Some(self.take_down(Then::Fail(reason), false));
                }
            }
            // A deadline may fire just after the VM ended.
            Input::GraceExpired => return matches!(self.state, State::Stopping(_)).then_some(Action::Kill),
            Input::Ended(end) => return self.ended(end),
            Input::Start | Input::Stop { .. } | Input::Restart => {}
        }
        None
    }

    /// Records a stage. The guest is not trusted: a stage counts once, and a later stage includes those before it.
    fn reached(&mut self, reached: StageTime) {
        let State::Starting(progress) = &mut self.state else { return };
        while progress.waiting_for() <= reached.stage {
            let stage = progress.waiting_for();
            progress.stages.push(StageTime { stage, ..reached });
            if stage == Stage::Engine {
                // `waiting_for` stays at the last stage.
                break;
            }
        }
        if progress.stages.last().is_some_and(|last| last.stage == Stage::Engine) {
            // The engine answered: whatever resets the guest from now on is not a failed start.
            self.resets = 0;
            progress.note = None;
            self.state = State::Running(std::mem::take(progress));
        }
    }

    /// Returns to `Starting`, with all stages but the engine's, until the engine answers again.
    fn engine_down(&mut self, reason: String) {
        if let State::Starting(progress) | State::Running(progress) = &mut self.state {
            let mut progress = std::mem::take(progress);
            progress.stages.retain(|reached| reached.stage != Stage::Engine);
            progress.note = Some(reason);
            self.state = State::Starting(progress);
        }
    }

    fn ended(&mut self, end: VmEnd) -> Option<Action> {
        self.agent = false;
        match (std::mem::replace(&mut self.state, State::Stopped), end) {
            // A VM that was being stopped may end in any way: the end was asked for.
            (State::Stopping(Then::Exit), _) => return Some(Action::Exit),
            (State::Stopping(Then::Boot), _) => return Some(self.boot()),
            // A container may power the VM off where isolation is off. That was asked for and is not a failure.
            (State::Running(_), VmEnd::PowerOff) => {}
            (State::Starting(_), VmEnd::PowerOff) => {
                self.state = State::Failed("the guest powered itself off before the engine answered".into());
            }
            (State::Starting(_) | State::Running(_), VmEnd::Reset) => {
                // A guest that resets in a loop would keep the host busy forever.
                self.resets += 1;
                if self.resets < MAX_RESETS {
                    return Some(self.boot());
                }
                self.state = State::Failed(format!("the guest reset itself {MAX_RESETS} times during its start"));
            }
            // The guest's reason is better than the manner of the end that followed it.
            (State::Stopping(Then::Fail(reason)), _)
            | (State::Starting(_) | State::Running(_), VmEnd::Broken(reason)) => self.state = State::Failed(reason),
            // No VM that could have ended.
            (state @ (State::Stopped | State::Failed(_)), _) => self.state = state,
        }
        None
    }

    /// Returns the state's name.
    pub fn name(&self) -> StateName {
        match self.state {
            State::Stopped => StateName::Stopped,
            State::Starting(_) => StateName::Starting,
            State::Running(_) => StateName::Running,
            State::Stopping(_) => StateName::Stopping,
            State::Failed(_) => StateName::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STAGES: [Stage; 4] = [Stage::Kernel, Stage::Agent, Stage::Disk, Stage::Engine];

    fn at(stage: Stage) -> Input {
        Input::Reached(StageTime { stage, ms: 1 })
    }

    fn running() -> Machine {
        let mut machine = Machine::default();
        assert_eq!(machine.apply(Input::Start), (Outcome::Begun, Some(Action::Boot)));
        machine.apply(Input::AgentConnected);
        for stage in STAGES {
            machine.apply(at(stage));
        }
        assert_eq!(machine.name(), StateName::Running);
        machine
    }

    #[test]
    fn a_second_start_is_told_that_it_runs_already() {
        assert_eq!(running().apply(Input::Start), (Outcome::Already, None));
    }

    #[test]
    fn stop_asks_the_agent_and_kills_when_the_time_is_over() {
        let mut machine = running();
        assert_eq!(machine.apply(Input::Stop { force: false }).1, Some(Action::Shutdown));
        assert_eq!(machine.apply(Input::Start).0, Outcome::Ending);
        assert_eq!(machine.apply(Input::GraceExpired).1, Some(Action::Kill));
        assert_eq!(machine.apply(Input::Ended(VmEnd::PowerOff)).1, Some(Action::Exit));
        assert_eq!(*machine.state(), State::Stopped);
    }

    #[test]
    fn a_forced_stop_kills_at_once_even_while_stopping() {
        assert_eq!(running().apply(Input::Stop { force: true }).1, Some(Action::Kill));
        let mut machine = running();
        machine.apply(Input::Stop { force: false });
        assert_eq!(machine.apply(Input::Stop { force: true }).1, Some(Action::Kill));
    }

    #[test]
    fn stop_before_the_agent_connected_kills() {
        let mut machine = Machine::default();
        machine.apply(Input::Start);
        assert_eq!(machine.apply(Input::Stop { force: false }).1, Some(Action::Kill));
    }

    #[test]
    fn restart_boots_again_after_the_shutdown() {
        let mut machine = running();
        assert_eq!(machine.apply(Input::Restart).1, Some(Action::Shutdown));
        assert_eq!(machine.apply(Input::Ended(VmEnd::PowerOff)).1, Some(Action::Boot));
        assert_eq!(machine.boots(), 2);
    }

    #[test]
    fn a_lost_vmm_is_a_failure_from_which_start_recovers() {
        let mut machine = running();
        machine.apply(Input::Ended(VmEnd::Broken("killed by signal 9".into())));
        assert_eq!(*machine.state(), State::Failed("killed by signal 9".into()));
        assert_eq!(machine.apply(Input::Start), (Outcome::Begun, Some(Action::Boot)));
    }

    #[test]
    fn a_guest_that_resets_in_a_loop_has_failed() {
        let mut machine = Machine::default();
        machine.apply(Input::Start);
        assert_eq!(machine.apply(Input::Ended(VmEnd::Reset)).1, Some(Action::Boot));
        assert_eq!(machine.apply(Input::Ended(VmEnd::Reset)).1, Some(Action::Boot));
        assert_eq!(machine.apply(Input::Ended(VmEnd::Reset)).1, None);
        assert_eq!(machine.name(), StateName::Failed);
    }

    #[test]
    fn a_failed_stage_shuts_the_guest_down_and_keeps_its_reason() {
        let mut machine = Machine::default();
        machine.apply(Input::Start);
        machine.apply(Input::AgentConnected);
        assert_eq!(machine.apply(Input::GuestFailed("no disk".into())).1, Some(Action::Shutdown));
        machine.apply(Input::Ended(VmEnd::PowerOff));
        assert_eq!(*machine.state(), State::Failed("no disk".into()));
    }

    #[test]
    fn an_engine_that_went_down_is_starting_until_it_is_back() {
        let mut machine = running();
        machine.apply(Input::EngineDown("dockerd exited".into()));
        let State::Starting(progress) = machine.state() else { panic!("{:?}", machine.state()) };
        assert_eq!((progress.waiting_for(), progress.note.as_deref()), (Stage::Engine, Some("dockerd exited")));
        machine.apply(at(Stage::Engine));
        assert_eq!(machine.name(), StateName::Running);
    }

    #[test]
    fn a_stage_counts_once_and_includes_those_before_it() {
        let mut machine = Machine::default();
        machine.apply(Input::Start);
        for (stage, ms) in [(Stage::Kernel, 1), (Stage::Kernel, 2), (Stage::Disk, 3), (Stage::Agent, 4)] {
            machine.apply(Input::Reached(StageTime { stage, ms }));
        }
        let State::Starting(progress) = machine.state() else { panic!("{:?}", machine.state()) };
        let times: Vec<_> = progress.stages.iter().map(|reached| (reached.stage, reached.ms)).collect();
        assert_eq!(times, [(Stage::Kernel, 1), (Stage::Agent, 3), (Stage::Disk, 3)]);
    }

    fn input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(Input::Start),
            any::<bool>().prop_map(|force| Input::Stop { force }),
            Just(Input::Restart),
            Just(Input::AgentConnected),
            Just(Input::AgentLost),
            (0_usize..4).prop_map(|index| at(STAGES[index])),
            Just(Input::GuestFailed("failed".into())),
            Just(Input::EngineDown("down".into())),
            Just(Input::GraceExpired),
            Just(Input::BootFailed("no".into())),
            Just(Input::Ended(VmEnd::PowerOff)),
            Just(Input::Ended(VmEnd::Reset)),
            Just(Input::Ended(VmEnd::Broken("broken".into()))),
        ]
    }

    proptest! {
        /// For any inputs in any order: one VM at a time, none left behind, no action on a VM that does not exist.
        #[test]
        fn there_is_one_vm_at_most_and_none_when_the_backend_ends(inputs in prop::collection::vec(input(), 0..64)) {
            let mut machine = Machine::default();
            let (mut alive, mut fresh) = (false, false);
            for input in inputs {
                // Only a VM that is there can end, and only a boot just ordered can fail.
                match &input {
                    Input::Ended(_) if !alive => continue,
                    Input::BootFailed(_) if !fresh => continue,
                    Input::Ended(_) | Input::BootFailed(_) => alive = false,
                    _ => {}
                }
                fresh = false;
                match machine.apply(input).1 {
                    Some(Action::Boot) => {
                        prop_assert!(!alive);
                        (alive, fresh) = (true, true);
                    }
                    Some(Action::Shutdown | Action::Kill) => prop_assert!(alive),
                    Some(Action::Exit) => {
                        prop_assert!(!alive);
                        break;
                    }
                    None => {}
                }
                let expected = matches!(machine.state(), State::Starting(_) | State::Running(_) | State::Stopping(_));
                prop_assert_eq!(alive, expected);
            }
        }
    }
}
