"""What the doctor says: troubles, devices and links of each node, a table, a verdict, and the hosts to do without.

In: what was found. Out: rows and lines for a page, JSON for `--json` and for the other nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter

Record = TypeVar("Record")


class Trouble(NamedTuple):
    """What a check found to be wrong."""

    found: str
    wanted: str
    advice: str
    is_warning: bool = False


@dataclass(frozen=True)
class Finding:
    """A trouble, with the check that found it and the node it was found on."""

    check: str
    node: int
    host: str
    found: str
    wanted: str
    advice: str
    is_warning: bool = False


@dataclass(frozen=True)
class Device:
    """What one process's device did alone, or why it did nothing."""

    local_rank: int
    name: str = ""
    is_gpu: bool = False
    matmul_tflops: float | None = None
    """bf16 on a GPU, fp32 on CPU cores."""
    memory_gb_per_second: float | None = None
    """Read and written by a copy."""
    memory_gb: float | None = None
    free_memory_gb: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Link:
    """An all-reduce of a group of processes."""

    kind: str
    """`within a node`, `pair of nodes` or `all`."""
    nodes: tuple[int, ...]
    processes: int
    is_exact: bool
    """Whether the sum of known integers was right on the process that tells."""
    gb_per_second: float | None = None
    """Bus bandwidth, 2 (n - 1) / n x bytes / seconds, as NCCL's own tests count it. Told by the group's first process."""


@dataclass(frozen=True)
class NodeReport:
    """What one node says of itself."""

    node: int
    host: str
    facts: dict[str, str] = field(default_factory=dict)
    """Versions, code, configuration, driver, variables: what has to be the same everywhere."""
    clock_offset_seconds: float = 0.0
    """Its clock less that of node 0."""
    findings: tuple[Finding, ...] = ()
    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Report:
    """What the doctor says at the end."""

    nodes: tuple[NodeReport, ...]
    findings: tuple[Finding, ...]
    num_checks: int
    num_nodes: int
    """How many were to be there."""
    seconds: float

    @property
    def failures(self) -> list[Finding]:
        """What a run would break on."""
        return [finding for finding in self.findings if not finding.is_warning]


def to_json(record: object) -> Any:
    """What `json.dumps` takes, of any of these."""
    return TypeAdapter(type(record)).dump_python(record, mode="json")


def from_json(kind: type[Record], content: Any) -> Record:
    """The same, back. Raises pydantic's ValidationError for what is no such record."""
    return TypeAdapter(kind).validate_python(content)


def first_line(error: object) -> str:
    """Of what an error says: libraries add pages to it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def spell_nodes(nodes: Iterable[int]) -> str:
    """`node 3`, `nodes 0 to 5, 7`."""
    numbers = sorted(set(nodes))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"node{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def bad_hosts(report: Report) -> list[str]:
    """Hosts that the next start should do without.

    What more than half of the nodes fail is not theirs to answer for (a full shared disk): without them nothing would start at all. Neither
    are sums that were never finished, where a node was lost.
    """
    failing: dict[str, set[str]] = {}
    for finding in report.failures:
        failing.setdefault(finding.check, set()).add(finding.host)
    if "arrival" in failing:
        failing.pop("all-reduce", None)
    own = [hosts for hosts in failing.values() if report.num_nodes == 1 or 2 * len(hosts) <= report.num_nodes]
    return sorted({host for hosts in own for host in hosts if host})


def table_of(findings: Sequence[Finding]) -> list[tuple[str, str, str, str, str]]:
    """Rows: failure or warning, check, node, found, wanted; failures first."""
    ordered = sorted(findings, key=lambda finding: (finding.is_warning, finding.node))
    return [("warning" if row.is_warning else "FAILED", row.check, _place(row), row.found, row.wanted) for row in ordered]


def advice_of(findings: Sequence[Finding]) -> list[str]:
    """A line for each thing to do, with the nodes it is to be done on."""
    todo: dict[tuple[str, str], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: (finding.is_warning, finding.node)):
        todo.setdefault((finding.check, finding.advice), []).append(_place(finding))
    return [f"{check} on {', '.join(dict.fromkeys(places))}: {advice}" for (check, advice), places in todo.items()]


def verdict_of(report: Report) -> str:
    """The last line."""
    num_failures, num_warnings = len(report.failures), len(report.findings) - len(report.failures)
    nodes = f"{report.num_nodes} node{'s' if report.num_nodes > 1 else ''}"
    warnings = f", {num_warnings} warning{'s' if num_warnings > 1 else ''}" if num_warnings else ""
    if not num_failures:
        return f"all {report.num_checks} checks passed on {nodes}{warnings} ({report.seconds:.0f} s)"
    where = spell_nodes(finding.node for finding in report.failures)
    return f"{num_failures} failure{'s' if num_failures > 1 else ''}{warnings} on {where} of {nodes} ({report.seconds:.0f} s)"


def _place(finding: Finding) -> str:
    return f"{finding.node} ({finding.host})" if finding.host else f"{finding.node}"
