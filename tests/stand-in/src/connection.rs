//! The messages.

use crate::manner::{Manner, Moment, Request};
use crate::rings::Ring;
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG.
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;

const SECTOR: u64 = 512;

/// How long it takes to close a socket that lingers.
const LINGER: Duration = Duration::from_secs(120);

pub(crate) struct Connection {
    socket: UnixStream,
    image: File,
    manner: Manner,
    memory: Option<Arc<GuestMemoryMmap>>,
    memory_file: Option<OwnedFd>,
    ring: Ring,
    call: Option<OwnedFd>,
    kick: Option<OwnedFd>,
    answered: u32,
}

/// A message of the frontend.
struct Message {
    request: Request,
    needs_reply: bool,
    payload: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl Message {
    fn words(&self) -> Vec<u32> {
        let words = self.payload.chunks_exact(4);
        words
            .map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")))
            .collect()
    }

    fn long(&self, index: usize) -> Result<u64> {
        let bytes = self.payload.get(8 * index..8 * index + 8);
        Ok(u64::from_ne_bytes(
            bytes.context("a short message")?.try_into()?,
        ))
    }
}

impl Connection {
    pub(crate) fn new(socket: UnixStream, image: &File, manner: Manner) -> Result<Self> {
        Ok(Self {
            socket,
            image: image.try_clone()?,
            manner,
            memory: None,
            memory_file: None,
            ring: Ring::new(image.try_clone()?),
            call: None,
            kick: None,
            answered: 0,
        })
    }

    pub(crate) fn serve(mut self) -> Result<()> {
        if self.manner == Manner::ReadsNothing {
            // Until the frontend gives up.
            let mut hung_up = [PollFd::new(&self.socket, PollFlags::RDHUP)];
            poll(&mut hung_up, None)?;
            return Ok(());
        }
        loop {
            let mut sources = vec![PollFd::new(&self.socket, PollFlags::IN)];
            if let Some(kick) = &self.kick {
                sources.push(PollFd::new(kick, PollFlags::IN));
            }
            poll(&mut sources, None)?;
            let ready: Vec<bool> = sources
                .iter()
                .map(|source| !source.revents().is_empty())
                .collect();
            if ready.get(1) == Some(&true) {
                self.kicked()?;
            }
            if ready[0] {
                let message = self.receive()?;
                self.obey(&message)?;
            }
        }
    }

