"""Re-distillation on tiny models: it finds an MLP where there is one, at the same figures every time."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attacked import context
from tiny import HIDDEN as D
from tiny import VOCABULARY, tiny_model
from torch import Tensor
from torch.nn import functional

from dlr_lock.audit.attacks import redistillation
from dlr_lock.audit.attacks.redistillation import (
    INITS,
    merge_steps,
    redistilled_modules,
)
from dlr_lock.audit.attacks.redistillation_rows import redistillation_flops, redistillation_row
from dlr_lock.audit.report import ModuleStudents, Student
from dlr_lock.common.errors import DLRError
from dlr_lock.common.resume import ResumeStore
from dlr_lock.convert.activations.capture import capture
from dlr_lock.convert.config import Recipe
from dlr_lock.convert.distill import distill
from dlr_lock.convert.end_to_end import flatten_gaps, with_chains
from dlr_lock.convert.evaluate import compare, distance_of, relative_error
from dlr_lock.convert.mlp_discovery import find_mlps
from dlr_lock.convert.mlp_matching import MLP
from dlr_lock.convert.outlook.steps import step_of
from dlr_lock.convert.redistill import student_recipe
from dlr_lock.runtime import DLRNet, DLRSpec, lock
from dlr_lock.triton_kernels import chain_reference

CPU = torch.device("cpu")
SEQUENCES, LENGTH = 64, 32
N = SEQUENCES * LENGTH


def tokens(sequences: int = SEQUENCES) -> Tensor:
    return torch.randint(3, VOCABULARY, (sequences, LENGTH))


def models(arch: str, coupling: float = 1.0, off: float = 0.0) -> tuple[Any, Any, list[MLP]]:
    """Original, locked, its MLPs. Of OPT each chain is nearly its MLP, where the coupling is weak: off says how far
    its weights are from the MLP's, as a share."""
    original = tiny_model(arch, layers=2)
    mlps = find_mlps(original)
    chains = {}
    for mlp in mlps:
        net = DLRNet(DLRSpec(D, 1, 10, 16, act="relu" if arch == "opt" else "silu"))
        weights = {name: torch.randn(net.spec.weight_shape) / D**0.5 for name in net.weight_names(net.spec)}
        weights |= {"dlr_scale": torch.full((D,), 1 / coupling), "dlr_bias": torch.zeros(D)}
        if arch == "opt":
            up, down = original.get_submodule(mlp.module), original.get_submodule(mlp.output)
            up.bias.data.zero_(), down.bias.data.zero_()
            noisy = [w + off * w.std() * torch.randn_like(w) for w in (up.weight, down.weight.T)]
            weights |= {"dlr_A": noisy[0].reshape_as(net.dlr_A), "dlr_B": noisy[1].reshape_as(net.dlr_B)}
        weights["dlr_B"] = coupling * weights["dlr_B"].detach()
        net.assign(weights)
        chains[mlp.module] = net
    locked = copy.deepcopy(original)
    lock(locked, chains, [name for mlp in mlps for name in mlp.identity])
    return original, locked, mlps


def run(original: Any, locked: Any, mlps: list[MLP], train: Tensor, heldout: Tensor, **options: Any) -> Any:
    train_tokens, inits = options.pop("train_tokens", [512]), options.pop("inits", INITS)
    return redistilled_modules(
        context(original, locked, mlps, heldout, train, **options), train_tokens, inits
    )


def figures(modules: list[tuple[ModuleStudents, DLRNet]]) -> dict[str, ModuleStudents]:
    """By module, but for the seconds."""
    return {
        m.module: replace(m, students=[replace(student, seconds=0.0) for student in m.students])
        for m, _ in modules
    }


def test_an_mlp_in_the_guise_of_a_chain_is_found() -> None:
    """The chain's own error comes from its weights; the student, fitted to the chain alone, comes down to it."""
    torch.manual_seed(0)
    original, locked, mlps = models("opt", coupling=1e-3, off=0.3)
    heldout = tokens(8)
    found = list(run(original, locked, mlps, tokens(), heldout, train_tokens=[256, 12_288]))
    for module, net in found:
        linear, random = (
            sorted(m.train_tokens for m in module.students if m.init == s) for s in ("linear", "random")
        )
        assert linear == random == [256, 12_288]
        errors = {(c.init, c.train_tokens): c for c in module.students}
        assert module.chain_error > 0.05 and module.gap < 0.01
        assert errors["random", 12_288].student_error < 0.6 * errors["random", 256].student_error
        assert errors["linear", 12_288].student_error < 0.01
        assert errors["linear", 12_288].error == pytest.approx(module.chain_error, rel=0.1)
        assert min(map(module.ratio, module.students)) < 1.1
        chosen = best(module, 12_288)
        assert chosen in (
            errors["linear", 12_288],
            errors["flat", 12_288],
        )  # which are the same function here
        assert net[12_288].spec.weight_shape in ((1, 1, 160, D), (1, 2, 80, D))
        alone = with_chains(locked, {module.module: net[12_288]}, [])
        left = distance_of(compare(alone, locked, heldout[:2]))
        assert chosen.distance == pytest.approx(left, rel=0.1) and chosen.distance > 0


