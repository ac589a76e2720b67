"""A transformer by hand, for every family ScaleBiO was run on, with its checkpoints and generation.

GPT-2, GPT-NeoX, Llama and the families after it are one `Transformer`: what sets a family apart is
a field of `ModelConfig`, which hf/families.py reads from Hugging Face's config.json. The reference
is `transformers`, whose logits, losses and gradients tests/test_model.py compares. Checkpoints'
files are the concern of hf/pretrained.py.

    model = from_pretrained("gpt2")                     # a hub id or a directory
    losses = model(tokens, labels)                      # (B,), the mean over each sample's response
    replies = generate(model, prompts, max_new_tokens=64, eos_id=model.config.eos_ids)

Read it first as if the residual stream x were a batch (B, T, D), as in any transformer:

    x = embed(tokens)
    for block in blocks:
        x = x + attn(norm(x))
        x = x + mlp(norm(x))
    logits = head(norm(x))                              # (B, T, V)

But neither padding nor a prompt predicts anything. All but attention treats each position by
itself, so x is a table with a row for each position that is needed; attention alone lays the rows
out as a batch and picks them up again (`Rows`). P rows, of each sample those up to its last
prediction, go through the blocks; after the last block's attention only the M that predict do.
Of two samples of prompt p, answer a and padding ·, with positions counted through:

    tokens (B, T)     positions            P rows        M rows: each predicts the next token, an a
    p p p a a ·       0 1 2 3  4  5        0 1 2 3       2 3
    p p a · · ·       6 7 8 9 10 11        6 7           7

Without labels, as in generation, P is B T.

B batch, T time, D width, N heads, K key/value heads, H head size, R rotated part of a head,
V vocabulary, L slots of the cache, P rows, M rows that predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hf import Problems, pretrained
from hf.families import ModelConfig, Rope


def wide(dtype: torch.dtype) -> torch.dtype:
    """What losses, norms and RoPE tables are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def dtype_of(flag: str, device_type: str) -> torch.dtype:
    """What parameters are stored in, by --dtype."""
    auto = "bf16" if device_type == "cuda" else "fp32"
    return DTYPES[auto if flag == "auto" else flag]


class RMSNormPlusOne(nn.RMSNorm):
    """Gemma's RMSNorm multiplies by 1 + weight, in fp32: near 1, bf16 has steps of 1/128."""

    offset = 1

    def forward(self, x: Tensor) -> Tensor:
        weight = self.offset + self.weight.to(wide(x.dtype))
        return F.rms_norm(x.to(weight.dtype), self.normalized_shape, weight, self.eps).to(x.dtype)


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "rms+1": RMSNormPlusOne}


def make_norm(c: ModelConfig, width: int, wanted: bool = True) -> nn.Module:
    """The family's norm; or what passes x on, where the family has none."""
    return NORMS[c.norm](width, eps=c.norm_eps) if wanted else nn.Identity()


