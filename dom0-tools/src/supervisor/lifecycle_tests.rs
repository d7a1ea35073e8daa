//! Situations of a guest, and what is done in each.

use super::*;
use crate::toolstack::libxl::EntryForm;
use std::time::Duration;

const fn disk(devid: u32) -> EntryKey {
    EntryKey {
        form: EntryForm::Disk,
        devid,
    }
}

const A: EntryKey = disk(51712);
const B: EntryKey = disk(51728);

const RNG: EntryKey = EntryKey {
    form: EntryForm::File,
    devid: 0,
};

const VIRTIO: EntryKey = EntryKey {
    form: EntryForm::Virtio,
    devid: 0,
};

const ATTACHED: EntryKey = EntryKey {
    form: EntryForm::Attached,
    devid: 0,
};

const IT_ENDED: &str = "it ended";

fn new(key: EntryKey) -> Event {
    Event::Appeared { key, served: false }
}

fn known(key: EntryKey) -> Event {
    Event::Appeared { key, served: true }
}

fn opened(key: EntryKey) -> Event {
    Event::Opened { key }
}

fn missing(key: EntryKey) -> Event {
    let (busy, error) = (false, "is missing".to_owned());
    Event::NotOpened { key, busy, error }
}

fn locked(key: EntryKey) -> Event {
    let (busy, error) = (true, "is locked".to_owned());
    Event::NotOpened { key, busy, error }
}

fn refused(key: EntryKey, busy: bool) -> Event {
    let error = "is refused".to_owned();
    Event::NotAttached { key, busy, error }
}

fn attached(key: EntryKey) -> Event {
    Event::Attached { key }
}

fn closing(key: EntryKey) -> Event {
    Event::Closing { key }
}

fn gone(key: EntryKey) -> Event {
    Event::Gone { key }
}

fn gave_up(key: EntryKey) -> Event {
    Event::GaveUp { key }
}

fn broken() -> Event {
    Event::Broken { why: IT_ENDED }
}

fn died() -> Event {
    let (how, why) = ("signal: 9".to_owned(), IT_ENDED);
    Event::Died { how, why }
}

fn not_started() -> Event {
    let error = "no memory".to_owned();
    Event::NotStarted { error }
}

fn cannot_serve() -> Event {
    let error = "no ioreq server".to_owned();
    Event::CannotServe { error }
}

fn open(key: EntryKey) -> Effect {
    Effect::Open { key }
}

/// A worker for a guest that none has served.
fn first_start() -> Effect {
    Effect::Start {
        ends_earlier: true,
        missed: None,
    }
}

/// A worker in place of one of this supervisor's.
fn next_start() -> Effect {
    Effect::Start {
        ends_earlier: false,
        missed: None,
    }
}

fn hand(key: EntryKey) -> Effect {
    Effect::Hand { key, served: false }
}

fn hand_known(key: EntryKey) -> Effect {
    Effect::Hand { key, served: true }
}

fn detach(key: EntryKey) -> Effect {
    Effect::Detach { key }
}

fn ready(key: EntryKey) -> Effect {
    Effect::TellReady { key }
}

fn claimed(key: EntryKey) -> Effect {
    Effect::LogClaimed { key }
}

fn end_use(key: EntryKey) -> Effect {
    Effect::EndUse { key }
}

fn release(key: EntryKey) -> Effect {
    Effect::Release { key }
}

fn closed(key: EntryKey) -> Effect {
    Effect::TellClosed { key }
}

fn log(key: EntryKey, error: &str) -> Effect {
    let error = error.to_owned();
    Effect::LogDevice { key, error }
}

fn log_waiting(key: EntryKey, why: &str) -> Effect {
    let why = why.to_owned();
    Effect::LogWaiting { key, why }
}

fn log_failure(error: &str) -> Effect {
    let error = error.to_owned();
    Effect::LogFailure { error }
}

fn kill(why: &'static str) -> Effect {
    Effect::Kill { why }
}

fn lost() -> Effect {
    Effect::LogLost {
        why: IT_ENDED,
        how: "signal: 9".to_owned(),
    }
}

