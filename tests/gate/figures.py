"""Cases and invented measurements, and a worker whose clock is known."""

from pathlib import Path

from evals.gate import measure
from evals.gate.cases import PAIRS_A_ROUND, GateCase
from evals.gate.judge import Margins
from evals.gate.measure import Unit

ROOT = Path(__file__).parent.parent.parent
STATIC = GateCase("block", 32, "low_confidence", max_tokens=64, rows=4)
FREE = GateCase("block", 32, "threshold", max_tokens=64, rows=4)
LIMIT = 0.05
MARGINS = Margins(LIMIT, LIMIT)
PEAKS = (1_000_000, 1_000_000)


class Clockwork(measure.Worker):
    """A side without a process. Both share a clock that slows down by a thousandth with every unit."""

    log: list[str] = []
    more_forwards = 0
    more_memory = {"held": 0, "peak": 0}

    def __init__(self, side, root):
        self.side = side

    def ask(self, **request):
        self.request = request

    def reply(self):
        if "call" not in self.request:
            return {}
        call, more = self.request["call"], self.side == "head"
        if call != "unit":
            return {"bytes": round(1000 * (1 + self.request.get("more_memory", 0))) + more * self.more_memory[call]}
        self.log.append(self.side)
        seconds = (1 + self.request.get("more_work", 0)) * 1.001 ** len(self.log) / 10
        answers = [str(row) for row in self.request["rows"]]
        return {"wall": seconds, "cpu": seconds, "tokens": 9, "nfe": 4 + more * self.more_forwards, "answers": answers}

    def close(self):
        pass


def units(seconds, nfe=100, answers=("a", "b"), tokens=50):
    return [Unit(wall, cpu, tokens, nfe, list(answers)) for wall, cpu in seconds]


STEADY = [(1.0, 1.0)] * 40


def rounds_of(head, base=STEADY, **figures):
    pairs = list(zip(units(base), units(head, **figures), strict=True))
    return [pairs[i : i + PAIRS_A_ROUND] for i in range(0, len(pairs), PAIRS_A_ROUND)]
