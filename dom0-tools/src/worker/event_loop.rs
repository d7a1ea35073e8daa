//! The loop that serves a guest: looks for work while that pays, and sleeps when it does not.

use crate::worker::budget::Budget;
use crate::worker::contention::Contention;
use crate::worker::polling::Polling;
use crate::worker::priority;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rustix::event::{Timespec, poll};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use xen_virtio_backend::tuning::{
    BUSY_LIMIT, BUSY_STEPS, IDLE_LOOKS, LONGEST_THROTTLE, SHORTEST_SLEEP, STEPS_PER_CHECK,
    STEPS_PER_LOOK,
};
use xen_virtio_backend::{Activity, Device, Interest as SourceInterest, Trace};
use xen_virtio_guest_mapping::syscalls;
use xen_virtio_transport::{
    DeviceReport, DeviceState, DevicesError, GuestDevices, Hypervisor, MmioDevice, MmioRange, Slot,
};

/// Tokens from here on are the server's own.
const OWN_TOKENS: usize = 1 << 16;
const TRAPS: Token = Token(OWN_TOKENS);
const DEVICE: Token = Token(OWN_TOKENS + 1);

/// Serves one guest and its devices.
pub struct EventLoop<H> {
    devices: GuestDevices<H>,
    poll: Poll,
    events: Events,
    polling: Polling,
    budget: Budget,
    contention: Contention,
    /// Its priority is that of a worker which sleeps in place of looking.
    is_raised: bool,
    /// Steps since the last one that found something to do.
    idle_steps: u32,
    sleeps: u64,
    yields: u64,
}

/// What serving has cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventLoopReport {
    /// How often there was nothing to do, and then something again.
    pub sleeps: u64,
    /// Nanoseconds of looking for work before it came, or before giving up, and of waiting for interrupt handlers.
    pub polled_ns: u64,
    /// Nanoseconds of processor time that the process has used.
    pub cpu_ns: u64,
    /// System calls, without most of those for setting up.
    pub syscalls: u64,
    /// How often the processor was offered to others while there was something to wait or to look for.
    pub yields: u64,
    /// Changes of task from the worker to another, its sleeps among them.
    pub task_switches: u64,
}

