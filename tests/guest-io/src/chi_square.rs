//! Whether bytes look like chance.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

/// Of 256 values that are equally likely: the mean is 255, and five standard deviations are 113.
const RANGE: std::ops::Range<f64> = 142.0..368.0;

/// Reads `count` bytes of `source`, and tells how often each value is among them.
pub(crate) fn run(source: &Path, count: usize) -> Result<()> {
    let mut bytes = vec![0; count];
    let mut file = File::open(source).with_context(|| source.display().to_string())?;
    let began = Instant::now();
    file.read_exact(&mut bytes)
        .with_context(|| source.display().to_string())?;
    let seconds = began.elapsed().as_secs_f64();
    let statistic = statistic(&bytes);
    println!(
        "chi-square {statistic:.1} of {count} bytes, {:.0} bytes a second",
        count as f64 / seconds
    );
    ensure!(
        RANGE.contains(&statistic),
        "{statistic:.1} is not within {RANGE:?}"
    );
    Ok(())
}

fn statistic(bytes: &[u8]) -> f64 {
    let mut counts = [0_u32; 256];
    for byte in bytes {
        counts[usize::from(*byte)] += 1;
    }
    let expected = bytes.len() as f64 / 256.0;
    let square = |count: &u32| (f64::from(*count) - expected).powi(2) / expected;
    counts.iter().map(square).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_told_from_what_is_none() {
        let mut state = 1_u64;
        let random: Vec<u8> = (0..1 << 16)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                state.to_le_bytes()[7]
            })
            .collect();
        assert!(RANGE.contains(&statistic(&random)));
        let mut zeros = random.clone();
        zeros[..8192].fill(0);
        assert!(!RANGE.contains(&statistic(&zeros)));
        let even: Vec<u8> = (0..1 << 16)
            .map(|place: u32| place.to_le_bytes()[0])
            .collect();
        assert!(!RANGE.contains(&statistic(&even)));
    }
}
