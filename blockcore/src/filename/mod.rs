//! Names of images: what a plain name, a `protocol:` name and a `json:` name mean. Pure.
//!
//! An image may be given by a name instead of options, and images name their backing images so. The
//! rules are QEMU's, since the names inside images are: a relative name is relative to the image that
//! contains it, and a colon before the first slash ends a protocol.
//!
//! Names come out of images, which may be hostile: every function here takes any text, and refuses
//! what no host takes (a NUL, more than [`MAX_NAME_BYTES`]).
//!
//! Not here: canonical paths, which only the host knows ([`same_backing`] says which two to compare),
//! and guessing whether a plain name is a host device.

mod described;

pub use self::described::{ChildPart, Described, NameSource, NodeParts, describe};
use crate::options::Options;
use crate::{Error, ErrorKind};

/// Longest plain name, in bytes: what Linux takes as a path (`PATH_MAX`, less the NUL).
pub const MAX_NAME_BYTES: usize = 4095;
/// Longest `json:` name that is read. What describes a chain of a hundred images takes some 20 KiB.
pub const MAX_JSON_NAME_BYTES: usize = 64 << 10;

/// What begins a name that is options in JSON.
const JSON: &str = "json:";

/// A protocol that names may begin with.
pub struct Protocol {
    /// What is before the colon: `nbd+unix`.
    pub prefix: &'static str,
    /// The driver that opens such names.
    pub driver: &'static str,
    /// Turns a name with this prefix into the driver's options. Sees the whole name.
    pub parse: fn(&str) -> Result<Options, Error>,
}

/// What a name begins with, up to a colon before the first slash. Of `nbd+unix:///disk`, `nbd+unix`.
pub fn protocol(name: &str) -> Option<&str> {
    let end = name.find([':', '/'])?;
    name[end..].starts_with(':').then(|| &name[..end])
}

/// Whether there is a colon before the first slash.
pub fn has_protocol(name: &str) -> bool {
    protocol(name).is_some()
}

/// Whether the name begins at the root of the file system.
pub fn is_absolute(name: &str) -> bool {
    name.starts_with('/')
}

/// A name, relative to the place of another: what is up to its last slash, never less than its
/// protocol. An absolute name is not changed.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] if `base` is a `json:` name, which is in no place, or if the result could
/// not be a name.
pub fn combine(base: &str, name: &str) -> Result<String, Error> {
    let combined = match is_absolute(name) {
        true => name.to_owned(),
        false => format!("{}{name}", base_directory(base)?),
    };
    check(&combined)?;
    Ok(combined)
}

/// The place of a node with this plain name: what relative names begin with. Empty for a name without
/// a slash, which is relative itself.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for a `json:` name.
pub fn base_directory(name: &str) -> Result<&str, Error> {
    if name.starts_with(JSON) {
        return Err(Error::invalid(format!(
            "no name can be relative to '{}', which is in no directory",
            shown(name)
        )));
    }
    let after_protocol = protocol(name).map_or(0, |prefix| prefix.len() + 1);
    let after_slash = name.rfind('/').map_or(0, |slash| slash + 1);
    Ok(&name[..after_protocol.max(after_slash)])
}

/// Where the backing image is that the image called `overlay` names `backing` in its header. `None` if
/// it names none.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] if `backing` is relative and `overlay` is no plain name; if either could not
/// be a name.
pub fn full_backing_name(overlay: &str, backing: &str) -> Result<Option<String>, Error> {
    if backing.is_empty() {
        return Ok(None);
    }
    if has_protocol(backing) || is_absolute(backing) {
        check(backing)?;
        return Ok(Some(backing.to_owned()));
    }
    if overlay.is_empty() {
        return Err(Error::invalid(format!(
            "cannot tell where backing image '{}' is: its overlay, to which it is relative, has no \
             name",
            shown(backing)
        )));
    }
    combine(overlay, backing).map(Some)
}

/// The options that open an image called `name`. A name without a protocol goes to driver `plain`.
///
/// # Errors
///
/// [`ErrorKind::NotFound`] for a protocol that is not in `protocols`; [`ErrorKind::Invalid`] for what
/// is no name, or not one of its protocol.
pub fn to_options(name: &str, protocols: &[Protocol], plain: &str) -> Result<Options, Error> {
    if let Some(options) = parse_json_name(name)? {
        return Ok(options);
    }
    check(name)?;
    if name.is_empty() {
        return Err(Error::invalid("an image's name is not empty"));
    }
    let Some(prefix) = protocol(name) else {
        let mut options = Options::default();
        options.set("driver", plain);
        options.set("filename", name);
        return Ok(options);
    };
    let found = protocols.iter().find(|known| known.prefix == prefix);
    let Some(found) = found else {
        let known: Vec<_> = protocols.iter().map(|known| known.prefix).collect();
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "'{0}' begins with protocol '{1}', and there are {2}; a file of that name is './{0}'",
                shown(name),
                shown(prefix),
                known.join(", "),
            ),
        ));
    };
    let mut options = (found.parse)(name)?;
    if options.value("driver").is_none() {
        options.set("driver", found.driver);
    }
    Ok(options)
}

