//! How queues, and the back-ends that serve them, begin and end.

use super::super::loss::Loss;
use super::super::pools::Pools;
use super::super::relaying::Relaying;
use super::super::ring::ShadowRing;
use super::{Relay, Relayed};
use crate::virtqueue::QueueIndex;
use std::collections::VecDeque;
use std::io;

impl Relay {
    /// Begins to relay a queue, which the back-end does not serve yet. It has accepted `VIRTIO_RING_F_EVENT_IDX`, if
    /// `event_idx`.
    ///
    /// # Panics
    ///
    /// If the back-end has something of it still: [`Relay::is_settled`].
    pub fn start(&mut self, index: QueueIndex, event_idx: bool) {
        assert!(self.is_settled(index), "the back-end has let go of it");
        let index = index.get();
        self.event_idx = event_idx;
        self.records[index].begin(self.region.name());
        self.queues[index] = Some(self.relayed(index));
    }

    pub(super) fn relayed(&self, index: usize) -> Relayed {
        Relayed {
            ring: self.ring(index),
            requests: (0..self.region.rings()[index].size).map(|_| None).collect(),
            expected: 0,
            waiting: VecDeque::new(),
        }
    }

    fn ring(&self, index: usize) -> ShadowRing {
        let places = &self.region.rings()[index];
        let mut ring = ShadowRing::new(places, self.base, self.event_idx, &self.region.memory());
        ring.overstate = self.rules.overstate;
        ring
    }

    /// Forgets a queue. What the back-end has of it keeps its memory until [`Relay::settle`].
    pub fn stop(&mut self, index: QueueIndex) {
        if let Some(inherited) = &mut self.inherited {
            inherited.stop(index);
        }
        let index = index.get();
        if let Some(queue) = self.queues[index].take() {
            let requests = queue.requests.into_iter().flatten();
            self.left_behind
                .extend(requests.map(|relaying| (index, relaying)));
        }
        for (_, relaying) in self.used.extract_if(.., |(queue, _)| *queue == index) {
            drop(self.pools.give_back(index, relaying));
        }
        self.pools.forget(index);
        // The next process has nothing to wait for of it.
        self.records[index].begin(self.region.name());
        // Who has asked for that sleeps no more, or asks again.
        self.look_at = None;
        if self.used.is_empty() {
            self.out_shortage.forget();
        }
        if self.queues.iter().all(Option::is_none) {
            self.in_shortage.forget();
        }
    }

    /// The back-end has let go of a queue that was stopped.
    pub fn settle(&mut self, index: QueueIndex) {
        let index = index.get();
        for (_, relaying) in self
            .left_behind
            .extract_if(.., |(queue, _)| *queue == index)
        {
            drop(self.pools.give_back(index, relaying));
        }
    }

    /// Whether a back-end that has stopped serving a queue, and says that it would go on at element `next` of the available
    /// ring, has given back all that it had taken: nothing else is written to its buffers.
    pub fn has_all_back(&self, index: QueueIndex, next: u16) -> bool {
        let inherited = self.inherited.as_ref();
        let region = inherited.map_or(&self.region, |inherited| &inherited.region);
        let places = &region.rings()[index.get()];
        places.used_index(&region.memory()) == next
    }

    /// Whether the back-end has nothing of the queue from before it was stopped.
    pub fn is_settled(&self, index: QueueIndex) -> bool {
        let mut left_behind = self.left_behind.iter();
        left_behind.all(|(queue, _)| *queue != index.get())
    }

    /// The back-end is gone. What it has used is the guest's; what else it had waits for the next one, or has failed.
    pub fn lose(&mut self) {
        if self.is_lost {
            // What was not taken over by now is lost too.
            self.inherited
                .take_if(|inherited| inherited.finished.is_none());
            self.tells_of_loss |= std::mem::take(&mut self.is_taken_over);
            return;
        }
        // What it says last may be anything.
        let _ = self.gather();
        self.is_lost = true;
        // What waits for that waits for another back-end first.
        self.in_shortage.forget();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            let loss = self.rules.loss(index);
            for place in &mut queue.requests {
                if let Some(mut relaying) = place.take_if(|lost| loss.fails(&lost.plan)) {
                    queue.expected -= usize::from(!relaying.plan.receives);
                    loss.answer(&mut relaying, &self.region.memory());
                    self.counters.failed += u64::from(loss.is_failure());
                    self.used.push((index, relaying));
                }
            }
        }
    }

    /// Begins anew for another back-end, in a region of its own, which the last one does not know: with what that has not
    /// used, in the order in which it was offered. It has accepted `VIRTIO_RING_F_EVENT_IDX`, if `event_idx`. False if
    /// something is to be taken out first.
    ///
    /// # Errors
    ///
    /// If the system has not the memory; nothing has changed then.
    pub fn resume(&mut self, event_idx: bool) -> io::Result<bool> {
        self.lose();
        if !self.used.is_empty() || self.inherited.is_some() {
            return Ok(false);
        }
        self.region = match self.next_region.take() {
            Some(region) => region,
            None => self.region.another()?,
        };
        self.event_idx = event_idx;
        self.pools = Pools::new(&self.region);
        self.left_behind.clear();
        for index in 0..self.queues.len() {
            let ring = self.ring(index);
            self.records[index].begin(self.region.name());
            if let Some(queue) = &mut self.queues[index] {
                queue.ring = ring;
                queue.expected = 0;
                let unfinished = queue.requests.iter_mut().filter_map(Option::take);
                let mut unfinished: Vec<Relaying> = unfinished.collect();
                unfinished.sort_unstable_by_key(|relaying| relaying.order);
                for relaying in unfinished.into_iter().rev() {
                    queue.waiting.push_front((relaying.request, relaying.plan));
                }
                if self.tells_of_loss && matches!(self.rules.loss(index), Loss::Tell(_)) {
                    let waiting = std::mem::take(&mut queue.waiting).into_iter();
                    let had = waiting.map(|(request, plan)| (request.repeated(), plan));
                    queue.waiting = had.collect();
                }
            }
        }
        self.is_taken_over = false;
        self.tells_of_loss = false;
        self.is_lost = false;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::loss::{Answer, Rules};
    use super::super::super::record::{Left, ShadowRecord};
    use super::*;

    const RULES: Rules = Rules {
        loss: &[Loss::Fail(Answer::Nothing)],
        overstate: false,
        alike: false,
    };

    #[test]
    fn the_next_process_waits_for_nothing_of_a_queue_that_was_stopped() {
        let record = ShadowRecord::private(4).unwrap();
        let records = vec![record.clone()];
        let mut relay = Relay::new(&[4], 1 << 16, 0, RULES, records).unwrap();
        let queue = QueueIndex::new(0, 1).unwrap();
        relay.start(queue, false);
        record.offer(2, 3, 4096);
        let left = |relay: &Relay| Left::of(&record, 4, relay.region().name());
        assert!(!left(&relay).unwrap().is_nothing());
        relay.stop(queue);
        // The back-end is the next one's all the same.
        assert!(left(&relay).unwrap().is_nothing());
    }
}
