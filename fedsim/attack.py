"""The attack of an experiment: capture what clients really send, reconstruct their examples, and measure how well.

The victim is the strategy's own client, run by the engine on a few of its examples, with all that it does to its update
(noise, clipping, a memory of its own). The attacker has what the server has: the broadcast, the update, and the config.
It runs the same client, without noise, on pictures that it changes until the updates agree. What a client keeps to
itself the attacker has to guess: ``knowledge`` says how, and ``labels`` how it comes by the labels. Of a strategy with
several exchanges the first is attacked, and a line says so.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim import block, config, files, privacy, record, registry, tree
from fedsim.attacks import analytic
from fedsim.attacks.images import matched, psnr, ssim
from fedsim.attacks.invert import Found, Plan, flat, invert
from fedsim.block import Guest, Work
from fedsim.config import AttackConfig, Experiment
from fedsim.data.dataset import Dataset, Federation, Indices, Split
from fedsim.data.partition import Lists
from fedsim.errors import ConfigError
from fedsim.memory import Memory
from fedsim.rng import Key
from fedsim.types import Batch, Local, Payload, Strategy, Task, Tree
from fedsim.worker import say_once

log = logging.getLogger("fedsim")

ATTACK, PICTURE = "attack.json", "attack.png"


class Victim(NamedTuple):
    """A client under attack: its examples, what the attacker sees, and what it does not."""

    client: int
    round: int
    x: Tensor
    y: Tensor
    shared: Payload
    sent: Payload
    memory: Payload


class Loot(NamedTuple):
    """What came of an attack on one client: pictures (N, …) in the order of its own, labels, and the figures."""

    client: int
    truth: Tensor
    guess: Tensor
    figures: dict[str, float]


@dataclass(frozen=True)
class First:
    """A partition of which each client keeps its first so many training examples; 0: all."""

    federation: Federation
    examples: int

    def __len__(self) -> int:
        return len(self.federation)

    def __getitem__(self, client: int) -> Indices:
        mine = self.federation.indices(client, "train")
        return mine[: self.examples] if self.examples else mine


@dataclass(frozen=True)
class Attacker:
    """An experiment's attack, built: ``strategy`` is what the victims run, ``guessed`` the same without noise."""

    config: AttackConfig
    settings: Any  # the strategy's config of the attacked visit
    task: Task
    relaxed: Task  # the same; of labels that are probabilities, where these are optimised
    federation: Federation
    strategy: Strategy[Any]
    guessed: Strategy[Any]
    key: Key  # of the victims' and the attacker's draws
    hypernet: Tree | None  # shapes of what a hypernetwork generates, as empty tensors; None without one

    @property
    def device(self) -> torch.device:
        """Where victims and attackers work: where the data set is."""
        return self.federation.dataset.train.x.device

    def __call__(self, state: Any, memory: Memory, round: int) -> list[Loot]:
        """Attack what the victims would send in this round, whose broadcast is that of ``state``. Changes nothing."""
        chosen = self.key.at("victims").numpy().permutation(len(self.federation))[: self.config.victims]
        return [self.loot(self.capture(state, memory, int(c), round)) for c in sorted(chosen)]

    def capture(self, state: Any, memory: Memory, client: int, round: int) -> Victim:
        """What this client sends, of its first few examples."""
        phase = self.strategy.phases[0]
        work = Work(round, 0, phase.local, tree.placed(phase.broadcast(state), self.device), self.key)
        own = block.remembered(work, Guest(client, memory.get(client)))
        done, _ = block.one(work, self.federation, Guest(client, own))
        rows = torch.from_numpy(self.federation.indices(client, "train"))
        train = self.federation.dataset.train
        return Victim(
            client, round, train.x[rows], train.y[rows], work.shared, done.value, tree.placed(own, self.device)
        )

    def loot(self, victim: Victim) -> Loot:
        """Reconstruct, match one to one, and measure."""
        c, key = self.config, self.key.at("attacker", victim.round, victim.client)
        generator, figures = key.torch(), {}
        found = self.inferred(victim)
        if found is not None:
            figures["label_accuracy"] = _overlap(found, victim.y)
        y: Tensor | None = victim.y
        if c.labels == "optimised":
            y = None
        elif c.labels == "inferred":
            guessed = torch.randint(self.task.classes, victim.y.shape, generator=generator)
            y = (found if found is not None else guessed).to(self.device)
        plan = Plan(c.method, c.iterations, c.step, c.tv, c.restarts)
        if c.knowledge == "analytic":
            got = self.by_structure(victim, y, plan, generator)
        else:
            got = self.by_simulation(victim, y, plan, generator, key)
        if y is None and got.others:
            figures["label_accuracy"] = _overlap(got.others[0].argmax(-1), victim.y)
        truth = victim.x.double().cpu()
        guess = matched(got.x.detach().double().cpu(), truth)
        figures |= {"psnr": _mean(psnr(guess, truth)), "ssim": _mean(ssim(guess, truth)), "objective": got.objective}
        mean_image = self.federation.dataset.train.x.double().mean(0).cpu().expand_as(truth)
        for name, image in (("mean_image", mean_image), ("grey", torch.full_like(truth, 0.5))):
            figures |= {f"psnr_{name}": _mean(psnr(image, truth)), f"ssim_{name}": _mean(ssim(image, truth))}
        return Loot(victim.client, truth, guess, figures)

    def by_simulation(
        self, victim: Victim, y: Tensor | None, plan: Plan, generator: torch.Generator, key: Key
    ) -> Found:
        """Run the strategy's own client on a guess. What it remembers is drawn as clients draw it, or known.

        Where ``y`` is None the first of the other unknowns are logits (N, C), and the labels their softmax.
        """
        local, n = self.guessed.phases[0].local, len(victim.y)

        def remembered(generator: torch.Generator) -> Payload:
            if self.config.knowledge == "oracle" or local.remember is None:
                return victim.memory
            return tree.placed(block.first_memory(local.remember, victim.shared, generator), self.device)

        fixed = remembered(key.at("memory").torch())
        places = [(channel, name) for channel, part in fixed.items() for name in part]

        joint = self.config.knowledge == "joint"

        def unknowns(generator: torch.Generator) -> list[Tensor]:
            labels = [] if y is not None else [self.any_labels(n, victim.x, generator)]
            drawn = remembered(generator) if joint else {}
            return labels + [drawn[channel][name] for channel, name in places if joint]

        def update(x: Tensor, others: Sequence[Tensor]) -> Tensor:
            held = Split(x, y if y is not None else others[0].softmax(-1))
            others = others if y is not None else others[1:]
            memory = {channel: dict(part) for channel, part in fixed.items()}
            for (channel, name), t in zip(places, others):
                memory[channel][name] = t
            return centred(simulate(local, victim.shared, memory, held, self.task.classes, key, victim.round))

        def centred(value: Payload) -> Tensor:
            return flat({**value, "delta": self.without_decay(value["delta"], victim)} if "delta" in value else value)

        return invert(update, centred(victim.sent), (n, *victim.x.shape[1:]), plan, generator, unknowns)

    def initial(self, generator: torch.Generator) -> Tree:
        """A model as training begins with one."""
        return tree.moved(self.task.init(generator), self.device)

    def any_labels(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Logits of labels, (n, C), before anything is known of them."""
        return torch.randn(n, self.task.classes, generator=generator).to(like)

    def by_structure(self, victim: Victim, y: Tensor | None, plan: Plan, generator: torch.Generator) -> Found:
        """Read θ and ∂F/∂θ off the update of a hypernetwork, then match that gradient.

        One example and a private last layer: with δ = ∂F/∂(bias of the layer before it), F'(x') = Σ_j δ_j ReLU(z_j(x'))
        has at the victim's x the gradient by θ that F has, whatever the private layer and the label are. Else the last
        layer is optimised along with the pictures, and the labels as in ``by_simulation``.
        """
        got = self.read(victim)
        names = sorted(got.theta)
        seen = torch.cat([got.gradient[n].flatten() for n in names])
        rest = {n: x for n, x in self.initial(generator).items() if n not in got.theta}
        surrogate = len(victim.y) == 1 and bool(rest)
        if surrogate:
            delta = got.gradient[_last_bias(got.gradient)]
            for n, x in rest.items():
                rest[n] = torch.zeros_like(x)
                if x.ndim == 2 and x.shape[1] == len(delta):
                    rest[n][0] = delta

        def update(x: Tensor, others: Sequence[Tensor]) -> Tensor:
            theta = {n: t.detach().requires_grad_() for n, t in got.theta.items()}
            if surrogate:
                value = self.task.predict(theta | rest, x)[:, 0].sum()
            else:
                labels = y if y is not None else others[0].softmax(-1)
                head = dict(zip(rest, others if y is not None else others[1:]))
                value = self.relaxed.loss(theta | head, Batch(x, labels))
            grads = torch.autograd.grad(value, [theta[n] for n in names], create_graph=True)
            return torch.cat([g.flatten() for g in grads])

        def unknowns(generator: torch.Generator) -> list[Tensor]:
            if surrogate:
                return []
            labels = [] if y is not None else [self.any_labels(len(victim.y), victim.x, generator)]
            return labels + [t for n, t in self.initial(generator).items() if n in rest]

        return invert(update, seen, (len(victim.y), *victim.x.shape[1:]), plan, generator, unknowns)

    def read(self, victim: Victim) -> analytic.Generated:
        """θ and ∂F/∂θ of the victim, by the identities of ``fedsim.attacks.analytic``."""
        if self.hypernet is None:
            raise ConfigError(f"attack.knowledge: 'analytic' reads hypernetworks, and {self.settings.name} has none")
        shapes = {n: x.shape for n, x in self.hypernet.items()}
        phi, delta = victim.shared["hyper"], victim.sent["delta"]
        return analytic.generated(self.as_gradient(delta, phi, victim), phi, shapes)

    def inferred(self, victim: Victim) -> Tensor | None:
        """The labels, where the update of the logits' bias travels (by itself, or as its generator's bias)."""
        delta = victim.sent.get("delta", {})
        *_, last = self.task.init(self.key.at("names").torch()).items()
        for name in (last[0], f"head.{last[0]}.bias"):
            if name in delta and last[1].shape == (self.task.classes,) and victim.y.ndim == 1:
                start = victim.shared.get("params", victim.shared.get("hyper", {}))
                begun = {name: start.get(name, torch.zeros_like(delta[name]))}
                g = self.as_gradient({name: delta[name]}, begun, victim)
                return analytic.labels(g[name].detach().clone(), len(victim.y))
        return None

    def without_decay(self, delta: Tree, victim: Victim) -> Tree:
        """The update without the pull of weight decay, which the attacker knows and which says nothing about data."""
        if not getattr(self.settings, "weight_decay", 0.0):
            return delta
        start = {n: x for part in victim.shared.values() for n, x in part.items()}
        known = {n: x for n, x in delta.items() if n in start and start[n].shape == x.shape}
        return delta | self.as_gradient(known, start, victim)

    def as_gradient(self, delta: Tree, start: Tree, victim: Victim) -> Tree:
        s = self.settings
        steps = block.steps_in(s.schedule(), len(victim.y))
        return analytic.gradient_of(delta, start, s.rate(victim.round), steps, s.momentum, s.weight_decay)


def simulate(
    local: Local, shared: Payload, memory: Payload, held: Split, classes: int, key: Key, round: int
) -> Payload:
    """What a client with this memory and these examples sends; differentiable by ``held.x`` and by the memory."""
    guess = Federation(Dataset("guess", held, held, classes), Lists([_all(held.y)]), 0.0, key)
    done, _ = block.one(Work(round, 0, local, shared, key), guess, Guest(0, memory))
    return done.value


def relax(task: Task) -> Task:
    """The task with labels that are probabilities, y (N, C): the loss of an example is −Σ_c y_c log p_c."""

    def loss(params: Tree, batch: Batch) -> Tensor:
        each = -(batch.y * task.predict(params, batch.x).log_softmax(-1)).sum(-1)
        if batch.weight is None:
            return each.mean()
        return (batch.weight * each).sum() / batch.weight.sum().clamp(min=1e-20)

    return task._replace(loss=loss)


def build(experiment: Experiment, federation: Federation, task: Task, noise: float | None = None) -> Attacker:
    """The attack of an experiment on this federation. ``noise`` is the run's σ, where it was found for a target.

    Raises ``ConfigError`` for what cannot be attacked.
    """
    attack = experiment.attack or AttackConfig()
    if attack.labels is None:
        attack = attack.model_copy(update={"labels": "optimised" if attack.method == "dlg" else "known"})
    x = federation.dataset.train.x
    if (
        not x.is_floating_point()
        or x.ndim not in (3, 4)
        or min(x.shape[-2:]) < 7
        or bool((x < 0).any() | (x > 1).any())
    ):
        raise ConfigError("attack: reconstructs pictures of at least 7×7 with values from 0 to 1; the data has none")
    attacked = visiting(experiment, attack)
    plugin = registry.load("strategies", attacked.strategy.name)
    strategy, key = plugin.build(attacked.strategy, task), Key.root(experiment.seed).at("attack")
    if not isinstance(strategy, Strategy):
        raise ConfigError("attack: a strategy of Flower's is not captured here; take one of ours")
    if len(strategy.phases) > 1:
        log.warning(
            "attack: %s has %d exchanges a round; what clients send in the first is attacked, the others are not",
            attacked.strategy.name,
            len(strategy.phases),
        )
    relaxed = relax(task) if attack.labels == "optimised" else task
    guessed = plugin.build(attacked.strategy, relaxed)
    if attacked.privacy:
        if noise is not None:
            found = attacked.privacy.model_copy(update={"noise_multiplier": noise, "target_epsilon": None})
            attacked = attacked.model_copy(update={"privacy": found})
        strategy, _ = privacy.protect(attacked, federation, task, key.at("noise"))
    victims = replace(federation, partition=First(federation, attack.examples), holdout=0.0)
    state = guessed.init(key.at("shapes").torch())
    hyper = guessed.phases[0].broadcast(state).get("hyper", {})
    shapes = {n: torch.empty_like(x) for n, x in task.init(key.torch()).items() if f"head.{n}.bias" in hyper}
    attacker = Attacker(attack, attacked.strategy, task, relaxed, victims, strategy, guessed, key, shapes or None)
    if attack.knowledge == "analytic" and not shapes:
        raise ConfigError(f"attack.knowledge: 'analytic' reads hypernetworks, and {attacked.strategy.name} has none")
    if attacked.privacy and attacked.privacy.mode == "client":
        say_once("attack: under privacy.mode = 'client' the noise is the server's, and it sees updates without it")
    return attacker


def visiting(experiment: Experiment, attack: AttackConfig) -> Experiment:
    """The experiment with the settings of the attacked visit."""
    if not attack.visit:
        return experiment
    plugin = registry.load("strategies", experiment.strategy.name)
    table = experiment.strategy.model_dump(exclude_none=True) | attack.visit
    return experiment.model_copy(update={"strategy": config.check(plugin.Config, table, "attack.visit")})


def figures(loot: Sequence[Loot]) -> dict[str, float]:
    """The mean over victims of each figure, as ``attack_…``; what was not measured on everybody is left out."""
    keys = [key for key in loot[0].figures if all(key in one.figures for one in loot)]
    return {f"attack_{key}": sum(one.figures[key] for one in loot) / len(loot) for key in keys}


def save(folder: Path, loot: Sequence[Loot], round: int, settings: Mapping[str, Any]) -> dict[str, float]:
    """Write ``attack.json`` and ``attack.png``; returns the mean figures."""
    means = figures(loot)
    report = {
        "round": round,
        "attack": dict(settings),
        "figures": means,
        "victims": [{"client": one.client, **one.figures} for one in loot],
    }
    files.write(folder / ATTACK, json.dumps(record.strict(report), indent=1, allow_nan=False).encode() + b"\n")
    files.write(folder / PICTURE, draw(loot))
    return means


def run(experiment: Experiment, out: Path) -> dict[str, float]:
    """``fedsim attack``: attack what clients send in round 1, and write it to a folder, which must be new or empty."""
    from fedsim.run import begin, check_folder
    from fedsim.run import build as build_session

    check_folder(out)
    session = build_session(experiment)
    sigma = session.private.sigma if session.private else None
    attacker = build(experiment, session.federation, session.task, sigma)
    loot = attacker(begin(session), session.memory, 1)
    out.mkdir(parents=True, exist_ok=True)
    return save(out, loot, 1, attacker.config.model_dump(exclude_none=True))


def draw(loot: Sequence[Loot], most: int = 12) -> bytes:
    """Originals above, reconstructions below, as a PNG; at most ``most`` of them."""
    import io

    from matplotlib.figure import Figure

    pairs = [(t, g, one.client) for one in loot for t, g in zip(one.truth, one.guess)][:most]
    figure = Figure(figsize=(1.1 * len(pairs) + 0.2, 2.5), layout="constrained")
    axes = figure.subplots(2, len(pairs), squeeze=False)
    for column, (truth, guess, client) in enumerate(pairs):
        for row, image in enumerate((truth, guess)):
            a = axes[row][column]
            shown = image if image.ndim == 2 else image.movedim(0, -1).squeeze(-1)
            a.imshow(shown.float().numpy(), cmap="gray", vmin=0, vmax=1)
            a.set_axis_off()
        axes[0][column].set_title(f"client {client}", fontsize=7)
        quality = float(psnr(guess[None], truth[None]))
        axes[1][column].set_title(f"{quality:.1f} dB", fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _all(y: Tensor) -> Indices:
    return torch.arange(len(y)).numpy()


def _mean(x: Tensor) -> float:
    return float(x.mean())


def _overlap(found: Tensor, y: Tensor) -> float:
    """Share of the labels that were found, each counted as often as it occurs."""
    found, y = found.cpu(), y.cpu()
    classes = int(max(found.max(), y.max())) + 1
    both = torch.minimum(found.bincount(minlength=classes), y.bincount(minlength=classes))
    return float(both.sum()) / len(y)


def _last_bias(gradient: Tree) -> str:
    return [n for n, g in gradient.items() if g.ndim == 1][-1]
