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
        schema.union("BlockExportOptions", "type", |schema| {
            let tag = Member {
                name: "type".to_owned(),
                kind: schema.choice("BlockExportType", EXPORT_TYPES),
                optional: false,
            };
            let others = EXPORT_OPTIONS.iter().filter(|spec| spec.name != "type");
            let key = "BlockExportOptions:vhost-user-blk";
            let case = schema.object_of(key, |schema| Part::of_table(others).members(schema, key));
            (vec![tag], vec![("vhost-user-blk".to_owned(), case)])
        })
    }
}
