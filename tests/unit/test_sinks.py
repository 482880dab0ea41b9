"""Where numbers and pictures go: read back from what was written, and W&B through a module that records."""

import json
import signal
import sys
from io import BytesIO
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_codec.errors import UserError, UserErrors
from megatron_codec.flags import parse_pretrain
from megatron_codec.training import sinks
from megatron_codec.training.pretrain import pretrain
from megatron_codec.training.sinks import JsonLines, Sinks
from megatron_codec.training.step import train_step

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)


def write(*flags: str, first: int = 0, iterations=(1, 2)) -> None:
    opened = Sinks(parse_pretrain(["--data-path", "p", *flags]), first)
    for iteration in iterations:
        opened.scalars(iteration, {"loss": 1 / iteration})
    opened.picture(iterations[-1], "samples", PICTURE)
    opened.close()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read


def test_files_and_tensorboard_hold_numbers_and_pictures(tmp_path):
    save, board = tmp_path / "save", tmp_path / "board"
    write("--save", str(save), "--tensorboard-dir", str(board))
    assert lines(save / "metrics.jsonl") == [{"iteration": 1, "loss": 1.0}, {"iteration": 2, "loss": 0.5}]
    np.testing.assert_array_equal(Image.open(save / "samples" / "iter_0000002.png"), PICTURE)
    read = events(board)
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    [image] = read.Images("samples")
    assert image.step == 2
    np.testing.assert_array_equal(Image.open(BytesIO(image.encoded_image_string)), PICTURE)


