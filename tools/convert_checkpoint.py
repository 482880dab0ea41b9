"""Converts a checkpoint into a folder that transformers and vLLM load, or such a folder into a checkpoint.

    python tools/convert_checkpoint.py --from megatron --to hf --load checkpoints --save folder --check photos
    python tools/convert_checkpoint.py --from hf --to megatron --load folder --save checkpoints

docs/conversion.md says what fits and what is kept.
"""

import tyro

from megatron_codec.errors import UserError, run_tool


def main() -> int:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise UserError("safetensors", "is not installed", "pip install 'megatron_codec[hf]'") from error
    from megatron_codec import parallel
    from megatron_codec.conversion import ConvertConfig, convert

    config = tyro.cli(ConvertConfig, description=__doc__)
    try:
        same = convert(config)
    finally:
        parallel.shut_down()
    if not same:
        print("the two are not the same model")
    return 0 if same else 1


if __name__ == "__main__":
    run_tool(main)
