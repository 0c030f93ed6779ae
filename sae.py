"""sae.py: train a sparse autoencoder on a language model's activations, measure it, look inside.
After Towards Monosemanticity (Bricken et al. 2023). `python sae.py --steps 1000` makes a small
transformer, once, explains its MLP and prints, in six minutes on two CPU cores:
    loss_recovered 0.9746   ce 3.337   ce_sae 3.417   ce_zero 6.489   ce_mean 7.041
    l0 35.50   fvu 0.1196   dead 0.0161   decoder norms 0.9999999 to 1.0000001
`python sae.py --model gelu-1l --steps 100000` is the first replication, Neel Nanda's. Read from top
to bottom: 1 config, 2 language model, 3 data, 4 activation buffer, 5 autoencoder, 6 training,
7 evaluation, 8 looking; each part can be copied out on its own.
"""

import itertools
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from einops import rearrange
from huggingface_hub import hf_hub_download
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import Digits, Punctuation, Sequence
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformers import HfArgumentParser, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

PUBLISHED = {"run1": "25.pt", "run2": "47.pt"}  # in NeelNanda/sparse_autoencoder on the Hub
# ---- 1. Config: every field is a flag ------------------------------------------------------------
@dataclass
class Config:
    model: str | None = HfArg(default=None, help="else tiny-1l; gelu-1l, any on the Hub, a folder")
    dataset: str | None = HfArg(default=None, help="stdlib, a name on the Hub, a file, a 'glob*'")
    hook: str = HfArg(default="blocks.0.mlp.hook_post", help="which activations to explain")
    steps: int = HfArg(default=1000, help="training steps; 0 evaluates what --load names")
    batch_size: int | None = HfArg(default=None, help="activations per step; else 1024 or 4096")
    d_sae: int | None = HfArg(default=None, help="features; else 8 x d_in, as in the paper's A/1")
    l1: float | None = HfArg(default=None, help="L1 weight; else 0.07 x the length of x - mean")
    k: int | None = HfArg(default=None, help="TopK: keep the k largest features, without L1")
    lr: float | None = HfArg(default=None, help="peak learning rate; else 0.09 / sqrt(d_in)")
    buffer: int = HfArg(default=64, help="batches in the buffer; first replication: 384")
    seed: int = HfArg(default=0, help="of the first weights and the buffer's order")
    device: str | None = HfArg(default=None, help="cpu, cuda, mps; else the best there is")
    out: str | None = HfArg(default=None, help="output folder; else runs/<model>")
    load: str | None = HfArg(default=None, help="start from run1, run2, a folder or a .pt file")
    save_every: int = HfArg(default=500, help="steps between checkpoints")
    features: str | None = HfArg(default=None, help="what the report shows, as in 12,34,56")
    cache: str = HfArg(default="~/.cache/sae.py", help="where tiny-1l is kept once it is trained")

    def __post_init__(self):
        for name, value in vars(self).items():
            least = {"steps": 0, "l1": 0, "seed": 0, "buffer": 2}.get(name, 1e-9)
            if type(value) in (int, float) and not least <= value < float("inf"):  # catches nan
                raise ValueError(f"--{name.replace('_', '-')} cannot be {value}")
        if self.k and self.l1 is not None:
            raise ValueError("--k takes the place of the L1 term: give --k or --l1, not both")
        self.model = self.model or ("gelu-1l" if self.load in PUBLISHED else "tiny-1l")
        self.batch_size = self.batch_size or (1024 if self.model == "tiny-1l" else 4096)
        datasets = {"tiny-1l": "stdlib", "gelu-1l": "NeelNanda/c4-code-tokenized-2b"}
        self.dataset = self.dataset or datasets.get(self.model, "monology/pile-uncopyrighted")
        accelerator = torch.accelerator.current_accelerator(check_available=True)  # cuda, mps, None
        self.device = self.device or str(accelerator or "cpu")
        self.out = self.out or f"runs/{Path(self.load or self.model).stem}"
