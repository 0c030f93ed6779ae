"""sae.py: train a sparse autoencoder (SAE) on a language model's activations.

After "Towards Monosemanticity" (Bricken et al. 2023) and its first open replication, Neel
Nanda's 1L-Sparse-Autoencoder. `python sae.py --steps 1000` trains one on the MLP of tiny-1l,
a small transformer in this repository, in under three minutes on two CPU cores. It finds

    loss_recovered 0.9792   ce 3.137   ce_sae 3.259   ce_zero 9.001   ce_mean 7.915
    l0 49.61   fvu 0.1232   dead 0.0   decoder norms 0.9999998 to 1.0000001

x: the activations at a token, a vector of length d_in. x_hat: the SAE's version of it.
ce: the model's cross-entropy. ce_sae, ce_zero, ce_mean: what it is if x is replaced by
x_hat, by zeros, by the mean of x. loss_recovered = (ce_zero - ce_sae) / (ce_zero - ce).
l0: how many features fire on a token, on average. fvu: the fraction of x's variance
that x_hat misses. dead: the fraction of features that fire on none of the held-out
tokens. decoder norms: the lengths of W_dec's rows, kept at 1.

The SAE itself is in sections 4 to 6; 1 to 3 feed it, 7 and 8 measure and show it, 9
saves and loads it (skip that at first), 10 runs it all. A class or function with a line
"# Needs:" above it can be copied, with what that line lists.
"""

import glob
import json
import math
import os
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from datasets import load_dataset
from einops import rearrange
from huggingface_hub import hf_hub_download
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file, save as to_bytes
from tqdm import tqdm
# Wraps a model: each of its activations has a name, by which a hook can read or replace it.
from transformer_lens.model_bridge import TransformerBridge

# ---- 1. Config: tyro makes each field a flag, and its comment the flag's help --------
PUBLISHED = {"run1": "25.pt", "run2": "47.pt"}  # the first replication's two SAEs

@dataclass
class Config:
    model: str = "tiny-1l"  # tiny-1l, gelu-1l, a model on the Hub, or a folder
    hook: str = "blocks.0.mlp.hook_post"  # where x is; here: MLP neurons after their GELU
    dataset: str = ""  # stdlib, file, folder, 'glob*' or Hub NAME[:SUBSET[:SPLIT]]; by default what suits --model
    seq_len: int = 128  # tokens in a row of data, BOS included
    held_out: int = 384  # rows for evaluation and report, which are never trained on

    d_sae: int | None = None  # number of features; by default 8 x d_in, as in the paper
    l1: float | None = None  # weight of the L1 term; by default from the size of x, and steps
    k: int | None = None  # features that fire per token, on average; replaces L1

    steps: int = 1000  # training steps; 0 only measures the SAE that --load names
    batch_size: int = 1024  # activations a step (first replication: 4096)
    lr: float | None = None  # peak learning rate; by default from d_sae and steps
    buffer: int = 64  # batches in the activation buffer (first replication: 384)
    seed: int = 0  # of the initial weights and of the order of activations
    device: str | None = None  # cpu, cuda, cuda:1, mps; by default the fastest there is

    out: str = ""  # folder to write into; by default runs/MODEL/HOOK[-k16][-from-SAE]
    save_every: int = 500  # steps between saves
    resume: bool = False  # go on from what --out holds; give the same flags again
    load: str = ""  # start from this SAE: run1, run2, a folder or a .pt file
    features: tuple[int, ...] = ()  # which to show, as in 12 34 56; by default about twenty

    def __post_init__(self):
        # Numbers have to be above 0; three may also be 0.
        for name, value in vars(self).items():
            if type(value) in (int, float):  # not bool
                may_be_0 = name in ("steps", "l1", "seed")
                in_range = 0 < value < math.inf or (may_be_0 and value == 0)
                assert in_range, f"--{name.replace('_', '-')} cannot be {value}"
        assert self.seq_len > 1, "--seq-len 1 leaves no token but BOS"
        assert self.steps > 0 or self.load, "--steps 0 only measures; it needs --load"

        # Defaults that follow from other flags.
        if self.load in PUBLISHED and self.model == "tiny-1l":
            self.model = "gelu-1l"
        usual = {"tiny-1l": "stdlib", "gelu-1l": "NeelNanda/c4-code-tokenized-2b"}
        self.dataset = self.dataset or usual.get(self.model, "monology/pile-uncopyrighted")
        if not self.out:
            self.out = f"runs/{Path(self.model).name}/{self.hook}"
            if self.k:
                self.out += f"-k{self.k}"
            if self.load:
                self.out += f"-from-{Path(self.load).name}"

# ---- 2. Data: rows of tokens, from text or from ready-made tokens --------------------
TABLES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv",
          ".parquet": "parquet"}

