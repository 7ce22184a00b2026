"""Every model family over prfaas: local and remote, several prefill chunks, a decode with radix cache, or with other
pages than prefill."""

from __future__ import annotations

import pytest

from sglang_prfaas.launch.local_deployment import Choices

from . import prefill_by_prfaas
from .driving import Driver, words

pytestmark = pytest.mark.sglang

RADIX = ("--disaggregation-decode-enable-radix-cache",)
FAMILIES = [
    Choices(
        family="qwen3",
        chunk_tokens=512,
        prefill_args=("--page-size", "64"),
        decode_args=(*RADIX, "--page-size", "16"),
    ),
    Choices(family="qwen3-next", chunk_tokens=512, decode_args=RADIX, prefill_args=prefill_by_prfaas.BACKEND),
    Choices(family="swa", chunk_tokens=512),
    Choices(
        family="ring",
        chunk_tokens=512,
        prefill_args=prefill_by_prfaas.BACKEND,
        decode_args=("--page-size", "16"),
    ),
]
LINEAR_ATTENTION = {"qwen3-next": "gdn", "ring": "lightning"}


@pytest.mark.parametrize("family_cluster", FAMILIES, indirect=True, ids=lambda choices: choices.family)
def test_family(family_cluster: Driver) -> None:
    cluster = family_cluster
    for count, route in ((5, "local"), (100, "local"), (700, "prfaas")):
        prompt = words(f"family-{count}", count)
        answer = cluster.ask(prompt)
        cluster.assert_equal(answer, prompt)
        assert answer.routing["route"] == route
    choices = cluster.cluster.deployment.choices
    if RADIX[0] in choices.decode_args:
        _only_the_suffix_is_sent(cluster)
    if choices.prefill_args == prefill_by_prfaas.BACKEND:
        prefill_by_prfaas.check(cluster, LINEAR_ATTENTION[choices.family])


def _only_the_suffix_is_sent(cluster: Driver) -> None:
    """Decode has a prefix of the prompt in its radix cache: prefill sends the pages after it, and no others."""
    start = words("turn one", 300)
    first = cluster.ask(start)
    cluster.assert_equal(first, start)
    longer = start + first.text + " " + words("turn two", 40)
    second = cluster.ask(longer)
    cluster.assert_equal(second, longer)
    one, two = cluster.received(first), cluster.received(second)
    assert one.cached_prefix_tokens == 0
    assert two.cached_prefix_tokens > 0, "decode found nothing in its radix cache"
    assert two.pages < one.pages / 2, "pages of the cached prefix crossed again"
    assert two.bytes < one.bytes
