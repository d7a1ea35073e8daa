//! `cargo bench`: how long the pieces of the data path take on this machine, on the simulator.

use criterion::{Criterion, criterion_group, criterion_main};
use xen_virtio_tests::WORKLOADS;

fn data_path(criterion: &mut Criterion) {
    for (name, workload) in WORKLOADS {
        criterion.bench_function(name, |bencher| bencher.iter(workload()));
    }
}

criterion_group!(benches, data_path);
criterion_main!(benches);
