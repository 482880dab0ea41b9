"""Makes a picture with transformers alone: python make_picture.py picture.jpg [seed]"""

# pyright: reportAttributeAccessIssue=false

import json
import re
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


def main(output: str, seed: str = "0") -> None:
    """Samples from the folder that this file lies in, and writes a standalone JPEG file."""
    folder = Path(__file__).parent
    jpeg = json.loads((folder / "megatron_codec.json").read_text())["jpeg"]
    preamble, head = bytes.fromhex(jpeg["preamble"]), bytes.fromhex(jpeg["file_head"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    set_seed(int(seed))
    # A byte is the character U+2800 + byte; the picture goes on from what all of them begin with.
    prompt = tokenizer("".join(chr(0x2800 + byte) for byte in preamble), return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt)[0], skip_special_tokens=True)
    payload = bytes(ord(character) & 255 for character in text if character >= "\u2800")[len(preamble) :]
    end = re.search(rb"\xff[^\x00\xff\xd0-\xd7]", payload)  # the first marker that ends a scan
    Path(output).write_bytes(head + payload[: end.start() if end else None] + b"\xff\xd9")


if __name__ == "__main__":
    main(*sys.argv[1:])
