//! Where a file has data and where it has holes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::IoError;
use blockcore::driver::{Place, Status, StatusFlags};
use blockcore::engine::{HostCall, HostReply};
use blockcore::io::{Io, align};

use super::io::FileIo;

impl FileIo {
    /// What the bytes from `offset` on are. A device is all data: its host does not tell. So is a file
    /// if nobody asks for zeroes, or if its file system does not tell.
    ///
    /// What lies past the end of a file that somebody cut short reads as zeroes, as a hole does.
    pub(super) async fn status(
        &self,
        io: Io<'_>,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> Result<Status, IoError> {
        let unit = self.request_alignment();
        let end = align::up(self.bytes().load(Ordering::Acquire), unit);
        let rest = bytes.max(end.saturating_sub(offset));
        if !exact || self.is_device() {
            return Ok(data(offset, rest));
        }
        let call = HostCall::DataExtent(Arc::clone(self.file()), offset);
        let extent = match io.context().host(call).await {
            Ok(HostReply::Extent(extent)) => extent,
            Ok(reply) => unreachable!("a look for data answered with {reply:?}"),
            Err(_) => return Ok(data(offset, rest)),
        };
        Ok(match extent {
            None => hole(offset, rest),
            Some(extent) => of_extent(offset, unit, extent),
        })
    }
}

/// What the bytes from `offset` on are, if the next data is in `extent`. A unit that has some is data.
fn of_extent(offset: u64, unit: u64, (begin, end): (u64, u64)) -> Status {
    let begin = align::down(begin, unit);
    if begin > offset {
        return hole(offset, begin - offset);
    }
    // Cut short between the host's two answers, the data may end before it begins.
    let end = align::up(end.max(offset + 1), unit);
    data(offset, end - offset)
}

fn data(offset: u64, bytes: u64) -> Status {
    at(StatusFlags::DATA, offset, bytes)
}

fn hole(offset: u64, bytes: u64) -> Status {
    at(StatusFlags::ZERO, offset, bytes)
}

fn at(flags: StatusFlags, offset: u64, bytes: u64) -> Status {
    Status {
        flags: flags | StatusFlags::PLACE,
        bytes,
        place: Place {
            child: None,
            offset,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_with_some_data_is_data_and_no_answer_is_empty() {
        for (offset, extent, expected) in [
            (0, (0, 4096), data(0, 4096)),
            (512, (512, 1000), data(512, 512)),
            (0, (4096, 8192), hole(0, 4096)),
            // The file system's blocks are smaller than the unit, or the file ends in one.
            (0, (4097, 8192), hole(0, 4096)),
            (4096, (4097, 4100), data(4096, 512)),
            // Cut short meanwhile.
            (4096, (4096, 4096), data(4096, 512)),
            (4096, (4096, 100), data(4096, 512)),
        ] {
            assert_eq!(of_extent(offset, 512, extent), expected, "{extent:?}");
        }
        assert_eq!(of_extent(7, 1, (7, 8)), data(7, 1));
    }
}
