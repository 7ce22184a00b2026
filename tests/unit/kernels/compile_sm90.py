"""Compiles the kernels for sm_90 without a GPU; prints registers, spilled bytes and shared memory of each as JSON.

Run with TRITON_INTERPRET=0. ``--write`` puts the figures of the installed Triton into ``sm90_table.json``.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from prfaas_kernels.common.delta_solve import delta_solve_kernel
from prfaas_kernels.common.scalar_prep import scalar_prep_kernel
from prfaas_kernels.common.segment_scan import segment_merge_kernel, segment_pass_kernel
from prfaas_kernels.common.state_scan import state_scan_kernel
from prfaas_kernels.common.tuning import DEFAULT
from prfaas_kernels.full_attention.kernel import prefill_attention_kernel
from prfaas_kernels.full_attention.prefill import plan_blocks, split_width
from prfaas_kernels.kda.prep import kda_prep_kernel
from prfaas_kernels.kv_pack.codec import LARGEST, TINY
from prfaas_kernels.kv_pack.copy_rows import copy_rows_kernel
from prfaas_kernels.kv_pack.quantise import dequantise_rows_kernel, quantise_rows_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE = Path(__file__).with_name("sm90_table.json")
VERSION = ".".join(triton.__version__.split(".")[:2])

HALF, FULL, INDEX, LONG, BYTE = "*bf16", "*fp32", "*i32", "*i64", "*u8"
POINTERS = {
    **dict.fromkeys(
        (
            "q",
            "k",
            "g",
            "beta",
            "v",
            "qg",
            "kg",
            "ke",
            "w",
            "u",
            "scores",
            "scores_out",
            "o",
            "kind",
            "k_pool",
            "v_pool",
        ),
        HALF,
    ),
    **dict.fromkeys(("a_log", "dt_bias", "lower", "lower_out", "decay", "pool", "maps", "starts", "scales"), FULL),
    **dict.fromkeys(("table", "cu_seqlens", "strong", "slots", "first", "segments", "first_segment"), INDEX),
    **dict.fromkeys(("indices", "packed", "page_table", "prefix_lens"), INDEX),
    **dict.fromkeys(("addresses", "strides"), LONG),
    "codes": BYTE,
}
COUNTS = ("heads", "segment_chunks", "rows", "units", "groups", "row_units", "scales_word")
NUMBERS = {**dict.fromkeys(COUNTS, "i32"), "scale": "fp32", "lower_bound": "fp32", "factor": "fp32"}
STRIDE = re.compile(r".*_[thskvn]$")
SHAPE = {"K": 128, "V": 128, "C": 64, "GROUP": 1, "DOT": "bf16", "PREC": "tf32"}
PREP = {"BK": DEFAULT.prep_block, "L2NORM": True}
KDA = {**SHAPE, **PREP, "GATE": 1, "HAS_BIAS": True, "RAW_BETA": True, "SPAN": 112.0}
SOLVE = {**SHAPE, "BLOCK": DEFAULT.solve_block, "RAW_BETA": True, "MERGE_PREC": "tf32"}
SCAN = {
    **SHAPE,
    "BV": DEFAULT.scan_block,
    "STAGES": DEFAULT.scan_stages,
    "HAS_WARM": False,
    "STORE_STATE": True,
    "KEEP_STARTS": False,
    "TRACK": False,
    "TRACK_SLOTS": False,
    "SEGMENTED": False,
}
SERIAL = ("segments", "starts")
PASS = {**SHAPE, "BV": DEFAULT.scan_block, "STAGES": DEFAULT.scan_stages}
MERGE = {**SHAPE, "BV": DEFAULT.scan_block, "HAS_WARM": False, "MERGE_PREC": "tf32"}
LATENTS = {"WIDTH": 576, "BLOCK": 1024, "GROUPS": 2, "UNIT": 16}
TO_INT8 = {**LATENTS, "LARGEST": LARGEST[torch.int8], "TINY": TINY, "INT8": True}
TO_FLOAT8 = {**TO_INT8, "LARGEST": LARGEST[torch.float8_e4m3fn], "INT8": False}
ROW_OPTIONS = {"num_warps": 4}
PREP_OPTIONS = {"num_warps": DEFAULT.prep_warps, "num_stages": DEFAULT.prep_stages}
MERGE_OPTIONS = {"num_warps": DEFAULT.merge_warps, "num_stages": 1}
SCAN_OPTIONS = {"num_warps": DEFAULT.scan_warps, "num_stages": DEFAULT.scan_stages}


def attention(width, value_width, group, *, page, shared=False):
    """A row of :data:`KERNELS`: prefill attention with a prefix, heads of K = ``width`` and V = ``value_width``."""
    blocks = plan_blocks(DEFAULT, torch.bfloat16, group=group, value_width=value_width)
    main, extra = split_width(width)
    constants = {
        "GROUP": group,
        "HEADS": blocks.heads,
        "TOKENS": blocks.tokens,
        "ROWS": blocks.rows,
        "KEYS": blocks.keys,
        "PAGE": page,
        "MAIN": main,
        "EXTRA": extra,
        "V": value_width,
        "SHARED": shared,
        "PREFIX": True,
        "DOT": "bf16",
        "PREC": "tf32",
        "STAGES": blocks.stages,
    }
    options = {"num_warps": DEFAULT.attention_warps, "num_stages": blocks.stages}
    return prefill_attention_kernel, constants, (), options


#: name -> (kernel, constexpr arguments, pointers that are None, launch options)
KERNELS = {
    "kda_prep_mild": (
        kda_prep_kernel,
        {**KDA, "STRONG": False},
        (),
        {**PREP_OPTIONS, "maxnreg": DEFAULT.prep_max_registers},
    ),
    "kda_prep_strong": (kda_prep_kernel, {**KDA, "STRONG": True}, (), PREP_OPTIONS),
    "delta_solve": (delta_solve_kernel, SOLVE, (), {"num_warps": DEFAULT.solve_warps}),
    "state_scan": (state_scan_kernel, {**SCAN, "HAS_W": True}, SERIAL, SCAN_OPTIONS),
    "state_scan_lightning": (state_scan_kernel, {**SCAN, "HAS_W": False}, ("w", *SERIAL), SCAN_OPTIONS),
    "state_scan_segments": (state_scan_kernel, {**SCAN, "HAS_W": True, "SEGMENTED": True}, (), SCAN_OPTIONS),
    "segment_pass": (segment_pass_kernel, {**PASS, "HAS_W": True}, (), SCAN_OPTIONS),
    "segment_pass_lightning": (segment_pass_kernel, {**PASS, "HAS_W": False}, ("w",), SCAN_OPTIONS),
    "segment_merge": (segment_merge_kernel, {**MERGE, "HAS_W": True}, ("warm",), MERGE_OPTIONS),
    "gdn_prep": (scalar_prep_kernel, {**SHAPE, **PREP, "DELTA": True, "FIXED": False}, (), PREP_OPTIONS),
    "lightning_prep": (
        scalar_prep_kernel,
        {**SHAPE, **PREP, "DELTA": False, "FIXED": True, "L2NORM": False},
        ("beta", "ke", "lower_out"),
        PREP_OPTIONS,
    ),
    "attention_gqa": attention(128, 128, 8, page=64),
    "attention_mla": attention(192, 128, 1, page=1),
    "attention_mla_absorbed": attention(576, 512, 32, page=64, shared=True),
    "pack_rows": (copy_rows_kernel, {"BLOCK": 4096, "UNIT": 4, "GATHER": True}, (), {"num_warps": 8}),
    "unpack_rows": (copy_rows_kernel, {"BLOCK": 4096, "UNIT": 4, "GATHER": False}, (), {"num_warps": 8}),
    "quantise_int8": (quantise_rows_kernel, TO_INT8, (), ROW_OPTIONS),
    "quantise_float8": (quantise_rows_kernel, TO_FLOAT8, (), ROW_OPTIONS),
    "dequantise_int8": (dequantise_rows_kernel, {**LATENTS, "INT8": True}, (), ROW_OPTIONS),
    "dequantise_float8": (dequantise_rows_kernel, {**LATENTS, "INT8": False}, (), ROW_OPTIONS),
}
#: These multiply no matrices, and move 16 bytes at a time.
ROWS = ("pack_rows", "unpack_rows", "quantise_int8", "quantise_float8", "dequantise_int8", "dequantise_float8")


def signature_of(kernel, constants, absent):
    """Types by argument; strides as runtime int32, the innermost dimension assumed contiguous as on the GPU."""
    names, signature, values = kernel.arg_names, {}, {}
    for index, name in enumerate(names):
        if name in POINTERS and name not in absent:
            signature[name] = POINTERS[name]
        elif name in NUMBERS or (STRIDE.match(name) and name not in POINTERS):
            signature[name] = NUMBERS.get(name, "i32")
        else:
            signature[name] = "constexpr"
            values[(index,)] = constants.get(name)
    # What the launcher finds by itself: addresses and strides divisible by 16.
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or (STRIDE.match(n) and n in signature)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[names[i]] != "constexpr"}
    return ASTSource(kernel, signature, values, attributes)


def measure(name):
    """Registers per thread, bytes spilled, shared memory per program in bytes, whether wgmma is used."""
    kernel, constants, absent, options = KERNELS[name]
    source = signature_of(kernel, constants, absent)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)),
        "shared_bytes": built.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "wide_access": bool(re.search(r"(ld|st)\.global[.\w:]*\.v4\.b32", ptx)),
    }


def main():
    figures = {name: measure(name) for name in KERNELS}
    if "--write" in sys.argv:
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        table[VERSION] = figures
        TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    print(json.dumps({"triton": VERSION, "kernels": figures, "rows": ROWS}))


if __name__ == "__main__":
    main()
