"""Two datacenters on one machine: the configuration files of a PrfaaS site, a PD site and a router, and running them.

What the demo and the integration tests stand on. Tiny models, real SGLang servers, the CPU platform, loopback.
"""

from sglang_prfaas.launch.local_deployment.cluster import LocalCluster, alive_servers, run_deployment
from sglang_prfaas.launch.local_deployment.files import (
    HEARTBEAT_TIMEOUT_S,
    HICACHE_ARGS,
    MODEL_NAME,
    STARTUP_TIMEOUT_S,
    Choices,
    LocalDeployment,
    write_deployment,
)

__all__ = [
    "HEARTBEAT_TIMEOUT_S",
    "HICACHE_ARGS",
    "MODEL_NAME",
    "STARTUP_TIMEOUT_S",
    "Choices",
    "LocalCluster",
    "LocalDeployment",
    "alive_servers",
    "run_deployment",
    "write_deployment",
]
