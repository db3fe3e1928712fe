"""What the wire costs a round: encoding, decoding, and a whole round to an echoing drafter in another process.

    python benchmarks/drafting_link.py [--positions 6] [--taps 2] [--hidden-size 384] [--sequences 1]

Prints microseconds, median and 90th percentile. The drafter answers from a thread of its own, as an engine would.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.rpc._gen.tandem.v1 import drafting_pb2
from tandem_serve.rpc.convert_drafting import commands_request, events_response, parse_commands, parse_events
from tandem_serve.rpc.convert_handshake import DrafterTerms
from tandem_serve.rpc.convert_tensor import DATA_TYPES
from tandem_serve.rpc.drafting_client import GrpcDrafterLink
from tandem_serve.rpc.drafting_server import DraftingServer
from tandem_serve.types import (
    CreditGranted,
    DraftBlock,
    DrafterCommand,
    DrafterInfo,
    DraftEvent,
    ExtendSequence,
    PrimaryInfo,
    credit_cost_bytes,
)

VOCAB_SIZE = 4096


class EchoDrafter:
    """interfaces.Drafter that drafts the token it was given, from a thread of its own."""

    def __init__(self, info: DrafterInfo) -> None:
        self.info = info
        self._deliver: Callable[[list[DraftEvent]], None] = lambda events: None
        self._inbox: SimpleQueue[Sequence[DrafterCommand]] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def check_primary(self, primary: PrimaryInfo) -> None:
        pass

    def connect(self, peer_id: str, deliver: Callable[[list[DraftEvent]], None]) -> None:
        self._deliver = deliver

    def submit(self, peer_id: str, commands: Sequence[DrafterCommand]) -> None:
        self._inbox.put(commands)

    def disconnect(self, peer_id: str) -> None:
        pass

    def _run(self) -> None:
        while True:
            commands = self._inbox.get()
            events: list[DraftEvent] = [CreditGranted(sum(map(credit_cost_bytes, commands)))]
            for command in commands:
                if isinstance(command, ExtendSequence):
                    events.append(DraftBlock(command.sequence_id, command.incarnation, command.round, (1,) * 5))
            self._deliver(events)


def infos(options: argparse.Namespace) -> tuple[PrimaryInfo, DrafterInfo]:
    taps, width = tuple(range(1, options.taps + 1)), options.hidden_size
    primary = PrimaryInfo("primary", "p", "t", VOCAB_SIZE, width, 64, 4096)
    return primary, DrafterInfo("drafter", "d", "p", "t", VOCAB_SIZE, taps, width, 8, 4096)


def percentiles(name: str, seconds: list[float]) -> None:
    ordered = sorted(seconds[len(seconds) // 5 :])
    p50, p90 = (ordered[int(len(ordered) * share)] * 1e6 for share in (0.5, 0.9))
    print(f"{name:32} p50 {p50:8.1f} us   p90 {p90:8.1f} us", flush=True)


def timed(run: Callable[[], object], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(options: argparse.Namespace, address: str) -> None:
    primary, drafter = infos(options)
    ids = tuple(range(1, options.positions + 1))
    representations = torch.randn(options.positions, options.taps, options.hidden_size)
    round_ = [ExtendSequence(f"sequence-{i}", 1, 7, 100, ids, representations, 5, 5) for i in range(options.sequences)]
    for dtype in DATA_TYPES:
        terms = DrafterTerms(drafter, dtype, 1 << 26, 1 << 26)
        data = commands_request(round_, dtype).SerializeToString()
        percentiles(f"encode {dtype}", timed(lambda: commands_request(round_, dtype).SerializeToString(), 2000))  # noqa: B023
        percentiles(
            f"decode {dtype}",
            timed(lambda: parse_commands(drafting_pb2.DraftRequest.FromString(data).commands, terms), 2000),  # noqa: B023
        )
    blocks = [DraftBlock(command.sequence_id, 1, 7, ids[:5]) for command in round_]
    answer = events_response(blocks).SerializeToString()
    percentiles("encode answer", timed(lambda: events_response(blocks).SerializeToString(), 2000))
    percentiles(
        "decode answer",
        timed(lambda: parse_events(drafting_pb2.DraftResponse.FromString(answer).events, VOCAB_SIZE), 2000),
    )
    changed = threading.Event()
    link = GrpcDrafterLink(address, primary, changed.set)
    while link.state != "ready":
        changed.wait(5)
        changed.clear()

    def whole_round() -> None:
        link.send(round_)
        blocks = 0
        while blocks < len(round_):
            changed.wait()
            changed.clear()
            blocks += len(link.receive())

    percentiles("whole round over gRPC, bf16", timed(whole_round, 3000))
    link.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=6)
    parser.add_argument("--taps", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        server = DraftingServer(EchoDrafter(infos(options)[1]), DrafterEngineConfig())
        server.start()
        print(server.address, flush=True)
        sys.stdin.read()
        server.stop()
        return
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin and server.stdout
        measure(options, server.stdout.readline().strip())
        server.stdin.close()


if __name__ == "__main__":
    main()
