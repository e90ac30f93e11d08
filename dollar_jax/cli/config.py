"""`dollar config`."""

import json
import textwrap
from itertools import groupby

from dollar_jax.cli.base import FLAGS, define, define_config, given_config


def define_flags(arguments: list[str]) -> None:
    define_config(arguments)
    define("bool", "json", False, "As a JSON object of the settings by name.")


def run() -> None:
    from dollar_jax.fields import REQUIRED, plain, settings

    rows = [row._replace(value=plain(row.value), default=plain(row.default)) for row in settings(given_config())]
    if FLAGS.json:
        fields = {row.path: row._replace(default=None if row.default is REQUIRED else row.default) for row in rows}
        print(json.dumps({path: row._asdict() for path, row in fields.items()}, indent=2))
        return
    for group, members in groupby(rows, lambda row: row.path.rpartition(".")[0]):
        print(f"\n[{group or 'config'}]")
        for row in members:
            print(f"{row.path} = {json.dumps(row.value)}")
            notes = [row.allowed]
            if row.default != row.value:
                notes.append("no default" if row.default is REQUIRED else f"default {json.dumps(row.default)}")
            notes += ["may change when a run is resumed"] * row.resumable
            text = f"{row.meaning} ({'; '.join(notes)})"
            print(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    "))
