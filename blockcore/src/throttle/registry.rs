//! [`Groups`]: the throttle groups of a process, by name.
//!
//! Threads: control thread only. A group itself is shared with workers; who may join one, and whether it
//! may go, is decided here.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use super::{Group, Limits};
use crate::graph::Control;
use crate::{Error, ErrorKind};

/// See the module's header. Clones are the same registry.
#[derive(Clone, Default)]
pub struct Groups(Rc<RefCell<BTreeMap<String, Entry>>>);

struct Entry {
    group: Arc<Group>,
    /// Nodes that use it, one entry for each use.
    users: Vec<String>,
}

/// A node's use of a group, which cannot be removed meanwhile. Ends when dropped.
pub struct GroupUse {
    groups: Groups,
    group: Arc<Group>,
    node: String,
}

impl Groups {
    /// Adds a group.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Exists`]; [`ErrorKind::Invalid`] as [`Limits::check`].
    pub fn add(&self, name: &str, limits: Limits) -> Result<(), Error> {
        let group = Group::new(name, limits)?;
        let mut groups = self.0.borrow_mut();
        if groups.contains_key(name) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("there is a throttle group '{name}' already"),
            ));
        }
        let users = Vec::new();
        groups.insert(name.to_owned(), Entry { group, users });
        Ok(())
    }

    /// The group called `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn find(&self, name: &str) -> Result<Arc<Group>, Error> {
        let groups = self.0.borrow();
        let entry = groups.get(name).ok_or_else(|| missing(name))?;
        Ok(Arc::clone(&entry.group))
    }

    /// Every group's name, in order.
    pub fn names(&self) -> Vec<String> {
        self.0.borrow().keys().cloned().collect()
    }

    /// Takes a group out.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] that names a node which uses it.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let mut groups = self.0.borrow_mut();
        let entry = groups.get(name).ok_or_else(|| missing(name))?;
        if let Some(user) = entry.users.first() {
            return Err(Error::busy(format!(
                "cannot remove throttle group '{name}': node '{user}' uses it"
            )));
        }
        groups.remove(name);
        Ok(())
    }

    /// Has `node` use a group.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn hold(&self, name: &str, node: &str) -> Result<GroupUse, Error> {
        let mut groups = self.0.borrow_mut();
        let entry = groups.get_mut(name).ok_or_else(|| missing(name))?;
        entry.users.push(node.to_owned());
        Ok(GroupUse {
            groups: self.clone(),
            group: Arc::clone(&entry.group),
            node: node.to_owned(),
        })
    }
}

fn missing(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("there is no throttle group '{name}'"),
    )
}

impl GroupUse {
    /// The group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Where it was found.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }
}

impl Drop for GroupUse {
    fn drop(&mut self) {
        let mut groups = self.groups.0.borrow_mut();
        let Some(entry) = groups.get_mut(self.group.name()) else {
            return;
        };
        if let Some(place) = entry.users.iter().position(|node| *node == self.node) {
            entry.users.swap_remove(place);
        }
    }
}

impl Control {
    /// Adds a throttle group, for nodes of driver `throttle` to use.
    ///
    /// # Errors
    ///
    /// As [`Groups::add`].
    pub fn add_throttle_group(&self, name: &str, limits: Limits) -> Result<(), Error> {
        self.throttle_groups().add(name, limits)
    }

    /// Changes a group's limits; those who wait do so at the new rate.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] as [`Limits::check`], and nothing has changed.
    pub fn set_throttle_limits(&self, name: &str, limits: Limits) -> Result<(), Error> {
        let now = self.context().engine().now();
        self.throttle_groups().find(name)?.set_limits(now, limits)
    }

    /// A group's limits.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn throttle_limits(&self, name: &str) -> Result<Limits, Error> {
        Ok(self.throttle_groups().find(name)?.limits())
    }

    /// Takes a throttle group out.
    ///
    /// # Errors
    ///
    /// As [`Groups::remove`].
    pub fn remove_throttle_group(&self, name: &str) -> Result<(), Error> {
        self.throttle_groups().remove(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_goes_when_its_last_user_has_gone() {
        let groups = Groups::default();
        groups.add("slow", Limits::default()).unwrap();
        let twice = groups.add("slow", Limits::default());
        assert_eq!(twice.unwrap_err().kind(), ErrorKind::Exists);
        let (one, two) = (groups.hold("slow", "a"), groups.hold("slow", "a"));
        drop(one);
        assert_eq!(groups.remove("slow").unwrap_err().kind(), ErrorKind::Busy);
        drop(two);
        groups.remove("slow").unwrap();
        assert_eq!(
            groups.remove("slow").unwrap_err().kind(),
            ErrorKind::NotFound
        );
    }
}
