//! [`Case`]: what a seed decides before anything runs.

use blockcore::engine::FileType;
use blockcore::engine::sim::{Faults, FileProperties, Random};

/// See the module's header.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    /// Requests come in multiples of this, and parts of disks begin at them.
    pub(crate) grain: u64,
    pub(crate) disks: Vec<DiskCase>,
    pub(crate) workers: usize,
    pub(crate) depth: usize,
    pub(crate) lives: usize,
    pub(crate) requests: usize,
    pub(crate) roots: usize,
    pub(crate) fast_path: bool,
    /// How long the operator rests between two changes, at most.
    pub(crate) rest_us: u64,
    pub(crate) faults: Faults,
}

/// A file or device of the host.
#[derive(Clone, Debug)]
pub(crate) struct DiskCase {
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) direct: bool,
    pub(crate) properties: FileProperties,
}

impl Case {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut of = |choices: &[u64]| choices[random.below(choices.len() as u64) as usize];
        let grain = of(&[16, 512, 512, 512]);
        let disks = (0..of(&[1, 2, 2]))
            .map(|number| DiskCase {
                path: format!("/simulated/disk{number}"),
                bytes: match grain {
                    16 => of(&[2, 4]) * 4096,
                    _ => of(&[4, 8, 24]) * 4096,
                },
                direct: of(&[0, 1]) == 1,
                properties: FileProperties {
                    file_type: match of(&[0, 0, 0, 1]) {
                        0 => FileType::Regular,
                        _ => FileType::BlockDevice,
                    },
                    direct_alignment: of(&[512, 4096]) as u32,
                    memory_alignment: of(&[4, 512]) as u32,
                    punches: of(&[0, 1, 1]) == 1,
                    zeroes: of(&[0, 1, 1]) == 1,
                    ..FileProperties::default()
                },
            })
            .collect();
        let (transient, fails) = match of(&[0, 0, 1, 2, 2]) {
            0 => (false, false),
            1 => (true, false),
            _ => (true, true),
        };
        let permille = |some: u64, trouble: bool| if trouble { some as u32 } else { 0 };
        Self {
            seed,
            grain,
            disks,
            workers: of(&[1, 2, 3]) as usize,
            depth: of(&[2, 8, 16]) as usize,
            lives: of(&[1, 2, 3]) as usize,
            requests: of(&[40, 80, 160]) as usize,
            roots: of(&[1, 2, 3, 4]) as usize,
            fast_path: of(&[0, 1, 1]) == 1,
            rest_us: of(&[50, 500, 3000]),
            faults: Faults {
                short_permille: permille(of(&[0, 50, 300]), transient),
                interrupted_permille: permille(of(&[0, 50]), transient),
                again_permille: permille(of(&[0, 50]), transient),
                read_error_permille: permille(of(&[0, 30]), fails),
                write_error_permille: permille(of(&[0, 30]), fails),
                allocate_error_permille: permille(of(&[0, 30]), fails),
                no_space_permille: permille(of(&[0, 30]), fails),
                sync_error_permille: permille(of(&[0, 50, 200]), fails),
                call_error_permille: permille(of(&[0, 30, 100]), fails),
                split_permille: of(&[0, 300, 900]) as u32,
                latency_us: (0, of(&[1, 100, 2000])),
                ..Faults::default()
            },
        }
    }

    /// The driver for a disk.
    pub(crate) fn driver(disk: &DiskCase) -> &'static str {
        match disk.properties.file_type {
            FileType::BlockDevice => "host_device",
            _ => "file",
        }
    }
}