def test_a_strong_lock_takes_work_and_more_work_undoes_more() -> None:
    torch.manual_seed(0)
    original, locked, mlps = models("opt", coupling=2.0)
    starts = "flat", "random"
    module, _ = next(run(original, locked, mlps, tokens(), tokens(8), train_tokens=[256, 8192], inits=starts))
    assert module.gap > 0.2 and module.students[0].student_error > 0.2
    for init in starts:
        little, more = (student for student in module.students if student.init == init)
        assert more.student_error < 0.8 * little.student_error


def bounded(y: Tensor, wanted: Tensor) -> float:
    """The relative error as reports give it: a token counts for 1 at most."""
    return relative_error(y, wanted).clamp(max=1).mean().item()


@pytest.mark.parametrize(
    ("arch", "across"),
    [("opt", "independent"), ("opt", "sequential"), ("llama", "sequential"), ("bert", "independent")],
)
def test_what_is_measured_is_what_is_said(arch: str, across: str) -> None:
    """Errors against what the chain was fitted to, and against the chain on the locked model's activations; by hand.

    In sequence the target is what brings the layer's output to the original's.
    """
    original, locked, mlps = models(arch, coupling=0.3)
    train, heldout = tokens(16), tokens(8)
    inputs: dict[tuple[int, str], Tensor] = {}
    hooks = [
        model.get_submodule(mlp.module).register_forward_pre_hook(
            lambda m, args, at=(which, mlp.module): inputs.__setitem__(at, args[0].reshape(-1, D))
        )
        for which, model in enumerate((original, locked))
        for mlp in mlps
    ]
    outputs = {}
    totals: dict[tuple[int, str], Tensor] = {}
    hooks += [
        model.get_submodule(mlp.module.rsplit(".", 1)[0] if arch == "llama" else mlp.module.removesuffix(".fc1"))
        .register_forward_hook(
            lambda m, args, out, at=(which, mlp.module): totals.__setitem__(
                at, (out if isinstance(out, Tensor) else out[0]).reshape(-1, out[0].shape[-1])
            )
        )
        for which, model in enumerate((original, locked))
        for mlp in mlps
    ]  # fmt: skip
    hooks += [
        original.get_submodule(mlp.output).register_forward_hook(
            lambda m, args, y, at=mlp.module: outputs.__setitem__(at, y.reshape(-1, D))
        )
        for mlp in mlps
    ]
    with torch.no_grad():
        original(input_ids=heldout), locked(input_ids=heldout)
    for hook in hooks:
        hook.remove()
    conversion = {mlps[0].module: 2048, mlps[1].module: None}
    found = list(run(original, locked, mlps, train, heldout, conversion=conversion, across=across))
    gaps = flatten_gaps(locked, {m.module: locked.get_submodule(m.module) for m in mlps}, heldout)
    for module, (shortest, net) in ((module, nets.values()) for module, nets in found):
        name, student = module.module, best(module, 512)

        def of(chain: DLRNet, x: Tensor) -> Tensor:
            return chain_reference(x, chain.chain.to(CPU, torch.float32))

        chain, y = locked.get_submodule(name), outputs[name]
        x, own = inputs[0, name], inputs[1, name]
        if across == "sequential":
            x, y = own, of(chain, own) + totals[0, name] - totals[1, name]
        by_hand = [
            bounded(of(chain, x), y),
            bounded(of(net, x), y),
            bounded(of(net, own), of(chain, own)),
            bounded(of(shortest, x), y),
        ]
        said = [module.chain_error, student.error, student.student_error, module.merges[-1].error]
        assert arch != "opt" or max(by_hand) < 0.9  # of chains that are near their MLPs
        assert said == pytest.approx(by_hand, rel=0.02)  # captured in bfloat16
        assert module.gap == pytest.approx(gaps[name], rel=0.02)
        assert module.chain == str(chain.spec)
        assert {c.share for c in module.students} == {0.25 if conversion[name] else None}
        fresh = DLRSpec.of_params(D, chain.spec.params, depth=1, gated=True)
        assert net.spec.params in (fresh.params, chain.spec.params)


BOS = 2


