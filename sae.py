"""sae.py: train a sparse autoencoder (SAE) on a language model's activations.

After "Towards Monosemanticity" (Bricken et al. 2023) and its first open replication,
Neel Nanda's 1L-Sparse-Autoencoder. `python sae.py --steps 1000` explains the MLP of
tiny-1l, a small transformer that comes along. After three minutes on two CPU cores:

    loss_recovered 0.9772   ce 3.137   ce_sae 3.271   ce_zero 9.001   ce_mean 7.915
    l0 43.63   fvu 0.1307   dead 0.0005   decoder norms 0.9999999 to 1.0000001

`python sae.py --model gelu-1l --steps 100000`: the first replication's model and data.

The sections follow the data, from top to bottom. 4 to 6 are the SAE: what people copy. The
others feed it, measure it and keep it: 1 Config, 2 Data, 3 Language model, [4 Activation
buffer, 5 Autoencoder, 6 Training], 7 Evaluation, 8 Looking, 9 Plumbing (to be skipped on a
first reading), main.
"""

import glob
import json
import math
import os
import sys
import sysconfig
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from io import StringIO
from itertools import islice
from pathlib import Path
from time import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from datasets import IterableDataset, load_dataset
from einops import rearrange
from huggingface_hub import hf_hub_download
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

def require(condition, message):
    """For errors that a user can put right: main() prints the message, no traceback."""
    if not condition:
        raise ValueError(message)

PUBLISHED = {"run1": "25.pt", "run2": "47.pt"}  # NeelNanda/sparse_autoencoder on the Hub

# torchrun starts this file several times and tells each process which of how many it
# is. Each reads rows of its own; `average` and `share` (section 9) keep the SAEs the same.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# ---- 1. Config: every field is a flag, and the comment behind it is its help ---------

