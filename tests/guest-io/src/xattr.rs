//! A file's extended attributes.

use anyhow::Result;
use rustix::fs::{XattrFlags, getxattr, setxattr};

/// Sets the attribute `name` of `file`, if there is a `value` for it, and prints what it is then.
pub(crate) fn run(file: &str, name: &str, value: Option<&str>) -> Result<()> {
    if let Some(value) = value {
        setxattr(file, name, value.as_bytes(), XattrFlags::empty())?;
    }
    let mut found = [0u8; 256];
    let len = getxattr(file, name, &mut found)?;
    println!(
        "xattr: {name} is {}",
        String::from_utf8_lossy(&found[..len])
    );
    Ok(())
}
