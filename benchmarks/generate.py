"""Sampling with the engine beside Hugging Face's `generate` and CTranslate2, on the same weights.

    python benchmarks/generate.py                          # 85M parameters, bf16
    python benchmarks/generate.py --rounds 5 --peers hugging-face
    python benchmarks/generate.py --model 7b --eager  # on a GPU, which is taken where there is one

Three loads: one sample from a short prompt; eight samples from one prompt of 4,096 tokens; sixteen requests
with prompts and lengths that differ. Each program but CTranslate2 runs in this process, the rounds
interleaved; a speed-up is the median over rounds of (their seconds / ours). No sample ends by itself, so all
make the same tokens.
Hugging Face pads a batch and goes on until its longest sample is done. CTranslate2 has no bf16 on a CPU: its
int8 and fp32 are compared with our bf16, at one sample, and its int8 with our int8 weights too. On a GPU
Hugging Face is the only peer.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from megatron_codec import parallel
from megatron_codec.codecs import JpegCodec
from megatron_codec.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_codec.errors import run_tool
from megatron_codec.inference import Engine, EngineConfig, Sampling
from megatron_codec.model import build_model, initialize_weights, transformer_config
from megatron_codec.presets import preset
from megatron_codec.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.llama import hugging_face_twin

MODELS = {
    "85m": ModelConfig(
        num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12, seq_length=12288
    ),
    "7b": preset("jpeglm-7b").model,
}
TOP_K, TOP_P = 40, 0.9


@dataclass(frozen=True)
class Config:
    """Times the engine beside its peers."""

    rounds: int = 3
    """Of every load and program."""
    peers: tuple[Literal["hugging-face", "ctranslate2"], ...] = ("hugging-face", "ctranslate2")
    """What to compare with; a peer that is not installed is left out."""
    loads: tuple[Literal["one", "shared", "mixed"], ...] = ("one", "shared", "mixed")
    """Which loads to run."""
    model: Literal["85m", "7b"] = "85m"
    """Its shape; weights are random."""
    eager: bool = False
    """Time our engine without CUDA graphs too."""


@dataclass(frozen=True)
class Load:
    """Prompts, new tokens of each, and samples of each."""

    title: str
    prompts: list[list[int]]
    new_tokens: list[int]
    n: int = 1

    @property
    def tokens(self) -> int:
        """New tokens of all samples."""
        return sum(self.new_tokens) * self.n


def loads(bos: int) -> dict[str, Load]:
    """The three, the same at every call."""
    rng = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return [bos, *rng.integers(0, 256, length - 1).tolist()]

    lengths = [int(x) for x in np.geomspace(16, 2048, 16)]
    return {
        "one": Load("one sample, prompt of 8", [prompt(8)], [200]),
        "shared": Load("8 samples of one prompt of 4,096", [prompt(4096)], [64], n=8),
        "mixed": Load(
            "16 requests, prompts of 16 to 2,048, 32 to 256 new tokens",
            [prompt(length) for length in lengths],
            [int(x) for x in rng.permutation(np.linspace(32, 256, 16))],
        ),
    }


class Ours:
    """The engine; each run has another seed, and its prompts are forgotten before it."""

    def __init__(self, shape: ModelConfig) -> None:
        parallelism, training = ParallelConfig(), TrainingConfig(bf16=True)
        layout = parallel.initialize(parallelism)
        codec = JpegCodec(256)
        self.tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=codec.to_dict())
        megatron = transformer_config(shape, parallelism, training, layout)
        module = build_model(megatron, shape, self.tokenizer.num_tokens, layout)
        self.module, self.device = module.to(layout.device), layout.device
        initialize_weights(self.module, shape, layout, 1)
        self.rest = shape, self.tokenizer, codec, layout
        self.engine = Engine(self.module, *self.rest, EngineConfig(cache_tokens=40_000))

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the weights: all but the embedding, of which it reads a row."""
        weights = [p for name, p in self.module.named_parameters() if "embedding" not in name]
        return sum(p.numel() * p.element_size() for p in weights)

    def run(self, load: Load, seed: int) -> int:
        """Makes the tokens of a load; returns how many."""
        self.engine.scheduler.pool.forget_all()
        sampling = [
            Sampling(top_k=TOP_K, top_p=TOP_P, seed=seed, n=load.n, max_tokens=count, ignore_eos=True)
            for count in load.new_tokens
        ]
        return sum(len(c.token_ids) for c in self.engine.generate(load.prompts, sampling))


