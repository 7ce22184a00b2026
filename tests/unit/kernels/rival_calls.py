"""Holds the benchmark's calls of fla-core and SGLang against the installed versions; prints what differs as JSON.

Without a GPU: a call goes through its function's own checks as far as the first launch. Run with TRITON_INTERPRET=0.
"""

import inspect
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "kernels" / "bench"))

import rivals
import torch
from arms import make_case

#: Of fla-core's KDA: named in its text, not in its signature.
PASSED_ON = ("A_log", "dt_bias")
NO_GPU = ("active driver", "torch.cpu", "CUDA", "only supported on sm90")


def verdict(maker, *inputs):
    """``absent``, ``wrong`` (names that the function does not take, or lacks) or ``stopped``: what ended the call."""
    try:
        call = maker(*inputs)
    except ImportError as error:
        return {"absent": str(error)}
    function = inspect.unwrap(call.function)
    parameters = inspect.signature(function).parameters.values()
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    text = inspect.getsource(function)
    known |= {name for name in PASSED_ON if f'"{name}"' in text or f"'{name}'" in text}
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    wrong = sorted(set(call.arguments) - known) + sorted(needed - set(call.arguments))
    try:
        call.restore()
        call.as_arm().run()
        stopped = None
    except Exception as error:  # noqa: BLE001  (whatever ended it is the verdict)
        stopped = rivals.brief(error)
    ran = stopped is None or any(mark in stopped for mark in NO_GPU)
    return {"wrong": wrong, "stopped": stopped, "reached_a_launch": ran}


@torch.inference_mode()
def main():
    case = make_case(200, 2, [130, 70], "cpu")
    verdicts = {maker.__name__: verdict(maker, case) for makers in rivals.RIVALS.values() for maker in makers}
    q, k, v = (torch.randn(70, heads, 128, dtype=torch.bfloat16) for heads in (4, 2, 2))
    marks = torch.tensor([0, 70], dtype=torch.int32)
    verdicts["sglang_attention"] = verdict(rivals.sglang_attention, q, k, v, marks, 70)
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main()
