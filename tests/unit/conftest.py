"""Fixtures that tests of evaluations share; other modules have their own of these names.

They import when they are asked for: most unit tests need neither torch nor Megatron-Core.
"""

import pytest


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 photographs of 40 pixels, in a folder."""
    from tests.evaluating import write_photos

    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def originals(photos):
    """20 of them, at 32 pixels."""
    from megatron_codec.codecs.images import Geometry
    from megatron_codec.evaluation.originals import read_originals
    from megatron_codec.preprocessing import Selection

    return read_originals(Selection((photos,), limit=20), 32, Geometry(), 48)
