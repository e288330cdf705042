//! Holds the committed code in `src/generated` against the proto file it comes from.
//!
//! After a change of the proto file, `BERTH_REGENERATE=1 cargo test -p berth-api --test generated`
//! writes the code.

use std::path::Path;
use std::{env, fs};

const PROTO_FILE: &str = "berth/v1/berth.proto";
const GENERATED_FILE: &str = "berth.v1.rs";

/// The message whose `Debug` is written by hand, in `src/redacted.rs`, because it carries secrets.
const WITHOUT_DEBUG: [&str; 1] = ["berth.v1.PullRequest"];

fn generate_into(directory: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile([PROTO_FILE], [root]).expect("the proto file compiles");
    tonic_prost_build::configure()
        .skip_debug(WITHOUT_DEBUG)
        .emit_rerun_if_changed(false)
        .out_dir(directory)
        .compile_fds(descriptors)
        .expect("code is generated from a compiled descriptor");
}

#[test]
fn committed_code_is_what_the_proto_file_generates() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/generated");
    if env::var_os("BERTH_REGENERATE").is_some() {
        generate_into(&committed);
    }
    let fresh = tempfile::tempdir().expect("a temporary directory can be made");
    generate_into(fresh.path());
    let names = |directory: &Path| -> Vec<_> {
        let entries = fs::read_dir(directory).expect("the directory of generated code can be listed");
        entries.map(|entry| entry.expect("a directory entry can be read").file_name()).collect()
    };
    assert_eq!(names(fresh.path()), [GENERATED_FILE], "the proto file has one package");
    assert_eq!(names(&committed), [GENERATED_FILE], "nothing else lies beside the generated code");
    let read =
        |directory: &Path| fs::read_to_string(directory.join(GENERATED_FILE)).expect("the code can be read");
    // Not assert_eq: on a difference it would print both files whole.
    assert!(
        read(fresh.path()) == read(&committed),
        "src/generated/{GENERATED_FILE} is not what {PROTO_FILE} generates; run this test with BERTH_REGENERATE=1"
    );
}
