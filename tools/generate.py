"""Samples pictures or clips from a checkpoint, from nothing or from the first part of one.

    python tools/generate.py --load checkpoints --num-samples 16 --output samples
    python tools/generate.py --load checkpoints --prompt-image cat.jpg --prompt-ratio 0.5 --output completed
    python tools/generate.py --load checkpoints --prompt-video cat.mp4 --prompt-frames 10 --output completed

OUTPUT has the pictures or clips, contact_sheet.png and samples.json.
"""

import tyro

from megatron_codec.errors import run_tool


def main() -> None:
    from megatron_codec import parallel
    from megatron_codec.inference.generate import GenerateConfig, generate

    config = tyro.cli(GenerateConfig, description=__doc__)
    try:
        summary = generate(config)
    finally:
        parallel.shut_down()
    if summary:
        without = f" ({summary['share_valid_without_grammar']:.1%} without the grammar)"
        print(
            f"{summary['samples']} samples in {summary['seconds']:.1f} s "
            f"({summary['tokens_per_second']:.0f} tokens/s); {summary['share_that_decodes']:.1%} decode, "
            f"{summary['share_valid']:.1%} are valid{without if config.constrain else ''}; "
            f"see {config.output / 'contact_sheet.png'}"
        )


if __name__ == "__main__":
    run_tool(main)
