//! The region's memory for data, and who may have how much of it.
//!
//! A back-end keeps a request for as long as it likes: a buffer for what may come some time stays for ever. So each queue has
//! a part of its own, which no other queue takes, and all share the other half.

use super::region::Region;
use super::relaying::{Plan, Relaying};
use crate::engine::{PageRun, Pool};
use crate::virtqueue::Request;
use xen_virtio_guest_mapping::PAGE_SIZE;

pub(super) struct Pools {
    own: Vec<Pool>,
    own_pages: usize,
    shared: Pool,
    shared_pages: usize,
    /// The queue whose request waits for shared pages: nobody else takes any meanwhile.
    waits_for_shared: Option<usize>,
}

/// What became of a request for pages.
pub(super) enum Taken {
    Pages {
        run: PageRun,
        is_shared: bool,
    },
    /// Until the back-end has given something back.
    NotNow,
    /// The most pages that such a request may have.
    Never {
        room: usize,
    },
}

impl Pools {
    /// The pages of `region`, none of them in use.
    pub(super) fn new(region: &Region) -> Self {
        let all = region.pool();
        let own_pages = all.len() / PAGE_SIZE / 2 / region.rings().len().max(1);
        let mut next = all.start;
        let own = region.rings().iter().map(|_| {
            let start = next;
            next += own_pages * PAGE_SIZE;
            Pool::new(start..next)
        });
        let own = own.collect();
        Self {
            own,
            own_pages,
            shared_pages: (all.end - next) / PAGE_SIZE,
            shared: Pool::new(next..all.end),
            waits_for_shared: None,
        }
    }

    /// Pages for a request of queue `queue`. What has nothing to read may stay with the back-end for ever, and gets those of
    /// the queue's own only.
    pub(super) fn take(&mut self, queue: usize, plan: &Plan) -> Taken {
        let pages = plan.pages();
        let room = match plan.receives {
            true => self.own_pages,
            false => self.own_pages.max(self.shared_pages),
        };
        if pages > room {
            return Taken::Never { room };
        }
        if pages <= self.own_pages
            && let Some(run) = self.own[queue].take(plan.bytes)
        {
            // It waits no more, and others may.
            self.forget(queue);
            let is_shared = false;
            return Taken::Pages { run, is_shared };
        }
        let waits = self.waits_for_shared;
        if plan.receives || pages > self.shared_pages || waits.is_some_and(|other| other != queue) {
            return Taken::NotNow;
        }
        match self.shared.take(plan.bytes) {
            Some(run) => {
                self.waits_for_shared = None;
                let is_shared = true;
                Taken::Pages { run, is_shared }
            }
            None => {
                self.waits_for_shared = Some(queue);
                Taken::NotNow
            }
        }
    }

    /// Takes a request's pages back.
    pub(super) fn give_back(&mut self, queue: usize, relaying: Relaying) -> (Request, Plan) {
        let Relaying {
            request,
            plan,
            run,
            is_shared,
            ..
        } = relaying;
        match is_shared {
            true => self.shared.give_back(run),
            false => self.own[queue].give_back(run),
        }
        (request, plan)
    }

    /// Nothing of queue `queue` waits any more.
    pub(super) fn forget(&mut self, queue: usize) {
        self.waits_for_shared.take_if(|waits| *waits == queue);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::Part;
    use super::*;
    use smallvec::SmallVec;

    fn plan(pages: usize) -> Plan {
        let bytes = pages * PAGE_SIZE;
        let part = Part {
            place: 0,
            len: u32::try_from(bytes).unwrap(),
            writable: false,
        };
        Plan {
            parts: [part].into_iter().collect(),
            descriptors: [part].into_iter().collect(),
            bytes,
            receives: false,
        }
    }

    fn take(pools: &mut Pools, queue: usize, pages: usize) -> Option<Relaying> {
        let plan = plan(pages);
        match pools.take(queue, &plan) {
            Taken::Pages { run, is_shared } => Some(Relaying {
                request: Request::new(0),
                plan,
                run,
                is_shared,
                order: 0,
                written: 0,
                descriptors: SmallVec::new(),
            }),
            Taken::NotNow => None,
            Taken::Never { room } => panic!("{room} pages at most"),
        }
    }

    /// A queue that has waited for shared pages, and was served from its own after all, keeps them from nobody.
    #[test]
    fn whoever_waits_no_more_is_not_waited_for() {
        // One page for each queue, and two that are shared.
        let mut pools = Pools::new(&Region::new(&[8, 8], 4 * PAGE_SIZE).unwrap());
        let own = take(&mut pools, 0, 1).unwrap();
        let shared = [0, 0].map(|queue| take(&mut pools, queue, 1).unwrap());
        assert!(shared.iter().all(|relaying| relaying.is_shared));
        assert!(take(&mut pools, 0, 1).is_none());
        drop(pools.give_back(0, own));
        assert!(!take(&mut pools, 0, 1).unwrap().is_shared);
        for relaying in shared {
            drop(pools.give_back(0, relaying));
        }
        assert!(take(&mut pools, 1, 2).unwrap().is_shared);
    }
}
