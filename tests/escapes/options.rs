//! Options of docker that would share something of the VM.

use std::{fs, os::unix::fs::PermissionsExt, thread};

use support::{
    engine::Engine,
    process::{COMMAND, Ran, run},
};

use crate::{
    IMAGE, build, probe,
    table::{self, Column, Outcome, Table},
};

/// Commands that run at once.
const AT_ONCE: usize = 3;

/// The sign that an option had its effect.
#[derive(Clone, Copy)]
enum Sign {
    /// One of these attempts of the probe is open.
    Attempts(&'static [&'static str]),
    /// The container runs at all.
    Runs,
    /// The shell line succeeds in it.
    Shell(&'static str),
}

/// Name in the table, options, sign.
const OPTIONS: &[(&str, &[&str], Sign)] = &[
    ("-v docker.sock", &["-v", "/var/run/docker.sock:/run/docker.sock"], Sign::Attempts(&["engine sockets"])),
    ("-v the engine's own socket", &["-v", "/run/bulkhead/engine:/bulkhead"], Sign::Attempts(&["engine sockets"])),
    ("-v /run", &["-v", "/run:/run-of-vm"], Sign::Attempts(&["engine sockets"])),
    ("-v /", &["-v", "/:/host"], Sign::Attempts(&["engine sockets"])),
    // Read-only in the VM: the engine empties a volume that it removes.
    (
        "a volume of the VM's /usr",
        &["--mount", "type=volume,dst=/host,volume-opt=type=none,volume-opt=o=bind,volume-opt=device=/usr"],
        Sign::Shell("test -x /host/sbin/bulkhead-init"),
    ),
    ("--pid=host", &["--pid=host"], Sign::Attempts(&["foreign processes", "foreign roots", "foreign namespaces"])),
    ("--network=host", &["--network=host"], Sign::Attempts(&["abstract sockets", "listeners"])),
    ("--ipc=host", &["--ipc=host"], Sign::Runs),
    ("--uts=host", &["--uts=host"], Sign::Runs),
    ("--userns=host", &["--userns=host"], Sign::Attempts(&["foreign ids", "wide id map"])),
    ("--cgroupns=host", &["--cgroupns=host"], Sign::Attempts(&["cgroup limits", "release_agent"])),
    ("--runtime=runc", &["--runtime=runc"], Sign::Attempts(&["foreign ids"])),
    ("--runtime=io.containerd.runc.v2", &["--runtime=io.containerd.runc.v2"], Sign::Attempts(&["foreign ids"])),
    ("--runtime=PATH", &["--runtime=/usr/libexec/bulkhead/crun"], Sign::Attempts(&["foreign ids"])),
    ("--device=/dev/vdb", &["--device=/dev/vdb"], Sign::Attempts(&["block devices"])),
    (
        "--device-cgroup-rule",
        &["--device-cgroup-rule=b *:* rwm", "--cap-add=MKNOD"],
        Sign::Attempts(&["block devices"]),
    ),
    (
        "--sysctl=kernel.core_pattern",
        &["--sysctl=kernel.core_pattern=|/bin/true"],
        Sign::Shell("grep -q /bin/true /proc/sys/kernel/core_pattern"),
    ),
    ("--oom-score-adj=-1000", &["--oom-score-adj=-1000"], Sign::Shell("grep -qx -- -1000 /proc/self/oom_score_adj")),
];

/// Tries each option in each column.
pub fn try_all(engine: &Engine, table: &mut Table, columns: &[Column]) {
    let all: Vec<_> = columns.iter().flat_map(|column| OPTIONS.iter().map(move |option| (*column, option))).collect();
    for some in all.chunks(AT_ONCE) {
        let outcomes: Vec<_> = thread::scope(|scope| {
            let running: Vec<_> =
                some.iter().map(|(column, option)| scope.spawn(|| attempt(engine, *column, option))).collect();
            running.into_iter().map(|running| running.join().unwrap()).collect()
        });
        for ((column, (name, ..)), outcome) in some.iter().zip(outcomes) {
            table.set(*column, name, outcome);
        }
    }
    let column = columns[0];
    table.set(column, "build --network=host", ran(build(engine, &["--network=host"]), |ran| Outcome::Open(ran.stdout)));
    table.set(column, "a plugin with all rights", plugin(engine));
    table.set(column, "runtime overwrite", overwrite(engine));
}

