"""``python -m tests.sglang.trained_models FAMILY DIR``: make a tiny model, train it, and print how to serve it."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

import torch

from sglang_prfaas.tiny_models import cpu_server_args, cpu_server_env, make_tiny_model

from .checkpoint import save
from .kv_error import items, relative_l2
from .starts import FAMILIES
from .training import LEAST_RIGHT, score, train


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sglang.trained_models", description=__doc__)
    parser.add_argument("family", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the model is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory = make_tiny_model(arguments.family, arguments.directory)
    model = train(arguments.family, directory, print)
    found = score(model)
    print(
        f"{arguments.family}: {found.right:.0%} of the answers are right. A right token's logit is above the next best "
        f"by {found.margin_median:.1f} in the middle, {found.margin_worst:.1f} in the worst hundredth."
    )
    buffers = items(model, prompts=20, seed=1)
    errors = ", ".join(f"{code} {relative_l2(code, buffers):.2e}" for code in ("fp8", "int8"))
    print(f"relative L2 error of its KVCache: {errors}. All in {time.process_time():.0f} CPU seconds.")
    if found.right < LEAST_RIGHT:
        raise SystemExit(f"training did not succeed: less than {LEAST_RIGHT:.0%} of the answers are right")
    save(model, directory)
    environment = [f"{name}={shlex.quote(value)}" for name, value in cpu_server_env(arguments.family).items()]
    options = [*cpu_server_args(arguments.family), "--load-format", "auto"]
    command = ["python", "-m", "sglang.launch_server", "--model-path", str(directory), *options]
    print(" ".join([*environment, shlex.join(command)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
