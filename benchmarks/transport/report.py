"""The result for people: lines while it runs, and the table of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
INTRODUCTION = """\
# The mover beside others over TCP

This file is written by

```
{command}
```

{about}.
{versions}.

Two processes for each mover, sender and receiver. All movers take turns in every round, beginning with another one
each time; every request's bytes are compared afterwards. Medians, and the range of speeds in brackets. GB are 1e9
bytes. Time is from the sender's first call until the last byte is in place; addresses and descriptor lists are
known before. CPU seconds are those of both processes; what the kernel does in interrupts beside them is in the JSON
file, as `machine_cpu_s_per_gb`, with all else that ran. Congestion control is set on the routes, the same for all
movers.

- `block`: one buffer of 256 MiB. `dense`: 48 layers of 512 pages of 64 KiB, in random order. `hybrid`: 16 MLA
  layers of 512 pages of 73,728 bytes, scattered, and 48 states of 2 MiB. `small`: 1,000 requests of 16 KiB in one
  batch; `small-serial`: each after the one before is acknowledged. `hybrid-layers`: `hybrid` while a prefill of 5.9 s
  computes its layers, one after another, in the time that the link needs for them: `prfaas` sends each at once, as it
  does in SGLang, the others when all are there, as SGLang's other backends do.
- `loopback`. `veth-1gbit`: two network namespaces, `tbf` at 1 Gbit/s; headers leave 0.956. `rtt-50ms`: a delay line
  of 1 Gbit/s, 25 ms each way, between two TUN devices; connections were idle before, so each request grows its
  window anew.
- `prfaas`: this project with its defaults, checksums on. `prfaas+tls`: with CURVE and mutual TLS. `prfaas+256`:
  while 256 more connections are open. `prfaas+2`: with two connections instead of four. `prfaas+bbr`: with
  `congestion_control = "bbr"`, which no other mover here lets be set for a link. `plain`: Python sockets,
  `sendall` and `recv_into`, 4 streams. `iperf3`: 4 streams, no page lists, no comparison.
- `mooncake`: Transfer Engine over TCP, defaults but for the length of its queues, which refuse these page lists
  otherwise. `mooncake+1mib`: also with slices of 1 MiB instead of 64 KiB. `nixl`: UCX over TCP, its agents as
  SGLang's NIXL backend makes them: eight threads at the sender. `nixl+polled`: without them and without the progress
  thread, the sender polls, which is faster where there are few cores, and not to be had in SGLang. While it is not
  its turn it is stopped, because its receiver spins.
{native}- `fraction`: of the link with all headers; on loopback of `plain`, the median of each round's ratio.
  `exposed s`: seconds from the last layer's end until the last byte is in place.

How much of a long prefill's transfer is exposed after its last layer: [architecture.md](../architecture.md).
"""
VERDICTS = {True: "yes", False: "NO", None: "not measured"}


def heading(link: str, workload: str, nbytes: int, rounds: int) -> str:
    return f"{workload}, {link}: {nbytes / 1e9:.3f} GB per request, {rounds} rounds"


def line_of(row: Row) -> str:
    fraction = f"{row['fraction']:.3f} of {row['fraction_of']}" if "fraction" in row else ""
    return (
        f"{row['mover']:>13} {row['gb_per_s']:7.3f} GB/s ({row['gb_per_s_min']:.3f} to {row['gb_per_s_max']:.3f})  "
        f"{row['cpu_s_per_gb']:6.3f} CPU s/GB (send {row['send_cpu_s_per_gb']:.3f}, receive "
        f"{row['receive_cpu_s_per_gb']:.3f})  {row['items_per_s']:8.0f} items/s  {fraction}"
    )


def bar_lines(bars: Sequence[Row]) -> list[str]:
    return [f"{VERDICTS[bar['passed']]:>12}  {bar['bar']}  ({_figure(bar['figure'])})" for bar in bars]


def markdown(result: dict[str, Any]) -> str:
    """The page docs/benchmarks/transport.md."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        INTRODUCTION.format(
            command=result["command"],
            about=f"{result['date']}, {result['cpus']} cores, load average {result['load_average']:.1f} at the start",
            versions=versions,
            native=f"- `prfaas` without native code: {why}.\n" if (why := result["not_native"]) else "",
        )
    ]
    for link, workload in dict.fromkeys((row["link"], row["workload"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["link"], row["workload"]) == (link, workload)]
        parts += [
            f"## {workload}, {link}",
            "",
            f"{rows[0]['congestion_control']}, {rows[0]['rounds']} rounds.",
            "",
            "| mover | GB/s | CPU s/GB | send + receive | fraction | exposed s | requests/s |",
            "|---|---|---|---|---|---|---|",
        ]
        parts += [_table_row(row) for row in rows]
        parts.append("")
    if result["absent"]:
        parts += ["## Not measured", ""]
        parts += [f"- `{item['what']}`: {item['reason'].rstrip('.')}.{_how(item)}" for item in result["absent"]]
        parts.append("")
    parts += ["## Bars", "", "| bar | figure | reached |", "|---|---|---|"]
    parts += [f"| {bar['bar']} | {_figure(bar['figure'])} | {VERDICTS[bar['passed']]} |" for bar in result["bars"]]
    return "\n".join(parts) + "\n"


def _table_row(row: Row) -> str:
    return (
        f"| `{row['mover']}` | {row['gb_per_s']:.3f} ({row['gb_per_s_min']:.3f} to {row['gb_per_s_max']:.3f}) "
        f"| {row['cpu_s_per_gb']:.3f} | {row['send_cpu_s_per_gb']:.3f} + {row['receive_cpu_s_per_gb']:.3f} "
        f"| {_figure(row.get('fraction'))} | {row['exposed_s']:.3f} | {_requests(row)} |"
    )


def _requests(row: Row) -> str:
    return f"{row['items_per_s']:,.0f}" if row["workload"].startswith("small") else "-"


def _how(item: Row) -> str:
    return f" To have it: {item['install']}." if item["install"] else ""


def _figure(figure: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3f}"
