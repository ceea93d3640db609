"""The network a second time, as plainly as it can be written: one area at a time, one sample at a time.

Written from the equations alone, it shares no line with the library; tests compare the two, and it is the slow side
of the speed comparison. One replica; parameters are a dict under the original's names, such as
"steps.0.columns.1.W_g.weight", "steps.0.router.U" (K,d,r), "steps.0.ctrl.head.3.bias", "head.2.weight".
"""

import torch
import torch.nn.functional as F
from torch import nn


def init_params(d, K, r, L, C, seed):
    """Initial values from torch.manual_seed(seed); the global state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return draw_params(d, K, r, L, C)


def draw_params(d, K, r, L, C):
    """Initial values in the fixed order of draws, from torch's global state."""
    params = {}

    def keep(name, module):
        params.update({f"{name}.{key}": value.detach() for key, value in module.named_parameters()})

    for step in range(L):
        for k in range(K):
            W_b, W_a = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
            W_g = nn.Linear(2 * d, d)
            W_m1, W_m2 = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
            for module in (W_b, W_a, W_m1, W_m2):
                nn.init.xavier_uniform_(module.weight, gain=0.8)
            nn.init.xavier_uniform_(W_g.weight, gain=0.2)
            modules = {"W_b": W_b, "W_a": W_a, "W_g": W_g, "W_m1": W_m1, "W_m2": W_m2, "norm": nn.LayerNorm(d)}
            for name, module in modules.items():
                keep(f"steps.{step}.columns.{k}.{name}", module)
        params[f"steps.{step}.router.U"] = torch.randn(K, d, r) * d**-0.5
        params[f"steps.{step}.router.V"] = torch.randn(K, d, r) * d**-0.5
        keep(f"steps.{step}.ctrl.proj", nn.Linear(d, d))
        keep(f"steps.{step}.ctrl.head.0", nn.LayerNorm(K * d))
        keep(f"steps.{step}.ctrl.head.1", nn.Linear(K * d, 2 * d))
        keep(f"steps.{step}.ctrl.head.3", nn.Linear(2 * d, K))
    keep("head.0", nn.LayerNorm(K * d))
    keep("head.2", nn.Linear(K * d, C))
    return params


def forward(params, x, temperature, gumbel=None, mask=None):
    """x (B,K,T,d), gumbel (L,B,K) or None, mask (B,T) or None -> class logits (B,C), route logits (L,B,K)."""
    p = params
    K = x.shape[1]
    L = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("steps."))

    def linear(name, v):
        return F.linear(v, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(name, v):
        return F.layer_norm(v, v.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def mean(v):  # (B,T,d) -> (B,d) over the tokens that exist
        if mask is None:
            return v.mean(1)
        return torch.stack([v[n, mask[n]].mean(0) for n in range(len(v))])

    areas = [x[:, k] for k in range(K)]
    routes = []
    for step in range(L):
        s = f"steps.{step}"
        z = torch.cat([F.gelu(linear(f"{s}.ctrl.proj", mean(X))) for X in areas], 1)
        hidden = F.gelu(linear(f"{s}.ctrl.head.1", norm(f"{s}.ctrl.head.0", z)))
        route = linear(f"{s}.ctrl.head.3", hidden)
        routes.append(route)
        noisy = route if gumbel is None else route + gumbel[step]
        alpha = F.softmax(noisy / temperature, dim=1)
        M = torch.zeros_like(areas[0])
        for k in range(K):
            U, V = p[f"{s}.router.U"][k], p[f"{s}.router.V"][k]
            M = M + alpha[:, k, None, None] * (areas[k] @ V @ U.T)
        new = []
        for k in range(K):
            c, X = f"{s}.columns.{k}", areas[k]
            b, a = F.gelu(linear(f"{c}.W_b", X)), F.gelu(linear(f"{c}.W_a", M))
            gate = torch.sigmoid(linear(f"{c}.W_g", torch.cat([X, M], -1)))
            n = F.gelu(linear(f"{c}.W_m1", b)) * F.gelu(linear(f"{c}.W_m2", a))
            new.append(norm(f"{c}.norm", X + (1 - gate) * b + gate * n))
        areas = new
    f = torch.cat([mean(X) for X in areas], 1)
    return linear("head.2", F.gelu(norm("head.0", f))), torch.stack(routes)


def gumbel_noise(L, B, K):
    """(L,B,K) of -log(E), E ~ Exp(1), one draw a layer."""
    return torch.stack([-torch.empty(B, K).exponential_().log() for _ in range(L)])


def routing_batch(B, K, T, d, signal=0.5, noise=0.7):
    """The routing task, sample by sample: x (B,K,T,d), labels (B,), target areas (B,)."""
    areas = [noise * torch.randn(B, T, d) for _ in range(K)]
    target = torch.randint(0, K, (B,))
    labels = []
    for n in range(B):
        k = int(target[n])
        areas[k][n, :, : d // 4] += signal * torch.randn(d // 4)
        labels.append(int(areas[k][n, :, : d // 4].sum() > 0))
    return torch.stack(areas, 1), torch.tensor(labels), target


def train(lr, d, rank, temperature, batch_size, seq_len, n_steps, K=2, L=2, C=2, seed=0):
    """The original's way to train: each step builds a batch, steps, and scores a fresh small batch with noise on.

    Returns the training losses and the accuracies, one a step.
    """
    torch.manual_seed(seed)
    params = {name: value.requires_grad_() for name, value in draw_params(d, K, rank, L, C).items()}
    optimizer = torch.optim.AdamW(params.values(), lr=lr)
    losses, accuracies = [], []
    for _ in range(n_steps):
        x, y, _ = routing_batch(batch_size, K, seq_len, d)
        loss = F.cross_entropy(forward(params, x, temperature, gumbel_noise(L, batch_size, K))[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        n = min(32, 2 * batch_size)
        x, y, _ = routing_batch(n, K, seq_len, d)
        with torch.no_grad():
            logits = forward(params, x, temperature, gumbel_noise(L, n, K))[0]
        accuracies.append((logits.argmax(1) == y).float().mean().item())
    return losses, accuracies
