//! [`NbdExportConfig`]: how an export over NBD is described.

use blockcore::Error;
use blockcore::options::{Form, OptionKind, OptionSpec, Options};
use formats::nbd::codec::MAX_STRING_BYTES;

use crate::config::{is_identifier, option};

/// An export of a node over NBD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdExportConfig {
    /// Its name in this process.
    pub id: String,
    /// What it offers.
    pub node: String,
    /// What clients call it.
    pub name: String,
    /// What it is, for people; empty for nothing.
    pub description: String,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether each write is stable before it completes.
    pub writethrough: bool,
    /// The named workers that serve it, its connections in turn; empty for those that all exports share.
    pub iothreads: Vec<String>,
    /// Dirty bitmaps that clients may read.
    pub bitmaps: Vec<BitmapChoice>,
    /// Whether clients may ask in which layer ranges are allocated.
    pub allocation_depth: bool,
}

/// A dirty bitmap, as an export names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapChoice {
    /// Its node; `None` for the first of the export's chain that has one of that name.
    pub node: Option<String>,
    /// Its name.
    pub name: String,
}

/// The kind of export that this is.
pub const TYPE: &str = "nbd";

/// The options of `--export type=nbd`.
pub const NBD_EXPORT_OPTIONS: &[OptionSpec] = &[
    option(
        "type",
        OptionKind::Choice(crate::config::EXPORT_TYPES),
        None,
        "kind of export",
    ),
    option("id", OptionKind::Text, None, "name of the export"),
    option("node-name", OptionKind::Text, None, "node to offer"),
    option(
        "writable",
        OptionKind::Bool,
        Some("off"),
        "whether clients may write",
    ),
    option(
        "writethrough",
        OptionKind::Bool,
        Some("off"),
        "whether writes are stable before they complete",
    ),
    option(
        "iothread",
        OptionKind::Text,
        Some(""),
        "the worker that serves all connections; by default those that all exports share",
    ),
    option(
        "iothread.*",
        OptionKind::Text,
        Some(""),
        "workers that serve the connections in turn",
    ),
    option(
        "fixed-iothread",
        OptionKind::Bool,
        Some("off"),
        "taken as QEMU has it: an export always stays where it is",
    ),
    option(
        "allow-inactive",
        OptionKind::Bool,
        Some("off"),
        "not in this version",
    ),
    option(
        "name",
        OptionKind::Text,
        Some(""),
        "what clients call it; by default the node's name",
    ),
    option(
        "description",
        OptionKind::Text,
        Some(""),
        "what it is, for people",
    ),
    option(
        "bitmaps.*",
        OptionKind::Text,
        Some(""),
        "dirty bitmaps that clients may read, of the node or one below it in its chain",
    ),
    option(
        "bitmaps.*.node",
        OptionKind::Text,
        Some(""),
        "the bitmap's node",
    ),
    option(
        "bitmaps.*.name",
        OptionKind::Text,
        Some(""),
        "the bitmap's name",
    ),
    option(
        "allocation-depth",
        OptionKind::Bool,
        Some("off"),
        "whether clients may ask in which layer ranges are allocated",
    ),
];

impl NbdExportConfig {
    /// Reads the options of `--export`, given in this form.
    ///
    /// # Errors
    ///
    /// The first option that is missing, unknown or out of range.
    pub fn from_options(options: &Options, form: Form) -> Result<Self, Error> {
        let options = options.typed(&[NBD_EXPORT_OPTIONS], form, "", "an export", &[])?;
        let text = |name| options.text(NBD_EXPORT_OPTIONS, name).to_owned();
        if options.bool(NBD_EXPORT_OPTIONS, "allow-inactive") {
            return Err(Error::unsupported(
                "option 'allow-inactive' is not in this version of stonework",
            ));
        }
        let node = text("node-name");
        let iothreads = options
            .iter()
            .filter(|(key, _)| key.starts_with("iothread"));
        let iothreads = iothreads.filter_map(|(_, value)| value.as_text());
        let config = Self {
            id: text("id"),
            name: options.get("name").unwrap_or(&node).to_owned(),
            node,
            description: text("description"),
            writable: options.bool(NBD_EXPORT_OPTIONS, "writable"),
            writethrough: options.bool(NBD_EXPORT_OPTIONS, "writethrough"),
            iothreads: iothreads.map(str::to_owned).collect(),
            bitmaps: bitmaps(&options)?,
            allocation_depth: options.bool(NBD_EXPORT_OPTIONS, "allocation-depth"),
        };
        config.check()?;
        Ok(config)
    }

