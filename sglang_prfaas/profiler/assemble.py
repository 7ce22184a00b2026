"""From what was measured to a profile. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from sglang_prfaas.errors import PeerError
from sglang_prfaas.profiler.decode import DecodeRun
from sglang_prfaas.profiler.model_config import ModelFacts
from sglang_prfaas.profiler.prefill import PrefillRun
from sglang_prfaas.profiler.summary import Transfer, bytes_by_tokens, kv_layout, prefill_curve, step_curve
from sglang_prfaas.profiler.targets import Target
from sglang_prfaas.scheduler.profiles import (
    DecodeProfile,
    KvPoint,
    LinkProfile,
    Measurement,
    PrefillProfile,
    ProfileFile,
)


class Made(Struct, frozen=True, kw_only=True):
    """How the figures came about. gpus: of an instance, by hardware, where the servers are not to be believed."""

    date: str
    command: str
    version: str
    gpus: Mapping[str, int]
    seconds: float
    notes: Sequence[str]


class Outcome(Struct, kw_only=True):
    """A profile, and the samples that it was made of."""

    profile: ProfileFile
    prefill_samples: dict[str, dict[int, list[float]]]
    decode_samples: dict[str, dict[str, list[float]]]
    transfers: dict[str, list[Transfer]]


def assemble(
    targets: Sequence[Target],
    facts: ModelFacts,
    *,
    prefill: Mapping[str, tuple[Target, PrefillRun]],
    decode: Mapping[str, tuple[Target, DecodeRun]],
    transfers: dict[str, list[Transfer]],
    links: Sequence[LinkProfile],
    made: Made,
) -> Outcome:
    """The profile of the runs, by hardware. Raises PeerError where S_kv(l) came out of neither config nor transfers."""
    moved = bytes_by_tokens(transfer for found in transfers.values() for transfer in found)
    layout, why = kv_layout(moved, facts.layout)
    if layout is None:
        raise PeerError(f"S_kv(l) is not known: {why}")
    measured = Measurement(
        date=made.date,
        command=made.command,
        version=made.version,
        servers={
            target.name: f"{target.role} of {target.hardware}, SGLang {target.info.version}, "
            f"{target.info.gpus} GPUs or ranks"
            for target in targets
        },
        seconds=round(made.seconds, 1),
        kv=tuple(
            KvPoint(
                tokens=tokens,
                moved_bytes=size,
                config_bytes=facts.layout.size_bytes(tokens) if facts.layout else 0.0,
            )
            for tokens, size in moved.items()
        ),
        kv_origin=why,
        links=tuple(links),
        notes=tuple(made.notes),
    )
    profile = ProfileFile(
        model=targets[0].info.model_name,
        kv=layout,
        prefill={
            hardware: PrefillProfile(
                time_s=prefill_curve(run.points),
                gpus=made.gpus.get(hardware, target.info.gpus),
                origin=_origin(target, made),
                points=tuple(run.points),
            )
            for hardware, (target, run) in prefill.items()
        },
        decode={
            hardware: DecodeProfile(
                step_s=step_curve(run.points),
                gpus=made.gpus.get(hardware, target.info.gpus),
                origin=_origin(target, made),
                points=tuple(run.points),
            )
            for hardware, (target, run) in decode.items()
        },
        measured=measured,
    )
    return Outcome(
        profile=profile,
        prefill_samples={hardware: run.samples for hardware, (_, run) in prefill.items()},
        decode_samples={hardware: run.samples for hardware, (_, run) in decode.items()},
        transfers=transfers,
    )


def _origin(target: Target, made: Made) -> str:
    return f"measured on {target.name}, SGLang {target.info.version}, {made.date.partition('T')[0]}"
