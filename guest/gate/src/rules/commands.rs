//! Commands of the docker command line: the ones that a request belongs to, and the list that allows or denies them.
//!
//! A request has *owners*, commands that do not work without it, and *helpers*, commands that make it on their way. A
//! deny list compares owners only: denying a helper's request would break its owners, too. An allow list compares both,
//! so that each allowed command can do its work.
//!
//! | Request                    | Owners              | Helpers                                  |
//! |----------------------------|---------------------|------------------------------------------|
//! | `POST /containers/create`  | `create`, `run`     |                                          |
//! | `GET /containers/ID/json`  | `inspect`, `port`   | `run`, `start`, `attach`, `exec`, …      |
//! | `POST /session`            | `build`, `buildx`   |                                          |

use bulkhead_protocol::SocketCommands;

/// An effect of a request, as commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CommandUse {
    owners: &'static [&'static str],
    groups: &'static [&'static str],
    helpers: &'static [&'static str],
}

/// Makes a [`CommandUse`] of owners, the groups that they belong to (`image*`), and helpers.
const fn of(
    owners: &'static [&'static str],
    groups: &'static [&'static str],
    helpers: &'static [&'static str],
) -> CommandUse {
    CommandUse { owners, groups, helpers }
}

const CONTAINER: &[&str] = &["container"];
const IMAGE: &[&str] = &["image"];
const PULL: CommandUse = of(&["pull"], IMAGE, &[]);
const IMPORT: CommandUse = of(&["import"], IMAGE, &[]);
const EXEC: CommandUse = of(&["exec"], CONTAINER, &[]);
const BUILD: CommandUse = of(&["build", "buildx"], &["builder", "image"], &[]);
const PRUNE_BUILDS: CommandUse = of(&["builder", "buildx"], &["builder", "system"], &[]);

/// A request of no known command, which only an allow list refuses.
const UNKNOWN: CommandUse = of(&[], &[], &[]);

/// The parts of a request that determine its commands.
#[derive(Clone, Copy, Debug)]
pub struct RequestInfo<'a> {
    /// The method, in any case.
    pub method: &'a str,
    /// The path as split by [`segments`](super::segments), without the version.
    pub segments: &'a [String],
    /// The text behind the question mark, as it came.
    pub query: &'a str,
    /// The body can have parameters, too.
    pub form_body: bool,
}

/// Returns the use of a request below `/containers`.
///
/// Methods are compared only where they distinguish commands. dockerd answers 404 or 405 to the others; here a wrong
/// method must not turn a known request into an unknown one, which a deny list lets pass.
fn container(method: &str, rest: &[&str]) -> CommandUse {
    let one = |name, helpers| of(name, CONTAINER, helpers);
    match (method, rest) {
        (_, ["json"]) => one(&["ps"], &[]),
        (_, ["create"]) => one(&["create", "run"], &[]),
        (_, ["prune"]) => of(&["container"], &["container", "system"], &[]),
        ("DELETE", [_]) => one(&["rm"], &[]),
        (_, [_, "json"]) => one(&["inspect", "port"], &["run", "start", "attach", "exec", "logs", "cp"]),
        (_, [_, "start"]) => one(&["start"], &["run"]),
        (_, [_, "stop"]) => one(&["stop"], &[]),
        (_, [_, "restart"]) => one(&["restart"], &[]),
        (_, [_, "kill"]) => one(&["kill"], &["run", "attach", "start"]),
        (_, [_, "pause"]) => one(&["pause"], &[]),
        (_, [_, "unpause"]) => one(&["unpause"], &[]),
        (_, [_, "wait"]) => one(&["wait"], &["run", "start", "attach"]),
        (_, [_, "resize"]) => one(&[], &["run", "start", "attach"]),
        (_, [_, "attach"] | [_, "attach", "ws"]) => one(&["attach"], &["run", "start"]),
        (_, [_, "exec"]) => EXEC,
        (_, [_, "rename"]) => one(&["rename"], &[]),
        (_, [_, "update"]) => one(&["update"], &[]),
        (_, [_, "logs"]) => one(&["logs"], &[]),
        (_, [_, "top"]) => one(&["top"], &[]),
        (_, [_, "stats"]) => one(&["stats"], &[]),
        (_, [_, "changes"]) => one(&["diff"], &[]),
        (_, [_, "export"]) => one(&["export"], &[]),
        (_, [_, "archive" | "copy"]) => one(&["cp"], &[]),
        _ => one(&[], &[]),
    }
}

