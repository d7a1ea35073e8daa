"""Makes a table, a JSON file and a picture of what the board's bench printed.

Reads the console from standard input: lines `bench LIMIT DISK PATTERN IOPS MB/s [P99]` and
`counts LIMIT PATTERN NAME VALUE...`, where LIMIT is the polling limit in microseconds; and, of a guest with our own disk and
one that qemu-storage-daemon serves, `back-end DISK PATTERN IOPS MB/s [P99]` and `back-end memory NAME KIB...`.
"""

import bars
import json
import pathlib
import statistics
import sys

DISKS = {"xvda": "xen-blkback", "vda": "grants", "vdb": "frames"}
OWN_AND_FOREIGN = {"vda": "own", "vdb": "qemu-storage-daemon"}


def read(lines):
    runs, counts, back_end = {}, [], {"runs": {}, "memory_kib": {}}
    for words in map(str.split, lines):
        if words[:1] == ["bench"] and len(words) >= 6:
            _, limit, disk, pattern, iops, *_ = words
            runs.setdefault((int(limit), pattern), {}).setdefault(DISKS[disk], []).append(int(iops))
        elif words[:1] == ["counts"]:
            values = {name: int(value) for name, value in zip(words[3::2], words[4::2])}
            counts.append({"limit_us": int(words[1]), "pattern": words[2], **values})
        elif words[:2] == ["back-end", "memory"]:
            back_end["memory_kib"] = {name: int(value) for name, value in zip(words[2::2], words[3::2])}
        elif words[:1] == ["back-end"] and len(words) >= 5:
            _, disk, pattern, iops, *_ = words
            back_end["runs"].setdefault(pattern, {}).setdefault(OWN_AND_FOREIGN[disk], []).append(int(iops))
    return runs, counts, back_end


def summary(runs):
    rows = []
    for (limit, pattern), disks in runs.items():
        row = {"limit_us": limit, "pattern": pattern, "runs": disks}
        row["iops"] = {name: statistics.median(values) for name, values in disks.items()}
        # Each run of one against the same run of the other: what disturbs a run disturbs both.
        ratios = {
            name: [a / b for a, b in zip(values, disks["xen-blkback"])]
            for name, values in disks.items()
            if name != "xen-blkback"
        }
        row["ratio"] = {name: statistics.median(values) for name, values in ratios.items()}
        row["range"] = {name: (min(values), max(values)) for name, values in ratios.items()}
        rows.append(row)
    return rows


def table(rows, counts):
    print("Direct I/O, IOPS (median); in brackets the ratio to xen-blkback in the same run (median; range)\n")
    print("| pattern | polling | xen-blkback | grants | frames |")
    print("|---|---|---|---|---|")
    for row in rows:
        cells = [
            "{:,.0f} ({:.2f}; {:.2f} to {:.2f})".format(row["iops"][name], row["ratio"][name], *row["range"][name])
            for name in ("grants", "frames")
        ]
        polling = f"{row['limit_us']} µs" if row["limit_us"] else "off"
        print(f"| {row['pattern']} | {polling} | {row['iops']['xen-blkback']:,.0f} | {' | '.join(cells)} |")
    if not counts:
        return
    print("\nA request with grants costs\n")
    print("| pattern | polling | kicks | interrupts | copy calls | segments | disk calls | sleeps | system calls | processor | of it looking |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for count in counts:
        names = ("kicks", "interrupts", "copy_batches", "copy_segments", "submissions", "sleeps", "syscalls")
        cells = [f"{count[name] / count['requests']:.2f}" for name in names]
        cells += [f"{count[name] / count['requests'] / 1000:.0f} µs" for name in ("cpu_ns", "polled_ns")]
        polling = f"{count['limit_us']} µs" if count["limit_us"] else "off"
        print(f"| {count['pattern']} | {polling} | {' | '.join(cells)} |")


def back_end_table(back_end):
    if not back_end["runs"]:
        return
    print("\nThe same loop device by qemu-storage-daemon behind us; in brackets the ratio to our own disk in the same run\n")
    print("| pattern | own | qemu-storage-daemon |")
    print("|---|---|---|")
    for pattern, disks in back_end["runs"].items():
        own, foreign = disks["own"], disks["qemu-storage-daemon"]
        ratios = [a / b for a, b in zip(foreign, own)]
        ratio = f"{statistics.median(ratios):.2f}; {min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {pattern} | {statistics.median(own):,.0f} | {statistics.median(foreign):,.0f} ({ratio}) |")
    sizes = ", ".join(f"{name} {kib:,} KiB" for name, kib in back_end["memory_kib"].items())
    print(f"\nResident: {sizes}")


def label(row):
    return row["pattern"] + ("" if row["limit_us"] else ", no polling")


def main():
    runs, counts, back_end = read(sys.stdin)
    if not runs:
        sys.exit("error: the console has no measurement")
    rows = summary(runs)
    table(rows, counts)
    back_end_table(back_end)
    directory = pathlib.Path(sys.argv[1])
    (directory / "bench.json").write_text(json.dumps({"rows": rows, "counts": counts, "back_end": back_end}, indent=1) + "\n")
    (directory / "bench.svg").write_text(bars.picture((label(row), row["ratio"]) for row in rows))
    print(f"\nwritten: {directory}/bench.json, {directory}/bench.svg")


main()
