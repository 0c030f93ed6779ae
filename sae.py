"""sae.py: find features in a language model's activations with a sparse autoencoder (SAE).

What does a language model compute? Looking at single neurons hardly helps: most of them fire on
several unrelated things. The likely reason is called superposition. The model keeps track of more
things than it has neurons, so it gives each thing not a neuron but a direction, a pattern over many
neurons. The patterns overlap, but seldom clash, since only a few things matter at any one token.

An SAE looks for these directions, called features. It learns d_sae of them, more than there are
neurons. A few of them should nearly add up to x, the activations at a token (d_in numbers):

    f     = relu((x - b_dec) @ W_enc + b_enc)    how much of each feature is in x: mostly 0
    x_hat = f @ W_dec + b_dec                    x rebuilt; row i of W_dec is feature i's direction
    loss  = |x_hat - x|^2 + l1 * sum(f)          l1 times the sum makes few features fire (f > 0)

This file follows "Towards Monosemanticity" (Bricken et al. 2023) and its early replication, Neel
Nanda's 1L-Sparse-Autoencoder. `python sae.py --steps 1000` takes four minutes on two CPU cores. It
runs tiny-1l, a small transformer, on a million tokens of Python, and finds 4,096 features in the
512 neurons of its MLP. One of them, feature 3622, fires on " while". There it adds 0.21 to the
probability that " True" comes next. On text that it was not trained on, the SAE scores

    loss_recovered  0.9738    how well the model predicts with x_hat: 1 as with x, 0 as with zeros
    l0              35.5      how many features fire at a token, on average
    fvu             0.1425    fraction of x's variance unexplained: what is missing in x_hat
    dead            0.0007    the fraction of features that never fire

An l0 of 36 is on the high side: 10 to 20 are easier to read. A larger l1 lowers l0 and raises fvu.
"""
import argparse
import io
import json
import math
import sysconfig
from glob import escape, glob
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from einops import rearrange
from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

# ---- 1. Data: rows of tokens ---------------------------------------------------------
def open_dataset(name):
    """A stream of texts. name: "stdlib" (the source of Python's own library), a pattern of files
    ("books/*.txt"; also .jsonl, .csv, .parquet), or NAME[:SUBSET] on Hugging Face's Hub"""
    if name == "stdlib":
        name = sysconfig.get_path("stdlib") + "/*.py"
    paths = sorted(glob(str(Path(name).expanduser()), recursive=True))
    if not paths and "*" not in name:  # then it is a name on the Hub
        return load_dataset(*name.split(":"), split="train", streaming=True)
    files = [escape(path) for path in paths if Path(path).is_file()]  # load_dataset globs again
    endings = " ".join("".join(Path(file).suffixes) for file in files).lower()  # ".jsonl.gz ..."
    for kind in ("json", "csv", "parquet"):  # tables; ("json" is in ".jsonl.gz", too)
        if kind in endings:
            return load_dataset(kind, data_files=files, split="train", streaming=True)
    return load_dataset("text", data_files=files, split="train", streaming=True,
                        sample_by="document", encoding="utf-8-sig")  # each file is one text

