//! Tells changes by this process, which it makes for the guest, from those by other programs.
//!
//! A change raises its events before its system call returns. So the queue of events is read until it is empty before
//! the change begins and again when it has ended, and what it is expected to raise is looked for between the two only:
//! neither an earlier nor a later event is taken for it, however slow the change or the reader is. A change that fails
//! raised none, and what was taken for its events is sent after all.
//!
//! A change by another program to the same file in the same moment may look the same. A name can be created, removed or
//! moved only once by this process, so the second such event is the other's. Of modifications, which inotify itself
//! puts together if there are several, none is sent: the guest's kernel raises that of its program after this process
//! has answered, which is after both.

use super::{Event, Events, State};

/// Events that are expected of a change.
pub(crate) struct Expected {
    node: u64,
    /// Empty for the node itself.
    name: Vec<u8>,
    mask: u32,
    /// The event comes once, or any number of times.
    once: bool,
}

/// The events that a request is about to raise.
#[derive(Default)]
pub(crate) struct Change(Vec<Expected>);

impl Change {
    /// A name appears in a directory, vanishes from it, or is moved: one of `IN_CREATE`, `IN_DELETE`, `IN_MOVED_FROM`,
    /// `IN_MOVED_TO`.
    pub(crate) fn name(&mut self, directory: u64, name: &[u8], mask: u32) {
        self.0.push(Expected { node: directory, name: name.to_vec(), mask, once: true });
    }

    /// A file is changed, which its own watchers see.
    pub(crate) fn file(&mut self, node: u64, mask: u32) {
        self.0.push(Expected { node, name: Vec::new(), mask, once: false });
    }

    /// A file is changed, which the watchers of a directory see that it has this name in.
    pub(crate) fn file_in(&mut self, directory: u64, name: &[u8], mask: u32) {
        self.0.push(Expected { node: directory, name: name.to_vec(), mask, once: false });
    }
}

/// A change in progress. It has failed if this is dropped without [`Own::end`].
pub(crate) struct Own<'a> {
    events: &'a Events,
    id: u64,
    succeeded: bool,
}

impl Events {
    /// Announces a change by this process.
    pub(crate) fn begin(&self, change: Change) -> Own<'_> {
        let mut state = self.state();
        self.collect(&mut state);
        let id = state.next_change;
        state.next_change += 1;
        state.changes.insert(id, change.0);
        Own { events: self, id, succeeded: false }
    }
}

impl Own<'_> {
    /// Ends the change.
    pub(crate) fn end(mut self, succeeded: bool) {
        self.succeeded = succeeded;
    }
}

impl Drop for Own<'_> {
    fn drop(&mut self) {
        let mut state = self.events.state();
        // With the change still expected: the last events of it are there by now.
        self.events.drain(&mut state);
        state.changes.remove(&self.id);
        let own = |held: Option<u64>| held == Some(self.id);
        if self.succeeded {
            state.pending.retain(|pending| !own(pending.held));
        } else {
            for pending in &mut state.pending {
                pending.held = pending.held.filter(|id| *id != self.id);
            }
        }
        self.events.announce(&state);
    }
}

impl State {
    /// The change in progress that an event can have come from.
    pub(super) fn cause(&mut self, event: &Event) -> Option<u64> {
        for (id, expected) in &mut self.changes {
            let matches = |expected: &Expected| {
                expected.node == event.node && expected.mask & event.mask != 0 && expected.name == event.name
            };
            if let Some(at) = expected.iter().position(matches) {
                if expected[at].once {
                    expected.swap_remove(at);
                }
                return Some(*id);
            }
        }
        None
    }
}
