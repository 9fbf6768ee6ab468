//! The files of a profile (XDG Base Directory Specification 0.8).
//!
//! | kind    | directory                                                     | files                                   |
//! |---------|---------------------------------------------------------------|-----------------------------------------|
//! | config  | `$XDG_CONFIG_HOME/bulkhead/<profile>/`                        | `settings.json`                         |
//! | data    | `$XDG_DATA_HOME/bulkhead/<profile>/`                          | `data.img`, `format`                    |
//! | state   | `$XDG_STATE_HOME/bulkhead/<profile>/`                         | `backend.log`, `console.log`            |
//! | runtime | `$XDG_RUNTIME_DIR/bulkhead/<profile>/`, `/tmp/bulkhead-<uid>` | `docker.sock`, `control.sock`, `lock` … |

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::Serialize;

use super::profile::{IMAGE, ProfileName};

/// Longest path of a Unix socket in bytes: `sun_path` holds 108, including the terminator (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// A directory or socket of a profile that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// No home directory is known.
    #[error("neither $HOME nor ${0} is set to an absolute path; set one of them")]
    NoHome(&'static str),
    /// A directory that cannot be created or examined.
    #[error("cannot use the directory {path}")]
    Folder {
        /// The directory.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// A fallback in `/tmp` that another user may have created.
    #[error("{path} {problem}; remove it, or set XDG_RUNTIME_DIR to a directory of your own")]
    Untrusted {
        /// The directory.
        path: PathBuf,
        /// The problem, as the end of a sentence about the path.
        problem: &'static str,
    },
    /// A socket path that is too long.
    #[error(
        "the socket path {path} has {length} bytes, more than the {MAX_SOCKET_PATH} that Linux allows; \
         use a shorter profile name or set XDG_RUNTIME_DIR to a shorter path"
    )]
    SocketTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// A profile that does not exist.
    #[error("there is no profile `{name}`; {known}")]
    UnknownProfile {
        /// The requested name.
        name: ProfileName,
        /// The existing profiles, or the way to create this one.
        known: String,
    },
}

/// The contents of a profile's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Contents {
    /// `settings.json`.
    Settings,
    /// The logs of backend and console.
    Logs,
    /// The data disk.
    Data,
    /// Sockets and lock of the backend.
    Sockets,
}

/// The base directories of one user.
#[derive(Clone, Debug)]
pub struct Base {
    config: PathBuf,
    data: PathBuf,
    state: PathBuf,
    cache: PathBuf,
    runtime: PathBuf,
    /// The runtime directory is the fallback in `/tmp`, where any user can create files.
    shared_tmp: bool,
}

impl Base {
    /// Reads the environment of this process.
    pub fn from_environment() -> Result<Self, PathError> {
        Self::from_variables(|name| std::env::var_os(name).map(PathBuf::from), nix::unistd::geteuid().as_raw())
    }

