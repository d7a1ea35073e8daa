//! The process that opens and makes interfaces for the service, whose own unit keeps it out of dom0's network then
//! (`xen-virtio-network.service`). systemd starts it when the service asks it first; it knows of nothing but what it is asked.

use super::interfaces::{Answer, Failure, Request, perform};
use super::made;
use crate::devices::{Busy, Held};
use crate::{ipc, systemd};
use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, socket_with,
};
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long each side waits for the other: nothing that is asked takes longer, since scripts run beside.
const LIMIT: Duration = Duration::from_secs(5);
/// For how long one that has not answered in time is not asked, since whoever asks does nothing else meanwhile: at first, and at
/// most. It doubles each time.
const FIRST_REST: Duration = Duration::from_secs(2);
const LONGEST_REST: Duration = Duration::from_secs(30);

/// Where it listens, if there is one.
static SOCKET: OnceLock<PathBuf> = OnceLock::new();

/// Until when it is not asked, and how long the rest is.
static SILENT: Mutex<Option<(Instant, Duration)>> = Mutex::new(None);

/// Has the process that listens at `socket` do what is asked of interfaces from now on.
pub fn leave_to(socket: PathBuf) {
    // It is said once, before anything is asked.
    let _ = SOCKET.set(socket);
}

pub(super) fn socket() -> Option<&'static Path> {
    SOCKET.get().map(PathBuf::as_path)
}

/// What became of a request. Descriptors come beside.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Done { names: Vec<String> },
    Failed(String),
    Busy(String),
    Held(String),
}

impl Outcome {
    fn of(performed: Result<Answer>) -> (Self, Vec<OwnedFd>) {
        let error = match performed {
            Ok(Answer { descriptors, names }) => return (Self::Done { names }, descriptors),
            Err(error) => error,
        };
        let why = format!("{error:#}");
        let outcome = match (error.is::<Busy>(), error.is::<Held>()) {
            (true, _) => Self::Busy(why),
            (_, true) => Self::Held(why),
            _ => Self::Failed(why),
        };
        (outcome, Vec::new())
    }
}

/// Has the process that listens at `path` do it.
///
/// # Errors
///
/// [`Failure`].
pub(super) fn ask(path: &Path, request: &Request) -> Result<Answer, Failure> {
    let unanswered = |why: &dyn Display| {
        let path = path.display();
        Failure::Unanswered(format!(
            "what opens network interfaces does not answer at {path}: {why} (systemctl status xen-virtio-network.socket xen-virtio-network)"
        ))
    };
    let before = *silent();
    if before.is_some_and(|(until, _)| Instant::now() < until) {
        return Err(unanswered(&"it has not in time"));
    }
    let exchanged = exchange(path, request);
    let is_late =
        |error: &io::Error| matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
    *silent() = exchanged.as_ref().is_err_and(is_late).then(|| {
        let rest = before.map_or(FIRST_REST, |(_, rest)| (rest * 2).min(LONGEST_REST));
        (Instant::now() + rest, rest)
    });
    let (outcome, descriptors) = exchanged.map_err(|error| unanswered(&error))?;
    match outcome {
        Outcome::Done { names } => Ok(Answer { descriptors, names }),
        Outcome::Failed(why) => Err(Failure::Refused(anyhow::Error::msg(why))),
        Outcome::Busy(why) => Err(Failure::Refused(Busy(why).into())),
        Outcome::Held(why) => Err(Failure::Refused(Held(why).into())),
    }
}

fn silent() -> MutexGuard<'static, Option<(Instant, Duration)>> {
    SILENT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn exchange(path: &Path, request: &Request) -> io::Result<(Outcome, Vec<OwnedFd>)> {
    let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
    let socket = socket_with(family, SocketType::SEQPACKET, flags, None)?;
    limit(&socket)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    ipc::send(&socket, request, &[])?;
    // What it waits in vain for is no end of the connection.
    ipc::receive(&socket)?.ok_or_else(|| ErrorKind::TimedOut.into())
}

fn limit(socket: &OwnedFd) -> io::Result<()> {
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(socket, timeout, Some(LIMIT))?;
    }
    Ok(())
}

