//! [`ExportOptions`]: how an export is described, from the table of its options.

use blockcore::options::Options;
use serde_json::Value;

use super::node::Part;
use super::{Input, Member, Qapi, QmpError, Schema};
use crate::config::{EXPORT_OPTIONS, EXPORT_TYPES, ExportConfig};

/// What an export is to be.
#[derive(Clone, Debug)]
pub struct ExportOptions(pub ExportConfig);

impl Qapi for ExportOptions {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        let options = Options::from_schema_json(input.value)?;
        let config = ExportConfig::from_options(&options, input.form)?;
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
            let (common, own): (Vec<_>, Vec<_>) = EXPORT_OPTIONS
                .iter()
                .filter(|spec| spec.name != "type")
                .partition(|spec| COMMON.contains(&spec.name.trim_end_matches(".*")));
            let mut base = vec![tag];
            base.extend(Part::of_table(common).members(schema, "BlockExportOptions"));
            let key = "BlockExportOptions:vhost-user-blk";
            let case = schema.object_of(key, |schema| Part::of_table(own).members(schema, key));
            (base, vec![("vhost-user-blk".to_owned(), case)])
        })
    }
}
