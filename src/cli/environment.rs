//! Environment variables in files: those that `run --env-file` gives to its command, and those that lead other programs
//! to the engine, for the file of a CI system such as `$GITHUB_ENV`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::CliError;
use crate::settings::Paths;

/// Longest file of variables that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// A file of variables that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnvironmentError {
    #[error("cannot use the file of variables {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path}: {problem}")]
    Invalid { path: PathBuf, problem: String },
    #[error(
        "{name} cannot be written to {path}, because its value has a line break; set XDG_RUNTIME_DIR to a plain path"
    )]
    LineBreak { name: &'static str, path: PathBuf },
}

/// The variables that lead a program to the engine of a profile, and to the profile itself.
pub(super) fn variables(paths: &Paths) -> [(&'static str, String); 2] {
    [("DOCKER_HOST", paths.docker_host()), ("BULKHEAD_PROFILE", paths.name().to_string())]
}

/// Appends the variables of a profile to a file, a line `NAME=value` for each, as GitHub Actions and dotenv files have
/// them.
pub(super) fn publish(paths: &Paths, file: &Path) -> Result<(), CliError> {
    let io_error = |source| EnvironmentError::Io { path: file.to_owned(), source };
    let mut text = String::new();
    for (name, value) in variables(paths) {
        // A second line would be another variable.
        if value.contains(['\n', '\r']) {
            return Err(EnvironmentError::LineBreak { name, path: file.to_owned() }.into());
        }
        text.extend([name, "=", &value, "\n"]);
    }
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(file).map_err(io_error)?;
    if is_in_a_line(&mut file).map_err(io_error)? {
        text.insert(0, '\n');
    }
    // In one write, so that lines of several writers do not mix.
    file.write_all(text.as_bytes()).map_err(io_error)?;
    Ok(())
}

/// Returns whether the last line of a file has no end.
fn is_in_a_line(file: &mut File) -> io::Result<bool> {
    let mut last = [b'\n'];
    // A pipe or terminal has no end to look at.
    if file.metadata()?.is_file() && file.seek(SeekFrom::End(0))? > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    Ok(last != [b'\n'])
}

/// Reads files in the form of `docker run --env-file`; a later variable replaces an earlier one of the same name.
pub(super) fn read(files: &[PathBuf]) -> Result<Vec<(String, String)>, CliError> {
    let mut all = Vec::new();
    for path in files {
        let io_error = |source| EnvironmentError::Io { path: path.clone(), source };
        let mut bytes = Vec::new();
        File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes)).map_err(io_error)?;
        let invalid = |problem| EnvironmentError::Invalid { path: path.clone(), problem };
        if bytes.len() as u64 > MAX_FILE {
            return Err(invalid("the file is larger than 1 MiB".to_owned()).into());
        }
        all.extend(parse(&bytes, |name| std::env::var(name).ok()).map_err(invalid)?);
    }
    Ok(all)
}

/// Parses lines `NAME=value`, with the value as it is, and `NAME`, whose value `inherited` has. Empty lines and those
/// that start with `#` are skipped.
fn parse(bytes: &[u8], inherited: impl Fn(&str) -> Option<String>) -> Result<Vec<(String, String)>, String> {
    // Editors of Windows begin files with this mark; docker skips it, too.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut variables = Vec::new();
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        // Values may be secrets: messages have the number of the line and the name at most.
        let line = str::from_utf8(line).map_err(|_| format!("line {number} is not UTF-8"))?;
        let line = line.strip_suffix('\r').unwrap_or(line).trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, value) = line.split_once('=').map_or((line, None), |(name, value)| (name, Some(value)));
        if name.is_empty() {
            return Err(format!("line {number} has no name before the ="));
        }
        if name.contains(char::is_whitespace) {
            return Err(format!("line {number} has a name with white space; write NAME=value"));
        }
        if line.contains('\0') {
            return Err(format!("line {number} has a NUL character"));
        }
        if let Some(value) = value.map(ToOwned::to_owned).or_else(|| inherited(name)) {
            variables.push((name.to_owned(), value));
        }
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use proptest::prelude::*;

    use super::*;
    use crate::settings::Base;

    fn parsed(text: &str) -> Result<Vec<(String, String)>, String> {
        parse(text.as_bytes(), |name| (name == "SET").then(|| "here".to_owned()))
    }

    #[test]
    fn a_file_is_read_as_docker_reads_it() {
        let text = "\u{feff}A=1\n# B=2\n\n  C = x y \r\nD=\"q\"=r\nSET\nUNSET\nE=";
        assert!(parsed(text).unwrap_err().starts_with("line 4 has a name with white space"));
        let text = text.replace("C = x y ", "C= x y ");
        let expected = [("A", "1"), ("C", " x y "), ("D", "\"q\"=r"), ("SET", "here"), ("E", "")];
        assert_eq!(parsed(&text).unwrap(), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn an_error_names_the_line_and_never_the_value() {
        for (text, expected) in [
            ("A=1\n=s3cret", "line 2 has no name"),
            ("A B=s3cret", "line 1 has a name with white space"),
            ("A=s3cret\0", "line 1 has a NUL"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.starts_with(expected) && !error.contains("s3cret"), "{error}");
        }
        assert_eq!(parse(b"A=\xff", |_| None).unwrap_err(), "line 1 is not UTF-8");
    }

    fn paths(runtime: &str) -> Paths {
        let variable = |name: &str| match name {
            "XDG_RUNTIME_DIR" => Some(runtime.into()),
            _ => Some("/h".into()),
        };
        Base::from_variables(variable, 1000).unwrap().profile(&"ci".parse().unwrap()).unwrap()
    }

    #[test]
    fn variables_are_appended_in_lines_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("env");
        let expected = "DOCKER_HOST=unix:///r/bulkhead/ci/docker.sock\nBULKHEAD_PROFILE=ci\n";
        publish(&paths("/r"), &file).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), expected);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&file, "A=1").unwrap();
        publish(&paths("/r"), &file).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("A=1\n{expected}"));
    }

    #[test]
    fn a_path_with_a_line_break_adds_no_variable_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("env");
        let error = publish(&paths("/r\nPATH=/evil"), &file).unwrap_err();
        assert!(error.to_string().contains("has a line break"), "{error}");
        assert!(!file.exists());
    }

    proptest! {
        #[test]
        fn no_file_makes_the_parser_panic_and_every_name_can_be_set(
            bytes in prop::collection::vec(any::<u8>(), 0..200)
        ) {
            for (name, value) in parse(&bytes, |_| None).unwrap_or_default() {
                prop_assert!(!name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'));
            }
        }
    }
}
