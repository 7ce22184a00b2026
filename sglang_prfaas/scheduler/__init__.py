"""Scheduling as pure functions: observation and request in, decision and reason out."""

from sglang_prfaas.scheduler.short_term import decide, uncached_length
from sglang_prfaas.scheduler.types import Decision, Observation, ServerView, SiteView

__all__ = ["Decision", "Observation", "ServerView", "SiteView", "decide", "uncached_length"]