    pub(crate) fn from_variables(variable: impl Fn(&str) -> Option<PathBuf>, uid: u32) -> Result<Self, PathError> {
        // The specification requires relative paths to be ignored.
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        let under = |name: &'static str, fallback: &str| {
            absolute(name)
                .or_else(|| absolute("HOME").map(|home| home.join(fallback)))
                .map(|path| path.join("bulkhead"))
                .ok_or(PathError::NoHome(name))
        };
        // The specification has no default for this one and asks for a replacement with similar properties: `create`
        // checks that the one in `/tmp` is the user's alone.
        let runtime = absolute("XDG_RUNTIME_DIR").map(|path| path.join("bulkhead"));
        Ok(Self {
            config: under("XDG_CONFIG_HOME", ".config")?,
            data: under("XDG_DATA_HOME", ".local/share")?,
            state: under("XDG_STATE_HOME", ".local/state")?,
            cache: under("XDG_CACHE_HOME", ".cache")?,
            shared_tmp: runtime.is_none(),
            // With the user ID in its name, so that users of one machine do not get into each other's way.
            runtime: runtime.unwrap_or_else(|| format!("/tmp/bulkhead-{uid}").into()),
        })
    }

    /// Directory of a guest image that the user or a package installed.
    pub fn data_image(&self) -> PathBuf {
        self.data.join(IMAGE)
    }

    /// Directory of the guest image that `scripts/image` built.
    pub fn cached_image(&self) -> PathBuf {
        self.cache.join("image/current")
    }

    /// The directories with the files of all profiles, and of guest images.
    pub fn directories(&self) -> [&Path; 5] {
        [&self.config, &self.data, &self.state, &self.cache, &self.runtime].map(PathBuf::as_path)
    }

    /// The profiles that have files, sorted.
    pub fn profiles(&self) -> Vec<ProfileName> {
        let mut names: Vec<String> = [&self.config, &self.data, &self.state]
            .into_iter()
            .filter_map(|directory| fs::read_dir(directory).ok())
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        // A profile usually has all three directories. Between them are those of the images, and files of other programs
        // or by hand: none of them parses as a name.
        names.sort_unstable();
        names.dedup();
        names.iter().filter_map(|name| name.parse().ok()).collect()
    }

    /// The paths of one profile; creates nothing.
    pub fn profile(&self, name: &ProfileName) -> Result<Paths, PathError> {
        let runtime = self.runtime.join(name.as_str());
        let paths = Paths {
            name: name.clone(),
            config: self.config.join(name.as_str()),
            data: self.data.join(name.as_str()),
            state: self.state.join(name.as_str()),
            runtime,
            base: self.clone(),
        };
        // Checked before any work is done: bind(2) fails late, and without naming the limit.
        for socket in [paths.docker_socket(), paths.control_socket(), paths.vsock_socket()] {
            let length = socket.as_os_str().len();
            if length > MAX_SOCKET_PATH {
                return Err(PathError::SocketTooLong { path: socket, length });
            }
        }
        Ok(paths)
    }

    /// The same for a profile that has been used before; the default one always exists. A mistyped `--profile` would
    /// otherwise look like an engine that is not running.
    pub fn known_profile(&self, name: &ProfileName) -> Result<Paths, PathError> {
        let paths = self.profile(name)?;
        if name.is_default() || paths.exists() {
            return Ok(paths);
        }
        // The list helps against the usual cause, a typing error.
        let names: Vec<String> = self.profiles().iter().map(ToString::to_string).collect();
        let known = if names.is_empty() {
            format!("`bulkhead --profile {name} start` creates it")
        } else {
            format!("existing profiles: {}", names.join(", "))
        };
        Err(PathError::UnknownProfile { name: name.clone(), known })
    }
}

/// The paths of one profile.
#[derive(Clone, Debug)]
pub struct Paths {
    name: ProfileName,
    config: PathBuf,
    data: PathBuf,
    state: PathBuf,
    runtime: PathBuf,
    base: Base,
}

impl Paths {
    /// The profile's name.
    pub fn name(&self) -> &ProfileName {
        &self.name
    }

    /// The directories shared by all profiles.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The settings file.
    pub fn settings(&self) -> PathBuf {
        self.config.join("settings.json")
    }

    /// The raw, sparse data disk.
    pub fn data_disk(&self) -> PathBuf {
        self.data.join("data.img")
    }

    /// The version of the profile's files.
    pub fn data_format(&self) -> PathBuf {
        self.data.join("format")
    }

    /// Marks a profile of `bulkhead run`, whose files may be deleted once no process uses it.
    pub fn throw_away_marker(&self) -> PathBuf {
        self.data.join("throw-away")
    }

    /// The log of the backend and of the vmm process.
    pub fn backend_log(&self) -> PathBuf {
        self.state.join("backend.log")
    }

    /// The guest's serial port, with `--serial`.
    pub fn serial_log(&self) -> PathBuf {
        self.console_log().with_file_name("serial.log")
    }

    /// The guest's console.
    pub fn console_log(&self) -> PathBuf {
        self.state.join("console.log")
    }

    /// The socket of the Docker API.
    pub fn docker_socket(&self) -> PathBuf {
        self.runtime.join("docker.sock")
    }

    /// The socket of the backend's control API.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }

    /// Host end of the hybrid vsock.
    pub fn vsock_socket(&self) -> PathBuf {
        self.runtime.join("vsock.sock")
    }

    /// The lock of the running backend; contains its process ID.
    pub fn lock(&self) -> PathBuf {
        self.runtime.join("lock")
    }

    /// The directory above the runtime directories of all profiles.
    pub fn runtime_root(&self) -> &Path {
        &self.base.runtime
    }

    /// `DOCKER_HOST` for this profile.
    pub fn docker_host(&self) -> String {
        format!("unix://{}", self.docker_socket().display())
    }

    /// Returns whether the profile has files that outlive its backend.
    pub fn exists(&self) -> bool {
        [&self.config, &self.data, &self.state].into_iter().any(|directory| directory.is_dir())
    }

