"""sae.py: train a sparse autoencoder on a language model's activations, measure it, look inside.
After Towards Monosemanticity (Bricken et al. 2023). `python sae.py --steps 1000` makes a small
transformer, once, explains its MLP and prints, in two to five minutes on two CPU cores:
    loss_recovered 0.9637   ce 3.329   ce_sae 3.405   ce_zero 5.425   ce_mean 8.642
    l0 30.57   fvu 0.0961   dead 0.0205   decoder norms 0.9999999 to 1.0000001
`python sae.py --model gelu-1l --steps 100000` is the first replication, Neel Nanda's. To be read in
order: config, language model, data, buffer, autoencoder, training, evaluation, looking.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import count, islice
from pathlib import Path
from time import time

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from einops import rearrange
from huggingface_hub import hf_hub_download
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import Digits, Punctuation, Sequence
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge, exceptions
from transformers import GPT2Tokenizer, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.hf_argparser import HfArg, HfArgumentParser

def require(holds, message):  # what a user can put right: main() ends with this line, status 2
    if not holds:
        raise ValueError(message)
# ---- 1. Config: every field is a flag ------------------------------------------------------------
REPO, PUBLISHED = "NeelNanda/sparse_autoencoder", {"run1": "25.pt", "run2": "47.pt"}  # on the Hub
@dataclass
class Config:
    model: str | None = HfArg(default=None, help="else tiny-1l (offline); gelu-1l, Hub name, path")
    dataset: str | None = HfArg(default=None, help="stdlib, a name on the Hub, a file, a 'glob*'")
    hook: str = HfArg(default="blocks.0.mlp.hook_post", help="which activations to explain")
    steps: int = HfArg(default=1000, help="training steps; 0 evaluates what --load names")
    batch_size: int | None = HfArg(default=None, help="activations per step; else 1024 or 4096")
    # Memory at gelu-1l's size: weights, gradients and Adam's two moments 4 x 2 x d_in 2,048 x d_sae
    # 16,384 x 4 bytes = 1.1 GB; a step's four [4,096, d_sae] 1.1 GB; --buffer 384, in bfloat16, 6.4
    d_sae: int | None = HfArg(default=None, help="features; else 8 x d_in, as in the paper's A/1")
    l1: float | None = HfArg(default=None, help="L1 weight; else 0.07 x the length of x - mean")
    k: int | None = HfArg(default=None, help="TopK: keep the k largest features, without L1")
    lr: float | None = HfArg(default=None, help="peak learning rate; else 0.27 / sqrt(d_sae)")
    buffer: int = HfArg(default=64, help="batches in the buffer; first replication: 384")
    seed: int = HfArg(default=0, help="of the first weights and the buffer's order")
    device: str | None = HfArg(default=None, help="cpu, cuda, mps; else the best there is")
    out: str | None = HfArg(default=None, help="output folder; else runs/<model>")
    load: str | None = HfArg(default=None, help="start from run1, run2, a folder or a .pt file")
    save_every: int = HfArg(default=500, help="steps between checkpoints")
    resume: bool = HfArg(default=False, help="go on with what --out holds, as if never stopped")
    features: str | None = HfArg(default=None, help="what the report shows, as in 12,34,56")
    cache: str = HfArg(default="~/.cache/sae.py", help="where tiny-1l is kept once it is trained")

    def __post_init__(self):
        for name, value in vars(self).items():
            least = {"steps": 0, "l1": 0, "seed": 0, "buffer": 2}.get(name, 1e-9)
            require(type(value) not in (int, float) or least <= value < float("inf"),  # nor nan
                    f"--{name.replace('_', '-')} cannot be {value}")
        require(not self.k or self.l1 is None, "TopK has no L1 term: give --k or --l1, not both")
        self.model = self.model or ("gelu-1l" if self.load in PUBLISHED else "tiny-1l")
        self.batch_size = self.batch_size or (1024 if self.model == "tiny-1l" else 4096)
        datasets = {"tiny-1l": "stdlib", "gelu-1l": "NeelNanda/c4-code-tokenized-2b"}
        self.dataset = self.dataset or datasets.get(self.model, "monology/pile-uncopyrighted")
        own = PartialState(self.device == "cpu" or not torch.accelerator.is_available()).device.type
        self.device = self.device or own  # under torchrun, "cuda" is each process's own GPU
        require(self.device in ("cpu", own), f"--device {self.device}: use {own}")
        self.out = self.out or f"runs/{Path(self.load or self.model).stem}"
# ---- 2. The language model -----------------------------------------------------------------------
def load_model(name, device="cpu", cache="~/.cache/sae.py"):
    """A frozen TransformerBridge, tokenizer included."""
    if name == "gelu-1l":
        model = TransformerBridge.boot_tl_legacy("NeelNanda/GELU_1L512W_C4_Code", device=device)
    else:
        name = tiny_1l(Path(cache, name).expanduser(), device) if name == "tiny-1l" else name
        model = TransformerBridge.boot_transformers(str(name), device=device)
    return model.eval().requires_grad_(False)

def tiny_1l(folder, device, steps=1000):
    """The paper's own transformer in small, trained, once, on Python's own source -> its folder"""
    if not folder.exists():
        texts, tokenizer = (row["text"] for row in documents("stdlib")), GPT2Tokenizer()
        bpe = tokenizer.backend_tokenizer  # with digits and punctuation one by one: easier to read
        bpe.pre_tokenizer = Sequence([Digits(True), Punctuation(), bpe.pre_tokenizer])
        tokenizer = tokenizer.train_new_from_iterator(texts, 2048, show_progress=False)
        torch.manual_seed(0)  # the same tiny-1l whatever --seed says, on the same machine
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=2048, hidden_size=128, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=512, rotary_pct=1.0, use_parallel_residual=False)).to(device)
        adam = torch.optim.AdamW(model.parameters())
        rate = torch.optim.lr_scheduler.OneCycleLR(adam, 5e-3, steps)
        rows = token_rows("stdlib", tokenizer)
        for _ in tqdm(range(steps), f"training tiny-1l, once, into {folder}"):
            tokens = torch.tensor(list(islice(rows, 16)), device=device)  # [16, seq_len]
            model(tokens, labels=tokens).loss.backward()
            adam.step()
            rate.step()
            adam.zero_grad()
        model.save_pretrained(work := folder.with_suffix(".part"))
        tokenizer.save_pretrained(work)
        work.replace(folder)  # all at once: nobody ever finds half a model there
    return folder

def harvest(model, hook, tokens):
    """The activations at `hook` for tokens [rows, seq_len] -> [rows, seq_len, d_in]"""
    def stop(act, hook):  # ends the forward pass: what lies above the hook is not computed
        require(act.shape[:2] == tokens.shape, f"--hook {hook.name} has no vector for each token")
        raise exceptions.StopAtLayerException(act)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        return model.run_with_hooks(tokens, fwd_hooks=[(hook, stop)]).flatten(2).float()
# ---- 3. The data: text -> rows of tokens ---------------------------------------------------------
def documents(src):
    """A stream of examples with a column `text` or `tokens`, read as they are needed."""
    if src == "stdlib":  # the Python standard library's source: its modules of one file
        src = sorted(map(str, Path(json.__file__).parents[1].glob("*.py")))
    elif not (set("*?[") & set(src) or Path(src).is_file()):
        return load_dataset(src, split="train", streaming=True)
    return load_dataset("text", data_files=src, sample_by="document", split="train", streaming=True)

def token_rows(dataset, tokenizer, share=(0, 1), seq_len=128, held_out=False):
    """Yields rows of tokens [seq_len], BOS first, shuffled, without end, from share i of n of
    the data; or those held out, each once, with the number of its document. `text` is packed;
    `tokens`, as in the first replication: 1,024 -> 8 x 128, BOS in place of each piece's first."""
    bos, eos, document = tokenizer.bos_token_id, tokenizer.eos_token_id, 0
    for turn in range(1) if held_out else count():
        for batch in split_dataset_by_node(documents(dataset), *share).shuffle(0).batch(64):
            require({"text", "tokens"} & {*batch}, f"--dataset {dataset}: no text in {[*batch]}")
            if "tokens" in batch:
                runs, start, step = batch["tokens"], 1, seq_len
            else:
                texts = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
                runs, start, step = [[t for text in texts for t in [*text, eos]]], 0, seq_len - 1
            rows = {}
            for run in runs:
                for i in range(start, len(run) - seq_len + 2, step):
                    row = [bos, *run[i:i + seq_len - 1]]
                    if ((check := hash(tuple(row))) % 32 == 0) == held_out:  # 1 in 32 is set aside
                        rows[check] = (row, document + run[:i].count(eos)) if held_out else row
                document += run.count(eos) + 1
            yield from (row for _, row in sorted(rows.items()))  # by checksum: that is, shuffled
        if turn == 0 and not held_out and share[0] == 0:
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
        for slots in self.order[:self.spent].split(rows_at_once * self.per_row):
            rows = list(islice(self.rows, -(-len(slots) // self.per_row)))
            act = harvest(self.model, self.hook, torch.tensor(rows, device=slots.device))
            act = rearrange(act[:, 1:], "row pos d_in -> (row pos) d_in")    # BOS: nothing to learn
            self.store[slots] = act[:len(slots)].to(self.store.dtype)        # last row: cut to fit
        self.order, self.spent = torch.randperm(len(self.store)).to(self.store.device), 0

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
        self.W_dec = torch.nn.Parameter(F.normalize(torch.randn(d_sae, d_in)))  # [d_sae, d_in]
        # Its rows have length 1. A feature begins by reading what it writes; at 0.3, for all sum up
        self.W_enc = torch.nn.Parameter(0.3 * self.W_dec.data.T.contiguous())   # [d_in, d_sae]
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
            x_hat, f = self(x)
        else:
            # f @ W_dec would multiply by d_sae - k zeros. What is left is a sum of k rows of W_dec
            # weighted by f; embedding_bag computes just that, and the same gradients.
            f, i = self.pre_activations(x).topk(self.k)                      # [batch, k] each
            f = F.relu(f)  # [batch, k]
            x_hat = self.b_dec + F.embedding_bag(i, self.W_dec, per_sample_weights=f, mode="sum")
        return (F.mse_loss(x_hat, x, reduction="sum") + l1 * f.sum()) / len(x), x_hat, f

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
                   dtype="float32", device="cpu", normalize_activations="none",
                   reshape_activations="none", apply_b_dec_to_input=True,
                   metadata={"sae_lens_version": "6.0.0"} | metadata)
        cfg |= dict(k=self.k, rescale_acts_by_decoder_norm=False) if self.k else {}
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder, "sae_weights.safetensors"))
        Path(folder, "cfg.json").write_text(json.dumps(cfg))

    @classmethod
    def load(cls, source, device="cpu"):
        """"run1" or "run2" (published), a folder of ours or SAELens's, or a .pt state dict"""
        path = Path(hf_hub_download(REPO, PUBLISHED[source]) if source in PUBLISHED else source)
        try:
            cfg = json.loads((path / "cfg.json").read_text()) if path.is_dir() else {}
            weights = (load_file(path / "sae_weights.safetensors") if cfg else
                       torch.load(path, "cpu", weights_only=True))
            kind = [cfg.get("architecture", "standard"), cfg.get("apply_b_dec_to_input", True)]
            require(kind in (["standard", True], ["topk", True]), f"{kind} is not known here")
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
    error = x - sae(x)[0]                                                    # [batch, d_in]
    drawn = torch.multinomial(error.pow(2).sum(-1).pow(2).cpu(), int(dead.sum()), replacement=True)
    direction = F.normalize(error[drawn], dim=-1)                            # [n_dead, d_in]
    length = sae.W_enc[:, ~dead].norm(dim=0).mean() * (1.0 if sae.k else 0.2)  # the paper's 0.2
    sae.W_dec[dead], sae.W_enc[:, dead], sae.b_enc[dead] = direction, length * direction.T, 0.0
    for moment in "exp_avg", "exp_avg_sq":  # Adam forgets where the old features were going
        adam.state[sae.W_enc][moment][:, dead] = 0.0
        adam.state[sae.W_dec][moment][dead] = adam.state[sae.b_enc][moment][dead] = 0.0

