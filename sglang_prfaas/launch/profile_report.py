"""The tables of `launch profile`."""

from __future__ import annotations

from sglang_prfaas.launch.tables import table
from sglang_prfaas.scheduler.profiles import ProfileFile
from sglang_prfaas.scheduler.throughput import kv_throughput_gbps


def print_report(profile: ProfileFile, file: str) -> None:
    """What was measured, and what to do with it."""
    measured = profile.measured
    assert measured is not None
    print(f"{profile.model}, measured {measured.date} in {measured.seconds:g} s\n")
    print(_prefill_table(profile))
    if profile.decode:
        print(f"\n{_decode_table(profile)}")
    kv = profile.kv
    print(f"\nKVCache: {kv.full_bytes_per_token:.0f} B/token", end="")
    if kv.window_tokens:
        print(f", {kv.window_bytes_per_token:.0f} B/token in a window of {kv.window_tokens}", end="")
    print(f", {kv.state_bytes:.0f} B fixed ({measured.kv_origin})")
    for point in measured.kv:
        config = f", config.json says {point.config_bytes:.0f}" if point.config_bytes else ""
        print(f"  {point.tokens} tokens: {point.moved_bytes:.0f} B moved{config}")
    for link in measured.links:
        print(
            f"link {link.from_site} to {link.to_site}: {link.gbps:.3g} Gbps for {_count(link.at_once)} of "
            f"{link.tokens} tokens, round trip {link.rtt_ms:.2f} ms"
        )
    for note in measured.notes:
        print(f"note: {note}")
    print(f"\nwritten to {file}")
    print("\n".join(_next_steps(profile, file)))


def _prefill_table(profile: ProfileFile) -> str:
    rows = []
    for hardware, measured in profile.prefill.items():
        for point in measured.points:
            seconds = measured.time_s.at(point.x)
            rows.append(
                (
                    hardware,
                    f"{point.x:.0f}",
                    f"{point.median_s * 1e3:.1f}",
                    f"{point.spread_s * 1e3:.1f}",
                    f"{point.repeats}" + (f" (-{point.outliers})" if point.outliers else ""),
                    f"{seconds * 1e3:.1f}",
                    measured.time_s.interpolation,
                    f"{point.x / point.median_s:.0f}",
                    f"{kv_throughput_gbps(profile.kv.size_bytes(point.x), point.median_s):.3g}",
                )
            )
    head = ("prefill", "tokens", "median ms", "spread ms", "repeats", "curve ms", "", "tokens/s", "KV Gbps")
    return table(head, rows)


def _decode_table(profile: ProfileFile) -> str:
    rows = []
    for hardware, measured in profile.decode.items():
        for point in measured.points:
            rows.append(
                (
                    hardware,
                    f"{point.context_tokens}",
                    f"{point.x:.0f}",
                    f"{point.median_s * 1e3:.2f}",
                    f"{point.spread_s * 1e3:.2f}",
                    f"{point.repeats}" + (f" (-{point.outliers})" if point.outliers else ""),
                    f"{point.x / point.median_s:.0f}",
                )
            )
    return table(("decode", "context", "streams", "step ms", "spread ms", "repeats", "tokens/s"), rows)


def _next_steps(profile: ProfileFile, file: str) -> list[str]:
    both = [hardware for hardware in profile.decode if hardware in profile.prefill]
    if not both:
        return ["`launch plan` needs prefill and decode curves of one hardware, the PD site's; profile that site, too"]
    pd = both[0]
    far = next((hardware for hardware in profile.prefill if hardware != pd), pd)
    flags = f"--profile {file} --prfaas-hardware {far} --pd-hardware {pd}"
    flags += f" --prfaas-gpus {profile.prefill[far].gpus} --pd-gpus {2 * profile.prefill[pd].gpus}"
    assert profile.measured is not None
    for link in profile.measured.links[:1]:
        flags += f" --link-gbps {link.gbps:.3g} --rtt-ms {link.rtt_ms:.3g}"
    return [f"next: python -m sglang_prfaas.launch plan {flags}"]


def _count(at_once: int) -> str:
    return "one transfer" if at_once == 1 else f"{at_once} transfers at once"
