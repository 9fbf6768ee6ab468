//! Ways out of the directories that the host shares: what a container tries, and what a client names as a source.
//!
//! The host looks at its own files afterwards. That the attempts are real is shown by the same program on the
//! directories themselves, with no wall in between: there each of them succeeds.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use rustix::fs::{CWD, RenameFlags, lgetxattr, renameat_with};
use serde_json::json;
use support::{
    engine::{self, Engine, ISOLATION, Isolation, shell},
    process::{COMMAND, run},
    tree::files,
};

use crate::{
    IMAGE, probe,
    table::{self, Column, Outcome, Table},
};

/// Start of every file that may not be reached, as the probe knows it.
const SECRET: &str = "secret of the host";

/// Attempts of the probe that only root of a machine can make where no wall is.
const NEEDS_ROOT: &[&str] =
    &["device on the host", "capability on the host", "attribute of the system on the host", "owner on the host"];

/// The directories of the attempts.
struct Ground {
    /// Shared for writing; Bulkhead's own directories lie in it.
    root: PathBuf,
    /// Not shared.
    outside: PathBuf,
    /// Shared, and mounted in no container.
    other: PathBuf,
    /// Bulkhead's own, in the first.
    own: &'static [&'static str],
}

impl Ground {
    /// Of the engine's home, whose settings, disk, logs and sockets are Bulkhead's own.
    fn of_engine() -> Self {
        let home = engine::home();
        let root = fs::canonicalize(home.path(".")).unwrap();
        let own = &["config/bulkhead", "data/bulkhead", "state/bulkhead", "run/bulkhead"];
        let ground = Self { root, outside: home.beside("outside"), other: home.beside("other"), own };
        for directory in [&ground.root.join("fixed"), &ground.outside, &ground.other] {
            fs::create_dir_all(directory).unwrap();
        }
        ground
    }

    /// Of nobody.
    fn bare() -> Self {
        let home = engine::home();
        let [root, outside, other] = ["bare", "bare-outside", "bare-other"].map(|name| home.beside(name));
        for (directory, file) in [("config/bulkhead/default", "settings.json"), ("data/bulkhead/default", "data.img")] {
            fs::create_dir_all(root.join(directory)).unwrap();
            fs::write(root.join(directory).join(file), "{}").unwrap();
        }
        Self { root, outside, other, own: &["config/bulkhead", "data/bulkhead"] }
    }

