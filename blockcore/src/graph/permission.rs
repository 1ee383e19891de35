//! Permissions: what a parent needs of a child, and what it lets others have ("shared"). Pure.

use bitflags::bitflags;

use crate::Error;

bitflags! {
    /// A set of permissions. The bits are those that QEMU's image locks stand for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Permissions: u8 {
        /// What is read is complete and of one moment.
        const CONSISTENT_READ = 1;
        /// Change what others read.
        const WRITE = 2;
        /// Write what leaves everything readable as it was.
        const WRITE_UNCHANGED = 4;
        /// Change the length.
        const RESIZE = 8;
    }
}

impl Permissions {
    /// The permissions' names, for messages.
    pub fn names(self) -> String {
        let names = [
            (Self::CONSISTENT_READ, "consistent read"),
            (Self::WRITE, "write"),
            (Self::WRITE_UNCHANGED, "write unchanged"),
            (Self::RESIZE, "resize"),
        ];
        let mine: Vec<_> = names
            .iter()
            .filter(|(permission, _)| self.contains(*permission))
            .map(|(_, name)| format!("'{name}'"))
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

/// Whether `new` can be granted on `node` beside the claims there are.
///
/// # Errors
///
/// [`crate::ErrorKind::Busy`] that names who holds what.
pub fn check<'a>(
    node: &str,
    new: &Claim,
    others: impl IntoIterator<Item = &'a Claim>,
) -> Result<(), Error> {
    for other in others {
        let refused = new.needs - other.shares;
        if !refused.is_empty() {
            return Err(Error::busy(format!(
                "{} cannot use node '{node}': it needs {}, which {} does not share",
                new.who,
                refused.names(),
                other.who
            )));
        }
        let taken = other.needs - new.shares;
        if !taken.is_empty() {
            return Err(Error::busy(format!(
                "{} cannot use node '{node}': it does not share {}, which {} uses",
                new.who,
                taken.names(),
                other.who
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(who: &str, needs: Permissions, shares: Permissions) -> Claim {
        Claim {
            who: who.into(),
            needs,
            shares,
        }
    }

    #[test]
    fn a_conflict_names_the_holder_in_both_directions() {
        let read = Permissions::CONSISTENT_READ;
        let write = Permissions::WRITE;
        let one = claim("export 'a'", read | write, read);
        let two = claim("export 'b'", write, Permissions::all());
        let error = check("disk", &two, [&one]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "export 'b' cannot use node 'disk': it needs 'write', which export 'a' does not share"
        );
        let error = check("disk", &one, [&two]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "export 'a' cannot use node 'disk': it does not share 'write', which export 'b' uses"
        );
        let reader = claim("job 'c'", read, Permissions::all());
        assert!(check("disk", &reader, [&one]).is_ok());
    }
}
