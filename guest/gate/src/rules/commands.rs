//! Commands of the docker command line: the ones that a request belongs to, and the list that allows or denies them.
//!
//! The table of routes (`api`) names the commands of each.
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

use super::{api, command_use::values};

/// The parts of a request that determine its commands.
#[derive(Clone, Copy, Debug)]
pub struct RequestInfo<'a> {
    /// The method, in any case.
    pub method: &'a str,
    /// The path as split by [`segments`](super::segments), without the version.
    pub segments: &'a [String],
    /// The text behind the question mark, as it came.
    pub query: &'a str,
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
    api::commands(info.method, info.segments, info.query).iter().all(|one| {
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
        permits(list, RequestInfo { method, segments: &segments(path), query })
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
    fn names_with_slashes_hide_no_command() {
        for (word, request) in [
            ("cp", "GET /containers/parent/alias/archive?path=/"),
            ("cp", "PUT /v1.45/containers/a/b%2Fc/archive"),
            ("rm", "DELETE /containers/parent/alias"),
            ("attach", "GET /containers/parent/alias/attach/ws"),
            ("start", "POST /containers/parent/alias/start"),
            ("exec", "POST /containers/parent/alias/exec"),
            ("network", "POST /networks/a/b/connect"),
            ("volume", "DELETE /volumes/a/b"),
            ("rmi", "DELETE /images/a/b/c"),
        ] {
            assert!(!passes(&list(false, word), request), "{word}: {request}");
            assert!(passes(&list(true, word), request), "{word}: {request}");
            assert!(!passes(&list(true, "ps"), request), "{request}");
        }
    }

    #[test]
    fn a_method_that_a_path_does_not_have_counts_as_all_that_it_has() {
        for (word, request) in [
            ("create", "GET /containers/create"),
            ("cp", "POST /containers/x/archive"),
            ("start", "HEAD /containers/x/start"),
            ("push", "PUT /images/a/push"),
            ("pull", "PUT /images/create?fromImage=x"),
        ] {
            assert!(!passes(&list(false, word), request), "{word}: {request}");
        }
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
            let info = RequestInfo { method: &method, segments: &segments(&path), query: &query };
            prop_assert!(!permits(&list(false, "push"), info), "{path}");
        }

        #[test]
        fn no_request_makes_it_panic_and_a_denied_group_owns_its_paths(
            method in "[A-Za-z]{1,7}", rest in proptest::collection::vec("[a-z]{1,8}", 0..4), query in ".{0,30}",
        ) {
            let mut segments = vec!["volumes".to_owned()];
            segments.extend(rest);
            let info = RequestInfo { method: &method, segments: &segments, query: &query };
            prop_assert!(!permits(&list(false, "volume*"), info));
            let info = RequestInfo { segments: &segments[1..], ..info };
            let _ = permits(&list(true, "run"), info);
        }
    }
}
