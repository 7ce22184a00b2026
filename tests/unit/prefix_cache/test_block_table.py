"""The hash table against a dict, with buckets that overflow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.prefix_cache.block_table import BlockTable


def hashes(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


def crowd(max_blocks: int, count: int) -> list[int]:
    """Hashes that all have the same two buckets in a table of this size."""
    sample = np.random.default_rng(0).integers(0, 2**64, 40_000, np.uint64)
    first, second = BlockTable(max_blocks)._buckets(sample)
    return [int(value) for value in sample[(first == first[0]) & (second == second[0])][:count]]


crowded = st.sampled_from([0, *crowd(200, 40), *range(1, 20)])
steps = st.lists(st.tuples(st.integers(0, 3), st.lists(crowded, min_size=1, max_size=40)), max_size=25)


@settings(deadline=None)
@given(steps, st.sampled_from([30, 200]))
def test_as_a_dict(script: list[tuple[int, list[int]]], max_blocks: int) -> None:
    table, model = BlockTable(max_blocks), dict[int, int]()
    for number, values in script:
        batch = np.unique(hashes(values))
        places = table.find(batch)
        numbers = table.numbers_at(places)
        assert numbers.tolist() == [model.get(value, 0) for value in batch.tolist()]
        present = numbers > 0
        if number:
            absent = batch[~present]
            inserted = table.insert(absent, number)
            assert inserted == min(len(absent), max_blocks - len(model))
            model |= dict.fromkeys(absent[:inserted].tolist(), number)
        else:
            table.write(places[present], 0)
            for value in batch[present].tolist():
                model.pop(value, None)
        assert len(table) == len(model)
    used, numbers = table.used_in(0, table.places)
    assert len(used) == len(model)
    assert sorted(numbers.tolist()) == sorted(model.values())
    assert table.numbers(hashes(list(model))).tolist() == list(model.values())


@settings(deadline=None)
@given(steps, st.sampled_from([30, 200]))
def test_one_by_one_as_all_at_once(script: list[tuple[int, list[int]]], max_blocks: int) -> None:
    table, model = BlockTable(max_blocks), dict[int, int]()
    for number, values in script:
        for value in values:
            place = table.find_one(value)
            assert max(place, -1) == int(table.find(hashes([value]))[0])
            assert table.number_at_one(place) == model.get(value, 0)
            if place >= 0:
                table.write_one(place, number)
                model[value] = number
            elif number:
                inserted = table.insert_one(-1 - place, value, number)
                assert inserted == (len(model) < max_blocks)
                model |= {value: number} if inserted else {}
            if model.get(value) == 0:
                del model[value]
            assert len(table) == len(model)
    assert table.numbers(hashes(list(model))).tolist() == list(model.values())


def test_entries_beside_the_arrays_are_changed_and_freed() -> None:
    table = BlockTable(100)
    batch = hashes(crowd(100, 40))  # their two buckets hold 16
    assert len(batch) == 40
    assert table.insert(batch, 1) == 40
    assert table.beside == 24
    table.write(table.find(batch), 2)
    assert set(table.numbers(batch).tolist()) == {2}
    table.write(table.find(batch[10:]), 0)
    assert table.numbers(batch).tolist() == [2] * 10 + [0] * 30
    table.write(table.find(batch[:10]), 0)
    assert (len(table), table.beside) == (0, 0)


def test_no_hashes() -> None:
    table = BlockTable(10)
    assert table.numbers(hashes([])).tolist() == []
    assert table.insert(hashes([]), 1) == 0


def test_uniform_hashes_fill_it_to_the_brim() -> None:
    table = BlockTable(200_000)
    batch = np.unique(np.random.default_rng(0).integers(0, 2**64, 200_000, np.uint64))
    assert table.insert(batch, 7) == len(batch)
    assert (table.numbers(batch) == 7).all()
    assert table.beside < 20
    assert table.memory_bytes / len(batch) < 14


def test_refuses_no_room_at_all() -> None:
    with pytest.raises(ValueError, match="max_blocks is 0"):
        BlockTable(0)
