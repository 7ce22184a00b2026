"""Connections that come and go, and when a session is lost."""

from __future__ import annotations

import random

import msgspec
import pytest

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.health import BACKOFF_MAX_S, CONTACTS, Contact, Health, backoff_s

CONFIG = msgspec.structs.replace(TransportConfig(), heartbeat_timeout_s=5.0, reconnect_timeout_s=10.0)


def contact(health: Health) -> Contact:
    return health.contact


def up() -> Health:
    health = Health(CONFIG, 2, 0.0)
    health.connected(0, 0.0)
    assert contact(health) is Contact.OPENING
    health.connected(1, 0.0)
    assert contact(health) is Contact.UP
    return health


def test_connections_come_and_go() -> None:
    health = up()
    health.disconnected(0, 1.0)
    assert contact(health) is Contact.PARTIAL
    health.disconnected(1, 1.0)
    assert contact(health) is Contact.SUSPENDED
    health.connected(1, 2.0)
    assert contact(health) is Contact.PARTIAL
    health.connected(0, 2.0)
    assert (contact(health), health.reconnects) == (Contact.UP, 2)
    assert health.verdict(7.0) == ""


def test_a_peer_that_ends_before_it_has_a_data_connection() -> None:
    health = Health(CONFIG, 2, 0.0)
    health.control_lost(1.0)
    assert health.verdict(1.5) == ""
    assert health.verdict(1.6) == "its process has ended: it closed its connection, and was gone for 0.5 s"
    health.control_found(1.6)
    assert health.verdict(4.0) == ""
    health.control_lost(4.0)
    health.connected(0, 4.1)
    assert health.verdict(5.0) == "", "a data connection stands"


def test_a_silent_peer() -> None:
    health = up()
    assert not health.silent(4.5)
    assert health.silent(4.6), "somebody who looks four times a second sees it within the 5 s"
    assert not health.silent(5.6), "once for each silence"
    assert health.verdict(15.0) == ""
    assert health.verdict(15.5) == "silent for 15.5 s"
    health.heard(5.0)
    assert health.verdict(15.5) == ""
    assert not health.silent(9.5)
    assert health.silent(9.6)


def test_a_system_that_accepts_is_no_sign_of_life() -> None:
    health = up()
    assert health.silent(5.5)
    for index in (0, 1):
        health.disconnected(index, 5.5)
    assert contact(health) is Contact.SUSPENDED
    for index in (0, 1):
        health.connected(index, 5.6, heard=False)
    assert not health.silent(14.0)
    assert health.verdict(15.5) == "silent for 15.5 s"


@pytest.mark.parametrize("connections", [1, 2])
def test_a_peer_that_closed_everything_has_ended(connections: int) -> None:
    """Also one that had not made all of its connections yet."""
    health = Health(CONFIG, 2, 0.0)
    for index in range(connections):
        health.connected(index, 0.0)
    for index in range(connections):
        health.disconnected(index, 1.0, closed=True)
    assert health.verdict(1.5) == ""
    assert "process has ended: it closed all connections" in health.verdict(1.6)
    health.heard(1.2)
    assert health.verdict(1.6) == "", "it lives, and is waited for"
    assert "process has ended" in health.verdict(1.8), "what it said before its end came late"


def test_connections_given_up_here_say_nothing_of_the_peer() -> None:
    health = up()
    health.disconnected(0, 1.0, closed=True)
    health.disconnected(1, 1.0)
    assert health.verdict(2.0) == ""


def test_a_link_that_is_cut_is_waited_for() -> None:
    health = up()
    health.control_lost(1.0)
    for index in (0, 1):
        health.disconnected(index, 1.0)
    assert health.verdict(10.9) == ""
    assert health.verdict(11.1) == "all data connections were lost, and none came back within 10 s"
    health.control_found(10.0)
    health.connected(0, 10.0)
    assert health.verdict(14.0) == ""


def test_a_control_connection_that_stays_away() -> None:
    health = up()
    health.control_lost(1.0)
    health.heard(10.0)
    assert health.verdict(10.0) == ""
    assert "did not come back within 10 s" in health.verdict(11.5)


def test_a_process_that_has_ended_refuses() -> None:
    health = up()
    for index in (0, 1):
        health.disconnected(index, 1.0)
    health.refused(0)
    assert health.verdict(1.1) == ""
    health.refused(0)
    assert "process has ended" in health.verdict(1.2)


def test_one_refused_connection_is_no_end_while_another_stands() -> None:
    health = up()
    health.disconnected(0, 1.0)
    for _ in range(5):
        health.refused(0)
    assert health.verdict(1.2) == ""


def test_a_control_port_that_refuses_is_the_end() -> None:
    health = up()
    health.control_lost(1.0)
    health.refused(-1)
    health.refused(-1)
    assert "process has ended" in health.verdict(1.2)


def test_every_contact_but_lost_can_be_lost() -> None:
    assert set(CONTACTS) == set(Contact)
    for before, following in CONTACTS.items():
        assert (Contact.LOST in following) == (before is not Contact.LOST)


@pytest.mark.parametrize("attempt", [1, 2, 5, 50, 10_000])
def test_backoff(attempt: int) -> None:
    assert backoff_s(0, random.Random(1)) == 0.0
    assert 0.0 < backoff_s(attempt, random.Random(1)) <= BACKOFF_MAX_S
