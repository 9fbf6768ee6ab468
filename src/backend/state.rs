//! The life of one VM as data: which input leads from which state to which, and what is to be done. No I/O here.

use bulkhead_protocol::Stage;

use super::{
    api::{Outcome, StageTime, StateName},
    events::VmEnd,
};

/// Resets in a row, without the engine answering between them, after which the start has failed.
const MAX_RESETS: u32 = 3;

/// How far a start has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Stages reached, in order.
    pub stages: Vec<StageTime>,
    /// Why a stage that was reached is missing again, for a person.
    pub note: Option<String>,
}

impl Progress {
    /// The stage that is being waited for.
    pub fn waiting_for(&self) -> Stage {
        match self.stages.last().map(|reached| reached.stage) {
            None => Stage::Kernel,
            Some(Stage::Kernel) => Stage::Agent,
            Some(Stage::Agent) => Stage::Disk,
            Some(Stage::Disk | Stage::Engine) => Stage::Engine,
        }
    }
}

/// What follows a VM that is being stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// The backend ends.
    Exit,
    /// The VM boots again.
    Boot,
    /// The start failed for this reason.
    Fail(String),
}

/// Where the VM is in its life.
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
    /// There is no VM, for this reason.
    Failed(String),
}

/// What happens to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A person wants the engine.
    Start,
    /// A person wants the VM down and the backend gone.
    Stop {
        /// At once, without asking the guest.
        force: bool,
    },
    /// A person wants a fresh VM.
    Restart,
    /// The VM could not be made.
    BootFailed(String),
    /// The agent has its configuration and can be asked to shut down.
    AgentConnected,
    /// The agent's connection ended.
    AgentLost,
    /// The guest reached a stage, so many milliseconds after the boot began.
    Reached(StageTime),
    /// The guest gave up.
    GuestFailed(String),
    /// The engine ended and is being started again.
    EngineDown(String),
    /// The time to shut down is over.
    GraceExpired,
    /// The VM's process is gone.
    Ended(VmEnd),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make a VM.
    Boot,
    /// Ask the agent to power off, and send [`Input::GraceExpired`] when it takes too long.
    Shutdown,
    /// VmEnd the VM at once.
    Kill,
    /// VmEnd the backend.
    Exit,
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    state: State,
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

    /// How many VMs were begun.
    pub fn boots(&self) -> u64 {
        self.boots
    }

    /// The number of the VM that a request just made is about: the one that runs or the one that follows it.
    pub fn awaited_boot(&self) -> u64 {
        self.boots + u64::from(self.state == State::Stopping(Then::Boot))
    }

    /// Takes one input and says what is to be done and, for a request, what to answer.
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
            State::Stopping(Then::Fail(_)) => {
                self.state = State::Stopping(Then::Boot);
                (Outcome::Begun, None)
            }
            State::Stopping(Then::Exit) => (Outcome::Ending, None),
        }
    }

    fn stop(&mut self, force: bool) -> (Outcome, Option<Action>) {
        let action = match &self.state {
            State::Stopped | State::Failed(_) => Some(Action::Exit),
            State::Starting(_) | State::Running(_) => Some(self.take_down(Then::Exit, force)),
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
            State::Stopping(Then::Exit) => (Outcome::Ending, None),
            State::Stopping(_) => {
                self.state = State::Stopping(Then::Boot);
                (Outcome::Begun, None)
            }
        }
    }

    /// Without an agent nobody in the guest can be asked, and nothing is mounted yet.
    fn take_down(&mut self, then: Then, force: bool) -> Action {
        self.state = State::Stopping(then);
        if self.agent && !force { Action::Shutdown } else { Action::Kill }
    }

    fn report(&mut self, input: Input) -> Option<Action> {
        match input {
            Input::AgentConnected => self.agent = true,
            Input::AgentLost => self.agent = false,
            Input::BootFailed(reason) => self.state = State::Failed(reason),
            Input::Reached(reached) => self.reached(reached),
            Input::EngineDown(reason) => self.engine_down(reason),
            Input::GuestFailed(reason) => {
                if matches!(self.state, State::Starting(_) | State::Running(_)) {
                    return Some(self.take_down(Then::Fail(reason), false));
                }
            }
            Input::GraceExpired => return matches!(self.state, State::Stopping(_)).then_some(Action::Kill),
            Input::Ended(end) => return self.ended(end),
            Input::Start | Input::Stop { .. } | Input::Restart => {}
        }
        None
    }

    /// The guest is not trusted: a stage counts once. A later stage includes those before it.
    fn reached(&mut self, reached: StageTime) {
        let State::Starting(progress) = &mut self.state else { return };
        while progress.waiting_for() <= reached.stage {
            let stage = progress.waiting_for();
            progress.stages.push(StageTime { stage, ..reached });
            if stage == Stage::Engine {
                break;
            }
        }
        if progress.stages.last().is_some_and(|last| last.stage == Stage::Engine) {
            self.resets = 0;
            progress.note = None;
            self.state = State::Running(std::mem::take(progress));
        }
    }

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
            (State::Stopping(Then::Exit), _) => return Some(Action::Exit),
            (State::Stopping(Then::Boot), _) => return Some(self.boot()),
            // Who powers the guest off from inside gets what was asked for.
            (State::Running(_), VmEnd::PowerOff) => {}
            (State::Starting(_), VmEnd::PowerOff) => {
                self.state = State::Failed("the guest powered itself off before the engine answered".into());
            }
            (State::Starting(_) | State::Running(_), VmEnd::Reset) => {
                self.resets += 1;
                if self.resets < MAX_RESETS {
                    return Some(self.boot());
                }
                self.state = State::Failed(format!("the guest reset itself {MAX_RESETS} times during its start"));
            }
            (State::Stopping(Then::Fail(reason)), _)
            | (State::Starting(_) | State::Running(_), VmEnd::Broken(reason)) => self.state = State::Failed(reason),
            (state @ (State::Stopped | State::Failed(_)), _) => self.state = state,
        }
        None
    }

    /// The state's name.
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
        /// Whatever happens in whatever order: one VM at a time, none left behind, no order to a VM that is not there.
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
