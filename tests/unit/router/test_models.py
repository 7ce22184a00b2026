"""Names of models and adapters, and which servers a request with an adapter may go to."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from sglang_prfaas.config.schema import RouterConfig, RouterSection, RouterSite, TargetConfig
from sglang_prfaas.core.request import RequestView
from sglang_prfaas.http import Client, HttpError
from sglang_prfaas.router.body import parse_body
from sglang_prfaas.router.models import Models
from sglang_prfaas.router.registry import Registry, Target
from sglang_prfaas.router.tenancy import permitted

LOADED = {"p": {"red", "blue"}, "l": {"red"}, "d": {"red", "blue"}}


def known() -> tuple[Models, Registry, dict[str, Target]]:
    """A router that has the lists of a prefill server in each site and of a decode server."""
    url = "http://127.0.0.1:2"
    far = [TargetConfig(name="p", role="prefill", url=url, bootstrap_port=3)]
    home = [
        TargetConfig(name="l", role="prefill", url=url, bootstrap_port=3),
        TargetConfig(name="d", role="decode", url=url),
    ]
    sites = [RouterSite(name="far", role="prfaas", servers=far), RouterSite(name="home", role="pd", servers=home)]
    config = RouterConfig(router=RouterSection(model="/models/tiny", port=1), sites=sites)

    async def make() -> Registry:
        return Registry(config, Client())

    registry = asyncio.run(make())
    targets = {target.name: target for target in registry.targets()}
    for name, target in targets.items():
        target.healthy = True
        target.models, target.adapters = frozenset({"tiny"}), frozenset(LOADED[name])
        target.alive = True
    return Models(("", "/models/tiny"), registry, now_s=lambda: 0.0, timeout_s=1.0), registry, targets


def wanted(models: Models, **fields: object) -> tuple[frozenset[str], str | None]:
    """The adapters of a request, and what goes into its `lora_path`."""
    models._refreshed_s = 0.0  # nobody answers here
    body = parse_body("completions", msgspec.json.encode({"prompt": "a", **fields}))
    return asyncio.run(models.select(body)), body.lora_path


@pytest.mark.parametrize("model", [None, "tiny", "/models/tiny", "default"])
def test_names_of_the_base_model(model: str | None) -> None:
    models, _, _ = known()
    assert wanted(models, model=model) == (frozenset(), None)
    assert wanted(models, model=model, lora_path="red") == (frozenset({"red"}), None)
    assert wanted(models, model=model, lora_path=["red", None, "blue"]) == (frozenset({"red", "blue"}), None)


@pytest.mark.parametrize("model", ["red", "tiny:red", "/models/tiny:red", "default: red "])
def test_names_that_select_an_adapter(model: str) -> None:
    models, _, _ = known()
    assert wanted(models, model=model) == (frozenset({"red"}), "red")
    assert wanted(models, model=model, lora_path="red") == (frozenset({"red"}), None)
    with pytest.raises(HttpError, match="selects the LoRA adapter 'red', lora_path another, 'blue'"):
        wanted(models, model=model, lora_path="blue")


@pytest.mark.parametrize("model", ["gpt", "", "red:blue", "tiny:"])
def test_names_that_are_not_served(model: str) -> None:
    models, _, _ = known()
    with pytest.raises(HttpError) as refused:
        wanted(models, model=model)
    assert refused.value.status == 404
    assert refused.value.message == f"The model {model!r} does not exist; served here: /models/tiny, blue, red, tiny."


def test_adapters_that_are_not_loaded() -> None:
    models, _, targets = known()
    for fields in ({"model": "tiny:green"}, {"lora_path": "green"}, {"lora_path": ["red", "green"]}):
        with pytest.raises(HttpError, match="The LoRA adapter 'green' is not loaded; loaded: blue, red"):
            wanted(models, **fields)
    targets["d"].models = None  # it has just come up, and may have it
    assert wanted(models, lora_path="green") == (frozenset({"green"}), None)


def test_ids_of_adapters() -> None:
    """As agents tell them."""
    models, _, targets = known()
    assert models.adapter_id("red") is None
    targets["l"].adapter_ids = {"red": "1"}
    assert models.adapter_id("red") == "1"
    targets["p"].adapter_ids = {"red": "1", "blue": "2"}
    assert (models.adapter_id("red"), models.adapter_id("blue")) == ("1", "2")


def test_other_weights_under_the_same_name_are_another_adapter() -> None:
    """Prefill by one and decode by the other would give tokens of neither. What decode servers have is in force."""
    models, _, targets = known()
    for name, told in (("p", "old"), ("l", "new"), ("d", "new")):
        targets[name].adapter_ids = {"red": told}
    assert models.adapter_id("red") == "new"
    assert models.servers(frozenset({"red"})) == frozenset({("home", "l"), ("home", "d")})
    targets["p"].adapter_ids = {}  # started anew, and not asked yet
    assert models.servers(frozenset({"red"})) is None


def test_an_extra_key_cannot_pass_for_an_adapter() -> None:
    models, _, targets = known()
    targets["p"].adapter_ids = {"red": "abc123"}
    for key in ("abc123", "mine-abc123", ["x", "abc123"]):
        with pytest.raises(HttpError, match="extra_key ends with the id of a LoRA adapter"):
            wanted(models, extra_key=key)
    for fields in ({"extra_key": "abc1234"}, {"extra_key": ["x"]}, {"extra_key": "abc123", "lora_path": "red"}):
        wanted(models, **fields)


def test_servers_of_adapters() -> None:
    models, registry, targets = known()
    assert models.servers(frozenset()) is None
    assert models.servers(frozenset({"red"})) is None, "all have it"
    assert models.servers(frozenset({"red", "blue"})) == frozenset({("far", "p"), ("home", "d")})
    view = RequestView(l_total=1, servers=models.servers(frozenset({"blue"})))
    seen = permitted(registry.observation, view)
    assert {server.name for site in seen.sites for server in site.servers} == {"p", "d"}
    assert len(list(registry.targets())) == 3
    targets["l"].models = None
    assert models.servers(frozenset({"blue"})) is None
