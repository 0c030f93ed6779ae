"""What sae.py promises, one test a promise; each one's name says it. `pytest`: offline."""
import json
import os
import re
from copy import deepcopy
from itertools import count, islice
from pathlib import Path
os.environ["HF_HUB_OFFLINE"] = "1"
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from torch.distributed.run import main as torchrun
from torch.optim.optimizer import register_optimizer_step_pre_hook
import sae as S

HERE = Path(S.__file__).parent
HOOK = "blocks.0.mlp.hook_post"
TEXT = str(Path(json.__file__).with_name("*.py"))  # some 150 rows of Python

MODEL = S.load_model("tiny-1l")
ROWS = S.split_rows(TEXT, MODEL.tokenizer, 64, 6)[0]  # [6, 64]
PLAIN = transformers.AutoModelForCausalLM.from_pretrained(HERE / "assets/tiny-1l").float()
TRUTH = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
TEXTS = [f"the cat number {i} sat on\nthe <|endoftext|> mat\n" for i in range(12)]

@torch.no_grad()
def plain(replace, rows=ROWS, module=PLAIN.gpt_neox.layers[0].mlp.act):
    """The output of tiny-1l without TransformerLens, with replace(x) there (HOOK), but for BOS"""
    with module.register_forward_hook(
            lambda module, args, x: torch.cat([x[:, :1], replace(x[:, 1:])], dim=1)):
        return PLAIN(rows, labels=rows)

@pytest.fixture
def main(monkeypatch, tmp_path):
    monkeypatch.setattr(S, "load_model", lambda name, device="cpu": MODEL)
    monkeypatch.chdir(tmp_path)
    def main(flags="", out="run"):
        S.main(["--dataset", TEXT, "--device", "cpu", "--d-sae", "256", "--batch-size", "64",
                "--held-out", "4", "--steps", "25", *flags.split()])
        return json.loads(Path(out, "metrics.json").read_text())
    return main

def make_sae(threshold=0.0, d_in=16, d_sae=48):
    torch.manual_seed(0)
    sae = S.SparseAutoencoder(d_in, d_sae)
    sae.b_enc.data.normal_(std=0.1)
    sae.b_dec.data.normal_(std=0.1)
    sae.threshold += threshold * torch.rand(d_sae)
    return sae

def next_batch():
    f = torch.rand(256, 64)
    return f * (f > 0.97) @ TRUTH  # [256, 32]: sums of few of the 64 directions

def norms_are_1(sae):
    return (sae.W_dec.norm(dim=-1) - 1).abs().max().item() < 1e-6

# ---- The autoencoder, and its unit norms ---------------------------------------------
def test_shapes_follow_x_and_a_new_sae_starts_with_x_hat_about_as_large_as_x():
    for leading in ((), (5,), (2, 3)):
        x_hat, f = make_sae()(torch.randn(*leading, 16))
        assert x_hat.shape == (*leading, 16) and f.shape == (*leading, 48)
    for times in (2, 8, 32):
        x = torch.randn(200, 64)
        x_hat = S.SparseAutoencoder(64, times * 64)(x)[0]
        assert 0.9 < (x_hat * x).sum() / x.pow(2).sum() < 1.1

@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_loss_and_all_four_gradients_are_those_of_the_plain_formula(threshold):
    sae, x = make_sae(threshold), torch.randn(10, 16)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = pre * (pre > sae.threshold)
    x_hat = f @ sae.W_dec + sae.b_dec
    right = (x_hat - x).pow(2).sum(-1).mean() + 0.3 * f.sum(-1).mean()  # means over the batch
    loss, *found = sae.loss(x, 0.3)
    torch.testing.assert_close([loss, *found], [right, x_hat, f])
    gradients, plain = (torch.autograd.grad(of, [*sae.parameters()]) for of in (loss, right))
    torch.testing.assert_close(gradients, plain)

def test_rows_keep_length_1_if_each_step_ends_with_normalize_and_else_not():
    for order, holds in (("project step normalize", True), ("project step", False),  # as published
                         ("normalize project step", False)):  # as it was mended at first
        sae, x = make_sae(), torch.randn(256, 16)
        adam = torch.optim.Adam(sae.parameters(), lr=0.01)
        act = {"project": sae.project_gradient, "step": adam.step, "normalize": sae.normalize}
        for _ in range(20):
            adam.zero_grad()
            sae.loss(x, 0.1)[0].backward()
            for name in order.split():
                act[name]()
        assert norms_are_1(sae) == holds

