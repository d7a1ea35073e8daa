//! Random transfers for a while, at the sizes and depths that the project is measured by.

use crate::ring::{Random, Ring, Transfer};
use anyhow::Result;
use std::path::Path;
use std::time::{Duration, Instant};

struct Case {
    name: &'static str,
    write: bool,
    block: usize,
    depth: usize,
}

const CASES: [Case; 4] = [
    Case {
        name: "4k-qd1-read",
        write: false,
        block: 4 << 10,
        depth: 1,
    },
    Case {
        name: "4k-qd16-read",
        write: false,
        block: 4 << 10,
        depth: 16,
    },
    Case {
        name: "4k-qd16-write",
        write: true,
        block: 4 << 10,
        depth: 16,
    },
    Case {
        name: "64k-qd4-read",
        write: false,
        block: 64 << 10,
        depth: 4,
    },
];

/// Prints a line `bench NAME IOPS MB/s` for each case, `seconds` each.
pub(crate) fn run(device: &Path, seconds: u64) -> Result<()> {
    for Case {
        name,
        write,
        block,
        depth,
    } in CASES
    {
        if std::env::var("ONLY").is_ok_and(|only| only != name) {
            continue;
        }
        let mut ring = Ring::open(device, block, depth)?;
        // The first transfers of a case set things up, on both sides.
        transfer(&mut ring, write, block, Duration::from_millis(200))?;
        let limit = Duration::from_secs(seconds);
        let (count, took) = transfer(&mut ring, write, block, limit)?;
        let iops = f64::from(count) / took.as_secs_f64();
        println!("bench {name} {iops:.0} {:.1}", iops * block as f64 / 1e6);
    }
    Ok(())
}

fn transfer(
    ring: &mut Ring,
    write: bool,
    block: usize,
    limit: Duration,
) -> Result<(u32, Duration)> {
    let mut random = Random(1);
    let blocks = usize::try_from(ring.bytes)? / block;
    let began = Instant::now();
    let mut count = 0;
    ring.run(
        |_, _| {
            let offset = (random.below(blocks) * block) as u64;
            let transfer = if write {
                Transfer::Write(offset)
            } else {
                Transfer::Read(offset)
            };
            (began.elapsed() < limit).then_some(transfer)
        },
        |_, _, _| {
            count += 1;
            Ok(())
        },
    )?;
    Ok((count, began.elapsed()))
}