    /// Puts secrets, traps and a read-only share into place, instead of what an earlier run left.
    fn plant(&self) {
        let at = |path: &str| self.root.join(path);
        for directory in [&at("planted"), &at("work")] {
            let _ = fs::remove_dir_all(directory);
        }
        // The directories that are shared stay the same.
        for directory in [&self.outside, &self.other, &at("fixed")] {
            fs::create_dir_all(directory).unwrap();
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
            }
        }
        let write = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        };
        for path in ["secret", "deep/secret", "deep/kept"] {
            write(self.outside.join(path), &format!("{SECRET}: {path}"));
        }
        write(self.outside.join("Dockerfile"), "FROM alpine\nLABEL secret=1");
        write(self.other.join("secret"), &format!("{SECRET}: another share"));
        for path in ["file", "mapped", "sub/file", "sub/victim"] {
            write(at("fixed").join(path), &"as it was ".repeat(600));
        }
        fs::create_dir_all(at("fixed/empty")).unwrap();
        write(at("planted/turn/deep/secret"), "public");
        write(at("planted/inside/secret"), &format!("{SECRET}, which is shared"));
        fs::create_dir_all(at("planted/bind")).unwrap();
        let below_root = self.outside.strip_prefix("/").unwrap();
        for (name, target) in [
            ("absolute", self.outside.clone()),
            ("turn-link", self.outside.clone()),
            ("relative", Path::new(&"../".repeat(12)).join(below_root)),
            ("process", Path::new("/proc/self/root").join(below_root)),
            ("file", self.outside.join("secret")),
            ("own", at(self.own[0])),
        ] {
            symlink(target, at("planted").join(name)).unwrap();
        }
        for (name, file) in
            [("settings", "config/bulkhead/default/settings.json"), ("disk", "data/bulkhead/default/data.img")]
        {
            fs::hard_link(at(file), at(&format!("planted/hard-{name}"))).unwrap();
        }
    }

    /// Makes `planted/turn` a directory and a link to the secret by turns, until the body ends.
    fn while_it_turns<T>(&self, body: impl FnOnce() -> T) -> T {
        let ended = Arc::new(AtomicBool::new(false));
        let (flag, planted) = (Arc::clone(&ended), self.root.join("planted"));
        let turning = thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                let names = [planted.join("turn"), planted.join("turn-link")];
                renameat_with(CWD, &names[0], CWD, &names[1], RenameFlags::EXCHANGE).unwrap();
                // The process that should lose the race needs the processor as well.
                thread::sleep(std::time::Duration::from_micros(200));
            }
        });
        let result = body();
        ended.store(true, Ordering::Relaxed);
        turning.join().unwrap();
        result
    }

    /// The probe's arguments, for these mounts of the read-only share and of `planted/bind`.
    fn words(&self, fixed: &Path, bind: &Path) -> Vec<String> {
        let places = [&self.root, fixed, bind, &self.outside, &self.other].map(|path| path.display().to_string());
        let own = self.own.iter().map(|own| (*own).to_owned());
        ["shares".to_owned()].into_iter().chain(places).chain(own).collect()
    }

    /// Runs the probe, and looks at the host's files afterwards.
    fn attempts(&self, table: &mut Table, column: Column, probe: impl FnOnce() -> String) {
        self.plant();
        let before = [&self.outside, &self.root.join("fixed")].map(|path| contents(path));
        let lines = table::lines(&self.while_it_turns(probe));
        assert!(lines.len() > 20, "the probe ended early: {lines:?}");
        table.extend(column, lines);
        let after = [&self.outside, &self.root.join("fixed")].map(|path| contents(path));
        let changed = |at: usize| {
            let names = |one: &Contents, other: &Contents| {
                let differs = one.iter().filter(|(path, state)| other.get(*path) != Some(*state));
                differs.map(|(path, _)| path.display().to_string()).collect::<Vec<_>>()
            };
            let mut changed = [names(&before[at], &after[at]), names(&after[at], &before[at])].concat();
            changed.dedup();
            if changed.is_empty() { Outcome::Refused("as before".into()) } else { Outcome::Open(changed.join(" ")) }
        };
        table.set(column, "files changed outside", changed(0));
        table.set(column, "files changed in a read-only share", changed(1));
        for (name, found) in self.made() {
            table.set(column, name, found.map_or(Outcome::Refused("an ordinary file".into()), Outcome::Open));
        }
    }

    /// The files of the probe that are something dangerous on the host, by their rows.
    fn made(&self) -> Vec<(&'static str, Option<String>)> {
        let at = |name: &str| self.root.join("work/made").join(name);
        let stat = |name: &str| fs::symlink_metadata(at(name)).ok();
        let attribute = |file: &str, name: &str| {
            let mut value = [0; 64];
            lgetxattr(at(file), name, &mut value).ok().map(|len| (name.to_owned(), value[..len].to_vec()))
        };
        let bits = stat("set-user-id").map(|stat| stat.mode() & 0o6000).filter(|bits| *bits != 0);
        let is_device = |stat: &fs::Metadata| stat.file_type().is_char_device() || stat.file_type().is_block_device();
        let device = ["null", "disk"].into_iter().find(|name| stat(name).is_some_and(|stat| is_device(&stat)));
        let of_system = attribute("trusted", "trusted.escape").or_else(|| attribute("security", "security.escape"));
        let forged = attribute("record", "user.bulkhead.owner").filter(|(_, value)| value == b"x");
        let owner = stat("owner").map(|stat| stat.uid()).filter(|uid| *uid == 4321);
        vec![
            ("set-user-id program on the host", bits.map(|bits| format!("{bits:o}"))),
            ("device on the host", device.map(str::to_owned)),
            ("capability on the host", attribute("capability", "security.capability").map(|(name, _)| name)),
            ("attribute of the system on the host", of_system.map(|(name, _)| name)),
            ("record of an owner that a container writes", forged.map(|(name, _)| name)),
            ("owner on the host", owner.map(|uid| uid.to_string())),
        ]
    }
}

