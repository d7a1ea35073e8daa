//! A program whose messages cannot be written does its work all the same.

#[path = "../../tests/broken_log/mod.rs"]
mod broken_log;

#[test]
fn xen_virtioctl_ends_as_it_would_with_a_standard_error() {
    broken_log::ends_as_with_a_log(env!("CARGO_BIN_EXE_xen-virtioctl"), &["check"]);
}
