"""Distances and feature extractors, beside clean-fid, torch and the obvious implementation."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_codec.errors import UserError
from megatron_codec.evaluation import distances, features, packages
from tests.data_sources import photo_crops


@pytest.fixture(scope="module")
def fid():
    return packages.clean_fid("fid")


def table(count: int, dimensions: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Features with correlations, as those of a network have them, none below 0."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    return np.maximum(0, scale * rng.normal(size=(count, dimensions)) @ mixing + shift)


def clean_frechet(fid, real, made) -> float:
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real, made)]
    return fid.frechet_distance(*moments[0], *moments[1])


@pytest.mark.parametrize(("n", "m", "d"), [(200, 200, 24), (150, 90, 40), (65, 300, 64)])
def test_the_svd_form_is_clean_fids_distance(fid, n, m, d):
    real, made = table(n, d, 1), table(m, d, 2, shift=0.3, scale=1.2)
    expected = clean_frechet(fid, real, made)
    assert expected > 1
    assert distances.frechet_svd(real, made) == pytest.approx(expected, rel=1e-6)
    assert distances.frechet(real, made) == pytest.approx(expected, rel=1e-12)


def test_with_fewer_pictures_than_features_the_svd_form_is_the_limit_of_clean_fids(fid):
    """clean-fid's square root of a singular product, which is inexact, agrees to 4 digits; so does that of
    the same covariances with a little added, which are not singular."""
    real, made = table(30, 48, 1), table(25, 48, 2, shift=0.3)
    value = distances.frechet_svd(real, made)
    assert distances.frechet(real, made) == value
    assert clean_frechet(fid, real, made) == pytest.approx(value, rel=1e-4)
    little = 1e-9 * np.eye(48)
    covariances = [np.cov(x, rowvar=False) + little for x in (real, made)]
    regular = fid.frechet_distance(real.mean(0), covariances[0], made.mean(0), covariances[1])
    assert regular == pytest.approx(value, rel=1e-4)


def test_a_set_is_at_distance_0_of_itself_and_of_its_rows_in_another_order():
    real = table(50, 80, 1)
    shuffled = real[np.random.default_rng(0).permutation(50)]
    found = distances.compare(real, shuffled)
    assert abs(found.frechet) < 1e-9 * (real**2).sum()
    # Without bias: a set that is the same is nearer than another of the same kind.
    assert found.kernel < 0
    assert (found.precision, found.recall) == (1.0, 1.0)


def test_kernel_distance_is_clean_fids_and_leaves_the_global_generator_as_it_was(fid):
    real, made = table(60, 30, 1), table(50, 30, 2, shift=0.3)
    np.random.seed(0)
    expected = fid.kernel_distance(real, made)
    np.random.seed(11)
    following = np.random.random()
    np.random.seed(11)
    assert distances.kernel(real, made) == expected
    assert np.random.random() == following
    # Of equal sizes there is one subset, the whole: by hand, Binkowski et al., equation 4.
    k = lambda x, y: (x @ y.T / 30 + 1) ** 3  # noqa: E731
    a, b = real[:50], made
    off = ~np.eye(50, dtype=bool)
    by_hand = (k(a, a)[off].sum() + k(b, b)[off].sum()) / (50 * 49) - 2 * k(a, b).mean()
    assert distances.kernel(a, b) == pytest.approx(by_hand, rel=1e-9)
    assert fid.kernel_distance(a, b) == pytest.approx(by_hand, rel=1e-9)  # which takes it 100 times


def test_precision_and_recall_are_those_of_the_obvious_implementation():
    real, made = table(70, 6, 1), table(90, 6, 2, shift=0.8, scale=0.7)

    def share(points, manifold, k):
        found = 0
        for point in points:
            for centre in manifold:
                radius = sorted(np.linalg.norm(centre - other) for other in manifold)[k]
                if np.linalg.norm(point - centre) <= radius:
                    found += 1
                    break
        return found / len(points)

    for k in (1, 3):
        expected = share(made, real, k), share(real, made, k)
        assert distances.precision_recall(real, made, k) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and expected[0] != expected[1]
    # Pictures that are all the same good one: every one is real, hardly any real one is covered.
    collapsed = np.repeat(real[:1], 70, axis=0)
    precision, recall = distances.precision_recall(real, collapsed)
    assert precision == 1 and recall == pytest.approx(1 / 70)


def test_rows_of_the_neighbours_do_not_matter(monkeypatch):
    """More than one block of 1,024 rows."""
    real, made = table(1100, 3, 1), table(1050, 3, 2, shift=0.5)
    from scipy.spatial.distance import cdist

    radii = np.sort(cdist(real, real, "sqeuclidean"))[:, 3]
    expected = (cdist(made, real, "sqeuclidean") <= radii).any(axis=1).mean()
    assert distances.precision_recall(real, made)[0] == expected


@pytest.mark.parametrize(
    ("real", "made", "message"),
    [
        (np.ones((5, 3)), np.ones((5, 4)), "same number of columns"),
        (np.ones((5, 3)), np.ones((3, 3)), "3 pictures: are too few.*at least 4"),
        (np.ones((5, 3)), np.full((5, 3), np.nan), "made pictures: must be finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(real, made, message):
    with pytest.raises(UserError, match=message):
        distances.compare(real, made)


def test_the_rank_problem_is_said_below_as_many_pictures_as_features():
    assert distances.rank_problem(1281, 1280) is None
    told = distances.rank_problem(200, 1280)
    assert told and "200" in told and "1280" in told and "rank 199" in told


def test_efficientnet_sees_what_is_in_a_picture():
    """Its classifier, on our features and preprocessing, knows a cat and a cup of coffee."""
    import skimage.data

    extractor = features.EfficientNetLite0()
    crops = []
    for photo in (skimage.data.chelsea(), skimage.data.coffee()):
        side = min(photo.shape[:2])
        top, left = (photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2
        square = Image.fromarray(photo[top : top + side, left : left + side])
        crops.append(np.asarray(square.resize((256, 256), Image.Resampling.BICUBIC)))
    found = features.features_of(np.stack(crops), extractor, lambda count: None, batch_size=1)
    assert found.shape == (2, extractor.dimensions) and found.dtype == np.float32
    with torch.inference_mode():
        classes = extractor._network._fc(torch.from_numpy(found)).argmax(dim=1).tolist()
    assert classes[0] in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert classes[1] == 967  # espresso
    names = features.metric_names(extractor, 3)
    assert all("EfficientNet-Lite0" in name for name in names.values())
    assert not any("ID" in name for name in names.values())


class Layers(torch.nn.Module):
    def __init__(self, dimensions: int):
        super().__init__()
        self.pool = torch.nn.AdaptiveAvgPool2d(8)
        self.mix = torch.nn.Linear(3 * 64, dimensions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.pool(x).flatten(1))


class Network(torch.nn.Module):
    """Has what clean-fid uses of the Inception file."""

    def __init__(self, dimensions: int = 2048):
        super().__init__()
        self.layers = Layers(dimensions)

    def forward(self, x: torch.Tensor, return_features: bool = True) -> torch.Tensor:
        return self.layers(x)


class ToTensor:
    """torchvision's, as far as clean-fid's resizing needs it."""

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        assert pixels.dtype == np.float32
        return torch.from_numpy(pixels.transpose(2, 0, 1))


def test_features_of_an_inception_file_are_those_that_clean_fid_takes_of_a_folder(tmp_path, fid, monkeypatch):
    transforms = SimpleNamespace(transforms=SimpleNamespace(ToTensor=ToTensor))
    monkeypatch.setattr(packages.clean_fid("utils"), "torchvision", transforms)
    torch.manual_seed(0)
    file = tmp_path / "weights.pt"
    torch.jit.script(Network()).save(file)
    extractor = features.find_extractor(file)
    folder = tmp_path / "pictures"
    folder.mkdir()
    crops = photo_crops(6, 32)
    for number, crop in enumerate(crops):
        crop.save(folder / f"{number}.png")
    cpu = torch.device("cpu")
    expected = fid.get_folder_features(
        str(folder), extractor._network, num_workers=0, device=cpu, verbose=False
    )
    found = features.features_of(
        np.stack([np.asarray(c) for c in crops]), extractor, lambda count: None, batch_size=4
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape == (6, 2048)
    names = features.metric_names(extractor, 3)
    assert (names["frechet"], names["kernel"]) == ("FID", "KID")


def test_a_missing_or_another_inception_file_says_where_to_get_the_right_one(tmp_path):
    with pytest.raises(UserError, match=r"absent\.pt: there is no such file; get inception-2015-12-05\.pt"):
        features.find_extractor(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match="is not that network"):
        features.find_extractor(tmp_path / "text.pt")
    torch.jit.script(Network(100)).save(tmp_path / "narrow.pt")
    with pytest.raises(UserError, match="is not that network"):
        features.find_extractor(tmp_path / "narrow.pt")


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    with pytest.raises(UserError, match=r"the package no-such: is not installed.*megatron_codec\[eval\]"):
        packages.package("no_such_module_here", "no-such")


BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")'
REAL = """
class models:
    class inception:
        InceptionA = InceptionC = InceptionE = object
"""


@pytest.mark.parametrize("torchvision", [None, BROKEN, REAL])
def test_clean_fid_needs_no_torchvision_and_leaves_no_stand_in(torchvision, tmp_path):
    """Where there is none, where it cannot be imported, where it can; others must see what there is."""
    path = [str(tmp_path), *sys.path]
    if torchvision:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(f"import torchvision.inner\n{torchvision}")
        (tmp_path / "torchvision" / "inner.py").touch()
    code = f"""
import sys
sys.path[:] = {path!r}
if {torchvision is None}:
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torchvision":
                raise ModuleNotFoundError("No module named 'torchvision'", name=name)
    sys.meta_path.insert(0, Refuse())
import numpy as np
from megatron_codec.evaluation.packages import clean_fid
print(clean_fid("fid").frechet_distance(np.zeros(2), np.eye(2), np.ones(2), np.eye(2)))
print(clean_fid("inception_torchscript").InceptionV3W.__name__)
print("torchvision" in sys.modules, "torchvision.inner" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    works = torchvision == REAL
    assert done.stdout.split() == ["2.0", "InceptionV3W", str(works), str(works)], done.stderr