/// Files with their modes, owners, numbers of links and bytes. Times change when a file is read.
type Contents = BTreeMap<PathBuf, ((u32, u32, u64), Vec<u8>)>;

fn contents(directory: &Path) -> Contents {
    files(directory, |stat| (stat.mode(), stat.uid(), stat.nlink()))
}

/// The engine with the shares of [`Ground::of_engine`]; the other tests run in it as well.
pub fn engine(isolation: Isolation) -> Engine {
    let Ground { root, other, .. } = Ground::of_engine();
    let list = json!([{"path": root}, {"path": root.join("fixed"), "readOnly": true}, {"path": other}]).to_string();
    let isolated = if isolation == Isolation::Off { "false" } else { "true" };
    engine::engine_with(&[(ISOLATION, isolated), ("filesharingDirectories", &list)])
}

/// The probe in containers that have the shares, as they are and privileged.
pub fn in_containers(engine: &Engine, table: &mut Table, columns: [Column; 2]) {
    let ground = Ground::of_engine();
    let mounts = [
        format!("--volume={0}:{0}", ground.root.display()),
        format!("--volume={}:/fixed", ground.root.join("fixed").display()),
        format!("--volume={}:/bind", ground.root.join("planted/bind").display()),
    ];
    for (column, privileged) in columns.into_iter().zip([None, Some("--privileged")]) {
        ground.attempts(table, column, || {
            let mut words: Vec<String> = ["run", "--rm"].map(Into::into).into();
            words.extend(mounts.iter().cloned());
            words.extend(privileged.map(Into::into));
            words.push(IMAGE.into());
            words.extend(ground.words(Path::new("/fixed"), Path::new("/bind")));
            engine.docker(&words.iter().map(String::as_str).collect::<Vec<_>>()).ok()
        });
    }
}

/// The probe on the directories themselves. Everything that it prints has to be open.
pub fn without_a_wall(table: &mut Table) {
    let ground = Ground::bare();
    fs::set_permissions(&ground.root, fs::Permissions::from_mode(0o755)).unwrap();
    ground.attempts(table, Column::NoWall, || {
        let mut command = Command::new(probe());
        command.args(ground.words(&ground.root.join("fixed"), &ground.root.join("planted/bind")));
        run(command, COMMAND).ok()
    });
}

/// Judges the table: nothing is open in a container, and everything is where no wall is.
pub fn judge(table: &Table, columns: &[Column]) {
    let real = table.names(Column::NoWall);
    for column in columns {
        let names = real.iter().copied().chain(table.names(*column));
        table.judge_requests(*column, names.map(|name| (name, false)));
    }
    let is_root = nix::unistd::geteuid().is_root();
    let real = real.iter().filter(|name| is_root || !NEEDS_ROOT.contains(*name));
    table.judge_requests(Column::NoWall, real.map(|name| (*name, true)));
}

