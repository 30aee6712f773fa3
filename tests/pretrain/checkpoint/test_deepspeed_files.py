"""DeepSpeed's own checkpoints: read to the same bits at every stage, and written so that DeepSpeed reads them to the same bits."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.loader import dump_config
from pretrain.checkpoint.deepspeed_files import STAND_INS, DeepSpeedFiles
from pretrain.checkpoint.index import FragmentIndex
from pretrain.checkpoint.verify import Commit, list_commits, read_commit
from pretrain.state import TrainState
from tests.conftest import run_on_ranks
from tests.pretrain.checkpoint.deepspeed_on_ranks import STEPS, bits_of
from tests.pretrain.verbs import call
from tests.tiny import write_tiny_dataset
from tests.training import tiny_config

SEED = 11
SAVED = {
    "bf16-1": {"parallel__zero_stage": "1"},
    "bf16-2": {"parallel__zero_stage": "2"},
    "bf16-3": {"parallel__zero_stage": "3"},
    "bf16-3-small": {
        "parallel__zero_stage": "3",
        "deepspeed": "{zero_optimization: {sub_group_size: 1500, stage3_param_persistence_threshold: 0}}",
    },
    "fp16-2": {"parallel__zero_stage": "2", "precision": "fp16"},
    "fp32-1": {"parallel__zero_stage": "1", "precision": "fp32"},
    "fp32-0": {"parallel__zero_stage": "0", "precision": "fp32"},
}
STAGES = {"bf16-1": 1, "bf16-2": 2, "bf16-3": 3, "bf16-3-small": 3, "fp16-2": 2, "fp32-1": 1}
LOADED = {name: SAVED[name] for name in ("bf16-1", "bf16-2", "bf16-3", "fp32-1")}


class Saved:
    """Checkpoints that DeepSpeed wrote on two ranks, and the bits of what its engines held."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.dataset, self.runs = folder / "saved", folder / "data", folder / "runs"
        write_tiny_dataset(self.dataset, num_documents=120)
        print(f"seed {SEED}")
        arguments = {"dataset": str(self.dataset), "runs": str(self.runs), "out": str(self.folder), "cases": SAVED, "seed": SEED}
        ranks = folder / "ranks"
        ranks.mkdir()
        self.bits = run_on_ranks("tests.pretrain.checkpoint.deepspeed_on_ranks:save_with_deepspeed", 2, arguments, 110, ranks)[0]

    def run_file(self, folder: Path, **settings: str) -> Path:
        """A run file for the model that was saved, with its run in `folder`/taken."""
        path = folder / "run-file.yaml"
        path.write_text(dump_config(tiny_config(self.dataset, folder, run__name="taken", **settings)))
        return path


@pytest.fixture(scope="module", name="saved")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("name", STAGES)
def test_its_files_are_read_to_the_same_bits_without_running_code(saved: Saved, tmp_path: Path, name: str) -> None:
    files = DeepSpeedFiles(saved.folder / name)
    assert (files.num_ranks, files.zero_stage, files.step, files.precision) == (2, STAGES[name], STEPS, name[:4])
    written = {key: value for rank in range(2) for key, value in files.image(rank, [], {}).write(tmp_path).items()}
    commit = Commit(tmp_path, TrainState(STEPS), written, {}, {}, 2, 1, 1.0, 0)
    assert bits_of(commit) == saved.bits[name]
    with FragmentIndex(commit) as index:
        assert index.loss_scale.keys() == ({"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"} if name == "fp16-2" else set())


def test_a_run_goes_on_from_them(saved: Saved, tmp_path: Path, run_on_ranks: Callable[..., list[Any]]) -> None:
    """Two ranks of stage 3 become one rank of stage 1, and the run ends."""
    run_file = saved.run_file(tmp_path, model__dropout="0.0")
    done = call("checkpoints", "import", saved.folder / "bf16-3-small", run_file)
    assert done.status == 0
    assert "2 rank(s) of stage 3 at step 3, taken over and read back; the data goes on behind 24 samples" in done.err
    commit = read_commit(tmp_path / "taken/checkpoints/step-00000003")
    assert bits_of(commit) == saved.bits["bf16-3-small"]
    assert commit.state == TrainState(STEPS, 24, 24 * 32)
    with pytest.raises(UserError, match="has checkpoints of its own"):
        call("checkpoints", "import", saved.folder / "bf16-1", run_file)
    arguments = {"dataset": str(saved.dataset), "runs": str(tmp_path), "cases": {"taken": {"model__dropout": "0.0"}}, "attempt": 2}
    (rank,) = run_on_ranks("tests.training:train_runs", 1, arguments)
    assert (rank["taken"]["outcome"], rank["taken"]["steps"]) == ("done", [3, 10])
    assert [step for step, *_ in rank["taken"]["losses"]] == [*range(4, 11)]
    assert list_commits(tmp_path / "taken/checkpoints")[0].name == "step-00000010"