fn attempt(engine: &Engine, column: Column, (_, options, sign): &(&str, &[&str], Sign)) -> Outcome {
    let mut arguments = vec!["run", "--rm"];
    arguments.extend(*options);
    if column.privileged() {
        arguments.push("--privileged");
    }
    match sign {
        Sign::Attempts(names) => {
            arguments.extend([IMAGE, "only"]);
            arguments.extend(*names);
        }
        Sign::Runs => arguments.extend(["alpine", "true"]),
        Sign::Shell(line) => arguments.extend(["alpine", "sh", "-c", line]),
    }
    let ended = run(engine.home.docker_command(&arguments), COMMAND);
    ran(ended, |ended| match sign {
        Sign::Attempts(_) => {
            let lines = table::lines(&ended.stdout);
            table::any(lines.iter().map(|(name, outcome)| (name.as_str(), outcome)))
        }
        _ => Outcome::Open("it had its effect".into()),
    })
}

/// The refusal of a command that failed, or the outcome of one that did not.
fn ran(ran: Ran, succeeded: impl FnOnce(Ran) -> Outcome) -> Outcome {
    if ran.status.success() {
        return succeeded(ran);
    }
    let words = ran.stderr.lines().find(|line| line.contains("rror")).unwrap_or(&ran.stderr);
    let short = words.rsplit("OCI runtime create failed: ").next().unwrap_or(words);
    Outcome::Refused(format!("{}: {short}", ran.status))
}

/// Installs a managed plugin. The engine grants all that its configuration asks for: here the VM's network, a directory
/// of the VM and all devices.
fn plugin(engine: &Engine) -> Outcome {
    let directory = engine.home.path("plugin");
    let root = directory.join("rootfs");
    fs::create_dir_all(&root).unwrap();
    fs::copy(probe(), root.join("probe")).unwrap();
    fs::set_permissions(root.join("probe"), fs::Permissions::from_mode(0o755)).unwrap();
    let configuration = serde_json::json!({
        "description": "escape", "documentation": "", "workDir": "/", "user": {},
        "entrypoint": ["/probe", "victim"],
        "interface": { "types": ["docker.volumedriver/1.0"], "socket": "escape.sock" },
        "network": { "type": "host" }, "propagatedMount": "",
        "mounts": [{
            "name": "host", "description": "", "source": "/etc", "destination": "/host", "type": "bind",
            "options": ["bind"], "settable": null
        }],
        "env": [], "args": { "name": "", "description": "", "settable": null, "value": [] },
        "linux": { "capabilities": ["CAP_SYS_ADMIN"], "allowAllDevices": true, "devices": [] },
    });
    fs::write(directory.join("config.json"), configuration.to_string()).unwrap();
    engine.docker(&["plugin", "rm", "--force", "escape"]);
    let made = engine.docker(&["plugin", "create", "escape", directory.to_str().unwrap()]);
    if !made.status.success() {
        return ran(made, |_| Outcome::Open(String::new()));
    }
    let enabled = engine.docker(&["plugin", "enable", "--timeout=10", "escape"]);
    engine.docker(&["plugin", "rm", "--force", "escape"]);
    let refused = enabled.stderr.contains("error in the container spec") || enabled.stderr.contains("isolation");
    // The plugin never opens its socket: the engine's complaint about that says that it ran.
    if refused { ran(enabled, |_| Outcome::Open(String::new())) } else { Outcome::Open(enabled.stderr) }
}

/// CVE-2019-5736: a process of the container waits for the runtime, which comes in with each exec.
fn overwrite(engine: &Engine) -> Outcome {
    engine.docker(&["rm", "--force", "overwrite"]);
    engine.docker(&["run", "--detach", "--name=overwrite", "--cap-add=ALL", IMAGE, "overwrite", "15"]).ok();
    for _ in 0..4 {
        engine.docker(&["exec", "overwrite", "/bin/true"]);
    }
    engine.docker(&["wait", "overwrite"]).ok();
    let lines = table::lines(&engine.docker(&["logs", "overwrite"]).ok());
    engine.docker(&["rm", "--force", "overwrite"]).ok();
    table::any(lines.iter().map(|(name, outcome)| (name.as_str(), outcome)))
}
