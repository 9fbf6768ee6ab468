//! Directories of the host that containers may mount: the setting `filesharingDirectories` and the policy's
//! `filesharingAllowedDirectories`.
//!
//! Paths are text here; `backend/shares` finds out which of them are directories.

use std::{
    ffi::OsString,
    path::{Component, Path, PathBuf},
};

use bulkhead_protocol::{MAX_HOST_SOCKETS, MAX_SHARES};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Maximum number of directories in the setting. A directory has two names at most: the user's and the one without
/// symbolic links. One more may come from the command line.
pub const MAX_SHARED_DIRECTORIES: usize = MAX_SHARES / 2 - 1;

/// Maximum number of sockets in the setting. One more may be the ssh-agent's.
const MAX_SHARED_SOCKETS: usize = MAX_HOST_SOCKETS - 1;

/// Maximum length of a setting, in bytes of JSON. All of the guest's configuration has to fit into one message.
const MAX_LENGTH: usize = 8 * 1024;

/// The accepted values of the setting, as the end of "must be …".
pub(super) const EXPECTED: &str = "a JSON list such as [{\"path\": \"/srv/data\", \"readOnly\": true}] with absolute \
                                   paths, or paths that start with $HOME, $TMP or $TEMP; `bulkhead share` changes it";

/// The accepted values of the setting `filesharingSockets`, as the end of "must be …".
pub(super) const EXPECTED_SOCKETS: &str = "a JSON list such as [\"/run/user/1000/app.sock\"] with absolute paths, or paths \
                                           that start with $HOME, $TMP or $TEMP; at most 63, each of them once";

/// A directory in the setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SharedDirectory {
    /// Its path, see [`Places::resolve`].
    pub path: String,
    /// Containers may not change anything in it.
    #[serde(default)]
    pub read_only: bool,
}

/// The directories that the policy allows to share, with everything below them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedDirectories {
    /// Absolute paths.
    pub paths: Vec<PathBuf>,
    /// The policy.
    pub file: PathBuf,
}

/// The places that a path can start with by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    home: Option<PathBuf>,
}

/// The default of the setting.
pub(super) fn default_value() -> Value {
    json!([{"path": "$HOME", "readOnly": false}])
}

/// Parses a value of the setting; `None` for one that is not valid.
pub(super) fn parse(value: &Value) -> Option<Vec<SharedDirectory>> {
    let items = value.as_array().filter(|items| items.len() <= MAX_SHARED_DIRECTORIES)?;
    // serde would take a list for a struct, with its fields in order.
    if !items.iter().all(Value::is_object) || value.to_string().len() > MAX_LENGTH {
        return None;
    }
    let directories = Vec::<SharedDirectory>::deserialize(value).ok()?;
    directories.iter().all(|directory| is_path(&directory.path)).then_some(directories)
}

/// Parses a value of the setting `filesharingSockets`; `None` for one that is not valid.
pub(super) fn parse_sockets(value: &Value) -> Option<Vec<String>> {
    let paths = Vec::<String>::deserialize(value).ok()?;
    let fits = paths.len() <= MAX_SHARED_SOCKETS && value.to_string().len() <= MAX_LENGTH;
    let is_new = |(at, path): (usize, &String)| is_path(path) && !paths[..at].contains(path);
    (fits && paths.iter().enumerate().all(is_new)).then_some(paths)
}

/// Accepts an absolute path without `..`, or one that starts with the name of a place.
pub(super) fn is_path(text: &str) -> bool {
    let start = text.split('/').next().unwrap_or_default();
    // A `..` would mean a directory outside of the one that is read there.
    let plain = !text.chars().any(char::is_control) && text.split('/').all(|part| part != "..");
    // The part before the first slash is empty in an absolute path, and in an empty text.
    plain && matches!(start, "" | "$HOME" | "$TMP" | "$TEMP") && !text.is_empty()
}

impl Places {
    /// Those of this process's environment, for the user's own paths.
    pub fn from_environment() -> Self {
        Self::with_home(std::env::var_os("HOME"))
    }

    /// Those of the user's account, for the administrator's paths: a variable is the user's to choose.
    pub fn from_account() -> Self {
        let user = nix::unistd::User::from_uid(nix::unistd::getuid()).ok().flatten();
        Self::with_home(user.map(|user| user.dir.into_os_string()))
    }

    fn with_home(home: Option<OsString>) -> Self {
        Self { home: home.map(PathBuf::from).filter(|path| path.is_absolute()) }
    }

