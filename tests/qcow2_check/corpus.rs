//! Damaged images: how each is made, and what is done to its bytes.

use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::Path;

use harness::daemon::Place;

use super::must;

/// An image before it is damaged: what `qemu-img` and `qemu-io` do to make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Base {
    Plain,
    SmallClusters,
    OneBitCounts,
    Wide,
    Version2,
    Snapshots,
    Version2Snapshots,
    Compressed,
    Extended,
    DataFile,
    Bitmaps,
    Backed,
    Lazy,
}

impl Base {
    fn commands(self) -> Vec<String> {
        let make = |options: &str| format!("qemu-img create -q -f qcow2 -o {options} disk 8M");
        let io = |commands: &str| format!("qemu-io -f qcow2 -c {commands} disk");
        let mut all = vec![make(match self {
            Self::SmallClusters => "cluster_size=512",
            Self::OneBitCounts => "cluster_size=4k,refcount_bits=1",
            Self::Wide => "cluster_size=4k,refcount_bits=64",
            Self::Version2 | Self::Version2Snapshots => "cluster_size=4k,compat=0.10",
            Self::Extended => "cluster_size=16k,extended_l2=on",
            Self::DataFile => "cluster_size=4k,data_file=data",
            Self::Lazy => "cluster_size=4k,lazy_refcounts=on",
            Self::Backed => "cluster_size=4k,backing_file=base,backing_fmt=raw",
            _ => "cluster_size=4k",
        })];
        all.extend([
            io("write_-P_1_0_64k"),
            io("write_-P_2_1M_20k"),
            io("write_-P_3_5M_40k"),
            io("write_-P_4_7M_1k"),
        ]);
        match self {
            Self::Snapshots | Self::Version2Snapshots => all.extend([
                "qemu-img snapshot -c first disk".to_owned(),
                io("write_-P_5_4k_12k"),
                "qemu-img snapshot -c second disk".to_owned(),
                io("write_-P_6_5M_4k"),
            ]),
            Self::Compressed => all.extend([io("write_-c_-P_7_3M_64k"), io("write_-c_-P_8_4M_4k")]),
            Self::Bitmaps => all.extend([
                "qemu-img bitmap --add disk b0".to_owned(),
                "qemu-img bitmap --add -g 512 disk b1".to_owned(),
                io("write_-P_9_2M_512k"),
            ]),
            Self::Plain | Self::Extended => all.extend([io("write_-z_2M_64k")]),
            _ => {}
        }
        all
    }

    /// The image's bytes.
    pub(crate) fn make(self, place: &Place) -> Vec<u8> {
        place.file("base", &vec![0xbb; 8 << 20]);
        for command in self.commands() {
            let words: Vec<_> = command
                .split(' ')
                .map(|word| word.replace('_', " "))
                .collect();
            // Names of options have underlines of their own.
            let original: Vec<_> = command.split(' ').collect();
            let args = words.iter().zip(&original).skip(1);
            let args: Vec<_> = args
                .map(|(spaced, word)| match word.contains("_-") {
                    true => spaced.as_str(),
                    false => word,
                })
                .collect();
            must(original[0], place, &args);
        }
        fs::read(place.join("disk")).expect("it was made")
    }
}

