//! Tells a monitoring system of the service: once, or whenever it asks at a socket.
//!
//! This is a process of its own, so that who asks can hold up no more than that.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};
use xen_virtio_dom0_tools::ctl::control;
use xen_virtio_dom0_tools::ctl::metrics::{Format, encode};
use xen_virtio_dom0_tools::ctl::report::Report;

/// The longest head of a request.
const MAX_HEAD: usize = 8 << 10;
/// How long somebody who has connected may take in all, while others wait.
const LIMIT: Duration = Duration::from_secs(2);

/// How long an answer is given again: whoever may ask is not to have the service ask its workers as often as he likes.
const FRESH: Duration = Duration::from_secs(1);
/// The wait after what keeps anybody from being heard, as having too many files open.
const RETRY: Duration = Duration::from_millis(100);

/// The last answer, and when it was given.
#[derive(Default)]
struct Last(Option<(Instant, Report)>);

impl Last {
    fn report(&mut self, ask: impl FnOnce() -> Result<Report>) -> Result<Report> {
        match &self.0 {
            Some((at, report)) if at.elapsed() < FRESH => Ok(report.clone()),
            _ => {
                let report = ask()?;
                self.0 = Some((Instant::now(), report.clone()));
                Ok(report)
            }
        }
    }
}

/// All that there is, now.
pub(crate) fn show(format: Format) -> Result<String> {
    Ok(encode(ask()?, format)?)
}

fn ask() -> Result<Report> {
    Ok(control::list(control::SOCKET_PATH.as_ref())?)
}

/// Answers whoever asks at `address`, a path or a loopback address with a port, until this process is ended.
pub(crate) fn serve(address: &str) -> Result<String> {
    if address.starts_with('/') {
        let listener =
            listen(Path::new(address)).with_context(|| format!("listening at {address}"))?;
        return answer_all(|| Ok(Client::Unix(listener.accept()?.0)));
    }
    let parsed: SocketAddr = address.parse().ok().with_context(|| {
        format!("{address} is neither an absolute path nor like 127.0.0.1:9809")
    })?;
    // Who may see which guests there are is not ours to say.
    ensure!(
        parsed.ip().is_loopback(),
        "{address} is no loopback address: have a proxy that knows who may ask listen there"
    );
    let listener = TcpListener::bind(parsed).with_context(|| format!("listening at {address}"))?;
    answer_all(|| Ok(Client::Tcp(listener.accept()?.0)))
}

fn answer_all(mut accept: impl FnMut() -> io::Result<Client>) -> Result<String> {
    let mut last = Last::default();
    loop {
        match accept() {
            Ok(client) => answer(client, &mut last),
            Err(_) => sleep(RETRY),
        }
    }
}

/// In place of what an earlier process has left there.
fn listen(path: &Path) -> Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            bail!("it is there already, and is no socket")
        }
        Ok(_) => {
            ensure!(
                UnixStream::connect(path).is_err(),
                "somebody listens there already"
            );
            fs::remove_file(path)?;
        }
        Err(_) => {}
    }
    Ok(UnixListener::bind(path)?)
}

enum Client {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Client {
    fn set_limit(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Unix(client) => {
                client.set_read_timeout(Some(limit))?;
                client.set_write_timeout(Some(limit))
            }
            Self::Tcp(client) => {
                client.set_read_timeout(Some(limit))?;
                client.set_write_timeout(Some(limit))
            }
        }
    }
}

impl Read for Client {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(client) => client.read(to),
            Self::Tcp(client) => client.read(to),
        }
    }
}

impl Write for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(client) => client.write(bytes),
            Self::Tcp(client) => client.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Answers one request. Whoever does not wait for that is nobody's concern.
fn answer(mut client: Client, last: &mut Last) {
    let Some(head) = read_head(&mut client, Instant::now() + LIMIT) else {
        return;
    };
    let response = respond(&head, |format| Ok(encode(last.report(ask)?, format)?));
    // The service may have taken longer than that to answer.
    let end = Instant::now() + LIMIT;
    let mut rest = response.as_bytes();
    while !rest.is_empty() {
        let limit = end.saturating_duration_since(Instant::now());
        if limit.is_zero() || client.set_limit(limit).is_err() {
            return;
        }
        match client.write(rest) {
            Ok(0) | Err(_) => return,
            Ok(len) => rest = &rest[len..],
        }
    }
}

