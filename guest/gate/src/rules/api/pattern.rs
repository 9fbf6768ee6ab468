//! Paths of routes, with the names in them.

use std::fmt;

/// The path of a route, such as `containers/{name}/json`.
///
/// As in dockerd's router `{name}` stands for one segment or more, because names contain slashes (images, and containers
/// linked as `parent/alias`), and `{id}` for exactly one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pattern(pub(super) &'static str);

impl Pattern {
    /// Returns the segments of the name, none for a path without one; `None` if the path is another one.
    pub fn matches<'a>(&self, segments: &'a [String]) -> Option<&'a [String]> {
        let Some((before, rest)) = self.0.split_once('{') else {
            return remove_first(segments, self.0).filter(|rest| rest.is_empty());
        };
        let (name, after) = rest.split_once('}')?;
        let rest = remove_first(segments, before)?;
        // The fixed end decides: `a/b/archive` is an archive of `a/b`.
        let found = remove_last(rest, after)?;
        let fits = match name {
            "id" => found.len() == 1,
            _ => !found.is_empty(),
        };
        fits.then_some(found)
    }

    /// Returns the path for a name.
    pub fn with_name(&self, name: &str) -> String {
        self.0.replace("{name}", name).replace("{id}", name)
    }
}

/// Removes the words of a fixed part from the beginning.
fn remove_first<'a>(mut segments: &'a [String], part: &str) -> Option<&'a [String]> {
    for word in part.split('/').filter(|word| !word.is_empty()) {
        let (first, rest) = segments.split_first()?;
        if first != word {
            return None;
        }
        segments = rest;
    }
    Some(segments)
}

/// Removes the words of a fixed part from the end.
fn remove_last<'a>(mut segments: &'a [String], part: &str) -> Option<&'a [String]> {
    for word in part.rsplit('/').filter(|word| !word.is_empty()) {
        let (last, rest) = segments.split_last()?;
        if last != word {
            return None;
        }
        segments = rest;
    }
    Some(segments)
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.0)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(pattern: &'static str, path: &str) -> Option<String> {
        let segments = crate::rules::segments(path);
        Pattern(pattern).matches(&segments).map(|name| name.join("/"))
    }

    #[test]
    fn names_may_have_slashes_and_the_end_decides() {
        for (path, expected) in [
            ("/containers/x/archive", Some("x")),
            ("/containers/parent/alias/archive", Some("parent/alias")),
            ("/containers/archive/archive", Some("archive")),
            ("/containers/archive", None),
            ("/containers", None),
            ("/containers/x/archive/y", None),
            ("/images/x/archive", None),
        ] {
            assert_eq!(name("containers/{name}/archive", path).as_deref(), expected, "{path}");
        }
        assert_eq!(name("containers/{name}/attach/ws", "/containers/a/b/attach/ws").as_deref(), Some("a/b"));
        assert_eq!(name("images/{name}", "/images/reg.io:5000/a/b").as_deref(), Some("reg.io:5000/a/b"));
    }

    #[test]
    fn ids_are_one_segment_and_fixed_paths_have_no_name() {
        assert_eq!(name("nodes/{id}/update", "/nodes/x/update").as_deref(), Some("x"));
        assert_eq!(name("nodes/{id}/update", "/nodes/x/y/update"), None);
        assert_eq!(name("nodes/{id}", "/nodes"), None);
        assert_eq!(name("volumes/prune", "/volumes/prune").as_deref(), Some(""));
        assert_eq!(name("volumes/prune", "/volumes/prune/x"), None);
    }
}