/// The bytes of an image that is damaged.
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Deref for Bytes {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

impl Bytes {
    fn u32(&self, at: u64) -> u32 {
        let at = at as usize;
        u32::from_be_bytes(self[at..at + 4].try_into().expect("4"))
    }

    fn u64(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_be_bytes(self[at..at + 8].try_into().expect("8"))
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        if self.len() < at + bytes.len() {
            self.resize(at + bytes.len(), 0);
        }
        self[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_u32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    fn put_u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    fn change(&mut self, at: u64, change: impl FnOnce(u64) -> u64) {
        let value = change(self.u64(at));
        self.put_u64(at, value);
    }

    fn cluster(&self) -> u64 {
        1 << self.u32(20)
    }

    fn l1(&self) -> u64 {
        self.u64(40)
    }

    /// Where the first L2 table is.
    fn l2(&self) -> u64 {
        self.u64(self.l1()) & OFFSET
    }

    /// Where the entry of the first cluster is that the guest has at `offset`, which one table maps.
    fn entry(&self, index: u64) -> u64 {
        let bytes = if self[79] & 16 != 0 { 16 } else { 8 };
        self.l2() + index * bytes
    }

    fn reftable(&self) -> u64 {
        self.u64(48)
    }

    fn block(&self) -> u64 {
        self.u64(self.reftable()) & OFFSET
    }

    /// Sets a count of 16 bits.
    fn set_count(&mut self, offset: u64, count: u16) {
        let at = self.block() + offset / self.cluster() * 2;
        self.put(at, &count.to_be_bytes());
    }

    fn snapshots(&self) -> u64 {
        self.u64(64)
    }

    /// Where the bitmaps extension's data is.
    fn bitmaps(&self) -> u64 {
        let mut at = u64::from(self.u32(100));
        while self.u32(at) != 0x2385_2875 {
            at += 8 + u64::from(self.u32(at + 4)).next_multiple_of(8);
        }
        at + 8
    }

    fn directory(&self) -> u64 {
        self.u64(self.bitmaps() + 16)
    }

    fn bitmap_table(&self) -> u64 {
        self.u64(self.directory())
    }

    fn end(&self) -> u64 {
        (self.len() as u64).next_multiple_of(self.cluster())
    }

    /// Makes a whole number of clusters of it, as hosts with direct I/O have it.
    fn pad(&mut self) {
        let end = self.end() as usize;
        self.resize(end, 0);
    }
}

/// In what a check by this program and one by QEMU may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Differs {
    /// In nothing.
    Nothing,
    /// What is left and what was repaired is counted otherwise; the repaired image must be as good.
    Repair,
    /// QEMU gives up; this program checks, or repairs.
    QemuFails,
}

/// A kind of damage.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) base: Base,
    pub(crate) differs: Differs,
    damage: fn(&mut Bytes),
}

impl Kind {
    pub(crate) fn make(&self, base: &[u8], path: &Path) {
        fs::write(path, self.bytes(base)).expect("there is room");
    }

    /// The damaged image.
    pub(crate) fn bytes(&self, base: &[u8]) -> Vec<u8> {
        let mut bytes = Bytes(base.to_vec());
        (self.damage)(&mut bytes);
        bytes.0
    }
}

const fn kind(name: &'static str, base: Base, damage: fn(&mut Bytes)) -> Kind {
    Kind {
        name,
        base,
        differs: Differs::Nothing,
        damage,
    }
}

const fn other(name: &'static str, base: Base, differs: Differs, damage: fn(&mut Bytes)) -> Kind {
    Kind {
        name,
        base,
        differs,
        damage,
    }
}

/// Every kind of damage.
pub(crate) const KINDS: &[Kind] = &[
    // Nothing, on everything.
    kind("plain", Base::Plain, |_| ()),
    kind("small clusters", Base::SmallClusters, |_| ()),
    kind("one-bit counts", Base::OneBitCounts, |_| ()),
    kind("wide counts", Base::Wide, |_| ()),
    kind("version 2", Base::Version2, |_| ()),
    kind("snapshots", Base::Snapshots, |_| ()),
    kind("snapshots of version 2", Base::Version2Snapshots, |_| ()),
    kind("compressed", Base::Compressed, |_| ()),
    kind("extended", Base::Extended, |_| ()),
    kind("data file", Base::DataFile, |_| ()),
    kind("bitmaps", Base::Bitmaps, |_| ()),
    kind("backing image", Base::Backed, |_| ()),
    kind("lazy", Base::Lazy, |_| ()),
    // Features.
    kind("dirty", Base::Lazy, |b| b[79] |= 1),
    kind("corrupt bit", Base::Plain, |b| b[79] |= 2),
    kind("dirty and leaking", Base::Lazy, |b| {
        b[79] |= 1;
        let end = b.end();
        b.put(end, &[1; 4096]);
        b.set_count(end, 1);
    }),
    kind(
        "dirty with counts that were never written",
        Base::Lazy,
        |b| {
            b[79] |= 1;
            let data = b.u64(b.entry(3)) & OFFSET;
            b.set_count(data, 0);
        },
    ),
    kind("unknown autoclear feature", Base::Plain, |b| b[88] |= 0x20),
    kind("unknown compatible feature", Base::Plain, |b| b[80] |= 0x20),
    kind("unknown incompatible feature", Base::Plain, |b| {
        b[72] |= 0x20
    }),
    // Reference counts.
    kind("a leaked cluster", Base::Plain, |b| {
        let end = b.end();
        b.put(end, &[1; 4096]);
        b.set_count(end, 1);
    }),
    kind("many leaked clusters", Base::Plain, |b| {
        for _ in 0..100 {
            let end = b.end();
            b.put(end, &[1; 4096]);
            b.set_count(end, 3);
        }
    }),
    kind("a count too high", Base::Plain, |b| {
        let data = b.u64(b.entry(0)) & OFFSET;
        b.set_count(data, 2);
    }),
    kind("a count too high and no flag", Base::Plain, |b| {
        let data = b.u64(b.entry(0)) & OFFSET;
        b.set_count(data, 2);
        b.change(b.entry(0), |entry| entry & !COPIED);
    }),
    kind("a data cluster's count is zero", Base::Plain, |b| {
        let data = b.u64(b.entry(0)) & OFFSET;
        b.set_count(data, 0);
    }),
    kind("an L2 table's count is zero", Base::Plain, |b| {
        b.set_count(b.l2(), 0)
    }),
    kind("the L1 table's count is zero", Base::Plain, |b| {
        b.set_count(b.l1(), 0)
    }),
    kind("the header's count is zero", Base::Plain, |b| {
        b.set_count(0, 0)
    }),
    kind("the refcount table's count is zero", Base::Plain, |b| {
        b.set_count(b.reftable(), 0)
    }),
    kind("the refcount block's count is zero", Base::Plain, |b| {
        b.set_count(b.block(), 0)
    }),
    kind("the refcount block's count is two", Base::Plain, |b| {
        b.set_count(b.block(), 2)
    }),
    kind("all counts zero", Base::Plain, |b| {
        let (block, cluster) = (b.block(), b.cluster() as usize);
        b.put(block, &vec![0; cluster]);
    }),
    kind("all counts high", Base::Plain, |b| {
        let (block, cluster) = (b.block(), b.cluster() as usize);
        b.put(block, &[0, 9].repeat(cluster / 2));
    }),
    kind("all one-bit counts set", Base::OneBitCounts, |b| {
        let (block, cluster) = (b.block(), b.cluster() as usize);
        b.put(block, &vec![0xff; cluster]);
    }),
    kind("all one-bit counts zero", Base::OneBitCounts, |b| {
        let (block, cluster) = (b.block(), b.cluster() as usize);
        b.put(block, &vec![0; cluster]);
    }),
    kind(
        "two references where one bit counts",
        Base::OneBitCounts,
        |b| {
            let first = b.u64(b.entry(0));
            b.put_u64(b.entry(1), first);
        },
    ),
    kind("no refcount block", Base::Plain, |b| {
        b.put_u64(b.reftable(), 0)
    }),
    kind(
        "no refcount blocks for small clusters",
        Base::SmallClusters,
        |b| {
            let table = b.reftable();
            b.put(table, &[0; 512]);
        },
    ),
    kind(
        "the second refcount block is gone",
        Base::SmallClusters,
        |b| {
            let table = b.reftable();
            b.put_u64(table + 8, 0);
        },
    ),
    kind("one refcount block twice", Base::SmallClusters, |b| {
        let (table, block) = (b.reftable(), b.block());
        b.put_u64(table + 8, block);
    }),
    other(
        "a refcount block with reserved bits",
        Base::Plain,
        Differs::QemuFails,
        |b| {
            b.change(b.reftable(), |entry| entry | 1);
        },
    ),
    other(
        "an unaligned refcount block",
        Base::Plain,
        Differs::QemuFails,
        |b| {
            b.change(b.reftable(), |entry| entry + 512);
        },
    ),
    other(
        "a refcount block past the end",
        Base::Plain,
        Differs::Repair,
        |b| {
            let (table, end) = (b.reftable(), b.end());
            b.put_u64(table + 8, end + 4 * 4096);
        },
    ),
    other(
        "the only refcount block past the end",
        Base::Plain,
        Differs::Repair,
        |b| {
            let (table, end) = (b.reftable(), b.end());
            b.put_u64(table, end + 4096);
        },
    ),
    kind("a refcount block on data", Base::Plain, |b| {
        let (table, data) = (b.reftable(), b.u64(b.entry(0)) & OFFSET);
        b.put_u64(table + 8, data);
    }),
    kind("no refcount table", Base::Plain, |b| b.put_u32(56, 0)),
    kind("a refcount table past the end", Base::Plain, |b| {
        let end = b.end();
        b.put_u64(48, end + 65536);
    }),
    kind("an unaligned refcount table", Base::Plain, |b| {
        b.change(48, |offset| offset + 512)
    }),
    kind("a refcount table that is too long", Base::Plain, |b| {
        b.put_u32(56, 0x10000)
    }),
    other(
        "refcount table on the L1 table",
        Base::Plain,
        Differs::Repair,
        |b| {
            let l1 = b.l1();
            b.put_u64(48, l1);
        },
    ),
    // L1 tables.
    kind("an L1 entry without its flag", Base::Plain, |b| {
        b.change(b.l1(), |entry| entry & !COPIED);
    }),
    kind("an L1 entry with reserved bits", Base::Plain, |b| {
        b.change(b.l1(), |entry| entry | 4);
    }),
    kind("an unaligned L1 entry", Base::Plain, |b| {
        b.change(b.l1(), |entry| entry + 512);
    }),
    kind("an L1 entry past the end", Base::Plain, |b| {
        let (l1, end) = (b.l1(), b.end());
        b.put_u64(l1 + 8, COPIED | (end + (1 << 20)));
    }),
    kind("an L1 entry into the header", Base::Plain, |b| {
        b.put_u64(b.l1() + 8, COPIED)
    }),
    kind("an L1 entry on a data cluster", Base::Plain, |b| {
        let (l1, data) = (b.l1(), b.u64(b.entry(0)));
        b.put_u64(l1 + 8, data);
    }),
    kind("one L2 table twice", Base::Plain, |b| {
        let (l1, first) = (b.l1(), b.u64(b.l1()));
        b.put_u64(l1 + 8, first);
    }),
    kind("an L1 table that refers to itself", Base::Plain, |b| {
        let l1 = b.l1();
        b.put_u64(l1 + 8, COPIED | l1);
    }),
    kind("an L1 table that is too short", Base::Plain, |b| {
        b.put_u32(36, 1)
    }),
    kind("an L1 table past the end", Base::Plain, |b| {
        let end = b.end();
        b.put_u64(40, end + 65536);
    }),
    kind(
        "an L1 table that begins beyond any file",
        Base::Plain,
        |b| b.put_u64(40, 1 << 63),
    ),
    // L2 tables.
    kind("an L2 entry without its flag", Base::Plain, |b| {
        b.change(b.entry(1), |entry| entry & !COPIED);
    }),
    kind("ten L2 entries without their flags", Base::Plain, |b| {
        for index in 0..10 {
            b.change(b.entry(index), |entry| entry & !COPIED);
        }
    }),
    kind("an L2 entry with reserved bits", Base::Plain, |b| {
        b.change(b.entry(1), |entry| entry | 1 << 57 | 8);
    }),
    kind("an unaligned L2 entry", Base::Plain, |b| {
        b.change(b.entry(1), |entry| entry + 512)
    }),
    kind("an unaligned zero entry", Base::Plain, |b| {
        b.change(b.entry(1), |entry| (entry + 512) | 1);
    }),
    kind("a zero entry with a place", Base::Plain, |b| {
        b.change(b.entry(1), |entry| entry | 1)
    }),
    kind("an L2 entry past the end", Base::Plain, |b| {
        let end = b.end();
        b.put_u64(b.entry(100), COPIED | (end + 65536));
    }),
    kind("an L2 entry just past the end", Base::Plain, |b| {
        b.pad();
        let end = b.end();
        b.put_u64(b.entry(100), COPIED | end);
    }),
    kind("an L2 entry at the highest offset", Base::Plain, |b| {
        b.put_u64(b.entry(100), COPIED | 0x00ff_ffff_ffff_f000);
    }),
    kind("one cluster twice", Base::Plain, |b| {
        let first = b.u64(b.entry(0));
        b.put_u64(b.entry(100), first);
    }),
    kind("a data cluster in the header", Base::Plain, |b| {
        b.put_u64(b.entry(100), COPIED | 1);
    }),
    kind("data on the L1 table", Base::Plain, |b| {
        let l1 = b.l1();
        b.put_u64(b.entry(100), COPIED | l1);
    }),
    kind("data on its own L2 table", Base::Plain, |b| {
        let l2 = b.l2();
        b.put_u64(b.entry(100), COPIED | l2);
    }),
    kind("data on a refcount block", Base::Plain, |b| {
        let block = b.block();
        b.put_u64(b.entry(100), COPIED | block);
    }),
    kind("an L2 table of noise", Base::Plain, |b| {
        let (l2, mut state) = (b.l2(), 7_u64);
        for index in 0..512 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            b.put_u64(l2 + index * 8, state);
        }
    }),
    kind(
        "a version 2 entry with the zero flag",
        Base::Version2,
        |b| {
            b.change(b.entry(1), |entry| entry | 1);
        },
    ),
    kind(
        "a version 2 entry that is only the zero flag",
        Base::Version2,
        |b| {
            b.put_u64(b.entry(100), 1);
        },
    ),
    // Compressed clusters.
    kind(
        "a compressed cluster with the flag",
        Base::Compressed,
        |b| {
            let entry = b.compressed();
            b.change(entry, |entry| entry | COPIED);
        },
    ),
    kind("a compressed cluster past the end", Base::Compressed, |b| {
        let (entry, end) = (b.compressed(), b.end());
        b.put_u64(entry, 1 << 62 | (end + (1 << 20)));
    }),
    kind(
        "a compressed cluster that is too long",
        Base::Compressed,
        |b| {
            let entry = b.compressed();
            b.change(entry, |entry| entry | 0xf << 58);
        },
    ),
    kind(
        "a compressed cluster's count is too low",
        Base::Compressed,
        |b| {
            let entry = b.compressed();
            let host = b.u64(entry) & 0x00ff_ffff_ffff;
            b.set_count(host, 1);
        },
    ),
    // Extended entries.
    kind("a subcluster that is data and zero", Base::Extended, |b| {
        let entry = b.entry(0);
        b.change(entry + 8, |bitmap| bitmap | 1 << 32);
    }),
    kind("parts without a place", Base::Extended, |b| {
        let entry = b.entry(100);
        b.put_u64(entry + 8, 5);
    }),
    kind("zero parts without a place", Base::Extended, |b| {
        let entry = b.entry(100);
        b.put_u64(entry + 8, 5 << 32);
    }),
    kind(
        "an unaligned extended entry with data",
        Base::Extended,
        |b| {
            b.change(b.entry(0), |entry| entry + 512);
        },
    ),
    kind(
        "an unaligned extended entry without data",
        Base::Extended,
        |b| {
            let entry = b.entry(0);
            b.change(entry, |entry| entry + 512);
            b.put_u64(entry + 8, 3 << 32);
        },
    ),
    kind("a compressed entry with parts", Base::Extended, |b| {
        let entry = b.entry(0);
        b.change(entry, |entry| entry & !COPIED | 1 << 62);
    }),
    kind(
        "an extended entry with the zero flag",
        Base::Extended,
        |b| {
            b.change(b.entry(0), |entry| entry | 1);
        },
    ),
    // External data files.
    kind(
        "a compressed cluster with a data file",
        Base::DataFile,
        |b| {
            b.put_u64(b.entry(100), 1 << 62 | 0x5000);
        },
    ),
    kind(
        "a data file's entry without its flag",
        Base::DataFile,
        |b| {
            b.change(b.entry(1), |entry| entry & !COPIED);
        },
    ),
    kind("a data file's entry past its end", Base::DataFile, |b| {
        b.put_u64(b.entry(100), COPIED | 1 << 40);
    }),
    // Snapshots.
    kind("a snapshot's L1 table is unaligned", Base::Snapshots, |b| {
        b.change(b.snapshots(), |offset| offset + 512);
    }),
    kind(
        "a snapshot's L1 table is past the end",
        Base::Snapshots,
        |b| {
            b.change(b.snapshots(), |offset| offset + (1 << 30));
        },
    ),
    kind("a snapshot's L1 table is too long", Base::Snapshots, |b| {
        b.put_u32(b.snapshots() + 8, 0x0100_0000);
    }),
    kind(
        "a snapshot's L1 table is longer than it was",
        Base::Snapshots,
        |b| {
            b.put_u32(b.snapshots() + 8, 600);
        },
    ),
    kind("no snapshots any more", Base::Snapshots, |b| {
        b.put_u32(60, 0)
    }),
    kind("one snapshot fewer", Base::Snapshots, |b| b.put_u32(60, 1)),
    kind("one snapshot more", Base::Snapshots, |b| b.put_u32(60, 3)),
    other(
        "too many snapshots",
        Base::Snapshots,
        Differs::QemuFails,
        |b| b.put_u32(60, 65_600),
    ),
    kind("the snapshot table is unaligned", Base::Snapshots, |b| {
        b.change(64, |offset| offset + 8);
    }),
    kind("the snapshot table's count is zero", Base::Snapshots, |b| {
        b.set_count(b.snapshots(), 0);
    }),
    kind(
        "a snapshot with too little extra data",
        Base::Snapshots,
        |b| {
            b.shorten_extra(8);
        },
    ),
    kind("a snapshot without extra data", Base::Snapshots, |b| {
        b.shorten_extra(0)
    }),
    kind(
        "a snapshot with too much extra data",
        Base::Snapshots,
        |b| {
            b.lengthen_extra(2000);
        },
    ),
    kind("a snapshot with unknown extra data", Base::Snapshots, |b| {
        b.lengthen_extra(100)
    }),
    kind(
        "a cluster of a snapshot is counted once",
        Base::Snapshots,
        |b| {
            let data = b.u64(b.entry(10)) & OFFSET;
            b.set_count(data, 1);
        },
    ),
    kind("a shared cluster with the flag", Base::Snapshots, |b| {
        b.change(b.entry(10), |entry| entry | COPIED);
    }),
    kind("a snapshot's unaligned zero entry", Base::Snapshots, |b| {
        let l1 = b.u64(b.snapshots());
        let l2 = b.u64(l1 + 8 * 2) & OFFSET;
        if l2 != 0 {
            b.put_u64(l2 + 8 * 100, 0x5200 | 1);
        }
    }),
    kind(
        "snapshots of version 2 and a leak",
        Base::Version2Snapshots,
        |b| {
            let end = b.end();
            b.put(end, &[1; 4096]);
            b.set_count(end, 1);
        },
    ),
    // Bitmaps.
    other(
        "a bitmap's entry with reserved bits",
        Base::Bitmaps,
        Differs::QemuFails,
        |b| {
            b.change(b.bitmap_table(), |entry| entry | 4);
        },
    ),
    other(
        "a bitmap's entry past the end",
        Base::Bitmaps,
        Differs::QemuFails,
        |b| {
            let (table, end) = (b.bitmap_table(), b.end());
            b.put_u64(table, end + (1 << 20));
        },
    ),
    kind("a bitmap in use", Base::Bitmaps, |b| {
        let directory = b.directory();
        b.put_u32(directory + 12, 1);
    }),
    kind("a bitmap's count is zero", Base::Bitmaps, |b| {
        let table = b.bitmap_table();
        b.set_count(table, 0);
    }),
    other(
        "a bitmap without a name",
        Base::Bitmaps,
        Differs::QemuFails,
        |b| {
            let directory = b.directory();
            b.put(directory + 18, &[0, 0]);
        },
    ),
    other(
        "a bitmap of an unknown type",
        Base::Bitmaps,
        Differs::QemuFails,
        |b| {
            let directory = b.directory();
            b.put(directory + 16, &[9]);
        },
    ),
    other("one bitmap fewer", Base::Bitmaps, Differs::QemuFails, |b| {
        let extension = b.bitmaps();
        b.put_u32(extension, 1);
    }),
    kind("bitmaps that are out of date", Base::Bitmaps, |b| {
        b[95] &= !1
    }),
    // The file itself.
    kind("cut short in the middle of the data", Base::Plain, |b| {
        let half = b.len() / 2;
        b.truncate(half);
    }),
    other("cut to its header", Base::Plain, Differs::QemuFails, |b| {
        b.truncate(4096)
    }),
    kind("longer than it should be", Base::Plain, |b| {
        let end = b.len() + 1_000_000;
        b.resize(end, 0);
    }),
    kind("not an image", Base::Plain, |b| b[0] = 0),
    kind("another version", Base::Plain, |b| b[7] = 4),
    kind("clusters that are too large", Base::Plain, |b| b[23] = 22),
    kind("a disk that is longer than its tables", Base::Plain, |b| {
        b[27] = 1
    }),
];

