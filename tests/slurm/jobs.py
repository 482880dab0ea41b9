"""What run.sh does while SLURM is up: `python -m tests.slurm.jobs FOLDER [NAME ...]`.

The job scripts of examples/ with the tiny preset in place of 7B, two ranks over gloo, under `sbatch`, under
`bash` within `salloc`, and under `bash` alone; and jobs that are stopped, saved, queued again and finished.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.tiny import Corpus, assert_same_course, make_corpus, read_metrics

STEPS = 60
JPEG, AVC = "examples/pretrain_jpeglm_7b.sh", "examples/pretrain_avclm_7b.sh"
# In place of the header's four nodes of eight.
SIZE = ["--nodes=1", "--gpus-per-node=2"]
MINUTES = 5


class Jobs:
    """One SLURM's jobs.

    Args:
        folder: where data, checkpoints and logs go.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.corpus: Corpus = make_corpus(folder)

    def environment(self, name: str, **changed: str) -> dict[str, str]:
        """The variables of a run that saves in folder/NAME."""
        return os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PRESET": "jpeglm-tiny",
            "TP": "2",
            "CP": "1",
            "TRAIN_DATA": self.corpus.train,
            "VALID_DATA": self.corpus.valid,
            "SAVE": str(self.folder / name),
            "TRAINING_ARGS": f"--train-iters {STEPS} --lr-warmup-iters 4",
            "LOGGING_ARGS": "--log-interval 1 --eval-iters 1",
            **changed,
        }

    def submit(self, name: str, script: str | None, *options: str, arguments=(), **changed: str) -> str:
        """Gives a script, or what --wrap says, to sbatch; the job's number."""
        command = [script, *arguments] if script else []
        done = subprocess.run(
            [
                "sbatch",
                "--parsable",
                *SIZE,
                f"--output={self.folder}/{name}.log",
                *options,
                *command,
            ],
            env=self.environment(name, **changed),
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A value of `scontrol show job`."""
        text = subprocess.check_output(["scontrol", "show", "job", "--oneliner", job], text=True)
        return next(word.partition("=")[2] for word in text.split() if word.startswith(f"{name}="))

    def wait(self, what: str, until: Callable[[], bool], minutes: int = MINUTES) -> None:
        """Looks until something is so; an AssertionError after so many minutes."""
        end = time.monotonic() + minutes * 60
        while not until():
            assert time.monotonic() < end, f"{what}: not within {minutes} minutes"
            time.sleep(0.2)

    def completed(self, name: str, job: str, restarts: int, minutes: int = MINUTES) -> None:
        """Waits for the end of a job, which has to be a good one."""
        final = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(f"{name}: the end of job {job}", lambda: self.field(job, "JobState") in final, minutes)
        log = (self.folder / f"{name}.log").read_text()
        assert self.field(job, "JobState") == "COMPLETED", log
        assert int(self.field(job, "Restarts")) >= restarts, log

    def lines(self, name: str) -> int:
        """How many lines of metrics there are so far."""
        path = self.folder / name / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def saved(self, name: str) -> int:
        """The step of the latest checkpoint."""
        return int((self.folder / name / "latest_checkpointed_iteration.txt").read_text())

    def finished(self, name: str, steps: int = STEPS) -> dict[int, dict[str, float]]:
        """The metrics of a run, which has made all steps once and saved the last."""
        latest = self.saved(name)
        metrics = read_metrics(self.folder / name / "metrics.jsonl")
        assert latest == steps and list(metrics) == list(range(1, steps + 1)), (latest, list(metrics))
        assert metrics[steps]["loss"] < metrics[1]["loss"] and "validation_loss" in metrics[steps]
        return metrics


def sbatch(jobs: Jobs) -> None:
    """A job of two ranks, from its header to its end."""
    job = jobs.submit("sbatch", JPEG)
    jobs.completed("sbatch", job, restarts=0)
    jobs.finished("sbatch")
    log = (jobs.folder / "sbatch.log").read_text()
    assert "TP=2 PP=1 DP=1" in log and "over gloo" in log, log
    # Started once more, it says that all is done.
    again = jobs.submit("sbatch", JPEG)
    jobs.completed("sbatch", again, restarts=0)
    assert "has made all of --train-iters" in (jobs.folder / "sbatch.log").read_text()


def allocation(jobs: Jobs) -> None:
    """`bash` within an allocation, with another layout and arguments."""
    done = subprocess.run(
        ["salloc", *SIZE, "bash", JPEG, "--global-batch-size", "12", "--train-iters", "20"],
        env=jobs.environment("allocation", TP="1"),
        capture_output=True,
        text=True,
        timeout=MINUTES * 60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TP=1 PP=1 DP=2" in done.stdout, done.stdout
    jobs.finished("allocation", 20)


def alone(jobs: Jobs) -> None:
    """`bash` without SLURM: Ctrl-C and SIGTERM make it save and end well, and the same command goes on."""
    command, environment = ["bash", JPEG], jobs.environment("alone", GPUS_PER_NODE="2")

    def ctrl_c(pid: int) -> None:
        os.killpg(pid, signal.SIGINT)  # as a terminal does, to all at once

    def sigterm(pid: int) -> None:
        os.kill(pid, signal.SIGTERM)

    for steps, stop in ((3, ctrl_c), (20, sigterm)):
        run = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        with run:
            jobs.wait(f"alone: {steps} steps", lambda: jobs.lines("alone") >= steps)  # noqa: B023
            stop(run.pid)
            output = run.communicate(timeout=MINUTES * 60)[0]
        assert run.returncode == 0 and "stopped on request" in output, output
        assert jobs.saved("alone") < STEPS
    subprocess.run(command, env=environment, check=True, timeout=MINUTES * 60, stdout=subprocess.DEVNULL)
    jobs.finished("alone")


def stopped(jobs: Jobs) -> None:
    """Sent USR1, a job saves, is queued again, and takes the course of one that was never stopped."""
    job = jobs.submit("stopped", AVC)
    jobs.wait("stopped: three steps", lambda: jobs.lines("stopped") >= 3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    jobs.completed("stopped", job, restarts=1)
    metrics = jobs.finished("stopped")
    log = (jobs.folder / "stopped.log").read_text()
    for words in ("stopped on request", "is queued again", "going on from"):
        assert words in log, log
    if (jobs.folder / "sbatch/metrics.jsonl").exists():
        assert_same_course(metrics, jobs.finished("sbatch"))


def ended(jobs: Jobs) -> None:
    """TERM to the batch shell, under --wrap too: saved, and not queued again."""
    script = f"--wrap=exec bash {AVC} --seed 1"
    options = ("--requeue", "--open-mode=append", script)
    job = jobs.submit("ended", None, *options)
    jobs.wait("ended: three steps", lambda: jobs.lines("ended") >= 3)
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
    jobs.completed("ended", job, restarts=0)
    assert jobs.field(job, "Restarts") == "0"
    assert 3 <= jobs.saved("ended") < STEPS


def failing(jobs: Jobs) -> None:
    """A fault of the run is the job's, and is not queued again."""
    job = jobs.submit("failing", JPEG, TRAIN_DATA=str(jobs.folder / "missing"))
    jobs.wait("failing: its end", lambda: jobs.field(job, "JobState") == "FAILED")
    assert jobs.field(job, "Restarts") == "0"


def time_limit(jobs: Jobs) -> None:
    """A run longer than its time limit comes to its end over several starts.

    SLURM may send the signal a minute early, and takes that long to notice. On a machine that makes the steps
    within the first half minute there is nothing to see, and the test says so by failing.
    """
    steps, options = 600, ["--time=2", "--signal=B:USR1@60"]
    arguments = ("--train-iters", str(steps))
    job = jobs.submit("time_limit", JPEG, *options, arguments=arguments)
    jobs.completed("time_limit", job, restarts=1, minutes=20)
    jobs.finished("time_limit", steps)


TESTS = {test.__name__: test for test in (alone, sbatch, allocation, stopped, ended, failing, time_limit)}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or [name for name in TESTS if name != "time_limit"]
    unknown = set(names) - TESTS.keys()
    assert not unknown, f"{unknown}: use some of {', '.join(TESTS)}"
    jobs = Jobs(folder)
    for name in names:
        start = time.monotonic()
        TESTS[name](jobs)
        print(f"{name}: passed in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
