"""Synthetic models and machines for the tests of placement."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from sollold.machine.device import Kind
from sollold.models.footprint.block import Block
from sollold.models.footprint.footprint import Footprint, footprint
from sollold.models.footprint.run_options import Run
from sollold.models.footprint.shape import Layer, Shape
from sollold.placement.inventory import DeviceCapacity, Fleet, Link, Machine

MIB = 1024**2
GIB = 1024 * MIB


def shape(
    layers: int = 16,
    layer_bytes: int = 50 * MIB,
    output: int = 20 * MIB,
    *,
    active: float = 1.0,
    sizes: Sequence[int] = (),
    n_embd: int = 1024,
    n_vocab: int = 32000,
    context_train: int = 32768,
) -> Shape:
    """A model of the llama family.

    Args:
        layers: number of layers, unless ``sizes`` is given.
        layer_bytes: bytes of each layer.
        output: bytes of the output and of the token embedding.
        active: share of a layer's bytes that is read for each token.
        sizes: bytes of each layer.
        n_embd: embedding length.
        n_vocab: size of the vocabulary.
        context_train: context length of the training.
    """
    block = Block(
        embd=n_embd,
        q=n_embd,
        k=256,
        v=256,
        out=n_embd,
        heads=16,
        head_k=n_embd // 16,
        head_v=n_embd // 16,
        ff=4 * n_embd,
    )
    shape_layers = tuple(
        Layer(
            weights=size,
            active=int(size * active),
            k=256,
            v=256,
            block=block,
            largest=min(size // 4, output),
        )
        for size in (sizes or [layer_bytes] * layers)
    )
    return Shape(
        architecture="llama",
        known=True,
        layers=shape_layers,
        output=output,
        host_weights=output,
        largest_tensor=min(layer_bytes // 4, output),
        largest_output=output,
        n_embd=n_embd,
        n_vocab=n_vocab,
        context_train=context_train,
        parameters=sum(layer.weights for layer in shape_layers),
    )


def footprint_with(model: Shape) -> Callable[[Run], Footprint]:
    return lambda run: footprint(model, run)


def cpu(node: str, room: int, bandwidth: float = 20e9) -> DeviceCapacity:
    return DeviceCapacity(node, "CPU", Kind.CPU, room, overhead=30 * MIB, bandwidth=bandwidth, compute=0.2e12)


def gpu(node: str, room: int, bandwidth: float = 500e9, number: int = 0) -> DeviceCapacity:
    return DeviceCapacity(
        node, f"CUDA{number}", Kind.GPU, room, overhead=300 * MIB, bandwidth=bandwidth, compute=20e12
    )


def machine(
    *capacities: DeviceCapacity, holds: bool = False, links: tuple[tuple[str, Link], ...] = ()
) -> Machine:
    node = capacities[0].node
    return Machine(node, f"host-{node}", capacities, holds=holds, links=links)


def fleet(*machines: Machine) -> Fleet:
    return Fleet(machines)


def random_fleet(seed: int, needed: int, machines: int) -> Fleet:
    """A heterogeneous cluster, scaled to a model of ``needed`` bytes; some devices are slow or small."""
    rng = random.Random(seed)
    fleet_machines = []
    for number in range(machines):
        node = f"n{number}"
        capacities = [cpu(node, int(needed * rng.uniform(0.15, 0.6)), rng.choice([8e9, 20e9, 45e9, 80e9]))]
        if rng.random() < 0.5:
            capacities.append(
                gpu(node, int(needed * rng.uniform(0.1, 0.5)), rng.choice([200e9, 450e9, 900e9, 1800e9]))
            )
        links = tuple(
            (f"n{peer}", Link(rng.uniform(0.0001, 0.002), rng.choice([110e6, 280e6, 1.1e9])))
            for peer in range(machines)
            if peer != number
        )
        fleet_machines.append(machine(*capacities, holds=number == 0, links=links))
    return Fleet(tuple(fleet_machines))


def tight_cluster(seed: int) -> tuple[Shape, Fleet]:
    """A model and three different machines that all have its file and, if it fits, little memory to spare.

    Small enough for an exhaustive search (`tests.placement.brute`).
    """
    rng = random.Random(seed)
    layers = rng.randint(8, 16)
    sizes = [rng.choice([60, 100, 115] if seed % 3 == 1 else [100]) * MIB for _ in range(layers)]
    model = shape(
        sizes=sizes,
        output=rng.choice([60, 150, 300]) * MIB,
        n_embd=2048,
        n_vocab=rng.choice([32000, 128000]),
        active=rng.choice([1.0, 1.0, 0.15]),
    )
    needed = sum(sizes) + model.output
    machines = []
    for node in ("n0", "n1", "n2"):
        room = int(needed * rng.uniform(0.15, 0.6)) + 250 * MIB
        capacities = [cpu(node, room, rng.choice([8e9, 20e9, 45e9, 80e9]))]
        if rng.random() < 0.5:
            room = int(needed * rng.uniform(0.1, 0.5)) + 300 * MIB
            capacities.append(gpu(node, room, rng.choice([200e9, 450e9, 900e9])))
        links = tuple(
            (peer, Link(rng.uniform(0.0001, 0.002), rng.choice([110e6, 280e6, 1.1e9])))
            for peer in ("n0", "n1", "n2")
            if peer != node
        )
        machines.append(machine(*capacities, holds=True, links=links))
    return model, Fleet(tuple(machines))
