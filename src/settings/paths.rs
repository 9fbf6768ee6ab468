//! Where a profile keeps its files (XDG Base Directory Specification 0.8).
//!
//! | what    | folder                                                        | files                                   |
//! |---------|---------------------------------------------------------------|-----------------------------------------|
//! | config  | `$XDG_CONFIG_HOME/bulkhead/<profile>/`                        | `settings.json`                         |
//! | data    | `$XDG_DATA_HOME/bulkhead/<profile>/`                          | `data.img`                              |
//! | state   | `$XDG_STATE_HOME/bulkhead/<profile>/`                         | `backend.log`, `console.log`            |
//! | runtime | `$XDG_RUNTIME_DIR/bulkhead/<profile>/`, `/tmp/bulkhead-<uid>` | `docker.sock`, `control.sock`, `lock` … |

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use super::profile::ProfileName;

/// Longest path of a Unix socket in bytes: `sun_path` holds 108, its terminator included (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Why a profile's folders cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// No home directory is known.
    #[error("neither $HOME nor ${0} is set to an absolute path; set one of them")]
    NoHome(&'static str),
    /// A folder could not be made or looked at.
    #[error("cannot use the folder {path}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The fallback in `/tmp` may have been planted by someone else.
    #[error("{path} {problem}; remove it, or set XDG_RUNTIME_DIR to a folder of your own")]
    Untrusted {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A socket's path does not fit.
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
    /// There is no such profile.
    #[error("there is no profile `{name}`; {known}")]
    UnknownProfile {
        /// The name asked for.
        name: ProfileName,
        /// The profiles that exist, in words.
        known: String,
    },
}

/// The base folders of one person.
#[derive(Clone, Debug)]
pub struct Base {
    config: PathBuf,
    data: PathBuf,
    state: PathBuf,
    cache: PathBuf,
    runtime: PathBuf,
    /// The runtime folder is the one in `/tmp`, where anybody could have put something.
    shared_tmp: bool,
}

impl Base {
    /// Reads the environment of this process.
    pub fn from_environment() -> Result<Self, PathError> {
        Self::from_variables(|name| std::env::var_os(name).map(PathBuf::from), nix::unistd::geteuid().as_raw())
    }

    pub(crate) fn from_variables(variable: impl Fn(&str) -> Option<PathBuf>, uid: u32) -> Result<Self, PathError> {
        // The specification says that relative paths are to be ignored.
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        let under = |name: &'static str, fallback: &str| {
            absolute(name)
                .or_else(|| absolute("HOME").map(|home| home.join(fallback)))
                .map(|path| path.join("bulkhead"))
                .ok_or(PathError::NoHome(name))
        };
        let runtime = absolute("XDG_RUNTIME_DIR").map(|path| path.join("bulkhead"));
        Ok(Self {
            config: under("XDG_CONFIG_HOME", ".config")?,
            data: under("XDG_DATA_HOME", ".local/share")?,
            state: under("XDG_STATE_HOME", ".local/state")?,
            cache: under("XDG_CACHE_HOME", ".cache")?,
            shared_tmp: runtime.is_none(),
            runtime: runtime.unwrap_or_else(|| format!("/tmp/bulkhead-{uid}").into()),
        })
    }

    /// Folder of images that a person or a package put there.
    pub fn data_image(&self) -> PathBuf {
        self.data.join("image")
    }

    /// Folder of the image that `scripts/image` built.
    pub fn cached_image(&self) -> PathBuf {
        self.cache.join("image/current")
    }

    /// The profiles that have files, sorted.
    pub fn profiles(&self) -> Vec<ProfileName> {
        let mut names: Vec<String> = [&self.config, &self.data, &self.state]
            .into_iter()
            .filter_map(|folder| fs::read_dir(folder).ok())
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            // The data folder also holds the images.
            .filter(|name| name != "image")
            .collect();
        names.sort_unstable();
        names.dedup();
        names.iter().filter_map(|name| name.parse().ok()).collect()
    }

    /// The files of one profile; makes nothing.
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
        for socket in [paths.docker_socket(), paths.control_socket(), paths.agent_socket()] {
            let length = socket.as_os_str().len();
            if length > MAX_SOCKET_PATH {
                return Err(PathError::SocketTooLong { path: socket, length });
            }
        }
        Ok(paths)
    }

    /// The same, but the profile must have been used before; the default one always exists.
    pub fn known_profile(&self, name: &ProfileName) -> Result<Paths, PathError> {
        let paths = self.profile(name)?;
        if name.is_default() || paths.exists() {
            return Ok(paths);
        }
        let names: Vec<String> = self.profiles().iter().map(ToString::to_string).collect();
        let known = if names.is_empty() {
            format!("`bulkhead --profile {name} start` makes it")
        } else {
            format!("there are: {}", names.join(", "))
        };
        Err(PathError::UnknownProfile { name: name.clone(), known })
    }
}

