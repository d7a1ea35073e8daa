//! Transfers for a while, at a size and a depth.

use crate::ring::{Ring, Transfer};
use anyhow::{Context, Result, bail};
use std::cell::Cell;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};
use xen_virtio_guest_io::Random;

/// What to measure, written as `4k-qd16-randread`: block size, transfers in flight, and fio's name for the
/// pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    block: usize,
    depth: usize,
    write: bool,
    random: bool,
}

impl FromStr for Pattern {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let [block, depth, kind] = parts[..] else {
            bail!("{text:?} is not like 4k-qd16-randread")
        };
        let block = match block.split_at(block.len().saturating_sub(1)) {
            (number, "k") => number.parse::<usize>()? << 10,
            (number, "m") => number.parse::<usize>()? << 20,
            _ => bail!("{block:?} is not a size like 4k or 1m"),
        };
        let depth = depth.strip_prefix("qd").context("no depth like qd16")?;
        let (random, kind) = match kind.strip_prefix("rand") {
            Some(kind) => (true, kind),
            None => (false, kind),
        };
        Ok(Self {
            block,
            depth: depth.parse()?,
            write: match kind {
                "read" => false,
                "write" => true,
                _ => bail!("{kind:?} is neither read nor write"),
            },
            random,
        })
    }
}

/// Prints IOPS and MB/s; at depth 1 also the microseconds within which 99 of 100 transfers ended.
pub(crate) fn run(device: &Path, pattern: &str, seconds: f64) -> Result<()> {
    let pattern: Pattern = pattern.parse()?;
    let mut ring = Ring::open(device, pattern.block, pattern.depth)?;
    // The first transfers set things up, on both sides.
    transfer(&mut ring, pattern, Duration::from_millis(200))?;
    let mut measured = transfer(&mut ring, pattern, Duration::from_secs_f64(seconds))?;
    let iops = f64::from(measured.count) / measured.took.as_secs_f64();
    print!("{iops:.0} {:.1}", iops * pattern.block as f64 / 1e6);
    measured.latencies.sort_unstable();
    let last = measured.latencies.len().saturating_sub(1);
    if let Some(latency) = measured.latencies.get(last * 99 / 100) {
        print!(" {}", latency.as_micros());
    }
    println!();
    Ok(())
}

struct Measured {
    count: u32,
    took: Duration,
    /// Of each transfer, at depth 1: at others nobody asks, and clocks are slow to read.
    latencies: Vec<Duration>,
}

fn transfer(ring: &mut Ring, pattern: Pattern, limit: Duration) -> Result<Measured> {
    let mut random = Random(1);
    let blocks = usize::try_from(ring.bytes)? / pattern.block;
    let began = Instant::now();
    let mut next = 0;
    let mut count = 0;
    let last_start = Cell::new(Duration::ZERO);
    let mut latencies = Vec::new();
    ring.run(
        |_, _| {
            let block = if pattern.random {
                random.below(blocks)
            } else {
                next % blocks
            };
            next += 1;
            let offset = (block * pattern.block) as u64;
            let transfer = if pattern.write {
                Transfer::Write(offset)
            } else {
                Transfer::Read(offset)
            };
            last_start.set(began.elapsed());
            (last_start.get() < limit).then_some(transfer)
        },
        |_, _, _| {
            count += 1;
            if pattern.depth == 1 {
                latencies.push(began.elapsed() - last_start.get());
            }
            Ok(())
        },
    )?;
    Ok(Measured {
        count,
        took: began.elapsed(),
        latencies,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_what_its_name_says() {
        let pattern: Pattern = "4k-qd16-randwrite".parse().unwrap();
        let expected = Pattern {
            block: 4096,
            depth: 16,
            write: true,
            random: true,
        };
        assert_eq!(pattern, expected);
        let pattern: Pattern = "1m-qd2-read".parse().unwrap();
        assert_eq!((pattern.block, pattern.random), (1 << 20, false));
        for wrong in [
            "",
            "4k",
            "4-qd1-read",
            "4k-1-read",
            "4k-qd1-trim",
            "k-qd1-read",
        ] {
            assert!(wrong.parse::<Pattern>().is_err(), "{wrong}");
        }
    }
}
