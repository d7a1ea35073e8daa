//! A program whose log cannot be written does its work all the same.

mod broken_log;

#[test]
fn xen_virtiod_ends_as_it_would_with_a_log() {
    broken_log::ends_as_with_a_log(env!("CARGO_BIN_EXE_xen-virtiod"), &[]);
}
