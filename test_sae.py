"""What sae.py promises, one test a promise; each one's name says it. `pytest`: offline."""
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from itertools import islice
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM
import sae as S

HERE = Path(S.__file__).parent
HOOK = "blocks.0.mlp.hook_post"
TEXT = str(Path(json.__file__).with_name("*.py"))  # some 150 rows of Python

# ---- What the tests work on ----------------------------------------------------------
@pytest.fixture(scope="session")
def model():
    return S.load_model("tiny-1l")

@pytest.fixture(scope="session")
def rows(model):
    return S.split_rows(TEXT, model.tokenizer, 64, 6)[0]  # [6, 64]

@pytest.fixture(scope="session")
def plain(rows):
    """The same model without TransformerLens: replace -> loss on `rows`, x [6, 64, 512]"""
    model = AutoModelForCausalLM.from_pretrained(HERE / "assets/tiny-1l", dtype=torch.float32)
    seen = []
    @torch.no_grad()
    def forward(replace):
        def splice(module, args, act):
            seen.append(act)
            return torch.cat([act[:, :1], replace(act[:, 1:])], dim=1)
        with model.gpt_neox.layers[0].mlp.act.register_forward_hook(splice):
            return model(rows, labels=rows).loss.item(), seen[-1]
    return forward

@pytest.fixture
def main(model, monkeypatch, tmp_path):
    """The command line, in this process: flags -> the metrics that it wrote"""
    monkeypatch.setattr(S, "load_model", lambda name, device="cpu": model)
    monkeypatch.chdir(tmp_path)
    def main(*flags):
        S.main(["--dataset", TEXT, "--device", "cpu", "--d-sae", "256", "--batch-size", "64",
                "--held-out", "4", "--steps", "25", *flags])
        return json.loads(Path("run/metrics.json").read_text())
    return main

def make_sae(threshold=0.0, d_in=16, d_sae=48):
    torch.manual_seed(0)
    sae = S.SparseAutoencoder(d_in, d_sae)
    sae.b_enc.data.normal_(std=0.1)
    sae.b_dec.data.normal_(std=0.1)
    sae.threshold += threshold * torch.rand(d_sae)
    return sae

def sparse_sums():
    """-> 64 directions [64, 32], and a function for batches [256, 32] of sparse sums of these"""
    random = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.randn(64, 32, generator=random), dim=-1)
    def next_batch():
        codes = torch.rand(256, 64, generator=random)
        return codes * (codes > 0.97) @ truth
    return truth, next_batch

def norms_are_1(sae):
    return (sae.W_dec.norm(dim=-1) - 1).abs().max().item() < 1e-6

# ---- The autoencoder, and its unit norms ---------------------------------------------
def test_shapes_follow_x_whatever_its_leading_dimensions():
    for leading in ((), (5,), (2, 3)):
        x_hat, f = make_sae()(torch.randn(*leading, 16))
        assert x_hat.shape == (*leading, 16) and f.shape == (*leading, 48)

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

@pytest.mark.parametrize("order, holds", [
    ("project step normalize", True),
    ("project step", False), ("normalize project step", False)])  # as published, as mended at first
def test_rows_keep_length_1_if_each_step_ends_with_normalize_and_else_not(order, holds):
    sae, x = make_sae(), torch.randn(256, 16)
    adam = torch.optim.Adam(sae.parameters(), lr=0.01)
    act = {"project": sae.project_gradient, "step": adam.step, "normalize": sae.normalize}
    for _ in range(20):
        adam.zero_grad()
        sae.loss(x, 0.1)[0].backward()
        for name in order.split():
            act[name]()
    assert norms_are_1(sae) == holds

def test_each_training_step_is_project_step_normalize(monkeypatch):
    sae, calls, norms = make_sae(d_in=32), [], []
    names = ["project_gradient", "step", "normalize"]
    for owner, name in zip((sae, torch.optim.Adam, sae), names):
        def call(*args, name=name, real=getattr(owner, name)):
            calls.append(name)
            return real(*args)
        monkeypatch.setattr(owner, name, call)
    S.train(sae, sparse_sums()[1], 30, save=lambda: norms.append(norms_are_1(sae)))
    assert calls == 30 * names and norms == 3 * [True]

