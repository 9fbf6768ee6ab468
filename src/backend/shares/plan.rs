//! The shared directories of a VM, from settings, options and policy.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bulkhead_protocol::{MAX_SHARES, Share};
use bulkhead_share::api;

use super::directory::{Refusal, SharedPath};
use crate::{
    backend::api::StartOptions,
    settings::{AllowedDirectories, Places, Settings, SharedDirectory},
};
use bulkhead_ipc::report::chain;

/// Maximum length of all paths together, in bytes. All of the guest's configuration has to fit into one message.
const MAX_LENGTH: usize = 16 * 1024;

/// The shared directories of a VM that has some.
#[derive(Clone, Debug, Default)]
pub struct SharesPlan {
    shares: Vec<Share>,
    /// Locks hold against the host's programs.
    host_locks: bool,
}

/// A directory of the setting, and the judgement on it.
#[derive(Debug)]
pub struct Judged {
    /// As it is in the setting.
    pub directory: SharedDirectory,
    /// The path behind it, if it can be shared.
    pub path: Result<SharedPath, Refusal>,
}

impl Judged {
    /// Judges a directory.
    pub fn new(directory: SharedDirectory, places: &Places, allowed: Option<&AllowedDirectories>) -> Self {
        let path = places.resolve(&directory.path).ok_or_else(|| {
            let text = directory.path.clone();
            if text.starts_with("$HOME") { Refusal::Home(text) } else { Refusal::Path(text) }
        });
        let path = path.and_then(|path| SharedPath::find(path, allowed));
        Self { directory, path }
    }

    /// The warning about one that cannot be shared.
    pub fn warning(&self) -> Option<String> {
        let refusal = self.path.as_ref().err()?;
        let path = &self.directory.path;
        Some(format!("not shared: {}; `bulkhead share remove '{path}'` takes it off the list", chain(refusal)))
    }

    /// Judges the directories of the settings.
    pub fn all(settings: &Settings) -> Vec<Self> {
        let (places, allowed) = (Places::from_environment(), settings.policy().allowed_directories());
        let directories = settings.shared_directories().into_iter();
        directories.map(|directory| Self::new(directory, &places, allowed.as_ref())).collect()
    }
}

impl SharesPlan {
    /// Plans the shared directories; `None` without any. Also returns a line for each that is left out: a VM without
    /// the files of a container is of more use than none.
    pub(in crate::backend) fn new(settings: &Settings, options: &StartOptions) -> (Option<Self>, Vec<String>) {
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        if !options.no_shares {
            for judged in Judged::all(settings) {
                problems.extend(judged.warning());
                found.extend(judged.path.map(|path| (path, judged.directory.read_only)));
            }
            // It comes by itself, so nobody misses one that cannot be shared.
            let allowed = settings.policy().allowed_directories();
            let here = options.working_directory.as_deref().and_then(|path| path.to_str());
            let here = here.and_then(|path| Places::default().resolve(path));
            found.extend(here.and_then(|path| SharedPath::find(path, allowed.as_ref()).ok()).map(|path| (path, false)));
        }
        let (shares, rest) = bounded(names(&found));
        if rest > 0 {
            problems.push(format!(
                "{rest} shared directories are left out, because there are too many or their paths are too long"
            ));
        }
        let plan = Self { shares, host_locks: settings.host_locks() };
        ((!plan.shares.is_empty()).then_some(plan), problems)
    }

    /// Also shares what was shared on its own before and is now a part of another directory with the same access. The
    /// guest knows it as a directory of its own.
    pub(super) fn keeping(mut self, before: &Self) -> Self {
        for old in &before.shares {
            let path = Path::new(&old.path);
            let around = |path: &Path| self.shares.iter().find(|share| Path::new(&share.path) == path);
            // The nearest one counts, and the same one is there already.
            let found = path.ancestors().find_map(around).filter(|share| share.path != old.path);
            if found.is_some_and(|share| share.read_only == old.read_only) {
                self.shares.push(old.clone());
            }
        }
        self.shares = bounded(self.shares).0;
        // The guest has been told once, when it mounted the file system.
        self.host_locks = before.host_locks;
        self
    }

    /// The list for the guest.
    pub(in crate::backend) fn guest(&self) -> Vec<Share> {
        self.shares.clone()
    }

    /// The list for the process that serves them, without these places.
    pub(super) fn setup(&self, hidden: &[PathBuf]) -> api::Command {
        let share = |share: &Share| api::Share { path: PathBuf::from(&share.path), read_only: share.read_only };
        let shares = self.shares.iter().map(share).collect();
        api::Command::Setup { shares, hidden: hidden.to_vec(), locks: self.host_locks }
    }
}

/// The names under which directories are shared: each by the user's and by the one without symbolic links, as programs
/// that start containers may use either. Those that another one includes are left out.
fn names(directories: &[(SharedPath, bool)]) -> Vec<Share> {
    let mut names = BTreeMap::<&Path, bool>::new();
    for (path, read_only) in directories {
        for name in [&path.named, &path.real] {
            // Of two entries for one directory the stricter counts.
            *names.entry(name).or_default() |= read_only;
        }
    }
    let included = |name: &Path, read_only: bool| {
        // Only where the path in the other one leads to the directory, and not to a link.
        let plain = directories.iter().any(|(path, _)| path.real == name);
        let around = name.ancestors().skip(1).find_map(|above| names.get(above));
        plain && around == Some(&read_only)
    };
    let shared = names.iter().filter(|(name, read_only)| !included(name, **read_only));
    shared
        .filter_map(|(name, read_only)| {
            // A real path can be any bytes; the user's name is always text.
            let path = name.to_str().filter(|path| !path.chars().any(char::is_control))?;
            Some(Share { path: path.to_owned(), read_only: *read_only })
        })
        .collect()
}

