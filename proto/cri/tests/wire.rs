//! Holds the compiled proto file against `fields.tsv`, a table of everything that is visible on the
//! wire.
//!
//! Both sides are brought into the table's own notation, one line per fact, and compared as sets: a
//! fact that only one side knows is printed. The table is a record of the published protocol and is
//! replaced, never edited, when Berth moves to a newer one.

use std::collections::BTreeSet;
use std::path::Path;

use protox::prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor,
    MethodDescriptor, Value,
};

const TABLE: &str = include_str!("fields.tsv");
const PACKAGE: &str = "runtime.v1.";

fn compiled() -> DescriptorPool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut compiler = protox::Compiler::new([root]).expect("the directory of the proto file is there");
    compiler.open_file("runtime/v1/api.proto").expect("the proto file compiles");
    compiler.descriptor_pool()
}

/// Name of a message or enum as the table has it: with the messages around it, without the package.
fn short(full_name: &str) -> String {
    full_name.strip_prefix(PACKAGE).unwrap_or(full_name).to_owned()
}

fn type_name(kind: &Kind) -> String {
    match kind {
        Kind::Message(message) => short(message.full_name()),
        Kind::Enum(values) => short(values.full_name()),
        Kind::Double => "double".into(),
        Kind::Float => "float".into(),
        Kind::Int32 => "int32".into(),
        Kind::Int64 => "int64".into(),
        Kind::Uint32 => "uint32".into(),
        Kind::Uint64 => "uint64".into(),
        Kind::Sint32 => "sint32".into(),
        Kind::Sint64 => "sint64".into(),
        Kind::Fixed32 => "fixed32".into(),
        Kind::Fixed64 => "fixed64".into(),
        Kind::Sfixed32 => "sfixed32".into(),
        Kind::Sfixed64 => "sfixed64".into(),
        Kind::Bool => "bool".into(),
        Kind::String => "string".into(),
        Kind::Bytes => "bytes".into(),
    }
}

/// The options of a field or an enum value that are set and that the table knows.
fn flags(options: &DynamicMessage) -> String {
    let set = |name| options.get_field_by_name(name).is_some_and(|value| *value == Value::Bool(true));
    let flags: Vec<_> = ["deprecated", "debug_redact"].into_iter().filter(|name| set(name)).collect();
    if flags.is_empty() { "-".into() } else { flags.join(",") }
}

fn field_line(message: &MessageDescriptor, field: &FieldDescriptor) -> String {
    let kind = field.kind();
    let (label, type_name) = match (&kind, field.cardinality()) {
        (Kind::Message(entry), _) if field.is_map() => {
            let (key, value) = (entry.map_entry_key_field(), entry.map_entry_value_field());
            ("map", format!("map<{},{}>", type_name(&key.kind()), type_name(&value.kind())))
        }
        (kind, Cardinality::Repeated) => ("repeated", type_name(kind)),
        (kind, Cardinality::Optional) => ("optional", type_name(kind)),
        (kind, Cardinality::Required) => ("required", type_name(kind)),
    };
    let message = short(message.full_name());
    let (number, name, flags) = (field.number(), field.name(), flags(&field.options()));
    format!("field\t{message}\t{number}\t{label}\t{type_name}\t{name}\t{flags}")
}

fn enum_lines(values: &EnumDescriptor) -> Vec<String> {
    let name = short(values.full_name());
    let line = |number, value: &str, flags| format!("enum\t{name}\t{number}\t-\t-\t{value}\t{flags}");
    values.values().map(|value| line(value.number(), value.name(), flags(&value.options()))).collect()
}

fn rpc_line(method: &MethodDescriptor) -> String {
    let streaming = match (method.is_client_streaming(), method.is_server_streaming()) {
        (false, false) => "unary",
        (false, true) => "server-streaming",
        (true, false) => "client-streaming",
        (true, true) => "bidirectional",
    };
    let service = method.parent_service();
    let (request, response) = (short(method.input().full_name()), short(method.output().full_name()));
    let path = format!("/{}/{}", service.full_name(), method.name());
    format!("rpc\t{}\t{}\t{request}\t{response}\t{streaming}\t{path}", service.name(), method.name())
}