/// The files of one profile.
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

    /// The folders shared by all profiles.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// What the person set.
    pub fn settings(&self) -> PathBuf {
        self.config.join("settings.json")
    }

    /// The raw, sparse data disk.
    pub fn data_disk(&self) -> PathBuf {
        self.data.join("data.img")
    }

    /// Marks a profile whose files may be thrown away once nobody uses it.
    pub fn throw_away_marker(&self) -> PathBuf {
        self.data.join("throw-away")
    }

    /// Log of the backend and of the vmm process.
    pub fn backend_log(&self) -> PathBuf {
        self.state.join("backend.log")
    }

    /// The guest's serial port, for those who ask for one.
    pub fn serial_log(&self) -> PathBuf {
        self.console_log().with_file_name("serial.log")
    }

    /// The guest's console.
    pub fn console_log(&self) -> PathBuf {
        self.state.join("console.log")
    }

    /// The Docker API.
    pub fn docker_socket(&self) -> PathBuf {
        self.runtime.join("docker.sock")
    }

    /// The backend's own API.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }

    /// Host end of the hybrid vsock.
    pub fn vsock_socket(&self) -> PathBuf {
        self.runtime.join("vsock.sock")
    }

    /// Where the guest's connections to the agent port arrive.
    pub fn agent_socket(&self) -> PathBuf {
        self.runtime.join(format!("vsock.sock_{}", bulkhead_protocol::AGENT_PORT))
    }

    /// Locked by the running backend; holds its process id.
    pub fn lock(&self) -> PathBuf {
        self.runtime.join("lock")
    }

    /// Folder above the runtime folders of all profiles.
    pub fn runtime_root(&self) -> &Path {
        &self.base.runtime
    }

    /// `DOCKER_HOST` for this profile.
    pub fn docker_host(&self) -> String {
        format!("unix://{}", self.docker_socket().display())
    }

    /// Whether the profile has any files that outlive its backend.
    pub fn exists(&self) -> bool {
        [&self.config, &self.data, &self.state].into_iter().any(|folder| folder.is_dir())
    }

    /// Makes the folders with mode 0700 and checks that the runtime folder is this person's alone.
    pub fn create(&self) -> Result<(), PathError> {
        make(&self.base.runtime)?;
        if self.base.shared_tmp {
            check_owner(&self.base.runtime)?;
        }
        [&self.data, &self.state, &self.runtime].into_iter().try_for_each(|folder| make(folder))
    }

    /// Makes the settings' folder with mode 0700.
    pub fn create_config(&self) -> Result<PathBuf, PathError> {
        make(&self.config)?;
        Ok(self.config.clone())
    }

    /// Removes the runtime folder if nothing is left in it.
    pub fn remove_empty_runtime(&self) {
        let _ = fs::remove_dir(&self.runtime);
    }

    /// Removes every file of the profile.
    pub fn remove_all(&self) -> Result<(), PathError> {
        for folder in [&self.runtime, &self.state, &self.data, &self.config] {
            match fs::remove_dir_all(folder) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(PathError::Folder { path: folder.clone(), source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn make(folder: &Path) -> Result<(), PathError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|source| PathError::Folder { path: folder.to_owned(), source })
}

fn check_owner(folder: &Path) -> Result<(), PathError> {
    let untrusted = |problem| Err(PathError::Untrusted { path: folder.to_owned(), problem });
    let metadata =
        fs::symlink_metadata(folder).map_err(|source| PathError::Folder { path: folder.to_owned(), source })?;
    if !metadata.is_dir() {
        return untrusted("is not a folder");
    }
    if metadata.uid() != nix::unistd::geteuid().as_raw() {
        return untrusted("belongs to somebody else");
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
        assert!(matches!(check_owner(&link), Err(PathError::Untrusted { problem: "is not a folder", .. })));
    }
}
