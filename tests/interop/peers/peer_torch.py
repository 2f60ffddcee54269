"""torch tensors as the Python client takes them: the bits of the same numbers as numpy arrays. `make test-interop`."""

import numpy as np
import pytest
import torch

import quarrel

EIGHT = torch.arange(8 * 256, dtype=torch.float32).reshape(8, 256).sin()


@pytest.fixture(scope="module")
def client(server):
    with quarrel.connect(server.location) as client:
        yield client


def bits(client, tensor):
    [layer] = client.quantize({"x": tensor}, scheme="W4A16")
    return layer.dtype, layer.shape, layer.packed.tobytes(), layer.scales.tobytes()


@pytest.mark.parametrize("dtype, numpy_type, word", [
    (torch.float32, np.float32, "f32"), (torch.float16, np.float16, "f16"), (torch.float64, np.float64, "f64"),
])
def test_a_tensor_gives_the_bits_of_its_array(client, dtype, numpy_type, word):
    tensor = EIGHT.to(dtype)
    assert bits(client, tensor) == bits(client, tensor.numpy())
    assert bits(client, tensor)[0] == word and tensor.numpy().dtype == numpy_type


def test_bfloat16_goes_as_it_is(client):
    tensor = EIGHT.to(torch.bfloat16)
    dtype, shape, packed, _ = bits(client, tensor)
    assert (dtype, shape) == ("bf16", (8, 256))
    # Scales are rounded to the weights' type, so only the scheme without stored rounding could agree with f32's.
    assert packed == bits(client, tensor.contiguous().clone())[2]
    [layer] = client.quantize({"x": tensor}, scheme="int8")
    restored = torch.from_numpy(layer.dequantize())
    assert (restored - tensor.float()).abs().max() <= layer.scales.max() * 0.51


@pytest.mark.parametrize("view", [
    lambda x: x.t(), lambda x: x[::2], lambda x: x[:, :128], lambda x: x.flip(0), lambda x: x.expand(8, 256),
], ids=["transposed", "every second", "columns", "flipped", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_view_is_what_it_shows(client, view, dtype):
    shown = view(EIGHT.to(dtype))
    [seen] = client.quantize({"x": shown}, scheme="int8")
    [copied] = client.quantize({"x": shown.contiguous().clone()}, scheme="int8")
    assert (seen.packed.tobytes(), seen.scales.tobytes()) == (copied.packed.tobytes(), copied.scales.tobytes())


def test_a_state_dict_with_parameters_goes_whole(client):
    model = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 8, bias=False))
    quantized = client.quantize(model.state_dict(), scheme="int8").collect()
    assert [name for name, layer in quantized.items() if layer.status == "quantized"] == ["0.weight", "2.weight"]
    parameters = client.quantize(dict(model.named_parameters()), scheme="int8").collect()
    assert parameters["0.weight"].packed.tobytes() == quantized["0.weight"].packed.tobytes()


@pytest.mark.parametrize("tensor", [
    torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, 4, device="meta"), torch.eye(4).to_sparse(),
], ids=["integers", "meta", "sparse"])
def test_what_holds_no_floats_is_refused_by_name(client, tensor):
    with pytest.raises((quarrel.InvalidInputError, TypeError), match="`odd`"):
        list(client.quantize({"odd": tensor}, scheme="int8"))
