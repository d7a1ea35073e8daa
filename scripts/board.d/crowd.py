"""Makes tables, a JSON file and a picture of what the board's crowd and busy printed.

Reads the console from standard input: lines `crowd LOAD GUESTS DISK PATTERN`, then what it took (milliseconds of
processor time of dom0 and of the guests, milliseconds, transfers, changes of task in dom0, changes of task that workers asked for
and that they did not), then what each guest measured: transfers a second, and at depth 1 the microseconds within which
99 of 100 ended, after a slash. PATTERN is `FIRST/OTHERS` where the first guest does another thing than the others. A line
`crowd-counts LOAD GUESTS DISK PATTERN NAME VALUE...` has what the service counted meanwhile, of all guests.
"""

import bars
import json
import pathlib
import statistics
import sys

DISKS = {"xvda": "xen-blkback", "vda": "grants", "vdb": "frames"}
TAKEN = ("dom0_ms", "guests_ms", "ms", "transfers", "changes_of_task", "workers_sleeps", "workers_preempted")


COUNTED = ("traps", "kicks", "interrupts", "copy_batches", "submissions", "sleeps", "task_switches", "yields", "syscalls")


def read(lines):
    runs = {}
    for words in map(str.split, lines):
        if words[:1] == ["crowd-counts"]:
            _, load, guests, disk, pattern, *counts = words
            counts = {name: int(value) for name, value in zip(counts[::2], counts[1::2])}
            runs[(load, int(guests), pattern)][DISKS[disk]][-1]["counts"] = counts
            continue
        if words[:1] != ["crowd"]:
            continue
        _, load, guests, disk, pattern, *rest = words
        numbers, measured = rest[: len(TAKEN)], rest[len(TAKEN) :]
        if len(measured) != int(guests):
            sys.exit(f"error: not {guests} guests have measured: {' '.join(words)}")
        run = dict(zip(TAKEN, map(int, numbers)))
        run["rates"] = [int(words.split("/")[0]) for words in measured]
        run["p99_us"] = [int(words.split("/")[1]) for words in measured if "/" in words]
        runs.setdefault((load, int(guests), pattern), {}).setdefault(DISKS[disk], []).append(run)
    return runs


def of_run(run):
    transfers = max(run["transfers"], 1)
    derived = {
        "rate": sum(run["rates"]),
        "slowest": min(run["rates"]),
        "fairness": min(run["rates"]) / max(max(run["rates"]), 1),
        "dom0_us": 1000 * run["dom0_ms"] / transfers,
        "guests_us": 1000 * run["guests_ms"] / transfers,
        "changes": run["changes_of_task"] / transfers,
        "workers": (run["workers_sleeps"] + run["workers_preempted"]) / transfers,
    }
    if run["p99_us"]:
        derived["p99_us"] = run["p99_us"][0]
    counts = run.get("counts", {})
    requests = max(counts.get("requests", 0), 1)
    derived |= {name: counts[name] / requests for name in COUNTED if name in counts}
    return derived


def summary(runs):
    rows = []
    for (load, guests, pattern), disks in runs.items():
        row = {"load": load, "guests": guests, "pattern": pattern, "runs": disks, "median": {}, "ratio": {}, "range": {}}
        derived = {name: [of_run(run) for run in taken] for name, taken in disks.items()}
        for name, taken in derived.items():
            row["median"][name] = {what: statistics.median(run[what] for run in taken) for what in taken[0]}
            # Each run of one against the same run of the other: what disturbs a run disturbs both.
            ratios = [run["rate"] / max(other["rate"], 1) for run, other in zip(taken, derived["xen-blkback"])]
            row["ratio"][name] = statistics.median(ratios)
            row["range"][name] = (min(ratios), max(ratios))
        rows.append(row)
    return rows


def table(rows):
    print("Transfers a second, of all guests (median); in brackets the ratio to xen-blkback in the same run (median; range). A")
    print("transfer: processor time of dom0 and of the guests, changes of task in dom0, and of those the workers'; the slowest guest's rate to the fastest's\n")
    print("| dom0 | guests | pattern | by | transfers/s | dom0, µs | guests, µs | changes | workers' | fairness | p99 of the first, µs |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        for name, median in row["median"].items():
            rate = f"{median['rate']:,.0f}"
            if name != "xen-blkback":
                rate += " ({:.2f}; {:.2f} to {:.2f})".format(row["ratio"][name], *row["range"][name])
            p99 = f"{median['p99_us']:,.0f}" if "p99_us" in median else ""
            print(
                f"| {row['load']} | {row['guests']} | {row['pattern']} | {name} | {rate} | {median['dom0_us']:.0f} | {median['guests_us']:.0f} "
                f"| {median['changes']:.2f} | {median['workers']:.2f} | {median['fairness']:.2f} | {p99} |"
            )
    print("\nA request, by the service's counts\n")
    print(f"| dom0 | guests | pattern | by | {' | '.join(name.replace('_', ' ') for name in COUNTED)} |")
    print("|---" * (4 + len(COUNTED)) + "|")
    for row in rows:
        for name, median in row["median"].items():
            if "traps" in median:
                cells = " | ".join(f"{median[what]:.2f}" for what in COUNTED)
                print(f"| {row['load']} | {row['guests']} | {row['pattern']} | {name} | {cells} |")


def label(row):
    guests = "1 guest" if row["guests"] == 1 else f"{row['guests']} guests"
    pattern = row["pattern"].replace("-randread", " reads").replace("-randwrite", " writes").replace("-read", " reads")
    beside = {"quiet": "", "loop": ", busy loop", "tasks": ", short tasks"}[row["load"]]
    return f"{guests}, {pattern}{beside}"


def main():
    rows = summary(read(sys.stdin))
    if not rows:
        sys.exit("error: the console has no measurement")
    table(rows)
    file = pathlib.Path(sys.argv[1])
    file.write_text(json.dumps(rows, indent=1) + "\n")
    drawn = file.with_suffix(".svg")
    drawn.write_text(bars.picture((label(row), row["ratio"]) for row in rows))
    print(f"\nwritten: {file}, {drawn}")


main()
