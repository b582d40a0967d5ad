"""Fed-SB: a small square matrix between frozen factors (Singhal et al. 2025, arXiv:2502.15436).

    h = (W₀ + s B R A) x,        B (d_out, r) and A (r, d_in) frozen, R (r, r) trained from 0
    server       R ← Σ p_k R_k                            exact, and r² numbers a layer travel

The paper takes B and A from the singular vectors of an estimated first step of full fine-tuning, which the clients
would have to send; here they are those of W₀ (as in LoRA-XS, arXiv:2405.17604), which everybody has. So R starts at 0.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from clients.lora import LoraConfig, lora, prepare, seed_of
from fedsim import Mean, Payload, Strategy, Task, Tree, tree
from fedsim.tasks.adapters import Start
from server.reduce import weighted_mean
from strategies.lora import State, family


class Config(LoraConfig):
    name: str = "fed_sb"
    start: Start = "svd"


def build(config: Config, task: Task) -> Strategy[State]:
    of, r = prepare(config, task), config.rank

    @lru_cache(maxsize=1)
    def frozen(seed: int) -> Tree:
        out = dict(of.A(seed, 0))
        with tree.constants():
            for layer in of.layers:
                W0 = of.base(seed)[layer.weight]
                U = torch.linalg.svd(W0.double(), full_matrices=False).U[:, :r]
                out[layer.B] = F.pad(U, (0, r - U.shape[1])).to(W0.dtype)
        return out

    def begin(seed: int) -> Tree:
        return {layer.R: of.base(seed)[layer.weight].new_zeros(r, r) for layer in of.layers} | of.head(seed)

    def fixed(shared: Payload) -> Tree:
        return frozen(seed_of(shared))

    def finish(s: State, mean: Mean) -> State:
        return s._replace(params=tree.add(s.params, mean.value["delta"]))

    return family(
        of,
        lora(of, config, fixed),
        weighted_mean(config.weighting),
        begin=begin,
        finish=finish,
        factors=lambda s: frozen(s.seed) | s.params,
    )
