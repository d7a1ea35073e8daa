//! A terminal at a guest's console.

use crate::patience::Patience;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use xen_virtio_dom0_tools::ctl::control::{self, ControlError, Order};

/// The key that ends it, as with `xl console`: Ctrl-].
const ESCAPE: u8 = 0x1d;
const BELL: &[u8] = b"\x07";

/// How long the guest may be silent when nothing more is typed.
const SILENCE: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// Which port of which console.
pub(crate) struct Wanted<'a> {
    pub(crate) guest: &'a str,
    pub(crate) device: Option<&'a str>,
    pub(crate) port: &'a str,
}

/// Why nothing more comes by a connection.
enum End {
    /// The person at the terminal wants no more.
    Left,
    /// The worker is gone, and there may be another one.
    Lost,
}

/// Attaches this terminal to a guest's console, until Ctrl-].
///
/// # Errors
///
/// What keeps it from being attached.
pub(crate) fn attach(wanted: &Wanted<'_>) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGWINCH,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGINT,
    ] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut session = Session {
        wanted,
        signals,
        attached: None,
        position: None,
        reads_input: true,
        is_terminal: isatty(stdin()),
        pending: Vec::new(),
    };
    let mut socket = session.connect()?;
    crate::say(&format!(
        "attached to port {} of guest {}; Ctrl-] leaves\n",
        wanted.port, wanted.guest
    ));
    let raw = RawTerminal::enter()?;
    let result = loop {
        match session.serve(&socket) {
            Ok(End::Left) => break Ok(()),
            Ok(End::Lost) => match session.reconnect() {
                Ok(Some(next)) => socket = next,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            },
            Err(error) => break Err(error),
        }
    };
    drop(raw);
    crate::say("\n");
    result
}

struct Session<'a> {
    wanted: &'a Wanted<'a>,
    signals: SignalFd,
    /// What the service has said of it, by which guest and device it is told.
    attached: Option<String>,
    /// Up to where the guest's output was read.
    position: Option<u64>,
    /// Standard input has not ended.
    reads_input: bool,
    /// … and is a terminal.
    is_terminal: bool,
    /// What the worker does not take yet: nobody in the guest reads.
    pending: Vec<u8>,
}

