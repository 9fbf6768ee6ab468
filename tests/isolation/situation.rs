//! The settings and policies that some rows need. Rows that need the same stand beside each other, so that the engine
//! starts as seldom as possible.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use support::{
    engine::{Engine, ISOLATION, START, STOP},
    registry::Registry,
};

use crate::{
    directory, shell,
    table::{State, guarded},
};

/// Folder of the administrator's policy.
const DIRECTORY: &str = "/etc/bulkhead";

/// Its file.
pub const POLICY: &str = "/etc/bulkhead/admin-settings.json";

/// The emulated machine has it. Only there does the suite write to /etc.
const EMULATED: &str = "/run/kvm-host/shares";

/// A policy that was cut off.
pub const BROKEN: &str = "{ \"enhancedContainerIsolation\": { \"value\": false, \"locked\": tru";

/// No version, keys of a later version, and a setting that the user may change.
const FREE: &str = r#"{ "enhancedContainerIsolation": { "value": false, "locked": false, "someday": 1 },
                        "analyticsEnabled": { "locked": true, "value": false } }"#;

/// The settings and the policy that the engine runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Situation {
    /// Isolation and nothing else.
    Usual,
    /// A list of images of each kind, and a list of commands that are refused.
    Denying,
    /// No list of commands, no derived images.
    Underived,
    /// Any image, and a list of the only commands.
    Allowing,
    /// A locked policy with exceptions; the user has turned isolation off.
    Locked,
    /// An unreadable policy; the user has turned isolation off.
    Broken,
    /// A policy that leaves the choice to the user, who has set nothing.
    Free,
}

/// The images that rows of the socket are about.
#[derive(Debug)]
pub struct Images {
    /// Name and port of the registry, as the engine knows it.
    pub registry: String,
    /// The id of the docker command line's image.
    tools: String,
    /// The digest of an image in the registry.
    pinned: String,
}

/// Those of the last registry.
static IMAGES: Mutex<Option<Arc<Images>>> = Mutex::new(None);

