//! `bulkhead share`.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    process::ExitCode,
};

use schemars::JsonSchema;
use serde::Serialize;

use super::{CliError, Format, client::Client, colour, command, print, print_json, runtime, table};
use crate::{
    backend::{api::SharesOutcome, shares::Judged},
    settings::{Base, MAX_SHARED_DIRECTORIES, Paths, Places, Policy, ProfileName, Settings, SharedDirectory},
};
use bulkhead_ipc::report::chain;

/// Show and change the directories of this machine that containers can mount.
///
/// `docker run --volume` and the like can mount a shared directory, everything below it, and nothing else. The home
/// directory is shared unless another list is set. This is the setting filesharingDirectories. A running engine takes a
/// change at once. Containers get errors for a mounted directory that is no longer shared.
#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Share directories with containers.
    ///
    /// A directory that is shared already gets the new mode. The administrator's policy may limit the choice.
    #[command(after_help = "\
Examples:
  bulkhead share add /srv/data
  bulkhead share add --read-only . /usr/share/dict")]
    Add {
        /// Directories to share, with everything below them.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// Do not let containers change anything in them.
        #[arg(long)]
        read_only: bool,
    },
    /// List the shared directories.
    List {
        /// Output format.
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Stop sharing directories; without any left, containers can mount none.
    Remove {
        /// Directories to take off the list.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
    },
}

/// Runs the verb under `policy`, this machine's.
pub(super) fn run(base: &Base, name: &ProfileName, policy: Policy, verb: Verb) -> Result<ExitCode, CliError> {
    let paths = match verb {
        Verb::List { format } => {
            let settings = Settings::load(&base.known_profile(name)?.settings())?.under(policy);
            let entries = Judged::all(&settings).iter().map(Entry::from).collect::<Vec<_>>();
            match format {
                Format::Json => print_json(&entries)?,
                Format::Pretty => print(&pretty(&entries))?,
            }
            return Ok(ExitCode::SUCCESS);
        }
        Verb::Add { paths: directories, read_only } => {
            let paths = base.profile(name)?;
            let new = directories.iter().map(|path| judged(path, read_only, &policy));
            let new = new.collect::<Result<Vec<_>, CliError>>()?;
            Settings::update_shares(&paths, &policy, |list| add(list, &new))?;
            paths
        }
        Verb::Remove { paths: directories } => {
            let paths = base.known_profile(name)?;
            let gone = directories.iter().map(|path| listed(path)).collect::<Result<Vec<_>, CliError>>()?;
            Settings::update_shares(&paths, &policy, |list| remove(list, &gone))?;
            paths
        }
    };
    runtime()?.block_on(apply(&paths));
    Ok(ExitCode::SUCCESS)
}

/// Makes a running engine share what the settings say now, or says when it will.
async fn apply(paths: &Paths) {
    let Ok(Some(client)) = Client::connect(paths).await else { return };
    let restart = command(paths, "restart");
    match client.share().await {
        Ok(SharesOutcome::Changed | SharesOutcome::NotRunning) => {}
        Ok(SharesOutcome::NextStart) => {
            eprintln!("note: the running engine takes the change at its next restart: {restart}");
        }
        // The list is saved all the same.
        Err(error) => {
            colour::warn(format_args!(
                "the running engine did not take the change: {}; restart it: {restart}",
                chain(&error)
            ));
        }
    }
}

/// A directory of the command line that can be shared.
fn judged(path: &Path, read_only: bool, policy: &Policy) -> Result<SharedDirectory, CliError> {
    let path = absolute(path)?.into_os_string().into_string().map_err(|path| {
        CliError::Failed(format!("{} cannot be shared, because its name is not UTF-8; rename it", path.display()))
    })?;
    let directory = SharedDirectory { path, read_only };
    let judged = Judged::new(directory, &Places::default(), policy.allowed_directories().as_ref());
    judged.path.map(|_| judged.directory).map_err(|refusal| CliError::Failed(chain(&refusal)))
}

/// Returns a path of the command line that may be written as in the list, and need not exist.
fn listed(path: &Path) -> Result<PathBuf, CliError> {
    let resolved = path.to_str().and_then(|path| Places::from_environment().resolve(path));
    resolved.map_or_else(|| absolute(path), Ok)
}

/// Returns a path of the command line as an absolute one, as the user sees it: symbolic links stay.
fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    let doing = "cannot find the working directory";
    if path.components().any(|part| part == Component::ParentDir) {
        // Behind a link `..` is not the directory that the text before it names.
        return fs::canonicalize(path)
            .map_err(|error| CliError::Failed(format!("cannot find the directory {}: {error}", path.display())));
    }
    let path =
        if path.is_absolute() { path.to_owned() } else { working_directory().map_err(CliError::io(doing))?.join(path) };
    Ok(path.components().filter(|part| *part != Component::CurDir).collect())
}

/// Returns the working directory by the name that the shell shows, if it has one.
pub(super) fn working_directory() -> std::io::Result<PathBuf> {
    let real = std::env::current_dir()?;
    Ok(shells_name(std::env::var_os("PWD").as_deref(), &real).unwrap_or(real))
}

/// The shell's name of a directory, if it still leads there.
fn shells_name(name: Option<&OsStr>, real: &Path) -> Option<PathBuf> {
    let name = Path::new(name?);
    let plain = name.is_absolute() && !name.components().any(|part| part == Component::ParentDir);
    let (one, other) = (fs::metadata(name).ok()?, fs::metadata(real).ok()?);
    let same = (one.dev(), one.ino()) == (other.dev(), other.ino());
    (plain && same).then(|| name.to_owned())
}