/// A new guest with one device, which was opened.
fn with_one() -> Vec<Event> {
    vec![new(A), opened(A)]
}

/// … whose worker has been started.
fn started() -> Vec<Event> {
    [with_one(), vec![Event::Settled, Event::Started]].concat()
}

/// … and has the device.
fn serving() -> Vec<Event> {
    [started(), vec![attached(A)]].concat()
}

/// Two devices are served.
/// A worker has been handed the guest's one device, of a file.
fn held() -> Vec<Event> {
    vec![new(RNG), opened(RNG), Event::Settled, Event::Started]
}

fn serving_two() -> Vec<Event> {
    let second = vec![new(B), opened(B), Event::Settled, attached(B)];
    [serving(), second].concat()
}

/// Its worker has died, and the next one is due.
fn bereft() -> Vec<Event> {
    [serving(), vec![broken(), died()]].concat()
}

/// The next worker has been started, with the device opened anew.
fn taken_over() -> Vec<Event> {
    let next = vec![Event::Again, opened(A), Event::Settled, Event::Started];
    [bereft(), next].concat()
}

/// A guest that an earlier supervisor has served: its devices appear.
fn earlier(events: &[Event]) -> (bool, Vec<Event>) {
    (true, events.to_vec())
}

fn this(events: Vec<Event>) -> (bool, Vec<Event>) {
    (false, events)
}

fn and(mut before: Vec<Event>, events: &[Event]) -> (bool, Vec<Event>) {
    before.extend_from_slice(events);
    (false, before)
}

