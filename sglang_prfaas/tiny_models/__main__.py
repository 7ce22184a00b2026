"""``python -m sglang_prfaas.tiny_models FAMILY DIR``: make a tiny model and print how to serve it on a CPU."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from sglang_prfaas.tiny_models.build import make_tiny_model
from sglang_prfaas.tiny_models.families import FAMILIES, cpu_server_args, cpu_server_env


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_prfaas.tiny_models", description=__doc__)
    parser.add_argument("family", choices=sorted(FAMILIES), metavar="FAMILY", help=", ".join(sorted(FAMILIES)))
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the model is written; kept if complete")
    arguments = parser.parse_args(argv)
    model = make_tiny_model(arguments.family, arguments.directory)
    environment = [f"{name}={shlex.quote(value)}" for name, value in cpu_server_env(arguments.family).items()]
    command = ["python", "-m", "sglang.launch_server", "--model-path", str(model), *cpu_server_args(arguments.family)]
    print(" ".join([*environment, shlex.join(command)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
