//! Groups of lines that the web pages of CI systems fold.
//!
//! GitHub Actions: "Workflow commands", "Grouping log lines". GitLab: "CI/CD job logs", "Expand and collapse job log
//! sections".

use std::time::{SystemTime, UNIX_EPOCH};

/// A CI system whose logs have groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogGroups {
    /// `::group::TITLE` to `::endgroup::`.
    GitHub,
    /// Sections, marked by escape sequences that a terminal would hide.
    GitLab,
}

impl LogGroups {
    /// The system that runs this process, by the variable that it sets for each job.
    pub(super) fn from_environment() -> Option<Self> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let is_set = |name| variable(name).as_deref() == Some("true");
        if is_set("GITHUB_ACTIONS") {
            Some(Self::GitHub)
        } else if is_set("GITLAB_CI") {
            Some(Self::GitLab)
        } else {
            None
        }
    }

    /// The line that begins a group; `id` has letters, digits and `_` only.
    pub(super) fn begin(self, id: &str, title: &str) -> String {
        match self {
            Self::GitHub => format!("::group::{title}"),
            Self::GitLab => {
                format!("\u{1b}[0Ksection_start:{}:{id}[collapsed=true]\r\u{1b}[0K{title}", unix_seconds())
            }
        }
    }

    /// The line that ends the group.
    pub(super) fn end(self, id: &str) -> String {
        match self {
            Self::GitHub => "::endgroup::".to_owned(),
            Self::GitLab => format!("\u{1b}[0Ksection_end:{}:{id}\r\u{1b}[0K", unix_seconds()),
        }
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_is_known_by_its_variable_and_a_terminal_has_no_groups() {
        let of = |set: &str, value: &str| LogGroups::from_variables(|name| (name == set).then(|| value.to_owned()));
        assert_eq!(of("GITHUB_ACTIONS", "true"), Some(LogGroups::GitHub));
        assert_eq!(of("GITLAB_CI", "true"), Some(LogGroups::GitLab));
        for (set, value) in [("CI", "true"), ("GITHUB_ACTIONS", ""), ("GITLAB_CI", "false")] {
            assert_eq!(of(set, value), None, "{set}={value}");
        }
    }

    #[test]
    fn the_lines_are_those_that_the_systems_look_for() {
        let (begin, end) = (LogGroups::GitHub.begin("start", "Start"), LogGroups::GitHub.end("start"));
        assert_eq!([begin.as_str(), end.as_str()], ["::group::Start", "::endgroup::"]);
        let (begin, end) = (LogGroups::GitLab.begin("start", "Start"), LogGroups::GitLab.end("start"));
        let time = begin.strip_prefix("\u{1b}[0Ksection_start:").unwrap().split(':').next().unwrap();
        assert!(time.parse::<u64>().unwrap() > 1_700_000_000);
        assert!(begin.ends_with(":start[collapsed=true]\r\u{1b}[0KStart"), "{begin:?}");
        assert!(end.starts_with("\u{1b}[0Ksection_end:") && end.ends_with(":start\r\u{1b}[0K"), "{end:?}");
    }
}
