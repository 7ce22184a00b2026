"""Workloads and traces. The trace here is synthetic: conversations that grow, in the Mooncake format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler import paper
from sglang_prfaas.simulate.scenario import Scenario, run_policy
from sglang_prfaas.simulate.servers import PrefixCache
from sglang_prfaas.simulate.workload import Arrival, load_trace, poisson, spread, time_scaled, with_burst

TRACE = Path(__file__).parent / "data" / "trace.jsonl"


def test_poisson_has_its_rate_and_lengths() -> None:
    found = poisson(paper.CASE_STUDY_LENGTHS, rate=2.0, output_tokens=7, duration_s=5000, seed=3)
    assert len(found) == pytest.approx(10_000, rel=0.04)
    assert [entry.at_s for entry in found] == sorted(entry.at_s for entry in found)
    assert np.mean([entry.input_tokens for entry in found]) == pytest.approx(27_486, rel=0.03)
    with pytest.raises(ConfigError, match="must be positive"):
        poisson(paper.CASE_STUDY_LENGTHS, rate=0.0, output_tokens=7, duration_s=5)


def test_a_trace() -> None:
    found = load_trace(TRACE)
    assert len(found) == 120
    assert found[0].at_s == 0
    assert all(len(entry.blocks) == entry.input_tokens // 512 for entry in found)
    moved = spread(found, 3.0)
    assert len({entry.at_s for entry in moved}) == 120
    assert time_scaled(found, 2.0)[-1].at_s == pytest.approx(found[-1].at_s / 2)


def test_a_burst_has_prompts_of_its_own() -> None:
    found = load_trace(TRACE)
    burst = with_burst(found, start_s=50, end_s=100, factor=3)
    inside = sum(50 <= entry.at_s < 100 for entry in found)
    assert len(burst) == len(found) + 2 * inside
    blocks = {block for entry in found for block in entry.blocks}
    copies = [entry for entry in burst if entry.blocks and entry.blocks[0] < 0]
    assert len(copies) == 2 * sum(50 <= entry.at_s < 100 and bool(entry.blocks) for entry in found)
    assert all(not blocks & set(entry.blocks) for entry in copies)


def test_wrong_traces_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"timestamp": 1}\n')
    with pytest.raises(ConfigError, match=r"line 2: .*input_length"):
        load_trace(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no request"):
        load_trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_trace(tmp_path / "none")


def test_prefix_cache_forgets_the_oldest() -> None:
    cache = PrefixCache(3)
    cache.insert(Arrival(0, 1024, 1, (1, 2)))
    assert cache.cached_tokens(Arrival(0, 1536, 1, (1, 2, 3))) == 1024
    assert cache.cached_tokens(Arrival(0, 1024, 1, (1, 2))) == 1023, "the last token is always computed"
    cache.insert(Arrival(0, 1024, 1, (8, 9)))
    assert cache.cached_tokens(Arrival(0, 1536, 1, (1, 2, 3))) == 512, "the end of a prompt first"
    assert cache.cached_tokens(Arrival(0, 1536, 1, (8, 9, 3))) == 1024


def test_caches_shorten_what_is_computed() -> None:
    asked = load_trace(TRACE)
    ttft = {}
    for blocks in (0, 10_000):
        scenario = Scenario(
            fleet=paper.case_study_fleet(), slo_tokens_per_s=40.0, n_p=3, t_tokens=19_400, cache_blocks=blocks
        )
        result = run_policy(scenario, "live", asked)
        ttft[blocks] = result.summary().ttft_mean_s
        assert result.summary().failed == 0
    assert ttft[10_000] < ttft[0]
