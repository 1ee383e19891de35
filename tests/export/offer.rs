//! What a disk offers: features, configuration space, memory slots, backend channel.

use harness::frontend::blk::{self, Request, feature};
use harness::frontend::connection::{code, protocol};
use harness::frontend::{Frontend, LIMIT, Wanted};

use crate::{DISK_SECTORS, Disk, SECTOR, content};
#[test]
fn the_offered_features_are_exactly_those_that_work() {
    let disk = Disk::serve(&[]);
    let frontend = Frontend::unshared(&disk.socket, &Wanted::default());
    let offered = frontend.connection.ask(code::GET_FEATURES, &[]).number();
    let expected = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::DISCARD
        | feature::WRITE_ZEROES
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX
        | feature::PROTOCOL_FEATURES
        | feature::VERSION_1;
    assert_eq!(bit_names(offered), bit_names(expected));
}

#[test]
fn the_offered_protocol_features_are_exactly_those_that_work() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    let offered = frontend
        .connection
        .ask(code::GET_PROTOCOL_FEATURES, &[])
        .number();
    let expected = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::BACKEND_REQ
        | protocol::CONFIG
        | protocol::CONFIGURE_MEM_SLOTS;
    assert_eq!(bit_names(offered), bit_names(expected));
}

#[test]
fn a_read_only_disk_says_so_and_refuses_every_change() {
    let disk = Disk::serve(&["--read-only"]);
    let mut frontend = disk.connect();
    assert!(frontend.has(feature::RO));
    let mut ring = frontend.start_queue(0, 128);
    for request in [
        Request::write(0, &[0xff; SECTOR]),
        Request::discard(&[blk::segment(0, 8, 0)]),
        Request::write_zeroes(&[blk::segment(0, 8, 0)]),
    ] {
        assert_eq!(
            frontend.status(&mut ring, &request),
            blk::IOERR,
            "{request:?}"
        );
    }
    assert_eq!(frontend.read(&mut ring, 7, SECTOR), content(7, 1));
    frontend.succeed(&mut ring, &Request::flush());
    drop(frontend);
    assert!(disk.bytes() == content(0, DISK_SECTORS));
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let disk = Disk::serve(&["--queues", "3"]);
    let frontend = disk.connect();
    let config = frontend.config();
    assert_eq!(config.capacity_sectors, DISK_SECTORS);
    assert_eq!(config.blk_size, 512);
    assert_eq!(config.num_queues, 3);
    assert_eq!(config.writeback, 1);
    assert_eq!(config.write_zeroes_may_unmap, 1);
    assert!(config.size_max >= 4096, "{config:?}");
    assert!(config.seg_max >= 1, "{config:?}");
    assert!(config.max_discard_sectors >= 1, "{config:?}");
    assert!(config.max_discard_seg >= 1, "{config:?}");
    assert!(config.discard_sector_alignment >= 1, "{config:?}");
    assert!(config.max_write_zeroes_sectors >= 1, "{config:?}");
    assert!(config.max_write_zeroes_seg >= 1, "{config:?}");
    let queues = frontend.connection.ask(code::GET_QUEUE_NUM, &[]).number();
    assert_eq!(queues, 3);
}

#[test]
fn a_disk_has_sixteen_queues_unless_told_otherwise() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    assert_eq!(frontend.config().num_queues, 16);
    assert_eq!(
        frontend.connection.ask(code::GET_QUEUE_NUM, &[]).number(),
        16
    );
}

#[test]
fn the_configuration_space_reads_the_same_in_pieces() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    let whole = frontend.config_bytes(0, blk::CONFIG_BYTES);
    for (offset, bytes) in [(0, 8), (8, 4), (12, 4), (20, 4), (32, 1), (34, 2), (56, 4)] {
        assert_eq!(
            frontend.config_bytes(offset, bytes),
            whole[offset as usize..][..bytes as usize],
            "{bytes} bytes at {offset}"
        );
    }
}

#[test]
fn there_is_room_for_many_memory_regions() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    let slots = frontend
        .connection
        .ask(code::GET_MAX_MEM_SLOTS, &[])
        .number();
    assert!(slots >= 32, "{slots} slots");
    for number in 0..31 {
        let region = frontend.memory.add((1 << 40) + (number << 21), 1 << 21);
        frontend.share_region(&region);
    }
}

#[test]
fn a_backend_channel_is_taken_and_can_be_replaced() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let first = frontend.open_backend_channel();
    let mut ring = frontend.start_queue(0, 16);
    assert_eq!(frontend.read(&mut ring, 1, SECTOR), content(1, 1));
    let _second = frontend.open_backend_channel();
    assert!(
        first.closes_within(LIMIT),
        "the replaced channel is kept open"
    );
    assert_eq!(frontend.read(&mut ring, 2, SECTOR), content(2, 1));
}

fn bit_names(bits: u64) -> Vec<u32> {
    (0..64).filter(|bit| bits & (1 << bit) != 0).collect()
}
