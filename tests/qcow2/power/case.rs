//! [`Case`]: what a seed decides before anything runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;
use std::sync::Mutex;

use blockcore::engine::sim::{Faults, Random};
use harness::history;

/// The write that made backing images.
pub(crate) const BASE_TAG: u32 = 1;

/// The files of an image: each name, as it is in the image's header, with what it holds.
pub(crate) type Files = BTreeMap<&'static str, Vec<u8>>;

/// See the module's header.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    /// Requests come in multiples of this.
    pub(crate) grain: u64,
    /// For `qemu-img create -o`.
    pub(crate) create: String,
    pub(crate) cluster: u64,
    pub(crate) bytes: u64,
    pub(crate) data_file: bool,
    /// Length and format of the backing image.
    pub(crate) backing: Option<(u64, &'static str)>,
    /// How we open it.
    pub(crate) open: String,
    pub(crate) direct: bool,
    pub(crate) workers: usize,
    /// Requests in flight on each worker.
    pub(crate) depth: usize,
    pub(crate) lives: usize,
    pub(crate) requests: usize,
    pub(crate) fast_path: bool,
    /// How long the operator rests between two changes, at most; 0 for no operator.
    pub(crate) rest_us: u64,
    pub(crate) faults: Faults,
    /// Operations can fail for good.
    pub(crate) fails: bool,
    /// There is a runtime directory, so that what completed survives a kill.
    pub(crate) keeps: bool,
}

