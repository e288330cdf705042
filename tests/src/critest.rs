//! Results of critest, checked against the specs that are allowed not to pass
//! (`tests/conformance/exceptions`).

use std::fmt;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// A spec of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Its full name: the names of its groups from the outermost in, then its own.
    pub name: String,
    /// Its result.
    pub outcome: Outcome,
}

/// The result of a spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It skipped itself, with this reason.
    Skipped(String),
    /// It failed, panicked or timed out, with this message.
    Failed(String),
}

/// Reads the report that critest writes with `-ginkgo.json-report` (ginkgo v2, `types.Report`).
/// Specs that the command line left out, such as benchmarks, are not returned. A set-up or clean-up
/// step of the whole suite is, if it failed.
///
/// # Errors
/// When it is not such a report, or has no specs.
pub fn read_report(json: &[u8]) -> Result<Vec<Spec>> {
    let report: Value = serde_json::from_slice(json).context("the report is not JSON")?;
    let suites = report.as_array().context("the report is not a list of suites")?;
    let mut specs = Vec::new();
    for node in suites.iter().filter_map(|suite| suite["SpecReports"].as_array()).flatten() {
        let groups = node["ContainerHierarchyTexts"].as_array().into_iter().flatten();
        let own = [&node["LeafNodeText"]];
        let words: Vec<&str> = groups.chain(own).filter_map(Value::as_str).collect();
        let kind = node["LeafNodeType"].as_str().context("a node without a type")?;
        let name = if kind == "It" { words.join(" ") } else { kind.to_owned() };
        let why = node["Failure"]["Message"].as_str().unwrap_or_default().to_owned();
        let outcome = match node["State"].as_str().context("a node without a state")? {
            "passed" => Outcome::Passed,
            // Left out by the command line: there is no reason.
            "skipped" if why.is_empty() => continue,
            "skipped" => Outcome::Skipped(why),
            other => Outcome::Failed(format!("{other}: {why}")),
        };
        if kind == "It" || matches!(outcome, Outcome::Failed(_)) {
            specs.push(Spec { name, outcome });
        }
    }
    ensure!(!specs.is_empty(), "the report has no specs");
    Ok(specs)
}

/// What a line of the exceptions allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fails,
    Skips,
    Depends,
}

#[derive(Debug)]
struct Exception {
    kind: Kind,
    /// A part of the names of the specs.
    part: String,
    reason: String,
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.part, self.reason)
    }
}

/// The specs that are allowed not to pass.
#[derive(Debug)]
pub struct Exceptions(Vec<Exception>);

/// The results of a run, given the exceptions.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// How many specs passed.
    pub passed: usize,
    /// The exceptions that applied, with the number of specs that each covered.
    pub excepted: Vec<(String, usize)>,
    /// Why the run fails: specs that failed or were skipped without an exception, with critest's
    /// message, and exceptions that match no spec.
    pub wrong: Vec<String>,
    /// Exceptions whose specs all passed.
    pub outdated: Vec<String>,
}

