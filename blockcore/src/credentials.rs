//! Keys that nodes and servers refer to by name: kept here, and meaning something to who takes them only.
//!
//! Threads: control thread only; what is kept may be used from any.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use crate::{Error, ErrorKind};

/// All that there are, by name. A clone is the same.
#[derive(Clone, Default)]
pub struct Credentials(Rc<RefCell<BTreeMap<String, Arc<dyn Any + Send + Sync>>>>);

impl Credentials {
    /// Keeps something under a name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Exists`].
    pub fn add(&self, name: &str, value: Arc<dyn Any + Send + Sync>) -> Result<(), Error> {
        let mut all = self.0.borrow_mut();
        if all.contains_key(name) {
            let text = format!("there are credentials '{name}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        all.insert(name.to_owned(), value);
        Ok(())
    }

    /// Forgets what is kept under a name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] as long as somebody has it.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let mut all = self.0.borrow_mut();
        match all.get(name) {
            None => Err(not_found(name)),
            Some(value) if Arc::strong_count(value) > 1 => {
                Err(Error::busy(format!("credentials '{name}' are in use")))
            }
            Some(_) => {
                all.remove(name);
                Ok(())
            }
        }
    }

    /// What is kept under a name; in use for as long as the caller has it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is none of that name, or it is of another type.
    pub fn get<T: Any + Send + Sync>(&self, name: &str) -> Result<Arc<T>, Error> {
        let value = self.0.borrow().get(name).cloned();
        let value = value.ok_or_else(|| not_found(name))?;
        value.downcast().map_err(|_| not_found(name))
    }
}

impl fmt::Debug for Credentials {
    /// Names only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.borrow().keys()).finish()
    }
}

fn not_found(name: &str) -> Error {
    let text = format!("No TLS credentials with id '{name}'");
    Error::new(ErrorKind::NotFound, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_has_is_not_forgotten() {
        let all = Credentials::default();
        all.add("k", Arc::new(7_u32)).unwrap();
        let kind = |result: Result<(), Error>| result.unwrap_err().kind();
        assert_eq!(kind(all.add("k", Arc::new(8_u32))), ErrorKind::Exists);
        let taken = all.get::<u32>("k").unwrap();
        assert_eq!(*taken, 7);
        assert!(all.get::<u64>("k").is_err());
        assert_eq!(kind(all.remove("k")), ErrorKind::Busy);
        drop(taken);
        all.remove("k").unwrap();
        assert_eq!(kind(all.remove("k")), ErrorKind::NotFound);
    }
}
