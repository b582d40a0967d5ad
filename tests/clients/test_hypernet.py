"""Hypernetworks: sizes, magnitude-invariance (MIP), and factored heads."""

import math

import pytest
import torch

from clients.hypernet import SLOPE, Form, Parametrization, encode, hypernet
from fedsim import tree
from fedsim.rng import Key
from fedsim.types import Tree

SHAPES = {"conv.weight": torch.Size([4, 2, 3, 3]), "conv.bias": torch.Size([4]), "fc.weight": torch.Size([8, 36])}


def gen(*names: str | int) -> torch.Generator:
    return Key.root(3).at("hypernet", *names).torch()


def theta(scale: float = 1.0) -> Tree:
    g = gen("theta")
    return {n: scale * torch.randn(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}


def norms(parametrization: Parametrization, squash: bool = False) -> torch.Tensor:
    """‖h(c·1)‖ for c = 0.1, 0.2, …, 1."""
    net = hypernet(SHAPES, 7, (16, 128), parametrization, squash=squash)
    phi = net.init(gen("phi"), theta())
    scales = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)
    return torch.stack([tree.norm(net.generate(phi, c * torch.ones(7, dtype=torch.float64))) for c in scales])


def test_size_of_the_dense_network() -> None:
    """|φ| = 64 H + H + (H + 1) |θ|, and for the CNN of the paper's Fashion-MNIST 14,943,424."""
    fmnist = {
        "conv1.weight": (16, 1, 5, 5), "conv1.bias": (16,), "conv2.weight": (32, 16, 5, 5), "conv2.bias": (32,),
        "fc1.weight": (128, 800), "fc1.bias": (128,),
    }  # fmt: skip
    shapes = {n: torch.Size(s) for n, s in fmnist.items()}
    net = hypernet(shapes, 64, (128,))
    phi = net.init(gen("phi"), {n: torch.zeros(s) for n, s in shapes.items()})
    size = sum(s.numel() for s in shapes.values())
    assert size == 115_776
    assert sum(x.numel() for x in phi.values()) == 64 * 128 + 128 + 129 * size == 14_943_424


