//! What a seed decides before anything runs: the disk, the guest's driver, what goes wrong.

use std::time::Duration;

use backend::config::{ExportConfig, SocketAddress};
use blockcore::engine::FileType;
use blockcore::engine::sim::{Faults, FileProperties, Random};
use blockcore::io::policy::{ErrorPolicy, OnError};
use blockcore::options::Options;

use crate::{PATH, SERIAL};

/// See the module's header.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) bytes: u64,
    pub(crate) block_bytes: u32,
    pub(crate) raw_offset: u64,
    pub(crate) properties: FileProperties,
    pub(crate) direct: bool,
    pub(crate) unmap: bool,
    pub(crate) no_flush: bool,
    pub(crate) writethrough: bool,
    pub(crate) fast_path: bool,
    pub(crate) capacity: Option<u64>,
    pub(crate) workers: usize,
    pub(crate) queues: usize,
    pub(crate) ring: u16,
    pub(crate) event_index: bool,
    pub(crate) indirect: bool,
    pub(crate) unkicked_permille: u32,
    pub(crate) depth: usize,
    pub(crate) lives: usize,
    pub(crate) requests: usize,
    pub(crate) faults: Faults,
    pub(crate) on_error: ErrorPolicy,
    /// Held requests are tried again by themselves after so long.
    pub(crate) retry: Option<Duration>,
}

impl Case {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut of = |choices: &[u64]| choices[random.below(choices.len() as u64) as usize];
        let device = of(&[0, 0, 1]) == 1;
        let properties = FileProperties {
            file_type: match device {
                true => FileType::BlockDevice,
                false => FileType::Regular,
            },
            direct_alignment: 512,
            memory_alignment: of(&[4, 512]) as u32,
            punches: of(&[0, 1, 1]) == 1,
            zeroes: of(&[0, 1, 1]) == 1,
            ..FileProperties::default()
        };
        let trouble = of(&[0, 1, 2, 2]);
        let permille = |some: u64, from: u64| if trouble >= from { some as u32 } else { 0 };
        let bytes = of(&[8, 64, 256]) * 4096;
        let [reads, writes] = [0, 1].map(|_| match of(&[0, 0, 0, 1, 2, 3, 3, 3]) {
            0 => OnError::Report,
            1 => OnError::Ignore,
            2 => OnError::Enospc,
            _ => OnError::Stop,
        });
        Self {
            seed,
            bytes,
            block_bytes: of(&[512, 512, 4096]) as u32,
            raw_offset: of(&[0, 0, 4096, 512]),
            properties,
            direct: of(&[0, 1]) == 1,
            unmap: of(&[0, 1]) == 1,
            no_flush: of(&[0, 0, 0, 0, 0, 0, 1]) == 1,
            writethrough: of(&[0, 0, 1]) == 1,
            fast_path: of(&[0, 1, 1, 1]) == 1,
            capacity: match of(&[0, 0, 0, 0, 1]) {
                1 if !device => Some(bytes / 2),
                _ => None,
            },
            workers: of(&[1, 2, 2, 3]) as usize,
            queues: of(&[1, 2, 3, 4]) as usize,
            ring: of(&[4, 16, 128]) as u16,
            event_index: of(&[0, 1]) == 1,
            indirect: of(&[0, 1]) == 1,
            unkicked_permille: of(&[0, 0, 300]) as u32,
            depth: of(&[1, 4, 16]) as usize,
            lives: of(&[1, 2, 4]) as usize,
            requests: of(&[50, 100, 200]) as usize,
            faults: Faults {
                short_permille: permille(of(&[0, 50, 300]), 1),
                interrupted_permille: permille(of(&[0, 50]), 1),
                again_permille: permille(of(&[0, 50]), 1),
                read_error_permille: permille(of(&[0, 30, 150]), 2),
                write_error_permille: permille(of(&[0, 30, 150]), 2),
                allocate_error_permille: permille(of(&[0, 30]), 2),
                no_space_permille: permille(of(&[0, 30, 150]), 2),
                stalled_permille: permille(of(&[0, 30]), 2),
                sync_error_permille: permille(of(&[0, 0, 30, 200]), 2),
                call_error_permille: permille(of(&[0, 50]), 2),
                split_permille: of(&[0, 300, 900]) as u32,
                latency_us: (0, of(&[1, 100, 2000])),
                ..Faults::default()
            },
            on_error: ErrorPolicy { reads, writes },
            retry: [None, Some(Duration::from_micros(of(&[10, 5000])))][of(&[0, 0, 1]) as usize],
        }
    }

    /// The node tree, as an operator would write it.
    pub(crate) fn options(&self, read_only: bool) -> Options {
        let on = |mode: bool| if mode { "on" } else { "off" };
        let driver = match self.properties.file_type {
            FileType::BlockDevice => "host_device",
            _ => "file",
        };
        let text = format!(
            "driver=raw,node-name=disk,offset={},size={},discard={},cache.direct={},\
             cache.no-flush={},read-only={},file.driver=pass-through,file.ask={},\
             file.file.driver={driver},file.file.filename={PATH}",
            self.raw_offset,
            self.bytes,
            if self.unmap { "unmap" } else { "ignore" },
            on(self.direct),
            on(self.no_flush),
            on(read_only),
            // Half of the cases have a node that sees each request; in the others it must not matter.
            on(self.seed.is_multiple_of(2)),
        );
        Options::parse(&text, None).expect("well-formed")
    }

    pub(crate) fn export(&self, read_only: bool) -> ExportConfig {
        ExportConfig {
            id: "export".into(),
            node: "disk".into(),
            socket: SocketAddress::Path("/simulated/socket".into()),
            iothreads: Vec::new(),
            writable: !read_only,
            writethrough: self.writethrough,
            queues: self.queues as u16,
            block_bytes: Some(self.block_bytes),
            serial: SERIAL.into(),
            on_error: self.on_error,
            retry_held: self.retry,
        }
    }

    /// Whether requests may be held.
    pub(crate) fn holds(&self) -> bool {
        let stops = |policy| matches!(policy, OnError::Enospc | OnError::Stop);
        stops(self.on_error.reads) || stops(self.on_error.writes)
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        (self.raw_offset + self.bytes).next_multiple_of(4096)
    }
}