/// Returns whether an entry of the list is the directory at `path`.
fn is_at(entry: &SharedDirectory, path: &Path) -> bool {
    let resolved = Places::from_environment().resolve(&entry.path);
    // The same name, or a name of the same directory.
    resolved.as_deref() == Some(path)
        || resolved.is_some_and(|resolved| match (fs::canonicalize(resolved), fs::canonicalize(path)) {
            (Ok(one), Ok(other)) => one == other,
            _ => false,
        })
}

fn add(mut list: Vec<SharedDirectory>, new: &[SharedDirectory]) -> Result<Vec<SharedDirectory>, CliError> {
    for directory in new {
        match list.iter_mut().find(|entry| is_at(entry, Path::new(&directory.path))) {
            // By the new name: the user may have chosen another link to it.
            Some(entry) => *entry = directory.clone(),
            None => list.push(directory.clone()),
        }
    }
    if list.len() > MAX_SHARED_DIRECTORIES {
        let message = "directories can be shared; share one that contains several, or remove some first";
        return Err(CliError::Failed(format!("at most {MAX_SHARED_DIRECTORIES} {message}")));
    }
    Ok(list)
}

fn remove(mut list: Vec<SharedDirectory>, gone: &[PathBuf]) -> Result<Vec<SharedDirectory>, CliError> {
    for path in gone {
        let at = list.iter().position(|entry| is_at(entry, path));
        let Some(at) = at else {
            let shown = path.display();
            let places = Places::from_environment();
            let around =
                list.iter().find(|entry| places.resolve(&entry.path).is_some_and(|above| path.starts_with(above)));
            return Err(CliError::Failed(match around {
                Some(entry) => {
                    format!("{shown} is shared as a part of {0}; remove {0}, and add what should stay", entry.path)
                }
                None => format!("{shown} is not shared; `bulkhead share list` shows the directories that are"),
            }));
        };
        list.remove(at);
    }
    Ok(list)
}

/// A directory in the output of `bulkhead share list --format json`, which is a list of them.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Entry {
    /// Its path.
    path: String,
    /// Containers cannot change anything in it.
    read_only: bool,
    /// The reason why it is not shared.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl From<&Judged> for Entry {
    fn from(judged: &Judged) -> Self {
        let (path, problem) = match &judged.path {
            Ok(path) => (path.named.display().to_string(), None),
            Err(refusal) => (judged.directory.path.clone(), Some(chain(refusal))),
        };
        Self { path, read_only: judged.directory.read_only, problem }
    }
}

fn pretty(entries: &[Entry]) -> String {
    if entries.is_empty() {
        return "no shared directories".to_owned();
    }
    let header = ["DIRECTORY", "MODE", "STATE"].map(ToOwned::to_owned).to_vec();
    let rows = entries.iter().map(|entry| {
        let mode = if entry.read_only { "read-only" } else { "read-write" };
        let problem = entry.problem.as_ref();
        let state = problem.map_or_else(|| "shared".to_owned(), |problem| format!("not shared: {problem}"));
        vec![entry.path.clone(), mode.to_owned(), state]
    });
    table(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn shared(path: &Path, read_only: bool) -> SharedDirectory {
        SharedDirectory { path: path.to_str().unwrap().to_owned(), read_only }
    }

    #[test]
    fn a_directory_is_in_the_list_once_under_whatever_name() {
        let place = tempfile::tempdir().unwrap();
        let (real, link) = (place.path().join("real"), place.path().join("link"));
        fs::create_dir(&real).unwrap();
        symlink("real", &link).unwrap();
        let list = add(Vec::new(), &[shared(&real, false)]).unwrap();
        let list = add(list, &[shared(&link, true)]).unwrap();
        assert_eq!(list, [shared(&link, true)]);
        assert_eq!(remove(list, &[real]).unwrap(), []);
    }

    #[test]
    fn what_is_shared_by_another_or_not_at_all_cannot_be_removed() {
        let list = || vec![shared(Path::new("/srv/missing"), false)];
        let error = |path: &str| remove(list(), &[path.into()]).unwrap_err().to_string();
        assert!(error("/srv/missing/x").contains("as a part of /srv/missing; remove /srv/missing"));
        assert!(error("/srv/missingx").contains("`bulkhead share list`"));
        // It need not exist.
        assert_eq!(remove(list(), &["/srv/missing".into()]).unwrap(), []);
    }

    #[test]
    fn the_list_has_an_end_that_the_error_names() {
        let many: Vec<_> =
            (0..=MAX_SHARED_DIRECTORIES).map(|at| shared(Path::new(&format!("/srv/{at}")), false)).collect();
        assert!(add(Vec::new(), &many).unwrap_err().to_string().starts_with("at most 31 directories"));
    }

    #[test]
    fn the_shells_name_counts_only_where_it_leads_to_the_directory() {
        let place = tempfile::tempdir().unwrap();
        let (real, link) = (place.path().join("real"), place.path().join("link"));
        fs::create_dir(&real).unwrap();
        symlink("real", &link).unwrap();
        let name = |name: &Path| shells_name(Some(name.as_os_str()), &real);
        assert_eq!(name(&link), Some(link.clone()));
        for other in [place.path(), Path::new("link"), &link.join("../real"), Path::new("/nonexistent")] {
            assert_eq!(name(other), None, "{}", other.display());
        }
    }
}