def all_tokens(dataset, tokenizer):
    """Yields the tokens of all texts, the same ones in every call. EOS follows each raw text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    padding = {tokenizer.pad_token_id} - {eos}  # if padding is EOS, only its repeats go (below)
    for example in open_dataset(dataset).shuffle(seed=0, buffer_size=1000):
        if "text" in example:
            # Without split_special_tokens, a text that says "<|endoftext|>" would contain an EOS.
            yield from tokenizer(example["text"] or "", add_special_tokens=False,
                                 split_special_tokens=True)["input_ids"]
            yield eos
        else:  # already tokenized: skips padding, a BOS in front, and repeats of BOS or EOS
            last = bos  # as if a BOS had come before, so that one in front is a repeat
            for token in example["tokens"] or []:
                if token not in padding and not (token == last and token in (bos, eos)):
                    yield token
                    last = token

def token_rows(dataset, tokenizer, seq_len):
    """Joins all texts and cuts them into rows: lists of BOS and seq_len - 1 tokens"""
    tokens = all_tokens(dataset, tokenizer)
    for row in zip(*[tokens] * (seq_len - 1)):  # seq_len - 1 tokens each; drops a shorter rest
        yield [tokenizer.bos_token_id, *row]

def split_rows(dataset, tokenizer, seq_len=128, n_held_out=384):
    """Rows 0, 32, 64, ... are for measuring, never for training. Returns the first n_held_out of
    these, a tensor [n_held_out, seq_len], and a generator of all other rows, pass after pass."""
    rows = token_rows(dataset, tokenizer, seq_len)
    held_out = list(islice(rows, 0, 32 * max(2, n_held_out), 32))  # the second is row 32
    assert len(held_out) > 1, f"--dataset {dataset}: fewer than 33 rows, too few to train on"
    def training_rows():
        while True:
            rows = enumerate(token_rows(dataset, tokenizer, seq_len))
            yield from (row for n, row in rows if n % 32 != 0)
    return torch.tensor(held_out[:n_held_out]), training_rows()

# ---- 2. The language model and its activations ---------------------------------------
def load_model(name, device="cpu"):
    """tiny-1l, gelu-1l, or a model that transformers can load. TransformerLens wraps it and puts a
    hook at each activation: a function of ours is called there, and may replace what it gets."""
    if name == "tiny-1l":
        name = str(Path(__file__).parent / "assets" / "tiny-1l")
    if name == "gelu-1l":  # stored in TransformerLens's own format
        model = TransformerBridge.boot_tl_legacy("NeelNanda/GELU_1L512W_C4_Code", device=device)
    else:
        model = TransformerBridge.boot_transformers(name, device=device)
    assert model.cfg.attention_dir == "causal", f"--model {name}: it sees later tokens"
    return model.eval().requires_grad_(False)

@torch.no_grad()
def get_activations(model, hook_name, tokens):
    """tokens [n, seq_len] -> x, what the model computes at the hook: [n, seq_len, d_in]"""
    def stop(act, hook):
        raise StopAtLayerException(act)  # ends the run here: run_with_hooks then returns act
    act = model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(hook_name, stop)])
    assert act is not None and act.shape[:2] == tokens.shape, f"{hook_name}: no vector per token"
    assert "resid_mid" not in hook_name, f"{hook_name}: the skip connection would not be replaced"
    return act.flatten(2).float()  # (attention heads, if there are any, are put side by side)

def replace_activations(model, hook_name, tokens, change, return_type):
    """Runs the model on tokens [n, seq_len] with change(x) [n, seq_len, d_in] in place of x, except
    at BOS, which the SAE never sees. return_type: "loss" (nats per token) or "logits" """
    def replace(act, hook):
        x = act.flatten(2).float()
        x = torch.cat([x[:, :1], change(x)[:, 1:]], dim=1)
        return x.view_as(act).to(act.dtype)
    return model.run_with_hooks(tokens, return_type=return_type, fwd_hooks=[(hook_name, replace)])

# ---- 3. The activation buffer --------------------------------------------------------
@torch.no_grad()
def activation_buffer(get_x, rows, batch_size, n_batches=64, device="cpu"):
    """Yields batches of x [batch_size, d_in], each from many texts, since the x of one text are
    alike. It holds n_batches, serves a random half, writes new x over that half, and so on.
    get_x: tokens [n, seq_len] -> x [n, seq_len, d_in]. rows: yields rows of tokens without end."""
    seq_len, d_in = get_x(torch.tensor([next(rows)], device=device)).shape[1:]
    buffer = torch.empty(n_batches * batch_size, d_in, device=device)
    free = torch.arange(len(buffer), device=device)  # the slots that may be written over: all
    while True:
        for slots in free.split(8192):  # not all at once: the model would need too much memory
            n_rows = math.ceil(len(slots) / (seq_len - 1))
            tokens = torch.tensor(list(islice(rows, n_rows)), device=device)
            x = get_x(tokens)[:, 1:]  # without BOS, whose x is the same in every row
            buffer[slots] = rearrange(x, "row pos d_in -> (row pos) d_in")[:len(slots)]

        free = torch.randperm(len(buffer), device=device)[:len(buffer) // 2]  # a random half
        for slots in free.split(batch_size):
            yield buffer[slots]  # [batch_size, d_in]

# ---- 4. The autoencoder --------------------------------------------------------------
class SparseAutoencoder(torch.nn.Module):
    """The formulas at the top, with a threshold in place of relu's 0. There are two ways to make
    few features fire. In the paper's way, it stays 0 and the loss has an L1 penalty. In the other,
    k is given and there is no penalty: move_threshold keeps the threshold so high that k features
    per token fire, on average (much like BatchTopK, Bussmann et al. 2024)."""

    def __init__(self, d_in, d_sae):
        super().__init__()
        self.W_dec = torch.nn.Parameter(F.normalize(torch.randn(d_sae, d_in), dim=-1))
        # The encoder starts as the decoder, scaled so that x_hat starts near x. For random rows,
        # x @ W_dec.T @ W_dec is about d_sae / d_in times x. Relu halves it. The factor undoes both.
        self.W_enc = torch.nn.Parameter(2 * d_in / d_sae * self.W_dec.data.T.contiguous())
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(d_sae))  # (equal, unless load scales them)

    def encode(self, x):
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc  # [..., d_sae]
        return pre * (pre > self.threshold)  # f [..., d_sae]

    def decode(self, f):
        return f @ self.W_dec + self.b_dec  # x_hat [..., d_in]

    def forward(self, x):
        f = self.encode(x)
        return self.decode(f), f

    def loss(self, x, l1=0.0):
        """x [batch, d_in] -> loss, x_hat, f. Both terms of the loss are means over the batch."""
        x_hat, f = self(x)
        squared_error = (x_hat - x).pow(2).sum(-1).mean()
        # We want few features to fire, but their number has no gradient. The sum of f has one, and
        # pulls small f down to 0. (It also makes large f a little too small. With k, f is not.)
        sparsity = f.sum(-1).mean()  # the L1 norm, since f is never negative
        return squared_error + l1 * sparsity, x_hat, f

    @torch.no_grad()
    def move_threshold(self, x, k):
        """Moves the threshold a bit towards where k features per row of x [n, d_in] fire"""
        pre = ((x - self.b_dec) @ self.W_enc + self.b_enc).flatten()  # [n * d_sae]
        highest = pre.topk(min(round(k * len(x)), len(pre))).values  # the highest one first
        goal = highest[-1].clamp(min=0)  # below 0, f would be negative
        self.threshold += 0.1 * (goal - self.threshold)  # a tenth of the way, as batches differ

    # The unit-norm rule: rows of W_dec keep length 1. Without it the SAE can cheat the L1 penalty:
    # halve f, double W_dec, same x_hat. A step is project_gradient, optimizer.step, normalize.
    @torch.no_grad()
    def project_gradient(self):
        """Before the step: removes the part of each row's gradient that points along the row.
        normalize would undo that part in W_dec, but it would stay in Adam's averages."""
        along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)  # [d_sae, 1]
        self.W_dec.grad -= along * self.W_dec

    def normalize(self):
        """After the step: brings the rows back to length 1, since even a step at a right angle
        lengthens a row, by Pythagoras. (The replication left this out at first.)"""
        self.W_dec.data = F.normalize(self.W_dec.data, dim=-1)

    @classmethod
    @torch.no_grad()
    def load(cls, file):
        """Reads a state_dict, such as the sae.pt that `run` saves"""
        weights = torch.load(file, map_location="cpu")
        sae = cls(*weights["W_enc"].shape)
        sae.load_state_dict({"threshold": sae.threshold, **weights})  # (0 if the file has none)
        sae.threshold.clamp_(min=0)  # f is never negative
        # Rows from elsewhere may have other lengths. f takes the length over: x_hat is the same.
        length = sae.W_dec.norm(dim=-1)  # [d_sae]
        for weight in (sae.W_enc, sae.b_enc, sae.threshold):
            weight *= length
        sae.normalize()
        return sae