@dataclass
class Config:
    model: str = "tiny-1l"  # tiny-1l, gelu-1l, a model on the Hub, or a folder
    hook: str = "blocks.0.mlp.hook_post"  # which activations, in TransformerLens's words
    dataset: str | None = None  # stdlib, file, folder, 'glob*', NAME[:SUBSET[:SPLIT]]
    seq_len: int = 128  # tokens in a row of data, BOS included
    held_out: int = 384  # rows that are not trained on, for evaluation and report

    d_sae: int | None = None  # number of features; by default 8 x d_in, the paper's A/1
    l1: float | None = None  # weight of the L1 term; by default it follows x's length
    k: int | None = None  # features per token, on average: BatchTopK, in place of L1

    steps: int = 1000  # training steps; 0 only measures what --load names
    batch_size: int | None = None  # activations a step; by default 4096 (tiny-1l: 1024)
    lr: float | None = None  # peak learning rate; by default it follows d_sae and steps
    buffer: int = 64  # batches in the activation buffer (first replication: 384)
    seed: int = 0  # of the first weights and of the order of the activations
    device: str | None = None  # cpu, cuda, cuda:1, mps; by default the fastest there is

    out: str | None = None  # folder for what is written; by default runs/MODEL/HOOK
    save_every: int | None = None  # steps between saves; by default steps / 20, >= 500
    resume: bool = False  # go on from what --out holds; give the same flags again
    load: str | None = None  # begin with this SAE: run1, run2, a folder or a .pt file
    features: tuple[int, ...] = ()  # which to report, as in 12 34 56; by default twenty

    def __post_init__(self):
        least = {"steps": 0, "l1": 0, "seed": 0, "seq_len": 2, "buffer": 2}
        for name, value in vars(self).items():
            if type(value) in (int, float):
                in_range = least.get(name, 1e-9) <= value < math.inf  # False for nan
                require(in_range, f"--{name.replace('_', '-')} cannot be {value}")
        require(not self.k or self.l1 is None, "--k stands in for --l1: give one")
        if self.steps == 0:
            only_load = self.load and not (self.k or self.l1 or self.lr or self.resume)
            require(only_load, "--steps 0 only measures: it needs --load, and none of --k, "
                    "--l1, --lr, --resume")

        # Defaults that follow from something else.
        if self.load in PUBLISHED and self.model == "tiny-1l":
            self.model = "gelu-1l"
        usual = {"tiny-1l": "stdlib", "gelu-1l": "NeelNanda/c4-code-tokenized-2b"}
        self.dataset = self.dataset or usual.get(self.model, "monology/pile-uncopyrighted")
        self.batch_size = self.batch_size or (1024 if self.model == "tiny-1l" else 4096)
        self.save_every = self.save_every or max(500, self.steps // 20)
        if self.out is None:
            name = self.model
            if self.load:
                name = f"from-{self.load}"
            self.out = f"runs/{name.replace('/', '-')}/{self.hook}"
            if self.k:
                self.out += f"-k{self.k}"

# ---- 2. Data: text, or ready-made tokens, to rows of tokens --------------------------

TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

def loader_of(file):
    """Which of datasets' loaders reads it (a.jsonl.zst is a .jsonl); None: it is text."""
    return next((TABLES[end] for end in Path(file).suffixes if end in TABLES), None)

def read_files(files):
    """Yields the examples that a file holds, or the file as one text."""
    for file in files:
        try:
            if loader_of(file):
                name = glob.escape(file)  # or a [1] in it would be a pattern
                splits = load_dataset(loader_of(file), data_files=name, streaming=True)
                yield from splits["train"]
            else:
                yield {"text": Path(file).read_text(encoding="utf-8", errors="replace")}
        except Exception as error:  # which of 5,000 files was it?
            raise ValueError(f"{file}: {error}") from error

def open_dataset(name):
    """A stream of examples (dicts): from files, or from the Hub. See Config.dataset."""
    path = os.path.expanduser(name)
    if name == "stdlib":  # the source of Python's own library, which everybody has
        path = sysconfig.get_path("stdlib") + "/*.py"
    elif os.path.isdir(path):
        path = glob.escape(path) + "/**"
    elif os.path.isfile(path):
        path = glob.escape(path)
    files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not files:
        name, subset, split = (name + "::").split(":")[:3]  # "" if unsaid
        return load_dataset(name, subset or None, split=split or "train", streaming=True)
    files = list(filter(loader_of, files)) or files  # a README beside tables is not data
    return IterableDataset.from_generator(read_files, gen_kwargs={"files": files})

def all_rows(dataset, tokenizer, seq_len):
    """Yields rows of tokens, lists [seq_len] that begin with BOS, in the same order always.

    Texts follow one another, with EOS between them. Ready-made tokens are cut as in the
    first replication: 1,024 into 8 x 128, BOS in the place of each piece's first token."""
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    require(eos is not None, "the tokenizer has no EOS")
    packed = deque()
    for example in open_dataset(dataset).shuffle(seed=0, buffer_size=1000):
        text = example.get("text")
        tokens = example.get("tokens", example.get("input_ids"))
        if isinstance(text, str):
            # Text that *writes* <|endoftext|> must not become that token: split it.
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            packed.extend(ids["input_ids"] + [eos])
            while len(packed) >= seq_len - 1:
                yield [bos] + [packed.popleft() for _ in range(seq_len - 1)]
        elif isinstance(tokens, list):
            for i in range(0, len(tokens) - seq_len + 1, seq_len):
                yield [bos] + tokens[i + 1:i + seq_len]
        else:  # an empty example is passed over
            found = {"text", "tokens", "input_ids"}.intersection(example)
            require(found, f"no column text or tokens, but {list(example)}")

# Needs: all_rows, and what that needs.
def token_rows(dataset, tokenizer, seq_len=128, held_out=False, part=0, parts=1):
    """Yields rows to train on, without end. Or those held out, every 32nd, each once.

    Rows come in groups of 32: one is held out, 31 are for one of the processes."""
    while True:
        found = False
        try:
            for n, row in enumerate(all_rows(dataset, tokenizer, seq_len)):
                if held_out:
                    wanted = n % 32 == 0
                else:
                    wanted = n % 32 > 0 and n // 32 % parts == part
                if wanted:
                    found = True
                    yield row
        except Exception as error:  # of many kinds: files, the network, their libraries
            raise ValueError(f"--dataset {dataset}: {error}") from error
        if held_out:
            return
        require(found, f"--dataset {dataset}: too short to make rows of, or empty")

# ---- 3. The language model -----------------------------------------------------------

def load_model(name, device="cpu"):
    """A frozen TransformerBridge. On a GPU in bfloat16: half the memory, and faster."""
    dtype = torch.float32
    if "cuda" in str(device):
        dtype = torch.bfloat16
    boot = TransformerBridge.boot_transformers
    if name == "gelu-1l":
        name = "NeelNanda/GELU_1L512W_C4_Code"
        boot = TransformerBridge.boot_tl_legacy  # from an early TransformerLens
    elif name == "tiny-1l":
        name = str(Path(__file__).parent / "assets" / "tiny-1l")
        require(os.path.isdir(name), f"{name} is missing: give --model gelu-1l, or another")
    return boot(name, device=device, dtype=dtype).eval().requires_grad_(False)

class Reached(Exception):
    """Carries the activations at a hook out of the forward pass, and so ends it."""

# Needs: torch, Reached.
@torch.no_grad()
def get_activations(model, hook, tokens):
    """tokens [rows, seq_len] -> what is at `hook`: [rows, seq_len, d_in], float32"""
    def stop(act, hook):
        raise Reached(act)  # caught just below: the layers above are never computed

    try:
        model.run_with_hooks(tokens, fwd_hooks=[(hook, stop)])
        raise ValueError(f"--hook {hook} is not reached by the forward pass")
    except Reached as reached:
        act = reached.args[0]
    if act.shape[:2] != tokens.shape:
        raise ValueError(f"--hook {hook}: {list(act.shape)} is not a vector for each token")
    return act.flatten(2).float()  # the heads of attention, if any, stand side by side

# ---- 4. The activation buffer --------------------------------------------------------

# Needs: torch, math, islice, rearrange.
class ActivationBuffer:
    """Serves activations [batch_size, d_in] in random order, each of them once.

    Those of one text are alike, and a gradient wants variety: a batch is drawn from all
    over the buffer. Whenever half of it has been served, that half is filled anew.

    get_activations: from tokens [rows, seq_len] to activations [rows, seq_len, d_in]
    rows: yields rows of tokens, lists [seq_len] with BOS first, without end"""

    def __init__(self, get_activations, rows, batch_size, n_batches, device="cpu"):
        self.get_activations = get_activations
        self.rows = rows
        self.batch_size = batch_size
        probe = get_activations(torch.tensor([next(rows)], device=device))
        self.per_row = probe.shape[1] - 1  # BOS is the same in all rows: it stays out
        self.d_in = probe.shape[2]
        self.rows_at_once = 16  # suits a CPU's cache
        dtype = torch.float32
        if probe.is_cuda:
            self.rows_at_once = 128
            dtype = torch.bfloat16

        # Nothing in `store` ever moves: to shuffle it would take its memory twice. Instead
        # `order` is shuffled, the order of serving. Its first `served` entries have been
        # served and may be overwritten: to begin with, all of them.
        size = n_batches * batch_size
        self.store = torch.empty(size, self.d_in, dtype=dtype, device=device)
        self.order = torch.arange(size, device=device)  # [size]
        self.served = size

    @torch.no_grad()
    def refill(self):
        """Overwrites what has been served, and only that, in place; draws a new order."""
        for slots in self.order[:self.served].split(self.rows_at_once * self.per_row):
            n_rows = math.ceil(len(slots) / self.per_row)
            tokens = torch.tensor(list(islice(self.rows, n_rows)), device=slots.device)
            act = self.get_activations(tokens)  # [rows, seq_len, d_in]
            act = rearrange(act[:, 1:], "row pos d_in -> (row pos) d_in")
            self.store[slots] = act[:len(slots)].to(self.store.dtype)  # the last row is cut
        self.order = torch.randperm(len(self.store)).to(self.order.device)
        self.served = 0

    def next(self):
        if self.served > len(self.order) // 2:
            self.refill()
        slots = self.order[self.served:self.served + self.batch_size]
        self.served += self.batch_size
        return self.store[slots].float()  # [batch, d_in]

# ---- 5. The autoencoder --------------------------------------------------------------

# Needs: torch, F. (save and load are in section 9, with what they need.)
class SparseAutoencoder(torch.nn.Module):
    """Writes x as a sum of a few out of d_sae directions.

        pre   = (x - b_dec) @ W_enc + b_enc          [batch, d_sae]
        f     = pre where pre > threshold, else 0    [batch, d_sae], most of it 0
        x_hat = f @ W_dec + b_dec                    [batch, d_in]

    Row i of W_dec, of length 1, is the direction of feature i; f[i] is how much of it is
    in x. With a threshold of 0 this is the paper's ReLU, and an L1 penalty keeps f sparse.
    With k, the threshold rises until only k features per token pass it, on average:
    BatchTopK (Bussmann et al. 2024), trained with the threshold that it is used with."""

    def __init__(self, d_in, d_sae, k=None):
        super().__init__()
        self.d_in = d_in
        self.d_sae = d_sae
        self.k = k
        directions = F.normalize(torch.randn(d_sae, d_in), dim=-1)
        self.W_dec = torch.nn.Parameter(directions)  # [d_sae, d_in]
        # A feature begins by reading what it writes. Half of them fire at first: at 0.3,
        # and with 8 features for each of x's numbers, they add up to about x.
        self.W_enc = torch.nn.Parameter(0.3 * directions.T.contiguous())  # [d_in, d_sae]
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))  # here all of them the same

    def pre_activations(self, x):
        # The value is (x - b_dec) @ W_enc + b_enc. Only the way back differs: the gradient
        # of b_dec is taken through `zero`, one vector whose value is 0, and not through the
        # [batch, d_in] matrix x - b_dec. That saves one of six large matrix products.
        b_dec = self.b_dec.detach()
        zero = (b_dec - self.b_dec) @ self.W_enc  # [d_sae]
        pre = (x - b_dec) @ self.W_enc  # [..., d_sae]
        pre += self.b_enc + zero  # in place: it is the largest matrix of a step
        return pre

    def encode(self, x):
        pre = self.pre_activations(x)
        return pre.masked_fill(pre <= self.threshold, 0.0)  # f [..., d_sae]

    def decode(self, f):
        return f @ self.W_dec + self.b_dec  # x_hat [..., d_in]

    def forward(self, x):
        f = self.encode(x)
        return self.decode(f), f

    def loss(self, x, l1=0.0):
        """For training: x [batch, d_in] -> loss, x_hat [batch, d_in], f [batch, d_sae]

        Both terms are means over the batch, so l1 means the same at any batch size. (The
        first replication sums the second: its 3e-4 at batch 4,096 is 1.23 here.)"""
        x_hat, f = self(x)
        squared_error = (x_hat - x).pow(2).sum(-1).mean()
        sparsity = f.sum(-1).mean()  # the L1 norm: f is never negative
        return squared_error + l1 * sparsity, x_hat, f

    @torch.no_grad()
    def move_threshold(self, x, k):
        """Towards the value that k features per token of x [n, d_in] pass; by a tenth, for
        one batch is noisy."""
        pre = self.pre_activations(x).flatten()  # [n * d_sae]
        largest = pre.topk(k * len(x)).values  # [k * n]
        self.threshold.lerp_(largest[-1].clamp(min=0), 0.1)

    # The unit-norm rule. Without it the SAE can cheat the L1 term: halve f, double W_dec,
    # same x_hat. A training step is: project_gradient, optimizer.step, normalize.

    @torch.no_grad()
    def project_gradient(self):
        """Before step(): takes out the part of each row's gradient that could only change
        the row's length. Left in, it would fill Adam's averages and bend later steps."""
        along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)  # [d_sae, 1]
        self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def normalize(self):
        """After step(): a step at a right angle to a row lengthens it (Pythagoras), so all
        rows are brought back to length 1. The first replication lacked this half,
        then had it before step(): all that was evaluated or saved was one step off."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def move_lengths_to_encoder(self):
        """Once, where training goes on from rows that are not of length 1 (SAELens): makes
        them so and leaves x_hat as it is. normalize() alone would change it."""
        length = self.W_dec.norm(dim=-1).clamp(min=1e-9)  # [d_sae]
        self.W_dec /= length[:, None]
        for tensor in (self.W_enc, self.b_enc, self.threshold):
            tensor *= length

# ---- 6. Training ---------------------------------------------------------------------

# Needs: torch, F.
@torch.no_grad()
def resample(sae, adam, dead, x):
    """Points the dead features ([d_sae], bool) at what the others fail on: the paper's
    "Neuron Resampling", but at the residual of an example and not at the example itself.
    x [n, d_in]: some thousands of examples."""

    # Draw examples by the square of their loss. None weighs more than 100 typical ones: a
    # few tokens of a residual stream are huge, and all features would be copies of those.
    error = torch.cat([part - sae(part)[0] for part in x.split(1024)])  # [n, d_in]
    weight = error.pow(2).sum(-1).pow(2)  # [n]
    weight = weight.clamp(max=100 * weight.median()) + 1e-30
    drawn = torch.multinomial(weight, int(dead.sum()), replacement=True)
    direction = F.normalize(error[drawn], dim=-1)  # [n_dead, d_in]

    # A feature writes what was missing, and reads what it writes. Its encoder is short,
    # 0.2 of the others' mean length (the paper's), but with k it has to pass a threshold.
    length = 0.2
    if sae.k:
        length = 1.0
    if not dead.all():
        length *= sae.W_enc[:, ~dead].norm(dim=0).mean()
    sae.W_dec[dead] = direction
    sae.W_enc[:, dead] = length * direction.T
    sae.b_enc[dead] = 0.0

    # Adam forgets where the old features were going.
    for moment in ("exp_avg", "exp_avg_sq"):
        adam.state[sae.W_dec][moment][dead] = 0.0
        adam.state[sae.W_enc][moment][:, dead] = 0.0
        adam.state[sae.b_enc][moment][dead] = 0.0

def schedule(step, steps):
    """The factors of the learning rate, of the L1 weight and of k at this step."""
    done = step / steps

    # 1) Warm-up over a twentieth of the run, of the rate (Adam's averages are of few
    #    gradients yet) and of L1 (at first every feature fires).
    warm_up = min(1.0, 20 * done + 0.01)

    # 2) Over the last fifth the rate falls to 0, and the weights settle. L1 falls to a
    #    half: it shrinks all f a bit, and now they recover.
    decay = min(1.0, 5 * (1 - done))

    # 3) k begins at 8 times its value and is down to it by half of the run: features that
    #    would not have been among the k largest find a use first, and few of them die.
    more = 8 ** max(0.0, 1 - 2 * done)

    return warm_up * decay, warm_up * (1 + decay) / 2, more

def train(cfg, sae, buffer):
    """Trains `sae` in place, with checkpoints and train.jsonl in cfg.out -> steps done"""
    weights = {"params": [sae.W_enc, sae.W_dec]}
    biases = {"params": [sae.b_enc, sae.b_dec]}
    adam = torch.optim.Adam([weights, biases], betas=(0.9, 0.99), fused=True)
    if cfg.resume:
        done, length, silent = load_checkpoint(cfg, sae, adam)
        n_rows = done * cfg.batch_size // buffer.per_row
        for _ in tqdm(range(n_rows), "passing over old rows", disable=RANK > 0):
            next(buffer.rows)
    else:
        done = 0
        silent = torch.zeros_like(sae.b_enc)  # [d_sae], steps since a feature fired
        x = share(buffer.next())  # [batch, d_in]
        length = (x - x.mean(0)).norm(dim=-1).median().item()  # typical: some are huge
        usable = 1e-5 * x.norm(dim=-1).median() < length < math.inf
        require(usable, f"--hook {cfg.hook}: its first batch is not finite, or all alike")
        if cfg.load:
            sae.move_lengths_to_encoder()
        else:
            sae.b_dec.data = x.mean(0)

    # Found by trial: the best rate falls with the number of features and, in long runs,
    # with their length; to end at the same L0, L1 then has to rise. (README: how well tried.)
    longer = max(1.0, cfg.steps / 1500)
    lr = cfg.lr or 0.27 / sae.d_sae ** 0.5 / longer ** (1 / 3)
    l1 = 0.07 * length * longer ** (1 / 5) if cfg.l1 is None else cfg.l1
    if sae.k:
        l1 = 0.0
    patience = max(10, cfg.steps // 20)  # a feature that is silent for so long is dead
    loss = torch.tensor(math.nan)  # until there is one, nothing is saved
    log = open(Path(cfg.out, "train.jsonl"), "a" if cfg.resume else "w", buffering=1)
    bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, disable=RANK > 0)
    try:
        for step in bar:

            # The rates, L1 weight and number of features of this step. Weights are pure
            # numbers, but biases are in units of x, and so is their rate.
            lr_factor, l1_factor, k_factor = schedule(step, cfg.steps)
            adam.param_groups[0]["lr"] = lr * lr_factor
            adam.param_groups[1]["lr"] = lr * lr_factor * length / sae.d_in ** 0.5
            x = buffer.next()  # [batch, d_in]
            if sae.k:
                k = min(sae.d_sae, round(sae.k * k_factor))
                sae.move_threshold(x[:128], k)  # 128 tokens are enough for an estimate

            # Forward and backward.
            loss, x_hat, f = sae.loss(x, l1 * l1_factor)
            loss.backward()
            average(sae)  # over the processes of torchrun, where there are several

            # The unit-norm rule: project, step, normalize. In this order.
            sae.project_gradient()
            adam.step()
            sae.normalize()
            fired = sae.b_enc.grad != 0  # [d_sae], in any of the processes
            silent = torch.where(fired, 0, silent + 1)
            adam.zero_grad()
            done = step + 1

            # ---- The SAE is trained. What follows revives dead features, logs, saves. ----

            dead = silent >= patience  # [d_sae]
            if done % patience == 0 and done < 0.85 * cfg.steps and dead.any():
                resample(sae, adam, dead, torch.cat([buffer.next() for _ in range(8)]))
                share(*sae.parameters())

            if RANK == 0 and (step % 25 == 0 or done == cfg.steps):
                error = (x_hat - x).pow(2).sum()
                variance = (x - x.mean(0)).pow(2).sum()
                row = dict(loss=loss.item(), l0=(f > 0).sum().item() / len(x),
                           fvu=(error / variance).item(), dead=dead.float().mean().item())
                log.write(json.dumps({"step": done, **row}) + "\n")
                bar.set_postfix(row)
                require(row["loss"] < math.inf, f"step {done}: {row}: lower --lr, or --l1")

            if RANK == 0 and done % cfg.save_every == 0 and loss.isfinite():
                save_checkpoint(cfg, sae, adam, done, length, silent)
    except KeyboardInterrupt:
        pass  # what there is is saved, measured and shown
    finally:  # saved, too, where an error ends the run: a file that cannot be read, say
        sae.normalize()  # Ctrl-C may have come between step and normalize
        if RANK == 0 and done > 0 and loss.isfinite():
            save_checkpoint(cfg, sae, adam, done, length, silent)
    return done

# ---- 7. Evaluation -------------------------------------------------------------------

# Needs: torch, F, tqdm, get_activations.
@torch.no_grad()
def evaluate(model, hook, sae, rows):
    """rows [n, seq_len], none of them trained on -> metrics, and how often each feature
    fires [d_sae], as a share of the tokens. BOS does not count, and is left as it is."""

    def cross_entropy(what, replace):
        """Nats per token, with replace(x) in the place of x [rows, pos, d_in]"""
        def splice(act, hook):
            x = act[:, 1:]
            new = replace(x.flatten(2).float())
            return torch.cat([act[:, :1], new.view_as(x).to(act.dtype)], dim=1)

        total = 0.0
        for tokens in tqdm(rows.split(16), f"evaluating {what}", leave=False):
            logits = model.run_with_hooks(tokens, fwd_hooks=[(hook, splice)])
            logits = logits[:, :-1].flatten(0, 1).float()  # [n_tokens, d_vocab]
            following = tokens[:, 1:].flatten()  # [n_tokens]
            total += F.cross_entropy(logits, following, reduction="sum").item()
        return total / rows[:, 1:].numel()

    acts = [get_activations(model, hook, tokens)[:, 1:] for tokens in rows.split(16)]
    x = torch.cat(acts).flatten(0, 1)  # [n_tokens, d_in]
    mean = x.mean(0)
    error = fired = 0
    for part in x.split(2048):
        x_hat, f = sae(part)  # [2048, d_in], [2048, d_sae]
        error += (x_hat - part).pow(2).sum()
        fired += (f > 0).sum(0)  # [d_sae]

    ce = cross_entropy("the model", lambda x: x)
    ce_sae = cross_entropy("the SAE", lambda x: sae(x)[0])
    ce_zero = cross_entropy("zeros", lambda x: torch.zeros_like(x))
    ce_mean = cross_entropy("the mean", lambda x: mean.expand_as(x))
    recovered = None  # if the model predicts no better with x than with zeros
    if ce_zero - ce > 0.01:
        recovered = (ce_zero - ce_sae) / (ce_zero - ce)
    fvu = error / (x - mean).pow(2).sum()  # 1 for an x_hat that is always the mean
    dead = (fired == 0).float().mean()
    metrics = dict(loss_recovered=recovered, ce=ce, ce_sae=ce_sae, ce_zero=ce_zero,
                   ce_mean=ce_mean, l0=fired.sum().item() / len(x), fvu=fvu.item(),
                   dead=dead.item())
    return metrics, fired / len(x)  # [d_sae]

# ---- 8. Looking: what features fire on, and what they do -----------------------------

def visible(tokenizer, tokens):
    """Tokens as strings in which spaces are seen. Where a character (語, an emoji) is
    several tokens long, the last one shows it, and the ones before show as "…"."""
    strings = []
    begun = []
    for token in tokens:
        begun.append(int(token))
        text = tokenizer.decode(begun)
        if text.endswith("\ufffd") and len(begun) < 4:  # a character has 4 bytes at most
            text = "…"
        else:
            begun = []
        text = text.replace(" ", "·").replace("\n", "↵")
        strings.append("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text))
    return strings

def logit_effect(model, hook, direction):
    """What adding `direction` [d_in] at `hook` does to the logits [d_vocab] on the direct
    path, up to the scale of the last LayerNorm. None where there is no such path."""
    if hook.endswith("mlp.hook_post"):
        layer = int(hook.split(".")[1])
        direction = direction @ model.blocks[layer].mlp.W_out.float()  # [d_model]
    elif "resid" not in hook:
        return None
    both = torch.stack([direction, 0 * direction]).to(model.cfg.dtype)
    logits = model.unembed(model.ln_final(both)).float()  # [2, d_vocab]
    return logits[0] - logits[1]  # without what the biases do

@torch.no_grad()
def report(model, hook, sae, rows, metrics, frequency, title, path, chosen=()):
    """Metrics, densities, features: first as a page at `path`, then on the terminal."""
    width = min(100, Console().width)
    page = Console(file=StringIO(), record=True, width=width, highlight=False, markup=False,
                   emoji=False)
    page.print(title, style="bold")
    for name, value in metrics.items():
        shown = "nothing to recover" if value is None else round(value, 4)
        page.print(f"{name:>14}  {shown}")
    norms = sae.W_dec.norm(dim=-1)
    page.print(f" decoder norms  {norms.min():.7f} to {norms.max():.7f}\n")

    # The paper's histogram of feature densities: four bars to a power of ten.
    page.print("How many features fire on this share of the tokens, and up to the next")
    exponents = frequency[frequency > 0].log10().clamp(min=-5)
    counts = exponents.histc(20, min=-5, max=0).int().tolist()
    for i, count in enumerate(counts):
        bar = "█" * round(60 * count / max(1, *counts))
        page.print(f"{10 ** (i / 4 - 5):14.4%}  {bar} {count}")

    # By default twenty features, evenly from rare to frequent, that fired ten times.
    if not chosen:
        often = frequency.argsort()[(frequency * rows[:, 1:].numel() < 9.5).sum():]
        spread = torch.linspace(0, len(often) - 1, min(20, len(often))).long()
        chosen = often[spread].tolist()
    acts = [get_activations(model, hook, part) for part in rows.split(16)]
    f = torch.cat([sae.encode(act)[..., chosen] for act in acts])  # [n, seq_len, chosen]
    f[:, 0] = 0.0  # BOS
    for i, f_i in zip(chosen, f.unbind(-1)):  # f_i [n, seq_len]
        head = f"\nfeature {i}: on {frequency[i]:.3%} of tokens, up to {f_i.max():.2f}"
        page.print(head, style="bold")
        effect = logit_effect(model, hook, sae.W_dec[i])
        if effect is not None:
            for word, top in ("up", effect.topk(8)), ("down", (-effect).topk(8)):
                tokens = [visible(model.tokenizer, [token])[0] for token in top.indices]
                page.print(f"{word:>7}  {'  '.join(tokens)}")

        # The five rows in which it is strongest, around the place where it is.
        peaks, places = f_i.max(dim=1)  # [n] each
        for row in peaks.topk(min(5, int((peaks > 0).sum()))).indices:
            strings = visible(model.tokenizer, rows[row])
            line = Text(f"{peaks[row]:7.2f}  ")
            start = max(1, int(places[row]) - 12)
            for pos in range(start, min(start + 20, len(strings))):
                level = f_i[row, pos] / peaks[row]
                tint = 255 - int(150 * level)  # black on it: for light and dark windows
                style = ""
                if level > 0:
                    style = f"#000000 on rgb(255,{tint},{tint // 2})"
                line.append(strings[pos], style)
            page.print(line, no_wrap=True, overflow="ellipsis")

    text = page.export_html(clear=False)
    text = text.replace("<head>", f"<head><title>SAE of {hook}</title>", 1)
    Path(path).write_text(text, encoding="utf-8")
    print(page.export_text(styles=sys.stdout.isatty()))

# ---- 9. Plumbing, to be skipped at first: what is kept, and several processes --------

def write(path, save, thing):
    """All or nothing: after a crash, or on a full disk, the old file is still there."""
    part = f"{path}.part{os.getpid()}"  # of this run, should two write into one folder
    try:
        save(thing, part)
    except Exception as error:  # torch and safetensors have their own for a full disk
        raise OSError(f"{path}: not written: {error}") from error
    os.replace(part, path)

def save_sae(sae, folder, **metadata):
    """Writes a folder that SAELens reads, too: SAE.load_from_disk(folder)"""
    cfg = dict(
        architecture="jumprelu", d_in=sae.d_in, d_sae=sae.d_sae, dtype="float32",
        device="cpu", apply_b_dec_to_input=True, normalize_activations="none",
        reshape_activations="none",
        k=sae.k, metadata=dict(sae_lens_version="6.0.0", **metadata))
    weights = sae.state_dict()
    if not sae.threshold.any():  # a plain ReLU
        cfg["architecture"] = "standard"
        del weights["threshold"]
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "cfg.json").write_text(json.dumps(cfg))
    write(Path(folder, "sae_weights.safetensors"), save_file, weights)

# What SAELens may say of an SAE. Where it says something else, numbers would be wrong.
COMPUTED = dict(
    normalize_activations="none", reshape_activations="none", apply_b_dec_to_input=True,
    rescale_acts_by_decoder_norm=False, finetuning_scaling_factor=False,
    activation_fn="relu", activation_fn_str="relu")

def load_sae(cls, source):
    """From run1 or run2 (published), a folder of ours or SAELens's, a .pt state dict."""
    try:
        path, cfg = Path(source), {}
        if source in PUBLISHED:
            path = hf_hub_download("NeelNanda/sparse_autoencoder", PUBLISHED[source])
        if os.path.isdir(path):
            cfg = json.loads((path / "cfg.json").read_text())
            weights = load_file(path / "sae_weights.safetensors")
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        kind = cfg.get("architecture", "standard")
        require(kind in ("standard", "jumprelu"), f"{kind} is not read, only standard and "
                "jumprelu (as which SAELens saves a trained batchtopk)")
        for name, value in COMPUTED.items():
            said = cfg.get(name, value)
            require(said in (value, None), f"{name} {said} is not computed here")
        sae = cls(*weights["W_enc"].shape, cfg.get("k"))
        weights.setdefault("threshold", torch.zeros(sae.d_sae))
        sae.load_state_dict(weights)
        sae.threshold.clamp_(min=0)  # for SAELens has a ReLU before its threshold
    except Exception as error:
        raise ValueError(f"--load {source}: {type(error).__name__}: {error}") from error
    return sae

