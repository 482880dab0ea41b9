"""tools/evaluate.py as users run it, with features of EfficientNet-Lite0: killed, started again, refused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.forks import run_tool

ROOT = Path(__file__).parents[2]


def arguments(corpus, trained, *more):
    flags = [
        *("--load", trained.folder, "--data", corpus.pictures, "--ratios", 0, 0.5),
        *("--num-samples", 8, "--seeds", 1, "--top-k", 0, 40, *more),
    ]
    return list(map(str, flags))


def finished_sets(output: Path) -> list[Path]:
    """Of models; what is being made has another name."""
    return [path for path in output.glob("sets/model*/set.json") if path.parent.suffix != ".partial"]


def test_a_killed_evaluation_goes_on_and_ends_in_a_report(corpus, trained, tmp_path):
    output = tmp_path / "evaluation"  # which it is where nothing else is said
    whole = [sys.executable, ROOT / "tools/evaluate.py", *arguments(corpus, trained)]
    running = subprocess.Popen(whole, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not finished_sets(output):
        assert running.poll() is None, "it ended before a set was there"
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = {path: path.stat().st_mtime_ns for path in finished_sets(output)}
    assert before and not (output / "report.md").exists()

    done = run_tool("evaluate", *arguments(corpus, trained), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    results = json.loads((output / "results.json").read_text())
    assert {row["completer"].partition(" (")[0] for row in results["rows"]} == {
        "model", "original", "other real ones", "other real ones, jpeg", "original, jpeg", "blurred", "noise",
    }  # fmt: skip
    assert sum(row["completer"].endswith("top-k 40") for row in results["rows"]) == 2
    of = {row["completer"]: row["numbers"]["frechet"]["mean"] for row in results["rows"] if not row["ratio"]}
    assert abs(of["original"]) < 1e-3 < of["original, jpeg"] < of["noise"]
    assert of["blurred"] < of["noise"]
    scores = results["checkpoints"][0]["held_out"]
    assert scores["pictures"] > 0 and scores["nats_per_token"] < 6
    text = (output / "report.md").read_text()
    assert "Frechet distance (EfficientNet-Lite0)" in text and "FID" not in text
    assert "not more than the 1280 features" in text and "warning: 8 pictures" in done.stdout

    folder = output / results["rows"][0]["sets"][0]
    checked = run_tool("check_jpeg", "--quiet", folder)
    assert checked.returncode == 0


def test_a_user_is_told_what_is_wrong_without_a_traceback(corpus, trained, tmp_path):
    wrong = arguments(
        corpus, trained, "--output", tmp_path / "out", "--inception", "absent.pt", "--neighbours", 8
    )
    done = run_tool("evaluate", *wrong)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: --num-samples 8: must be at least 9" in done.stderr
    assert "error: --inception absent.pt: there is no such file; get inception-2015-12-05.pt" in done.stderr
