//! `WWW-Authenticate`: the challenges of a response (RFC 9110, section 11.6.1).

/// Longest header that is looked at.
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

/// The challenges of one header; `None` if it is malformed: a guess at where credentials are wanted is not made.
pub(crate) fn parse(header: &str) -> Option<Vec<Challenge>> {
    if header.len() > MAX_LEN {
        return None;
    }
    let mut rest = header;
    let mut challenges: Vec<Challenge> = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return Some(challenges);
        }
        let word = token(&mut rest)?;
        let spaced = rest.trim_start_matches([' ', '\t']);
        if let Some(after) = spaced.strip_prefix('=') {
            // A parameter of the last challenge.
            rest = after.trim_start_matches([' ', '\t']);
            let value = if rest.starts_with('"') { quoted(&mut rest)? } else { token(&mut rest)?.to_owned() };
            challenges.last_mut()?.parameters.push((word.to_ascii_lowercase(), value));
            let end = rest.trim_start_matches([' ', '\t']);
            if !end.is_empty() && !end.starts_with(',') {
                return None;
            }
        } else {
            if !rest.is_empty() && !rest.starts_with([' ', '\t', ',']) {
                return None;
            }
            challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
        }
    }
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
        )
        .unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].scheme, "bearer");
        assert_eq!(found[0].get("realm"), Some("https://auth.docker.io/token"));
        assert_eq!(found[0].get("scope"), Some("repository:a/b:pull,push"));
        let found = parse(r#"Basic realm="a \"b\", c", BEARER Realm = x , , service=y"#).unwrap();
        assert_eq!(found[0].get("realm"), Some(r#"a "b", c"#));
        assert_eq!(
            (found[1].scheme.as_str(), found[1].get("realm"), found[1].get("service")),
            ("bearer", Some("x"), Some("y"))
        );
        assert_eq!(parse("Negotiate").unwrap()[0].scheme, "negotiate");
        assert_eq!(parse(" , ,").unwrap(), []);
    }

    #[test]
    fn malformed_headers_are_no_challenge() {
        for header in [
            "realm=x",
            r#"Bearer realm="open"#,
            r#"Bearer realm="x" service="y""#,
            "Bearer realm=",
            "Bearer =x",
            "Bearer realm=\"a\nb\"",
            "Bearer\"x\"",
            "Bearer realm=\"\\",
            "é",
        ] {
            assert_eq!(parse(header), None, "{header:?}");
        }
        assert_eq!(parse(&"a,".repeat(MAX_LEN)), None);
    }

    proptest! {
        #[test]
        fn any_text_ends_in_a_result(header in any::<String>()) {
            let _ = parse(&header);
        }

        #[test]
        fn quoted_values_are_read_back(value in "[ -~]{0,60}") {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
            let found = parse(&format!("Bearer realm=\"{escaped}\"")).unwrap();
            prop_assert_eq!(found[0].get("realm"), Some(value.as_str()));
        }
    }
}
