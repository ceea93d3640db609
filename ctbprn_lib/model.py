"""CTBPRN: cortical columns, a thalamic router and a basal-ganglia controller, R replicas side by side.

Every weight has a leading replica axis, and area weights an area axis behind it, so a layer is a handful of
batched matrix products: no Python loop runs over replicas or areas. Letters: R replicas, B batch, K areas,
T tokens, F input features, d width, r router rank, L layers, C classes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ctbprn_lib import InputError, files, recordings
from ctbprn_lib.recordings import Preparation
from ctbprn_lib.tasks import CHUNK, Task

KINDS_OF_LABELS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))  # beside text
CONFIG = ("n_features", "d", "rank", "n_areas", "n_layers", "n_classes", "n_replicas", "stem")

# {our name: the original's name} of the parameters of the head, of what the areas of a layer share, and of a column.
HEAD_NAMES = {
    "head_gain": "head.0.weight", "head_bias": "head.0.bias", "head_weight": "head.2.weight", "head_c": "head.2.bias",
}  # fmt: skip
SHARED_NAMES = {
    "U": "router.U", "V": "router.V", "P": "ctrl.proj.weight", "p": "ctrl.proj.bias",
    "ctrl_gain": "ctrl.head.0.weight", "ctrl_bias": "ctrl.head.0.bias", "H1": "ctrl.head.1.weight",
    "b1": "ctrl.head.1.bias", "H2": "ctrl.head.3.weight", "b2": "ctrl.head.3.bias",
}  # fmt: skip
COLUMN_NAMES = {
    "W_b": "W_b.weight", "W_a": "W_a.weight", "W_g": "W_g.weight", "beta": "W_g.bias",
    "W_m1": "W_m1.weight", "W_m2": "W_m2.weight", "norm_gain": "norm.weight", "norm_bias": "norm.bias",
}  # fmt: skip


def _linear(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., N, i), weight (..., o, i), bias (..., o) with equal leading axes -> (..., N, o): one batched product."""
    lead, (n, i) = x.shape[:-2], x.shape[-2:]
    o = weight.shape[-2]
    x, weight = x.reshape(-1, n, i), weight.reshape(-1, o, i).mT
    y = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.reshape(-1, 1, o), x, weight)
    return y.view(*lead, n, o)


def _draw_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Fill weight (o, i) and bias (o) with the initial values that nn.Linear draws."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        limit = 1 / math.sqrt(weight.shape[1])
        nn.init.uniform_(bias, -limit, limit)