class Embed(nn.Module):
    """Token embedding, with learned positions where the family has them."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.scale = c.embed_scale
        self.weight = nn.Parameter(torch.empty(c.vocab, c.width))
        self.positions = nn.Embedding(c.max_positions, c.width) if c.learned_positions else None

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(tokens, self.weight)  # (P, D)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.scale != 1:
            # Rounded to the weights' dtype first, as in Gemma's training: in bf16, 59.867 is 59.75.
            x = x * torch.full((), self.scale, dtype=x.dtype, device=x.device)
        return x


def rope_tables(
    c: ModelConfig, rope: Rope, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of each pair's rotation at `positions`, (B or 1, T, 1, R): once for the first
    features of the pairs, where sin is negated, and once for the second.

    To read on past the `length` that it was first trained on, a model divides a frequency by
    `factor`: "linear" any; "llama3" and "yarn" a low one, and keep a high one, by how often it
    turns within `length`. YaRN also stretches what is rotated.
    """
    R, size, kind = c.rotary, 1.0, rope.kind
    pairs = torch.arange(0, R, 2, device=positions.device, dtype=dtype)
    frequency = 1 / rope.theta ** (pairs / R)  # (R/2,)
    if kind == "linear":
        factor, keep = *rope.numbers, 0
    elif kind == "llama3":
        factor, low, high, length = rope.numbers
        turns = length * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        factor, length, fast, slow, size, whole = rope.numbers
        # The pairs that turn `fast` and `slow` times within `length`, those between being between.
        first, last = (R * math.log(length / (n * 2 * math.pi)) / (2 * math.log(rope.theta))
                       for n in (fast, slow))  # fmt: skip
        first, last = (math.floor(first), math.ceil(last)) if whole else (first, last)
        first, last = max(first, 0), min(last, R - 1)
        keep = 1 - ((pairs / 2 - first) / (last - first or 0.001)).clamp(0, 1)
    if kind != "default":
        frequency = frequency * (keep + (1 - keep) / factor)
    angle = positions[..., None, None].to(dtype) * frequency
    cos, sin = size * angle.cos(), size * angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + R/2]) of the first R features of each head, in the tables' dtype:
    x (B, T, N or K, H)."""
    R = cos.shape[-1]
    a, rest = x[..., :R], x[..., R:]
    turned = torch.addcmul(a * cos, a.roll(R // 2, dims=-1), sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def causal_mask(positions: Tensor, slots: int, window: int | None) -> Tensor:
    """True where the query at a position (B or 1, T) may look at a slot: (B or 1, 1, T, slots)."""
    query = positions[:, None, :, None]
    key = torch.arange(slots, device=positions.device)
    mask = key <= query
    return mask & (key > query - window) if window else mask


class Rows(NamedTuple):
    """Which positions of a batch the rows of a table are: index (P,), of 0 to B T - 1, or None for
    all in order, which needs no copies."""

    shape: tuple[int, int]  # B, T
    index: Tensor | None = None

    def pick(self, x: Tensor) -> Tensor:
        """(B, T, …) -> (P, …). No position is picked twice, so that backward, which adds to zeros,
        gives the same bits in any order."""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def samples(self, device: torch.device) -> Tensor:
        """(P,): the sample that each row belongs to."""
        index = self.index
        if index is None:
            index = torch.arange(math.prod(self.shape), device=device)
        return index // self.shape[1]

    def grid(self, x: Tensor) -> Tensor:
        """The opposite, (P, …) -> (B, T, …), zero at all other positions."""
        if self.index is not None:
            x = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_copy_(0, self.index, x)
        return x.unflatten(0, self.shape)


class Context(NamedTuple):
    """What a block is told beside the residual stream."""

    rows: Rows  # the P rows of x on entry
    out: Rows  # the rows of x on return: the same, or M of them
    keep: Tensor | None = None  # (M,), the places of `out` among the P rows; None: all
    rope: tuple[Tensor, Tensor] | None = None  # from rope_tables, where positions are rotated
    mask: Tensor | None = None  # from causal_mask; None: causal
    # Takes the keys and the values of these positions, each (B, T, K, H), and returns both of all
    # positions so far, (2, B, L, K, H); see Cache.
    cache: Callable[[Tensor, Tensor], Tensor] | None = None

    def trim(self, x: Tensor) -> Tensor:
        """(P, …) -> (M, …)"""
        return x if self.keep is None else x.index_select(0, self.keep)


class Attention(nn.Module):
    """Causal attention of N query heads over K key/value heads."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        H = c.head_size
        self.q = nn.Linear(c.width, c.n_heads * H, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.n_kv_heads * H, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.n_kv_heads * H, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_heads * H, c.width, bias=c.out_bias)
        self.normed = (c.n_heads * H, c.n_kv_heads * H) if c.qk_norm == "all" else (H, H)
        self.q_norm, self.k_norm = (make_norm(c, n, bool(c.qk_norm)) for n in self.normed)
        self.head_size, self.groups = H, c.n_heads // c.n_kv_heads
        self.scale, self.cap = c.score_scale, c.score_cap

    def forward(self, x: Tensor, at: Context) -> Tensor:
        """x (P, D) -> (P or M, D)."""
        H, (of_q, of_k) = self.head_size, self.normed
        q = self.q_norm(self.q(at.trim(x)).unflatten(1, (-1, of_q)))
        k = self.k_norm(self.k(x).unflatten(1, (-1, of_k)))
        q, k, v = (t.flatten(1).unflatten(1, (-1, H)) for t in (q, k, self.v(x)))
        q = at.out.grid(q)  # (P or M, N, H) -> (B, T, N, H)
        k, v = at.rows.grid(k), at.rows.grid(v)  # (P, K, H) -> (B, T, K, H)
        if at.rope is not None:
            q, k = rotate(q, *at.rope), rotate(k, *at.rope)
        if at.cache is not None:
            k, v = at.cache(k, v)  # (B, L, K, H)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), at.mask)
        return self.o(at.out.pick(y.transpose(1, 2).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q (B, N, T, H), k and v (B, K, T or L, H) -> (B, N, T, H)."""
        # Only the flash kernel lets heads share k and v, and it takes neither masks nor fp32.
        flash = mask is None and q.dtype in (torch.bfloat16, torch.float16)
        if self.groups > 1 and not flash:
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))  # (B, N, T or L, H)
        if self.cap is None:
            options = {"is_causal": mask is None, "enable_gqa": flash and self.groups > 1}
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, **options)
        scores = self.cap * torch.tanh(q @ k.transpose(2, 3) * (self.scale / self.cap))
        scores = scores.masked_fill(~mask, -math.inf)  # (B, N, T, T or L)
        return torch.softmax(scores, dim=-1, dtype=wide(q.dtype)).to(q.dtype) @ v


class MLP(nn.Module):
    """Two layers, the inner one gated (SwiGLU, GeGLU) in the families after GPT-NeoX."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(c.width, c.hidden, bias=c.mlp_bias) if c.gated else None
        self.up = nn.Linear(c.width, c.hidden, bias=c.mlp_bias)
        self.down = nn.Linear(c.hidden, c.width, bias=c.mlp_bias)
        self.activation = c.activation

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x) if self.gate is None else self.gate(x)  # (P or M, hidden)
        if self.activation == "silu":
            inner = F.silu(inner)
        else:  # every other spelling than "gelu" names the tanh approximation
            inner = F.gelu(inner, approximate="none" if self.activation == "gelu" else "tanh")
        return self.down(inner if self.gate is None else inner * self.up(x))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream.

        x ─┬─ attn_norm ─ attn ─ [attn_post_norm] ─ + ─┬─ mlp_norm ─ mlp ─ [mlp_post_norm] ─ + ─▶
           └────────────────────────────────────────┘  └─────────────────────────────────────┘

    parallel (GPT-NeoX):  x + attn(attn_norm(x)) + mlp(mlp_norm(x))
    The norms in brackets are Gemma's and OLMo-2's, which has no others; elsewhere they pass x on.
    Granite scales what is added.
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attn_norm, self.attn = make_norm(c, c.width, c.pre_norms), Attention(c)
        self.attn_post_norm = make_norm(c, c.width, c.post_norms)
        self.mlp_norm, self.mlp = make_norm(c, c.width, c.pre_norms), MLP(c)
        self.mlp_post_norm = make_norm(c, c.width, c.post_norms)
        self.parallel, self.scale = c.parallel, c.residual_scale

    def forward(self, x: Tensor, at: Context) -> Tensor:
        """x (P, D) -> (P or M, D)."""
        a = self.attn(self.attn_norm(x), at)
        x = at.trim(x)
        if self.parallel:
            return x + a + self.mlp(self.mlp_norm(x))
        x = torch.add(x, self.attn_post_norm(a), alpha=self.scale)
        return torch.add(x, self.mlp_post_norm(self.mlp(self.mlp_norm(x))), alpha=self.scale)


def capped(y: Tensor, cap: float | None) -> Tensor:
    """Gemma-2's bound on logits."""
    return y if cap is None else cap * torch.tanh(y / cap)


class TokenLosses(torch.autograd.Function):
    """Cross-entropy at M positions, whose logits (M, V) are made a chunk of positions at a time.

        y = cap(z), z = x Wᵀ      d = ∂loss/∂z = (softmax(y) − onehot(target)) (1 − y²/cap²)

    For backward the first K rows of d are kept, in the dtype of x; of the others the logits are
    made again there. The gradient that arrives for each loss scales the rows of dx and of x,
    (M, D), rather than the M V numbers of d.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, cap, chunk, keep, head=None):
        """x (M, D), targets (M,) -> (M,). A `chunk` is so many positions; `keep` is K, M or several
        chunks. The slopes of a `head` that is given learn what each row adds to them."""
        padded, losses, V = TokenLosses.padded(weight), [], len(weight)
        kept = x.new_empty(keep, len(padded))
        for i, (h, t) in enumerate(zip(x.split(chunk), targets.split(chunk), strict=True)):
            y = None  # free the last chunk's before the next one's is made
            y = TokenLosses.logits(h, padded, cap, V)
            log_p = F.log_softmax(y, -1, dtype=wide(x.dtype))
            losses.append(F.nll_loss(log_p, t, reduction="none"))
            del log_p
            if len(d := kept[i * chunk : (i + 1) * chunk]):
                TokenLosses.logits_grad(y, t, losses[-1], cap, d)
        losses = torch.cat(losses)
        ctx.save_for_backward(x, weight, targets, losses, kept)
        ctx.cap, ctx.chunk, ctx.head = cap, chunk, head
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, targets, losses, d = ctx.saved_tensors
        padded, keep = TokenLosses.padded(weight), len(d)
        dx, dw, slopes = [], None, []
        along = None
        if ctx.head is not None:
            along = TokenLosses.padded(ctx.head.slopes.of(ctx.head)["weight"])  # (V', D)

        def parts(a: Tensor) -> list[Tensor]:  # what is kept, as a whole, and chunks of the rest
            return [b for b in (a[:keep], *a[keep:].split(ctx.chunk)) if len(b)] or [a]

        each = zip(*map(parts, (x, targets, losses, grad[:, None])), strict=True)
        for i, (h, t, loss, g) in enumerate(each):
            if i or not keep:
                d = None  # the last chunk's
                y = TokenLosses.logits(h, padded, ctx.cap, len(weight))
                d = TokenLosses.logits_grad(y, t, loss, ctx.cap)
                del y
                d = d.to(x.dtype)  # (m, V')
            if along is not None:  # ⟨∂loss/∂z, h dᵀ⟩
                slopes.append((g * h * (d @ along)).sum(1))
            if ctx.needs_input_grad[0]:
                dx.append((g * (d @ padded)).to(x.dtype))
            if ctx.needs_input_grad[1]:
                h = (g * h).to(x.dtype)
                dw = d.T @ h if dw is None else dw.addmm_(d.T, h)
        if dw is not None:
            # Not dw[:V]: a tied embedding's gradient can be added in place to no view.
            dw.resize_(weight.shape)
        if along is not None:
            ctx.head.slopes.add(torch.cat(slopes))
        return torch.cat(dx) if dx else None, dw, None, None, None, None, None

    @staticmethod
    def padded(weight: Tensor) -> Tensor:
        """In bf16 with rows of zeros up to a multiple of 8: (V', D). Where V is not one, as GPT-2's
        50257, a GPU multiplies several times slower."""
        more = -len(weight) % 8 if weight.dtype != wide(weight.dtype) else 0
        return F.pad(weight, (0, 0, 0, more)) if more else weight

    @staticmethod
    def logits(h: Tensor, padded: Tensor, cap: float | None, V: int) -> Tensor:
        """y (m, V') as multiplied, but fp32 where it is capped; the columns of padding get
        probability 0."""
        y = h @ padded.T
        if cap is not None:
            y = capped(y.to(wide(h.dtype)), cap)
        y[:, V:] = torch.finfo(y.dtype).min
        return y

    @staticmethod
    def logits_grad(y: Tensor, t: Tensor, loss: Tensor, cap: float | None, out=None) -> Tensor:
        """d of a chunk, (m, V'), in `out`. softmax − 1 of the target is exp(−loss) − 1, of which
        bf16 would lose what is small."""
        # Straight into `out` where nothing follows: copying it there would take as long again.
        d = torch.softmax(y, -1, out=out if cap is None else None)
        d.scatter_(1, t[:, None], loss.neg().expm1().to(d.dtype)[:, None])
        if cap is not None:
            d.addcmul_(d * y, y, value=-1 / cap**2)
            d = d if out is None else out.copy_(d)
        return d


class Head(nn.Module):
    """Logits, or the loss at each position."""

    # Of the gradient of a micro-batch's logits so much is kept for backward; the rest is made again
    # there. Logits are made in chunks of a sixteenth of this in fp32; some three are held at once.
    logits_bytes = 2e9

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.vocab, c.width))
        self.cap, self.scale = c.logit_cap, c.logit_scale
        self.slopes = None  # see bilevel.Slopes: the loss is not linear in the weight

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x (…, D) -> logits (…, V), or x (M, D) with targets (M,) -> losses (M,)."""
        x = x if self.scale == 1 else x * self.scale
        if targets is None:
            return capped(F.linear(x, self.weight).to(wide(x.dtype)), self.cap)
        # Bytes that a column of logits may take, and no more than all rows need.
        column = min(self.logits_bytes / len(self.weight), 64 * len(x))
        chunk = max(1, int(column / 64))  # 16 x 4 bytes
        keep = min(int(column / x.element_size()) // chunk * chunk, len(x))
        keep *= torch.is_grad_enabled()
        watched = self if self.slopes is not None and self.slopes.trains(self) else None
        return TokenLosses.apply(x, self.weight, targets, self.cap, chunk, keep, watched)


class Predictions:
    """What labels (B, T) ask for, and the rows that takes: see the picture above. Found where the
    labels are, on the CPU: sizes that depend on data on the GPU would have to be waited for.

    rows           the P rows that take part; all, where that is less than 5% too many
    out            the M rows that predict
    keep (M,)      their places among the P rows
    targets (M,)   the tokens they predict
    counts (B,)    predictions in each sample, or 1
    """

    def __init__(self, labels: Tensor, device: torch.device):
        answered = F.pad(labels[:, 1:] != -100, (0, 1))  # (B, T), by the position that predicts
        needed = answered.flip(1).cumsum(1).flip(1) > 0  # (B, T)
        places = answered.flatten().nonzero().squeeze(1)  # (M,)
        rows = needed.flatten().nonzero().squeeze(1)  # (P,)
        keep = needed.flatten().cumsum(0)[places] - 1
        if len(rows) > 0.95 * needed.numel():  # copying to B T rows and back would cost more
            rows, keep = None, places
        targets = labels.flatten()[places + 1]

        def move(x: Tensor) -> Tensor:
            pinned = device.type == "cuda" and x.device.type == "cpu"  # else the copy is waited for
            return (x.pin_memory() if pinned else x).to(device, non_blocking=True)

        shape = tuple(labels.shape)
        places, self.keep, self.targets = move(torch.stack((places, keep, targets)))
        self.rows, self.out = Rows(shape, rows if rows is None else move(rows)), Rows(shape, places)
        self.counts = move(answered.sum(1).clamp(min=1))

    def means(self, losses: Tensor) -> Tensor:
        """Of each sample, (B,), from losses (M,); 0 where there are none."""
        return self.out.grid(losses).sum(1) / self.counts


class Transformer(nn.Module):
    """embed -> blocks -> norm -> head. Has no buffers, so that `to_empty` leaves none undefined."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = make_norm(config, config.width)
        self.head = Head(config)
        self.recompute = False  # activation checkpointing: keep the blocks' inputs alone
        self.tie()

    def tie(self) -> None:
        """Make a tied head's weight the embedding's, which `to_empty` from meta undoes."""
        if self.config.tied:
            self.head.weight = self.embed.weight

    def __call__(self, tokens: Tensor, labels: Tensor | None = None, **rest) -> Tensor:
        """See forward. FSDP, whose hook is called next, would move labels to the GPU."""
        asked = None if labels is None else Predictions(labels, tokens.device)
        return super().__call__(tokens, asked, **rest)

    def forward(
        self,
        tokens: Tensor,
        labels: Predictions | None = None,
        cache: Cache | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or with labels the mean response loss of each sample (B,). Both are
        fp32 (float64 for float64 parameters).

        tokens (B, T)   padded on the right
        labels (B, T)   -100: no loss; labels[t] is predicted from tokens up to t-1. A sample
                        without labels has loss 0. They may stay on the CPU; a call makes
                        Predictions of them
        cache           tokens continue what it holds
        last (B,)       compute logits at this index of each row alone: (B, 1, V)
        """
        c, (B, T) = self.config, tokens.shape
        if c.learned_positions and c.max_positions < T:
            raise ValueError(f"{T} tokens: the model has {c.max_positions} positions")
        times = torch.arange(T, device=tokens.device)[None]  # (1, T): places in the sample
        if cache is not None:
            times = times + cache.lengths[:, None]  # (B, T)
        rows, keep = Rows((B, T)), None
        out = rows
        if labels is not None:
            rows, out, keep = labels.rows, labels.out, labels.keep
            both = (table.samples(tokens.device) for table in (rows, out))
            self.row_samples = {len(sample): sample for sample in both}
        elif last is not None:
            keep = torch.arange(B, device=tokens.device) * T + last
            out = Rows((B, T), keep)
        slots, masks = T if cache is None else cache.slots, {}
        for window in set(c.windows):
            free = cache is None and c.score_cap is None and (window is None or window >= T)
            masks[window] = None if free else causal_mask(times, slots, window)
        x = self.embed(rows.pick(tokens), rows.pick(times.expand(B, T)))  # (P, D)
        ropes = {rope: rope and rope_tables(c, rope, times, wide(x.dtype)) for rope in set(c.ropes)}
        at = Context(rows, rows)
        for i, block in enumerate(self.blocks):
            extend = None if cache is None else partial(cache.extend, i, times)
            at = at._replace(mask=masks[c.windows[i]], rope=ropes[c.ropes[i]], cache=extend)
            if i == c.n_layers - 1:
                at = at._replace(out=out, keep=keep)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, at, use_reentrant=False)
            else:
                x = block(x, at)
        x = self.norm(x)  # (M, D), or (B T, D)
        if labels is None:
            return self.head(x.unflatten(0, (B, -1)))
        return labels.means(self.head(x, labels.targets))


# Generation

class Cache:
    """Keys and values of the tokens so far. Slot t of a row holds position t, so rows of different
    lengths stand side by side; a slot past a row's end is masked until its token overwrites it."""

    def __init__(self, lengths: Tensor, slots: int):
        self.lengths, self.slots = lengths, slots  # (B,): positions held; L
        self.blocks: list[Tensor] = []

    def extend(self, i: int, times: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write block i's keys and values (B, T, K, H) of positions `times` (B, T); all that are
        held, (2, B, L, K, H)."""
        if i == len(self.blocks):
            self.blocks.append(k.new_zeros(2, len(k), self.slots, *k.shape[2:]))
        samples = torch.arange(len(k), device=k.device)[:, None]
        self.blocks[i][0, samples, times], self.blocks[i][1, samples, times] = k, v
        return self.blocks[i]


def sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    """One token for each row of logits (B, V): the likeliest at temperature 0; else that in whose
    share of [0, 1) the draw (B,) falls."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the mass of likelier tokens
        probs = probs.scatter(-1, order, ordered.where(before < top_p, 0))
    mass = probs.double().cumsum(-1)
    new = torch.searchsorted(mass, (draws * mass[:, -1])[:, None], right=True).squeeze(1)
    return new.clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_id: int | Iterable[int] | None = None,
    seeds: Sequence[int] | None = None,
    stop_when: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Continue each prompt until EOS, `max_new_tokens` or the model's last position. Returns the
    new tokens, without EOS.

    eos_id      one id or several
    seeds       of the draws of each prompt, by default 0, 1, …: what else is in the batch does not
                matter
    stop_when   told after each token whether all rows are finished; returns whether to stop. Under
                FSDP every rank must make the same number of forwards: all-reduce it there
    Raises ValueError for an empty prompt, or one that leaves no position.
    """
    limit = model.config.max_positions
    bad = [i for i, p in enumerate(prompts) if not 0 < len(p) < limit]
    if bad or not prompts:
        raise ValueError(f"prompts {bad}: permitted are 1 to {limit - 1} tokens")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: must be >= 0, and in (0, 1]")
    device = next(model.parameters()).device
    ends = torch.tensor([] if eos_id is None else eos_id, dtype=torch.long, device=device).view(-1)
    seeds = range(len(prompts)) if seeds is None else seeds
    rngs = (torch.Generator().manual_seed(seed) for seed in seeds)  # the same on every device
    draws = torch.stack([torch.rand(max_new_tokens, dtype=torch.double, generator=rng)
                         for rng in rngs]).to(device)  # (B, N)  # fmt: skip
    lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
    rows, longest = torch.arange(len(prompts), device=device), max(map(len, prompts))
    size = min(longest + max_new_tokens, limit)
    tokens = torch.tensor([p + [0] * (size - len(p)) for p in prompts], device=device)  # (B, L)
    cache = Cache(torch.zeros_like(lengths), size)
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    fed, last = tokens[:, :longest], lengths - 1
    for n in range(max_new_tokens):
        logits = model(fed, cache=cache, last=last)[:, 0]  # (B, V)
        new = sample(logits, temperature, top_p, draws[:, n])
        goes_on = lengths < size  # a row at the end is fed its last token again, to no effect
        tokens[rows[goes_on], lengths[goes_on]] = new[goes_on]
        lengths = lengths + goes_on
        finished |= torch.isin(new, ends) | (lengths == size)
        if stop_when(bool(finished.all())):
            break
        cache.lengths = lengths - 1
        fed, last = tokens[rows, lengths - 1][:, None], torch.zeros_like(lengths)
    stops = set(ends.tolist())
    texts = zip(prompts, tokens.tolist(), lengths.tolist(), strict=True)
    replies = (row[len(prompt) : length] for prompt, row, length in texts)
    return [list(takewhile(lambda token: token not in stops, reply)) for reply in replies]


# Weights, from a checkpoint or at random

def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the model's own order. A tied head is not among them."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def open_checkpoint(id_or_dir: str | Path) -> tuple[Path, ModelConfig]:
    """The directory of a checkpoint, checked down to each tensor's shape, and its configuration.

    Reads no weights. Raises one ValueError with a line for each problem.
    """
    directory = pretrained.find_checkpoint(id_or_dir)
    config = pretrained.load_config(directory)
    Problems(pretrained.check_weights(directory, config, parameter_shapes(config))).raise_if_any()
    return directory, config


def read_tensors(directory: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, full CPU tensor) of each parameter of an opened checkpoint, in the files' dtype. The
    tensors lie in memory-mapped files: copy what is to be kept."""
    return pretrained.read_tensors(directory, config, parameter_shapes(config))


def random_weights(
    config: ModelConfig, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """GPT-2's initialisation, float32: N(0, initializer_range), by default 0.02, and less by
    1/sqrt(2 layers) where a block writes to the residual stream.

    A tensor depends on (seed, its place in the model) alone; and on the kind of GPU it is drawn on.
    """
    for i, (name, shape) in enumerate(parameter_shapes(config).items()):
        if name.endswith("bias"):
            yield name, torch.zeros(shape, device=device)
        elif "norm" in name:
            yield name, torch.full(shape, float(config.norm != "rms+1"), device=device)
        else:
            rng = torch.Generator(device).manual_seed(seed * 1_000_000 + i)
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            std = config.hf.get("initializer_range", 0.02)
            std /= math.sqrt(2 * config.n_layers) if residual else 1
            yield name, torch.normal(0.0, std, shape, generator=rng, device=device)


def build(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A model in one process, filled from (name, tensor) pairs."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    model.tie()
    missing = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            missing.pop(name).copy_(tensor)
    assert not missing, f"no tensor for {list(missing)}"
    return model


def from_pretrained(
    id_or_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """Load a hub id or a local directory, unsharded. Raises one ValueError with all problems."""
    directory, config = open_checkpoint(id_or_dir)
    return build(config, read_tensors(directory, config), dtype, device)


def save_pretrained(model: Transformer, directory: str | Path) -> None:
    """Write an unsharded model in Hugging Face's format, without a tokenizer."""
    with pretrained.written_whole(directory) as temporary:
        parameters = ((name, p.detach().cpu()) for name, p in model.named_parameters())
        like = ((name, p.detach().to("meta")) for name, p in model.named_parameters())
        pretrained.write_tensors(temporary, model.config, parameters, like)