/// Returns the use of a request below `/images`. Names of images contain slashes, hence `..`.
fn image(method: &str, rest: &[&str]) -> CommandUse {
    let one = |name, helpers| of(name, IMAGE, helpers);
    match (method, rest) {
        (_, ["json"]) => one(&["images"], &[]),
        (_, ["search"]) => one(&["search"], &[]),
        (_, ["get"]) => one(&["save"], &[]),
        (_, ["load"]) => one(&["load"], &[]),
        (_, ["prune"]) => of(&["image"], &["image", "system"], &[]),
        ("DELETE", _) => one(&["rmi"], &[]),
        (_, [_, .., "push"]) => one(&["push"], &[]),
        (_, [_, .., "tag"]) => one(&["tag"], &[]),
        (_, [_, .., "history"]) => one(&["history"], &[]),
        (_, [_, .., "get"]) => one(&["save"], &[]),
        (_, [_, .., "json"]) => one(&["inspect"], &["run", "create", "pull", "build"]),
        _ => one(&[], &[]),
    }
}

/// Returns the values of a parameter that are not empty.
fn values(query: &str, name: &str) -> impl Iterator<Item = String> {
    let plain = |text: &str| super::target::decode(&text.replace('+', " "));
    // As Go's `url.ParseQuery`: a plus sign is a space, and keys can be escaped as well (`%66romImage`).
    query.split('&').filter_map(move |pair| {
        let (key, value) = pair.split_once('=')?;
        let there = !value.is_empty() && plain(key) == name.as_bytes();
        there.then(|| String::from_utf8_lossy(&plain(value)).into_owned())
    })
}

/// Returns the image that a request pulls.
pub fn pulled_image(segments: &[String], query: &str) -> Option<String> {
    if !matches!(segments, [images, create] if images == "images" && create == "create") {
        return None;
    }
    let image = values(query, "fromImage").next()?;
    // `tag` can hold a digest.
    Some(match values(query, "tag").next() {
        Some(tag) if tag.contains(':') => format!("{image}@{tag}"),
        Some(tag) => format!("{image}:{tag}"),
        None => image,
    })
}

/// Returns the uses of `POST /images/create`, which is `pull` or `import` by its parameters, and both in doubt.
fn create_image(info: RequestInfo<'_>) -> Vec<CommandUse> {
    let has = |name| values(info.query, name).next().is_some();
    let (pull, import) = (has("fromImage"), has("fromSrc"));
    // Parameters in a body take precedence in Go, and this body is not read here.
    match (pull, import) {
        (true, false) if !info.form_body => vec![PULL],
        (false, true) if !info.form_body => vec![IMPORT],
        _ => vec![PULL, IMPORT],
    }
}

/// Returns all uses of a request; none for those that every client makes before any command.
fn uses(info: RequestInfo<'_>) -> Vec<CommandUse> {
    let segments: Vec<&str> = info.segments.iter().map(String::as_str).collect();
    let method = info.method.to_ascii_uppercase();
    let only = match segments[..] {
        ["_ping" | "version"] => return Vec::new(),
        ["images", "create"] => return create_image(info),
        ["containers", ref rest @ ..] => container(&method, rest),
        ["images", ref rest @ ..] => image(&method, rest),
        // start, resize and inspect of an exec are parts of the one command.
        ["exec", ..] => EXEC,
        ["commit"] => of(&["commit"], CONTAINER, &[]),
        ["build", "prune"] => PRUNE_BUILDS,
        // BuildKit works over /session and /grpc alone; /build is the older builder.
        ["build" | "session" | "grpc", ..] => BUILD,
        ["volumes", "prune"] => of(&["volume"], &["volume", "system"], &[]),
        ["networks", "prune"] => of(&["network"], &["network", "system"], &[]),
        ["volumes", ..] => of(&["volume"], &["volume"], &[]),
        ["networks", ..] => of(&["network"], &["network"], &[]),
        ["info"] => of(&["info"], &["system"], &["login", "pull", "push", "build", "search"]),
        ["events"] => of(&["events"], &["system"], &["stats", "container"]),
        ["auth"] => of(&["login"], &["system"], &[]),
        ["system", ..] => of(&["system"], &["system"], &[]),
        ["distribution", ..] => of(&["manifest"], IMAGE, &["pull"]),
        ["swarm", ..] => of(&["swarm"], &["swarm"], &[]),
        ["nodes", ..] => of(&["node"], &["node"], &[]),
        ["services" | "tasks", ..] => of(&["service", "stack"], &["service", "stack"], &["node"]),
        ["secrets", ..] => of(&["secret"], &["secret"], &["stack", "service"]),
        ["configs", ..] => of(&["config"], &["config"], &["stack", "service"]),
        ["plugins", ..] => of(&["plugin"], &["plugin"], &[]),
        _ => UNKNOWN,
    };
    vec![only]
}

