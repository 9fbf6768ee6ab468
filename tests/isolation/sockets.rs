//! Containers that may have the engine's socket, row by row.
//!
//! In lines of a shell `$S` mounts the socket, `$R` is a registry, and `$INSIDE` goes before a command in a container
//! that has the socket. In names of images `R` stands for the registry. See `situation` for what is allowed when.

use std::thread;

use support::{
    engine::Engine,
    process::{COMMAND, run},
};

use crate::{
    shell, situation,
    table::{
        Expect::{Fails, Holds, Says},
        Proof::{Code, Lines},
        Row, check,
    },
};

/// Mounts the engine's socket.
pub const MOUNT: &str = "-v /var/run/docker.sock:/var/run/docker.sock";

const DENIED: &str = "enhanced container isolation: docker socket mount denied for container with image \
                      \"docker.io/library/docker\"; image is not in the allowed list; if you wish to allow it, configure \
                      the docker socket image list in the Docker Desktop settings.";

const BLOCKED: &str =
    "is blocked; if you wish to allow it, configure the docker socket command list in the Docker Desktop settings.";

/// Containers at once.
const AT_ONCE: usize = 2;

/// A list of images of all kinds; `push`, `build` and `volume*` are refused.
pub const DENYING: &[Row] = &[
    Row(
        "socket",
        "imageList: a name with a tag, `docker:cli`",
        Code(|engine| {
            // An image that was pushed under another name counts once it is pulled under the listed one.
            try_images(engine, &[("docker:cli", true)])?;
            try_images(engine, &[("made/official", true), ("alpine", false)])
        }),
    ),
    Row(
        "socket",
        "imageList: no tag is `latest`",
        Code(|engine| try_images(engine, &[("R/names/plain", true), ("R/names/plain:other", false)])),
    ),
    Row(
        "socket",
        "imageList: `:*` is any tag",
        Code(|engine| try_images(engine, &[("R/names/any:v1", true), ("R/elsewhere/any:v1", false)])),
    ),
    Row(
        "socket",
        "imageList: wildcards in names",
        Code(|engine| try_images(engine, &[("R/ci-tools/one:x", true), ("R/ci-tools/deep/er:x", false)])),
    ),
    Row(
        "socket",
        "imageList: a digest",
        Code(|engine| try_images(engine, &[("R/pinned:p", true), ("R/pinned:other", false)])),
    ),
    Row(
        "socket",
        "imageList: an id, of an image that was loaded",
        Code(|engine| try_images(engine, &[("tools", true), ("debian", false), ("made/local", false)])),
    ),
    Row(
        "socket",
        "another image under an allowed name, by docker tag",
        Lines(
            "docker pull --quiet docker:cli >pulled && docker image rm docker:cli >removed && docker tag alpine docker:cli && \
             docker run --rm $S docker:cli true; code=$?; docker image rm docker:cli >removed; exit $code",
            Fails(125, DENIED),
        ),
    ),
    Row(
        "socket",
        "another image under an allowed name, by docker load",
        Lines(
            "docker tag alpine docker:cli && docker save docker:cli >fake.tar && docker image rm docker:cli >removed && \
             docker load --quiet <fake.tar && docker run --rm $S docker:cli true; code=$?; \
             docker image rm docker:cli >removed; exit $code",
            Fails(125, DENIED),
        ),
    ),
    Row(
        "socket",
        "another image under an allowed name, by docker build",
        Lines(
            "printf 'FROM alpine\nLABEL name=cli\n' | DOCKER_BUILDKIT=0 docker build --quiet --tag docker:cli - >built && \
             docker run --rm $S docker:cli true; code=$?; docker image rm docker:cli >removed; exit $code",
            Fails(125, DENIED),
        ),
    ),
    Row(
        "socket",
        "stale digest: refused until it is pulled again",
        Lines(
            "docker run --rm $S $R/moving cat /name
             docker tag made/new $R/moving; docker push --quiet $R/moving >pushed; docker pull --quiet $R/moving >pulled
             docker tag made/old $R/moving; docker run --rm $S $R/moving true 2>refused; echo $?
             grep -o 'docker socket mount denied' refused
             docker image rm $R/moving >removed; docker pull --quiet $R/moving >pulled; docker run --rm $S $R/moving cat /name",
            Says("old\n125\ndocker socket mount denied\nnew\n"),
        ),
    ),
    Row(
        "socket",
        "allowDerivedImages, the default: derived by name, `:*` and id",
        Code(|engine| {
            derive(engine)?;
            let allowed = ["derived/official", "derived/any", "derived/tools"].map(|image| (image, true));
            try_images(engine, &allowed)?;
            try_images(engine, &[("derived/local", false)])
        }),
    ),
    Row(
        "socket",
        "containers started over an allowed socket are isolated",
        Lines(
            "$INSIDE docker run --rm --runtime=runc --userns=host alpine cat /proc/self/uid_map
             $INSIDE docker run --name=by-inside alpine true; docker inspect --format '{{.HostConfig.Runtime}}' by-inside
             docker rm by-inside; $INSIDE docker run --rm --pid=host alpine true",
            Fails(
                125,
                "         0     165536      65536\nsysbox-runc\nby-inside\ndocker: Error response from daemon: failed to create \
                 task for container: failed to create shim task: OCI runtime create failed: error in the container spec: \
                 invalid or unsupported container spec: sysbox containers can't share namespaces [pid] with the host",
            ),
        ),
    ),
    Row(
        "socket",
        "made from inside: paths of the VM are refused, volumes work",
        Lines(
            "for path in /etc /usr /var/lib/docker; do $INSIDE docker run --rm -v $path:/x alpine true 2>&1; done |
                 grep -c \"configured as a restricted host mount\"
             $INSIDE docker run --rm -v kept:/v alpine sh -c 'echo kept >/v/file; cat /proc/self/uid_map'
             $INSIDE docker run --rm --mount type=volume,source=kept,target=/v alpine cat /v/file; docker volume rm kept",
            Says("3\n         0     165536      65536\nkept\nkept\n"),
        ),
    ),
    Row(
        "socket",
        "made from inside: the socket only for images that are allowed",
        Lines(
            "$INSIDE docker run --rm $S tools docker ps --format '{{.Names}}' | grep -cx inside
             for way in \"$S\" '-v /run:/x' '--volumes-from=inside'; do $INSIDE docker run --rm $way alpine true 2>&1; done |
                 grep -c 'docker socket mount denied for container with image \"docker.io/library/alpine\"'",
            Says("1\n3\n"),
        ),
    ),
    Row(
        "socket",
        "commandList deny: docker push, and the request by hand",
        Lines(
            "$INSIDE docker push alpine
             for path in /v1.43/images /images; do
                 $INSIDE curl -sS -w '\\n%{http_code}\\n' --unix-socket /var/run/docker.sock -XPOST \
                     \"http://localhost$path/myimage/push?tag=latest\"
             done",
            Holds(|said| {
                let by_hand = |path: &str| said.contains(&format!("docker command \\\"{path}?tag=latest\\\" {BLOCKED}"));
                let by_docker = said.lines().any(|line| line.contains("/images/alpine/push?") && line.ends_with(BLOCKED));
                by_docker
                    && by_hand("/v1.43/images/myimage/push")
                    && by_hand("/images/myimage/push")
                    && said.lines().filter(|line| *line == "403").count() == 2
            }),
        ),
    ),
    Row(
        "socket",
        "commandList deny: docker build",
        Lines(
            "$INSIDE sh -c 'echo FROM alpine | DOCKER_BUILDKIT=0 docker build -'",
            Fails(1, "is blocked; if you wish to allow it"),
        ),
    ),
    Row(
        "socket",
        "commandList deny: /session and /grpc, any version or none",
        Lines(
            "for path in /session /grpc /v1.45/session /v1.45/grpc //v1.45//grpc /%67rpc; do
                 $INSIDE curl -sS -o /dev/null -w '%{http_code}\\n' --path-as-is --unix-socket /var/run/docker.sock -XPOST \
                     -H 'Connection: Upgrade' -H 'Upgrade: h2c' http://localhost$path
             done | sort | uniq -c",
            Holds(|said| said.split_whitespace().eq(["6", "403"])),
        ),
    ),
    Row(
        "socket",
        "commandList deny: a group, `volume*`; the host is not held to it",
        Lines(
            "for verb in ls 'create v' 'inspect plugins' 'prune --force'; do $INSIDE docker volume $verb 2>&1; done |
                 grep -c 'is blocked; if you wish to allow it'
             $INSIDE docker ps --format '{{.Names}}'; docker volume ls --quiet | grep -cx plugins",
            Says("4\ninside\n1\n"),
        ),
    ),
];