def open_dataset(name):
    """A stream of examples (dicts), from files or from the Hub. See Config.dataset."""
    if name == "stdlib":  # the source of Python's own library, which everybody has
        name = sysconfig.get_path("stdlib") + "/*.py"
    elif os.path.isdir(name):
        name = glob.escape(name) + "/**"  # (escape: it may have brackets in it)
    matches = {name, *glob.glob(name, recursive=True)}  # (so may the name of a file)
    files = sorted(filter(os.path.isfile, matches))
    if not files:  # a name on the Hub: "a:b" -> "a", "b", ""
        name, subset, split = (name.split(":") + ["", ""])[:3]
        return load_dataset(name, subset or None, split=split or "train", streaming=True)

    # (load_dataset unpacks .gz and .zst.)
    unpacked = [file.lower().removesuffix(".gz").removesuffix(".zst") for file in files]
    suffixes = {Path(file).suffix for file in unpacked}
    kinds = {TABLES.get(suffix, "text") for suffix in suffixes}
    assert len(kinds) == 1, f"it holds {suffixes}: choose, as in 'folder/*.txt'"
    kind = kinds.pop()
    options = {}
    if kind == "text":  # each file is an example
        options = dict(sample_by="document", encoding_errors="replace")
    files = [glob.escape(file) for file in files]  # load_dataset looks for patterns
    return load_dataset(kind, data_files=files, split="train", streaming=True, **options)

def all_tokens(dataset, tokenizer):
    """Yields the tokens of all examples, with EOS after each, in the same order each
    time (the seed of the shuffle is fixed), so that the same rows stay held out."""
    for example in open_dataset(dataset).shuffle(seed=0, buffer_size=1000):
        found = {"text", "tokens", "input_ids"}.intersection(example)
        assert found, f"no column text or tokens, but {list(example)}"
        text = example.get("text")
        tokens = example.get("tokens") or example.get("input_ids")  # ready-made
        if isinstance(text, str) and text:
            # In parts, because a tokenizer takes nearly 200 times the memory of its text.
            # (split_special_tokens: if a text says <|endoftext|>, that is not an EOS.)
            for start in range(0, len(text), 1_000_000):
                part = tokenizer(text[start:start + 1_000_000], add_special_tokens=False,
                                 split_special_tokens=True)
                yield from part["input_ids"]
            yield tokenizer.eos_token_id
        elif isinstance(tokens, list) and tokens:
            if tokens[0] in (tokenizer.bos_token_id, tokenizer.eos_token_id):
                tokens = tokens[1:]  # token_rows puts a BOS before each row
            yield from map(int, tokens)  # an error if they are words, not ids
            yield tokenizer.eos_token_id