def test_move_threshold_comes_to_where_k_features_pass_and_moves_nothing_else():
    sae, before, x = make_sae(), make_sae(), torch.randn(4000, 16)
    for part in 2 * x.split(128):
        sae.move_threshold(part, 5)
    assert abs((sae.encode(x) > 0).sum() / len(x) - 5) < 0.2
    for _ in range(100):
        sae.move_threshold(x[:128], 48)  # more than are positive: f is never negative, all the same
    assert (sae.encode(x) >= 0).all()
    assert all(map(torch.equal, sae.parameters(), before.parameters()))

@pytest.mark.parametrize("threshold", [None, 0.5, -0.5])  # None: the replication's files have none
def test_any_rows_load_as_length_1_with_the_same_x_hat(threshold, tmp_path):
    sae, x, file = make_sae(), torch.randn(50, 16), tmp_path / "a.pt"
    sae.W_dec.data *= torch.rand(48, 1) + 0.5
    sae.threshold += max(threshold or 0, 0)  # below 0, in a JumpReLU from elsewhere: f stops at 0
    weights = sae.state_dict() | {"threshold": torch.full((48,), threshold or 0.0)}
    if threshold is None:
        del weights["threshold"]
    torch.save(weights, file)
    loaded = S.SparseAutoencoder.load(file)
    assert norms_are_1(loaded)
    torch.testing.assert_close(loaded(x)[0], sae(x)[0])
    torch.save({"W_enc": weights["W_enc"]}, file)
    with pytest.raises(RuntimeError, match="W_dec"):  # and not a random decoder
        S.SparseAutoencoder.load(file)

# ---- Training ------------------------------------------------------------------------
@pytest.mark.parametrize("sparsity", [{"l1": 0.2}, {"k": 2}])
def test_the_tiny_overfit_finds_the_directions_that_made_the_data(sparsity):
    torch.manual_seed(0)
    sae = S.SparseAutoencoder(32, 128)
    S.train(sae, next_batch, 1000, **sparsity)
    assert (TRUTH @ sae.W_dec.T).max(dim=1).values.mean() > 0.99  # cosines
    x = next_batch()
    x_hat, f = sae(x)
    assert (x_hat - x).pow(2).sum() < 0.1 * (x - x.mean(0)).pow(2).sum()
    assert (f > 0).sum() / len(x) < 4

def train_and_watch(name, get_x=next_batch, **flags):
    """100 steps -> l1 as sae.loss gets it, or k as sae.move_threshold does, and the three rates"""
    sae, weights, rates = make_sae(d_in=32), [], []
    real = getattr(sae, name)
    setattr(sae, name, lambda x, weight: weights.append(weight) or real(x, weight))
    def before_step(adam, args, kwargs):
        assert norms_are_1(sae), "normalized after the step before"
        assert F.cosine_similarity(sae.W_dec.grad, sae.W_dec).abs().max() < 1e-4, "projected"
        rates.append([group["lr"] for group in adam.param_groups])
    with register_optimizer_step_pre_hook(before_step):
        S.train(sae, get_x, 100, lr=0.01, **flags)
    return weights, *zip(*rates)

def test_each_step_has_its_rates_its_l1_or_k_and_ends_with_norms_of_1():
    k, W_enc, W_dec, biases = train_and_watch("move_threshold", k=2)
    assert 15 < k[0] < 16 and k == sorted(k, reverse=True) and k[40] > k[49] == k[-1] == 2
    assert W_dec[0] < 0.003 < W_dec[4] == W_dec[66] == 0.01 > W_dec[70] > W_dec[90] > W_dec[99] > 0
    assert W_enc == pytest.approx([0.7 * rate for rate in W_dec])
    assert train_and_watch("loss", k=2)[0] == 100 * [0.0], "with k, no L1"
    l1, W_enc, W_dec, biases = train_and_watch("loss")
    assert 0 < l1[0] < 0.1 * l1[-1] and l1 == sorted(l1) and l1[40] < l1[49] == l1[-1]
    assert W_enc == W_dec > biases
    l1_8, _, W_dec_8, biases_8 = train_and_watch("loss", lambda: 8 * next_batch())
    assert l1_8 == pytest.approx([8 * w for w in l1], rel=0.1) and W_dec_8 == W_dec
    assert biases_8 == pytest.approx([8 * rate for rate in biases], rel=0.1)
    x = next_batch()
    x[:3] *= 30  # a few huge x: the mean distance from the mean is now 1.3 times as large
    assert train_and_watch("loss", lambda: x)[0] == pytest.approx(l1, rel=0.1)