impl Bytes {
    /// Where the entry of a compressed cluster is.
    fn compressed(&self) -> u64 {
        let l1 = self.l1();
        let tables = (0..4).map(|index| self.u64(l1 + index * 8) & OFFSET);
        let entries = tables.filter(|table| *table != 0);
        let mut entries = entries.flat_map(|table| (0..512).map(move |index| table + index * 8));
        let is_compressed = |entry: &u64| self.u64(*entry) & 1 << 62 != 0;
        entries
            .find(is_compressed)
            .expect("there are compressed clusters")
    }

    /// Where the first snapshot's entry has its extra data, how much, and where the table ends.
    fn extra(&self) -> (u64, u32, u64) {
        let first = self.snapshots();
        (first + 40, self.u32(first + 36), first + 4096)
    }

    fn shorten_extra(&mut self, bytes: u32) {
        let (at, has, end) = self.extra();
        self.put_u32(at - 4, bytes);
        let names_at = (at + u64::from(has)) as usize;
        let names = self[names_at..names_at + 16].to_vec();
        let id_and_name = usize::from(self[at as usize - 27]) + usize::from(self[at as usize - 25]);
        let rest_at = (names_at + id_and_name).next_multiple_of(8);
        let rest = self[rest_at..end as usize].to_vec();
        let new_names = at + u64::from(bytes);
        self.put(new_names, &names[..id_and_name]);
        let new_rest = (new_names + id_and_name as u64).next_multiple_of(8);
        self.put(new_rest, &rest[..rest.len() - 64]);
    }

    fn lengthen_extra(&mut self, bytes: u32) {
        let (at, has, end) = self.extra();
        let tail_at = (at + u64::from(has)) as usize;
        let tail = self[tail_at..end as usize - bytes as usize].to_vec();
        // Whole words, so that what follows stays aligned.
        let bytes = bytes.next_multiple_of(8);
        self.put_u32(at - 4, bytes + has);
        self.put(at + u64::from(has), &vec![0x77; bytes as usize]);
        self.put(at + u64::from(has + bytes), &tail[..tail.len() - 8]);
    }
}