# ---- 5. Training ---------------------------------------------------------------------
@torch.enable_grad()
def train(sae, next_batch, steps, lr=None, l1=0.07, k=None, save=lambda: None):
    """Trains `sae` in place. next_batch() -> x [batch, d_in]; save() is called some 20 times."""
    assert k or not sae.threshold.any(), "an SAE with a threshold is trained with k: give k"
    x = next_batch()
    is_new = not sae.b_enc.any() and not sae.b_dec.any()
    if is_new:  # start at the mean of x: features then say how x differs from it
        sae.b_dec.data = x.mean(0)

    # spread: how far x typically is from its mean (the median, as a few tokens have a huge x). If x
    # doubles, the squared error is 4 times as large, but the sum of f only 2 times. l1 times the
    # spread makes up for that, so the same l1 does the same for every model.
    spread = (x - x.mean(0)).norm(dim=-1).median().item()

    # Found by trial, with the powers: 0.005 is right for 4,096 features and 1,000 steps. Adam moves
    # a number by about lr per step, large or small, so the biases need an lr on the scale of x.
    lr = lr or 0.005 * (4096 / len(sae.b_enc)) ** 0.5 * (1000 / max(600, steps)) ** (1 / 3)
    adam = torch.optim.Adam([
        {"params": [sae.W_enc], "lr": 0.7 * lr if k else lr},  # with k, fewer die at this rate
        {"params": [sae.W_dec], "lr": lr},
        {"params": [sae.b_enc, sae.b_dec], "lr": lr * spread / x.shape[1] ** 0.5},
    ], betas=(0.9, 0.99), eps=1e-16, fused=True)  # (eps: Adam's own is too large if x is small)
    # The rates rise over the first twentieth of the run, and fall to 0 over the last third.
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda done: min(1, 20 * (done + 1) / steps, 3 * (1 - done / steps)))

    look_every = max(10, steps // 20)  # steps from one look at the features to the next
    dead = torch.ones_like(sae.b_enc, dtype=torch.bool)  # [d_sae]: not fired since the last look
    bar = tqdm(range(1, steps + 1))
    for step in bar:
        # Over the first half of the run l1 grows from 0, or k falls from 8 times its value. If only
        # a few features could fire from the start, the others would die before they find a use.
        ramp = min(1, 2 * step / steps)

        x = next_batch().detach()  # [batch, d_in]
        if k:
            sae.move_threshold(x[:128], k * 8 ** (1 - ramp))  # 128 tokens are enough
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
            x_hat, f = sae(x)  # now, after the step
            fvu = (x_hat - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
            l0 = (f > 0).sum() / len(x)
            bar.set_postfix(fvu=fvu.item(), l0=l0.item(), dead=dead.float().mean().item())
            assert fvu.isfinite(), f"step {step}: fvu is {fvu}, so this SAE is not saved"
            # Near the end it is too late to learn. And in an SAE that was loaded, features that
            # seem dead in a short run may just be rare.
            if is_new and dead.any() and step < 0.85 * steps:
                resample(sae, adam, dead, torch.cat([next_batch() for _ in range(8)]))
            dead[:] = True
            save()

@torch.no_grad()
def resample(sae, adam, dead, x):
    """The paper's neuron resampling. A feature that never fires gets no gradient, so it stays dead.
    Here the features in dead [d_sae] (bool) start anew, each in the direction of what the SAE
    misses in one of the examples x [n, d_in]. (The paper takes the example itself.)"""
    error = torch.cat([chunk - sae(chunk)[0] for chunk in x.split(1024)])  # [n, d_in]
    loss = error.pow(2).sum(-1)  # [n]
    revived = dead.nonzero().flatten()[:len(x)]  # [n_revived], their numbers
    # Examples are drawn in proportion to the square of their loss, none of them twice.
    drawn = torch.multinomial(loss.pow(2) + 1e-30, len(revived))  # [n_revived]
    direction = F.normalize(error[drawn], dim=-1)  # [n_revived, d_in]
    # Some errors are alike. Ten features that correct the same error overshoot it tenfold, and
    # training diverges. So a direction within 45 degrees of an earlier one is left out.
    keep = (direction @ direction.T).tril(-1).amax(dim=1) < 0.7  # cosines with earlier ones
    revived, drawn, direction = revived[keep], drawn[keep], direction[keep]

    # The encoder starts at a fifth of the mean length, as in the paper. The bias lets it fire where
    # (x - b_dec) @ direction > |error| / 4. With the paper's 0 it would fire on half of all tokens.
    length = 0.2 * sae.W_enc.norm(dim=0).mean()
    sae.W_dec[revived] = direction
    sae.W_enc[:, revived] = length * direction.T
    sae.b_enc[revived] = sae.threshold[revived] - length * error[drawn].norm(dim=-1) / 4

    # Adam's two averages start anew: that of the gradient at 0, that of its square at a typical
    # value. (In the paper both start at 0. The next steps would then be too long.)
    for weight, index in ((sae.W_dec, revived), (sae.W_enc, (..., revived)), (sae.b_enc, revived)):
        adam.state[weight]["exp_avg"][index] = 0.0
        squared = adam.state[weight]["exp_avg_sq"]
        squared[index] = squared.sqrt().mean() ** 2

# ---- 6. Evaluation -------------------------------------------------------------------
def cross_entropy(model, hook_name, rows, change):
    """The model's loss on rows [n, seq_len] in nats per token, with change(x) in place of x"""
    losses = [replace_activations(model, hook_name, row, change, "loss")
              for row in tqdm(rows.split(1), "evaluating", leave=False)]
    return torch.stack(losses).mean().item()

@torch.no_grad()
def evaluate(model, hook_name, sae, rows):
    """rows [n, seq_len], held out -> metrics, and how often each feature fires [d_sae]"""
    ce = cross_entropy(model, hook_name, rows, lambda x: x)
    ce_sae = cross_entropy(model, hook_name, rows, lambda x: sae(x)[0])
    ce_zero = cross_entropy(model, hook_name, rows, torch.zeros_like)
    acts = torch.cat([get_activations(model, hook_name, chunk) for chunk in rows.split(4)])
    x = rearrange(acts[:, 1:], "row pos d_in -> (row pos) d_in")
    error, fired = 0.0, 0  # fired becomes [d_sae]: on how many tokens each fires
    for chunk in x.split(2048):
        x_hat, f = sae(chunk)
        error += (x_hat - chunk).pow(2).sum().item()
        fired += (f > 0).sum(0)
    metrics = {
        "loss_recovered": (ce_zero - ce_sae) / ((ce_zero - ce) or math.nan),  # no 0 / 0
        "ce": ce, "ce_sae": ce_sae, "ce_zero": ce_zero,
        "l0": fired.sum().item() / len(x),
        "fvu": error / (x - x.mean(0)).pow(2).sum().item(),
        "dead": (fired == 0).float().mean().item(),
    }
    return metrics, fired / len(x)

# ---- 7. Looking at features ----------------------------------------------------------
@torch.no_grad()
def effect(model, hook_name, sae, i, rows, pos):
    """What feature i does: how much it adds to the probability of each next token [d_vocab], on
    average over rows [n, seq_len]. To see it, the model runs with and without f_i * W_dec[i], the
    feature's share of x, at one position in each row (pos [n])."""
    n = torch.arange(len(rows), device=rows.device)
    def subtract(x):  # [n, seq_len, d_in]
        x = x.clone()
        x[n, pos] -= sae.encode(x[n, pos])[:, i, None] * sae.W_dec[i]
        return x
    p = model(rows)[n, pos].softmax(-1)  # [n, d_vocab]
    without = replace_activations(model, hook_name, rows, subtract, "logits")[n, pos].softmax(-1)
    return (p - without).mean(0)

@torch.no_grad()
def report(model, hook_name, sae, rows, shown, heading, page):
    """Shows each feature in `shown`: how often it fires, the five of rows [n, seq_len] where f is
    largest, and the next tokens it makes likelier there. Prints it, and writes the page (HTML)."""
    text = Text(f"{heading}\n\nIn quotes: where f is largest. The deeper the orange, the larger f.")
    chunks = (get_activations(model, hook_name, chunk) for chunk in rows.split(4))
    f = torch.cat([sae.encode(x)[..., shown] for x in chunks])  # [n, seq_len, shown]
    f[:, 0] = 0.0  # BOS, on which the SAE was not trained
    for i, f_i in zip(shown, f.unbind(-1)):  # [n, seq_len]
        peak, pos = f_i.max(dim=1)  # [n]
        best = peak.topk(min(5, (peak > 0).sum())).indices  # the rows to show, if any
        added, tokens = effect(model, hook_name, sae, i, rows[best], pos[best]).topk(3)
        text.append(f"\n\nfeature {i} fires on {f_i[:, 1:].sign().mean():.3%} of tokens", "bold")
        for word, p in zip(model.to_str_tokens(tokens), added):
            text.append(f", adds {p:.2f} to {word!r}" if p > 0.005 else "", "bold")
        for n in best.tolist():
            words = model.to_str_tokens(rows[n])
            text.append(f"\n{words[pos[n]]!r:>16}  ")
            for j in range(max(1, pos[n] - 12), min(len(words), pos[n] + 8)):
                pale = 255 - int(155 * f_i[n, j] / peak.max())
                style = f"#000000 on rgb(255,{pale},{pale // 2})" if f_i[n, j] > 0 else ""
                text.append(repr(words[j])[1:-1], style)  # (repr: a newline is shown as \n)
    recorder = Console(record=True, file=io.StringIO())  # only keeps what it prints, for the page
    recorder.print(text, soft_wrap=True)
    recorder.save_html(page)  # before printing, as a terminal may fail on a letter it cannot show
    Console().print(text.append(f"\n\nThe same as a page: {page}"), soft_wrap=True)

# ---- 8. All of it, in order ----------------------------------------------------------
def run(args):
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # on a GPU: TF32, faster and less exact
    model = load_model(args.model, args.device)
    assert args.seq_len <= model.cfg.n_ctx, f"--seq-len: at most {model.cfg.n_ctx} for this model"
    held_out, training = split_rows(args.dataset, model.tokenizer, args.seq_len, args.held_out)
    held_out = held_out.to(args.device)
    buffer = activation_buffer(lambda tokens: get_activations(model, args.hook, tokens),
                               training, args.batch_size, device=args.device)
    d_in = get_activations(model, args.hook, held_out[:1]).shape[-1]
    sae = SparseAutoencoder(d_in, args.d_sae or 8 * d_in)
    out = Path(args.out or "run")
    if args.load:
        sae = SparseAutoencoder.load(args.load)
        assert len(sae.b_dec) == d_in, f"--load: its d_in is {len(sae.b_dec)}, not {d_in}"
    if args.steps == 0 and not args.out:
        out = Path(args.load).parent  # metrics and report go next to the SAE they describe
    sae.to(args.device)
    out.mkdir(parents=True, exist_ok=True)
    def save():  # via a new file: if the run is killed here, the old one is intact
        torch.save(sae.state_dict(), out / "new.pt")
        for figures in ("metrics.json", "report.html"):
            (out / figures).unlink(missing_ok=True)  # they would no longer be those of sae.pt
        (out / "new.pt").replace(out / "sae.pt")

    if args.steps > 0:
        train(sae, lambda: next(buffer), args.steps, args.lr, args.l1, args.k, save)
    metrics, frequency = evaluate(model, args.hook, sae, held_out)
    (out / "metrics.json").write_text(json.dumps(metrics | vars(args), indent=1))
    order = [i for i in frequency.argsort().tolist() if frequency[i] > 2e-4]  # not the rarest
    shown = args.features or order[::len(order) // 20 + 1]  # about twenty, from rare to frequent
    flags = [f"{name}={value}" for name, value in vars(args).items() if value is not None]
    heading = "".join(f"\n{name:>14}  {value:.4f}" for name, value in metrics.items())
    report(model, args.hook, sae, held_out, shown, " ".join(flags) + heading, out / "report.html")

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
    add("--load", help="start from this SAE, a file such as run/sae.pt")
    add("--features", type=int, nargs="+", help="show these; if not given, twenty are chosen")
    add("--out", help="folder to write to; if not given, run (or, with --steps 0, that of --load)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    add("--seed", type=int, default=0, help="of the weights and the order of activations")
    args = parser.parse_args(argv)
    if min(args.seq_len, args.batch_size) < 2 or 0 in (args.held_out, args.d_sae, args.k, args.lr):
        parser.error("--seq-len, --batch-size: at least 2; --held-out, --d-sae, --k, --lr: not 0")
    run(args)

if __name__ == "__main__":
    main()