def test_b_dec_starts_at_the_mean_of_x_unless_the_sae_was_loaded_and_a_single_step_trains():
    x = 5 + torch.randn(256, 16, requires_grad=True)  # (as from a model that was not frozen)
    new, loaded = S.SparseAutoencoder(16, 48), make_sae()
    loaded.b_dec.data[:] = 0.0
    for sae, start in ((new, x.mean(0)), (loaded, torch.zeros(16))):
        with torch.no_grad():  # as in a notebook
            S.train(sae, lambda: x, 1)
        torch.testing.assert_close(sae.b_dec, start, atol=0.1, rtol=0.0)
    assert (loaded.W_enc - make_sae().W_enc).abs().max() > 1e-3

def test_resample_draws_by_the_square_of_the_loss_and_changes_the_dead_alone():
    sae, dead = make_sae(threshold=2.0), torch.arange(48) < 40
    adam = torch.optim.Adam(sae.parameters())
    sae.loss(torch.randn(100, 16))[0].backward()
    adam.step()
    states = [adam.state[weight] for weight in (sae.W_dec, sae.W_enc, sae.b_enc)]
    squares = [state["exp_avg_sq"].clone() for state in states]
    sae.b_enc.data[:], sae.b_dec.data[:] = -1e9, 0.0  # so bad that the error is x itself
    before, x = deepcopy(sae).requires_grad_(False), F.normalize(torch.randn(1060, 16), dim=-1)
    x[1000:] *= 4  # their loss is 16 times as large, its square 256 times
    x[1050:] = x[1049] * torch.tensor([1, -1]).repeat(5)[:, None]  # eleven: the same, or opposite
    S.resample(sae, adam, dead, x)
    kept = (sae.W_dec == before.W_dec).all(dim=1)  # [48]
    cosine, drawn = (sae.W_dec[~kept] @ F.normalize(x, dim=-1).T).max(dim=1)
    assert cosine.min() > 0.999 and drawn.unique().numel() == len(drawn) > 20, "none twice"
    assert (drawn >= 1000).float().mean() > 0.75, "by the loss itself, it would be half of them"
    alike = (sae.W_dec[~kept] @ sae.W_dec[~kept].T).tril(-1)
    assert alike.max() < 0.7 and alike.min() < -0.999, "and none alike, but opposites are not"
    fifth, reach = 0.2 * before.W_enc.norm(dim=0).mean(), x[drawn].norm(dim=-1)
    before.W_enc[:, ~kept] = fifth * sae.W_dec[~kept].T
    before.b_enc[~kept] = sae.threshold[~kept] - fifth * reach / 4
    torch.testing.assert_close([*sae.parameters()][1:], [*before.parameters()][1:])
    for state, square, new in zip(states, squares, (~kept, (..., ~kept), ~kept)):
        assert state["exp_avg"].any() and not state["exp_avg"][new].any()
        assert 0 < state["exp_avg_sq"][new].min() and state["exp_avg_sq"][new].max() < square.mean()
        square[new] = state["exp_avg_sq"][new]
        assert kept[40:].all() and torch.equal(state["exp_avg_sq"], square), "others are as before"

def test_dead_features_come_back_but_not_near_the_end_nor_in_an_sae_that_was_loaded(monkeypatch):
    revived, looks, resample = [], [], S.resample
    monkeypatch.setattr(S, "resample", lambda *a: revived.append(sum(a[2])) or resample(*a))
    new, loaded = S.SparseAutoencoder(32, 48), make_sae(d_in=32)
    new.W_enc.data[:, :20], loaded.b_enc.data[:20] = 0.0, -100.0
    for sae in (new, loaded):
        S.train(sae, lambda: next_batch()[:8], 400, k=4,  # this one dies again and again:
                save=lambda: looks.append(new.b_enc.data[30].fill_(-100.0)))
    assert 0.4 <= len(revived) / len(looks) < 0.43, "in 85 % of the first run, not in the second"
    assert max(revived[1:]) < 10 < 20 <= revived[0], "those that were not in any of its batches"
    assert (new.encode(next_batch()) > 0).any(dim=0)[:20].sum() > 15