impl Exceptions {
    /// Reads lines of `KIND | PART OF THE SPECS' NAMES | REASON`; empty lines and those that begin
    /// with `#` are ignored. KIND is `fails`, `skips` (critest skips the specs), or `depends` (it
    /// skips them on some machines only).
    ///
    /// # Errors
    /// When a line has another form; the message has its number.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().zip(1..).filter(|(line, _)| !line.is_empty() && !line.starts_with('#'));
        let parsed = lines.map(|(line, number)| {
            let fields: Vec<&str> = line.split('|').map(str::trim).collect();
            let &[kind, part, reason] = fields.as_slice() else {
                bail!("line {number} is not KIND | PART | REASON");
            };
            let kind = match kind {
                "fails" => Kind::Fails,
                "skips" => Kind::Skips,
                "depends" => Kind::Depends,
                _ => bail!("line {number}: {kind:?} is not fails, skips or depends"),
            };
            ensure!(!part.is_empty(), "line {number} has no part of a name");
            ensure!(!reason.is_empty(), "line {number} has no reason");
            Ok(Exception { kind, part: part.to_owned(), reason: reason.to_owned() })
        });
        parsed.collect::<Result<_>>().map(Self)
    }

    /// Those whose specs are not about `subject`, on a machine where they have to pass.
    #[must_use]
    pub fn without(mut self, subject: &str) -> Self {
        self.0.retain(|line| line.part != subject);
        self
    }

    /// Checks a run. If it is `complete`, every exception has to match a spec.
    #[must_use]
    pub fn check(&self, specs: &[Spec], complete: bool) -> Verdict {
        let mut verdict = Verdict::default();
        let mut covered = vec![0; self.0.len()];
        for Spec { name, outcome } in specs {
            let (what, why, kinds) = match outcome {
                Outcome::Passed => {
                    verdict.passed += 1;
                    continue;
                }
                Outcome::Failed(why) => ("failed", why, [Kind::Fails].as_slice()),
                Outcome::Skipped(why) => ("skipped", why, [Kind::Skips, Kind::Depends].as_slice()),
            };
            let exception = |line: &Exception| kinds.contains(&line.kind) && name.contains(&line.part);
            match self.0.iter().zip(&mut covered).find(|(line, _)| exception(line)) {
                Some((_, count)) => *count += 1,
                None => verdict.wrong.push(format!("{name} ({what}): {why}")),
            }
        }
        let applied = self.0.iter().zip(covered).filter(|(_, count)| *count > 0);
        verdict.excepted = applied.map(|(line, count)| (line.to_string(), count)).collect();
        for line in &self.0 {
            let mut about = specs.iter().filter(|spec| spec.name.contains(&line.part)).peekable();
            if about.peek().is_none() {
                if complete {
                    verdict.wrong.push(format!("no spec matches the exception {:?}", line.part));
                }
            } else if line.kind != Kind::Depends && about.all(|spec| spec.outcome == Outcome::Passed) {
                verdict.outdated.push(line.to_string());
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report(nodes: &[(&str, &str, &str, &str)]) -> Vec<u8> {
        let node = |&(kind, text, state, message): &(&str, &str, &str, &str)| {
            json!({
                "ContainerHierarchyTexts": ["[k8s.io] Group"], "LeafNodeType": kind, "LeafNodeText": text,
                "State": state, "Failure": {"Message": message},
            })
        };
        let nodes: Vec<Value> = nodes.iter().map(node).collect();
        json!([{"SpecReports": nodes}]).to_string().into_bytes()
    }

    fn specs() -> Vec<Spec> {
        let bytes = report(&[
            ("It", "runs", "passed", ""),
            ("It", "streams", "failed", "no stream"),
            ("It", "hangs", "timedout", "too long"),
            ("It", "confines", "skipped", "no AppArmor"),
            ("It", "is left out", "skipped", ""),
            ("BeforeSuite", "", "passed", ""),
            ("AfterSuite", "", "panicked", "oh"),
        ]);
        read_report(&bytes).expect("a report")
    }

    #[test]
    fn a_report_is_read_with_full_names_and_reasons() {
        let expected = [
            ("[k8s.io] Group runs", Outcome::Passed),
            ("[k8s.io] Group streams", Outcome::Failed("failed: no stream".to_owned())),
            ("[k8s.io] Group hangs", Outcome::Failed("timedout: too long".to_owned())),
            ("[k8s.io] Group confines", Outcome::Skipped("no AppArmor".to_owned())),
            ("AfterSuite", Outcome::Failed("panicked: oh".to_owned())),
        ];
        let expected = expected.map(|(name, outcome)| Spec { name: name.to_owned(), outcome });
        assert_eq!(specs(), expected);
        for other in ["", "{}", "[]", r#"[{"SpecReports": [{}]}]"#] {
            assert!(read_report(other.as_bytes()).is_err(), "{other}");
        }
    }

    #[test]
    fn what_has_no_exception_is_wrong() {
        let exceptions =
            Exceptions::parse("# a comment\n\nfails | streams | not offered\n").expect("exceptions");
        let verdict = exceptions.check(&specs(), true);
        assert_eq!(verdict.passed, 1);
        assert_eq!(verdict.excepted, [("streams: not offered".to_owned(), 1)]);
        let wrong = [
            "[k8s.io] Group hangs (failed): timedout: too long",
            "[k8s.io] Group confines (skipped): no AppArmor",
            "AfterSuite (failed): panicked: oh",
        ];
        assert_eq!(verdict.wrong, wrong);
    }

    #[test]
    fn an_exception_covers_its_kind_only() {
        let lines =
            ["skips | streams", "fails | confines", "depends | hangs", "skips | runs", "fails | gone"];
        let exceptions =
            Exceptions::parse(&lines.map(|line| format!("{line} | x\n")).concat()).expect("exceptions");
        let verdict = exceptions.check(&specs(), true);
        assert_eq!(verdict.excepted, []);
        assert_eq!(verdict.wrong.len(), 5, "{:?}", verdict.wrong);
        assert!(verdict.wrong.contains(&"no spec matches the exception \"gone\"".to_owned()));
        assert_eq!(verdict.outdated, ["runs: x"]);
        assert_eq!(
            exceptions.check(&specs(), false).wrong.len(),
            4,
            "a part of a run need not have them all"
        );
    }

    #[test]
    fn a_spec_that_depends_on_the_machine_may_pass() {
        let specs = [Spec { name: "confines".to_owned(), outcome: Outcome::Passed }];
        let verdict =
            Exceptions::parse("depends | confines | AppArmor").expect("exceptions").check(&specs, true);
        assert_eq!(verdict, Verdict { passed: 1, ..Verdict::default() });
    }

    #[test]
    fn a_malformed_line_is_named() {
        for line in ["fails | x", "fails | x | y | z", "maybe | x | y", "fails | | y", "skips | x |"] {
            let error = Exceptions::parse(&format!("fails | a | b\n{line}")).expect_err(line);
            assert!(error.to_string().starts_with("line 2"), "{error}");
        }
    }
}
