"""Cases and invented measurements, and a worker whose clock is known."""

from pathlib import Path

from evals.gate import measure
from evals.gate.cases import GateCase
from evals.gate.measure import Unit

ROOT = Path(__file__).parent.parent.parent
STATIC = GateCase("block", 32, "low_confidence", max_tokens=64, rows=4)
FREE = GateCase("block", 32, "threshold", max_tokens=64, rows=4)
LIMIT = 0.05


class Clockwork(measure.Worker):
    """A side without a process. Both share a clock that slows down by a hundredth with every unit."""

    log: list[str] = []
    more_forwards = 0

    def __init__(self, side, root, slowdown=0.0):
        self.side, self.factor = side, 1 + slowdown

    def ask(self, **request):
        self.request = request

    def reply(self):
        if "params" not in self.request:
            return {}
        self.log.append(self.side)
        seconds = self.factor * 1.01 ** len(self.log)
        rows = self.request["rows"]
        nfe = 4 + (self.side == "head") * self.more_forwards
        return {"wall": seconds, "cpu": seconds, "tokens": 9, "nfe": nfe, "answers": [str(row) for row in rows]}

    def close(self):
        pass


def units(seconds, nfe=100, answers=("a", "b")):
    return [Unit(wall, cpu, 50, nfe, list(answers)) for wall, cpu in seconds]


STEADY = [(1.0, 1.0)] * 40


def pairs_of(head, base=STEADY, **figures):
    return list(zip(units(base), units(head, **figures), strict=True))