def test_what_is_not_finite_stops_the_run_before_it_is_saved_and_so_does_l1_with_a_threshold():
    saved, served = [], count()
    with pytest.raises(AssertionError, match="step 80"):
        S.train(S.SparseAutoencoder(32, 48), lambda: next_batch() / (next(served) != 75), 200,
                save=lambda: saved.append(1))
    assert len(saved) == 7
    for threshold, bad in ((0.0, {"lr": 1e38}), (0.0, {"l1": float("nan")}), (0.1, {"l1": 0.1})):
        with pytest.raises(AssertionError, match="fvu is|give k"):
            S.train(make_sae(threshold, d_in=32), next_batch, 1, **bad)

# ---- Data ----------------------------------------------------------------------------
def texts_of(data, tokenizer):
    tokens = torch.tensor(list(S.all_tokens(data, tokenizer)))
    ends = (tokens == tokenizer.eos_token_id).nonzero().flatten() + 1
    assert ends[-1] == len(tokens), "EOS is the last"
    return [tokenizer.decode(text[:-1]) for text in tokens.tensor_split(ends)[:-1]]

def test_rows_are_the_tokens_of_all_texts_shuffled_with_eos_after_each_and_bos_in_front():
    rows = list(S.token_rows(TEXT, MODEL.tokenizer, 50))
    assert {len(row) for row in rows} == {50} and {row[0] for row in rows} == {0}
    tokens = list(S.all_tokens(TEXT, MODEL.tokenizer))
    assert [t for row in rows for t in row[1:]] == tokens[:len(tokens) // 49 * 49]
    texts = [file.read_text() for file in sorted(Path(TEXT).parent.glob("*.py"))]
    found = texts_of(TEXT, MODEL.tokenizer)
    assert sorted(found) == sorted(texts) and found != texts

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    table = Dataset.from_dict({"text": TEXTS, "id": [7] * 12})
    for name in ("a.jsonl", "B.NDJSON", "[c].jsonl"):  # (load_dataset would read [c] as c)
        table.to_json(tmp_path / name)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    files = {f"{i:02}.txt": text for i, text in enumerate(TEXTS)}
    files |= {"c.jsonl": '{"text": "not this one"}', "words.csv": "title,body\na,b\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.bom").write_text(text, encoding="utf-8-sig")
    (tmp_path / "latin.md").write_bytes("café".encode("latin-1"))
    (tmp_path / "folder.txt").mkdir()

@pytest.mark.parametrize("name", ["*.txt", "*.txt.bom", "a.jsonl", "a.csv", "a.parquet", "B.NDJSON",
                                  "[[]c].jsonl", "**/*.txt"])
def test_the_same_texts_are_read_from_whatever_files_they_are_in(name, home):
    assert sorted(texts_of(f"~/{name}", MODEL.tokenizer)) == sorted(TEXTS)

@pytest.mark.parametrize("name, error", [
    ("a.*", "JSON"), ("words.csv", "tokens"), ("latin.md", "utf-8"), ("nothing*.txt", "Empty"),
    ("nothing.txt", "nothing.txt"), ("", "Empty"), ("00.txt", "fewer than 33 rows")])
def test_what_cannot_be_read_is_an_error_and_no_endless_loop(name, error, home):
    with pytest.raises(Exception, match=error):
        next(S.split_rows(f"~/{name}", MODEL.tokenizer, 8)[1])

@pytest.mark.parametrize("bos, eos, pad, made, right", [
    (1, 2, 3, [1, 7, 7, 2, 8, 3, 3], [7, 7, 2, 8]),        # BOS in front goes, and padding
    (1, 2, 3, [3, 3, 1, 7, 1, 8, 2], [7, 1, 8, 2]),        # padded in front; a BOS that separates
    (1, 2, 2, [1, 7, 2, 8, 8, 2, 2, 2], [7, 2, 8, 8, 2]),  # PAD is EOS: one EOS remains
    (2, 2, 2, [2, 7, 2, 8, 2, 2], [7, 2, 8, 2]),           # and so is BOS (GPT-2, NeoX)
    (2, 2, None, [7, 0, 0, 8], [7, 0, 0, 8]), (1, 2, 3, None, [])])
def test_ready_made_tokens_lose_padding_and_bos_in_front(bos, eos, pad, made, right, monkeypatch):
    tokenizer = type("", (), {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})
    data = Dataset.from_dict({"tokens": [made]}).to_iterable_dataset()
    monkeypatch.setattr(S, "open_dataset", lambda name: data)
    assert list(S.all_tokens("", tokenizer)) == right

def test_every_32nd_row_is_held_out_in_each_pass_however_many_are_asked_for(tmp_path):
    data, tokenizer = str(tmp_path / "made.jsonl"), MODEL.tokenizer
    made = torch.arange(1000, 1000 + 40 * 1023).view(40, 1023).tolist()  # no two the same
    Dataset.from_dict({"tokens": made}).to_json(data)
    rows = list(S.token_rows(data, tokenizer, 128))
    others = [row for n, row in enumerate(rows) if n % 32 != 0]
    for n_held_out in (1, 3, 100):
        held_out, training_rows = S.split_rows(data, tokenizer, 128, n_held_out)
        assert held_out.tolist() == rows[:32 * n_held_out:32]
        assert list(islice(training_rows, 3 * len(others))) == 3 * others, "pass after pass"

# ---- The language model and the buffer -----------------------------------------------
def test_a_hook_without_one_vector_per_token_is_refused_and_so_are_resid_mid_and_bert(monkeypatch):
    for hook in ("attn.hook_pattern", "attn.hook_cos", "hook_nothing", "hook_resid_mid"):
        with pytest.raises((AssertionError, KeyError), match=hook):
            S.get_activations(MODEL, f"blocks.0.{hook}", ROWS)
    bert = type("", (), {"cfg": type("", (), {"attention_dir": "bidirectional"})})
    monkeypatch.setattr(S.TransformerBridge, "boot_transformers", lambda name, device: bert)
    with pytest.raises(AssertionError, match="later tokens"):
        S.load_model("bert")

def test_a_bfloat16_model_runs_on_while_the_sae_works_in_float32():
    model, seen = S.load_model("tiny-1l").to(torch.bfloat16), []
    loss = S.replace_activations(model, HOOK, ROWS, lambda x: seen.append(x) or x, "loss")
    assert loss.item() == pytest.approx(plain(lambda x: x).loss.item(), rel=0.02)
    assert seen[0].dtype == S.get_activations(model, HOOK, ROWS).dtype == torch.float32

def test_the_buffer_serves_each_activation_once_never_bos_mixes_rows_and_refills_at_half():
    used = count()  # x of row n is n, n + 1/64, n + 2/64, ..., and -1 for BOS
    rows = ([-1, *(n + pos / 64 for pos in range(20))] for n in used)
    buffer = S.activation_buffer(lambda tokens: tokens[..., None], rows, 30, 8)
    served = [next(buffer) for _ in range(4)]
    assert next(used) == 13, "one row for the shape, twelve to fill it"
    served = torch.cat([*served, *(next(buffer) for _ in range(36))])
    assert served.unique().numel() == 1200 and served.min() >= 0, "none twice, never BOS"
    assert set(range(1, 13)) < set(served.floor().flatten().tolist()), "none is passed over"
    assert all(batch.floor().unique().numel() >= 5 for batch in served.split(30)), "of many rows"

# ---- Evaluation, and what a feature does ---------------------------------------------
def test_every_metric_is_what_other_means_give():
    sae, seen, before = make_sae(0.1, 512, 64), [], MODEL(ROWS)
    sae.W_enc.data[:, :5], sae.b_enc.data[:5] = 0.0, -1.0  # five dead ones
    metrics, frequency = S.evaluate(MODEL, HOOK, sae, ROWS)
    changes = (lambda x: seen.append(x) or x, lambda x: sae(x)[0], torch.zeros_like)
    ce, ce_sae, ce_zero = (plain(change).loss.item() for change in changes)
    x = S.get_activations(MODEL, HOOK, ROWS)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(x, seen[0].flatten(0, 1), atol=1e-4, rtol=1e-4)
    x_hat, f = sae(x)
    right = {"loss_recovered": 1 - (ce_sae - ce) / (ce_zero - ce), "ce": ce, "ce_sae": ce_sae,
             "ce_zero": ce_zero, "l0": (f > 0).sum(1).float().mean().item(),
             "fvu": ((x_hat - x) ** 2).mean().item() / x.var(0, unbiased=False).mean().item(),
             "dead": (f.amax(0) <= 0).sum().item() / 64}
    assert metrics == pytest.approx(right, rel=1e-3) and metrics["dead"] >= 5 / 64
    torch.testing.assert_close(frequency, (f > 0).float().mean(0))
    assert torch.equal(MODEL(ROWS), before), "nothing stays behind in the model"

def test_effect_is_what_the_plain_model_loses_without_the_features_share_at_this_position():
    hook, sae, rows, pos = "blocks.0.hook_resid_pre", make_sae(d_in=128), ROWS[:3], [5, 9, 63]
    i = sae(S.get_activations(MODEL, hook, rows))[1][[0, 1, 2], pos].sum(0).argmax()
    def without(x):
        share = torch.zeros_like(x)
        for n, p in enumerate(pos):
            share[n, p - 1] = sae(x[n, p - 1])[1][i] * sae.W_dec[i]  # (x lacks BOS)
        return x - share
    one, other = (plain(change, rows, PLAIN.gpt_neox.embed_in).logits[[0, 1, 2], pos].softmax(-1)
                  for change in (lambda x: x, without))
    found = S.effect(MODEL, hook, sae, i, rows, torch.tensor(pos))
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, (one - other).mean(0), atol=1e-5, rtol=1e-3)

