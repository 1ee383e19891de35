//! Checking and repairing an image, while nobody else uses it.
//!
//! A check counts how often every cluster of the file is referred to (`walk`, into `counts`) and compares
//! that with the reference counts that the image has (`blocks`). What is found is counted as QEMU's
//! `qemu-img check` counts it: a *corruption* can lose data, a *leak* is space that nobody refers to.
//!
//! Repairing leaks lowers counts. Repairing all also raises them, clears what points nowhere, puts the
//! "copied" flags right (`copied`), and makes all reference counts anew where they cannot be trusted
//! (`rebuild`). That is done beside the old ones, and one write to the header puts the new ones in
//! their place: a crash leaves either.
//!
//! Memory goes with what the file really has: tables are read as far as the file goes, and counts are kept
//! for clusters that somebody refers to. The refcount table may have 8 MiB, an L1 table 32 MiB, as their
//! limits are; blocks of reference counts are kept up to a bound.

mod bitmaps;
mod blocks;
mod copied;
mod counts;
pub(super) mod driver;
mod image;
mod rebuild;
mod snapshots;
mod walk;

use blockcore::Error;
use blockcore::driver::{CheckReport, Fix};
use blockcore::io::Io;

use self::blocks::Blocks;
use self::counts::Counts;
use self::image::{Image, SECTOR_BYTES};
use self::snapshots::Snapshots;
use super::layout::header::Features;

/// What a repair may touch, as questions.
trait Repairs {
    fn has_leaks(self) -> bool;
    fn has_errors(self) -> bool;
    /// The first word of a message on something that this repairs, or does not.
    fn verb(self) -> &'static str;
}

impl Repairs for Fix {
    fn has_leaks(self) -> bool {
        self != Self::None
    }

    fn has_errors(self) -> bool {
        self == Self::All
    }

    fn verb(self) -> &'static str {
        match self {
            Self::All => "repairing",
            Self::None | Self::Leaks => "error",
        }
    }
}

/// Checks the image in `file`, a node that nobody else uses; `log` gets a sentence for each thing that is
/// found. With a repair the node must be writable and resizable.
///
/// After a repair the report says what that first look has found; only another check tells whether
/// anything is left that could not be seen before.
///
/// # Errors
///
/// What keeps the check from being done: a header that means nothing, metadata that cannot be read, a
/// repair that needs more than was asked for. What was repaired before that stays repaired.
pub async fn check(
    file: Io<'_>,
    repair: Fix,
    log: &mut dyn FnMut(&str),
) -> Result<CheckReport, Error> {
    let image = Image::open(file, repair).await?;
    let blocks = Blocks::read(&image).await?;
    let mut check = Check {
        counts: Counts::new(image.geometry, image.bytes()),
        blocks,
        image,
        repair,
        report: CheckReport::default(),
        snapshots: Snapshots::default(),
        rebuild: false,
        highest: 0,
        log,
    };
    check.run().await?;
    Ok(check.report)
}

/// A check under way.
struct Check<'a, 'l> {
    image: Image<'a>,
    repair: Fix,
    report: CheckReport,
    snapshots: Snapshots,
    /// How often clusters are referred to.
    counts: Counts,
    /// How often the image says that they are.
    blocks: Blocks,
    /// The reference counts of the image cannot be corrected one by one.
    rebuild: bool,
    /// The last cluster that is in use.
    highest: u64,
    log: &'l mut dyn FnMut(&str),
}

impl Check<'_, '_> {
    async fn run(&mut self) -> Result<(), Error> {
        let header = &self.image.header;
        // Of whole sectors, as QEMU counts.
        let disk_bytes = header.bytes - header.bytes % SECTOR_BYTES;
        self.report.total_clusters = self.image.geometry.clusters(disk_bytes);
        self.read_snapshots().await?;
        self.count_all(self.repair).await?;
        let counted = self.report;
        self.compare(Fix::None).await?;
        if self.rebuild && self.repair.has_errors() {
            self.rebuild().await?;
        } else if self.repair != Fix::None {
            if self.rebuild {
                return Err(Error::new(
                    blockcore::ErrorKind::Corrupt,
                    "the reference counts must be made anew: repair all, and not only leaks",
                ));
            }
            if self.report.leaks > 0 || self.report.corruptions > 0 {
                self.report = counted;
                self.compare(self.repair).await?;
            }
        }
        self.check_copied().await?;
        self.write_snapshots().await?;
        self.report.image_end_offset = (self.highest + 1) << self.image.geometry.cluster_bits;
        self.finish().await
    }

