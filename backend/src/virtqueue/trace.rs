//! Tells whoever looks on of each request of a device, as its driver gets it back.

use super::queue::QueueIndex;
use super::request::{Completion, Request};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A request that its driver has back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TracedRequest {
    pub queue: QueueIndex,
    /// The descriptor that its chain begins with.
    pub head: u16,
    /// Bytes of its device-readable buffers, and of its device-writable ones.
    pub readable: usize,
    pub writable: usize,
    /// Bytes that the device says to have written.
    pub written: u32,
    /// How long it was with the device.
    pub took: Duration,
    pub detail: Option<RequestDetail>,
}

/// What a device knows of a request beyond its buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestDetail {
    /// A word in lower case, with hyphens.
    pub what: &'static str,
    /// The bytes of the device's that it is about, from `offset` on.
    pub offset: u64,
    pub bytes: u64,
    /// The driver is told of an error.
    pub has_failed: bool,
}

/// Who looks on.
pub trait TraceSink {
    fn request(&mut self, request: &TracedRequest);

    /// No more comes for now; the driver has been told of what has come. False once nobody looks on any more.
    fn flush(&mut self) -> bool;

    /// Somebody else looks on from now on.
    fn replaced(&mut self);
}

/// Where the requests of a device are told of. Nobody looks on at first.
#[derive(Default)]
pub struct Trace {
    is_on: Cell<bool>,
    /// The sink has been told something since it was flushed.
    has_news: Cell<bool>,
    sink: RefCell<Option<Box<dyn TraceSink>>>,
}

impl Trace {
    /// Tells `sink` from now on, in place of whoever was told before.
    pub fn begin(&self, sink: Box<dyn TraceSink>) {
        if let Some(mut before) = self.sink.replace(Some(sink)) {
            before.replaced();
        }
        self.is_on.set(true);
    }

    /// Whether somebody looks on.
    pub fn is_on(&self) -> bool {
        self.is_on.get()
    }

    fn tell(&self, request: &TracedRequest) {
        if let Some(sink) = &mut *self.sink.borrow_mut() {
            sink.request(request);
            self.has_news.set(true);
        }
    }

    /// Has whoever looks on hear of what has come, if something has.
    pub fn flush(&self) {
        if !self.has_news.take() {
            return;
        }
        let mut sink = self.sink.borrow_mut();
        if sink.as_mut().is_some_and(|sink| !sink.flush()) {
            *sink = None;
            self.is_on.set(false);
        }
    }
}

/// The part of one queue in its device's [`Trace`].
pub(super) struct QueueTrace {
    queue: QueueIndex,
    trace: Rc<Trace>,
    /// Since when the device has had the requests that it has, of those that somebody looks on at.
    taken: BTreeMap<u16, Instant>,
}

impl QueueTrace {
    pub(super) fn new(queue: QueueIndex, trace: Rc<Trace>) -> Self {
        Self {
            queue,
            trace,
            taken: BTreeMap::new(),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.trace.is_on()
    }

    /// The device takes `request`.
    pub(super) fn begin(&mut self, request: &Request) {
        if self.is_on() {
            self.taken.insert(request.head(), Instant::now());
        }
    }

    /// The device gives it back, and says this of it. What is to be told of that, once it is so.
    pub(super) fn end(
        &mut self,
        completion: &Completion,
        detail: Option<RequestDetail>,
    ) -> Option<TracedRequest> {
        let taken = self.taken.remove(&completion.head)?;
        let request = &completion.spent;
        Some(TracedRequest {
            queue: self.queue,
            head: completion.head,
            readable: request.readable.len(),
            writable: request.writable.len(),
            written: completion.written,
            took: taken.elapsed(),
            detail,
        })
    }

    /// It is on the used ring.
    pub(super) fn ended(&self, request: &TracedRequest) {
        self.trace.tell(request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps what it is told, until it has been told of three.
    #[derive(Default, Clone)]
    struct Kept(Rc<RefCell<Vec<TracedRequest>>>, Rc<Cell<bool>>);

    impl TraceSink for Kept {
        fn request(&mut self, request: &TracedRequest) {
            self.0.borrow_mut().push(*request);
        }

        fn flush(&mut self) -> bool {
            self.0.borrow().len() < 3
        }

        fn replaced(&mut self) {
            self.1.set(true);
        }
    }

    fn queue() -> (Rc<Trace>, QueueTrace) {
        let trace = Rc::<Trace>::default();
        let index = QueueIndex::new(1, 2).unwrap();
        (Rc::clone(&trace), QueueTrace::new(index, trace))
    }

    fn serve(queue: &mut QueueTrace, head: u16) {
        let request = Request::new(head);
        queue.begin(&request);
        end(queue, &request.finish(0), None);
        queue.trace.flush();
    }

    fn end(queue: &mut QueueTrace, completion: &Completion, detail: Option<RequestDetail>) {
        if let Some(traced) = queue.end(completion, detail) {
            queue.ended(&traced);
        }
    }

    #[test]
    fn whoever_looks_on_is_told_of_what_was_taken_since() {
        let (trace, mut queue) = queue();
        let before = Request::new(7);
        queue.begin(&before);
        let kept = Kept::default();
        let told = &kept.0;
        trace.begin(Box::new(kept.clone()));
        end(&mut queue, &before.finish(0), None);
        assert!(told.borrow().is_empty());
        let detail = RequestDetail {
            what: "read",
            offset: 512,
            bytes: 0,
            has_failed: true,
        };
        let request = Request::new(9);
        queue.begin(&request);
        end(&mut queue, &request.finish(0), Some(detail));
        let [traced] = told.borrow()[..] else {
            panic!("{told:?}")
        };
        let index = traced.queue.get();
        assert_eq!((index, traced.head, traced.detail), (1, 9, Some(detail)));
    }

    #[test]
    fn nothing_is_kept_once_nobody_looks_on() {
        let (trace, mut queue) = queue();
        let Kept(told, _) = Kept::default();
        trace.begin(Box::new(Kept(Rc::clone(&told), Rc::default())));
        for head in 0..3 {
            serve(&mut queue, head);
        }
        assert_eq!(told.borrow().len(), 3);
        assert!(!trace.is_on());
        queue.begin(&Request::new(5));
        assert!(queue.taken.is_empty());
        // The sink, and what it holds, is gone.
        assert_eq!(Rc::strong_count(&told), 1);
    }

    #[test]
    fn the_next_one_that_looks_on_takes_the_place_of_the_last() {
        let (trace, mut queue) = queue();
        let (first, second) = (Kept::default(), Kept::default());
        for kept in [&first, &second] {
            trace.begin(Box::new(kept.clone()));
            serve(&mut queue, 1);
        }
        assert_eq!((first.0.borrow().len(), first.1.get()), (1, true));
        assert_eq!((second.0.borrow().len(), second.1.get()), (1, false));
    }
}
