"""A plugin of SGLang that loses received full-attention KVCache: what a codec decodes becomes zeros.

SGLang finds it by its entry point, in a directory that is put on a server's path. Recurrent state, tokens and
everything else arrive as ever, so that what changes in an answer came from that KVCache."""

from __future__ import annotations

import os
from pathlib import Path

NAME = "prfaas_test_losing"

SOURCE = """
import os

from sglang_prfaas.transport.codec.quantised import Quantised

decode = Quantised.decode


def losing(self, payload, out):
    decode(self, payload, out)
    if os.path.exists(os.environ["PRFAAS_TEST_LOST"]):
        out[:] = 0


def register():
    Quantised.decode = losing
"""


def environment(directory: Path, lost: Path) -> dict[str, str]:
    """Write the plugin; what a server's environment needs to load it. It loses while the file `lost` exists."""
    notes = directory / f"{NAME}-1.dist-info"
    notes.mkdir(parents=True)
    (directory / f"{NAME}.py").write_text(SOURCE)
    (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n")
    (notes / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{NAME} = {NAME}:register\n")
    path = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PRFAAS_TEST_LOST": str(lost)}
