"""Shows what a tokenizer was trained on and what its merges are, as Markdown.

python tools/show_tokenizer.py tokenizer.json
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_codec.codecs import JpegCodec, get_codec
from megatron_codec.errors import run_tool
from megatron_codec.tokenizer import Tokenizer

RESTART_MARKER = re.compile(rb"\xff[\xd0-\xd7]")
# A luminance DC difference of zero is 00, the end of a block 1010. A byte may begin at any of these bits.
EMPTY_BLOCKS = [("001010" * 100)[start:] for start in range(6)]


@dataclass(frozen=True)
class Arguments:
    """Shows what a tokenizer was trained on and what its merges are, as Markdown."""

    tokenizer: Annotated[Path, tyro.conf.Positional]
    """The tokenizer's file."""
    examples: int = 12
    """Merges to show of each kind."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    tokenizer = Tokenizer.load(arguments.tokenizer)
    print(f"{tokenizer!r}\n")
    for name, value in (tokenizer.trained_on or {}).items():
        print(f"- {name}: {value}")
    codec = get_codec(**tokenizer.codec) if tokenizer.codec else None
    kinds = defaultdict(list)
    for token in range(256, tokenizer.vocab_size):
        text = tokenizer.token_bytes(tokenizer.ids.tokens[token] if tokenizer.ids else token)
        kinds[jpeg_kind(text, codec.head) if isinstance(codec, JpegCodec) else "merges"].append(text)
    print("\n| what it is | merges | longest, bytes | the first ones |\n|---|---|---|---|")
    for kind, texts in sorted(kinds.items(), key=lambda item: -len(item[1])):
        first = " ".join(f"`{text.hex()}`" for text in texts[: arguments.examples])
        print(f"| {kind} | {len(texts)} | {max(map(len, texts))} | {first} |")


def jpeg_kind(text: bytes, head: bytes) -> str:
    """What some bytes of a stream with standard tables are (ITU-T T.81, annexes B, F and K)."""
    if RESTART_MARKER.fullmatch(text):
        return "restart marker"
    if RESTART_MARKER.search(text):
        ends = RESTART_MARKER.split(text)
        return "patch's last bits and restart marker" if not ends[-1] else "restart marker and empty blocks"
    if text == b"\xff\x00":
        return "stuffed byte 255"
    bits = "".join(f"{byte:08b}" for byte in text)
    if any(pattern.startswith(bits) for pattern in EMPTY_BLOCKS):
        return "empty luminance blocks"
    if any(pattern[:12] in bits for pattern in EMPTY_BLOCKS):
        return "empty luminance blocks and neighbours"
    return "head, the same in all streams" if text in head else "coefficients"


if __name__ == "__main__":
    run_tool(main)