/// Messages of the package, without those that stand for the entries of a map.
fn messages(pool: &DescriptorPool) -> Vec<MessageDescriptor> {
    let ours =
        |message: &MessageDescriptor| message.full_name().starts_with(PACKAGE) && !message.is_map_entry();
    pool.all_messages().filter(ours).collect()
}

fn enums(pool: &DescriptorPool) -> Vec<EnumDescriptor> {
    pool.all_enums().filter(|values| values.full_name().starts_with(PACKAGE)).collect()
}

fn compiled_lines(pool: &DescriptorPool) -> Vec<String> {
    let mut lines = Vec::new();
    for message in messages(pool) {
        let name = short(message.full_name());
        for range in message.reserved_ranges() {
            // The compiler's ranges end after their last number.
            lines.push(format!("reserved\t{name}\t{}-{}\t-\t-\t-\t-", range.start, range.end - 1));
        }
        for reserved in message.reserved_names() {
            lines.push(format!("reserved\t{name}\t-\t-\t-\t{reserved}\t-"));
        }
        if message.fields().len() == 0 {
            lines.push(format!("message\t{name}\t-\t-\t-\t-\tno fields"));
        }
        lines.extend(message.fields().map(|field| field_line(&message, &field)));
    }
    lines.extend(enums(pool).iter().flat_map(enum_lines));
    let ours = pool.services().filter(|service| service.full_name().starts_with(PACKAGE));
    lines.extend(
        ours.flat_map(|service| service.methods().map(|method| rpc_line(&method)).collect::<Vec<_>>()),
    );
    lines
}

fn table_lines() -> Vec<String> {
    TABLE.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

/// The number that the table's heading gives for `what`.
fn promised(what: &str) -> usize {
    let heading = TABLE.lines().find(|line| line.starts_with("# counts:")).expect("the table has counts");
    let word = heading.split_whitespace().find_map(|word| word.strip_prefix(&format!("{what}=")));
    let digits = word.expect("the table counts this").trim_end_matches('.');
    digits.parse().expect("a count is a number")
}

#[test]
fn the_proto_file_and_the_table_know_the_same_facts() {
    let (compiled, table) = (compiled_lines(&compiled()), table_lines());
    let (ours, theirs): (BTreeSet<_>, BTreeSet<_>) = (compiled.iter().collect(), table.iter().collect());
    let extra: Vec<_> = ours.difference(&theirs).collect();
    let missing: Vec<_> = theirs.difference(&ours).collect();
    assert!(
        extra.is_empty() && missing.is_empty(),
        "only in api.proto: {extra:#?}\nonly in fields.tsv: {missing:#?}"
    );
    assert_eq!(compiled.len(), ours.len(), "the proto file says nothing twice");
    assert_eq!(table.len(), theirs.len(), "the table says nothing twice");
}

#[test]
fn the_proto_file_has_as_much_of_everything_as_the_table_promises() {
    let pool = compiled();
    let fields = messages(&pool).iter().map(|message| message.fields().len()).sum::<usize>();
    let values = enums(&pool).iter().map(|values| values.values().len()).sum::<usize>();
    let rpcs = pool.services().map(|service| service.methods().len()).sum::<usize>();
    assert_eq!(messages(&pool).len(), promised("messages"));
    assert_eq!(fields, promised("fields"));
    assert_eq!(enums(&pool).len(), promised("enums"));
    assert_eq!(values, promised("enum_values"));
    assert_eq!(rpcs, promised("rpcs"));
}

#[test]
fn no_field_has_presence_beyond_what_the_table_says() {
    // The table's "optional" is the plain singular label; the keyword `optional` would make a oneof
    // of one field.
    for message in messages(&compiled()) {
        assert_eq!(message.oneofs().len(), 0, "{} has no oneof", message.full_name());
    }
}