/// The images, once they are made.
pub fn images() -> Option<Arc<Images>> {
    IMAGES.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Makes them and fills the registry. Images of one that is allowed have a layer of their own each. A test before this
/// one may have pulled another image of the name `docker:cli`.
const MAKE: &str = r#"set -e
    docker image inspect tools >/dev/null || {
        docker image inspect docker:cli >/dev/null || docker load --quiet --input "$IMAGES/docker.tar"
        docker tag docker:cli tools
    }
    if docker image inspect docker:cli >/dev/null; then docker image rm --force docker:cli; fi
    mkdir -p make; printf 'FROM alpine\nCOPY name /name\n' >make/Dockerfile
    for name in official plain any wild pinned old new other local; do
        echo $name >make/name; DOCKER_BUILDKIT=0 docker build --quiet --tag made/$name make 2>/dev/null
    done
    push() { docker tag made/$1 $R/$2; docker push --quiet $R/$2; }
    push official library/docker:cli; push plain names/plain:latest; push any names/any:v1
    push wild ci-tools/one:x; push pinned pinned:p; push old moving:latest
    for name in names/plain:other elsewhere/any:v1 ci-tools/deep/er:x pinned:other; do push other $name; done
    plugin=$(docker info --format '{{range .ClientInfo.Plugins}}{{if eq .Name "buildx"}}{{.Path}}{{end}}{{end}}')
    docker create --name plugin -v plugins:/plugins alpine
    if [[ $plugin ]]; then docker cp "$plugin" plugin:/plugins; fi
    docker rm plugin"#;

/// A container from which the engine is asked.
const INSIDE: &str = "docker run --detach --init --name=inside $S -v plugins:/root/.docker/cli-plugins tools sleep 1d";

impl Images {
    fn make(engine: &Engine, port: u16) -> Result<Self, String> {
        let registry = format!("host.docker.internal:{port}");
        done(engine, &format!("R={registry}\n{MAKE}"))?;
        let tools = done(engine, "docker image inspect --format '{{.Id}}' tools")?.trim().to_owned();
        let pinned = done(engine, "docker image inspect --format '{{index .RepoDigests 0}}' made/pinned")?;
        let pinned = pinned.trim().split_once('@').map(|(_, digest)| digest.to_owned()).ok_or(pinned)?;
        Ok(Self { registry, tools, pinned })
    }

    /// `dockerSocketMount` of a situation.
    fn exceptions(&self, situation: Situation) -> Option<serde_json::Value> {
        let Self { registry, tools, pinned } = self;
        Some(match situation {
            Situation::Denying => serde_json::json!({
                "imageList": { "images": [
                    "docker:cli", format!("{registry}/names/plain"), format!("{registry}/names/any:*"),
                    format!("{registry}/ci-tools/*:*"), format!("{registry}/pinned@{pinned}"), tools,
                    format!("{registry}/moving"),
                ] },
                "commandList": { "type": "deny", "commands": ["push", "build", "volume*"] }
            }),
            Situation::Underived => serde_json::json!({
                "imageList": {
                    "images": ["docker:cli", format!("{registry}/names/any:*"), tools], "allowDerivedImages": false
                }
            }),
            Situation::Allowing => serde_json::json!({
                "imageList": { "images": ["*"] },
                "commandList": { "type": "allow", "commands": ["ps", "run", "volume*"] }
            }),
            Situation::Locked => serde_json::json!({
                "imageList": { "images": [tools], "allowDerivedImages": true },
                "commandList": { "type": "deny", "commands": ["push", "build"] }
            }),
            Situation::Usual | Situation::Broken | Situation::Free => return None,
        })
    }
}

impl Situation {
    fn has_policy(self) -> bool {
        matches!(self, Self::Locked | Self::Broken | Self::Free)
    }

    fn has_exceptions(self) -> bool {
        matches!(self, Self::Denying | Self::Underived | Self::Allowing | Self::Locked)
    }

    fn policy(self) -> Option<String> {
        match self {
            Self::Locked => {
                let exceptions = images()?.exceptions(self);
                let isolation = serde_json::json!({"value": true, "locked": true, "dockerSocketMount": exceptions});
                let proxy = serde_json::json!({"locked": true, "mode": "manual", "http": "http://127.0.0.1:3128"});
                let policy = serde_json::json!({
                    "configurationFileVersion": 2, "enhancedContainerIsolation": isolation, "containersProxy": proxy
                });
                Some(policy.to_string())
            }
            Self::Broken => Some(BROKEN.to_owned()),
            Self::Free => Some(FREE.to_owned()),
            Self::Usual | Self::Denying | Self::Underived | Self::Allowing => None,
        }
    }

    /// The user's settings.
    fn settings(self) -> Vec<(&'static str, String)> {
        let isolation = match self {
            Self::Locked | Self::Broken => Some("false".to_owned()),
            Self::Free => None,
            Self::Usual | Self::Denying | Self::Underived | Self::Allowing => Some("true".to_owned()),
        };
        let own = images().filter(|_| self.has_exceptions() && !self.has_policy());
        let exceptions =
            own.as_ref().and_then(|images| images.exceptions(self)).map(|exceptions| exceptions.to_string());
        let options = own.map(|images| format!(r#"{{"registry-mirrors": ["http://{}"]}}"#, images.registry));
        let all = [(ISOLATION, isolation), ("dockerSocketMount", exceptions), ("dockerDaemonOptions", options)];
        all.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
    }
}

/// Runs lines that have to succeed.
fn done(engine: &Engine, lines: &str) -> Result<String, String> {
    let ran = shell(engine, lines);
    if ran.status.success() { Ok(ran.stdout) } else { Err(format!("{lines}: {}", ran.stdout)) }
}

/// The engine in one situation after the other; stopped and without a policy when dropped in another than the usual
/// one.
pub struct Situations<'a> {
    engine: &'a Engine,
    now: Situation,
    /// The outcome of the last change.
    reached: Result<(), String>,
    registry: Option<Registry>,
}

impl<'a> Situations<'a> {
    /// Of an engine that runs with isolation.
    pub fn new(engine: &'a Engine) -> Self {
        Self { engine, now: Situation::Usual, reached: Ok(()), registry: None }
    }

    /// Changes to a situation unless it is the present one.
    pub fn need(&mut self, situation: Situation) -> Result<(), State> {
        if situation.has_policy() && !Path::new(EMULATED).exists() {
            return Err(State::NotBuilt("tried in the emulated machine only, as it writes to /etc".into()));
        }
        // A locked policy lets only a program of root's start, and a checkout in the emulated machine has its owner's.
        if matches!(situation, Situation::Locked | Situation::Broken)
            && let Err(problem) = bulkhead::root_owned::check(Path::new(support::program()))
        {
            return Err(State::NotBuilt(format!("needs a build that only root can change: {problem}")));
        }
        if situation != self.now {
            self.reached = guarded(|| self.change(situation));
        }
        self.reached.clone().map_err(State::Failed)
    }

    fn change(&mut self, to: Situation) -> Result<(), String> {
        let engine = self.engine;
        engine.remove_containers();
        if to.has_exceptions() && self.registry.is_none() {
            let (registry, port) = serve(engine);
            self.registry = Some(registry);
            let images = Arc::new(Images::make(engine, port)?);
            *IMAGES.lock().unwrap_or_else(PoisonError::into_inner) = Some(images);
        }
        // A policy takes effect at a start of the backend; a restart keeps the one that the backend has read.
        let stopped = self.now.has_policy() || to.has_policy();
        self.now = to;
        if stopped {
            engine.home.bulkhead(&["stop"], STOP).ok();
            let _ = fs::remove_dir_all(DIRECTORY);
        }
        let settings = to.settings();
        engine.write_settings(&settings.iter().map(|(key, value)| (*key, value.as_str())).collect::<Vec<_>>());
        if let Some(policy) = to.policy() {
            fs::create_dir_all(DIRECTORY)
                .and_then(|()| fs::write(POLICY, policy))
                .map_err(|error| error.to_string())?;
        }
        if stopped {
            let ran = engine.home.bulkhead(&["start", "--timeout", "220"], START);
            engine.note_start();
            // For the rows about its messages.
            fs::write(directory(engine.home).join("start.log"), format!("{}{}", ran.stdout, ran.stderr)).unwrap();
            ran.ok();
        } else {
            engine.restart();
        }
        if to.has_exceptions() {
            done(engine, INSIDE)?;
        }
        Ok(())
    }
}

impl Drop for Situations<'_> {
    fn drop(&mut self) {
        if self.now == Situation::Usual {
            return;
        }
        let home = self.engine.home;
        home.bulkhead(&["stop", "--force"], STOP);
        if self.now.has_policy() {
            let _ = fs::remove_dir_all(DIRECTORY);
        }
        self.engine.write_settings(&[]);
    }
}

/// A registry on the loopback, with its port.
fn serve(engine: &Engine) -> (Registry, u16) {
    let storage = engine.home.path("registry");
    fs::create_dir_all(&storage).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    (Registry::serve(&storage, SocketAddr::from((Ipv4Addr::LOCALHOST, port)), ""), port)
}
