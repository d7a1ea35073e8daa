//! `xen-virtioctl demo`: the devices on a simulated hypervisor, on any Linux machine.
//!
//! The guest is the `virtio-drivers` crate: a driver that nobody here wrote.

use anyhow::{Context, Result, ensure};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use virtio_drivers::device::blk::VirtIOBlk;
use xen_virtio_backend::RingStock;
use xen_virtio_backend::StateArea;
use xen_virtio_backend::blk::{Blk, Disk};
use xen_virtio_dom0_tools::ctl::arguments::DemoOptions;
use xen_virtio_guest_mapping::AddressMode;
use xen_virtio_sim::{FIRST_DEVICE, SimHal, SimMachine, SimTransport};
use xen_virtio_transport::DeviceReport;

const REQUEST: usize = 64 << 10;
const REQUEST_SECTORS: usize = REQUEST / 512;

/// Runs the demo; returns what to show.
///
/// # Errors
///
/// What went wrong, a mismatch of the data above all.
pub(crate) fn run(options: &DemoOptions) -> Result<String> {
    let mut temporary = None;
    let path = match &options.disk {
        Some(path) => path.clone(),
        None => temporary.insert(TemporaryDisk::new(16 << 20)?).path.clone(),
    };
    let disk = Disk::open(&path, false)?;
    let bytes = usize::try_from(disk.bytes().min(64 << 20))? / REQUEST * REQUEST;
    ensure!(
        bytes > 0,
        "disk {}: the demo needs at least {REQUEST} bytes",
        path.display()
    );
    let mode = if options.no_grants {
        AddressMode::Frames
    } else {
        AddressMode::Grants
    };
    let (guest, machine) = SimMachine::start(mode, || {
        Ok(vec![Box::new(Blk::new(
            disk,
            *b"xen-virtioctl demo\0\0",
            1,
            StateArea::private(Blk::KEPT)?,
            &RingStock::new(1),
        )?)])
    })?;
    let written = (0..bytes).map(pattern).collect::<Vec<u8>>();

    SimHal::install(guest.memory().clone(), mode);
    let transport = SimTransport::new(guest.clone(), FIRST_DEVICE);
    let mut driver = VirtIOBlk::<SimHal, _>::new(transport).context("probing the device")?;
    let began = Instant::now();
    for (index, chunk) in written.chunks(REQUEST).enumerate() {
        driver
            .write_blocks(index * REQUEST_SECTORS, chunk)
            .context("writing")?;
    }
    driver.flush().context("flushing")?;
    let writing = began.elapsed();
    let mut read = vec![0; bytes];
    let began = Instant::now();
    for (index, chunk) in read.chunks_mut(REQUEST).enumerate() {
        driver
            .read_blocks(index * REQUEST_SECTORS, chunk)
            .context("reading back")?;
    }
    let reading = began.elapsed();
    let mapped = guest.memory().grants();
    drop(driver);
    let [report] = &machine.stop()?[..] else {
        unreachable!("one device")
    };
    let mut on_disk = vec![0; bytes];
    File::open(&path)?.read_exact(&mut on_disk)?;
    ensure!(
        read == written,
        "what the guest read back is not what it wrote"
    );
    ensure!(
        on_disk == written,
        "what is in {} is not what the guest wrote",
        path.display()
    );
    Ok(summary(&path, bytes, writing, reading, mapped, report))
}

/// A byte that depends on its place, so that a block in the wrong one is noticed.
fn pattern(place: usize) -> u8 {
    (place.wrapping_mul(0x9e37_79b9) >> 16).to_le_bytes()[0]
}

fn summary(
    path: &Path,
    bytes: usize,
    writing: Duration,
    reading: Duration,
    grants: usize,
    report: &DeviceReport,
) -> String {
    let mib = bytes >> 20;
    let rate = |time: Duration| bytes as f64 / 1e6 / time.as_secs_f64();
    let mut text = String::new();
    let mut line = |what: &str, how: String| {
        let _ = writeln!(text, "{what:<10}{how}");
    };
    line(
        "disk",
        format!(
            "{}, driven by the virtio-drivers crate in a simulated guest",
            path.display()
        ),
    );
    line(
        "written",
        format!(
            "{mib} MiB in requests of {} KiB, {:.0} MB/s",
            REQUEST >> 10,
            rate(writing)
        ),
    );
    line("read back", format!("{mib} MiB, {:.0} MB/s", rate(reading)));
    line(
        "verified",
        "every byte, in the guest and in the file".to_owned(),
    );
    line(
        "trapped",
        format!(
            "{} register accesses, {} of them kicks, for {} requests; {} interrupts",
            report.traps, report.kicks, report.requests, report.interrupts
        ),
    );
    line(
        "granted",
        format!(
            "{grants} pages while the driver ran (its rings); after it, {} are mapped",
            report.grants_mapped
        ),
    );
    line(
        "copied",
        format!(
            "{} bytes in {} segments, {} batches",
            report.copy_bytes, report.copy_segments, report.copy_batches
        ),
    );
    text
}

/// A disk in the system's temporary directory, removed when dropped.
struct TemporaryDisk {
    path: PathBuf,
}

impl TemporaryDisk {
    fn new(bytes: u64) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("xen-virtio-demo-{}.img", std::process::id()));
        let file = File::options().write(true).create_new(true).open(&path);
        let disk = Self { path };
        file.and_then(|file| file.set_len(bytes))
            .with_context(|| format!("making a disk at {}", disk.path.display()))?;
        Ok(disk)
    }
}

impl Drop for TemporaryDisk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
