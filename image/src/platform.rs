//! The platforms of images, by the names that builders use.
//!
//! Names are Go's (`GOOS`, `GOARCH`), as the OCI image-spec 1.1 wants them (image-index.md,
//! "platform"). Builders write others too: those of the kernel and of Debian mean the same. An
//! image that says nothing is for any machine.

/// How well an image fits this machine; the higher the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fit {
    /// It does not say.
    Unsaid,
    /// For an older machine whose programs this one runs too.
    Older,
    /// For this architecture.
    Same,
    /// For this architecture with more of its instructions: the level.
    Level(u8),
}

/// Go's name of the architecture that this program was built for.
pub(crate) fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// `linux/<architecture>`, for messages.
pub(crate) fn host() -> String {
    format!("linux/{}", host_architecture())
}

/// How an image for this platform fits; `None` = not at all. Absent texts are empty.
pub(crate) fn fit(os: &str, architecture: &str, variant: &str) -> Option<Fit> {
    fit_on(host_architecture(), os, architecture, variant)
}

fn fit_on(host: &str, os: &str, architecture: &str, variant: &str) -> Option<Fit> {
    let os = os.to_ascii_lowercase();
    let (architecture, variant) = (architecture.to_ascii_lowercase(), variant.to_ascii_lowercase());
    if !matches!(os.as_str(), "" | "linux") {
        return None;
    }
    if architecture.is_empty() {
        return variant.is_empty().then_some(Fit::Unsaid);
    }
    let (architecture, variant) = canonical(&architecture, &variant);
    match (host, architecture) {
        ("amd64", "386") => return Some(Fit::Older),
        (host, architecture) if host != architecture => return None,
        _ => {}
    }
    match (architecture, variant) {
        (_, "" | "v1") | ("arm64", "v8") | ("arm", "v5" | "v6" | "v7") => Some(Fit::Same),
        ("amd64", "v2") if has_amd64_v2() => Some(Fit::Level(2)),
        ("amd64", "v3") if has_amd64_v3() => Some(Fit::Level(3)),
        _ => None,
    }
}

/// Go's name for an architecture and its variant by any name.
fn canonical<'a>(architecture: &'a str, variant: &'a str) -> (&'a str, &'a str) {
    match architecture {
        "x86_64" | "x86-64" | "x64" => ("amd64", variant),
        "i386" | "i486" | "i586" | "i686" | "x86" => ("386", ""),
        "386" => ("386", ""),
        "aarch64" | "arm64" => ("arm64", if variant == "8" { "v8" } else { variant }),
        "armhf" => ("arm", "v7"),
        "armel" => ("arm", "v6"),
        "arm" => (
            "arm",
            match variant {
                "5" => "v5",
                "6" => "v6",
                "7" => "v7",
                other => other,
            },
        ),
        "ppc64el" | "powerpc64le" => ("ppc64le", variant),
        other => (other, variant),
    }
}

#[cfg(target_arch = "x86_64")]
fn has_amd64_v2() -> bool {
    std::is_x86_feature_detected!("sse4.2")
        && std::is_x86_feature_detected!("popcnt")
        && std::is_x86_feature_detected!("cmpxchg16b")
}

#[cfg(target_arch = "x86_64")]
fn has_amd64_v3() -> bool {
    has_amd64_v2()
        && std::is_x86_feature_detected!("avx2")
        && std::is_x86_feature_detected!("bmi2")
        && std::is_x86_feature_detected!("fma")
        && std::is_x86_feature_detected!("movbe")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_amd64_v2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_amd64_v3() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_builders_are_understood() {
        for (host, os, architecture, variant, wanted) in [
            ("amd64", "linux", "amd64", "", Some(Fit::Same)),
            ("amd64", "Linux", "AMD64", "v1", Some(Fit::Same)),
            ("amd64", "linux", "x86_64", "", Some(Fit::Same)),
            ("amd64", "", "x86-64", "", Some(Fit::Same)),
            ("amd64", "", "", "", Some(Fit::Unsaid)),
            ("amd64", "linux", "", "", Some(Fit::Unsaid)),
            ("amd64", "linux", "i386", "", Some(Fit::Older)),
            ("amd64", "linux", "386", "", Some(Fit::Older)),
            ("amd64", "linux", "amd64", "v9", None),
            ("amd64", "windows", "amd64", "", None),
            ("amd64", "windows", "", "", None),
            ("amd64", "linux", "arm64", "", None),
            ("amd64", "unknown", "unknown", "", None),
            ("arm64", "linux", "aarch64", "", Some(Fit::Same)),
            ("arm64", "linux", "arm64", "8", Some(Fit::Same)),
            ("arm64", "linux", "arm64", "v8", Some(Fit::Same)),
            ("arm64", "linux", "386", "", None),
            ("386", "linux", "i686", "", Some(Fit::Same)),
            ("386", "linux", "amd64", "", None),
            ("ppc64le", "linux", "ppc64el", "", Some(Fit::Same)),
        ] {
            assert_eq!(
                fit_on(host, os, architecture, variant),
                wanted,
                "{os}/{architecture}/{variant} on {host}"
            );
        }
        assert!(Fit::Unsaid < Fit::Older && Fit::Older < Fit::Same && Fit::Same < Fit::Level(2));
    }
}
