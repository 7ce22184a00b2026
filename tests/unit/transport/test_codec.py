"""Codecs of full-attention KVCache: bits, errors, bounds, and what a session uses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from prfaas_kernels.kv_pack.codec import encode_rows

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.codec.base import ELEMENT_BYTES, Codec
from sglang_prfaas.transport.codec.quantised import BLOCK_ELEMENTS, Quantised, group_width
from sglang_prfaas.transport.codec.session import RAW, CodecChoice, SessionCodec, obstacle, offered
from sglang_prfaas.transport.codec.shuffled import Shuffled
from sglang_prfaas.transport.framing import ChunkHeader, pack_header, unpack_header
from sglang_prfaas.transport.layout import Component, Layout

CODECS = ("shuffle", "fp8", "int8")
LARGEST_ERROR = {"fp8": 0.04, "int8": 0.01, "shuffle": 0.0}


def layout(dtype: str = "bfloat16", items: tuple[int, ...] = (2304, 256), kv_format: str = "") -> Layout:
    return Layout("m", dtype, 1, 1, kv_format, (0,), (Component("kv", items), Component("mamba", (64,))))


def make(name: str, dtype: str, item_bytes: int) -> Codec:
    return Shuffled(dtype, item_bytes) if name == "shuffle" else Quantised(name, dtype, item_bytes)


def values(items: int, item_bytes: int, dtype: str, seed: int = 0) -> npt.NDArray[np.uint8]:
    generator = torch.Generator().manual_seed(seed)
    elements = item_bytes // ELEMENT_BYTES[dtype]
    return torch.randn(items, elements, generator=generator).to(getattr(torch, dtype)).view(torch.uint8).numpy()


def as_floats(data: npt.NDArray[np.uint8], dtype: str) -> torch.Tensor:
    return torch.from_numpy(data).view(getattr(torch, dtype)).float()


@pytest.mark.parametrize("dtype", ELEMENT_BYTES)
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("items", [1, 3, 300])
def test_round_trip(name: str, dtype: str, items: int) -> None:
    item_bytes = 576 * ELEMENT_BYTES[dtype]
    codec = make(name, dtype, item_bytes)
    raw = values(items, item_bytes, dtype)
    payload = codec.encode(raw)
    assert payload is not None
    assert codec.least_bytes(items) <= len(payload) <= codec.most_bytes(items) < raw.nbytes
    out = np.full_like(raw, 0xEE)
    codec.decode(payload, out)
    given_, found = as_floats(raw, dtype), as_floats(out, dtype)
    assert ((found - given_).norm() / given_.norm()).item() <= LARGEST_ERROR[name]
    again = codec.encode(raw)
    assert again is not None
    assert again.tobytes() == payload.tobytes()
    from_tensor = codec.encode(torch.from_numpy(raw))
    assert from_tensor is not None
    assert from_tensor.tobytes() == payload.tobytes()


def test_blocks_change_nothing() -> None:
    items, width = 3 * BLOCK_ELEMENTS // 4096 + 1, 128
    raw = values(items, 8192, "bfloat16")
    rows = torch.from_numpy(raw).view(torch.bfloat16)
    for name, code in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        payload = Quantised(name, "bfloat16", 8192).encode(raw)
        assert payload is not None
        assert payload.tobytes() == encode_rows(rows, width=width, code=code).numpy().tobytes()


@pytest.mark.parametrize(
    ("elements", "width"),
    [(4096, 128), (576, 64), (80, 80), (96, 96), (48, 48), (320, 64), (127, 127), (131, 0), (8, 0)],
)
def test_group_width(elements: int, width: int) -> None:
    assert group_width(elements) == width


def test_an_eighth_of_a_scale_is_lost_at_most() -> None:
    """MLA latents, GQA heads: at least 1.8 times fewer bytes."""
    for elements in (576, 80 * 16, 128, 8 * 128, 64 * 576):
        codec = Quantised("fp8", "bfloat16", 2 * elements)
        assert 2 * elements / codec.most_bytes(1) >= 1.8


def test_noise_is_not_compressed() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 1024), dtype=np.uint8)
    assert Shuffled("float16", 1024).encode(noise) is None


def test_infinities_and_nan_stay_in_their_group() -> None:
    raw = values(2, 512, "float32")
    raw[0, :4] = np.frombuffer(np.float32(np.inf).tobytes(), np.uint8)
    codec = Quantised("fp8", "float32", 512)
    payload = codec.encode(raw)
    assert payload is not None
    out = np.empty_like(raw)
    codec.decode(payload, out)
    found = as_floats(out, "float32")
    assert bool(found[0].isnan().all())
    assert bool(found[1].isfinite().all())


@pytest.mark.parametrize("name", CODECS)
@given(data=st.binary(min_size=1, max_size=600))
def test_any_payload_fills_its_items_or_is_refused(name: str, data: bytes) -> None:
    codec = make(name, "bfloat16", 256)
    memory = np.full((4, 256), 0xEE, np.uint8)
    try:
        codec.decode(np.frombuffer(data, np.uint8), memory[1:3])
    except ProtocolError:
        pass
    assert (memory[[0, 3]] == 0xEE).all()


@pytest.mark.parametrize("size", [511, 513, 1 << 40])
def test_a_frame_of_another_size_is_refused_before_it_is_decompressed(size: int) -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(512))
    header_and_size = b"\x28\xb5\x2f\xfd" + b"\xc0" + b"\x00" + size.to_bytes(8, "little")
    assert zstandard.frame_content_size(header_and_size + frame[6:]) == size
    with pytest.raises(ProtocolError, match=f"says that it has {size} bytes, expected 512"):
        Shuffled("float16", 256).decode(
            np.frombuffer(header_and_size + frame[6:], np.uint8), np.empty((2, 256), np.uint8)
        )


def test_a_frame_that_says_no_size_or_is_followed_by_something_is_refused() -> None:
    sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(512))
    whole = zstandard.ZstdCompressor().compress(bytes(512))
    for frame in (sizeless, whole + b"x", whole[:-1], b"", b"no frame"):
        with pytest.raises(ProtocolError):
            Shuffled("float16", 256).decode(np.frombuffer(frame, np.uint8), np.empty((2, 256), np.uint8))


@pytest.mark.parametrize("name", CODECS)
def test_where_an_encoded_chunk_belongs(name: str) -> None:
    codec = SessionCodec(name, layout())
    first = codec.of(0, 0)
    assert first is not None
    header = ChunkHeader(7, 0, 0, 5, first.most_bytes(3), items=3)
    place = codec.place(unpack_header(pack_header(header)), 1 << 20)
    assert place.codec is first
    assert place.header == ChunkHeader(7, 0, 0, 5 * 2304, 3 * 2304)
    plain = ChunkHeader(7, 1, 0, 5, 9)
    assert codec.place(plain, 1 << 20).header is plain


@pytest.mark.parametrize("name", CODECS)
def test_encoded_chunks_that_cannot_be_are_refused(name: str) -> None:
    codec = SessionCodec(name, layout())
    first = codec.of(0, 0)
    assert first is not None
    good = first.least_bytes(3)
    wrong = [
        ChunkHeader(7, 1, 0, 0, good, items=3),
        ChunkHeader(7, 0, 2, 0, good, items=3),
        ChunkHeader(7, 0, 0, 0, first.most_bytes(3) + 1, items=3),
        ChunkHeader(7, 0, 0, 0, first.least_bytes(3) - 1, items=3),
        ChunkHeader(7, 0, 0, 0, 1 << 20, items=2**32 - 1),
        ChunkHeader(7, 0, 0, 0, good, items=1000),
    ]
    for header in wrong:
        with pytest.raises(ProtocolError):
            codec.place(header, 1 << 20)
    with pytest.raises(ProtocolError, match="has no codec in this session"):
        SessionCodec().place(ChunkHeader(7, 0, 0, 0, good, items=3), 1 << 20)


def test_no_items_are_refused() -> None:
    head = pack_header(ChunkHeader(7, 0, 0, 1, 9, items=1 << 32))
    with pytest.raises(ProtocolError, match="no items"):
        unpack_header(head)


@pytest.mark.parametrize(
    ("codec", "of", "offers", "chunk_bytes", "why"),
    [
        ("fp8", layout("fp8_e4m3"), CODECS, 1 << 20, "dtype is fp8_e4m3"),
        ("fp8", layout(), ("shuffle",), 1 << 20, "decode takes shuffle"),
        ("fp8", layout(), (), 1 << 20, "decode takes none"),
        ("shuffle", layout(), CODECS, 2303, "a page has 2304 bytes, a chunk at most 2303"),
        ("int8", layout(items=(2 * 131,)), CODECS, 1 << 20, "cannot be put into groups"),
        ("shuffle", layout(items=(2 * 131,)), CODECS, 1 << 20, ""),
        ("shuffle", layout(items=(3,)), CODECS, 1 << 20, "cannot be put into groups"),
        ("int8", layout(kv_format="vllm"), CODECS, 1 << 20, "byte layout is vllm"),
        ("fp8", layout(), CODECS, 2304, ""),
        ("fp8", layout(items=(0, 256)), CODECS, 1 << 20, ""),
    ],
)
def test_obstacles(codec: str, of: Layout, offers: tuple[str, ...], chunk_bytes: int, why: str) -> None:
    found = obstacle(codec, of, offers, chunk_bytes)
    assert why in found
    assert bool(why) == bool(found)


def test_a_codec_without_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "prfaas_kernels" else object())
    assert offered("all") == ("shuffle",)
    assert obstacle("fp8", layout(), CODECS, 1 << 20) == "Python's module prfaas_kernels is not installed here"


def test_offers_and_choices() -> None:
    assert offered("all") == CODECS
    assert offered("lossless") == ("shuffle",)
    assert offered("none") == ()
    choice = CodecChoice("fp8", {"far": "int8", "near": RAW})
    assert [choice.of(site) for site in ("far", "near", "other", "")] == ["int8", RAW, "fp8", "fp8"]
    assert CodecChoice().of("far") == RAW
