"""Redistillation, the strongest attack known to us: a chain is fitted back into an MLP of its size, or nearly.

The attacker distils the chain into a student, on text, from one of three initialisations:

    linear   two wide steps, of the chain's first half and its second. Each step's reading directions are brought back
             to where its half begins: with z that state, u_k the movement from there to step k, u_k is nearly z J_k for
             the best linear J_k, so a unit that reads (z + u_k) A reads about z (1 + J_k) A. On a default chain such a
             student keeps fewer activations in training than the MLP itself (0.86 of them by plain autograd)
    flat     the chain flattened, one step of rank L K r: every step reads x
    random   a fresh SwiGLU MLP with as many parameters, which takes nothing from the chain but its outputs
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..common.errors import DLRError
from ..common.micro_batch import MicroBatch
from ..common.progress import Count, no_count
from ..common.splits import random_rows
from ..reporting.lock_verdict import Redistillation
from ..runtime import DLRNet, DLRSpec
from ..triton_kernels import chain_reference, lane_updates
from .activations.pairs import Activations
from .config import Recipe
from .context import Context
from .distill import distill
from .evaluate import measure
from .report import ModuleReport

FIT_TOKENS = 40_000  # tokens for the linear maps J_k
BATCH = 256  # smaller ones undo more: 128 undid a small chain at 0.05 of its training tokens that 512 did not
# Muon's rate by initialisation. Of layer 12 of SmolLM2 at 1/4 of the training tokens the student's error over the
# chain's is 1.21 at 0.012, 1.28 at 0.03, 1.19 at 0.06 from the flat start; 1.88, 1.77 and 1.94 from a random one.
# Of two wide steps 1.093 at 0.012, 1.066 at 0.004, 1.069 at 0.002, at 1/16; one wide step has 1.161 at its best rate.
_RATES = {"linear": 0.004, "flat": 0.06, "random": 0.03}
INITS = tuple(_RATES)  # none is always the best: which is depends on the chain and on the tokens
_ROWS = 8192  # tokens at a time, where the chain is run


def attack_module(
    context: Context, net: DLRNet, report: ModuleReport, pairs: Activations, progress: Count
) -> Redistillation:
    """The attack on a module's chain, for the share of its conversion's training tokens that the configuration says.

    pairs, errors: as for `redistill`.
    """
    assert context.config.redistill
    return redistill(
        copy.deepcopy(net).float(),
        pairs,
        context.train_rows,
        train_tokens=attack_tokens(context.config.redistill, report.train_tokens),
        conversion=report.train_tokens,
        name=report.module,
        device=context.device,
        seed=context.config.seed + report.layer,
        progress=progress,
        micro=context.micro_batch("the attack on modules", "token"),
    )


def attack_tokens(share: float, conversion: int) -> int:
    """The attacker's training tokens: a share of the conversion's of a module, and at least one."""
    return max(1, round(share * conversion))


def redistill(
    net: DLRNet,
    activations: Activations,
    tokens: int,
    *,
    train_tokens: int,
    conversion: int,
    name: str,
    device: torch.device,
    inits: Sequence[str] = INITS,
    seed: int = 0,
    progress: Count = no_count,
    micro: MicroBatch | None = None,
) -> Redistillation:
    """Distils a chain back, from each initialisation, and measures the students, the best one against the chain, too.

    The best is that of the lowest error against what the chain should give. The linear start is measured before it is
    trained: it is the chain's steps merged by regression alone.

    Args:
        net: The chain.
        activations: What the chain was fitted to: x, and the y that it should give, [N, d] each, or a process's share.
        tokens: How many of the rows of all, from the first, are the attacker's text.
        train_tokens: The attacker's training tokens for each student.
        conversion: Those that the chain cost.
        name, device, seed, progress, micro: As for `fit_student`.
        inits: The initialisations.

    Raises:
        DLRError: As `fit_student` does, where no student comes about.
    """
    outputs = activations.like_y()
    micro = micro or MicroBatch(f"the attack on {name}", "token")
    _run(net, activations.x, device, outputs, micro)
    given = activations
    own = Activations(given.x, outputs, given.first, given.mapped, given.scratch)
    own.share = given.share
    held, ranks = given.share.held(tokens, len(given)), given.share.ranks

    def error_of(one: DLRNet, wanted: Activations = given) -> float:
        return measure(one, *wanted.rows(held), device, ranks=ranks, micro=micro).rel_error

    errors: dict[str, float] = {}
    merged_error: float | None = None
    best: DLRNet | None = None  # one student at a time beside it: they are as large as the chain
    for number, init in enumerate(inits):
        start = starting_point(net, own, tokens, init, seed=seed, device=device)
        if start is not None and init == "linear":
            merged_error = error_of(start)
        try:
            student = fit_student(
                net,
                own,
                tokens,
                train_tokens=train_tokens,
                init=init,
                seed=seed,
                name=name,
                device=device,
                start=start,
                progress=partial(_in_turn, progress, number, len(inits)),
                micro=micro,
            )
        except DLRError:
            if number + 1 == len(inits) and best is None:
                raise
            continue
        errors[init] = error_of(student)
        if errors[init] == min(errors.values()):
            best = student
        del start, student
    assert best is not None
    init = min(errors, key=lambda name: errors[name])
    return Redistillation(
        train_tokens, conversion, errors[init], error_of(net), error_of(best, own), init, errors, merged_error
    )


def _in_turn(progress: Count, number: int, count: int, done: int, total: int) -> None:
    """The progress of fit `number` of `count` as part of all of them, which are equally long."""
    progress(number * total + done, count * total)


def fit_student(
    net: DLRNet,
    activations: Activations,
    tokens: int,
    *,
    train_tokens: int,
    init: str,
    seed: int,
    name: str,
    device: torch.device,
    start: DLRNet | None = None,
    progress: Count = no_count,
    note: Callable[[str], object] = lambda sentence: None,
    micro: MicroBatch | None = None,
) -> DLRNet:
    """A student of a chain's size, distilled from it: float32, on the CPU. The chain is left as it is.

    Args:
        net: The chain.
        activations: x and y = net(x), [N, d] each.
        tokens: How many of the rows, from the first, are the attacker's text.
        train_tokens: The attacker's training tokens.
        init: One of INITS, see above.
        seed: Of the draws.
        name: The module's, for errors.
        device: Where it is fitted.
        start: What `starting_point` gives for it, where that is known already.
        progress, note, micro: As for `distill`.

    Raises:
        DLRError: On another initialisation, and as `distill` does.
    """
    start = start or starting_point(net, activations, tokens, init, seed=seed, device=device)
    if start is None:
        spec = DLRSpec.of_params(net.spec.hidden_size, net.spec.params, depth=1, act="silu", gated=True)
    else:
        spec = start.spec
    recipe = student_recipe(train_tokens, init, seed)
    tensors = distill(
        activations,
        tokens,
        spec,
        recipe,
        name=f"the student of {name}",
        device=device,
        init=None if start is None else start.state_dict(),
        progress=progress,
        note=note,
        micro=micro,
    )
    student = DLRNet(spec, dtype=torch.float32)
    student.assign(tensors)
    return student


def starting_point(
    net: DLRNet, activations: Activations, tokens: int, init: str, *, seed: int, device: torch.device
) -> DLRNet | None:
    """What a student is before it is trained, in float32; None where it knows nothing of the chain.

    Args:
        net, activations, tokens, init, seed: As for `fit_student`.
        device: Where the regression of the linear start is done.

    Raises:
        DLRError: On another initialisation.
    """
    if init not in INITS:
        raise DLRError(f"unknown init {init!r}; one of {', '.join(INITS)}")
    if init == "random":
        return None
    if init == "flat":
        return flattened(net)
    half = half_of(net.spec)
    x, _ = activations.share.sample(activations.rows, random_rows(tokens, FIT_TOKENS, seed))
    try:
        reads = linear_reads(net, x.to(device, torch.float32), half)
    except torch.OutOfMemoryError:  # it takes all its tokens at once; one regression the CPU does, too
        reads = linear_reads(net, x.float().cpu(), half)
    return merged(net, half, reads)


def student_recipe(train_tokens: int, init: str, seed: int = 0) -> Recipe:
    """How a student is fitted, for so many training tokens from one of `INITS`."""
    batch = min(BATCH, train_tokens)
    return Recipe(train_tokens, batch, "random", seed, rate=_RATES[init], scale=1.0, lr_multiplier_b=1.0)


def half_of(chain: DLRSpec) -> int:
    """Steps of a chain that the linear start makes into one: it has two, or one of a chain of one."""
    return -(-chain.depth // 2)


def flattened(net: DLRNet) -> DLRNet:
    """The MLP that a chain is when every step reads x: one step of rank L K r, in float32, on the chain's device."""
    spec = net.spec
    flat = DLRNet(
        DLRSpec(spec.hidden_size, 1, 1, spec.lanes * spec.depth * spec.rank, spec.act, spec.gated),
        dtype=torch.float32,
        device=net.dlr_A.device,
    )
    tensors = dict(net.named_parameters())
    flat.assign({name: tensors[name].reshape(p.shape) for name, p in flat.named_parameters()})
    return flat