    /// Returns the absolute path that `text` stands for, without `.`, repeated and trailing slashes; `None` for one
    /// that has no valid form, or below a home directory that is not known.
    pub fn resolve(&self, text: &str) -> Option<PathBuf> {
        if !is_path(text) {
            return None;
        }
        let (start, rest) = text.split_once('/').unwrap_or((text, ""));
        let place = match start {
            "" => Path::new("/"),
            "$HOME" => self.home.as_deref()?,
            _ => Path::new("/tmp"),
        };
        clean(&place.join(rest.trim_start_matches('/')))
    }
}

/// Returns an absolute path without `.`, repeated and trailing slashes; `None` for a relative path and one with `..`.
fn clean(path: &Path) -> Option<PathBuf> {
    // `Components` leaves out the rest.
    let parent = path.components().any(|part| part == Component::ParentDir);
    (path.is_absolute() && !parent).then(|| path.components().collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn places() -> Places {
        Places::with_home(Some("/home/me".into()))
    }

    #[test]
    fn a_path_is_absolute_or_starts_with_a_place() {
        for (text, path) in [
            ("/srv/data", "/srv/data"),
            ("//srv/./data//", "/srv/data"),
            ("/", "/"),
            ("$HOME", "/home/me"),
            ("$HOME/src/", "/home/me/src"),
            ("$HOME//etc", "/home/me/etc"),
            ("$TMP/x", "/tmp/x"),
            ("$TEMP", "/tmp"),
        ] {
            // As text: paths that differ in slashes only are equal.
            assert_eq!(places().resolve(text).unwrap().to_str(), Some(path), "{text}");
        }
        for text in ["", "src", "./src", "$HOMEx", "$USER", "~", "/a/../b", "$HOME/..", "/a\nb"] {
            assert_eq!(places().resolve(text), None, "{text}");
        }
        assert_eq!(Places::with_home(Some("relative".into())).resolve("$HOME"), None);
        assert_eq!(Places::default().resolve("$HOME/x"), None);
    }

    #[test]
    fn sockets_are_a_list_of_paths_each_of_them_once() {
        let list = ["/run/user/1000/app.sock", "$HOME/.app/socket"];
        assert_eq!(parse_sockets(&json!(list)), Some(list.map(str::to_owned).to_vec()));
        assert_eq!(parse_sockets(&json!([])), Some(Vec::new()));
        let many: Vec<_> = (0..64).map(|number| format!("/tmp/{number}")).collect();
        assert!(parse_sockets(&json!(many[..63])).is_some());
        let long = "/x".repeat(5000);
        for value in [
            json!("/tmp/a"),
            json!({"path": "/tmp/a"}),
            json!(["app.sock"]),
            json!(["/tmp/../a"]),
            json!(["/tmp/a", "/tmp/a"]),
            json!([1]),
            json!([long]),
            json!(many),
        ] {
            assert_eq!(parse_sockets(&value), None, "{value}");
        }
    }

    #[test]
    fn a_value_that_is_not_understood_in_full_is_not_taken() {
        let one = json!([{"path": "/a"}, {"path": "$HOME/b", "readOnly": true}]);
        let parsed = parse(&one).unwrap();
        assert_eq!((parsed.len(), parsed[0].read_only, parsed[1].read_only), (2, false, true));
        assert_eq!(parse(&json!([])), Some(Vec::new()));
        assert_eq!(parse(&default_value()).unwrap()[0].path, "$HOME");
        for bad in [
            json!({"path": "/a"}),
            json!(["/a"]),
            json!([["/a", true]]),
            json!([{"path": "a"}]),
            json!([{"path": "/a", "readonly": true}]),
            json!([{"path": "/a", "readOnly": "yes"}]),
            json!([{"readOnly": true}]),
            json!([{"path": format!("/{}", "a".repeat(MAX_LENGTH))}]),
            Value::Array(vec![json!({"path": "/a"}); MAX_SHARED_DIRECTORIES + 1]),
        ] {
            assert_eq!(parse(&bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_a_text_stands_for_is_absolute_and_clean(text in r"(/|\$HOME|\$TMP|)[/.a$]{0,12}") {
            if let Some(path) = places().resolve(&text) {
                prop_assert!(path.is_absolute());
                prop_assert_eq!(places().resolve(path.to_str().unwrap()), Some(path.clone()));
                prop_assert!(!path.to_str().unwrap().contains("//"));
            }
        }
    }
}