class OursOtherwise(Ours):
    """The engine on the same weights with other settings."""

    def __init__(self, ours: Ours, **settings: Any):
        self.module, self.rest = ours.module, ours.rest
        self.engine = Engine(self.module, *self.rest, EngineConfig(**settings))


class OursInt8(OursOtherwise):
    """The engine with its weights in int8, for one sample."""

    def __init__(self, ours: Ours):
        super().__init__(ours, cache_tokens=4096, weight_dtype="int8")


class HuggingFace:
    """`generate` of transformers, with its default cache."""

    def __init__(self, ours: Ours):
        self.model = hugging_face_twin(ours.module, ours.rest[0]).to(torch.bfloat16)
        self.pad, self.device = ours.tokenizer.eos, ours.device

    @torch.inference_mode()
    def run(self, load: Load, seed: int) -> int:
        """Makes at least the tokens of a load: a batch goes on until its longest sample is done."""
        torch.manual_seed(seed)
        longest = max(map(len, load.prompts))
        ids = torch.full((len(load.prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(load.prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            do_sample=True,
            top_k=TOP_K,
            top_p=TOP_P,
            min_new_tokens=max(load.new_tokens),
            max_new_tokens=max(load.new_tokens),
            num_return_sequences=load.n,
            pad_token_id=self.pad,
            eos_token_id=None,
        )
        assert out.shape == (len(load.prompts) * load.n, longest + max(load.new_tokens))
        return load.tokens


class CTranslate2:
    """CTranslate2's generator, for one sample, in a process of its own and on one thread.

    A second thread slows it: 14 ms a token instead of 5.5 with int8, on two idle cores, of which it then uses
    1.1. And in this process it slows us, from 5.0 ms to 7.2: more threads of OpenMP than cores go to sleep
    when they wait.
    """

    def __init__(self, ours: Ours, compute_type: str):
        import ctranslate2
        from tokenizers import Tokenizer as Words
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        twin = hugging_face_twin(ours.module, ours.rest[0])
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            twin.config.bos_token_id, twin.config.eos_token_id = ours.tokenizer.bos, ours.tokenizer.eos
            twin.save_pretrained(folder / "llama")
            words = {str(i): i for i in range(twin.config.vocab_size)}
            PreTrainedTokenizerFast(
                tokenizer_object=Words(WordLevel(words, unk_token="0")),
                bos_token=str(ours.tokenizer.bos),
                eos_token=str(ours.tokenizer.eos),
                unk_token="0",
            ).save_pretrained(folder / "llama")
            converter = ctranslate2.converters.TransformersConverter(str(folder / "llama"))
            converter.convert(str(folder / "converted"), quantization=compute_type)
            context = multiprocessing.get_context("spawn")
            self.there, here = context.Pipe()
            arguments = str(folder / "converted"), compute_type, here
            self.process = context.Process(target=serve_ctranslate2, args=arguments, daemon=True)
            self.process.start()
            self.there.recv()  # it has read the folder

    def run(self, load: Load, seed: int) -> int:
        """Makes the tokens of a load of one sample."""
        [prompt], [count] = load.prompts, load.new_tokens
        self.there.send(([str(i) for i in prompt], count))
        return self.there.recv()


def receive(connection: Connection) -> Any:
    """What comes next, or None when the other end has gone."""
    try:
        return connection.recv()
    except EOFError:
        return None


def serve_ctranslate2(folder: str, compute_type: str, connection: Connection) -> None:
    """Answers prompts and numbers of tokens with how many it made."""
    import ctranslate2

    generator = ctranslate2.Generator(folder, compute_type=compute_type, intra_threads=1)
    connection.send(None)
    while asked := receive(connection):
        prompt, count = asked
        [result] = generator.generate_batch(
            [prompt],
            min_length=count,
            max_length=count,
            sampling_topk=TOP_K,
            sampling_topp=TOP_P,
            include_prompt_in_result=False,
        )
        connection.send(len(result.sequences_ids[0]))


def bandwidth(device: torch.device) -> float:
    """Bytes a second at which all threads together read memory."""
    numbers = torch.ones(512 << 20, dtype=torch.int8, device=device).view(torch.int64)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - started)
    return numbers.numel() * 8 / min(seconds)


def measure(config: Config) -> dict[str, Any]:
    """Prints the table; returns the ratios."""
    ours = Ours(MODELS[config.model])
    gpu = ours.device.type == "cuda"
    programs: dict[str, Any] = {"ours, bf16": ours}
    if config.eager:
        programs["ours, no graphs"] = OursOtherwise(ours, cache_tokens=40_000, cuda_graphs=False)
    if not gpu:
        programs["ours, int8"] = OursInt8(ours)
    if "hugging-face" in config.peers:
        programs["Hugging Face, bf16"] = HuggingFace(ours)
    if "ctranslate2" in config.peers and not gpu:
        try:
            for compute_type in ("int8", "float32"):
                programs[f"CTranslate2, {compute_type}"] = CTranslate2(ours, compute_type)
        except ImportError:
            print("CTranslate2 is not installed: source requirements/install.sh bench")
    ratios: dict[str, Any] = {}
    chosen = {name: load for name, load in loads(ours.tokenizer.bos).items() if name in config.loads}
    for name, load in chosen.items():
        running = {
            title: program
            for title, program in programs.items()
            if name == "one" or not isinstance(program, CTranslate2 | OursInt8)
        }
        seconds = timed(load, {title: program.run for title, program in running.items()}, config.rounds)
        print(f"\n{load.title}")
        for title, taken in seconds.items():
            speedup = ratio(taken, seconds["ours, bf16"])
            best = min(taken)
            print(f"  {title:24} {load.tokens / best:8.0f} tokens/s {best:8.2f} s  ours is {speedup:.2f}x")
            if title != "ours, bf16":
                ratios[f"{name}: {title}"] = round(speedup, 2)
        if "CTranslate2, int8" in seconds:
            ratios["one, both int8: CTranslate2"] = round(
                ratio(seconds["CTranslate2, int8"], seconds["ours, int8"]), 2
            )
            print(f"  in int8 ours is {ratios['one, both int8: CTranslate2']:.2f}x CTranslate2")
        if name == "one":
            share = ours.weight_bytes * load.tokens / min(seconds["ours, bf16"]) / bandwidth(ours.device)
            rate = bandwidth(ours.device) / 1e9
            print(f"  ours reads its weights at {share:.2f} of what memory gives ({rate:.1f} GB/s)")
            ratios["one: share of bandwidth"] = round(share, 2)
    return ratios


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast we are: the median over rounds."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def timed(load: Load, programs: dict[str, Callable[[Load, int], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round; one round before is not counted."""
    seconds: dict[str, list[float]] = {title: [] for title in programs}
    with tqdm(total=(rounds + 1) * len(programs), desc=load.title, leave=False) as bar:
        for number in range(rounds + 1):
            for title, run in programs.items():
                started = time.perf_counter()
                made = run(load, number)
                taken = time.perf_counter() - started
                assert made == load.tokens, f"{title} made {made} tokens, not {load.tokens}"
                if number:
                    seconds[title].append(taken)
                bar.update()
    return seconds


def main() -> None:
    print(json.dumps(measure(tyro.cli(Config, description=__doc__))))


if __name__ == "__main__":
    run_tool(main)
