//! What a VMM asks for, as the protocol's messages have it.

use super::served::Served;
use super::vring::{Areas, not_waiting, tell};
use std::fs::File;
use std::io;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use xen_virtio_backend::{QueueIndex, with_sources};
use xen_virtio_guest_mapping::owned::SharedRegion;

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Bytes of the configuration space that a VMM may ask for at once.
const MAX_CONFIG: u32 = 256;

impl Served {
    fn queue(&self, number: u32) -> Result<QueueIndex> {
        let count = self.vrings.len();
        let refused = || refused(format!("it names queue {number} of {count}"));
        self.index(number).ok_or_else(refused)
    }

    /// A queue that does not run, which alone is set up.
    fn stopped(&self, number: u32) -> Result<QueueIndex> {
        let index = self.queue(number)?;
        match self.vrings[index.get()].is_started {
            true => Err(refused(format!("it sets up queue {number}, which runs"))),
            false => Ok(index),
        }
    }
}

/// The VMM did what no VMM may.
fn refused(what: String) -> Error {
    Error::ReqHandlerError(io::Error::other(what))
}

fn unending(index: u32) -> Error {
    refused(format!(
        "queue {index} has requests that do not end, and cannot be stopped"
    ))
}

fn of_system(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}

/// What was not offered.
fn not_offered<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

impl VhostUserBackendReqHandlerMut for Served {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        for vring in &mut self.vrings {
            vring.is_enabled = false;
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.host.state.identity().features | PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.are_enabled = features & PROTOCOL_FEATURES == 0;
        let features = features & !PROTOCOL_FEATURES;
        let offered = self.host.state.identity().features;
        match features & !offered {
            0 if self.accept(features) => Ok(()),
            0 => Err(refused(format!(
                "it has accepted the features {features:#x}, without VIRTIO_F_VERSION_1, which is required"
            ))),
            more => Err(refused(format!(
                "it has accepted the features {more:#x}, which were not offered (QEMU: indirect_desc=off for {:#x})",
                1 << VIRTIO_RING_F_INDIRECT_DESC
            ))),
        }
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        if regions.len() != files.len() {
            return Err(Error::IncorrectFds);
        }
        let table = regions
            .iter()
            .zip(files)
            .map(|(region, file)| SharedRegion {
                guest: region.guest_phys_addr,
                len: region.memory_size,
                vmm: region.user_addr,
                file,
                offset: region.mmap_offset,
            });
        let set = self.memory.set(table.collect());
        set.map_err(|error| refused(with_sources(&error)))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let index = self.stopped(index)?;
        let most = self.host.state.identity().queue_sizes[index.get()];
        let size = u16::try_from(num).ok();
        let size = size.filter(|size| size.is_power_of_two() && *size <= most);
        let size = size.ok_or_else(|| {
            refused(format!(
                "it gives a queue {num} entries; {most} are the most, and a power of two"
            ))
        })?;
        self.vrings[index.get()].size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let index = self.stopped(index)?;
        let address = |vmm| {
            let refused = || {
                refused(format!(
                    "it has a ring at {vmm:#x}, which it does not share"
                ))
            };
            self.memory.guest_address(vmm).ok_or_else(refused)
        };
        let areas = Areas {
            descriptors: address(descriptor)?,
            available: address(available)?,
            used: address(used)?,
        };
        self.vrings[index.get()].areas = Some(areas);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let index = self.stopped(index)?;
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.vrings[index.get()].base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = self.queue(index)?;
        let next = self.stop(queue).map_err(of_system)?;
        let next = next.ok_or_else(|| unending(index))?;
        Ok(VhostUserVringState::new(index, next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.stopped(index.into())?;
        self.set_kick(index, fd);
        self.vrings[index.get()].is_enabled |= self.are_enabled;
        self.start(index).map_err(of_system)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.queue(index.into())?;
        let call = not_waiting(fd).map_err(of_system)?;
        let vring = &mut self.vrings[index.get()];
        vring.call = call;
        // What was completed while there was nobody to tell.
        if vring.is_started {
            tell(vring.call.as_ref());
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.queue(index.into())?;
        self.vrings[index.get()].error = not_waiting(fd).map_err(of_system)?;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = self.queue(index)?;
        self.vrings[queue.get()].is_enabled = enable;
        match enable {
            true => self.start(queue).map_err(of_system),
            false => self
                .pause(queue)
                .map_err(of_system)?
                .map(drop)
                .ok_or_else(|| unending(index)),
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let mut bytes = vec![0; size.min(MAX_CONFIG) as usize];
        self.host.read_config(offset as usize, &mut bytes);
        Ok(bytes)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.host.write_config(offset as usize, buf);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        not_offered("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered("GET_SHARED_OBJECT")
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        not_offered("GET_INFLIGHT_FD")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        not_offered("SET_INFLIGHT_FD")
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        not_offered("GET_MAX_MEM_SLOTS")
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        not_offered("ADD_MEM_REG")
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        not_offered("REM_MEM_REG")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        not_offered("SET_DEVICE_STATE_FD")
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered("CHECK_DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered("GET_SHMEM_CONFIG")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered("SET_LOG_BASE")
    }
}
