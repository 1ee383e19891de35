//! [`ExportOptions`]: how an export is described, from the table of its options.

use blockcore::options::{OptionSpec, Options};
use serde_json::Value;

use super::node::Part;
use super::{Input, Member, Qapi, QmpError, Schema};
use crate::config::{AnyExportConfig, EXPORT_OPTIONS, EXPORT_TYPES};
use crate::nbd::config::NBD_EXPORT_OPTIONS;

/// What an export is to be.
#[derive(Clone, Debug)]
pub struct ExportOptions(pub AnyExportConfig);

impl Qapi for ExportOptions {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        let options = Options::from_schema_json(input.value)?;
        let config = AnyExportConfig::from_options(&options, input.form)?;
        Ok(Self(config))
    }

    fn emit(&self) -> Option<Value> {
        None
    }

    fn describe(schema: &mut Schema) -> String {
        /// What all kinds of exports take.
        const COMMON: [&str; 7] = [
            "id",
            "node-name",
            "iothread",
            "fixed-iothread",
            "writable",
            "writethrough",
            "allow-inactive",
        ];
        schema.union("BlockExportOptions", "type", |schema| {
            let tag = Member {
                name: "type".to_owned(),
                kind: schema.choice("BlockExportType", EXPORT_TYPES),
                optional: false,
            };
            let is_common = |spec: &&OptionSpec| COMMON.contains(&spec.name.trim_end_matches(".*"));
            let common = EXPORT_OPTIONS.iter().filter(|spec| spec.name != "type");
            let common = Part::of_table(common.filter(is_common));
            let mut base = vec![tag];
            base.extend(common.members(schema, "BlockExportOptions"));
            let tables = [EXPORT_OPTIONS, NBD_EXPORT_OPTIONS];
            let cases = EXPORT_TYPES.iter().zip(tables).map(|(kind, table)| {
                let own = table.iter().filter(|spec| spec.name != "type");
                let own = Part::of_table(own.filter(|spec| !is_common(spec)));
                let key = format!("BlockExportOptions:{kind}");
                let case = schema.object_of(&key, |schema| own.members(schema, &key));
                ((*kind).to_owned(), case)
            });
            let cases = cases.collect();
            (base, cases)
        })
    }
}
