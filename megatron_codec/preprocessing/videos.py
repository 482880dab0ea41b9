"""Videos to codec streams, one for each clip; what cannot be read is reported and skipped."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from megatron_codec.codecs import AvcCodec
from megatron_codec.codecs.video import MAX_PIXELS, VideoError
from megatron_codec.codecs.video_graph import pyav
from megatron_codec.preprocessing.skipping import Skipped
from megatron_codec.preprocessing.sources import Item, UnusableError

SUFFIXES = frozenset(
    ".3g2 .3gp .264 .265 .asf .avi .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2ts .m2v .m4v .mjpeg "
    ".mjpg .mkv .mov .mp4 .mpeg .mpg .mts .mxf .nut .obu .ogv .ogm .rm .rmvb .ts .vob .webm .wmv .y4m".split()
)


@dataclass(frozen=True)
class VideoEncoder:
    """Clips of videos.

    Args:
        codec: what the streams are.
        clips: of a video at most; None for all.
        stride: seconds from the beginning of a clip to that of the next; by default a clip's length.
        pad_short: repeat the last frame of videos that are too short, instead of skipping them.
        max_pixels: videos with more pixels a frame are skipped.

    Raises UserError where PyAV is not installed.
    """

    codec: AvcCodec
    clips: int | None = 1
    stride: float | None = None
    pad_short: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        pyav()

    @property
    def suffixes(self) -> frozenset[str]:
        """Endings of the files that are taken for videos."""
        return SUFFIXES

    @property
    def things(self) -> str:
        """See `Encoder`."""
        return "videos"

    def encode(self, items: Iterable[Item]) -> Iterator[tuple[Item, list[bytes] | Skipped]]:
        """See `Encoder`."""
        for item in items:
            try:
                result = self._encode(item)
            except MemoryError:
                raise
            except VideoError as error:
                result = Skipped.because(item, UnusableError(error.kind, error.rule))
            except Exception as error:  # FFmpeg's own, of every kind
                result = Skipped.because(item, error)
            yield item, result

    def _encode(self, item: Item) -> list[bytes] | Skipped:
        if item.place is not None and item.place.is_whole_file:
            return self._clips(item.place.path)
        if item.place is not None:
            with item.place.open() as file:
                return self._clips(file)
        content = item.read()
        if isinstance(content, np.ndarray):
            raise UnusableError("still picture", "is a picture of an array, not a video")
        return self._clips(io.BytesIO(content))

    def _clips(self, source: str | IO[bytes]) -> list[bytes]:
        clips = self.codec.encode_clips(source, self.clips, self.stride, self.pad_short, self.max_pixels)
        return list(clips)

    def settings(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {
            "clips_per_video": self.clips,
            "stride": self.stride,
            "pad_short": self.pad_short,
            "max_pixels": self.max_pixels,
        }

    def versions(self) -> dict[str, str]:
        """See `Encoder`."""
        av = pyav()
        libraries = ("libavformat", "libavcodec", "libavfilter", "libswscale")
        versions = {name: ".".join(map(str, av.library_versions[name])) for name in libraries}
        return {"av": av.__version__, "x264": self.codec.x264_version} | versions
