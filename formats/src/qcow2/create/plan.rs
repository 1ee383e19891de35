//! [`Plan`]: where everything in a new image lies.
//!
//! In this order, without gaps: the header, the refcount table, refcount blocks, the L1 table, and in a
//! preallocated image L2 tables and all clusters of the disk. Each has one reference.

use blockcore::Error;
use blockcore::driver::Preallocation;

use super::spec::Spec;
use super::target::{Stream, Target};
use crate::qcow2::layout::entry::{L1Entry, L2Entry};
use crate::qcow2::layout::header::{Header, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use crate::qcow2::layout::{Geometry, HostOffset, set_refcount};

/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// See the module's header. All in clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    geometry: Geometry,
    refcount_table: u64,
    refcount_blocks: u64,
    l1_entries: u64,
    l1: u64,
    l2_tables: u64,
    /// Those that hold the disk's data in this file.
    data: u64,
}

impl Plan {
    /// # Errors
    ///
    /// [`blockcore::ErrorKind::Invalid`] if tables would be longer than they may be.
    pub(super) fn new(spec: &Spec) -> Result<Self, Error> {
        let plan = Self::unchecked(spec)?;
        let bits = plan.geometry.cluster_bits;
        let is_too_far = plan.clusters() > (1 << 55) >> bits;
        let table_bytes = plan.refcount_table << bits;
        if is_too_far || table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_long("refcount table", spec));
        }
        Ok(plan)
    }

    /// As [`new`](Self::new), of an image that may never have all of it: its refcount table may be longer
    /// than there may be.
    pub(super) fn unchecked(spec: &Spec) -> Result<Self, Error> {
        let geometry = spec.geometry();
        let l1_entries = geometry.l1_entries(spec.bytes);
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(too_long("L1 table", spec));
        }
        let mut plan = Self {
            geometry,
            refcount_table: 1,
            refcount_blocks: 1,
            l1_entries,
            l1: geometry.clusters(l1_entries * 8),
            l2_tables: 0,
            data: 0,
        };
        if spec.is_mapped() {
            plan.l2_tables = l1_entries;
        }
        if spec.is_mapped() && !geometry.data_file {
            plan.data = geometry.clusters(spec.bytes);
        }
        // Blocks count themselves and the table that names them.
        loop {
            let blocks = plan.clusters().div_ceil(geometry.block_counts());
            let table = geometry.clusters(blocks * 8).max(1);
            if (blocks, table) == (plan.refcount_blocks, plan.refcount_table) {
                break;
            }
            (plan.refcount_blocks, plan.refcount_table) = (blocks, table);
        }
        Ok(plan)
    }

    /// Length of the image, with all that it has a place for.
    pub(super) fn bytes(&self) -> u64 {
        self.offset(self.clusters())
    }

    fn clusters(&self) -> u64 {
        self.first_data() + self.data
    }

    fn first_block(&self) -> u64 {
        1 + self.refcount_table
    }

    fn first_l1(&self) -> u64 {
        self.first_block() + self.refcount_blocks
    }

    fn first_l2(&self) -> u64 {
        self.first_l1() + self.l1
    }

    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2_tables
    }

    fn offset(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits
    }

    fn header(&self, spec: &Spec) -> Header {
        Header {
            l1_offset: match self.l1 {
                0 => 0,
                _ => self.offset(self.first_l1()),
            },
            l1_entries: self.l1_entries as u32,
            refcount_table_offset: self.offset(1),
            refcount_table_clusters: self.refcount_table as u32,
            ..spec.header()
        }
    }

    /// Writes the image to a target that has been emptied, the header last.
    ///
    /// # Errors
    ///
    /// What the target answered; there is no image then.
    pub(super) async fn write(&self, target: &Target<'_>, spec: &Spec) -> Result<(), Error> {
        let header = self.header(spec).serialise()?;
        let metadata = self.offset(self.first_data());
        target.lengthen(metadata, Preallocation::Off).await?;
        let mut stream = Stream::new(target, self.offset(1));
        self.write_refcounts(&mut stream).await?;
        let l1 = (0..self.l1_entries).map(|index| match self.l2_tables {
            0 => L1Entry::default(),
            _ => L1Entry::new(HostOffset(self.offset(self.first_l2() + index))),
        });
        let words = l1.map(|entry| entry.0);
        stream.words(words, self.offset(self.l1)).await?;
        for table in 0..self.l2_tables {
            self.write_l2(&mut stream, spec, table).await?;
        }
        stream.end().await?;
        let end = self.offset(self.clusters());
        let before = target.lengthen(end, spec.preallocation).await?;
        if self.data > 0 {
            target.zero(metadata, end.min(before)).await?;
        }
        // The rest of the header's cluster first: a sector is written whole or not at all, and the first
        // makes the file an image.
        let (first, rest) = header.split_at(SECTOR_BYTES);
        if !rest.is_empty() {
            target.write(SECTOR_BYTES as u64, rest).await?;
        }
        target.sync().await?;
        target.write(0, first).await?;
        target.sync().await
    }

    async fn write_refcounts(&self, stream: &mut Stream<'_, '_>) -> Result<(), Error> {
        let blocks = 0..self.refcount_blocks;
        let words = blocks.map(|block| self.offset(self.first_block() + block));
        stream
            .words(words, self.offset(self.refcount_table))
            .await?;
        let (order, counts) = (self.geometry.refcount_order, self.geometry.block_counts());
        let mut whole = vec![0; self.geometry.cluster_bytes() as usize];
        for index in 0..counts {
            set_refcount(&mut whole, order, index as usize, 1);
        }
        for block in 0..self.refcount_blocks {
            let used = self.clusters() - block * counts;
            if used >= counts {
                stream.bytes(&whole).await?;
                continue;
            }
            let mut last = whole.clone();
            for index in used..counts {
                set_refcount(&mut last, order, index as usize, 0);
            }
            stream.bytes(&last).await?;
        }
        Ok(())
    }

    async fn write_l2(
        &self,
        stream: &mut Stream<'_, '_>,
        spec: &Spec,
        table: u64,
    ) -> Result<(), Error> {
        let geometry = self.geometry;
        let first = table * geometry.table_entries();
        let last = (first + geometry.table_entries()).min(geometry.clusters(spec.bytes));
        let words = (first..last).flat_map(|cluster| {
            let host = match geometry.data_file {
                true => cluster,
                false => self.first_data() + cluster,
            };
            let mut entry = L2Entry::data(HostOffset(self.offset(host)), geometry);
            if geometry.extended && !spec.data_file_raw {
                // Its place is kept, and what is not written comes from the backing image.
                entry.bitmap = 0;
            }
            let (first, second) = entry.to_words(geometry);
            [first, second].into_iter().take(geometry.entry_words())
        });
        stream.words(words, geometry.cluster_bytes()).await
    }
}

fn too_long(table: &str, spec: &Spec) -> Error {
    Error::invalid(format!(
        "a disk of {} bytes needs a longer {table} than there may be with clusters of {} bytes: larger \
         clusters make it shorter",
        spec.bytes,
        spec.geometry().cluster_bytes()
    ))
}
