"""A Transformer encoder of CTBPRN's size, which the same loop trains: what one would use instead.

It is made of torch's own modules. Letters are those of model.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctbprn_lib.model import Network

HEADS = 2  # attention takes most of the time, and more heads take more of it


class Encoder(nn.Module):
    """One replica: a Linear for each area, the tokens of all areas in one sequence, pre-norm encoder layers, a head.

    The feed-forward part is (8 K - 3) / 2 times as wide as d, so that a layer has about as many weights as a layer of
    CTBPRN, whose matrices but the router's are (8 K + 1) d^2. Positions are those of Vaswani et al. (2017).
    """

    if TYPE_CHECKING:  # buffers
        positions: torch.Tensor

    def __init__(self, n_features: int, d: int, n_areas: int, n_layers: int, n_classes: int, n_tokens: int) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Linear(n_features, d) for _ in range(n_areas))
        heads = next(n for n in range(HEADS, 0, -1) if d % n == 0)
        wide = (8 * n_areas - 3) * d // 2
        how: dict[str, Any] = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(d, heads, wide, **how) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, n_classes)
        at = torch.arange(n_tokens)[:, None] / 10_000 ** (torch.arange(0, d, 2) / d)  # (T, d / 2)
        self.register_buffer("positions", torch.stack([at.sin(), at.cos()], 2).flatten(1)[:, :d])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, keep: torch.Tensor | None = None) -> torch.Tensor:
        """x (B,K,T,F), mask (B,T) or None, keep (B,d) or None -> logits (B,C)."""
        K, T = x.shape[1:3]
        tokens = torch.cat([stem(x[:, k]) + self.positions[:T] for k, stem in enumerate(self.stems)], 1)  # (B,KT,d)
        there = None if mask is None else mask.repeat(1, K)  # (B,KT)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=None if there is None else ~there)
        tokens = self.norm(tokens)
        mean = tokens.mean(1) if there is None else (tokens * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return self.head(mean if keep is None else mean * keep)


class Transformer(Network):
    """R Encoders, with the interface that train.py expects of CTBPRN: weights have a leading replica axis."""

    encoders: tuple[Encoder]
    names: list[str]

    def __init__(
        self,
        n_features: int,
        d: int,
        n_areas: int,
        n_layers: int,
        n_classes: int,
        n_tokens: int,
        n_replicas: int = 1,
        seed: Sequence[int] | None = None,
    ) -> None:
        """seed: one number for each replica; None leaves all weights 0, for values from elsewhere."""
        super().__init__()
        sizes = dict(n_features=n_features, d=d, n_areas=n_areas, n_layers=n_layers, n_classes=n_classes)
        self.config = sizes | dict(n_replicas=n_replicas)
        self.register_buffer("temperature", torch.ones(n_replicas))
        encoders = []
        with torch.random.fork_rng(devices=[]):
            for r in range(n_replicas):
                torch.manual_seed(seed[r] if seed else 0)
                encoders.append(Encoder(**sizes, n_tokens=n_tokens))
        self.names = [name for name, _ in encoders[0].named_parameters()]
        values = [dict(encoder.named_parameters()) for encoder in encoders]
        for name in self.names:
            stacked = torch.stack([of[name].detach() for of in values])
            self.register_parameter(name.replace(".", "_"), nn.Parameter(stacked if seed else stacked * 0))
        self.register_buffer("positions", encoders[0].positions.clone())
        self.encoders = (encoders[0].to("meta"),)  # in a tuple, because its own weights are not used

    @property
    def width(self) -> int:
        return self.config["d"]

    def forward(
        self,
        x: torch.Tensor,
        gumbel: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (R,B,K,T,F), mask (R,B,T) or None, keep (R,B,d) or None -> logits (R,B,C).

        With them come zeros (R,L,B,K), as there is no route.
        """
        R, B, K = x.shape[:3]
        logits = []
        for r in range(R):
            own = {name: self.get_parameter(name.replace(".", "_"))[r] for name in self.names}
            own["positions"] = self.positions
            of = x[r], None if mask is None else mask[r], None if keep is None else keep[r]
            with sdpa_kernel(SDPBackend.MATH):  # twice as fast on a CPU at these widths
                logits.append(functional_call(self.encoders[0], own, of))
        return torch.stack(logits), x.new_zeros(R, self.config["n_layers"], B, K)
