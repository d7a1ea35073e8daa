//! Performs what a guest's lifecycle decides.

use super::super::entry::OpenedDevice;
use super::super::lifecycle::{Effect, Event};
use super::super::orphan_workers;
use super::super::worker_process::WorkerProcess;
use super::{Guest, WorkerContext};
use crate::devices::{self, net};
use crate::ipc::ToWorker;
use crate::program;
use crate::toolstack::ToolstackError;
use crate::toolstack::libxl::EntryKey;
use anyhow::{Result, bail};
use mio::Token;
use std::os::fd::BorrowedFd;

impl Guest {
    /// Performs an effect: how it ended, where that is to be told.
    pub(super) fn perform(
        &mut self,
        effect: Effect,
        context: &mut WorkerContext<'_>,
    ) -> Result<Option<Event>, ToolstackError> {
        let domid = self.domid();
        Ok(match effect {
            Effect::Open { key } => Some(self.open(key, context)),
            Effect::Settle => Some(Event::Settled),
            Effect::Start {
                ends_earlier,
                missed,
            } => Some(match self.start_worker(ends_earlier, missed, context) {
                Ok(worker) => {
                    self.worker = Some(worker);
                    Event::Started
                }
                Err(error) => Event::NotStarted {
                    error: format!("{error:#}"),
                },
            }),
            Effect::Hand { key, served } => {
                context.back_ends.handed((domid, key));
                context.dialling.forget((domid, key));
                self.note_shared(key, None, context);
                self.hand(key, served)
            }
            Effect::Detach { key } => self.send(&ToWorker::Detach { key }),
            Effect::Serve => self.send(&ToWorker::Serve),
            Effect::Kill { why } => {
                if let Some(mut worker) = self.worker.take() {
                    worker.kill(context.registry);
                    self.dying = Some((worker, why));
                }
                self.reap()
            }
            Effect::Hold => {
                context.toolstack.hold(&self.identity)?;
                None
            }
            Effect::LetRun => {
                context.toolstack.let_run(&self.identity)?;
                None
            }
            Effect::TellReady { key } => {
                context.toolstack.tell_ready(domid, key)?;
                None
            }
            Effect::TellClosed { key } => {
                context.toolstack.tell_closed(domid, key)?;
                None
            }
            Effect::EndUse { key } => {
                self.opened.remove(&key);
                context.uses.end(&self.identity, key);
                context.back_ends.end((domid, key), context.registry);
                context.listeners.end((domid, key), context.registry);
                context.dialling.end((domid, key));
                self.note_shared(key, None, context);
                // Also one that no connection was made to yet.
                program::end_of_device(&self.identity, key);
                None
            }
            Effect::Release { key } => {
                self.release(key, context);
                None
            }
            Effect::LogServing
            | Effect::LogLost { .. }
            | Effect::LogFailure { .. }
            | Effect::LogDevice { .. }
            | Effect::LogWaiting { .. }
            | Effect::LogClaimed { .. } => {
                self.log(&effect);
                None
            }
        })
    }

    fn log(&mut self, effect: &Effect) {
        let (name, domid) = (&self.name, self.identity.domid);
        // A guest can cause all but these two as often as it likes.
        let is_limited = !matches!(effect, Effect::LogServing | Effect::LogClaimed { .. });
        if is_limited && !self.log_limit.allow() {
            return;
        }
        match effect {
            Effect::LogServing => {
                let pid = self.worker.as_ref().map_or(0, WorkerProcess::pid);
                tracing::info!(guest = name, domid, "worker {pid} serves it");
            }
            Effect::LogClaimed { key } => {
                let known = self.lifecycle.entries.get(key);
                if let Some((known, after)) =
                    known.and_then(|known| Some((known, known.claimed_after()?)))
                {
                    tracing::info!(
                        guest = name,
                        domid,
                        device = %key,
                        "is {}, {} ms after it was found",
                        known.detail,
                        after.as_millis()
                    );
                }
            }
            Effect::LogLost { why, how } => tracing::warn!(
                guest = name,
                domid,
                "worker {} is lost ({why}, {how}); another one takes over",
                self.lost
            ),
            Effect::LogFailure { error } => tracing::error!(guest = name, domid, "{error}"),
            Effect::LogWaiting { key, why } => {
                tracing::warn!(guest = name, domid, device = %key, "waits: {why}");
            }
            Effect::LogDevice { key, error } => {
                tracing::error!(guest = name, domid, device = %key, "{error}");
            }
            _ => {}
        }
    }