SparseAutoencoder.save = save_sae
SparseAutoencoder.load = classmethod(load_sae)

def save_checkpoint(cfg, sae, adam, done, length, silent):
    sae.save(cfg.out, model_name=cfg.model, hook_name=cfg.hook, dataset_path=cfg.dataset)
    state = dict(cfg=vars(cfg), sae=sae.state_dict(), adam=adam.state_dict(), done=done,
                 length=length, silent=silent)
    write(Path(cfg.out, "resume.pt"), torch.save, state)

MAY_CHANGE = "resume", "out", "device", "features", "save_every", "buffer", "held_out"

def load_checkpoint(cfg, sae, adam):
    box = [None]  # process 0 reads the file, which others may not have, and sends it
    if RANK == 0:
        box[0] = torch.load(Path(cfg.out, "resume.pt"), "cpu", weights_only=True)
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box)
    state = box[0]
    for name, before in state["cfg"].items():
        same = name in MAY_CHANGE or before == getattr(cfg, name)
        require(same, f"--resume: the run in {cfg.out} has --{name} {before}")
    sae.load_state_dict(state["sae"])
    adam.load_state_dict(state["adam"])
    tqdm.write(f"{state['done']} of {cfg.steps} steps are done", file=sys.stderr)
    return state["done"], state["length"], state["silent"].to(sae.b_enc.device)

