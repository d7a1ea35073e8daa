//! The memory that requests' data passes through: whole pages, as direct I/O wants them.

use std::ops::Range;
use xen_virtio_guest_mapping::PAGE_SIZE;

/// Hands out runs of pages of a memory that somebody else owns.
#[derive(Debug)]
pub(crate) struct Pool {
    used: Vec<bool>,
    /// Where to look first: behind what was handed out last.
    next: usize,
}

/// Pages that belong to one request until they are given back.
#[derive(Debug)]
#[must_use = "pages that are not given back are lost"]
pub(crate) struct PageRun {
    first: usize,
    pages: usize,
}

impl PageRun {
    /// A run of a memory that nobody hands out any more.
    pub(crate) fn left(first: usize, pages: usize) -> Self {
        Self { first, pages }
    }

    /// The byte of the memory at which the run begins.
    pub(crate) fn start(&self) -> usize {
        self.first * PAGE_SIZE
    }
}

impl Pool {
    /// A pool of the whole pages in `bytes`, a range of the memory that begins at a page.
    pub(crate) fn new(bytes: Range<usize>) -> Self {
        let (first, end) = (bytes.start.div_ceil(PAGE_SIZE), bytes.end / PAGE_SIZE);
        let used = (0..end).map(|page| page < first).collect();
        Self { used, next: first }
    }

    /// Room for `bytes`, at least one, side by side; `None` until enough has been given back.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<PageRun> {
        let pages = bytes.div_ceil(PAGE_SIZE);
        let first = self
            .find(self.next..self.used.len(), pages)
            .or_else(|| self.find(0..self.used.len(), pages))?;
        self.used[first..first + pages].fill(true);
        self.next = first + pages;
        Some(PageRun { first, pages })
    }

    fn find(&self, range: Range<usize>, pages: usize) -> Option<usize> {
        let mut free = 0;
        for page in range {
            free = if self.used[page] { 0 } else { free + 1 };
            if free == pages {
                return Some(page + 1 - pages);
            }
        }
        None
    }

    #[cfg(test)]
    pub(crate) fn free_pages(&self) -> usize {
        self.used.iter().filter(|used| !**used).count()
    }

    pub(crate) fn give_back(&mut self, PageRun { first, pages }: PageRun) {
        self.used[first..first + pages].fill(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_do_not_overlap_and_come_back() {
        let mut pool = Pool::new(PAGE_SIZE..9 * PAGE_SIZE);
        let runs: Vec<PageRun> = [1, PAGE_SIZE, 3 * PAGE_SIZE, 2 * PAGE_SIZE + 1]
            .into_iter()
            .map(|bytes| pool.take(bytes).unwrap())
            .collect();
        let starts: Vec<usize> = runs.iter().map(|run| run.start() / PAGE_SIZE).collect();
        assert_eq!(starts, [1, 2, 3, 6]);
        assert!(pool.take(1).is_none());
        for run in runs {
            pool.give_back(run);
        }
        assert!(pool.take(8 * PAGE_SIZE + 1).is_none());
        assert_eq!(pool.take(8 * PAGE_SIZE).unwrap().start(), PAGE_SIZE);
    }

    #[test]
    fn a_gap_behind_the_last_run_is_found() {
        let mut pool = Pool::new(0..4 * PAGE_SIZE);
        let first = pool.take(PAGE_SIZE).unwrap();
        let _rest = pool.take(3 * PAGE_SIZE).unwrap();
        pool.give_back(first);
        assert_eq!(pool.take(1).unwrap().start(), 0);
    }
}
