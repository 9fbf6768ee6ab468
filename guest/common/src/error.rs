//! Formats errors for logs.

use std::{error::Error, fmt::Write};

/// The error and its sources on one line, outermost first, separated by colons.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{fmt, io};

    use super::*;

    #[derive(Debug)]
    struct Step(io::Error);

    impl fmt::Display for Step {
        fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
            to.write_str("cannot open /x")
        }
    }

    impl Error for Step {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn the_chain_names_step_and_cause_once_each() {
        assert_eq!(chain(&Step(io::Error::other("no such thing"))), "cannot open /x: no such thing");
    }
}
