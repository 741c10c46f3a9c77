"""The fine-grained mixture of experts that takes the place of a block's MLP.

    y_t = shared(x_t) + sum over the k experts e with the largest router logits: softmax(these k logits)_e expert_e(x_t)

Top-k, then softmax over the chosen. Softmax over all, top-k, then dividing by the sum of the chosen is the same thing
(Qwen2-MoE and Qwen3-MoE with norm_topk_prob); without the division (norm_topk_prob false) the weights sum to less than
1. No token is dropped, an expert may have none, and the result does not depend on which other tokens are in the batch.

    reference:  loop_experts        one expert after the other, 15 lines
    real path:  _GroupedExperts     tokens sorted by expert, one grouped matrix product per projection, no waiting for
                                    the device, sums in a fixed order, so that gradients repeat bitwise
    many ranks: Experts.dispatch    each rank keeps E / ep experts; token copies travel to them and back (all-to-all)

References: Innovator (arXiv:2507.18671, sections 4.3 and 4.4), Switch Transformers (arXiv:2101.03961, balance loss),
ST-MoE (arXiv:2202.08906, z-loss), Transformers' Qwen2-MoE and Qwen3-MoE.

Departures
1. Router logits are fp32 products of the layer's own (bf16) inputs and weights; Transformers rounds them to bf16.
2. The balance loss is that of one micro-batch, and every layer's counts in full (Megatron-LM's default), not the mean
   over layers (Transformers).

Routing replay (R3, arXiv:2510.11370; R2 in GSPO, arXiv:2507.18071): reinforcement learning can hand in the experts that
the engine or the old policy chose, see choose_experts.

Letters: T tokens, D width, E experts, k chosen a token, n expert width, N = T k token copies in the order of their
experts, S disciplines that own experts.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor


class _RouterLogits(torch.autograd.Function):
    """x W^T in fp32 that keeps x as it is for the backward pass, not its fp32 copy."""
    @staticmethod
    def forward(ctx, x_TD, w_ED):
        ctx.save_for_backward(x_TD, w_ED)
        return x_TD.float() @ w_ED.float().T

    @staticmethod
    def backward(ctx, g_TE):
        x_TD, w_ED = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        return ((g_TE @ w_ED.float()).to(x_TD.dtype) if need_x else None,
                (g_TE.T @ x_TD.float()).to(w_ED.dtype) if need_w else None)


def choose_experts(logits_TE: torch.Tensor, k: int, normalise: bool, given_Tk=None):
    """Weights [T, k] (fp32) and numbers [T, k] of the experts that a token goes to, and those with the k largest
    logits. They are the same but for routing replay: `given` names the experts (a row of -1: the largest logits), and
    the weights are the softmax of the live logits at these places, so that the router still learns."""
    top_Tk, best_Tk = logits_TE.topk(k, dim=-1)
    experts_Tk = best_Tk
    if given_Tk is not None:
        experts_Tk = torch.where(given_Tk < 0, best_Tk, given_Tk.long())
        top_Tk = logits_TE.gather(1, experts_Tk)
    whole = top_Tk if normalise else logits_TE
    return (top_Tk - whole.logsumexp(-1, keepdim=True)).exp(), experts_Tk, best_Tk


# ---- experts --------------------------------------------------------------------------------------------------------
def loop_experts(x_TD, gate_up_EFD, down_EDn, weights_Tk, experts_Tk):
    """The reference: every expert on its own tokens, one after the other. gate_up [E, 2n, D], down [E, D, n]."""
    out_TD = torch.zeros_like(x_TD)
    for e in range(gate_up_EFD.shape[0]):
        t, j = (experts_Tk == e).nonzero(as_tuple=True)  # its tokens, and the place it has among their k
        gate, up = F.linear(x_TD[t], gate_up_EFD[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_EDn[e])
        out_TD = out_TD.index_add(0, t, y * weights_Tk[t, j, None].to(y.dtype))
    return out_TD


class _GroupedExperts(torch.autograd.Function):
    """The same as loop_experts. Kept for the backward pass: x [T, D], the gate/up product h [N, 2n], indices, weights.
    The expert outputs are neither kept nor made again: d weight = <g, y> = <down^T g, a>, where a = silu(gate) up."""
    @staticmethod
    def forward(ctx, x_TD, gate_up_EFD, down_EDn, weights_Tk, experts_Tk):
        k = experts_Tk.shape[1]
        sorted_N, order_N = experts_Tk.flatten().sort(stable=True)  # copy t k + j of token t, by expert
        ends_E = torch.searchsorted(sorted_N, torch.arange(gate_up_EFD.shape[0], device=x_TD.device), right=True).int()
        h_NF = F.grouped_mm(x_TD[order_N // k], gate_up_EFD.transpose(1, 2), offs=ends_E)
        gate, up = h_NF.chunk(2, dim=-1)
        y_ND = F.grouped_mm(F.silu(gate) * up, down_EDn.transpose(1, 2), offs=ends_E)
        y_TkD = y_ND[order_N.argsort()].unflatten(0, (-1, k))
        ctx.save_for_backward(x_TD, gate_up_EFD, down_EDn, weights_Tk, order_N, ends_E, h_NF)
        return (y_TkD * weights_Tk[..., None].to(y_TkD.dtype)).sum(1)

    @staticmethod
    def backward(ctx, g_TD):
        x_TD, gate_up_EFD, down_EDn, weights_Tk, order_N, ends_E, h_NF = ctx.saved_tensors
        need_x, need_gate_up, need_down, need_weights, _ = ctx.needs_input_grad
        k = weights_Tk.shape[1]
        tokens_N, inverse_N = order_N // k, order_N.argsort()
        g_ND, w_N1 = g_TD[tokens_N], weights_Tk.flatten()[order_N, None].to(g_TD.dtype)
        gate, up = h_NF.chunk(2, dim=-1)
        silu = F.silu(gate)
        a_Nn = silu * up
        da_Nn = F.grouped_mm(g_ND, down_EDn, offs=ends_E)  # before the routing weight
        dx = d_gate_up = d_down = d_weights = None
        if need_weights:
            d_weights = (a_Nn * da_Nn).sum(-1, dtype=torch.float32)[inverse_N].view_as(weights_Tk)
        if need_down:
            d_down = F.grouped_mm(g_ND.T, a_Nn * w_N1, offs=ends_E)
        if need_x or need_gate_up:
            da_Nn = da_Nn * w_N1
            dh_NF = torch.cat([torch.ops.aten.silu_backward(da_Nn * up, gate), da_Nn * silu], dim=-1)
            if need_gate_up:
                d_gate_up = F.grouped_mm(dh_NF.T, x_TD[tokens_N], offs=ends_E)
            if need_x:
                dx = F.grouped_mm(dh_NF, gate_up_EFD, offs=ends_E)[inverse_N].unflatten(0, (-1, k)).sum(1)
        return dx, d_gate_up, d_down, d_weights, None


class _AllToAll(torch.autograd.Function):
    """Rows of x go to the ranks of `group`, send[r] of them to rank r; receive[r] come from it."""
    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.back = (receive, send, group)
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, g):
        return _AllToAll.apply(g, *ctx.back), None, None, None


class Experts(nn.Module):
    """E SwiGLU experts of width n, stacked; checkpoints hold them one by one (model.pieces). `group`: the ranks that
    share the experts (expert parallelism, set by common.shard), each holding E / ep neighbours."""
    def __init__(self, E: int, D: int, n: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * n, D))  # rows 0..n-1 gate, n..2n-1 up
        self.down_proj = nn.Parameter(torch.empty(E, D, n))
        self.group = None

    def forward(self, x_TD, weights_Tk, experts_Tk):
        gate_up, down = (p.to_local() if isinstance(p, DTensor) else p for p in (self.gate_up_proj, self.down_proj))
        if self.group is None:
            # NOTE tracing torch 2.13's grouped product is bf16 only, running it is not: in fp32 it stays out of graphs
            run = _GroupedExperts.apply
            run = run if x_TD.dtype == torch.bfloat16 else torch.compiler.disable(run)
            return run(x_TD, gate_up, down, weights_Tk, experts_Tk)
        return self.dispatch(x_TD, gate_up, down, weights_Tk, experts_Tk)

    @torch.compiler.disable
    def dispatch(self, x_TD, gate_up, down, weights_Tk, experts_Tk):
        """Token copies with their weights go to the ranks of their experts, which send weighted outputs back.
        NOTE the one place that waits for the device: all-to-all needs the numbers of rows on the host."""
        k, ep = experts_Tk.shape[1], self.group.size()
        sorted_N, order_N = experts_Tk.flatten().sort(stable=True)
        local = gate_up.shape[0]
        edges = torch.arange(local * ep, device=x_TD.device)
        counts_re = torch.searchsorted(sorted_N, edges, right=True).diff(prepend=edges.new_zeros(1)).view(ep, local)
        theirs_re = torch.empty_like(counts_re)  # row r: how many copies for each of my experts come from rank r
        dist.all_to_all_single(theirs_re, counts_re, group=self.group)
        send, receive = torch.stack([counts_re.sum(1), theirs_re.sum(1)]).tolist()
        x_RD = _AllToAll.apply(x_TD[order_N // k], send, receive, self.group)
        w_R = _AllToAll.apply(weights_Tk.flatten()[order_N], send, receive, self.group)
        mine_R = torch.arange(local, device=x_TD.device).repeat(ep).repeat_interleave(theirs_re.flatten())
        if not len(x_RD):  # no token for this rank: one row of weight 0 keeps the products and gradients defined
            x_RD, w_R, mine_R = (torch.cat([v, v.new_zeros(1, *v.shape[1:])]) for v in (x_RD, w_R, mine_R))
        y_RD = _GroupedExperts.apply(x_RD, gate_up, down, w_R[:, None], mine_R[:, None])[:sum(receive)]
        y_ND = _AllToAll.apply(y_RD, receive, send, self.group)
        return y_ND[order_N.argsort()].unflatten(0, (-1, k)).sum(1)


# ---- losses and load ------------------------------------------------------------------------------------------------
def owners(E: int, S: int, device=None) -> torch.Tensor:
    """The discipline of every expert [E]: the first E / S experts are the first discipline's, and so on."""
    return torch.arange(E, device=device) // (E // S) if S else torch.full((E,), -1, device=device)


