"""Serves completions and pictures of a checkpoint over HTTP: OpenAI's and Megatron-LM's routes, and a page.

    python tools/run_text_generation_server.py --load checkpoints
    torchrun --nproc-per-node 2 tools/run_text_generation_server.py --load checkpoints \\
        --tensor-model-parallel-size 2
"""

import tyro

from megatron_codec.errors import run_tool


def main() -> int:
    from megatron_codec import parallel
    from megatron_codec.inference.server.serve import serve
    from megatron_codec.inference.server.settings import ServerConfig

    config = tyro.cli(ServerConfig, description=__doc__)
    try:
        return serve(config)
    finally:
        parallel.shut_down()


if __name__ == "__main__":
    run_tool(main)
