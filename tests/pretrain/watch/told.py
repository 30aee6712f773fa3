"""A training without a training: rank 0's report of progress, told on standard input what to show. Its argument is a run folder."""

import json
import sys
from pathlib import Path

from configs.steps import Steps
from pretrain.state import TrainState
from pretrain.watch.progress import ProgressReport


def main() -> None:
    folder = Path(sys.argv[1])
    with ProgressReport(Steps(3200, 32, [], 1), TrainState(20, 20, 640), True, folder, 2) as report:
        for line in sys.stdin:
            command, _, rest = line.rstrip("\n").partition(" ")
            if command == "end":
                break
            if command == "say":
                report.say(rest)
            elif command == "print":
                print(rest, file=sys.stderr)
            elif command == "enter":
                (folder / "timeline.jsonl").write_text(
                    json.dumps({"attempt": 2, "time": 1.0, "phase": rest, "step": 20, "waited": 0}) + "\n"
                )
            elif command == "flood":
                for _ in range(300):
                    report.say("word " * 500)
                (folder / "said").touch()
            elif command == "saved":
                report.show({"step": int(rest), "tokens_seen": 32 * int(rest), "attempt": 2, "checkpoint/kind": "durable"})
            else:
                step = int(rest)
                row = {"step": step, "tokens_seen": 32 * step, "attempt": 2, "loss": 5 - step / 50, "tokens_per_second": 12345.6}
                report.show(row | {"mfu/palm": 0.412, "memory/allocated_bytes": 61.2e9})


if __name__ == "__main__":
    main()