impl Case {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut of = |choices: &[u64]| choices[random.below(choices.len() as u64) as usize];
        let cluster = 512 << of(&[0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 5, 5, 7]);
        let version_2 = of(&[0, 0, 0, 1]) == 1;
        let bytes = match cluster {
            512 => of(&[32, 64, 128, 200]) << 10,
            65536 => of(&[5, 12]) * cluster,
            _ => (cluster * of(&[10, 40, 150])).min(400 << 10),
        };
        let bytes = bytes - of(&[0, 0, 512, 1536]);
        let data_file = !version_2 && of(&[0, 0, 0, 0, 0, 1]) == 1;
        let mut create = format!("cluster_size={cluster}");
        if version_2 {
            create.push_str(",compat=0.10");
        } else {
            let width = of(&[0, 1, 2, 3, 4, 4, 4, 5, 6, 6]);
            write!(create, ",refcount_bits={}", 1 << width).unwrap();
            if cluster >= 16384 && of(&[0, 1, 1]) > 0 {
                create.push_str(",extended_l2=on");
            }
            if of(&[0, 0, 1]) == 1 {
                create.push_str(",lazy_refcounts=on");
            }
            if !data_file && of(&[0, 0, 1]) == 1 {
                create.push_str(",compression_type=zstd");
            }
        }
        let mut backing = None;
        match of(&[0, 0, 0, 1, 2, 2]) {
            1 => create.push_str(",preallocation=metadata"),
            2 => {
                let length = match of(&[0, 1, 2]) {
                    0 => bytes,
                    1 => (bytes / 2).next_multiple_of(512),
                    _ => bytes + 20 * 512,
                };
                backing = Some((length, ["raw", "qcow2"][of(&[0, 1]) as usize]));
            }
            _ => {}
        }
        let mut open = match of(&[0, 1, 1, 2]) {
            0 => "l2-cache-size=4k,refcount-cache-size=1k".to_owned(),
            1 => "l2-cache-size=1,l2-cache-entry-size=512".to_owned(),
            _ => "discard=unmap".to_owned(),
        };
        if of(&[0, 1]) == 1 {
            open.push_str(",pass-discard-request=on");
        }
        if of(&[0, 0, 1]) == 1 {
            open.push_str(",pass-discard-other=on");
        }
        if !version_2 && of(&[0, 0, 0, 0, 1]) == 1 {
            open.push_str(",discard-no-unref=on");
        }
        let (transient, fails) = match of(&[0, 0, 0, 1, 1, 2]) {
            0 => (false, false),
            1 => (true, false),
            _ => (true, true),
        };
        let permille = |some: u64, trouble: bool| if trouble { some as u32 } else { 0 };
        Self {
            seed,
            grain: of(&[64, 512, 512, 512, 512]),
            create,
            cluster,
            bytes,
            data_file,
            backing,
            open,
            direct: of(&[0, 1]) == 1,
            workers: of(&[1, 2, 3]) as usize,
            depth: of(&[2, 4, 6]) as usize,
            lives: of(&[2, 3, 4]) as usize,
            requests: match cluster {
                // Files grow by many clusters at a time.
                16384.. => 20,
                _ => of(&[20, 50, 90]) as usize,
            },
            fast_path: of(&[0, 1, 1]) == 1,
            rest_us: of(&[0, 500, 3000, 20_000]),
            faults: Faults {
                short_permille: permille(of(&[0, 50, 300]), transient),
                interrupted_permille: permille(of(&[0, 50]), transient),
                again_permille: permille(of(&[0, 50]), transient),
                read_error_permille: permille(of(&[0, 10]), fails),
                write_error_permille: permille(of(&[0, 10, 30]), fails),
                allocate_error_permille: permille(of(&[0, 30]), fails),
                no_space_permille: permille(of(&[0, 10, 30]), fails),
                sync_error_permille: permille(of(&[0, 0, 50]), fails),
                call_error_permille: permille(of(&[0, 10]), fails),
                split_permille: of(&[0, 300, 900]) as u32,
                latency_us: (0, of(&[1, 100, 2000])),
                ..Faults::default()
            },
            fails,
            keeps: of(&[0, 1, 1]) == 1,
        }
    }

    /// The image, as QEMU makes it.
    pub(crate) fn files(&self) -> Files {
        static MADE: Mutex<BTreeMap<String, Files>> = Mutex::new(BTreeMap::new());
        let (create, bytes) = (&self.create, self.bytes);
        let key = format!("{create} {bytes} {} {:?}", self.data_file, self.backing);
        let mut made = MADE.lock().expect("nobody panics here");
        made.entry(key).or_insert_with(|| self.make()).clone()
    }

    fn make(&self) -> Files {
        let directory = tempfile::tempdir().expect("there is room for tests");
        let run = |arguments: &[&str]| {
            let mut command = Command::new("qemu-img");
            let output = command.args(arguments).current_dir(&directory).output();
            let output = output.expect("QEMU's tools are installed");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arguments:?}: {said}");
        };
        let mut names = vec!["image"];
        let (mut options, bytes) = (self.create.clone(), self.bytes.to_string());
        if self.data_file {
            options.push_str(",data_file=data");
            names.push("data");
        }
        let mut create = vec!["create", "-f", "qcow2", "-o", &options];
        if let Some((bytes, format)) = self.backing {
            let raw = directory.path().join("base.raw");
            std::fs::write(raw, history::data(BASE_TAG, 0, bytes)).expect("just made");
            run(&["convert", "-f", "raw", "-O", format, "base.raw", "base"]);
            names.push("base");
            create.extend(["-u", "-b", "base", "-F", format]);
        }
        create.extend(["image", &bytes]);
        run(&create);
        let read = |name| std::fs::read(directory.path().join(name)).expect("just made");
        names.into_iter().map(|name| (name, read(name))).collect()
    }

    /// Options for the image on the simulated host.
    pub(crate) fn options(&self, open: &str) -> String {
        let direct = if self.direct { "on" } else { "off" };
        let mut options = format!(
            "driver=qcow2,node-name=disk,discard=unmap,{open},file.driver=file,\
             file.filename=/simulated/image,file.cache.direct={direct},file.discard=unmap"
        );
        if self.data_file {
            write!(
                options,
                ",data-file.driver=file,data-file.filename=/simulated/data,\
                 data-file.cache.direct={direct},data-file.discard=unmap"
            )
            .unwrap();
        }
        if let Some((_, format)) = self.backing {
            write!(
                options,
                ",backing.driver={format},backing.file.driver=file,\
                 backing.file.filename=/simulated/base"
            )
            .unwrap();
        }
        options.replace("discard=unmap,discard=unmap", "discard=unmap")
    }
}
