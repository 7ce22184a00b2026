"""The case study of the paper (section 4) as values."""

from __future__ import annotations

import pytest

from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.throughput import Fleet, Workload


@pytest.fixture
def workload() -> Workload:
    return paper.case_study_workload()


@pytest.fixture
def fleet() -> Fleet:
    return paper.case_study_fleet()


@pytest.fixture
def homogeneous() -> Fleet:
    return paper.homogeneous_fleet()
