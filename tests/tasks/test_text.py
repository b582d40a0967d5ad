"""Transformers from a folder: small ones with random weights, saved here, so that nothing has to be fetched."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from worlds import KEY, grid, same

from clients import dp_sgd
from fedsim import block
from fedsim.block import Guest, Work
from fedsim.data import fetch
from fedsim.data.dataset import Dataset, Federation, Split
from fedsim.errors import ConfigError
from fedsim.rng import Key
from fedsim.tasks import adapters, text
from fedsim.tasks.module import seeded
from fedsim.types import Batch, Task, Tree
from server.loop import run_round
from strategies import fedavg, fedex_lora, fedit, ffa_lora

peft = pytest.importorskip("peft")
hf = text.transformers()
VOCABULARY, T = 50, 12
STEPS: dict[str, Any] = {"lr": 0.5, "batch_size": 3, "steps": 2, "rank": 2, "alpha": 4.0, "cohort": 3}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20, pad_token_id=0,
    )  # fmt: skip
    with seeded(Key.root(1).torch()):
        hf.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=20,
    )  # fmt: skip
    with seeded(Key.root(1).torch()):
        hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2")
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=20)
    with seeded(Key.root(1).torch()):
        hf.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    yield
    adapters._FOLDS.clear()
    text._read.cache_clear()


def texts(generate: bool = False, n: int = 18, high: int = VOCABULARY) -> Federation:
    """Three clients with texts of different lengths, padded with 0."""
    rng = Key.root(4).at("texts").numpy()
    x = rng.integers(1, high, size=(n, T))
    if not generate:
        x[np.arange(T) >= rng.integers(3, T + 1, size=(n, 1))] = 0
    x_ = torch.from_numpy(x)
    y = torch.roll(x_, -1, 1) if generate else torch.arange(n) % 3
    split = Split(x_, y)
    dataset = Dataset("texts", split, split, VOCABULARY if generate else 3)
    return Federation(dataset, np.split(np.arange(n), [9, 14]), 0.0, KEY)


def task(path: Path, federation: Federation, **config: Any) -> Task:
    return text.build(text.Config(path=str(path), **config), federation.dataset, len(federation))


def values(strategy: Any, state: Any, world: Federation, batched: bool) -> list[Tree]:
    work = Work(1, 0, strategy.phases[0].local, strategy.phases[0].broadcast(state), KEY)
    guests = [Guest(c, None) for c in range(len(world))]
    done = block.batched(work, world, guests) if batched else [block.one(work, world, g) for g in guests]
    return [d.value["delta"] for d, _ in done]


def test_a_classifier_begins_pretrained_with_a_head_of_its_own(bert: Path) -> None:
    world = texts()
    t = task(bert, world)
    assert t.unbatchable is None and t.classes == 3
    a, b = (t.init(Key.root(seed).torch()) for seed in (1, 2))
    weights = load_file(bert / "model.safetensors")
    assert same({f"encoder.{n}": x for n, x in weights.items() if "pooler" not in n}, {
        n: x for n, x in a.items() if n.startswith("encoder.")
    })  # fmt: skip
    assert torch.equal(a["encoder.embeddings.word_embeddings.weight"], b["encoder.embeddings.word_embeddings.weight"])
    assert not torch.equal(a["head.weight"], b["head.weight"])
    only = task(bert, world, trainable="head")
    assert set(only.init(Key.root(1).torch())) == {"head.weight", "head.bias"}


def words(path: Path) -> None:
    """A tokenizer for that model: the word "t7" is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    own = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t1"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.save(str(path / "tokenizer.json"))


