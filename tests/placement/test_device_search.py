"""The search for the fastest split, compared with exhaustive enumeration."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest

from sollold.placement.device_search import best_split
from sollold.placement.layer_runs import Bin, Buffers, Split


def buffer_bytes(device: Bin, first: int, last: int, count: int, buffers: Buffers) -> int:
    """Bytes of a run's buffers, which are needed in addition to its layers."""
    if device.first:
        return 0
    if buffers.exact is not None:
        return buffers.exact(first, last)
    if last == count:
        return buffers.output if first == count - 1 else buffers.ends
    return buffers.middle if first else buffers.begins


def reference(memory: list[int], active: list[int], bins: list[Bin], buffers: Buffers) -> float:
    """The least time over all subsets and orders of devices and all cut points, by enumeration."""
    count = len(memory)
    sums = [sum(memory[:i]) for i in range(count + 1)]
    acts = [sum(active[:i]) for i in range(count + 1)]
    times = {(0, 0): 0.0}
    for mask in range(1 << len(bins)):
        for start in range(count):
            cost = times.get((mask, start))
            if cost is None:
                continue
            for i, device in enumerate(bins):
                if mask & 1 << i or (device.first and start):
                    continue
                for end in range(start + 1, count + 1):
                    last = end == count
                    if last and device.first:
                        continue
                    if (
                        sums[end] - sums[start] + buffer_bytes(device, start, end, count, buffers)
                        > device.room
                    ):
                        continue
                    if device.loading is not None and sums[end] - sums[start] > device.loading:
                        continue
                    more = (
                        cost
                        + device.hop
                        + device.rate * (acts[end] - acts[start])
                        + (device.tail if last else 0.0)
                    )
                    key = mask | 1 << i, end
                    if more < times.get(key, inf):
                        times[key] = more
    return min((cost for (_, start), cost in times.items() if start == count), default=inf)


def random_case(seed: int) -> tuple[list[int], list[int], list[Bin], Buffers]:
    """Bytes of layers, bytes read per token, devices and buffers, at random."""
    rng = random.Random(seed)
    layers = rng.randint(6, 16)
    kind = seed % 4
    sizes = [100] * layers
    if kind == 1:
        sizes = [int(100 * rng.choice([0.9, 1.0, 1.15])) for _ in range(layers)]
    if kind == 2:
        sizes = [rng.choice([40, 100]) for _ in range(layers)]
    memory = [size + rng.choice([0, 0, 10]) for size in sizes] + [rng.choice([60, 150, 300])]
    active = [*sizes, memory[-1]]
    if kind == 3:
        active = [size // 8 for size in sizes[:-1]] + [sizes[-1], memory[-1]]
    total = sum(memory)
    bins = []
    for i in range(rng.randint(2, 5)):
        room = int(total * rng.uniform(0.15, 0.7))
        local = i == 0 and rng.random() < 0.5
        bins.append(
            Bin(
                rate=rng.choice([1.0, 2.0, 5.0, 20.0]) * 1e-5,
                hop=0.0 if local else rng.uniform(0.0005, 0.003),
                tail=0.0 if local else rng.uniform(0.0, 0.004),
                room=room,
                loading=int(room * 0.97) if seed % 5 == 0 else None,
                worker=-1 if local else i,
            )
        )
    if rng.random() < 0.4:
        bins.append(Bin(rate=3e-5, hop=0.0, tail=0.0, room=int(total * 0.3), first=True))
    buffers = Buffers(begins=12, middle=10, ends=25, output=15)
    if seed % 3 == 0:
        # Every third layer and the output need additional memory.
        def exact(first: int, last: int) -> int:
            return 10 + 15 * (last > layers) + 20 * any(not index % 3 for index in range(first, last))

        buffers = Buffers(begins=30, middle=30, ends=45, output=45, exact=exact, least=10)
    return memory, active, bins, buffers


def check(memory: list[int], active: list[int], bins: list[Bin], buffers: Buffers, split: Split) -> None:
    start = 0
    used = set()
    seconds = 0.0
    for index, first, last in split.runs:
        device = bins[index]
        assert first == start
        assert last > first
        assert index not in used
        size = sum(memory[first:last])
        assert size + buffer_bytes(device, first, last, len(memory), buffers) <= device.room
        assert device.loading is None or size <= device.loading
        seconds += (
            device.hop + device.rate * sum(active[first:last]) + (device.tail if last == len(memory) else 0)
        )
        used.add(index)
        start = last
    assert start == len(memory)
    assert split.seconds == pytest.approx(seconds)


def test_the_split_is_within_1_percent_of_the_optimum_on_400_clusters() -> None:
    found = 0
    for seed in range(400):
        memory, active, bins, buffers = random_case(seed)
        best = reference(memory, active, bins, buffers)
        split = best_split(memory, active, bins, buffers=buffers)
        if best == inf:
            assert split is None, seed
            continue
        assert split is not None, seed
        check(memory, active, bins, buffers, split)
        assert split.seconds <= best * 1.01, (seed, split.seconds / best)
        found += 1
    assert found > 150


def test_a_split_uses_one_device_of_a_group_and_a_limited_number_of_workers() -> None:
    memory = [10] * 10
    shared = [Bin(1e-3, 0.0, 0.0, 60, group=1), Bin(1e-3, 0.0, 0.0, 60, group=1)]
    assert best_split(memory, memory, shared) is None
    three = [Bin(1e-3, 0.001, 0.0, 40, worker=i) for i in range(3)]
    assert best_split(memory, memory, three, workers=2) is None
    split = best_split(memory, memory, three, workers=3)
    assert split is not None
    assert len(split.runs) == 3


def test_the_machine_with_more_devices_is_found_among_similar_ones() -> None:
    memory = [10] * 10
    single = Bin(1e-3, 0.001, 0.0, 60, worker=0)
    pair = [replace(single, worker=1), replace(single, worker=1)]
    for bins in ([single, *pair], [*pair, single], [single, replace(single, worker=2), *pair]):
        split = best_split(memory, memory, bins, workers=1)
        assert split is not None
        assert {bins[index].worker for index, _, _ in split.runs} == {1}


def test_a_slow_device_is_left_out() -> None:
    memory = [10] * 10
    fast = [Bin(1e-3, 0.001, 0.0, 60, worker=i) for i in range(2)]
    split = best_split(memory, memory, [Bin(1.0, 0.0, 0.0, 90), *fast])
    assert split is not None
    assert {index for index, _, _ in split.runs} == {1, 2}


def test_only_splits_faster_than_the_limit_are_found() -> None:
    memory = [10] * 10
    bins = [Bin(1e-3, 0.001, 0.0, 60, worker=i) for i in range(2)]
    assert best_split(memory, memory, bins, below=0.1) is None
    assert best_split(memory, memory, bins, below=0.2) is not None


def test_layers_on_the_host_or_on_another_machine_can_be_required() -> None:
    memory = [10] * 10
    host = Bin(1e-3, 0.0, 0.0, 60, first=True)
    own = Bin(1e-4, 0.0, 0.0, 200)
    other = Bin(1e-3, 0.001, 0.0, 200, worker=1)
    split = best_split(memory, memory, [host, own], host=True)
    assert split is not None
    assert [index for index, _, _ in split.runs] == [0, 1]
    split = best_split(memory, memory, [own, other], apart=True)
    assert split is not None
    assert 1 in {index for index, _, _ in split.runs}
