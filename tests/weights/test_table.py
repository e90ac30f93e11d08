import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from dollar_jax.weights.safetensors_io import read_config, read_tensors, write_component
from dollar_jax.weights.table import CONV, TRANSPOSE, Row, export_stream, import_params

TABLE = [
    Row("embed.weight", "embed/kernel", TRANSPOSE),
    Row("layers.{i}.{m}.weight", "layers/{m:up|down}/kernel", TRANSPOSE),
    Row("stem.weight", "stem/kernel", CONV),
    Row("tied.{i}.layer.0.weight", None),
]


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, np.float32)


SHAPES = {
    "embed": {"kernel": shape(2, 3)},
    "layers": {"up": {"kernel": shape(2, 3, 4)}, "down": {"kernel": shape(2, 4, 3)}},
    "stem": {"kernel": shape(3, 1, 2, 5)},
}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    sizes = {"embed.weight": (3, 2), "stem.weight": (5, 2, 3, 1)}
    for i in range(2):
        sizes |= {f"layers.{i}.up.weight": (4, 3), f"layers.{i}.down.weight": (3, 4)}
    return {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}


def test_tensors_land_where_the_table_says(tensors):
    params = flatten_dict(import_params(TABLE, tensors, SHAPES), sep="/")
    np.testing.assert_array_equal(params["embed/kernel"], tensors["embed.weight"].T)
    np.testing.assert_array_equal(params["layers/up/kernel"][1], tensors["layers.1.up.weight"].T)
    assert params["stem/kernel"][2, 0, 1, 4] == tensors["stem.weight"][4, 1, 2, 0]


def test_round_trip_is_bit_identical(tensors):
    exported = dict(export_stream(TABLE, import_params(TABLE, iter(tensors.items()), SHAPES)))
    assert exported.keys() == tensors.keys()
    for name, value in exported.items():
        assert value.flags.c_contiguous
        np.testing.assert_array_equal(value, tensors[name])


def test_parameters_take_the_models_dtype(tensors):
    bf16 = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, ml_dtypes.bfloat16), SHAPES)
    params = import_params(TABLE, tensors, bf16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_missing_tensor_is_named(tensors):
    del tensors["layers.1.down.weight"]
    with pytest.raises(ValueError, match=r"lack 'layers\.1\.down\.weight'$"):
        import_params(TABLE, tensors, SHAPES)


def test_long_lists_of_missing_tensors_are_cut_short():
    with pytest.raises(ValueError, match="and 1 more"):
        import_params(TABLE, {}, SHAPES)


@pytest.mark.parametrize("name", ["layers.2.up.weight", "layers.0.side.weight", "embed.weight.x"])
def test_tensor_without_a_place_is_named(tensors, name):
    with pytest.raises(ValueError, match=rf"'{name}' of shape \(1, 2\) has no place"):
        import_params(TABLE, {**tensors, name: np.zeros((1, 2))}, SHAPES)


def test_skipped_tensors_may_be_there(tensors):
    import_params(TABLE, {**tensors, "tied.7.layer.0.weight": np.zeros(1)}, SHAPES)
    with pytest.raises(ValueError, match="no place"):
        import_params(TABLE, {**tensors, "tied.7.layer.1.weight": np.zeros(1)}, SHAPES)


def test_wrong_shape_names_both_shapes(tensors):
    tensors["layers.1.up.weight"] = np.zeros((3, 4))
    message = r"'layers\.1\.up\.weight' has shape \(3, 4\), .*'layers/up/kernel' needs \(4, 3\)"
    with pytest.raises(ValueError, match=message):
        import_params(TABLE, tensors, SHAPES)


def test_tensor_that_comes_twice_is_named(tensors):
    with pytest.raises(ValueError, match="'embed.weight' comes twice"):
        import_params(TABLE, [*tensors.items(), ("embed.weight", tensors["embed.weight"])], SHAPES)


def test_parameter_without_a_row_is_named():
    with pytest.raises(ValueError, match="'head/kernel' of shape .* has no row"):
        import_params(TABLE, {}, {**SHAPES, "head": {"kernel": shape(1)}})


def test_two_parameters_for_one_tensor_are_named():
    table = [Row("w", "a/kernel"), Row("w", "b/kernel")]
    with pytest.raises(ValueError, match="'b/kernel' and 'a/kernel' are both 'w'"):
        dict(export_stream(table, {"a": {"kernel": np.ones(1)}, "b": {"kernel": np.ones(1)}}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_component_folder_round_trip(tmp_path, tensors, dtype):
    tensors["steps"] = np.array(7)
    write_component(tmp_path / "new", {"b": 1, "a": [1, 2]}, tensors, dtype=dtype)
    assert read_config(tmp_path / "new") == {"a": [1, 2], "b": 1}
    again = dict(read_tensors(tmp_path / "new"))
    assert again.pop("steps") == 7
    for name, value in again.items():
        assert value.dtype.name == dtype
        np.testing.assert_array_equal(value, tensors[name].astype(value.dtype))
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_shards_are_read_in_turn_and_a_missing_one_is_named(tmp_path, tensors):
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(dict(read_tensors(tmp_path))) == names
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="'b.safetensors'"):
        list(read_tensors(tmp_path))
    index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="not in its folder"):
        list(read_tensors(tmp_path))


def test_folders_that_cannot_be_read_say_why(tmp_path, tensors):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        list(read_tensors(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        list(read_tensors(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="a pickle, which is never opened"):
        list(read_tensors(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        list(read_tensors(tmp_path))
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="'int8'"):
        write_component(tmp_path, {}, tensors, dtype="int8")