/// Does what is asked at the socket that systemd has opened, one after the other, until it is told to end; what it has begun is done
/// then.
///
/// # Errors
///
/// If systemd has opened none, or nobody can be accepted.
pub fn run() -> Result<()> {
    let given = systemd::given().context("what systemd has opened")?;
    let (_, listener) = given.into_iter().next().context(
        "it has no socket: systemctl start xen-virtio-network.socket, which starts it when it is needed",
    )?;
    // Before there are threads, which are not to have it then.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    thread::Builder::new()
        .name("end".to_owned())
        .spawn(move || {
            let _ = signals.wait();
            let _nothing_begins = made::finish();
            exit(0);
        })?;
    loop {
        let client = accept_with(&listener, SocketFlags::CLOEXEC).context("accepting")?;
        if let Err(error) = serve(&client) {
            tracing::warn!("a request was not carried out: {error}");
        }
    }
}

/// Does what a client asks. The socket is for root only.
fn serve(client: &OwnedFd) -> io::Result<()> {
    limit(client)?;
    let asked = ipc::receive(client)?;
    let (request, _): (Request, _) = asked.ok_or(ErrorKind::TimedOut)?;
    // It waits no more, and asks again.
    if has_ended(client)? {
        return Err(ErrorKind::BrokenPipe.into());
    }
    let (outcome, descriptors) = Outcome::of(perform(&request));
    let beside: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    ipc::send(client, &outcome, &beside)
}

fn has_ended(client: &OwnedFd) -> io::Result<bool> {
    let mut client = [PollFd::new(client, PollFlags::empty())];
    poll(&mut client, Some(&Timespec::default()))?;
    Ok(client[0].revents().contains(PollFlags::HUP))
}

#[cfg(test)]
mod tests {
    use super::super::interfaces::Opening;
    use super::super::made::tests as of_made;
    use super::*;
    use crate::devices::is_busy;
    use rustix::net::{bind, listen};

    fn ask(path: &Path, request: &Request) -> Result<Answer> {
        Ok(super::ask(path, request)?)
    }

    fn opening(interface: &str) -> Request {
        Request::Open(Opening {
            interface: interface.to_owned(),
            mac: [0, 0x16, 0x3e, 0, 0, 1],
            mtu: None,
            queues: 1,
            made: None,
            is_new: true,
            served: false,
        })
    }

    #[test]
    fn what_is_asked_is_done_and_what_is_wrong_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.sock");
        let nobody = ask(&path, &Request::Names).unwrap_err();
        assert!(is_busy(&nobody), "{nobody:#}");
        assert!(nobody.to_string().contains("xen-virtio-network.socket"));
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let listener = socket_with(family, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 4).unwrap();
        let served = thread::spawn(move || {
            for _ in 0..4 {
                let client = accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
                serve(&client).unwrap();
            }
            listener
        });
        let names = ask(&path, &Request::Names).unwrap().names;
        assert_eq!(names, made::names());
        // As without it.
        let here = perform(&opening("no-such-tap")).unwrap_err();
        let error = ask(&path, &opening("no-such-tap")).unwrap_err();
        assert_eq!(error.to_string(), here.to_string());
        assert!(!is_busy(&error) && error.to_string().contains("ip tuntap add"));
        let ending = of_made::ending("lo");
        let busy = ask(&path, &opening("lo")).unwrap_err();
        drop(ending);
        assert!(is_busy(&busy), "{busy:#}");
        let removed = Request::Remove("vio65535.9".to_owned());
        ask(&path, &removed).unwrap();
        let _listener = served.join().unwrap();
        // Nobody accepts any more.
        let began = Instant::now();
        for _ in 0..10 {
            assert!(is_busy(&ask(&path, &Request::Names).unwrap_err()));
        }
        assert!(began.elapsed() < 2 * LIMIT, "{:?}", began.elapsed());
    }

    #[test]
    fn who_has_gone_is_not_served() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("network.sock");
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let kind = SocketType::SEQPACKET;
        let listener = socket_with(family, kind, flags, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 4).unwrap();
        let client = socket_with(family, kind, flags, None).unwrap();
        connect(&client, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        ipc::send(&client, &Request::Names, &[]).unwrap();
        drop(client);
        let accepted = accept_with(&listener, SocketFlags::CLOEXEC).unwrap();
        let error = serve(&accepted).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }
}
