//! Blocks that say which they are and how often they were written: written at random, read back, compared.

use crate::ring::{Ring, Transfer};
use anyhow::{Result, bail};
use std::path::Path;
use std::time::{Duration, Instant};
use xen_virtio_guest_io::Random;

const BLOCK: usize = 4096;
const DEPTH: usize = 16;
/// Blocks written between two rounds of reading back.
const ROUND: usize = 256;

/// Fills `buffer` with what generation `generation` of block `block` holds.
fn fill(buffer: &mut [u8], block: usize, generation: u32) {
    let mut random = Random((block as u64) << 32 | u64::from(generation));
    for word in buffer.chunks_exact_mut(8) {
        word.copy_from_slice(&random.number().to_le_bytes());
    }
}

/// Prints a line a second, and `verified …` at the end.
pub(crate) fn run(device: &Path, seconds: u64) -> Result<()> {
    let mut ring = Ring::open(device, BLOCK, DEPTH)?;
    let blocks = usize::try_from(ring.bytes)? / BLOCK;
    let mut generations = vec![0u32; blocks];
    let mut random = Random(0);
    let mut told = Instant::now();
    let end = told + Duration::from_secs(seconds);
    let (mut written, mut checked, mut rounds) = (0u64, 0u64, 0u64);
    while Instant::now() < end || rounds == 0 {
        // Distinct blocks: two writes in flight to one block have no order.
        let mut chosen: Vec<usize> = (0..ROUND).map(|_| random.below(blocks)).collect();
        chosen.sort_unstable();
        chosen.dedup();
        let mut left = chosen.clone();
        ring.run(
            |ring, slot| {
                let block = left.pop()?;
                let generation = &mut generations[block];
                *generation += 1;
                fill(ring.buffer(slot), block, *generation);
                Some(Transfer::Write((block * BLOCK) as u64))
            },
            |_, _, _| {
                written += 1;
                Ok(())
            },
        )?;
        ring.sync()?;
        // What was just written, and as many of what was written at any time.
        let known = |block: usize| generations[block] > 0;
        let mut left = chosen;
        left.extend(
            (0..ROUND)
                .map(|_| random.below(blocks))
                .filter(|block| known(*block)),
        );
        let mut expected = vec![0; BLOCK];
        ring.run(
            |_, _| Some(Transfer::Read((left.pop()? * BLOCK) as u64)),
            |ring, slot, transfer| {
                let (Transfer::Read(offset) | Transfer::Write(offset)) = transfer;
                let block = usize::try_from(offset)? / BLOCK;
                let generation = generations[block];
                fill(&mut expected, block, generation);
                if ring.buffer(slot) != expected {
                    bail!("block {block} does not hold what its write {generation} left there");
                }
                checked += 1;
                Ok(())
            },
        )?;
        rounds += 1;
        if rounds == 1 || told.elapsed() >= Duration::from_secs(1) {
            told = Instant::now();
            println!("verifying: {}", standing(written, checked, &mut ring));
        }
    }
    println!("verified: {}", standing(written, checked, &mut ring));
    Ok(())
}

/// What has been found so far (a mismatch ends it at once), and the longest pause since this was said last.
fn standing(written: u64, checked: u64, ring: &mut Ring) -> String {
    format!(
        "{written} blocks written, {checked} read back, no mismatch, longest pause {} ms",
        ring.take_longest_pause().as_millis()
    )
}
