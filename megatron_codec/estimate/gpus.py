"""The GPUs that are known by name, with their memory and their peaks."""

from dataclasses import dataclass

from megatron_codec.config import Fp8Config
from megatron_codec.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        label: its name for people.
        gib: memory in GiB, as torch reports it.
        tflops: dense peak in 1e12 FLOP/s of matrix products in bf16, from NVIDIA's data sheets (SXM).
        fp8_tflops: that of FP8; None if it has none.
        fp8_recipes: of `--fp8-recipe`, those that it computes.
        device_names: how `torch.cuda.get_device_name` calls it; what follows one of them after a blank or
            a hyphen does not matter.
    """

    label: str
    gib: float
    tflops: float
    fp8_tflops: float | None = None
    fp8_recipes: tuple[str, ...] = ()
    device_names: tuple[str, ...] = ()

    def peak(self, fp8: Fp8Config) -> float | None:
        """Dense peak in TFLOP/s under these flags; None if the matrices cannot be multiplied so."""
        if not fp8.in_hardware:
            return self.tflops
        return self.fp8_tflops if fp8.fp8_recipe in self.fp8_recipes else None


# PCIe and NVL cards of the Hopper generation have lower peaks than SXM, and other names.
_A100 = "NVIDIA A100-SXM4", "NVIDIA A100-PCIE", "NVIDIA A100 80GB PCIe"
_H100, _H200 = ("NVIDIA H100 80GB HBM3",), ("NVIDIA H200",)
# Transformer Engine 2.20 has mxfp8 from Blackwell on.
_HOPPER = "delayed", "tensorwise", "blockwise"

GPUS = {
    "a100-40gb": Gpu("A100 40 GB", 39.4, 312, device_names=_A100),
    "a100-80gb": Gpu("A100 80 GB", 79.1, 312, device_names=_A100),
    "h100-80gb": Gpu("H100 80 GB", 79.1, 989, 1979, _HOPPER, _H100),
    "h200-141gb": Gpu("H200 141 GB", 139.8, 989, 1979, _HOPPER, _H200),
}


def gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: there is none.
    """
    if name in GPUS:
        return GPUS[name]
    if name in ("h100-fp8", "h200-fp8"):
        known = next(known for known in GPUS if known.startswith(name[:4]))
        raise UserError(f"--gpu {name}", "is no GPU of its own", f"use --gpu {known} --fp8-format hybrid")
    raise UserError(f"--gpu {name}", "is not known", f"use one of {', '.join(GPUS)}")


def peak_tflops(device_name: str, fp8: bool) -> float | None:
    """Dense peak in TFLOP/s of the GPU that torch calls `device_name`, in FP8 or bf16; None if not known."""
    for kind in GPUS.values():
        if _is_called(device_name, kind.device_names):
            return kind.fp8_tflops if fp8 else kind.tflops
    return None


def _is_called(device_name: str, names: tuple[str, ...]) -> bool:
    if any(word in device_name for word in (" NVL", " MIG ")):  # another card, or a part of one
        return False
    return any(device_name == name or device_name.startswith((f"{name} ", f"{name}-")) for name in names)