def test_a_head_begins_as_the_texts_of_the_labels(bert: Path) -> None:
    """A text that is a label's own is told with sharpness times its cosine, at the mean length: by hand here."""
    words(bert)
    world = texts()
    t = task(bert, world, labels=["t5 t6", "t7", "t8 t9 t10"], sharpness=10.0)
    params = t.init(Key.root(1).torch())
    assert same(params, t.init(Key.root(2).torch()))  # nothing in it is drawn
    x = torch.zeros(3, T, dtype=torch.int64)
    x[0, :2], x[1, 0], x[2, :3] = torch.tensor([5, 6]), 7, torch.tensor([8, 9, 10])
    model = hf.AutoModel.from_pretrained(bert).eval()
    with torch.no_grad():
        states = model(input_ids=x, attention_mask=(x != 0).long()).last_hidden_state
    e = torch.stack([states[0, :2].mean(0), states[1, 0], states[2, :3].mean(0)])
    cosine = torch.nn.functional.cosine_similarity(e[:, None], e[None], dim=-1)
    expected = 10.0 * cosine * e.norm(dim=1, keepdim=True) / e.norm(dim=1).mean()
    torch.testing.assert_close(t.predict(params, x), expected, rtol=1e-5, atol=1e-5)
    assert t.predict(params, x).argmax(1).tolist() == [0, 1, 2]


