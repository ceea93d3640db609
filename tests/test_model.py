"""The network against the golden files, a second implementation, and its own promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctbprn_lib import InputError, scoring, train
from ctbprn_lib.model import CTBPRN

GOLDEN = [Path(__file__).parent / "golden" / f"{name}.npz" for name in ("d24_k3_r5_s3", "d32_k2_r4_s2")]


def relative(got, expected):
    """Largest difference in units of the expected array's largest value."""
    expected = torch.as_tensor(expected)
    return ((got.detach() - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request):
    with np.load(request.param) as file:
        arrays = dict(file)
    config = json.loads(str(arrays.pop("config")))
    params = {name.removeprefix("param."): a for name, a in arrays.items() if name.startswith("param.")}
    x, gumbel = torch.tensor(arrays["X"])[None], torch.tensor(arrays["gumbel"])[None]
    return config, arrays, params, x, gumbel, torch.tensor(arrays["y"])


def test_initial_values_are_the_golden_ones_bit_for_bit(golden):
    config, _, params, *_ = golden
    c = config
    drawn = CTBPRN(c["d"], c["d"], c["rank"], c["K"], c["steps"], c["num_classes"], stem=False, seed=c["init_seed"])
    names = dict(drawn.reference_names())
    assert set(names) == set(params)
    for name, (ours, index) in names.items():
        assert torch.equal(drawn.get_parameter(ours)[0][index], torch.as_tensor(params[name])), name


def test_outputs_loss_gradients_and_one_adamw_step_are_the_golden_ones(golden):
    config, arrays, params, x, gumbel, y = golden
    model, same = (CTBPRN.from_reference(given, config["temperature"]) for given in (params, arrays))  # "param." or not
    assert torch.equal(model(x)[0], same(x)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    logits, routes = model(x, gumbel)
    assert relative(logits[0], arrays["logits"]) < 1e-5
    assert relative(routes[0], arrays["route_logits"]) < 1e-5
    assert relative(model(x)[0][0], arrays["logits_noise_free"]) < 1e-5
    loss = F.cross_entropy(logits[0], y)
    loss.backward()
    assert relative(loss, arrays["loss"]) < 1e-5
    for name, (ours, index) in model.reference_names():
        assert relative(model.get_parameter(ours).grad[0][index], arrays[f"grad.{name}"]) < 1e-5, name
    optimizer.step()
    for name, (ours, index) in model.reference_names():
        # AdamW's first step is lr g / (|g| + eps): where |g| is not far above eps, float32's rounding of the gradient
        # (1e-6 of its largest value) is magnified by lr eps / (|g| + eps)^2, in any implementation.
        expected, grad = (torch.as_tensor(arrays[f"{kind}.{name}"]) for kind in ("after_adamw", "grad"))
        magnified = 1e-3 * 1e-8 / (grad.abs() + 1e-8) ** 2 * 1e-6 * grad.abs().max()
        after = model.get_parameter(ours)[0][index].detach()
        assert (after - expected).norm() <= 1e-5 * expected.norm(), name
        assert ((after - expected).abs() <= 1e-5 * expected.abs().max() + magnified).all(), name
        assert (magnified > 1e-6).double().mean() < 0.05, name  # so the bound is 1e-5 nearly everywhere


def params_of(model, r):
    """Replica r's values under the reference's names."""
    return {name: model.get_parameter(ours)[r][index] for name, (ours, index) in model.reference_names()}


LIMITS = dict(R=(1, 4), K=(1, 6), T=(1, 40), d=(4, 48), r=(1, 16), L=(1, 3), C=(2, 9), B=(1, 4), seed=(0, 2**31))
shapes = st.fixed_dictionaries(
    {name: st.integers(*limits) for name, limits in LIMITS.items()}
    | {"temperature": st.floats(0.3, 3), "noise": st.booleans(), "unequal": st.booleans()}
)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_every_replica_equals_the_plain_loop_implementation(s):
    R, K, T, d, L, B = (s[name] for name in "RKTdLB")
    model = CTBPRN(d, d, s["r"], K, L, s["C"], s["temperature"], R, stem=False, seed=s["seed"])
    generator = torch.Generator().manual_seed(s["seed"])
    x = torch.randn(R, B, K, T, d, generator=generator)
    gumbel = train.gumbel_noise((R, L, B, K), generator) if s["noise"] else None
    lengths = torch.randint(1, T + 1, (R, B), generator=generator)
    mask = torch.arange(T) < lengths[..., None] if s["unequal"] else None
    with torch.no_grad():
        logits, routes = model(x, gumbel, mask)
        for r in range(R):
            noise, there = (None if a is None else a[r] for a in (gumbel, mask))
            plain = reference.forward(params_of(model, r), x[r], s["temperature"], noise, there)
            torch.testing.assert_close(logits[r], plain[0], rtol=2e-4, atol=2e-5)
            torch.testing.assert_close(routes[r], plain[1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize(("K", "r"), [(2, 3), (2, 4), (3, 4)])  # narrower, as wide, and wider than d together
def test_gradients_are_those_of_the_plain_loop_implementation(K, r, unequal):
    model, generator = CTBPRN(8, 8, r, K, n_replicas=2, stem=False), torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, K, 7, 8, generator=generator), torch.arange(5) % 2
    gumbel = train.gumbel_noise((2, 2, 5, K), generator)
    mask = torch.arange(7) < torch.tensor([[7, 3, 5, 1, 2], [1, 7, 7, 4, 6]])[..., None] if unequal else None
    logits = model(x, gumbel, mask)[0]
    plain = torch.stack(
        [reference.forward(params_of(model, i), x[i], 1.0, gumbel[i], mask[i] if unequal else None)[0] for i in (0, 1)]
    )
    names, values = zip(*model.named_parameters(), strict=True)
    ours, theirs = (
        torch.autograd.grad(scoring.cross_entropy(z, y.expand(2, 5)).sum(), values) for z in (logits, plain)
    )
    for name, got, expected in zip(names, ours, theirs, strict=True):
        assert relative(got, expected) < 1e-5, name


@pytest.mark.parametrize(("K", "r"), [(2, 3), (3, 4)])
@pytest.mark.parametrize("unequal", [False, True])
def test_all_that_grows_with_the_batch_stays_in_bf16(K, r, unequal):
    model, mask = CTBPRN(5, 8, r, K), torch.ones(1, 30, 7, dtype=torch.bool) if unequal else None
    wide = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if tensor.dtype == torch.float32 and tensor.numel() >= K * 30 * 7 * r:
                    wide.append(str(func))
            return result

    x = torch.randn(1, K, 30, 7, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Watch():
        new, _ = model.layers[0](x, mask, model.temperature, None)
    assert new.dtype == torch.bfloat16 and not wide


def test_values_of_tokens_that_do_not_exist_do_not_matter():
    model = CTBPRN(5, 8, 3, 2, n_replicas=2)
    x, mask = torch.randn(2, 3, 2, 7, 5), torch.arange(7).expand(2, 3, 7) < 4
    changed = torch.where(mask[:, :, None, :, None], x, 1e3)
    assert torch.equal(model(x, None, mask)[0], model(changed, None, mask)[0])
    torch.testing.assert_close(model(x, None, mask)[0], model(x[:, :, :, :4])[0])


def test_a_replica_of_many_equals_a_solo_run_over_five_steps():
    """Same values, noise and batches: within 1e-5, whatever the neighbours do (one of them overflows)."""
    task_shape, R = (3, 2, 12, 6), 3
    together = CTBPRN(6, 16, 4, 2, n_replicas=R, seed=[1, 2, 3], temperature=[0.7, 1.0, 1.6])
    solo = CTBPRN(6, 16, 4, 2, seed=2, temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(R, *task_shape, generator=generator), torch.randint(0, 2, (R, 3), generator=generator),
             train.gumbel_noise((R, 2, 3, 2), generator)) for _ in range(5)]  # fmt: skip

    def run(model, replicas):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for x, y, gumbel in data:
            x = x.clone()
            x[2] *= 1e38
            scoring.cross_entropy(model(x[replicas], gumbel[replicas])[0], y[replicas]).mean(1).sum().backward()
            train.clip_gradients(list(model.parameters()), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    run(together, slice(None))
    run(solo, slice(1, 2))
    for (name, mine), (_, theirs) in zip(solo.named_parameters(), together.named_parameters(), strict=True):
        assert relative(theirs[1], mine[0]) < 1e-5, name
    assert not all(p[2].isfinite().all() for p in together.parameters())  # the neighbour did come to harm


def test_replica_r_of_one_seed_is_the_solo_network_of_seed_plus_r():
    before = torch.get_rng_state()
    many, one = CTBPRN(4, 8, 2, 2, n_replicas=3, seed=10), CTBPRN(4, 8, 2, 2, seed=12)
    assert all(torch.equal(a[2], b[0]) for a, b in zip(many.parameters(), one.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("n_features", "d"), [(3, 32), (16, 16), (64, 32)])
def test_the_stem_keeps_the_variance_and_the_angles_of_the_input(n_features, d):
    model = CTBPRN(n_features, d, 2, 2, n_replicas=2)
    product = model.stem_weight.mT @ model.stem_weight if d >= n_features else model.stem_weight @ model.stem_weight.mT
    scale = max(1, d / n_features)
    torch.testing.assert_close(
        product, (scale * torch.eye(min(d, n_features))).expand_as(product), atol=1e-5, rtol=1e-5
    )
    assert (model.stem_bias == 0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"d": 0}, "d must be"), ({"rank": 1.5}, "rank must be"), ({"temperature": 0}, "temperature"),
     ({"stem": False}, "n_features must equal d"), ({"n_replicas": 2, "seed": [1]}, "seed")],
)  # fmt: skip
def test_sizes_that_make_no_network_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        CTBPRN(**{"n_features": 4, "d": 8, "rank": 2, "n_areas": 2, **changed})


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"x must be \(R,B,K,T,F\)"):
        CTBPRN(4, 8, 2, 2)(torch.zeros(1, 3, 2, 5, 6))


def test_saved_and_loaded_it_gives_the_same_answers(tmp_path):
    model = CTBPRN(4, 8, 2, 3, n_classes=5, n_replicas=2, temperature=[0.5, 2.0])
    model.save(tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 3, 6, 4)
    assert torch.equal(model(x)[0], CTBPRN.load(tmp_path / "m.safetensors")(x)[0])


def test_a_damaged_file_is_refused_with_its_name_and_what_is_wrong(tmp_path):
    path = tmp_path / "m.safetensors"
    CTBPRN(4, 8, 2, 2).save(path)
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-5], "not a whole safetensors file"),
        (whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "SHA-256"),
        (whole.replace(b'n_areas\\": 2', b'n_areas\\": 3'), "SHA-256"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"m.safetensors.*{message}"):
            CTBPRN.load(path)