@contextmanager
def blame(what):
    """Puts `what`, say a flag, in front of the message of any error raised inside."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {error}") from error

# Needs: all of section 2, and the imports that it uses.
def token_rows(dataset, tokenizer, seq_len=128, held_out=False):
    """Yields rows of tokens, lists [seq_len] that begin with BOS. Rows 0, 32, 64, ... are
    held out: held_out=True yields only these, once; False all the others, endlessly."""
    eos = tokenizer.eos_token_id
    assert eos is not None, "the tokenizer has no EOS"
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    while True:  # a pass over the data
        with blame(f"--dataset {dataset}"):
            tokens = all_tokens(dataset, tokenizer)
            for n in count():
                row = [bos, *islice(tokens, seq_len - 1)]
                if len(row) < seq_len:
                    break  # the data have ended, after n rows
                is_held_out = n % 32 == 0
                if is_held_out == held_out:  # is it one of those that were asked for?
                    yield row
            assert n > 1, "too short for two rows (one is held out), or empty"
        if held_out:
            return

# ---- 3. The language model -----------------------------------------------------------
def load_model(name, device="cpu"):
    """A frozen TransformerBridge, in float32"""
    boot = TransformerBridge.boot_transformers  # any model that transformers can load
    if name == "gelu-1l":
        name = "NeelNanda/GELU_1L512W_C4_Code"
        boot = TransformerBridge.boot_tl_legacy  # a checkpoint of an early TransformerLens
    elif name == "tiny-1l":
        name = str(Path(__file__).parent / "assets" / "tiny-1l")
        assert os.path.isdir(name), f"{name} is missing: give --model gelu-1l, or another"
    with blame(f"--model {name}"):
        return boot(name, device=device).eval().requires_grad_(False)

class Reached(Exception):
    """Ends the forward pass at the hook, for the rest is not needed; carries x out."""

# Needs: torch, Reached.
@torch.no_grad()
def get_activations(model, hook, tokens):
    """tokens [n, seq_len] -> what is at `hook`: [n, seq_len, d_in], float32"""
    def stop(act, **_):  # TransformerLens also passes hook=...
        raise Reached(act)

    try:
        model.run_with_hooks(tokens, fwd_hooks=[(hook, stop)])
        raise ValueError(f"--hook {hook} is not reached by the forward pass")
    except Reached as reached:
        act = reached.args[0]
    fits = act.dim() > 2 and act.shape[:2] == tokens.shape
    assert fits, f"--hook {hook}: {list(act.shape)} is not a vector for each token"
    return act.flatten(2).float()  # attention heads, if any, are concatenated

# ---- 4. The activation buffer --------------------------------------------------------
# Needs: torch, math, islice, rearrange.
class ActivationBuffer:
    """Serves activations [batch_size, d_in] of `rows` in random order, none twice.

    The activations of one text are alike, and a batch should be varied: it is drawn from
    all over the buffer. When half of the buffer has been served, that half is refilled."""

    def __init__(self, activations_of, rows, batch_size, n_batches, device="cpu"):
        self.activations_of = activations_of  # tokens [n, seq_len] -> [n, seq_len, d_in]
        self.rows = rows  # yields lists of tokens [seq_len], BOS first, without end
        self.batch_size = batch_size
        probe = activations_of(torch.tensor([next(rows)], device=device))  # for the shapes
        self.per_row = probe.shape[1] - 1  # BOS is the same in all rows and left out
        self.d_in = probe.shape[2]

        # Nothing in `store` ever moves, since shuffling it would take twice its memory.
        # `order` says in which order its positions are served. If order is 2 0 3 1, and
        # served is 2, then positions 2 and 0 may be overwritten, and 3 is next. At the
        # start all count as served, so that the first next() fills them.
        size = n_batches * batch_size
        self.store = torch.empty(size, self.d_in, dtype=probe.dtype, device=device)
        self.order = torch.arange(size, device=device)
        self.served = size

    @torch.no_grad()
    def refill(self):
        """Overwrites what has been served, and only that, in place; draws a new order."""
        # 64 rows per forward pass, to bound the language model's memory
        for slots in self.order[:self.served].split(64 * self.per_row):
            n_rows = math.ceil(len(slots) / self.per_row)
            tokens = torch.tensor(list(islice(self.rows, n_rows)), device=slots.device)
            act = self.activations_of(tokens)  # [n_rows, seq_len, d_in]
            act = rearrange(act[:, 1:], "row pos d_in -> (row pos) d_in")
            # (The last row may have more tokens than there are slots left.)
            self.store[slots] = act[:len(slots)]
        # Drawn on the CPU, for the same order on every device
        self.order = torch.randperm(len(self.store)).to(self.store.device)
        self.served = 0

    def next(self):
        if self.served >= len(self.order) // 2:
            self.refill()
        slots = self.order[self.served:self.served + self.batch_size]
        self.served += self.batch_size
        return self.store[slots].float()  # [batch, d_in]

# ---- 5. The autoencoder --------------------------------------------------------------
# Needs: torch, F. (Its save and load are in section 9, and need what stands there.)
class SparseAutoencoder(torch.nn.Module):
    """Writes x as a sparse sum of d_sae directions.

        pre   = (x - b_dec) @ W_enc + b_enc          [batch, d_sae]
        f     = pre where pre > threshold, else 0    [batch, d_sae], most of it 0
        x_hat = f @ W_dec + b_dec                    [batch, d_in]

    Row i of W_dec, of length 1, is the direction of feature i; f[:, i] says how much of
    it is in each x. With a threshold of 0 this is the paper's ReLU, and an L1 penalty
    keeps f sparse. With k there is no penalty: the threshold is kept at such a height
    that, on average, k features per token are above it. (BatchTopK, Bussmann et al. 2024,
    has no threshold while it trains: it keeps the k * batch largest of each batch.)"""

    def __init__(self, d_in, d_sae, k=None):
        super().__init__()
        self.d_in = d_in
        self.d_sae = d_sae
        self.k = k
        directions = F.normalize(torch.randn(d_sae, d_in), dim=-1)
        self.W_dec = torch.nn.Parameter(directions)  # [d_sae, d_in]
        # The encoder begins as 0.3 times the decoder, transposed. Then x_hat begins near x:
        # over n random directions d, the sum of (x . d) d is about n / d_in times x; for
        # n = 8 d_in, 8 x. ReLU keeps half of that, 4 x, and 0.3 times that is about x.
        columns = directions.T.contiguous()  # contiguous: safetensors wants it
        self.W_enc = torch.nn.Parameter(0.3 * columns)  # [d_in, d_sae]
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        # Trained here, all thresholds are equal. In a loaded SAE they may differ.
        self.register_buffer("threshold", torch.zeros(d_sae))

    def pre_activations(self, x):
        # b_dec is detached: its gradient through here would cost another product as large
        # as this one. project_gradient adds it more cheaply, so each step must call it.
        return (x - self.b_dec.detach()) @ self.W_enc + self.b_enc  # [..., d_sae]

    def encode(self, x):
        pre = self.pre_activations(x)
        return pre * (pre > self.threshold)  # f [..., d_sae]

    def decode(self, f):
        return f @ self.W_dec + self.b_dec  # x_hat [..., d_in]

    def forward(self, x):
        f = self.encode(x)
        return self.decode(f), f

    def loss(self, x, l1=0.0):
        """x [batch, d_in] -> loss, x_hat [batch, d_in], f [batch, d_sae]. Both terms
        are means over the batch, so l1 means the same at any batch size."""
        x_hat, f = self(x)
        squared_error = (x_hat - x).pow(2).sum(-1).mean()
        sparsity = f.sum(-1).mean()  # the L1 norm: f is never negative
        return squared_error + l1 * sparsity, x_hat, f

    @torch.no_grad()
    def move_threshold(self, x, factor=1.0):
        """Before a training step: finds the threshold above which factor * k features
        per token of x [n, d_in] would fire on average, and moves a tenth of the way to
        it, since one batch is noisy. (factor: 8 at first, later 1; see schedule.)"""
        k = min(self.d_sae, round(factor * self.k))
        pre = self.pre_activations(x).flatten()  # [n * d_sae]
        target = pre.topk(k * len(x)).values[-1]  # the (k * n)-th largest, a scalar
        target = target.clamp(min=0)  # so that f is never negative
        self.threshold += 0.1 * (target - self.threshold)

    # The unit-norm rule. Without it the SAE can cheat the L1 term: halve f, double W_dec,
    # same x_hat. A training step is: project_gradient, optimizer.step, normalize.

    @torch.no_grad()
    def project_gradient(self):
        """Before step(): takes out the part of each row's gradient that could only
        change its length. Left in, it would fill Adam's moments and distort later
        steps. (Also completes the gradient of b_dec.)"""
        # What b_dec's gradient lacks is its part through the encoder. There, b_dec only
        # shifts b_enc: pre = x @ W_enc + (b_enc - b_dec @ W_enc). Hence:
        self.b_dec.grad -= self.W_enc @ self.b_enc.grad  # [d_in]

        along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)  # [d_sae, 1]
        self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def normalize(self):
        """After step(): that changed the lengths, too. (Even a step at a right angle
        would lengthen a row, by Pythagoras.) So all go back to length 1."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-9)  # never by 0