/// Whether an earlier supervisor has served the guest, and what has happened since; what happens now; what is done.
type Row = (&'static str, (bool, Vec<Event>), Event, Vec<Effect>);

#[allow(clippy::too_many_lines)]
fn rows() -> Vec<Row> {
    vec![
        // A guest begins.
        ("a device appears", this(vec![]), new(A), vec![open(A)]),
        ("it was opened", this(vec![new(A)]), opened(A), vec![]),
        (
            "it is to be served",
            this(with_one()),
            Event::Settled,
            vec![first_start()],
        ),
        (
            "its worker starts",
            and(with_one(), &[Event::Settled]),
            Event::Started,
            vec![Effect::LogServing, hand(A), Effect::Serve],
        ),
        (
            "its worker has it",
            this(started()),
            attached(A),
            vec![ready(A), claimed(A)],
        ),
        (
            "a second device appears",
            this(serving()),
            new(B),
            vec![open(B)],
        ),
        (
            "it goes to the same worker",
            and(serving(), &[new(B), opened(B)]),
            Event::Settled,
            vec![hand(B)],
        ),
        (
            "two come together",
            this(vec![new(A), opened(A), new(B), opened(B), Event::Settled]),
            Event::Started,
            vec![Effect::LogServing, hand(A), hand(B), Effect::Serve],
        ),
        ("nothing is there", this(vec![]), Event::Settled, vec![]),
        // A guest whose toolstack does not wait for its devices.
        (
            "it is held",
            this(vec![]),
            new(RNG),
            vec![Effect::Hold, open(RNG)],
        ),
        (
            "it is held once",
            this(vec![new(RNG)]),
            new(VIRTIO),
            vec![open(VIRTIO)],
        ),
        (
            "until all that it has is served",
            and(held(), &[new(VIRTIO), opened(VIRTIO), Event::Settled]),
            attached(RNG),
            vec![ready(RNG), claimed(RNG)],
        ),
        (
            "it is let run",
            this(held()),
            attached(RNG),
            vec![ready(RNG), claimed(RNG), Effect::LetRun],
        ),
        (
            "it is let run when it has no such device any more",
            this(vec![new(RNG)]),
            gone(RNG),
            vec![end_use(RNG), release(RNG), Effect::LetRun],
        ),
        (
            "it waits for a worker that follows",
            and(held(), &[broken()]),
            died(),
            vec![lost()],
        ),
        (
            "what it has had it runs without",
            and(held(), &[attached(RNG), broken(), died(), Event::Again]),
            missing(RNG),
            vec![log(RNG, "is missing")],
        ),
        (
            "its own file's device is waited for however long that takes",
            this(vec![new(RNG)]),
            missing(RNG),
            vec![log(RNG, "is missing"), end_use(RNG)],
        ),
        (
            "what its toolstack has given it may be another back-end's",
            this(vec![new(VIRTIO)]),
            missing(VIRTIO),
            vec![log(VIRTIO, "is missing"), end_use(VIRTIO), Effect::LetRun],
        ),
        (
            "a back-end of ours that is not there yet is waited for",
            this(vec![new(VIRTIO)]),
            locked(VIRTIO),
            vec![log_waiting(VIRTIO, "is locked")],
        ),
        (
            "what is attached goes to a guest that runs",
            this(serving()),
            new(ATTACHED),
            vec![open(ATTACHED)],
        ),
        // What cannot be opened.
        (
            "it cannot be opened",
            this(vec![new(A)]),
            missing(A),
            vec![log(A, "is missing"), end_use(A)],
        ),
        (
            "a guest without any device gets no worker",
            this(vec![new(A), missing(A)]),
            Event::Settled,
            vec![],
        ),
        (
            "somebody has it",
            this(vec![new(A)]),
            locked(A),
            vec![log_waiting(A, "is locked")],
        ),
        (
            "who may let go of it",
            this(vec![new(A), locked(A), Event::Settled]),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        (
            "who has it still, which is no news",
            this(vec![new(A), locked(A), Event::Settled, Event::Again]),
            locked(A),
            vec![],
        ),
        (
            "who has let go of it",
            this(vec![
                new(A),
                locked(A),
                Event::Settled,
                Event::Again,
                opened(A),
            ]),
            Event::Settled,
            vec![first_start()],
        ),
        (
            "what is missing of a new guest is not looked for",
            this(vec![new(A), missing(A), Event::Settled]),
            Event::Again,
            vec![Effect::Settle],
        ),
        (
            "but for what its toolstack does not wait for",
            this(vec![new(RNG), missing(RNG), Event::Settled]),
            Event::Again,
            vec![open(RNG), Effect::Settle],
        ),
        (
            "one of two is missing",
            this(vec![new(A), missing(A), new(B), opened(B)]),
            Event::Settled,
            vec![first_start()],
        ),
        (
            "the other one is served",
            this(vec![new(A), missing(A), new(B), opened(B), Event::Settled]),
            Event::Started,
            vec![Effect::LogServing, hand(B), Effect::Serve],
        ),
        // What a worker refuses.
        (
            "the worker refuses it",
            this(started()),
            refused(A, false),
            vec![log(A, "is refused"), end_use(A)],
        ),
        (
            "what it has refused it cannot have",
            and(started(), &[refused(A, false)]),
            attached(A),
            vec![],
        ),
        (
            "what it was never handed it cannot have",
            this(serving()),
            attached(B),
            vec![],
        ),
        (
            "what it was never handed it cannot refuse",
            this(serving()),
            refused(B, true),
            vec![],
        ),
        (
            "it is busy for the worker",
            and(started(), &[refused(A, true)]),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        (
            "and is handed once more",
            and(started(), &[refused(A, true), Event::Again, opened(A)]),
            Event::Settled,
            vec![hand(A)],
        ),
        (
            "twice attached is twice told, and claimed once",
            this(serving()),
            attached(A),
            vec![ready(A)],
        ),
        // A worker that cannot be started.
        (
            "no worker can be started",
            and(with_one(), &[Event::Settled]),
            not_started(),
            vec![log_failure("no memory")],
        ),
        (
            "again",
            and(with_one(), &[Event::Settled, not_started()]),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        (
            "again in vain, which is no news",
            and(
                with_one(),
                &[
                    Event::Settled,
                    not_started(),
                    Event::Again,
                    opened(A),
                    Event::Settled,
                ],
            ),
            not_started(),
            vec![],
        ),
        (
            "another device does not hurry it",
            and(
                with_one(),
                &[Event::Settled, not_started(), new(B), opened(B)],
            ),
            Event::Settled,
            vec![],
        ),
        (
            "the worker says that it cannot serve",
            this(started()),
            cannot_serve(),
            vec![log_failure("no ioreq server"), kill("it cannot serve")],
        ),
        (
            "it has said why it dies",
            and(started(), &[cannot_serve()]),
            died(),
            vec![],
        ),
        (
            "another one is tried",
            and(started(), &[cannot_serve(), died()]),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        // A worker dies.
        (
            "the worker ends",
            this(serving()),
            broken(),
            vec![kill(IT_ENDED)],
        ),
        (
            "it ends once",
            and(serving(), &[broken()]),
            broken(),
            vec![],
        ),
        (
            "nobody follows before it is dead",
            and(serving(), &[broken(), new(B), opened(B)]),
            Event::Settled,
            vec![],
        ),
        (
            "it is dead",
            and(serving(), &[broken()]),
            died(),
            vec![lost()],
        ),
        (
            "what it had is opened again",
            this(bereft()),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        (
            "another one takes over",
            and(bereft(), &[Event::Again, opened(A)]),
            Event::Settled,
            vec![next_start()],
        ),
        (
            "with what it had",
            and(bereft(), &[Event::Again, opened(A), Event::Settled]),
            Event::Started,
            vec![Effect::LogServing, hand_known(A), Effect::Serve],
        ),
        (
            "which libxl knows",
            this(taken_over()),
            attached(A),
            vec![ready(A)],
        ),
        (
            "all that it had is opened again",
            and(serving_two(), &[broken(), died()]),
            Event::Again,
            vec![open(A), open(B), Effect::Settle],
        ),
        (
            "it dies before it has what it was handed",
            and(started(), &[broken(), died()]),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        (
            "the next one is told that it is new",
            and(
                started(),
                &[broken(), died(), Event::Again, opened(A), Event::Settled],
            ),
            Event::Started,
            vec![Effect::LogServing, hand(A), Effect::Serve],
        ),
        (
            "what it had is gone",
            and(bereft(), &[Event::Again]),
            missing(A),
            vec![log(A, "is missing")],
        ),
        (
            "the guest is served without it",
            and(bereft(), &[Event::Again, missing(A)]),
            Event::Settled,
            vec![next_start()],
        ),
        (
            "as long as it is gone",
            and(bereft(), &[Event::Again, missing(A), Event::Settled]),
            Event::Started,
            vec![Effect::LogServing, Effect::Serve],
        ),
        (
            "it is looked for",
            and(
                bereft(),
                &[Event::Again, missing(A), Event::Settled, Event::Started],
            ),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        (
            "and comes back",
            and(
                bereft(),
                &[
                    Event::Again,
                    missing(A),
                    Event::Settled,
                    Event::Started,
                    Event::Again,
                    opened(A),
                ],
            ),
            Event::Settled,
            vec![hand_known(A)],
        ),
        // A worker dies in a takeover.
        (
            "the next one dies before it has begun",
            this(taken_over()),
            broken(),
            vec![kill(IT_ENDED)],
        ),
        (
            "and is followed",
            and(taken_over(), &[broken(), died()]),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        (
            "by one that is told what the first had",
            and(
                taken_over(),
                &[broken(), died(), Event::Again, opened(A), Event::Settled],
            ),
            Event::Started,
            vec![Effect::LogServing, hand_known(A), Effect::Serve],
        ),
        (
            "a device appears while nobody serves",
            and(bereft(), &[new(B), opened(B)]),
            Event::Settled,
            vec![],
        ),
        (
            "it goes to the next worker",
            and(
                bereft(),
                &[
                    new(B),
                    opened(B),
                    Event::Settled,
                    Event::Again,
                    opened(A),
                    opened(B),
                    Event::Settled,
                ],
            ),
            Event::Started,
            vec![Effect::LogServing, hand_known(A), hand(B), Effect::Serve],
        ),
        // A device is closed.
        (
            "its toolstack closes it",
            this(serving()),
            closing(A),
            vec![end_use(A), detach(A)],
        ),
        (
            "one that nobody ever served",
            this(vec![new(A), missing(A)]),
            closing(A),
            vec![end_use(A), release(A), closed(A)],
        ),
        (
            "while its worker is dying",
            and(serving(), &[broken()]),
            closing(A),
            vec![end_use(A)],
        ),
        (
            "the next worker gives it up",
            and(
                serving(),
                &[broken(), closing(A), died(), Event::Again, Event::Settled],
            ),
            Event::Started,
            vec![Effect::LogServing, detach(A), Effect::Serve],
        ),
        (
            "a death after it was asked",
            and(
                serving(),
                &[closing(A), broken(), died(), Event::Again, Event::Settled],
            ),
            Event::Started,
            vec![Effect::LogServing, detach(A), Effect::Serve],
        ),
        (
            "a death after it gave it up",
            and(
                serving(),
                &[
                    closing(A),
                    gave_up(A),
                    broken(),
                    died(),
                    Event::Again,
                    Event::Settled,
                ],
            ),
            Event::Started,
            vec![Effect::LogServing, Effect::Serve],
        ),
        (
            "it is closed twice",
            and(serving(), &[closing(A)]),
            closing(A),
            vec![end_use(A), detach(A)],
        ),
        (
            "one that was never known",
            this(serving()),
            closing(B),
            vec![end_use(B), detach(B)],
        ),
        (
            "the other one goes on",
            and(serving_two(), &[closing(A), broken(), died()]),
            Event::Again,
            vec![open(B), Effect::Settle],
        ),
        // A device is removed, and made again.
        (
            "it is removed",
            this(serving()),
            gone(A),
            vec![end_use(A), detach(A)],
        ),
        (
            "what nobody knows is removed",
            this(serving()),
            gone(B),
            vec![],
        ),
        (
            "it is made again",
            and(serving(), &[gone(A), new(A), opened(A)]),
            Event::Settled,
            vec![hand(A)],
        ),
        (
            "it is made again, and its worker dies before it gave up the first",
            and(
                serving(),
                &[
                    gone(A),
                    new(A),
                    opened(A),
                    Event::Settled,
                    attached(A),
                    broken(),
                    died(),
                    Event::Again,
                    opened(A),
                    Event::Settled,
                ],
            ),
            Event::Started,
            vec![Effect::LogServing, hand_known(A), Effect::Serve],
        ),
        (
            "it is made again, and its worker dies before it has the second",
            and(
                serving(),
                &[
                    gone(A),
                    new(A),
                    opened(A),
                    Event::Settled,
                    broken(),
                    died(),
                    Event::Again,
                    opened(A),
                    Event::Settled,
                ],
            ),
            Event::Started,
            vec![Effect::LogServing, detach(A), hand(A), Effect::Serve],
        ),
        (
            "one that was not served is removed",
            this(vec![new(A), missing(A)]),
            gone(A),
            vec![end_use(A), release(A)],
        ),
        // A supervisor starts among guests.
        (
            "a guest that was served",
            earlier(&[known(A), opened(A)]),
            Event::Settled,
            vec![first_start()],
        ),
        (
            "is taken over",
            earlier(&[known(A), opened(A), Event::Settled]),
            Event::Started,
            vec![Effect::LogServing, hand_known(A), Effect::Serve],
        ),
        (
            "with what its toolstack has added meanwhile",
            earlier(&[known(A), opened(A), new(B), opened(B), Event::Settled]),
            Event::Started,
            vec![Effect::LogServing, hand_known(A), hand(B), Effect::Serve],
        ),
        (
            "a guest whose entries are gone has a worker too",
            earlier(&[]),
            Event::Settled,
            vec![first_start()],
        ),
        (
            "one of whose devices is missing stays with its worker, if that lives",
            earlier(&[known(A), missing(A), known(B), opened(B)]),
            Event::Settled,
            vec![Effect::Start {
                ends_earlier: true,
                missed: Some(A),
            }],
        ),
        (
            "and is looked at again",
            earlier(&[known(A), missing(A), Event::Settled, not_started()]),
            Event::Again,
            vec![open(A), Effect::Settle],
        ),
        (
            "a device of whose state nothing is left",
            this(vec![]),
            Event::Unrecorded { key: A },
            vec![log(A, UNRECORDED)],
        ),
        (
            "is served by nobody",
            this(vec![Event::Unrecorded { key: A }]),
            Event::Settled,
            vec![],
        ),
        (
            "and is not tried again",
            this(vec![Event::Unrecorded { key: A }, Event::Settled]),
            Event::Again,
            vec![Effect::Settle],
        ),
        (
            "its guest's new device is served",
            this(vec![
                Event::Unrecorded { key: A },
                new(B),
                opened(B),
                Event::Settled,
            ]),
            Event::Started,
            vec![Effect::LogServing, hand(B), Effect::Serve],
        ),
        (
            "once taken over, it is as any other",
            earlier(&[
                known(A),
                opened(A),
                Event::Settled,
                Event::Started,
                broken(),
                died(),
                Event::Again,
                opened(A),
            ]),
            Event::Settled,
            vec![next_start()],
        ),
    ]
}

#[test]
fn every_situation_has_its_effects() {
    let rows = rows();
    for (situation, (served_earlier, before), event, expected) in &rows {
        let now = Instant::now();
        let mut lifecycle = Lifecycle::new(*served_earlier, now);
        for event in before {
            lifecycle.on(event.clone(), now);
        }
        let effects = lifecycle.on(event.clone(), now);
        assert_eq!(effects, *expected, "{situation}");
    }
}

/// How long after the last of `events` something is tried again.
fn again_after(events: &[Event]) -> Option<Duration> {
    let now = Instant::now();
    let mut lifecycle = Lifecycle::new(false, now);
    for event in events {
        lifecycle.on(event.clone(), now);
    }
    lifecycle.again_at().map(|at| at - now)
}

#[test]
fn what_has_failed_is_tried_again_when_that_may_help() {
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    for (events, expected) in [
        (serving(), None),
        (bereft(), seconds(0)),
        (vec![new(A), missing(A), Event::Settled], None),
        (vec![new(A), locked(A), Event::Settled], seconds(1)),
        (
            [with_one(), vec![Event::Settled, not_started()]].concat(),
            seconds(10),
        ),
        (
            [started(), vec![cannot_serve(), died()]].concat(),
            seconds(10),
        ),
        ([started(), vec![refused(A, true)]].concat(), seconds(1)),
        ([started(), vec![refused(A, false)]].concat(), None),
        ([serving(), vec![refused(A, false)]].concat(), seconds(10)),
        (
            [bereft(), vec![Event::Again, missing(A), Event::Settled]].concat(),
            seconds(10),
        ),
    ] {
        assert_eq!(again_after(&events), expected, "{events:?}");
    }
}

#[test]
fn a_guest_whose_workers_keep_dying_gets_the_next_ones_less_and_less_often() {
    let now = Instant::now();
    let mut lifecycle = Lifecycle::new(false, now);
    for event in serving() {
        lifecycle.on(event, now);
    }
    let mut waits = Vec::new();
    for _ in 0..20 {
        for event in [broken(), died()] {
            lifecycle.on(event, now);
        }
        waits.push((lifecycle.again_at().unwrap() - now).as_secs());
        for event in [Event::Again, opened(A), Event::Settled, Event::Started] {
            lifecycle.on(event, now);
        }
    }
    assert!(waits[..16].iter().all(|wait| *wait == 0), "{waits:?}");
    assert_eq!(waits[16..], [1, 2, 4, 8]);
    assert_eq!(lifecycle.restarts(), 20);
}

#[test]
fn a_guest_is_at_rest_when_it_needs_no_worker_or_has_been_told_why_it_has_none() {
    for (events, expected) in [
        (vec![], true),
        (vec![new(A), missing(A), Event::Settled], true),
        (bereft(), false),
        ([started(), vec![cannot_serve()]].concat(), true),
    ] {
        let now = Instant::now();
        let mut lifecycle = Lifecycle::new(false, now);
        for event in &events {
            lifecycle.on(event.clone(), now);
        }
        assert_eq!(lifecycle.is_at_rest(), expected, "{events:?}");
    }
}
