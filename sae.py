"""sae.py: train a sparse autoencoder (SAE) on a language model's activations.

The activations x at one place in a model (for each token a vector of length d_in) are
written as a weighted sum of a few out of many directions, the features:

    f     = relu((x - b_dec) @ W_enc + b_enc)    how much of each feature is in x: mostly 0
    x_hat = f @ W_dec + b_dec                    close to x; W_dec's rows are the directions

After "Towards Monosemanticity" (Bricken et al. 2023) and its first open replication, Neel
Nanda's 1L-Sparse-Autoencoder. `python sae.py --steps 1000` reads a million tokens of Python
through tiny-1l, the small transformer beside this file, and finds 4,096 features in the
activations of its 512 MLP neurons, in three minutes on two CPU cores. On held-out text it gets

    loss_recovered  0.9738    1: the model predicts as well from x_hat as from x; 0: as from zeros
    l0              35.9      how many features fire (are above 0) on a token, on average
    fvu             0.1431    fraction of x's variance unexplained, that is, missing in x_hat
    dead            0.0007    the fraction of features that never fire on that text

Text becomes rows of tokens (section 1), and the model turns these into x (2). Shuffled batches
of x (3) train the autoencoder (4, 5). It is measured (6), and its features are shown (7).
"""
import argparse
import io
import json
import math
import sys
import sysconfig
from glob import escape, glob
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from einops import rearrange
from huggingface_hub import hf_hub_download
from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

# ---- 1. Data: rows of tokens ---------------------------------------------------------
def open_dataset(name):
    """A stream of texts. name: "stdlib" (the source of Python's own library), a pattern of
    files ("books/*.txt"; also .jsonl, .csv, .parquet), or NAME[:SUBSET] on Hugging Face's Hub"""
    if name == "stdlib":
        name = sysconfig.get_path("stdlib") + "/*.py"
    # (escape: load_dataset would take a name with [ or * in it for a pattern)
    files = [escape(file) for file in sorted(glob(name, recursive=True))]
    if not files:  # then it is a name on the Hub, perhaps with a subset
        return load_dataset(*name.split(":"), split="train", streaming=True)

    # Either each file is one text, or all are tables with a text in each row.
    endings = {"".join(Path(file.lower()).suffixes) for file in files}  # ".jsonl.gz" has json in it
    for kind in ("json", "csv", "parquet"):
        if all(kind in ending for ending in endings):
            return load_dataset(kind, data_files=files, split="train", streaming=True)
        if any(kind in ending for ending in endings):
            raise ValueError(f"--dataset {name}: files of several kinds, {endings}")
    return load_dataset("text", data_files=files, split="train", streaming=True,
                        sample_by="document")  # a whole file is one text

def all_tokens(dataset, tokenizer):
    """Yields the tokens of all texts, EOS after each text: the same sequence at each call."""
    for example in open_dataset(dataset).shuffle(seed=0, buffer_size=1000):
        if "text" in example:
            # split_special_tokens: a "<|endoftext|>" in the text is ordinary text, not an EOS.
            yield from tokenizer(example["text"] or "", add_special_tokens=False,
                                 split_special_tokens=True)["input_ids"]
        elif "tokens" in example:  # already tokenized; a BOS is dropped: token_rows adds one
            yield from (t for t in example["tokens"] if t != tokenizer.bos_token_id)
        else:
            raise ValueError(f"--dataset {dataset}: no text or tokens, but {list(example)}")
        yield tokenizer.eos_token_id

def token_rows(dataset, tokenizer, seq_len):
    """Joins all texts and cuts them into rows: lists of BOS and seq_len - 1 tokens"""
    tokens = all_tokens(dataset, tokenizer)
    while True:
        row = [tokenizer.bos_token_id, *islice(tokens, seq_len - 1)]
        if len(row) < seq_len:
            return  # the end of the data; less than a row is left
        yield row