# ---- 6. Training ---------------------------------------------------------------------
# Needs: torch, F.
@torch.no_grad()
def resample(sae, adam, dead, x):
    """The paper's "Neuron Resampling", but a dead feature is pointed at an example's
    error x - x_hat, not at the example, most of which the living features explain.
    dead: [d_sae], bool. x: [n, d_in], some thousands of examples."""
    # Draw examples in proportion to the square of their loss. None is drawn twice:
    # otherwise a few huge losses would give many copies of the same feature.
    error = torch.cat([part - sae(part)[0] for part in x.split(1024)])  # [n, d_in]
    weight = error.pow(2).sum(-1).pow(2) + 1e-30  # [n]; above 0, or multinomial may fail
    assert weight.sum().isfinite(), "the loss is not finite; lower --lr, or --l1"
    revived = dead.nonzero().flatten()[:len(x)]  # [n_revived], no more than len(x)
    drawn = torch.multinomial(weight, len(revived), replacement=False)  # [n_revived]
    direction = F.normalize(error[drawn], dim=-1)  # [n_revived, d_in]

    # Decoder and encoder both point at what was missing. The encoder has 0.2 of the others'
    # mean length, as in the paper; with k it has all of it, or it would not fire.
    length = sae.W_enc[:, ~dead].norm(dim=0).mean().nan_to_num(1.0)  # 1 if all are dead
    if not sae.k:
        length *= 0.2
        sae.threshold[revived] = 0.0  # a loaded SAE may have another
    sae.W_dec[revived] = direction
    sae.W_enc[:, revived] = length * direction.T
    sae.b_enc[revived] = 0.0

    # Adam forgets where the old features were going: its two moments are 0 again.
    for moment in ("exp_avg", "exp_avg_sq"):
        adam.state[sae.W_dec][moment][revived] = 0.0
        adam.state[sae.W_enc][moment][:, revived] = 0.0
        adam.state[sae.b_enc][moment][revived] = 0.0

def schedule(step, steps):
    """The factors for the learning rate, the L1 weight and k at this step"""
    progress = step / steps

    # 1) The rate warms up over a twentieth of the run, because Adam's averages are
    #    unreliable after few gradients (+ 0.01, or step 0 would do nothing). It falls
    #    to 0 over the last fifth.
    warm_up = min(1.0, 20 * progress + 0.01)
    decay = min(1.0, 5 * (1 - progress))
    lr_factor = warm_up * decay

    # 2) At full sparsity from the start, features would die before they have found a use.
    #    So over the first half of the run, L1 grows from 0, and k falls from 8 times its value.
    growth = min(1.0, 2 * progress)
    k_factor = 8 ** (1 - growth)

    # 3) L1 makes f too small even where a feature is right to fire. To undo some of
    #    that, L1 is halved over the last fifth, as decay goes from 1 to 0.
    l1_factor = growth * (1 + decay) / 2

    return lr_factor, l1_factor, k_factor

