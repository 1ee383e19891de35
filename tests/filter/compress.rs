//! The filter that has writes compressed.

use std::rc::Rc;

use blockcore::ErrorKind;
use blockcore::driver::StatusFlags;
use blockcore::io::RequestKind;
use harness::overlay::DATA_OFFSET;

use crate::setup::{Machine, pattern};

#[test]
fn whatever_is_written_is_compressed_in_whole_clusters_up_to_an_end_inside_of_one() {
    const BYTES: u64 = 50_001;
    let machine = Machine::new(1);
    machine.create_file("/disk", DATA_OFFSET);
    machine.add(&format!(
        "driver=compress,node-name=c,file.driver=overlay,file.cluster-size=4K,file.size={BYTES},\
         file.file.driver=file,file.file.filename=/disk"
    ));
    let root = machine.root("c");
    let mut model = vec![0; BYTES as usize];
    for (offset, bytes) in [(0, 4096), (10_000, 9000), (BYTES - 10, 10), (41_000, 2000)] {
        let data = pattern(offset as u8, bytes);
        machine.write(&root, offset, &data).unwrap();
        model[offset as usize..][..bytes as usize].copy_from_slice(&data);
    }
    assert!(machine.read(&root, 0, BYTES).unwrap() == model);
    assert!(machine.read(&root, BYTES - 5, 5).unwrap() == model[BYTES as usize - 5..]);
    let compressed = |offset: u64| {
        let root = Rc::clone(&root);
        let status = machine.serve(async move {
            let request = root.enter(RequestKind::Read, 0, 0).await;
            request.block_status(true, offset, 512).await
        });
        let flags = status.unwrap().flags;
        flags.contains(StatusFlags::COMPRESSED)
    };
    for offset in [0, 9000, 19_000, 41_000, BYTES - 1] {
        assert!(compressed(offset), "{offset}");
    }
    assert!(!compressed(30_000));
}

#[test]
fn a_format_that_cannot_compress_is_refused() {
    let machine = Machine::new(1);
    let refused = machine.try_add("driver=compress,node-name=c,file.driver=null-co");
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
}