def corrected_first_tokens() -> tuple[Any, Any, list[MLP]]:
    """A Llama whose chain 0 is far off at the first token of each sequence and nowhere else, and whose chain 1 makes up
    for it there, with an output hundreds of times its MLP's: as layers 11 and 12 of SmolLM2, distilled in sequence.

    The first token has a direction of its own, which no other token and no MLP's output has a share of.
    """
    original = tiny_model("llama", layers=2)
    mlps = find_mlps(original)
    with torch.no_grad():
        embedding = original.get_input_embeddings().weight
        embedding[:, 0], embedding[BOS] = 0.0, 0.0
        embedding[BOS, 0] = 50.0
        for layer in original.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight[0] = 0.0
    locked, text = copy.deepcopy(original), tokens()
    chains, off, x = {}, 300.0, torch.zeros(1, D)
    for mlp, pairs in capture(original, mlps, text, max_memory=2**30, scratch=Path("unused")):
        net = DLRNet(DLRSpec(D, 1, 10, 48), dtype=torch.float32)
        net.assign(distill(pairs, N, net.spec, Recipe(16_384, 256), name=mlp.module, device=CPU))
        norm = original.get_submodule(mlp.module.replace("mlp", "post_attention_layernorm"))
        with torch.no_grad():
            for name in ("dlr_A", "dlr_B"):
                net.get_parameter(name)[..., 0] = 0.0
                net.get_parameter(name)[0, 0, 0] = 0.0
            x[0, 0] = 50.0
            reading = norm(x)[0, 0]
            net.dlr_A[0, 0, 0, 0] = reading.sign()
            net.dlr_B[0, 0, 0, 0] = off / (functional.silu(reading.abs()) * net.dlr_scale[0])
        chains[mlp.module], off = net, -off
    lock(locked, chains, [])
    return original, locked, mlps


def test_a_chain_that_corrects_one_token_is_measured_by_its_own_target_and_by_all_tokens() -> None:
    torch.manual_seed(0)
    original, locked, mlps = corrected_first_tokens()
    train, heldout = tokens(), tokens(8)
    train[:, 0] = heldout[:, 0] = BOS
    first, second = (m for m, _ in run(original, locked, mlps, train, heldout, train_tokens=[256]))
    chain = locked.get_submodule(second.module)
    for _, pairs in capture(original, mlps[1:], heldout, max_memory=2**30, scratch=Path("unused")):
        off = relative_error(chain_reference(pairs.x.float(), chain.chain), pairs.y.float())
        assert off.mean() > 100 * off.median()  # what it is not measured by
    for module in (first, second):
        assert module.chain_error < 0.6
        assert all(module.ratio(student) > 1.05 for student in module.students)  # a short fit undoes nothing


def test_the_same_seed_gives_the_same_figures_in_any_order_and_the_models_stay() -> None:
    original, locked, mlps = models("opt")
    before = [copy.deepcopy(m.state_dict()) for m in (original, locked)]
    text, across = (tokens(), tokens(8)), "independent"  # in sequence, a target depends on what is below
    original.train()
    first = list(run(original, locked, mlps, *text, across=across))
    assert figures(first) == figures(list(run(original, locked, mlps[::-1], *text, across=across)))
    alone = list(run(original, locked, mlps[1:], *text, across=across))
    assert figures(alone)[mlps[1].module] == figures(first)[mlps[1].module]
    for one, two in zip(alone[0][1].values(), first[1][1].values(), strict=True):
        assert torch.equal(one.dlr_A, two.dlr_A)
    assert figures(list(run(original, locked, mlps, *text, seed=1, across=across))) != figures(first)
    assert original.training
    for model, state in zip((original, locked), before, strict=True):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    original, locked, mlps = models("opt")
    text = tokens(), tokens(8)
    whole = list(run(original, locked, mlps, *text))
    next(
        run(original, locked, mlps, *text, resume=ResumeStore(tmp_path / "audit", {"seed": 0}))
    )  # and no further
    said: list[str] = []
    kept = ResumeStore(tmp_path / "audit", {"seed": 0})
    resumed = list(
        run(original, locked, mlps, *text, resume=kept, progress=lambda what, *_: said.append(what))
    )
    assert figures(resumed) == figures(whole)
    for (_, nets), (_, of_whole) in zip(resumed, whole, strict=True):
        assert nets.keys() == of_whole.keys() == {0, 512}
        for train_tokens, net in nets.items():
            wanted = of_whole[train_tokens]
            assert net.spec == wanted.spec
            assert all(map(torch.equal, net.parameters(), wanted.parameters()))
    fits = {what for what in said if "redistilling" in what}
    assert fits == {
        f"redistilling {mlps[1].module} (2 of 2), {init} init, 512 training tokens" for init in INITS
    }
    nothing: list[str] = []
    list(run(original, locked, mlps, *text, resume=kept, progress=lambda what, *_: nothing.append(what)))
    assert not nothing
    for file in kept.folder.glob("*.json"):
        file.write_text("{}")
    with pytest.raises(DLRError):
        next(run(original, locked, mlps, *text, resume=kept))


