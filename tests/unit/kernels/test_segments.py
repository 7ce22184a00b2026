"""When the scan runs in segments, and that it says why."""

import logging

import pytest
from prfaas_kernels.common import segments
from prfaas_kernels.common.tuning import DEFAULT


def plan(tokens, heads, *, sequences=1, longest=None, **settings):
    return segments.plan_segments(
        tokens=tokens,
        sequences=sequences,
        heads=heads,
        blocks=4,
        slots=segments.H200_MULTIPROCESSORS,
        settings=DEFAULT._replace(**settings),
        longest=longest,
    )


@pytest.mark.parametrize(
    ("tokens", "heads", "chunks"),
    [
        (32768, 32, 0),  # 128 programs fill the GPU as they are
        (131072, 32, 0),
        (131072, 16, 0),  # two segments would not pay for their extra pass
        (8192, 4, 0),  # too short
        (32768, 8, 128),
        (65536, 4, 128),
        (131072, 8, 512),
        (32768, 1, 16),
    ],
)
def test_few_heads_and_long_sequences_are_cut(tokens, heads, chunks):
    assert plan(tokens, heads).chunks == chunks


def test_segments_of_one_long_sequence_fill_the_gpu_once():
    for heads in (1, 2, 4, 8):
        for tokens in (32768, 65536, 131072, 1 << 20):
            chunks = plan(tokens, heads).chunks
            assert -(-tokens // 64 // chunks) * heads * 4 <= segments.H200_MULTIPROCESSORS


def test_a_batch_counts_as_a_whole_and_its_longest_sequence_decides():
    assert plan(8 * 16384, 4, sequences=8).chunks == 0
    assert plan(8 * 16384, 4, sequences=8, longest=20000).chunks == 0
    assert plan(8 * 16384, 4, sequences=8, longest=100000).chunks == 256
    assert plan(32 * 32768, 4, sequences=32).chunks == 0


def test_thresholds_come_from_the_settings():
    assert plan(8192, 4, segment_min_tokens=4096).chunks == 16
    assert plan(131072, 16, segment_ratio=2.0).chunks == 1024
    assert plan(32768, 1, segment_step=4).chunks == 16


def test_the_reason_is_logged_once_at_info(caplog, monkeypatch):
    monkeypatch.setattr(segments, "_seen", set())
    with caplog.at_level(logging.DEBUG, logger=segments.__name__):
        for tokens in (32768, 65536):
            segments.log_plan("kda", 8, plan(tokens, 8))
        segments.log_plan("kda", 8, plan(64, 8))
    assert [record.levelname for record in caplog.records] == ["INFO", "DEBUG", "INFO"]
    assert caplog.records[0].getMessage() == (
        "kda scans in segments: a chain of 512 chunks against segments of 128 (8 heads, 132 programs at once): at least"
        " 3.0 times"
    )
    assert "serially: the longest sequence has 64 tokens, under 32768" in caplog.records[2].getMessage()