    /// Checks what does not depend on the node.
    ///
    /// # Errors
    ///
    /// The first value that is out of range.
    pub fn check(&self) -> Result<(), Error> {
        if !is_identifier(&self.id) {
            return Err(Error::invalid(format!(
                "Invalid block export id '{}': it is a letter, and after that letters, digits, '-', '.' and '_'",
                self.id
            )));
        }
        let named = [
            ("export name", &self.name),
            ("description", &self.description),
        ];
        for (what, text) in named {
            if text.len() > MAX_STRING_BYTES {
                return Err(Error::invalid(format!(
                    "{what} '{text}' too long: {} bytes, of {MAX_STRING_BYTES} that clients take",
                    text.len()
                )));
            }
        }
        Ok(())
    }
}

/// Each bitmap is a name, or an object of its node's name and its own.
fn bitmaps(options: &Options) -> Result<Vec<BitmapChoice>, Error> {
    let mut bitmaps = Vec::new();
    for place in 0.. {
        let key = format!("bitmaps.{place}");
        let part = |name: &str| options.get(&format!("{key}.{name}")).map(str::to_owned);
        let choice = match (options.get(&key), part("node"), part("name")) {
            (Some(name), None, None) => BitmapChoice {
                node: None,
                name: name.to_owned(),
            },
            (None, Some(node), Some(name)) => BitmapChoice {
                node: Some(node),
                name,
            },
            (None, None, None) => break,
            (Some(_), ..) => {
                return Err(Error::invalid(format!(
                    "Parameters '{key}.*' are unexpected"
                )));
            }
            (None, None, Some(_)) => {
                return Err(Error::invalid(format!("Parameter '{key}.node' is missing")));
            }
            (None, Some(_), None) => {
                return Err(Error::invalid(format!("Parameter '{key}.name' is missing")));
            }
        };
        bitmaps.push(choice);
    }
    Ok(bitmaps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(text: &str) -> Result<NbdExportConfig, Error> {
        let options = Options::parse_schema(text, Some("type"))?;
        NbdExportConfig::from_options(&options, Form::KeyValue)
    }

    #[test]
    fn an_export_is_read_as_qemu_writes_it() {
        let text = "nbd,id=e,node-name=d,bitmaps.0=b,bitmaps.1.node=n,bitmaps.1.name=c,\
                    allocation-depth=on";
        let config = export(text).unwrap();
        assert_eq!((config.name.as_str(), config.writable), ("d", false));
        assert!(config.allocation_depth);
        let choice = |node: Option<&str>, name: &str| BitmapChoice {
            node: node.map(str::to_owned),
            name: name.to_owned(),
        };
        assert_eq!(config.bitmaps, [choice(None, "b"), choice(Some("n"), "c")]);
        assert_eq!(export("nbd,id=e,node-name=d,name=").unwrap().name, "");
    }

    #[test]
    fn impossible_exports_say_what_is_wrong() {
        let message = |more: &str| {
            let text = format!("nbd,id=e,node-name=d,{more}");
            export(&text).unwrap_err().to_string()
        };
        assert!(message("bitmaps.0.name=c").contains("'bitmaps.0.node' is missing"));
        assert!(message("bitmaps.1=c").contains("'bitmaps.0' missing"));
        assert!(message("num-queues=2").contains("'num-queues' is unexpected"));
        assert!(message(&format!("name={}", "x".repeat(4097))).contains("too long"));
        assert!(message("allow-inactive=on").contains("not in this version"));
    }
}
