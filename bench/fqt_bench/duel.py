"""Time two trees against each other: fresh processes of both stand side by side, and take turns A B B A.

What slows the machine down for longer than a turn (some milliseconds) slows both down; what is shorter the minimum leaves
out. What a process has of its own, where its memory lies, differs from round to round.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .trees import Tree, command, environment

TURNS = 12  # of each side in a round
TURN_NS = 8_000_000  # how long one is at least; both sides take as many samples
ROUNDS = 3
# Asked whether there is a GPU, torch must not begin to use it: a forked process could not.
_BEFORE_A_FORK = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
STALL_S = 600.0  # for one turn, its compilation included
PROTOCOL = f"{TURNS} turns of {TURN_NS // 10**6} ms"


@dataclass
class Duel:
    """A case's nanoseconds of a call, the least of each round; or why there are none, by side ("base", "head")."""

    name: str
    base: list[int]
    head: list[int]
    unknown: dict[str, str]
    failed: dict[str, str]

    @property
    def timed(self) -> bool:
        return not self.unknown and not self.failed

    @property
    def log_ratio(self) -> float:
        """log(head / base): above 0 where head is slower, 0 where the rounds do not agree that it differs.

        Slower code shows in the ratio of all rounds' minima, and in every round's own (but for a quarter of them): the
        one nearest to 0 counts. A process whose memory happens to lie well, or a round that was disturbed on one side
        for all of its turns, moves some of them only.
        """
        least = math.log(min(self.head) / min(self.base))
        sign = math.copysign(1, least)
        rounds = sorted(sign * math.log(h / b) for b, h in zip(self.base, self.head, strict=True))
        return sign * max(min(abs(least), rounds[len(rounds) // 4]), 0.0) + 0.0  # no -0.0


class Arena:
    """The process that forks the fresh processes of all duels (see `timed`). Use as a context."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile("w+")
        # Empty: a tuned table holds for one version of a kernel, and would speed up the tree that it was tuned with alone.
        self.cache = tempfile.TemporaryDirectory(prefix="fqt-bench-")
        self.control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command("timed", [str(theirs.fileno())]), cwd=tempfile.gettempdir(),
                env=environment(**_BEFORE_A_FORK, FQT_CACHE_DIR=self.cache.name),
                stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, pass_fds=[theirs.fileno()],
            )  # fmt: skip

    def enter(self, tree: Tree) -> _Side:
        """A fresh process, which begins to import the tree's library."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(
                    self.control, [json.dumps([str(root) for root in tree.roots]).encode()], [theirs.fileno()]
                )
            except OSError:
                pass  # its answers say that nobody is there
        return _Side(ours, self.said)

    def said(self) -> str:
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or ["no message"])[-1]

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *error: object) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.cache.cleanup()


class _Side:
    """A process that times the library of a tree. It ends when this is left."""

    def __init__(self, connection: socket.socket, said: Callable[[], str]) -> None:
        self.connection, self.said = connection, said
        connection.settimeout(STALL_S)
        self.lines = connection.makefile("rw", buffering=1)
        self.pid: int | None = None

    def ready(self) -> None:
        """Wait until it stands ready; if it does not, its answer to each case says why."""
        self.pid = self._line().get("pid")

    def ask(self, case: str, samples: int) -> dict:
        try:
            print(json.dumps({"case": case, "samples": samples}), file=self.lines)
        except OSError:
            pass  # the answer says so
        return self._line()

    def _line(self) -> dict:
        try:
            if line := self.lines.readline():
                return json.loads(line)
            return {"error": f"the process ended: {self.said()}"[:500]}
        except TimeoutError:
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)
            return {"error": f"no answer in {STALL_S:.0f} s"}
        except OSError as e:
            return {"error": f"{e}: {self.said()}"[:500]}

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.lines.close()
        except OSError:
            pass
        self.connection.close()


def duels(
    arena: Arena,
    base: Tree,
    head: Tree,
    cases: Sequence[str],
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Duel]:
    """Each case's duel."""
    results = [Duel(name, [], [], {}, {}) for name in cases]
    for number in range(rounds):
        with arena.enter(base) as a, arena.enter(head) as b:  # they start at the same time
            a.ready()
            b.ready()
            for result in results:
                progress(f"round {number + 1} of {rounds}: {result.name}")
                if result.timed:
                    _fight(result, {"base": a, "head": b}, first=number % 2)
    return results


def _fight(result: Duel, sides: dict[str, _Side], first: int) -> None:
    """One round of a case: A B B A, or B A A B if first is 1, and so on."""
    least: dict[str, int] = {}
    samples = 1
    for turn in range(TURNS):
        for name in ("base", "head") if (turn + first) % 2 == 0 else ("head", "base"):
            answer = sides[name].ask(result.name, samples)
            if "ns" not in answer:
                kind, text = next(iter(answer.items()))
                (result.unknown if kind == "unknown" else result.failed)[name] = text
                if turn == 0:
                    continue  # the other side's turn: it may not know the case either
                return
            least[name] = min(answer["ns"], least.get(name, answer["ns"]))
        if not result.timed:
            return
        if turn == 0:  # both are warm: the first, single sample says how many make a turn
            samples = max(TURN_NS // max(min(least.values()), 1), 1)
    result.base.append(least["base"])
    result.head.append(least["head"])
