//! Permissions: what a parent needs of a child, and what it lets others have ("shared"). Pure.

use bitflags::bitflags;

use crate::driver::{ChildPermissions, ChildQuery, Role};

bitflags! {
    /// A set of permissions. The bits are those that QEMU's image locks stand for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct Permissions: u8 {
        /// What is read is complete and of one moment.
        const CONSISTENT_READ = 1;
        /// Change what others read.
        const WRITE = 2;
        /// Write what leaves everything readable as it was. [`WRITE`](Self::WRITE) includes it.
        const WRITE_UNCHANGED = 4;
        /// Change the length.
        const RESIZE = 8;
    }
}

impl Permissions {
    /// As operators write and read them.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("consistent-read", Self::CONSISTENT_READ),
        ("write", Self::WRITE),
        ("write-unchanged", Self::WRITE_UNCHANGED),
        ("resize", Self::RESIZE),
    ];

    /// The permissions' names, for messages.
    pub fn names(self) -> String {
        let mine: Vec<_> = Self::NAMES
            .iter()
            .filter(|(_, permission)| self.contains(*permission))
            .map(|(name, _)| format!("'{name}'"))
            .collect();
        mine.join(", ")
    }
}

/// One user's needs.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Who it is, for messages: `export 'vda'`.
    pub who: String,
    /// What it needs.
    pub needs: Permissions,
    /// What it lets others have.
    pub shares: Permissions,
}

/// What a node needs of a child by the core's rules:
///
/// * A filter needs and shares what its parents do.
/// * A node that defers to a backing node needs to read it consistently if its own parents read
///   consistently, and bears that others change it only if its parents would bear that of the node.
/// * A format that may write touches its metadata even if no parent writes: it writes and resizes what
///   holds them, reads it consistently, and lets nobody else write or resize. What only holds data is
///   written and resized if a parent writes, and not resized by others.
///
/// An image that another process has is not guarded: whatever that process does is its right.
pub fn default_rule(query: &ChildQuery) -> ChildPermissions {
    let (mut needs, mut shares) = (query.needs, query.shares);
    let writes = Permissions::WRITE | Permissions::RESIZE;
    if query.role.contains(Role::COW) {
        needs &= Permissions::CONSISTENT_READ;
        let kept = match query.shares.contains(Permissions::WRITE) {
            true => writes,
            false => Permissions::empty(),
        };
        shares = kept | Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED;
    } else if query.role.intersects(Role::DATA | Role::METADATA) {
        if query.role.contains(Role::METADATA) {
            if !query.read_only {
                needs |= writes;
            }
            needs |= Permissions::CONSISTENT_READ;
            shares -= writes;
        } else if needs.intersects(Permissions::WRITE) {
            // The first write to a place may make what holds it longer.
            needs |= Permissions::RESIZE;
        }
        shares -= Permissions::RESIZE;
    }
    if query.inactive {
        shares |= writes;
    }
    ChildPermissions { needs, shares }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::DriverKind;

    const READ: Permissions = Permissions::CONSISTENT_READ;
    const WRITE: Permissions = Permissions::WRITE;
    const RESIZE: Permissions = Permissions::RESIZE;

    fn rule(role: Role, needs: Permissions, shares: Permissions, read_only: bool) -> (u8, u8) {
        let kind = match role.contains(Role::FILTERED) {
            true => DriverKind::Filter,
            false => DriverKind::Format,
        };
        let answer = default_rule(&ChildQuery {
            kind,
            index: 0,
            role,
            needs,
            shares,
            read_only,
            inactive: false,
        });
        (answer.needs.bits(), answer.shares.bits())
    }

    fn bits(needs: Permissions, shares: Permissions) -> (u8, u8) {
        (needs.bits(), shares.bits())
    }

    #[test]
    fn a_filter_passes_its_parents_needs_on() {
        let filtered = Role::FILTERED | Role::PRIMARY;
        assert_eq!(
            rule(filtered, READ | WRITE, READ, false),
            bits(READ | WRITE, READ)
        );
    }

    #[test]
    fn a_backing_node_is_read_and_held_still() {
        let all = Permissions::all();
        let still = READ | Permissions::WRITE_UNCHANGED;
        assert_eq!(
            rule(Role::COW, READ | WRITE, READ, false),
            bits(READ, still)
        );
        // A parent that bears changes of the overlay bears those of the backing node.
        assert_eq!(
            rule(Role::COW, WRITE, all, false),
            bits(Permissions::empty(), all)
        );
    }

    #[test]
    fn a_format_keeps_others_from_its_image_even_while_nobody_writes() {
        let all = Permissions::all();
        let shared = READ | Permissions::WRITE_UNCHANGED;
        assert_eq!(
            rule(Role::IMAGE, READ, all, false),
            bits(READ | WRITE | RESIZE, shared)
        );
        assert_eq!(rule(Role::IMAGE, READ, all, true), bits(READ, shared));
    }

    #[test]
    fn what_only_holds_data_is_written_when_a_parent_writes() {
        let all = Permissions::all();
        assert_eq!(rule(Role::DATA, READ, all, false), bits(READ, all - RESIZE));
        assert_eq!(
            rule(Role::DATA, READ | WRITE, all, false),
            bits(READ | WRITE | RESIZE, all - RESIZE)
        );
    }
}