def split_rows(dataset, tokenizer, seq_len=128, n_held_out=384):
    """Rows 0, 32, 64, ... are never trained on. Returns the first n_held_out of these, a tensor
    [n_held_out, seq_len], and a generator of all other rows, pass after pass."""
    held_out = list(islice(token_rows(dataset, tokenizer, seq_len), 0, 32 * n_held_out, 32))
    if len(held_out) < 2:  # (with one row in all, training_rows would loop forever)
        raise ValueError(f"--dataset {dataset}: it has fewer than 33 rows of tokens")

    def training_rows():
        while True:
            rows = enumerate(token_rows(dataset, tokenizer, seq_len))  # the same in each pass
            yield from (row for n, row in rows if n % 32 != 0)
    return torch.tensor(held_out), training_rows()

# ---- 2. The language model and its activations ---------------------------------------
def load_model(name, device="cpu"):
    """tiny-1l, gelu-1l, or a model that transformers can load, wrapped by TransformerLens, which
    puts a hook at each activation: a function of ours may read or replace it there."""
    if name == "tiny-1l":
        name = str(Path(__file__).parent / "assets" / "tiny-1l")
    if name == "gelu-1l":  # stored in TransformerLens's own format
        model = TransformerBridge.boot_tl_legacy("NeelNanda/GELU_1L512W_C4_Code", device=device)
    else:
        model = TransformerBridge.boot_transformers(name, device=device)
    return model.eval().requires_grad_(False)

@torch.no_grad()
def get_activations(model, hook_name, tokens):
    """tokens [n, seq_len] -> x, what the model computes at the hook: [n, seq_len, d_in]"""
    def stop(act, hook):
        raise StopAtLayerException(act)  # run_with_hooks catches it, and returns act
    act = model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(hook_name, stop)])
    if act is None or act.shape[:2] != tokens.shape:  # (None: it never got there)
        raise ValueError(f"--hook {hook_name}: it does not give one vector for each token")
    return act.flatten(2).float()  # (attention heads, if any, are concatenated)

# ---- 3. The activation buffer --------------------------------------------------------
class ActivationBuffer:
    """Serves batches of x [batch_size, d_in] that are mixed from many texts, since those of one
    text are alike. Each x is served once; when half is served, new ones overwrite that half."""

    def __init__(self, get_x, rows, batch_size, n_batches=64, device="cpu"):
        self.get_x = get_x  # tokens [n, seq_len] -> x [n, seq_len, d_in]
        self.rows = rows  # yields rows of tokens, without end
        self.batch_size = batch_size
        first = get_x(torch.tensor([next(rows)], device=device))  # for its shape
        self.per_row = first.shape[1] - 1  # without BOS: nothing precedes it, so its x never varies
        # Nothing in `store` ever moves, since shuffling it would need twice its memory.
        # Instead, `order` says in which order its places are served. If order is 3 0 2 1 and
        # served is 2, places 3 and 0 may be overwritten, and place 2 comes next.
        self.store = torch.empty(n_batches * batch_size, first.shape[2], device=device)
        self.order = torch.arange(len(self.store), device=device)
        self.served = len(self.store)  # all, so that the first next_batch fills it

    @torch.no_grad()
    def refill(self):
        # Overwrites what has been served: 8,192 places at a time, to bound the model's memory.
        for places in self.order[:self.served].split(8192):
            n_rows = math.ceil(len(places) / self.per_row)
            tokens = torch.tensor(list(islice(self.rows, n_rows)), device=places.device)
            x = rearrange(self.get_x(tokens)[:, 1:], "row pos d_in -> (row pos) d_in")
            self.store[places] = x[:len(places)]  # (the last row may be cut)
        self.order = torch.randperm(len(self.store), device=places.device)  # mixes old and new
        self.served = 0

    def next_batch(self):
        if self.served >= len(self.store) // 2:
            self.refill()
        places = self.order[self.served:self.served + self.batch_size]
        self.served += self.batch_size
        return self.store[places]  # [batch, d_in]

