"""The doctor on all nodes at once: each looks at itself, they meet at node 0, measure together, and all learn the verdict.

In: a `Site`. Out: a `Report`, the same on every node that arrived. A node that does not arrive, or a store that falls silent, is a finding,
within a limit of time.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from launch.preflight.comparison import COMPARISONS, compare_nodes
from launch.preflight.limited import Failed, within
from launch.preflight.meeting import ANSWER_SECONDS, LOOK_SECONDS, find_meeting, make_meeting, ports_of
from launch.preflight.probes import CHECKS, Check, run_checks
from launch.preflight.processes import MEASURE_SECONDS, measure
from launch.preflight.report import Finding, NodeReport, Report, Trouble, first_line, from_json, spell_nodes, to_json
from launch.preflight.site import Site, facts_of_node, look_for, name_of_node, remove_marks

Say = Callable[[str], object]
ALONE = ("torch and CUDA", "device")
WITH_OTHERS = ("arrival", "shared with others")
SHARED_SECONDS = 15.0
"""Until a new file of one node is seen on another."""
LAST_WORD_SECONDS = 5.0


def examine(site: Site, say: Say, checks: Mapping[str, Check] = CHECKS) -> Report:
    """Run all checks, on this node and with the others. Nothing is left running, no file is left behind."""
    began, host = time.monotonic(), name_of_node()
    say(f"node {site.node} ({host}): {len(checks)} checks of its own")
    troubles = run_checks(site, checks)
    own = tuple(Finding(check, site.node, host, *trouble) for check, rows in troubles.items() for trouble in rows)
    report = NodeReport(site.node, host, {**site.facts, **facts_of_node()}, findings=own)
    reports: list[Report | BaseException] = []

    def meet() -> None:
        try:
            reports.append(_lead(site, report, say) if site.node == 0 else _follow(site, report, say))
        except BaseException as error:  # told to the main thread, which decides
            reports.append(error)

    try:  # in a thread: a network that is cut holds up whoever talks to the store, and signals are to be heard
        thread = threading.Thread(target=meet, name="meeting", daemon=True)
        thread.start()
        thread.join(2 * site.job.join_seconds + MEASURE_SECONDS + 60)
    finally:
        remove_marks(site)
    ended = reports[0] if reports else ConnectionError(f"node 0 at {site.host} fell silent")
    if _is_lost(ended):
        advice = "see what the doctor says on node 0, and whether the network between the two holds"
        lost = Finding("arrival", site.node, host, first_line(ended), "the verdict of node 0", advice)
        ended = Report((report,), (*own, lost), len(checks), site.num_nodes, 0.0)
    if isinstance(ended, BaseException):
        raise ended
    num_checks = len(checks) + len(ALONE) + len(COMPARISONS) + (len(WITH_OTHERS) if site.num_nodes > 1 else 0)
    return replace(ended, num_checks=num_checks, seconds=time.monotonic() - began)


def _is_lost(ended: object) -> bool:
    """Whether it is what torch raises for a store that is gone."""
    from torch.distributed import DistError

    return isinstance(ended, DistError | ConnectionError)


def _lead(site: Site, own: NodeReport, say: Say) -> Report:
    """Node 0: wait for all, measure, compare, tell all."""
    own, processes = _with_torch(site, own)
    meeting = make_meeting(site)
    if isinstance(meeting, Trouble):
        return _report(site, [own], [Finding("ports", 0, own.host, *meeting)])

    def tell(keys: list[str]) -> None:
        say(f"waiting for {spell_nodes(int(key.rpartition('/')[2]) for key in keys)} of {site.num_nodes}")

    others = range(1, site.num_nodes)
    missing = meeting.wait([f"arrived/{node}" for node in others], site.job.join_seconds, tell)
    arrived = {node: meeting.hear(f"arrived/{node}") for node in others if f"arrived/{node}" not in missing}
    if missing:
        found, wanted = f"it did not arrive within {site.job.join_seconds:g} s", f"{site.host}:{meeting.port} reached"
        advice = "see there whether the job has started, and whether a firewall stands in between (a higher job.join_seconds waits longer)"
        absent = [Finding("arrival", node, "", found, wanted, advice) for node in others if node not in arrived]
        say(f"{spell_nodes(finding.node for finding in absent)} did not arrive within {site.job.join_seconds:g} s")
        report = _report(site, [own, *(from_json(NodeReport, words["report"]) for words in arrived.values())], absent)
    else:
        all_processes = [processes, *(words["processes"] for words in arrived.values())]
        until = time.monotonic() + SHARED_SECONDS + MEASURE_SECONDS + 2 * ANSWER_SECONDS
        meeting.tell("began", {"time": time.time(), "marks": _marks(site), "processes": all_processes})
        unseen: list[Finding] = []
        if arrived:
            places = {path: (node, words["report"]["host"]) for node, words in arrived.items() for path in words["marks"]}
            marks = {path: token for words in arrived.values() for path, token in words["marks"].items()}
            unseen = [_not_shared(path, *places[path], "node 0 does not see") for path in _unseen(marks)]
        own = measure(site, meeting, own, all_processes, say)
        lost = meeting.wait([f"finished/{node}" for node in others], until - time.monotonic(), tell)
        for node in others:
            words = arrived[node]["report"]
            if f"finished/{node}" in lost:
                unseen.append(
                    Finding("arrival", node, words["host"], "it was lost while it measured", "a report", "see what ended it there")
                )
        told = [meeting.hear(f"finished/{node}") if f"finished/{node}" not in lost else arrived[node]["report"] for node in others]
        report = _report(site, [own, *(from_json(NodeReport, words) for words in told)], unseen)
    meeting.tell("report", to_json(report))
    meeting.wait([f"heard/{node}" for node in arrived], LAST_WORD_SECONDS)
    return report


def _follow(site: Site, own: NodeReport, say: Say) -> Report:
    """Another node: arrive, measure, and wait for the verdict."""
    own, processes = _with_torch(site, own)
    meeting = find_meeting(site, say)
    if meeting is None:
        ports = f"{site.host}:{ports_of(site)[0]} to {ports_of(site)[-1]}"
        found = f"no doctor of node 0 at {ports} within {site.job.join_seconds:g} s"
        advice = "see whether node 0 has started, and whether a firewall stands in between (a higher job.join_seconds waits longer)"
        return _report(site, [own], [Finding("arrival", site.node, own.host, found, "node 0", advice)])
    meeting.tell(f"arrived/{site.node}", {"report": to_json(own), "marks": _marks(site), "processes": processes})
    while not (meeting.is_told("began") or meeting.is_told("report")):
        time.sleep(LOOK_SECONDS)
    if meeting.is_told("began"):
        began = meeting.hear("began")
        own = replace(own, clock_offset_seconds=time.time() - began["time"])  # a fraction of a second too much: the wait above
        unseen = [_not_shared(path, site.node, own.host, "it does not see, of node 0,") for path in _unseen(began["marks"])]
        own = measure(site, meeting, replace(own, findings=(*own.findings, *unseen)), began["processes"], say)
        meeting.tell(f"finished/{site.node}", to_json(own))
        while not meeting.is_told("report"):
            time.sleep(LOOK_SECONDS)
    report = from_json(Report, meeting.hear("report"))
    with contextlib.suppress(RuntimeError):  # node 0 waits for this for a while only
        meeting.tell(f"heard/{site.node}", True)
    return report


def _report(site: Site, nodes: list[NodeReport], more: list[Finding]) -> Report:
    findings = [finding for node in nodes for finding in node.findings] + more + compare_nodes(nodes, site.hardware)
    return Report(tuple(nodes), tuple(findings), 0, site.num_nodes, 0.0)


def _with_torch(site: Site, own: NodeReport) -> tuple[NodeReport, int]:
    """What torch says of this node, and how many processes there are going to be."""
    import torch
    from torch.cuda import nccl

    devices, why = torch.cuda.device_count(), ""
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            why = first_line(error)
    facts = {"torch": torch.__version__, "CUDA of torch": torch.version.cuda or "none"}
    if devices:
        facts["NCCL"] = ".".join(map(str, nccl.version()))
        facts["GPUs"] = f"{devices} x {torch.cuda.get_device_name(0)}"
    findings = own.findings
    if (wanted := site.hardware.gpus_per_node) and (devices < wanted or why):
        found = f"torch {torch.__version__} sees {devices} GPUs (driver {own.facts['driver']})" + (f": {why}" if why else "")
        advice = "install the build of torch that fits the driver, and see CUDA_VISIBLE_DEVICES"
        findings = (*findings, Finding("torch and CUDA", site.node, own.host, found, f"{wanted} x {site.hardware.gpu}", advice))
    return replace(own, facts={**own.facts, **facts}, findings=findings), site.processes or devices or site.cpu_processes


def _marks(site: Site) -> dict[str, str]:
    return {str(path): site.token for path in site.marks}


def _unseen(marks: Mapping[str, str]) -> list[str]:
    came_to = within({"marks": lambda: look_for(marks, SHARED_SECONDS)}, SHARED_SECONDS + ANSWER_SECONDS)["marks"]
    return list(marks) if isinstance(came_to, Failed) else came_to


def _not_shared(path: str, node: int, host: str, who: str) -> Finding:
    found = f"{who} the file {path}, though it was written {SHARED_SECONDS:g} s ago"
    advice = "mount the same folder on all nodes under the same path, or correct run.root and job.shared_folders"
    return Finding("shared with others", node, host, found, "a folder that all nodes share", advice)
