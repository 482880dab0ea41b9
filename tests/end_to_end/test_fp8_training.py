"""What emulated FP8 costs in loss at the tiny preset; benchmarks/fp8_recipes.py does it on more data."""

from itertools import pairwise

import pytest

from megatron_codec.codecs import JpegCodec
from megatron_codec.data import write_dataset
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops
from tests.distributed.launch import launch
from tests.tiny import read_metrics

HYBRID = "--fp8-format hybrid --fp8-emulation --fp8-amax-history-len 16 --fp8-amax-compute-algo max".split()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hybrid_ends_within_a_hundredth_of_bf16_and_without_scaling_far_from_it(tmp_path):
    codec = JpegCodec(image_size=32, quality=25, remove_head=True)
    streams = [codec.encode(crop) for crop in photo_crops(2000, codec.image_size)]
    tokenizer = Tokenizer.train(streams, 320, codec=codec.to_dict())
    ids, offsets = tokenizer.encode_batch(streams, add_special_tokens=True)
    documents = [ids[start:stop] for start, stop in pairwise(offsets.tolist())]
    write_dataset(tmp_path / "photos", documents, codec.to_dict(), tokenizer.to_dict())
    runs = {"bf16": [], "hybrid": HYBRID, "no scaling": [*HYBRID, "--no-fp8-emulation-scaling"]}
    flags = "--preset jpeglm-tiny --train-iters 300 --lr-decay-iters 3000 --eval-iters 0".split()
    flags += ["--log-interval", "50", "--train-data-path", str(tmp_path / "photos"), "--metrics-file"]
    lines = [[*flags, str(tmp_path / f"{name}.jsonl"), *more] for name, more in runs.items()]
    launch("tests.distributed.jobs:train", 1, timeout=1500, command_lines=lines)
    last = {name: read_metrics(tmp_path / f"{name}.jsonl")[300]["loss"] for name in runs}
    assert last["hybrid"] == pytest.approx(last["bf16"], rel=0.01), last
    assert last["no scaling"] > 1.03 * last["bf16"], last
