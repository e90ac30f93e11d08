"""One kind of network in a pipeline folder: its config.json as our configuration and back, and its weights' table."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_type_hints

from dollar_jax.fields import convert
from dollar_jax.models.network import Network, make_network
from dollar_jax.weights.table import Params, Row

# Fields of our configurations that say how a network is computed; config.json knows nothing of them.
OURS = {"dtype", "param_dtype", "remat", "scan_layers", "attention", "context_parallel", "shared_position_bias"}
# Numbers of layers and heads; other sizes may be larger.
_COUNTS = {"num_layers", "num_attention_heads", "num_heads", "num_res_blocks", "layers_per_block"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of networks of diffusers or transformers. The fields of `config` but OURS are those of config.json.
    `fixed` are further ones with the only value that is supported, or a function of the configuration that makes it,
    which a file that leaves them out means too; `note` goes into a refusal. `required` must be in the file, all where
    it is None. `given` are fields of OURS that the kind decides, `extra` fields that are written and not read.
    Some versions of the library leave out the `prefix` of tensors' names."""

    library: Literal["diffusers", "transformers"]
    class_name: str
    config: type
    module: Callable[[Any, Any], Any]  # a configuration and nnx.Rngs
    table: Callable[[Any, Params], Sequence[Row]]  # of a configuration and the parameters' shapes
    note: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    required: frozenset[str] | None = None
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefix: str = ""

    def named(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """A file's tensors by their whole names."""
        return {self.prefix + name.removeprefix(self.prefix): tensor for name, tensor in tensors.items()}

    def network(self, config: Any) -> Network:
        return make_network(functools.partial(self.module, config))

    def read(self, fields: Mapping[str, Any], file: object = "config.json", **ours: Any) -> Any:
        """The configuration that the fields of `file` describe, with `ours` of OURS; ValueError naming the field."""
        if (found := fields.get("_class_name", self.class_name)) != self.class_name:
            raise ValueError(f"{file} is of a {found}, not of a {self.class_name}: {self.note}")
        for name, value in self.fixed.items():
            self._check(file, name, fields.get(name, value), value)
        hints = {name: hint for name, hint in get_type_hints(self.config).items() if name not in OURS}
        if missing := sorted((self.required if self.required is not None else hints.keys()) - fields.keys()):
            raise ValueError(f"{file} lacks {', '.join(missing)}: it is not of a {self.class_name}")
        known = {name: typed(fields[name], hint, name, file) for name, hint in hints.items() if name in fields}
        try:
            config = self.config(**known, **{**self.given, **ours})
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        for name, value in self.fixed.items():
            if callable(value):
                self._check(file, name, fields.get(name, value(config)), value(config))
        return config

    def own(self, fields: Mapping[str, Any], where: str) -> Any:
        """The configuration of settings in place of a file: ValueError naming one that is wrong or unknown."""
        hints = get_type_hints(self.config)
        if unknown := sorted(fields.keys() - hints.keys()):
            raise ValueError(f"{where} has no {unknown[0]}; there are {', '.join(hints)}")
        try:
            return self.config(**{name: typed(value, hints[name], name, where) for name, value in fields.items()})
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from error

    def _check(self, file: object, name: str, found: Any, value: Any) -> None:
        if not callable(value) and found != value:
            raise ValueError(f"{file} has {name} = {found!r}, not {value!r}: {self.note}")

    def write(self, config: Any) -> dict[str, Any]:
        """The fields of config.json with which the library builds the same network."""
        own = {"_class_name": self.class_name} if self.library == "diffusers" else {"architectures": [self.class_name]}
        fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in OURS}
        fixed = {name: value(config) if callable(value) else value for name, value in self.fixed.items()}
        return {**own, **fields, **fixed, **self.extra}


def typed(value: Any, hint: Any, name: str, file: object) -> Any:
    """A value of a JSON file as the type `hint`, lists as tuples; numbers bounded, and positive but for a list's."""
    where = f"{file}: {name}"
    value = convert(hint, value, where)
    most = 1000 if name in _COUNTS else 2**20
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int) and not isinstance(number, bool) and not 1 <= number <= most:
            raise ValueError(f"{where} is {value!r}, but must be from 1 to {most}")
        signed = isinstance(value, tuple) and name != "latents_std"
        if isinstance(number, float) and not (math.isfinite(number) and (number > 0 or signed)):
            raise ValueError(f"{where} is {value!r}, but must be {'finite' if signed else 'positive'}")
    return value