/// The head of a request; nothing, if it does not come in time, or has no end.
fn read_head(client: &mut Client, end: Instant) -> Option<String> {
    let mut head = Vec::new();
    let mut bytes = [0; 1024];
    while !head.windows(4).any(|part| part == b"\r\n\r\n") {
        let limit = end.saturating_duration_since(Instant::now());
        if limit.is_zero() || head.len() > MAX_HEAD {
            return None;
        }
        client.set_limit(limit).ok()?;
        match client.read(&mut bytes) {
            Ok(len @ 1..) => head.extend(&bytes[..len]),
            _ => return None,
        }
    }
    String::from_utf8(head).ok()
}

/// The answer to the request `head` (RFC 9112).
fn respond(head: &str, show: impl FnOnce(Format) -> Result<String>) -> String {
    let format = accepted(head);
    let mut words = head.split_whitespace();
    let (method, target) = (words.next(), words.next().unwrap_or_default());
    let path = target.split('?').next();
    let (status, kind, text) = match (method, path) {
        (Some("GET"), Some("/metrics")) => match show(format) {
            Ok(text) => ("200 OK", format.content_type(), text),
            Err(error) => ("503 Service Unavailable", PLAIN, format!("{error:#}\n")),
        },
        (Some("GET"), _) => ("404 Not Found", PLAIN, "there is /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", PLAIN, "GET /metrics\n".to_owned()),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    )
}

/// The format that whoever sends the request `head` wants: who does not ask for OpenMetrics may not know it.
fn accepted(head: &str) -> Format {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    let wants = fields.any(|(name, value)| {
        name.eq_ignore_ascii_case("accept") && value.contains("application/openmetrics-text")
    });
    match wants {
        true => Format::OpenMetrics,
        false => Format::Prometheus,
    }
}

const PLAIN: &str = "text/plain; charset=utf-8";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_metrics_are_there() {
        for (head, status) in [
            ("GET /metrics HTTP/1.1\r\n\r\n", "200 OK"),
            ("GET /metrics?x=y HTTP/1.1\r\n\r\n", "200 OK"),
            ("GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
            ("\r\n\r\n", "405 Method Not Allowed"),
        ] {
            let response = respond(head, |_| Ok("# EOF\n".to_owned()));
            assert!(
                response.starts_with(&format!("HTTP/1.1 {status}\r\n")),
                "{head}: {response}"
            );
        }
        let response = respond("GET /metrics HTTP/1.1\r\n\r\n", |_| {
            bail!("it does not run")
        });
        assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
        assert!(response.ends_with("it does not run\n"), "{response}");
    }

    #[test]
    fn who_asks_for_openmetrics_gets_that() {
        for (fields, format) in [
            ("", Format::Prometheus),
            ("Accept: */*\r\n", Format::Prometheus),
            (
                "Host: x\r\naccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n",
                Format::OpenMetrics,
            ),
        ] {
            let head = format!("GET /metrics HTTP/1.1\r\n{fields}\r\n");
            assert_eq!(accepted(&head), format, "{head}");
        }
    }

    #[test]
    fn an_answer_is_given_again_while_it_is_fresh() {
        let mut last = Last::default();
        let mut asked = 0;
        for _ in 0..3 {
            let report = last.report(|| {
                asked += 1;
                Ok(Report::default())
            });
            assert_eq!(report.unwrap(), Report::default());
        }
        assert_eq!(asked, 1);
        last.0 = last.0.map(|(at, report)| (at - FRESH, report));
        assert!(last.report(|| bail!("it does not run")).is_err());
    }

    #[test]
    fn who_says_nothing_or_too_much_is_not_waited_for() {
        let soon = || Instant::now() + Duration::from_millis(100);
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert_eq!(read_head(&mut Client::Unix(ours), soon()), None);
        drop(theirs);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[b'x'; 2 * MAX_HEAD]).unwrap();
        assert_eq!(read_head(&mut Client::Unix(ours), soon()), None);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(read_head(&mut Client::Unix(ours), soon()).is_some());
    }

    #[test]
    fn others_than_this_host_are_not_listened_to() {
        for (address, wrong) in [
            ("0.0.0.0:9809", "no loopback address"),
            ("localhost", "neither"),
            ("/etc/passwd", "is no socket"),
        ] {
            let error = format!("{:#}", serve(address).unwrap_err());
            assert!(error.contains(wrong), "{error}");
        }
    }
}
