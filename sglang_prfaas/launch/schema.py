"""`launch schema`: the JSON Schema of the configuration files."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec

from sglang_prfaas.config.schema import RouterConfig, SiteConfig

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch schema`."""
    parser.add_argument(
        "kind", nargs="?", choices=("site", "router"), help="which file (default: a schema that takes either)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the schema; returns 0."""
    print(json.dumps(json_schema(args.kind), indent=2))
    return 0


def json_schema(kind: str | None) -> dict[str, Any]:
    """The JSON Schema of a site's file, of a router's, or of either."""
    if kind == "site":
        return {"$schema": _DIALECT, **msgspec.json.schema(SiteConfig)}
    if kind == "router":
        return {"$schema": _DIALECT, **msgspec.json.schema(RouterConfig)}
    (site, router), components = msgspec.json.schema_components(
        (SiteConfig, RouterConfig), ref_template="#/$defs/{name}"
    )
    return {"$schema": _DIALECT, "oneOf": [site, router], "$defs": components}