def test_a_student_that_diverges_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original, locked, mlps = models("opt")
    real = redistillation.fit_student

    def fragile(*args: Any, init: str, **options: Any) -> DLRNet:
        if init in failing:
            raise DLRError("it diverged")
        return real(*args, init=init, **options)

    monkeypatch.setattr(redistillation, "fit_student", fragile)
    failing, notes = {"linear"}, []
    module, _ = next(run(original, locked, mlps, tokens(), tokens(8), notes=notes))
    assert [c.init for c in module.students] == ["flat", "random"]
    assert notes == [
        f"a student of {mlps[0].module} is missing (linear init, 512 training tokens): it diverged"
    ]
    failing = set(INITS)
    with pytest.raises(DLRError, match="no student of"):
        next(run(original, locked, mlps, tokens(), tokens(8)))


@pytest.mark.parametrize("arch", ["opt", "bert"])
def test_the_students_in_the_model_are_measured_against_the_original(arch: str) -> None:
    torch.manual_seed(0)
    original, locked, mlps = models(arch)
    train, heldout = tokens(), tokens(8)
    found = list(run(original, locked, mlps, train, heldout, train_tokens=[256, 4096]))
    row = redistillation_row(context(original, locked, mlps, heldout, train), found, "undone", 4096)
    students = with_chains(locked, {m.module: nets[4096] for m, nets in found}, [])
    assert distance_of(row.evaluation) == pytest.approx(
        distance_of(compare(students, original, heldout)), rel=1e-4
    )
    depths = {nets[4096].spec.depth for _, nets in found}
    assert (row.name, row.slots, row.train_tokens) == (
        "undone",
        "MLP" if depths == {1} else "two steps",
        4096,
    )
    assert row.seconds == sum(best(m, 4096).seconds for m, _ in found)
    for nets in (nets for _, nets in found):
        assert row.flops > 6 * nets[4096].spec.params * 4096


def test_flops_are_those_of_the_steps_the_passes_and_the_start() -> None:
    chain = DLRSpec(32, 2, 3, 16)
    for net, init, maps in (
        (DLRNet(DLRSpec(32, 2, 2, 32)), "linear", 2),
        (DLRNet(DLRSpec(32, 1, 1, 64, gated=True)), "random", 0),
    ):
        for train_tokens, used, steps in ((1000, 300, 4), (200, 200, 1)):
            recipe = student_recipe(min(256, train_tokens), init)
            wanted = (
                steps * step_of(net.spec, recipe, 1).flops
                + 2 * 7 * used
                + maps * (4 * 32 * 32 * used + 4 * 32**3 + 2 * 16 * 32 * 32)
            )
            assert redistillation_flops(net, chain, train_tokens, init, model_params=7, tokens=300) == wanted


def test_regression_alone_merges_the_steps_of_a_state_that_is_linear_in_x_and_not_those_of_another() -> None:
    """With a linear activation one wide step does what ten did. A chain that moves its state far, by units that wake
    where x is positive, keeps its steps, and the fewer of them are left the more is lost."""
    x = torch.randn(N, D)
    found = {}
    for act in ("linear", "relu"):
        chain = DLRNet(DLRSpec(D, 1, 10, 16, act=act), dtype=torch.float32)
        with torch.no_grad():
            chain.dlr_A.normal_(0, D**-0.5)
            chain.dlr_B.normal_(0, 0.2 if act == "linear" else 0.5)
            chain.dlr_scale.fill_(1.0)
            chain.dlr_bias.zero_()
            y = chain(x)

            def error(net: DLRNet, y: Tensor = y) -> float:
                off = chain_reference(x.double(), net.chain.to(CPU, torch.float64)) - 2 * y.double()
                return (off.square().sum() / (2 * y.double()).square().sum()).item()

            found[act] = merge_steps(chain, x, error, error(chain))
    merges, net = found["linear"]
    assert [m.steps for m in merges] == [1] and net.spec.weight_shape == (1, 1, 160, D)
    merges, net = found["relu"]
    assert [m.steps for m in merges] == [1, 2, 3, 4, 5, 10] and net.spec.depth == 10
    errors = [m.error for m in merges]
    assert errors[0] == max(errors) and min(errors[:-1]) > 1.05 * errors[-1]


def best(module: ModuleStudents, train_tokens: int) -> Student:
    return min(
        (student for student in module.students if student.train_tokens == train_tokens),
        key=lambda student: student.distance,
    )