def train(cfg, sae, buffer):
    """Trains `sae` in place; writes checkpoints and train.jsonl. Returns the steps done."""
    # spread: how far x typically is from its mean. (Median, because a few x are huge.)
    x = buffer.next()  # [batch, d_in]
    spread = (x - x.mean(0)).norm(dim=-1).median().item()
    # x may be constant (then spread is a rounding error), or overflow (nan, inf).
    usable = 1e-5 * x.norm(dim=-1).median() < spread < math.inf
    assert usable, f"--hook {cfg.hook}: its first batch is not finite, or all alike"

    # Adam moves each weight by about lr, however large x is. That suits W_enc and W_dec:
    # if x doubles, they can stay, and f doubles. But biases have to double, too, so their
    # rate is lr times a typical entry of x - mean. With k, W_enc has half the rate: far
    # fewer features die (found by experiment). "scale" is our own key, for the loop.
    bias_scale = spread / sae.d_in ** 0.5
    groups = [{"params": [sae.W_enc], "scale": 0.5 if sae.k else 1.0},
              {"params": [sae.W_dec], "scale": 1.0},
              {"params": [sae.b_enc, sae.b_dec], "scale": bias_scale}]
    # (betas: as in the first replication. fused: faster.)
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)

    # b_dec starts at the mean of x, unless training goes on from another SAE.
    done = 0
    if cfg.resume:
        done = load_checkpoint(cfg, sae, adam, buffer)
    elif not cfg.load:
        sae.b_dec.data = x.mean(0)

    # Defaults, fitted by hand to runs of 600 to 12,000 steps and 2,048 to 8,192
    # features. There is no theory behind them, except for spread in l1: if x is doubled,
    # the squared error is 4 times as large, and f 2 times, so l1 has to be doubled, too.
    stretch = max(1.0, cfg.steps / 1500)  # 1 for short runs
    lr = cfg.lr or 0.27 / (sae.d_sae ** 0.5 * stretch ** (1 / 3))
    l1 = cfg.l1
    if l1 is None:
        l1 = 0.0 if sae.k else 0.07 * spread * stretch ** (1 / 6)
    print(f"peak learning rate {lr:.3g}, L1 weight {l1:.3g}")

    steps_silent = torch.zeros_like(sae.b_enc)  # [d_sae], since a feature last fired
    patience = max(10, cfg.steps // 20)  # steps of silence until dead; we look as often

    log = open(Path(cfg.out, "train.jsonl"), "a" if cfg.resume else "w", buffering=1)
    bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps)
    try:
        for step in bar:

            # The batch, and the learning rates, L1 weight and k of this step.
            x = buffer.next()  # [batch, d_in]
            lr_factor, l1_factor, k_factor = schedule(step, cfg.steps)
            for group in adam.param_groups:
                group["lr"] = lr * lr_factor * group["scale"]
            if sae.k:
                sae.move_threshold(x[:128], k_factor)  # 128 tokens are enough

            # Forward and backward.
            loss, x_hat, f = sae.loss(x, l1 * l1_factor)
            loss.backward()

            # The unit-norm rule: project, step, normalize. In this order.
            sae.project_gradient()
            adam.step()
            sae.normalize()
            adam.zero_grad()

            # ---- The step is done. Below: revive dead features, log, save. ----

            done = step + 1
            steps_silent += 1
            steps_silent[f.amax(dim=0) > 0] = 0  # those that fired in this batch
            dead = steps_silent >= patience  # [d_sae]
            # Dead features are revived, and at the next look again, if they still do not
            # fire. Not near the end, though: learning takes time.
            if done % patience == 0 and done < 0.85 * cfg.steps and dead.any():
                resample(sae, adam, dead, torch.cat([buffer.next() for _ in range(8)]))

            if done % 25 == 0 or done in (1, cfg.steps):
                fvu = (x_hat - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
                entry = dict(step=done, loss=loss.item(), l0=(f > 0).sum().item() / len(x),
                             fvu=fvu.item(), silent=dead.float().mean().item())
                print(json.dumps(entry), file=log)
                bar.set_postfix(entry)

            if done % cfg.save_every == 0 and done < cfg.steps:
                save_checkpoint(cfg, sae, adam, done)
    except KeyboardInterrupt:  # what has been trained so far is saved, measured, shown
        if done == 0:
            raise
        sae.normalize()  # Ctrl-C may have come between step and normalize
    save_checkpoint(cfg, sae, adam, done)
    return done

# ---- 7. Evaluation -------------------------------------------------------------------
# Needs: torch, F, tqdm.
@torch.no_grad()
def cross_entropy(model, hook, rows, replace):
    """The model's loss on rows [n, seq_len], in nats per token, with replace(act) in
    place of the activations at `hook`: act [n, seq_len - 1, d_in], float32, without BOS"""
    def splice(whole, **_):  # TransformerLens also passes hook=...
        bos, old = whole[:, :1], whole[:, 1:]
        new = replace(old.flatten(2).float())  # heads, if any, are concatenated
        return torch.cat([bos, new.view_as(old).to(whole.dtype)], dim=1)

    total = 0.0
    for tokens in tqdm(rows.split(16), "evaluating", leave=False):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, splice)])
        logits = logits[:, :-1].flatten(0, 1).float()  # [n_tokens, d_vocab]
        following = tokens[:, 1:].flatten()  # [n_tokens]
        total += F.cross_entropy(logits, following, reduction="sum").item()
    return total / rows[:, 1:].numel()