# ---- 4. The autoencoder --------------------------------------------------------------
class SparseAutoencoder(torch.nn.Module):
    """Writes x as a sparse sum of d_sae directions.

        pre   = (x - b_dec) @ W_enc + b_enc          [batch, d_sae]
        f     = pre where pre > threshold, else 0    [batch, d_sae], most of it 0
        x_hat = f @ W_dec + b_dec                    [batch, d_in]

    Row i of W_dec, of norm 1, is the direction of feature i; f[:, i] says how much of it is in
    each x. Two ways keep f sparse. As in the paper: the threshold is 0, which makes this a ReLU,
    and the loss has an L1 penalty. Or, with --k: no penalty, but move_threshold keeps the threshold
    so high that on average k features a token exceed it (like BatchTopK, Bussmann et al. 2024)."""

    def __init__(self, d_in, d_sae):
        super().__init__()
        self.W_dec = torch.nn.Parameter(F.normalize(torch.randn(d_sae, d_in), dim=-1))
        # The encoder begins as the decoder, transposed, times 0.3: then x_hat begins about as large
        # as x. (Over all rows, (x @ row) * row adds up to d_sae / d_in, or 8, times x; half fire.)
        self.W_enc = torch.nn.Parameter(0.3 * self.W_dec.data.T.contiguous())
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))  # all equal, but load may scale each

    def pre_activations(self, x):
        # Multiplied out: the gradient of x - b_dec would be one more product as large as x @ W_enc.
        return x @ self.W_enc + (self.b_enc - self.b_dec @ self.W_enc)  # [..., d_sae]

    def encode(self, x):
        pre = self.pre_activations(x)
        return pre * (pre > self.threshold)  # f [..., d_sae]

    def decode(self, f):
        return f @ self.W_dec + self.b_dec  # x_hat [..., d_in]

    def forward(self, x):
        f = self.encode(x)
        return self.decode(f), f

    def loss(self, x, l1=0.0):
        """x [batch, d_in] -> loss, x_hat, f. Both terms are means over x's tokens."""
        x_hat, f = self(x)
        squared_error = (x_hat - x).pow(2).sum(-1).mean()
        sparsity = f.sum(-1).mean()  # the L1 norm, since f is never negative
        return squared_error + l1 * sparsity, x_hat, f

    @torch.no_grad()
    def move_threshold(self, x, k):
        """Moves the threshold a tenth of the way (one batch is noisy) towards the (k n)-th largest
        of all pre of x [n, d_in]: above it are k features a token, on average."""
        pre = self.pre_activations(x).flatten()
        highest = pre.topk(min(round(k * len(x)), len(pre))).values
        self.threshold += 0.1 * (highest[-1].clamp(min=0) - self.threshold)  # (f stays >= 0)

    # The unit-norm rule. Without it the SAE can cheat the L1 penalty: halve f, double W_dec,
    # same x_hat. A training step is project_gradient, optimizer.step, normalize.

    @torch.no_grad()
    def project_gradient(self):
        """Before the step: takes out the part of each row's gradient that could only change
        its length. Left in, it would fill Adam's averages, and distort later steps."""
        along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)  # [d_sae, 1]
        self.W_dec.grad -= along * self.W_dec

    def normalize(self):
        """After the step: brings the rows back to length 1, since even a step at a right angle
        lengthens a row, by Pythagoras. (The first replication left this out.)"""
        self.W_dec.data = F.normalize(self.W_dec.data, dim=-1)

    @classmethod
    @torch.no_grad()
    def load(cls, source):
        """source: a state_dict's file, or run1 or run2, the first replication's SAEs of gelu-1l"""
        if source in ("run1", "run2"):
            file = {"run1": "25.pt", "run2": "47.pt"}[source]
            source = hf_hub_download("NeelNanda/sparse_autoencoder", file)
        weights = torch.load(source, map_location="cpu")
        sae = cls(*weights["W_enc"].shape)
        sae.load_state_dict({"threshold": sae.threshold, **weights})  # (run1, run2 have none: 0)
        # Rows of W_dec come to length 1; pre, and so f, takes over the old one: x_hat is the same.
        length = sae.W_dec.norm(dim=-1)  # [d_sae]
        for weight in (sae.W_enc, sae.b_enc, sae.threshold):
            weight *= length
        sae.normalize()
        return sae

