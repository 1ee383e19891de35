//! `stonework img create`: what an image that is to be made shall be, also for the verbs that copy into
//! new ones. Making it is in `make`.

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::{DriverKind, DriverType, Preallocation, Role};
use blockcore::filename::full_backing_name;
use blockcore::options::{OptionKind, OptionSpec, Options, parse_size};
use clap::Args;

use super::cli::{ObjectArgs, parse_bytes};
use super::open::How;
use super::{Failure, Program};

/// The child that holds an image's data where the image itself does not.
pub(super) const DATA_FILE: &str = "data-file";

/// `stonework img create`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Format of the image
    #[arg(short, long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,
    /// Options of the format: key=value,...; 'help' lists them
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Hold only what differs from this image; relative to the new one
    #[arg(short, long, value_name = "IMAGE")]
    pub backing: Option<String>,
    /// Format of the backing image
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    /// Do not look at the backing image
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub objects: ObjectArgs,
    /// The image to make; a file that exists is overwritten
    #[arg(required_unless_present = "options")]
    pub filename: Option<String>,
    /// Its length in bytes; with a backing image that of it by default
    #[arg(value_parser = parse_bytes)]
    pub size: Option<u64>,
}

/// An image that is to be made.
#[derive(Clone)]
pub(super) struct Creation {
    pub(super) name: String,
    pub(super) format: &'static DriverType,
    /// Options of the format and of what is below, under their tables' names.
    pub(super) options: Options,
    pub(super) bytes: u64,
    pub(super) backing: Option<NewBacking>,
    /// An external data file, relative to the image.
    pub(super) data_file: Option<String>,
}

/// The backing image that a new image is to name.
#[derive(Clone, Debug, Default)]
pub(super) struct NewBacking {
    /// Relative to the new image.
    pub(super) name: String,
    pub(super) format: Option<String>,
}

pub(super) async fn run(program: Rc<Program>, args: CreateArgs) -> Result<u8, Failure> {
    args.objects.check()?;
    let format = program.creatable(&args.format)?;
    if wants_help(&args.options) {
        program.list_options(format)?;
        return Ok(0);
    }
    let Some(filename) = args.filename else {
        return Err(Error::invalid("the image to make is not named").into());
    };
    let mut options = program.creation_options(format, &args.options)?;
    let data_file = options.take(DATA_FILE);
    let size = options.take("size");
    let said = size.map(|text| parse_bytes(&text).map_err(Error::invalid));
    let size = args
        .size
        .map_or_else(|| said.transpose(), |size| Ok(Some(size)))?;
    let backing = take_backing(&mut options, args.backing, args.backing_format)?;
    if let Some(backing) = &backing {
        check_backing(format, &filename, backing)?;
    }
    let bytes = match (&backing, args.backing_unsafe) {
        (Some(backing), false) => {
            let bytes = backing_bytes(&program, &filename, backing).await?;
            Some(size.unwrap_or(bytes))
        }
        _ => size,
    };
    let Some(bytes) = bytes else {
        return Err(Error::invalid(format!(
            "'{}' needs a size: say it after the name, such as 10G",
            filename
        ))
        .into());
    };
    let creation = Creation {
        name: filename,
        format,
        options,
        bytes,
        backing,
        data_file,
    };
    if !args.quiet {
        program.say(creation.announcement())?;
    }
    program.create(&creation).await?;
    Ok(0)
}

/// Whether one of several `-o` asks what there is.
pub(super) fn wants_help(options: &[String]) -> bool {
    let mut words = options.iter().flat_map(|text| text.split(','));
    words.any(|word| word == "help" || word == "?")
}

/// What `-b` and `-F`, or their names among the options, say.
pub(super) fn take_backing(
    options: &mut Options,
    backing: Option<String>,
    format: Option<String>,
) -> Result<Option<NewBacking>, Error> {
    let name = backing.or(take(options, "backing_file"));
    let format = format.or(take(options, "backing_fmt"));
    match name.filter(|name| !name.is_empty()) {
        Some(name) => Ok(Some(NewBacking { name, format })),
        None if format.is_some() => Err(Error::invalid(
            "a backing image's format (-F) is said without a backing image (-b)",
        )),
        None => Ok(None),
    }
}

/// Takes out an option, however its table writes it.
fn take(options: &mut Options, name: &str) -> Option<String> {
    let found = options.iter().find(|(key, _)| is_same(key, name));
    let key = found?.0.to_owned();
    options.take(&key)
}