def test_the_gradient_loses_its_part_along_each_row_and_nothing_else():
    sae = make_sae()
    sae.loss(torch.randn(100, 16), 0.1)[0].backward()
    before = sae.W_dec.grad.clone()
    sae.project_gradient()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-5
    assert F.cosine_similarity(before - sae.W_dec.grad, sae.W_dec).abs().min() > 0.999

def test_move_threshold_comes_to_where_k_features_pass_and_moves_nothing_else():
    sae, x = make_sae(), torch.randn(4000, 16)
    before = deepcopy(sae)
    for part in 2 * x.split(128):
        sae.move_threshold(part, 5)
    assert abs((sae.encode(x) > 0).sum() / len(x) - 5) < 0.2
    for _ in range(100):
        sae.move_threshold(x[:128], 48)  # more than are positive: f is never negative, all the same
    assert (sae.encode(x) >= 0).all()
    assert all(map(torch.equal, sae.parameters(), before.parameters()))

@pytest.mark.parametrize("source, file", [("run1", "25.pt"), ("run2", "47.pt"), ("a.pt", "a.pt")])
def test_any_rows_load_as_length_1_with_the_same_x_hat(source, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(S, "hf_hub_download", lambda repo, name: (
        repo == "NeelNanda/sparse_autoencoder" and name))
    sae, x = make_sae(threshold=0.5 * (source == "a.pt")), torch.randn(50, 16)
    sae.W_dec.data *= torch.rand(48, 1) + 0.5
    weights = sae.state_dict()
    if source != "a.pt":
        del weights["threshold"]  # the published files have none
    torch.save(weights, file)
    loaded = S.SparseAutoencoder.load(source)
    assert norms_are_1(loaded)
    torch.testing.assert_close(loaded(x)[0], sae(x)[0])
    torch.save({"W_enc": weights["W_enc"]}, file)
    with pytest.raises(RuntimeError, match="W_dec"):  # and not a random decoder
        S.SparseAutoencoder.load(source)

# ---- Training ------------------------------------------------------------------------
@pytest.mark.parametrize("sparsity", [{"l1": 0.2}, {"k": 2}])
def test_the_tiny_overfit_finds_the_directions_that_made_the_data(sparsity):
    torch.manual_seed(0)
    truth, next_batch = sparse_sums()
    sae = S.SparseAutoencoder(32, 128)
    S.train(sae, next_batch, 1000, **sparsity)
    assert (truth @ sae.W_dec.T).max(dim=1).values.mean() > 0.95  # cosines
    x = next_batch()
    x_hat, f = sae(x)
    assert (x_hat - x).pow(2).sum() < 0.2 * (x - x.mean(0)).pow(2).sum()
    assert (f > 0).sum() / len(x) < 4

@pytest.mark.parametrize("sparsity", [{"l1": 0.1}, {"k": 2}])
def test_x_eight_times_as_large_gives_the_same_sae_with_f_eight_times_as_large(sparsity):
    found = []
    for scale in (1, 8):
        torch.manual_seed(0)
        sae, next_batch = S.SparseAutoencoder(32, 64), sparse_sums()[1]
        S.train(sae, lambda: scale * next_batch(), 60, **sparsity)
        found.append([sae.W_enc, sae.W_dec, sae.b_enc / scale, sae.b_dec / scale])
    for one, eight in zip(*found):
        assert (one - eight).abs().mean() < 1e-3 * one.abs().mean()

def weights_of(name, steps=100, next_batch=sparse_sums()[1], **flags):
    """What train passes to sae.loss as l1, or to sae.move_threshold as k, at each step"""
    sae, seen = make_sae(d_in=32), []
    real = getattr(sae, name)
    setattr(sae, name, lambda x, weight: seen.append(weight) or real(x, weight))
    S.train(sae, next_batch, steps, **flags)
    return seen

def test_l1_grows_and_k_falls_over_the_first_half():
    l1, k = weights_of("loss"), weights_of("move_threshold", k=2)
    assert 0 < l1[0] < 0.1 * l1[-1] and l1 == sorted(l1) and l1[40] < l1[49] == l1[-1]
    assert 15 < k[0] < 16 and k == sorted(k, reverse=True) and k[40] > k[49] == k[-1] == 2
    assert weights_of("loss", k=2) == 100 * [0.0], "with k, no L1"

def test_a_few_huge_x_do_not_change_l1():
    x = sparse_sums()[1]()
    usual = weights_of("loss", 2, lambda: x)[-1]
    x[:3] *= 30  # x's mean distance from its mean is now 1.3 times as large
    assert 0.9 < weights_of("loss", 2, lambda: x)[-1] / usual < 1.1

def test_even_a_single_step_trains():
    sae = make_sae(d_in=32)
    S.train(sae, sparse_sums()[1], 1)
    assert (sae.W_enc - make_sae(d_in=32).W_enc).abs().max() > 1e-3
    assert (sae.b_dec - make_sae(d_in=32).b_dec).abs().max() < 0.05, "b_dec is kept, if it is not 0"

@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_resample_draws_by_the_square_of_the_loss_and_changes_the_dead_alone(threshold):
    sae, dead = make_sae(threshold), torch.arange(48) < 40
    adam = torch.optim.Adam(sae.parameters())
    sae.loss(torch.randn(100, 16))[0].backward()
    adam.step()
    states = [adam.state[weight] for weight in (sae.W_dec, sae.W_enc, sae.b_enc)]
    squares = [state["exp_avg_sq"].clone() for state in states]
    sae.b_enc.data[:], sae.b_dec.data[:] = -1e9, 0.0  # so bad that the error is x itself
    before = deepcopy(sae)
    x = F.normalize(torch.randn(1060, 16), dim=-1)
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
    torch.testing.assert_close(sae.W_enc[:, ~kept], fifth * sae.W_dec[~kept].T)
    torch.testing.assert_close(sae.b_enc[~kept], sae.threshold[~kept] - fifth * reach / 4)
    assert kept[40:].all() and torch.equal(sae.b_dec, before.b_dec)
    assert torch.equal(sae.W_enc[:, kept], before.W_enc[:, kept])
    assert torch.equal(sae.b_enc[kept], before.b_enc[kept])
    for state, square, new in zip(states, squares, (~kept, (..., ~kept), ~kept)):
        assert state["exp_avg"].any() and not state["exp_avg"][new].any()
        square[new] = square.sqrt().mean() ** 2
        torch.testing.assert_close(state["exp_avg_sq"], square, atol=0.0, rtol=1e-5)

def test_dead_features_come_back_and_none_is_revived_near_the_end(monkeypatch):
    sae, looks, revived, resample = make_sae(d_in=32), [], [], S.resample
    sae.b_enc.data[:20] = -100.0
    monkeypatch.setattr(S, "resample", lambda *args: revived.append(sum(args[2])) or resample(*args))
    def save():
        looks.append(sae.b_enc.data[30].fill_(-100.0))  # this one dies again and again
    next_batch = sparse_sums()[1]
    S.train(sae, lambda: next_batch()[:8], 400, k=4, save=save)
    assert len(looks) == 20 and len(revived) == 16, "after each look of the first 85 %"
    assert max(revived[1:]) < 10, "those alone that were not in any of its batches"
    assert (sae.encode(next_batch()) > 0).any(dim=0)[:20].sum() > 15

# ---- Data ----------------------------------------------------------------------------
def texts_of(data, tokenizer):
    """The texts whose tokens all_tokens yields, with EOS after each"""
    tokens = torch.tensor(list(S.all_tokens(data, tokenizer)))
    ends = (tokens == tokenizer.eos_token_id).nonzero().flatten() + 1
    *texts, rest = tokens.tensor_split(ends)
    assert len(rest) == 0, "EOS is the last"
    return sorted(tokenizer.decode(text[:-1]) for text in texts)

def test_rows_are_the_tokens_of_all_texts_with_eos_after_each_and_bos_in_front(model):
    rows = list(S.token_rows(TEXT, model.tokenizer, 50))
    assert {len(row) for row in rows} == {50} and {row[0] for row in rows} == {0}
    tokens = list(S.all_tokens(TEXT, model.tokenizer))
    assert [t for row in rows for t in row[1:]] == tokens[:len(tokens) // 49 * 49]
    files = Path(TEXT).parent.glob("*.py")
    assert texts_of(TEXT, model.tokenizer) == sorted(file.read_text() for file in files)

TEXTS = [f"the cat number {i} sat on\nthe <|endoftext|> mat\n" for i in range(12)]

@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """A folder in which the same 12 texts stand in files of several kinds"""
    folder = tmp_path_factory.mktemp("kinds")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(text)
    table = Dataset.from_dict({"text": TEXTS, "id": [7] * 12})
    for name in ("a.jsonl", "B.NDJSON", "[c].jsonl"):  # (load_dataset would read [c] as c)
        table.to_json(folder / name)
    table.to_csv(folder / "a.csv")
    table.to_parquet(folder / "a.parquet")
    (folder / "c.jsonl").write_text('{"text": "not this one"}')
    (folder / "latin.md").write_bytes("café".encode("latin-1"))
    (folder / "words.csv").write_text("title,body\na,b\n")
    return folder

@pytest.mark.parametrize("name", ["*.txt", "a.jsonl", "a.csv", "a.parquet", "B.NDJSON",
                                  "[[]c].jsonl"])
def test_the_same_texts_are_read_from_whatever_files_they_are_in(name, kinds, model):
    assert texts_of(f"{kinds}/{name}", model.tokenizer) == sorted(TEXTS)

@pytest.mark.parametrize("name, error", [
    ("a.*", "several kinds"), ("[0a]*[tl]", "several kinds"), ("words.csv", "title.*body"),
    ("latin.md", "utf-8"), ("nothing*.txt", "nothing"), ("00.txt", "fewer than 33 rows")])
def test_what_cannot_be_read_is_an_error_and_no_endless_loop(name, error, kinds, model):
    with pytest.raises(Exception, match=error):
        next(S.split_rows(f"{kinds}/{name}", model.tokenizer, 8)[1])

def test_ready_made_tokens_are_taken_and_every_32nd_row_is_held_out_in_each_pass(model, tmp_path):
    made = torch.arange(1000, 1000 + 40 * 1023).view(40, 1023).tolist()  # no two the same
    data, tokenizer = str(tmp_path / "made.jsonl"), model.tokenizer
    Dataset.from_dict({"tokens": [[tokenizer.bos_token_id, *line] for line in made]}).to_json(data)
    rows = list(S.token_rows(data, tokenizer, 128))
    tokens = [t for row in rows for t in row[1:] if t != tokenizer.eos_token_id]
    assert len(set(tokens)) == len(tokens) > 40 * 1023 - 127 and min(tokens) >= 1000
    held_out, training_rows = S.split_rows(data, tokenizer, 128, 100)
    assert held_out.tolist() == rows[::32]
    others = [row for n, row in enumerate(rows) if n % 32 != 0]
    assert list(islice(training_rows, 3 * len(others))) == 3 * others, "pass after pass"
    assert S.split_rows(data, tokenizer, 128, 3)[0].tolist() == rows[:96:32]

# ---- The language model and the buffer -----------------------------------------------
def test_activations_are_those_of_the_model_and_nothing_stays_behind(model, rows, plain):
    before = model(rows)
    x = S.get_activations(model, HOOK, rows)
    torch.testing.assert_close(x, plain(lambda x: x)[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(model(rows), before)
    assert S.get_activations(model, "blocks.0.attn.hook_z", rows).shape == (6, 64, 128), "4 heads"

@pytest.mark.parametrize("hook", ["attn.hook_pattern", "attn.hook_cos", "hook_nothing"])
def test_a_hook_without_one_vector_for_each_token_is_refused(hook, model, rows):
    with pytest.raises((ValueError, KeyError), match=hook):
        S.get_activations(model, f"blocks.0.{hook}", rows)

def test_the_buffer_serves_each_activation_once_never_bos_and_mixes_rows():
    def numbers():  # x of row n is n, n + 1/64, n + 2/64, ..., and -1 for BOS
        for n in range(10 ** 6):
            yield [-1, *(n + pos / 64 for pos in range(20))]
    buffer = S.ActivationBuffer(lambda tokens: tokens[..., None], numbers(), 30, 8)
    served = torch.cat([buffer.next_batch() for _ in range(40)]).flatten()
    assert served.unique().numel() == len(served) == 1200, "none twice"
    assert served.min() >= 0, "never BOS"
    assert served.max() < 1200 / 20 + 20, "none passed over: rows are used in their order"
    assert all(batch.floor().unique().numel() >= 5 for batch in served.split(30)), "of many rows"

def test_the_buffer_stays_where_it_is_and_is_never_copied():
    act, rows = torch.randn(300, 64), iter(torch.randint(300, (2000, 128)).tolist())
    buffer = S.ActivationBuffer(lambda tokens: act[tokens], rows, 256, 400)
    place = buffer.store.data_ptr()
    with torch.profiler.profile(profile_memory=True) as seen:
        [buffer.next_batch() for _ in range(201)]  # two refills
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest < buffer.store.nbytes / 5 and buffer.store.data_ptr() == place

# ---- Evaluation and report -----------------------------------------------------------
def test_every_metric_is_what_other_means_give(model, rows, plain):
    sae = make_sae(0.1, 512, 64)
    sae.W_enc.data[:, :5], sae.b_enc.data[:5] = 0.0, -1.0  # five dead ones
    metrics, frequency = S.evaluate(model, HOOK, sae, rows)
    ce, x = plain(lambda x: x)
    ce_sae, ce_zero = plain(lambda x: sae(x)[0])[0], plain(torch.zeros_like)[0]
    x = x[:, 1:].reshape(-1, 512)
    x_hat, f = sae(x)
    right = {"loss_recovered": 1 - (ce_sae - ce) / (ce_zero - ce), "ce": ce, "ce_sae": ce_sae,
             "ce_zero": ce_zero, "l0": (f > 0).sum(1).float().mean().item(),
             "fvu": ((x_hat - x) ** 2).mean().item() / x.var(0, unbiased=False).mean().item(),
             "dead": (f.amax(0) <= 0).sum().item() / 64}
    assert metrics == pytest.approx(right, rel=1e-3) and metrics["dead"] >= 5 / 64
    torch.testing.assert_close(frequency, (f > 0).float().mean(0))

def test_x_itself_recovers_1_and_zeros_recover_0(model, rows):
    sae = S.SparseAutoencoder(512, 512)
    for scale in (1.0, 0.0):
        sae.forward = lambda x: (scale * x, x)
        assert abs(S.evaluate(model, HOOK, sae, rows)[0]["loss_recovered"] - scale) < 1e-5

class Words:
    """In place of a language model: x at a token is its number, and BOS's is the largest"""
    STRINGS = ["plain", "one", "[red]two", "<b>three", "четыре", "five\n", "six", "<bos>"]
    def run_with_hooks(self, tokens, return_type, fwd_hooks):
        with pytest.raises(S.StopAtLayerException) as stop:
            fwd_hooks[0][1](tokens[..., None].float(), hook=None)
        return stop.value.layer_output
    def to_str_tokens(self, tokens):
        return [self.STRINGS[t] for t in tokens.tolist()]

def test_a_feature_is_shown_where_it_fires_most(tmp_path, capsys, monkeypatch):
    sae, page = S.SparseAutoencoder(1, 1), tmp_path / "page.html"
    sae.W_enc.data[:] = 1.0
    rows = torch.tensor([[7, 0, i, 0] for i in range(1, 7)])
    args = (Words(), "hook", sae, rows, {"l0": 0.25}, torch.tensor([0.3]), page)
    S.report(*args)
    out = capsys.readouterr().out
    assert out.split()[:2] == ["l0", "0.2500"] and "\nfeature 0: on 30.000% of tokens" in out
    assert re.findall("plain(.*)plain", out) == ["six", "five\\n", "четыре", "<b>three", "[red]two"]
    tinted = re.findall(r'<span class="r\d+">([^<]*)</span>', page.read_text(encoding="utf-8"))
    assert {"six", "&lt;b&gt;three", "[red]two"} < set(tinted) and "plain" not in tinted
    page.unlink()  # a terminal that lacks a character does not cost the page
    monkeypatch.setattr("sys.stdout", open(tmp_path / "terminal", "w", encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        S.report(*args)
    assert "четыре" in page.read_text(encoding="utf-8")

# ---- The command line ----------------------------------------------------------------
@pytest.mark.parametrize("flags", [[], ["--k", "8"], ["--hook", "blocks.0.attn.hook_z"]])
def test_the_same_seed_gives_the_same_numbers_and_so_does_what_was_saved(flags, main):
    metrics = main(*flags)
    assert set(os.listdir("run")) == {"sae.pt", "metrics.json", "report.html"}
    assert main(*flags, "--load", "run/sae.pt", "--steps", "0") == pytest.approx(metrics, rel=1e-4)
    assert main(*flags) == metrics != main(*flags, "--seed", "1")

def test_a_kill_in_the_middle_of_a_save_leaves_the_last_one(main, monkeypatch):
    main()
    before = Path("run/sae.pt").read_bytes()
    monkeypatch.setattr(torch, "save", lambda weights, path: path.write_bytes(b"half of") / 0)
    with pytest.raises(ZeroDivisionError):
        main()
    assert Path("run/sae.pt").read_bytes() == before

@pytest.mark.parametrize("flags", ["--steps 0", "--k 0", "--d-sae 0", "--lr -1", "--seq-len 1"])
def test_a_flag_that_makes_no_sense_is_refused(flags, main, capsys):
    with pytest.raises(SystemExit):
        main(*flags.split())
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]

# ---- README.md, and the card of tiny-1l ----------------------------------------------
def block(page, part):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / page).read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if part in block)

@pytest.mark.parametrize("part, shown", [
    ("to_tokens", r"'<.endoftext.>' .*\n'for'( \d+){3}\n' i'( \d+){3}\n"),
    ("randn", r"FVU 0\.\d+\n"),
    ("ln_final", r"up (\[.*\]) down (?!\1)"),
    ("histc", r"from +0\.001% of tokens: (.*\n){10}$"), ("load_file", "")])
def test_a_recipe_runs_as_it_stands(part, shown, main, capsys):
    main("--k", "8")
    exec(block("README.md", part), {})
    assert re.search(shown, capsys.readouterr().out)
    if part == "load_file":  # to SAELens and back: the same SAE, thresholds included
        x, there = torch.randn(9, 512), S.SparseAutoencoder.load("run/sae.pt")
        assert torch.equal(there(x)[0], S.SparseAutoencoder.load("back.pt")(x)[0])

def test_the_recipe_for_several_gpus_keeps_two_processes_equal_bit_by_bit(tmp_path):
    code = block("README.md", "all_gather").replace("steps=1000", "steps=12")
    code = code.replace("4096", "256").replace("if rank == 0", "if True")
    (tmp_path / "several.py").write_text(code.replace('"several.pt"', 'f"{rank}.pt"'))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "several.py"], cwd=tmp_path, check=True, env={
        **os.environ, "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""})
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    assert all(map(torch.equal, first.values(), second.values()))

def test_the_code_on_tiny_1ls_card_makes_such_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = block("assets/tiny-1l/README.md", "GPTNeoX").replace("2048", "400")
    exec(code.replace('"src"', f'"{Path(TEXT).parent}"').replace("42_000, 16", "3, 4"), {})
    x = S.get_activations(S.load_model("./tiny-1l"), HOOK, torch.randint(400, (2, 20)))
    assert x.shape == (2, 20, 512)

def test_sae_py_stays_short():
    assert len((HERE / "sae.py").read_text(encoding="utf-8").splitlines()) <= 440