def test_encoding_has_constant_norm() -> None:
    gamma = torch.rand(1000, 7, generator=gen("gamma"), dtype=torch.float64)
    torch.testing.assert_close(encode(gamma).norm(dim=1), torch.full((1000,), math.sqrt(7), dtype=torch.float64))
    assert encode(torch.zeros(3)).tolist() == [1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(encode(torch.ones(3)), torch.tensor([0.0, 0, 0, 1, 1, 1]), atol=1e-7, rtol=0)


def test_without_encodings_the_output_is_as_large_as_the_input() -> None:
    n = norms("kaiming")
    torch.testing.assert_close(
        n / torch.linspace(0.1, 1.0, 10, dtype=torch.float64), n[-1].expand(10), rtol=1e-12, atol=0
    )


def test_encoded_the_output_hardly_depends_on_the_size_of_the_input() -> None:
    """Plain: a factor of 10 over these inputs. Encoded: below 2. With θ⁰ added: some per cent."""
    spread = {p: float(n.max() / n.min()) for p in ("kaiming", "input", "mip") if (n := norms(p)) is not None}
    assert spread["kaiming"] == pytest.approx(10)
    assert spread["input"] < 2
    assert spread["mip"] < 1.05 < spread["kaiming"]


def test_mip_squashes_an_unbounded_input() -> None:
    net = hypernet(SHAPES, 7, (16,), "mip")
    phi = net.init(gen("phi"), theta())
    far = net.generate(phi, torch.full((7,), 1e4, dtype=torch.float64))
    torch.testing.assert_close(far, net.generate(phi, torch.full((7,), 1e6, dtype=torch.float64)))


@pytest.mark.parametrize("parametrization", ["output", "mip"])
@pytest.mark.parametrize("head", ["dense", "lowrank", "kronecker"])
def test_with_output_weights_at_zero_theta_is_the_base(parametrization: Parametrization, head: Form) -> None:
    """θ(v) = θ⁰ for every v, so a pre-trained θ⁰ gives its own predictions; ∂F/∂θ⁰ = ∂F/∂θ."""
    base = theta()
    net = hypernet(SHAPES, 5, (16,), parametrization, head)
    phi = net.init(gen("phi"), base)
    bases = {f"head.{n}.bias" for n in SHAPES}
    for name in phi:
        if name not in bases and name.startswith("head."):
            phi[name] = torch.zeros_like(phi[name])
    for i in range(3):
        v = torch.randn(5, generator=gen("v", i), dtype=torch.float64)
        out = net.generate(phi, v)
        assert all(torch.equal(out[n], base[n]) for n in SHAPES)
    want = {n: torch.randn(s, generator=gen("want"), dtype=torch.float64) for n, s in SHAPES.items()}
    grad = torch.func.grad(lambda p: tree.dot(net.generate(p, v), want))(phi)
    for n in SHAPES:
        assert torch.equal(grad[f"head.{n}.bias"].view(SHAPES[n]), want[n])


@pytest.mark.parametrize("head", ["lowrank", "kronecker"])
def test_factored_heads_are_what_their_equations_say(head: Form) -> None:
    net = hypernet(SHAPES, 5, (16,), "default", head, rank=2)
    phi = net.init(gen("phi"), theta())
    v = torch.randn(5, generator=gen("v"), dtype=torch.float64)
    a = torch.relu(phi["trunk.0.weight"] @ v + phi["trunk.0.bias"])
    out = net.generate(phi, v)
    for n, shape in SHAPES.items():
        b = phi[f"head.{n}.bias"]
        if head == "lowrank":
            w = phi[f"head.{n}.left"] @ phi[f"head.{n}.right"]
            assert phi[f"head.{n}.left"].shape == (shape.numel(), 2)
        elif len(shape) == 1:
            w = phi[f"head.{n}.weight"]
        else:  # every row of W is the product, entry by entry, of a row of A and a row of B
            rows, columns = phi[f"head.{n}.rows"], phi[f"head.{n}.columns"]
            w = torch.stack([rows[i] * columns[j] for i in range(len(rows)) for j in range(len(columns))])
            assert rows.numel() + columns.numel() == 16 * (shape[0] + shape.numel() // shape[0])
        torch.testing.assert_close(out[n], (w @ a + b).view(shape))


@pytest.mark.parametrize("head", ["dense", "lowrank", "kronecker"])
@pytest.mark.parametrize("parametrization", ["default", "mip"])
def test_every_head_starts_with_entries_of_one_variance(head: Form, parametrization: Parametrization) -> None:
    """What is generated has the same scale, however the head is factored: within 20 % over 150 networks."""
    shapes = {"w": torch.Size([40, 60])}
    zero = {"w": torch.zeros(40, 60)}
    total = {}
    for form in ("dense", head):
        net = hypernet(shapes, 8, (64,), parametrization, form, rank=32)
        draws = [net.generate(net.init(gen(form, i), zero), torch.full((8,), 0.5))["w"].var() for i in range(150)]
        total[form] = float(torch.stack(draws).mean())
    assert total[head] == pytest.approx(total["dense"], rel=0.2)


def test_default_is_pytorchs_initialisation() -> None:
    net = hypernet({"w": torch.Size([500])}, 64, (128,))
    phi = net.init(gen("phi"), {"w": torch.zeros(500)})
    for name, fan_in in (("trunk.0.weight", 64), ("trunk.0.bias", 64), ("head.w.weight", 128), ("head.w.bias", 128)):
        largest = float(phi[name].abs().max())
        assert 0.95 / math.sqrt(fan_in) < largest <= 1 / math.sqrt(fan_in)


def test_mip_is_kaiming_by_fan_out() -> None:
    net = hypernet({"w": torch.Size([500])}, 64, (128,), "mip")
    phi = net.init(gen("phi"), {"w": torch.ones(500)})
    assert phi["trunk.0.weight"].shape == (128, 128)  # cosines and sines
    assert float(phi["trunk.0.weight"].std()) == pytest.approx(math.sqrt(2 / (1 + SLOPE**2) / 128), rel=0.02)
    assert float(phi["head.w.weight"].std()) == pytest.approx(math.sqrt(2 / (1 + SLOPE**2) / 500), rel=0.02)
    assert not phi["trunk.0.bias"].any()
    assert torch.equal(phi["head.w.bias"], torch.ones(500))