/// No list of commands; derived images are not allowed.
pub const UNDERIVED: &[Row] = &[
    Row(
        "socket",
        "allowDerivedImages false: only the images themselves",
        Code(|engine| {
            derive(engine)?;
            try_images(engine, &[("docker:cli", true), ("R/names/any:v1", true)])?;
            try_images(engine, &["derived/official", "derived/any", "derived/tools"].map(|image| (image, false)))
        }),
    ),
    Row(
        "socket",
        "no commandList: any command, isolated all the same",
        Lines(
            "$INSIDE docker volume create vol; $INSIDE docker volume rm vol
             $INSIDE docker tag alpine $R/inside; $INSIDE docker push --quiet $R/inside >pushed && echo pushed
             for kit in 0 1; do
                 $INSIDE sh -c \"printf 'FROM alpine\\nRUN cat /proc/self/uid_map\\n' | \
                     BUILDKIT_PROGRESS=plain DOCKER_BUILDKIT=$kit docker build --no-cache -\" >built 2>&1
                 grep -cE ' 0 +[1-9][0-9]{5,} +65536$' built || cat built
             done",
            Says("vol\nvol\npushed\n1\n1\n"),
        ),
    ),
];

/// Any image; the only commands are `ps`, `run` and `volume*`.
pub const ALLOWING: &[Row] = &[
    Row(
        "socket",
        "imageList: `*`, any container may; local-only images, too",
        Code(|engine| try_images(engine, &[("alpine", true), ("made/local", true), ("R/pinned:other", true)])),
    ),
    Row(
        "socket",
        "commandList allow: what is listed, and a group",
        Lines(
            "$INSIDE docker ps --format '{{.Names}}'; $INSIDE docker run --rm alpine echo ran
             $INSIDE docker volume create vol; $INSIDE docker volume ls --quiet | grep -x vol; $INSIDE docker volume rm vol",
            Says("inside\nran\nvol\nvol\nvol\n"),
        ),
    ),
    Row(
        "socket",
        "commandList allow: nothing else, by docker or by hand",
        Lines(
            "for command in images 'pull alpine' 'exec inside true' 'rm inside' 'network ls' 'push alpine' 'build -'; do
                 $INSIDE sh -c \"echo FROM alpine | DOCKER_BUILDKIT=0 docker $command\" >said 2>&1 && echo \"$command passed\"
                 grep -q 'is blocked; if you wish to allow it' said || cat said
             done
             for path in /containers/json /images/json /v1.43/info /session /future; do
                 $INSIDE curl -sS -o /dev/null -w '%{http_code}\\n' --unix-socket /var/run/docker.sock http://localhost$path
             done",
            Says("200\n403\n403\n403\n403\n"),
        ),
    ),
];

