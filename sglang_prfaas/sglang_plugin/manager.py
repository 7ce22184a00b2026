"""The KV manager of a scheduler process: one mover, for the role the server has now."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.disaggregation.base.conn import BaseKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_device, get_disagg, get_parallel, get_serving

from sglang_prfaas import env
from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.sglang_plugin import inner_rail, transfer_metrics
from sglang_prfaas.sglang_plugin.kv_pages import layout_of, memory_of, model_identity
from sglang_prfaas.sglang_plugin.link_reports import LinkReports
from sglang_prfaas.sglang_plugin.ranks import split_address
from sglang_prfaas.sglang_plugin.role_prefixes import RolePrefixes
from sglang_prfaas.transport import transfer_log
from sglang_prfaas.transport.addresses import dialable, resolve
from sglang_prfaas.transport.codec.session import CodecChoice
from sglang_prfaas.transport.messages import RankInfo
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.registration import Registration
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.transfer_log import TransferRecord
from sglang_prfaas.transport.vector import why_not_native

if TYPE_CHECKING:
    from sglang_prfaas.sglang_plugin.inner_rail.rail import Rail
    from sglang_prfaas.sglang_plugin.layerwise import LayerwiseSending

logger = logging.getLogger(__name__)


class AnyPrefill:
    """What SGLang's decode queue is told of every prefill server before its directory has answered.

    With this `dp_size` the queue takes the bootstrap room itself as the DP rank, and calls `init` at once instead of
    polling once a second; the receiver then looks the server up without blocking, and derives the true rank.
    """

    dp_size = 1 << 63
    follow_bootstrap_room = True


class _AnyPrefillTable:
    """`prefill_info_table` of the decode queue: knows every address."""

    def get(self, address: str, default: Any = None) -> AnyPrefill:
        return AnyPrefill()


class PrfaasKVManager(BaseKVManager):
    """Owns the mover of this rank. Raises ConfigError for a parallel layout this backend cannot serve."""

    supports_role_switch = True

    def __init__(self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool | None = False):
        self.kv_args = args
        self.mode = disaggregation_mode
        self.server_args = server_args
        self.config = env.transport_from_env(os.environ)
        self.site = os.environ.get(env.SITE, "")
        self.server = os.environ.get(env.SERVER, "") or f"port {get_serving().port}"
        self.clock = MonotonicClock()
        parallel = get_parallel()
        unsupported = {"--pp-size": parallel.pp_size, "--attention-context-parallel-size": parallel.attn_cp_size}
        for flag, size in unsupported.items():
            if size > 1:
                raise ConfigError(f"{flag} {size}: the prfaas transfer backend supports 1; use tensor parallelism")
        self.tp_rank = int(parallel.attn_tp_rank)
        self.dp_rank = int(args.system_dp_rank or 0)
        self._rank = self.dp_rank * int(parallel.attn_tp_size) + self.tp_rank
        model = ModelConfig.from_server_args(server_args)
        mla = bool(is_mla_backend) or bool(args.is_hybrid_mla_backend)
        self.layout = layout_of(
            args,
            model_identity(model.hf_config),
            int(parallel.attn_tp_size),
            self.tp_rank,
            0 if mla else int(model.get_total_num_kv_heads()),
            0 if mla else int(model.get_swa_num_kv_heads(1)),
            model_dtype=model.dtype,
        )
        self.memory = memory_of(args, get_device().device)
        self.send_mover: SendMover | None = None
        self.receive_mover: ReceiveMover | None = None
        self.layerwise: LayerwiseSending | None = None
        """Set once the model is at hand, where SGLang's mode permits it."""
        self.rail: Rail | None = None
        """The site's inner rail, where it has one."""
        if self.config.inner_rail != inner_rail.NONE:
            from sglang_prfaas.sglang_plugin.inner_rail.rail import Rail

            self.rail = Rail(self.config.inner_rail, self.site, args, disaggregation_mode, server_args, is_mla_backend)
        self._prefixes = RolePrefixes()
        self._registration: Registration | None = None
        self._link_reports: LinkReports | None = None
        self.prefill_info_table = _AnyPrefillTable()
        if why_not_native:
            logger.info("prfaas: KVCache is sent and received without native code: %s", why_not_native)
        if disaggregation_mode == DisaggregationMode.PREFILL:
            self._start_prefill()
        else:
            self._start_decode()

    def _start_prefill(self) -> None:
        host = resolve(self.config.bind_host or get_serving().host)
        base = env.port_from_env(os.environ)
        rank = self._rank
        links = env.links_from_env(os.environ)
        endpoint = os.environ.get(env.LINK_REPORTS, "")
        if endpoint:
            self._link_reports = LinkReports(endpoint, self.site, f"{self.server}/{rank}")
        self.send_mover = SendMover(
            self.layout,
            self.memory,
            self.config,
            self.clock,
            host=host,
            first_port=base + 2 * rank if base else 0,
            links=links,
            report=self._link_reports,
            codecs=CodecChoice(self.config.codec, env.link_codecs_from_env(os.environ)),
            site=self.site,
        )
        if self._link_reports is not None:
            self._link_reports.counts = self.send_mover.counts
        self.send_mover.start()
        self.register_to_bootstrap()
        logger.info(
            "prfaas: prefill rank %d listens on %s, control port %d, data port %d",
            rank,
            host,
            self.send_mover.control_port,
            self.send_mover.data_port,
        )

    def _start_decode(self) -> None:
        self._prefixes.decode()
        self.receive_mover = ReceiveMover(
            self.layout,
            self.memory,
            self.config,
            self.clock,
            site=self.site,
            server=self.server,
            rank=self._rank,
            links=env.links_from_env(os.environ),
        )
        self.receive_mover.start()

    def register_to_bootstrap(self) -> None:
        """Enter this rank into its server's directory; repeated in the background until acknowledged."""
        assert self.send_mover is not None
        parallel = get_parallel()
        directory_host = dialable(resolve(get_serving().host))
        if parallel.dist_init_addr and parallel.nnodes > 1:
            directory_host = resolve(split_address(parallel.dist_init_addr)[0])
        advertised = self.config.advertise_host
        if not advertised and parallel.nnodes > 1:
            from sglang.srt.utils.network import get_local_ip_auto

            advertised = get_local_ip_auto()
        self._registration = Registration(
            directory_host,
            get_disagg().disaggregation_bootstrap_port,
            RankInfo(
                self.dp_rank,
                self.tp_rank,
                0,
                advertised,
                self.send_mover.control_port,
                self.rail.announcement() if self.rail is not None else None,
            ),
            self.clock,
            dp_size=int(parallel.dp_size),
            tp_size=int(parallel.attn_tp_size),
            pp_size=1,
            follow_bootstrap_room=parallel.dp_size == 1 or parallel.load_balance_method == "follow_bootstrap_room",
            page_tokens=self.layout.page_tokens,
            security=self.send_mover.security,
        )
        self._registration.start()

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Receivers look their prefill server up themselves, without blocking the scheduler."""
        return True

    def submit_prefill_recompute(self, receiver: Any, payload: Any) -> None:
        """SGLang asks for this where it retracted a request from decode and has the prefill server compute it again,
        for weights that changed meanwhile. Refused: it posts to the prefill server's own HTTP port, which no other site
        can reach. The request ends with the reason, and the others go on."""
        receiver.abort(
            "the request was retracted, and is to be computed again on its prefill server: over the prfaas backend a "
            "decode server does not reach that one's HTTP port; start it with "
            "--disaggregation-decode-retraction-backup cpu_tensor or host_pool, or send the request again"
        )

    def deregister_buffer_to_engine(self) -> None:
        """SGLang frees the KVCache for a while."""
        if self.rail is not None:
            self.rail.manager.deregister_buffer_to_engine()

    def register_buffer_to_engine(self) -> None:
        """SGLang has the KVCache again."""
        if self.rail is not None:
            self.rail.manager.register_buffer_to_engine()

    def teardown(self) -> None:
        """Release every port, thread and connection, for a change of role."""
        if self.layerwise is not None:
            self.layerwise.remove()
        if self._registration is not None:
            self._registration.close()
        if self.send_mover is not None:
            self.send_mover.close("the prefill server changed its role")
        if self._link_reports is not None:
            self._link_reports.close()
            self._link_reports = None
        if self.receive_mover is not None:
            self.receive_mover.close("the decode server changed its role")
        if self.rail is not None:
            self.rail.close()
            self.rail = None
        self._prefixes.end()

    def log_transfer(self, **values: Any) -> None:
        """Count a finished transfer, and append it to the transfer log, where that is asked for."""
        if self.server_args.enable_metrics:
            transfer_metrics.count(
                values["role"], values.get("rail", "prfaas"), str(values["status"]), values.get("bytes", 0)
            )
        path = os.environ.get(env.TRANSFER_LOG, "")
        if not path:
            return
        record = TransferRecord(
            site=self.site,
            server=self.server,
            rank=self.tp_rank,
            unix_time_s=transfer_log.unix_time_s(),
            **values,
        )
        try:
            transfer_log.append(path, record)
        except OSError as error:
            logger.error("prfaas: transfer log %s cannot be written: %s", path, error)
