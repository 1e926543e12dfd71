//! Names of directory entries and extended attributes, checked once.
//!
//! Invariants:
//! - A [`Name`] has 1 to 255 bytes, none of them `/` or NUL, and is neither `.` nor `..`.
//! - An [`XattrName`] has 1 to 255 bytes, none of them NUL.

use std::fmt;

use bytes::Bytes;

use crate::Errno;

/// A name in a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Bytes);

impl Name {
    /// Checks `bytes` as a name: ENAMETOOLONG above 255 bytes, EINVAL for what no directory can hold.
    pub fn new(bytes: impl Into<Bytes>) -> Result<Name, Errno> {
        let bytes = bytes.into();
        if bytes.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if bytes.is_empty() || &bytes[..] == b"." || &bytes[..] == b".." {
            return Err(Errno::EINVAL);
        }
        if bytes.iter().any(|byte| *byte == b'/' || *byte == 0) {
            return Err(Errno::EINVAL);
        }
        Ok(Name(bytes))
    }

    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes of the name, shared.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

/// The name of an extended attribute, its namespace included (`user.comment`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XattrName(Bytes);

impl XattrName {
    /// Checks `bytes` as an attribute's name: ERANGE above 255 bytes, EINVAL when empty or with a NUL.
    pub fn new(bytes: impl Into<Bytes>) -> Result<XattrName, Errno> {
        let bytes = bytes.into();
        if bytes.len() > NAME_MAX {
            return Err(Errno::ERANGE);
        }
        if bytes.is_empty() || bytes.contains(&0) {
            return Err(Errno::EINVAL);
        }
        Ok(XattrName(bytes))
    }

    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes of the name, shared.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}

impl fmt::Debug for XattrName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

/// The longest name of a directory entry or an extended attribute, in bytes.
pub const NAME_MAX: usize = 255;