    fn kicked(&mut self) -> Result<()> {
        let kick = self.kick.as_ref().context("a kick")?;
        let mut count = [0; 8];
        // Another kick may have been read with the one before.
        let _ = rustix::io::read(kick, &mut count);
        let (Some(memory), Some(call)) = (&self.memory, &self.call) else {
            return Ok(());
        };
        self.ring.serve(memory, call, kick, self.manner.moment())?;
        if let Some(file) = &self.memory_file {
            misuse(file, self.manner.moment());
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Message> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut header)];
        let received = recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::WAITALL)?;
        ensure!(received.bytes == 12, "the frontend is gone");
        let mut descriptor = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                descriptor = descriptors.next();
            }
        }
        let word = |index: usize| {
            u32::from_ne_bytes(
                header[4 * index..4 * index + 4]
                    .try_into()
                    .expect("four bytes"),
            )
        };
        let mut payload = vec![0; usize::try_from(word(2))?];
        self.socket.read_exact(&mut payload)?;
        Ok(Message {
            request: Request(word(0)),
            needs_reply: word(1) & 8 != 0,
            payload,
            descriptor,
        })
    }

    fn obey(&mut self, message: &Message) -> Result<()> {
        let request = message.request;
        match self.manner {
            Manner::EndsAt(at) if at == request => bail!("ends"),
            Manner::SilentAt(at) if at == request => {
                // Messages are read, and none is answered.
                loop {
                    self.receive()?;
                }
            }
            _ => {}
        }
        match request {
            Request::GET_FEATURES => {
                let version = match self.manner {
                    Manner::Legacy => 0,
                    _ => 1 << VIRTIO_F_VERSION_1,
                };
                let blk = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX;
                let has_index = self.manner != Manner::NoEventIndex;
                let index = u64::from(has_index) << VIRTIO_RING_F_EVENT_IDX;
                let features = version | PROTOCOL_FEATURES | index | blk;
                return self.answer(request, &features.to_ne_bytes());
            }
            Request::GET_PROTOCOL_FEATURES => {
                return self.answer(request, &PROTOCOL.to_ne_bytes());
            }
            Request::GET_QUEUE_NUM => {
                let queues = match self.manner {
                    Manner::Queues(queues) => queues,
                    _ => 1u64,
                };
                return self.answer(request, &queues.to_ne_bytes());
            }
            Request::GET_CONFIG => return self.answer_config(message),
            Request::GET_VRING_BASE => {
                let base = match self.manner {
                    Manner::FarBase => self.ring.next_available().wrapping_add(77),
                    _ => self.ring.next_available(),
                };
                let index = u32::from(self.manner == Manner::OtherQueue) * 3;
                self.ring.stop();
                self.kick = None;
                self.call = None;
                let state = [index, u32::from(base)].map(u32::to_ne_bytes).concat();
                return self.answer(request, &state);
            }
            Request::SET_FEATURES => {
                let has_index = message.long(0)? & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
                self.ring.set_event_index(has_index);
            }
            Request::SET_MEM_TABLE => {
                let (base, bytes) = (message.long(1)?, message.long(2)?);
                let file = message.descriptor.as_ref().context("no memory")?;
                let offset = FileOffset::new(File::from(file.try_clone()?), 0);
                let range = (GuestAddress(base), usize::try_from(bytes)?, Some(offset));
                self.memory = Some(Arc::new(GuestMemoryMmap::from_ranges_with_files([range])?));
                self.memory_file = Some(file.try_clone()?);
            }
            Request::SET_VRING_NUM => self.ring.set_size(message.words()[1].try_into()?),
            Request::SET_VRING_BASE => self.ring.set_base(message.words()[1].try_into()?),
            Request::SET_VRING_ADDR => {
                let (descriptors, used, available) =
                    (message.long(1)?, message.long(2)?, message.long(3)?);
                self.ring.set_addresses(descriptors, available, used)?;
            }
            Request::SET_VRING_CALL => self.call = duplicate(message)?,
            Request::SET_VRING_KICK => self.kick = duplicate(message)?,
            Request::SET_BACKEND_REQ_FD => {
                if let Some(channel) = duplicate(message)? {
                    speak(UnixStream::from(channel), self.manner);
                }
            }
            _ => {}
        }
        if message.needs_reply {
            let refuses = self.manner == Manner::Refuses(request);
            self.answer(request, &u64::from(refuses).to_ne_bytes())?;
        }
        Ok(())
    }

    fn answer_config(&mut self, message: &Message) -> Result<()> {
        let request = message.request;
        if self.manner == Manner::NoConfig {
            return self.answer(request, &[0; 12]);
        }
        let mut payload = message.payload.clone();
        let capacity = self.image.metadata()?.len() / SECTOR;
        payload[12..20].copy_from_slice(&capacity.to_le_bytes());
        // The most segments of a request.
        payload[24..28].copy_from_slice(&16u32.to_le_bytes());
        if self.manner == Manner::LongConfig {
            payload.extend([0xff; 500]);
        }
        self.answer(request, &payload)
    }

    fn answer(&mut self, request: Request, payload: &[u8]) -> Result<()> {
        self.answered += 1;
        let size = u32::try_from(payload.len())?;
        // Version 1, a reply.
        let (mut request, mut flags, mut size, mut payload) = (request, 5u32, size, payload);
        match self.manner {
            Manner::OtherVersion => flags = 6,
            Manner::HugeMessage => size = u32::MAX,
            Manner::NoAnswer => flags = 1,
            Manner::ShortAnswer(at) if at == request => {
                payload = &payload[..payload.len() / 2];
                size /= 2;
            }
            _ => {}
        }
        if self.manner == Manner::UnaskedAnswer && self.answered > 3 {
            request = Request(request.0 + 1);
        }
        let header = [request.0, flags, size].map(u32::to_ne_bytes).concat();
        let bytes = [&header, payload].concat();
        if self.manner == Manner::OutOfBand {
            send_out_of_band(&self.socket)?;
        }
        let image = [self.image.as_fd(); 3];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if self.manner == Manner::Descriptors {
            control.push(SendAncillaryMessage::ScmRights(&image));
        }
        sendmsg(
            &self.socket,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }
}

fn duplicate(message: &Message) -> Result<Option<OwnedFd>> {
    let descriptor = message.descriptor.as_ref();
    Ok(descriptor.map(OwnedFd::try_clone).transpose()?)
}

/// Sends what the manner has for the frontend, until that has enough of it.
fn speak(mut channel: UnixStream, manner: Manner) {
    let (request, flags) = match manner {
        Manner::ConfigChanges => (CONFIG_CHANGE, 1),
        Manner::OddRequests => (77, 9),
        Manner::OutOfBandRequests => {
            std::thread::spawn(move || {
                send_out_of_band(&channel)?;
                let message = [CONFIG_CHANGE, 1, 0u32].map(u32::to_ne_bytes).concat();
                channel.write_all(&message)?;
                channel.read(&mut [0])
            });
            return;
        }
        _ => {
            // Kept open, as a good one has it.
            std::thread::spawn(move || channel.read(&mut [0]));
            return;
        }
    };
    let message = [request, flags, 0u32].map(u32::to_ne_bytes).concat();
    std::thread::spawn(move || while channel.write_all(&message).is_ok() {});
}

/// Sends a byte out of band, with a descriptor that takes long to close: a socket that lingers for data that nobody reads.
fn send_out_of_band(socket: &UnixStream) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut stream = TcpStream::connect(listener.local_addr()?)?;
    stream.set_nonblocking(true)?;
    while stream.write(&[0; 1 << 16]).is_ok() {}
    sockopt::set_socket_linger(&stream, Some(LINGER))?;
    // It lingers as long as somebody may read.
    std::mem::forget(listener);
    let files = [stream.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    let flags = SendFlags::NOSIGNAL | SendFlags::OOB;
    sendmsg(socket, &[IoSlice::new(&[0])], &mut control, flags)?;
    Ok(())
}

/// Does to the memory's file what no back-end may.
fn misuse(file: &OwnedFd, moment: Option<Moment>) {
    use rustix::fs::{FallocateFlags, fallocate, ftruncate};
    match moment {
        Some(Moment::Shrinks) => {
            // It is sealed.
            let _ = ftruncate(file, 0);
        }
        Some(Moment::Punches) => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = fallocate(file, flags, 0, 2 << 20);
        }
        _ => {}
    }
}
