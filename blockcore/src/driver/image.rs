//! What operators ask of an image as a whole: internal snapshots, checks, how large it will be.
//!
//! Pure: what the calls of [`Driver`](super::Driver) and [`DriverType`](super::DriverType) are given and
//! answer.

/// An internal snapshot to be taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotSpec {
    /// Its name.
    pub name: String,
    /// Its identifier, unique in the image; `None`: one that the driver chooses, as a number.
    pub id: Option<String>,
    /// When it is taken, in seconds since 1970.
    pub seconds: u64,
    /// And the nanoseconds after that.
    pub nanoseconds: u32,
    /// How long the guest has run by then.
    pub vm_clock_ns: u64,
    /// How many instructions it has run, if they are counted.
    pub instructions: Option<u64>,
    /// How much of what was saved as the machine's state belongs to it, in bytes.
    pub vm_state_bytes: u64,
}

/// An internal snapshot that an image has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique in the image.
    pub id: String,
    /// Not unique, if others have made it.
    pub name: String,
    /// As in [`SnapshotSpec`].
    pub seconds: u64,
    /// As in [`SnapshotSpec`].
    pub nanoseconds: u32,
    /// As in [`SnapshotSpec`].
    pub vm_clock_ns: u64,
    /// As in [`SnapshotSpec`].
    pub instructions: Option<u64>,
    /// As in [`SnapshotSpec`].
    pub vm_state_bytes: u64,
}

/// Which internal snapshot: what is given must all be the snapshot's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotRef {
    /// Its identifier.
    pub id: Option<String>,
    /// Its name; of several the first.
    pub name: Option<String>,
}

impl SnapshotRef {
    /// The snapshot with this identifier.
    pub fn id(id: impl Into<String>) -> Self {
        Self {
            id: Some(id.into()),
            name: None,
        }
    }

    /// The first snapshot of this name.
    pub fn name(name: impl Into<String>) -> Self {
        Self {
            id: None,
            name: Some(name.into()),
        }
    }

    /// Where in a list it is; `None` if it is not there, or nothing was given.
    pub fn find(&self, snapshots: &[SnapshotInfo]) -> Option<usize> {
        let (id, name) = (self.id.as_deref(), self.name.as_deref());
        if id.is_none() && name.is_none() {
            return None;
        }
        snapshots.iter().position(|snapshot| {
            id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name)
        })
    }

    /// What `text` names in a list, where it may be either: an identifier, else a name.
    pub fn id_or_name(text: &str, snapshots: &[SnapshotInfo]) -> Self {
        let by_id = Self::id(text);
        match by_id.find(snapshots) {
            Some(_) => by_id,
            None => Self::name(text),
        }
    }
}

impl std::fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.id, &self.name) {
            (Some(id), Some(name)) => write!(f, "snapshot '{name}' with the identifier '{id}'"),
            (Some(id), None) => write!(f, "snapshot with the identifier '{id}'"),
            (None, Some(name)) => write!(f, "snapshot '{name}'"),
            (None, None) => f.write_str("snapshot without a name"),
        }
    }
}

/// What a check repairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fix {
    /// Nothing.
    #[default]
    None,
    /// Space that is taken and not used: no data is touched.
    Leaks,
    /// Everything that can be. What contradicts itself is decided one way, which may be the wrong one.
    All,
}

/// What a check has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Places where the image contradicts itself, and still does.
    pub corruptions: u64,
    /// Clusters that are taken and not used, and still are.
    pub leaks: u64,
    /// Contradictions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// Clusters of the disk; 0 if they are not counted, as for the next three.
    pub total_clusters: u64,
    /// Of these, those that the image holds.
    pub allocated_clusters: u64,
    /// Of these, those that do not lie behind the one before.
    pub fragmented_clusters: u64,
    /// Of these, those that are compressed.
    pub compressed_clusters: u64,
    /// Where the last cluster in use ends in the image's file, in bytes.
    pub image_end_offset: u64,
}

impl CheckReport {
    /// Nothing is wrong, and everything was looked at.
    pub fn is_clean(&self) -> bool {
        (self.corruptions, self.leaks, self.check_errors) == (0, 0, 0)
    }
}

/// How large an image becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// With what is known to be in it now, in bytes.
    pub required_bytes: u64,
    /// When all of it has been written to, in bytes.
    pub fully_allocated_bytes: u64,
    /// Besides, if the persistent dirty bitmaps of the image it is made from are copied, in bytes; `None`
    /// if it can have none.
    pub bitmaps_bytes: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_found_by_all_that_is_given_and_a_text_is_an_identifier_first() {
        let list: Vec<_> = [("1", "one"), ("2", "1"), ("3", "one"), ("4", "three")]
            .map(|(id, name)| SnapshotInfo {
                id: id.into(),
                name: name.into(),
                ..SnapshotInfo::default()
            })
            .into();
        assert_eq!(SnapshotRef::id("3").find(&list), Some(2));
        assert_eq!(SnapshotRef::name("one").find(&list), Some(0));
        assert_eq!(SnapshotRef::name("3").find(&list), None);
        let both = |id: &str, name: &str| SnapshotRef {
            id: Some(id.into()),
            name: Some(name.into()),
        };
        assert_eq!(both("3", "one").find(&list), Some(2));
        assert_eq!(both("4", "one").find(&list), None);
        assert_eq!(SnapshotRef::default().find(&list), None);
        let found = |text: &str| SnapshotRef::id_or_name(text, &list).find(&list);
        assert_eq!((found("1"), found("three")), (Some(0), Some(3)));
        assert_eq!(found("five"), None);
    }
}
