"""The rules that keep the package one-way: who may import what, and what is written nowhere."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [p.relative_to(ROOT) for d in ("dollar_jax", "configs") for p in ROOT.glob(f"{d}/**/*.py")]
STDLIB = "|".join(sys.stdlib_module_names)
IO = r"(logging|os|pathlib|io|json|sys|subprocess|tqdm|absl|tensorboardX|orbax|safetensors)\b"
COMPILED = r"(?!dollar_jax/program\.py)"
PURE = r"dollar_jax/(losses|schedule)\.py"
METHOD = r"dollar_jax\.rewards\.methods\.(?!base\b)\w+\."
TRAINING = r"dollar_jax\.(losses|objectives|step|state|optim|sharding|config|train)\b"

# (rule, the files it holds in, imports forbidden there); both are matched from the start.
IMPORTS = [
    (
        "losses and schedule import next to nothing",
        PURE,
        rf"(?!(jax|jaxtyping|numpy|dollar_jax\.types|{STDLIB})(\.|$))",
    ),
    ("losses and schedule know no randomness", PURE, r"(random|jax\.random|numpy\.random)\b"),
    ("objectives gets networks as arguments", "dollar_jax/objectives", r"dollar_jax\.models\b"),
    ("models knows nothing of training", "dollar_jax/models/", TRAINING),
    ("flax only in models/", "(?!dollar_jax/models/)", r"flax\b(?!\.traverse_util)"),
    ("orbax only in checkpoint.py", r"(?!dollar_jax/checkpoint\.py)", r"orbax\b"),
    ("safetensors only in weights/", "(?!dollar_jax/weights/)", r"safetensors\b"),
    ("torch only in tests and benchmarks", "", r"torch\w*(\.|$)"),
    ("ConfigDict only at the command line and in configs/", r"dollar_jax/(?!cli|experiment\.py)", r"ml_collections\b"),
    ("step does no I/O", r"dollar_jax/step\.py", IO),
    ("programs are compiled in one place", COMPILED, r"(jax\.(p?jit|pmap)|jax\.experimental\.pjit)\b"),
    ("the loop is at the top", r"dollar_jax/(?!(cli|reproduce)\b)", r"dollar_jax\.train\b"),
    ("what a step is made of knows no host", r"dollar_jax/(distillation|objectives|state|optim)\.py", IO),
    ("a reward method is not known by its file elsewhere", "(?!dollar_jax/rewards/methods/)", METHOD),
]
# (rule, the files it holds in, names and calls forbidden there); a call is "function(arguments".
USES = [
    ("losses and schedule know no randomness", PURE, r"(jax|np|numpy)\.random\b"),
    ("jax's transformations and optax instead of NNX's", "", r"nnx\.(jit|grad|Optimizer)\b"),
    ("programs are compiled in one place", COMPILED, r"jax\.(p?jit|pmap)\b"),
    ("step does no I/O", r"dollar_jax/step\.py", r"(print|open)\("),
    (
        "what a reward method does otherwise is in its class",
        "(?!dollar_jax/(rewards/methods|report)/)",
        r".*\bmethod (==|!=|in|not in) ['\"(\[{]",
    ),
    ("every key of a config is explicit", "", r"(\w+\.)*(config|cfg)(\.\w+)*\.get\(2"),
]


def imports(tree: ast.AST, path: Path) -> list[str]:
    """Dotted names: `from a import b, c` imports a.b and a.c."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: len(path.parts) - node.level] if node.level else ()
            module = ".".join([*parents, *filter(None, [node.module])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def uses(tree: ast.AST) -> list[str]:
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    names = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    names += [ast.unparse(node) for node in nodes if isinstance(node, ast.Compare)]
    return names + [f"{ast.unparse(c.func)}({len(c.args + c.keywords)}" for c in calls]


def violations(path: Path, source: str) -> list[str]:
    tree = ast.parse(source)
    found = ["a module is named after what it does"] if path.name == "utils.py" else []
    pairs = [(r, imports(tree, path)) for r in IMPORTS] + [(r, uses(tree)) for r in USES]
    for (rule, files, bad), names in pairs:
        if re.match(files, path.as_posix()):
            found += [f"{rule}: {name}" for name in names if re.match(bad, name)]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_rules_hold(path):
    assert not violations(path, (ROOT / path).read_text())


def test_the_step_is_built_in_one_place_for_training_and_planning():
    trees = [ast.parse((ROOT / path).read_text()) for path in FILES]
    calls = [use for tree in trees for use in uses(tree) if "make_step(" in use]
    assert len(calls) <= 1, "one call of make_step serves both"


BAD = """losses.py: import optax | schedule.py: from dollar_jax import types, models
losses.py: jax.random.normal(key) | objectives.py: from dollar_jax.models.wan import WanConfig
models/wan.py: from ..losses import vsd | train.py: from flax import nnx | models/utils.py: 0
train.py: import orbax.checkpoint | cli.py: from safetensors import safe_open | step.py: print(1)
weights/wan.py: import torch.nn | config.py: from ml_collections import ConfigDict
step.py: from pathlib import Path | step.py: functools.partial(jax.jit, donate_argnums=0)
generate.py: from jax import jit | generate.py: jax.jit(f) | run.py: from dollar_jax import train
scorer.py: 1 if c.method == 'lrm' else 2 | step.py: from dollar_jax.rewards.methods.lrm import Replay
state.py: import json | train.py: self.config.student.get('lr', 1e-4) | models/wan.py: nnx.Optimizer(model, tx)"""


@pytest.mark.parametrize("sample", re.split(r" \| |\n", BAD))
def test_each_rule_notices(sample):
    path, source = sample.split(": ", 1)
    assert violations(Path("dollar_jax") / path, source)
