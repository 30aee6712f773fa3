"""The W&B dashboard as code: which plots there are, in which order, over which axes.

In: the table below, a project. Out: a workspace of `wandb-workspaces`, to be saved or printed; it is built without a network. The names are
those of `metrics.jsonl`; a plot of what a run does not have stays empty.
"""

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.errors import UserError

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as workspaces

NAME = "pretrain"
SMOOTHING = 0.6
"""Of W&B's own time-weighted running mean; the original stays behind it."""


@dataclass(frozen=True)
class Plot:
    """Lines over one axis."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    """A regular expression instead, where the names depend on the run: one plot of all that match."""
    x: str = "tokens_seen"
    unit: str | None = None
    is_log: bool = False
    is_smooth: bool = False
    from_zero: bool = False
    is_stacked: bool = False


SECTIONS: dict[str, tuple[Plot, ...]] = {
    "Health": (
        Plot("Loss", ("loss",), unit="nats per token", is_log=True, is_smooth=True),
        Plot("Gradient norm, before clipping", ("gradient_norm",), is_log=True),
        Plot("Skipped steps", ("skipped_steps",), from_zero=True),
        Plot("Tokens per second", ("tokens_per_second",), is_smooth=True, from_zero=True),
        Plot("Spikes: robust standard deviations", ("spike/z",), x="step"),
        Plot("Slowest rank, to the median", ("ranks/slowest_ratio", "slow_ranks/ratio"), x="step"),
    ),
    "Loss": (
        Plot("Loss", ("loss",), unit="nats per token", is_log=True, is_smooth=True),
        Plot("Held out", ("held_out/nats_per_token",), unit="nats per token", is_log=True),
        Plot("Held out, bits per byte", ("held_out/bits_per_byte",), unit="bits per byte"),
        Plot("Held out, by source", pattern=r"held_out/.+/nats_per_token", unit="nats per token", is_log=True),
        Plot("Held out, by source, bits per byte", pattern=r"held_out/.+/bits_per_byte", unit="bits per byte"),
        Plot("Tasks", pattern=r"task/.+"),
        Plot("Learning rate", ("learning_rate",), from_zero=True),
        Plot("Parameter norm", ("parameter_norm",)),
        Plot("Gradient norm of each layer", pattern=r"norm/gradients/.+", is_log=True),
        Plot("Weight norm of each layer", pattern=r"norm/weights/.+"),
        Plot("Loss scale (fp16)", ("loss_scale",), is_log=True),
    ),
    "Throughput": (
        Plot("Tokens per second", ("tokens_per_second",), is_smooth=True, from_zero=True),
        Plot("Tokens per second and device", ("tokens_per_second_per_device",), is_smooth=True, from_zero=True),
        Plot("Utilisation", ("mfu/palm", "mfu/causal", "mfu/hardware"), unit="share of the peak", from_zero=True),
        Plot(
            "Where a step goes",
            ("seconds/data_wait", "seconds/forward", "seconds/backward", "seconds/optimizer", "seconds/other"),
            unit="seconds",
            from_zero=True,
            is_stacked=True,
        ),
        Plot("Step", ("step_seconds", "ranks/median_seconds"), unit="seconds", is_smooth=True, from_zero=True),
        Plot("Slowest rank", ("ranks/slowest",), x="step"),
    ),
    "Memory": (
        Plot("Device", ("memory/allocated_bytes", "memory/reserved_bytes"), unit="bytes", from_zero=True),
        Plot("Host, of rank 0", ("memory/host_bytes",), unit="bytes", from_zero=True),
    ),
    "Data": (
        Plot("Waited for data", ("data_wait_share",), unit="share of the time", from_zero=True),
        Plot("Waited for data, per step", ("seconds/data_wait",), unit="seconds", from_zero=True),
        Plot("Tokens seen", ("tokens_seen",), x="step", from_zero=True),
        Plot("Held-out tokens", ("held_out/num_tokens",), from_zero=True),
        Plot("Held-out tokens, by source", pattern=r"held_out/.+/num_tokens", from_zero=True),
    ),
    "Restarts": (
        Plot("Attempt", ("attempt",), x="step"),
        Plot("Where attempts began", ("segment/from_step",), x="segment/attempt", unit="step"),
        Plot("Rollbacks", ("rollback/number",), x="step"),
        Plot("A save stops training for", ("checkpoint/stall_seconds",), x="step", unit="seconds", from_zero=True),
        Plot("Size of a save", ("checkpoint/bytes",), x="step", unit="bytes", from_zero=True),
        Plot("Skipped steps in a row", ("skip/in_a_row",), x="step"),
    ),
}
"""In the order in which one looks: is it well, does it learn, is it fast, does it fit, is it fed, what happened to it."""


def build_workspace(entity: str, project: str) -> "workspaces.Workspace":
    """The dashboard of a project; no network. Raises UserError where the package is missing."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("the package wandb-workspaces is not installed: pip install 'pretrain[dashboard]'.")
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(name=name, panels=[_panel(plot, number) for number, plot in enumerate(plots)], is_open=True)
        for name, plots in SECTIONS.items()
    ]
    settings = workspaces.WorkspaceSettings(x_axis="tokens_seen", remove_legends_from_panels=False, max_runs=20)
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def describe_workspace(workspace: "workspaces.Workspace") -> dict[str, Any]:
    """What would be sent to W&B, as JSON."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)  # pyright: ignore[reportPrivateUsage]


def save_workspace(entity: str | None, project: str) -> str:
    """Make the dashboard in W&B; returns its address. Raises UserError where W&B cannot be asked."""
    import wandb

    from pretrain.watch.wandb_run import set_up

    try:
        set_up(wandb.Settings(silent=True))
        entity = entity or wandb.Api(timeout=30).default_entity
        workspace = build_workspace(entity or "", project)
        return workspace.save().url
    except UserError:
        raise
    except Exception as error:  # of the client's own classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"the dashboard could not be saved: {reason}. With --print its definition is written here.") from None


def _panel(plot: Plot, number: int) -> Any:
    import wandb_workspaces.reports.v2 as reports
    from wandb_workspaces.reports.v2.interface import Layout

    return reports.LinePlot(
        title=plot.title,
        x=plot.x,
        y=list(plot.metrics),
        metric_regex=plot.pattern,
        title_x={"tokens_seen": "tokens seen", "segment/attempt": "attempt"}.get(plot.x, plot.x),
        title_y=plot.unit,
        log_y=plot.is_log or None,
        range_y=(0, None) if plot.from_zero else (None, None),
        smoothing_type="exponentialTimeWeighted" if plot.is_smooth else "none",
        smoothing_factor=SMOOTHING if plot.is_smooth else 0,
        smoothing_show_original=plot.is_smooth or None,
        plot_type="stacked-area" if plot.is_stacked else "line",
        layout=Layout(x=8 * (number % 3), y=6 * (number // 3), w=8, h=6),
    )