impl Session<'_> {
    /// Has the service connect a socket to the port.
    fn connect(&mut self) -> Result<OwnedFd, ControlError> {
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, theirs) = pair.map_err(std::io::Error::from)?;
        let order = Order::Attach {
            port: self.wanted.port.to_owned(),
            from: self.position,
        };
        let path = Path::new(control::SOCKET_PATH);
        let Wanted { guest, device, .. } = self.wanted;
        let attached = control::attach(path, guest, *device, order, theirs.as_fd())?;
        if self
            .attached
            .as_ref()
            .is_some_and(|before| *before != attached)
        {
            // Another guest of that name: its output has a beginning of its own.
            self.attached = None;
            self.position = None;
            return self.connect();
        }
        self.attached = Some(attached);
        Ok(ours)
    }

    /// Connects once more, as soon as somebody serves the port. Nothing, if a signal ends it.
    fn reconnect(&mut self) -> Result<Option<OwnedFd>> {
        let patience = Patience::begin();
        loop {
            patience.rest();
            match self.connect() {
                Ok(socket) => return Ok(Some(socket)),
                Err(error) => patience.bear(error)?,
            }
            while let Some(signal) = self.signals.read_signal()? {
                if signal.ssi_signo.cast_signed() != Signal::SIGWINCH as i32 {
                    return Ok(None);
                }
            }
        }
    }

    fn serve(&mut self, socket: &OwnedFd) -> Result<End> {
        let mut greeted = false;
        send_size(socket);
        loop {
            let takes_more = self.pending.is_empty();
            let reads_input = self.reads_input && (takes_more || self.is_terminal);
            let output = match takes_more {
                true => PollFlags::empty(),
                false => PollFlags::OUT,
            };
            let (terminal, signals) = (stdin(), self.signals.as_fd());
            let mut fds = [
                PollFd::new(socket, PollFlags::IN | output),
                PollFd::from_borrowed_fd(signals, PollFlags::IN),
                PollFd::from_borrowed_fd(terminal, PollFlags::IN),
            ];
            let limit = (!self.reads_input && takes_more).then_some(&SILENCE);
            // What has ended tells of it whatever is asked.
            let count = if reads_input { 3 } else { 2 };
            match poll(&mut fds[..count], limit) {
                Ok(0) => return Ok(End::Left),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [of_socket, of_signals, of_terminal] = fds.map(|fd| fd.revents());
            if !of_signals.is_empty() {
                while let Some(signal) = self.signals.read_signal()? {
                    if signal.ssi_signo.cast_signed() != Signal::SIGWINCH as i32 {
                        return Ok(End::Left);
                    }
                    send_size(socket);
                }
            }
            if !takes_more && of_socket.contains(PollFlags::OUT) && !self.send(socket) {
                return Ok(End::Lost);
            }
            let says = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
            if of_socket.intersects(says) && !self.show(socket, &mut greeted)? {
                return Ok(End::Lost);
            }
            if !of_terminal.is_empty()
                && let Some(end) = self.pass_input(socket)?
            {
                return Ok(end);
            }
        }
    }

    /// Shows what the guest has written. False if nothing more comes.
    fn show(&mut self, socket: &OwnedFd, greeted: &mut bool) -> Result<bool> {
        let mut bytes = [0; 1 << 16];
        let len = match read(socket, &mut bytes) {
            Ok(0) | Err(Errno::CONNRESET) => return Ok(false),
            Ok(len) => len,
            Err(Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        if !*greeted {
            let position = bytes[..len].try_into().ok().map(u64::from_le_bytes);
            let position = position.context("the worker does not say where it begins")?;
            ensure!(
                position != control::CONSOLE_NO_ROOM,
                "as many are attached to this port as can be"
            );
            self.position = Some(position);
            *greeted = true;
            return Ok(true);
        }
        self.position = self.position.map(|position| position + len as u64);
        let mut rest = &bytes[..len];
        while !rest.is_empty() {
            let written = write(stdout(), rest).context("writing to the terminal")?;
            rest = &rest[written..];
        }
        Ok(true)
    }

    /// Passes on what is typed. How it ends, if it does.
    fn pass_input(&mut self, socket: &OwnedFd) -> Result<Option<End>> {
        let mut bytes = [0; 1024];
        bytes[0] = control::CONSOLE_INPUT;
        let len = match read(stdin(), &mut bytes[1..]) {
            Ok(0) | Err(Errno::IO) => {
                self.reads_input = false;
                return Ok(None);
            }
            Ok(len) => len,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let typed = &bytes[1..=len];
        let escape = match self.is_terminal {
            true => typed.iter().position(|byte| *byte == ESCAPE),
            false => None,
        };
        let len = escape.unwrap_or(len);
        if !self.pending.is_empty() {
            // As a terminal whose keys nobody reads does.
            let _ = write(stdout(), BELL);
        } else if len > 0 {
            self.pending.extend(&bytes[..=len]);
            if !self.send(socket) {
                return Ok(Some(End::Lost));
            }
        }
        Ok(escape.map(|_| End::Left))
    }

    /// Sends what is pending, as far as that goes now. False if the worker is gone.
    fn send(&mut self, socket: &OwnedFd) -> bool {
        match send(
            socket,
            &self.pending,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        ) {
            Ok(_) => self.pending.clear(),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return false,
        }
        true
    }
}

/// Tells the guest of the terminal's size, if this is one. It is no reason to end that nobody hears of it.
fn send_size(socket: &OwnedFd) {
    if let Ok(size) = tcgetwinsize(stdout())
        && size.ws_col > 0
    {
        let mut message = vec![control::CONSOLE_RESIZE];
        message.extend(size.ws_col.to_le_bytes());
        message.extend(size.ws_row.to_le_bytes());
        let _ = send(socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}

/// The terminal hands over every key, and does nothing else, until this is dropped.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> Result<Self> {
        let Ok(before) = tcgetattr(stdin()) else {
            return Ok(Self(None));
        };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).context("setting the terminal up")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // A terminal that is gone needs no setting back.
            let _ = tcsetattr(stdin(), OptionalActions::Now, before);
        }
    }
}