    /// Opens what the device at `key` needs, or has had.
    fn open(&mut self, key: EntryKey, context: &mut WorkerContext<'_>) -> Event {
        let entries = &mut self.lifecycle.entries;
        let others = entries.iter().filter(|(other, _)| **other != key);
        let others: usize = others.map(|(_, known)| known.state_bytes).sum();
        let Some(known) = entries.get_mut(&key) else {
            return Event::Gone { key };
        };
        // What was opened for it and never handed over would be in its own way.
        self.opened.remove(&key);
        let guest = (&self.identity, self.name.as_str());
        // A guest of which we serve no device gets no state file: it would count as served.
        let opened = OpenedDevice::open(guest, &self.known_as, key, known, context).and_then(
            |mut device| {
                let devices = others + known.state_bytes;
                device.state_bytes = context.files.reserve(&self.identity, devices)?;
                Ok(device)
            },
        );
        known.is_held = opened.as_ref().is_err_and(devices::is_held);
        match opened {
            Ok(device) => {
                self.opened.insert(key, device);
                Event::Opened { key }
            }
            Err(error) => Event::NotOpened {
                key,
                busy: devices::is_busy(&error),
                error: format!("{error:#}"),
            },
        }
    }

    fn start_worker(
        &mut self,
        ends_earlier: bool,
        missed: Option<EntryKey>,
        context: &mut WorkerContext<'_>,
    ) -> Result<WorkerProcess> {
        let state = context.files.open(&self.identity)?;
        if let Some(key) = missed
            && orphan_workers::has_workers(self.domid())?
        {
            bail!("is left to its earlier worker, which has {key}, until that can be opened");
        }
        if ends_earlier {
            orphan_workers::end_workers(self.domid())?;
        }
        let token = Token(*context.next_token);
        *context.next_token += WorkerProcess::TOKENS;
        WorkerProcess::start(
            context.launcher,
            self.domid(),
            &state,
            context.config,
            context.registry,
            token,
        )
    }

    /// Hands the worker, if there is one still, what was opened for the device at `key`.
    fn hand(&mut self, key: EntryKey, served: bool) -> Option<Event> {
        let device = self.opened.remove(&key)?;
        let message = device.message(key, served);
        self.send_with(&message, &device.descriptors())
    }

    pub(super) fn send(&mut self, message: &ToWorker) -> Option<Event> {
        self.send_with(message, &[])
    }

    /// Sends a message to the worker, if there is one still. What became of the worker, if it does not take it.
    pub(super) fn send_with(
        &mut self,
        message: &ToWorker,
        fds: &[BorrowedFd<'_>],
    ) -> Option<Event> {
        let worker = self.worker.as_mut()?;
        let sent = worker.conversation.send(message, fds);
        sent.err().map(|_| Event::Broken {
            why: "it takes no message",
        })
    }

    /// Nobody has the device of entry `key` any more.
    pub(super) fn release(&self, key: EntryKey, context: &mut WorkerContext<'_>) {
        if let Ok(Some(kept)) = context.files.kept(&self.identity, key) {
            net::end_left(kept, self.domid(), key);
        }
        if let Err(error) = context.files.keep(&self.identity, key, None) {
            let domid = self.domid();
            tracing::error!(guest = self.name, domid, device = %key, "{error:#}");
        }
    }
}