class Foreign:
    """Of a client's own, in its client state; opened, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_of_anything_else_is_opened_only_on_demand(saved: Saved, tmp_path: Path) -> None:
    folder, trace = tmp_path / "copy", tmp_path / "it ran"
    shutil.copytree(saved.folder / "bf16-1", folder)
    path = folder / f"global_step{STEPS}" / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "mine": Foreign(trace)}, path, pickle_module=pickle)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt holds more than .*could run any code.*--run-its-pickle"):
        DeepSpeedFiles(folder)
    assert not trace.exists()
    assert DeepSpeedFiles(folder, trusted=True).step == STEPS
    assert trace.exists()


def test_what_is_not_whole_is_refused_by_name(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        DeepSpeedFiles(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no checkpoint of DeepSpeed's"):
        DeepSpeedFiles(tmp_path)
    with pytest.raises(UserError, match=f"has no checkpoint 'other'; its tags: global_step{STEPS}"):
        DeepSpeedFiles(saved.folder / "bf16-1", "other")
    with pytest.raises(UserError, match="written at stage 0, whose moments carry no names"):
        DeepSpeedFiles(saved.folder / "fp32-0")
    for name, missing in (("bf16-1", 1), ("bf16-3", 0)):
        folder = tmp_path / name
        shutil.copytree(saved.folder / name, folder)
        gone = folder / f"global_step{STEPS}" / f"bf16_zero_pp_rank_{missing}_mp_rank_00_optim_states.pt"
        content = gone.read_bytes()
        gone.unlink()
        with pytest.raises(UserError, match=f"written by 2 ranks and lacks {gone.name}"):
            DeepSpeedFiles(folder)
        gone.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=f"{gone.name} cannot be read"):
            files = DeepSpeedFiles(folder)
            files.image(missing, [], {})


def test_a_model_of_other_parameters_is_refused_and_nothing_is_left(saved: Saved, tmp_path: Path) -> None:
    run_file = saved.run_file(tmp_path, model__num_layers="3")
    with pytest.raises(UserError, match=r"other parameters than the run file's model \(11\): blocks.2.attention.key.weight: found None"):
        call("checkpoints", "import", saved.folder / "bf16-1", run_file)
    assert not (tmp_path / "taken").exists()


def test_what_is_exported_is_read_by_deepspeed_to_the_same_bits(
    saved: Saved, tmp_path: Path, run_on_ranks: Callable[..., list[Any]]
) -> None:
    """By its script for the weights, and by its universal loader at every stage on two ranks, which then learn a step."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run_file = saved.run_file(tmp_path)
    call("checkpoints", "import", saved.folder / "bf16-1", run_file)
    out = tmp_path / "exported"
    with pytest.raises(UserError, match="Add --deepspeed"):
        call("checkpoints", "export", tmp_path / "taken", out)
    done = call("checkpoints", "export", tmp_path / "taken", out, "--deepspeed")
    assert done.status == 0 and "read back and equal bit for bit" in done.err
    with pytest.raises(UserError, match="is there already and not empty"):
        call("checkpoints", "export", tmp_path / "taken", out, "--deepspeed")
    with pytest.raises(UserError, match="has no checkpoint of step 7; it has 3"):
        call("checkpoints", "export", tmp_path / "taken", tmp_path / "other", "--deepspeed", "--step", "7")

    weights = get_fp32_state_dict_from_zero_checkpoint(str(out))
    wanted = saved.bits["bf16-1"]
    assert {name: weight.contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex() for name, weight in weights.items()} == {
        name: values["weight"] for name, values in wanted.items()
    }
    arguments = {"dataset": str(saved.dataset), "runs": str(saved.runs), "exported": str(out), "out": str(tmp_path / "loaded")}
    found = run_on_ranks(
        "tests.pretrain.checkpoint.deepspeed_on_ranks:load_with_deepspeed", 2, {**arguments, "cases": LOADED, "seed": SEED}
    )[0]
    for name, case in found.items():
        assert case["bits"] == wanted, name
        assert (case["steps"], case["decay"]) == (STEPS, [0.1, 0.0]), name
        assert case["state"]["samples_seen"] == 24
    losses = [case["loss"] for case in found.values()]
    assert max(losses) - min(losses) < 1e-2 * max(losses)


def test_a_member_by_its_name_is_a_stage_and_nothing_else_is_looked_up() -> None:
    """Python 3.11.0 to 3.11.3 write ZeroStageEnum's members as `getattr(ZeroStageEnum, name)`."""
    stage = STAND_INS["deepspeed.runtime.zero.config.ZeroStageEnum"]
    look_up = STAND_INS["builtins.getattr"]
    assert [look_up(stage, name) for name in ("optimizer_states", "gradients", "weights")] == [1, 2, 3]
    for kind, name in ((int, "from_bytes"), (stage, "__subclasses__"), (stage, "from_bytes"), (type, "weights")):
        with pytest.raises(pickle.UnpicklingError):
            look_up(kind, name)
