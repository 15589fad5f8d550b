"""What a collection of a billion images takes: machines, hours and cost, dense and pruned, by simulation.

    python studies/billion_images.py --forward 16.7 --speedup 1.69 --decode 386 --devices 32 --cores 64 --shared-cores

No such run was made. A machine has ``--devices`` devices that run the model and ``--cores`` cores that load images.
Parts are dealt out to machines as they ask for them. A machine dies at random (``--mtbf`` hours between failures),
loses the part at hand, and is back after ``--restart`` minutes. The rates are images/s that you have measured: of one
device at your batch size, and of one core for reading and decoding (``cpvit predict`` prints both). With
``--shared-cores`` a device is some of the cores themselves (here two), and an image takes its time for both.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What one does, per second."""

    forward: float
    """Images, of all its devices."""
    loading: float
    """Images, of all its cores."""
    upload: float
    """Images whose files its network brings."""
    shared: bool
    """Whether the same cores load images and run the model."""

    @property
    def rate(self) -> float:
        """Stages overlap, so the slowest of them is that of the machine; on the same cores they add up."""
        cores = 1 / (1 / self.forward + 1 / self.loading) if self.shared else min(self.forward, self.loading)
        return min(cores, self.upload)

    @property
    def bottleneck(self) -> str:
        """Which."""
        rates = {"forward": self.forward, "loading": self.loading, "network": self.upload}
        return min(rates, key=lambda name: rates[name])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=float, default=1e9)
    parser.add_argument("--forward", type=float, required=True, help="images/s of one device, dense")
    parser.add_argument("--speedup", type=float, required=True, help="of the forward, pruned")
    parser.add_argument("--decode", type=float, required=True, help="images/s of one core, read and decoded")
    parser.add_argument("--devices", type=int, default=1, help="in a machine")
    parser.add_argument("--cores", type=int, default=16, help="in a machine")
    parser.add_argument("--shared-cores", action="store_true", help="the devices are the cores")
    parser.add_argument("--network", type=float, default=10.0, help="Gbit/s of a machine")
    parser.add_argument("--kilobytes", type=float, default=100.0, help="of an image file")
    parser.add_argument("--machines", type=int, default=64)
    parser.add_argument("--price", type=float, default=1.0, help="of a machine for an hour")
    parser.add_argument("--rows-per-part", type=int, default=65536)
    parser.add_argument("--bytes-per-row", type=float, default=800.0, help="of output")
    parser.add_argument("--mtbf", type=float, default=24.0, help="hours between failures of a machine")
    parser.add_argument("--restart", type=float, default=10.0, help="minutes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    upload = arguments.network * 1e9 / 8 / (arguments.kilobytes * 1e3)
    loading = arguments.decode * arguments.cores
    parts = -(-int(arguments.images) // arguments.rows_per_part)
    size = arguments.images * arguments.bytes_per_row / 1e12
    print(
        f"{arguments.images:.3g} images, {parts} parts of {arguments.rows_per_part}, {size:.2f} TB of output"
    )
    for name, factor in (("dense", 1.0), ("pruned", arguments.speedup)):
        machine = Machine(
            arguments.forward * arguments.devices * factor, loading, upload, arguments.shared_cores
        )
        hours, lost = simulate(arguments, parts, machine.rate)
        cost = hours * arguments.machines * arguments.price
        print(
            f"{name:>7}: {machine.rate:.0f} images/s a machine (bottleneck: {machine.bottleneck}), "
            f"{arguments.machines} machines {hours:.1f} h, cost {cost:.0f}, {lost} parts made twice "
            f"({100 * lost / parts:.2f}%)"
        )


def simulate(arguments: argparse.Namespace, parts: int, rate: float) -> tuple[float, int]:
    """Hours until the last part is there, and how many were lost half-made."""
    generator = random.Random(arguments.seed)
    part = arguments.rows_per_part / rate / 3600
    failures = [generator.expovariate(1 / arguments.mtbf) for _ in range(arguments.machines)]
    free = [(0.0, number) for number in range(arguments.machines)]
    left, lost, end = parts, 0, 0.0
    while left:
        now, number = heapq.heappop(free)
        done = now + part
        if failures[number] < done:
            back = max(now, failures[number]) + arguments.restart / 60
            failures[number] = back + generator.expovariate(1 / arguments.mtbf)
            lost += 1
            heapq.heappush(free, (back, number))
            continue
        left -= 1
        end = max(end, done)
        heapq.heappush(free, (done, number))
    return end, lost


if __name__ == "__main__":
    main()