    /// Counts the references to everything but reference counts, and looks whether what refers makes
    /// sense.
    async fn count(&mut self, repair: Fix) -> Result<(), Error> {
        let geometry = self.image.geometry;
        self.refer(0, geometry.cluster_bytes());
        self.count_active(repair).await?;
        self.count_snapshots(repair).await?;
        self.count_bitmaps(repair).await
    }

    /// As [`count`](Self::count), with the reference counts' own place.
    async fn count_all(&mut self, repair: Fix) -> Result<(), Error> {
        self.count(repair).await?;
        let header = &self.image.header;
        let (table, bytes) = (header.refcount_table_offset, header.refcount_table_bytes());
        self.refer(table, bytes);
        self.count_blocks();
        Ok(())
    }

    /// Something refers to `bytes` at `offset`.
    fn refer(&mut self, offset: u64, bytes: u64) {
        let (report, log) = (&mut self.report, &mut *self.log);
        self.counts.add(offset, bytes, &mut |what| {
            report.corruptions += 1;
            log(&what);
        });
    }

    /// Something is wrong, and stays so for now.
    fn corrupt(&mut self, what: &str) {
        self.report.corruptions += 1;
        self.say(&format!("error: {what}"));
    }

    fn say(&mut self, what: &str) {
        (self.log)(what);
    }

    /// Marks the image as in order, if it is now.
    async fn finish(&mut self) -> Result<(), Error> {
        if self.repair == Fix::None {
            return Ok(());
        }
        self.blocks.write_back(&self.image).await?;
        self.image.flush().await?;
        if self.report.check_errors == 0 && self.report.corruptions == 0 {
            self.image
                .clear_features(Features::DIRTY | Features::CORRUPT)
                .await?;
        }
        Ok(())
    }

    /// Compares what was counted with what the image says, and corrects it as far as asked.
    async fn compare(&mut self, repair: Fix) -> Result<(), Error> {
        let per_block = self.image.geometry.block_counts();
        let clusters = self.counts.clusters();
        self.highest = 0;
        for block in self.counted_blocks() {
            let first = block * per_block;
            let last = (first + per_block).min(clusters);
            if !self.blocks.is_readable(block) {
                self.report.check_errors += last - first;
                let what = format!("error: refcount block {block} cannot be read");
                self.say(&what);
                continue;
            }
            for cluster in first..last {
                let has = self.blocks.get(&self.image, cluster).await?;
                let should = self.counts.get(cluster);
                if has > 0 || should > 0 {
                    self.highest = cluster;
                }
                if has != should {
                    self.correct(cluster, has, should, repair);
                }
            }
        }
        if repair != Fix::None {
            self.blocks.write_back(&self.image).await?;
        }
        Ok(())
    }

    /// Indices of the refcount blocks in which something is or should be counted, within the file.
    fn counted_blocks(&self) -> Vec<u64> {
        let table = 0..self.blocks.table().len() as u64;
        let mut blocks: Vec<_> = table.filter(|block| self.blocks.has(*block)).collect();
        blocks.extend(self.counts.blocks());
        blocks.sort_unstable();
        blocks.dedup();
        let (per_block, clusters) = (self.image.geometry.block_counts(), self.counts.clusters());
        blocks.retain(|block| block * per_block < clusters);
        blocks
    }

    fn correct(&mut self, cluster: u64, has: u64, should: u64, repair: Fix) {
        let is_leak = has > should;
        let may = match is_leak {
            true => repair.has_leaks(),
            false => repair.has_errors() && has > 0,
        };
        if has == 0 {
            // There may be no block to count it in.
            self.rebuild = true;
        }
        let what = match (may, is_leak) {
            (true, _) => "repairing",
            (false, true) => "leaked",
            (false, false) => "error:",
        };
        self.say(&format!(
            "{what} cluster {cluster}: its reference count is {has}, and {should} refer to it"
        ));
        let report = &mut self.report;
        let counter = match (may, is_leak) {
            (true, true) => &mut report.leaks_fixed,
            (true, false) => &mut report.corruptions_fixed,
            (false, true) => &mut report.leaks,
            (false, false) => &mut report.corruptions,
        };
        *counter += 1;
        if may {
            self.blocks.set(cluster, should);
        }
    }
}
