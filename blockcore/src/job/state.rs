//! States of a job, and which commands each takes. Pure.
//!
//! States, verbs and which go together are QEMU's.

use std::fmt;

use crate::{Error, ErrorKind};

macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$variant_about:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_about])* $variant,)*
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The word for it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

words! {
    /// How far a job is.
    JobState {
        /// It is there, and has not begun.
        Created = "created",
        /// It works.
        Running = "running",
        /// It is held, and has nothing in flight.
        Paused = "paused",
        /// All is copied, and what changes is copied after it, until it is told to end.
        Ready = "ready",
        /// As [`Paused`](Self::Paused), for one that was [`Ready`](Self::Ready).
        Standby = "standby",
        /// Its own work is done, and not that of those that end together with it.
        Waiting = "waiting",
        /// All that is left to do is to make its result a fact.
        Pending = "pending",
        /// It failed or was cancelled, and is being taken back.
        Aborting = "aborting",
        /// It is over, and can be asked how it ended.
        Concluded = "concluded",
        /// It is forgotten.
        Null = "null",
    }
}

words! {
    /// What can be asked of a job.
    Verb {
        /// To give up.
        Cancel = "cancel",
        /// To hold still.
        Pause = "pause",
        /// To go on.
        Resume = "resume",
        /// To copy faster or slower.
        SetSpeed = "set-speed",
        /// To end well, of one that would go on for ever.
        Complete = "complete",
        /// To make its result a fact.
        Finalize = "finalize",
        /// To be forgotten.
        Dismiss = "dismiss",
        /// To copy another way.
        Change = "change",
    }
}

impl JobState {
    /// Whether a job in this state takes a command.
    pub fn takes(self, verb: Verb) -> bool {
        use JobState::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        match verb {
            Verb::Cancel => matches!(
                self,
                Created | Running | Paused | Ready | Standby | Waiting | Pending
            ),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }

    /// Whether a job goes from this state to `next`, ever.
    pub fn leads_to(self, next: Self) -> bool {
        use JobState::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        match self {
            Created => matches!(next, Running | Aborting | Null),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => next == Running,
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => next == Ready,
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Aborting | Concluded),
            Aborting => matches!(next, Aborting | Concluded),
            Concluded => next == Null,
            Null => false,
        }
    }

    /// Refuses a command that a job in this state does not take.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`], in QEMU's words.
    pub fn check(self, job: &str, verb: Verb) -> Result<(), Error> {
        match self.takes(verb) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Invalid,
                format!("Job '{job}' in state '{self}' cannot accept command verb '{verb}'"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By QEMU's letters: what each state takes, and where it leads.
    const TABLE: [(JobState, &str, &str); 10] = [
        (JobState::Created, "cprsh", "RXN"),
        (JobState::Running, "cprsh", "PYWX"),
        (JobState::Paused, "cprsh", "R"),
        (JobState::Ready, "cprshC", "SWX"),
        (JobState::Standby, "cprshC", "Y"),
        (JobState::Waiting, "c", "DX"),
        (JobState::Pending, "cF", "XE"),
        (JobState::Aborting, "", "XE"),
        (JobState::Concluded, "D", "N"),
        (JobState::Null, "", ""),
    ];

    #[test]
    fn every_state_takes_what_the_table_says_and_leads_where_it_says() {
        let verbs = "cprsCFDh".chars().zip(Verb::ALL);
        let verbs: Vec<_> = verbs.collect();
        let states: Vec<_> = "CRPYSWDXEN".chars().zip(JobState::ALL).collect();
        assert_eq!((verbs.len(), states.len()), (Verb::ALL.len(), TABLE.len()));
        for (state, takes, leads) in TABLE {
            for (letter, verb) in &verbs {
                assert_eq!(
                    state.takes(**verb),
                    takes.contains(*letter),
                    "{state} {verb}"
                );
                let refusal = state.check("j", **verb).map_err(|error| error.report());
                let expected =
                    format!("Job 'j' in state '{state}' cannot accept command verb '{verb}'");
                assert_eq!(refusal.err(), (!state.takes(**verb)).then_some(expected));
            }
            for (letter, next) in &states {
                assert_eq!(
                    state.leads_to(**next),
                    leads.contains(*letter),
                    "{state} {next}"
                );
            }
        }
    }
}