def test_labels_that_do_not_fit(bert: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.labels: texts needs 3 texts, one for each label \(got 2\)"):
        task(bert, texts(), labels=["t1", "t2"])
    with pytest.raises(ConfigError, match=r"task\.labels: texts needs no texts for a language model"):
        task(llama, texts(generate=True), labels=["t1"])
    (bert / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"task.labels: .*has no tokenizer.json"):
        task(bert, texts(), labels=["t1", "t2", "t3"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_says_nothing(bert: Path, pooling: str, attention: str) -> None:
    world = texts()
    t = task(bert, world, pooling=pooling, attention=attention)
    params = t.init(Key.root(1).torch())
    x = world.dataset.train.x[:1].clone()
    x[0, 5:] = 0
    torch.testing.assert_close(t.predict(params, x), t.predict(params, x[:, :5]), rtol=1e-5, atol=1e-6)
    other = x.clone()
    other[0, 4] = other[0, 4] % (VOCABULARY - 1) + 1
    assert not torch.allclose(t.predict(params, x), t.predict(params, other), atol=1e-4)


def test_equal_to_the_encoder_called_plainly(bert: Path) -> None:
    world = texts()
    t = task(bert, world)
    params, x = t.init(Key.root(1).torch()), world.dataset.train.x
    model = hf.AutoModel.from_pretrained(bert).eval()
    mask = x != 0
    with torch.no_grad():
        states = model(input_ids=x, attention_mask=mask.long()).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = mean @ params["head.weight"].T + params["head.bias"]
    torch.testing.assert_close(t.predict(params, x), expected, rtol=1e-5, atol=1e-5)


def of_peft(path: Path, a: Tree, head: Tree, x: Tensor, y: Tensor) -> tuple[Tensor, Tree]:
    """Logits and gradients by B, A of PEFT's own LoRA with these factors: B random, α = 4, r = 2."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], lora_dropout=0.0)
    model = peft.get_peft_model(hf.AutoModel.from_pretrained(path), config).eval()
    places = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            ours = name.replace("base_model.model.", "encoder.").replace(".default.weight", "")
            p.data.copy_(a[ours])
            places[ours] = p
    mask = x != 0
    states = model(input_ids=x, attention_mask=mask.long()).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    logits = mean @ head["head.weight"].T + head["head.bias"]
    grads = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), list(places.values()))
    return logits.detach(), dict(zip(places, grads, strict=True))


def test_adapters_are_pefts(bert: Path) -> None:
    """Names, logits and gradients are those of PEFT on the same model."""
    from clients.lora import LoraConfig, prepare

    world = texts()
    of = prepare(LoraConfig(name="x", rank=2, alpha=4.0), task(bert, world))
    assert [layer.name.rpartition(".")[2] for layer in of.layers] == ["query", "value"] * 2
    start = of.A(1, 0) | {n: torch.randn(x.shape, generator=Key.root(2).at(n).torch()) for n, x in of.B(1).items()}
    x, y = world.dataset.train.x, world.dataset.train.y
    mine = of.of(1, {}, start, {})
    leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
    mine.loss(leaves, Batch(x, y)).backward()
    logits, grads = of_peft(bert, start, of.base(1), x, y)
    assert set(grads) == set(start)
    torch.testing.assert_close(mine.predict(start, x), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close({n: leaves[n].grad for n in grads}, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", [ffa_lora, fedex_lora])
def test_the_result_opens_in_peft(bert: Path, tmp_path: Path, module: Any) -> None:
    """Of FedEx too, whose base weights have changed: their change is in the adapter."""
    world = texts()
    t = task(bert, world)
    strategy = module.build(module.Config(**STEPS), t)
    state = strategy.init(KEY.torch())
    for r in (1, 2):
        state, _ = run_round(strategy, state, r, [0, 1, 2], grid(world), KEY)
    for name, content in strategy.export(state).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder = tmp_path / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bert)
    model = peft.PeftModel.from_pretrained(hf.AutoModel.from_pretrained(bert), folder).eval()
    head, x = load_file(folder / "head.safetensors"), world.dataset.train.x
    with torch.no_grad():
        states = model(input_ids=x, attention_mask=(x != 0).long()).last_hidden_state
    logits = text.pooled(states, x != 0, "mean") @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(t.predict(strategy.params(state), x), logits, rtol=1e-4, atol=1e-5)
    begin = t.predict(strategy.params(strategy.init(KEY.torch())), x)
    assert not torch.allclose(begin, logits, atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", ["frozen", "train"])
def test_a_block_is_its_clients(bert: Path, head: str, attention: str) -> None:
    world = texts()
    t = task(bert, world, attention=attention)
    strategy = ffa_lora.build(ffa_lora.Config(**STEPS, head=head), t)
    state = strategy.init(KEY.torch())
    plain, folded = values(strategy, state, world, False), values(strategy, state, world, True)
    assert [fine for _, fine in adapters._FOLDS.values()] == [True]
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-6)
    assert max(float(x.abs().max()) for x in plain[0].values()) > 1e-4


def test_private_gradients_of_examples(bert: Path) -> None:
    """Clipped one by one with a loop, and by the folded formulation."""
    from clients.lora import LoraConfig, prepare

    world, clip = texts(), 0.05
    t = task(bert, world)
    of = prepare(LoraConfig(name="x", rank=2), dp_sgd.private(t, 1.0, clip, 6, "auto"))
    start, x, y = of.B(1), world.dataset.train.x[:6], world.dataset.train.y[:6]
    private = of.of(1, of.A(1, 0), start, {}).private
    assert private
    got = private.gradient(start, Batch(x, y), {n: torch.zeros_like(p) for n, p in start.items()}, torch.tensor(6))
    bare = prepare(LoraConfig(name="x", rank=2), t).of(1, of.A(1, 0), start, {})
    total = {n: torch.zeros_like(p) for n, p in start.items()}
    for j in range(6):
        leaves = {n: p.clone().requires_grad_() for n, p in start.items()}
        grads = torch.autograd.grad(bare.loss(leaves, Batch(x[j : j + 1], y[j : j + 1])), list(leaves.values()))
        size = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for n, g in zip(total, grads, strict=True):
            total[n] += g * min(1.0, clip / float(size)) / 6
    torch.testing.assert_close(got, total, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_private_gradients_are_opacuss(bert: Path) -> None:
    """Clipped over all B jointly, by Opacus's hooks and optimizer on PEFT's model with A and the head frozen."""
    opacus = pytest.importorskip("opacus")
    from opacus.optimizers import DPOptimizer

    from clients.lora import LoraConfig, prepare

    world, clip = texts(), 0.05
    of = prepare(LoraConfig(name="x", rank=2, alpha=4.0), dp_sgd.private(task(bert, world), 1.0, clip, 6, "auto"))
    x, y, fixed = world.dataset.train.x[:6], world.dataset.train.y[:6], of.A(1, 0)
    start = {n: 0.1 * torch.randn(p.shape, generator=Key.root(2).at(n).torch()) for n, p in of.B(1).items()}
    private = of.of(1, fixed, start, {}).private
    assert private
    still = {n: torch.zeros_like(p) for n, p in start.items()}
    got = private.gradient(start, Batch(x, y), still, torch.tensor(6))

    base = of.base(1)
    encoder = hf.AutoModel.from_pretrained(bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    own = text.Classifier(encoder, 3, text.Config(path=str(bert)), 0, "")
    own.head.weight.data, own.head.bias.data = base["head.weight"], base["head.bias"]
    model = peft.get_peft_model(own, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"]))
    places = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            ours = name.replace("base_model.model.", "").replace(".default.weight", "")
            p.data.copy_((fixed | start)[ours])
            p.requires_grad_(ours in start)
            places[ours] = p
    hooked = opacus.GradSampleModule(model, loss_reduction="sum").train()
    optimizer = DPOptimizer(
        torch.optim.SGD([places[n] for n in start], lr=1.0), noise_multiplier=0.0, max_grad_norm=clip,
        expected_batch_size=6, loss_reduction="sum",
    )  # fmt: skip
    torch.nn.functional.cross_entropy(hooked(x), y, reduction="sum").backward()
    optimizer.clip_and_accumulate()
    torch.testing.assert_close(got, {n: places[n].summed_grad / 6 for n in start}, rtol=1e-3, atol=1e-6)
    assert max(float(g.abs().max()) for g in got.values()) > 1e-4


@pytest.mark.parametrize(
    ("kind", "rows", "lr"), [("llama", 16 + 8, 2.0), ("gpt2", 3 * 16, 20.0)]
)  # q_proj and v_proj; c_attn, which is query, key and value in one
def test_a_decoder_learns_to_continue(request: pytest.FixtureRequest, kind: str, rows: int, lr: float) -> None:
    world = texts(generate=True)
    t = task(request.getfixturevalue(kind), world)
    strategy = ffa_lora.build(ffa_lora.Config(**STEPS | {"lr": lr, "steps": 5, "batch_size": 9}), t)
    state = strategy.init(KEY.torch())
    data = Batch(world.dataset.train.x, world.dataset.train.y)
    before = float(t.loss(strategy.params(state), data))
    for r in range(1, 4):
        state, trained = run_round(strategy, state, r, [0, 1, 2], grid(world), KEY)
    assert float(t.loss(strategy.params(state), data)) < before - 0.005
    assert trained.bytes_up == 3 * 4 * 2 * 2 * rows  # 3 clients, r = 2, two layers


def test_a_gpt2_is_itself_with_linear_layers(gpt2: Path, tmp_path: Path) -> None:
    """The logits of transformers' own, and after training those of PEFT on it."""
    world = texts(generate=True)
    t, x = task(gpt2, world), world.dataset.train.x
    strategy = ffa_lora.build(ffa_lora.Config(**STEPS | {"lr": 2.0}), t)
    state = strategy.init(KEY.torch())
    model = hf.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    with torch.no_grad():
        before = model(input_ids=x).logits
    torch.testing.assert_close(t.predict(strategy.params(state), x), before, rtol=1e-4, atol=1e-5)
    state, _ = run_round(strategy, state, 1, [0, 1, 2], grid(world), KEY)
    (tmp_path / "adapter").mkdir()
    for name, content in strategy.export(state).items():
        (tmp_path / name).write_bytes(content)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = adapted(input_ids=x).logits
    torch.testing.assert_close(t.predict(strategy.params(state), x), logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, before, atol=1e-3)


@pytest.mark.parametrize("private", [False, True])
def test_products_in_bfloat16(bert: Path, private: bool) -> None:
    """The update of float32 to bfloat16's digits, in a block and alone, and not the same; sent as float32."""
    world = texts()
    moved = []
    for precision in ("float32", "bfloat16"):
        t = task(bert, world, precision=precision)
        if private:
            t = dp_sgd.private(t, 1e-9, 0.05, 3, "auto")
        strategy = ffa_lora.build(ffa_lora.Config(**STEPS), t)
        state = strategy.init(KEY.torch())
        moved += [values(strategy, state, world, batched)[0] for batched in (False, True)]
    exact, _, alone, block_ = moved
    assert {x.dtype for x in alone.values()} == {torch.float32}
    assert [fine for _, fine in adapters._FOLDS.values()] == [True, True]
    for got in (alone, block_):
        for name, x in exact.items():
            assert 0 < (got[name] - x).norm() < 0.1 * x.norm()


@pytest.mark.skipif(not fetch.available()["minilm"], reason="fedsim data get minilm")
def test_a_block_is_its_clients_on_minilm() -> None:
    """All 6 layers of 384, 22.7 million parameters: what 3 clients send, to 1e-5 of what they send one by one."""
    world = texts(high=30_000)
    t = task(Path("minilm"), world)
    for module in (ffa_lora, fedex_lora):
        strategy = module.build(module.Config(**STEPS | {"rank": 8}), t)
        state = strategy.init(KEY.torch())
        plain, folded = values(strategy, state, world, False), values(strategy, state, world, True)
        for one, other in zip(plain, folded, strict=True):
            assert max(float(x.abs().max()) for x in one.values()) > 1e-3
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    assert [fine for _, fine in adapters._FOLDS.values()] == [True]


def test_all_of_it_can_be_trained(bert: Path) -> None:
    world = texts()
    t = task(bert, world)
    strategy = fedavg.build(fedavg.Config(lr=0.1, batch_size=9), t)
    state = strategy.init(KEY.torch())
    after, _ = run_round(strategy, state, 1, [0, 1, 2], grid(world), KEY)
    assert not torch.equal(state.w["encoder.encoder.layer.0.output.dense.weight"], after.w[
        "encoder.encoder.layer.0.output.dense.weight"
    ])  # fmt: skip


def test_what_does_not_fit_is_said(bert: Path, tmp_path: Path) -> None:
    world = texts()
    with pytest.raises(ConfigError, match="is no model folder"):
        task(tmp_path / "nowhere", world)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be opened"):
        task(tmp_path, world)
    with pytest.raises(ConfigError, match="knows 50 tokens, and texts has token 69"):
        task(bert, texts(high=70))
    labels = world.dataset.train.y
    long, numbers = Split(world.dataset.train.x.repeat(1, 2), labels), Split(torch.zeros(18, 4), labels)
    config = text.Config(path=str(bert))
    with pytest.raises(ConfigError, match=r"data\.length: this model reads at most 20"):
        text.build(config, Dataset("texts", long, long, 3), 3)
    with pytest.raises(ConfigError, match="needs tokens"):
        text.build(config, Dataset("numbers", numbers, numbers, 3), 3)


@pytest.mark.skipif(not fetch.available()["minilm"], reason="fedsim data get minilm")
@pytest.mark.parametrize(("module", "size"), [(ffa_lora, 147_456), (fedit, 294_912)])
def test_bytes_on_minilm(module: Any, size: int) -> None:
    """Rank 8 on query and value of six layers of 384: 36,864 numbers of B, and as many of A."""
    world = texts(n=16, high=30_000)
    strategy = module.build(module.Config(**STEPS | {"rank": 8, "steps": 1}), task(Path("minilm"), world))
    _, trained = run_round(strategy, strategy.init(KEY.torch()), 1, [0, 1], grid(world), KEY)
    assert trained.bytes_up == 2 * size and trained.bytes_down == 2 * (size + 8)


def test_a_model_is_read_once(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a client, not for a round, not for another task on it."""
    read = []
    real = hf.AutoModel.from_pretrained
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", lambda *args, **kw: read.append(args) or real(*args, **kw))
    world = texts()
    for _ in range(2):
        strategy = ffa_lora.build(ffa_lora.Config(**STEPS), task(bert, world))
        state = strategy.init(KEY.torch())
        for r in (1, 2):
            state, _ = run_round(strategy, state, r, [0, 1, 2], grid(world), KEY)
    assert len(read) == 1
