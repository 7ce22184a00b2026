"""Rules that span fields: what a single type cannot say. Each finding says what to write instead.

A module for each part of a file, and one for what files say of each other (`deployment.py`).
"""

from sglang_prfaas.config.checks.deployment import deployment_findings
from sglang_prfaas.config.checks.finding import Finding, fatal
from sglang_prfaas.config.checks.router import router_findings
from sglang_prfaas.config.checks.site import site_findings

__all__ = ["Finding", "deployment_findings", "fatal", "router_findings", "site_findings"]