# ---- 2. The language model -----------------------------------------------------------------------
def load_model(name, device="cpu", cache="~/.cache/sae.py"):
    """A frozen TransformerBridge, tokenizer included."""
    if name == "tiny-1l":
        model = tiny_1l(Path(cache, "tiny-1l").expanduser(), device)
    elif name == "gelu-1l":
        model = TransformerBridge.boot_tl_legacy("NeelNanda/GELU_1L512W_C4_Code", device=device)
    else:
        model = TransformerBridge.boot_transformers(name, device=device)
    return model.eval().requires_grad_(False)

def tiny_1l(folder, device, steps=1200):
    """The paper's own transformer in small, trained on the Python source of this machine, once."""
    shape = dict(n_layers=1, d_model=128, n_heads=4, d_head=32, d_mlp=512, n_ctx=128, d_vocab=2048)
    model = TransformerBridge.boot_native(shape | dict(act_fn="gelu", seed=0), device=device)
    if not folder.exists():
        bpe = ByteLevelBPETokenizer()  # with digits and punctuation one by one, to read more easily
        bpe.pre_tokenizer = Sequence([Digits(True), Punctuation(), bpe.pre_tokenizer])
        texts, special = (row["text"] for row in documents("stdlib")), ["<bos>", "<eos>"]
        bpe.train_from_iterator(texts, 2048, special_tokens=special, show_progress=False)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, bos_token="<bos>", eos_token="<eos>")
        embed, *block, unembed = model.parameters()  # the outer two see each token only at times
        groups = [{"params": [embed, unembed], "lr": 1.5e-2}, {"params": block, "lr": 3e-3}]
        adam = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        rate = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1, (step + 1) / 50, (1 - step / steps) / 0.7))
        rows = token_rows("stdlib", tokenizer)
        for _ in tqdm(range(steps), f"training tiny-1l, once, into {folder}"):
            tokens = torch.tensor(list(itertools.islice(rows, 16)), device=device)  # [16, seq_len]
            model(tokens, return_type="loss").backward()
            adam.step()
            rate.step()
            adam.zero_grad()
        tokenizer.save_pretrained(work := folder.with_suffix(".part"))
        save_file(model.state_dict(), work / "model.safetensors")
        work.replace(folder)  # all at once: nobody ever finds half a model there
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return model

@torch.no_grad()
def harvest(model, hook, tokens):
    """The activations at `hook` for tokens [rows, seq_len] -> [rows, seq_len, d_in]"""
    def stop(act, hook):  # ends the forward pass: what lies above the hook is not computed
        raise StopAtLayerException(act)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        return model.run_with_hooks(tokens, fwd_hooks=[(hook, stop)]).flatten(2).float()
# ---- 3. The data: text -> rows of tokens ---------------------------------------------------------
def documents(dataset):
    """A stream of examples with a column `text` or `tokens`, read as they are needed."""
    if dataset == "stdlib":  # the Python standard library's source, less what is dull to read
        root, dull = Path(json.__file__).parents[1], {
            "site-packages", "test", "tests", "encodings", "pydoc_data", "idlelib", "lib2to3"}
        files = [f for f in root.rglob("*.py") if not dull & {*f.relative_to(root).parts}]
        dataset = sorted(map(str, files))
    elif not (set("*?[") & set(dataset) or Path(dataset).is_file()):
        return load_dataset(dataset, split="train", streaming=True)
    return load_dataset(
        "text", data_files=dataset, sample_by="document", split="train", streaming=True)

def token_rows(dataset, tokenizer, seq_len=128, held_out=False):
    """Yields rows of tokens [seq_len], BOS first, shuffled, without end; or those held out from
    these, each once, with the number of its document. A column `tokens` is cut as in the first
    replication (1,024 -> 8 x 128, BOS in the place of each piece's first); `text` is packed."""
    bos, eos, document = tokenizer.bos_token_id, tokenizer.eos_token_id, 0
    for turn in range(1) if held_out else itertools.count():
        for batch in documents(dataset).shuffle(seed=0, buffer_size=1000).batch(64):
            if "tokens" in batch:
                runs, start, step = batch["tokens"], 1, seq_len
            elif "text" in batch:
                texts = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
                runs, start, step = [[t for text in texts for t in [*text, eos]]], 0, seq_len - 1
            else:
                raise ValueError(f"--dataset {dataset} has no column text or tokens: {[*batch]}")
            rows = {}
            for run in runs:
                number = list(itertools.accumulate((t == eos for t in run), initial=document))
                document = number[-1] + 1
                for i in range(start, len(run) - seq_len + 2, step):
                    row = [bos, *run[i:i + seq_len - 1]]
                    # The checksum sets one row in 32 aside: what is evaluated is not trained on
                    if ((check := hash(tuple(row))) % 32 == 0) == held_out:
                        rows[check] = (row, number[i]) if held_out else row
            yield from (row for _, row in sorted(rows.items()))  # by checksum: that is, shuffled
        if turn == 0 and not held_out:
            tqdm.write("The data has come to its end and starts again.")
