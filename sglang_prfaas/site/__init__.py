"""One datacenter: starts, watches and stops its servers, and is its HTTP gateway for routers.

from sglang_prfaas.site import Site, running

async with Site(config) as site: ...            # in an event loop
with running(Site(prfaas), Site(pd)) as sites:  # from plain code: starts all of them in parallel
    sites["pd"].kill("decode-0")
"""

from sglang_prfaas.site.commands import ServerCommand, site_commands
from sglang_prfaas.site.site import Site
from sglang_prfaas.site.supervisor import Supervisor
from sglang_prfaas.site.threaded import running

__all__ = ["ServerCommand", "Site", "Supervisor", "running", "site_commands"]
