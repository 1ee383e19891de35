//! `stonework img dd`: copies blocks of an image to a new one.

use std::rc::Rc;

use blockcore::Error;
use blockcore::io::buffer::Segments;
use blockcore::options::{Options, parse_size};
use clap::Args;

use super::cli::FormatArgs;
use super::create::Creation;
use super::open::{How, Probing};
use super::{Failure, Program};

/// Block size without a given one.
const DEFAULT_BLOCK_BYTES: u64 = 512;
/// Largest block size: what fits a signed 32 bit number.
const MAX_BLOCK_BYTES: u64 = i32::MAX as u64;
/// How much is copied at once, whatever the block size.
const CHUNK_BYTES: u64 = 2 << 20;

/// `stonework img dd`.
#[derive(Args, Debug)]
pub struct DdArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// Format of the new image
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub output_format: String,
    /// Read it although somebody may be changing it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// if=IMAGE of=IMAGE [bs=BYTES] [count=BLOCKS] [skip=BLOCKS]
    #[arg(value_name = "OPERAND", required = true)]
    pub operands: Vec<String>,
}

/// What the operands say.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Operands {
    input: String,
    output: String,
    block_bytes: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(texts: &[String]) -> Result<Self, Error> {
        let number = |name: &str, text: &str| {
            parse_size(text).ok_or_else(|| {
                Error::invalid(format!("operand '{name}' takes a number, not '{text}'"))
            })
        };
        let (mut input, mut output) = (None, None);
        let (mut block_bytes, mut count, mut skip) = (DEFAULT_BLOCK_BYTES, None, 0);
        for text in texts {
            let Some((name, value)) = text.split_once('=') else {
                return Err(Error::invalid(format!(
                    "'{text}' is no operand such as if=IMAGE"
                )));
            };
            match name {
                "if" => input = Some(value.to_owned()),
                "of" => output = Some(value.to_owned()),
                "bs" => block_bytes = number(name, value)?,
                "count" => count = Some(number(name, value)?),
                "skip" => skip = number(name, value)?,
                _ => {
                    return Err(Error::invalid(format!(
                        "there is no operand '{name}'; there are if, of, bs, count, skip"
                    )));
                }
            }
        }
        if !(1..=MAX_BLOCK_BYTES).contains(&block_bytes) {
            return Err(Error::invalid(format!(
                "operand 'bs' is from 1 to {MAX_BLOCK_BYTES}, not {block_bytes}"
            )));
        }
        let (Some(input), Some(output)) = (input, output) else {
            return Err(Error::invalid("dd needs both if=IMAGE and of=IMAGE"));
        };
        Ok(Self {
            input,
            output,
            block_bytes,
            count,
            skip,
        })
    }

    /// The range of an image of so many bytes that is copied: where it begins, and how long it is.
    /// `None` if there is nothing to skip to.
    fn range(&self, bytes: u64) -> Option<(u64, u64)> {
        let begin = self.block_bytes.checked_mul(self.skip)?;
        let rest = bytes.checked_sub(begin)?;
        let wanted = match self.count {
            Some(count) => count.saturating_mul(self.block_bytes),
            None => u64::MAX,
        };
        Some((begin, rest.min(wanted)))
    }
}

pub(super) async fn run(program: Rc<Program>, args: DdArgs) -> Result<u8, Failure> {
    let operands = Operands::parse(&args.operands)?;
    let format = program.creatable(&args.output_format)?;
    let how = How {
        force_share: args.force_share,
        ..How::reading(&args.format, Probing::Refused("-f"))?
    };
    let source = program.open(&operands.input, &how).await?;
    let range = operands.range(source.bytes());
    let (begin, bytes) = range.unwrap_or_else(|| {
        program.warn(format!(
            "'{}' ends before what is to be skipped",
            operands.input
        ));
        (0, 0)
    });
    let creation = Creation {
        name: operands.output.clone(),
        format,
        options: Options::default(),
        bytes,
        backing: None,
        data_file: None,
    };
    program.create(&creation).await?;
    let how = How {
        format: Some(args.output_format.clone()),
        image_opts: false,
        probing: Probing::Refused("-O"),
        write: true,
        force_share: false,
        ..how
    };
    let target = program.open(&operands.output, &how).await?;
    let buffer = Segments::allocate(CHUNK_BYTES.min(bytes.max(1)) as usize, 4096);
    let mut done = 0;
    while done < bytes {
        let part = buffer.slice(0, CHUNK_BYTES.min(bytes - done));
        source.read(begin + done, part.clone()).await?;
        target.write(done, part.clone()).await?;
        done += part.bytes();
    }
    target.flush().await?;
    target.close().await?;
    source.close().await?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Operands, Error> {
        let words: Vec<_> = text.split(' ').map(str::to_owned).collect();
        Operands::parse(&words)
    }

    #[test]
    fn operands_come_in_any_order_and_both_images_are_needed() {
        let operands = parse("count=3 of=b bs=1k if=a skip=2").unwrap();
        assert_eq!(operands.range(1 << 20), Some((2048, 3072)));
        assert_eq!(operands.range(3072), Some((2048, 1024)));
        assert_eq!(operands.range(2048), Some((2048, 0)));
        assert_eq!(operands.range(2047), None);
        for bad in [
            "if=a",
            "of=b",
            "if=a of=b bs=0",
            "if=a of=b bs=2G",
            "if=a of=b seek=1",
            "a",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
