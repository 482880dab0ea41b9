"""What is different for tools/generate.py, and in part the server, when a model writes clips."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_codec.codecs import AvcCodec, Codec, DecodeError
from megatron_codec.contact_sheet import film_sheet
from megatron_codec.errors import UserError


def prompt_faults(videos: Sequence[Path], frames: int | None) -> Iterator[UserError]:
    """The faults of --prompt-video and --prompt-frames that can be seen without a model."""
    for path in videos:
        if not path.is_file():
            yield UserError(f"--prompt-video {path}", "there is no such file")
    if len({path.stem for path in videos}) < len(videos):
        rule = "has two videos of one name, and samples are named after them"
        yield UserError("--prompt-video", rule, "rename one of the two")
    if frames is not None and frames < 1:
        yield UserError(f"--prompt-frames {frames}", "must be at least 1", "leave it out for --prompt-ratio")


def video_streams(videos: Sequence[Path], codec: Codec) -> list[tuple[str, bytes]]:
    """Name and stream of the first clip of each video.

    Raises UserError for a model of pictures, and for a video that cannot be used.
    """
    if videos and not isinstance(codec, AvcCodec):
        raise UserError(
            f"--prompt-video {videos[0]}", f"the model writes {codec.name}", "give --prompt-image"
        )
    return [(path.stem, codec.encode(path)) for path in videos]


def prompt_ratio(ratio: float, frames: int | None, codec: Codec) -> float:
    """The share of a prompt that is given. Raises UserError for frames that the codec does not have."""
    if frames is None:
        return ratio
    if not isinstance(codec, AvcCodec):
        raise UserError(f"--prompt-frames {frames}", f"the model writes {codec.name}", "give --prompt-ratio")
    if frames > codec.frames:
        raise UserError(f"--prompt-frames {frames}", f"a clip of this model has {codec.frames} frames")
    return frames / codec.frames


def made_up(codec: Codec, stream: bytes) -> dict[str, float]:
    """The share of a clip's macroblocks that the decoder had to make up, 1 if it does not decode: a field for
    samples.json and the server's answers. Nothing for pictures."""
    if not isinstance(codec, AvcCodec):
        return {}
    try:
        return {"share_made_up": codec.decode_reported(stream)[1].share}
    except DecodeError:
        return {"share_made_up": 1.0}


def clip_sheet(
    codec: AvcCodec,
    originals: Sequence[tuple[str, bytes]],
    samples: Sequence[np.ndarray | None],
    ratio: float,
) -> Image.Image:
    """All clips with their frames side by side, a clip a row, generated frames marked; each original below
    its samples.

    Args:
        originals: name and stream of what was completed; none if samples come from nothing.
        samples: uint8 [frames, height, width, 3], as many for each original, or None for one that does not
            decode.
        ratio: of each original that was the prompt.
    """
    given = codec.prompt_frames(ratio) if originals else 0
    rows: list[tuple[np.ndarray | None, int]] = []
    each = len(samples) // max(1, len(originals))
    for number, sample in enumerate(samples):
        rows.append((sample, given))
        if originals and number % each == each - 1:
            rows.append((codec.decode(originals[number // each][1]), codec.frames))
    return film_sheet(rows)
