"""MoRE's operations with hand-written backward passes: many maps in one kernel, nothing kept that is not needed.

Each is the mathematics of `layer.py` and `more_ds.losses`, with the shapes fixed by the batch alone and no question to
the device in between. The gradients with respect to every differentiable input are exact; second derivatives are not
offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from more_ds.tuners.more.products import Products


class Choose(torch.autograd.Function):
    """The straight-through gate of many maps: which expert each task uses, and what it multiplies the components by.

    With p = softmax(W e + b) and k = argmax p, the value is `table[k]`, and the gradient is that of `p[k] * table[k]`
    at p[k] = 1 (equations 3 to 5); or that of `p @ table` (`is_for_all`), which tells every expert what it would have
    done to the loss, where the paper's tells the chosen one alone whether there should be more of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        embeddings: Tensor,
        rows: Tensor,
        table: Tensor,
        is_for_all: bool = False,
        again: Callable[[], Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """Choose for a batch.

        Args:
            ctx: autograd's.
            weight: (maps, r, h) of the gates.
            bias: (maps, r).
            embeddings: (maps, tasks, h).
            rows: (batch,) the task of every example.
            table: (r, r) what expert k + 1 multiplies the components by.
            is_for_all: whether the gradient reaches the p of all experts.
            again: makes the first three again; they are then not kept while the activations are.

        Returns:
            (batch, maps * r).
        """
        by_row = embeddings.shape[1] > len(rows)  # whichever are fewer: the tasks, or the examples
        asked = embeddings.index_select(1, rows) if by_row else embeddings
        p = torch.softmax(torch.baddbmm(bias.unsqueeze(1), asked, weight.mT), dim=-1)
        chosen = p.argmax(-1)
        values = table[chosen]
        ctx.by_row, ctx.tasks, ctx.again = by_row, embeddings.shape[1], again
        kept = (weight, asked) if again is None else (None, None)
        ctx.save_for_backward(*kept, rows, p, *((table, None) if is_for_all else (values, chosen)))
        maps, _, r = p.shape
        drawn = values if by_row else values.index_select(1, rows)
        return drawn.transpose(0, 1).reshape(len(rows), maps * r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """From (batch, maps * r) to the gates and the embeddings."""
        weight, asked, rows, p, multipliers, chosen = ctx.saved_tensors  # of all experts, or of the chosen ones alone
        if ctx.again is not None:
            weight, _, asked = ctx.again()
            asked = asked.index_select(1, rows) if ctx.by_row else asked
        maps, _, r = p.shape
        grad = grads[0].view(len(rows), maps, r).transpose(0, 1)
        if not ctx.by_row:
            grad = torch.zeros_like(p).index_add_(1, rows, grad)
        if chosen is None:
            to_p = grad @ multipliers.T
            logits = p * (to_p - (p * to_p).sum(-1, keepdim=True))
        else:
            index = chosen.unsqueeze(-1)
            scale = (grad * multipliers).sum(-1, keepdim=True) * p.gather(-1, index)
            logits = torch.mul(p, -scale).scatter_add_(-1, index, scale)
        to_asked = torch.bmm(logits, weight)
        if ctx.by_row:
            whole = to_asked.new_zeros(maps, ctx.tasks, to_asked.shape[-1])
            to_asked = whole.index_add_(1, rows, to_asked)
        return torch.bmm(logits.mT, asked), logits.sum(1), to_asked, None, None, None, None


class Contrast(torch.autograd.Function):
    """The contrastive loss of many maps at once; see `more_ds.losses.contrastive_loss`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, owners: Tensor, embeddings: Tensor, rows: Tensor, temperature: float) -> Tensor:
        """Compute the mean over the maps and the batch, in nats.

        Args:
            ctx: autograd's.
            z: (inputs, batch, h) pooled inputs, float32.
            owners: (maps,) which of the inputs each map reads.
            embeddings: (maps, tasks, h), float32.
            rows: (batch,) the examples' own tasks.
            temperature: divides the cosine.
        """
        z_length, scale = (torch.linalg.vector_norm(one, dim=-1).clamp_(min=1e-12) for one in (z, embeddings))
        unit, scale = z / z_length.unsqueeze(2), scale.mul_(temperature)
        logits = torch.bmm(unit.index_select(0, owners), embeddings.mT).div_(scale.unsqueeze(1))
        log_p = torch.log_softmax(logits, dim=-1)
        index = rows.view(1, -1, 1).expand(*log_p.shape[:-1], 1)
        ctx.save_for_backward(unit, embeddings, z_length, scale, logits, log_p, index, owners)
        ctx.temperature = temperature
        return -log_p.gather(-1, index).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """From the scalar to the pooled inputs and the embeddings.

        The embeddings of all maps are large, their units as large again: what would be taken along each unit is taken
        from the logits instead. With l = z e / (|z| |e| tau), the gradient of l is (z / |z|) / (|e| tau) - l e / |e|^2.
        """
        unit, embeddings, z_length, scale, logits, log_p, index, owners = ctx.saved_tensors
        share = grads[0] / index.numel()
        to_logits = log_p.exp().mul_(share).scatter_add_(-1, index, (-share).expand(index.shape))
        to_logits.div_(scale.unsqueeze(1))
        to_e = torch.bmm(to_logits.mT, unit.index_select(0, owners))
        along = (to_logits * logits).sum(1).div_(scale).unsqueeze(2)
        to_e.addcmul_(embeddings, along, value=-(ctx.temperature**2))
        to_unit = torch.zeros_like(unit).index_add_(0, owners, torch.bmm(to_logits, embeddings))
        to_z = (to_unit - unit * (to_unit * unit).sum(-1, keepdim=True)).div_(z_length.unsqueeze(2))
        return to_z, None, to_e, None, None


def answer_few(
    x: Tensor, a: Tensor, v: Tensor, bases: Sequence[Mapping[str, Any]], bs: Sequence[Tensor]
) -> Iterator[Tensor]:
    """What `SharedInput` computes, without a gradient and without dropout, for a batch of few tokens.

    Args:
        x: (batch, ..., in).
        a: (maps * r, in).
        v: (batch or 1, maps * r).
        bases: `weight` (out, in) and `bias` (out,) or None of every map.
        bs: their (out, r).

    Returns:
        (batch, ..., out) of every map.
    """
    flat = x.reshape(-1, x.shape[-1])
    z = F.linear(flat, a)
    z = z * v if v.shape[0] in (1, z.shape[0]) else (z.view(v.shape[0], -1, v.shape[1]) * v.unsqueeze(1)).view(z.shape)
    for base, b, part in zip(bases, bs, z.split(bs[0].shape[1], dim=1), strict=True):
        y = F.linear(flat, base["weight"], base["bias"])
        yield y.addmm_(part, b.T).view(*x.shape[:-1], -1)


class SharedInput(torch.autograd.Function):
    """Frozen linear maps which read one tensor, each with its update, and the pooled tensor beside them.

    h_i = W_i x + b_i + B_i ((A_i drop(x)) * v_i): one product with all A's, the update added in place to the base's
    output, one gradient of x for all maps. Kept for the backward pass are x, or what it is made of, one bit of dropout
    per value, and A x, with the tokens in its rows' direction: products of thin matrices are up to six times faster on
    a CPU when the long side lies in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        products: Products,
        product: GatedProduct | None,
        dropout: float,
        a: Tensor,
        v: Tensor,
        pooling: Tensor | None,
        maps: int,
        *parameters: Any,
    ) -> tuple[Tensor, ...]:
        """Run the maps.

        Args:
            ctx: autograd's.
            x: (batch, ..., in).
            products: how large matrices are multiplied.
            product: what x is the product of, if that is kept anyway; x is then made again when it is needed.
            dropout: probability with which the A's do not see a value of x; drawn as `F.dropout` draws it.
            a: (maps * r, in) the A's, one below the other.
            v: (batch or 1, maps * r) what each example multiplies A x by, in the type of x.
            pooling: (batch, examples in a row, length) weights to pool x with, or None.
            maps: their number.
            parameters: the W's (out, in), the biases (out,) or None, and the B's (out, r).

        Returns:
            (batch, ..., out) of every map; with `pooling`, then the pooled x, (examples, in).
        """
        weights, biases, bs = parameters[:maps], parameters[maps : 2 * maps], parameters[2 * maps :]
        flat = x.reshape(-1, x.shape[-1])
        read, keep = torch.native_dropout(flat, dropout, True) if dropout > 0 else (flat, None)
        z = a @ read.T
        scaled = (z.view(a.shape[0], v.shape[0], -1) * v.T.unsqueeze(2)).view(z.shape)
        outputs = []
        for weight, bias, b, part in zip(weights, biases, bs, scaled.chunk(maps), strict=True):
            outputs.append(products.outputs(flat, weight, bias, part.T, b).view(*x.shape[:-1], -1))
        ctx.maps, ctx.shape, ctx.dropout, ctx.pools = maps, x.shape, dropout, pooling is not None
        ctx.products, ctx.act = products, None if product is None else product.act
        made_of = (flat, None) if product is None else (product.gate, product.up)
        ctx.save_for_backward(*made_of, keep, a, v, z, pooling, *weights, *bs)
        ctx.set_materialize_grads(False)
        if pooling is not None:
            outputs.append(torch.bmm(pooling, x).flatten(0, 1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """From the outputs (None: one that nobody read) to x, the A's, v and the B's."""
        x, up, keep, a, v, z, pooling, *parameters = ctx.saved_tensors
        weights, bs = parameters[: ctx.maps], parameters[ctx.maps :]
        from_outputs = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads[: ctx.maps]]
        by_example = (a.shape[0], v.shape[0], -1)
        factors = v.T.unsqueeze(2)
        scaled = (z.view(by_example) * factors).view(z.shape)
        to_scaled = torch.empty_like(z)
        to_bs: list[Tensor | None] = []
        for g, b, part, out in zip(from_outputs, bs, scaled.chunk(ctx.maps), to_scaled.chunk(ctx.maps), strict=True):
            if g is None:
                out.zero_()
            else:
                torch.mm(b.T, g.T, out=out)
            to_bs.append(None if g is None else (part @ g).T)
        to_v = (to_scaled * z).view(by_example).sum(2).T
        to_z = to_scaled.view(by_example).mul_(factors).view(z.shape)
        read = x if ctx.act is None else (ctx.act(x) * up).view(-1, ctx.shape[-1])
        to_a = to_z @ (read if keep is None else _kept(read, keep, ctx.dropout))
        to_x = None
        if ctx.needs_input_grad[0]:
            behind = [(g, weight) for g, weight in zip(from_outputs, weights, strict=True) if g is not None]
            if keep is None and behind:
                to_x = ctx.products.inputs(*behind.pop(0), to_z.T, a)
            else:
                to_x = to_z.T @ a if keep is None else _kept(to_z.T @ a, keep, ctx.dropout)
            for g, weight in behind:
                to_x.addmm_(g, weight)
            to_x = to_x.view(ctx.shape)
            from_pooled = grads[ctx.maps] if ctx.pools else None
            if from_pooled is not None:
                to_x.baddbmm_(pooling.mT, from_pooled.view(*pooling.shape[:2], -1))
        return to_x, None, None, None, to_a, to_v, None, None, *[None] * (2 * ctx.maps), *to_bs


class GatedProduct:
    """act(gate) * up of a gated feed-forward network, kept as its two factors alone.

    Written with plain operations, autograd keeps act(gate), and the product a second time for the map that reads it.
    Here both are computed again in the backward pass, where they cost two elementwise operations.
    """

    def __init__(self, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> None:
        """Take (..., width) factors; `act` has no parameters."""
        self.act, self.gate, self.up = act, gate.detach(), up.detach()
        self.value: Tensor = _Product.apply(act, gate, up)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        (to_gate,) = torch.autograd.grad(activated, gate, grads[0] * up)
        return None, to_gate, grads[0] * activated.detach()


def _kept(x: Tensor, keep: Tensor, dropout: float) -> Tensor:
    """What dropout has left of x."""
    return (x * keep).mul_(1 / (1 - dropout))