/// Refuses what is wrong with a backing image before anything is made.
pub(super) fn check_backing(
    format: &DriverType,
    name: &str,
    backing: &NewBacking,
) -> Result<(), Error> {
    if !format.backing {
        return Err(Error::invalid(format!(
            "images of format '{}' have no backing image",
            format.name
        )));
    }
    let full = full_backing_name(name, &backing.name)?;
    if full.as_deref() == Some(name) {
        return Err(Error::invalid(format!(
            "'{name}' cannot be its own backing image"
        )));
    }
    Ok(())
}

/// The length of a backing image, which must be there and be what it is said to be.
async fn backing_bytes(program: &Program, name: &str, backing: &NewBacking) -> Result<u64, Error> {
    let full = full_backing_name(name, &backing.name)?.unwrap_or_default();
    let Some(format) = &backing.format else {
        return Err(Error::invalid(format!(
            "the format of backing image '{}' is not said, and not guessed: say it with -F, such as {}",
            backing.name,
            program.command_with("-F", "raw")
        )));
    };
    let how = How {
        format: Some(format.clone()),
        write: false,
        force_share: true,
        backing: true,
        ..How::creating()
    };
    let context = |error: Error| {
        let message = format!("cannot open backing image '{full}': {}", error.report());
        Error::new(error.kind(), message)
    };
    let image = program.open(&full, &how).await.map_err(context)?;
    let bytes = image.bytes();
    image.close().await?;
    Ok(bytes)
}

impl Creation {
    /// What is going to be made, in `qemu-img`'s words.
    fn announcement(&self) -> String {
        let mut said = vec![format!("fmt={}", self.format.name)];
        let mut size = Some(format!("size={}", self.bytes));
        for spec in self.format.create_options {
            let shown = shown(spec.name);
            let value = match (&*shown, &self.backing) {
                ("size", _) => {
                    said.extend(size.take());
                    continue;
                }
                ("filename", _) => continue,
                ("backing_file", Some(backing)) => Some(backing.name.as_str()),
                ("backing_fmt", Some(backing)) => backing.format.as_deref(),
                _ => self.options.get(spec.name).or(spec.default),
            };
            let Some(value) = value.filter(|value| !value.is_empty()) else {
                continue;
            };
            let value = match spec.kind {
                OptionKind::Size | OptionKind::Bytes => {
                    parse_size(value).map(|bytes| bytes.to_string())
                }
                _ => None,
            }
            .unwrap_or_else(|| value.to_owned());
            said.push(format!("{shown}={value}"));
        }
        if let Some(size) = size {
            said.push(size);
            let given = self.options.iter();
            said.extend(
                given.map(|(key, value)| format!("{key}={}", value.as_text().unwrap_or(""))),
            );
        }
        format!("Formatting '{}', {}", self.name, said.join(" "))
    }
}

/// Whether images of a format are the bytes of what is below, as it is.
pub(super) fn is_plain(format: &DriverType) -> bool {
    let plain = Options::default();
    match format.kind {
        DriverKind::Protocol => true,
        _ => format.create_on.is_none() && format.child_role(&plain, 0).contains(Role::FILTERED),
    }
}

/// The option of a table that is meant.
pub(super) fn find<'s>(table: &'s [OptionSpec], key: &str) -> Option<&'s OptionSpec> {
    // One option is called otherwise here than in the control protocol, whose names tables have.
    let key = if key == "compat" { "version" } else { key };
    table.iter().find(|spec| is_same(spec.name, key))
}

/// Whether two names are of one option: `qemu-img` writes them with underscores, the control protocol
/// with hyphens.
fn is_same(one: &str, other: &str) -> bool {
    one.replace('-', "_") == other.replace('-', "_")
}

/// An option's name as `qemu-img` writes it.
fn shown(name: &str) -> String {
    match name {
        "version" => "compat".to_owned(),
        name => name.replace('-', "_"),
    }
}

