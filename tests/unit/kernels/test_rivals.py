"""The benchmark's calls of fla-core and SGLang fit the installed versions, so that none fails on the day of a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MAKERS = [
    *("fla_kda", "fla_kda_in_segments", "fla_gdn", "fla_gdn_in_segments", "fla_lightning"),
    *("sglang_kda", "sglang_gdn", "sglang_lightning", "sglang_attention"),
]


@pytest.fixture(scope="module")
def verdicts():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "rival_calls.py")],
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("maker", MAKERS)
def test_arguments_fit_and_the_call_comes_as_far_as_a_launch(verdicts, maker):
    assert set(verdicts) == set(MAKERS)
    verdict = verdicts[maker]
    if "absent" in verdict:
        pytest.skip(verdict["absent"].strip().splitlines()[0])
    assert verdict["wrong"] == []
    assert verdict["reached_a_launch"], verdict["stopped"]
