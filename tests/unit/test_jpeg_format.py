"""Headers of JPEG files against Pillow, and every fault of a header by its name, beside djpeg's word."""

import io
from functools import cache

import pytest
from PIL import Image

from megatron_codec.codecs.jpeg_format import FormatError, check_file, parse
from tests.data_sources import photo_crops
from tests.jpeg_oracle import DJPEG, djpeg_complaint, zigzag

SAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


def save(picture: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@cache
def photo(size: int = 32) -> Image.Image:
    return photo_crops(1, size)[0]


def segment(file: bytes, marker: int) -> tuple[int, int]:
    """Where the first segment of a marker begins and ends, found by its length field."""
    at = 2
    while file[at + 1] != marker:
        at += 2 + int.from_bytes(file[at + 2 : at + 4], "big")
    return at, at + 2 + int.from_bytes(file[at + 2 : at + 4], "big")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", [(16, 16), (17, 16), (250, 33), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}])
def test_a_header_says_what_pillow_wrote(sampling, size, options):
    picture = photo(256).crop((0, 0, *size))
    file = save(picture, subsampling=sampling, quality=60, **options)
    layout, opened = parse(file), Image.open(io.BytesIO(file))
    horizontal, vertical = SAMPLINGS[sampling]
    assert (layout.width, layout.height) == size == opened.size
    assert [(c.horizontal, c.vertical) for c in layout.components] == [(horizontal, vertical), (1, 1), (1, 1)]
    assert layout.blocks == [0] * horizontal * vertical + [1, 2]
    across = -(-size[0] // (8 * horizontal))
    assert layout.mcus == across * -(-size[1] // (8 * vertical))
    assert layout.interval == (3 if "restart_marker_blocks" in options else across if options else 0)
    order = [8 * v + u for v, u in zigzag()]
    tables = [opened.quantization[number] for number in (0, 1, 1)]  # type: ignore[attr-defined]
    for component, table in zip(layout.components, tables, strict=True):
        # Pillow has them in the order of rows, a file in zigzag order.
        assert list(component.quantization) == [table[place] for place in order]
    assert layout.scan_offset == segment(file, 0xDA)[1]
    assert check_file(file).valid


def test_grey_and_four_components():
    grey = parse(save(photo(40).convert("L").crop((0, 0, 33, 9))))
    assert (grey.blocks, grey.mcus) == ([0], 10)
    cmyk = save(photo(40).convert("CMYK"))
    assert parse(cmyk).blocks == [0, 1, 2, 3] and check_file(cmyk).valid
    # A single component is not interleaved, so its sampling factors do not count (T.81 A.2.2).
    file = bytearray(save(photo(40).convert("L")))
    start, _ = segment(file, 0xC0)
    file[start + 11] = 0x22
    assert parse(bytes(file)).blocks == [0] and check_file(bytes(file)).valid
    assert not DJPEG or not djpeg_complaint(bytes(file))


def test_metadata_and_fill_bytes_are_read_over():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    file = save(photo(), comment=b"made by hand", icc_profile=b"profile" * 20000, exif=exif.tobytes())
    assert check_file(file).valid
    filled = file[:2] + b"\xff\xff\xff" + file[2:]
    assert check_file(filled).valid
    assert not DJPEG or not djpeg_complaint(filled)


def damaged_headers() -> dict[str, bytes]:
    """By what has to be said of each."""
    file = save(photo(), quality=50, restart_marker_blocks=1)
    app, sof, sos = segment(file, 0xE0), segment(file, 0xC0), segment(file, 0xDA)
    dqt, dht, dri = segment(file, 0xDB), segment(file, 0xC4), segment(file, 0xDD)

    def put(at: int, *values: int) -> bytes:
        return file[:at] + bytes(values) + file[at + len(values) :]

    def without(part: tuple[int, int]) -> bytes:
        return file[: part[0]] + file[part[1] :]

    def doubled(part: tuple[int, int]) -> bytes:
        return file[: part[1]] + file[part[0] :]

    def adobe(*body: int) -> bytes:
        segment = b"\xff\xee" + (len(body) + 7).to_bytes(2, "big") + b"Adobe" + bytes(body)
        return file[:2] + segment + file[app[1] :]

    def table(kind: int, counts: list[int], symbols: bytes) -> bytes:
        body = bytes((kind, *counts)) + symbols
        return file[: dht[0]] + b"\xff\xc4" + (len(body) + 2).to_bytes(2, "big") + body + file[dht[0] :]

    return {
        "does not begin with SOI": file[1:],
        "ends before the scan": file[:2],
        "00 where a marker is due": put(app[0], 0),
        "segment FFE0 of 1 bytes": put(app[0] + 2, 0, 1),
        "segment FFDA of 65535 bytes": put(sos[0] + 2, 0xFF, 0xFF),
        "marker FFD8 before the scan": put(app[0] + 1, 0xD8),
        "marker FFD0 before the scan": put(app[0] + 1, 0xD0),
        "marker FFDC before the scan": put(app[0] + 1, 0xDC),
        "JFIF segment .*not 1.x": put(app[0] + 9, 2),
        "JFIF segment .*not whole": file[:2] + b"\xff\xe0\x00\x0aJFIF\x00\x01\x01\x00" + file[app[1] :],
        "Adobe segment of 8 bytes": adobe(1),
        "Adobe colour transform 2, not one of": adobe(0, 100, 0, 0, 0, 0, 2),
        "quantization table of 16 bits": put(dqt[0] + 4, 0x10),
        "quantization table 4 has not 64 values": put(dqt[0] + 4, 4),
        "quantization table 0 has not 64 values": put(dqt[0] + 20, 0),
        "an empty DQT": file[: dqt[0]] + b"\xff\xdb\x00\x02" + file[dqt[0] :],
        "no quantization table 0": without(dqt),
        "Huffman table 0/2 is cut, empty or numbered wrongly": put(dht[0] + 4, 2),
        "Huffman table 0/0 is cut, empty or numbered wrongly": put(dht[0] + 5, 0, 0, 0, 0, 200),
        "Huffman table 0/0 has more codes than there can be": put(dht[0] + 5, 2, 0, 0, 0, 0, 0, 0, 0, 0, 10),
        "Huffman table 0/0 has symbols that are none": put(dht[1] - 1, 0x8B),
        "Huffman table 1/0 has symbols that are none": table(0x10, [0] * 14 + [200, 57], bytes(257)),
        "an empty DHT": file[: dht[0]] + b"\xff\xc4\x00\x02" + file[dht[0] :],
        "no Huffman table 0/0": without(dht),
        "DRI of 5 bytes": file[: dri[0]] + b"\xff\xdd\x00\x05\x00\x01\x00" + file[dri[1] :],
        "is progressive, not baseline": put(sof[0] + 1, 0xC2),
        "is extended sequential, not baseline": put(sof[0] + 1, 0xC1),
        "a second SOF": doubled(sof),
        "SOF0 whose length does not fit": put(sof[0] + 9, 2),
        "0 x 32 pixels": put(sof[0] + 7, 0, 0),
        "32 x 0 pixels": put(sof[0] + 5, 0, 0),
        "pixels of 12 bits": put(sof[0] + 4, 12),
        "sampling factors 0 x 2, not 1 to 4": put(sof[0] + 11, 0x02),
        r"sampling factors \(3, 2, 1\), which do not": put(sof[0] + 11, 0x32, 0, 2, 0x21),
        "3 components, or two of one number": put(sof[0] + 13, 1),
        "SOS before SOF0": without(sof),
        "SOS whose length does not fit": put(sos[0] + 4, 2),
        "a scan of 1 of 3 components": file[: sos[0]] + bytes.fromhex("FFDA0008010100003F00"),
        "SOS ends in 013F00": put(sos[1] - 3, 1),
        "component 2 in the scan where the frame has 1": put(sos[0] + 5, 2),
        "no quantization table 3": put(sof[0] + 12, 3),
        "no Huffman table 1/2": put(sos[0] + 6, 0x02),
        "blocks in an MCU, more than 10": put(sof[0] + 11, 0x44),
    }  # fmt: skip


HEADERS = damaged_headers()


@pytest.mark.parametrize("reason", HEADERS)
def test_a_fault_of_the_header_is_named_with_its_byte(reason):
    file = HEADERS[reason]
    with pytest.raises(FormatError, match=reason) as caught:
        parse(file)
    report = check_file(file)
    assert not report.valid and report.reason == caught.value.reason and report.offset == caught.value.offset
    # The fault lies in the segment that begins at the offset, or at the end of a file that is cut.
    assert report.offset is not None
    assert report.offset == len(file) or report.offset == 0 or file[report.offset] in (0x00, 0xFF)


def test_a_header_cut_anywhere_is_refused():
    file = save(photo(), restart_marker_blocks=1)
    for length in range(parse(file).scan_offset):
        report = check_file(file[:length])
        assert not report.valid and report.offset is not None and report.offset <= length
    for length in range(parse(file).scan_offset, len(file), 7):
        report = check_file(file[:length])
        assert not report.valid and report.offset == length and report.reason.startswith("ends ")


def test_a_fault_of_the_scan_is_named_with_its_place():
    file = save(photo(48), quality=50, subsampling="4:2:0", restart_marker_blocks=1)
    last = file.index(b"\xff\xd7")
    report = check_file(file[: last + 1] + b"\xd0" + file[last + 2 :])
    assert report.offset == last + 1
    assert report.reason == "D0 is not part of RST7, which is due after MCU 7 of 9"
    report = check_file(file[:-2])
    assert (report.reason, report.offset) == ("ends before EOI", len(file) - 2)
    report = check_file(file[: last + 2] + b"\xff\xff" + file[last + 2 :])
    assert report.reason.startswith("FF in the data is followed by FF and not by 00; MCU 8 of 9, block 0")


def test_tables_without_a_code_for_a_whole_mcu_are_refused():
    file = save(photo(), quality=50)
    start, end = segment(file, 0xC4)
    one_code = bytes((0x00, 1, *[0] * 15)) + b"\x0c"
    broken = file[:start] + b"\xff\xc4" + (len(one_code) + 2).to_bytes(2, "big") + one_code + file[end:]
    report = check_file(broken)
    assert not report.valid and "no codes for a whole MCU" in report.reason
