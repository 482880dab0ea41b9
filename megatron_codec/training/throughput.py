"""How well the devices are used: FLOP/s, model FLOPs utilization (MFU) and memory."""

import sys
from pathlib import Path

import torch

from megatron_codec.config import PretrainConfig
from megatron_codec.estimate import peak_tflops, token_flops
from megatron_codec.parallel import Layout

GIB = 2**30


class Throughput:
    """Turns tokens a second of one device into FLOP/s and MFU.

    Args:
        num_tokens: ids of the tokenizer, BOS and EOS included.
        fp8: whether matrices are multiplied in FP8, whose peak is another.

    Attributes:
        peak: dense peak of the device in TFLOP/s: `--peak-tflops`, or what is known of it by its name;
            None on a CPU and on an unknown GPU, and then there is no MFU.
    """

    def __init__(self, config: PretrainConfig, num_tokens: int, device: torch.device, fp8: bool):
        self._flops = token_flops(config, config.model.padded_vocab_size(num_tokens))
        self.peak = config.logging.peak_tflops
        if self.peak is None and device.type == "cuda":
            self.peak = peak_tflops(torch.cuda.get_device_name(device), fp8)

    def of(self, tokens_per_second: float) -> dict[str, float]:
        """TFLOP/s and MFU of a device, counting all of attention (PaLM) or its causal half (Megatron-LM)."""
        full, causal = (tokens_per_second * flops / 1e12 for flops in (self._flops.full, self._flops.causal))
        values = {"tflops_per_device": full, "tflops_per_device_causal_attention": causal}
        if self.peak is not None:
            values["mfu_full_attention"] = full / self.peak
            values["mfu_causal_attention"] = causal / self.peak
        return values


def peak_memory(layout: Layout) -> dict[str, float]:
    """GiB at the fullest moment so far, of the process that needed most; every process calls it.

    On CUDA what torch allocated, and beside it what it reserved; on a CPU the resident memory.
    """
    device = layout.device
    if device.type == "cuda":
        names = ["memory_gib", "memory_reserved_gib"]
        sizes = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)]
    else:
        names, sizes = ["memory_gib"], [_peak_resident_bytes()]
    most = torch.tensor(sizes, dtype=torch.float64, device=device) / GIB
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(names, most.tolist(), strict=True))


def _peak_resident_bytes() -> int:
    # On Linux, ru_maxrss of a process that was started by a larger one is that of the larger one.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