/// Returns the shares that the guest's configuration has room for, and the number of the others.
fn bounded(mut shares: Vec<Share>) -> (Vec<Share>, usize) {
    let all = shares.len();
    let mut length = 0;
    let fitting = shares.iter().take(MAX_SHARES).take_while(|share| {
        length += share.path.len();
        length <= MAX_LENGTH
    });
    let count = fitting.count();
    shares.truncate(count);
    (shares, all - count)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn path(named: &str, real: &str) -> SharedPath {
        SharedPath { named: named.into(), real: real.into() }
    }

    #[test]
    fn a_directory_that_another_one_now_contains_stays_one_of_its_own() {
        let plan = |shares: &[(&str, bool)]| SharesPlan {
            shares: shares
                .iter()
                .map(|(path, read_only)| Share { path: (*path).into(), read_only: *read_only })
                .collect(),
            host_locks: false,
        };
        let kept = |new: &[(&str, bool)], old: &[(&str, bool)]| plan(new).keeping(&plan(old)).shares;
        let all = plan(&[("/home", false), ("/home/me", false)]).shares;
        assert_eq!(kept(&[("/home", false)], &[("/home/me", false)]), all);
        assert_eq!(kept(&[("/home", false), ("/home/me", false)], &[("/home/me", false)]), all);
        // With another access it is part of the new one, and one that is shared no more is gone.
        for old in [("/home/me", true), ("/homes", false), ("/", false)] {
            assert_eq!(kept(&[("/home", false)], &[old]), plan(&[("/home", false)]).shares, "{old:?}");
        }
        let nearest = [("/home", false), ("/home/me", true)];
        assert_eq!(kept(&nearest, &[("/home/me/src", false)]), plan(&nearest).shares);
    }

    fn shown(directories: &[(SharedPath, bool)]) -> Vec<(String, bool)> {
        names(directories).into_iter().map(|share| (share.path, share.read_only)).collect()
    }

    #[test]
    fn a_directory_behind_a_link_has_both_names() {
        let home = [(path("/home/me", "/data/me"), false)];
        assert_eq!(shown(&home), [("/data/me".into(), false), ("/home/me".into(), false)]);
        // In another share a link would lead nowhere, so the directory behind it is shared in its place.
        let link = [(path("/home/me", "/home/me"), false), (path("/home/me/link", "/srv/x"), false)];
        let expected = [("/home/me", false), ("/home/me/link", false), ("/srv/x", false)];
        assert_eq!(shown(&link), expected.map(|(name, mode)| (name.to_owned(), mode)));
    }

    #[test]
    fn what_is_in_another_share_is_listed_only_if_it_differs() {
        let plain = |name: &str, read_only| (path(name, name), read_only);
        let list = [
            plain("/a", false),
            plain("/a/b", false),
            plain("/a/c", true),
            plain("/a/c/d", true),
            plain("/a/c/e", false),
            plain("/ab", false),
        ];
        let expected = [("/a", false), ("/a/c", true), ("/a/c/e", false), ("/ab", false)];
        assert_eq!(shown(&list), expected.map(|(name, mode)| (name.to_owned(), mode)));
        assert_eq!(shown(&[plain("/a", false), plain("/a", true)]), [("/a".to_owned(), true)]);
    }

    #[test]
    fn there_is_an_end_to_the_list() {
        let share = |path: String| Share { path, read_only: false };
        let many: Vec<_> = (0..100).map(|at| share(format!("/{at}"))).collect();
        let (shares, rest) = bounded(many);
        assert_eq!((shares.len(), rest), (MAX_SHARES, 100 - MAX_SHARES));
        let long: Vec<_> = (0..5).map(|_| share("x".repeat(4000))).collect();
        assert_eq!(bounded(long).1, 1);
    }

    #[test]
    fn what_cannot_be_shared_is_left_out_and_named() {
        let place = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(place.path()).unwrap();
        for name in ["src", "here"] {
            fs::create_dir(real.join(name)).unwrap();
        }
        symlink("/proc", real.join("kernel")).unwrap();
        let list = ["src", "missing", "kernel"].map(|name| serde_json::json!({"path": real.join(name)}));
        let file = real.join("settings.json");
        fs::write(&file, serde_json::json!({"filesharingDirectories": list}).to_string()).unwrap();
        let settings = Settings::load(&file).unwrap();
        let options = StartOptions { working_directory: Some(real.join("here")), ..StartOptions::default() };
        let (plan, problems) = SharesPlan::new(&settings, &options);
        let paths: Vec<_> = plan.unwrap().guest().into_iter().map(|share| PathBuf::from(share.path)).collect();
        assert_eq!(paths, [real.join("here"), real.join("src")]);
        assert_eq!(problems.len(), 2);
        assert!(problems[0].contains("missing does not exist") && problems[1].contains("kernel cannot be shared"));
        let (plan, problems) = SharesPlan::new(&settings, &StartOptions { no_shares: true, ..options });
        assert!(plan.is_none() && problems.is_empty());
    }
}