def _layer_norm(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Layer norm over the last axis of x; gain and bias broadcast to it, so each replica and area has its own.

    They are rounded to x's precision as weights are, and autocast is off, which widens norms on a GPU: x stays narrow.
    """
    with torch.autocast(x.device.type, enabled=False):
        return torch.addcmul(bias.to(x.dtype), F.layer_norm(x, x.shape[-1:], eps=1e-5), gain.to(x.dtype))


class Layer(nn.Module):
    """One layer: controller, router, two-compartment columns.

    m_k = mean_T X_k;  h_k = GELU(P m_k + p);  l = H2 GELU(H1 LN([h_1 .. h_K]) + b1) + b2
    alpha = softmax((l + g) / tau);  M = sum_k alpha_k X_k V_k U_k^T
    b = GELU(W_b x), a = GELU(W_a M), gate = sigmoid(W_g [x; M] + beta), n = GELU(W_m1 b) * GELU(W_m2 a)
    X_k <- LN(x + (1 - gate) * b + gate * n)
    """

    if TYPE_CHECKING:  # parameters and buffers

        def __getattr__(self, name: str) -> torch.Tensor: ...

    def __init__(self, R: int, K: int, d: int, r: int) -> None:
        super().__init__()
        shapes = {
            "W_b": (R, K, d, d), "W_a": (R, K, d, d), "W_g": (R, K, d, 2 * d), "beta": (R, K, d),
            "W_m1": (R, K, d, d), "W_m2": (R, K, d, d), "norm_gain": (R, K, d), "norm_bias": (R, K, d),
            "U": (R, K, d, r), "V": (R, K, d, r), "P": (R, d, d), "p": (R, d),
            "ctrl_gain": (R, K * d), "ctrl_bias": (R, K * d),
            "H1": (R, 2 * d, K * d), "b1": (R, 2 * d), "H2": (R, K, 2 * d), "b2": (R, K),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    @torch.no_grad()
    def draw_initial_values(self, r: int) -> None:
        """Draw the initial values of replica r from torch's CPU state, in the original's order."""
        K, d = self.beta.shape[1:]
        for k in range(K):
            columns = {name: self.get_parameter(name)[r, k] for name in ("W_b", "W_a", "W_g", "W_m1", "W_m2")}
            for name, weight in columns.items():
                _draw_linear(weight, self.beta[r, k] if name == "W_g" else None)
            gate = columns.pop("W_g")
            for weight in columns.values():  # drawn anew
                nn.init.xavier_uniform_(weight, gain=0.8)
            nn.init.xavier_uniform_(gate, gain=0.2)
        self.U[r].normal_().mul_(d**-0.5)
        self.V[r].normal_().mul_(d**-0.5)
        for weight, bias in ((self.P, self.p), (self.H1, self.b1), (self.H2, self.b2)):
            _draw_linear(weight[r], bias[r])
        self.norm_gain[r], self.ctrl_gain[r] = 1, 1

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        temperature: torch.Tensor,
        gumbel: torch.Tensor | None,
        without: str = "",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (R,K,B,T,d), mask (R,B,T), True where a token exists, or None, gumbel (R,B,K) or None; without: see CTBPRN.

        Returns the new x and the route logits (R,B,K).
        """
        R, K, B, T, d = x.shape
        h = F.gelu(_linear(self.P, _token_mean(x, mask).view(R, K * B, d), self.p))
        z = h.view(R, K, B, d).transpose(1, 2).reshape(R, B, K * d)
        z = _layer_norm(z, self.ctrl_gain[:, None], self.ctrl_bias[:, None])
        route = _linear(self.H2, F.gelu(_linear(self.H1, z, self.b1)), self.b2)  # (R,B,K)
        alpha = ((route if gumbel is None else route + gumbel) / temperature.view(R, 1, 1)).softmax(-1)
        if without == "routing":
            alpha = torch.full_like(alpha, 1 / K)
        elif without == "message":
            alpha = torch.zeros_like(alpha)  # so M = 0

        x = x.view(R, K, B * T, d)
        low = _linear(self.V.mT, x).view(R, K, B, T, -1)
        low = low * alpha.transpose(1, 2)[..., None, None].to(low.dtype)  # alpha_k X_k V_k
        m = low.permute(0, 2, 3, 1, 4).reshape(R, 1, B * T, -1)  # (R,1,BT,Kr): areas side by side
        U, W_a, W_gm = self.U.transpose(1, 2).reshape(R, 1, d, -1), self.W_a, self.W_g[..., d:]
        if U.shape[-1] < d:  # M = low [U_1 .. U_K]^T is never formed: W M = (W [U_1 .. U_K]) low^T is narrower
            W_a, W_gm = torch.matmul(W_a, U), torch.matmul(W_gm, U)
        else:
            m = _linear(U, m)
        m = m.expand(R, K, -1, -1).contiguous()

        b = F.gelu(_linear(self.W_b, x))
        a = F.gelu(_linear(W_a, m))
        gate = (_linear(self.W_g[..., :d], x, self.beta) + _linear(W_gm, m)).sigmoid()
        n = F.gelu(_linear(self.W_m1, b)) * F.gelu(_linear(self.W_m2, a))
        x = _layer_norm(x + torch.lerp(b, n, gate), self.norm_gain[:, :, None], self.norm_bias[:, :, None])
        return x.view(R, K, B, T, d), route


def _token_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that exist, all of them where mask (R,B,T) is None: (R,K,B,T,d) -> (R,K,B,d)."""
    if mask is None:
        return x.sum(3) / x.shape[3]  # x.mean takes four times as long in bf16
    there = mask[:, None, :, :, None]
    return (x * there).sum(3) / there.sum(3)


class Network(nn.Module):
    """What train.py and scoring.py need of a network: R replicas, called as CTBPRN is.

    config: sizes, at least d, n_layers, n_classes and n_replicas. without: see CTBPRN. temperature: (R,), a buffer.
    """

    if TYPE_CHECKING:  # parameters and buffers

        def __getattr__(self, name: str) -> torch.Tensor: ...

    config: dict[str, Any]
    without: str = ""

    @property
    def width(self) -> int:
        """The number of features that the head reads."""
        raise NotImplementedError


class CTBPRN(Network):
    """R replicas of one CTBPRN configuration; replica r starts from the values of seed[r] and learns alone.

    n_features F, d width, rank r, n_areas K, n_layers L, n_classes C; temperature a float or one per replica;
    stem: a Linear F -> d per area before the first layer (without it F must equal d, the original's network);
    without: what is left out to see what it is worth, as an attribute that may be set: "routing" (alpha = 1 / K),
    "message" (M = 0) or ""; it is not saved.
    seed: R seeds, or one from which replica r takes seed + r; None leaves all weights 0, for values from elsewhere.
    Raises InputError for sizes that make no network.
    """

    def __init__(
        self,
        n_features: int,
        d: int,
        rank: int,
        n_areas: int,
        n_layers: int = 2,
        n_classes: int = 2,
        temperature: float | Sequence[float] | torch.Tensor = 1.0,
        n_replicas: int = 1,
        stem: bool = True,
        seed: int | Sequence[int] | None = 0,
    ) -> None:
        super().__init__()
        values = (n_features, d, rank, n_areas, n_layers, n_classes, n_replicas, stem)
        self.config = dict(zip(CONFIG, values, strict=True))
        for name, value in self.config.items():
            if type(value) is not (bool if name == "stem" else int) or value < (name != "stem"):
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not stem and n_features != d:
            raise InputError(f"without a stem n_features must equal d, got n_features {n_features} and d {d}")
        R, K = n_replicas, n_areas
        tau = torch.as_tensor(temperature, dtype=torch.float32, device="cpu")
        if not (tau > 0).all():
            raise InputError(f"temperature must be above 0, got {temperature}")
        self.register_buffer("temperature", torch.empty(R).copy_(tau))
        shapes = {"stem_weight": (R, K, d, n_features), "stem_bias": (R, K, d)} if stem else {}
        shapes |= {"head_gain": (R, K * d), "head_bias": (R, K * d)}
        shapes |= {"head_weight": (R, n_classes, K * d), "head_c": (R, n_classes)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.layers: Any = nn.ModuleList(Layer(R, K, d, rank) for _ in range(n_layers))
        if seed is None:
            return
        seeds = [seed + r for r in range(R)] if isinstance(seed, int) else list(seed)
        if len(seeds) != R:
            raise InputError(f"seed must be one number or {R}, one a replica, got {len(seeds)}")
        with torch.random.fork_rng(devices=[]):
            for r, s in enumerate(seeds):
                torch.manual_seed(s)
                self.draw_initial_values(r)

    @torch.no_grad()
    def draw_initial_values(self, r: int) -> None:
        """Draw the initial values of replica r from torch's CPU state, in the order of the original.

        The stem, which the original has not, is semi-orthogonal (Saxe et al., 2014): the first layer sees the input's
        geometry and variance as it would without one.
        """
        for layer in self.layers:
            layer.draw_initial_values(r)
        self.head_gain[r] = 1
        _draw_linear(self.head_weight[r], self.head_c[r])
        if self.config["stem"]:  # drawn last, so that a network without a stem has the golden files' values
            gain = max(1, self.config["d"] / self.config["n_features"]) ** 0.5  # a channel keeps the input's variance
            for weight in self.stem_weight[r]:
                nn.init.orthogonal_(weight, gain=gain)

    @property
    def width(self) -> int:
        return self.config["n_areas"] * self.config["d"]

    def forward(
        self,
        x: torch.Tensor,
        gumbel: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits and route logits.

        x (R,B,K,T,F) (a view of (R,K,B,T,F) memory saves a copy); gumbel (R,L,B,K), or None for the noise-free gate;
        mask (R,B,T), True where a token exists, or None; keep (R,B,width), by what the head's features are multiplied,
        or None.  Returns logits (R,B,C) and route_logits (R,L,B,K).
        """
        R, B, K, T, n_features = x.shape
        if (R, K, n_features) != tuple(self.config[k] for k in ("n_replicas", "n_areas", "n_features")):
            raise InputError(f"x must be (R,B,K,T,F) for {self.config}, got {tuple(x.shape)}")
        x = x.transpose(1, 2)
        if self.config["stem"]:
            x = _linear(self.stem_weight, x.reshape(R, K, B * T, n_features), self.stem_bias)
        x = x.reshape(R, K, B, T, -1).contiguous()
        routes = []
        for i, layer in enumerate(self.layers):
            x, route = layer(x, mask, self.temperature, None if gumbel is None else gumbel[:, i], self.without)
            routes.append(route)
        f = _token_mean(x, mask).transpose(1, 2).reshape(R, B, -1)
        f = F.gelu(_layer_norm(f, self.head_gain[:, None], self.head_bias[:, None]))
        return _linear(self.head_weight, f if keep is None else f * keep, self.head_c), torch.stack(routes, 1)

    @classmethod
    @torch.no_grad()
    def from_reference(cls, params: Mapping[str, np.ndarray | torch.Tensor], temperature: float) -> "CTBPRN":
        """One replica without a stem from arrays under the original's names, with or without "param." before them."""
        prefix = "param." if any(name.startswith("param.") for name in params) else ""
        params = {name.removeprefix(prefix): a for name, a in params.items() if name.startswith(prefix)}
        n_layers = 1 + max(int(name.split(".")[1]) for name in params if name.startswith("steps."))
        K, d, r = params["steps.0.router.U"].shape
        model = cls(d, d, r, K, n_layers, params["head.2.weight"].shape[0], temperature, stem=False, seed=None)
        for theirs, (ours, index) in model.reference_names():
            model.get_parameter(ours)[0][index] = torch.as_tensor(params[theirs])
        return model

    def reference_names(self) -> Iterator[tuple[str, tuple[str, Any]]]:
        """Pairs (the original's name, place): place is (parameter name, index behind the replica axis).

        The stem is left out, because the original has none.
        """
        yield from ((theirs, (ours, ...)) for ours, theirs in HEAD_NAMES.items())
        for i in range(self.config["n_layers"]):
            yield from ((f"steps.{i}.{theirs}", (f"layers.{i}.{ours}", ...)) for ours, theirs in SHARED_NAMES.items())
            for k in range(self.config["n_areas"]):
                for ours, theirs in COLUMN_NAMES.items():
                    yield f"steps.{i}.columns.{k}.{theirs}", (f"layers.{i}.{ours}", k)

    @torch.no_grad()
    def replica(self, r: int) -> "CTBPRN":
        """Replica r as a network of its own (R = 1)."""
        alone = CTBPRN(**self.config | {"n_replicas": 1}, seed=None)
        alone.load_state_dict({name: values[r : r + 1] for name, values in self.state_dict().items()})
        return alone

    def save(self, path: str | Path) -> None:
        """Write weights and configuration, with a SHA-256 of both, to a safetensors file."""
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        files.write_tensors(path, state, json.dumps(self.config))

    @classmethod
    def load(cls, path: str | Path) -> "CTBPRN":
        """Read a network that save, or a Classifier, wrote.  Raises InputError: the file and what is wrong with it."""
        return _read(path)[0]


class Classifier:
    """A trained network with all that it needs to classify raw recordings; its methods are named as in scikit-learn.

    classes_: (C,) the labels, as they stand in the data.  area_names: (K,).  seq_len: tokens that the network reads.
    network: the CTBPRN, R = 1.  preparation: how areas are sorted and features standardised.
    """

    TENSORS = ("preparation.center", "preparation.scale")

    def __init__(
        self, network: CTBPRN, preparation: Preparation, classes: np.ndarray, area_names: Sequence[str], seq_len: int
    ) -> None:
        self.network, self.preparation, self.classes_ = network, preparation, classes
        self.area_names, self.seq_len = tuple(area_names), seq_len

    @classmethod
    def of(cls, network: CTBPRN, task: Task, seq_len: int) -> "Classifier":
        """The classifier that a network trained on the first seq_len tokens of a task is."""
        return cls(network, task.preparation, task.classes, task.area_names, seq_len)

    def predict(self, x: np.ndarray, lengths: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """(N,) the most probable label of each recording; arguments and errors as predict_proba."""
        return self.classes_[self.predict_proba(x, lengths).argmax(1)]

    @torch.no_grad()
    def predict_proba(self, x: np.ndarray, lengths: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """(N,C) probabilities, in the order of classes_.

        x: raw recordings in the form and unit of the .npz: (N,T,F), or (N,K,T,F) where that was so.  lengths: (N,)
        tokens that exist, where sequences are unequal.  Tokens beyond seq_len are not read, as in training; a
        recording with fewer is read to its end.
        Raises InputError for another shape, and for values that are missing or infinite.
        """
        with recordings.errors_about("recordings to classify"):
            x, mask = self._checked(x, lengths)
            device, logits = self.network.temperature.device, []
            for i in range(0, len(x), CHUNK):
                part = slice(i, i + CHUNK)
                prepared = self.preparation.apply(x[part], mask[part])
                there = None if mask.all() else torch.from_numpy(mask[part]).to(device)[None]
                logits.append(self.network(torch.from_numpy(prepared).to(device)[None], None, there)[0][0])
        return torch.cat(logits).double().softmax(-1).cpu().numpy()

    def _checked(self, x: np.ndarray, lengths: Sequence[int] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The first seq_len tokens of x, and which of them exist (N,T), where x has the form of training."""
        x, mask = recordings.checked(x, lengths)
        (K, F), columns = self.preparation.center.shape, self.preparation.columns
        form = ("N", "T", sum(map(len, columns))) if columns else ("N", K, "T", F)
        if x.ndim != len(form) or any(isinstance(n, int) and n != m for n, m in zip(form, x.shape, strict=True)):
            raise InputError(f"x must be ({', '.join(map(str, form))}) as in training, got shape {x.shape}")
        x, mask = x[..., : self.seq_len, :], mask[:, : self.seq_len]
        recordings.refuse_missing_values(x, mask, self.area_names, columns)
        return x, mask

    def save(self, path: str | Path) -> None:
        """Write everything, with a SHA-256 of it, to a safetensors file, which CTBPRN.load reads as well."""
        state = {name: value.detach().cpu() for name, value in self.network.state_dict().items()}
        arrays = (self.preparation.center, self.preparation.scale)
        state |= {name: torch.from_numpy(array) for name, array in zip(self.TENSORS, arrays, strict=True)}
        about = dict(classes=self.classes_.tolist(), area_names=self.area_names, seq_len=self.seq_len)
        about |= dict(columns=self.preparation.columns, kind=self.classes_.dtype.name)
        files.write_tensors(path, state, json.dumps(self.network.config | {"classifier": about}))

    @classmethod
    def load(cls, path: str | Path) -> "Classifier":
        """Read a classifier that save wrote.  Raises InputError: the file and what is wrong with it."""
        network, arrays, about = _read(path)
        K, F = network.config["n_areas"], network.config["n_features"]
        if about is None:
            raise InputError(f"{path}: a network without what a classifier needs; CTBPRN.load reads it")
        try:
            center, scale = (arrays[name].numpy() for name in cls.TENSORS)
            columns = about["columns"] and tuple(tuple(map(int, features)) for features in about["columns"])
            flat = sorted(f for features in columns or () for f in features)
            labels, kind, seq_len, area_names = (about[name] for name in ("classes", "kind", "seq_len", "area_names"))
            classes = np.array(labels, dtype=kind if kind in KINDS_OF_LABELS else None)
            fits = [
                center.shape == scale.shape == (K, F),
                center.dtype == scale.dtype == np.float64,
                np.isfinite(center).all() and (scale > 0).all(),
                not columns or (len(columns) == K and max(map(len, columns)) == F and flat == list(range(len(flat)))),
                classes.shape == (network.config["n_classes"],) and classes.tolist() == labels,
                classes.dtype.kind == "U" or (classes.dtype.name == kind and kind in KINDS_OF_LABELS),
                type(seq_len) is int and seq_len > 0,
                network.config["n_replicas"] == 1,
                len(area_names) == K and all(isinstance(name, str) for name in area_names),
            ]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            fits = [False]
        if not all(fits):
            raise InputError(f"{path}: what the classifier holds does not fit its network; the file is damaged")
        return cls(network, Preparation(columns or None, center, scale), classes, area_names, seq_len)


def _read(path: str | Path) -> tuple[CTBPRN, dict[str, torch.Tensor], Any]:
    """The network in a file, and what a Classifier wrote beside it: its arrays and its entry in the configuration."""
    state, text = files.tensors(path)
    arrays = {name: state.pop(name) for name in Classifier.TENSORS if name in state}
    try:
        config = json.loads(text)
        about = config.pop("classifier", None)
        return _network(config, state), arrays, about
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError):
        raise InputError(
            f"{path}: the configuration does not fit the weights; expected {', '.join(CONFIG)}, weights of the "
            "shapes that follow from them, which are finite float32 numbers, and temperature above 0"
        ) from None


def _network(config: dict[str, Any], state: Mapping[str, torch.Tensor]) -> CTBPRN:
    """The network of this configuration with the values of state.  Raises some error where they do not fit.

    It is built on the device "meta", where tensors have no values, and then given those of state: a few bytes of
    configuration could ask for any amount of memory.
    """
    if set(config) != set(CONFIG) or config["n_layers"] > len(state):
        raise ValueError
    if not all(value.dtype == torch.float32 and value.isfinite().all() for value in state.values()):
        raise ValueError
    if not (state["temperature"] > 0).all():
        raise ValueError
    with torch.device("meta"):
        network = CTBPRN(**config, seed=None)
    network.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return network