/// For drivers whose names are a prefix and something to be had as it is: that, as option `filename`.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] if nothing follows the prefix.
pub fn strip_prefix(name: &str, prefix: &str) -> Result<Options, Error> {
    let rest = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix(':'));
    let Some(rest) = rest.filter(|rest| !rest.is_empty()) else {
        return Err(Error::invalid(format!(
            "'{}' names nothing after '{prefix}:'",
            shown(name)
        )));
    };
    let mut options = Options::default();
    options.set("filename", rest);
    Ok(options)
}

/// The plain name of a file: its path, written so that it is not taken for a protocol. `None` if no
/// name can say it.
pub fn of_path(path: &str) -> Option<String> {
    let name = match has_protocol(path) {
        true => format!("./{path}"),
        false => path.to_owned(),
    };
    (!name.is_empty() && check(&name).is_ok()).then_some(name)
}

/// The options in a `json:` name; `None` for any other.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for what is not an object, as [`Options::parse_json`].
pub fn parse_json_name(name: &str) -> Result<Option<Options>, Error> {
    let Some(json) = name.strip_prefix(JSON) else {
        return Ok(None);
    };
    if json.len() > MAX_JSON_NAME_BYTES {
        return Err(Error::invalid(format!(
            "'{}' has {} bytes, and a name has at most {MAX_JSON_NAME_BYTES}",
            shown(name),
            json.len()
        )));
    }
    Options::parse_json(json).map(Some)
}

/// The `json:` name that [`parse_json_name`] reads as these options.
pub fn json_name(options: &Options) -> String {
    format!("{JSON}{}", options.to_json())
}

/// Whether the backing node that an image has is another than the one that its header asks for, so that
/// its own name does not describe it.
///
/// `header` is what the header's name came to when it was opened: the opened node's name, which need
/// not be the text in the header. `attached` is the name of the backing node now.
pub fn backing_overridden(header: &str, attached: Option<&str>) -> bool {
    attached.unwrap_or("") != header
}

/// Whether two names are of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sameness {
    /// They are.
    Same,
    /// They are not.
    Different,
    /// They are if both have a canonical path and that is the same. For the host to say.
    IfCanonical {
        /// A path of one.
        one: String,
        /// A path of the other.
        other: String,
    },
}

/// Whether `wanted`, as an operator writes it, is the backing image that `overlay` calls `backing` in
/// its header. Both are relative to the overlay: never to this process's directory.
pub fn same_backing(wanted: &str, overlay: &str, backing: &str) -> Sameness {
    let same = |same| match same {
        true => Sameness::Same,
        false => Sameness::Different,
    };
    if wanted.is_empty() || backing.is_empty() {
        return Sameness::Different;
    }
    if wanted == backing {
        return Sameness::Same;
    }
    let full = |name| full_backing_name(overlay, name).ok().flatten();
    let (Some(one), Some(other)) = (full(wanted), full(backing)) else {
        return Sameness::Different;
    };
    // Of what is no path the text is all there is, and a name may be written out in full.
    if has_protocol(&one) || has_protocol(&other) {
        return same(wanted == other || one == other);
    }
    match one == other {
        true => Sameness::Same,
        false => Sameness::IfCanonical { one, other },
    }
}

/// Whether some host could take this text as a name.
fn check(name: &str) -> Result<(), Error> {
    let limit = match name.starts_with(JSON) {
        true => MAX_JSON_NAME_BYTES + JSON.len(),
        false => MAX_NAME_BYTES,
    };
    if name.contains('\0') {
        return Err(Error::invalid(format!(
            "'{}' has a NUL in it, and no image's name has",
            shown(name)
        )));
    }
    if name.len() > limit {
        return Err(Error::invalid(format!(
            "'{}' has {} bytes, and a name has at most {limit}",
            shown(name),
            name.len()
        )));
    }
    Ok(())
}

/// A name for a message: without what a terminal would act upon, and of a length to be read.
fn shown(name: &str) -> String {
    const LONGEST: usize = 100;
    let mut text: String = name.chars().take(LONGEST).collect();
    if text.len() < name.len() {
        text.push('…');
    }
    text.escape_debug().to_string()
}

#[cfg(test)]
mod tests;