# ---- 5. Training ---------------------------------------------------------------------
def train(sae, next_batch, steps, lr=None, l1=0.07, k=None, save=lambda: None):
    """Trains `sae` in place. next_batch() -> x [batch, d_in]; save() is called some 20 times."""
    # spread: how far x typically is from its mean. (A median, since on a few tokens x is huge.)
    # If x doubles, so do f and the best biases: hence spread, per entry of x, in the biases' rate.
    # The squared error would be 4 times as large, the L1 norm only twice: so spread multiplies l1.
    x = next_batch()
    spread = (x - x.mean(0)).norm(dim=-1).median().item()
    if not sae.b_dec.any():  # a new SAE
        sae.b_dec.data = x.mean(0)

    # 0.37 / sqrt(d_sae), and less beyond 600 steps: form and numbers come from experiments.
    lr = lr or 0.37 / len(sae.b_enc) ** 0.5 / max(1, steps / 600) ** (1 / 3)
    adam = torch.optim.Adam([
        {"params": [sae.W_enc], "lr": 0.7 * lr if k else lr},  # (so fewer features die)
        {"params": [sae.W_dec], "lr": lr},
        {"params": [sae.b_enc, sae.b_dec], "lr": lr * spread / x.shape[1] ** 0.5},
    ], betas=(0.9, 0.99), eps=1e-16, fused=True)  # (eps: 1e-8 is too much if x is small)
    # The rates warm up over the first twentieth of the run, and fall to 0 over the last third.
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda done: min(1, 20 * (done + 1) / steps, 3 * (1 - done / steps)))
    look_every = max(10, steps // 20)  # steps between two looks for dead features
    dead = torch.ones_like(sae.b_enc, dtype=torch.bool)  # [d_sae]: not fired since the last look
    bar = tqdm(range(1, steps + 1))
    for step in bar:
        # Over the first half of the run l1 grows from 0, or k falls from 8 times its value. If few
        # features could fire from the start, the others would die before they find a use.
        ramp = min(1, 2 * step / steps)

        x = next_batch()  # [batch, d_in]
        if k:
            sae.move_threshold(x[:128], k * 8 ** (1 - ramp))  # (128 tokens are enough)
        loss, x_hat, f = sae.loss(x, 0.0 if k else l1 * spread * ramp)
        loss.backward()

        # The unit-norm rule, in this order.
        sae.project_gradient()
        adam.step()
        sae.normalize()
        adam.zero_grad()
        scheduler.step()

        # ---- The step is done. Now and then: show figures, revive dead features, save. ----
        dead &= ~(f > 0).any(dim=0)
        if step % look_every == 0 or step == steps:
            fvu = (x_hat - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
            l0 = (f > 0).sum() / len(x)
            bar.set_postfix(fvu=fvu.item(), l0=l0.item(), dead=dead.float().mean().item())
            if dead.any() and step < 0.85 * steps:  # after that, too little time to learn
                resample(sae, adam, dead, torch.cat([next_batch() for _ in range(8)]))
            dead[:] = True
            save()

@torch.no_grad()
def resample(sae, adam, dead, x):
    """The paper's neuron resampling: dead features (dead [d_sae], bool) start anew, each pointed at
    the SAE's error on an example of its own in x [n, d_in]. (The paper: at the example itself.)"""
    error = torch.cat([part - sae(part)[0] for part in x.split(1024)])  # [n, d_in]
    odds = error.pow(2).sum(-1).pow(2) + 1e-30  # [n]: squared error, squared; 0 cannot be drawn
    revived = dead.nonzero().flatten()[:len(x)]  # [n_revived], at most n
    drawn = torch.multinomial(odds, len(revived))  # [n_revived], no example twice
    direction = F.normalize(error[drawn], dim=-1)  # [n_revived, d_in]
    # A direction within 45 degrees of one drawn before is dropped: its feature stays dead. (Where
    # x is huge, errors are alike, and ten copies would add the error ten times: training diverges.)
    is_new = (direction @ direction.T).tril(-1).amax(dim=1) < 0.7  # [n_revived], bool
    revived, drawn, direction = revived[is_new], drawn[is_new], direction[is_new]
    # Encoder and decoder both point there; the encoder's length is a fifth of the mean, as in the
    # paper. With this b_enc, pre > threshold where (x - b_dec) @ direction > error's length / 4.
    # (With the paper's 0, the feature fires on half of all tokens, with k on few: soon it is dead.)
    length = 0.2 * sae.W_enc.norm(dim=0).mean()
    sae.W_dec[revived] = direction
    sae.W_enc[:, revived] = length * direction.T
    sae.b_enc[revived] = sae.threshold[revived] - length * error[drawn].norm(dim=-1) / 4
    # Adam's averages start anew: the gradients' at 0, their squares' at a typical value (a mean of
    # roots: outliers count less). At 0, steps are too long: Adam mends that at a run's start alone.
    for weight, place in ((sae.W_dec, revived), (sae.W_enc, (..., revived)), (sae.b_enc, revived)):
        adam.state[weight]["exp_avg"][place] = 0.0
        squared = adam.state[weight]["exp_avg_sq"]
        squared[place] = squared.sqrt().mean() ** 2

# ---- 6. Evaluation -------------------------------------------------------------------
def cross_entropy(model, hook_name, rows, replace):
    """The model's loss on rows [n, seq_len], in nats per token, with replace(x) in place of
    the activations x [n, seq_len - 1, d_in] at the hook. BOS keeps its own."""
    def splice(act, hook):
        x = act[:, 1:]
        x_hat = replace(x.flatten(2).float()).view_as(x).to(x)  # (heads joined, then parted)
        return torch.cat([act[:, :1], x_hat], dim=1)
    total = 0.0
    for part in tqdm(rows.split(4), "evaluating", leave=False):
        loss = model.run_with_hooks(part, return_type="loss", fwd_hooks=[(hook_name, splice)])
        total += loss.item() * len(part)
    return total / len(rows)

@torch.no_grad()
def evaluate(model, hook_name, sae, rows):
    """rows [n, seq_len], held out -> metrics, and how often each feature fires [d_sae]"""
    ce = cross_entropy(model, hook_name, rows, lambda x: x)
    ce_sae = cross_entropy(model, hook_name, rows, lambda x: sae(x)[0])
    ce_zero = cross_entropy(model, hook_name, rows, torch.zeros_like)
    acts = torch.cat([get_activations(model, hook_name, part) for part in rows.split(4)])
    x = rearrange(acts[:, 1:], "row pos d_in -> (row pos) d_in")
    error, fired = 0.0, 0  # fired becomes [d_sae]: on how many tokens each fires
    for part in x.split(2048):
        x_hat, f = sae(part)
        error += (x_hat - part).pow(2).sum().item()
        fired += (f > 0).sum(0)
    metrics = {
        "loss_recovered": (ce_zero - ce_sae) / (ce_zero - ce or math.nan),  # nan if ce_zero = ce
        "ce": ce, "ce_sae": ce_sae, "ce_zero": ce_zero,
        "l0": fired.sum().item() / len(x),
        "fvu": error / (x - x.mean(0)).pow(2).sum().item(),
        "dead": (fired == 0).float().mean().item(),
    }
    return metrics, fired / len(x)

# ---- 7. Looking ----------------------------------------------------------------------
@torch.no_grad()
def report(model, hook_name, sae, rows, metrics, frequency, page):
    """Prints metrics and up to twenty features, from rare to frequent, each with the five rows
    in which it fires most. Writes the same to the HTML file `page`."""
    console = Console(record=True, file=io.StringIO(), width=100, highlight=False)  # prints nowhere
    for name, value in metrics.items():
        console.print(f"{name:>14}  {value:.4f}")
    # Features that fire on fewer than 2 of 10,000 tokens are left out: they have few examples.
    order = [i for i in frequency.argsort().tolist() if frequency[i] > 2e-4]
    shown = order[::len(order) // 20 + 1]  # every so-many-th: at most twenty
    acts = (get_activations(model, hook_name, part) for part in rows.split(4))
    f = torch.cat([sae.encode(act)[..., shown] for act in acts])  # [n, seq_len, shown]
    f[:, 0] = 0.0  # BOS, which the SAE was not trained on
    for i, f_i in zip(shown, f.unbind(-1)):  # f_i [n, seq_len]
        console.print(f"\nfeature {i}: on {frequency[i]:.3%} of tokens", style="bold")
        peak, place = f_i.max(dim=1)  # [n]
        for n in peak.topk(min(5, (peak > 0).sum())).indices.tolist():
            around = slice(max(1, place[n] - 12), place[n] + 8)
            line = Text()
            for word, value in zip(model.to_str_tokens(rows[n, around]), f_i[n, around]):
                pale = 255 - int(155 * value / peak.max())  # the larger f, the deeper orange
                style = f"#000000 on rgb(255,{pale},{pale // 2})" if value > 0 else ""
                line.append(repr(word)[1:-1], style)  # (repr: a newline as \n)
            console.print(line, soft_wrap=True)
    console.save_html(page, clear=False)  # first: print fails where a terminal lacks a character
    print(console.export_text(styles=sys.stdout.isatty()))

# ---- 8. All of it, in order ----------------------------------------------------------
def run(args):
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # on a GPU: TF32, faster and less exact
    model = load_model(args.model, args.device)
    held_out, training = split_rows(args.dataset, model.tokenizer, args.seq_len, args.held_out)
    held_out = held_out.to(args.device)
    buffer = ActivationBuffer(lambda tokens: get_activations(model, args.hook, tokens),
                              training, args.batch_size, device=args.device)
    d_in = buffer.store.shape[1]
    sae = SparseAutoencoder(d_in, args.d_sae or 8 * d_in)
    if args.load:
        sae = SparseAutoencoder.load(args.load)
    sae.to(args.device)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    def save():  # into a new file: if it is killed midway, the old one is still whole
        torch.save(sae.state_dict(), out / "new.pt")
        (out / "new.pt").replace(out / "sae.pt")

    if args.steps > 0:
        train(sae, buffer.next_batch, args.steps, args.lr, args.l1, args.k, save)
    metrics, frequency = evaluate(model, args.hook, sae, held_out)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    report(model, args.hook, sae, held_out, metrics, frequency, out / "report.html")

def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny-1l", help="tiny-1l, gelu-1l, a model on the Hub, or a folder")
    add("--hook", default="blocks.0.mlp.hook_post", help="where x is: a hook of TransformerLens")
    add("--dataset", default="stdlib", help="stdlib, 'files/*.txt', or NAME[:SUBSET] on the Hub")
    add("--seq-len", type=int, default=128, help="tokens in a row, with BOS")
    add("--held-out", type=int, default=384, help="rows to measure on, at most (1 in 32)")
    add("--d-sae", type=int, help="number of features; if not given, 8 times d_in")
    add("--l1", type=float, default=0.07, help="weight of the L1 penalty, in units of x's spread")
    add("--k", type=int, help="features that fire per token, on average; replaces L1")
    add("--steps", type=int, default=1000, help="training steps; 0: only measure what --load names")
    add("--batch-size", type=int, default=1024, help="activations in a step")
    add("--lr", type=float, help="peak learning rate; if not given, from d_sae and steps")
    add("--load", help="start from this SAE: run1, run2, or a file such as run/sae.pt")
    add("--out", default="run", help="folder for sae.pt, metrics.json and report.html")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--seed", type=int, default=0, help="of the weights and the order of activations")
    args = parser.parse_args(argv)
    sizes = [args.seq_len - 1, args.held_out - 1, args.batch_size - 1, args.d_sae, args.k, args.lr]
    if any(size is not None and size <= 0 for size in sizes):
        parser.error("--seq-len, --held-out, --batch-size: at least 2; --d-sae, --k, --lr: above 0")
    if args.steps < 1 and not args.load:
        parser.error("--steps 0 only measures what --load names")
    run(args)

if __name__ == "__main__":
    main()