    /// Creates the directories with mode 0700 and checks that the runtime directory belongs to this user alone.
    pub fn create(&self) -> Result<(), PathError> {
        make(&self.base.runtime)?;
        // Another user could have created it first, to listen on the sockets or to read them. The sticky bit of `/tmp`
        // keeps one that passes the check from being replaced.
        if self.base.shared_tmp {
            check_owner(&self.base.runtime)?;
        }
        [&self.data, &self.state, &self.runtime].into_iter().try_for_each(|directory| make(directory))
    }

    /// Creates the settings' directory with mode 0700.
    pub fn create_config(&self) -> Result<PathBuf, PathError> {
        make(&self.config)?;
        Ok(self.config.clone())
    }

    /// The profile's own directories, with what is in each, in the order in which [`ProfileLock`] lets them be removed:
    /// that of the data and that of the sockets hold the locks.
    ///
    /// [`ProfileLock`]: crate::backend::lock::ProfileLock
    pub fn directories(&self) -> [(Contents, &Path); 4] {
        [
            (Contents::Settings, &self.config),
            (Contents::Logs, &self.state),
            (Contents::Data, &self.data),
            (Contents::Sockets, &self.runtime),
        ]
    }

    /// Removes the runtime directory if it is empty.
    pub fn remove_empty_runtime(&self) {
        let _ = fs::remove_dir(&self.runtime);
    }

    /// Removes every file of the profile.
    pub fn remove_all(&self) -> Result<(), PathError> {
        // The data directory has the marker of a temporary profile: if this is interrupted before, the next `bulkhead
        // run` still finds the profile and removes the rest.
        for directory in [&self.runtime, &self.state, &self.data, &self.config] {
            match fs::remove_dir_all(directory) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(PathError::Folder { path: directory.clone(), source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn make(directory: &Path) -> Result<(), PathError> {
    // The mode is for new directories, parents included. Existing ones keep theirs: their modes are the user's choice.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| PathError::Folder { path: directory.to_owned(), source })
}

fn check_owner(directory: &Path) -> Result<(), PathError> {
    let untrusted = |problem| Err(PathError::Untrusted { path: directory.to_owned(), problem });
    // Not through a link, whose owner could point it elsewhere after the check.
    let metadata =
        fs::symlink_metadata(directory).map_err(|source| PathError::Folder { path: directory.to_owned(), source })?;
    if !metadata.is_dir() {
        return untrusted("is not a directory");
    }
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        return untrusted("belongs to another user");
    }
    if metadata.mode() & 0o077 != 0 {
        return untrusted("is open to other users");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn base(variables: &[(&str, &str)]) -> Result<Base, PathError> {
        Base::from_variables(
            |name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value)),
            1000,
        )
    }

    #[test]
    fn without_xdg_variables_the_defaults_of_the_specification_are_used() {
        let paths = base(&[("HOME", "/home/a")]).unwrap().profile(&ProfileName::default()).unwrap();
        assert_eq!(paths.settings(), Path::new("/home/a/.config/bulkhead/default/settings.json"));
        assert_eq!(paths.data_disk(), Path::new("/home/a/.local/share/bulkhead/default/data.img"));
        assert_eq!(paths.console_log(), Path::new("/home/a/.local/state/bulkhead/default/console.log"));
        assert_eq!(paths.docker_host(), "unix:///tmp/bulkhead-1000/default/docker.sock");
    }

    #[test]
    fn relative_paths_in_the_variables_are_ignored() {
        let paths = base(&[("HOME", "/h"), ("XDG_DATA_HOME", "data"), ("XDG_RUNTIME_DIR", "run")]).unwrap();
        let paths = paths.profile(&ProfileName::default()).unwrap();
        assert_eq!(paths.data_disk(), Path::new("/h/.local/share/bulkhead/default/data.img"));
        assert!(paths.base.shared_tmp);
        assert!(matches!(base(&[("HOME", "h")]), Err(PathError::NoHome("XDG_CONFIG_HOME"))));
    }

    #[test]
    fn a_socket_path_that_does_not_fit_is_refused_with_its_length() {
        let long = format!("/{}", "r".repeat(90));
        let base = base(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", &long)]).unwrap();
        let error = base.profile(&ProfileName::default()).unwrap_err();
        assert!(matches!(error, PathError::SocketTooLong { length, .. } if length > MAX_SOCKET_PATH), "{error}");
    }

    #[test]
    fn a_runtime_folder_open_to_others_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        check_owner(folder.path()).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(check_owner(folder.path()), Err(PathError::Untrusted { .. })));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/root", &link).unwrap();
        assert!(matches!(check_owner(&link), Err(PathError::Untrusted { problem: "is not a directory", .. })));
    }
}