def test_a_run_that_goes_on_leaves_out_what_came_after_its_checkpoint(tmp_path):
    flags = ["--save", str(tmp_path), "--tensorboard-dir", str(tmp_path / "board")]
    write(*flags, iterations=(1, 2, 3))
    write(*flags, first=2, iterations=(3, 4))
    assert [line["iteration"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [event.step for event in events(tmp_path / "board").Scalars("loss")] == [1, 2, 3, 4]


def test_one_sink_that_cannot_be_closed_does_not_keep_the_others_open(tmp_path, monkeypatch):
    closed = []

    def close_badly(self):
        closed.append("file")
        raise OSError("disk full")

    monkeypatch.setattr(JsonLines, "close", close_badly)
    for name in ("PictureFiles", "TensorBoard"):
        kind = getattr(sinks, name)
        monkeypatch.setattr(kind, "close", lambda self, name=name: closed.append(name))
    with pytest.raises(OSError, match="disk full"):
        write("--save", str(tmp_path), "--tensorboard-dir", str(tmp_path / "board"))
    assert sorted(closed) == ["PictureFiles", "TensorBoard", "file"]


class FakeWandb(ModuleType):
    """Takes the calls that `WeightsAndBiases` makes of wandb, and records them."""

    def __init__(self):
        super().__init__("wandb")
        self.calls: list[tuple] = []
        self.Image = lambda picture: ("image", picture.size)

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        run = SimpleNamespace(id=arguments["id"] or "abc123")
        run.define_metric = lambda *args, **kwargs: self.calls.append(("define_metric", args, kwargs))
        run.log = lambda values: self.calls.append(("log", values))
        run.finish = lambda: self.calls.append(("finish",))
        return run


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_same_numbers_and_pictures(tmp_path, wandb):
    flags = ["--save", str(tmp_path), "--wandb-project", "codec", "--wandb-exp-name", "tiny"]
    write(*flags)
    (_, arguments), *calls = wandb.calls
    assert arguments["project"] == "codec" and arguments["name"] == "tiny"
    assert arguments["dir"] == str(tmp_path) and arguments["id"] is None and arguments["resume"] is None
    assert arguments["config"]["training"]["train_iters"] == 1000
    assert calls == [
        ("define_metric", ("iteration",), {}),
        ("define_metric", ("*",), {"step_metric": "iteration"}),
        ("log", {"iteration": 1, "loss": 1.0}),
        ("log", {"iteration": 2, "loss": 0.5}),
        ("log", {"iteration": 2, "samples": ("image", (4, 4))}),
        ("finish",),
    ]
    assert (tmp_path / "wandb_id.txt").read_text() == "abc123\n"


def test_a_run_that_goes_on_goes_on_in_wandb(tmp_path, wandb):
    save = str(tmp_path / "save")
    write("--save", save, "--wandb-project", "codec")
    for load in (save, f"{save}/iter_0000002"):
        elsewhere = str(tmp_path / "elsewhere")
        write("--save", elsewhere, "--load", load, "--wandb-project", "codec", first=2, iterations=(3,))
        arguments = [call[1] for call in wandb.calls if call[0] == "init"][-1]
        assert (arguments["id"], arguments["resume"]) == ("abc123", "allow")
        assert (tmp_path / "elsewhere" / "wandb_id.txt").read_text() == "abc123\n"
    # From step 0, whatever the weights, it is another run.
    write("--save", save, "--load", save, "--finetune", "--wandb-project", "codec")
    assert [call[1]["id"] for call in wandb.calls if call[0] == "init"][-1] is None


def test_wandb_keeps_its_files_where_it_is_told(tmp_path, wandb):
    folder = tmp_path / "a" / "b"
    write("--save", str(tmp_path), "--wandb-project", "codec", "--wandb-save-dir", str(folder))
    assert wandb.calls[0][1]["dir"] == str(folder) and folder.is_dir()
    write("--wandb-project", "codec")
    assert [call[1]["dir"] for call in wandb.calls if call[0] == "init"][-1] is None


def test_a_project_that_cannot_be_opened_is_told_and_the_other_sinks_are_closed(tmp_path, wandb, monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("no API key\nand a long explanation")

    closed = []
    wandb.init = refuse
    monkeypatch.setattr(JsonLines, "close", lambda self: closed.append(self))
    with pytest.raises(
        UserError, match=r"--wandb-project codec: cannot be opened \(RuntimeError: no API key\); run `wandb"
    ):
        write("--save", str(tmp_path), "--wandb-project", "codec")
    assert len(closed) == 1


def test_a_package_that_is_missing_is_a_fault_of_the_command_line(tmp_path, monkeypatch):
    found = {"tensorboard": SimpleNamespace(origin="x.py")}
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: found.get(name))
    config = parse_pretrain(["--wandb-project", "codec", "--tensorboard-dir", "board"])
    told = ["--wandb-project codec: needs the package wandb, which is not installed; pip install wandb"]
    assert [str(fault) for fault in sinks.faults(config)] == told
    found["wandb"] = SimpleNamespace(origin=None)  # ./wandb, the folder that W&B writes into
    assert [str(fault) for fault in sinks.faults(config)] == told
    found.clear()
    assert len(list(sinks.faults(config))) == 2
    assert not list(sinks.faults(parse_pretrain([])))


def test_everything_that_is_wrong_is_told_at_once_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "_installed", lambda package: package != "wandb")
    command = ["--mock-data", "--save", str(tmp_path / "save"), "--wandb-project", "codec"]
    config = parse_pretrain([*command, "--profile-steps", "3", "2", "--sample-interval", "5"])
    with pytest.raises(UserErrors) as caught:
        pretrain(config)
    told = [str(fault) for fault in caught.value.faults]
    assert [text.partition(":")[0] for text in told] == [
        "--sample-interval 5",
        "--profile-steps 3 2",
        "--wandb-project codec",
    ]
    assert not (tmp_path / "save").exists()


def test_a_step_that_fails_leaves_what_was_measured_before(corpus, tmp_path, monkeypatch):
    def fails_at_the_fourth(model, optimizer, schedule, train, iteration, *rest):
        if iteration == 3:
            raise RuntimeError("out of memory")
        return train_step(model, optimizer, schedule, train, iteration, *rest)

    monkeypatch.setattr("megatron_codec.training.pretrain.train_step", fails_at_the_fourth)
    before = signal.getsignal(signal.SIGTERM)
    flags = [*corpus.flags, "--tensorboard-dir", str(tmp_path / "board")]
    with pytest.raises(RuntimeError, match="out of memory"):
        pretrain(parse_pretrain(flags))
    assert [event.step for event in events(tmp_path / "board").Scalars("loss")] == [1, 2, 3]
    assert signal.getsignal(signal.SIGTERM) == before
