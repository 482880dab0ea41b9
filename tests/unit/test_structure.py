"""The house: imports point one way, one file patches, and everything public says what it is."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_codec"
PYTHON = sorted(PACKAGE.rglob("*.py"))
FOLDERS = "megatron_codec csrc tools examples benchmarks tests docs requirements .ci".split()
SCRIPTS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
TEXT = sorted(
    path
    for files in (ROOT.glob("*.*"), *((ROOT / folder).rglob("*") for folder in FOLDERS))
    for path in files
    if path.suffix in (".py", ".cpp", ".hpp", ".sh", ".md", ".txt", ".toml", ".yaml", ".html", ".js", ".css")
)

# What each part may import of the others; CONTRIBUTING.md explains it. `training.checkpoint` is a part of
# its own: it is where training and inference meet.
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "contact_sheet": set(),
    "platform": set(),
    "codecs": {"errors", "_csrc"},
    "tokenizer": {"errors", "files", "_csrc"},
    "data": {"errors", "files"},
    "preprocessing": {"errors", "files", "codecs", "tokenizer", "data"},
    "config": {"errors"},
    "presets": {"errors", "config"},
    "estimate": {"errors", "config"},
    "flags": {"errors", "config", "presets", "data", "estimate"},
    "parallel": {"platform", "config"},
    "model": {"platform", "config", "parallel", "_csrc"},
    "conversion": {
        *("errors", "files", "platform", "config", "parallel", "codecs", "tokenizer", "preprocessing"),
        "model",
        "training.checkpoint",
    },
    "training.checkpoint": {"errors", "files", "platform", "config", "parallel", "model"},
    "training": {
        *("errors", "files", "config", "platform", "parallel", "tokenizer", "data", "model", "estimate"),
        "training.checkpoint",
    },
    "inference": {
        *("errors", "files", "contact_sheet", "config", "parallel", "codecs", "tokenizer", "data", "model"),
        *("training.checkpoint", "_csrc"),
    },
    "baselines": {"errors", "files"},
    "evaluation": {
        *("errors", "files", "contact_sheet", "config", "parallel", "codecs", "tokenizer", "data"),
        *("preprocessing", "inference", "estimate"),
    },
}
WITHOUT_TORCH = {
    "errors", "files", "contact_sheet", "codecs", "tokenizer", "data", "preprocessing", "config",
    "presets", "flags", "estimate",
}  # fmt: skip


def part_of(module: str) -> str:
    """The part of the house that a dotted name belongs to: `megatron_codec.model.llama` to `model`."""
    name = module.removeprefix("megatron_codec").removeprefix(".")
    return "training.checkpoint" if name.startswith("training.checkpoint") else name.partition(".")[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported anywhere in a file, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PYTHON, ids=module_of)
def test_imports_point_one_way(path):
    importer = part_of(module_of(path))
    names = set(imports_of(parsed(path)))
    ours = {part_of(name) for name in names if name.startswith("megatron_codec.")}
    allowed = MAY_IMPORT[importer] | {importer, "__version__"} if importer else {"__version__"}
    assert ours <= allowed, f"{importer or 'megatron_codec'} may not import {sorted(ours - allowed)}"
    roots = {name.partition(".")[0] for name in names}
    assert not roots & {"tests", "tools", "benchmarks"}
    # A codec that is a network is let in; it is imported only when it is asked for.
    if importer in WITHOUT_TORCH and path.name != "vq.py":
        assert not roots & {"torch", "megatron", "transformer_engine", "apex"}


def test_the_order_of_the_parts_has_no_cycle():
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()
    assert {part_of(module_of(path)) for path in PYTHON} - {""} <= MAY_IMPORT.keys()


@pytest.mark.parametrize(
    "tool",
    ["preprocess_jpeg", "preprocess_avc", "train_tokenizer", "verify_dataset", "show_dataset", "check_jpeg"],
)
def test_preprocessing_starts_without_torch_and_pyav(tool):
    """What is imported in passing counts as well."""
    code = f"""
import runpy, sys
runpy.run_path("tools/{tool}.py", run_name="imported")
import megatron_codec.preprocessing, megatron_codec.tokenizer, megatron_codec.data, megatron_codec.codecs
print(sorted({{"torch", "megatron", "transformers", "av"}} & set(sys.modules)))
"""
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def foreign_assignments(tree: ast.AST) -> list[str]:
    """What a file assigns into torch or megatron, by `torch.x = y` or `setattr`, also under another name."""
    foreign: set[str] = set()

    def is_foreign(node: ast.AST) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in foreign

    found = []
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                if (module or alias.name).partition(".")[0] in ("torch", "megatron"):
                    foreign.add(alias.asname or alias.name.partition(".")[0])
    # `cuda = torch.cuda` makes another name for it; a few rounds follow names of names.
    for _ in range(3):
        for node in nodes:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Name | ast.Attribute):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if is_foreign(value):
                    foreign |= {target.id for target in targets if isinstance(target, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            if is_foreign(node.args[0]):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and is_foreign(node):
            found.append(ast.unparse(node))
    return found


def test_only_platform_patches():
    patching = {path.name: found for path in PYTHON if (found := foreign_assignments(parsed(path)))}
    assert patching.keys() == {"platform.py"}, patching
    # The finder finds what it should.
    for line in (
        "import torch; torch.cuda.current_device = 1",
        "import torch.cuda as c; c.x = 1",
        "from megatron.core import optimizer; optimizer.Adam = 1",
        "from torch import cuda; setattr(cuda, 'x', 1)",
        "import torch; d = torch.distributed; e = d; e.x, y = 1, 2",
        "import torch; del torch.x",
        "import torch; torch.x += 1",
    ):
        assert foreign_assignments(ast.parse(line)), line
    for line in ("import torch; x = torch.zeros(3); x.y = 1", "torch = 1; torch.x = 2", "x.torch = 1"):
        assert not foreign_assignments(ast.parse(line)), line


def undocumented(tree: ast.Module, module: str) -> Iterator[str]:
    """Public functions, classes and methods without a docstring.

    A method that another class of the file explains, its base or its Protocol, need not explain it again.
    """
    if ast.get_docstring(tree) is None:
        yield module
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = [node for kind in classes for node in kind.body if isinstance(node, FUNCTION)]
    explained = {method.name for method in methods if ast.get_docstring(method)}
    for node in [*tree.body, *methods]:
        public = isinstance(node, FUNCTION | ast.ClassDef) and not node.name.startswith("_")
        if public and ast.get_docstring(node) is None and not (node in methods and node.name in explained):
            yield f"{module}.{node.name}"


def test_everything_public_has_a_docstring():
    missing = [name for path in PYTHON for name in undocumented(parsed(path), module_of(path))]
    # What a script does is said once, at its head.
    missing += [str(path) for path in SCRIPTS if ast.get_docstring(parsed(path)) is None]
    assert not missing


def test_text_is_ascii():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in TEXT
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if not line.isascii()
    ]
    assert not found
