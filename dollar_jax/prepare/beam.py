"""`dollar prepare --beam`: the units of a job as the elements of an Apache Beam pipeline, on any of its runners.
Workers write whole units into a folder that all of them share. A unit that is interrupted and retried, or made twice,
ends with the same bytes as without Beam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import apache_beam as beam  # pyright: ignore[reportMissingImports]
    from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
    from apache_beam.utils.shared import Shared  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ValueError("--beam needs Apache Beam: pip install -e '.[beam]'") from error

from dollar_jax.prepare import job, shards
from dollar_jax.prepare.settings import PrepareSettings


class EncodeUnits(beam.DoFn):
    """Makes each unit it is given and passes its number on. The teacher is loaded once in each process."""

    def __init__(self, settings: PrepareSettings, out: Path):
        self.settings, self.out, self.shared = settings, out, Shared()

    def setup(self) -> None:
        self.encoder = self.shared.acquire(lambda: shards.Encoder(self.settings, shards.load_generator(self.settings)))

    def process(self, unit: int) -> Iterator[int]:
        job.encode_units([unit], self.encoder, self.out)
        yield unit


def hand_out_with_beam(settings: PrepareSettings, out: Path, options: Sequence[str], units: Sequence[int]) -> None:
    """Has a pipeline with these command-line `options` make the units; see `job.prepare`."""
    encode = EncodeUnits(settings, out.absolute())
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = pipeline | beam.Create(units) | beam.Reshuffle() | beam.ParDo(encode)
