//! A node's options as strictly as QEMU's schema has them: what `--blockdev` and QMP take.
//!
//! The whole tree is looked at before anything is opened: every key is one that its driver has, every value
//! of its type, and what must be given is there. [`Options::typed`] says how strictly. Pure.

use super::{Graph, NODE_OPTIONS};
use crate::Error;
use crate::driver::{ChildSpec, DriverType, Role};
use crate::options::typed::{missing, refused, wrong_type};
use crate::options::{Form, OptionValue, Options};

impl Graph {
    /// The options of a node and of those that it describes below, each value in the kind that its driver's
    /// table gives it.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`]: the first thing that is missing, unknown or of another type.
    pub fn typed_options(&self, options: &Options, form: Form) -> Result<Options, Error> {
        typed_options(self.driver_types(), options.clone(), form, "")
    }
}

/// As [`Graph::typed_options`], of nodes that have these drivers. `prefix` is what stands before keys in
/// messages.
///
/// # Errors
///
/// As there.
pub fn typed_options(
    types: &[&'static DriverType],
    options: Options,
    form: Form,
    prefix: &str,
) -> Result<Options, Error> {
    Visit { types, form }.node(options, prefix)
}

/// Looks at a tree.
struct Visit<'a> {
    types: &'a [&'static DriverType],
    form: Form,
}

impl Visit<'_> {
    /// A node whose options have been under `prefix`, which ends with a dot if there is any.
    fn node(&self, mut options: Options, prefix: &str) -> Result<Options, Error> {
        let kind = self.driver(&options, prefix)?;
        let mut typed = Options::default();
        for child in kind.children {
            let nested = options.take_nested(child.name);
            let scalar = options.take_value(child.name);
            let path = format!("{prefix}{}", child.name);
            match (scalar, nested.is_empty()) {
                (Some(value), _) => typed.set_value(child.name, reference(child, value, &path)?),
                (None, false) => {
                    let first = nested.iter().next().map_or("", |(key, _)| key);
                    if first.starts_with(|letter: char| letter.is_ascii_digit()) {
                        return Err(wrong_type(&path, "BlockdevRef"));
                    }
                    let below = self.node(nested, &format!("{path}."))?;
                    typed.set_nested(child.name, below);
                }
                (None, true) if child.optional => {}
                (None, true) => return Err(missing(&path)),
            }
        }
        let children: Vec<_> = kind.children.iter().map(|child| child.name).collect();
        let whose = format!("driver '{}'", kind.name);
        let tables = [NODE_OPTIONS, kind.options];
        let own = options.typed(&tables, self.form, prefix, &whose, &children)?;
        typed.set_all(own);
        Ok(typed)
    }

    fn driver(&self, options: &Options, prefix: &str) -> Result<&'static DriverType, Error> {
        let path = format!("{prefix}driver");
        let name = match options.value("driver") {
            Some(OptionValue::Text(name)) => name,
            Some(_) => return Err(wrong_type(&path, "string")),
            None => return Err(missing(&path)),
        };
        let found = self.types.iter().find(|kind| kind.name == name);
        found.copied().ok_or_else(|| {
            let known = self.types.iter().map(|kind| kind.name);
            refused(&path, name, known)
        })
    }
}

/// The name of a child's node, or that there is none.
fn reference(child: &ChildSpec, value: OptionValue, path: &str) -> Result<OptionValue, Error> {
    let may_be_absent = child.optional && child.role.contains(Role::COW);
    match &value {
        OptionValue::Null if may_be_absent => Ok(value),
        OptionValue::Text(name) if name.is_empty() && may_be_absent => Ok(OptionValue::Null),
        OptionValue::Text(name) if name.is_empty() => {
            Err(Error::invalid(format!("Parameter '{path}' names no node")))
        }
        OptionValue::Text(_) => Ok(value),
        _ => Err(wrong_type(path, "BlockdevRef")),
    }
}