def routing_losses(logits_TE, experts_Tk, labels_T, S: int, kind: str):
    """Losses [3] (fp32, differentiable) and counts [S + 1, E] (choices by label and expert) of one micro-batch.

    labels: the discipline of each token, 0..S-1; S: another or none; S + 1: padding, which counts nowhere.
    R = tokens that are not padding, L = those with a label below S:
      balance = E sum_e f_e p_e,  f_e = choices of e / (R k),  p_e = mean over R of softmax(logits)_e; 1 when uniform
      z       = mean over R of logsumexp(logits)^2
      label   = bce: mean over L and over all E of the binary cross-entropy of sigmoid(logit_e) with "e is the label's"
                ce:  mean over L of the cross-entropy of softmax(logits) with the uniform mix of the label's experts
    A step's loss adds, per micro-batch, coefficient x loss summed over layers x (its R / the step's R).
    """
    E, k = logits_TE.shape[1], experts_Tk.shape[1]
    real_T, own_T = (labels_T <= S).float(), (labels_T < S).float()
    R, L = real_T.sum().clamp(min=1), own_T.sum().clamp(min=1)
    cells = (labels_T[:, None] * E + experts_Tk).flatten()
    counts_GE = torch.zeros((S + 2) * E, dtype=torch.int64, device=cells.device).scatter_add_(
        0, cells, torch.ones_like(cells)).view(S + 2, E)[:-1]
    f_E = counts_GE.sum(0) / (R * k)
    p_E = (logits_TE.softmax(-1) * real_T[:, None]).sum(0) / R
    z = (logits_TE.logsumexp(-1).square() * real_T).sum() / R
    target_TE = (owners(E, S, logits_TE.device) == labels_T[:, None]).float()
    if kind == "bce":
        label_T = F.binary_cross_entropy_with_logits(logits_TE, target_TE, reduction="none").mean(-1)
    else:
        label_T = -(logits_TE.log_softmax(-1) * target_TE).sum(-1) / target_TE.sum(-1).clamp(min=1)
    return torch.stack([E * (f_E * p_E).sum(), z, (label_T * own_T).sum() / L]), counts_GE


