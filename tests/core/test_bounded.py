from __future__ import annotations

from gpuguard.core.bounded import BoundedTable


def test_a_full_table_forgets_its_oldest_and_counts() -> None:
    table: BoundedTable[int, int] = BoundedTable(2)
    for key in range(5):
        table[key] = key
    assert (len(table), table.evicted, table.get(4), table.get(0)) == (2, 3, 4, None)


def test_what_is_over_makes_room_uncounted() -> None:
    table: BoundedTable[int, int] = BoundedTable(2)
    for number in range(4):
        table.make_room(lambda one: one < 1)
        table[number] = number
    assert (table.values(), table.evicted) == ([2, 3], 1)