/// Name in the table, and a line of shell that succeeds if the attempt does.
///
/// `reads OPTION…` and `raw JSON` make a container, start it, and look for a secret in its /m.
const SOURCES: &[(&str, &str)] = &[
    (
        "a path outside as a source",
        "reads -v $OUT:/m || reads --mount type=bind,src=$OUT,dst=/m || reads -v /host_mnt$OUT:/m || \
         reads -v /proc/1/root$OUT:/m",
    ),
    (
        ".. in a source",
        "for from in $ROOT/../$BESIDE/outside $ROOT/planted/../../$BESIDE/outside /host_mnt$ROOT/../$BESIDE/outside \
         $ROOT/planted/absolute/../outside $ROOT/config/../config/bulkhead; do
             raw \"\\\"Binds\\\":[\\\"$from:/m\\\"]\" && exit
             raw \"\\\"Mounts\\\":[{\\\"Type\\\":\\\"bind\\\",\\\"Source\\\":\\\"$from\\\",\\\"Target\\\":\\\"/m\\\"}]\" && exit
         done; exit 1",
    ),
    (
        "a link as a source",
        "for link in absolute relative process file absolute/deep; do
             reads -v $ROOT/planted/$link:/m && exit
         done; exit 1",
    ),
    (
        "Bulkhead's own files as a source",
        "for from in $ROOT/config/bulkhead $ROOT//config/./bulkhead/ /host_mnt$ROOT/data/bulkhead $ROOT/run/bulkhead/default \
         $ROOT/planted/own $ROOT/planted/hard-settings $ROOT/config/bulkhead/default/settings.json; do
             reads -v $from:/m && exit
         done; reads --mount type=bind,src=$ROOT/planted/hard-disk,dst=/m",
    ),
    (
        "a volume of a path outside",
        "trap 'docker volume rm --force outside' EXIT
         for from in $OUT $ROOT/planted/absolute $ROOT/../$BESIDE/outside $ROOT/config/bulkhead; do
             docker volume create -o type=none -o o=bind -o device=$from outside >/dev/null || continue
             reads -v outside:/m && exit
             docker volume rm outside >/dev/null
         done; exit 1",
    ),
    (
        "a subpath of a volume",
        "trap 'docker volume rm --force planted' EXIT
         docker volume create -o type=none -o o=bind -o device=$ROOT/planted planted >/dev/null
         for below in absolute relative process turn/../../../$BESIDE/outside own; do
             reads --mount type=volume,src=planted,dst=/m,volume-subpath=$below && exit
         done; exit 1",
    ),
    (
        "a target through a link",
        "docker run --rm -v $ROOT:/s -v $ROOT/planted/inside:/s/planted/absolute/made-bind \
             --tmpfs /s/planted/relative/made-tmpfs -w /s/planted/process/made-work alpine true || true
         find $OUT | grep made",
    ),
    (
        "docker cp through a link",
        "docker create --name src -v $ROOT:/s alpine true >/dev/null; echo x >mark
         docker cp src:/s/planted/inside/secret - | grep -a \"$MARKS\" >&2 || { echo control; exit; }
         for link in absolute relative process; do
             docker cp src:/s/planted/$link/secret - | grep -a \"$MARKS\" && exit
             docker cp mark src:/s/planted/$link/made-copy || true
         done
         docker cp -L src:/s/planted/file - | grep -a \"$MARKS\" && exit
         find $OUT | grep made",
    ),
    (
        "docker cp into a read-only share",
        "docker create --name src -v $ROOT:/s -v $ROOT/fixed:/f alpine true >/dev/null; echo x >mark
         docker cp mark src:/s/fixed/made-copy || true; docker cp mark src:/f/made-copy || true
         docker cp mark src:/f/file || true; find $ROOT/fixed | grep made || grep x $ROOT/fixed/file",
    ),
    (
        "docker cp of Bulkhead's own files",
        "docker create --name src -v $ROOT:/s alpine true >/dev/null; echo x >mark
         for own in config/bulkhead data/bulkhead planted/hard-settings; do docker cp src:/s/$own - >copied && exit; done
         docker cp mark src:/s/config/bulkhead/made-copy || true; find $ROOT/config | grep made",
    ),
    (
        "a build of a host's path",
        "for from in $OUT file://$OUT $ROOT/planted/inside; do
             curl -sS --unix-socket \"$SOCKET\" -X POST \"http://localhost/build?remote=$from\" | grep 'Successfully built' && exit
         done; exit 1",
    ),
    (
        "a service with a path outside",
        "trap 'docker service rm src || true; docker swarm leave --force' EXIT
         docker swarm init --advertise-addr 127.0.0.1 >/dev/null
         docker service create --detach --name src --mount type=bind,src=$OUT,dst=/m alpine true",
    ),
    (
        "secrets and configs of compose",
        "trap 'docker compose --project-name escape down' EXIT
         echo \"{services: {src: {image: alpine, command: cat /c /run/secrets/s, configs: [{source: c, target: /c}], \
             secrets: [s]}}, configs: {c: {file: $OUT/secret}}, secrets: {s: {file: $ROOT/planted/file}}}\" >compose.yaml
         docker compose --project-name escape run --rm src | grep \"$MARKS\"",
    ),
    (
        "a source that is swapped before the start",
        "for target in $OUT $ROOT/config/bulkhead; do
             rm -rf $ROOT/planted/swap; mkdir $ROOT/planted/swap
             docker create --name src -v $ROOT/planted/swap:/m alpine sh -c \"$LOOK\" >/dev/null
             rmdir $ROOT/planted/swap; ln -s $target $ROOT/planted/swap
             started && exit
         done; exit 1",
    ),
    (
        "a source that is swapped all the time",
        "for round in 1 2 3; do reads -v $ROOT/planted/turn:/m && exit; reads -v $ROOT/planted/turn/deep:/m && exit; done; exit 1",
    ),
];

