"""Completes real pictures at several prompt ratios and says how near the completions are to the real ones.

    python tools/evaluate.py --load checkpoints --data photos --subset test --hold-out 0.01 \\
        --ratios 0.25 0.5 0.75 --num-samples 200 --output evaluation
    python tools/evaluate.py --load checkpoints --data photos --ratios 0 --top-k 40 80 --top-p 0.9 1.0 \\
        --inception inception-2015-12-05.pt --num-samples 5000 --output evaluation

Ends in OUTPUT/report.md, report.html and results.json. Stopped at any moment, the same command goes on where
it was. docs/evaluation.md says what each number means.
"""

import os
import sys

import tyro

from megatron_codec.errors import run_tool


def main() -> None:
    from megatron_codec import parallel
    from megatron_codec.evaluation.evaluate import evaluate
    from megatron_codec.evaluation.evaluate_config import EvaluateConfig

    config = tyro.cli(EvaluateConfig, description=__doc__)
    try:
        results = evaluate(config)
    except KeyboardInterrupt:
        print(f"stopped; {config.output} is where the same command goes on", file=sys.stderr)
        raise
    finally:
        parallel.shut_down()
    if config.export and os.environ.get("RANK", "0") == "0":
        print(f"see {config.output / 'export'}")
    if not results:
        return
    name = results["names"]["frechet"]
    for row in results["rows"]:
        number = row["numbers"]["frechet"]
        print(f"ratio {row['ratio']:g}, {row['completer']}: {name} {number['mean']:.3f}")
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    print(f"see {config.output / 'report.md'}, {config.output / 'report.html'}")


if __name__ == "__main__":
    run_tool(main)
