//! `stonework img`'s command line: the verbs, and what several of them share.

use blockcore::Error;
use blockcore::options::parse_size;
use clap::{Args, Subcommand, ValueEnum};

use super::{
    amend, bench, bitmap, check, commit, compare, convert, create, dd, info, map, measure, rebase,
    resize, snapshot,
};
use crate::cli::CacheMode;

/// `stonework img`.
#[derive(Args, Debug)]
#[command(
    infer_long_args = true,
    after_help = "Verbs, options, output and exit statuses are qemu-img's. Verbs that only look (info, \
                  map, compare, check, measure, snapshot -l) find out an image's format by themselves; \
                  every other one wants to be told (-f), and refuses a file without a given format \
                  that begins like an image."
)]
pub struct ImgArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Change options of an image's format
    #[command(infer_long_args = true)]
    Amend(amend::AmendArgs),
    /// Measure requests to an image
    #[command(infer_long_args = true)]
    Bench(bench::BenchArgs),
    /// Change a persistent bitmap in an image
    #[command(infer_long_args = true)]
    Bitmap(bitmap::BitmapArgs),
    /// Check an image's metadata, and repair it with -r
    #[command(infer_long_args = true)]
    Check(check::CheckArgs),
    /// Write an image's changes to its backing image
    #[command(infer_long_args = true)]
    Commit(commit::CommitArgs),
    /// Tell whether two images hold the same
    #[command(infer_long_args = true)]
    Compare(compare::CompareArgs),
    /// Copy images to a new one, of another format if wanted
    #[command(infer_long_args = true)]
    Convert(convert::ConvertArgs),
    /// Make an image
    #[command(infer_long_args = true)]
    Create(create::CreateArgs),
    /// Copy blocks of an image to a new one
    #[command(infer_long_args = true)]
    Dd(dd::DdArgs),
    /// Tell what an image is
    #[command(infer_long_args = true)]
    Info(info::InfoArgs),
    /// Tell what ranges of an image are, and where they lie
    #[command(infer_long_args = true)]
    Map(map::MapArgs),
    /// Tell how much space an image would need
    #[command(infer_long_args = true)]
    Measure(measure::MeasureArgs),
    /// Give an image another backing image
    #[command(infer_long_args = true)]
    Rebase(rebase::RebaseArgs),
    /// Change an image's length
    #[command(infer_long_args = true)]
    Resize(resize::ResizeArgs),
    /// List, make, apply or delete snapshots inside an image
    #[command(infer_long_args = true)]
    Snapshot(snapshot::SnapshotArgs),
}

/// How the image of a verb is described.
#[derive(Args, Clone, Debug, Default)]
pub struct FormatArgs {
    /// Format of the image
    #[arg(short, long, value_name = "FORMAT", conflicts_with = "image_opts")]
    pub format: Option<String>,
    /// The image is given as options: driver=qcow2,file.filename=disk.qcow2
    #[arg(long)]
    pub image_opts: bool,
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub objects: ObjectArgs,
}

/// What `qemu-img` takes and this version has no use for.
#[derive(Args, Clone, Debug, Default)]
pub struct ObjectArgs {
    /// Not in this version
    #[arg(long, hide = true)]
    pub object: Vec<String>,
}

impl ObjectArgs {
    /// Refuses objects.
    ///
    /// # Errors
    ///
    /// [`blockcore::ErrorKind::Unsupported`] if there are some.
    pub fn check(&self) -> Result<(), Error> {
        match self.object.is_empty() {
            true => Ok(()),
            false => Err(Error::unsupported(
                "option --object of qemu-img is not in this version of stonework",
            )),
        }
    }
}

/// `--output`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people
    #[default]
    Human,
    /// For programs
    Json,
}

/// A cache mode, under `qemu-img`'s names.
///
/// # Errors
///
/// What there is.
pub fn parse_cache(text: &str) -> Result<CacheMode, String> {
    if text == "off" {
        return Ok(CacheMode::None);
    }
    CacheMode::from_str(text, false).map_err(|_| {
        "a cache mode is one of none, writeback, writethrough, directsync, unsafe".into()
    })
}

/// A number of bytes with a suffix.
///
/// # Errors
///
/// What it should look like.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| {
        "a size is a number of bytes below 8E, with a suffix k, M, G, T, P or E if wanted".into()
    })
}

/// Puts `--` before a last word like `-1G`, the size of `resize`, which would be taken for an option.
/// `arguments` are all of the process's, its name among them.
pub fn with_sizes_apart(mut arguments: Vec<String>) -> Vec<String> {
    let is_resize = arguments.get(1).is_some_and(|word| word == "img")
        && arguments.get(2).is_some_and(|word| word == "resize");
    let is_size = |word: &String| {
        let digits = word.strip_prefix('-');
        digits.is_some_and(|digits| digits.starts_with(|first: char| first.is_ascii_digit()))
    };
    let apart = arguments.iter().any(|word| word == "--");
    if is_resize && !apart && arguments.last().is_some_and(is_size) {
        arguments.insert(arguments.len() - 1, "--".into());
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_negative_size_is_no_option_of_resize_and_of_nothing_else() {
        for (given, made) in [
            ("s img resize a -1G", "s img resize a -- -1G"),
            ("s img resize a -- -1G", "s img resize a -- -1G"),
            ("s img resize a +1G", "s img resize a +1G"),
            ("s img resize a -f", "s img resize a -f"),
            ("s img bench a -1", "s img bench a -1"),
        ] {
            assert_eq!(with_sizes_apart(words(given)), words(made));
        }
    }

    #[test]
    fn cache_modes_have_qemus_names() {
        assert_eq!(parse_cache("off"), Ok(CacheMode::None));
        assert_eq!(parse_cache("unsafe"), Ok(CacheMode::Unsafe));
        assert!(parse_cache("fast").is_err());
    }
}
