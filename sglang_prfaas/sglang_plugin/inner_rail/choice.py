"""Whether a request's bytes go over the inner rail. Needs no SGLang."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_prfaas.transport.messages import RankInfo


def takes_rail(
    kind: str, site: str, ranks: Sequence[RankInfo], proven_sites: Sequence[str], page_tokens: tuple[int, int] = (0, 0)
) -> bool:
    """Whether all prefill ranks of a request announce the rail `kind` as ranks of `site`, this decode rank's own.

    proven_sites: whose keys the prefill ranks have proved to hold; empty strings where no keys are used. A rank of
    another site that claims to be of this one is not believed. page_tokens: of a page here and there; a rail moves
    whole pages."""
    return (
        page_tokens[0] == page_tokens[1]
        and bool(ranks)
        and all(rank.rail is not None and (rank.rail.kind, rank.rail.site) == (kind, site) for rank in ranks)
        and all(proven in ("", site) for proven in proven_sites)
    )
