//! [`Case`]: what a seed decides before anything runs.

use blockcore::engine::FileType;
use blockcore::engine::sim::{Faults, FileProperties, Random};
use harness::overlay;

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
    /// No root writes from its beginning to its end.
    pub(crate) readers_only: bool,
    pub(crate) fast_path: bool,
    /// How long the operator rests between two changes, at most.
    pub(crate) rest_us: u64,
    pub(crate) faults: Faults,
}

/// A file or device of the host.
#[derive(Clone, Debug)]
pub(crate) struct DiskCase {
    pub(crate) path: String,
    /// The disk's length.
    pub(crate) bytes: u64,
    /// The disk is what an image of clusters of this size holds, above a base.
    pub(crate) cluster: Option<u64>,
    /// Where the base is.
    pub(crate) base_path: String,
    /// How long the base is.
    pub(crate) base_bytes: u64,
    pub(crate) direct: bool,
    /// It gets longer and shorter.
    pub(crate) resizes: bool,
    /// Its file is open for writing only while somebody writes.
    pub(crate) auto_read_only: bool,
    is_device: bool,
    pub(crate) properties: FileProperties,
}

impl DiskCase {
    /// What goes together: images lie in files, which grow; a base is no longer than its image.
    fn fitted(mut self) -> Self {
        self.base_bytes = self.base_bytes.min(self.bytes);
        if self.cluster.is_some() {
            // A power cut may leave any number of sectors of a file that grew, and a host that wants more
            // for direct I/O does not open it then.
            self.properties.direct_alignment = 512;
        }
        if self.is_device && self.cluster.is_none() {
            self.properties.file_type = FileType::BlockDevice;
        }
        self.resizes &= self.can_resize();
        if self.resizes {
            // As above.
            self.properties.direct_alignment = 512;
        }
        self
    }

    /// How long its file is at first.
    pub(crate) fn file_bytes(&self) -> u64 {
        match self.cluster {
            None => self.bytes,
            Some(_) => 0,
        }
    }

    /// The disk, from what the files hold.
    pub(crate) fn decode(&self, file: &[u8], base: &[u8]) -> Vec<u8> {
        let Some(cluster) = self.cluster else {
            let mut disk = file.to_vec();
            // What is past the end is zero if it ever gets longer.
            disk.resize(self.most_bytes() as usize, 0);
            return disk;
        };
        let byte = |of: &[u8], at: u64| of.get(at as usize).copied().unwrap_or(0);
        let bytes =
            (0..self.bytes).map(|at| match byte(file, overlay::MAP_OFFSET + at / cluster) {
                0 => byte(base, at),
                1 | 3 => byte(file, overlay::DATA_OFFSET + at),
                _ => 0,
            });
        bytes.collect()
    }
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
                cluster: match of(&[0, 0, 1]) {
                    0 => None,
                    _ => Some(of(&[512, 4096, 16384])),
                },
                base_path: format!("/simulated/base{number}"),
                base_bytes: of(&[2, 4, 24]) * 4096,
                direct: of(&[0, 1]) == 1,
                resizes: of(&[0, 1]) == 1,
                auto_read_only: of(&[0, 1]) == 1,
                is_device: of(&[0, 0, 0, 1]) == 1,
                properties: FileProperties {
                    file_type: FileType::Regular,
                    direct_alignment: of(&[512, 4096]) as u32,
                    memory_alignment: of(&[4, 512]) as u32,
                    punches: of(&[0, 1, 1]) == 1,
                    zeroes: of(&[0, 1, 1]) == 1,
                    ..FileProperties::default()
                },
            })
            .map(DiskCase::fitted)
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
            readers_only: of(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 1]) == 1,
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

    /// The driver for a disk's file.
    pub(crate) fn driver(disk: &DiskCase) -> &'static str {
        match disk.properties.file_type {
            FileType::BlockDevice => "host_device",
            _ => "file",
        }
    }
}
