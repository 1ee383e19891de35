//! `stonework img resize`: changes an image's length.

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::Preallocation;
use clap::Args;

use super::cli::{FormatArgs, parse_bytes};
use super::create::preallocation;
use super::open::How;
use super::{Failure, Program};

/// `stonework img resize`.
#[derive(Args, Debug)]
pub struct ResizeArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Make it shorter: what is past the new end is lost
    #[arg(long)]
    pub shrink: bool,
    /// How space for what is added is prepared: off, metadata, falloc, full
    #[arg(long, value_name = "HOW", default_value = "off")]
    pub preallocation: String,
    /// The image
    pub filename: String,
    /// The new length in bytes, or by how much to change it
    #[arg(value_name = "[+|-]SIZE", value_parser = NewSize::parse)]
    pub size: NewSize,
}

/// A length, or a change of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// Exactly so many bytes.
    Exact(u64),
    /// So many bytes more.
    More(u64),
    /// So many bytes less.
    Less(u64),
}

impl NewSize {
    fn parse(text: &str) -> Result<Self, String> {
        let (kind, digits): (fn(u64) -> Self, _) = match text.split_at_checked(1) {
            Some(("+", digits)) => (Self::More, digits),
            Some(("-", digits)) => (Self::Less, digits),
            _ => (Self::Exact, text),
        };
        parse_bytes(digits).map(kind)
    }

    /// From what is there; `None` if nothing would be left, or too much.
    fn apply(self, bytes: u64) -> Option<u64> {
        let new = match self {
            Self::Exact(new) => Some(new),
            Self::More(more) => bytes.checked_add(more),
            Self::Less(less) => bytes.checked_sub(less),
        };
        new.filter(|new| *new > 0 && i64::try_from(*new).is_ok())
    }
}

pub(super) async fn run(program: Rc<Program>, args: ResizeArgs) -> Result<u8, Failure> {
    let preallocation = preallocation(&args.preallocation)?;
    // Its data comes from elsewhere as before, but what is added must not.
    let image = program
        .open(&args.filename, &How::writing(&args.format)?)
        .await?;
    let before = image.bytes();
    let Some(bytes) = args.size.apply(before) else {
        return Err(Error::invalid(format!(
            "'{}' has {before} bytes: the new length has to be above zero and below 8E",
            args.filename
        ))
        .into());
    };
    if bytes < before && preallocation != Preallocation::Off {
        return Err(Error::invalid("an image that gets shorter has nothing to preallocate").into());
    }
    if bytes < before && !args.shrink {
        return Err(Error::invalid(format!(
            "'{}' would get shorter: all data past {bytes} bytes is lost then, and partitions and file \
             systems have to be made smaller before; if that is done, run '{}'",
            args.filename,
            program.command_with_flag("--shrink")
        ))
        .into());
    }
    let node = image.look(|node| node.name().to_owned());
    program.control.resize(&node, bytes, preallocation).await?;
    image.flush().await?;
    image.close().await?;
    if !args.quiet {
        program.say("Image resized.")?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_with_a_sign_is_a_change() {
        assert_eq!(NewSize::parse("+1k"), Ok(NewSize::More(1024)));
        assert_eq!(NewSize::parse("-1k"), Ok(NewSize::Less(1024)));
        assert_eq!(NewSize::parse("1k"), Ok(NewSize::Exact(1024)));
        for bad in ["", "+", "x", "1Q", "--1"] {
            assert!(NewSize::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn nothing_must_not_be_left() {
        assert_eq!(NewSize::Less(1024).apply(1024), None);
        assert_eq!(NewSize::Less(1024).apply(1000), None);
        assert_eq!(NewSize::Exact(0).apply(1024), None);
        assert_eq!(NewSize::More(u64::MAX).apply(1), None);
        assert_eq!(NewSize::More(512).apply(1024), Some(1536));
    }
}