# Needs: torch, math, get_activations, cross_entropy.
@torch.no_grad()
def evaluate(model, hook, sae, rows):
    """rows [n, seq_len], held out -> metrics, and how often each feature fires [d_sae],
    as a share of the tokens. BOS is left out of l0, fvu and dead, and never replaced."""
    x = torch.cat([get_activations(model, hook, part)[:, 1:] for part in rows.split(16)])
    x = x.flatten(0, 1)  # [n_tokens, d_in]
    mean = x.mean(0)  # [d_in]
    error = 0.0
    fired = 0  # becomes [d_sae]: on how many tokens
    for part in x.split(2048):
        x_hat, f = sae(part)  # [n, d_in], [n, d_sae]
        error += (x_hat - part).pow(2).sum()
        fired += (f > 0).sum(0)

    ce = cross_entropy(model, hook, rows, lambda act: act)  # nothing replaced
    ce_sae = cross_entropy(model, hook, rows, lambda act: sae(act)[0])
    ce_zero = cross_entropy(model, hook, rows, torch.zeros_like)
    ce_mean = cross_entropy(model, hook, rows, lambda act: mean.expand_as(act))
    recovered = math.nan  # if zeros are as good as x, there is nothing to win back
    if ce_zero - ce > 0.01:
        recovered = (ce_zero - ce_sae) / (ce_zero - ce)
    fvu = error / (x - mean).pow(2).sum()  # 1 for an x_hat that is always the mean
    dead = (fired == 0).float().mean()  # fired on none of these tokens
    l0 = fired.sum() / len(x)
    metrics = dict(loss_recovered=recovered, ce=ce, ce_sae=ce_sae, ce_zero=ce_zero,
                   ce_mean=ce_mean, l0=l0.item(), fvu=fvu.item(), dead=dead.item())
    return metrics, fired / len(x)  # [d_sae]

