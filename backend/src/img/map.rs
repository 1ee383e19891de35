//! `stonework img map`: what the ranges of an image are, and where they lie.

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::StatusFlags;
use clap::Args;

use super::cli::{FormatArgs, OutputFormat, parse_bytes};
use super::open::{How, Image, Probing};
use super::walk::Extent;
use super::{Failure, Program};

/// `stonework img map`.
#[derive(Args, Debug)]
pub struct MapArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// How to print it
    #[arg(long, value_enum, default_value_t)]
    pub output: OutputFormat,
    /// Where to begin, in bytes
    #[arg(short = 's', long, value_name = "OFFSET", value_parser = parse_bytes, default_value = "0")]
    pub start_offset: u64,
    /// How much to look at, in bytes [default: all]
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = parse_bytes)]
    pub max_length: Option<u64>,
    /// Look at it although somebody may be changing it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// The image
    pub filename: String,
}

/// A range that is alike throughout, as it is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    start: u64,
    bytes: u64,
    flags: StatusFlags,
    depth: usize,
    /// Where it lies, and in which file.
    place: Option<(u64, String)>,
}

impl Entry {
    /// Whether `next` only goes on with this one.
    fn continues(&self, next: &Self) -> bool {
        let places = match (&self.place, &next.place) {
            (None, None) => true,
            (Some((offset, file)), Some((next, next_file))) => {
                file == next_file && offset + self.bytes == *next
            }
            _ => false,
        };
        self.start + self.bytes == next.start
            && self.flags == next.flags
            && self.depth == next.depth
            && places
    }

    fn is_data(&self) -> bool {
        self.flags.contains(StatusFlags::DATA) && !self.flags.contains(StatusFlags::ZERO)
    }

    fn json(&self) -> String {
        let has = |flag| self.flags.contains(flag);
        let mut text = format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
             \"data\": {}, \"compressed\": {}",
            self.start,
            self.bytes,
            self.depth,
            has(StatusFlags::ALLOCATED),
            has(StatusFlags::ZERO),
            has(StatusFlags::DATA),
            has(StatusFlags::COMPRESSED),
        );
        if let Some((offset, _)) = &self.place {
            text.push_str(&format!(", \"offset\": {offset}"));
        }
        text.push('}');
        text
    }

    fn human(&self) -> Result<String, Error> {
        let Some((offset, file)) = &self.place else {
            return Err(Error::unsupported(
                "the image has compressed data, or data that lies in no file: --output=json shows it",
            ));
        };
        let hex = |number: u64| match number {
            0 => "0".to_owned(),
            number => format!("{number:#x}"),
        };
        Ok(format!(
            "{:<16}{:<16}{:<16}{file}",
            hex(self.start),
            hex(self.bytes),
            hex(*offset)
        ))
    }
}

pub(super) async fn run(program: Rc<Program>, args: MapArgs) -> Result<u8, Failure> {
    let how = How {
        force_share: args.force_share,
        ..How::reading(&args.format, Probing::Allowed)?
    };
    let image = program.open(&args.filename, &how).await?;
    let length = image.bytes();
    let end = match args.max_length {
        Some(bytes) => length.min(args.start_offset.saturating_add(bytes)),
        None => length,
    };
    let json = args.output == OutputFormat::Json;
    if !json {
        let [offset, bytes, mapped, file] = ["Offset", "Length", "Mapped to", "File"];
        program.say(format!("{offset:<16}{bytes:<16}{mapped:<16}{file}"))?;
    }
    let mut printed = Printed {
        program: &program,
        json,
        begun: false,
    };
    let mut last: Option<Entry> = None;
    let mut offset = args.start_offset;
    while offset < end {
        let extent = image.known_extent(offset, end - offset).await?;
        let entry = entry(&image, offset, &extent);
        offset += entry.bytes;
        match &mut last {
            Some(last) if last.continues(&entry) => last.bytes += entry.bytes,
            last => {
                if let Some(whole) = last.replace(entry) {
                    printed.add(&whole)?;
                }
            }
        }
    }
    // As `qemu-img` has it, nothing is one range, of no bytes.
    printed.add(&last.unwrap_or(Entry {
        start: args.start_offset,
        bytes: 0,
        flags: StatusFlags::empty(),
        depth: 0,
        place: None,
    }))?;
    printed.end()?;
    image.close().await?;
    Ok(0)
}

/// The list as far as it is printed.
struct Printed<'a> {
    program: &'a Program,
    json: bool,
    begun: bool,
}

impl Printed<'_> {
    fn add(&mut self, entry: &Entry) -> Result<(), Error> {
        if !self.json {
            return match entry.is_data() {
                true => self.program.say(entry.human()?),
                false => Ok(()),
            };
        }
        let begin = if self.begun { ",\n" } else { "[" };
        self.begun = true;
        self.program.print(&format!("{begin}{}", entry.json()))
    }

    fn end(self) -> Result<(), Error> {
        match self.json {
            true => self.program.say("]"),
            false => Ok(()),
        }
    }
}

fn entry(image: &Image, start: u64, extent: &Extent) -> Entry {
    let flags = extent.status.flags;
    let place = flags.contains(StatusFlags::PLACE).then(|| {
        let file = file_of(image, extent);
        (extent.status.place.offset, file)
    });
    let kept =
        StatusFlags::ALLOCATED | StatusFlags::ZERO | StatusFlags::DATA | StatusFlags::COMPRESSED;
    Entry {
        start,
        bytes: extent.bytes,
        flags: flags & kept,
        depth: extent.depth,
        place,
    }
}

/// The name of the file in which a range lies.
fn file_of(image: &Image, extent: &Extent) -> String {
    image.control.read(|graph| {
        let layer = graph.chain(image.node).nth(extent.depth);
        let layer = layer.unwrap_or(image.node);
        let child = extent.status.place.child.and_then(|index| {
            let spec = &graph.node_by_id(layer)?.driver_type().children.get(index)?;
            let mut children = graph.children(layer);
            children.find(|(name, _)| *name == spec.name)
        });
        let node = child.map_or(layer, |(_, node)| node.id());
        graph.described(node).name()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(start: u64, offset: u64) -> Entry {
        Entry {
            start,
            bytes: 4096,
            flags: StatusFlags::DATA | StatusFlags::ALLOCATED,
            depth: 0,
            place: Some((offset, "a.raw".into())),
        }
    }

    #[test]
    fn what_goes_on_in_the_same_file_at_the_next_place_is_one_entry() {
        assert!(data(0, 65536).continues(&data(4096, 69632)));
        assert!(!data(0, 65536).continues(&data(4096, 73728)));
        let mut other = data(4096, 69632);
        other.place = Some((69632, "b.raw".into()));
        assert!(!data(0, 65536).continues(&other));
        other.place = None;
        assert!(!data(0, 65536).continues(&other));
    }

    #[test]
    fn lines_are_in_qemus_form() {
        assert_eq!(
            data(0, 65536).human().unwrap(),
            "0               0x1000          0x10000         a.raw"
        );
        assert_eq!(
            data(4096, 0).json(),
            "{ \"start\": 4096, \"length\": 4096, \"depth\": 0, \"present\": true, \"zero\": false, \
             \"data\": true, \"compressed\": false, \"offset\": 0}"
        );
    }

    #[test]
    fn data_without_a_place_has_no_line() {
        let mut entry = data(0, 0);
        entry.place = None;
        assert!(entry.human().is_err());
    }
}