def merged(net: DLRNet, group: int, reads: dict[str, Tensor] | None = None) -> DLRNet:
    """The chain of fewer, wider steps: `group` consecutive ones of a lane read the state that the first of them reads.

    Args:
        net: The chain, L x K x r.
        group: How many; more than K count as K.
        reads: What its steps read with instead of their A (and G), [L, K, r, d] each, as `linear_reads` gives them for
            the same group.

    Returns:
        A chain of L x ceil(K / group) x (group r), in float32, on the chain's device. A last group of fewer steps is
        filled up with units of zero weights, which add nothing.
    """
    lanes, depth, rank, hidden = net.spec.weight_shape
    group = min(group, depth)
    steps = -(-depth // group)
    spec = replace(net.spec, depth=steps, rank=group * rank)
    wide = DLRNet(spec, dtype=torch.float32, device=net.dlr_A.device)
    tensors = {name: tensor.detach() for name, tensor in net.named_parameters()} | (reads or {})
    for name in net.weight_names(net.spec):
        filled = tensors[name].new_zeros(lanes, steps * group, rank, hidden)
        filled[:, :depth] = tensors[name]
        tensors[name] = filled.view(spec.weight_shape)
    wide.assign(tensors)
    return wide


@torch.no_grad()
def linear_reads(net: DLRNet, x: Tensor, group: int | None = None) -> dict[str, Tensor]:
    """A and G of every step, brought back to what the first step of its group reads: A (1 + J_k)^T with J_k [d, d] the
    best linear map of that state z to the movement u_k from there to step k.

    Least squares in which a token's u_k counts by its direction, whatever its size. Unweighted, a chain hides its map
    behind few tokens: one fitted to move those far and out of line took the student's error at 1/4 of the training
    tokens from 1.08 to 1.41 of the chain's, and this weight takes it back to 1.08 (docs/experiments/lock-strength.md).

    Args:
        net: The chain.
        x: [N, d] float32, tokens to fit J_k on. 17 d tokens leave 3% more of the student's error than 140 d.
        group: Steps of a group; None for all of a lane, which brings them back to x.

    Returns:
        By name, [L, K, r, d] each, in float32 on x's device.
    """
    chain = net.chain.to(x.device, torch.float32)
    readers = {"dlr_A": chain.A} if chain.G is None else {"dlr_A": chain.A, "dlr_G": chain.G}
    reads = {name: w.clone() for name, w in readers.items()}
    every = group or net.spec.depth
    begin = x.expand(net.spec.lanes, -1, -1)  # the states that the group at hand begins with

    def bring_back(k: int, z: Tensor, _: object) -> None:
        nonlocal begin
        if k % every == 0:
            begin = z.clone()
            return
        for lane, (start, state) in enumerate(zip(begin, z, strict=True)):
            jacobian = _linear_map(start, state - start)
            for w in reads.values():
                w[lane, k] += w[lane, k] @ jacobian.T

    lane_updates(x, chain, bring_back)
    return reads


def regression_flops(chain: DLRSpec, tokens: int, group: int) -> int:
    """FLOPs of the least squares of `linear_reads` on so many tokens of text.

    For every step but the first of a group they are those of a covariance of the group's state, one of it and the
    movement, the inverse of the first and its product with the second, and the step's reads brought back.
    """
    d, used = chain.hidden_size, min(tokens, FIT_TOKENS)
    maps = chain.lanes * (chain.depth - -(-chain.depth // group))
    return maps * (4 * used * d * d + 4 * d**3 + 2 * chain.rank * d * d)


def _linear_map(z: Tensor, u: Tensor) -> Tensor:
    """[d, d], the best linear map of z to u [N, d], u = z J, see `linear_reads`."""
    size = u.norm(dim=1, keepdim=True)
    weight = 1 / size.clamp(min=1e-6 * size.mean() + 1e-30)
    wz = z * weight
    covariance = (wz.T @ wz).double()
    covariance.diagonal().add_(1e-4 * covariance.diagonal().mean())
    return torch.linalg.inv(covariance).float() @ (wz.T @ (u * weight))


@torch.no_grad()
def _run(net: DLRNet, x: Tensor, device: torch.device, y: Tensor, micro: MicroBatch) -> None:
    """y [N, d] becomes what the chain gives for x [N, d]."""
    chain = net.chain.to(device, torch.float32)

    def some(rows: slice) -> None:
        y[rows] = chain_reference(x[rows].to(device, torch.float32), chain)

    micro.each(some, len(x), _ROWS)