/// Returns true if a word of a list means one of these commands or groups.
fn means(word: &str, commands: &[&str], groups: &[&str]) -> bool {
    // `image*` is the group `image`, and each command that begins so. Without a star a word is a command or a group.
    match word.strip_suffix('*') {
        Some(prefix) => groups.contains(&prefix) || commands.iter().any(|command| command.starts_with(prefix)),
        None => commands.contains(&word) || groups.contains(&word),
    }
}

/// Returns true if a list lets a request pass.
pub fn permits(list: &SocketCommands, info: RequestInfo<'_>) -> bool {
    uses(info).iter().all(|one| {
        // A request with several uses needs all of them. One without any passes, as /_ping and /version do.
        let owned = list.commands.iter().any(|word| means(word, one.owners, one.groups));
        if list.allow { owned || list.commands.iter().any(|word| means(word, one.helpers, &[])) } else { !owned }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::segments, *};

    fn list(allow: bool, words: &str) -> SocketCommands {
        SocketCommands { allow, commands: words.split_whitespace().map(ToOwned::to_owned).collect() }
    }

    fn passes(list: &SocketCommands, request: &str) -> bool {
        let (method, target) = request.split_once(' ').unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        permits(list, RequestInfo { method, segments: &segments(path), query, form_body: false })
    }

    #[test]
    fn a_refused_command_is_refused_on_every_way_to_it_and_others_are_not() {
        let deny = list(false, "push build");
        for request in [
            "POST /v1.43/images/myimage/push?tag=latest",
            "POST /images/reg.io/a/b/push",
            "post /images/x/push",
            "POST /images/reg.io%2Fa/%70ush",
            "POST //v1.43//images/./x/push/",
            "POST /build?t=x",
            "POST /session",
            "POST /grpc",
            "POST /v1.45/grpc",
            "POST /build/cancel",
        ] {
            assert!(!passes(&deny, request), "{request}");
        }
        for request in [
            "GET /_ping",
            "HEAD /_ping",
            "GET /version",
            "GET /containers/json",
            "POST /images/x/tag",
            "POST /build/prune",
        ] {
            assert!(passes(&deny, request), "{request}");
        }
    }

    #[test]
    fn groups_are_all_commands_of_their_subject() {
        for (word, requests) in [
            (
                "image*",
                "GET /images/json|POST /images/create?fromImage=a|POST /images/load|DELETE /images/a|GET /images/search|\
                 POST /images/a/b/tag|GET /images/a/history|POST /images/prune|GET /images/a/get|POST /build|POST /session",
            ),
            (
                "container*",
                "GET /containers/json|POST /containers/create|POST /containers/x/start|DELETE /containers/x|POST /commit|\
                 POST /exec/x/start|GET /containers/x/logs|HEAD /containers/x/archive|POST /containers/x/rename",
            ),
            ("volume*", "GET /volumes|POST /volumes/create|DELETE /volumes/v|POST /volumes/prune"),
            ("network*", "GET /networks|POST /networks/create|POST /networks/n/connect"),
            ("build*", "POST /build|POST /build/prune|POST /session|POST /grpc"),
            (
                "system*",
                "GET /info|GET /events|GET /system/df|POST /containers/prune|POST /images/prune|POST /build/prune",
            ),
        ] {
            for request in requests.split('|') {
                assert!(!passes(&list(false, word), request), "{word}: {request}");
                assert!(passes(&list(true, word), request), "{word}: {request}");
                assert!(!passes(&list(true, "swarm"), request), "{request}");
            }
        }
    }

    #[test]
    fn with_a_list_of_allowed_commands_each_can_do_its_work_and_nothing_else_passes() {
        let ps = list(true, "ps");
        assert!(passes(&ps, "GET /containers/json") && passes(&ps, "GET /_ping") && passes(&ps, "GET /v1.43/version"));
        for request in
            ["GET /images/json", "POST /containers/create", "POST /session", "GET /debug/pprof", "GET /", "GET /future"]
        {
            assert!(!passes(&ps, request), "{request}");
        }
        let run = list(true, "run");
        for request in [
            "POST /containers/create",
            "POST /containers/x/attach?stdin=1",
            "POST /containers/x/start",
            "POST /containers/x/wait?condition=next-exit",
            "POST /containers/x/resize?h=1",
        ] {
            assert!(passes(&run, request), "{request}");
        }
        for request in
            ["POST /containers/x/exec", "POST /images/create?fromImage=x", "GET /info", "DELETE /containers/x"]
        {
            assert!(!passes(&run, request), "{request}");
        }
    }

    #[test]
    fn pull_and_import_share_a_path_and_doubt_is_both() {
        let deny_pull = list(false, "pull");
        assert!(!passes(&deny_pull, "POST /images/create?fromImage=x&tag=y"));
        assert!(passes(&deny_pull, "POST /images/create?fromSrc=-"));
        for odd in
            ["POST /images/create", "POST /images/create?%66romImage=x", "POST /images/create?fromSrc=-&fromImage=x"]
        {
            assert!(!passes(&deny_pull, odd), "{odd}");
        }
        let segments = segments("/images/create");
        let with_body = RequestInfo { method: "POST", segments: &segments, query: "fromSrc=-", form_body: true };
        assert!(!permits(&deny_pull, with_body), "parameters of the body win over those of the query");
    }

    #[test]
    fn a_pull_is_told_with_its_tag() {
        let pulled = |query: &str| pulled_image(&segments("/v1.43/images/create"), query);
        assert_eq!(pulled("fromImage=docker&tag=cli").as_deref(), Some("docker:cli"));
        assert_eq!(pulled("tag=a&fromImage=reg%3A5000%2Fx").as_deref(), Some("reg:5000/x:a"));
        assert_eq!(pulled("fromImage=x&tag=sha256:00").as_deref(), Some("x@sha256:00"));
        assert_eq!(pulled("fromImage=&fromSrc=-"), None);
        assert_eq!(pulled_image(&segments("/images/x/create"), "fromImage=x"), None);
    }

    #[test]
    fn an_empty_list_of_refused_commands_refuses_nothing_and_of_allowed_ones_everything() {
        assert!(passes(&list(false, ""), "POST /build"));
        assert!(!passes(&list(true, ""), "GET /containers/json"));
        assert!(passes(&list(true, ""), "GET /_ping"));
    }

    proptest! {
        #[test]
        fn no_spelling_of_a_refused_request_passes(
            detours in proptest::collection::vec("(|/|/\\.|/x/\\.\\.)", 4),
            mask in any::<u64>(),
            version in "(|/v1\\.[0-9]{2})",
            method in "[pP][oO][sS][tT]",
            query in "[a-z=&%]{0,12}",
        ) {
            let [a, b, c, d] = &detours[..] else { unreachable!() };
            let path: String = format!("{version}{a}/images{b}/reg.io/name{c}/push{d}")
                .bytes()
                .enumerate()
                .map(|(at, byte)| {
                    if mask >> (at % 64) & 1 == 1 { format!("%{byte:02x}") } else { char::from(byte).to_string() }
                })
                .collect();
            let info = RequestInfo { method: &method, segments: &segments(&path), query: &query, form_body: false };
            prop_assert!(!permits(&list(false, "push"), info), "{path}");
        }

        #[test]
        fn no_request_makes_it_panic_and_a_denied_group_owns_its_paths(
            method in "[A-Za-z]{1,7}", rest in proptest::collection::vec("[a-z]{1,8}", 0..4), query in ".{0,30}",
        ) {
            let mut segments = vec!["volumes".to_owned()];
            segments.extend(rest);
            let info = RequestInfo { method: &method, segments: &segments, query: &query, form_body: false };
            prop_assert!(!permits(&list(false, "volume*"), info));
            let info = RequestInfo { segments: &segments[1..], ..info };
            let _ = permits(&list(true, "run"), info);
        }
    }
}
