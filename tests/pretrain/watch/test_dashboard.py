"""The dashboard as code: built without a network, with the names of the contract, in the order it says; saved by the genuine packages."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from pretrain.watch import dashboard
from pretrain.watch.dashboard import SECTIONS, Plot, build_workspace, describe_workspace
from tests.pretrain.verbs import call
from tests.pretrain.watch.tracked import environment_for, pretrain, write_run
from tests.pretrain.watch.wandb_server import Server

NAMES = (
    *("loss", "learning_rate", "gradient_norm", "tokens_per_second", "tokens_per_second_per_device", "data_wait_share"),
    *("skipped_steps", "loss_scale", "step_seconds", "seconds/data_wait", "seconds/forward", "seconds/backward", "seconds/optimizer"),
    *("seconds/other", "mfu/palm", "mfu/causal", "mfu/hardware", "memory/allocated_bytes", "memory/reserved_bytes"),
    *("memory/host_bytes", "parameter_norm", "norm/weights/layers.0", "norm/gradients/layers.0", "held_out/nats_per_token"),
    *("held_out/bits_per_byte", "held_out/num_tokens", "held_out/books/nats_per_token", "held_out/books/bits_per_byte"),
    *("held_out/books/num_tokens", "task/arithmetic/exact_match", "spike/z", "skip/in_a_row", "slow_ranks/ratio", "rollback/number"),
    *("ranks/slowest", "ranks/slowest_ratio", "ranks/median_seconds", "checkpoint/stall_seconds", "checkpoint/bytes", "attempt"),
    "tokens_seen",
)
"""Of what a run writes down as numbers, all that one looks at."""


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")


def shows(plot: Plot, name: str) -> bool:
    return name in plot.metrics or (plot.pattern is not None and re.fullmatch(plot.pattern, name) is not None)


@pytest.mark.parametrize("name", NAMES)
def test_each_value_is_shown(name: str) -> None:
    assert any(shows(plot, name) for plots in SECTIONS.values() for plot in plots)


def test_a_source_is_not_taken_for_all_sources() -> None:
    by_source = next(plot for plot in SECTIONS["Loss"] if plot.pattern == r"held_out/.+/nats_per_token")
    assert not shows(by_source, "held_out/nats_per_token")


def lines(definition: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    sections = definition["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}


def test_its_definition_is_printed_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A door of ours would hear a knock."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    folder = write_run(tmp_path / "mine", 10, wandb_project="atlas", wandb_entity="us")
    definition = json.loads(call("wandb", "dashboard", folder, "--print").out)
    assert json.loads(call("wandb", "dashboard", folder / "run.yaml", "--print").out)["project"] == "atlas"
    assert (definition["entity"], definition["project"]) == ("us", "atlas")
    shown = lines(definition)
    assert list(shown) == ["Health", "Loss", "Throughput", "Memory", "Data", "Restarts"]
    for name, plots in SECTIONS.items():
        for plot, config in zip(plots, shown[name], strict=True):
            assert config["chartTitle"] == plot.title and config["xAxis"] == plot.x
            assert config.get("metrics", []) == list(plot.metrics) and config.get("metricRegex") == plot.pattern
            assert bool(config.get("yLogScale")) == plot.is_log
            assert (config.get("smoothingWeight") or 0) == (0.6 if plot.is_smooth else 0)
    assert shown["Loss"][0]["xAxis"] == "tokens_seen" and shown["Loss"][0]["yLogScale"] is True


def test_without_a_key_or_the_package_a_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_run(tmp_path / "mine", 10)
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        call("wandb", "dashboard", folder)
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pretrain\[dashboard\]'"):
        call("wandb", "dashboard", folder, "--print")
    assert importlib.util is dashboard.importlib.util


def test_it_is_the_same_each_time_but_for_the_names_of_panels() -> None:
    def plain(definition: dict[str, Any]) -> str:
        return re.sub(r'"(__id__|id)": "[^"]*"', "", json.dumps(definition))

    assert plain(describe_workspace(build_workspace("e", "p"))) == plain(describe_workspace(build_workspace("e", "p")))


def test_it_is_saved_on_a_server(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", 10, wandb_project="atlas")
    with Server() as server:
        done = pretrain(environment_for(server), "wandb", "dashboard", folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("http") and "atlas" in done.stdout
        (view,) = server.views
    assert list(lines({"spec": json.loads(view["spec"])})) == list(SECTIONS)