def test_a_feature_is_shown_where_it_fires_most_with_what_it_adds(tmp_path, capsys, monkeypatch):
    sae, page = make_sae(d_in=512), tmp_path / "page.html"
    x = S.get_activations(MODEL, HOOK, ROWS)
    sae.b_enc.data[:], sae.W_enc.data[:, :2] = 0.0, 0.0  # feature 1 is dead, 0 is the neuron
    sae.W_enc.data[x[0, 0].argmax(), 0] = 1.0  # that fires most on BOS, which is not to be shown
    f = sae.encode(x)[:, 1:, 0]
    peak, pos = f.max(dim=1)
    best = peak.topk(5).indices
    added, token = S.effect(MODEL, HOOK, sae, 0, ROWS[best], pos[best] + 1).max(0)
    S.report(MODEL, HOOK, sae, ROWS, [0, 1], "café", page)
    out, html = capsys.readouterr().out, page.read_text("utf-8")
    assert out.startswith("café\n") and out.splitlines()[-1].endswith("page.html")
    assert f"\nfeature 0 fires on {(f > 0).float().mean():.3%} of tokens, adds {added:.2f} to " \
           f"{MODEL.to_str_tokens(token)[0]!r}" in out and "1 fires on 0.000% of tokens\n" in out
    words = [repr(MODEL.to_str_tokens(ROWS[n])[pos[n] + 1]) for n in best]
    assert re.findall(r"^ *('.*?')  ", out, re.M) == words
    darkest = re.search(r"r(\d+) {color: #000000; .*background-color: #ff6432", html)[1]
    assert f'<span class="r{darkest}">{words[0][1:-1]}</span>' in html
    page.unlink()  # a terminal that lacks a character does not cost the page
    monkeypatch.setattr("sys.stdout", open(tmp_path / "terminal", "w", encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        S.report(MODEL, HOOK, sae, ROWS, [0, 1], "café", page)
    assert page.read_text("utf-8") == html

# ---- The command line ----------------------------------------------------------------
def test_the_same_seed_gives_the_same_numbers_and_so_does_what_was_saved(main):
    for flags in ("", "--k 8 --hook blocks.0.attn.hook_z"):
        metrics = main(flags)
        again = main(f"{flags} --load run/sae.pt --steps 0 --out there", "there")
        assert [*again.values()][:7] == pytest.approx([*metrics.values()][:7], rel=1e-4)
        assert main(flags) == metrics and len(os.listdir("run")) == 3

def test_each_flag_has_its_effect_and_stands_beside_the_figures(main):
    before = main("--features 1")
    for flag, value, figure in (
            ("l1", 0.3, "l0"), ("k", 4, "l0"), ("lr", 0.1, "fvu"), ("steps", 40, "fvu"),
            ("batch_size", 32, "fvu"), ("d_sae", 128, "l0"), ("seed", 1, "fvu"),
            ("seq_len", 64, "ce"), ("held_out", 5, "ce"),
            ("hook", "blocks.0.hook_mlp_out", "ce_zero")):
        after = main(f"--features 1 --{flag.replace('_', '-')} {value}")
        assert abs(after[figure] / before[figure] - 1) > 1e-3 and after[flag] == value, flag

def test_features_are_shown_from_rare_to_frequent_or_those_asked_for(main, capsys, monkeypatch):
    frequency = 1e-4 * torch.arange(256).flip(0)  # 253 and above: not on more than 2 in 10,000
    monkeypatch.setattr(S, "evaluate", lambda *args: ({"l0": 1.0}, frequency))
    for flags, shown in (("", [*range(252, -1, -13)]), ("--features 200 7", [200, 7])):
        main(flags)
        assert re.findall(r"feature (\d+)", capsys.readouterr().out) == [*map(str, shown)]

def test_training_on_starts_from_the_file_and_measuring_writes_beside_it(main):
    trained = main()
    same = main("--load run/sae.pt --lr 1e-9 --steps 10 --out there", "there")
    assert [*same.values()][:7] == pytest.approx([*trained.values()][:7], rel=1e-3)
    assert main("--load there/sae.pt --steps 0", "there")["steps"] == 0
    assert json.loads(Path("run/metrics.json").read_text()) == trained

def test_a_stop_leaves_a_whole_sae_with_its_own_figures_or_none(main, monkeypatch):
    main()
    before = [file.read_bytes() for file in sorted(Path("run").iterdir())]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # in a save
        patch.setattr(torch, "save", lambda weights, path: path.write_bytes(b"half of") / 0)
        main("--l1 0.1")
    assert [file.read_bytes() for file in sorted(Path("run").glob("[!n]*"))] == before
    monkeypatch.setattr(S, "evaluate", lambda *args: 1 / 0)  # after the last save
    with pytest.raises(ZeroDivisionError):
        main("--l1 0.1")
    assert os.listdir("run") == ["sae.pt"] and Path("run/sae.pt").read_bytes() != before[-1]

@pytest.mark.parametrize("flags", ["--k 0", "--d-sae 0", "--lr 0", "--held-out 0", "--seq-len 1",
                                   "--batch-size 1", "--seq-len 129", "--load narrow.pt"])
def test_a_flag_that_makes_no_sense_is_refused(flags, main, capsys):
    torch.save(make_sae().state_dict(), "narrow.pt")
    with pytest.raises((SystemExit, AssertionError)) as error:
        main(flags)
    assert flags.split()[0] in capsys.readouterr().err + str(error.value)

def recipe(part):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S)
    return next(block for block in blocks if part in block)

def test_each_recipe_runs_as_it_stands(main, capsys):
    main("--k 8 --d-sae 4096 --features 1")
    names = {}  # (the second and the third go on from the first)
    for part, shown in (("to_tokens", r"\n' True'( +\d+: \d+\.\d+)+\n"), ("generate", "while"),
                        ("histc", r"0.001%(.*\n){10}$"), ("randn", "FVU 0"), ("load_file", "")):
        exec(recipe(part), names)
        assert re.search(shown, capsys.readouterr().out)
    x, there = torch.randn(9, 512), S.SparseAutoencoder.load("run/sae.pt")
    assert torch.equal(there(x)[0], S.SparseAutoencoder.load("back.pt")(x)[0]), "from SAELens"

def test_the_recipe_for_several_gpus_keeps_two_processes_equal_bit_by_bit(tmp_path, monkeypatch):
    code = recipe("all_gather").replace("steps=1000", "steps=12").replace("4096", "256")
    code = code.replace("if rank == 0", "if True").replace('"several.pt"', 'f"{rank}.pt"')
    code = code.replace("1024", "64").replace("torch.cuda.is_available()", "False")
    monkeypatch.chdir(tmp_path)
    Path("several.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    torchrun(["--nproc-per-node", "2", "several.py"])
    first, second = torch.load("0.pt"), torch.load("1.pt")
    assert all(map(torch.equal, first.values(), second.values()))

def test_sae_py_stays_short():
    assert len((HERE / "sae.py").read_text("utf-8").splitlines()) <= 450
