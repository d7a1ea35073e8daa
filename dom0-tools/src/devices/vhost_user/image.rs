//! A disk in a format that is not ours: qemu-storage-daemon serves it, by one line of configuration.

use crate::program::{Exec, SOCKET_WORD};
use crate::text::stable_hash;
use std::path::{Path, PathBuf};

/// The setting that declares it. A format is never guessed from what is in the image, which its guest writes.
pub(in super::super) const FORMAT: &str = "format";
/// The one that needs nobody else.
pub(in super::super) const RAW: &str = "raw";
const QCOW2: &str = "qcow2";

const PROGRAM: &str = "/usr/bin/qemu-storage-daemon";
/// Where the images' sockets are, each in a folder of its own, which the program's user has.
const SOCKETS: &str = "/run/xen-virtio-images";

/// The socket at which the image at `path` is served, and what is started to do that.
///
/// # Errors
///
/// What is wrong with the settings.
pub(super) fn served(
    format: &str,
    path: &Path,
    read_only: bool,
) -> Result<(PathBuf, Exec), String> {
    if format != QCOW2 {
        return Err(format!("format = {format:?} is none of {RAW}, {QCOW2}"));
    }
    let text = path.to_str().filter(|text| text.starts_with('/'));
    let text = text.ok_or_else(|| format!("path = {path:?} is no absolute path"))?;
    let socket = format!("{SOCKETS}/{:016x}/disk.sock", stable_hash(text));
    let block = serde_json::json!({
        "driver": QCOW2,
        "node-name": "disk",
        "read-only": read_only,
        "discard": "unmap",
        "file": { "driver": "file", "filename": text, "discard": "unmap" },
    });
    let writable = if read_only { "off" } else { "on" };
    // What is not written through is lost when the program is killed, whatever the guest was told.
    let export = format!(
        "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={SOCKET_WORD},writable={writable},\
         writethrough=on"
    );
    let words = [
        PROGRAM.to_owned(),
        "--blockdev".to_owned(),
        block.to_string(),
        "--export".to_owned(),
        export,
    ];
    Ok((socket.into(), Exec::Words(words.into())))
}
