//! [`QmpError`]: what a command answers instead of a value.

use blockcore::Error;

/// What kind of error: clients match on a few of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// There is no such command, or not now.
    CommandNotFound,
    /// What was named does not exist.
    DeviceNotFound,
    /// There is no such job.
    DeviceNotActive,
}

impl ErrorClass {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
        }
    }
}

/// A refusal or failure, for a client: a class for code and a sentence for a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// For code.
    pub class: ErrorClass,
    /// For a person.
    pub desc: String,
}

impl QmpError {
    /// An error of class `class`.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        let desc = desc.into();
        Self { class, desc }
    }

    /// An error without a class of its own.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }
}

impl From<Error> for QmpError {
    fn from(error: Error) -> Self {
        Self::generic(error.report())
    }
}

impl From<QmpError> for Error {
    fn from(error: QmpError) -> Self {
        Self::invalid(error.desc)
    }
}
