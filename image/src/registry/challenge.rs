//! `WWW-Authenticate`: the challenges of a response (RFC 9110, section 11.6.1).

/// Longest header that is parsed.
const MAX_LEN: usize = 8 * 1024;

/// One challenge: scheme in lower case, parameters with names in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub(crate) scheme: String,
    pub(crate) parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The first parameter of that name.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// The challenges of one header, in order. A parameter that cannot be read is left out, up to the
/// next comma: registries put texts for people into challenges, and not all quote them. What is
/// used of a challenge decides on its own whether it is of any use.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    if header.len() > MAX_LEN {
        return challenges;
    }
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return challenges;
        }
        let Some(word) = token(&mut rest) else {
            skip_item(&mut rest);
            continue;
        };
        let spaced = rest.trim_start_matches([' ', '\t']);
        if let Some(after) = spaced.strip_prefix('=') {
            rest = after.trim_start_matches([' ', '\t']);
            let value =
                if rest.starts_with('"') { quoted(&mut rest) } else { token(&mut rest).map(str::to_owned) };
            let ends = rest.is_empty() || rest.starts_with([' ', '\t', ',']);
            match (value, challenges.last_mut()) {
                (Some(value), Some(challenge)) if ends => {
                    challenge.parameters.push((word.to_ascii_lowercase(), value));
                }
                _ => skip_item(&mut rest),
            }
        } else if rest.is_empty() || rest.starts_with([' ', '\t', ',']) {
            challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
        } else {
            skip_item(&mut rest);
        }
    }
}

/// Passes over everything up to the next comma that is not quoted.
fn skip_item(rest: &mut &str) {
    let (mut is_quoted, mut is_escaped) = (false, false);
    let end = rest.find(|c| {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if is_quoted => is_escaped = true,
            '"' => is_quoted = !is_quoted,
            ',' => return !is_quoted,
            _ => {}
        }
        false
    });
    *rest = end.and_then(|end| rest.get(end..)).unwrap_or_default();
}

fn token<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let end = rest.find(|c| !is_token(c)).unwrap_or(rest.len());
    let (word, after) = rest.split_at(end);
    *rest = after;
    (!word.is_empty()).then_some(word)
}

fn quoted(rest: &mut &str) -> Option<String> {
    let mut characters = rest.char_indices();
    characters.next()?;
    let mut value = String::new();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => {
                *rest = rest.get(at + 1..)?;
                return Some(value);
            }
            '\\' => value.push(characters.next()?.1),
            c if c.is_control() && c != '\t' => return None,
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges_of_real_registries_are_read() {
        let found = parse(
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
        );
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].scheme, "bearer");
        assert_eq!(found[0].get("realm"), Some("https://auth.docker.io/token"));
        assert_eq!(found[0].get("scope"), Some("repository:a/b:pull,push"));
        let found = parse(r#"Basic realm="a \"b\", c", BEARER Realm = x , , service=y"#);
        assert_eq!(found[0].get("realm"), Some(r#"a "b", c"#));
        assert_eq!(
            (found[1].scheme.as_str(), found[1].get("realm"), found[1].get("service")),
            ("bearer", Some("x"), Some("y"))
        );
        assert_eq!(parse("Negotiate")[0].scheme, "negotiate");
        assert_eq!(parse(" , ,"), []);
    }

    #[test]
    fn a_parameter_that_cannot_be_read_takes_no_other_with_it() {
        for odd in [
            "error=",
            "error=a:b",
            "error=a/b c",
            "err\u{fffd}r=x",
            "/",
            r#"error="a"b"#,
            r#"error=a "c, realm=evil""#,
            "error=\"a\nb\"",
        ] {
            for header in [
                format!(r#"Bearer {odd},realm="https://a/t",service="s""#),
                format!(r#"Bearer realm="https://a/t",{odd},service="s""#),
                format!(r#"Bearer realm="https://a/t",service="s",{odd}"#),
            ] {
                let found = parse(&header);
                assert_eq!(found[0].scheme, "bearer", "{header}");
                assert_eq!(found[0].get("realm"), Some("https://a/t"), "{header}");
                let service = found.iter().find_map(|challenge| challenge.get("service"));
                assert_eq!(service, Some("s"), "{header}");
            }
        }
        let found = parse(r#"Bearer realm="https://a/t" service="s""#);
        assert_eq!((found[0].get("realm"), found[0].get("service")), (Some("https://a/t"), Some("s")));
    }

    #[test]
    fn what_is_malformed_is_no_parameter() {
        for header in [
            "realm=x",
            r#"Bearer realm="open"#,
            "Bearer realm=",
            "Bearer =x",
            "Bearer realm=\"a\nb\"",
            "Bearer\"x\"",
            "Bearer realm=\"\\",
            "é",
        ] {
            assert!(parse(header).iter().all(|challenge| challenge.parameters.is_empty()), "{header:?}");
        }
        assert_eq!(parse(&"a,".repeat(MAX_LEN)), []);
    }

    proptest! {
        #[test]
        fn any_text_ends_in_a_result(header in any::<String>()) {
            let _ = parse(&header);
        }

        #[test]
        fn quoted_values_are_read_back(value in "[ -~]{0,60}") {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
            let found = parse(&format!("Bearer realm=\"{escaped}\""));
            prop_assert_eq!(found[0].get("realm"), Some(value.as_str()));
        }
    }
}