def load_statistics(counts_LGE: torch.Tensor, names: list[str]) -> dict:
    """Counts [layers, S + 1, E] -> load_max: the largest load of an expert over the mean, in the worst layer;
    load_entropy: mean over layers, 1 when uniform; share: of the choices of each discipline's tokens (and of the
    others'), the part that went to each discipline's experts."""
    p_LE = F.normalize(counts_LGE.sum(1).double(), p=1, dim=1)
    E, S, counts_GE = p_LE.shape[1], len(names), counts_LGE.sum(0).double()
    entropy_L = -torch.special.xlogy(p_LE, p_LE).sum(1) / math.log(max(E, 2))
    share = {}
    if S:
        share_GS = F.normalize(counts_GE.unflatten(1, (S, E // S)).sum(2), p=1, dim=1)
        share = {name: [round(x, 4) for x in row]
                 for name, row in zip([*names, "other"], share_GS.tolist()) if any(row)}
    return {"load_max": float(p_LE.max()) * E, "load_entropy": float(entropy_L.mean()), "share": share}


# ---- the layer ------------------------------------------------------------------------------------------------------
class MoE(nn.Module):
    """Router, experts and shared expert of one block, sized by model.ModelConfig. `shared`: a module that maps [T, D]
    to [T, D], or None. router_only: the router learns from its own losses alone (stage route); the output then carries
    no gradient, so that nothing but router inputs is kept for the backward pass."""
    def __init__(self, c, shared: nn.Module | None):
        super().__init__()
        self.k, self.normalise = c.num_experts_per_tok, c.norm_topk_prob
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.experts = Experts(c.num_experts, c.hidden_size, c.moe_intermediate_size)
        self.shared_expert = shared
        self.shared_expert_gate = nn.Linear(c.hidden_size, 1, bias=False) if c.shared_expert_gate else None
        self.S, self.router_only, self.label_loss = len(c.expert_groups), False, "bce"

    def forward(self, x_TD, labels_T=None, given_Tk=None):
        """-> [T, D] and, with labels, what routing_losses returns and the k best experts of every token (else None).
        given: replayed experts (choose_experts)."""
        logits_TE = _RouterLogits.apply(x_TD, self.gate.weight)
        weights_Tk, experts_Tk, best_Tk = choose_experts(logits_TE, self.k, self.normalise, given_Tk)
        report = None if labels_T is None else (
            *routing_losses(logits_TE, experts_Tk, labels_T, self.S, self.label_loss), best_Tk.to(torch.int16))
        if self.router_only:
            weights_Tk = weights_Tk.detach()
        y_TD = self.experts(x_TD, weights_Tk, experts_Tk)
        if self.shared_expert is not None:
            s_TD = self.shared_expert(x_TD)
            y_TD = y_TD + (s_TD if self.shared_expert_gate is None else s_TD * self.shared_expert_gate(x_TD).sigmoid())
        return y_TD, report
