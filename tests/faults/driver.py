"""One build in a process of its own: what the campaign starts, watches and kills.

In: a file with a `data` section as JSON, and where to build (`here` or `ray`). Out: a line of JSON for every report, and a
last one with what came of it; exit status 2 for what a user can mend, as the program itself has it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.data_section import DataSection
from configs.errors import UserError
from data_pipeline.build import build_dataset
from data_pipeline.execution import open_here, open_ray

Say = Callable[[dict[str, Any]], None]


def drive(data: DataSection, engine: str, rebuild: bool, say: Say) -> int:
    """Build, and say how far it is; the exit status."""
    try:
        result = build_dataset(data, lambda progress: say(asdict(progress)), {"here": open_here, "ray": open_ray}[engine], rebuild)
    except UserError as error:
        say({"refused": str(error)})
        return 2
    kept = {stage["stage"]: stage["num_units_kept"] for stage in result.report.get("stages", ())}
    say({"outcome": result.outcome, "kept": result.num_units_kept, "num_units": result.num_units, "kept_by_stage": kept})
    return 0


def say_line(content: dict[str, Any]) -> None:
    """Print a line that is there at once."""
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    section, engine, rebuild = sys.argv[1:]
    sys.exit(drive(DataSection.model_validate_json(Path(section).read_bytes(), strict=True), engine, rebuild == "rebuild", say_line))