impl<H: Hypervisor> EventLoop<H> {
    /// A server that looks for work for at most `limit` before it sleeps, and uses at most `cpu_percent` of
    /// one processor.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn new(hypervisor: H, limit: Duration, cpu_percent: u32) -> io::Result<Self> {
        let poll = Poll::new()?;
        let traps = hypervisor.events().as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&traps), TRAPS, Interest::READABLE)?;
        Ok(Self {
            devices: GuestDevices::new(hypervisor),
            poll,
            events: Events::with_capacity(16),
            polling: Polling::new(limit, Instant::now()),
            budget: Budget::new(cpu_percent, Instant::now(), cpu_time()),
            contention: Contention::new(Instant::now()),
            is_raised: false,
            idle_steps: 0,
            sleeps: 0,
            yields: 0,
        })
    }

    pub fn hypervisor(&mut self) -> &mut H {
        self.devices.hypervisor()
    }

    /// For what else [`EventLoop::serve`] is to return for.
    pub fn registry(&self) -> &Registry {
        self.poll.registry()
    }

    /// Adds a device, see [`GuestDevices::add`].
    ///
    /// # Errors
    ///
    /// [`DevicesError`], or the system's.
    pub fn add(&mut self, range: MmioRange, device: MmioDevice) -> Result<Slot, AddError> {
        let mut sources = Vec::new();
        device.sources(&mut |source, interest| {
            let interest = match interest {
                SourceInterest::Readable => Interest::READABLE,
                SourceInterest::Writable => Interest::WRITABLE,
            };
            sources.push((source.as_raw_fd(), interest));
        });
        // First, for what was in the device's place stays there if this fails.
        let mut registered = Vec::new();
        let mut added = Ok(());
        for (source, interest) in sources {
            let registry = self.poll.registry();
            added = registry.register(&mut SourceFd(&source), DEVICE, interest);
            if added.is_err() {
                break;
            }
            registered.push(source);
        }
        let added = match added {
            Ok(()) => self.devices.add(range, device).map_err(AddError::from),
            Err(error) => Err(error.into()),
        };
        if added.is_err() {
            for source in registered {
                // The device is no more; a ring, which is what was registered, may live on in the stock.
                let _ = self.poll.registry().deregister(&mut SourceFd(&source));
            }
        }
        added
    }

    /// Keeps the place of a device that cannot be served now, see [`GuestDevices::add_missing`].
    ///
    /// # Errors
    ///
    /// [`DevicesError`].
    pub fn add_missing(
        &mut self,
        range: MmioRange,
        state: DeviceState,
    ) -> Result<Slot, DevicesError> {
        self.devices.add_missing(range, state)
    }

    /// Keeps a place for a device, see [`GuestDevices::claim`].
    ///
    /// # Errors
    ///
    /// [`DevicesError`].
    pub fn claim(&mut self, range: MmioRange) -> Result<(), DevicesError> {
        self.devices.claim(range)
    }

    /// Has a device take up what was changed of it, see [`MmioDevice::update`]. False if it is not there now.
    pub fn update(&mut self, slot: Slot) -> bool {
        let device = self.devices.device_mut(slot);
        device.map(MmioDevice::update).is_some()
    }

    /// Who is told of each request of a device, if it is there now.
    pub fn trace(&self, slot: Slot) -> Option<&Trace> {
        self.devices.device(slot).map(MmioDevice::trace)
    }

    /// Takes a device away, see [`GuestDevices::remove`]. It is to be asked with [`EventLoop::has_left`] until nothing of it is
    /// under way.
    pub fn remove(&mut self, slot: Slot) -> Option<Box<dyn Device>> {
        self.devices.remove(slot)
    }

    /// Whether nothing of a device that was taken away is under way any more. If not, [`EventLoop::serve`] returns when it
    /// is to be asked again.
    pub fn has_left(&mut self, device: &mut dyn Device) -> bool {
        if !device.settle() {
            return false;
        }
        let registry = self.poll.registry();
        device.sources(&mut |source, _| {
            // They were registered when the device was added.
            let _ = registry.deregister(&mut SourceFd(&source.as_raw_fd()));
        });
        true
    }

    pub fn device(&self, slot: Slot) -> Option<DeviceReport> {
        self.devices.device(slot).map(MmioDevice::report)
    }

    /// Serves until something else that was registered may be readable, or for `timeout`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn serve(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let began = Instant::now();
        let mut worked: u32 = 0;
        for step in 0..BUSY_STEPS {
            if step.is_multiple_of(STEPS_PER_CHECK) && self.has_throttled()? {
                break;
            }
            let activity = self.devices.step();
            if activity == Activity::Working {
                self.found_work();
                worked += 1;
                if worked.is_multiple_of(STEPS_PER_CHECK) && began.elapsed() >= BUSY_LIMIT {
                    break;
                }
                continue;
            }
            let sleeps = self.sleeps_in_place_of_looking();
            match activity {
                _ if sleeps => {}
                // A kernel thread that carries out our transfers may wait for this processor.
                Activity::Waiting => self.give_way(),
                _ => {
                    if self.polling.is_on() && self.devices.watch(IDLE_LOOKS) {
                        self.found_work();
                        continue;
                    }
                }
            }
            if self.idle_steps.is_multiple_of(STEPS_PER_LOOK) {
                let now = Instant::now();
                if self.idle_steps == 0 {
                    self.polling.worked(now);
                }
                if (sleeps || !self.polling.goes_on(now))
                    && self.devices.prepare_sleep()? < Activity::Working
                {
                    return self.sleep(timeout);
                }
                if now.saturating_duration_since(began) >= BUSY_LIMIT {
                    break;
                }
                if !sleeps {
                    self.offer_processor(activity);
                }
            }
            self.idle_steps = self.idle_steps.wrapping_add(1);
        }
        self.wait(Some(Duration::ZERO))
    }

    /// Leaves the processor to others for a moment, if the guest has had its share of it. Its vCPUs wait
    /// meanwhile. False if it may be served.
    fn has_throttled(&mut self) -> io::Result<bool> {
        if !self.budget.is_limited() {
            return Ok(false);
        }
        let Some(rest) = self.budget.throttle_delay(Instant::now(), cpu_time()) else {
            return Ok(false);
        };
        let moment = Timespec::try_from(rest.min(LONGEST_THROTTLE)).map_err(io::Error::other)?;
        syscalls::count();
        poll(&mut [], Some(&moment))?;
        Ok(true)
    }

    fn give_way(&mut self) {
        self.yields += 1;
        syscalls::count();
        std::thread::yield_now();
    }

    fn sleeps_in_place_of_looking(&mut self) -> bool {
        let sleeps = self.contention.sleeps();
        if sleeps != self.is_raised {
            self.is_raised = sleeps;
            syscalls::count();
            priority::set(sleeps);
        }
        sleeps
    }

    /// Others may have work, whatever is hoped for here.
    fn offer_processor(&mut self, activity: Activity) {
        let before = Instant::now();
        self.give_way();
        let after = Instant::now();
        let requests = self.devices.requests();
        // While the disk works, its kernel thread may be who took long.
        let took = match activity {
            Activity::Idle => after - before,
            _ => Duration::ZERO,
        };
        self.contention.gave_way(took, after, requests);
    }

    fn found_work(&mut self) {
        if self.idle_steps >= STEPS_PER_LOOK {
            self.polling.stopped(Instant::now());
        }
        self.idle_steps = 0;
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let asleep = Instant::now();
        if !self.contention.sleeps() {
            self.polling.stopped(asleep);
        }
        let again = self.devices.try_again_at();
        let again = again.map(|at| at.saturating_duration_since(asleep).max(SHORTEST_SLEEP));
        self.wait(again.into_iter().chain(timeout).min())?;
        let awake = Instant::now();
        self.contention.passed(awake, self.devices.requests());
        self.polling.slept(awake - asleep);
        self.idle_steps = 0;
        self.sleeps += 1;
        Ok(())
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        syscalls::count();
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether what was registered with `token` may be readable.
    pub fn is_ready(&self, token: Token) -> bool {
        self.events.iter().any(|event| event.token() == token)
    }

    pub fn report(&self) -> EventLoopReport {
        EventLoopReport {
            sleeps: self.sleeps,
            polled_ns: nanoseconds(self.polling.looked() + self.devices.waited()),
            cpu_ns: nanoseconds(cpu_time()),
            syscalls: syscalls::made(),
            yields: self.yields,
            task_switches: task_switches(),
        }
    }
}

/// Changes of task from this process to another, its sleeps among them.
fn task_switches() -> u64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else {
        return 0;
    };
    let switches = usage.voluntary_context_switches() + usage.involuntary_context_switches();
    switches.try_into().unwrap_or(0)
}

/// The processor time that this process has used.
fn cpu_time() -> Duration {
    syscalls::count();
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else {
        return Duration::ZERO;
    };
    let time = usage.user_time() + usage.system_time();
    Duration::from_micros(time.num_microseconds().try_into().unwrap_or(0))
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Why a device is not served.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    #[error(transparent)]
    GuestDevices(#[from] DevicesError),
    #[error("its events cannot be waited for")]
    Events(#[from] io::Error),
}
