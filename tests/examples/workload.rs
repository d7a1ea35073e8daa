//! Repeats one workload: what `scripts/instructions` has counted.

use xen_virtio_tests::WORKLOADS;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [] => {
            for (name, _) in WORKLOADS {
                println!("{name}");
            }
        }
        [name, times] => {
            let (_, workload) = WORKLOADS
                .iter()
                .find(|(known, _)| known == name)
                .expect("a name that this program lists");
            let mut operation = workload();
            for _ in 0..times.parse().expect("a number of times") {
                operation();
            }
        }
        _ => panic!("usage: workload [NAME TIMES]"),
    }
}