/// The name of an image as a refusal has it: in full and without a tag.
fn full(image: &str) -> String {
    let end = image.rfind('/').map_or(0, |slash| slash + 1);
    let name = image[end..].find(':').map_or(image, |colon| &image[..end + colon]);
    match name.split_once('/') {
        Some((first, _)) if first.contains(['.', ':']) => name.to_owned(),
        Some(_) => format!("docker.io/{name}"),
        None => format!("docker.io/library/{name}"),
    }
}

/// Runs a container of each image with the engine's socket, which must start or be refused in the documented words.
fn try_images(engine: &Engine, images: &[(&str, bool)]) -> Result<(), String> {
    let registry = situation::images().map(|images| images.registry.clone()).unwrap_or_default();
    for some in images.chunks(AT_ONCE) {
        let ended: Vec<_> = thread::scope(|scope| {
            let start = |(image, allowed): &(&str, bool)| {
                let image = image.replacen("R/", &format!("{registry}/"), 1);
                let allowed = *allowed;
                scope.spawn(move || try_image(engine, &image, allowed))
            };
            let running: Vec<_> = some.iter().map(start).collect();
            running.into_iter().map(|one| one.join().unwrap_or_else(|_| Err("it panicked".into()))).collect()
        });
        ended.into_iter().collect::<Result<(), String>>()?;
    }
    Ok(())
}

fn try_image(engine: &Engine, image: &str, allowed: bool) -> Result<(), String> {
    let mut arguments = vec!["run", "--rm"];
    arguments.extend(MOUNT.split(' '));
    arguments.extend([image, "test", "-S", "/var/run/docker.sock"]);
    let ran = run(engine.home.docker_command(&arguments), COMMAND);
    let text = DENIED.replace("docker.io/library/docker", &full(image));
    let holds =
        if allowed { ran.status.success() } else { ran.status.code() == Some(125) && ran.stderr.contains(&text) };
    let expected = if allowed { "allowed" } else { "refused" };
    if holds { Ok(()) } else { Err(format!("{image} should be {expected}: {}: {}", ran.status, ran.stderr)) }
}

/// Makes images that are built from others, of which `local` is not allowed.
fn derive(engine: &Engine) -> Result<(), String> {
    if shell(engine, "docker image inspect derived/official derived/any derived/tools derived/local").status.success() {
        return Ok(());
    }
    let lines = r"set -e; docker pull --quiet docker:cli >pulled
        derive() { printf 'FROM %s\nCOPY name /derived\n' $2 >make/Dockerfile; DOCKER_BUILDKIT=$3 docker build --quiet --tag derived/$1 make >built 2>&1 || { cat built; exit 1; }; }
        derive official docker:cli 0; derive any $R/names/any:v1 1; derive tools tools 0; derive local made/local 0";
    check(engine, lines, Says(""))
}
