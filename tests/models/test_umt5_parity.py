"""The text encoders against transformers' in PyTorch, on random weights that went through a file."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dollar_jax.models.network import make_network
from dollar_jax.models.umt5 import UMT5Config, UMT5Encoder, position_buckets, zero_padding
from dollar_jax.weights.safetensors_io import TRANSFORMERS_FILE, read_config, read_tensors, write_component
from dollar_jax.weights.table import export_stream, import_params
from dollar_jax.weights.umt5 import T5, UMT5, UMT5_TABLE

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
}


KINDS = {"umt5": UMT5, "t5": T5}
CLASSES = {
    "umt5": (transformers.UMT5EncoderModel, transformers.UMT5Config),
    "t5": (transformers.T5EncoderModel, transformers.T5Config),
}


@pytest.fixture(scope="module", params=CLASSES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    encoder, config = CLASSES[request.param]
    model = encoder(config(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(folder)
    return folder, model


def load(folder, **ours):
    fields = read_config(folder)
    config = KINDS[fields["model_type"]].read(fields, **ours)
    network = make_network(lambda rngs: UMT5Encoder(config, rngs))
    return config, network, import_params(UMT5_TABLE, read_tensors(folder), network.shapes)


def prompts():
    ids = np.random.default_rng(0).integers(2, 50, (3, 33)).astype(np.int32)
    mask = (np.arange(33) < np.array([[33], [7], [1]])).astype(np.int32)
    return ids * mask, mask


@pytest.mark.parametrize("scan_layers", [True, False])
def test_states_match_with_padded_prompts(saved, scan_layers):
    folder, model = saved
    _, network, params = load(folder, scan_layers=scan_layers)
    ids, mask = prompts()
    with torch.no_grad():
        theirs = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    ours = np.asarray(jax.jit(network.apply)(params, ids, mask))
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


def test_padding_tokens_do_not_change_the_prompt(saved):
    _, network, params = load(saved[0])
    ids, mask = prompts()
    other = np.where(mask, ids, 9)
    encode = jax.jit(network.apply)
    first, second = (zero_padding(encode(params, i, mask), jnp.asarray(mask)) for i in (ids, other))
    np.testing.assert_array_equal(first, second)
    assert not jnp.any(first[1, 7:]) and jnp.any(first[1, :7])


def test_another_text_encoder_is_refused(saved):
    with pytest.raises(ValueError, match="model_type = 'mt5'.*umt5 and t5"):
        UMT5.read({**read_config(saved[0]), "model_type": "mt5"})


def test_buckets_match_at_full_length():
    fields: dict[str, Any] = TINY | {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
    config = UMT5Config(**fields)
    theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**fields))
    attention = theirs.encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    expected = attention._relative_position_bucket(distance).numpy()
    np.testing.assert_array_equal(position_buckets(512, config), expected)


def test_round_trip_through_our_own_file(saved, tmp_path):
    folder, model = saved
    config, _, params = load(folder)
    tensors = dict(export_stream(UMT5_TABLE, params))
    theirs = {k: v.numpy() for k, v in model.state_dict().items() if "embed_tokens" not in k}
    assert tensors.keys() == theirs.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)

    write_component(
        tmp_path,
        KINDS["t5" if config.shared_position_bias else "umt5"].write(config),
        tensors,
        file_name=TRANSFORMERS_FILE,
    )
    again = type(model).from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), model.state_dict()[name].numpy(), err_msg=name)
    assert load(tmp_path)[0] == config


def test_other_feed_forward_is_refused():
    with pytest.raises(ValueError, match="gated-gelu"):
        UMT5Config(feed_forward_proj="relu")
