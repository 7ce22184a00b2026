"""The router: decides where each request's prefill runs, drives both legs, relays decode's answer."""

from sglang_prfaas.router.app import Router
from sglang_prfaas.router.process import run, run_router

__all__ = ["Router", "run", "run_router"]