# ---- 8. Looking: what features fire on, and what they do -----------------------------
def visible(tokenizer, tokens):
    """Tokens as strings, with · for a space and ↵ for a newline. A character that takes
    several tokens (語, an emoji) is shown by the last of them; the others show "…"."""
    strings = []
    pending = []  # tokens of a character that is not complete
    for token in tokens:
        pending.append(int(token))
        # (EOS in front, then off: some tokenizers drop a space at the very start.)
        text = tokenizer.decode([tokenizer.eos_token_id, *pending])
        text = text.removeprefix(tokenizer.eos_token)
        # While a character is incomplete, its text ends in \ufffd. Then wait for more,
        # up to four tokens, since a character has at most four bytes.
        if text.endswith("\ufffd") and len(pending) < 4:
            strings.append("…")
        else:
            text = text.replace(" ", "·").replace("\n", "↵")
            # What does not print is escaped: a tab is \t.
            strings.append("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
            pending = []
    return strings

def logit_effect(model, hook, direction):
    """Which tokens a feature makes more likely (the "logit lens"): puts what
    `direction` [d_in] writes into the residual stream, and nothing else, through the
    final norm and the unembedding. Returns logits [d_vocab], of which only the order
    means anything, or None for hooks for which that is not worked out here."""
    in_stream = ("resid_pre", "resid_mid", "resid_post", "_mlp_out", "_attn_out")
    if hook.endswith("mlp.hook_post"):
        block = model.blocks[int(hook.split(".")[1])]
        if hasattr(block, "ln2_post"):  # Gemma has a norm between MLP and stream
            return None
        direction = direction @ block.mlp.W_out  # [d_model], by W_out [d_mlp, d_model]
    elif not hook.endswith(in_stream):
        return None
    # Minus the logits of a zero vector, which are what the biases alone would give
    both = torch.stack([direction, torch.zeros_like(direction)])  # [2, d_model]
    logits = model.unembed(model.ln_final(both))  # [2, d_vocab]
    return logits[0] - logits[1]

def example(strings, f):
    """The text around the token on which f [seq_len] is largest, tinted by f."""
    peak, place = f.max(dim=0)
    line = Text(f"{peak:7.2f}  ")
    start = max(1, int(place) - 12)  # 0 is BOS
    for string, value in zip(strings[start:start + 20], f[start:start + 20]):
        tint = 255 - int(150 * (value / peak))  # a larger f is a deeper orange
        style = f"#000000 on rgb(255,{tint},{tint // 2})" if value > 0 else ""
        line.append(string, style)
    return line

@torch.no_grad()
def report(cfg, model, sae, rows, metrics, frequency):
    """Metrics, densities, features: first as a page in cfg.out, then on the terminal."""
    # Prints nothing yet. It records, for the two exports at the end.
    page = Console(file=StringIO(), record=True, width=min(100, Console().width),
                   highlight=False, markup=False, emoji=False)
    size = f"{sae.d_sae} features, {metrics['steps']} steps"
    page.print(f"{cfg.model}, {cfg.hook}, {cfg.dataset}: {size}", style="bold")
    for name, value in metrics.items():
        page.print(f"{name:>14}  {round(value, 4)}")
    norms = sae.W_dec.norm(dim=-1)
    page.print(f" decoder norms  {norms.min():.7f} to {norms.max():.7f}\n")

    # The paper's histogram of feature densities, from 1e-5 to 1: four bars for each
    # factor of ten.
    page.print("How many features fire on what share of tokens (left: where a bar begins)")
    exponents = frequency[frequency > 0].log10()
    counts = exponents.histc(20, min=-5, max=0).int().tolist()
    for i, n in enumerate(counts):
        bar = "█" * round(56 * n / max(1, *counts))
        page.print(f"{10 ** (i / 4 - 5):14.4%}  {bar} {n}")

    # By default about twenty features, evenly from rare (2e-4 of the tokens) to frequent.
    order = [i for i in frequency.argsort().tolist() if frequency[i] >= 2e-4]
    chosen = cfg.features or order[::max(1, len(order) // 20)]
    acts = (get_activations(model, cfg.hook, part) for part in rows.split(16))
    f = torch.cat([sae.encode(act)[..., chosen] for act in acts])  # [n, seq_len, chosen]
    f[:, 0] = 0.0  # BOS
    for i, f_i in zip(chosen, f.unbind(-1)):  # f_i [n, seq_len]
        most = f_i.max().abs()  # abs: 0.00 and not -0.00
        head = f"\nfeature {i}: on {frequency[i]:.3%} of tokens, up to {most:.2f}"
        page.print(head, style="bold")
        effect = logit_effect(model, cfg.hook, sae.W_dec[i])
        if effect is not None:
            for word, sign in ("up", 1), ("down", -1):
                top = (sign * effect).topk(8).indices
                tokens = [visible(model.tokenizer, [token])[0] for token in top]
                line = f"{word:>7}  {'  '.join(tokens)}"
                page.print(line, no_wrap=True, overflow="ellipsis")

        # Its five strongest rows.
        for row in f_i.amax(dim=1).argsort(descending=True)[:5]:
            if f_i[row].max() > 0:
                line = example(visible(model.tokenizer, rows[row]), f_i[row])
                page.print(line, no_wrap=True, overflow="ellipsis")

    text = page.export_html(clear=False)
    text = text.replace("<head>", f"<head><title>SAE of {cfg.hook}</title>", 1)
    Path(cfg.out, "report.html").write_text(text, encoding="utf-8")
    print(page.export_text(styles=sys.stdout.isatty()))

# ---- 9. Saving, loading, checks: skip it on a first reading --------------------------
def write(path, save):
    """Calls save on a temporary file, and renames that: after a crash, or on a full
    disk, the old file is still there."""
    part = Path(f"{path}.part")
    with blame(path):
        save(part)
        os.replace(part, path)

# SAELens can do more to x than subtract b_dec. These keys say: nothing more is done.
PLAIN = dict(normalize_activations="none", reshape_activations="none",
             apply_b_dec_to_input=True)

# save_sae and load_sae become methods of SparseAutoencoder, below. They stand here so
# that section 5 holds the mathematics alone.

def save_sae(sae, folder, **metadata):
    """Writes a folder that SAELens can also read: SAE.load_from_disk(folder)"""
    cfg = dict(  # the keys that SAELens wants
        architecture="jumprelu",  # its name for an SAE with thresholds
        d_in=sae.d_in, d_sae=sae.d_sae, k=sae.k, dtype="float32", device="cpu", **PLAIN,
        metadata=dict(sae_lens_version="6.0.0", **metadata))  # the format's version
    weights = sae.state_dict()
    if not sae.threshold.any():  # a plain ReLU
        cfg["architecture"] = "standard"
        del weights["threshold"]
    Path(folder).mkdir(parents=True, exist_ok=True)
    data = to_bytes(weights)  # (save_file makes files that only their owner may read)
    write(f"{folder}/sae_weights.safetensors", lambda part: part.write_bytes(data))
    write(f"{folder}/cfg.json", lambda part: part.write_text(json.dumps(cfg)))

@torch.no_grad()
def load_sae(cls, source):
    """source: run1, run2, a folder that this file or SAELens saved, or a .pt state dict"""
    with blame(f"--load {source}"):
        cfg = {}
        if os.path.isdir(source):
            cfg = json.loads(Path(source, "cfg.json").read_text())
            weights = load_file(Path(source, "sae_weights.safetensors"))
        else:
            if source in PUBLISHED:
                source = hf_hub_download("NeelNanda/sparse_autoencoder", PUBLISHED[source])
            weights = torch.load(source, map_location="cpu", weights_only=True)

        # An SAE that does anything else would be computed wrongly here, so it is
        # refused. (A missing key counts as the value that is wanted here.)
        others = dict(rescale_acts_by_decoder_norm=False, activation_fn_str="relu")
        for name, value in dict(PLAIN, **others).items():
            found = cfg.get(name, value)
            assert found in (None, value), f"{name} {found} is not read here; try SAELens"
        architecture = cfg.get("architecture", "standard")
        known = architecture in ("standard", "jumprelu")
        assert known, f"architecture {architecture} is not read here; try SAELens"

        d_in, d_sae = weights["W_enc"].shape
        sae = cls(d_in, d_sae, cfg.get("k"))
        weights.setdefault("threshold", sae.threshold)  # a ReLU SAE has none: 0
        sae.load_state_dict(weights)
        sae.threshold.clamp_(min=0)  # in SAELens, one below 0 acts like 0

        # SAELens allows rows of W_dec of any length. Here row i is divided by its length, and
        # f[i] multiplied by it (through W_enc, b_enc and threshold): the same x_hat.
        length = sae.W_dec.norm(dim=-1)  # [d_sae]
        for weight in (sae.W_enc, sae.b_enc, sae.threshold):
            weight *= length  # column i of W_enc by length[i]
        sae.normalize()
        return sae

SparseAutoencoder.save = save_sae
SparseAutoencoder.load = classmethod(load_sae)

def save_checkpoint(cfg, sae, adam, done):
    finite = all(p.isfinite().all() for p in sae.parameters())
    assert finite, f"step {done}: weights are not finite; lower --lr, or --l1"
    sae.save(cfg.out, model_name=cfg.model, hook_name=cfg.hook, dataset_path=cfg.dataset)
    flags = [cfg.model, cfg.hook, sae.k]
    state = dict(sae=sae.state_dict(), adam=adam.state_dict(), done=done, flags=flags)
    write(f"{cfg.out}/resume.pt", lambda part: torch.save(state, part))

def load_checkpoint(cfg, sae, adam, buffer):
    with blame(f"--resume: {cfg.out}"):
        state = torch.load(Path(cfg.out, "resume.pt"), sae.b_enc.device, weights_only=True)
        flags = [cfg.model, cfg.hook, sae.k]
        assert state["flags"] == flags, f"it is of {state['flags']}, not of {flags}"
        sae.load_state_dict(state["sae"])
        adam.load_state_dict(state["adam"])
    # Skip about as many rows as the interrupted run used. (About: resample used more. And
    # train has filled the buffer already, with the first rows: they come twice.)
    used = state["done"] * cfg.batch_size // buffer.per_row
    for _ in tqdm(range(used), "skipping old rows"):
        next(buffer.rows)
    return state["done"]

def check_model(cfg, model, rows):
    near = get_close_matches(cfg.hook, model.hook_dict, n=3, cutoff=0)
    assert cfg.hook in model.hook_dict, f"--hook {cfg.hook}: no such hook, but {near}"
    assert cfg.seq_len <= model.cfg.n_ctx, f"--seq-len: at most {model.cfg.n_ctx}"
    known = 0 <= rows.min() and rows.max() < model.cfg.d_vocab
    assert known, f"--dataset {cfg.dataset}: its tokens are not those of {cfg.model}"

def check_sae(cfg, sae, d_in):
    for name, wanted in dict(d_in=d_in, d_sae=cfg.d_sae, k=cfg.k).items():
        found = getattr(sae, name)
        fits = wanted in (None, found)  # None: not asked for
        assert fits, f"the SAE has {name} {found}, not {wanted}"
    assert not (sae.k and cfg.l1), f"--l1 {cfg.l1}: with k there is no L1 term"
    known = all(0 <= i < sae.d_sae for i in cfg.features)
    assert known, f"--features {cfg.features}: there are 0 to {sae.d_sae - 1}"

# ---- 10. All of it, in order ---------------------------------------------------------
def run(cfg):
    assert "RANK" not in os.environ, "it trains in one process: start it without torchrun"
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    torch.manual_seed(cfg.seed)
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = cfg.device or str(best)
    with blame(f"--device {device}"):
        torch.zeros(1, device=device)  # fails if there is no such device
    Path(cfg.out).mkdir(parents=True, exist_ok=True)

    # The language model, and the rows that are held out.
    model = load_model(cfg.model, device)
    set_aside = token_rows(cfg.dataset, model.tokenizer, cfg.seq_len, held_out=True)
    rows = torch.tensor(list(islice(set_aside, cfg.held_out)), device=device)  # [n, seq_len]
    check_model(cfg, model, rows)

    # A buffer of activations of the other rows, and the autoencoder.
    stream = token_rows(cfg.dataset, model.tokenizer, cfg.seq_len)
    buffer = ActivationBuffer(lambda tokens: get_activations(model, cfg.hook, tokens),
                              stream, cfg.batch_size, cfg.buffer, device)
    if cfg.load:
        sae = SparseAutoencoder.load(cfg.load)
    else:
        sae = SparseAutoencoder(buffer.d_in, cfg.d_sae or 8 * buffer.d_in, cfg.k)
    check_sae(cfg, sae, buffer.d_in)
    sae.to(device)

    # Train it, measure it, look at it.
    done = 0
    if cfg.steps:
        done = train(cfg, sae, buffer)
    else:
        sae.save(cfg.out, model_name=cfg.model, hook_name=cfg.hook)  # in SAELens's format
    metrics, frequency = evaluate(model, cfg.hook, sae, rows)
    metrics.update(steps=done, tokens=done * cfg.batch_size)
    Path(cfg.out, "metrics.json").write_text(json.dumps(metrics, indent=1))
    report(cfg, model, sae, rows, metrics, frequency)

def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # where there is no █, print ?
    try:
        run(tyro.cli(Config, args=argv, description=__doc__.split("\n")[0]))
    except (AssertionError, OSError, ValueError, torch.OutOfMemoryError) as error:
        print("sae.py:", *str(error).split(), file=sys.stderr)  # on one line
        sys.exit(2)

if __name__ == "__main__":
    main()
