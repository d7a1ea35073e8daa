"""Makes a table and a JSON file of what the board's network bench printed.

Reads the console from standard input: lines `net LIMIT NAME PATTERN RATE DOM0_MS`, where LIMIT is the polling limit in
microseconds, and RATE is in kB/s, in packets or in round trips a second.
"""

import json
import pathlib
import statistics
import sys

SECONDS = 2
UNITS = {
    "tcp-out": (1e-3, "MB/s", "{:,.1f}"),
    "tcp-in": (1e-3, "MB/s", "{:,.1f}"),
    "udp64-out": (1, "packets/s", "{:,.0f}"),
    "udp64-in": (1, "packets/s", "{:,.0f}"),
    "round-trips": (1, "round trips/s", "{:,.0f}"),
}


def read(lines):
    runs = {}
    for words in map(str.split, lines):
        if words[:1] == ["net"] and len(words) == 6:
            _, limit, name, pattern, rate, time = words
            runs.setdefault((int(limit), pattern), {}).setdefault(name, []).append((float(rate), int(time)))
    return runs


def main():
    runs = read(sys.stdin)
    if not runs:
        sys.exit("nothing was measured")
    rows = []
    for (limit, pattern), by_name in runs.items():
        row = {"limit_us": limit, "pattern": pattern, "runs": by_name, "rate": {}, "ratio": {}, "range": {}, "dom0_ms_per_s": {}}
        for name, values in by_name.items():
            # Each run of one against the same run of the other: what disturbs a run disturbs both.
            ratios = [a / b for (a, _), (b, _) in zip(values, by_name["pv"]) if b]
            row["rate"][name] = statistics.median(rate for rate, _ in values)
            row["ratio"][name] = statistics.median(ratios) if ratios else 0
            row["range"][name] = (min(ratios, default=0), max(ratios, default=0))
            row["dom0_ms_per_s"][name] = statistics.median(time for _, time in values) / SECONDS
        rows.append(row)
    names = list(next(iter(runs.values())))
    print("Rates (median); in brackets the ratio to xen-netback in the same run (median; range), and dom0's processor time in a second\n")
    print(f"| pattern | polling | {' | '.join(names)} |")
    print("|---" * (2 + len(names)) + "|")
    for row in rows:
        factor, unit, form = UNITS[row["pattern"]]
        cells = []
        for name in names:
            ratio = "" if name == "pv" else "{:.2f}; {:.2f} to {:.2f}; ".format(row["ratio"][name], *row["range"][name])
            cells.append(f"{form.format(row['rate'][name] * factor)} ({ratio}{row['dom0_ms_per_s'][name]:.0f} ms)")
        polling = f"{row['limit_us']} µs" if row["limit_us"] else "off"
        print(f"| {row['pattern']}, {unit} | {polling} | {' | '.join(cells)} |")
    out = pathlib.Path(sys.argv[1]) / "net.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{out}")


main()
