"""The rail of one rank: SGLang's manager, sender and receiver of it, told of each other by prfaas's directory.

SGLang's own way is an HTTP registry without keys at the bootstrap port. Here ranks are found through prfaas's
directory, and whether a prefill server lives is told by the prfaas session with it; so the registry and its heartbeats
are left out.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from sglang.srt.disaggregation.common.conn import PrefillServerInfo

from sglang_prfaas import env
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import ConfigError, LaunchError, LocalError
from sglang_prfaas.sglang_plugin.hooks import problems_with
from sglang_prfaas.sglang_plugin.inner_rail.overrides import OVERRIDES
from sglang_prfaas.sglang_plugin.inner_rail.packages import require
from sglang_prfaas.sglang_plugin.inner_rail.rooms import RailRooms
from sglang_prfaas.transport.messages import Directory, InnerRail

logger = logging.getLogger(__name__)


class _ManagerParts:
    """Over SGLang's manager of a rail."""

    def register_to_bootstrap(self) -> None:
        """Nothing: the entry in prfaas's directory says where this rank listens."""

    def _start_heartbeat_checker_thread(self) -> threading.Thread:
        """A thread for SGLang to end; nobody is asked for signs of life."""
        thread = threading.Thread(target=self._heartbeat_shutdown.wait, name="prfaas-rail-idle", daemon=True)
        thread.start()
        return thread


class _ReceiverParts:
    """Over SGLang's receiver of a rail."""

    def _get_bootstrap_info_from_server(
        self, prefill_dp_rank: int, prefill_cp_rank: int, target_tp_rank: int, target_pp_rank: int
    ) -> dict[str, Any] | None:
        """Where a prefill rank's rail listens, in SGLang's form; None where it has none."""
        rail = self.kv_mgr.ranks_of[self.bootstrap_addr].get((prefill_dp_rank, target_tp_rank))
        return {"rank_ip": rail.host, "rank_port": rail.port, "pp_rank": 0} if rail is not None else None


class Rail:
    """What a rank has of its site's inner rail. Belongs to the scheduler's thread.

    Raises LaunchError where the rail's package or its device is missing, ConfigError without a name of the site."""

    def __init__(
        self, kind: str, site: str, args: Any, mode: Any, server_args: Any, is_mla_backend: bool | None
    ) -> None:
        if not site:
            raise ConfigError(f"transport.inner_rail is {kind}, which needs the name of the site: set {env.SITE}")
        require(kind)
        problems = problems_with(OVERRIDES)
        if problems:
            raise LaunchError("\n".join(problems))
        self.kind = kind
        self.site = site
        self.rooms = RailRooms()
        backend = _backend(kind)
        _start_engine(kind, args)
        self._known: dict[str, str] = {}
        self._ranks_of: dict[str, Mapping[tuple[int, int], InnerRail]] = {}
        manager_class = type("RailManager", (_ManagerParts, backend["manager"]), {})
        self.receiver = type("RailReceiver", (_ReceiverParts, backend["receiver"]), {})
        """SGLang's receiver of the rail, to be made with `manager`, what `meet` returns, and a name of `rooms`."""
        self.sender = backend["sender"]
        """SGLang's sender of the rail."""
        self.manager = manager_class(args, mode, server_args, is_mla_backend)
        self.manager.ranks_of = self._ranks_of
        logger.warning(
            "prfaas: inner rail %s of site %s listens on %s without keys: whoever reaches it can read and write "
            "KVCache; keep that network to the site",
            kind,
            site,
            self.manager.local_ip,
        )

    def announcement(self) -> InnerRail:
        """What the directory says of this prefill rank."""
        return InnerRail(self.kind, self.site, self.manager.local_ip, int(self.manager.rank_port))

    def meet(self, address: str, directory: Directory) -> str:
        """Make the manager know a prefill server by its directory. Returns its name, for `receiver`: another one after
        the server has restarted, when what was known of it is dropped. Raises LocalError where shapes do not fit."""
        ranks = {(rank.dp_rank, rank.tp_rank): rank.rail for rank in directory.ranks if rank.rail is not None}
        places = ",".join(authority(rail.host, rail.port) for _, rail in sorted(ranks.items()))
        name = f"{address}/{places}/"
        if self._known.get(address) == name:
            return name
        old = self._known.pop(address, None)
        if old is not None:
            self.manager._handle_node_failure(old)
            del self._ranks_of[old]
        info = PrefillServerInfo(
            attn_tp_size=directory.tp_size,
            attn_cp_size=1,
            dp_size=directory.dp_size,
            pp_size=1,
            page_size=None,
            kv_cache_dtype=None,
            follow_bootstrap_room=directory.follow_bootstrap_room,
        )
        try:
            self.manager._resolve_rank_mapping(info)
        except AssertionError as error:
            raise LocalError(f"inner rail {self.kind}: {error}") from None
        self._ranks_of[name] = ranks
        self.manager.prefill_info_table[name] = info
        self._known[address] = name
        return name

    def close(self) -> None:
        """Release its ports, threads and registered memory, for a change of role."""
        self.manager.teardown()


def _backend(kind: str) -> dict[str, Any]:
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

    parts = {"manager": KVClassType.MANAGER, "sender": KVClassType.SENDER, "receiver": KVClassType.RECEIVER}
    return {name: get_kv_class(TransferBackend(kind), part) for name, part in parts.items()}


def _start_engine(kind: str, args: Any) -> None:
    """What SGLang starts with its servers only where the rail is their transfer backend. Raises LaunchError."""
    from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import init_mooncake_transfer_engine
    from sglang.srt.utils.network import get_local_ip_auto

    try:
        init_mooncake_transfer_engine(get_local_ip_auto(), args.gpu_id, args.ib_device)
    except RuntimeError as error:
        protocol = os.environ.get("MOONCAKE_PROTOCOL", "rdma")
        raise LaunchError(
            f"transport.inner_rail is {kind}, which does not start over {protocol}: {error} Name RDMA devices with "
            "--disaggregation-ib-device, or set MOONCAKE_PROTOCOL=tcp where there are none."
        ) from error