/// The functions of the lines. A container that is refused costs no start.
const FUNCTIONS: &str = r#"
LOOK='cat /m /m/secret /m/deep/secret 2>/dev/null; find /m -name settings.json -o -name data.img -o -name docker.sock'
MARKS='secret of the host\|settings.json\|data.img\|docker.sock\|filesharingDirectories'
started() { local found=0; docker start -a src | grep "$MARKS" || found=1; docker rm -f src >/dev/null; return $found; }
reads() { docker create --name src "$@" alpine sh -c "$LOOK" >/dev/null && started; }
raw() {
    local body="{\"Image\":\"alpine\",\"Cmd\":[\"sh\",\"-c\",\"$LOOK\"],\"HostConfig\":{$1}}" json='Content-Type: application/json'
    curl -sS --unix-socket "$SOCKET" -H "$json" -d "$body" -o raw "http://localhost/containers/create?name=src"
    cat raw >&2; grep -q '"Id"' raw && started
}
export DOCKER_CONTEXT=bulkhead; cd "$SCRATCH"
"#;

/// Names sources to the engine, with isolation on.
pub fn as_sources(engine: &Engine, table: &mut Table, column: Column) {
    let ground = Ground::of_engine();
    ground.plant();
    let scratch = engine.home.path("sources");
    fs::create_dir_all(&scratch).unwrap();
    let beside = ground.outside.parent().unwrap();
    let head = format!(
        "ROOT={} OUT={} BESIDE={} SOCKET={} SCRATCH={}\n{FUNCTIONS}",
        ground.root.display(),
        ground.outside.display(),
        beside.file_name().unwrap().display(),
        engine.home.docker_socket().display(),
        scratch.display()
    );
    let line = |text: &str| shell(engine.home, &format!("{head}{text}"), COMMAND * 2);
    let clean_up = "curl -sS --unix-socket \"$SOCKET\" -X DELETE 'http://localhost/containers/src?force=1' >/dev/null";
    // The lines find a secret that is shared.
    let control = line("reads -v $ROOT/planted/inside:/m");
    assert!(control.status.success() && control.stdout.contains(SECRET), "{control:?}");
    let before = contents(&ground.outside);
    ground.while_it_turns(|| {
        for (name, attempt) in SOURCES {
            let ended = line(attempt);
            let outcome = if ended.status.success() {
                Outcome::Open(ended.stdout.lines().last().unwrap_or("it had its effect").to_owned())
            } else {
                Outcome::Refused(ended.stderr.lines().last().unwrap_or("no effect").to_owned())
            };
            table.set(column, name, outcome);
            line(clean_up);
        }
    });
    let same = contents(&ground.outside) == before;
    let outcome = if same { Outcome::Refused("as before".into()) } else { Outcome::Open("files differ".into()) };
    table.set(column, "files outside after all sources", outcome);
}