impl Program {
    /// The driver of a format in which images can be made.
    ///
    /// # Errors
    ///
    /// That there is none.
    pub(super) fn creatable(&self, name: &str) -> Result<&'static DriverType, Error> {
        let format = self.format(name)?;
        match format.create_on.is_some() || is_plain(format) {
            true => Ok(format),
            false => Err(Error::unsupported(format!(
                "images of format '{name}' cannot be made by this version of stonework"
            ))),
        }
    }

    /// The options of what is below an image.
    fn file_table(&self) -> &'static [OptionSpec] {
        self.kind("file").map_or(&[], |kind| kind.create_options)
    }

    /// What several `-o` say together, each under its table's name: the last word counts.
    ///
    /// # Errors
    ///
    /// What is no option.
    pub(super) fn creation_options(
        &self,
        format: &DriverType,
        texts: &[String],
    ) -> Result<Options, Error> {
        let mut options = Options::default();
        for text in texts {
            for (key, value) in Options::parse(text, None)?.iter() {
                if is_same(key, DATA_FILE) && format.children.iter().any(|c| c.name == DATA_FILE) {
                    options.set_value(DATA_FILE, value.clone());
                    continue;
                }
                let spec = find(format.create_options, key)
                    .or_else(|| find(self.file_table(), key))
                    .filter(|spec| spec.name != "filename");
                let Some(spec) = spec else {
                    return Err(Error::invalid(format!(
                        "images of format '{}' have no option '{key}': '-o help' lists those there are",
                        format.name
                    )));
                };
                options.set_value(spec.name, value.clone());
            }
        }
        Ok(options)
    }

    /// What several `-o` say an image is to become, each under its table's name: the last word counts.
    ///
    /// # Errors
    ///
    /// What is no option, or one of new images only.
    pub(super) fn amend_options(
        &self,
        format: &DriverType,
        texts: &[String],
    ) -> Result<Options, Error> {
        if format.amend_options.is_empty() {
            return Err(not_amended(format));
        }
        let mut options = Options::default();
        for text in texts {
            for (key, value) in Options::parse(text, None)?.iter() {
                if let Some(spec) = find(format.amend_options, key) {
                    options.set_value(spec.name, value.clone());
                    continue;
                }
                let why = match find(format.create_options, key) {
                    Some(_) => "can be chosen only when an image is made",
                    None => "is none that images have: '-o help' lists those there are",
                };
                return Err(Error::invalid(format!("option '{key}' {why}")));
            }
        }
        Ok(options)
    }

    /// Prints what `-o` takes for new images.
    pub(super) fn list_options(&self, format: &DriverType) -> Result<(), Error> {
        self.say(format!("Supported {} options:", format.name))?;
        let mut specs: Vec<&OptionSpec> = format.create_options.iter().collect();
        let below = self.file_table().iter();
        specs.extend(below.filter(|spec| find(format.create_options, spec.name).is_none()));
        self.list(specs, true)
    }

    /// Prints what `-o` takes for images that are to become others.
    ///
    /// # Errors
    ///
    /// [`blockcore::ErrorKind::Unsupported`] if those of the format cannot.
    pub(super) fn list_amend_options(&self, format: &DriverType) -> Result<(), Error> {
        if format.amend_options.is_empty() {
            return Err(not_amended(format));
        }
        self.say(format!("Amend options for '{}':", format.name))?;
        self.list(format.amend_options.iter().collect(), false)
    }

    fn list(&self, mut specs: Vec<&OptionSpec>, defaults: bool) -> Result<(), Error> {
        specs.retain(|spec| spec.name != "filename");
        specs.sort_by_key(|spec| shown(spec.name));
        for spec in specs {
            let kind = match spec.kind {
                OptionKind::Text => "str".to_owned(),
                OptionKind::Bool => "bool (on/off)".to_owned(),
                OptionKind::Size | OptionKind::Bytes => "size".to_owned(),
                OptionKind::Int => "num".to_owned(),
                OptionKind::Choice(words) => words.join("|"),
            };
            let option = format!("{}=<{kind}>", shown(spec.name));
            let default = spec.default.filter(|text| defaults && !text.is_empty());
            let default = match default {
                Some(default) => format!(" (default: {default})"),
                None => String::new(),
            };
            self.say(format!("  {option:<22} - {}{default}", spec.help))?;
        }
        Ok(())
    }
}

fn not_amended(format: &DriverType) -> Error {
    Error::unsupported(format!(
        "images of format '{}' cannot be amended",
        format.name
    ))
}

/// A preallocation by its name.
pub(super) fn preallocation(text: &str) -> Result<Preallocation, Error> {
    let mut names = Preallocation::NAMES.into_iter();
    let found = names.find(|(name, _)| *name == text);
    found.map(|(_, value)| value).ok_or_else(|| {
        let names = Preallocation::NAMES.map(|(name, _)| name).join(", ");
        Error::invalid(format!(
            "there is no preallocation '{text}'; there are {names}"
        ))
    })
}
