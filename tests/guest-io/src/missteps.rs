//! What a driver does that does not get on: each is told where its integrator looks.

use crate::{Driver, Negotiated, RawQueue};
use anyhow::{Result, bail, ensure};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_ACCESS_PLATFORM,
};
use xen_virtio_guest_mapping::GRANT_BIT;
use xen_virtio_transport::Register;

const SIZE: u32 = 64;

/// Makes the misstep of this name.
///
/// # Errors
///
/// If the device does not answer as virtio has it.
pub fn make(driver: &Driver, name: &str) -> Result<()> {
    let offered = driver.offered_features();
    match name {
        "order" => {
            for status in [VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK] {
                driver.write(Register::Status, 0);
                driver.write(Register::Status, status);
                ensure!(
                    driver.read(Register::Status) == 0,
                    "status {status} alone was taken"
                );
            }
        }
        "features" => {
            let without = driver.negotiate(offered & !(1 << VIRTIO_F_ACCESS_PLATFORM));
            ensure!(
                without == Negotiated::Refused,
                "features without ACCESS_PLATFORM were taken"
            );
        }
        "early-queue" => {
            driver.write(Register::Status, 0);
            for status in [
                VIRTIO_CONFIG_S_ACKNOWLEDGE,
                VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER,
            ] {
                driver.write(Register::Status, status);
            }
            let queue = RawQueue::new(driver, 64);
            driver.start_queue(0, SIZE, queue.addresses());
            ensure!(
                driver.read(Register::QueueReady) == 0,
                "a queue was started early"
            );
        }
        "no-queue" => {
            ensure!(
                driver.negotiate(offered) == Negotiated::Accepted,
                "good features refused"
            );
            driver.driver_ok();
        }
        // As a kernel with 64 KiB pages does.
        "wrong-grants" => {
            ensure!(
                driver.negotiate(offered) == Negotiated::Accepted,
                "good features refused"
            );
            let place = |page: u64| GRANT_BIT | (0xfff_0000 + page) << 12;
            driver.start_queue(0, SIZE, [place(0), place(1), place(2)]);
            driver.driver_ok();
            ensure!(driver.needs_reset(), "no DEVICE_NEEDS_RESET");
        }
        // Linux's next driver finds the device as its bus leaves one behind.
        "none" => {
            driver.write(Register::Status, 0);
            driver.write(Register::Status, VIRTIO_CONFIG_S_ACKNOWLEDGE);
        }
        _ => bail!("no such misstep: {name}"),
    }
    Ok(())
}
