//! `bulkhead delete`.

use std::{
    fs,
    io::{self, BufRead, IsTerminal, Read, Write},
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::Serialize;

use super::{CliError, Format, in_bytes, print, print_json, start::blocking, stop};
use crate::{
    backend::{
        api::StopOptions,
        disk,
        docker::context::{ContextError, DockerContext},
        launch,
        lock::ProfileLock,
    },
    settings::{Contents, PathError, Paths, ProfileName},
};
use bulkhead_ipc::report::chain;

/// Longest answer to the question that is read, in bytes.
const MAX_ANSWER: u64 = 256;

/// Delete a profile: its data disk with all images, containers and volumes, its settings, logs and docker context.
///
/// Stops the engine first, as `bulkhead stop` does. Asks before that; without a terminal, `--force` is needed. A
/// symbolic link is removed and what it leads to is kept. The docker context stays if it is the current one, because
/// docker fails without it. Refused while a process of another session uses the profile.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead --profile ci delete
  bulkhead --profile ci delete --force --format json")]
pub(super) struct Arguments {
    /// Do not ask.
    #[arg(short, long)]
    force: bool,
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Output of `bulkhead delete --format json`.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct Deleted {
    /// The profile.
    profile: ProfileName,
    /// The engine was running.
    stopped: bool,
    /// The directories that were removed with everything in them.
    removed: Vec<Removed>,
    /// The docker context that was removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<String>,
    /// Things that were left alone, each with the reason.
    kept: Vec<Kept>,
}

/// A directory that was removed.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
struct Removed {
    /// Its contents.
    contents: Contents,
    /// Its path.
    path: PathBuf,
}

/// A thing that was left alone.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
struct Kept {
    /// Its path, or the name of the docker context.
    name: String,
    /// The reason.
    reason: String,
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    let context = match DockerContext::new(paths.name(), &paths.docker_host()) {
        Ok(context) => Some(context),
        // Then no backend could make one either.
        Err(ContextError::NoHome) => None,
        Err(error) => return Err(CliError::Failed(chain(&error))),
    };
    let context = context.filter(|context| context.exists().unwrap_or(false));
    let exists = paths.directories().iter().any(|(_, path)| fs::symlink_metadata(path).is_ok());
    if exists && !arguments.force {
        confirm(paths)?;
    }
    let mut deleted = Deleted {
        profile: paths.name().clone(),
        stopped: exists && stop::stop(paths, &StopOptions::default()).await?,
        removed: Vec::new(),
        context: None,
        kept: Vec::new(),
    };
    if exists {
        let mine = paths.clone();
        (deleted.removed, deleted.kept) = blocking(move || remove(&mine)).await??;
    }
    if let Some(context) = context {
        match context.remove().and_then(|()| context.exists()) {
            Ok(false) => deleted.context = Some(context.name().to_owned()),
            Ok(true) => deleted.kept.push(Kept {
                name: context.name().to_owned(),
                reason: "the docker context is the current one; choose another with `docker context use`, then delete \
                         it with `docker context rm`"
                    .to_owned(),
            }),
            Err(error) => deleted.kept.push(Kept { name: context.name().to_owned(), reason: chain(&error) }),
        }
    }
    match arguments.format {
        Format::Json => print_json(&deleted),
        Format::Pretty => print(&pretty(&deleted)),
    }
}

/// Asks on the terminal; fails unless the answer is yes.
fn confirm(paths: &Paths) -> Result<(), CliError> {
    if !io::stdin().is_terminal() {
        return Err(CliError::Failed(
            "standard input is not a terminal, so nothing can be asked; add --force to delete without a question"
                .to_owned(),
        ));
    }
    let used = disk::usage(&paths.data_disk())
        .map(|disk| format!(" ({} in use)", in_bytes(disk.allocated_bytes)))
        .unwrap_or_default();
    eprint!(
        "Delete profile `{}` with its data disk{used}, all images, containers and volumes, settings and logs? [y/N] ",
        paths.name()
    );
    let _ = io::stderr().flush();
    let mut answer = String::new();
    io::stdin().lock().take(MAX_ANSWER).read_line(&mut answer).map_err(CliError::io("cannot read the answer"))?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(CliError::Failed("nothing was deleted".to_owned())),
    }
}

/// Removes the directories of a profile that no process uses, and returns what was removed and kept.
fn remove(paths: &Paths) -> Result<(Vec<Removed>, Vec<Kept>), CliError> {
    // Before the directories that the locks need are created. An empty one says nothing: a backend that has just exited
    // removes that of its sockets when others may take the lock already.
    let is_link = |path: &Path| fs::symlink_metadata(path).is_ok_and(|file| file.is_symlink());
    let has_files = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
    let existing = paths.directories().map(|(_, path)| is_link(path) || has_files(path));
    paths.create()?;
    // A `start` waits until this is done, instead of meeting half a profile or failing on the lock below.
    let _turn = launch::lock_start(paths)?;
    let lock = ProfileLock::acquire(paths)?;
    let (mut removed, mut kept) = (Vec::new(), Vec::new());
    for ((contents, path), existed) in paths.directories().into_iter().zip(existing) {
        // The user may have put a directory or the disk on another file system by a link. That is theirs.
        for link in [path, &path.join("data.img")] {
            if let Ok(target) = fs::read_link(link) {
                let reason = format!("a symbolic link led there: {}", link.display());
                let target = link.parent().map_or_else(|| target.clone(), |directory| directory.join(&target));
                kept.push(Kept { name: target.display().to_string(), reason });
            }
        }
        if remove_directory(path)? && existed {
            removed.push(Removed { contents, path: path.to_owned() });
        }
    }
    // Of the lock only the open file is left, so a profile of this name can be created again from here on.
    drop(lock);
    Ok((removed, kept))
}

/// Removes a directory with everything in it, or a link to one; returns whether there was one.
fn remove_directory(path: &Path) -> Result<bool, PathError> {
    // Goes down by descriptors and never through a link, even one that is put there meanwhile; a link at `path` itself
    // is unlinked.
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(PathError::Folder { path: path.to_owned(), source }),
    }
}

fn pretty(deleted: &Deleted) -> String {
    let mut lines = Vec::new();
    if deleted.stopped {
        lines.push("stopped the engine".to_owned());
    }
    for Removed { contents, path } in &deleted.removed {
        let what = match contents {
            Contents::Settings => "settings",
            Contents::Logs => "logs",
            Contents::Data => "data disk",
            Contents::Sockets => "sockets",
        };
        lines.push(format!("removed {} ({what})", path.display()));
    }
    lines.extend(deleted.context.iter().map(|name| format!("removed docker context {name}")));
    lines.extend(deleted.kept.iter().map(|Kept { name, reason }| format!("kept {name}: {reason}")));
    if lines.is_empty() {
        lines.push(format!("profile `{}` has no files", deleted.profile));
    }
    lines.join("\n")
}