# ---- 4. The activation buffer --------------------------------------------------------------------
class ActivationBuffer:
    """Serves activations [batch_size, d_in] in random order, each of them once: those of one text
    are alike, and a gradient wants variety. Half of the store is refilled when half is spent."""
    def __init__(self, model, hook, rows, batch_size, n_batches, device="cpu"):
        self.model, self.hook, self.rows, self.batch_size = model, hook, rows, batch_size
        act = harvest(model, hook, torch.tensor([next(rows)], device=device))  # [1, seq_len, d_in]
        self.per_row, self.d_in = act.shape[1] - 1, act.shape[2]             # -1: BOS stays out
        dtype = torch.bfloat16 if act.is_cuda else torch.float32  # CPUs are slow at bfloat16
        self.store = torch.empty(n_batches * batch_size, self.d_in, dtype=dtype, device=device)
        # Nothing in `store` ever moves (to shuffle it would take it twice). `order` is the order of
        # serving; its first `spent` entries have been served: to begin with, all of them.
        self.order, self.spent = torch.arange(len(self.store), device=device), len(self.store)

    def refill(self, rows_at_once=16):  # overwrites what is spent, and only that, in place
        full = self.spent // self.per_row * self.per_row                     # whole rows of tokens
        for slots in self.order[:full].split(rows_at_once * self.per_row):
            rows = list(itertools.islice(self.rows, len(slots) // self.per_row))
            act = harvest(self.model, self.hook, torch.tensor(rows, device=slots.device))
            # BOS has the same activation in every row, far from all others: nothing to learn.
            act = rearrange(act[:, 1:], "row pos d_in -> (row pos) d_in")
            self.store[slots] = act.to(self.store.dtype)
        live = torch.cat([self.order[:full], self.order[self.spent:]])  # to be served
        live = live[torch.randperm(len(live)).to(self.order.device)]
        self.order, self.spent = torch.cat([self.order[full:self.spent], live]), self.spent - full

    def next(self):  # -> [batch_size, d_in], float32
        if self.spent > len(self.order) // 2:
            self.refill()
        self.spent += self.batch_size
        return self.store[self.order[self.spent - self.batch_size:self.spent]].float()
# ---- 5. The autoencoder --------------------------------------------------------------------------
class SparseAutoencoder(torch.nn.Module):
    """x_hat = f @ W_dec + b_dec  with  f = ReLU((x - b_dec) @ W_enc + b_enc)  and most of f zero.
    Row i of W_dec, of length 1, is feature i's direction in the space of the activations x.
    k=None is the paper's ReLU with an L1 penalty; an integer is TopK (Gao et al. 2024)."""
    def __init__(self, d_in, d_sae, k=None):
        super().__init__()
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        W_dec = F.normalize(torch.randn(d_sae, d_in), dim=-1)  # rows of length 1
        # A feature begins by reading what it writes; at 0.3, or all together would be too much
        self.W_enc = torch.nn.Parameter(0.3 * W_dec.T.contiguous())          # [d_in, d_sae]
        self.W_dec = torch.nn.Parameter(W_dec)                               # [d_sae, d_in]
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))  # [d_sae]
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))  # [d_in]

    def pre_activations(self, x):
        # (x - b_dec) @ W_enc + b_enc, multiplied out: the same numbers, but b_dec meets W_enc once
        # and not once per example, and x needs no gradient: 5 matrix products a step, not 6.
        return F.linear(x, self.W_enc.T, self.b_enc - self.b_dec @ self.W_enc)  # [batch, d_sae]

    def encode(self, x):  # [batch, d_in] -> f [batch, d_sae]
        pre = self.pre_activations(x)
        if self.k is None:
            return F.relu(pre)
        values, index = pre.topk(self.k)                                     # [batch, k] each
        return torch.zeros_like(pre).scatter(-1, index, F.relu(values))

    def decode(self, f):  # [batch, d_sae] -> x_hat [batch, d_in]
        return F.linear(f, self.W_dec.T, self.b_dec)

    def forward(self, x):  # [batch, d_in] -> x_hat [batch, d_in], f [batch, d_sae]
        f = self.encode(x)
        return self.decode(f), f

    def loss(self, x, l1=0.0):
        """x [batch, d_in] -> loss, x_hat [batch, d_in], f [batch, d_sae] (TopK's: [batch, k])
        Both terms are means over the batch, so l1 means the same at any batch size. The first
        replication sums the second: its 3e-4 at batch 4,096 is 4,096 x 3e-4 = 1.23 here."""
        if self.k is None:
            f = self.encode(x)
            sparsity, x_hat = f.sum(), self.decode(f)  # in this order backward can add up in place
        else:
            # f @ W_dec would multiply by d_sae - k zeros. What is left is a sum of k rows of W_dec
            # weighted by f; embedding_bag computes just that, and the same gradients.
            f, i = self.pre_activations(x).topk(self.k)                      # [batch, k] each
            f = F.relu(f)  # [batch, k]
            x_hat = self.b_dec + F.embedding_bag(i, self.W_dec, per_sample_weights=f, mode="sum")
            sparsity = f.sum()
        return (F.mse_loss(x_hat, x, reduction="sum") + l1 * sparsity) / len(x), x_hat, f

    # The unit-norm rule. Without it the L1 term is cheated: halve f, double W_dec, same x_hat.
    # It has two halves, and a training step is: project_gradient, optimizer.step, normalize.
    # One: the part of a row's gradient along the row could only change its length. It goes *before*
    # step(), or it would fill Adam's moments and bend all later steps.
    # Two: a step at a right angle to a row still makes it longer (Pythagoras), so the rows are
    # brought back to length 1 *after* step(). The first replication lacked this half, then had it
    # before step(): whatever was evaluated or saved was one step off.
    def project_gradient(self):  # half one, before optimizer.step()
        W, grad = self.W_dec.data, self.W_dec.grad                           # [d_sae, d_in] each
        grad -= (grad * W).sum(-1, keepdim=True) * W

    def normalize(self):  # half two, after optimizer.step()
        self.W_dec.data /= self.W_dec.data.norm(dim=-1, keepdim=True)

    def save(self, folder, **metadata):
        """Write two files that SAELens reads, too: SAE.load_from_disk(folder)"""
        cfg = dict(architecture="topk" if self.k else "standard", d_in=self.d_in, d_sae=self.d_sae,
                   dtype="float32", device="cpu", apply_b_dec_to_input=True,
                   normalize_activations="none", reshape_activations="none", metadata=metadata)
        cfg |= dict(k=self.k, rescale_acts_by_decoder_norm=False) if self.k else {}
        weights = {name: p.detach().cpu() for name, p in self.named_parameters()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, write in {"sae_weights.safetensors": lambda f: save_file(weights, f),
                            "cfg.json": lambda f: f.write_text(json.dumps(cfg))}.items():
            write(part := Path(folder, name + ".part"))
            part.replace(Path(folder, name))  # a crash leaves the old file or the new, no half

    @classmethod
    def load(cls, source, device="cpu"):
        """"run1" or "run2" (published), a folder of ours or SAELens's, or a .pt state dict"""
        path, cfg = Path(source), {}
        if source in PUBLISHED:
            path = Path(hf_hub_download("NeelNanda/sparse_autoencoder", PUBLISHED[source]))
        try:
            if path.is_file():
                weights = torch.load(path, map_location="cpu", weights_only=True)
            else:
                cfg = json.loads((path / "cfg.json").read_text())
                weights = load_file(path / "sae_weights.safetensors")
            if cfg.get("architecture") not in (None, "standard", "topk"):
                raise ValueError(f"the architecture {cfg['architecture']} is not known here")
            sae = cls(*weights["W_enc"].shape, cfg.get("k"))
            sae.load_state_dict(weights)
        except Exception as error:
            raise ValueError(f"--load {source} (run1, run2, a folder or .pt): {error!r}") from error
        return sae.to(device)
# ---- 6. Training ---------------------------------------------------------------------------------
@torch.no_grad()
def resample(sae, adam, dead, x):
    """Point the `dead` features ([d_sae], bool) at what the others fail on; after the paper.
    Of x [batch, d_in], examples are drawn with probability proportional to their squared loss."""
    residual = x - sae(x)[0]                                                 # [batch, d_in]
    drawn = torch.multinomial(residual.pow(2).sum(-1).pow(2), int(dead.sum()), replacement=True)
    direction = F.normalize(residual[drawn], dim=-1)                         # [n_dead, d_in]
    length = sae.W_enc[:, ~dead].norm(dim=0).mean() * (1.0 if sae.k else 0.2)  # the paper's 0.2
    sae.W_dec[dead], sae.W_enc[:, dead], sae.b_enc[dead] = direction, length * direction.T, 0.0
    for moment in "exp_avg", "exp_avg_sq":  # Adam forgets where the old features were going
        adam.state[sae.W_enc][moment][:, dead] = 0.0
        adam.state[sae.W_dec][moment][dead] = adam.state[sae.b_enc][moment][dead] = 0.0

def train(cfg, sae, buffer):
    """Train `sae` in place; writes checkpoints and train.jsonl into cfg.out."""
    x = buffer.next()                                                        # [batch, d_in]
    scale = (x - x.mean(0)).pow(2).mean().sqrt().item()                      # of one of x's numbers
    lr = cfg.lr or 0.09 / sae.d_in ** 0.5
    l1 = 0.0 if sae.k else 0.07 * scale * sae.d_in ** 0.5 if cfg.l1 is None else cfg.l1
    sae.b_dec.data = sae.b_dec.data if cfg.load else x.mean(0)
    groups = [{"params": [sae.W_enc, sae.W_dec]}, {"params": [sae.b_enc, sae.b_dec]}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    since_fired = torch.zeros(sae.d_sae, dtype=torch.long, device=x.device)  # in steps
    about = {"sae_lens_version": "6.0.0", "model_name": cfg.model, "hook_name": cfg.hook,
             "dataset_path": cfg.dataset}
    with open(f"{cfg.out}/train.jsonl", "w") as log, suppress(KeyboardInterrupt):
        for step in (bar := tqdm(range(cfg.steps))):
            left = 1 - step / cfg.steps  # the share of the run still to come
            warm, decay = min(1, 20 * (1 - left) + 0.01), min(1, left / (0.5 if sae.k else 0.2))
            for group, unit in zip(adam.param_groups, (1, scale)):  # biases are in units of x
                group["lr"] = lr * unit * warm * decay
            x = buffer.next()                                                # [batch, d_in]
            loss, x_hat, f = sae.loss(x, l1 * warm * (1 + decay) / 2)
            loss.backward()
            # A feature that fired for any example has a gradient on its bias; the others: 0.
            since_fired = torch.where(sae.b_enc.grad == 0, since_fired + 1, 0)
            sae.project_gradient()  # the unit-norm rule: before step() and after it
            adam.step()
            sae.normalize()
            adam.zero_grad()
            dead = since_fired > cfg.steps // 40                             # [d_sae]
            if step % (cfg.steps // 20 + 1) == 0 and 0.2 < left < 1 and dead.any():
                resample(sae, adam, dead, torch.cat([buffer.next() for _ in range(8)]))
                since_fired[dead] = 0
            save = (step + 1) % cfg.save_every == 0
            if save or step % 25 == 0 or step + 1 == cfg.steps:  # seldom: a GPU has to wait for it
                row = {"loss": loss, "l0": (f > 0).sum() / len(x),
                       "fvu": (x_hat - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum(),
                       "dead": dead.float().mean(), "weights": sae.W_enc.norm() + sae.b_dec.norm()}
                row = {name: round(value.item(), 4) for name, value in row.items()}
                if not sum(row.values()) < float("inf"):
                    raise ValueError(f"not finite: {row}; lower --lr. the last good SAE is saved")
                bar.set_postfix(row)
                log.write(json.dumps({"step": step + 1, **row}) + "\n")
            if save:
                sae.save(cfg.out, **about, steps=step + 1)
    sae.normalize()  # for Ctrl-C may have come between step() and normalize()
    sae.save(cfg.out, **about, steps=step + 1)
# ---- 7. Evaluation -------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, hook, sae, rows):
    """-> metrics, and how often each feature fires: [d_sae], as a share of the activations
    rows [n, seq_len]: none of them trained on. Cross-entropies are in nats per token."""
    def cross_entropy(replace):
        def splice(act, hook):  # act [rows, seq_len, d_in]; BOS, at position 0, is left alone
            return torch.cat([act[:, :1], replace(act[:, 1:].flatten(2)).view_as(act[:, 1:])], 1)
        losses = [model.run_with_hooks(part, return_type="loss", fwd_hooks=[(hook, splice)])
                  * len(part) for part in rows.split(16)]
        return (sum(losses) / len(rows)).item()
    x = torch.cat([harvest(model, hook, part)[:, 1:] for part in rows.split(16)])  # [n, pos, d_in]
    mean, error, fired = x.mean((0, 1)), 0.0, 0
    for part in x.split(16):
        x_hat, f = sae(part)  # [16, pos, d_in], [16, pos, d_sae]
        error, fired = error + (x_hat - part).pow(2).sum(), fired + (f > 0).sum((0, 1))  # [d_sae]
    ce, ce_sae, ce_zero, ce_mean = map(
        cross_entropy, (lambda x: x, lambda x: sae(x)[0], torch.zeros_like, mean.expand_as))
    # 1: x_hat is as good for the model as x. 0: no better than zeros. None: nor is x (untrained).
    recovered = (ce_zero - ce_sae) / (ce_zero - ce) if ce_zero - ce > 0.01 else None
    frequency = fired / x[..., 0].numel()  # [d_sae]
    return dict(loss_recovered=recovered, ce=ce, ce_sae=ce_sae, ce_zero=ce_zero, ce_mean=ce_mean,
                l0=frequency.sum().item(), fvu=(error / (x - mean).pow(2).sum()).item(),
                dead=(fired == 0).float().mean().item()), frequency
# ---- 8. Looking ----------------------------------------------------------------------------------
def show(tokenizer, tokens):
    """Tokens as strings, with what cannot be seen made visible."""
    for text in tokenizer.batch_decode([[token] for token in tokens]):
        text = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
        yield "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)

def logit_effect(model, hook, direction):
    """What adding `direction` [d_in] at `hook` does to the logits [d_vocab] by the direct path, up
    to the size of what the final LayerNorm normalises; None where there is no such path."""
    if hook.endswith("mlp.hook_post"):
        direction = direction @ model.W_out[int(hook.split(".")[1])]         # [d_model]
    elif "resid" not in hook:
        return None
    if model.cfg.normalization_type in ("LN", "LNPre"):
        direction = direction - direction.mean()
    return direction * getattr(model.ln_final, "weight", 1) @ model.W_U

@torch.no_grad()
def report(model, hook, sae, rows, document, metrics, frequency, path, chosen=None):
    """Print metrics, densities and features, and write the same to `path` as a page.
    rows [n, seq_len] and document [n], the number of the text in which each row begins."""
    console, norms = Console(record=True, width=100), sae.W_dec.norm(dim=-1)
    for name, value in metrics.items():
        console.print(f"{name:>14}  {'nothing to recover' if value is None else round(value, 4)}")
    console.print(f" decoder norms  {norms.min():.7f} to {norms.max():.7f}\n")
    console.print("How many features (bars) fire how often (log10 of the share of tokens)")
    density = frequency[frequency > 0].log10().histc(20, -5, 0).tolist()  # 20 bars
    for i, n in enumerate(density):
        console.print(f"{i / 4 - 5:14.2f}  {'█' * round(60 * n / max(density))} {n:.0f}")
    if chosen is None:  # twenty, evenly from rare to frequent, of those seen often enough to judge
        seen = frequency.argsort()[(frequency * rows.numel() < 10).sum():]
        chosen = seen[torch.linspace(0, len(seen) - 1, min(20, len(seen))).long()].tolist()
    act = [sae.encode(harvest(model, hook, part))[..., chosen] for part in rows.split(16)]
    act = rearrange(torch.cat(act), "row pos feature -> feature row pos")
    act[..., 0] = 0.0                                                        # BOS
    texts = document[:, None] + (rows == model.tokenizer.eos_token_id).cumsum(1)  # [n, seq_len]
    for i, a in zip(chosen, act):                                            # a [n, seq_len]
        console.print(f"\n[bold]feature {i}: on {frequency[i]:.3%} of tokens, up to {a.max():.2f}")
        if (effect := logit_effect(model, hook, sae.W_dec[i])) is not None:
            for word, top in ("up", effect.topk(8)), ("down", (-effect).topk(8)):
                console.print(Text(f"{word:>7}  " + "  ".join(show(model.tokenizer, top.indices))))
        peaks = a.new_zeros(int(texts.max()) + 1).scatter_reduce(
            0, texts.flatten(), a.flatten(), "amax")                         # the best of each text
        for peak, text in zip(*peaks.topk(min(5, len(peaks)))):
            row, pos = divmod(int((a * (texts == text)).argmax()), rows.shape[1])
            line, window = Text(f"{peak:7.2f}  "), (row, slice(max(1, pos - 12), pos + 8))
            for token, level in zip(show(model.tokenizer, rows[window]), a[window] / a.max()):
                tint = 255 - int(level * 150)  # black on a tint reads well on light and dark alike
                line.append(token, f"#000000 on rgb(255,{tint},{tint // 2})" if level > 0 else "")
            console.print(line, no_wrap=True, overflow="ellipsis")
    console.save_html(path)
# ---- All of it, in order -------------------------------------------------------------------------
def run(cfg):
    """What the paper's abstract says."""
    out, began = Path(cfg.out), time.time()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    model = load_model(cfg.model, cfg.device, cfg.cache)
    if cfg.hook not in model.hook_dict:
        near = get_close_matches(cfg.hook, model.hook_dict, 3, 0)
        raise ValueError(f"--hook {cfg.hook}: {cfg.model} has none of that name, but {near}")
    held_out = [*itertools.islice(token_rows(cfg.dataset, model.tokenizer, held_out=True), 384)]
    if len(held_out) < 2:
        raise ValueError(f"--dataset {cfg.dataset}: not found or too short, for rows of 128 tokens")
    rows, document = (torch.tensor(column, device=cfg.device) for column in zip(*held_out))
    stream = token_rows(cfg.dataset, model.tokenizer)
    buffer = ActivationBuffer(model, cfg.hook, stream, cfg.batch_size, cfg.buffer, cfg.device)
    sae = SparseAutoencoder(buffer.d_in, cfg.d_sae or 8 * buffer.d_in, cfg.k).to(cfg.device)
    sae = SparseAutoencoder.load(cfg.load, cfg.device) if cfg.load else sae
    if sae.d_in != buffer.d_in or (sae.k or 0) > sae.d_sae:
        raise ValueError(f"d_in {sae.d_in}, d_sae {sae.d_sae}, k {sae.k}; d_in is {buffer.d_in}")
    if cfg.steps:
        train(cfg, sae, buffer)
    metrics, frequency = evaluate(model, cfg.hook, sae, rows)
    metrics |= dict(steps=cfg.steps, tokens=cfg.steps * cfg.batch_size, seconds=time.time() - began)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    chosen = [int(i) for i in cfg.features.split(",")] if cfg.features else None
    report(model, cfg.hook, sae, rows, document, metrics, frequency, out / "report.html", chosen)

def main(argv=None):
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"sae.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        run(Config(**vars(args)))
    except (OSError, ValueError) as error:  # what the user can put right; bugs show their traceback
        hint = " (--model tiny-1l needs no network)" if "connect" in str(error) else ""
        parser.exit(2, f"sae.py: {' '.join(str(error).split())}{hint}\n")

if __name__ == "__main__":
    main()
