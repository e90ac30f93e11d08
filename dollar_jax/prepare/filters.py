"""Frames through FFmpeg's filters: interlaced ones made progressive, and the container's crop cut out."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
from av.error import BlockingIOError, EOFError, FFmpegError
from av.filter import Graph

Timed = tuple[Fraction, Fraction, av.VideoFrame]  # start and duration in seconds
Crop = tuple[int, int, int, int]  # pixels to cut off: left, top, right, bottom

# Matroska's element names.
_SEGMENT, _TRACKS, _ENTRY, _VIDEO = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
_EDGES = (b"\x54\xcc", b"\x54\xbb", b"\x54\xdd", b"\x54\xaa")


def filtered(frames: Iterable[Timed], crop: Crop) -> Iterator[Timed]:
    """As many frames; those that are neither flagged as interlaced nor to be cropped are untouched."""
    graph: Graph | None = None
    waiting: deque[tuple[Fraction, Fraction]] = deque()
    built_for, interlaced, failure = None, False, None

    def push(graph: Graph, frame: av.VideoFrame | None) -> Iterator[Timed]:
        graph.push(frame)
        with contextlib.suppress(BlockingIOError, EOFError):
            while waiting:
                done = graph.vpull()
                yield *waiting.popleft(), done

    try:
        for time, duration, frame in frames:
            interlaced = interlaced or frame.interlaced_frame  # once is enough: bwdif leaves the others alone
            if not interlaced and not any(crop):
                yield time, duration, frame
                continue
            kind = frame.width, frame.height, frame.format.name, interlaced
            if kind != built_for:
                if graph:
                    yield from push(graph, None)
                graph, built_for = _graph(frame, interlaced, crop), kind
            assert graph
            waiting.append((time, duration))
            yield from push(graph, frame)
    except FFmpegError as error:  # the frames before it count
        failure = error
    if graph:
        yield from push(graph, None)
    if failure:
        raise failure


def _graph(frame: av.VideoFrame, interlaced: bool, crop: Crop) -> Graph:
    filters = []
    if interlaced and frame.format.components[0].bits == 8:  # all that fieldmatch can do
        # Film's frames are put together again from their fields; what is still combed is left to bwdif.
        filters.append(("fieldmatch", "combmatch=full:combpel=10:blockx=8:blocky=8"))
    if interlaced:
        filters.append(("bwdif", "mode=send_frame:deint=interlaced"))
    if any(crop):
        left, top, right, bottom = crop
        filters.append(("crop", f"iw-{left + right}:ih-{top + bottom}:{left}:{top}:exact=1"))
    graph = Graph()
    graph.threads = 1
    time_base = frame.time_base or Fraction(1, 1000)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    graph.link_nodes(source, *(graph.add(*each) for each in filters), graph.add("buffersink")).configure()
    return graph


def pixel_crop(head: bytes, index: int) -> Crop:
    """The crop of stream `index`, by the beginning of a Matroska file: PyAV does not tell it."""
    try:
        segment = next(body for name, body in _elements(head) if name == _SEGMENT)
        tracks = next(body for name, body in _elements(segment) if name == _TRACKS)
        entry = [body for name, body in _elements(tracks) if name == _ENTRY][index]
        video = dict(_elements(next(body for name, body in _elements(entry) if name == _VIDEO)))
    except (StopIteration, IndexError):
        return 0, 0, 0, 0
    left, top, right, bottom = (int.from_bytes(video.get(edge, b""), "big") for edge in _EDGES)
    return left, top, right, bottom


def _elements(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """EBML (RFC 8794): a name, a length, and as many bytes; the zeros a number begins with say how long it is."""
    at = 0
    while at < len(data):
        length_at = at + 9 - data[at].bit_length()
        body_at = length_at + 9 - data[length_at].bit_length()
        bits = 7 * (body_at - length_at)
        length = int.from_bytes(data[length_at:body_at], "big") & ((1 << bits) - 1)
        yield data[at:length_at], data[body_at : body_at + length]
        at = body_at + length
