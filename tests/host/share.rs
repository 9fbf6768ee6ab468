//! Shared directories: the list, what can be on it, and the policy.

use std::{fs, os::unix::fs::symlink, path::PathBuf, process::Output};

use serde_json::{Value, json};
use support::program;

use crate::{
    home::{Home, refused},
    policy::under,
};

fn done(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn list(home: &Home) -> Value {
    serde_json::from_str(&done(&home.bulkhead(&["share", "list", "--format", "json"]))).unwrap()
}

#[test]
fn the_home_directory_is_shared_until_the_list_says_otherwise() {
    let home = Home::new();
    let (me, data) = (home.path(""), home.path("data"));
    let (me, data) = (me.to_str().unwrap().trim_end_matches('/'), data.to_str().unwrap());
    assert_eq!(list(&home), json!([{"path": me, "readOnly": false}]));
    done(&home.bulkhead(&["share", "add", "--read-only", data]));
    assert_eq!(list(&home), json!([{"path": me, "readOnly": false}, {"path": data, "readOnly": true}]));
    // The default keeps its name, so that the file is right for another home as well.
    let file = fs::read_to_string(home.path("config/bulkhead/default/settings.json")).unwrap();
    let expected = json!([{"path": "$HOME", "readOnly": false}, {"path": data, "readOnly": true}]);
    assert_eq!(serde_json::from_str::<Value>(&file).unwrap()["filesharingDirectories"], expected);
    done(&home.bulkhead(&["share", "add", data]));
    assert_eq!(list(&home)[1]["readOnly"], false);
    let shown = done(&home.bulkhead(&["share", "list"]));
    assert!(shown.lines().nth(2).unwrap().ends_with("  read-write  shared"), "{shown}");
    done(&home.bulkhead(&["share", "remove", me, data]));
    assert_eq!(list(&home), json!([]));
    assert_eq!(done(&home.bulkhead(&["share", "list"])), "no shared directories\n");
    done(&home.bulkhead(&["settings", "unset", "filesharingDirectories"]));
    assert_eq!(list(&home), json!([{"path": me, "readOnly": false}]));
}

#[test]
fn a_relative_path_is_the_directory_that_the_shell_shows() {
    let home = Home::new();
    fs::create_dir_all(home.path("work/src")).unwrap();
    symlink("work", home.path("link")).unwrap();
    let add = |directory: &str, path: &str| {
        let mut command = home.command(program());
        command.current_dir(home.path(directory)).env("PWD", home.path(directory)).args(["share", "add", path]);
        done(&command.output().unwrap());
        // Without the home directory, the first of them.
        let all = list(&home);
        all.as_array().unwrap()[1..].iter().map(|one| PathBuf::from(one["path"].as_str().unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(add("link", "."), [home.path("link")]);
    assert_eq!(add("link", "src//"), [home.path("link"), home.path("link/src")]);
    // The second name of a directory takes the place of the first.
    assert_eq!(add("work/src", ".."), [home.path("work").canonicalize().unwrap(), home.path("link/src")]);
}

#[test]
fn what_cannot_be_shared_is_refused_with_the_reason() {
    let home = Home::new();
    let file = home.path("file");
    fs::write(&file, "").unwrap();
    symlink("/proc/sys", home.path("kernel")).unwrap();
    let [missing, file, kernel] =
        ["missing", "file", "kernel"].map(|name| home.path(name).to_str().unwrap().to_owned());
    for (path, expected) in [
        (missing.as_str(), "does not exist; create it first"),
        (file.as_str(), "is not a directory"),
        (kernel.as_str(), "shows the kernel and the devices of this machine"),
        ("/proc", "shows the kernel"),
        ("/sys/kernel", "shows the kernel"),
        ("/dev/shm", "shows the kernel"),
        ("/", "cannot be shared as a whole"),
        ("../missing", "cannot find the directory ../missing"),
    ] {
        let message = refused(&home.bulkhead(&["share", "add", path]), 1);
        assert!(message.contains(path) && message.contains(expected), "{message}");
    }
    assert!(!home.path("config/bulkhead/default/settings.json").exists());
    let message = refused(&home.bulkhead(&["share", "remove", &file]), 1);
    assert!(message.contains("is shared as a part of $HOME"), "{message}");
    assert!(refused(&home.bulkhead(&["share", "remove", "/srv"]), 1).contains("/srv is not shared"));
    assert_eq!(home.bulkhead(&["share", "add"]).status.code(), Some(2));
    for value in ["/srv", "[\"/srv\"]", "[{\"path\": \"srv\"}]", "[{\"path\": \"/a/../b\"}]"] {
        let message = refused(&home.bulkhead(&["settings", "set", "filesharingDirectories", value]), 1);
        assert!(message.contains("must be a JSON list such as"), "{message}");
    }
}

#[test]
fn a_directory_that_is_gone_stays_on_the_list_with_the_reason_and_can_be_removed() {
    let home = Home::new();
    let gone = home.path("gone");
    fs::create_dir(&gone).unwrap();
    let gone = gone.to_str().unwrap();
    done(&home.bulkhead(&["share", "add", gone]));
    fs::remove_dir(gone).unwrap();
    let problem = list(&home)[1]["problem"].as_str().unwrap().to_owned();
    assert!(problem.contains("does not exist"), "{problem}");
    let shown = done(&home.bulkhead(&["share", "list"]));
    assert!(shown.contains("not shared: the directory"), "{shown}");
    let doctor = String::from_utf8(home.bulkhead(&["doctor"]).stdout).unwrap();
    let line = doctor.lines().find(|line| line.contains(" shares: ")).unwrap();
    assert!(line.contains(" FAIL shares: ") && line.contains("bulkhead share remove"), "{line}");
    done(&home.bulkhead(&["share", "remove", gone]));
    assert_eq!(list(&home).as_array().unwrap().len(), 1);
}

#[test]
fn a_policy_limits_the_list_and_gives_its_default() {
    let home = Home::new();
    for name in ["mine", "mine/src", "other"] {
        fs::create_dir(home.path(name)).unwrap();
    }
    let [mine, source, other] = ["mine", "mine/src", "other"].map(|name| home.path(name).to_str().unwrap().to_owned());
    let policy = json!({"filesharingAllowedDirectories": [
        {"path": mine, "sharedByDefault": false}, {"path": source, "sharedByDefault": true}]});
    let run = |arguments: &[&str]| Some(under(&home, &policy.to_string())?.args(arguments).output().unwrap());
    let Some(output) = run(&["share", "list", "--format", "json"]) else { return };
    assert_eq!(serde_json::from_str::<Value>(&done(&output)).unwrap(), json!([{"path": source, "readOnly": false}]));
    let message = refused(&run(&["share", "add", &other]).unwrap(), 1);
    let expected = format!(
        "error: {other} cannot be shared: /etc/bulkhead/admin-settings.json allows only {mine}, {source}, and what is \
         below\n"
    );
    assert_eq!(message, expected);
    done(&run(&["share", "add", &mine]).unwrap());
    // Set without the check of the verb, it has no effect.
    let value = json!([{"path": other}]).to_string();
    done(&run(&["settings", "set", "filesharingDirectories", &value]).unwrap());
    let shown = done(&run(&["share", "list"]).unwrap());
    assert!(shown.contains("not shared: ") && shown.contains("allows only"), "{shown}");
    let shown = done(&run(&["policy", "show"]).unwrap());
    let line = shown.lines().find(|line| line.starts_with("filesharingAllowedDirectories")).unwrap();
    assert!(line.ends_with("  -       in force"), "{line}");
}