def train(cfg, sae, buffer):
    """Train `sae` in place, with checkpoints and train.jsonl in cfg.out -> the steps it has had"""
    out, done, logged, k, main = Path(cfg.out), 0, 0, sae.k, PartialState().is_main_process
    groups = [{"params": [sae.W_enc, sae.W_dec]}, {"params": [sae.b_enc, sae.b_dec]}]
    adam = torch.optim.Adam(groups, betas=(0.7, 0.97), fused=True)  # short run, short memory
    idle = torch.zeros_like(sae.b_enc, dtype=torch.long)  # [d_sae], steps since a feature fired
    about = dict(model_name=cfg.model, hook_name=cfg.hook, dataset_path=cfg.dataset,
                 d_in=sae.d_in, d_sae=sae.d_sae, k=sae.k, batch_size=cfg.batch_size, of=cfg.steps)
    if cfg.resume:
        state = torch.load(out / "resume.pt", cfg.device, weights_only=True)
        require(state["about"] == about, f"--resume: {out} holds {state['about']}, not {about}")
        done, idle, logged = state["done"], state["idle"], state["log"]
        PartialState().print(f"{out}: {done} of {cfg.steps} steps are done")
        sae.load_state_dict(state["sae"])
        adam.load_state_dict(state["adam"])
        torch.set_rng_state(state["rng"].cpu())
        buffer.rows = islice(buffer.rows, done * cfg.batch_size // buffer.per_row, None)
    if done >= cfg.steps:
        return done
    x = broadcast(buffer.next())  # so that all processes begin alike       # [batch, d_in]
    scale = (x - x.mean(0)).pow(2).mean().sqrt().item()                      # of one of x's numbers
    lr = cfg.lr or 0.27 / sae.d_sae ** 0.5  # more features, smaller steps, as Gao et al. 2024 found
    l1 = 0.0 if sae.k else 0.07 * scale * sae.d_in ** 0.5 if cfg.l1 is None else cfg.l1
    sae.b_dec.data = sae.b_dec.data if cfg.load or cfg.resume else x.mean(0)
    log = open(out / "train.jsonl", "a", buffering=1)
    log.seek(log.truncate(logged))  # what a crash came after is logged anew
    def save():
        sae.save(part := out / "part", **about, steps=done)
        torch.save(dict(about=about, done=done, sae=sae.state_dict(), adam=adam.state_dict(),
                        idle=idle, rng=torch.get_rng_state(), log=log.tell()), part / "resume.pt")
        for file in part.iterdir():
            file.replace(out / file.name)  # a crash leaves the old file or the new, and no half
        part.rmdir()
    with suppress(KeyboardInterrupt):
        bar = tqdm(range(done, cfg.steps), initial=done, total=cfg.steps, disable=not main)
        for step in bar:
            left = 1 - step / cfg.steps  # the share of the run still to come
            warm, decay = min(1, 20 * (1 - left) + 0.01), min(1, left / (0.5 if sae.k else 0.2))
            for group, unit in zip(adam.param_groups, (1, scale)):  # biases are in units of x
                group["lr"] = lr * unit * warm * decay
            sae.k = k and min(sae.d_sae, round(k * 8 ** max(0, 2 * left - 1)))  # first 8 k: few die
            x = buffer.next()                                                # [batch, d_in]
            loss, x_hat, f = sae.loss(x, l1 * warm * (1 + decay) / 2)
            loss.backward()
            for p in sae.parameters():
                p.grad = reduce(p.grad, "mean")  # over the processes of torchrun
            idle = torch.where(sae.b_enc.grad == 0, idle + 1, 0)  # no gradient: it did not fire
            sae.project_gradient()  # the unit-norm rule: before step() and after it
            adam.step()
            sae.normalize()
            adam.zero_grad()
            dead, done = idle > cfg.steps // 20, step + 1                    # [d_sae]
            if step % (cfg.steps // 20 + 1) == 0 and 0.15 < left < 1 and dead.any():
                resample(sae, adam, dead, broadcast(torch.cat([buffer.next() for _ in range(8)])))
            if main and 0 in (step % 25, done % cfg.save_every, done - cfg.steps):  # a GPU waits
                row = dict(loss=loss, l0=(f > 0).sum() / len(x), dead=dead.float().mean(),
                           fvu=(x_hat - x).pow(2).mean() / scale**2, weights=sae.W_enc.norm())
                row = {name: round(value.item(), 4) for name, value in row.items()}
                require(sum(row.values()) < float("inf"), f"not finite: {row}; lower --lr")
                bar.set_postfix(row)
                log.write(json.dumps({"step": done, **row}) + "\n")
                if done % cfg.save_every == 0:
                    save()
    sae.normalize()  # for Ctrl-C may have come between step() and normalize()
    if main:
        save()
    return done
# ---- 7. Evaluation -------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, hook, sae, rows):
    """-> metrics, and how often each feature fires: [d_sae], as a share of the activations
    rows [n, seq_len]: none of them trained on. Cross-entropies are in nats per token."""
    def cross_entropy(replace):
        def splice(act, hook):  # act [rows, seq_len, d_in]; BOS, at position 0, is left alone
            return torch.cat([act[:, :1], replace(act[:, 1:].flatten(2)).view_as(act[:, 1:])], 1)
        return sum(model.run_with_hooks(part, return_type="loss", fwd_hooks=[(hook, splice)])
                   * len(part) for part in rows.split(16)).item() / len(rows)
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
    logits = model.unembed(model.ln_final(torch.stack([direction, 0 * direction])))
    return logits[0] - logits[1]  # without what the biases do

@torch.no_grad()
def report(model, hook, sae, rows, document, metrics, frequency, path, chosen=()):
    """Print metrics, densities and features, and write the same to `path` as a page.
    rows [n, seq_len] and document [n], the number of the text in which each row begins."""
    console, norms = Console(record=True, width=100), sae.W_dec.norm(dim=-1)
    for name, value in metrics.items():
        console.print(f"{name:>14}  {'nothing to recover' if value is None else round(value, 4)}")
    console.print(f" decoder norms  {norms.min():.7f} to {norms.max():.7f}\n")
    console.print("How many features (bars) fire how often (log10 of the share of tokens)")
    density = frequency[frequency > 0].log10().histc(20, -5, 0).tolist()  # 20 bars
    for i, n in enumerate(density):
        console.print(f"{i / 4 - 5:14.2f}  {'█' * round(60 * n / max(1, *density))} {n:.0f}")
    if not chosen:  # twenty, evenly from rare to frequent, of those seen often enough to judge
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
        for peak, text in zip(*peaks.topk(min(5, int((peaks > 0).sum())))):
            row, pos = divmod(int((a * (texts == text)).argmax()), rows.shape[1])
            line, window = Text(f"{peak:7.2f}  "), (row, slice(max(1, pos - 12), pos + 8))
            for token, level in zip(show(model.tokenizer, rows[window]), a[window] / a.max()):
                tint = 255 - int(level * 150)  # black on a tint reads well on light and dark alike
                line.append(token, f"#000000 on rgb(255,{tint},{tint // 2})" if level > 0 else "")
            console.print(line, no_wrap=True, overflow="ellipsis")
    console.save_html(path)
# ---- All of it, in order -------------------------------------------------------------------------
def run(cfg):
    """Under torchrun all this runs in many processes, each with a share of the data and a buffer of
    its own. If one will do, delete what says broadcast, reduce, share, main or PartialState."""
    out, began = Path(cfg.out), time()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    share = PartialState().process_index, PartialState().num_processes
    with PartialState().local_main_process_first():  # tiny-1l is trained, all else fetched, once
        model = load_model(cfg.model, cfg.device, cfg.cache)
    near = get_close_matches(cfg.hook, model.hook_dict, 3, 0)
    require(cfg.hook in near, f"--hook {cfg.hook}: {cfg.model} has none of that name, but {near}")
    torch.manual_seed(cfg.seed)
    held_out = [*islice(token_rows(cfg.dataset, model.tokenizer, share, held_out=True), 384)]
    require(len(held_out) > 1, f"--dataset {cfg.dataset}: not found, or too short to make rows of")
    rows, document = (torch.tensor(column, device=cfg.device) for column in zip(*held_out))
    stream = token_rows(cfg.dataset, model.tokenizer, share)
    buffer = ActivationBuffer(model, cfg.hook, stream, cfg.batch_size, cfg.buffer, cfg.device)
    sae = SparseAutoencoder(buffer.d_in, cfg.d_sae or 8 * buffer.d_in, cfg.k).to(cfg.device)
    sae = SparseAutoencoder.load(cfg.load, cfg.device) if cfg.load else sae
    require(sae.d_in == buffer.d_in and (sae.k or 0) <= sae.d_sae,
            f"the SAE: d_in {sae.d_in}, d_sae {sae.d_sae}, k {sae.k}. The hook: d_in {buffer.d_in}")
    shown = [int(i) for i in cfg.features.split(",")] if cfg.features else []
    require({*shown} <= {*range(sae.d_sae)}, f"--features {shown}: they are 0 to {sae.d_sae - 1}")
    done = train(cfg, sae, buffer)
    if share[0] == 0:
        metrics, frequency = evaluate(model, cfg.hook, sae, rows)
        metrics |= dict(steps=done, tokens=done * cfg.batch_size * share[1], seconds=time() - began)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
        report(model, cfg.hook, sae, rows, document, metrics, frequency, out / "report.html", shown)

def main(argv=None):
    parser = HfArgumentParser(Config, description=__doc__.split("\n")[0])
    parser.error = lambda message: parser.exit(2, f"sae.py: {message}\n")
    try:
        run(Config(**vars(parser.parse_args(argv))))
    except (OSError, ValueError) as error:  # what the user can put right; bugs show their traceback
        parser.exit(2, f"sae.py: {' '.join(str(error).split())}\n")

if __name__ == "__main__":
    main()