def start(device):
    """-> the device of this process, once it has met the others."""
    if WORLD_SIZE > 1:
        dist.init_process_group(timeout=timedelta(hours=9))  # one may download for long
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # "cuda" is this one
    elif WORLD_SIZE > 1:
        best = "cpu"  # the processes of a Mac cannot average on its one GPU
    try:
        return str(torch.zeros(1, device=device or best).device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: it is not there; use {best}") from error

def share(*tensors):
    for tensor in tensors:
        if WORLD_SIZE > 1:
            dist.broadcast(tensor.data, 0)
    return tensors[0]

def average(sae):
    for tensor in [p.grad for p in sae.parameters()] + [sae.threshold]:
        if WORLD_SIZE > 1:
            dist.all_reduce(tensor, dist.ReduceOp.AVG)

# ---- All of it, in order -------------------------------------------------------------

def run(cfg):
    began = time()
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    torch.manual_seed(cfg.seed)
    device = start(cfg.device)
    other = not cfg.load or Path(cfg.out).resolve() != Path(cfg.load).resolve()
    require(other, f"--out {cfg.out} is what --load reads: give another folder")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)

    # The language model, and what has to fit it.
    model = load_model(cfg.model, device)
    near = get_close_matches(cfg.hook, list(model.hook_dict), n=3, cutoff=0)
    require(cfg.hook in model.hook_dict, f"--hook {cfg.hook}: not there; {near} are")
    most = model.cfg.n_ctx
    require(cfg.seq_len <= most, f"--seq-len {cfg.seq_len}: {cfg.model} reads {most} tokens")

    # The rows that are held out, and a buffer of activations of the others.
    data = (cfg.dataset, model.tokenizer, cfg.seq_len)
    rows = list(islice(token_rows(*data, held_out=True), cfg.held_out))
    require(rows, f"--dataset {cfg.dataset}: too short to make rows of, or empty")
    rows = torch.tensor(rows, device=device)  # [held_out, seq_len]
    known = rows.max() < model.cfg.d_vocab
    require(known, f"--dataset {cfg.dataset}: its tokens are not those of {cfg.model}")
    stream = token_rows(*data, part=RANK, parts=WORLD_SIZE)
    buffer = ActivationBuffer(lambda tokens: get_activations(model, cfg.hook, tokens),
                              stream, cfg.batch_size, cfg.buffer, device)

    # The autoencoder.
    if cfg.load:
        sae = SparseAutoencoder.load(cfg.load)
        if cfg.k or cfg.l1 is not None:
            sae.k = cfg.k  # it goes on in the way that is asked for
    else:
        sae = SparseAutoencoder(buffer.d_in, cfg.d_sae or 8 * buffer.d_in, cfg.k)
    size = f"the SAE has d_in {sae.d_in}, d_sae {sae.d_sae}; the hook has d_in {buffer.d_in}"
    require(sae.d_in == buffer.d_in and cfg.d_sae in (None, sae.d_sae), size)
    require((sae.k or 0) <= sae.d_sae, f"--k {sae.k}: {size}")
    for i in cfg.features:
        require(0 <= i < sae.d_sae, f"--features {i}: they are 0 to {sae.d_sae - 1}")

    sae.to(device)
    done = 0
    if cfg.steps:
        done = train(cfg, sae, buffer)
    elif RANK == 0:
        sae.save(cfg.out, model_name=cfg.model, hook_name=cfg.hook)
    if RANK == 0:
        metrics, frequency = evaluate(model, cfg.hook, sae, rows)
        tokens = done * cfg.batch_size * WORLD_SIZE
        metrics.update(steps=done, tokens=tokens, seconds=time() - began)
        Path(cfg.out, "metrics.json").write_text(json.dumps(metrics, indent=1))
        title = f"{cfg.model}, {cfg.hook}, {cfg.dataset}: {sae.d_sae} features, {done} steps"
        path = Path(cfg.out, "report.html")
        report(model, cfg.hook, sae, rows, metrics, frequency, title, path, cfg.features)

def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that it cannot print
    try:
        run(tyro.cli(Config, args=argv, description=__doc__.split("\n")[0]))
    except (OSError, ValueError) as error:  # what a user can put right
        print("sae.py:", *str(error).split(), file=sys.stderr)  # on one line
        sys.exit(2)
    except KeyboardInterrupt:  # not in the training steps: nothing to save
        sys.exit("sae.py: stopped")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
